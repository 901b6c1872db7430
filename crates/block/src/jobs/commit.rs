//! Commit: writing what upper images hold into a lower one.

use super::{CHUNK, ChunkSet, Job, Mirror, MirrorMode, Step, add_mapped, copy_range};
use crate::{Error, Image, Result, formats::Preallocation};
use std::sync::Arc;

/// Commits images that nobody writes to: everything from `top` down to above `base` goes into `base`.
pub struct Commit {
    top: Arc<Image>,
    base: Arc<Image>,
    left: ChunkSet,
    total: u64,
    at: u64,
    buf: Vec<u8>,
}

impl Commit {
    /// Starts. `base` is the image of the chain `depth` below `top`, opened for writing.
    pub fn new(top: Arc<Image>, base: Arc<Image>, depth: u32) -> Result<Self> {
        if base.is_read_only() {
            return Err(Error::ReadOnly(base.name().to_owned()));
        }
        if base.size() < top.size() {
            base.resize(top.size(), Preallocation::Off)?;
        }
        let left = ChunkSet::new(top.size(), CHUNK);
        add_mapped(&top, &left, |e| e.depth < depth && e.present)?;
        let total = left.bytes();
        Ok(Commit { top, base, left, total, at: 0, buf: Vec::new() })
    }
}

impl Job for Commit {
    fn step(&mut self) -> Result<Step> {
        for _ in 0..16 {
            let Some((offset, len)) = self.left.take(self.at) else { return Ok(Step::Finished) };
            self.at = offset + len;
            if let Err(e) = copy_range(&self.top, &self.base, offset, len, &mut self.buf) {
                self.left.add(offset, len);
                return Err(e.context("commit"));
            }
        }
        Ok(Step::Worked)
    }

    fn progress(&self) -> (u64, u64) {
        (self.total - self.left.bytes().min(self.total), self.total)
    }

    fn complete(mut self: Box<Self>) -> Result<()> {
        while self.step()? == Step::Worked {}
        self.base.flush()
    }
}

/// Commits an image in use: a mirror of what it holds into its backing file. When it completes, base and top show the
/// same, and the machine can go on with the base alone.
pub struct ActiveCommit {
    mirror: Box<Mirror>,
}

impl ActiveCommit {
    /// Starts. `base` is the immediate backing file of `top`, opened for writing.
    pub fn new(top: Arc<Image>, base: Arc<Image>) -> Result<Self> {
        if base.size() < top.size() {
            base.resize(top.size(), Preallocation::Off)?;
        }
        Ok(ActiveCommit { mirror: Box::new(Mirror::new(top, base, MirrorMode::Top)?) })
    }
}

impl Job for ActiveCommit {
    fn step(&mut self) -> Result<Step> {
        self.mirror.step()
    }

    fn progress(&self) -> (u64, u64) {
        self.mirror.progress()
    }

    fn complete(self: Box<Self>) -> Result<()> {
        self.mirror.complete()
    }
}
