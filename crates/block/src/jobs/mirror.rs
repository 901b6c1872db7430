//! Mirror: a copy of an image that keeps up with the guest, until it can take over.

use super::{CHUNK, ChunkSet, Job, Step, Watcher, add_mapped, copy_range};
use crate::{Error, Image, Result};
use std::sync::Arc;

/// What a mirror copies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MirrorMode {
    /// The whole disk.
    Full,
    /// Only what the image itself holds; the target has the same backing file.
    Top,
    /// Only what is written from now on.
    None,
}

/// Chunks to be copied (again).
struct Dirty {
    set: ChunkSet,
}

impl Watcher for Dirty {
    fn after_change(&self, offset: u64, len: u64) {
        self.set.add(offset, len);
    }
}

/// A mirror in progress. While it runs, every change is copied again; [`Job::complete`] stops the guest's I/O for the last
/// chunks, and then both images hold the same.
pub struct Mirror {
    source: Arc<Image>,
    target: Arc<Image>,
    dirty: Arc<Dirty>,
    watcher: u64,
    at: u64,
    done: u64,
    buf: Vec<u8>,
}

impl Mirror {
    /// Starts. The target must be at least as large, and for [`MirrorMode::Full`] may hold anything.
    pub fn new(source: Arc<Image>, target: Arc<Image>, mode: MirrorMode) -> Result<Self> {
        if target.size() < source.size() {
            return Err(Error::usage("The mirror's target is smaller than its source"));
        }
        let chunk = source.format().unit().max(target.format().unit()).max(CHUNK);
        let dirty = Arc::new(Dirty { set: ChunkSet::new(source.size(), chunk) });
        // First watch, then look: what changes in between is seen by both.
        let watcher = source.watch(Arc::clone(&dirty) as Arc<dyn Watcher>);
        let added = match mode {
            MirrorMode::Full => {
                dirty.set.add(0, source.size());
                Ok(())
            }
            MirrorMode::Top => add_mapped(&source, &dirty.set, |e| e.depth == 0 && e.present),
            MirrorMode::None => Ok(()),
        };
        let mirror = Mirror { source, target, dirty, watcher, at: 0, done: 0, buf: Vec::new() };
        added.map(|()| mirror)
    }

    fn copy_next(&mut self) -> Result<bool> {
        let Some((offset, len)) = self.dirty.set.take(self.at) else { return Ok(false) };
        self.at = offset + len;
        // A change while the chunk is read puts it back into the set, and it is copied again.
        if let Err(e) = copy_range(&self.source, &self.target, offset, len, &mut self.buf) {
            self.dirty.set.add(offset, len);
            return Err(e.context("mirror"));
        }
        self.done += len;
        Ok(true)
    }
}

impl Job for Mirror {
    fn step(&mut self) -> Result<Step> {
        for _ in 0..16 {
            if !self.copy_next()? {
                return Ok(Step::Ready);
            }
        }
        Ok(Step::Worked)
    }

    fn progress(&self) -> (u64, u64) {
        (self.done, self.done + self.dirty.set.bytes())
    }

    fn complete(mut self: Box<Self>) -> Result<()> {
        while self.step()? == Step::Worked {}
        let source = Arc::clone(&self.source);
        source.paused(|| {
            while self.copy_next()? {}
            self.target.flush()
        })
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.source.unwatch(self.watcher);
    }
}
