//! `convert`.

use super::{Context, Outcome, create};
use crate::{
    args::{self, Source},
    copy::{self, Concatenation, Plan},
    progress::Progress,
};
use block::{
    Create, Error, Image, OpenOptions, Result, create_image,
    formats::{self, Backing},
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
    /// Source format.
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Target format.
    #[arg(short = 'O', long, value_name = "FMT")]
    target_format: Option<String>,
    /// The target is named by options.
    #[arg(long)]
    target_image_opts: bool,
    /// Target options, name=value,...; -o help lists them.
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Compress the target.
    #[arg(short, long)]
    compress: bool,
    /// Backing file of the target; what the source's backing file has is not copied.
    #[arg(short = 'B', long, value_name = "FILE")]
    backing: Option<String>,
    /// Format of the backing file.
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// The target exists: do not create it.
    #[arg(short = 'n', long)]
    no_create: bool,
    /// The existing target reads as zeros.
    #[arg(long)]
    target_is_zero: bool,
    /// Cache mode of the target.
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// Cache mode of the source.
    #[arg(short = 'T', long, value_name = "CACHE")]
    source_cache: Option<String>,
    /// Take an internal snapshot's contents.
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// Leave out zeros of at least so many bytes; 0 writes everything.
    #[arg(short = 'S', long, value_name = "SIZE")]
    sparse_size: Option<String>,
    /// Threads.
    #[arg(short = 'm', long, value_name = "N")]
    parallel: Option<usize>,
    /// Place data in any order.
    #[arg(short = 'W', long)]
    oob: bool,
    /// Bytes per second.
    #[arg(short = 'r', long, value_name = "RATE")]
    rate_limit: Option<String>,
    /// Go on past read errors.
    #[arg(long)]
    salvage: bool,
    /// Copy persistent bitmaps, too.
    #[arg(long)]
    bitmaps: bool,
    /// Leave out bitmaps that are inconsistent.
    #[arg(long)]
    skip_broken_bitmaps: bool,
    /// Let the host copy ranges itself where it can (zeros stored in the source stay stored).
    #[arg(short = 'C', long)]
    copy_range_offloading: bool,
    /// Source images, and the target last.
    #[arg(num_args = 0..)]
    files: Vec<String>,
}

/// `snapshot.id=..,snapshot.name=..`, or an id or name.
pub(crate) fn view_snapshot(image: &Image, which: &str) -> Result<()> {
    let snapshots = image.format().snapshots().ok_or_else(|| {
        Error::unsupported(format!("Format '{}' has no internal snapshots", image.driver().name))
    })?;
    let mut options = block::Options::parse(which)?;
    let name = match (options.take("snapshot.id"), options.take("snapshot.name")) {
        (None, None) => which.to_owned(),
        (id, name) => {
            let found = snapshots.list().into_iter().find(|s| {
                id.as_ref().is_none_or(|i| *i == s.id) && name.as_ref().is_none_or(|n| *n == s.name)
            });
            found
                .ok_or_else(|| {
                    Error::NotFound(format!("Failed to load snapshot: Can't find snapshot '{which}'"))
                })?
                .id
        }
    };
    snapshots.view(&name).map_err(|e| e.context("Failed to load snapshot"))
}

fn copy_bitmaps(source: &Image, target: &Image, skip_broken: bool) -> Result<()> {
    let none =
        || Error::unsupported("This will continue to be invalid to use --bitmaps: the format has no bitmaps");
    let from = source.format().bitmaps().ok_or_else(none)?;
    for bitmap in from.list() {
        if bitmap.in_use {
            if skip_broken {
                eprintln!("warning: Skipping inconsistent bitmap '{}'", bitmap.name);
                continue;
            }
            return Err(Error::invalid(format!(
                "Cannot copy inconsistent bitmap '{}': Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove'",
                bitmap.name
            )));
        }
        let bits = from.load(&bitmap.name)?;
        target.quiesced(|f| {
            let to = f.bitmaps().ok_or_else(none)?;
            to.add(&bitmap.name, Some(bitmap.granularity), false)?;
            to.store(&bitmap.name, &bits)?;
            to.set_enabled(&bitmap.name, bitmap.auto)
        })?;
    }
    Ok(())
}

pub(crate) fn run(mut a: Args, context: &Context) -> Outcome {
    let target_format = a.target_format.clone().unwrap_or_else(|| "raw".into());
    let driver = formats::find(&target_format)
        .ok_or_else(|| Error::usage(format!("Unknown file format '{target_format}'")))?;
    let Some(mut options) = create::collect(&a.options)? else {
        create::print_options(driver);
        return Ok(());
    };
    let Some(target_name) = a.files.pop().filter(|_| !a.files.is_empty()) else {
        return Err(Error::usage("Must specify image file name").into());
    };
    if a.no_create && !a.options.is_empty() {
        eprintln!("warning: -o has no effect when skipping image creation");
    }
    if a.target_is_zero && !a.no_create {
        return Err(Error::usage("--target-is-zero requires use of -n flag").into());
    }
    if a.target_image_opts && !a.no_create {
        return Err(Error::usage("--target-image-opts requires use of -n flag").into());
    }
    let threads = match a.parallel {
        Some(n) if !(1..=16).contains(&n) => {
            return Err(Error::usage(
                "Invalid number of coroutines. Allowed number of coroutines is between 1 and 16",
            )
            .into());
        }
        Some(n) => n,
        // Twice as many as processors: while some wait for their turn or for the disk, others work.
        None => std::thread::available_parallelism().map_or(4, |n| n.get() * 2).clamp(4, 8),
    };
    let sparse = match &a.sparse_size {
        Some(s) => args::parse_size(s, "buffer size for sparse output")?,
        None => 4096,
    };
    if !sparse.is_multiple_of(512) {
        return Err(Error::usage("Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to 2147483136. Select 0 to disable sparse detection (fully allocates output).").into());
    }
    let rate = a.rate_limit.as_deref().map(|r| args::parse_size(r, "rate limit")).transpose()?;
    // None at all, as with QEMU.
    let rate = rate.filter(|&r| r > 0);
    let source_cache = args::cache(a.source_cache.as_deref(), "writeback")?;
    let mut sources = Vec::new();
    for name in &a.files {
        let options = OpenOptions { cache: source_cache, ..OpenOptions::reader(None) };
        let image = a.source.open(name, a.format.as_deref(), options)?;
        if let Some(which) = &a.snapshot {
            if a.files.len() > 1 {
                return Err(Error::usage("No support for concatenating multiple snapshot").into());
            }
            view_snapshot(&image, which)?;
        }
        sources.push(image);
    }
    let source = Concatenation::new(&sources);
    let backing_name = a.backing.or(options.take("backing_file")).filter(|b| !b.is_empty());
    let backing_format = a.backing_format.or(options.take("backing_fmt"));
    if backing_name.is_some() && sources.len() > 1 {
        return Err(Error::usage(
            "Having a backing file for the target makes no sense when concatenating multiple input images",
        )
        .into());
    }
    if backing_name.is_some() && backing_format.is_none() && !a.no_create {
        return Err(Error::usage("backing file specified without backing format; say it with -F").into());
    }
    let size = options.take_size("size")?.unwrap_or(source.size());
    if a.compress && options.get("data_file").is_some() {
        return Err(Error::usage("Compression and data file are not supported together").into());
    }
    if a.compress && (options.get("encryption").is_some_and(|v| v != "off") || options.get("encrypt.format").is_some()) {
        return Err(Error::usage("Compression and encryption not supported at the same time").into());
    }
    if a.copy_range_offloading && a.sparse_size.is_some() {
        return Err(Error::usage("Cannot enable copy offloading when -S is used").into());
    }
    if a.copy_range_offloading && a.compress {
        return Err(Error::usage("Cannot enable copy offloading when -c is used").into());
    }
    let preallocated = options.get("preallocation").is_some_and(|p| p != "off");
    if a.compress && preallocated {
        return Err(Error::usage("Compression and preallocation not supported at the same time").into());
    }
    let secrets = a.source.secrets()?;
    if !a.no_create {
        let create = Create {
            format: target_format.clone(),
            name: target_name.clone(),
            size: Some(size),
            backing: backing_name.clone().map(|name| Backing { name, format: backing_format.clone() }),
            unsafe_backing: false,
            options,
            secrets,
        };
        create_image(&create)
            .map_err(|e| e.context(format!("{target_name}: error while converting {target_format}")))?;
    }
    let open = OpenOptions {
        cache: args::cache(a.cache.as_deref(), "unsafe")?,
        discard: true,
        ..Default::default()
    };
    let target_source = Source { image_opts: a.target_image_opts, force_share: false, ..a.source.clone() };
    let format = (!a.target_image_opts).then_some(target_format.as_str());
    let target = target_source.open(&target_name, format, open)?;
    if a.compress && !target.format().compresses() {
        return Err(Error::unsupported("Compression not supported for this file format").into());
    }
    if target.size() < size {
        return Err(Error::usage("output file is smaller than input file").into());
    }
    if a.bitmaps && (sources.len() > 1 || target.format().bitmaps().is_none()) {
        return Err(Error::usage("--bitmaps is not supported for this source and target").into());
    }
    let progress = Progress::new(source.size(), a.progress && !a.quiet, context.personality);
    let fresh = !a.no_create && target.format().created_zeroed();
    let plan = Plan {
        len: size.min(source.size()),
        skip: 0,
        compress: a.compress,
        unordered: a.oob,
        threads,
        sparse,
        target_zero: backing_name.is_none() && (fresh || a.target_is_zero),
        skip_depth: backing_name.is_some().then_some(1),
        salvage: a.salvage,
        offload: a.copy_range_offloading,
        rate,
    };
    copy::copy(&source, &target, &plan, &progress)?;
    if a.bitmaps {
        copy_bitmaps(&sources[0], &target, a.skip_broken_bitmaps)?;
    }
    target.close()?;
    progress.finish();
    Ok(())
}
