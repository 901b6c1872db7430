//! Developer tasks, run as `cargo xtask <task>`.
//!
//! Everything these tasks prepare lives outside the source tree, in the cache directory (see [`paths`]).

mod apt;
mod bench;
mod cpio;
mod elf;
mod guest;
mod kernel;
mod lab;
mod modules;
mod paths;
mod qemu;
mod stopwatch;
mod stress;
mod tiny;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "xtask", bin_name = "cargo xtask", about = "Developer tasks of Kvasir")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Prepare the test guest (kernel and initramfs) in the cache directory
    Guest(guest::Options),
    /// Run scenarios on real KVM: in the lab host, or directly on a host that has hardware virtualization
    Lab(lab::Options),
    /// Measure, and print the rows of docs/performance.md
    Bench(bench::Options),
    /// Fetch the newest of QEMU's disk image tools, and print their directory, for KVASIR_QEMU_BIN
    QemuTools,
    /// Run the stress guest on the software CPU and check its results
    Stress(stress::Options),
    /// Start a virtual machine monitor and time it until its guest prints a line (used by the scenarios)
    Stopwatch(stopwatch::Options),
}

fn main() -> Result<ExitCode> {
    match Args::parse().task {
        Task::Guest(options) => guest::task(&options),
        Task::Lab(options) => lab::task(&options),
        Task::Bench(options) => bench::task(&options),
        Task::QemuTools => qemu::task(),
        Task::Stress(options) => stress::task(&options),
        Task::Stopwatch(options) => stopwatch::task(&options),
    }
}
