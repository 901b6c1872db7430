//! SMBIOS tables (DMTF DSP0134 3.4), 64-bit entry point.

use memory::GuestMemory;

/// What the tables say.
#[derive(Clone, Debug)]
pub struct SmbiosConfig {
    /// Product name: the board's, as QEMU's guests know it.
    pub product: String,
    /// System UUID, in the order it is written.
    pub uuid: Option<[u8; 16]>,
    /// Number of processor sockets.
    pub sockets: u32,
    /// Cores of each socket.
    pub cores: u32,
    /// Threads of each socket.
    pub threads: u32,
    /// RAM in bytes.
    pub memory: u64,
}

/// Builds structures; strings are numbered as they come.
struct Table {
    bytes: Vec<u8>,
    handle: u16,
    count: u16,
}

impl Table {
    /// Adds a structure: `formatted` is what follows the 4-byte header.
    fn add(&mut self, kind: u8, formatted: &[u8], strings: &[&str]) -> u16 {
        let handle = self.handle;
        self.handle += 1;
        self.count += 1;
        self.bytes.push(kind);
        self.bytes.push(formatted.len() as u8 + 4);
        self.bytes.extend(handle.to_le_bytes());
        self.bytes.extend(formatted);
        for s in strings {
            self.bytes.extend(s.bytes().filter(|b| *b != 0));
            self.bytes.push(0);
        }
        if strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        handle
    }
}

fn build(config: &SmbiosConfig, with_bios: bool) -> Vec<u8> {
    let mut t = Table { bytes: Vec::new(), handle: 0x100, count: 0 };
    let version = env!("CARGO_PKG_VERSION");
    // Type 0: BIOS, unless there is one that tells of itself. Characteristics: "not supported"; extension: virtual machine, UEFI not.
    let mut bios = vec![1, 2, 0, 0xe8, 3, 0];
    bios.extend(8u64.to_le_bytes());
    bios.extend([0, 0x14, 0, 0, 0xff, 0xff]);
    if with_bios {
        t.add(0, &bios, &["Kvasir", version, "04/01/2014"]);
    }
    // Type 1: system.
    let mut system = vec![1, 2, 3, 0];
    system.extend(uuid_field(config.uuid));
    system.extend([6, 0, 0]); // wake-up type: power switch
    t.add(1, &system, &["QEMU", &config.product, version]);
    // Type 3: chassis, other.
    t.add(3, &[1, 1, 2, 0, 0, 3, 3, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0], &["QEMU", version]);
    for socket in 0..config.sockets {
        let designation = format!("CPU {socket}");
        let byte = |n: u32| n.min(255) as u8;
        let mut cpu = vec![1, 3, 1, 2];
        cpu.extend([0; 8]); // processor ID
        cpu.extend([3, 0]);
        cpu.extend([0; 6]); // clock and speeds: unknown
        cpu.extend([0x41, 1]); // enabled, upgrade: other
        cpu.extend([0xff; 6]); // no cache handles
        cpu.extend([0, 0, 0, byte(config.cores), byte(config.cores), byte(config.threads), 2, 0, 0xfe, 0]);
        for n in [config.cores, config.cores, config.threads] {
            cpu.extend((n as u16).to_le_bytes());
        }
        t.add(4, &cpu, &[&designation, "QEMU", version]);
    }
    // Type 16: physical memory array; type 17: one device that holds it all.
    let kib = config.memory >> 10;
    let mut array = vec![1, 3, 6];
    array.extend(if kib < 0x8000_0000 { kib as u32 } else { 0x8000_0000 }.to_le_bytes());
    array.extend([0xfe, 0xff, 1, 0]);
    array.extend(if kib < 0x8000_0000 { 0 } else { config.memory }.to_le_bytes());
    let array = t.add(16, &array, &[]);
    let mib = config.memory >> 20;
    let mut dimm = array.to_le_bytes().to_vec();
    dimm.extend([0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]);
    dimm.extend(if mib < 0x7fff { mib as u16 } else { 0x7fff }.to_le_bytes());
    dimm.extend([9, 0, 1, 0, 7, 2, 0, 0, 0, 2, 0, 0, 0, 0]);
    dimm.extend(if mib < 0x7fff { 0 } else { mib as u32 & 0x7fff_ffff }.to_le_bytes());
    dimm.extend([0; 8]);
    t.add(17, &dimm, &["DIMM 0", "QEMU"]);
    t.add(32, &[0, 0, 0, 0, 0, 0, 0], &[]);
    t.add(127, &[], &[]);
    t.bytes
}

/// The UUID with its first three fields in little-endian order, as SMBIOS 2.6 and later want it.
fn uuid_field(uuid: Option<[u8; 16]>) -> [u8; 16] {
    let mut u = uuid.unwrap_or_default();
    u[..4].reverse();
    u[4..6].reverse();
    u[6..8].reverse();
    u
}

/// Writes the entry point at `base` (paragraph-aligned, 0xf0000..0x100000, where operating systems look for it) and
/// the structures behind it. Returns the length used.
///
/// # Errors
/// There is no RAM there.
pub fn write(config: &SmbiosConfig, memory: &GuestMemory, base: u64) -> memory::Result<u64> {
    let table = build(config, true);
    let at = base + 0x20;
    memory.write(base, &entry_point(&table, at))?;
    memory.write(at, &table)?;
    Ok(0x20 + table.len() as u64)
}

/// The entry point, without an address, and the structures, without the BIOS's, for firmware to complete and place.
pub fn for_firmware(config: &SmbiosConfig) -> (Vec<u8>, Vec<u8>) {
    let table = build(config, false);
    (entry_point(&table, 0).to_vec(), table)
}

fn entry_point(table: &[u8], at: u64) -> [u8; 24] {
    let mut entry = [0u8; 24];
    entry[..5].copy_from_slice(b"_SM3_");
    entry[6] = 24;
    (entry[7], entry[8]) = (3, 4);
    entry[10] = 1;
    entry[12..16].copy_from_slice(&(table.len() as u32).to_le_bytes());
    entry[16..24].copy_from_slice(&at.to_le_bytes());
    entry[5] = entry.iter().fold(0u8, |a, b| a.wrapping_sub(*b));
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_chain_to_the_end() {
        let config = SmbiosConfig {
            product: "Standard PC (Q35 + ICH9, 2009)".into(),
            uuid: Some([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]),
            sockets: 2,
            cores: 3,
            threads: 3,
            memory: 40 << 30,
        };
        let t = build(&config, true);
        let (mut at, mut kinds) = (0, vec![]);
        while at < t.len() {
            kinds.push(t[at]);
            let strings = at + usize::from(t[at + 1]);
            let end = t[strings..].windows(2).position(|w| w == [0, 0]).unwrap();
            at = strings + end + 2;
        }
        assert_eq!(kinds, [0, 1, 3, 4, 4, 16, 17, 32, 127]);
        assert_eq!(uuid_field(config.uuid)[..8], [4, 3, 2, 1, 6, 5, 8, 7]);
    }
}
