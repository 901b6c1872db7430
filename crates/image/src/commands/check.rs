//! `check`.

use super::{Context, Failure, Outcome};
use crate::{
    args::{self, Output, Source},
    json,
};
use block::{
    Error, OpenOptions,
    formats::{CheckReport, Repair},
};
use serde_json::{Map, Value};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    /// Print nothing but errors.
    #[arg(short, long)]
    quiet: bool,
    /// Format.
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Output format.
    #[arg(long, value_enum, default_value = "human")]
    output: Output,
    /// Repair leaks, or all.
    #[arg(short, long, value_name = "leaks|all")]
    repair: Option<String>,
    /// Cache mode of the image.
    #[arg(short = 'T', long = "source-cache", value_name = "CACHE")]
    cache: Option<String>,
    /// Image.
    filename: String,
}

fn print_json(report: &CheckReport, name: &str, format: &str) {
    let mut out = Map::new();
    let mut put = |key: &str, value: Value| drop(out.insert(key.into(), value));
    put("filename", name.into());
    put("format", format.into());
    put("check-errors", report.check_errors.into());
    for (key, value) in [
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("image-end-offset", report.image_end_offset.unwrap_or(0)),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ] {
        if value != 0 {
            put(key, value.into());
        }
    }
    println!("{}", json::pretty(&out.into()));
}

fn print_human(report: &CheckReport) {
    let r = report;
    if r.corruptions == 0 && r.leaks == 0 && r.check_errors == 0 {
        println!("No errors were found on the image.");
    } else {
        if r.corruptions > 0 {
            println!(
                "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.",
                r.corruptions
            );
        }
        if r.leaks > 0 {
            println!(
                "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.",
                r.leaks
            );
        }
        if r.check_errors > 0 {
            println!("\n{} internal errors have occurred during the check.", r.check_errors);
        }
    }
    if r.total_clusters != 0 && r.allocated_clusters != 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        println!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            r.allocated_clusters,
            r.total_clusters,
            percent(r.allocated_clusters, r.total_clusters),
            percent(r.fragmented_clusters, r.allocated_clusters),
            percent(r.compressed_clusters, r.allocated_clusters)
        );
    }
    if let Some(end) = r.image_end_offset {
        println!("Image end offset: {end}");
    }
}

pub(crate) fn run(a: Args, context: &Context) -> Outcome {
    let repair = match a.repair.as_deref() {
        None => Repair::None,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(_) => return Err(Error::usage("--repair/-r expects 'leaks' or 'all'").into()),
    };
    let options = OpenOptions {
        read_only: repair == Repair::None,
        for_check: true,
        no_backing: true,
        cache: args::cache(a.cache.as_deref(), "writeback")?,
        ..Default::default()
    };
    let image = a.source.open(&a.filename, a.format.as_deref(), options)?;
    let mut report = match image.quiesced(|f| f.check(repair)) {
        Ok(report) => report,
        Err(Error::Unsupported(why)) => {
            eprintln!("{}: {why}", context.personality.program());
            return Err(Failure::Status(63));
        }
        Err(e) => return Err(e.context("Check failed").into()),
    };
    if a.output == Output::Human {
        report.messages.iter().for_each(|m| eprintln!("{m}"));
    }
    let fixed = (report.leaks_fixed, report.corruptions_fixed);
    if fixed != (0, 0) {
        if a.output == Output::Human && !a.quiet {
            println!(
                "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
                 Double checking the fixed image now...",
                fixed.0, fixed.1
            );
        }
        report = image.quiesced(|f| f.check(Repair::None))?;
        (report.leaks_fixed, report.corruptions_fixed) = fixed;
    }
    // QEMU tells it for these two alone.
    report.image_end_offset =
        report.image_end_offset.filter(|_| matches!(image.driver().name, "qcow2" | "parallels"));
    image.close()?;
    if !a.quiet {
        match a.output {
            Output::Human => print_human(&report),
            Output::Json => print_json(&report, &a.filename, image.driver().name),
        }
    }
    match () {
        () if report.corruptions > 0 => Err(Failure::Status(2)),
        () if report.leaks > 0 => Err(Failure::Status(3)),
        () if report.check_errors > 0 => Err(Failure::Status(1)),
        () => Ok(()),
    }
}
