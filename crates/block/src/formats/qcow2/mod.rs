//! qcow2, versions 2 and 3 (QEMU's `docs/interop/qcow2.txt`).
//!
//! Locks, in this order: the caller's range locks; `meta` (header, refcounts, what waits to be written); `l1`; the slice cache.
//! Readers take only `l1` and the slice cache, briefly.

mod amend;
mod bitmap;
mod check;
mod codec;
mod create;
mod crypto;
mod flush;
mod header;
mod map;
mod refcount;
mod resize;
mod snapshot;
mod table;
mod write;

use super::{
    Amending, Backing, Bitmaps, CheckReport, Cipher, Driver, Extent, Format, Info, Opening, Preallocation, ProbeInput, Repair,
    Snapshots, WriteExtent, has_magic,
};
use crate::{
    Error, Options, Result,
    storage::{Storage, Zeroing},
};
use header::Header;
use refcount::Refcounts;
use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, MutexGuard, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};
use table::{TableCache, words};

/// The format.
pub static DRIVER: Driver = Driver {
    name: "qcow2",
    probe,
    open,
    create: Some(create::create),
    measure: Some(create::measure),
    options: create::OPTIONS,
    backing: true,
};

/// L1 and L2 entries: the cluster has exactly one reference.
const COPIED: u64 = 1 << 63;
/// L2 entry: compressed.
const COMPRESSED: u64 = 1 << 62;
/// L2 entry: reads as zeros.
const ZERO: u64 = 1;
/// Offset field of L1 and L2 entries.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Sizes that do not change while an image is open.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    cluster_bits: u32,
    cluster_size: u64,
    l2_entry_size: u64,
    /// Entries of an L2 table.
    l2_entries: u64,
    /// 32 with extended L2 entries, otherwise 1.
    subclusters: u64,
    subcluster_size: u64,
    zstd: bool,
    version: u32,
    /// Guest data is in the second storage, each cluster at its guest offset.
    data_file: bool,
}

impl Geometry {
    fn new(header: &Header) -> Self {
        let cluster_size = header.cluster_size();
        let subclusters = if header.l2_entry_size() == 16 { 32 } else { 1 };
        Geometry {
            cluster_bits: header.cluster_bits,
            cluster_size,
            l2_entry_size: header.l2_entry_size(),
            l2_entries: cluster_size / header.l2_entry_size(),
            subclusters,
            subcluster_size: cluster_size / subclusters,
            zstd: header.compression == 1,
            version: header.version,
            data_file: header.incompatible & header::DATA_FILE != 0,
        }
    }

    /// Which L1 entry maps a guest offset.
    fn l1_index(&self, offset: u64) -> u64 {
        offset / (self.cluster_size * self.l2_entries)
    }

    /// Where compressed data is: (host offset, bytes at most).
    fn compressed(&self, entry: u64) -> (u64, u64) {
        let shift = 62 - (self.cluster_bits - 8);
        let host = entry & ((1 << shift) - 1);
        let sectors = ((entry & !(COPIED | COMPRESSED)) >> shift) + 1;
        (host, sectors * 512 - host % 512)
    }
}

/// What changes under one lock.
struct Meta {
    header: Header,
    refcounts: Option<Refcounts>,
    /// L1 entries to be written.
    l1_dirty: BTreeSet<usize>,
    /// Where the next compressed cluster goes, if its host cluster has room.
    compressed_tail: u64,
    snapshots: Vec<snapshot::Snapshot>,
    /// The dirty bit is set on disk.
    dirty_marked: bool,
}

/// An open qcow2 image.
pub(super) struct Qcow2 {
    geo: Geometry,
    storages: Vec<Arc<dyn Storage>>,
    read_only: bool,
    has_backing: AtomicBool,
    size: AtomicU64,
    l1: RwLock<Vec<u64>>,
    tables: TableCache,
    meta: Mutex<Meta>,
    tracker: bitmap::Tracker,
    encryption: Option<crypto::Encryption>,
}

fn probe(input: &ProbeInput<'_>) -> u32 {
    let version = input.head.get(4..8).is_some_and(|v| matches!(v, [0, 0, 0, n] if *n >= 2));
    if has_magic(input.head, 0, &header::MAGIC) && version { 100 } else { 0 }
}

fn open(opening: Opening<'_>) -> Result<Box<dyn Format>> {
    let mut header = Header::read(&*opening.storage, opening.read_only, opening.for_check)?;
    let options = opening.options;
    let named_data_file = options.take("data-file.filename").or_else(|| options.take("data-file"));
    options.take("data-file.driver");
    for tuning in [
        "l2-cache-size",
        "l2-cache-entry-size",
        "refcount-cache-size",
        "cache-size",
        "cache-clean-interval",
        "overlap-check",
    ] {
        // Sizes of caches tune memory against speed; the caches here are bounded already, and all overlap checks are on.
        options.take(tuning);
    }
    for tuning in ["pass-discard-request", "pass-discard-snapshot", "pass-discard-other", "discard-no-unref"]
    {
        options.take(tuning);
    }
    let lazy = options.take_bool("lazy-refcounts")?;
    let encryption =
        crypto::open(&opening.storage, &header, options, opening.secrets, opening.no_io || opening.for_check)?;
    let geo = Geometry::new(&header);
    let mut storages = vec![opening.storage];
    if geo.data_file && !opening.no_io {
        let name = named_data_file.or_else(|| header.data_file.clone()).ok_or_else(|| {
            Error::invalid(
                "'data-file' is required for this image: it stores no name for its external data file",
            )
        })?;
        storages.push(opening.siblings.open(&name, opening.read_only)?);
    } else if let Some(name) = named_data_file.filter(|_| !geo.data_file) {
        return Err(Error::usage(format!(
            "'data-file' ({name}) can only be set for images with an external data file"
        )));
    }
    let bytes =
        crate::storage::StorageExt::read_vec(&*storages[0], header.l1_offset, header.l1_size as usize * 8)?;
    let l1: Vec<u64> = words(&bytes).collect();
    let snapshots = snapshot::read_table(&*storages[0], &header)?;
    if let Some(lazy) = lazy
        && header.version >= 3
    {
        header.compatible = header.compatible & !header::LAZY_REFCOUNTS | u64::from(lazy);
    }
    let marked = header.incompatible & header::DIRTY != 0;
    let image = Qcow2 {
        geo,
        storages,
        read_only: opening.read_only,
        has_backing: AtomicBool::new(header.backing.is_some()),
        size: AtomicU64::new(header.size),
        l1: RwLock::new(l1),
        tables: TableCache::new(geo.cluster_size),
        meta: Mutex::new(Meta {
            header,
            refcounts: None,
            l1_dirty: BTreeSet::new(),
            compressed_tail: 0,
            snapshots,
            dirty_marked: marked,
        }),
        tracker: bitmap::Tracker::default(),
        encryption,
    };
    if !opening.read_only {
        let mut meta = image.lock();
        if meta.header.forget_unknown_autoclear() && !opening.for_check {
            meta.header.write(&**image.main())?;
        }
        drop(meta);
        if marked && !opening.for_check {
            image.check_image(Repair::All)?;
        }
        image.load_tracked()?;
    }
    Ok(Box::new(image))
}

impl Qcow2 {
    fn lock(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The main file.
    fn main(&self) -> &Arc<dyn Storage> {
        &self.storages[0]
    }

    /// Index of the storage with guest data.
    fn data_index(&self) -> u16 {
        u16::from(self.geo.data_file)
    }

    fn disk_size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Whether absent clusters may show a backing file's contents.
    fn has_backing(&self) -> bool {
        self.has_backing.load(Ordering::Relaxed)
    }

    /// The L1 entry for a guest offset; 0 past the table.
    fn l1_entry(&self, offset: u64) -> u64 {
        let l1 = self.l1.read().unwrap_or_else(|e| e.into_inner());
        usize::try_from(self.geo.l1_index(offset)).ok().and_then(|i| l1.get(i)).copied().unwrap_or(0)
    }

    /// The refcounts, read on first use.
    fn refcounts<'m>(&self, meta: &'m mut Meta) -> Result<&'m mut Refcounts> {
        let Meta { header, refcounts, .. } = meta;
        match refcounts {
            Some(r) => Ok(r),
            None => Ok(refcounts.insert(Refcounts::open(
                Arc::clone(self.main()),
                self.geo.cluster_bits,
                header.refcount_order,
                header.reftable_offset,
                u64::from(header.reftable_clusters),
            )?)),
        }
    }

    /// Marks the image corrupt, so that nobody writes to it, and returns the error to report.
    fn mark_corrupt(&self, meta: &mut Meta, message: &str) -> Error {
        if !self.read_only && self.geo.version >= 3 {
            meta.header.incompatible |= header::CORRUPT;
            if let Err(e) = meta.header.write(&**self.main()) {
                tracing::error!(error = %e, "the corrupt mark could not be written");
            }
        }
        Error::Corrupt(format!(
            "qcow2: Marking image as corrupt: {message}; further corruption events will be suppressed"
        ))
    }
}

impl Format for Qcow2 {
    fn size(&self) -> u64 {
        self.disk_size()
    }

    fn info(&self) -> Result<Info> {
        let meta = self.lock();
        let h = &meta.header;
        let mut specific = serde_json::Map::new();
        let mut put = |key: &str, value: serde_json::Value| {
            specific.insert(key.into(), value);
        };
        put("compat", if h.version >= 3 { "1.1" } else { "0.10" }.into());
        put("compression-type", if self.geo.zstd { "zstd" } else { "zlib" }.into());
        put("refcount-bits", (1u64 << h.refcount_order).into());
        if h.version >= 3 {
            put("lazy-refcounts", (h.compatible & header::LAZY_REFCOUNTS != 0).into());
            put("corrupt", (h.incompatible & header::CORRUPT != 0).into());
            put("extended-l2", (self.geo.subclusters > 1).into());
        }
        if let Some(name) = &h.data_file {
            put("data-file", name.as_str().into());
        }
        if self.geo.data_file {
            put("data-file-raw", (h.autoclear & header::RAW_DATA_FILE != 0).into());
        }
        if let Some(encryption) = &self.encryption {
            put("encrypt", encryption.specific.clone());
        }
        let bitmaps = self.bitmap_list(&meta)?;
        if !bitmaps.is_empty() {
            put("bitmaps", bitmap::describe(&bitmaps));
        }
        Ok(Info {
            cluster_size: Some(self.geo.cluster_size),
            backing: h.backing.clone(),
            encrypted: h.crypt_method != 0,
            dirty: h.incompatible & header::DIRTY != 0,
            specific: Some(specific.into()),
            children: if self.storages.len() > 1 { vec![("data-file".into(), 1)] } else { Vec::new() },
            ..Info::default()
        })
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn unit(&self) -> u64 {
        self.geo.cluster_size
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        self.map_range(offset, len, out)
    }

    fn decode(&self, _extent: &Extent, stored: &[u8], out: &mut [u8]) -> Result<()> {
        codec::decompress(self.geo.zstd, stored, out)
    }

    fn prepare_write(&self, offset: u64, len: u64, out: &mut Vec<WriteExtent>) -> Result<()> {
        self.prepare(offset, len, out)
    }

    fn commit_write(&self, extents: &[WriteExtent]) -> Result<()> {
        self.commit(extents)
    }

    fn abort_write(&self, extents: &[WriteExtent]) {
        self.abort(extents);
    }

    fn note_write(&self, offset: u64, len: u64) -> Result<()> {
        self.track(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<Zeroing> {
        self.zero(offset, len, unmap)
    }

    fn zero_unit(&self) -> u64 {
        self.geo.subcluster_size
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.discard_range(offset, len)
    }

    fn flush(&self) -> Result<()> {
        self.flush_all()
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.set_disk_size(size, preallocation)
    }

    fn compress(&self, unit: &[u8]) -> Result<Option<Vec<u8>>> {
        // A short last cluster is stored as a whole one.
        if (unit.len() as u64) < self.geo.cluster_size {
            let mut whole = unit.to_vec();
            whole.resize(self.geo.cluster_size as usize, 0);
            return codec::compress(self.geo.zstd, &whole, whole.len());
        }
        codec::compress(self.geo.zstd, unit, unit.len())
    }

    fn compresses(&self) -> bool {
        !self.geo.data_file && self.encryption.is_none()
    }

    fn cipher(&self) -> Option<&dyn Cipher> {
        self.encryption.as_ref()?.cipher.as_ref().map(|c| c as &dyn Cipher)
    }

    fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.put_compressed(offset, data)
    }

    fn check(&self, repair: Repair) -> Result<CheckReport> {
        self.check_image(repair)
    }

    fn set_backing(&self, backing: Option<&Backing>) -> Result<()> {
        self.change_backing(backing)
    }

    fn amend(&self, options: &mut Options, context: &Amending<'_>) -> Result<()> {
        self.amend_options(options, context)
    }

    fn preallocate(&self, mode: Preallocation) -> Result<()> {
        self.preallocate_range(0, self.disk_size(), mode)
    }

    fn make_empty(&self) -> Result<()> {
        self.empty()
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }

    fn bitmaps(&self) -> Option<&dyn Bitmaps> {
        Some(self)
    }

    fn close(&self) -> Result<()> {
        self.finish()
    }
}
