//! The fixed-format tables.

use super::{
    AcpiConfig, HPET_BASE, IOAPIC_BASE, LAPIC_BASE, OEM_ID, OEM_TABLE, PciHost, Power, RESET_PORT,
    RESET_VALUE, SCI_GSI, table,
};
use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;
use devices::chipset::AcpiPm;

/// FACS (5.2.10): 64 bytes, no checksum.
pub(super) fn facs() -> Vec<u8> {
    let mut t = vec![0; 64];
    t[..4].copy_from_slice(b"FACS");
    t[4] = 64;
    t[32] = 2; // version
    t
}

/// FADT (5.2.9), without its pointers to FACS and DSDT.
pub(super) fn fadt(config: &AcpiConfig) -> Vec<u8> {
    const LEGACY_DEVICES: u16 = 1;
    const HAS_8042: u16 = 1 << 1;
    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_RTC: u16 = 1 << 5;
    let port =
        |at: u16, bits: u8| GAS::new(AddressSpace::SystemIo, bits, 0, AccessSize::Undefined, u64::from(at));
    let mut f = FADTBuilder::new(OEM_ID, OEM_TABLE, 1);
    let mut arch = 0;
    if !config.serial.is_empty() || config.i8042 {
        arch |= LEGACY_DEVICES;
    }
    if config.i8042 {
        arch |= HAS_8042;
    }
    if config.pci.is_none() {
        arch |= NO_VGA;
    }
    if !config.rtc {
        arch |= NO_CMOS_RTC;
    } else {
        f.century = 0x32;
    }
    f.iapc_boot_arch = arch.into();
    f = f.flag(Flags::ResetRegSup);
    match config.power {
        Power::Fixed { base } => {
            for flag in [Flags::Wbinvd, Flags::ProcC1, Flags::SlpButton, Flags::TmrValExt, Flags::RtcS4] {
                f = f.flag(flag);
            }
            f.sci_int = (SCI_GSI as u16).into();
            f.smi_cmd = 0xb2.into();
            f.acpi_enable = AcpiPm::ENABLE;
            f.acpi_disable = AcpiPm::DISABLE;
            (f.pm1_evt_len, f.pm1_cnt_len, f.pm_tmr_len, f.gpe0_blk_len) = (4, 2, 4, 16);
            f.pm1a_evt_blk = u32::from(base).into();
            f.pm1a_cnt_blk = u32::from(base + 4).into();
            f.pm_tmr_blk = u32::from(base + 8).into();
            f.gpe0_blk = u32::from(base + 0x20).into();
            f.x_pm1a_evt_blk = port(base, 32);
            f.x_pm1a_cnt_blk = port(base + 4, 16);
            f.x_pm_tmr_blk = port(base + 8, 32);
            f.x_gpe0_blk = port(base + 0x20, 128);
            f.p_lvl2_lat = 0xfff.into(); // no C2, no C3
            f.p_lvl3_lat = 0xfff.into();
            f.reset_reg = port(RESET_PORT, 8);
            f.reset_value = RESET_VALUE;
        }
        Power::Reduced { base, .. } => {
            f = f.flag(Flags::HwReducedAcpi).flag(Flags::PwrButton).flag(Flags::SlpButton);
            f.sleep_control_reg = port(base, 8);
            f.sleep_status_reg = port(base + 1, 8);
            f.reset_reg = port(base + 2, 8);
            f.reset_value = RESET_VALUE;
        }
        Power::None => f = f.flag(Flags::HwReducedAcpi),
    }
    let mut bytes = Vec::new();
    f.finalize().to_aml_bytes(&mut bytes);
    bytes
}

/// MADT (5.2.12).
pub(super) fn madt(config: &AcpiConfig) -> Sdt {
    let topology = &config.topology;
    const PCAT_COMPAT: u32 = 1;
    let mut t = table(b"APIC", 5);
    t.append_slice(&(LAPIC_BASE as u32).to_le_bytes());
    t.append_slice(&PCAT_COMPAT.to_le_bytes());
    for (uid, id) in topology.apic_ids().enumerate() {
        let uid = uid as u32;
        if id < 255 {
            let mut e = vec![0, 8, uid as u8, id as u8]; // processor local APIC (5.2.12.2)
            e.extend(1u32.to_le_bytes());
            t.append_slice(&e);
        } else {
            let mut e = vec![9, 16, 0, 0]; // processor local x2APIC (5.2.12.12)
            e.extend(id.to_le_bytes());
            e.extend(1u32.to_le_bytes());
            e.extend(uid.to_le_bytes());
            t.append_slice(&e);
        }
    }
    let mut ioapic = vec![1, 12, 0, 0];
    ioapic.extend((IOAPIC_BASE as u32).to_le_bytes());
    ioapic.extend(0u32.to_le_bytes());
    t.append_slice(&ioapic);
    // Interrupt source overrides (5.2.12.5): where the timer is, and the SCI, level-triggered and active high.
    const ACTIVE_HIGH_LEVEL: u16 = 0xd;
    let timer = (config.timer_gsi != 0).then_some((0u8, config.timer_gsi, 0));
    let sci =
        matches!(config.power, Power::Fixed { .. }).then_some((SCI_GSI as u8, SCI_GSI, ACTIVE_HIGH_LEVEL));
    let level = config.level_irqs.iter().map(|irq| (*irq, u32::from(*irq), ACTIVE_HIGH_LEVEL));
    for (source, gsi, flags) in timer.into_iter().chain(sci).chain(level) {
        let mut e = vec![2, 10, 0, source];
        e.extend(gsi.to_le_bytes());
        e.extend(flags.to_le_bytes());
        t.append_slice(&e);
    }
    // NMI on LINT1 of every processor (5.2.12.7).
    t.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    t
}

/// MCFG (PCI firmware specification 3.0, 4.1.2).
pub(super) fn mcfg(pci: &PciHost) -> Vec<u8> {
    let mut t = MCFG::new(OEM_ID, OEM_TABLE, 1);
    t.add_ecam(pci.ecam_base, 0, 0, (pci.buses - 1) as u8);
    let mut bytes = Vec::new();
    t.to_aml_bytes(&mut bytes);
    bytes
}

/// HPET (IA-PC HPET specification 1.0a, 3.2.4).
pub(super) fn hpet() -> Sdt {
    let mut t = table(b"HPET", 1);
    let block_id: u32 = 0x8086_a201; // vendor, legacy replacement, 64-bit, 3 comparators, revision 1
    t.append_slice(&block_id.to_le_bytes());
    t.append_slice(&[0, 0, 0, 0]); // system memory, 0 bits wide and offset as firmware has it
    t.append_slice(&HPET_BASE.to_le_bytes());
    t.append_slice(&[0, 0, 0, 0]); // number, minimum tick, page protection
    t
}
