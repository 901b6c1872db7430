//! `bench`.

use super::{Context, Outcome};
use crate::args::{self, Source};
use block::{Error, OpenOptions};
use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

#[derive(clap::Args)]
#[command(disable_help_flag = false)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    /// Print nothing.
    #[arg(short, long)]
    quiet: bool,
    /// Format.
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Cache mode.
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// Requests.
    #[arg(short, long, default_value_t = 75000)]
    count: u64,
    /// Requests in flight.
    #[arg(short, long, default_value_t = 64)]
    depth: u64,
    /// First byte.
    #[arg(short, long, value_name = "OFFSET", default_value = "0")]
    offset: String,
    /// Bytes of a request.
    #[arg(short = 's', long, value_name = "SIZE", default_value = "4096")]
    buffer_size: String,
    /// Bytes from one request to the next; the request's size by default.
    #[arg(short = 'S', long, value_name = "SIZE")]
    step_size: Option<String>,
    /// Write instead of read.
    #[arg(short = 'w', long)]
    write: bool,
    /// Byte to write.
    #[arg(long, default_value_t = 0)]
    pattern: u8,
    /// Flush after so many requests.
    #[arg(long, value_name = "N")]
    flush_interval: Option<u64>,
    /// Flush without waiting for requests in flight.
    #[arg(long)]
    no_drain: bool,
    /// Engine; every name means positioned system calls on a pool of threads.
    #[arg(short = 'i', long, value_name = "AIO")]
    aio: Option<String>,
    /// Native AIO, as -i native.
    #[arg(short = 'n', long)]
    native: bool,
    /// Image.
    filename: String,
}

pub(crate) fn run(a: Args, _context: &Context) -> Outcome {
    let size = args::parse_size(&a.buffer_size, "buffer size")?;
    let step = match &a.step_size {
        Some(s) => args::parse_size(s, "step size")?,
        None => size,
    };
    let start = args::parse_size(&a.offset, "offset")?;
    let aio = if a.native { Some("native") } else { a.aio.as_deref() };
    if !matches!(aio, None | Some("threads" | "native" | "io_uring")) {
        return Err(Error::usage("Invalid aio option; use threads, native or io_uring").into());
    }
    if a.flush_interval.is_some() && !a.write {
        return Err(Error::usage("--flush-interval is only available in write tests").into());
    }
    if a.flush_interval.is_some_and(|f| f != 0 && f < a.depth) {
        return Err(Error::usage("Flush interval can't be smaller than depth").into());
    }
    let cache = args::cache(a.cache.as_deref(), "writeback")?;
    let image = a.source.open(
        &a.filename,
        a.format.as_deref(),
        OpenOptions { read_only: !a.write, cache, ..Default::default() },
    )?;
    if size == 0 || size > image.size() || size > 1 << 30 || a.depth == 0 {
        return Err(Error::usage("Invalid request size or depth for this image").into());
    }
    if !a.quiet {
        println!(
            "Sending {} {} requests, {size} bytes each, {} in parallel (starting at offset {start}, step size {step})",
            a.count,
            if a.write { "write" } else { "read" },
            a.depth
        );
        if let Some(n) = a.flush_interval {
            println!("Sending flush every {}{n} requests", if a.no_drain { "" } else { "drained " });
        }
    }
    let (next, error) = (AtomicU64::new(0), Mutex::new(None));
    // Requests wrap around so that each lies within the disk.
    let span = image.size() - size + 1;
    let work = || {
        let mut buf = vec![a.pattern; size as usize];
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= a.count
                || error.lock().map_or(true, |e: std::sync::MutexGuard<'_, Option<Error>>| e.is_some())
            {
                return;
            }
            let at = start.wrapping_add(i.wrapping_mul(step)) % span;
            let mut done = if a.write { image.write_at(&buf, at) } else { image.read_at(&mut buf, at) };
            if a.flush_interval.is_some_and(|f| f != 0 && (i + 1) % f == 0) {
                done = done.and_then(|()| image.flush());
            }
            if let Err(e) = done {
                error.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(e);
                return;
            }
        }
    };
    let started = Instant::now();
    std::thread::scope(|scope| {
        let pool = a.depth.min(std::thread::available_parallelism().map_or(2, |n| n.get() as u64));
        for _ in 1..pool {
            scope.spawn(work);
        }
        work();
    });
    if let Some(e) = error.into_inner().unwrap_or_else(|e| e.into_inner()) {
        return Err(e.context("Failed request").into());
    }
    if !a.quiet {
        println!("Run completed in {:.3} seconds.", started.elapsed().as_secs_f64());
    }
    Ok(image.close()?)
}
