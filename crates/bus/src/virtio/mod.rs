//! Virtio (OASIS Virtual I/O Device specification, version 1.2): queues, the device trait, and the transports.
//!
//! # Plugging a device
//! A model gives a `Box<dyn VirtioDevice>`; a transport makes a [`crate::Device`] of it:
//! ```text
//! let platform = Platform { memory, irqs, doorbells: vm.doorbells() };
//! // PCI: an endpoint with MSI-X; its BARs place themselves, see `crate::pci`.
//! let function = shared(VirtioPci::new(device, &platform));
//! pci.add(slot, 0, &function)?;
//! // MMIO: 0x200 bytes at a fixed place and a line of its own.
//! let mmio = shared(VirtioMmio::new(device, &platform, base, pin.line()));
//! bus.map(Space::Memory, base, VirtioMmio::LEN, name, &mmio, RegionId(0))?;
//! ```
//! The owner then calls `start` before vCPUs run, `pause` after they have stopped, and so on, as for any device.
//!
//! # Writing a device
//! Implement [`VirtioDevice`]. The transport negotiates features, keeps the queues' addresses and calls
//! [`VirtioDevice::activate`] when the driver is ready (DRIVER_OK). Threads, rings and other costly things are made
//! there, not before: most of a guest's devices are never used in its first second.
//!
//! A queue is an `Arc<Mutex<Queue>>`: whoever processes it holds the lock for a batch, and the transport takes it to
//! save the ring's position once the device is paused. A batch is: [`Queue::pop`] chains, move data with
//! [`Chain::reader`] and [`Chain::writer`] (or [`Chain::readable`] slices handed to the host), [`Queue::push`] each,
//! [`Queue::publish`] once, and [`Interrupt::queue`] if that says so.
//!
//! Lock order: transport, device, queue, interrupt. Device threads and back ends start at "device".

mod chain;
mod core;
mod device;
mod mmio;
mod pci;
mod queue;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

pub use chain::{Chain, Reader, Segment, Writer};
pub use device::{Activation, Interrupt, InterruptSink, SharedQueue, VirtioDevice};
pub use mmio::VirtioMmio;
pub use pci::VirtioPci;
pub use queue::{Queue, QueueConfig, QueueError, QueuePosition};

use accel::{Doorbells, Irqs};
use memory::GuestMemory;
use std::sync::Arc;

/// What a transport takes from the machine.
#[derive(Clone)]
pub struct Platform {
    /// Guest RAM.
    pub memory: GuestMemory,
    /// Interrupt inputs, for MSI-X.
    pub irqs: Arc<dyn Irqs>,
    /// Kernel shortcuts where the accelerator has them: queue notifications then wake the device's thread directly.
    pub doorbells: Option<Arc<dyn Doorbells>>,
}

/// Feature bits that are not a device type's own (virtio 1.2, 6).
pub mod feature {
    /// Descriptors may point to tables of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are suppressed by ring index rather than by flag.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// Packed ring layout.
    pub const RING_PACKED: u64 = 1 << 34;
    /// What split rings offer by default.
    pub const RING_DEFAULT: u64 = INDIRECT_DESC | EVENT_IDX;
}

/// Device types (virtio 1.2, 5).
pub mod device_id {
    /// Network card.
    pub const NET: u32 = 1;
    /// Block device.
    pub const BLOCK: u32 = 2;
    /// Console.
    pub const CONSOLE: u32 = 3;
    /// Entropy source.
    pub const RNG: u32 = 4;
    /// Memory balloon.
    pub const BALLOON: u32 = 5;
    /// SCSI host.
    pub const SCSI: u32 = 8;
    /// 9P transport.
    pub const P9: u32 = 9;
    /// GPU.
    pub const GPU: u32 = 16;
    /// Input device.
    pub const INPUT: u32 = 18;
    /// Socket device.
    pub const VSOCK: u32 = 19;
    /// File system device.
    pub const FS: u32 = 26;
    /// Persistent memory.
    pub const PMEM: u32 = 27;
}

/// Device status bits (virtio 1.2, 2.1).
pub mod status {
    /// The guest has found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver.
    pub const DRIVER: u8 = 2;
    /// The driver is set up and drives.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed on.
    pub const FEATURES_OK: u8 = 8;
    /// The device has met an error it cannot recover from without a reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}
