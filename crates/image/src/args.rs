//! Options that commands share.

use crate::objects;
use block::{CacheMode, Error, Image, OpenOptions, Options, Result};
use std::{collections::BTreeMap, sync::Arc};

/// How an image is named on the command line.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Source {
    /// Treat file names as option strings (driver=...,file.filename=...).
    #[arg(long)]
    pub image_opts: bool,
    /// Define an object, such as secret,id=x,file=path.
    #[arg(long, value_name = "OBJECTDEF")]
    pub object: Vec<String>,
    /// Open although another process uses the image; what is read may be inconsistent.
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

impl Source {
    /// Secrets that `--object secret,...` defines.
    pub(crate) fn secrets(&self) -> Result<Arc<BTreeMap<String, Vec<u8>>>> {
        Ok(objects::parse(&self.object)?.secrets)
    }

    /// Puts name and format into open options; the result is the name to open.
    pub(crate) fn apply(
        &self,
        name: &str,
        format: Option<&str>,
        options: &mut OpenOptions,
    ) -> Result<String> {
        let objects = objects::parse(&self.object)?;
        options.secrets = objects.secrets;
        options.credentials = objects.credentials;
        options.force_share |= self.force_share && options.read_only;
        options.format = format.map(str::to_owned);
        if !self.image_opts {
            return Ok(name.to_owned());
        }
        if format.is_some() {
            return Err(Error::usage("--image-opts and --format are mutually exclusive"));
        }
        options.options = Options::parse(name)?;
        Ok(String::new())
    }

    /// Opens an image, with qemu-img's words on failure.
    pub(crate) fn open(&self, name: &str, format: Option<&str>, mut options: OpenOptions) -> Result<Image> {
        let opened = self.apply(name, format, &mut options).and_then(|n| Image::open(&n, &options));
        let image = opened.map_err(|e| e.context(format!("Could not open '{name}'")))?;
        image.warnings().iter().for_each(|w| eprintln!("{w}"));
        Ok(image)
    }
}

/// Parses a cache mode.
pub(crate) fn cache(name: Option<&str>, default: &str) -> Result<CacheMode> {
    CacheMode::parse(name.unwrap_or(default))
}

/// How results are printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub(crate) enum Output {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

/// Parses a size on the command line.
pub(crate) fn parse_size(text: &str, what: &str) -> Result<u64> {
    block::parse_size(text).filter(|&s| i64::try_from(s).is_ok()).ok_or_else(|| {
        Error::usage(format!(
            "Invalid {what} specified: '{text}'. Sizes are bytes, or have a suffix k, M, G, T, P or E."
        ))
    })
}
