//! The traits and types every format implements or uses.

use crate::{Error, Options, Result, options::OptionSpec, storage::Storage, storage::Zeroing};
use std::{collections::BTreeMap, path::Path, sync::Arc};

/// What a format is, and how to make one of its images work.
#[derive(Debug)]
pub struct Driver {
    /// Its name in `-f` and in backing-format fields.
    pub name: &'static str,
    /// How sure it is that an image is its own: 0 (not), 100 (signature found).
    pub probe: fn(&ProbeInput<'_>) -> u32,
    /// Opens an image.
    pub open: fn(Opening<'_>) -> Result<Box<dyn Format>>,
    /// Creates an image; `None` where images of this format cannot be made.
    pub create: Option<fn(Creation<'_>) -> Result<()>>,
    /// Says how large an image would get; `None` where nobody can say.
    pub measure: Option<fn(Measurement<'_>) -> Result<Measured>>,
    /// Creation options beyond `size`.
    pub options: &'static [OptionSpec],
    /// Whether its images can have a backing file.
    pub backing: bool,
}

/// What probing may look at.
#[derive(Debug)]
pub struct ProbeInput<'a> {
    /// The first bytes (2048, or fewer in a small file).
    pub head: &'a [u8],
    /// The file's name, for formats without a signature.
    pub name: &'a str,
}

/// Opens or creates files that belong to an image besides its main one.
pub trait Siblings {
    /// Opens the file that an image names; `name` is resolved relative to the image.
    fn open(&self, name: &str, read_only: bool) -> Result<Arc<dyn Storage>>;
    /// Creates it.
    fn create(&self, name: &str, size: u64) -> Result<Arc<dyn Storage>>;
}

/// What [`Driver::open`] gets.
pub struct Opening<'a> {
    /// The main file. Its `read_only()` tells whether writes are allowed.
    pub storage: Arc<dyn Storage>,
    /// The image is to be read only: nothing whatever may be written, not even repairs.
    pub read_only: bool,
    /// Format-specific options; the format takes out those it knows and the caller refuses the rest.
    pub options: &'a mut Options,
    /// For extents and external data files.
    pub siblings: &'a dyn Siblings,
    /// Secrets by id, for encrypted images.
    pub secrets: &'a BTreeMap<String, Vec<u8>>,
    /// Opened to look at or repair metadata: tolerate dirty and corrupt marks, and do not repair unasked.
    pub for_check: bool,
    /// No guest data will be read or written (`info`): missing keys and data files are tolerated.
    pub no_io: bool,
}

/// What [`Driver::create`] gets.
pub struct Creation<'a> {
    /// The main file, empty or (a device) of unknown contents.
    pub storage: Arc<dyn Storage>,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Backing file to record.
    pub backing: Option<Backing>,
    /// Creation options; the format takes out those it knows.
    pub options: &'a mut Options,
    /// The image's name (`dir/disk.vmdk`), for formats that name further files after it.
    pub name: &'a str,
    /// For further files.
    pub siblings: &'a dyn Siblings,
    /// Secrets by id.
    pub secrets: &'a BTreeMap<String, Vec<u8>>,
}

/// What [`Driver::measure`] gets.
pub struct Measurement<'a> {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Creation options.
    pub options: &'a mut Options,
    /// Offsets and lengths of the data in the source, ascending; empty without a source.
    pub data: &'a [(u64, u64)],
    /// Bytes that the source's persistent bitmaps would take: `(granularity, name length)` each.
    pub bitmaps: Option<&'a [(u64, usize)]>,
    /// The source will be converted onto a backing file.
    pub backing: bool,
}

/// How large an image would get.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Measured {
    /// Bytes for the data given.
    pub required: u64,
    /// Bytes if all of the disk were allocated.
    pub fully_allocated: u64,
    /// Bytes for bitmaps.
    pub bitmaps: Option<u64>,
}

/// A reference to a backing file, as stored in an image.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Backing {
    /// Its name, as stored (may be relative to the image).
    pub name: String,
    /// Its format, if stored.
    pub format: Option<String>,
}

/// What an image says about itself.
#[derive(Clone, Debug, Default)]
pub struct Info {
    /// Allocation unit in bytes (cluster, grain, block); `None` where there is none.
    pub cluster_size: Option<u64>,
    /// Backing file.
    pub backing: Option<Backing>,
    /// Guest data is encrypted.
    pub encrypted: bool,
    /// All data is stored compressed.
    pub compressed: bool,
    /// The image was not closed cleanly.
    pub dirty: bool,
    /// Format-specific facts: an object, keys with dashes, as `qemu-img info --output=json` shows under
    /// `format-specific.data`.
    pub specific: Option<serde_json::Value>,
    /// Human text for the same where it is not simply the keys.
    pub notes: Vec<String>,
    /// Names of further files: (child name, index into `storages`).
    pub children: Vec<(String, usize)>,
}

/// Where a range of the guest's disk is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First byte, as the guest counts.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Where they are.
    pub mapping: Mapping,
}

/// What holds the bytes of an extent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mapping {
    /// Stored as they are (or encrypted, see [`Format::cipher`]).
    Data {
        /// Index into [`Format::storages`].
        file: u16,
        /// Offset in that storage of the extent's first byte.
        host: u64,
        /// May be overwritten where it is, without any metadata change.
        in_place: bool,
    },
    /// Part of a unit that has to be read and decoded whole.
    Compressed {
        /// Index into [`Format::storages`].
        file: u16,
        /// Where the stored bytes begin.
        host: u64,
        /// How many bytes are stored (at most; the decoder may need fewer).
        stored: u32,
        /// Guest offset of the unit's first byte.
        unit_start: u64,
        /// Bytes of the decoded unit.
        unit: u32,
        /// For the format's own use.
        method: u32,
    },
    /// Reads as zeros, whatever the backing file says. `host` is the space reserved for it, if any.
    Zero {
        /// (Index into [`Format::storages`], offset).
        host: Option<(u16, u64)>,
    },
    /// Comes from the backing file; zeros where there is none.
    Unallocated,
}

/// Where a piece of a write goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WriteExtent {
    /// First byte of the request in this piece, as the guest counts.
    pub offset: u64,
    /// Bytes of the request in this piece.
    pub len: u64,
    /// Index into [`Format::storages`].
    pub file: u16,
    /// Where byte `offset` goes in that storage.
    pub host: u64,
    /// Newly allocated: [`Format::commit_write`] has to map it.
    pub new: bool,
    /// Guest bytes before `offset` that must be copied in front (host space `host - head ..`), because the new unit
    /// replaces them.
    pub head: u64,
    /// Guest bytes after the piece that must be copied behind it.
    pub tail: u64,
    /// The space for head and tail is known to read as zeros, so that zeros need not be copied there.
    pub fresh: bool,
    /// For the format's own use between prepare and commit.
    pub cookie: u64,
}

/// Repair asked of a check.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Repair {
    /// Only look.
    #[default]
    None,
    /// Give back leaked space.
    Leaks,
    /// Repair whatever can be.
    All,
}

/// What a check found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CheckReport {
    /// Damage.
    pub corruptions: u64,
    /// Space that is lost but harmless.
    pub leaks: u64,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// Damage repaired.
    pub corruptions_fixed: u64,
    /// Leaks repaired.
    pub leaks_fixed: u64,
    /// Where the used part of the file ends.
    pub image_end_offset: Option<u64>,
    /// Guest clusters in all.
    pub total_clusters: u64,
    /// Guest clusters that are allocated.
    pub allocated_clusters: u64,
    /// Of these, those that do not follow their predecessor in the file.
    pub fragmented_clusters: u64,
    /// Of these, compressed ones.
    pub compressed_clusters: u64,
    /// One line per finding (the first few thousand).
    pub messages: Vec<String>,
}

impl CheckReport {
    /// Adds a line, up to a bound that keeps a hostile image from filling memory.
    pub fn say(&mut self, message: impl Into<String>) {
        const LIMIT: usize = 10_000;
        match self.messages.len() {
            n if n < LIMIT => self.messages.push(message.into()),
            LIMIT => self.messages.push("(more findings are not listed)".into()),
            _ => {}
        }
    }
}

/// How much to allocate ahead.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Metadata only.
    Metadata,
    /// Reserve the host's space too.
    Falloc,
    /// Write zeros everywhere.
    Full,
}

impl Preallocation {
    /// `off`, `metadata`, `falloc`, `full`.
    pub fn parse(text: &str) -> Result<Self> {
        Ok(match text {
            "off" => Preallocation::Off,
            "metadata" => Preallocation::Metadata,
            "falloc" => Preallocation::Falloc,
            "full" => Preallocation::Full,
            _ => {
                return Err(Error::usage(format!(
                    "Invalid parameter '{text}'; preallocation is off, metadata, falloc or full"
                )));
            }
        })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    }
}

/// An internal snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SnapshotInfo {
    /// Unique id (a number in text).
    pub id: String,
    /// Name.
    pub name: String,
    /// Bytes of saved machine state.
    pub vm_state_size: u64,
    /// Creation time, seconds since 1970.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// Guest clock in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instruction count, where recorded.
    pub icount: Option<u64>,
    /// Disk size at that time in bytes.
    pub disk_size: u64,
}

/// Internal snapshots of an image. Callers make sure that no guest I/O is in flight.
pub trait Snapshots {
    /// All of them, in the order stored.
    fn list(&self) -> Vec<SnapshotInfo>;
    /// Takes one; an empty id is filled in.
    fn create(&self, snapshot: SnapshotInfo) -> Result<()>;
    /// Makes the disk what it was then. `which` is an id or a name.
    fn apply(&self, which: &str) -> Result<()>;
    /// Deletes one.
    fn delete(&self, which: &str) -> Result<()>;
    /// Shows the snapshot's contents through an image opened read-only, until it is closed.
    fn view(&self, which: &str) -> Result<()>;
}

/// A persistent dirty bitmap.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BitmapInfo {
    /// Name.
    pub name: String,
    /// Bytes of disk per bit.
    pub granularity: u64,
    /// Records new writes.
    pub auto: bool,
    /// Was not stored cleanly.
    pub in_use: bool,
}

/// Persistent dirty bitmaps of an image.
pub trait Bitmaps {
    /// All of them.
    fn list(&self) -> Vec<BitmapInfo>;
    /// Adds an empty one.
    fn add(&self, name: &str, granularity: Option<u64>, enabled: bool) -> Result<()>;
    /// Removes one.
    fn remove(&self, name: &str) -> Result<()>;
    /// Whether new writes are recorded.
    fn set_enabled(&self, name: &str, enabled: bool) -> Result<()>;
    /// The bits, one per granule, least significant first.
    fn load(&self, name: &str) -> Result<Vec<u8>>;
    /// Replaces the bits.
    fn store(&self, name: &str, bits: &[u8]) -> Result<()>;
}

/// What [`Format::amend`] gets besides its options.
#[derive(Clone, Copy, Debug)]
pub struct Amending<'a> {
    /// Secrets by id, for keys to add or erase.
    pub secrets: &'a BTreeMap<String, Vec<u8>>,
    /// Allow changes after which the data may not be accessible any more.
    pub force: bool,
}

/// Encryption of guest data as stored.
pub trait Cipher: Send + Sync {
    /// Decrypts whole sectors in place. `guest` and `host` are where the first byte is as the guest and as the storage counts.
    fn decrypt(&self, guest: u64, host: u64, buf: &mut [u8]) -> Result<()>;
    /// Encrypts whole sectors in place.
    fn encrypt(&self, guest: u64, host: u64, buf: &mut [u8]) -> Result<()>;
    /// Bytes of a sector; requests are rounded out to it.
    fn sector(&self) -> u64 {
        512
    }
}

/// An open image of some format.
///
/// A format owns its metadata and answers where the guest's bytes are; [`crate::Image`] moves them. What the caller
/// guarantees, so that formats need no bookkeeping of requests in flight:
///
/// * Ranges given are within [`Format::size`] and not empty.
/// * While `prepare_write .. commit_write` (or `abort_write`), `write_zeroes`, `discard` or `write_compressed` runs on a
///   range, no other request touches any unit ([`Format::unit`]) of that range. Different ranges come concurrently.
/// * `resize`, `set_backing`, `amend`, `check`, snapshot and bitmap calls come alone.
/// * Between a `map` and the end of the I/O based on it, the units mapped are neither freed nor moved.
///
/// What the format guarantees: after `flush` returns, everything committed before it survives a power cut; a power cut at any
/// write leaves an image that opens, with nothing flushed lost, and at worst leaked space. Space that on-disk metadata
/// may still refer to is not reused before new metadata is durable.
pub trait Format: Send + Sync {
    /// Size of the disk in bytes.
    fn size(&self) -> u64;

    /// Facts about the image.
    fn info(&self) -> Result<Info>;

    /// The files that extents refer to; the first is the main file.
    fn storages(&self) -> &[Arc<dyn Storage>];

    /// Allocation unit in bytes: copy-on-write and exclusion work on multiples of it. A power of two, or 1 where every
    /// byte has its fixed place.
    fn unit(&self) -> u64;

    /// If guest offset `x` is always at `base + x` of the first storage, readable and writable without a word to the
    /// format: `base`.
    fn flat(&self) -> Option<u64> {
        None
    }

    /// Appends the extents of `offset .. offset + len` to `out`, in order, without gaps and not reaching further. Neighbours
    /// that continue each other should be merged. It may stop early, after at least one extent, if more would need further
    /// metadata reads; the caller asks again.
    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()>;

    /// Decodes the stored bytes of a [`Mapping::Compressed`] extent; `out` is one whole unit.
    fn decode(&self, _extent: &Extent, _stored: &[u8], _out: &mut [u8]) -> Result<()> {
        Err(Error::unsupported("this format stores nothing compressed"))
    }

    /// Finds or allocates space for a write, appending pieces to `out` in order, without gaps. It may stop early after
    /// at least one piece. Nothing becomes visible before [`Format::commit_write`].
    fn prepare_write(&self, offset: u64, len: u64, out: &mut Vec<WriteExtent>) -> Result<()>;

    /// The data (with heads and tails) is written: map it.
    fn commit_write(&self, extents: &[WriteExtent]) -> Result<()>;

    /// Guest data of this range is about to change in place, by `write_at` on mapped extents (allocating writes, zeroing and
    /// discards do not announce themselves here). For formats that record what changes.
    fn note_write(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    /// The data could not be written: give back what `prepare_write` allocated.
    fn abort_write(&self, extents: &[WriteExtent]);

    /// Makes whole units read as zeros. The range is a multiple of [`Format::zero_unit`] (but may end at the end of the
    /// disk). `unmap`: space may be freed.
    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> Result<Zeroing> {
        Ok(Zeroing::Unsupported)
    }

    /// Granularity of [`Format::write_zeroes`].
    fn zero_unit(&self) -> u64 {
        self.unit()
    }

    /// The guest no longer needs these bytes; afterwards they read as zeros or as before. Any range.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// Makes everything committed durable.
    fn flush(&self) -> Result<()>;

    /// Changes the size of the disk. New space reads as zeros, even where a backing file is longer.
    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()>;

    /// Compresses one unit (shorter at the end of the disk): `None` if that gains nothing. May run on many threads.
    fn compress(&self, _unit: &[u8]) -> Result<Option<Vec<u8>>> {
        Err(Error::unsupported("this format cannot store compressed data"))
    }

    /// Whether [`Format::compress`] works.
    fn compresses(&self) -> bool {
        false
    }

    /// Whether data can only be stored compressed: [`crate::Image`] then compresses whole units for every write, and
    /// [`Format::compress`] never declines.
    fn compressed_only(&self) -> bool {
        false
    }

    /// Stores one unit compressed. `offset` is a multiple of the unit.
    fn write_compressed(&self, _offset: u64, _data: &[u8]) -> Result<()> {
        Err(Error::unsupported("this format cannot store compressed data"))
    }

    /// Encryption of the guest's data, if any.
    fn cipher(&self) -> Option<&dyn Cipher> {
        None
    }

    /// Looks for damage, and repairs it as asked.
    fn check(&self, _repair: Repair) -> Result<CheckReport> {
        Err(Error::unsupported("This image format does not support checks"))
    }

    /// Records another backing file, or none.
    fn set_backing(&self, _backing: Option<&Backing>) -> Result<()> {
        Err(Error::unsupported("This image format does not support changing the backing file"))
    }

    /// Changes creation options of an existing image.
    fn amend(&self, _options: &mut Options, _context: &Amending<'_>) -> Result<()> {
        Err(Error::unsupported("Format driver does not support option amendment"))
    }

    /// Allocates what the mode says for the whole disk.
    fn preallocate(&self, _mode: Preallocation) -> Result<()> {
        Err(Error::unsupported("This image format does not support preallocation"))
    }

    /// Deallocates the whole disk in one go, so that everything comes from the backing file.
    fn make_empty(&self) -> Result<()> {
        Err(Error::unsupported("This image format cannot be emptied"))
    }

    /// Internal snapshots, if the format has them.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }

    /// Dirty bitmaps, if the format has them.
    fn bitmaps(&self) -> Option<&dyn Bitmaps> {
        None
    }

    /// Bytes at the end of the file that nothing uses were reclaimed, marks of use removed, everything written: the last
    /// call, and only on a writable image.
    fn close(&self) -> Result<()> {
        self.flush()
    }

    /// Whether new space of this image is known to read as zeros without being written (`convert` then skips zeros).
    fn created_zeroed(&self) -> bool {
        true
    }
}

/// Appends an extent, merging it with the last where one continues the other.
pub fn push_extent(out: &mut Vec<Extent>, extent: Extent) {
    if let Some(last) = out.last_mut()
        && last.offset + last.len == extent.offset
    {
        let merges = match (last.mapping, extent.mapping) {
            (
                Mapping::Data { file: a, host: x, in_place: i },
                Mapping::Data { file: b, host: y, in_place: j },
            ) => a == b && i == j && x.checked_add(last.len) == Some(y),
            (Mapping::Zero { host: None }, Mapping::Zero { host: None }) => true,
            (Mapping::Zero { host: Some((a, x)) }, Mapping::Zero { host: Some((b, y)) }) => {
                a == b && x.checked_add(last.len) == Some(y)
            }
            (Mapping::Unallocated, Mapping::Unallocated) => true,
            (a @ Mapping::Compressed { .. }, b) => a == b,
            _ => false,
        };
        if merges {
            last.len += extent.len;
            return;
        }
    }
    out.push(extent);
}

/// Appends a piece of a write, merging neighbours that continue each other.
pub fn push_write(out: &mut Vec<WriteExtent>, piece: WriteExtent) {
    if let Some(last) = out.last_mut()
        && last.offset + last.len == piece.offset
        && last.file == piece.file
        && last.host.checked_add(last.len) == Some(piece.host)
        && last.new == piece.new
        && last.tail == 0
        && piece.head == 0
        && last.cookie == piece.cookie
        && last.fresh == piece.fresh
    {
        last.len += piece.len;
        last.tail = piece.tail;
        return;
    }
    out.push(piece);
}

/// Whether `head` has `magic` at `at`.
pub fn has_magic(head: &[u8], at: usize, magic: &[u8]) -> bool {
    head.get(at..).is_some_and(|h| h.starts_with(magic))
}

/// Whether `name` ends in `.extension`, in any case.
pub fn has_extension(name: &str, extension: &str) -> bool {
    Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case(extension))
}
