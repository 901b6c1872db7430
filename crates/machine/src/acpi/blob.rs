//! Tables that do not know yet where they will lie.

/// A pointer in the blob to something else in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Where the pointer is.
    pub at: usize,
    /// Its length in bytes, 4 or 8. It holds the offset of its target in the blob.
    pub size: usize,
}

/// ACPI tables one behind the other. Pointers are offsets in the blob, and checksums are zero, until somebody who knows
/// where the blob lies puts that right: [`Blob::resolve`], or firmware by the script in `firmware::loader`.
#[derive(Clone, Debug, Default)]
pub struct Blob {
    /// The tables.
    pub bytes: Vec<u8>,
    /// Pointers among them.
    pub links: Vec<Link>,
    /// Start and length of each table that has a checksum.
    pub summed: Vec<(usize, usize)>,
    /// Offset of the RSDT.
    pub rsdt: usize,
    /// Offset of the XSDT.
    pub xsdt: usize,
}

/// Where in a table's header the checksum is.
pub const CHECKSUM: usize = 9;

/// Length of the RSDP, which is not in the blob.
pub const RSDP_LEN: usize = 36;
/// Part of the RSDP that its first checksum covers.
pub const RSDP_FIRST_LEN: usize = 20;
/// Offsets in the RSDP: checksum, RSDT, XSDT, checksum of the whole.
pub const RSDP_CHECKSUM: usize = 8;
/// See [`RSDP_CHECKSUM`].
pub const RSDP_RSDT: usize = 16;
/// See [`RSDP_CHECKSUM`].
pub const RSDP_XSDT: usize = 24;
/// See [`RSDP_CHECKSUM`].
pub const RSDP_WHOLE_CHECKSUM: usize = 32;

/// What makes bytes sum to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |a, b| a.wrapping_sub(*b))
}

impl Blob {
    /// Appends a table with a header, aligned to 64 bytes; `pointers` are the offset in the table, the size and the
    /// target of each of its pointers. Returns its offset.
    pub(super) fn add(&mut self, table: &[u8], pointers: &[(usize, usize, usize)]) -> usize {
        let at = self.add_raw(table);
        self.bytes[at + CHECKSUM] = 0;
        self.summed.push((at, table.len()));
        for (offset, size, target) in pointers {
            let place = at + offset;
            self.bytes[place..place + size].copy_from_slice(&(*target as u64).to_le_bytes()[..*size]);
            self.links.push(Link { at: place, size: *size });
        }
        at
    }

    /// Appends something without a header or checksum.
    pub(super) fn add_raw(&mut self, bytes: &[u8]) -> usize {
        let at = self.bytes.len().next_multiple_of(64);
        self.bytes.resize(at, 0);
        self.bytes.extend(bytes);
        at
    }

    /// The RSDP (ACPI specification 6.5, 5.2.5.3), pointers and checksums as in the blob.
    pub fn rsdp(&self, oem: [u8; 6]) -> Vec<u8> {
        let mut rsdp = vec![0; RSDP_LEN];
        rsdp[..8].copy_from_slice(b"RSD PTR ");
        rsdp[9..15].copy_from_slice(&oem);
        rsdp[15] = 2;
        rsdp[RSDP_RSDT..RSDP_RSDT + 4].copy_from_slice(&(self.rsdt as u32).to_le_bytes());
        rsdp[20] = RSDP_LEN as u8;
        rsdp[RSDP_XSDT..RSDP_XSDT + 8].copy_from_slice(&(self.xsdt as u64).to_le_bytes());
        rsdp
    }

    /// The tables and the RSDP for a blob that lies at `base` (below 4 GiB).
    pub fn resolve(&self, base: u64, oem: [u8; 6]) -> (Vec<u8>, Vec<u8>) {
        let move_pointer = |bytes: &mut [u8], at: usize, size: usize| {
            let mut pointer = [0; 8];
            pointer[..size].copy_from_slice(&bytes[at..at + size]);
            let moved = u64::from_le_bytes(pointer) + base;
            bytes[at..at + size].copy_from_slice(&moved.to_le_bytes()[..size]);
        };
        let mut bytes = self.bytes.clone();
        for link in &self.links {
            move_pointer(&mut bytes, link.at, link.size);
        }
        for (start, len) in &self.summed {
            bytes[start + CHECKSUM] = checksum(&bytes[*start..start + len]);
        }
        let mut rsdp = self.rsdp(oem);
        move_pointer(&mut rsdp, RSDP_RSDT, 4);
        move_pointer(&mut rsdp, RSDP_XSDT, 8);
        rsdp[RSDP_CHECKSUM] = checksum(&rsdp[..RSDP_FIRST_LEN]);
        rsdp[RSDP_WHOLE_CHECKSUM] = checksum(&rsdp);
        (bytes, rsdp)
    }
}
