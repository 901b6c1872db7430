//! `q35`: a PC with PCI Express, as QEMU's q35 (Intel Q35 and ICH9) looks to a guest that is booted directly.

use super::{Board, Builder};
use crate::Result;
use crate::acpi::{PciHost, Power, SCI_GSI};
use crate::blueprint::BoardSpec;
use crate::kernel::E820;
use bus::pci::{ConfigPorts, Ecam, HostBridge, PciBus, Windows};
use bus::{RegionId, Space};
use devices::chipset::{AcpiPm, I8042, LegacyLine, Rtc, RtcBase, SystemPorts};

pub(super) const BOARD: Board = Board {
    name: "q35",
    about: "Standard PC with PCI Express (Q35 + ICH9)",
    product: "Standard PC (Q35 + ICH9, 2009)",
    low_ram_end,
    build,
};

const ECAM_BASE: u64 = 0xb000_0000;
/// Buses behind the host bridge: root ports have one each. Linux probes every slot of every bus that the MCFG names (with
/// two exits a slot under KVM), so there are no more than machines use.
const BUSES: u16 = 32;
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

fn build(b: &mut Builder, spec: &BoardSpec) -> Result<()> {
    let pit_line = LegacyLine::new(b.pin(0).line());
    let rtc_line = LegacyLine::new(b.pin(8).line());
    if b.irqchip.is_some() {
        b.software_pit(pit_line.clone())?;
    }
    // With KVM the timer chip is in the kernel, out of the HPET's reach.
    if spec.hpet.unwrap_or(b.irqchip.is_some()) {
        b.hpet(&pit_line, &rtc_line)?;
    }
    let rtc = b.own(Rtc::new(&b.clock.clone(), rtc_line, RtcBase::Utc));
    b.ports(&rtc, 0x70, 2, "rtc", RegionId(0))?;
    b.acpi.rtc = true;

    let (keyboard, mouse) = (b.pin(1).line(), b.pin(12).line());
    let i8042 = b.own(I8042::new(b.system.clone(), keyboard, mouse));
    b.ports(&i8042, 0x60, 1, "i8042", I8042::DATA)?;
    b.ports(&i8042, 0x64, 1, "i8042", I8042::COMMAND)?;
    I8042::connect_input(&i8042, b.displays.input());
    b.acpi.i8042 = true;
    let ports = b.own(SystemPorts::new(b.system.clone()));
    b.ports(&ports, 0x80, 1, "post", SystemPorts::POST)?;
    b.ports(&ports, 0x92, 1, "port92", SystemPorts::CONTROL)?;
    b.ports(&ports, 0xed, 1, "delay", SystemPorts::DELAY)?;

    let sci = b.pin(SCI_GSI).line();
    let pm = b.own(AcpiPm::new(&b.clock.clone(), sci, b.system.clone()));
    b.ports(&pm, PM_BASE, AcpiPm::LENGTH as u16, "acpi-pm", AcpiPm::BLOCK)?;
    b.ports(&pm, 0xb2, 2, "apm", AcpiPm::SMI_COMMAND)?;
    b.power_button = Some(Box::new(move || {
        if !pm.lock().unwrap_or_else(|e| e.into_inner()).press_power_button() {
            tracing::warn!("the guest does not listen to the power button");
        }
    }));
    b.acpi.power = Power::Fixed { base: PM_BASE };

    let pins = (16..24).map(|gsi| b.pin(gsi)).collect();
    let pci = PciBus::root(b.bus.clone(), pins);
    let ports = b.own(ConfigPorts::new(pci.clone(), Some(b.system.clone())));
    b.ports(&ports, 0xcf8, 8, "pci-ports", RegionId(0))?;
    let ecam = b.own(Ecam::new(pci.clone(), BUSES));
    b.bus.map(Space::Memory, ECAM_BASE, u64::from(BUSES) << 20, "pci-ecam", &ecam, RegionId(0))?;
    let host = bus::shared(HostBridge::q35(Some((ECAM_BASE, BUSES))));
    pci.add(0, 0, &host).map_err(|e| crate::Error::Config(e.to_string()))?;
    b.reserved.push(E820 { start: ECAM_BASE, len: u64::from(BUSES) << 20, kind: E820::RESERVED });
    b.acpi.pci = Some(PciHost {
        ecam_base: ECAM_BASE,
        buses: BUSES,
        mmio32: (MMIO32_START as u32, (MMIO32_END - 1) as u32),
        mmio64: (MMIO64_START, MMIO64_START + MMIO64_LEN - 1),
        routes: pci.interrupt_routes(),
    });
    b.pci = Some(pci);
    b.windows = Some(windows);
    b.serial_ports()
}
