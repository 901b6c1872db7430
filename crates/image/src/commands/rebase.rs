//! `rebase`.

use super::{Context, Outcome};
use crate::{
    args::{self, Source},
    progress::Progress,
};
use block::{
    Error, Image, OpenOptions, Result,
    formats::{self, Backing, Mapping},
    storage,
};
use std::sync::Arc;

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
    /// Cache mode of the image.
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// Cache mode of the backing files.
    #[arg(short = 'T', long, value_name = "CACHE")]
    source_cache: Option<String>,
    /// Only change the record: both backing files hold the same.
    #[arg(short = 'u', long = "backing-unsafe")]
    unsafe_mode: bool,
    /// Compress what has to be copied.
    #[arg(short, long)]
    compress: bool,
    /// New backing file; empty for none.
    #[arg(short, long, value_name = "FILE")]
    backing: Option<String>,
    /// Its format.
    #[arg(short = 'B', short_alias = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Image.
    filename: String,
}

/// Reads what an overlay sees of a backing image, or of none.
fn read_below(image: Option<&Arc<Image>>, buf: &mut [u8], at: u64) -> Result<()> {
    let n = image.map_or(0, |i| i.size().saturating_sub(at).min(buf.len() as u64)) as usize;
    buf[n..].fill(0);
    match image {
        Some(image) if n > 0 => image.read_at(&mut buf[..n], at),
        _ => Ok(()),
    }
}

/// Copies into `image` what would look different on the new backing file.
fn keep_contents(
    image: &Image,
    old: Option<&Arc<Image>>,
    new: Option<&Arc<Image>>,
    compress: bool,
    progress: &Progress,
) -> Result<()> {
    const PIECE: u64 = 1 << 20;
    let unit = image.format().unit().max(512);
    let (mut at, mut extents) = (0, Vec::new());
    let (mut x, mut y) = (vec![0; PIECE.max(unit) as usize], vec![0; PIECE.max(unit) as usize]);
    while at < image.size() {
        extents.clear();
        image.map_own(at, image.size() - at, &mut extents)?;
        for e in &extents {
            let end = e.offset + e.len;
            let mut here = e.offset;
            while e.mapping == Mapping::Unallocated && here < end {
                let step = PIECE.max(unit);
                let n = (end - here).min(step - here % step);
                read_below(old, &mut x[..n as usize], here)?;
                read_below(new, &mut y[..n as usize], here)?;
                for (i, (p, q)) in
                    x[..n as usize].chunks(unit as usize).zip(y.chunks(unit as usize)).enumerate()
                {
                    if p == &q[..p.len()] {
                        continue;
                    }
                    let offset = here + i as u64 * unit;
                    let packed =
                        if compress && offset.is_multiple_of(unit) { image.compress(p)? } else { None };
                    match packed {
                        Some(data) => image.write_compressed(offset, &data)?,
                        None if block::is_zero(p) => image.write_zeroes(offset, p.len() as u64, false)?,
                        None => image.write_at(p, offset)?,
                    }
                }
                here += n;
            }
            progress.add(e.len);
            at = end;
        }
    }
    Ok(())
}

pub(crate) fn run(a: Args, context: &Context) -> Outcome {
    let backing = a
        .backing
        .clone()
        .ok_or_else(|| Error::usage("Use the -b option to explicitly specify a backing file"));
    let name = backing?;
    let format = a.backing_format.clone();
    if let Some(format) = format.as_deref()
        && formats::find(format).is_none()
    {
        return Err(Error::usage(format!("Invalid format name: '{format}'")).into());
    }
    let cache = args::cache(a.cache.as_deref(), "writeback")?;
    let source_cache = args::cache(a.source_cache.as_deref(), "writeback")?;
    let options = OpenOptions { cache, no_backing: a.unsafe_mode, ..Default::default() };
    let image = a.source.open(&a.filename, a.format.as_deref(), options)?;
    let new = (!name.is_empty()).then(|| Backing { name: name.clone(), format: format.clone() });
    let progress = Progress::new(image.size(), a.progress && !a.quiet, context.personality);
    if !a.unsafe_mode {
        let new_image = match &new {
            Some(b) => {
                let full = storage::join_name(image.name(), &b.name);
                let options = OpenOptions { cache: source_cache, ..OpenOptions::reader(None) };
                let opened = Source::default().open(&full, b.format.as_deref(), options);
                Some(Arc::new(opened.map_err(|e| e.context("Could not open new backing file"))?))
            }
            None => None,
        };
        keep_contents(&image, image.backing().as_ref(), new_image.as_ref(), a.compress, &progress)?;
        image.flush()?;
        image.replace_backing(new_image);
    }
    if let Some(b) = &new
        && b.format.is_none()
    {
        return Err(Error::usage(format!(
            "Could not change the backing file to '{name}': backing format must be specified; say it with -F"
        ))
        .into());
    }
    image
        .quiesced(|f| f.set_backing(new.as_ref()))
        .map_err(|e| e.context(format!("Could not change the backing file to '{name}'")))?;
    image.close()?;
    progress.finish();
    Ok(())
}
