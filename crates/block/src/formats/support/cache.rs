//! A bounded write-back cache of the pages of an image's tables.
//!
//! Formats change table entries here when data has been written, and the entries reach the file on a flush, behind a barrier:
//! an entry on disk therefore never refers to data that is not there, and nothing else is needed for crash safety in
//! formats that allocate at the end of the file.

use crate::{Result, storage::Storage};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

/// Bytes of a page.
const PAGE: usize = 4096;
/// What is written back is a multiple of this and so aligned.
const SECTOR: usize = 512;

/// The cache. Offsets are those of the storage.
pub(crate) struct MetaCache {
    storage: Arc<dyn Storage>,
    state: Mutex<State>,
    limit: usize,
    /// A change makes its whole page dirty.
    whole_pages: bool,
}

#[derive(Default)]
struct State {
    pages: HashMap<u64, Page>,
    clock: u64,
    dirty: usize,
}

struct Page {
    bytes: Box<[u8; PAGE]>,
    /// One bit per sector that differs from the file.
    dirty: u8,
    /// Being written: the file is older than this page though no bit is set.
    pinned: bool,
    used: u64,
}

/// Sectors taken out for writing: their offsets and contents, ascending, neighbours joined.
pub(crate) type Batch = Vec<(u64, Vec<u8>)>;

impl MetaCache {
    /// A cache of about `limit` bytes.
    pub(crate) fn new(storage: Arc<dyn Storage>, limit: usize) -> Self {
        MetaCache { storage, state: Mutex::default(), limit: (limit / PAGE).max(8), whole_pages: false }
    }

    /// The same, for formats whose log holds pages: batches then hold whole pages of 4096 bytes.
    pub(crate) fn of_pages(storage: Arc<dyn Storage>, limit: usize) -> Self {
        MetaCache { whole_pages: true, ..MetaCache::new(storage, limit) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Runs `f` on the cached page `index`, reading it first if need be.
    fn with_page<T>(&self, state: &mut State, index: u64, f: impl FnOnce(&mut Page) -> T) -> Result<T> {
        state.clock += 1;
        let clock = state.clock;
        if !state.pages.contains_key(&index) {
            if state.pages.len() >= self.limit {
                state.evict();
            }
            let mut bytes = Box::new([0; PAGE]);
            self.storage.read_at(&mut bytes[..], index.saturating_mul(PAGE as u64))?;
            state.pages.insert(index, Page { bytes, dirty: 0, pinned: false, used: clock });
        }
        let page = state.pages.entry(index).or_insert_with(|| Page {
            bytes: Box::new([0; PAGE]),
            dirty: 0,
            pinned: false,
            used: clock,
        });
        page.used = clock;
        Ok(f(page))
    }

    /// Fills `buf` from `offset`, seeing what was written here before.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut state = self.lock();
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (index, within) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            let n = (PAGE - within).min(buf.len() - done);
            let target = &mut buf[done..done + n];
            self.with_page(&mut state, index, |page| {
                target.copy_from_slice(&page.bytes[within..within + n])
            })?;
            done += n;
        }
        Ok(())
    }

    /// Changes bytes; they reach the file with [`flush_ordered`].
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut state = self.lock();
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let (index, within) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            let n = (PAGE - within).min(bytes.len() - done);
            let newly = self.with_page(&mut state, index, |page| {
                page.bytes[within..within + n].copy_from_slice(&bytes[done..done + n]);
                let was = page.dirty;
                for sector in within / SECTOR..=(within + n - 1) / SECTOR {
                    page.dirty |= 1 << sector;
                }
                if self.whole_pages {
                    page.dirty = u8::MAX;
                }
                was == 0
            })?;
            state.dirty += usize::from(newly);
            done += n;
        }
        Ok(())
    }

    /// The 32-bit little-endian number at `offset`.
    pub(crate) fn le32(&self, offset: u64) -> Result<u32> {
        let mut b = [0; 4];
        self.read(offset, &mut b)?;
        Ok(u32::from_le_bytes(b))
    }

    /// The 64-bit little-endian number at `offset`.
    pub(crate) fn le64(&self, offset: u64) -> Result<u64> {
        let mut b = [0; 8];
        self.read(offset, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }

    /// Whether so much is unwritten that the format should flush by itself, to keep memory bounded.
    pub(crate) fn is_full(&self) -> bool {
        self.lock().dirty > self.limit / 2
    }

    /// Takes what has to be written. The pages stay cached; [`MetaCache::put`] has to follow.
    pub(crate) fn take(&self) -> Batch {
        let mut state = self.lock();
        if state.dirty == 0 {
            return Batch::new();
        }
        state.dirty = 0;
        let mut indices: Vec<u64> =
            state.pages.iter().filter(|(_, p)| p.dirty != 0).map(|(&i, _)| i).collect();
        indices.sort_unstable();
        let mut batch = Batch::new();
        for index in indices {
            let Some(page) = state.pages.get_mut(&index) else { continue };
            for sector in (0..PAGE / SECTOR).filter(|s| page.dirty >> s & 1 != 0) {
                let offset = index * PAGE as u64 + (sector * SECTOR) as u64;
                let bytes = &page.bytes[sector * SECTOR..(sector + 1) * SECTOR];
                match batch.last_mut() {
                    Some((start, joined)) if *start + joined.len() as u64 == offset => {
                        joined.extend_from_slice(bytes)
                    }
                    _ => batch.push((offset, bytes.to_vec())),
                }
            }
            page.dirty = 0;
            page.pinned = true;
        }
        batch
    }

    /// Writes a batch to the file. Whatever fails becomes dirty again.
    pub(crate) fn put(&self, batch: &Batch) -> Result<()> {
        let mut result = Ok(());
        for (offset, bytes) in batch {
            if result.is_ok() {
                result = self.storage.write_at(bytes, *offset);
            }
        }
        self.settle(batch, result.is_ok());
        result
    }

    /// Ends what [`MetaCache::take`] began, for callers who write the batch in another way.
    pub(crate) fn settle(&self, batch: &Batch, written: bool) {
        let mut state = self.lock();
        let mut dirty = 0;
        for (offset, bytes) in batch {
            for at in (*offset..*offset + bytes.len() as u64).step_by(SECTOR) {
                if let Some(page) = state.pages.get_mut(&(at / PAGE as u64)) {
                    page.pinned = false;
                    if !written {
                        dirty += usize::from(page.dirty == 0);
                        page.dirty |= 1 << (at % PAGE as u64 / SECTOR as u64);
                    }
                }
            }
        }
        state.dirty += dirty;
    }
}

impl State {
    /// Drops the older half of what the file holds too.
    fn evict(&mut self) {
        let mut clean: Vec<u64> =
            self.pages.values().filter(|p| p.dirty == 0 && !p.pinned).map(|p| p.used).collect();
        if clean.is_empty() {
            return;
        }
        let middle = clean.len() / 2;
        let (_, &mut middle, _) = clean.select_nth_unstable(middle);
        self.pages.retain(|_, p| p.dirty != 0 || p.pinned || p.used > middle);
    }
}

/// Makes table changes durable. `levels` are the caches from the tables nearest to the data up to the root; each is written
/// only after everything it refers to is durable. `serial` keeps two flushes from overtaking each other, and `before` runs
/// ahead of the first barrier (to pad the file).
pub(crate) fn flush_ordered(
    serial: &Mutex<()>,
    storage: &dyn Storage,
    levels: &[&MetaCache],
    before: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let _serial = serial.lock().unwrap_or_else(|e| e.into_inner());
    // Taken before the barrier, so that what the entries refer to is behind it; the root first, so that what its entries
    // refer to is in the batches taken later.
    let mut batches: Vec<Batch> = levels.iter().rev().map(|cache| cache.take()).collect();
    batches.reverse();
    let mut result = if batches.iter().any(|b| !b.is_empty()) { before() } else { Ok(()) };
    result = result.and_then(|()| storage.flush());
    for (cache, batch) in levels.iter().zip(&batches) {
        if batch.is_empty() {
            continue;
        }
        match result {
            Ok(()) => result = cache.put(batch).and_then(|()| storage.flush()),
            Err(_) => cache.settle(batch, false),
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn writes_back_what_changed_and_survives_eviction() {
        let memory = Arc::new(MemoryStorage::new(vec![7; 1 << 20]));
        let cache = MetaCache::new(memory.clone(), 8 * PAGE);
        for i in 0..100u64 {
            cache.write(i * 8192 + 4090, &i.to_le_bytes()).unwrap();
        }
        assert!(cache.is_full());
        for i in 0..100u64 {
            assert_eq!(cache.le64(i * 8192 + 4090).unwrap(), i);
        }
        assert_eq!(memory.snapshot()[4090], 7, "nothing is written before a flush");
        flush_ordered(&Mutex::default(), &*memory, &[&cache], || Ok(())).unwrap();
        assert!(cache.take().is_empty());
        let bytes = memory.snapshot();
        for i in 0..100usize {
            assert_eq!(bytes[i * 8192 + 4090..][..8], (i as u64).to_le_bytes());
            assert_eq!(bytes[i * 8192 + 4098], 7);
        }
        for i in 0..100u64 {
            cache.le32((300 + i) * 4096).unwrap();
        }
        assert!(cache.lock().pages.len() <= 9, "clean pages are bounded");
    }

    #[test]
    fn a_failed_write_leaves_the_change_dirty() {
        let memory = Arc::new(MemoryStorage::new(vec![0; 8192]));
        let cache = MetaCache::new(memory.clone(), 1 << 16);
        cache.write(5, b"abc").unwrap();
        memory.set_read_only(true).unwrap();
        let serial = Mutex::default();
        assert!(flush_ordered(&serial, &*memory, &[&cache], || Ok(())).is_err());
        memory.set_read_only(false).unwrap();
        flush_ordered(&serial, &*memory, &[&cache], || Ok(())).unwrap();
        assert_eq!(&memory.snapshot()[5..8], b"abc");
    }
}
