//! The script by which firmware puts the ACPI tables in place: allocate, point, sum (QEMU, hw/acpi/bios-linker-loader).

use crate::acpi::blob::{
    Blob, CHECKSUM, RSDP_CHECKSUM, RSDP_FIRST_LEN, RSDP_LEN, RSDP_RSDT, RSDP_WHOLE_CHECKSUM, RSDP_XSDT,
};

/// File with the tables.
pub(super) const TABLES: &str = "etc/acpi/tables";
/// File with the RSDP.
pub(super) const RSDP: &str = "etc/acpi/rsdp";
/// File with the script.
pub(super) const SCRIPT: &str = "etc/table-loader";

const ENTRY_LEN: usize = 128;
const NAME_LEN: usize = 56;

/// Where memory is allocated.
#[derive(Clone, Copy)]
pub(super) enum Zone {
    /// Anywhere below 4 GiB.
    High = 1,
    /// The BIOS area, in which systems look for the RSDP.
    BiosArea = 2,
}

/// A script being written.
#[derive(Default)]
pub(super) struct Script(Vec<u8>);

impl Script {
    fn entry(&mut self, command: u32, body: &[u8]) {
        let start = self.0.len();
        self.0.extend(command.to_le_bytes());
        self.0.extend(body);
        self.0.resize(start + ENTRY_LEN, 0);
    }

    /// Loads a file into memory.
    pub(super) fn allocate(&mut self, file: &str, align: u32, zone: Zone) {
        self.entry(1, &[&name(file)[..], &align.to_le_bytes(), &[zone as u8]].concat());
    }

    /// Adds the address of `source` to the pointer at `at` of `file`.
    pub(super) fn add_pointer(&mut self, file: &str, source: &str, at: usize, size: usize) {
        let at = (at as u32).to_le_bytes(); // far below 4 GiB
        self.entry(2, &[&name(file)[..], &name(source), &at, &[size as u8]].concat());
    }

    /// Sums part of a file.
    pub(super) fn add_checksum(&mut self, file: &str, at: usize, start: usize, len: usize) {
        let numbers = [at, start, len].map(|n| (n as u32).to_le_bytes()).concat(); // as above
        self.entry(3, &[&name(file)[..], &numbers].concat());
    }

    /// Tells the host, in the writable file `file`, the address of `source` plus `offset`.
    pub(super) fn write_pointer(&mut self, file: &str, at: u32, source: &str, offset: u32, size: u8) {
        let numbers = [at, offset].map(u32::to_le_bytes).concat();
        self.entry(4, &[&name(file)[..], &name(source), &numbers, &[size]].concat());
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.0
    }
}

fn name(file: &str) -> [u8; NAME_LEN] {
    let mut field = [0; NAME_LEN];
    let len = file.len().min(NAME_LEN - 1);
    field[..len].copy_from_slice(&file.as_bytes()[..len]);
    field
}

/// Appends what brings the blob and its RSDP in place.
pub(super) fn place_tables(script: &mut Script, blob: &Blob) {
    script.allocate(TABLES, 64, Zone::High);
    script.allocate(RSDP, 16, Zone::BiosArea);
    for link in &blob.links {
        script.add_pointer(TABLES, TABLES, link.at, link.size);
    }
    for (start, len) in &blob.summed {
        script.add_checksum(TABLES, start + CHECKSUM, *start, *len);
    }
    script.add_pointer(RSDP, TABLES, RSDP_RSDT, 4);
    script.add_pointer(RSDP, TABLES, RSDP_XSDT, 8);
    script.add_checksum(RSDP, RSDP_CHECKSUM, 0, RSDP_FIRST_LEN);
    script.add_checksum(RSDP, RSDP_WHOLE_CHECKSUM, 0, RSDP_LEN);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::{self, AcpiConfig, PciHost, Power};
    use std::collections::BTreeMap;

    /// Does what firmware does.
    fn run(script: &[u8], files: &mut BTreeMap<String, (u64, Vec<u8>)>) {
        let text = |b: &[u8]| String::from_utf8(b.split(|c| *c == 0).next().unwrap().to_vec()).unwrap();
        let number = |b: &[u8]| u32::from_le_bytes(b[..4].try_into().unwrap()) as usize;
        for e in script.chunks(ENTRY_LEN) {
            let file = text(&e[4..60]);
            match number(e) {
                1 => assert!(files[&file].0.is_multiple_of(number(&e[60..]) as u64), "{file}"),
                2 => {
                    let source = files[&text(&e[60..116])].0;
                    let (at, size) = (number(&e[116..]), usize::from(e[120]));
                    let bytes = &mut files.get_mut(&file).unwrap().1;
                    let mut pointer = [0; 8];
                    pointer[..size].copy_from_slice(&bytes[at..at + size]);
                    let sum = u64::from_le_bytes(pointer) + source;
                    bytes[at..at + size].copy_from_slice(&sum.to_le_bytes()[..size]);
                }
                3 => {
                    let (at, start, len) = (number(&e[60..]), number(&e[64..]), number(&e[68..]));
                    let bytes = &mut files.get_mut(&file).unwrap().1;
                    let sum = bytes[start..start + len].iter().fold(0u8, |a, b| a.wrapping_add(*b));
                    bytes[at] = bytes[at].wrapping_sub(sum);
                }
                other => panic!("command {other}"),
            }
        }
    }

    #[test]
    fn the_script_gives_what_resolving_gives() {
        let config = AcpiConfig {
            power: Power::Fixed { base: 0x600 },
            pci: Some(PciHost::default()),
            hpet: true,
            ..AcpiConfig::default()
        };
        let blob = acpi::build(&config);
        let mut script = Script::default();
        place_tables(&mut script, &blob);
        let mut files = BTreeMap::from([
            (TABLES.to_owned(), (0x7fe0_0000, blob.bytes.clone())),
            (RSDP.to_owned(), (0xf_5a20, blob.rsdp(acpi::OEM_ID))),
        ]);
        run(&script.finish(), &mut files);
        let (bytes, rsdp) = blob.resolve(0x7fe0_0000, acpi::OEM_ID);
        assert_eq!(files[TABLES].1, bytes);
        assert_eq!(files[RSDP].1, rsdp);
    }
}
