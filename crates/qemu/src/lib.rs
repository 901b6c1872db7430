//! QEMU's front door: its command line, translated into the blueprint and nothing else.
//!
//! - `options`: the table of options; one row each, those that are known but not supported among them.
//! - `command`: what the options say, gathered.
//! - `translate`: from there to the blueprint.
//! - `run`: the machine, its monitors, and the program's end.

mod command;
mod daemon;
mod drives;
mod help;
mod introspect;
mod network;
mod options;
mod readconfig;
mod run;
mod translate;

pub use command::Command;
pub use translate::Plan;

use std::ffi::OsString;
use std::process::ExitCode;

/// A command line that cannot be obeyed: what, where, what to do instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(pub String);

impl Error {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl From<base::props::PropError> for Error {
    fn from(e: base::props::PropError) -> Self {
        Self(e.to_string())
    }
}

impl From<machine::Error> for Error {
    fn from(e: machine::Error) -> Self {
        Self(e.to_string())
    }
}

impl From<chardev::Error> for Error {
    fn from(e: chardev::Error) -> Self {
        Self(e.to_string())
    }
}

impl From<devices::CreateError> for Error {
    fn from(e: devices::CreateError) -> Self {
        Self(e.to_string())
    }
}

/// Result of reading a command line.
pub type Result<T> = std::result::Result<T, Error>;

/// Runs `qemu-system-x86_64` with these arguments, the program's name first.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let mut args = args.map(|a| a.to_string_lossy().into_owned());
    let program = args.next().unwrap_or_else(|| "qemu-system-x86_64".into());
    let program = program.rsplit('/').next().unwrap_or_default().to_owned();
    let args: Vec<String> = args.collect();
    match run::main(&program, &args) {
        Ok(status) => ExitCode::from(status),
        Err(e) => {
            eprintln!("{program}: {e}");
            ExitCode::from(1)
        }
    }
}

/// Reads a command line, without running anything; for tests and tools.
///
/// # Errors
/// The first option that is wrong.
pub fn parse(args: &[&str]) -> Result<Plan> {
    let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
    translate::plan(Command::read(&args)?)
}
