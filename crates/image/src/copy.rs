//! Copying images, on several threads: one looks up what comes next, any reads, examines and writes it.
//!
//! By default places in the target are handed out in the order of the disk, so that the result is laid out in order although
//! data moves out of order.

use crate::progress::Progress;
use block::{Error, Image, MapEntry, Result};
use std::{
    collections::VecDeque,
    sync::{
        Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Bytes of one piece of work.
const PIECE: u64 = 512 << 10;
/// Zeros are written in steps of this.
const ZERO_PIECE: u64 = 1 << 30;

/// Images one after the other, as one disk.
pub(crate) struct Concatenation<'a> {
    parts: Vec<(u64, &'a Image)>,
    size: u64,
}

impl<'a> Concatenation<'a> {
    pub(crate) fn new(images: impl IntoIterator<Item = &'a Image>) -> Self {
        let mut size = 0;
        let parts = images
            .into_iter()
            .map(|image| {
                let start = size;
                size += image.size();
                (start, image)
            })
            .collect();
        Concatenation { parts, size }
    }

    /// Bytes of all parts.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    fn part(&self, offset: u64) -> Option<(u64, &'a Image)> {
        self.parts
            .iter()
            .rev()
            .find(|(start, image)| *start <= offset && offset < start + image.size())
            .copied()
    }

    /// Fills `buf`; zeros past the end.
    pub(crate) fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let Some((start, image)) = self.part(offset) else {
                buf.fill(0);
                return Ok(());
            };
            let n = (start + image.size() - offset).min(buf.len() as u64) as usize;
            let (now, later) = buf.split_at_mut(n);
            image.read_at(now, offset - start)?;
            buf = later;
            offset += n as u64;
        }
        Ok(())
    }

    /// What is at `offset ..`, for at least a byte.
    pub(crate) fn map(&self, offset: u64, len: u64, out: &mut Vec<MapEntry>) -> Result<()> {
        let Some((start, image)) = self.part(offset) else { return Ok(()) };
        let n = (start + image.size() - offset).min(len);
        let before = out.len();
        image.map(offset - start, n, out)?;
        out[before..].iter_mut().for_each(|e| e.start += start);
        Ok(())
    }
}

/// How to copy.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Bytes to copy, from the source's start plus `skip`.
    pub(crate) len: u64,
    /// Bytes of the source to pass over.
    pub(crate) skip: u64,
    /// Compress.
    pub(crate) compress: bool,
    /// Place data in any order.
    pub(crate) unordered: bool,
    /// Threads.
    pub(crate) threads: usize,
    /// Zeros of at least this many bytes are left out; 0: everything is written.
    pub(crate) sparse: u64,
    /// Where nothing is written, the target reads as zeros.
    pub(crate) target_zero: bool,
    /// Data of the source's backing files (from this depth on) is in the target's backing file, too.
    pub(crate) skip_depth: Option<u32>,
    /// Go on past read errors, with zeros.
    pub(crate) salvage: bool,
    /// Let the host copy what is stored as it is.
    pub(crate) offload: bool,
    /// Bytes per second.
    pub(crate) rate: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Zero,
    Skip,
}

struct Job {
    sequence: u64,
    offset: u64,
    len: u64,
    kind: Kind,
}

/// Gives out the work in order.
struct Planner {
    at: u64,
    sequence: u64,
    runs: VecDeque<(u64, u64, Kind)>,
}

struct Turns {
    next: Mutex<u64>,
    changed: Condvar,
}

impl Turns {
    fn wait(&self, sequence: u64) {
        let mut next = self.next.lock().unwrap_or_else(|e| e.into_inner());
        while *next < sequence {
            next = self.changed.wait(next).unwrap_or_else(|e| e.into_inner());
        }
    }

    fn advance(&self, sequence: u64) {
        let mut next = self.next.lock().unwrap_or_else(|e| e.into_inner());
        *next = (*next).max(sequence + 1);
        drop(next);
        self.changed.notify_all();
    }
}

/// A turn, passed on exactly once, also when the work fails.
struct Turn<'a> {
    turns: &'a Turns,
    sequence: u64,
    ordered: bool,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.ordered {
            self.turns.wait(self.sequence);
            self.turns.advance(self.sequence);
        }
    }
}

/// A copy in progress.
struct Copier<'a> {
    source: &'a Concatenation<'a>,
    target: &'a Image,
    plan: &'a Plan,
    progress: &'a Progress,
    planner: Mutex<Planner>,
    turns: Turns,
    failed: AtomicBool,
    error: Mutex<Option<Error>>,
    started: Instant,
    moved: Mutex<u64>,
}

/// Copies as planned.
pub(crate) fn copy(
    source: &Concatenation<'_>,
    target: &Image,
    plan: &Plan,
    progress: &Progress,
) -> Result<()> {
    let copier = Copier {
        source,
        target,
        plan,
        progress,
        planner: Mutex::new(Planner { at: 0, sequence: 0, runs: VecDeque::new() }),
        turns: Turns { next: Mutex::new(0), changed: Condvar::new() },
        failed: AtomicBool::new(false),
        error: Mutex::new(None),
        started: Instant::now(),
        moved: Mutex::new(0),
    };
    std::thread::scope(|scope| {
        for _ in 1..plan.threads.max(1) {
            scope.spawn(|| copier.work());
        }
        copier.work();
    });
    match copier.error.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(e) => Err(e),
        None => Ok(()),
    }
}

impl Copier<'_> {
    fn work(&self) {
        let mut buf = Vec::new();
        while !self.failed.load(Ordering::Relaxed) {
            let done = match self.next() {
                Ok(Some(job)) => self.run(&job, &mut buf),
                Ok(None) => return,
                Err(e) => Err(e),
            };
            if let Err(e) = done {
                self.failed.store(true, Ordering::Relaxed);
                self.error.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(e);
            }
        }
    }

    fn next(&self) -> Result<Option<Job>> {
        let mut planner = self.planner.lock().unwrap_or_else(|e| e.into_inner());
        if planner.runs.is_empty() {
            if planner.at >= self.plan.len {
                return Ok(None);
            }
            let mut at = planner.at;
            let inside = self.source.size().saturating_sub(self.plan.skip + at).min(self.plan.len - at);
            if inside == 0 {
                // The target is longer than the source.
                let rest = self.plan.len - at;
                planner.runs.push_back((at, rest, Kind::Zero));
                at += rest;
            } else {
                let mut entries = Vec::new();
                self.source.map(self.plan.skip + at, inside, &mut entries)?;
                for e in entries {
                    let kind = if self.plan.skip_depth.is_some_and(|d| e.depth >= d) {
                        Kind::Skip
                    } else if self.plan.sparse == 0 || !e.zero {
                        Kind::Data
                    } else {
                        Kind::Zero
                    };
                    at = e.start + e.length - self.plan.skip;
                    match planner.runs.back_mut() {
                        Some(last) if last.2 == kind => last.1 += e.length,
                        _ => planner.runs.push_back((e.start - self.plan.skip, e.length, kind)),
                    }
                }
            }
            if at == planner.at {
                return Err(Error::invalid("the source's map makes no progress"));
            }
            planner.at = at;
        }
        let Some((offset, len, kind)) = planner.runs.pop_front() else { return Ok(None) };
        // Pieces end on multiples of their size, so that no cluster is shared by two of them.
        let step = match kind {
            Kind::Data => PIECE.max(self.target.format().unit()),
            _ => ZERO_PIECE,
        };
        let step = if self.plan.compress { self.target.format().unit().max(256 << 10) } else { step };
        let mut n = len.min(step - offset % step);
        let mut kind = kind;
        if self.plan.compress {
            // A compressed cluster is written once: take whole clusters, whatever their parts are.
            let unit = self.target.format().unit();
            let end = (offset + n).next_multiple_of(unit).min(self.plan.len);
            if end > offset + n {
                kind = Kind::Data;
                n = end - offset;
            }
        }
        Ok(Some(take(&mut planner, offset, len, n, kind)))
    }

    fn run(&self, job: &Job, buf: &mut Vec<u8>) -> Result<()> {
        // A flat target has nothing to lay out.
        let ordered = !self.plan.unordered && self.target.format().flat().is_none();
        let turn = Turn { turns: &self.turns, sequence: job.sequence, ordered };
        match job.kind {
            Kind::Skip => {}
            Kind::Zero if self.plan.target_zero => {}
            Kind::Zero => self.target.write_zeroes(job.offset, job.len, true)?,
            Kind::Data if self.plan.offload && self.offload(job)? => self.limit(job.len),
            Kind::Data => {
                buf.resize(job.len as usize, 0);
                self.read(job, buf)?;
                if self.plan.compress {
                    self.write_compressed(job, buf, ordered)?;
                } else {
                    self.write(job, buf, &turn)?;
                }
                self.limit(job.len);
            }
        }
        drop(turn);
        self.progress.add(job.len);
        Ok(())
    }

    /// Has the host copy a piece from file to file, where it is stored as it is in both; false where it is not, or where the host
    /// cannot.
    fn offload(&self, job: &Job) -> Result<bool> {
        let Some((target, base, _)) = self.target.direct() else { return Ok(false) };
        let Some((start, image)) = self.source.part(self.plan.skip + job.offset) else { return Ok(false) };
        let at = self.plan.skip + job.offset - start;
        if at + job.len > image.size() {
            return Ok(false);
        }
        let (mut entries, mut done) = (Vec::new(), 0);
        while done < job.len {
            entries.clear();
            image.map(at + done, job.len - done, &mut entries)?;
            for e in &entries {
                // Only the image's own files are looked at, not those of its backing images.
                let storage = image.format().storages().get(usize::from(e.file));
                let (Some(host), Some(storage), 0, true) = (e.offset, storage, e.depth, e.data) else {
                    return Ok(false);
                };
                let Some(file) = storage.raw_fd() else { return Ok(false) };
                let (mut from, mut to) = (host, base + job.offset + (e.start - at));
                let mut left = e.length as usize;
                while left > 0 {
                    match rustix::fs::copy_file_range(file, Some(&mut from), target, Some(&mut to), left) {
                        // Other file systems, files that lie about their size: copying by hand begins again.
                        Ok(0) | Err(_) => return Ok(false),
                        Ok(n) => left -= n.min(left),
                    }
                }
                done = e.start + e.length - at;
            }
        }
        Ok(true)
    }

    fn read(&self, job: &Job, buf: &mut [u8]) -> Result<()> {
        let at = self.plan.skip + job.offset;
        match self.source.read_at(buf, at) {
            Err(_) if self.plan.salvage => {
                for (i, sector) in buf.chunks_mut(512).enumerate() {
                    let offset = at + i as u64 * 512;
                    if let Err(e) = self.source.read_at(sector, offset) {
                        eprintln!("warning: error while reading offset {offset}: {e}");
                        sector.fill(0);
                    }
                }
                Ok(())
            }
            Err(e) => Err(e.context(format!("error while reading at byte {at}"))),
            Ok(()) => Ok(()),
        }
    }

    fn write(&self, job: &Job, buf: &[u8], turn: &Turn<'_>) -> Result<()> {
        let runs = data_runs(buf, self.plan.sparse);
        let failed = |e: Error| e.context(format!("error while writing at byte {}", job.offset));
        let ordered = turn.ordered;
        if ordered {
            self.turns.wait(job.sequence);
        }
        let last = runs.len().saturating_sub(1);
        let mut end = 0;
        for (i, run) in runs.iter().enumerate() {
            self.zero_gap(job, end, run.start).map_err(failed)?;
            let mut placed = || {
                if i == last {
                    turn.turns.advance(job.sequence);
                }
            };
            let at = job.offset + run.start as u64;
            if ordered {
                self.target.write_in_turn(&buf[run.clone()], at, &mut placed).map_err(failed)?;
            } else {
                self.target.write_at(&buf[run.clone()], at).map_err(failed)?;
            }
            end = run.end;
        }
        self.zero_gap(job, end, buf.len()).map_err(failed)
    }

    fn zero_gap(&self, job: &Job, start: usize, end: usize) -> Result<()> {
        if self.plan.target_zero || start == end {
            return Ok(());
        }
        self.target.write_zeroes(job.offset + start as u64, (end - start) as u64, true)
    }

    fn write_compressed(&self, job: &Job, buf: &[u8], ordered: bool) -> Result<()> {
        let unit = self.target.format().unit() as usize;
        let mut packed = Vec::new();
        for piece in buf.chunks(unit) {
            packed.push(if self.plan.sparse > 0 && block::is_zero(piece) {
                None
            } else {
                Some(self.target.compress(piece)?)
            });
        }
        if ordered {
            self.turns.wait(job.sequence);
        }
        for (i, (piece, packed)) in buf.chunks(unit).zip(packed).enumerate() {
            let at = job.offset + (i * unit) as u64;
            match packed {
                None if self.plan.target_zero => {}
                None => self.target.write_zeroes(at, piece.len() as u64, true)?,
                Some(Some(data)) => self.target.write_compressed(at, &data)?,
                Some(None) => self.target.write_at(piece, at)?,
            }
        }
        Ok(())
    }

    /// Waits until what was moved fits the rate.
    fn limit(&self, len: u64) {
        let Some(rate) = self.plan.rate else { return };
        let moved = {
            let mut moved = self.moved.lock().unwrap_or_else(|e| e.into_inner());
            *moved += len;
            *moved
        };
        let due = Duration::from_secs_f64(moved as f64 / rate.max(1) as f64);
        std::thread::sleep(due.saturating_sub(self.started.elapsed()));
    }
}

/// Takes `n` bytes from the front, of which `len` were the first run's.
fn take(planner: &mut Planner, offset: u64, len: u64, n: u64, kind: Kind) -> Job {
    if n < len {
        planner.runs.push_front((offset + n, len - n, kind));
    } else {
        let mut over = n - len;
        while over > 0 {
            match planner.runs.pop_front() {
                Some((o, l, k)) if l > over => {
                    planner.runs.push_front((o + over, l - over, k));
                    over = 0;
                }
                Some((_, l, _)) => over -= l,
                None => {
                    planner.at = planner.at.max(offset + n);
                    over = 0;
                }
            }
        }
    }
    let sequence = planner.sequence;
    planner.sequence += 1;
    Job { sequence, offset, len: n, kind }
}

/// The parts of `buf` to write: zeros of at least `sparse` bytes are left out.
fn data_runs(buf: &[u8], sparse: u64) -> Vec<std::ops::Range<usize>> {
    if sparse == 0 {
        return std::iter::once(0..buf.len()).collect();
    }
    let grain = if sparse >= 4096 { 4096 } else { 512 };
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (i, block) in buf.chunks(grain).enumerate() {
        if block::is_zero(block) {
            continue;
        }
        let (start, end) = (i * grain, i * grain + block.len());
        match runs.last_mut() {
            Some(last) if ((start - last.end) as u64) < sparse => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::data_runs;

    #[test]
    fn short_zeros_are_written_and_long_ones_left_out() {
        let mut buf = vec![0u8; 65536];
        buf[5000] = 1;
        buf[16384] = 1;
        assert_eq!(data_runs(&buf, 4096), [4096..8192, 16384..20480]);
        assert_eq!(data_runs(&buf, 16384), vec![4096..20480; 1]);
        assert_eq!(data_runs(&buf, 0), vec![0..65536; 1]);
        assert!(data_runs(&[0; 4096], 4096).is_empty());
    }
}
