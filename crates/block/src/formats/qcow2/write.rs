//! Writing: allocation, mapping, zeroing, discarding, compressed clusters.

use super::{COMPRESSED, COPIED, Meta, OFFSET, Qcow2, ZERO, header, table::Slice};
use crate::{
    Error, Result,
    formats::{WriteExtent, push_write},
    storage::Zeroing,
};
use std::sync::Arc;

/// `WriteExtent::cookie`: the host clusters were allocated for this write.
const ALLOCATED: u64 = 1;
/// Ranges waiting to be freed before metadata is written for their sake.
const MAX_WAITING: usize = 8192;

impl Qcow2 {
    /// Allocates up to `want` neighbouring clusters for data or tables, refusing any that hold metadata.
    pub(super) fn allocate(&self, meta: &mut Meta, want: u64) -> Result<(u64, u64, bool)> {
        if meta.header.compatible & header::LAZY_REFCOUNTS != 0 {
            self.mark_dirty(meta, true)?;
        }
        let found = self.refcounts(meta)?.allocate(want)?;
        self.refuse_overlap(meta, found.0, found.1)?;
        Ok(found)
    }

    /// Allocates exactly `want` neighbouring clusters.
    pub(super) fn allocate_exact(&self, meta: &mut Meta, want: u64) -> Result<u64> {
        let first = self.refcounts(meta)?.allocate_exact(want)?;
        self.refuse_overlap(meta, first, want)?;
        Ok(first)
    }

    /// An image with wrong refcounts offers its own metadata for allocation; writing there would destroy it.
    fn refuse_overlap(&self, meta: &mut Meta, first: u64, count: u64) -> Result<()> {
        let bits = self.geo.cluster_bits;
        let (start, end) = (first << bits, (first + count) << bits);
        let hits = |offset: u64, len: u64| offset < end && start < offset.saturating_add(len);
        let h = &meta.header;
        let cluster = self.geo.cluster_size;
        let mut what = None;
        if first == 0 {
            what = Some("qcow2_header");
        } else if hits(h.l1_offset, u64::from(h.l1_size) * 8) {
            what = Some("active L1 table");
        } else if h.snapshot_count > 0 && hits(h.snapshots_offset, cluster) {
            what = Some("snapshot table");
        } else if let Some(r) = &meta.refcounts
            && r.table().iter().any(|&b| b != 0 && hits(b, cluster))
        {
            what = Some("refcount block");
        } else if hits(h.reftable_offset, u64::from(h.reftable_clusters) << bits) {
            what = Some("refcount table");
        } else if self
            .l1
            .read()
            .unwrap_or_else(|e| e.into_inner())
            .iter()
            .any(|e| e & OFFSET != 0 && hits(e & OFFSET, cluster))
        {
            what = Some("active L2 table");
        }
        match what {
            Some(what) => {
                Err(self
                    .mark_corrupt(meta, &format!("Preventing invalid allocation that overlaps with {what}")))
            }
            None => Ok(()),
        }
    }

    /// Offset of the L2 table for a guest offset, made writable: allocated if there is none, copied if it is shared.
    pub(super) fn table_for_write(&self, meta: &mut Meta, offset: u64) -> Result<u64> {
        let index = self.geo.l1_index(offset) as usize;
        let entry = self.l1_entry(offset);
        let old = entry & OFFSET;
        if entry & COPIED != 0 && old != 0 {
            return Ok(old);
        }
        if old & (self.geo.cluster_size - 1) != 0 {
            return Err(Error::Corrupt(format!(
                "L2 table offset {old:#x} unaligned; run a check with repair"
            )));
        }
        let (cluster, _, _) = self.allocate(meta, 1)?;
        let new = cluster << self.geo.cluster_bits;
        let words = (self.geo.cluster_size / 8) as usize;
        self.tables.forget(new, self.geo.cluster_size);
        if old == 0 {
            self.tables.insert_new(new, std::iter::repeat_n(0, words));
        } else {
            let table = self.read_l2(old)?;
            self.tables.insert_new(new, table.into_iter());
            self.refcounts(meta)?.release(old >> self.geo.cluster_bits, 1);
        }
        let mut l1 = self.l1.write().unwrap_or_else(|e| e.into_inner());
        let slot = l1.get_mut(index).ok_or_else(|| Error::invalid("the L1 table is too small"))?;
        *slot = new | COPIED;
        meta.l1_dirty.insert(index);
        Ok(new)
    }

    /// All words of an L2 table, as the cache has them.
    pub(super) fn read_l2(&self, table: u64) -> Result<Vec<u64>> {
        let mut out = Vec::with_capacity((self.geo.cluster_size / 8) as usize);
        let step = self.tables.slice_bytes();
        for at in (table..table + self.geo.cluster_size).step_by(step as usize) {
            let slice = self.tables.get(&**self.main(), at)?;
            out.extend((0..(step / 8) as usize).map(|i| slice.get(i)));
        }
        Ok(out)
    }

    /// Entry and subcluster bitmap for a guest offset, with the L1 entry's copied flag folded in; zeros if there is no table.
    fn entry(&self, offset: u64) -> Result<(u64, u64)> {
        let l1 = self.l1_entry(offset);
        if l1 & OFFSET == 0 {
            return Ok((0, 0));
        }
        let (slice, word) = self.slice_for(l1 & OFFSET, offset)?;
        let entry = slice.get(word);
        let bitmap = if self.geo.subclusters > 1 { slice.get(word + 1) } else { 0 };
        Ok((if l1 & COPIED == 0 { entry & !COPIED } else { entry }, bitmap))
    }

    fn writable_entry(&self, meta: &mut Meta, offset: u64) -> Result<(Arc<Slice>, usize)> {
        let table = self.table_for_write(meta, offset)?;
        self.slice_for(table, offset)
    }

    fn set_entry(&self, slot: &(Arc<Slice>, usize), entry: u64, bitmap: u64) {
        self.tables.set(&slot.0, slot.1, entry);
        if self.geo.subclusters > 1 {
            self.tables.set(&slot.0, slot.1 + 1, bitmap);
        }
    }

    /// Whether an entry has a host cluster that a write may go to.
    fn own_cluster(&self, entry: u64) -> bool {
        entry & COMPRESSED == 0 && entry & COPIED != 0 && (entry & OFFSET != 0 || self.geo.data_file)
    }

    /// Releases what an entry refers to, once nothing durable does.
    pub(super) fn release_entry(&self, meta: &mut Meta, entry: u64) -> Result<()> {
        if self.geo.data_file {
            return Ok(());
        }
        let bits = self.geo.cluster_bits;
        if entry & COMPRESSED != 0 {
            let (host, stored) = self.geo.compressed(entry);
            let (first, last) = (host >> bits, (host + stored - 1) >> bits);
            self.refcounts(meta)?.release(first, last - first + 1);
        } else if entry & OFFSET != 0 {
            self.refcounts(meta)?.release((entry & OFFSET) >> bits, 1);
        }
        Ok(())
    }

    /// Writes metadata when much of it waits.
    fn relieve(&self, meta: &mut Meta) -> Result<()> {
        if self.tables.is_crowded() || meta.refcounts.as_ref().is_some_and(|r| r.waiting() > MAX_WAITING) {
            self.write_meta(meta)?;
        }
        Ok(())
    }

    /// Bits of the subclusters that `start .. end` (offsets in a cluster) touches.
    fn touched(&self, start: u64, end: u64) -> u64 {
        let s = self.geo.subcluster_size;
        let (first, last) = (start / s, (end - 1) / s);
        ((1u64 << (last + 1)) - 1) & !((1 << first) - 1)
    }

    pub(super) fn prepare(&self, offset: u64, len: u64, out: &mut Vec<WriteExtent>) -> Result<()> {
        let geo = self.geo;
        let end = offset + len;
        let mut meta = self.lock();
        let mut at = offset;
        while at < end {
            let cluster = at - at % geo.cluster_size;
            let stop = (cluster + geo.cluster_size).min(end);
            let (entry, bitmap) = self.entry(at)?;
            if self.own_cluster(entry) {
                let mut piece = WriteExtent {
                    offset: at,
                    len: stop - at,
                    file: self.data_index(),
                    host: (entry & OFFSET) + at - cluster,
                    new: false,
                    head: 0,
                    tail: 0,
                    fresh: false,
                    cookie: 0,
                };
                if (entry & OFFSET) & (geo.cluster_size - 1) != 0 {
                    return Err(self.mark_corrupt(&mut meta, "Cluster allocation offset unaligned"));
                }
                if geo.subclusters > 1 {
                    let touched = self.touched(at - cluster, stop - cluster);
                    if bitmap & touched != touched || (bitmap >> 32) & touched != 0 {
                        piece.new = true;
                        let s = geo.subcluster_size;
                        let (first, last) = ((at - cluster) / s, (stop - 1 - cluster) / s);
                        if bitmap >> first & 1 == 0 {
                            piece.head = at - cluster - first * s;
                        }
                        if bitmap >> last & 1 == 0 {
                            piece.tail = (last + 1) * s - (stop - cluster);
                        }
                    }
                } else if entry & ZERO != 0 && geo.version >= 3 {
                    piece.new = true;
                    piece.head = at - cluster;
                    piece.tail = cluster + geo.cluster_size - stop;
                }
                if piece.new {
                    self.clamp_tail(&mut piece);
                    out.push(piece);
                } else {
                    push_write(out, piece);
                }
                at = stop;
                continue;
            }
            // The table comes before what it maps, so that the clusters of a table lie together.
            if let Err(e) = self.table_for_write(&mut meta, at) {
                drop(meta);
                self.abort(out);
                out.clear();
                return Err(e);
            }
            // How many clusters from here on, of the same table, have to be allocated.
            let mut run = 1;
            let mut last = entry;
            let table_end = (geo.l1_index(at) + 1).saturating_mul(geo.cluster_size * geo.l2_entries).min(end);
            while cluster + run * geo.cluster_size < table_end {
                let (next, _) = self.entry(cluster + run * geo.cluster_size)?;
                if self.own_cluster(next) {
                    break;
                }
                last = next;
                run += 1;
            }
            let (host, got, fresh) = if geo.data_file {
                (cluster, run, false)
            } else {
                let (first, got, fresh) = match self.allocate(&mut meta, run) {
                    Ok(found) => found,
                    Err(e) => {
                        drop(meta);
                        self.abort(out);
                        out.clear();
                        return Err(e);
                    }
                };
                if got < run {
                    last = self.entry(cluster + (got - 1) * geo.cluster_size)?.0;
                }
                (first << geo.cluster_bits, got, fresh && self.main().grows_with_zeros())
            };
            let stop = (cluster + got * geo.cluster_size).min(end);
            // With subclusters, only what was there must be copied whole.
            let grain = |entry: u64| if entry == 0 { geo.subcluster_size } else { geo.cluster_size };
            let mut piece = WriteExtent {
                offset: at,
                len: stop - at,
                file: self.data_index(),
                host: host + at - cluster,
                new: true,
                head: at % grain(entry & !COPIED),
                tail: stop.next_multiple_of(grain(last & !COPIED)) - stop,
                fresh,
                cookie: if geo.data_file { 0 } else { ALLOCATED },
            };
            self.clamp_tail(&mut piece);
            out.push(piece);
            at = stop;
        }
        Ok(())
    }

    /// An external data file must not grow past the disk.
    fn clamp_tail(&self, piece: &mut WriteExtent) {
        if self.geo.data_file {
            let end = piece.offset + piece.len;
            piece.tail = piece.tail.min(self.disk_size().saturating_sub(end));
        }
    }

    pub(super) fn commit(&self, extents: &[WriteExtent]) -> Result<()> {
        let geo = self.geo;
        for piece in extents {
            self.track(piece.offset, piece.len)?;
        }
        if extents.iter().all(|p| !p.new) {
            return Ok(());
        }
        let mut meta = self.lock();
        for piece in extents.iter().filter(|p| p.new) {
            let (start, end) = (piece.offset - piece.head, piece.offset + piece.len + piece.tail);
            let mut cluster = start - start % geo.cluster_size;
            let base = piece.host - (piece.offset - cluster);
            let first = cluster;
            while cluster < end {
                let slot = self.writable_entry(&mut meta, cluster)?;
                let old = slot.0.get(slot.1);
                let new = (base + (cluster - first)) | COPIED;
                let mut bitmap = 0;
                if geo.subclusters > 1 {
                    let from = start.max(cluster) - cluster;
                    let to = (end - cluster).min(geo.cluster_size);
                    // A clamped tail still makes the whole subcluster valid: what is missing lies past the disk.
                    let written = self.touched(from, to);
                    // Where nothing was stored before, subclusters may still be marked as zeros.
                    let kept = if old & COMPRESSED == 0 && (piece.cookie == 0 || old & OFFSET == 0) {
                        slot.0.get(slot.1 + 1)
                    } else {
                        0
                    };
                    bitmap = (kept & !(written | written << 32)) | written;
                }
                self.set_entry(&slot, new, bitmap);
                if piece.cookie == ALLOCATED {
                    self.release_entry(&mut meta, old)?;
                }
                cluster += geo.cluster_size;
            }
        }
        self.relieve(&mut meta)
    }

    pub(super) fn abort(&self, extents: &[WriteExtent]) {
        let geo = self.geo;
        let mut meta = self.lock();
        for piece in extents.iter().filter(|p| p.cookie == ALLOCATED) {
            let start = piece.offset - piece.offset % geo.cluster_size;
            let first = (piece.host - (piece.offset - start)) >> geo.cluster_bits;
            let count = (piece.offset + piece.len - start).div_ceil(geo.cluster_size);
            let result = self.refcounts(&mut meta).and_then(|r| r.give_back(first, count));
            if let Err(e) = result {
                tracing::warn!(error = %e, "space of a failed write leaks");
            }
        }
    }

    pub(super) fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<Zeroing> {
        let geo = self.geo;
        if geo.version < 3 {
            // Version 2 has no zero entries; an absent cluster reads as zeros only without a backing file.
            if self.has_backing()
                || (offset | len) & (geo.cluster_size - 1) != 0 && offset + len != self.disk_size()
            {
                return Ok(Zeroing::Unsupported);
            }
            self.discard_range(offset, len)?;
            return Ok(Zeroing::Done);
        }
        self.track(offset, len)?;
        let mut meta = self.lock();
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let cluster = at - at % geo.cluster_size;
            let stop = (cluster + geo.cluster_size).min(end);
            let whole = at == cluster && (stop == cluster + geo.cluster_size || stop == self.disk_size());
            let (entry, bitmap) = self.entry(at)?;
            let touched = if whole { 0xffff_ffff } else { self.touched(at - cluster, stop - cluster) };
            let already = if geo.subclusters > 1 {
                entry & COMPRESSED == 0
                    && (bitmap >> 32) & touched == touched
                    && (!unmap || entry & OFFSET == 0)
            } else {
                entry & COMPRESSED == 0 && entry & ZERO != 0 && (!unmap || entry & OFFSET == 0)
            };
            // Without a backing file an absent cluster reads as zeros as it is.
            if already || (entry & !COPIED == 0 && bitmap == 0 && !self.has_backing() && !geo.data_file) {
                at = stop;
                continue;
            }
            if !whole && entry & COMPRESSED != 0 {
                // Part of a compressed cluster: it has to become a plain one first.
                return Ok(Zeroing::Unsupported);
            }
            // A shared cluster stays as it is: only the table, which is made our own, changes.
            let slot = self.writable_entry(&mut meta, at)?;
            let drop_cluster =
                whole && (entry & COMPRESSED != 0 || (unmap && entry & OFFSET != 0 && !geo.data_file));
            let kept = if drop_cluster { 0 } else { slot.0.get(slot.1) };
            if geo.subclusters > 1 {
                let bits = if drop_cluster { 0 } else { bitmap };
                self.set_entry(&slot, kept, (bits & !touched) | touched << 32);
            } else {
                self.set_entry(&slot, kept | ZERO, 0);
            }
            if drop_cluster {
                self.release_entry(&mut meta, entry)?;
            } else if geo.data_file && unmap {
                self.storages[1].write_zeroes(at, stop - at, crate::storage::ZeroFlags { unmap: true })?;
            }
            at = stop;
        }
        if geo.data_file && meta.header.autoclear & header::RAW_DATA_FILE != 0 && !unmap {
            // The data file alone must read the same.
            crate::storage::StorageExt::fill_zeroes(&*self.storages[1], offset, len)?;
        }
        self.relieve(&mut meta)?;
        Ok(Zeroing::Done)
    }

    pub(super) fn discard_range(&self, offset: u64, len: u64) -> Result<()> {
        let geo = self.geo;
        let size = self.disk_size();
        let mut at = offset.next_multiple_of(geo.cluster_size);
        let end = offset + len;
        // The disk's last cluster may be short.
        let end = if end == size { end } else { end - end % geo.cluster_size };
        if at < end {
            self.track(at, end - at)?;
        }
        let mut meta = self.lock();
        while at < end {
            let (entry, bitmap) = self.entry(at)?;
            let stop = at + geo.cluster_size;
            let plain_zero =
                if geo.subclusters > 1 { bitmap == 0xffff_ffff << 32 } else { entry & ZERO != 0 };
            let placed =
                entry & OFFSET != 0 || entry & COMPRESSED != 0 || (geo.data_file && entry & COPIED != 0);
            let nothing = (plain_zero && !placed)
                || (!placed && bitmap == 0 && entry & ZERO == 0 && !self.has_backing());
            // In version 2 an absent cluster would show the backing file again: leave it alone.
            if nothing || (geo.version < 3 && self.has_backing()) {
                at = stop;
                continue;
            }
            let slot = self.writable_entry(&mut meta, at)?;
            let (new, bits) = match (geo.version >= 3, geo.subclusters > 1) {
                (false, _) => (0, 0),
                (true, false) => (ZERO, 0),
                (true, true) => (0, 0xffff_ffffu64 << 32),
            };
            self.set_entry(&slot, new, bits);
            self.release_entry(&mut meta, entry)?;
            if geo.data_file && placed {
                let n = geo.cluster_size.min(size - at);
                if self.storages[1].write_zeroes(at, n, crate::storage::ZeroFlags { unmap: true })?
                    == Zeroing::Unsupported
                {
                    self.storages[1].discard(at, n)?;
                }
            }
            at = stop;
        }
        self.relieve(&mut meta)
    }

    pub(super) fn put_compressed(&self, offset: u64, data: &[u8]) -> Result<()> {
        let geo = self.geo;
        if geo.data_file {
            return Err(Error::unsupported(
                "An image with an external data file cannot store compressed clusters",
            ));
        }
        if !offset.is_multiple_of(geo.cluster_size)
            || data.is_empty()
            || data.len() as u64 >= geo.cluster_size
        {
            return Err(Error::usage("a compressed write must be one cluster, and smaller than it"));
        }
        let len = data.len() as u64;
        self.track(offset, geo.cluster_size.min(self.disk_size() - offset))?;
        let host = self.allocate_bytes(&mut self.lock(), len)?;
        let written = self.main().write_at(data, host);
        let mut meta = self.lock();
        let bits = geo.cluster_bits;
        if let Err(e) = written {
            let (first, last) = (host >> bits, (host + len - 1) >> bits);
            self.refcounts(&mut meta)?.give_back(first, last - first + 1)?;
            meta.compressed_tail = 0;
            return Err(e);
        }
        let slot = self.writable_entry(&mut meta, offset)?;
        let old = slot.0.get(slot.1);
        let sectors = ((host + len - 1) >> 9) - (host >> 9);
        self.set_entry(&slot, COMPRESSED | host | sectors << (62 - (bits - 8)), 0);
        self.release_entry(&mut meta, old)?;
        self.relieve(&mut meta)
    }

    /// Room for `len` bytes of compressed data, less than a cluster; a reference on each host cluster it touches.
    fn allocate_bytes(&self, meta: &mut Meta, len: u64) -> Result<u64> {
        let (bits, cluster) = (self.geo.cluster_bits, self.geo.cluster_size);
        if meta.header.compatible & header::LAZY_REFCOUNTS != 0 {
            self.mark_dirty(meta, true)?;
        }
        let tail = meta.compressed_tail;
        if tail & (cluster - 1) != 0 {
            let at = tail >> bits;
            let max = self.refcounts(meta)?.max();
            let count = self.refcounts(meta)?.get(at)?;
            let fits = (tail & (cluster - 1)) + len <= cluster;
            if count > 0 && count < max && (fits || self.refcounts(meta)?.allocate_at(at + 1)?) {
                if !fits {
                    self.refuse_overlap(meta, at + 1, 1)?;
                }
                self.refcounts(meta)?.reference(at, 1)?;
                meta.compressed_tail = tail + len;
                return Ok(tail);
            }
        }
        let (first, _, _) = self.allocate(meta, 1)?;
        let host = first << bits;
        // The offset field of a compressed entry is narrower than that of a plain one.
        if host >> (62 - (bits - 8)) != 0 {
            return Err(Error::unsupported(
                "The image file is too large for compressed clusters of this size",
            ));
        }
        meta.compressed_tail = host + len;
        Ok(host)
    }
}
