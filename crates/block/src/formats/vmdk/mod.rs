//! VMDK, VMware's disk image ("Virtual Disk Format" 5.0): a descriptor that names extents, which are flat files, files of
//! grains found through tables, or nothing but zeros.
//!
//! Grains of stream-optimized images are always compressed. A changed grain is appended anew; the old one's space is lost.

mod create;
mod descriptor;
mod sparse;

use super::{
    Backing, CheckReport, Driver, Extent, Format, Info, Mapping, Opening, Preallocation, ProbeInput, Repair,
    WriteExtent, push_extent, push_write,
    support::{self, Places, Slot, le32, le64},
};
use crate::{
    Context, Error, Result,
    options::{OptionKind, OptionSpec},
    storage::{self, Storage, StorageExt, ZeroFlags, Zeroing},
};
use descriptor::{Descriptor, Kind, MAX_DESCRIPTOR, NO_PARENT};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use sparse::{COW_MAGIC, GRAIN_MARKER, MAGIC, Sparse};
use std::{
    cell::RefCell,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

const fn option(name: &'static str, kind: OptionKind, help: &'static str) -> OptionSpec {
    OptionSpec { name, kind, help, default: None }
}

/// The format.
pub static DRIVER: Driver = Driver {
    name: "vmdk",
    probe,
    open,
    create: Some(create::create),
    measure: None,
    options: &[
        option(
            "adapter_type",
            OptionKind::Text,
            "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
        ),
        OptionSpec { default: Some("off"), ..option("compat6", OptionKind::Bool, "VMDK version 6 image") },
        OptionSpec {
            default: Some("undefined"),
            ..option("hwversion", OptionKind::Text, "VMDK hardware version")
        },
        option("toolsversion", OptionKind::Text, "VMware guest tools version"),
        option(
            "subformat",
            OptionKind::Text,
            "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | twoGbMaxExtentSparse | \
             twoGbMaxExtentFlat | streamOptimized} ",
        ),
        option(
            "zeroed_grain",
            OptionKind::Bool,
            "Enable efficient zero writes using the zeroed-grain GTE feature",
        ),
    ],
    backing: true,
};

/// Most extents of an image; each takes a descriptor of the process.
const MAX_EXTENTS: usize = 8192;

/// A piece of the disk.
struct Piece {
    /// First byte, as the guest counts.
    start: u64,
    len: u64,
    writable: bool,
    /// Index into the storages.
    file: u16,
    /// Name and word of the extent line, for `info`.
    shown: (String, String),
    body: Body,
}

enum Body {
    Flat { offset: u64 },
    Zero,
    Sparse(Box<Sparse>),
}

/// The descriptor's text and where it is, to change the CID in.
struct Text {
    text: String,
    offset: u64,
    room: u64,
}

struct Vmdk {
    storages: Vec<Arc<dyn Storage>>,
    pieces: Vec<Piece>,
    size: u64,
    unit: u64,
    backing: Option<Backing>,
    parsed: Descriptor,
    /// Compressed grains only.
    packed: bool,
    text: Mutex<Option<Text>>,
    /// The CID was changed since the image was opened.
    touched: AtomicBool,
}

fn probe(input: &ProbeInput<'_>) -> u32 {
    let head = input.head;
    if head.starts_with(MAGIC) || head.starts_with(COW_MAGIC) || descriptor::looks_like_descriptor(head) {
        100
    } else {
        0
    }
}

/// The descriptor of an image: its place, room and text, and what it says. A bare sparse extent has none.
fn read_descriptor(storage: &dyn Storage) -> Result<(Option<Text>, Descriptor)> {
    let mut magic = [0; 4];
    storage.read_at(&mut magic, 0)?;
    let (offset, room) = if &magic == MAGIC {
        // A stream's header names the descriptor at its front; the footer's copy may not.
        let mut bytes = [0; 44];
        storage.read_at(&mut bytes, 0)?;
        let (at, len) = (le64(&bytes, 28), le64(&bytes, 36));
        if at == 0 || len == 0 {
            return Ok((None, Descriptor::parse("")?));
        }
        if len > (MAX_DESCRIPTOR / 512) as u64 || at > 1 << 48 {
            return Err(Error::invalid("Invalid VMDK extent: the descriptor is too large"));
        }
        (at * 512, len * 512)
    } else if &magic == COW_MAGIC {
        return Ok((None, Descriptor::parse("")?));
    } else {
        (0, storage.size()?.min(MAX_DESCRIPTOR as u64))
    };
    let bytes = storage.read_vec(offset, room as usize)?;
    let (text, parsed) = Descriptor::from_bytes(&bytes)?;
    let room = if offset == 0 { MAX_DESCRIPTOR as u64 } else { room };
    Ok((Some(Text { text, offset, room }), parsed))
}

fn open(opening: Opening<'_>) -> Result<Box<dyn Format>> {
    let main = opening.storage;
    let (text, parsed) = read_descriptor(&*main)?;
    let mut magic = [0; 4];
    main.read_at(&mut magic, 0)?;
    let mut storages = vec![Arc::clone(&main)];
    let mut pieces = Vec::new();
    if &magic == MAGIC || &magic == COW_MAGIC {
        // One file that holds everything, whatever its descriptor calls it.
        let sparse = Sparse::open(Arc::clone(&main))?;
        let name = main.name();
        let word = parsed.extents.first().map_or("SPARSE".to_owned(), |e| e.word.clone());
        pieces.push(Piece {
            start: 0,
            len: sparse.size(),
            writable: true,
            file: 0,
            shown: (name, word),
            body: Body::Sparse(Box::new(sparse)),
        });
    } else {
        if !matches!(
            parsed.create_type.as_str(),
            "monolithicFlat"
                | "vmfs"
                | "vmfsSparse"
                | "twoGbMaxExtentSparse"
                | "twoGbMaxExtentFlat"
                | "custom"
        ) {
            return Err(Error::unsupported(format!("Unsupported image type '{}'", parsed.create_type)));
        }
        if parsed.extents.len() > MAX_EXTENTS {
            return Err(Error::invalid(format!(
                "VMDK descriptor names {} extents; {MAX_EXTENTS} are the most",
                parsed.extents.len()
            )));
        }
        let mut start = 0u64;
        for line in &parsed.extents {
            let len = line
                .sectors
                .checked_mul(512)
                .filter(|&l| start.checked_add(l).is_some_and(|end| end <= i64::MAX as u64));
            let len = len.ok_or_else(|| Error::invalid("VMDK extents add up to more than 8 EiB"))?;
            let (mut file, mut name) = (0, String::new());
            let body = match line.kind {
                Kind::Zero => Body::Zero,
                kind => {
                    let storage = opening
                        .siblings
                        .open(&line.file, opening.read_only || !line.writable)
                        .context(|| format!("Could not open VMDK extent '{}'", line.file))?;
                    name = storage.name();
                    file = storages.len() as u16;
                    storages.push(Arc::clone(&storage));
                    if let Kind::Flat { sector } = kind {
                        let offset = sector
                            .checked_mul(512)
                            .filter(|o| o.checked_add(len).is_some_and(|e| e <= i64::MAX as u64));
                        let offset = offset
                            .ok_or_else(|| Error::invalid(format!("Invalid extent offset {sector}")))?;
                        Body::Flat { offset }
                    } else {
                        let sparse =
                            Sparse::open(storage).context(|| format!("VMDK extent '{}'", line.file))?;
                        if sparse.size() < len {
                            return Err(Error::invalid(format!(
                                "VMDK extent '{}' is shorter than the descriptor says",
                                line.file
                            )));
                        }
                        Body::Sparse(Box::new(sparse))
                    }
                }
            };
            pieces.push(Piece {
                start,
                len,
                writable: line.writable,
                file,
                shown: (name, line.word.clone()),
                body,
            });
            start += len;
        }
    }
    let backing = match &parsed.parent_hint {
        Some(name) if parsed.parent_cid != NO_PARENT => {
            Some(Backing { name: name.clone(), format: Some("vmdk".into()) })
        }
        _ => None,
    };
    if let Some(b) = &backing
        && !opening.no_io
        && !opening.for_check
        && let Ok(cid) = create::read_cid(&storage::join_name(&main.name(), &b.name))
        && cid != parsed.parent_cid
    {
        return Err(Error::invalid(format!(
            "Backing file '{}' was changed since '{}' was made on top of it (its CID is {cid:08x}, not {:08x})",
            b.name,
            main.name(),
            parsed.parent_cid
        )));
    }
    let sparse =
        || pieces.iter().filter_map(|p| if let Body::Sparse(s) = &p.body { Some((p, s)) } else { None });
    let unit = sparse().map(|(_, s)| s.grain).max().unwrap_or(1);
    if !opening.read_only && sparse().any(|(p, _)| p.start % unit != 0) {
        return Err(Error::unsupported(
            "A VMDK extent begins in the middle of a grain; such an image can only be opened read-only",
        ));
    }
    let packed = sparse().any(|(_, s)| s.compressed());
    if packed && pieces.len() > 1 && !opening.read_only {
        return Err(Error::unsupported(
            "VMDK images with several compressed extents can only be opened read-only",
        ));
    }
    Ok(Box::new(Vmdk {
        size: pieces.iter().map(|p| p.len).sum(),
        storages,
        unit,
        backing,
        parsed,
        packed,
        pieces,
        text: Mutex::new(text),
        touched: AtomicBool::new(opening.read_only),
    }))
}

impl Vmdk {
    /// The piece that holds guest offset `at`.
    fn piece(&self, at: u64) -> Result<&Piece> {
        let i = self.pieces.partition_point(|p| p.start <= at);
        self.pieces.get(i.wrapping_sub(1)).filter(|p| at - p.start < p.len).ok_or(Error::OutOfRange {
            offset: at,
            len: 1,
            size: self.size,
        })
    }

    /// Gives the image another content id before its contents change, so that overlays made on the old contents are found out.
    fn touch(&self) -> Result<()> {
        if self.touched.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut text = self.text.lock().unwrap_or_else(|e| e.into_inner());
        if self.touched.load(Ordering::Acquire) {
            return Ok(());
        }
        if let Some(t) = &mut *text {
            let mut cid = [0; 4];
            support::random_bytes(&mut cid)?;
            if let Some(changed) = descriptor::replace_cid(&t.text, u32::from_le_bytes(cid) & 0x7fff_ffff) {
                // Only the sector with the number, where the length stays the same: it is written whole or not at all.
                if changed.len() == t.text.len() {
                    let at =
                        changed.bytes().zip(t.text.bytes()).position(|(a, b)| a != b).unwrap_or(0) & !511;
                    let end = changed.len().min(at + 1024);
                    self.storages[0].write_at(&changed.as_bytes()[at..end], t.offset + at as u64)?;
                } else if changed.len() as u64 <= t.room {
                    let mut bytes = changed.clone().into_bytes();
                    if t.offset > 0 {
                        bytes.resize(bytes.len().max(t.text.len()), 0);
                        self.storages[0].write_at(&bytes, t.offset)?;
                    } else {
                        self.storages[0].write_at(&bytes, 0)?;
                        self.storages[0].set_size(bytes.len() as u64)?;
                    }
                }
                t.text = changed;
            }
        }
        self.touched.store(true, Ordering::Release);
        Ok(())
    }

    fn each_sparse(&self) -> impl Iterator<Item = &Sparse> {
        self.pieces.iter().filter_map(|p| if let Body::Sparse(s) = &p.body { Some(&**s) } else { None })
    }

    /// The only extent of an image with compressed grains.
    fn stream(&self) -> Result<&Sparse> {
        self.each_sparse()
            .next()
            .ok_or_else(|| Error::unsupported("this VMDK image stores nothing compressed"))
    }
}

impl Format for Vmdk {
    fn size(&self) -> u64 {
        self.size
    }

    fn info(&self) -> Result<Info> {
        let extents: Vec<serde_json::Value> = self
            .pieces
            .iter()
            .filter(|p| !matches!(p.body, Body::Zero))
            .map(|p| {
                let mut extent = serde_json::json!({
                    "filename": p.shown.0,
                    "format": if matches!(p.body, Body::Sparse(_)) && self.storages.len() == 1 { "" } else { &p.shown.1 },
                    "virtual-size": p.len,
                });
                if let Body::Sparse(s) = &p.body {
                    extent["cluster-size"] = s.grain.into();
                    if s.compressed() {
                        extent["compressed"] = true.into();
                    }
                }
                extent
            })
            .collect();
        let cid = match &*self.text.lock().unwrap_or_else(|e| e.into_inner()) {
            Some(t) => Descriptor::parse(&t.text)?.cid,
            None => self.parsed.cid,
        };
        Ok(Info {
            cluster_size: (self.unit > 1).then_some(self.unit),
            backing: self.backing.clone(),
            specific: Some(serde_json::json!({
                "cid": cid,
                "parent-cid": self.parsed.parent_cid,
                "create-type": self.parsed.create_type,
                "extents": extents,
            })),
            children: (1..self.storages.len()).map(|i| (format!("extents.{}", i - 1), i)).collect(),
            ..Info::default()
        })
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn unit(&self) -> u64 {
        self.unit
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        let piece = self.piece(offset)?;
        let within = offset - piece.start;
        let len = len.min(piece.len - within);
        match &piece.body {
            Body::Zero => push_extent(out, Extent { offset, len, mapping: Mapping::Zero { host: None } }),
            Body::Flat { offset: base } => push_extent(
                out,
                Extent {
                    offset,
                    len,
                    mapping: Mapping::Data {
                        file: piece.file,
                        host: base + within,
                        in_place: piece.writable,
                    },
                },
            ),
            Body::Sparse(sparse) => {
                let mut found = Vec::new();
                support::map_units((piece.file, sparse.grain), (within, len), &mut found, |g, s| {
                    sparse.lookup(g, s)
                })?;
                for mut e in found {
                    e.offset += piece.start;
                    match &mut e.mapping {
                        Mapping::Compressed { unit_start, .. } => *unit_start += piece.start,
                        Mapping::Data { in_place, .. } => *in_place = piece.writable,
                        _ => {}
                    }
                    push_extent(out, e);
                }
            }
        }
        Ok(())
    }

    fn decode(&self, extent: &Extent, stored: &[u8], out: &mut [u8]) -> Result<()> {
        let damaged = |what: &str| {
            Error::Corrupt(format!(
                "'{}': the compressed grain at {:#x} {what}",
                self.storages[0].name(),
                extent.offset
            ))
        };
        let piece = self.piece(extent.offset)?;
        let Body::Sparse(sparse) = &piece.body else { return Err(damaged("is in an extent without grains")) };
        let packed = if sparse.markers() {
            let (marker, rest) =
                stored.split_at_checked(GRAIN_MARKER).ok_or_else(|| damaged("has no marker"))?;
            rest.get(..le32(marker, 8) as usize).ok_or_else(|| damaged("is longer than its place"))?
        } else {
            stored
        };
        INFLATE.with_borrow_mut(|state| {
            let inflate = state.get_or_insert_with(|| Decompress::new(true));
            inflate.reset(true);
            match inflate.decompress(packed, out, FlushDecompress::Finish) {
                Ok(_) => {
                    // The last grain of a disk may have been stored no longer than the disk.
                    let got = inflate.total_out() as usize;
                    let needed = (piece.start + piece.len)
                        .saturating_sub(extent.offset - extent.offset % sparse.grain);
                    if (got as u64) < needed.min(out.len() as u64) {
                        return Err(damaged("ends early"));
                    }
                    out[got..].fill(0);
                    Ok(())
                }
                Err(e) => Err(damaged(&format!("cannot be decoded: {e}"))),
            }
        })
    }

    fn prepare_write(&self, offset: u64, len: u64, out: &mut Vec<WriteExtent>) -> Result<()> {
        let piece = self.piece(offset)?;
        let within = offset - piece.start;
        let len = len.min(piece.len - within);
        if !piece.writable {
            return Err(Error::ReadOnly(format!("VMDK extent '{}'", piece.shown.0)));
        }
        match &piece.body {
            Body::Zero => Err(Error::ReadOnly("a VMDK extent of zeros".into())),
            Body::Flat { offset: base } => {
                let host = base + within;
                out.push(WriteExtent {
                    offset,
                    len,
                    file: piece.file,
                    host,
                    new: false,
                    head: 0,
                    tail: 0,
                    fresh: false,
                    cookie: 0,
                });
                Ok(())
            }
            Body::Sparse(sparse) if sparse.compressed() => {
                Err(Error::unsupported("stream-optimized VMDK images store whole compressed grains only"))
            }
            Body::Sparse(sparse) => {
                let mut made = Vec::new();
                let whole = (piece.file, sparse.grain);
                support::prepare_units(
                    whole,
                    (within, len),
                    &mut made,
                    |g, s| sparse.lookup(g, s),
                    |_| sparse.allocate(),
                )?;
                for mut e in made {
                    e.tail = e.tail.min(piece.len - e.offset - e.len);
                    e.offset += piece.start;
                    push_write(out, e);
                }
                Ok(())
            }
        }
    }

    fn commit_write(&self, extents: &[WriteExtent]) -> Result<()> {
        self.touch()?;
        for e in extents.iter().filter(|e| e.new) {
            let piece = self.piece(e.offset)?;
            let Body::Sparse(sparse) = &piece.body else { continue };
            let local = WriteExtent { offset: e.offset - piece.start, ..e.clone() };
            support::commit_units(sparse.grain, &[local], |grain, host| sparse.assign(grain, host))?;
        }
        Ok(())
    }

    fn note_write(&self, _offset: u64, _len: u64) -> Result<()> {
        self.touch()
    }

    fn abort_write(&self, _extents: &[WriteExtent]) {}

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<Zeroing> {
        self.touch()?;
        let mut at = offset;
        while at < offset + len {
            let piece = self.piece(at)?;
            let within = at - piece.start;
            let n = (offset + len - at).min(piece.len - within);
            let storage = &self.storages[usize::from(piece.file)];
            let done = match &piece.body {
                Body::Zero => Zeroing::Done,
                _ if !piece.writable => {
                    return Err(Error::ReadOnly(format!("VMDK extent '{}'", piece.shown.0)));
                }
                Body::Flat { offset: base } => storage.write_zeroes(base + within, n, ZeroFlags { unmap })?,
                Body::Sparse(sparse) => {
                    // A piece that ends inside a unit of another grain size is not whole.
                    let whole = within.is_multiple_of(sparse.grain)
                        && (n.is_multiple_of(sparse.grain) || within + n == piece.len);
                    support::zero_units(
                        (storage, sparse.grain),
                        (within, n),
                        unmap,
                        |g, s| sparse.lookup(g, s),
                        |grain, slot| match slot {
                            Slot::Zero => Ok(Zeroing::Done),
                            Slot::Free if self.backing.is_none() => Ok(Zeroing::Done),
                            _ if whole && sparse.zeroed_grains() => {
                                sparse.zero(grain).map(|()| Zeroing::Done)
                            }
                            _ => Ok(Zeroing::Unsupported),
                        },
                    )?
                }
            };
            if done == Zeroing::Unsupported {
                return Ok(done);
            }
            at += n;
        }
        Ok(Zeroing::Done)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let mut at = offset;
        let mut extents = Vec::new();
        while at < offset + len {
            extents.clear();
            self.map(at, offset + len - at, &mut extents)?;
            for e in &extents {
                if let Mapping::Data { file, host, in_place: true } = e.mapping {
                    self.touch()?;
                    self.storages[usize::from(file)].discard(host, e.len)?;
                }
                at = e.offset + e.len;
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        for piece in &self.pieces {
            match &piece.body {
                Body::Sparse(sparse) => sparse.flush()?,
                Body::Flat { .. } => self.storages[usize::from(piece.file)].flush()?,
                Body::Zero => {}
            }
        }
        if self.storages.len() > 1 { self.storages[0].flush() } else { Ok(()) }
    }

    fn resize(&self, _size: u64, _preallocation: Preallocation) -> Result<()> {
        Err(support::no_resize())
    }

    fn compress(&self, unit: &[u8]) -> Result<Option<Vec<u8>>> {
        let sparse = self.stream()?;
        DEFLATE.with_borrow_mut(|state| {
            let deflate = state.get_or_insert_with(|| Compress::new(Compression::default(), true));
            deflate.reset();
            // Stored blocks cost five bytes each, and the stream six: this always suffices.
            let mut packed = vec![0; unit.len() + unit.len() / 1000 + 128];
            match deflate.compress(unit, &mut packed, FlushCompress::Finish) {
                Ok(Status::StreamEnd) => {
                    packed.truncate(deflate.total_out() as usize);
                    // A lone grain that does not shrink is stored by plain images as it is; a stream has no other way.
                    Ok((sparse.compressed() || packed.len() < unit.len()).then_some(packed))
                }
                Ok(_) => Err(Error::invalid("deflate needs more room than it may")),
                Err(e) => Err(Error::invalid(format!("deflate failed: {e}"))),
            }
        })
    }

    fn compresses(&self) -> bool {
        self.packed
    }

    fn compressed_only(&self) -> bool {
        self.packed
    }

    fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<()> {
        let sparse = self.stream()?;
        if !sparse.compressed() {
            return Err(Error::unsupported("only stream-optimized VMDK images can store compressed grains"));
        }
        self.touch()?;
        let marker = if sparse.markers() { GRAIN_MARKER } else { 0 };
        let len = (marker + data.len()).next_multiple_of(512);
        if len as u64 > 2 * sparse.grain + 512 {
            return Err(Error::usage("the compressed grain is too long"));
        }
        let mut bytes = Vec::with_capacity(len);
        if marker > 0 {
            bytes.extend_from_slice(&(offset / 512).to_le_bytes());
            bytes.extend_from_slice(&(data.len() as u32).to_le_bytes());
        }
        bytes.extend_from_slice(data);
        bytes.resize(len, 0);
        let host = sparse.allocate_packed(len as u64)?;
        sparse.storage.write_at(&bytes, host)?;
        sparse.assign(offset / sparse.grain, host)
    }

    fn check(&self, _repair: Repair) -> Result<CheckReport> {
        let mut report = CheckReport::default();
        for piece in &self.pieces {
            let size = match &piece.body {
                Body::Zero => continue,
                _ => self.storages[usize::from(piece.file)].size()?,
            };
            match &piece.body {
                Body::Flat { offset } if offset + piece.len > size => {
                    report.corruptions += 1;
                    report.say(format!(
                        "ERROR: extent '{}' ends before its {} bytes",
                        piece.shown.0, piece.len
                    ));
                }
                Body::Sparse(sparse) => check_sparse(sparse, &piece.shown.0, size, &mut report)?,
                _ => {}
            }
        }
        Ok(report)
    }

    fn created_zeroed(&self) -> bool {
        self.storages.iter().all(|s| s.grows_with_zeros())
    }
}

/// Looks for grains outside of the file or on top of each other.
fn check_sparse(sparse: &Sparse, name: &str, size: u64, report: &mut CheckReport) -> Result<()> {
    report.total_clusters += sparse.size().div_ceil(sparse.grain);
    let (mut last, mut outside, mut end) = (None, 0u64, 0);
    // One bit for each grain-sized place of the file finds overlaps in bounded memory.
    let mut used = Places::new(if sparse.compressed() { 0 } else { size / sparse.grain + 1 })?;
    let mut shared = 0u64;
    let walked = sparse.each(|grain, host| {
        report.allocated_clusters += 1;
        report.compressed_clusters += u64::from(sparse.compressed());
        report.fragmented_clusters += u64::from(last.is_some_and(|l: u64| l + sparse.grain != host));
        last = Some(host);
        end = end.max(host + if sparse.compressed() { 512 } else { sparse.grain });
        if host >= size {
            outside += 1;
            report.say(format!(
                "ERROR: cluster offset {host:#x} of grain {grain} lies after the end of '{name}'"
            ));
        } else if !sparse.compressed() && host % sparse.grain == 0 && !used.claim(host / sparse.grain) {
            shared += 1;
            report
                .say(format!("ERROR: grain {grain} shares its place at {host:#x} of '{name}' with another"));
        }
    });
    report.corruptions += outside + shared;
    if let Err(e) = walked {
        report.corruptions += 1;
        report.say(format!("ERROR: {e}"));
    }
    report.image_end_offset = report.image_end_offset.max(Some(end));
    Ok(())
}

thread_local! {
    static INFLATE: RefCell<Option<Decompress>> = const { RefCell::new(None) };
    static DEFLATE: RefCell<Option<Compress>> = const { RefCell::new(None) };
}
