//! `bench`.

use super::{Context, Outcome};
use crate::args::{self, Source};
use block::{
    Error, Image, OpenOptions, Result,
    queue::{Buffer, Engine, Operation, Queue, Request},
};
use std::{sync::Arc, time::Instant};

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
    /// Engine: threads, native or io_uring (these two are the same); io_uring where possible by default.
    #[arg(short = 'i', long, value_name = "AIO")]
    aio: Option<String>,
    /// Native AIO, as -i native.
    #[arg(short = 'n', long)]
    native: bool,
    /// Image.
    filename: String,
}

/// Keeps `depth` requests in flight until `count` are done.
fn run_requests(a: &Args, image: &Arc<Image>, engine: Engine, size: u64, step: u64, start: u64) -> Result<()> {
    let depth = a.depth.min(1024);
    let mut queue = Queue::new(Arc::clone(image), depth as u32, engine)?;
    // Requests wrap around so that each lies within the disk.
    let span = image.size() - size + 1;
    let mut buffers: Vec<Buffer> = (0..depth)
        .map(|_| {
            let mut buffer = queue.buffer(size as usize);
            buffer.fill(a.pattern);
            buffer
        })
        .collect();
    let interval = a.flush_interval.filter(|&n| n > 0);
    let (mut issued, mut flush_due, mut flushing, mut done) = (0u64, false, false, Vec::new());
    while issued < a.count || queue.in_flight() > 0 {
        if flush_due && !flushing && (a.no_drain || queue.in_flight() == 0) {
            let (operation, buffer) = (Operation::Flush, Buffer::empty());
            queue.push(Request { id: u64::MAX, operation, offset: 0, len: 0, buffer })?;
            (flush_due, flushing) = (false, true);
        }
        // A drained flush has the image for itself.
        let open = a.no_drain || !(flush_due || flushing);
        while open && issued < a.count && !flush_due {
            let Some(buffer) = buffers.pop() else { break };
            let offset = start.wrapping_add(issued.wrapping_mul(step)) % span;
            let operation = if a.write { Operation::Write { durable: false } } else { Operation::Read };
            queue.push(Request { id: issued, operation, offset, len: size, buffer })?;
            issued += 1;
            flush_due = interval.is_some_and(|n| issued.is_multiple_of(n));
        }
        queue.wait()?;
        queue.reap(&mut done)?;
        for completion in done.drain(..) {
            completion.result?;
            if completion.id == u64::MAX {
                flushing = false;
            } else {
                buffers.push(completion.buffer);
            }
        }
    }
    Ok(())
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
            println!("Sending flush every {n} requests");
        }
    }
    let engine = aio.map_or(Ok(Engine::Auto), Engine::parse)?;
    let image = Arc::new(image);
    let started = Instant::now();
    if let Err(e) = run_requests(&a, &image, engine, size, step, start) {
        return Err(e.context("Failed request").into());
    }
    if !a.quiet {
        println!("Run completed in {:.3} seconds.", started.elapsed().as_secs_f64());
    }
    Ok(image.close()?)
}
