//! Measurements whose results stand in `docs/performance.md`.

mod boot;
mod image;
mod resources;
mod softcpu;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

#[derive(clap::Args)]
pub struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Boot on the software CPU beside QEMU's TCG: time, start-up, memory
    Boot(boot::Options),
    /// Many kinds of work on the software CPU beside QEMU's TCG and this machine itself
    Softcpu(softcpu::Options),
    /// The image tool beside QEMU's: converting, checking, mapping, comparing, start-up, NBD
    Image(image::Options),
}

pub fn task(options: &Options) -> Result<ExitCode> {
    match &options.what {
        What::Boot(options) => boot::task(options),
        What::Softcpu(options) => softcpu::task(options),
        What::Image(options) => image::task(options),
    }
}
