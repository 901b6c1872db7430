//! `measure`.

use super::{Context, Outcome, convert, create, map};
use crate::{
    args::{self, Output, Source},
    json,
};
use block::{
    Error, OpenOptions,
    formats::{self, Measurement},
};
use serde_json::json;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    /// Source format.
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Target format.
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    target_format: String,
    /// Target options.
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Output format.
    #[arg(long, value_enum, default_value = "human")]
    output: Output,
    /// Size of the disk, instead of a source.
    #[arg(short, long, value_name = "SIZE")]
    size: Option<String>,
    /// Take an internal snapshot's contents.
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// Source image.
    filename: Option<String>,
}

pub(crate) fn run(a: Args, _context: &Context) -> Outcome {
    let driver = formats::find(&a.target_format)
        .ok_or_else(|| Error::usage(format!("Unknown file format '{}'", a.target_format)))?;
    let measure = driver.measure.ok_or_else(|| {
        Error::unsupported(format!("Block driver '{}' does not support size measurement", driver.name))
    })?;
    let Some(mut options) = create::collect(&a.options)? else {
        create::print_options(driver);
        return Ok(());
    };
    let backing = options.take("backing_file").is_some();
    options.take("backing_fmt");
    let mut data = Vec::new();
    let mut bitmaps = None;
    let size = match (&a.filename, &a.size) {
        (Some(_), Some(_)) => {
            return Err(Error::usage("--size N cannot be used together with a filename").into());
        }
        (None, None) => return Err(Error::usage("Either --size N or one filename must be specified").into()),
        (None, Some(size)) => args::parse_size(size, "image size")?,
        (Some(name), None) => {
            let image = a.source.open(name, a.format.as_deref(), OpenOptions::reader(None))?;
            if let Some(which) = &a.snapshot {
                convert::view_snapshot(&image, which)?;
            }
            map::for_each(&image, 0, image.size(), |e| {
                let below = backing && e.depth > 0;
                if !e.zero && !below {
                    data.push((e.start, e.length));
                }
                Ok(())
            })?;
            if let Some(b) = image.format().bitmaps()
                && driver.name == "qcow2"
            {
                let list: Vec<(u64, usize)> =
                    b.list().iter().filter(|b| !b.in_use).map(|b| (b.granularity, b.name.len())).collect();
                bitmaps = Some(list);
            }
            image.size()
        }
    };
    let with_bitmaps = bitmaps.as_deref();
    let measured =
        measure(Measurement { size, options: &mut options, data: &data, bitmaps: with_bitmaps, backing })?;
    options.finish(&format!("format '{}'", driver.name))?;
    match a.output {
        Output::Human => {
            println!("required size: {}", measured.required);
            println!("fully allocated size: {}", measured.fully_allocated);
            if let Some(bitmaps) = measured.bitmaps {
                println!("bitmaps size: {bitmaps}");
            }
        }
        Output::Json => {
            let mut v = json!({ "required": measured.required, "fully-allocated": measured.fully_allocated });
            if let Some(bitmaps) = measured.bitmaps {
                v["bitmaps"] = bitmaps.into();
            }
            println!("{}", json::pretty(&v));
        }
    }
    Ok(())
}
