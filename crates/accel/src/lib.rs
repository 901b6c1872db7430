//! What executes a guest: the traits that every accelerator implements, and KVM.
//!
//! The other accelerator, the software CPU, is the crate `softcpu`.

pub mod cpuid;
mod exit;
mod irq;
pub mod kvm;
mod signals;
pub mod state;
mod vm;

pub use cpuid::{Cpuid, CpuidEntry};
pub use exit::{DebugExit, Exit, SystemEvent};
pub use irq::{Doorbells, IoAddress, IrqFd, Irqs, LocalApic, MsrFault};
pub use signals::{CpuSignals, Signal};
pub use state::CpuState;
pub use vm::{
    Accel, BreakKind, CpuIo, GuestDebug, HardwareBreak, Kicker, Slot, SlotId, Vcpu, VcpuConfig, Vm,
};

/// What an accelerator could not do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The accelerator is not usable on this host; the text says why and what to do.
    #[error("{0}")]
    Unavailable(String),
    /// A system call or ioctl failed.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: String,
        /// The host's reason.
        source: std::io::Error,
    },
    /// A request that this accelerator cannot serve; the text names it.
    #[error("{0}")]
    Unsupported(String),
    /// A saved state that does not fit.
    #[error("cannot load CPU state: {0}")]
    BadState(String),
}

/// Result of accelerator operations.
pub type Result<T> = std::result::Result<T, Error>;
