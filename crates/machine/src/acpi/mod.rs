//! ACPI tables (ACPI specification 6.5): RSDP, RSDT, XSDT, FADT, FACS, MADT, HPET, MCFG, DSDT.

pub mod blob;
mod dsdt;
mod tables;

use crate::topology::Topology;
use acpi_tables::sdt::Sdt;
use memory::GuestMemory;

pub use blob::Blob;
pub use dsdt::{PciHost, SerialPort, VirtioMmio};

/// OEM identity in table headers; guests written for QEMU recognise it.
pub(crate) const OEM_ID: [u8; 6] = *b"BOCHS ";
const OEM_TABLE: [u8; 8] = *b"BXPC    ";

/// What the tables describe.
#[derive(Clone, Debug, Default)]
pub struct AcpiConfig {
    /// vCPUs and their APIC IDs.
    pub topology: Topology,
    /// Power management registers: the fixed hardware's, or the reduced-hardware kind of a microvm.
    pub power: Power,
    /// IOAPIC input of the timer chip: 2 as in most PCs, 0 with KVM's own controllers.
    pub timer_gsi: u32,
    /// PCI host bridge, if the board has one.
    pub pci: Option<PciHost>,
    /// Whether there is an HPET at 0xfed0_0000.
    pub hpet: bool,
    /// Serial ports.
    pub serial: Vec<SerialPort>,
    /// virtio-mmio transports.
    pub virtio_mmio: Vec<VirtioMmio>,
    /// Whether there is an i8042 keyboard controller.
    pub i8042: bool,
    /// ISA interrupts that PCI's arrive as, level-triggered.
    pub level_irqs: Vec<u8>,
    /// Whether there is a firmware configuration device.
    pub fw_cfg: bool,
    /// Whether there is a CMOS real-time clock.
    pub rtc: bool,
}

/// Power management hardware.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Power {
    /// Fixed hardware (PM1 blocks, timer, GPE) at this port base, as the ICH9 has it; SCI on GSI 9.
    Fixed {
        /// PMBASE.
        base: u16,
    },
    /// Reduced hardware: sleep control, sleep status and reset registers at consecutive ports, and a generic event
    /// device with the power button.
    Reduced {
        /// Port of the sleep control register; status follows, then reset.
        base: u16,
        /// GSI of the event device.
        gsi: u32,
    },
    /// No power management.
    #[default]
    None,
}

impl Power {
    /// Port of the reset register, which takes [`RESET_VALUE`].
    pub fn reset_port(&self) -> Option<u16> {
        match self {
            Power::Fixed { .. } => Some(RESET_PORT),
            Power::Reduced { base, .. } => Some(base + 2),
            Power::None => None,
        }
    }
}

/// SCI on PCs.
pub const SCI_GSI: u32 = 9;
/// Address of the HPET.
pub const HPET_BASE: u64 = 0xfed0_0000;
/// Address of the IOAPIC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Address of the local APICs.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Port, written with [`RESET_VALUE`], that resets a PC.
pub const RESET_PORT: u16 = 0xcf9;
/// What resets it.
pub const RESET_VALUE: u8 = 0x0f;
/// S5's SLP_TYP with reduced hardware.
pub const REDUCED_S5_SLEEP_TYPE: u8 = 5;

/// Builds the tables. Their lengths depend only on what the machine is made of, not on where firmware puts it.
pub fn build(config: &AcpiConfig) -> Blob {
    let mut blob = Blob::default();
    let dsdt = blob.add(&dsdt::build(config), &[]);
    let facs = match config.power {
        Power::Fixed { .. } => Some(blob.add_raw(&tables::facs())),
        _ => None,
    };
    // Offsets in the FADT (5.2.9): FIRMWARE_CTRL, DSDT, X_FIRMWARE_CTRL, X_DSDT.
    let mut pointers = vec![(140, 8, dsdt)];
    if let Some(facs) = facs {
        pointers.extend([(36, 4, facs), (40, 4, dsdt), (132, 8, facs)]);
    }
    let mut entries = vec![blob.add(&tables::fadt(config), &pointers)];
    entries.push(blob.add(tables::madt(config).as_slice(), &[]));
    if let Some(pci) = config.pci.as_ref().filter(|p| p.has_ecam) {
        entries.push(blob.add(&tables::mcfg(pci), &[]));
    }
    if config.hpet {
        entries.push(blob.add(tables::hpet().as_slice(), &[]));
    }
    let list = |signature, size: usize| {
        let mut t = table(signature, 1);
        t.append_slice(&vec![0; size * entries.len()]);
        let pointers = entries.iter().enumerate().map(|(i, e)| (36 + size * i, size, *e));
        (t.as_slice().to_vec(), pointers.collect::<Vec<_>>())
    };
    let (rsdt, xsdt) = (list(b"RSDT", 4), list(b"XSDT", 8));
    blob.rsdt = blob.add(&rsdt.0, &rsdt.1);
    blob.xsdt = blob.add(&xsdt.0, &xsdt.1);
    blob
}

/// Writes the tables at `base` (paragraph-aligned, in the BIOS area so that systems that scan find the RSDP), which
/// starts with the RSDP. Returns the length used.
///
/// # Errors
/// There is no RAM there.
pub fn write(config: &AcpiConfig, memory: &GuestMemory, base: u64) -> memory::Result<u64> {
    const BLOB: u64 = 64; // behind the RSDP
    let (bytes, rsdp) = build(config).resolve(base + BLOB, OEM_ID);
    memory.write(base + BLOB, &bytes)?;
    memory.write(base, &rsdp)?;
    Ok(BLOB + bytes.len() as u64)
}

fn table(signature: &[u8; 4], revision: u8) -> Sdt {
    Sdt::new(*signature, 36, revision, OEM_ID, OEM_TABLE, 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::{Backing, Layout};

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let m = GuestMemory::new(&Layout::pc(1 << 20, 1 << 30).unwrap(), &Backing::Anonymous, false).unwrap();
        let config = AcpiConfig {
            topology: Topology::flat(3),
            power: Power::Fixed { base: 0x600 },
            pci: Some(PciHost::default()),
            hpet: true,
            serial: vec![SerialPort { port: 0x3f8, gsi: 4 }],
            i8042: true,
            rtc: true,
            ..Default::default()
        };
        write(&config, &m, 0xe0000).unwrap();
        let read = |at: u64, len: usize| {
            let mut b = vec![0; len];
            m.read(at, &mut b).unwrap();
            b
        };
        let rsdp = read(0xe0000, 36);
        assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(&rsdp)), (&b"RSD PTR "[..], 0, 0));
        let table_at = |at: u64| {
            let len = u32::from_le_bytes(read(at + 4, 4).try_into().unwrap());
            let bytes = read(at, len as usize);
            assert_eq!(sum(&bytes), 0, "{:?}", std::str::from_utf8(&bytes[..4]));
            bytes
        };
        let xsdt = table_at(u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        let mut names = vec![];
        for entry in xsdt[36..].chunks(8) {
            let t = table_at(u64::from_le_bytes(entry.try_into().unwrap()));
            names.push(String::from_utf8(t[..4].to_vec()).unwrap());
            if &t[..4] == b"FACP" {
                table_at(u64::from_le_bytes(t[140..148].try_into().unwrap()));
            }
        }
        assert_eq!(names, ["FACP", "APIC", "MCFG", "HPET"]);
    }
}
