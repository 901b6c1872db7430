//! `compare`.

use super::{Context, Failure, Outcome, map};
use crate::{
    args::{self, Source},
    progress::Progress,
};
use block::{Error, Image, OpenOptions, Result};
use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    /// Show progress.
    #[arg(short, long)]
    progress: bool,
    /// Print nothing.
    #[arg(short, long)]
    quiet: bool,
    /// Differences in size and allocation count, too.
    #[arg(short, long)]
    strict: bool,
    /// Format of the first image.
    #[arg(short = 'f', long = "a-format", visible_alias = "format", value_name = "FMT")]
    format: Option<String>,
    /// Format of the second image.
    #[arg(short = 'F', long = "b-format", value_name = "FMT")]
    second_format: Option<String>,
    /// Cache mode of both.
    #[arg(short = 'T', long, value_name = "CACHE")]
    cache: Option<String>,
    /// First image.
    first: String,
    /// Second image.
    second: String,
}

/// Bytes compared at once: two of these stay in a processor's own cache.
const PIECE: u64 = 128 << 10;

/// Ranges in which either image has data: (start, end).
fn interesting(a: &Image, b: &Image, size: u64) -> Result<Vec<(u64, u64)>> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for image in [a, b] {
        map::for_each(image, 0, image.size().min(size), |e| {
            if !e.zero {
                ranges.push((e.start, e.start + e.length));
            }
            Ok(())
        })?;
    }
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges {
        match merged.last_mut() {
            Some(last) if last.1 >= start => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    Ok(merged)
}

/// Offset of the first difference; what lies past an image's end counts as zeros.
pub(crate) fn first_difference(a: &Image, b: &Image, progress: &Progress) -> Result<Option<u64>> {
    let size = a.size().max(b.size());
    let mut pieces = Vec::new();
    for (start, end) in interesting(a, b, size)? {
        let mut at = start;
        while at < end {
            let stop = (at - at % PIECE + PIECE).min(end);
            pieces.push((at, stop));
            at = stop;
        }
    }
    let (next, found, failed) = (AtomicU64::new(0), AtomicU64::new(u64::MAX), Mutex::new(None));
    let read = |image: &Image, buf: &mut [u8], at: u64| -> Result<()> {
        let n = image.size().saturating_sub(at).min(buf.len() as u64) as usize;
        buf[n..].fill(0);
        if n == 0 { Ok(()) } else { image.read_at(&mut buf[..n], at) }
    };
    let work = || {
        let (mut x, mut y) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
        loop {
            let Some(&(start, end)) = pieces.get(next.fetch_add(1, Ordering::Relaxed) as usize) else {
                return;
            };
            if start > found.load(Ordering::Relaxed) {
                return;
            }
            let n = (end - start) as usize;
            let done = read(a, &mut x[..n], start).and_then(|()| read(b, &mut y[..n], start));
            if let Err(e) = done {
                failed.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(e);
                found.fetch_min(start, Ordering::Relaxed);
                return;
            }
            if x[..n] != y[..n] {
                let at = x[..n].iter().zip(&y[..n]).position(|(p, q)| p != q).unwrap_or(0);
                found.fetch_min(start + at as u64, Ordering::Relaxed);
            }
            progress.add(end - start);
        }
    };
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(4);
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    if let Some(e) = failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
        return Err(e);
    }
    Ok(Some(found.into_inner()).filter(|&f| f != u64::MAX))
}

/// First offset at which one image is allocated and the other is not.
fn status_difference(a: &Image, b: &Image) -> Result<Option<u64>> {
    let list = |image: &Image| -> Result<Vec<(u64, u64, bool, bool)>> {
        let mut out: Vec<(u64, u64, bool, bool)> = Vec::new();
        map::for_each(image, 0, image.size(), |e| {
            match out.last_mut() {
                Some(last) if (last.2, last.3) == (e.present, e.zero) => last.1 = e.start + e.length,
                _ => out.push((e.start, e.start + e.length, e.present, e.zero)),
            }
            Ok(())
        })?;
        Ok(out)
    };
    let (x, y) = (list(a)?, list(b)?);
    let (mut i, mut j) = (0, 0);
    while let (Some(p), Some(q)) = (x.get(i), y.get(j)) {
        if (p.2, p.3) != (q.2, q.3) {
            return Ok(Some(p.0.max(q.0)));
        }
        if p.1 <= q.1 {
            i += 1;
        }
        if q.1 <= p.1 {
            j += 1;
        }
    }
    Ok(None)
}

pub(crate) fn run(a: Args, context: &Context) -> Outcome {
    let two = |e: Error| {
        eprintln!("{}: {e}", context.personality.program());
        Failure::Status(2)
    };
    let cache = args::cache(a.cache.as_deref(), "writeback").map_err(two)?;
    let options = || OpenOptions { cache, ..OpenOptions::reader(None) };
    let first = a.source.open(&a.first, a.format.as_deref(), options()).map_err(two)?;
    let second = a.source.open(&a.second, a.second_format.as_deref(), options()).map_err(two)?;
    let say = |text: &str| {
        if !a.quiet {
            println!("{text}");
        }
    };
    let progress =
        Progress::new(first.size().max(second.size()), a.progress && !a.quiet, context.personality);
    if first.size() != second.size() && a.strict {
        say("Strict mode: Image size mismatch!");
        return Err(Failure::Status(1));
    }
    if a.strict
        && let Some(at) = status_difference(&first, &second).map_err(two)?
    {
        say(&format!("Strict mode: Offset {at} block status mismatch!"));
        return Err(Failure::Status(1));
    }
    let found = first_difference(&first, &second, &progress).map_err(two)?;
    progress.finish();
    if let Some(at) = found {
        // qemu-img names the sector-aligned chunk it compared; the byte says more.
        say(&format!("Content mismatch at offset {at}!"));
        return Err(Failure::Status(1));
    }
    if first.size() != second.size() {
        say("Warning: Image size mismatch!");
    }
    say("Images are identical.");
    Ok(())
}
