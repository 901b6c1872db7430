//! `commit`.

use super::{Context, Outcome, map};
use crate::{
    args::{self, Source},
    progress::Progress,
};
use block::{Error, Image, OpenOptions, Options, Result, formats::Preallocation, storage};
use std::{
    sync::Arc,
    time::{Duration, Instant},
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
    /// Format.
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Cache mode.
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// Image of the chain to write to; the next one by default.
    #[arg(short, long, value_name = "BASE")]
    base: Option<String>,
    /// Bytes per second.
    #[arg(short, long, value_name = "RATE")]
    rate_limit: Option<String>,
    /// Do not empty the image afterwards.
    #[arg(short = 'd', long)]
    drop: bool,
    /// Image.
    filename: String,
}

/// Names and formats of the images below `image`, down to and including `base`.
fn chain(image: &Image, base: Option<&str>) -> Result<Vec<(String, Option<String>)>> {
    let mut out: Vec<(String, Option<String>)> = Vec::new();
    let none = || Error::usage("Image does not have a backing file");
    let mut backing = image.info()?.backing.ok_or_else(none)?;
    let mut owner = image.name().to_owned();
    loop {
        let full = storage::join_name(&owner, &backing.name);
        out.push((full.clone(), backing.format.clone()));
        match base {
            None => return Ok(out),
            Some(b) if b == full || b == backing.name => return Ok(out),
            Some(b) => {
                let options = OpenOptions {
                    no_backing: true,
                    no_io: true,
                    ..OpenOptions::reader(backing.format.as_deref())
                };
                let next = Image::open(&full, &options)?.info()?.backing;
                backing = next.ok_or_else(|| {
                    Error::usage(format!("Did not find '{b}' in the backing chain of '{}'", image.name()))
                })?;
                owner = full;
            }
        }
        if out.len() > 200 {
            return Err(Error::invalid("The backing chain is too long"));
        }
    }
}

pub(crate) fn run(a: Args, context: &Context) -> Outcome {
    let cache = args::cache(a.cache.as_deref(), "writeback")?;
    let rate = a.rate_limit.as_deref().map(|r| args::parse_size(r, "rate limit")).transpose()?;
    let options = OpenOptions { cache, no_backing: true, discard: true, ..Default::default() };
    let top = a.source.open(&a.filename, a.format.as_deref(), options.clone())?;
    let chain = chain(&top, a.base.as_deref())?;
    let Some(((base_name, base_format), between)) = chain.split_last() else {
        return Err(Error::usage("Image does not have a backing file").into());
    };
    // The base is written to, so it is opened once, for writing; what lies between is stacked on it by hand.
    let writable = OpenOptions { no_backing: false, ..options.clone() };
    let base = Arc::new(Source::default().open(base_name, base_format.as_deref(), writable)?);
    let mut below = Arc::clone(&base);
    for (name, format) in between.iter().rev() {
        let reader = OpenOptions { no_backing: true, options: Options::new(), ..OpenOptions::reader(None) };
        let image = Source::default().open(name, format.as_deref(), reader)?;
        image.replace_backing(Some(below));
        below = Arc::new(image);
    }
    top.replace_backing(Some(below));
    let depth = chain.len() as u32;
    if base.size() < top.size() {
        base.resize(top.size(), Preallocation::Off)?;
    }
    let progress = Progress::new(top.size(), a.progress && !a.quiet, context.personality);
    let started = Instant::now();
    let (mut moved, mut buf) = (0u64, Vec::new());
    map::for_each(&top, 0, top.size(), |e| {
        progress.add(e.length);
        // What is in no image above the base is seen through it anyway.
        if e.depth >= depth || !e.present {
            return Ok(());
        }
        if e.zero {
            return base.write_zeroes(e.start, e.length, true);
        }
        let mut at = e.start;
        while at < e.start + e.length {
            let n = (e.start + e.length - at).min(2 << 20);
            buf.resize(n as usize, 0);
            top.read_at(&mut buf, at)?;
            base.write_at(&buf, at)?;
            at += n;
            moved += n;
            if let Some(rate) = rate {
                let due = Duration::from_secs_f64(moved as f64 / rate.max(1) as f64);
                std::thread::sleep(due.saturating_sub(started.elapsed()));
            }
        }
        Ok(())
    })?;
    base.flush()?;
    // Emptying is only right where the image sits directly on what was written to.
    if !a.drop && between.is_empty() {
        match top.quiesced(|f| f.make_empty()) {
            Ok(()) | Err(Error::Unsupported(_)) => {}
            Err(e) => return Err(e.context("Could not empty the image").into()),
        }
    }
    top.replace_backing(None);
    top.close()?;
    base.close()?;
    progress.finish();
    if !a.quiet {
        println!("Image committed.");
    }
    Ok(())
}
