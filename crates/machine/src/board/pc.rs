//! `pc`: a PC with conventional PCI, as QEMU's pc (Intel i440FX and PIIX3, with the PIIX4's power management).

use super::q35::ISA_IRQS;
use super::{Board, Builder, PciView};
use crate::acpi::{PciHost, Power, SCI_GSI};
use crate::blueprint::BoardSpec;
use crate::{Error, Result};
use base::props::Bag;
use bus::pci::{ConfigPorts, PciBus, Route, Windows};
use bus::{IrqPin, RegionId};
use devices::chipset::{AcpiPm, MemoryController, Piix3, Piix4Pm, PirqRouter, SmBus};

pub(super) const BOARD: Board = Board {
    name: "pc",
    about: "Standard PC with conventional PCI (i440FX + PIIX)",
    product: "Standard PC (i440FX + PIIX, 1996)",
    firmware: true,
    low_ram_end,
    build,
};

/// PMBASE as QEMU's firmware sets it, and the SMBus behind it.
const PM_BASE: u16 = 0x600;
const SMBUS_BASE: u16 = 0x700;
const MMIO32_START: u64 = 0xe000_0000;
const MMIO32_END: u64 = 0xfec0_0000;
const MMIO64_START: u64 = 0x80_0000_0000;
const MMIO64_LEN: u64 = 0x10_0000_0000;

/// RAM below 4 GiB ends at 3 GiB, or at 3.5 if all of it fits there.
fn low_ram_end(total: u64) -> u64 {
    if total > MMIO32_START { 3 << 30 } else { MMIO32_START }
}

fn windows() -> Windows {
    Windows {
        mmio32: MMIO32_START..MMIO32_END,
        mmio64: MMIO64_START..MMIO64_START + MMIO64_LEN,
        io: 0xc000..0x1_0000,
    }
}

/// PIRQ of a slot's pin: they rotate from device 1 up.
fn pirq(slot: u8, pin: u8) -> usize {
    usize::from(slot) + usize::from(pin) + 3
}

fn build(b: &mut Builder, spec: &BoardSpec) -> Result<()> {
    b.legacy(spec)?;
    let sci = b.pin(SCI_GSI).line();
    let pm = AcpiPm::new(&b.clock.clone(), sci, b.system.clone());
    let pm = b.own(pm);
    b.ports(&pm, 0xb2, 2, "apm", AcpiPm::SMI_COMMAND)?;
    b.press_through(&pm);
    b.acpi.power = Power::Fixed { base: PM_BASE };
    let smbus = b.own(SmBus::new());

    let isa = (0..16).map(|gsi| b.pin(gsi)).collect();
    let pirqs = PirqRouter::new(0, ISA_IRQS.len(), None, isa);
    let pins = (0..ISA_IRQS.len() as u32).map(|n| IrqPin::new(pirqs.clone(), n)).collect();
    let pci = PciBus::root_with(b.bus.clone(), pins, pirq);
    let ports = b.own(ConfigPorts::new(pci.clone(), Some(b.system.clone())));
    b.ports(&ports, 0xcf8, 8, "pci-ports", RegionId(0))?;
    // Without firmware everything is in its place at power-on.
    let direct = b.rom.is_none();
    let fail = |e: bus::pci::PciError| Error::Config(e.to_string());
    let host = MemoryController::i440fx(b.shadow()?);
    pci.add(0, 0, &bus::shared(host)).map_err(fail)?;
    let bridge = Piix3::new(pirqs, direct.then_some(ISA_IRQS.map(|irq| irq as u8)));
    pci.add(1, 0, &bus::shared(bridge)).map_err(fail)?;
    let power = Piix4Pm::new(&b.bus, &pm, &smbus, direct.then_some((PM_BASE, SMBUS_BASE)));
    pci.add(1, 3, &bus::shared(power)).map_err(fail)?;

    // PCI's interrupts arrive as ISA ones in either mode.
    let to_isa = |r: Route| Route { gsi: ISA_IRQS[(r.gsi & 3) as usize], ..r };
    let routes: Vec<Route> = pci.interrupt_routes().into_iter().map(to_isa).collect();
    b.isa_pirqs = Some(ISA_IRQS.map(|irq| irq as u8));
    b.acpi.level_irqs = vec![10, 11];
    b.acpi.pci = Some(PciHost {
        ecam_base: 0,
        has_ecam: false,
        buses: 256,
        mmio32: vec![(MMIO32_START as u32, (MMIO32_END - 1) as u32)],
        mmio64: (MMIO64_START, MMIO64_START + MMIO64_LEN - 1),
        pic_routes: routes.clone(),
        routes,
    });
    let low = b.memory.regions()[0].len().max(2 << 30)..MMIO32_END;
    b.pci_view = Some(PciView { bus: pci.clone(), ecam: None, low });
    b.pci = Some(pci);
    b.windows = Some(windows);
    b.plug_one(&Bag::new("piix3-ide").with("addr", "1.1"))?;
    b.serial_ports()
}
