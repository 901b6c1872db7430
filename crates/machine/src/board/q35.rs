//! `q35`: a PC with PCI Express, as QEMU's q35 (Intel Q35 and ICH9) looks to a guest that is booted directly.

use super::{Board, Builder, PciView};
use crate::Result;
use crate::acpi::{PciHost, Power, SCI_GSI};
use crate::blueprint::BoardSpec;
use crate::kernel::E820;
use base::props::Bag;
use bus::pci::{ConfigPorts, Ecam, PciBus, Route, Windows};
use bus::{IrqPin, RegionId};
use devices::chipset::{
    AcpiPm, ChipsetRegisters, Ich9SmBus, Lpc, LpcPreset, MemoryController, NoReboot, PirqRouter,
};

pub(super) const BOARD: Board = Board {
    name: "q35",
    about: "Standard PC with PCI Express (Q35 + ICH9)",
    product: "Standard PC (Q35 + ICH9, 2009)",
    firmware: true,
    low_ram_end,
    build,
};

/// Interrupts that firmware routes PIRQ A to D to, and E to H, for systems that use the 8259s.
pub(super) const ISA_IRQS: [u32; 4] = [10, 10, 11, 11];
/// GSI of PIRQ A; the others follow.
const PIRQ_GSI: u32 = 16;
/// Chipset configuration registers, where QEMU's firmware puts them.
const RCBA: u32 = 0xfed1_c000;
const ECAM_BASE: u64 = 0xb000_0000;
/// Buses behind the host bridge: root ports have one each. Linux probes every slot of every bus that the MCFG names (with
/// two exits a slot under KVM), so there are no more than machines use.
const BUSES: u16 = 32;
/// The smallest window that the chipset has.
const ECAM_BUSES: u16 = 64;
/// PMBASE as QEMU's firmware sets it.
const PM_BASE: u16 = 0x600;
const MMIO32_START: u64 = 0xc000_0000;
const MMIO32_END: u64 = 0xfec0_0000;
const MMIO64_START: u64 = 0x80_0000_0000;
const MMIO64_LEN: u64 = 0x10_0000_0000;

/// RAM below 4 GiB ends at 2 GiB, or just below the ECAM window if all of it fits there.
fn low_ram_end(total: u64) -> u64 {
    if total > ECAM_BASE { 2 << 30 } else { ECAM_BASE }
}

fn windows() -> Windows {
    Windows {
        mmio32: MMIO32_START..MMIO32_END,
        mmio64: MMIO64_START..MMIO64_START + MMIO64_LEN,
        io: 0xc000..0x1_0000,
    }
}

/// PIRQ of a slot's pin: devices 25 to 31 have A to D in order, as the chipset's registers say; the slots before
/// them rotate over E to H.
fn pirq(slot: u8, pin: u8) -> usize {
    if slot < 25 { 4 + (usize::from(slot) + usize::from(pin)) % 4 } else { usize::from(pin) % 4 }
}

fn build(b: &mut Builder, spec: &BoardSpec) -> Result<()> {
    b.legacy(spec)?;
    let sci = b.pin(SCI_GSI).line();
    let no_reboot = NoReboot::default();
    let pm = AcpiPm::with_watchdog(&b.clock.clone(), sci, b.system.clone(), no_reboot.clone());
    let pm = b.own(pm);
    b.ports(&pm, 0xb2, 2, "apm", AcpiPm::SMI_COMMAND)?;
    let chipset = b.own(ChipsetRegisters::new(no_reboot));
    b.press_through(&pm);
    b.acpi.power = Power::Fixed { base: PM_BASE };

    let isa = (0..16).map(|gsi| b.pin(gsi)).collect();
    let pirqs = PirqRouter::new(PIRQ_GSI, 8, Some(b.irqs.clone()), isa);
    let pins = (PIRQ_GSI..PIRQ_GSI + 8).map(|gsi| IrqPin::new(pirqs.clone(), gsi)).collect();
    let pci = PciBus::root_with(b.bus.clone(), pins, pirq);
    let ports = b.own(ConfigPorts::new(pci.clone(), Some(b.system.clone())));
    b.ports(&ports, 0xcf8, 8, "pci-ports", RegionId(0))?;
    let ecam = b.own(Ecam::new(pci.clone(), 256));
    // Without firmware everything is in its place at power-on.
    let direct = b.rom.is_none();
    let preset = direct.then_some((ECAM_BASE, ECAM_BUSES));
    let host = MemoryController::q35(&b.bus, &ecam, preset, b.shadow()?);
    let place = host.ecam_place();
    let fail = |e: bus::pci::PciError| crate::Error::Config(e.to_string());
    pci.add(0, 0, &bus::shared(host)).map_err(fail)?;
    let preset = direct.then_some(LpcPreset { pm_base: PM_BASE, rcba: RCBA });
    let lpc = Lpc::new(&b.bus, pirqs, &pm, &chipset, preset);
    pci.add(31, 0, &bus::shared(lpc)).map_err(fail)?;
    pci.add(31, 3, &bus::shared(Ich9SmBus::new())).map_err(fail)?;
    b.reserved.push(E820 { start: ECAM_BASE, len: u64::from(ECAM_BUSES) << 20, kind: E820::RESERVED });
    b.acpi.pci = Some(PciHost {
        ecam_base: ECAM_BASE,
        has_ecam: true,
        buses: BUSES,
        mmio32: vec![(MMIO32_START as u32, (MMIO32_END - 1) as u32)],
        mmio64: (MMIO64_START, MMIO64_START + MMIO64_LEN - 1),
        routes: pci.interrupt_routes(),
        pic_routes: pci
            .interrupt_routes()
            .into_iter()
            .map(|r| Route { gsi: ISA_IRQS[(r.gsi & 3) as usize], ..r })
            .collect(),
    });
    let low = b.memory.regions()[0].len().max(2 << 30)..MMIO32_END;
    b.pci_view = Some(PciView { bus: pci.clone(), ecam: Some(place), low });
    b.pci = Some(pci);
    b.windows = Some(windows);
    b.plug_one(&Bag::new("ich9-ahci").with("addr", "1f.2"))?;
    b.serial_ports()
}
