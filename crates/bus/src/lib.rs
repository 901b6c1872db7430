//! Devices and what connects them: the port and memory buses, interrupt lines, PCI, virtio.
//!
//! Lock order: the bus's own maps are leaves (never held while a device runs), so a device may map and unmap regions
//! from inside an access. Each device has one lock; a device never calls into another while it holds its own, except
//! downwards (host bridge, function, virtio transport, virtio device).

mod chardev;
mod device;
mod io;
mod line;
pub mod pci;
mod state;
mod system;
pub mod virtio;
mod window;

pub use chardev::{CharEvent, CharFrontend, Chardev, NullChardev};
pub use device::{Device, RegionId, SharedDevice, shared};
pub use io::{Bus, MapError, Space};
pub use line::{IrqLine, IrqPin};
pub use state::{State, StateError};
pub use system::{System, SystemRequest};
pub use window::RamWindow;
