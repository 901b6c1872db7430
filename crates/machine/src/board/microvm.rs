//! `microvm`: the least that boots Linux fast: serial port, virtio-mmio transports, reduced-hardware ACPI. No PCI, no
//! keyboard controller, no real-time clock (guests take the time from kvm-clock), no power-management timer.

use super::plug::MmioSlot;
use super::{Board, Builder};
use crate::acpi::{Power, REDUCED_S5_SLEEP_TYPE, RESET_VALUE};
use crate::blueprint::BoardSpec;
use crate::{Error, Result};
use bus::RegionId;
use devices::chipset::{LegacyLine, ReducedPower};

pub(super) const BOARD: Board = Board {
    name: "microvm",
    about: "Minimal machine: virtio-mmio, ACPI without fixed hardware",
    product: "microvm",
    firmware: false,
    low_ram_end,
    build,
};

/// Where QEMU's microvm has its transports.
const MMIO_BASE: u64 = 0xfeb0_0000;
const MMIO_STEP: u64 = 0x200;
/// IOAPIC inputs for the transports: those above the ISA ones, then the free ISA ones.
const MMIO_GSIS: [u32; 14] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 12];
const POWER_PORT: u16 = 0x600;
const POWER_GSI: u32 = 9;

fn low_ram_end(_: u64) -> u64 {
    3 << 30
}

fn build(b: &mut Builder, spec: &BoardSpec) -> Result<()> {
    if spec.hpet == Some(true) {
        return Err(Error::Config("microvm has no HPET; use --machine q35,hpet=on".into()));
    }
    if b.irqchip.is_some() {
        let line = LegacyLine::new(b.pin(0).line());
        b.software_pit(line)?;
    }
    let button = b.pin(POWER_GSI).line();
    let power = b.own(ReducedPower::new(b.system.clone(), button, REDUCED_S5_SLEEP_TYPE, RESET_VALUE));
    b.ports(&power, POWER_PORT, ReducedPower::PORTS as u16, "acpi-reduced", RegionId(0))?;
    b.power_button = Some(Box::new(move || power.lock().unwrap_or_else(|e| e.into_inner()).power_button()));
    b.acpi.power = Power::Reduced { base: POWER_PORT, gsi: POWER_GSI };
    b.mmio_slots = MMIO_GSIS
        .iter()
        .zip(0u64..)
        .map(|(&gsi, i)| MmioSlot { base: MMIO_BASE + MMIO_STEP * i, gsi })
        .collect();
    b.serial_ports()
}
