//! VHDX, the disk image of Hyper-V ([MS-VHDX]): two headers, two region tables, metadata, one table of 64-bit entries, and a
//! log through which the table is changed.
//!
//! Order of a flush: data, barrier, log entry, barrier, table, barrier.

mod header;
mod log;

use super::{
    CheckReport, Creation, Driver, Extent, Format, Info, Opening, Preallocation, ProbeInput, Repair,
    WriteExtent,
    support::{self, Batch, MetaCache, Places, Slot, Tail, le64},
};
use crate::{
    Error, Result,
    options::{OptionKind, OptionSpec},
    storage::{Storage, Zeroing},
};
use header::{Header, MAX_DISK, MIB, Metadata, Region, Regions};
use log::{Log, MAX_PAGES, PAGE};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

/// The format.
pub static DRIVER: Driver = Driver {
    name: "vhdx",
    probe,
    open,
    create: Some(create),
    measure: None,
    options: &[
        OptionSpec {
            name: "log_size",
            kind: OptionKind::Size,
            help: "Log size; min 1MB.",
            default: Some("1048576"),
        },
        OptionSpec {
            name: "block_size",
            kind: OptionKind::Size,
            help: "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.",
            default: Some("0"),
        },
        OptionSpec {
            name: "subformat",
            kind: OptionKind::Text,
            help: "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.",
            default: None,
        },
        OptionSpec {
            name: "block_state_zero",
            kind: OptionKind::Bool,
            help: "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' when using 'qemu-img convert' with subformat=dynamic.",
            default: None,
        },
    ],
    backing: false,
};

/// States of a payload block, the low three bits of its entry.
const ZERO: u64 = 2;
const FULLY_PRESENT: u64 = 6;
const PARTIALLY_PRESENT: u64 = 7;
/// The bits of an entry that say where the block is: a multiple of 1 MiB.
const PLACE: u64 = !(MIB - 1);
/// Bytes of table kept in memory at most.
const CACHE: usize = 8 << 20;

struct Vhdx {
    storages: [Arc<dyn Storage>; 1],
    metadata: Metadata,
    bat: Region,
    /// Where no block may lie.
    reserved: [Region; 4],
    table: MetaCache,
    tail: Tail,
    header: Mutex<Current>,
    /// The header says that the contents change.
    touched: AtomicBool,
    /// A log was replayed on opening.
    replayed: bool,
}

/// The header, and the log once there is one.
struct Current {
    header: Header,
    log: Option<Log>,
}

fn probe(input: &ProbeInput<'_>) -> u32 {
    if input.head.starts_with(b"vhdxfile") { 100 } else { 0 }
}

fn open(opening: Opening<'_>) -> Result<Box<dyn Format>> {
    let storage = opening.storage;
    let mut id = [0; 8];
    storage.read_at(&mut id, 0)?;
    if &id != b"vhdxfile" {
        return Err(Error::invalid("Not a VHDX image: wrong signature"));
    }
    let mut header = Header::read(&*storage)?;
    let mut replayed = false;
    if header.log != [0; 16] {
        if opening.read_only {
            return Err(Error::io(
                format!(
                    "VHDX image file '{}' opened read-only, but contains a log that needs to be replayed\n\
                     To replay the log, run:\nqemu-img check -r all '{}'",
                    storage.name(),
                    storage.name()
                ),
                std::io::Error::from_raw_os_error(libc::EPERM),
            ));
        }
        log::replay(&*storage, header.log_offset, header.log_length, &header.log)?;
        header.log = [0; 16];
        header.advance(&*storage)?;
        replayed = true;
    }
    let regions = Regions::read(&*storage)?;
    let metadata = Metadata::read(&*storage, regions.metadata)?;
    let size = storage.size()?;
    if metadata.entries() * 8 > regions.bat.length {
        return Err(Error::invalid("Invalid VHDX image: the block table is too small for the disk"));
    }
    if regions.bat.offset + metadata.entries() * 8 > size.next_multiple_of(MIB) {
        return Err(Error::invalid("Invalid VHDX image: the block table reaches past the end of the file"));
    }
    let log = Region { offset: header.log_offset, length: header.log_length.into() };
    if regions.bat.overlaps(log.offset, log.length) || regions.metadata.overlaps(log.offset, log.length) {
        return Err(Error::invalid("Invalid VHDX image: the log overlaps another region"));
    }
    let reserved = [Region { offset: 0, length: MIB }, log, regions.bat, regions.metadata];
    let next = reserved.iter().map(|r| r.offset + r.length).max().unwrap_or(0).max(size);
    let next = next.checked_next_multiple_of(MIB).ok_or_else(|| Error::invalid("The file is too large"))?;
    Ok(Box::new(Vhdx {
        table: MetaCache::of_pages(Arc::clone(&storage), CACHE),
        tail: Tail::new(Arc::clone(&storage), next, 1 << 62)?,
        storages: [storage],
        metadata,
        bat: regions.bat,
        reserved,
        header: Mutex::new(Current { header, log: None }),
        touched: AtomicBool::new(false),
        replayed,
    }))
}

fn create(creation: Creation<'_>) -> Result<()> {
    let options = creation.options;
    let log_size = options.take_size("log_size")?.unwrap_or(MIB);
    let block = options.take_size("block_size")?.unwrap_or(0);
    let fixed = match options.take("subformat").as_deref() {
        None | Some("dynamic") => false,
        Some("fixed") => true,
        Some(other) => return Err(Error::usage(format!("Invalid subformat '{other}'"))),
    };
    let zero_state = options.take_bool("block_state_zero")?.unwrap_or(true);
    let size = creation.size.checked_next_multiple_of(512).filter(|&s| s <= MAX_DISK);
    let size = size.ok_or_else(|| Error::usage("Image size too large; max of 64TB"))?;
    let log_size = u32::try_from(log_size).ok().filter(|s| *s > 0 && s.is_multiple_of(MIB as u32));
    let log_size = log_size.ok_or_else(|| Error::usage("Log size must be a multiple of 1 MB"))?;
    let block = match block {
        0 if size > 32 << 40 => 64 << 20,
        0 if size > 100 << 30 => 32 << 20,
        0 if size > 1 << 30 => 16 << 20,
        0 => 8 << 20,
        given if given % MIB != 0 => return Err(Error::usage("Block size must be a multiple of 1 MB")),
        given if !given.is_power_of_two() => return Err(Error::usage("Block size must be a power of two")),
        given if given > 256 << 20 => return Err(Error::usage("Block size must not exceed 268435456")),
        given => given,
    };
    let metadata = Metadata { block, size, logical: 512 };
    let storage = &creation.storage;
    storage.set_size(0)?;
    let regions = header::write_new(&**storage, metadata, log_size)?;
    let data = regions.metadata.offset + regions.metadata.length;
    let blocks = metadata.blocks();
    let ratio = metadata.chunk_ratio();
    if fixed || zero_state {
        let mut piece = Vec::with_capacity(1 << 16);
        for first in (0..metadata.entries()).step_by(1 << 13) {
            piece.clear();
            for index in first..metadata.entries().min(first + (1 << 13)) {
                let number = index - index / (ratio + 1);
                let entry = match (index % (ratio + 1) == ratio, fixed) {
                    (true, _) => 0,
                    (false, true) => (data + number * block) | FULLY_PRESENT,
                    (false, false) => ZERO,
                };
                piece.extend_from_slice(&u64::to_le_bytes(entry));
            }
            storage.write_at(&piece, regions.bat.offset + first * 8)?;
        }
    }
    storage.set_size(if fixed { data + blocks * block } else { data })?;
    storage.flush()
}

impl Vhdx {
    /// Where in the file the table's entry of a block is.
    fn entry_at(&self, block: u64) -> u64 {
        self.bat.offset + (block + block / self.metadata.chunk_ratio()) * 8
    }

    fn lookup(&self, first: u64, out: &mut [Slot]) -> Result<usize> {
        let ratio = self.metadata.chunk_ratio();
        let n = out.len().min(512).min((ratio - first % ratio) as usize);
        let mut bytes = [0; 4096];
        self.table.read(self.entry_at(first), &mut bytes[..n * 8])?;
        for (i, slot) in out[..n].iter_mut().enumerate() {
            let entry = le64(&bytes, i * 8);
            *slot = match entry & 7 {
                FULLY_PRESENT => {
                    let place = entry & PLACE;
                    if !self.place_is_sound(place) {
                        return Err(Error::Corrupt(format!(
                            "'{}': block {} of the VHDX image lies at {place:#x}, among the metadata",
                            self.storages[0].name(),
                            first + i as u64
                        )));
                    }
                    Slot::Data(place)
                }
                PARTIALLY_PRESENT => {
                    return Err(Error::Corrupt(format!(
                        "'{}': block {} of the VHDX image belongs to a parent, but there is none",
                        self.storages[0].name(),
                        first + i as u64
                    )));
                }
                ZERO => Slot::Zero,
                _ => Slot::Free,
            };
        }
        Ok(n)
    }

    fn place_is_sound(&self, place: u64) -> bool {
        place <= 1 << 62 && !self.reserved.iter().any(|r| r.overlaps(place, self.metadata.block))
    }

    /// Says in the header that the contents change, before they do.
    fn touch(&self) -> Result<()> {
        if self.touched.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut current = self.header.lock().unwrap_or_else(|e| e.into_inner());
        if !self.touched.load(Ordering::Acquire) {
            current.header.file_write = support::random_uuid()?;
            current.header.data_write = support::random_uuid()?;
            current.header.advance(&*self.storages[0])?;
            self.touched.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Logs and writes a batch of table pages, whose data is durable.
    fn write_table(&self, current: &mut Current, batch: &Batch) -> Result<()> {
        let storage = &*self.storages[0];
        let pages: Vec<(u64, &[u8])> = batch
            .iter()
            .flat_map(|(offset, bytes)| {
                bytes.chunks_exact(PAGE).enumerate().map(move |(i, p)| (offset + (i * PAGE) as u64, p))
            })
            .collect();
        if current.log.is_none() {
            let guid = support::random_uuid()?;
            current.header.log = guid;
            current.header.advance(storage)?;
            current.log = Some(Log::new(current.header.log_offset, current.header.log_length, guid));
        }
        let Some(log) = &mut current.log else { return Ok(()) };
        for chunk in pages.chunks(MAX_PAGES) {
            log.append(storage, chunk)?;
            storage.flush()?;
            for (offset, page) in chunk {
                storage.write_at(page, *offset)?;
            }
            storage.flush()?;
        }
        Ok(())
    }
}

impl Format for Vhdx {
    fn size(&self) -> u64 {
        self.metadata.size
    }

    fn info(&self) -> Result<Info> {
        Ok(Info { cluster_size: Some(self.metadata.block), ..Info::default() })
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn unit(&self) -> u64 {
        self.metadata.block
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        support::map_units((0, self.metadata.block), (offset, len), out, |first, slots| {
            self.lookup(first, slots)
        })
    }

    fn prepare_write(&self, offset: u64, len: u64, out: &mut Vec<WriteExtent>) -> Result<()> {
        self.touch()?;
        support::prepare_units(
            (0, self.metadata.block),
            (offset, len),
            out,
            |first, slots| self.lookup(first, slots),
            |_| {
                let host = self.tail.take(self.metadata.block)?;
                Ok((host, self.tail.is_fresh(host)))
            },
        )
    }

    fn commit_write(&self, extents: &[WriteExtent]) -> Result<()> {
        support::commit_units(self.metadata.block, extents, |unit, host| {
            self.table.write(self.entry_at(unit), &(host | FULLY_PRESENT).to_le_bytes())
        })?;
        if self.table.is_full() { self.flush() } else { Ok(()) }
    }

    fn note_write(&self, _offset: u64, _len: u64) -> Result<()> {
        self.touch()
    }

    fn abort_write(&self, _extents: &[WriteExtent]) {}

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<Zeroing> {
        self.touch()?;
        support::zero_units(
            (&self.storages[0], self.metadata.block),
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
        self.touch()?;
        support::discard_units((&self.storages[0], self.metadata.block), (offset, len), |first, slots| {
            self.lookup(first, slots)
        })
    }

    fn flush(&self) -> Result<()> {
        // The header's lock also keeps two flushes from overtaking each other.
        let mut current = self.header.lock().unwrap_or_else(|e| e.into_inner());
        let batch = self.table.take();
        if batch.is_empty() {
            return self.storages[0].flush();
        }
        let result = self
            .tail
            .pad()
            .and_then(|()| self.storages[0].flush())
            .and_then(|()| self.write_table(&mut current, &batch));
        self.table.settle(&batch, result.is_ok());
        result
    }

    fn close(&self) -> Result<()> {
        self.flush()?;
        let mut current = self.header.lock().unwrap_or_else(|e| e.into_inner());
        if current.header.log != [0; 16] {
            current.header.log = [0; 16];
            current.log = None;
            current.header.advance(&*self.storages[0])?;
        }
        Ok(())
    }

    fn resize(&self, _size: u64, _preallocation: Preallocation) -> Result<()> {
        Err(support::no_resize())
    }

    fn check(&self, _repair: Repair) -> Result<CheckReport> {
        let file_size = self.storages[0].size()?;
        let block = self.metadata.block;
        let mut report = CheckReport {
            total_clusters: self.metadata.blocks(),
            // Replaying happened on opening; this is where it is told.
            corruptions_fixed: u64::from(self.replayed),
            ..CheckReport::default()
        };
        // One bit for each MiB of the file finds overlaps.
        let mut used = Places::new(file_size / MIB + 1)?;
        let (mut last, mut start, mut end) = (None, file_size, 0);
        for number in 0..self.metadata.blocks() {
            let entry = self.table.le64(self.entry_at(number))?;
            let place = entry & PLACE;
            match entry & 7 {
                FULLY_PRESENT => {}
                PARTIALLY_PRESENT | 4 | 5 => {
                    report.corruptions += 1;
                    report.say(format!("ERROR: block {number} has the state {}", entry & 7));
                    continue;
                }
                _ => continue,
            }
            report.allocated_clusters += 1;
            report.fragmented_clusters += u64::from(last.is_some_and(|l: u64| l + block != place));
            last = Some(place);
            if !self.place_is_sound(place) || place + block > file_size {
                report.corruptions += 1;
                report.say(format!("ERROR: block {number} lies at {place:#x}, outside of the data"));
                continue;
            }
            end = end.max(place + block);
            start = start.min(place);
            for at in place / MIB..(place + block) / MIB {
                if !used.claim(at) {
                    report.corruptions += 1;
                    report.say(format!("ERROR: block {number} at {place:#x} overlaps another block"));
                    break;
                }
            }
        }
        // Gaps between the regions are their makers' choice; what lies between and behind blocks is lost.
        report.leaks = file_size.saturating_sub(start.min(file_size) + used.claimed() * MIB) / block;
        if report.leaks > 0 {
            report.say(format!("Leaked space: {} blocks", report.leaks));
        }
        report.image_end_offset =
            Some(end.max(self.reserved.iter().map(|r| r.offset + r.length).max().unwrap_or(0)));
        Ok(report)
    }

    fn created_zeroed(&self) -> bool {
        self.storages[0].grows_with_zeros()
    }
}
