//! Cached slices of L2 tables.

use super::Qcow2;
use crate::{Error, Result, storage::Storage};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

/// Bytes of L2 tables kept in memory.
const CACHE_BYTES: u64 = 32 << 20;
/// Largest slice of a table that is read at once.
const MAX_SLICE: u64 = 64 << 10;

/// A piece of an L2 table in memory, as native integers. Read without locks; changed only under the metadata lock.
#[derive(Debug)]
pub(super) struct Slice {
    /// Where in the file it is.
    pub(super) offset: u64,
    words: Box<[AtomicU64]>,
    used: AtomicBool,
    /// Changed words, as `lo .. hi`; equal when clean.
    lo: AtomicU32,
    hi: AtomicU32,
}

impl Slice {
    fn new(offset: u64, words: impl Iterator<Item = u64>, dirty: bool) -> Self {
        let words: Box<[AtomicU64]> = words.map(AtomicU64::new).collect();
        let hi = if dirty { words.len() as u32 } else { 0 };
        Slice { offset, words, used: AtomicBool::new(true), lo: AtomicU32::new(0), hi: AtomicU32::new(hi) }
    }

    pub(super) fn get(&self, index: usize) -> u64 {
        self.words[index].load(Ordering::Acquire)
    }

    fn is_dirty(&self) -> bool {
        self.hi.load(Ordering::Relaxed) != 0
    }
}

/// Slices by file offset.
#[derive(Debug)]
pub(super) struct TableCache {
    slices: RwLock<HashMap<u64, Arc<Slice>>>,
    /// Held while a slice is loaded or dropped, so that a slow reader cannot bring back what was changed meanwhile.
    loading: Mutex<()>,
    /// Slices to be written; under the metadata lock.
    dirty: Mutex<Vec<Arc<Slice>>>,
    slice_bytes: u64,
    limit: usize,
}

impl TableCache {
    pub(super) fn new(cluster_size: u64) -> Self {
        let slice_bytes = cluster_size.min(MAX_SLICE);
        TableCache {
            slices: RwLock::default(),
            loading: Mutex::default(),
            dirty: Mutex::default(),
            slice_bytes,
            limit: (CACHE_BYTES / slice_bytes).clamp(16, 8192) as usize,
        }
    }

    /// Bytes of a slice.
    pub(super) fn slice_bytes(&self) -> u64 {
        self.slice_bytes
    }

    /// The slice at file offset `offset` (a multiple of the slice size).
    pub(super) fn get(&self, storage: &dyn Storage, offset: u64) -> Result<Arc<Slice>> {
        if let Some(slice) = self.slices.read().unwrap_or_else(|e| e.into_inner()).get(&offset) {
            slice.used.store(true, Ordering::Relaxed);
            return Ok(Arc::clone(slice));
        }
        let _loading = self.loading.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(slice) = self.slices.read().unwrap_or_else(|e| e.into_inner()).get(&offset) {
            return Ok(Arc::clone(slice));
        }
        let mut bytes = vec![0; self.slice_bytes as usize];
        storage.read_at(&mut bytes, offset)?;
        let slice = Arc::new(Slice::new(offset, words(&bytes), false));
        let mut slices = self.slices.write().unwrap_or_else(|e| e.into_inner());
        if slices.len() >= self.limit {
            // Second chance for what was used since the last time round; dirty slices stay until they are written.
            let target = self.limit * 7 / 8;
            let mut left = slices.len();
            for _ in 0..2 {
                slices.retain(|_, s| {
                    let keep = left <= target || s.is_dirty() || s.used.swap(false, Ordering::Relaxed);
                    left -= usize::from(!keep);
                    keep
                });
            }
        }
        // A writer may have put its changed copy there meanwhile.
        Ok(Arc::clone(slices.entry(offset).or_insert(slice)))
    }

    /// Puts a table in the cache that is not on disk yet, all of it to be written.
    pub(super) fn insert_new(&self, offset: u64, table: impl Iterator<Item = u64>) {
        let _loading = self.loading.lock().unwrap_or_else(|e| e.into_inner());
        let mut slices = self.slices.write().unwrap_or_else(|e| e.into_inner());
        let mut dirty = self.dirty.lock().unwrap_or_else(|e| e.into_inner());
        let per_slice = (self.slice_bytes / 8) as usize;
        let mut table = table.peekable();
        let mut at = offset;
        while table.peek().is_some() {
            let slice = Arc::new(Slice::new(at, table.by_ref().take(per_slice), true));
            dirty.retain(|s| s.offset != at);
            dirty.push(Arc::clone(&slice));
            slices.insert(at, slice);
            at += self.slice_bytes;
        }
    }

    /// Changes a word. The caller holds the metadata lock.
    pub(super) fn set(&self, slice: &Arc<Slice>, index: usize, value: u64) {
        if !slice.is_dirty() {
            slice.lo.store(index as u32, Ordering::Relaxed);
            slice.hi.store(index as u32 + 1, Ordering::Relaxed);
            // The slice may have been dropped from the cache, and loaded again, while the caller held it: this one counts.
            self.slices.write().unwrap_or_else(|e| e.into_inner()).insert(slice.offset, Arc::clone(slice));
            self.dirty.lock().unwrap_or_else(|e| e.into_inner()).push(Arc::clone(slice));
        } else {
            slice.lo.fetch_min(index as u32, Ordering::Relaxed);
            slice.hi.fetch_max(index as u32 + 1, Ordering::Relaxed);
        }
        slice.words[index].store(value, Ordering::Release);
    }

    /// How many slices wait to be written.
    pub(super) fn dirty_count(&self) -> usize {
        self.dirty.lock().unwrap_or_else(|e| e.into_inner()).len()
    }

    /// Whether so much waits that it should be written.
    pub(super) fn is_crowded(&self) -> bool {
        self.dirty_count() >= self.limit / 2
    }

    /// Writes all changed slices. The caller holds the metadata lock and has seen to the order.
    pub(super) fn write_dirty(&self, storage: &dyn Storage) -> Result<()> {
        let mut dirty = self.dirty.lock().unwrap_or_else(|e| e.into_inner());
        dirty.sort_unstable_by_key(|s| s.offset);
        while let Some(slice) = dirty.last() {
            // Only whole sectors: a torn sector must not mix old and new words of different entries.
            let lo = slice.lo.load(Ordering::Relaxed) as usize & !63;
            let hi = (slice.hi.load(Ordering::Relaxed) as usize).next_multiple_of(64).min(slice.words.len());
            let mut bytes = Vec::with_capacity((hi - lo) * 8);
            for word in &slice.words[lo..hi] {
                bytes.extend(word.load(Ordering::Relaxed).to_be_bytes());
            }
            storage.write_at(&bytes, slice.offset + lo as u64 * 8)?;
            slice.lo.store(0, Ordering::Relaxed);
            slice.hi.store(0, Ordering::Relaxed);
            dirty.pop();
        }
        Ok(())
    }

    /// Forgets a table whose cluster is no longer one, with changes not yet written.
    pub(super) fn forget(&self, offset: u64, len: u64) {
        let _loading = self.loading.lock().unwrap_or_else(|e| e.into_inner());
        let mut slices = self.slices.write().unwrap_or_else(|e| e.into_inner());
        for at in (offset..offset + len).step_by(self.slice_bytes as usize) {
            slices.remove(&at);
        }
        self.dirty
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .retain(|s| s.offset < offset || s.offset >= offset + len);
    }

    /// Forgets everything; nothing may be dirty.
    pub(super) fn clear(&self) {
        let _loading = self.loading.lock().unwrap_or_else(|e| e.into_inner());
        self.slices.write().unwrap_or_else(|e| e.into_inner()).clear();
    }
}

/// Big-endian words.
pub(super) fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|c| {
        let mut v = [0; 8];
        v.copy_from_slice(c);
        u64::from_be_bytes(v)
    })
}

impl Qcow2 {
    /// The slice that has the entry for guest offset `offset` in the table at `table`, and the entry's word index in it.
    pub(super) fn slice_for(&self, table: u64, offset: u64) -> Result<(Arc<Slice>, usize)> {
        let entry = (offset >> self.geo.cluster_bits) & (self.geo.l2_entries - 1);
        let byte = entry * self.geo.l2_entry_size;
        let slice_bytes = self.tables.slice_bytes();
        if table & (self.geo.cluster_size - 1) != 0 {
            return Err(Error::Corrupt(format!(
                "L2 table offset {table:#x} unaligned; run a check with repair"
            )));
        }
        let slice = self.tables.get(&*self.storages[0], table + byte / slice_bytes * slice_bytes)?;
        Ok((slice, (byte % slice_bytes / 8) as usize))
    }
}
