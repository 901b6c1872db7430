//! `dd`.

use super::{Context, Outcome};
use crate::{
    args::{self, Source},
    copy::{self, Concatenation, Plan},
    progress::Progress,
};
use block::{Create, Error, OpenOptions, create_image};

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
    /// if=, of=, bs=, count=, skip=.
    operands: Vec<String>,
}

pub(crate) fn run(a: Args, context: &Context) -> Outcome {
    let (mut input, mut output, mut bs, mut count, mut skip) = (None, None, 512, None, 0);
    for operand in &a.operands {
        let (key, value) =
            operand.split_once('=').ok_or_else(|| Error::usage(format!("unrecognized operand {operand}")))?;
        match key {
            "if" => input = Some(value.to_owned()),
            "of" => output = Some(value.to_owned()),
            "bs" => bs = args::parse_size(value, "block size")?,
            "count" => count = Some(args::parse_size(value, "count")?),
            "skip" => skip = args::parse_size(value, "skip")?,
            _ => return Err(Error::usage(format!("unrecognized operand {key}")).into()),
        }
    }
    let (Some(input), Some(output)) = (input, output) else {
        return Err(Error::usage("Must specify both input and output files").into());
    };
    if bs == 0 || bs > i64::from(i32::MAX) as u64 {
        return Err(Error::usage("Invalid block size; it must be between 1 and 2147483647").into());
    }
    let image = a.source.open(&input, a.format.as_deref(), OpenOptions::reader(None))?;
    let wanted = count.map_or(image.size(), |c| c.saturating_mul(bs).min(image.size()));
    let start = skip.saturating_mul(bs);
    let len = if count.is_some() {
        wanted.min(image.size().saturating_sub(start))
    } else {
        image.size().saturating_sub(start)
    };
    if start > image.size() {
        eprintln!("{}: {input}: cannot skip to specified offset", context.personality.program());
    }
    create_image(&Create {
        format: a.target_format.clone(),
        name: output.clone(),
        size: Some(len),
        ..Default::default()
    })
    .map_err(|e| e.context(format!("{output}: error while creating output image")))?;
    let target = Source::default().open(&output, Some(&a.target_format), OpenOptions::default())?;
    let progress = Progress::new(len, false, context.personality);
    let plan = Plan {
        len,
        skip: start.min(image.size()),
        compress: false,
        unordered: false,
        threads: 2,
        sparse: 4096,
        target_zero: target.format().created_zeroed(),
        skip_depth: None,
        salvage: false,
        offload: false,
        rate: None,
    };
    copy::copy(&Concatenation::new([&image]), &target, &plan, &progress)?;
    Ok(target.close()?)
}
