//! PCI: configuration space, BARs, interrupts (INTx, MSI, MSI-X), buses and the host's way into them.
//!
//! # Putting a PCI machine together
//! ```text
//! let pins: Vec<_> = (16..24).map(|gsi| IrqPin::new(irqs.clone(), gsi)).collect();
//! let pci = PciBus::root(bus.clone(), pins);                            // Arc<PciBus>
//! let ports = shared(ConfigPorts::new(pci.clone(), Some(system)));      // 0xcf8..0xcff, and 0xcf9 reset control
//! bus.map(Space::Port, 0xcf8, 8, "pci-ports", &ports, RegionId(0))?;
//! let ecam = shared(Ecam::new(pci.clone(), 256));                       // 1 MiB a bus
//! bus.map(Space::Memory, ECAM_BASE, 256 << 20, "pci-ecam", &ecam, RegionId(0))?;
//! let host = shared(HostBridge::q35(Some((ECAM_BASE, 256))));
//! pci.add(0, 0, &host)?;                                                // device 0, function 0
//! let disk = shared(VirtioPci::new(device, &platform));                 // see `crate::virtio`
//! pci.add(pci.free_slot().ok_or(..)?, 0, &disk)?;
//! // Without firmware (and again after each machine reset): place BARs, enable decoding, set interrupt lines.
//! pci.assign_resources(&mut Windows { mmio32, mmio64, io })?;
//! for route in pci.interrupt_routes() { /* _PRT: slot, pin, gsi */ }
//! ```
//! The bus owner also calls `start`, `pause`, `reset`, `save` and `load` of each function: they are ordinary
//! [`Device`]s. A function's BARs appear on and vanish from the [`crate::Bus`] by themselves when its configuration
//! space changes, also by `reset` and `load`.
//!
//! References are to the PCI Local Bus Specification 3.0 and the PCI Express Base Specification 5.0.

mod assign;
mod bar;
mod bus;
mod config;
mod host;
mod intx;
mod msi;
mod msix;
#[cfg(test)]
mod tests;

pub use assign::{AssignError, Windows};
pub use bar::{Bar, BarKind};
pub use bus::{PciBus, PciError, SharedFunction, Swizzle, firmware_node};
pub use config::{Config, ConfigSaved, Identity};
pub use host::{ConfigPorts, Ecam, HostBridge};
pub use intx::{Intx, Route};
pub use msi::Msi;
pub use msix::{Msix, MsixVectors};

use crate::Device;
use std::sync::Arc;

/// Register offsets of the configuration header (PCI 3.0, 6.1) and bits in them.
pub mod reg {
    /// Vendor ID.
    pub const VENDOR: u16 = 0x00;
    /// Device ID.
    pub const DEVICE: u16 = 0x02;
    /// Command register.
    pub const COMMAND: u16 = 0x04;
    /// Status register.
    pub const STATUS: u16 = 0x06;
    /// Revision, then class code.
    pub const REVISION: u16 = 0x08;
    /// Header type; bit 7 says that the device has several functions.
    pub const HEADER_TYPE: u16 = 0x0e;
    /// First base address register.
    pub const BAR0: u16 = 0x10;
    /// Bridges: primary, secondary and subordinate bus numbers.
    pub const PRIMARY_BUS: u16 = 0x18;
    /// Bridges: I/O base and limit.
    pub const IO_BASE: u16 = 0x1c;
    /// Bridges: memory base and limit.
    pub const MEMORY_BASE: u16 = 0x20;
    /// Bridges: prefetchable memory base and limit.
    pub const PREFETCH_BASE: u16 = 0x24;
    /// Subsystem vendor and subsystem ID.
    pub const SUBSYSTEM: u16 = 0x2c;
    /// Expansion ROM base of an endpoint.
    pub const ROM: u16 = 0x30;
    /// First capability.
    pub const CAPABILITIES: u16 = 0x34;
    /// Expansion ROM base of a bridge.
    pub const BRIDGE_ROM: u16 = 0x38;
    /// Interrupt line (a scratch register for software).
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// Interrupt pin: 0 none, 1 INTA, ... 4 INTD.
    pub const INTERRUPT_PIN: u16 = 0x3d;
    /// Bridges: bridge control.
    pub const BRIDGE_CONTROL: u16 = 0x3e;

    /// Command: decode I/O BARs.
    pub const COMMAND_IO: u16 = 1 << 0;
    /// Command: decode memory BARs.
    pub const COMMAND_MEMORY: u16 = 1 << 1;
    /// Command: bus master.
    pub const COMMAND_MASTER: u16 = 1 << 2;
    /// Command: INTx disabled.
    pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
    /// Status: INTx asserted.
    pub const STATUS_INTERRUPT: u16 = 1 << 3;
    /// Status: there is a capability list.
    pub const STATUS_CAPABILITIES: u16 = 1 << 4;
}

/// Capability identifiers (PCI Code and ID Assignment Specification).
pub mod capability {
    /// Message-signalled interrupts.
    pub const MSI: u8 = 0x05;
    /// Vendor-specific.
    pub const VENDOR: u8 = 0x09;
    /// PCI Express.
    pub const EXPRESS: u8 = 0x10;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
}

/// A PCI function: a device whose regions are BARs (region n is BAR n, region 6 the expansion ROM).
pub trait PciFunction: Device {
    /// Its configuration space.
    fn config(&self) -> &Config;
    /// The same, to change.
    fn config_mut(&mut self) -> &mut Config;
    /// A read of configuration space by the guest: `data.len()` is 1, 2 or 4 and does not cross a double word.
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }
    /// A write to configuration space by the guest. Functions that watch registers call
    /// [`Config::write`] themselves and look at the result.
    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config_mut().write(offset, data);
    }
    /// For bridges: the bus behind.
    fn secondary(&self) -> Option<Arc<PciBus>> {
        None
    }
}
