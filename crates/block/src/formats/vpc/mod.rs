//! VHD, the disk image of Virtual PC and Hyper-V generation 1: fixed (raw with a footer) and dynamic (one table of 32-bit
//! sector numbers; each block has a bitmap of its sectors in front, which disks without a parent keep full of ones).
//!
//! A dynamic disk has its footer at both ends. A new block takes the place of the footer at the end, which is written again
//! behind it before the table refers to the block; until then the copy at the front holds.

mod header;

use super::{
    CheckReport, Creation, Driver, Extent, Format, Info, Mapping, Opening, Preallocation, ProbeInput, Repair,
    WriteExtent,
    support::{self, MetaCache, Slot, Tail, be32, flush_ordered},
};
use crate::{
    Error, Result,
    options::{OptionKind, OptionSpec},
    storage::{Storage, Window, ZeroFlags, Zeroing},
};
use header::{
    DYNAMIC, DynamicHeader, FOOTER, Footer, Geometry, Kind, MAX_CHS_SECTORS, MAX_SECTORS, SizeFrom,
};
use std::sync::{Arc, Mutex};

/// The format.
pub static DRIVER: Driver = Driver {
    name: "vpc",
    probe,
    open,
    create: Some(create),
    measure: None,
    options: &[
        OptionSpec {
            name: "subformat",
            kind: OptionKind::Text,
            help: "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
            default: None,
        },
        OptionSpec {
            name: "force_size",
            kind: OptionKind::Bool,
            help: "Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based calculation",
            default: None,
        },
    ],
    backing: false,
};

/// Bytes of table kept in memory at most.
const CACHE: usize = 8 << 20;
/// Table entry of a block that is not there.
const UNUSED: u32 = u32::MAX;
const DEFAULT_BLOCK: u64 = 2 << 20;

fn probe(input: &ProbeInput<'_>) -> u32 {
    if Footer::is_footer(input.head) { 100 } else { 0 }
}

fn open(opening: Opening<'_>) -> Result<Box<dyn Format>> {
    let from = match opening.options.take("force_size_calc").as_deref() {
        None => SizeFrom::Creator,
        Some("chs") => SizeFrom::Chs,
        Some("current_size") => SizeFrom::Field,
        Some(other) => return Err(Error::usage(format!("Invalid size calculation algorithm '{other}'"))),
    };
    let storage = opening.storage;
    let file_size = storage.size()?;
    let mut bytes = [0; FOOTER];
    storage.read_at(&mut bytes, 0)?;
    let mut at_front = true;
    if !Footer::is_footer(&bytes) {
        // A fixed disk has its only footer at the end.
        let at = file_size.checked_sub(FOOTER as u64);
        let at = at.ok_or_else(|| Error::invalid("The file is too small to be a VHD image"))?;
        storage.read_at(&mut bytes, at)?;
        if !Footer::is_footer(&bytes) {
            return Err(Error::invalid("Not a VHD image: there is no footer at its beginning or end"));
        }
        at_front = false;
    }
    let footer = Footer::parse(&bytes)?;
    if !footer.intact {
        tracing::warn!(image = %storage.name(), "the checksum of the VHD footer is wrong");
    }
    let sectors = footer.sectors(from);
    if sectors > i64::MAX as u64 / 512 {
        return Err(Error::invalid(format!("Invalid VHD image: size {sectors} sectors")));
    }
    if footer.kind == Kind::Fixed {
        let size = sectors * 512;
        if size > file_size {
            return Err(Error::invalid(format!(
                "Invalid VHD image: the disk has {size} bytes but the file only {file_size}"
            )));
        }
        // The guest must not reach the footer, even where the file is longer than the disk.
        let disk: Arc<dyn Storage> = Arc::new(Window::new(storage, 0, size)?);
        return Ok(Box::new(Fixed { storages: [disk], size }));
    }
    if !at_front {
        return Err(Error::invalid("Invalid VHD image: a dynamic disk whose first footer is damaged"));
    }
    let mut bytes2 = [0; DYNAMIC];
    storage.read_at(&mut bytes2, footer.header)?;
    let header = DynamicHeader::parse(&bytes2, sectors, file_size)?;
    Ok(Box::new(Dynamic {
        table: MetaCache::new(Arc::clone(&storage), CACHE),
        storages: [storage],
        size: sectors * 512,
        header,
        footer: bytes,
        header_at: footer.header,
        tail: Mutex::new(None),
        written_end: Mutex::new(0),
        serial: Mutex::new(()),
    }))
}

fn create(creation: Creation<'_>) -> Result<()> {
    let fixed = match creation.options.take("subformat").as_deref() {
        None | Some("dynamic") => false,
        Some("fixed") => true,
        Some(other) => {
            return Err(Error::usage(format!("Invalid parameter '{other}'; subformat is dynamic or fixed")));
        }
    };
    let force_size = creation.options.take_bool("force_size")?.unwrap_or(false);
    let wanted = creation.size.div_ceil(512);
    let geometry = if force_size { Geometry::MAX } else { Geometry::covering(wanted) };
    let sectors = if geometry.total() == MAX_CHS_SECTORS { wanted } else { geometry.total() };
    if sectors > MAX_SECTORS {
        return Err(Error::unsupported("Disk size is too large, max size is 2040 GiB"));
    }
    let kind = if fixed { Kind::Fixed } else { Kind::Dynamic };
    let footer = Footer::encode(kind, sectors, geometry, force_size, support::random_uuid()?);
    let storage = &creation.storage;
    if fixed {
        storage.set_size(sectors * 512 + FOOTER as u64)?;
        storage.write_at(&footer, sectors * 512)?;
        return storage.flush();
    }
    let header = DynamicHeader {
        table: (FOOTER + DYNAMIC) as u64,
        entries: (sectors * 512).div_ceil(DEFAULT_BLOCK) as u32,
        block: DEFAULT_BLOCK,
    };
    let end = header.first_block();
    storage.write_at(&footer, 0)?;
    storage.write_at(&header.encode(), FOOTER as u64)?;
    // The specification's largest disk has a table of 4 MiB.
    storage.write_at(&vec![0xff; (end - header.table) as usize], header.table)?;
    storage.write_at(&footer, end)?;
    storage.flush()
}

/// A fixed disk.
struct Fixed {
    storages: [Arc<dyn Storage>; 1],
    size: u64,
}

impl Format for Fixed {
    fn size(&self) -> u64 {
        self.size
    }

    fn info(&self) -> Result<Info> {
        Ok(Info::default())
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn unit(&self) -> u64 {
        1
    }

    fn flat(&self) -> Option<u64> {
        Some(0)
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        let (held, len) = self.storages[0].held(offset, len)?;
        let mapping = match held {
            crate::storage::Held::Data => Mapping::Data { file: 0, host: offset, in_place: true },
            crate::storage::Held::Hole => Mapping::Zero { host: Some((0, offset)) },
        };
        super::push_extent(out, Extent { offset, len, mapping });
        Ok(())
    }

    fn prepare_write(&self, offset: u64, len: u64, out: &mut Vec<WriteExtent>) -> Result<()> {
        out.push(WriteExtent {
            offset,
            len,
            file: 0,
            host: offset,
            new: false,
            head: 0,
            tail: 0,
            fresh: false,
            cookie: 0,
        });
        Ok(())
    }

    fn commit_write(&self, _extents: &[WriteExtent]) -> Result<()> {
        Ok(())
    }

    fn abort_write(&self, _extents: &[WriteExtent]) {}

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<Zeroing> {
        self.storages[0].write_zeroes(offset, len, ZeroFlags { unmap })
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.storages[0].discard(offset, len)
    }

    fn flush(&self) -> Result<()> {
        self.storages[0].flush()
    }

    fn resize(&self, _size: u64, _preallocation: Preallocation) -> Result<()> {
        Err(support::no_resize())
    }

    fn created_zeroed(&self) -> bool {
        self.storages[0].grows_with_zeros()
    }
}

/// A dynamic disk.
struct Dynamic {
    storages: [Arc<dyn Storage>; 1],
    size: u64,
    header: DynamicHeader,
    footer: [u8; FOOTER],
    header_at: u64,
    table: MetaCache,
    tail: Mutex<Option<Arc<Tail>>>,
    /// Where the footer at the end was last written by this program.
    written_end: Mutex<u64>,
    serial: Mutex<()>,
}

impl DynamicHeader {
    /// Where the first block goes in an image this program makes.
    fn first_block(&self) -> u64 {
        (self.table + u64::from(self.entries) * 4).next_multiple_of(512)
    }

    /// Bytes of a block with its bitmap.
    fn stride(&self) -> u64 {
        self.bitmap() + self.block
    }
}

impl Dynamic {
    fn lookup(&self, first: u64, out: &mut [Slot]) -> Result<usize> {
        let mut bytes = [0; 2048];
        let n = out.len().min(512);
        self.table.read(self.header.table + first * 4, &mut bytes[..n * 4])?;
        for (i, slot) in out[..n].iter_mut().enumerate() {
            *slot = match be32(&bytes, i * 4) {
                UNUSED => Slot::Free,
                sector => Slot::Data(u64::from(sector) * 512 + self.header.bitmap()),
            };
        }
        Ok(n)
    }

    /// Calls `f` with the number and first byte of every block that is there.
    fn each_block(&self, mut f: impl FnMut(u64, u64)) -> Result<()> {
        let mut bytes = vec![0; 1 << 16];
        let entries = u64::from(self.header.entries);
        for first in (0..entries).step_by(1 << 14) {
            let n = (entries - first).min(1 << 14) as usize;
            self.table.read(self.header.table + first * 4, &mut bytes[..n * 4])?;
            for (i, entry) in bytes[..n * 4].chunks_exact(4).map(|e| be32(e, 0)).enumerate() {
                if entry != UNUSED {
                    f(first + i as u64, u64::from(entry) * 512);
                }
            }
        }
        Ok(())
    }

    /// The end of the headers and the table.
    fn metadata_end(&self) -> u64 {
        self.header.first_block().max(self.header_at.saturating_add(DYNAMIC as u64))
    }

    /// The allocator; the first use reads the whole table to find where the last block ends.
    fn tail(&self) -> Result<Arc<Tail>> {
        let mut tail = self.tail.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(tail) = &*tail {
            return Ok(Arc::clone(tail));
        }
        let mut next = self.metadata_end();
        self.each_block(|_, start| next = next.max(start + self.header.stride()))?;
        let limit = u64::from(UNUSED) * 512;
        let made = Arc::new(Tail::new(Arc::clone(&self.storages[0]), next, limit)?);
        *tail = Some(Arc::clone(&made));
        Ok(made)
    }
}

impl Format for Dynamic {
    fn size(&self) -> u64 {
        self.size
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
                // Held so that a flush does not put the footer where a block is being made.
                let _written_end = self.written_end.lock().unwrap_or_else(|e| e.into_inner());
                let start = tail.take(self.header.stride())?;
                // The first sectors may hold the old footer; they become the bitmap.
                self.storages[0].write_at(&vec![0xff; self.header.bitmap() as usize], start)?;
                let host = start + self.header.bitmap();
                Ok((host, tail.is_fresh(host)))
            },
        )
    }

    fn commit_write(&self, extents: &[WriteExtent]) -> Result<()> {
        support::commit_units(self.header.block, extents, |unit, host| {
            let sector = (host - self.header.bitmap()) / 512;
            self.table.write(self.header.table + unit * 4, &(sector as u32).to_be_bytes())
        })?;
        if self.table.is_full() { self.flush() } else { Ok(()) }
    }

    fn abort_write(&self, _extents: &[WriteExtent]) {}

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<Zeroing> {
        support::zero_units(
            (&self.storages[0], self.header.block),
            (offset, len),
            unmap,
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
        flush_ordered(&self.serial, &*self.storages[0], &[&self.table], || {
            let Some(tail) = tail else { return Ok(()) };
            let mut written = self.written_end.lock().unwrap_or_else(|e| e.into_inner());
            let end = tail.end();
            if *written != end {
                self.storages[0].write_at(&self.footer, end)?;
                *written = end;
            }
            Ok(())
        })
    }

    fn close(&self) -> Result<()> {
        self.flush()?;
        let Some(tail) = self.tail.lock().unwrap_or_else(|e| e.into_inner()).clone() else { return Ok(()) };
        // Space of writes that failed may lie behind the footer, which has to be the file's end.
        let end = tail.end() + FOOTER as u64;
        if self.storages[0].grows_with_zeros() && self.storages[0].size()? > end {
            self.storages[0].set_size(end)?;
        }
        self.storages[0].write_at(&self.footer, tail.end())?;
        self.storages[0].flush()
    }

    fn resize(&self, _size: u64, _preallocation: Preallocation) -> Result<()> {
        Err(support::no_resize())
    }

    fn check(&self, _repair: Repair) -> Result<CheckReport> {
        let file_size = self.storages[0].size()?;
        let mut report =
            CheckReport { total_clusters: self.size.div_ceil(self.header.block), ..CheckReport::default() };
        let mut starts = Vec::new();
        let mut last = None;
        let (metadata_end, stride) = (self.metadata_end(), self.header.stride());
        self.each_block(|index, start| {
            report.allocated_clusters += 1;
            report.fragmented_clusters += u64::from(last.is_some_and(|l: u64| l + stride != start));
            last = Some(start);
            starts.push((start, index));
            if start < metadata_end || start + stride > file_size {
                report.corruptions += 1;
                report.say(format!("ERROR: block {index} lies at {start:#x}, outside of the data"));
            }
        })?;
        starts.sort_unstable();
        for pair in starts.windows(2) {
            if pair[1].0 - pair[0].0 < stride {
                report.corruptions += 1;
                report.say(format!(
                    "ERROR: blocks {} and {} overlap at {:#x}",
                    pair[0].1, pair[1].1, pair[1].0
                ));
            }
        }
        let end = starts.last().map_or(metadata_end, |&(start, _)| start + stride);
        report.image_end_offset = Some(end);
        let lost = file_size.saturating_sub(end + FOOTER as u64) / stride;
        if lost > 0 {
            report.leaks += lost;
            report.say(format!("Leaked space behind {end:#x}: {lost} blocks"));
        }
        let mut footer = [0; FOOTER];
        self.storages[0].read_at(&mut footer, file_size.saturating_sub(FOOTER as u64))?;
        if !Footer::is_footer(&footer) {
            report.leaks += 1;
            report.say("The footer at the end is missing; the next writer restores it");
        }
        Ok(report)
    }
}
