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

/// What can be changed of a qcow2 image, as `-o help` lists it.
const QCOW2: &[(&str, &str)] = &[
    ("backing_file=<str>", "File name of a base image"),
    ("backing_fmt=<str>", "Image format of the base image"),
    ("compat=<str>", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    ("data_file=<str>", "File name of an external data file"),
    ("data_file_raw=<bool (on/off)>", "The external data file must stay valid as a raw image"),
    ("encrypt.iter-time=<num>", "Time to spend in PBKDF in milliseconds"),
    ("encrypt.keyslot=<num>", "Select a single keyslot to modify explicitly"),
    ("encrypt.new-secret=<str>", "New secret to set in the matching keyslots. Empty string to erase"),
    ("encrypt.old-secret=<str>", "Select all keyslots that match this password"),
    ("encrypt.state=<str>", "Select new state of affected keyslots (active/inactive)"),
    ("lazy_refcounts=<bool (on/off)>", "Postpone refcount updates"),
    ("refcount_bits=<num>", "Width of a reference count entry in bits"),
    ("size=<size>", "Virtual disk size"),
];

/// The same for LUKS.
const LUKS: &[(&str, &str)] = &[
    ("iter-time=<num>", "Time to spend in PBKDF in milliseconds"),
    ("keyslot=<num>", "Select a single keyslot to modify explicitly"),
    ("new-secret=<str>", "New secret to set in the matching keyslots. Empty string to erase"),
    ("old-secret=<str>", "Select all keyslots that match this password"),
    ("state=<str>", "Select new state of affected keyslots (active/inactive)"),
];

pub(crate) fn run(a: Args, context: &Context) -> Outcome {
    let Some(mut options) = create::collect(&a.options)? else {
        let name = a.format.as_deref().unwrap_or("qcow2");
        let driver =
            block::formats::find(name).ok_or_else(|| Error::usage(format!("Unknown driver '{name}'")))?;
        let list = match driver.name {
            "qcow2" => QCOW2,
            "luks" => LUKS,
            other => {
                return Err(
                    Error::unsupported(format!("Format driver '{other}' does not support option amendment")).into()
                );
            }
        };
        println!("Amend options for '{}':", driver.name);
        list.iter().for_each(|(option, text)| println!("  {option:<22} - {text}"));
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
