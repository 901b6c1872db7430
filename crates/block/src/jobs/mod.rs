//! Long-running work on images that are in use: mirror, backup, stream and commit.
//!
//! A job is a value that does a bit of work at a time: [`Job::step`]. Whoever runs it (a thread, a test) decides when, and so
//! can pause it by not calling. Jobs notice what the guest writes meanwhile through a [`Watcher`] on the image.

mod backup;
mod commit;
mod mirror;
mod stream;

use crate::{Error, Result};
use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

pub use backup::{Backup, BackupMode};
pub use commit::{ActiveCommit, Commit};
pub use mirror::{Mirror, MirrorMode};
pub use stream::Stream;

/// Bytes that jobs treat as one unless the image's own unit is larger.
const CHUNK: u64 = 64 << 10;

/// Sees every change of guest data before it happens and after.
pub trait Watcher: Send + Sync {
    /// A write, zeroing or discard of this range is about to happen. An error refuses it.
    fn before_change(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    /// It happened (or was attempted).
    fn after_change(&self, _offset: u64, _len: u64) {}
}

/// What a job did in a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Something; there is more.
    Worked,
    /// Nothing is left now, but the guest may make more (mirror, active commit): the job can be completed.
    Ready,
    /// All is done.
    Finished,
}

/// Work in steps.
pub trait Job: Send {
    /// Does a bit (at most a few MiB).
    fn step(&mut self) -> Result<Step>;
    /// (Bytes done, bytes in all). The total may grow while a guest writes.
    fn progress(&self) -> (u64, u64);
    /// Ends a job that is ready, or finishes one that has an end.
    fn complete(self: Box<Self>) -> Result<()>;
}

/// Pauses, cancels and slows a job that runs on a thread.
#[derive(Debug, Default)]
pub struct Control {
    paused: AtomicBool,
    cancelled: AtomicBool,
    /// Bytes per second; 0 is no limit.
    rate: AtomicU64,
}

impl Control {
    /// Stops or resumes.
    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Release);
    }

    /// Ends the job as soon as possible; what it did so far stays.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    /// Limits bytes per second; 0 lifts the limit.
    pub fn set_rate(&self, rate: u64) {
        self.rate.store(rate, Ordering::Release);
    }

    /// Runs a job until it is ready or finished; `true` if it was cancelled before.
    pub fn run(&self, job: &mut dyn Job) -> Result<bool> {
        let mut mark = (Instant::now(), job.progress().0, self.rate.load(Ordering::Acquire));
        loop {
            if self.cancelled.load(Ordering::Acquire) {
                return Ok(true);
            }
            if self.paused.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            }
            if job.step()? != Step::Worked {
                return Ok(false);
            }
            let rate = self.rate.load(Ordering::Acquire);
            if rate != mark.2 {
                mark = (Instant::now(), job.progress().0, rate);
            } else if rate > 0 {
                let due =
                    Duration::from_secs_f64(job.progress().0.saturating_sub(mark.1) as f64 / rate as f64);
                // Short naps, so that a cancel or a new rate is seen soon.
                std::thread::sleep(due.saturating_sub(mark.0.elapsed()).min(Duration::from_millis(100)));
            }
        }
    }
}

/// One bit per chunk of a disk.
#[derive(Debug)]
pub(crate) struct ChunkSet {
    chunk: u64,
    size: u64,
    state: Mutex<(Vec<u64>, u64)>,
}

impl ChunkSet {
    pub(crate) fn new(size: u64, chunk: u64) -> Self {
        let words = size.div_ceil(chunk).div_ceil(64) as usize;
        ChunkSet { chunk, size, state: Mutex::new((vec![0; words], 0)) }
    }

    /// Adds all chunks that a range touches.
    pub(crate) fn add(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        if offset >= end {
            return;
        }
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        for bit in offset / self.chunk..=(end - 1) / self.chunk {
            let word = &mut state.0[(bit / 64) as usize];
            if *word >> (bit % 64) & 1 == 0 {
                *word |= 1 << (bit % 64);
                state.1 += 1;
            }
        }
    }

    /// Takes the first chunk at or after `from`, wrapping round; the result is its range.
    pub(crate) fn take(&self, from: u64) -> Option<(u64, u64)> {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        if state.1 == 0 {
            return None;
        }
        let words = state.0.len();
        let first = (from / self.chunk / 64) as usize % words.max(1);
        for i in 0..=words {
            let at = (first + i) % words;
            let mut word = state.0[at];
            if i == 0 {
                word &= !0 << (from / self.chunk % 64);
            }
            if word != 0 {
                let bit = u64::from(word.trailing_zeros());
                state.0[at] &= !(1 << bit);
                state.1 -= 1;
                let start = (at as u64 * 64 + bit) * self.chunk;
                return Some((start, self.chunk.min(self.size - start)));
            }
        }
        None
    }

    /// Takes one particular chunk; whether it was there.
    pub(crate) fn take_at(&self, chunk: u64) -> bool {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let Some(word) = state.0.get_mut((chunk / 64) as usize) else { return false };
        let had = *word >> (chunk % 64) & 1 != 0;
        *word &= !(1 << (chunk % 64));
        state.1 -= u64::from(had);
        had
    }

    /// Bytes in the set, to the chunk.
    pub(crate) fn bytes(&self) -> u64 {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).1 * self.chunk
    }
}

/// Adds what an image's map says is to be copied: `wanted` decides.
fn add_mapped(
    image: &crate::Image,
    into: &ChunkSet,
    wanted: impl Fn(&crate::MapEntry) -> bool,
) -> Result<()> {
    let (mut at, mut entries) = (0, Vec::new());
    while at < image.size() {
        entries.clear();
        image.map(at, image.size() - at, &mut entries)?;
        for e in &entries {
            if wanted(e) {
                into.add(e.start, e.length);
            }
            at = e.start + e.length;
        }
        if entries.is_empty() {
            return Err(Error::invalid("the image's map makes no progress"));
        }
    }
    Ok(())
}

/// Copies a range from one image to another, zeros as zeros.
fn copy_range(
    from: &crate::Image,
    to: &crate::Image,
    offset: u64,
    len: u64,
    buf: &mut Vec<u8>,
) -> Result<()> {
    buf.resize(len as usize, 0);
    from.read_at(buf, offset)?;
    if crate::is_zero(buf) { to.write_zeroes(offset, len, true) } else { to.write_at(buf, offset) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_come_out_once_in_order_and_wrap() {
        let set = ChunkSet::new(1000 * 10, 10);
        set.add(15, 10);
        set.add(9995, 100);
        assert_eq!(set.bytes(), 30);
        assert_eq!(set.take(30), Some((9990, 10)));
        assert_eq!(set.take(30), Some((10, 10)));
        assert!(set.take_at(2) && !set.take_at(2));
        assert_eq!(set.take(0), None);
        set.add(0, 10);
        assert_eq!(set.take(9999), Some((0, 10)));
    }
}
