//! VDI, VirtualBox's disk image, version 1.1: a header, one table of 32-bit block numbers, blocks.
//!
//! Blocks are numbered in the order in which they lie in the file, and the header counts them; the next block goes behind the
//! last. Other programs allocate by that count alone, so it is made durable before any table entry that relies on it.

use super::{
    Mapping,
    CheckReport, Creation, Driver, Extent, Format, Info, Opening, Preallocation, ProbeInput, Repair,
    WriteExtent,
    support::{self, MetaCache, Places, Slot, Tail, flush_ordered, le32, le64, put},
};
use crate::{
    Error, Result,
    options::{OptionKind, OptionSpec},
    storage::{Storage, StorageExt, Zeroing},
};
use std::sync::{Arc, Mutex};

/// The format.
pub static DRIVER: Driver = Driver {
    name: "vdi",
    probe,
    open,
    create: Some(create),
    measure: None,
    options: &[OptionSpec {
        name: "static",
        kind: OptionKind::Bool,
        help: "VDI static (pre-allocated) image",
        default: Some("off"),
    }],
    backing: false,
};

const SIGNATURE: u32 = 0xbeda_107f;
const VERSION: u32 = 0x0001_0001;
const HEADER: usize = 512;
/// Block sizes seen are 1 MiB; the field allows any, and these bounds keep copies and tables sane.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 4096..=256 << 20;
const DEFAULT_BLOCK: u32 = 1 << 20;
/// Table entry of a block that was never written.
const UNALLOCATED: u32 = 0xffff_ffff;
/// Table entry of a block that was discarded: zeros.
const DISCARDED: u32 = 0xffff_fffe;
const TYPE_DYNAMIC: u32 = 1;
const TYPE_STATIC: u32 = 2;
/// Bytes of table kept in memory at most.
const CACHE: usize = 8 << 20;

/// Offsets of header fields.
mod at {
    pub(super) const SIGNATURE: usize = 0x40;
    pub(super) const VERSION: usize = 0x44;
    pub(super) const HEADER_SIZE: usize = 0x48;
    pub(super) const IMAGE_TYPE: usize = 0x4c;
    pub(super) const TABLE: usize = 0x154;
    pub(super) const DATA: usize = 0x158;
    pub(super) const SECTOR_SIZE: usize = 0x168;
    pub(super) const DISK_SIZE: usize = 0x170;
    pub(super) const BLOCK_SIZE: usize = 0x178;
    pub(super) const BLOCKS: usize = 0x180;
    pub(super) const ALLOCATED: usize = 0x184;
    pub(super) const UUID_IMAGE: usize = 0x188;
    pub(super) const UUID_LAST_SNAPSHOT: usize = 0x198;
    pub(super) const UUID_LINK: usize = 0x1a8;
    pub(super) const UUID_PARENT: usize = 0x1b8;
}

/// The header fields that matter, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    is_static: bool,
    table: u64,
    data: u64,
    disk_size: u64,
    block: u64,
    blocks: u32,
}

impl Header {
    fn parse(b: &[u8; HEADER]) -> Result<Self> {
        let bad = |what: String| Error::invalid(format!("Invalid VDI image: {what}"));
        if le32(b, at::SIGNATURE) != SIGNATURE {
            return Err(bad(format!("bad signature {:#010x}", le32(b, at::SIGNATURE))));
        }
        let unsupported = |what: String| Error::unsupported(format!("unsupported VDI image ({what})"));
        let version = le32(b, at::VERSION);
        if version != VERSION {
            return Err(unsupported(format!("version {}.{}", version >> 16, version & 0xffff)));
        }
        let image_type = le32(b, at::IMAGE_TYPE);
        if !matches!(image_type, TYPE_DYNAMIC | TYPE_STATIC) {
            return Err(unsupported(format!("image type {image_type}")));
        }
        let (table, data) = (le32(b, at::TABLE), le32(b, at::DATA));
        if table % 512 != 0 || table < HEADER as u32 {
            return Err(unsupported(format!("unaligned block map offset {table:#x}")));
        }
        if data % 512 != 0 {
            return Err(unsupported(format!("unaligned data offset {data:#x}")));
        }
        if le32(b, at::SECTOR_SIZE) != 512 {
            return Err(unsupported(format!("sector size {} is not 512", le32(b, at::SECTOR_SIZE))));
        }
        let block = le32(b, at::BLOCK_SIZE);
        if !block.is_power_of_two() || !BLOCK_SIZES.contains(&block) {
            return Err(unsupported(format!("block size {block}")));
        }
        let (disk_size, blocks) = (le64(b, at::DISK_SIZE), le32(b, at::BLOCKS));
        // Some writers leave a size that is no multiple of a sector; the partial sector is part of the disk.
        let disk_size = disk_size
            .checked_next_multiple_of(512)
            .filter(|&s| s <= u64::from(blocks) * u64::from(block))
            .ok_or_else(|| unsupported(format!("disk size {disk_size} needs more than {blocks} blocks")))?;
        if u64::from(data) < u64::from(table) + u64::from(blocks) * 4 {
            return Err(bad("the block map overlaps the data".into()));
        }
        if b[at::UUID_LINK..at::UUID_LINK + 16] != [0; 16] {
            return Err(unsupported("non-NULL link UUID".into()));
        }
        if b[at::UUID_PARENT..at::UUID_PARENT + 16] != [0; 16] {
            return Err(unsupported("non-NULL parent UUID".into()));
        }
        Ok(Header {
            is_static: image_type == TYPE_STATIC,
            table: u64::from(table),
            data: u64::from(data),
            disk_size,
            block: u64::from(block),
            blocks,
        })
    }
}

/// An open image.
struct Vdi {
    storages: [Arc<dyn Storage>; 1],
    header: Header,
    table: MetaCache,
    /// The sector of the header that holds the count of blocks.
    count: MetaCache,
    tail: Mutex<Option<Arc<Tail>>>,
    serial: Mutex<()>,
}

fn probe(input: &ProbeInput<'_>) -> u32 {
    if super::has_magic(input.head, at::SIGNATURE, &SIGNATURE.to_le_bytes()) { 100 } else { 0 }
}

fn open(opening: Opening<'_>) -> Result<Box<dyn Format>> {
    let mut bytes = [0; HEADER];
    opening.storage.read_at(&mut bytes, 0)?;
    let header = Header::parse(&bytes)?;
    if header.table + u64::from(header.blocks) * 4 > opening.storage.size()?.next_multiple_of(512) {
        return Err(Error::invalid("Invalid VDI image: the block map reaches past the end of the file"));
    }
    Ok(Box::new(Vdi {
        table: MetaCache::new(Arc::clone(&opening.storage), CACHE),
        count: MetaCache::new(Arc::clone(&opening.storage), 0),
        storages: [opening.storage],
        header,
        tail: Mutex::new(None),
        serial: Mutex::new(()),
    }))
}

fn create(creation: Creation<'_>) -> Result<()> {
    let is_static = creation.options.take_bool("static")?.unwrap_or(false);
    let block = u64::from(DEFAULT_BLOCK);
    let size =
        creation.size.checked_next_multiple_of(512).ok_or_else(|| Error::usage("Image size too large"))?;
    // The data offset is a 32-bit number of bytes, so the table has to end below 4 GiB.
    let blocks =
        u32::try_from(size.div_ceil(block)).ok().filter(|&b| b < u32::MAX / 4 - 512).ok_or_else(|| {
            Error::unsupported(format!(
                "Unsupported VDI image size (size is {size:#x}, max is {:#x})",
                u64::from(u32::MAX / 4 - 512) << 20
            ))
        })?;
    let table = HEADER as u64;
    let data = table + (u64::from(blocks) * 4).next_multiple_of(512);
    let mut header = [0; HEADER];
    put(&mut header, 0, b"<<< Kvasir VM Virtual Disk Image >>>\n");
    for (offset, value) in [
        (at::SIGNATURE, SIGNATURE),
        (at::VERSION, VERSION),
        (at::HEADER_SIZE, 0x180),
        (at::IMAGE_TYPE, if is_static { TYPE_STATIC } else { TYPE_DYNAMIC }),
        (at::TABLE, table as u32),
        (at::DATA, data as u32),
        (at::SECTOR_SIZE, 512),
        (at::BLOCK_SIZE, DEFAULT_BLOCK),
        (at::BLOCKS, blocks),
        (at::ALLOCATED, if is_static { blocks } else { 0 }),
    ] {
        put(&mut header, offset, &value.to_le_bytes());
    }
    put(&mut header, at::DISK_SIZE, &size.to_le_bytes());
    put(&mut header, at::UUID_IMAGE, &support::random_uuid()?);
    put(&mut header, at::UUID_LAST_SNAPSHOT, &support::random_uuid()?);
    let storage = &creation.storage;
    storage.write_at(&header, 0)?;
    // In pieces, so that the table of a large disk does not have to fit in memory.
    let mut piece = Vec::with_capacity(1 << 16);
    let mut offset = table;
    for first in (0..blocks).step_by(1 << 14) {
        piece.clear();
        for i in first..blocks.min(first + (1 << 14)) {
            piece.extend_from_slice(&(if is_static { i } else { UNALLOCATED }).to_le_bytes());
        }
        storage.write_at(&piece, offset)?;
        offset += piece.len() as u64;
    }
    storage.fill_zeroes(offset, data - offset)?;
    if is_static {
        storage.set_size(data + u64::from(blocks) * block)?;
    }
    storage.flush()
}

impl Vdi {
    fn lookup(&self, first: u64, out: &mut [Slot]) -> Result<usize> {
        let mut bytes = [0; 2048];
        let n = out.len().min(512);
        self.table.read(self.header.table + first * 4, &mut bytes[..n * 4])?;
        for (i, slot) in out[..n].iter_mut().enumerate() {
            *slot = match le32(&bytes, i * 4) {
                UNALLOCATED => Slot::Free,
                DISCARDED => Slot::Zero,
                // The header bounds the number of blocks; a table that says otherwise is damaged.
                entry if entry >= self.header.blocks => {
                    return Err(Error::Corrupt(format!(
                        "'{}': block {} of the VDI image refers to block {entry} of the file, but there are only {}",
                        self.storages[0].name(),
                        first + i as u64,
                        self.header.blocks
                    )));
                }
                entry => Slot::Data(self.header.data + u64::from(entry) * self.header.block),
            };
        }
        Ok(n)
    }

    /// The allocator; the first use reads the whole table to find where the last block ends.
    fn tail(&self) -> Result<Arc<Tail>> {
        let mut tail = self.tail.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(tail) = &*tail {
            return Ok(Arc::clone(tail));
        }
        // Not from the header's count: after a crash it may count blocks that the table never came to refer to.
        let next = self.next_block()?;
        let Header { data, block, blocks, .. } = self.header;
        let made = Arc::new(Tail::new(
            Arc::clone(&self.storages[0]),
            data + u64::from(next) * block,
            data + u64::from(blocks) * block,
        )?);
        *tail = Some(Arc::clone(&made));
        Ok(made)
    }

    /// One more than the highest block number in the table, with memory that does not depend on the file's contents.
    fn next_block(&self) -> Result<u32> {
        let mut next = 0;
        let mut bytes = vec![0; 1 << 16];
        for first in (0..u64::from(self.header.blocks)).step_by(1 << 14) {
            let n = (u64::from(self.header.blocks) - first).min(1 << 14) as usize;
            self.storages[0].read_at(&mut bytes[..n * 4], self.header.table + first * 4)?;
            for entry in
                bytes[..n * 4].chunks_exact(4).map(|e| le32(e, 0)).filter(|&e| e < self.header.blocks)
            {
                next = next.max(entry + 1);
            }
        }
        Ok(next)
    }
}

impl Format for Vdi {
    fn size(&self) -> u64 {
        self.header.disk_size
    }

    fn info(&self) -> Result<Info> {
        Ok(Info { cluster_size: Some(self.header.block), ..Info::default() })
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn unit(&self) -> u64 {
        self.header.block
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        let before = out.len();
        support::map_units((0, self.header.block), (offset, len), out, |first, slots| {
            self.lookup(first, slots)
        })?;
        // There is never a backing file that could show through.
        for extent in out[before..].iter_mut().filter(|e| e.mapping == Mapping::Unallocated) {
            extent.mapping = Mapping::Zero { host: None };
        }
        Ok(())
    }

    fn prepare_write(&self, offset: u64, len: u64, out: &mut Vec<WriteExtent>) -> Result<()> {
        support::prepare_units(
            (0, self.header.block),
            (offset, len),
            out,
            |first, slots| self.lookup(first, slots),
            |_| {
                let tail = self.tail()?;
                let host = tail.take(self.header.block)?;
                Ok((host, tail.is_fresh(host)))
            },
        )
    }

    fn commit_write(&self, extents: &[WriteExtent]) -> Result<()> {
        support::commit_units(self.header.block, extents, |unit, host| {
            let number = (host - self.header.data) / self.header.block;
            self.table.write(self.header.table + unit * 4, &(number as u32).to_le_bytes())
        })?;
        if self.table.is_full() { self.flush() } else { Ok(()) }
    }

    fn abort_write(&self, _extents: &[WriteExtent]) {}

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<Zeroing> {
        support::zero_units(
            (&self.storages[0], self.header.block),
            (offset, len),
            unmap && !self.header.is_static,
            |first, slots| self.lookup(first, slots),
            |_, _| Ok(Zeroing::Done),
        )
    }

    fn zero_unit(&self) -> u64 {
        1
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        support::discard_units((&self.storages[0], self.header.block), (offset, len), |first, slots| {
            self.lookup(first, slots)
        })
    }

    fn flush(&self) -> Result<()> {
        let tail = self.tail.lock().unwrap_or_else(|e| e.into_inner()).clone();
        let Some(tail) = tail else { return self.storages[0].flush() };
        // The count first and behind its own barrier: a program that believes a count too low would overwrite blocks.
        let count = ((tail.end() - self.header.data) / self.header.block) as u32;
        if self.count.le32(at::ALLOCATED as u64)? != count {
            self.count.write(at::ALLOCATED as u64, &count.to_le_bytes())?;
        }
        flush_ordered(&self.serial, &*self.storages[0], &[&self.count, &self.table], || tail.pad())
    }

    fn resize(&self, _size: u64, _preallocation: Preallocation) -> Result<()> {
        Err(support::no_resize())
    }

    fn check(&self, repair: Repair) -> Result<CheckReport> {
        let Header { blocks, data, block, .. } = self.header;
        let mut report = CheckReport { total_clusters: u64::from(blocks), ..CheckReport::default() };
        let mut used = Places::new(u64::from(blocks))?;
        let (mut last, mut next) = (None, 0u32);
        let mut bytes = vec![0; 1 << 16];
        for first in (0..u64::from(blocks)).step_by(1 << 14) {
            let n = (u64::from(blocks) - first).min(1 << 14) as usize;
            self.table.read(self.header.table + first * 4, &mut bytes[..n * 4])?;
            for (i, entry) in bytes[..n * 4].chunks_exact(4).map(|e| le32(e, 0)).enumerate() {
                let index = first + i as u64;
                if entry >= DISCARDED {
                    continue;
                }
                if entry >= blocks {
                    report.corruptions += 1;
                    report.say(format!("ERROR: block index {index} out of range, is {entry}"));
                    continue;
                }
                if !used.claim(u64::from(entry)) {
                    report.corruptions += 1;
                    report.say(format!("ERROR: block index {entry} also used by {index}"));
                }
                report.allocated_clusters += 1;
                report.fragmented_clusters +=
                    u64::from(last.is_some_and(|l: u32| l.wrapping_add(1) != entry));
                last = Some(entry);
                next = next.max(entry + 1);
            }
        }
        report.image_end_offset = Some(data + u64::from(next) * block);
        let allocated = report.allocated_clusters as u32;
        let counted = self.count.le32(at::ALLOCATED as u64)?;
        if allocated != counted {
            let fixable = repair == Repair::All && next == allocated && report.corruptions == 0;
            if counted > allocated {
                report.leaks += u64::from(counted - allocated);
                report.say(format!(
                    "Leaked blocks: the header counts {counted}, the table refers to {allocated}"
                ));
            } else {
                report.corruptions += 1;
                report.say(format!("ERROR: allocated blocks mismatch, is {allocated}, should be {counted}"));
            }
            if fixable || (repair != Repair::None && counted > allocated && next == allocated) {
                self.count.write(at::ALLOCATED as u64, &allocated.to_le_bytes())?;
                flush_ordered(&self.serial, &*self.storages[0], &[&self.count], || Ok(()))?;
                if counted > allocated {
                    report.leaks_fixed = std::mem::take(&mut report.leaks);
                } else {
                    report.corruptions_fixed += 1;
                    report.corruptions -= 1;
                }
            }
        }
        Ok(report)
    }

    fn created_zeroed(&self) -> bool {
        self.storages[0].grows_with_zeros() || !self.header.is_static
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn valid() -> [u8; HEADER] {
        let mut b = [0; HEADER];
        for (offset, value) in [
            (at::SIGNATURE, SIGNATURE),
            (at::VERSION, VERSION),
            (at::IMAGE_TYPE, TYPE_DYNAMIC),
            (at::TABLE, 512),
            (at::DATA, 1024),
            (at::SECTOR_SIZE, 512),
            (at::BLOCK_SIZE, DEFAULT_BLOCK),
            (at::BLOCKS, 10),
            (at::DISK_SIZE, 10 << 20),
        ] {
            put(&mut b, offset, &value.to_le_bytes());
        }
        b
    }

    #[test]
    fn hostile_fields_are_refused() {
        assert_eq!(Header::parse(&valid()).unwrap().disk_size, 10 << 20);
        for (offset, value) in [
            (at::VERSION, 2),
            (at::IMAGE_TYPE, 4),
            (at::TABLE, 511),
            (at::TABLE, 0),
            (at::DATA, 513),
            (at::DATA, 512),
            (at::SECTOR_SIZE, 4096),
            (at::BLOCK_SIZE, 0),
            (at::BLOCK_SIZE, 3 << 20),
            (at::BLOCKS, 9),
            (at::BLOCKS, u32::MAX),
            (at::DISK_SIZE + 4, u32::MAX),
            (at::UUID_LINK, 1),
            (at::UUID_PARENT + 12, 1),
        ] {
            let mut b = valid();
            put(&mut b, offset, &value.to_le_bytes());
            assert!(Header::parse(&b).is_err(), "{offset:#x} = {value:#x}");
        }
    }

    proptest! {
        #[test]
        fn any_header_parses_or_fails(changes in proptest::collection::vec((0..HEADER, any::<u8>()), 0..40)) {
            let mut b = valid();
            for (at, byte) in changes {
                b[at] = byte;
            }
            let _ = Header::parse(&b);
        }
    }
}
