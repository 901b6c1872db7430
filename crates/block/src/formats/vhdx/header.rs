//! The fixed structures of a VHDX file: headers, region table, metadata table ([MS-VHDX] 2.2, 2.5, 2.6).

use crate::{
    Error, Result,
    formats::support::{le16, le32, le64, put, random_uuid},
    storage::{Storage, StorageExt},
};

pub(super) const MIB: u64 = 1 << 20;
/// Where the two headers are.
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
/// Where the two region tables are.
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
/// Bytes of a header.
const HEADER: usize = 4096;
/// Bytes of a region table or a metadata table.
const TABLE: usize = 64 << 10;
/// Largest disk.
pub(super) const MAX_DISK: u64 = 64 << 40;

/// An identifier with the bytes as they are stored.
pub(super) type Guid = [u8; 16];

/// A GUID from its usual text, as stored: the first three fields least significant byte first.
const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> Guid {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

const REGION_BAT: Guid = guid(0x2dc2_7766, 0xf623, 0x4200, [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
const REGION_METADATA: Guid =
    guid(0x8b7c_a206, 0x4790, 0x4b9a, [0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e]);
const ITEM_PARAMETERS: Guid =
    guid(0xcaa1_6737, 0xfa36, 0x4d43, [0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b]);
const ITEM_SIZE: Guid = guid(0x2fa5_4224, 0xcd1b, 0x4876, [0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8]);
const ITEM_PAGE83: Guid = guid(0xbeca_12ab, 0xb2e6, 0x4523, [0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46]);
const ITEM_LOGICAL: Guid =
    guid(0x8141_bf1d, 0xa96f, 0x4709, [0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f]);
const ITEM_PHYSICAL: Guid =
    guid(0xcda3_48c7, 0x445d, 0x4471, [0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56]);
const ITEM_PARENT: Guid = guid(0xa8d3_5f2d, 0xb30b, 0x454d, [0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c]);

/// The Castagnoli CRC of `bytes`, continuing from `crc`.
pub(super) fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    const ENTRIES: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut value = i as u32;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 != 0 { value >> 1 ^ 0x82f6_3b78 } else { value >> 1 };
                bit += 1;
            }
            table[i] = value;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!crc, |crc, &b| crc >> 8 ^ ENTRIES[usize::from(crc as u8 ^ b)])
}

/// The CRC of a structure whose own CRC stands at byte 4.
pub(super) fn own_crc(bytes: &[u8]) -> u32 {
    let crc = crc32c(0, &bytes[..4]);
    crc32c(crc32c(crc, &[0; 4]), &bytes[8..])
}

/// One of the two headers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub(super) sequence: u64,
    pub(super) file_write: Guid,
    pub(super) data_write: Guid,
    /// Zeros where the log is empty.
    pub(super) log: Guid,
    pub(super) log_length: u32,
    pub(super) log_offset: u64,
    /// Which of the two places it is in.
    place: usize,
}

impl Header {
    fn parse(b: &[u8], place: usize) -> Option<Self> {
        if &b[..4] != b"head" || le32(b, 4) != own_crc(b) || le16(b, 66) != 1 || le16(b, 64) != 0 {
            return None;
        }
        let id = |at: usize| {
            let mut id = [0; 16];
            id.copy_from_slice(&b[at..at + 16]);
            id
        };
        Some(Header {
            sequence: le64(b, 8),
            file_write: id(16),
            data_write: id(32),
            log: id(48),
            log_length: le32(b, 68),
            log_offset: le64(b, 72),
            place,
        })
    }

    /// The current header of a file.
    pub(super) fn read(storage: &dyn Storage) -> Result<Self> {
        let mut best: Option<Header> = None;
        for (place, at) in HEADERS.into_iter().enumerate() {
            let bytes = storage.read_vec(at, HEADER)?;
            if let Some(header) = Header::parse(&bytes, place)
                && best.as_ref().is_none_or(|b| header.sequence > b.sequence)
            {
                best = Some(header);
            }
        }
        let header = best.ok_or_else(|| Error::invalid("No valid VHDX header found"))?;
        if !header.log_offset.is_multiple_of(MIB)
            || !u64::from(header.log_length).is_multiple_of(MIB)
            || header.log_length == 0
            || header.log_offset < MIB
            || header.log_offset > i64::MAX as u64
        {
            return Err(Error::invalid("Invalid VHDX header: the log's place makes no sense"));
        }
        Ok(header)
    }

    /// Writes this header in the other place, as the newer of the two, and makes that durable.
    pub(super) fn advance(&mut self, storage: &dyn Storage) -> Result<()> {
        let mut next = self.clone();
        next.sequence = next.sequence.wrapping_add(1);
        next.place = 1 - next.place;
        storage.write_at(&next.encode(), HEADERS[next.place])?;
        storage.flush()?;
        *self = next;
        Ok(())
    }

    fn encode(&self) -> Vec<u8> {
        let mut b = vec![0; HEADER];
        put(&mut b, 0, b"head");
        put(&mut b, 8, &self.sequence.to_le_bytes());
        put(&mut b, 16, &self.file_write);
        put(&mut b, 32, &self.data_write);
        put(&mut b, 48, &self.log);
        put(&mut b, 66, &1u16.to_le_bytes());
        put(&mut b, 68, &self.log_length.to_le_bytes());
        put(&mut b, 72, &self.log_offset.to_le_bytes());
        let crc = own_crc(&b);
        put(&mut b, 4, &crc.to_le_bytes());
        b
    }
}

/// A region of the file: offset and length in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Region {
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl Region {
    pub(super) fn overlaps(&self, offset: u64, length: u64) -> bool {
        offset < self.offset + self.length && self.offset < offset.saturating_add(length)
    }
}

/// What the region table says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Regions {
    pub(super) bat: Region,
    pub(super) metadata: Region,
}

impl Regions {
    pub(super) fn read(storage: &dyn Storage) -> Result<Self> {
        let mut first_error = None;
        for at in REGION_TABLES {
            match Self::parse(&storage.read_vec(at, TABLE)?) {
                Ok(regions) => return Ok(regions),
                Err(e) => first_error = first_error.or(Some(e)),
            }
        }
        Err(first_error.unwrap_or_else(|| Error::invalid("No valid VHDX region table found")))
    }

    fn parse(b: &[u8]) -> Result<Self> {
        let bad = |what: &str| Error::invalid(format!("Invalid VHDX region table: {what}"));
        if &b[..4] != b"regi" || le32(b, 4) != own_crc(b) {
            return Err(bad("wrong signature or checksum"));
        }
        let count = le32(b, 8) as usize;
        if count > 2047 {
            return Err(bad("too many entries"));
        }
        let (mut bat, mut metadata) = (None, None);
        let mut seen: Vec<Region> = Vec::new();
        for e in b[16..].chunks_exact(32).take(count) {
            let region = Region { offset: le64(e, 16), length: le32(e, 24).into() };
            if region.offset < MIB
                || !region.offset.is_multiple_of(MIB)
                || !region.length.is_multiple_of(MIB)
                || region.length == 0
                || region.offset > i64::MAX as u64
            {
                return Err(bad("a region's place makes no sense"));
            }
            if seen.iter().any(|s| s.overlaps(region.offset, region.length)) {
                return Err(bad("regions overlap"));
            }
            seen.push(region);
            let slot = if e[..16] == REGION_BAT {
                &mut bat
            } else if e[..16] == REGION_METADATA {
                &mut metadata
            } else if le32(e, 28) & 1 != 0 {
                return Err(Error::unsupported(
                    "The VHDX image requires a region this program does not know",
                ));
            } else {
                continue;
            };
            if slot.replace(region).is_some() {
                return Err(bad("a region is listed twice"));
            }
        }
        match (bat, metadata) {
            (Some(bat), Some(metadata)) => Ok(Regions { bat, metadata }),
            _ => Err(bad("the block table or the metadata is missing")),
        }
    }
}

/// What the metadata says about the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Metadata {
    pub(super) block: u64,
    pub(super) size: u64,
    pub(super) logical: u32,
}

impl Metadata {
    pub(super) fn read(storage: &dyn Storage, region: Region) -> Result<Self> {
        let bad = |what: &str| Error::invalid(format!("Invalid VHDX metadata: {what}"));
        let table = storage.read_vec(region.offset, TABLE)?;
        if &table[..8] != b"metadata" {
            return Err(bad("wrong signature"));
        }
        let count = usize::from(le16(&table, 10));
        if count > 2047 {
            return Err(bad("too many entries"));
        }
        let (mut parameters, mut size, mut logical) = (None, None, None);
        for e in table[32..].chunks_exact(32).take(count) {
            let (offset, length, flags) = (u64::from(le32(e, 16)), u64::from(le32(e, 20)), le32(e, 24));
            let mut item = [0; 8];
            let known = [ITEM_PARAMETERS, ITEM_SIZE, ITEM_PAGE83, ITEM_LOGICAL, ITEM_PHYSICAL];
            if e[..16] == ITEM_PARENT {
                return Err(Error::unsupported(
                    "VHDX images with a parent (differencing disks) are not supported",
                ));
            }
            if !known.iter().any(|k| e[..16] == *k) {
                if flags & 4 != 0 {
                    return Err(Error::unsupported(
                        "The VHDX image requires metadata this program does not know",
                    ));
                }
                continue;
            }
            if offset < TABLE as u64 || offset + length > region.length {
                return Err(bad("an item lies outside of its region"));
            }
            storage.read_at(&mut item, region.offset + offset)?;
            if e[..16] == ITEM_PARAMETERS {
                parameters = Some((le32(&item, 0), le32(&item, 4)));
            } else if e[..16] == ITEM_SIZE {
                size = Some(le64(&item, 0));
            } else if e[..16] == ITEM_LOGICAL {
                logical = Some(le32(&item, 0));
            }
        }
        let (Some((block, flags)), Some(size), Some(logical)) = (parameters, size, logical) else {
            return Err(bad("a required item is missing"));
        };
        if flags & 2 != 0 {
            return Err(Error::unsupported(
                "VHDX images with a parent (differencing disks) are not supported",
            ));
        }
        if !block.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block) {
            return Err(bad(&format!("block size {block}")));
        }
        if !matches!(logical, 512 | 4096) {
            return Err(bad(&format!("logical sector size {logical}")));
        }
        if size > MAX_DISK || !size.is_multiple_of(logical.into()) {
            return Err(bad(&format!("disk size {size}")));
        }
        Ok(Metadata { block: block.into(), size, logical })
    }

    /// Payload blocks between two entries for sector bitmaps.
    pub(super) fn chunk_ratio(&self) -> u64 {
        (u64::from(self.logical) << 23) / self.block
    }

    /// Payload blocks of the disk.
    pub(super) fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block)
    }

    /// Entries of the block table.
    pub(super) fn entries(&self) -> u64 {
        self.blocks() + self.blocks().saturating_sub(1) / self.chunk_ratio()
    }
}

/// Writes everything but the block table's entries; the result says where the regions are.
pub(super) fn write_new(storage: &dyn Storage, metadata: Metadata, log_length: u32) -> Result<Regions> {
    let mut id = vec![0; TABLE];
    put(&mut id, 0, b"vhdxfile");
    for (i, unit) in "Kvasir".encode_utf16().enumerate() {
        put(&mut id, 8 + 2 * i, &unit.to_le_bytes());
    }
    storage.write_at(&id, 0)?;
    let mut header = Header {
        sequence: 0,
        file_write: random_uuid()?,
        data_write: random_uuid()?,
        log: [0; 16],
        log_length,
        log_offset: MIB,
        place: 0,
    };
    storage.write_at(&header.encode(), HEADERS[0])?;
    header.advance(storage)?;
    let bat = Region {
        offset: MIB + u64::from(log_length),
        length: (metadata.entries() * 8).next_multiple_of(MIB).max(MIB),
    };
    let regions = Regions { bat, metadata: Region { offset: bat.offset + bat.length, length: MIB } };
    let mut table = vec![0; TABLE];
    put(&mut table, 0, b"regi");
    put(&mut table, 8, &2u32.to_le_bytes());
    for (i, (id, region)) in
        [(REGION_BAT, regions.bat), (REGION_METADATA, regions.metadata)].into_iter().enumerate()
    {
        let at = 16 + 32 * i;
        put(&mut table, at, &id);
        put(&mut table, at + 16, &region.offset.to_le_bytes());
        put(&mut table, at + 24, &(region.length as u32).to_le_bytes());
        put(&mut table, at + 28, &1u32.to_le_bytes());
    }
    let crc = own_crc(&table);
    put(&mut table, 4, &crc.to_le_bytes());
    for at in REGION_TABLES {
        storage.write_at(&table, at)?;
    }
    let mut bytes = vec![0; TABLE + 4096];
    put(&mut bytes, 0, b"metadata");
    put(&mut bytes, 10, &5u16.to_le_bytes());
    let parameters = metadata.block.to_le_bytes(); // the upper half is the flags: none
    let items: [(Guid, Vec<u8>, u32); 5] = [
        (ITEM_PARAMETERS, parameters.to_vec(), 4),
        (ITEM_SIZE, metadata.size.to_le_bytes().to_vec(), 6),
        (ITEM_PAGE83, random_uuid()?.to_vec(), 6),
        (ITEM_LOGICAL, metadata.logical.to_le_bytes().to_vec(), 6),
        (ITEM_PHYSICAL, 512u32.to_le_bytes().to_vec(), 6),
    ];
    let mut at = TABLE;
    for (i, (id, value, flags)) in items.iter().enumerate() {
        let entry = 32 + 32 * i;
        put(&mut bytes, entry, id);
        put(&mut bytes, entry + 16, &(at as u32).to_le_bytes());
        put(&mut bytes, entry + 20, &(value.len() as u32).to_le_bytes());
        put(&mut bytes, entry + 24, &flags.to_le_bytes());
        put(&mut bytes, at, value);
        at += value.len().next_multiple_of(8);
    }
    storage.write_at(&bytes, regions.metadata.offset)?;
    Ok(regions)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;
    use proptest::prelude::*;

    fn sample() -> (Vec<u8>, Regions, Metadata) {
        let memory = MemoryStorage::default();
        let metadata = Metadata { block: 8 << 20, size: 100 << 20, logical: 512 };
        let regions = write_new(&memory, metadata, 1 << 20).unwrap();
        memory.set_size(regions.metadata.offset + MIB).unwrap();
        (memory.snapshot(), regions, metadata)
    }

    #[test]
    fn what_is_written_reads_back() {
        assert_eq!(crc32c(0, b"123456789"), 0xe306_9283);
        let (bytes, regions, metadata) = sample();
        let memory = MemoryStorage::new(bytes);
        let mut header = Header::read(&memory).unwrap();
        assert_eq!((header.sequence, header.place), (1, 1));
        assert_eq!(Regions::read(&memory).unwrap(), regions);
        assert_eq!(Metadata::read(&memory, regions.metadata).unwrap(), metadata);
        header.advance(&memory).unwrap();
        assert_eq!(Header::read(&memory).unwrap(), header);
        // A torn newest header leaves the older one.
        memory.write_at(&[9], HEADERS[header.place] + 100).unwrap();
        assert_eq!(Header::read(&memory).unwrap().sequence, 1);
    }

    proptest! {
        #[test]
        fn any_metadata_reads_or_fails(changes in proptest::collection::vec((0..256usize, any::<u8>()), 1..12), items in any::<[u8; 8]>()) {
            let (mut bytes, regions, _) = sample();
            let at = regions.metadata.offset as usize;
            for (i, byte) in changes {
                bytes[at + i] = byte;
                bytes[REGION_TABLES[0] as usize + i] = byte;
            }
            put(&mut bytes, at + TABLE, &items);
            let memory = MemoryStorage::new(bytes);
            let _ = Regions::read(&memory);
            if let Ok(m) = Metadata::read(&memory, regions.metadata) {
                let _ = m.entries();
            }
        }
    }
}
