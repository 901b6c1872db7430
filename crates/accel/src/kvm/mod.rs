//! The KVM accelerator: guests run on the processor through `/dev/kvm`.
//!
//! | file | what |
//! | --- | --- |
//! | `accel.rs` | opening the device, [`KvmAccel`] |
//! | `probe.rs` | is KVM there, permitted, and real hardware virtualization |
//! | `vm.rs` | the virtual machine; `slots.rs` its memory, `chips.rs` the state of its interrupt controllers |
//! | `irq.rs`, `doorbell.rs` | lines, messages and their routing; ioeventfd and irqfd |
//! | `vcpu.rs` | the run loop; `run.rs` the page shared with the kernel, `kick.rs` getting out of it |
//! | `state.rs`, `msrs.rs` | architectural state to and from the kernel |
//! | `cpuid.rs` | what guests may be promised |
//! | `dump.rs`, `stats.rs` | what to say when a vCPU cannot go on, and exit counters |
//! | `sys.rs` | ioctls that `kvm-ioctls` does not offer in the needed shape |
//!
//! References are to the kernel's `Documentation/virt/kvm/api.rst` where nothing else is named.

mod accel;
mod chips;
mod cpuid;
mod doorbell;
mod dump;
mod irq;
mod kick;
mod msrs;
mod probe;
mod run;
mod slots;
mod state;
mod stats;
mod sys;
mod vcpu;
mod vm;

pub use accel::KvmAccel;
pub use probe::{Probe, probe};
pub use vm::{RESERVED_END, RESERVED_START};

use crate::Error;
use std::io;

/// Wraps the failure of an ioctl, with what was attempted.
fn host(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |e| Error::Host { what: what.into(), source: io::Error::from_raw_os_error(e.errno()) }
}

/// Wraps a refusal to take a part of a saved state.
fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |e| Error::BadState(format!("KVM refuses the {what}: {}", io::Error::from_raw_os_error(e.errno())))
}
