//! Kvasir's command line.

mod chardev;
mod curses;
mod doctor;
mod net;
mod run;
mod terminal;
mod vms;

use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::process::ExitCode;

/// Exit statuses, the same for every subcommand.
pub mod status {
    /// The host failed.
    pub const HOST: u8 = 1;
    /// Bad usage: arguments, files they name, or a host that lacks what they need.
    pub const USAGE: u8 = 2;
    /// The guest reset itself, and resets end the run (`--no-reboot`).
    pub const GUEST_RESET: u8 = 3;
    /// The guest panicked.
    pub const GUEST_PANIC: u8 = 4;
    /// The accelerator could not go on with the guest.
    pub const BROKEN: u8 = 5;
}

#[derive(Parser)]
#[command(
    name = "kvasir",
    version,
    about = "Virtual machines on KVM, and on a software CPU where there is none"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a virtual machine in this terminal
    Run(Box<run::Args>),
    /// Make a virtual machine and keep it: from Debian's packages, an image, a URL or an ISO
    Create(Box<vms::CreateArgs>),
    /// Start a virtual machine made with 'create'
    Start(vms::StartArgs),
    /// List the virtual machines made with 'create'
    Ls(vms::ListArgs),
    /// Remove virtual machines made with 'create'
    Rm(vms::RemoveArgs),
    /// Work on disk images: create, convert, check, resize, snapshot, serve... ("kvasir image --help")
    // Listed here for the help; the program hands it to the image tool before it comes to this.
    Image,
    /// Say what this host has and lacks for virtualization
    Doctor(doctor::Args),
    /// List networks, and help guests into bridges
    Net(net::Args),
}

/// Runs the command line and returns the exit status.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    init_logs();
    let argv: Vec<OsString> = args.collect();
    let result = match Cli::parse_from(&argv).command {
        Command::Run(args) => match &args.vm {
            // The VM's own arguments come first, so that those given here win.
            Some(vm) => vms::named(vm, argv.get(2..).unwrap_or_default()),
            None => run::main(&args),
        },
        Command::Create(args) => vms::create(&args),
        Command::Start(args) => vms::start(&args),
        Command::Ls(args) => vms::list(&args),
        Command::Rm(args) => vms::remove(&args),
        Command::Image => return image_is_elsewhere(),
        Command::Doctor(args) => doctor::main(&args),
        Command::Net(args) => net::main(&args),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            eprintln!("kvasir: {}", failure.message);
            ExitCode::from(failure.status)
        }
    }
}

/// `image` where a global option stands before it.
fn image_is_elsewhere() -> ExitCode {
    eprintln!("kvasir: 'image' must be the first argument");
    ExitCode::from(status::USAGE)
}

/// A message for the user and the exit status that goes with it.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: u8,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn usage(message: impl ToString) -> Self {
        Self { status: status::USAGE, message: message.to_string() }
    }
}

impl From<machine::Error> for Failure {
    fn from(e: machine::Error) -> Self {
        let status = if e.is_usage() { status::USAGE } else { status::HOST };
        Self { status, message: e.to_string() }
    }
}

impl From<base::props::PropError> for Failure {
    fn from(e: base::props::PropError) -> Self {
        Self::usage(e)
    }
}

/// Logs go to standard error; `KVASIR_LOG` sets the filter (`debug`, `warn,bus=trace`, ...).
fn init_logs() {
    use tracing_subscriber::filter::{LevelFilter, Targets};
    use tracing_subscriber::prelude::*;
    let default = Targets::new().with_default(LevelFilter::WARN);
    let (filter, bad) = match std::env::var("KVASIR_LOG") {
        Ok(text) => match text.parse::<Targets>() {
            Ok(filter) => (filter, None),
            Err(e) => (
                default,
                Some(format!("KVASIR_LOG={text}: {e}; use for example 'debug' or 'warn,bus=trace'")),
            ),
        },
        Err(_) => (default, None),
    };
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).without_time();
    tracing_subscriber::registry().with(layer.with_filter(filter)).init();
    if let Some(text) = bad {
        tracing::warn!("{text}");
    }
}
