//! An x86-64 processor in software, for x86-64 hosts.
//!
//! * `state`: registers, flags, segment caches, control and model-specific registers ([`Cpu`]).
//! * `mmu`: segmentation, paging, TLBs, guest memory, device registers.
//! * `decode`, `block`: guest code as blocks of [`op::Op`]s, cached by the host address of the code.
//! * `interp`: what operations do, one file per instruction family. The reference for everything else.
//! * `native`, `fpu`: x87, MMX, SSE, AVX and the like, executed by the host's own units.
//! * `exception`, `interrupt`, `task`: delivery of events in every mode.
//! * `exec`, `vcpu`, `vm`: the run loop and the accelerator's traits.

mod accelerator;
pub mod alu;
pub mod block;
pub mod clock;
pub mod cpuid;
mod debug;
pub mod decode;
mod exception;
mod exec;
pub mod fault;
pub mod flags;
pub mod fpu;
mod interp;
pub mod mmu;
pub mod msr;
pub mod native;
pub mod op;
mod segments;
pub mod state;
mod stats;
mod system;
mod task;
#[cfg(test)]
mod tests;
pub mod translate;
mod vcpu;
pub mod vm;

pub use accelerator::{SoftAccel, SoftSpec};
pub use fault::{Fault, Res};
pub use state::Cpu;
pub use vcpu::SoftVcpu;
pub use vm::SoftVm;
