//! Builds a virtual machine from its blueprint, and runs it.
//!
//! - [`Blueprint`]: the description.
//! - [`Machine`]: the running thing: vCPU threads, pause, resume, reset, power button.
//! - `board`: what is where on a `q35` and a `microvm`.
//! - `acpi`, `smbios`, `kernel`: what firmware would do for a directly booted kernel.

mod acceleration;
pub mod acpi;
pub mod blueprint;
mod board;
pub mod control;
pub mod cpu;
mod drives;
pub mod firmware;
pub mod graph;
mod hotplug;
pub mod inspect;
pub mod inspect_pci;
pub mod kernel;
mod netdevs;
mod nodes;
pub mod objects;
mod run;
pub mod smbios;
pub mod topology;
mod vcpu;

pub use acceleration::{Acceleration, choose, kvm_usable};
pub use blueprint::Blueprint;
pub use board::BOARDS;
pub use control::{Cause, Notice, Remote, RunState};
pub use netdevs::NetdevInfo;
pub use nodes::BlockNode;
pub use run::{Chardevs, Machine, Outcome};

/// Why a machine cannot be built or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A description that makes no sense; the text says what to do instead.
    #[error("{0}")]
    Config(String),
    /// A bad property.
    #[error(transparent)]
    Property(#[from] base::props::PropError),
    /// The processor model.
    #[error(transparent)]
    Cpu(#[from] cpu::CpuError),
    /// The accelerator.
    #[error(transparent)]
    Accel(#[from] accel::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    /// A device.
    #[error(transparent)]
    Device(#[from] devices::CreateError),
    /// A network backend.
    #[error(transparent)]
    Net(#[from] net::Error),
    /// Two things at the same place.
    #[error(transparent)]
    Map(#[from] bus::MapError),
    /// The host's refusal.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: String,
        /// The host's reason.
        source: std::io::Error,
    },
}

impl Error {
    /// Whether the user's input is at fault (exit status 2) rather than the host or the guest.
    pub fn is_usage(&self) -> bool {
        !matches!(
            self,
            Error::Host { .. }
                | Error::Net(net::Error::Host { .. })
                | Error::Accel(accel::Error::Host { .. })
        )
    }
}

/// Result of machine operations.
pub type Result<T> = std::result::Result<T, Error>;
