//! `snapshot`.

use super::{Context, Outcome};
use crate::{args::Source, text};
use block::{Error, OpenOptions, formats::SnapshotInfo};
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    /// Print nothing.
    #[arg(short, long)]
    quiet: bool,
    /// Format.
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// List snapshots (the default).
    #[arg(short, long, conflicts_with_all = ["apply", "create", "delete"])]
    list: bool,
    /// Make the disk what it was then.
    #[arg(short, long, value_name = "SNAPSHOT", conflicts_with_all = ["create", "delete"])]
    apply: Option<String>,
    /// Take a snapshot.
    #[arg(short, long, value_name = "SNAPSHOT", conflicts_with = "delete")]
    create: Option<String>,
    /// Delete a snapshot.
    #[arg(short, long, value_name = "SNAPSHOT")]
    delete: Option<String>,
    /// Image.
    filename: String,
}

pub(crate) fn run(a: Args, _context: &Context) -> Outcome {
    let listing = a.apply.is_none() && a.create.is_none() && a.delete.is_none();
    let options = OpenOptions { read_only: listing, no_backing: listing, ..Default::default() };
    let image = a.source.open(&a.filename, a.format.as_deref(), options)?;
    let refused =
        || Error::unsupported(format!("Format '{}' has no internal snapshots", image.driver().name));
    image.quiesced(|format| {
        let snapshots = format.snapshots();
        if listing {
            let list = snapshots.map(|s| s.list()).unwrap_or_default();
            if !list.is_empty() {
                print!("{}", text::snapshots(&list));
            }
            return Ok(());
        }
        let snapshots = snapshots.ok_or_else(refused)?;
        if let Some(name) = &a.create {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            return snapshots
                .create(SnapshotInfo {
                    name: name.clone(),
                    date_sec: now.as_secs() as u32,
                    date_nsec: now.subsec_nanos(),
                    icount: Some(0),
                    ..Default::default()
                })
                .map_err(|e| e.context(format!("Could not create snapshot '{name}'")));
        }
        if let Some(name) = &a.apply {
            return snapshots.apply(name).map_err(|e| match e {
                Error::NotFound(_) => Error::NotFound(format!(
                    "Could not apply snapshot '{name}': Failed to load snapshot: No such file or directory"
                )),
                e => e.context(format!("Could not apply snapshot '{name}'")),
            });
        }
        if let Some(name) = &a.delete {
            return snapshots.delete(name).map_err(|e| match e {
                Error::NotFound(_) => {
                    Error::NotFound(format!("Could not delete snapshot '{name}': snapshot not found"))
                }
                e => e.context(format!("Could not delete snapshot '{name}'")),
            });
        }
        Ok(())
    })?;
    Ok(image.close()?)
}
