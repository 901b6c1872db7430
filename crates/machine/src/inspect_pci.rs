//! PCI functions as monitors show them.

use crate::Machine;
use bus::pci::{BarKind, PciBus, PciFunction};
use std::sync::Arc;

/// A base address register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciRegion {
    /// Number of the register; 6 is the expansion ROM.
    pub bar: u8,
    /// Ports or memory.
    pub io: bool,
    /// Can lie above 4 GiB.
    pub wide: bool,
    /// Reads have no side effects.
    pub prefetchable: bool,
    /// Where it decodes now.
    pub address: Option<u64>,
    /// Bytes.
    pub size: u64,
}

/// A function.
#[derive(Clone, Debug)]
pub struct PciInfo {
    /// Bus number.
    pub bus: u8,
    /// Device number.
    pub slot: u8,
    /// Function number.
    pub function: u8,
    /// Class and subclass.
    pub class: u16,
    /// Vendor and device.
    pub id: (u16, u16),
    /// Subsystem vendor and device.
    pub subsystem: (u16, u16),
    /// Interrupt line, as firmware or the guest wrote it.
    pub irq: u8,
    /// Interrupt pin: 0 none, 1 INTA.
    pub pin: u8,
    /// Regions.
    pub regions: Vec<PciRegion>,
    /// Id of the device, if it has one.
    pub device: Option<String>,
    /// For bridges: secondary and subordinate bus, and what is behind.
    pub bridge: Option<(u8, u8, Vec<PciInfo>)>,
}

impl Machine {
    /// All functions of the root bus, with those behind bridges inside.
    pub fn pci(&self) -> Vec<PciInfo> {
        self.built().pci.as_ref().map(|root| self.bus_info(root, 0, 0)).unwrap_or_default()
    }

    fn bus_info(&self, bus: &Arc<PciBus>, number: u8, depth: usize) -> Vec<PciInfo> {
        if depth > 16 {
            return Vec::new();
        }
        let mut all = Vec::new();
        for (slot, function, handle) in bus.functions() {
            let (mut info, behind) = {
                let f = handle.lock().unwrap_or_else(|e| e.into_inner());
                (function_info(&*f, number, slot, function), f.secondary())
            };
            info.device = self
                .built()
                .plugged
                .iter()
                .find(|p| {
                    p.pci.as_ref().is_some_and(|at| {
                        Arc::ptr_eq(&at.bus, bus) && (at.slot, at.function) == (slot, function)
                    })
                })
                .and_then(|p| p.bag.id.clone());
            if let (Some(behind), Some((secondary, _, inside))) = (behind, &mut info.bridge) {
                *inside = self.bus_info(&behind, *secondary, depth + 1);
            }
            all.push(info);
        }
        all
    }
}

fn function_info(f: &dyn PciFunction, bus: u8, slot: u8, function: u8) -> PciInfo {
    let c = f.config();
    let mut regions = Vec::new();
    for bar in 0..7 {
        if let Some(b) = c.bar(bar) {
            regions.push(PciRegion {
                bar,
                io: b.kind == BarKind::Io,
                wide: b.kind == BarKind::Memory64,
                prefetchable: b.prefetchable,
                address: c.bar_address(bar),
                size: b.size,
            });
        }
    }
    let bridge = c.is_bridge().then(|| (c.get_u8(0x19), c.get_u8(0x1a), Vec::new()));
    PciInfo {
        bus,
        slot,
        function,
        class: c.get_u16(0x0a),
        id: (c.get_u16(0), c.get_u16(2)),
        subsystem: if bridge.is_some() { (0, 0) } else { (c.get_u16(0x2c), c.get_u16(0x2e)) },
        irq: c.get_u8(0x3c),
        pin: c.get_u8(0x3d),
        regions,
        device: None,
        bridge,
    }
}

/// What a class code means, in monitors' words.
pub fn class_name(class: u16) -> &'static str {
    match class {
        0x0000 => "Unclassified device",
        0x0001 => "VGA compatible unclassified device",
        0x0100 => "SCSI controller",
        0x0101 => "IDE controller",
        0x0106 => "SATA controller",
        0x0108 => "Non-Volatile memory controller",
        0x0180 => "Mass storage controller",
        0x0200 => "Ethernet controller",
        0x0280 => "Network controller",
        0x0300 => "VGA controller",
        0x0380 => "Display controller",
        0x0401 => "Multimedia audio controller",
        0x0403 => "Audio controller",
        0x0500 => "RAM controller",
        0x0600 => "Host bridge",
        0x0601 => "ISA bridge",
        0x0604 => "PCI bridge",
        0x0680 => "Bridge",
        0x0780 => "Communication controller",
        0x0880 => "System peripheral",
        0x0900 => "Keyboard controller",
        0x0980 => "Input controller",
        0x0c03 => "USB controller",
        0x0c05 => "SMBus",
        _ => "Class",
    }
}
