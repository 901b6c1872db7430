//! `amend`.

use super::{Context, Outcome, create};
use crate::{
    args::{self, Source},
    progress::Progress,
};
use block::{Error, OpenOptions, formats::Amending};

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
    /// Allow changes that could lose access to the data.
    #[arg(long)]
    force: bool,
    /// Options to change, name=value,...; -o help lists them.
    #[arg(short, long, value_name = "OPTIONS", required = true)]
    options: Vec<String>,
    /// Image.
    filename: Option<String>,
}

pub(crate) fn run(a: Args, context: &Context) -> Outcome {
    let Some(mut options) = create::collect(&a.options)? else {
        let name = a.format.as_deref().unwrap_or("qcow2");
        let driver =
            block::formats::find(name).ok_or_else(|| Error::usage(format!("Unknown driver '{name}'")))?;
        create::print_options(driver);
        return Ok(());
    };
    let name = a.filename.ok_or_else(|| Error::usage("Expecting one image file name"))?;
    let cache = args::cache(a.cache.as_deref(), "writeback")?;
    let image = a.source.open(
        &name,
        a.format.as_deref(),
        OpenOptions { cache, no_backing: true, ..Default::default() },
    )?;
    let progress = Progress::new(1, a.progress && !a.quiet, context.personality);
    let secrets = a.source.secrets()?;
    let amending = Amending { secrets: &secrets, force: a.force };
    image.quiesced(|f| f.amend(&mut options, &amending))?;
    options.finish(&format!("format '{}'", image.driver().name))?;
    image.close()?;
    progress.finish();
    Ok(())
}
