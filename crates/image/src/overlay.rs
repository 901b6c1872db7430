//! Temporary overlays: writes go to a file that is gone with the program.

use crate::args::Source;
use block::{Create, Error, Image, OpenOptions, Result, create_image, formats::Backing};
use std::sync::Arc;

/// Opens an image read-only below a temporary qcow2 image that takes the writes, in `$TMPDIR` or `/var/tmp`.
pub(crate) fn open(source: &Source, name: &str, format: Option<&str>, options: OpenOptions) -> Result<Image> {
    let below = OpenOptions { read_only: true, ..options.clone() };
    let base = source.open(name, format, below)?;
    let directory = std::env::var("TMPDIR").unwrap_or_else(|_| "/var/tmp".into());
    let mut seed = [0; 8];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut seed))
        .map_err(|e| Error::io("/dev/urandom", e))?;
    let file = format!("{directory}/kvasir-overlay-{:016x}", u64::from_ne_bytes(seed));
    create_image(&Create {
        format: "qcow2".into(),
        name: file.clone(),
        size: Some(base.size()),
        backing: Some(Backing { name: "temporary".into(), format: Some("raw".into()) }),
        unsafe_backing: true,
        ..Default::default()
    })?;
    let writer = OpenOptions {
        no_backing: true,
        cache: block::CacheMode { no_flush: true, ..Default::default() },
        discard: options.discard,
        detect_zeroes: options.detect_zeroes,
        ..OpenOptions::writer(Some("qcow2"))
    };
    let overlay = Image::open(&file, &writer);
    // The descriptor keeps it until the image is closed.
    std::fs::remove_file(&file).map_err(|e| Error::io(file, e))?;
    let overlay = overlay?;
    overlay.replace_backing(Some(Arc::new(base)));
    Ok(overlay)
}
