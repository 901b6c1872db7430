//! `resize`.

use super::{Context, Outcome};
use crate::args::{self, Source};
use block::{Error, OpenOptions, formats::Preallocation};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    /// Print nothing.
    #[arg(short, long)]
    quiet: bool,
    /// Format.
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// How to allocate new space: off, metadata, falloc, full.
    #[arg(long, value_name = "PREALLOC", default_value = "off")]
    preallocation: String,
    /// Allow losing data behind the new end.
    #[arg(long)]
    shrink: bool,
    /// Image.
    filename: String,
    /// New size, or +/- a difference.
    #[arg(allow_hyphen_values = true)]
    size: String,
}

pub(crate) fn run(a: Args, context: &Context) -> Outcome {
    let preallocation = Preallocation::parse(&a.preallocation)?;
    let image = a.source.open(&a.filename, a.format.as_deref(), OpenOptions::default())?;
    let current = image.size();
    let amount = args::parse_size(a.size.trim_start_matches(['+', '-']), "image size")?;
    let size = match a.size.as_bytes().first() {
        Some(b'+') => current.checked_add(amount),
        Some(b'-') => current.checked_sub(amount),
        _ => Some(amount),
    };
    let size = size
        .filter(|&s| s > 0 || amount == 0)
        .and_then(|s| s.checked_next_multiple_of(512))
        .ok_or_else(|| Error::usage("New image size must be positive"))?;
    if size < current && !a.shrink {
        eprintln!(
            "{}: warning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing \
             such an operation, make sure there is no important data there.",
            context.personality.program()
        );
        return Err(Error::usage("Use the --shrink option to perform a shrink operation.").into());
    }
    image.resize(size, preallocation)?;
    image.close()?;
    if !a.quiet {
        println!("Image resized.");
    }
    Ok(())
}
