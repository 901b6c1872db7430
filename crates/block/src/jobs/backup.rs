//! Backup: a copy of an image as it was when the job began, while the guest goes on writing.

use super::{CHUNK, ChunkSet, Job, Step, Watcher, copy_range};
use crate::{Error, Image, Result};
use std::sync::{Arc, Mutex};

/// What a backup copies.
#[derive(Clone, Debug)]
pub enum BackupMode {
    /// The whole disk.
    Full,
    /// Only what a dirty bitmap names: bytes per bit, bits.
    Incremental(u64, Vec<u8>),
}

/// The chunks that still have to be copied, and the copying of them before they change.
struct Before {
    source: Arc<Image>,
    target: Arc<Image>,
    left: ChunkSet,
    chunk: u64,
    /// Held while a chunk moves, so that a guest's write waits for a copy in progress.
    copying: Mutex<Vec<u8>>,
}

impl Before {
    fn copy(&self, chunk: u64) -> Result<bool> {
        let mut buf = self.copying.lock().unwrap_or_else(|e| e.into_inner());
        if !self.left.take_at(chunk) {
            return Ok(false);
        }
        let offset = chunk * self.chunk;
        let len = self.chunk.min(self.source.size() - offset);
        let done = copy_range(&self.source, &self.target, offset, len, &mut buf);
        if done.is_err() {
            self.left.add(offset, len);
        }
        done.map(|()| true)
    }
}

impl Watcher for Before {
    fn before_change(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        for chunk in offset / self.chunk..=(offset + len - 1) / self.chunk {
            self.copy(chunk).map_err(|e| e.context("backup before a write"))?;
        }
        Ok(())
    }
}

/// A backup in progress.
pub struct Backup {
    before: Arc<Before>,
    watcher: u64,
    at: u64,
    total: u64,
}

impl Backup {
    /// Starts: from now on the target becomes what the source is at this moment.
    pub fn new(source: Arc<Image>, target: Arc<Image>, mode: BackupMode) -> Result<Self> {
        if target.size() < source.size() {
            return Err(Error::usage("The backup's target is smaller than its source"));
        }
        let chunk = source.format().unit().max(target.format().unit()).max(CHUNK);
        let left = ChunkSet::new(source.size(), chunk);
        match mode {
            BackupMode::Full => left.add(0, source.size()),
            BackupMode::Incremental(granularity, bits) => {
                for (i, byte) in bits.iter().enumerate().filter(|(_, b)| **b != 0) {
                    for bit in (0..8).filter(|b| byte >> b & 1 != 0) {
                        left.add((i as u64 * 8 + bit).saturating_mul(granularity), granularity);
                    }
                }
            }
        }
        let total = left.bytes();
        let before =
            Arc::new(Before { source: Arc::clone(&source), target, left, chunk, copying: Mutex::default() });
        // No write may be half-way while the moment is fixed.
        let watcher = source.paused(|| Ok(source.watch(Arc::clone(&before) as Arc<dyn Watcher>)))?;
        Ok(Backup { before, watcher, at: 0, total })
    }
}

impl Job for Backup {
    fn step(&mut self) -> Result<Step> {
        for _ in 0..16 {
            let Some((offset, len)) = self.before.left.take(self.at) else {
                return Ok(Step::Finished);
            };
            // Put back, to be taken under the lock that writers respect.
            self.before.left.add(offset, len);
            self.before.copy(offset / self.before.chunk)?;
            self.at = offset + len;
        }
        Ok(Step::Worked)
    }

    fn progress(&self) -> (u64, u64) {
        (self.total - self.before.left.bytes().min(self.total), self.total)
    }

    fn complete(mut self: Box<Self>) -> Result<()> {
        while self.step()? == Step::Worked {}
        self.before.target.flush()
    }
}

impl Drop for Backup {
    fn drop(&mut self) {
        self.before.source.unwatch(self.watcher);
    }
}
