//! The subcommands: one file each, with its options and its function, and one line in the table below.

use crate::Personality;
use block::Error;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::{ffi::OsString, process::ExitCode};

/// What a command needs besides its own options.
pub(crate) struct Context {
    pub(crate) personality: Personality,
}

/// How a command failed.
pub(crate) enum Failure {
    /// A message, and exit status 1.
    Error(Error),
    /// A status with no message, or one that is printed already.
    Status(u8),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Error(error)
    }
}

/// Result of a command.
pub(crate) type Outcome = Result<(), Failure>;

macro_rules! commands {
    ($($(#[doc = $doc:literal])* $name:ident => $module:ident),* $(,)?) => {
        $(pub(crate) mod $module;)*

        #[derive(Subcommand)]
        enum Command {
            $($(#[doc = $doc])* $name($module::Args),)*
        }

        /// Parses a command line whose first word is a command, without building the others: most of the time of a short
        /// command would go into that. `None` if it is none.
        fn parse_one(name: &str, program: &'static str, args: &[OsString]) -> Option<Result<Command, clap::Error>> {
            $(if name == stringify!($module) {
                let command =
                    clap::Command::new(stringify!($module)).bin_name(format!("{program} {name}"));
                let command = <$module::Args as clap::Args>::augment_args(command);
                let about = concat!($($doc),*).trim();
                let parsed = command
                    .about(about)
                    .try_get_matches_from(args)
                    .and_then(|m| <$module::Args as FromArgMatches>::from_arg_matches(&m));
                return Some(parsed.map(Command::$name));
            })*
            None
        }

        impl Command {
            fn run(self, context: &Context) -> Outcome {
                match self {
                    $(Command::$name(args) => $module::run(args, context),)*
                }
            }
        }
    };
}

commands! {
    /// Update format-specific options of an image
    Amend => amend,
    /// Time reads or writes
    Bench => bench,
    /// Change the persistent bitmaps of an image
    Bitmap => bitmap,
    /// Check an image for errors
    Check => check,
    /// Write an image's changes to its backing file
    Commit => commit,
    /// See whether two images have the same contents
    Compare => compare,
    /// Copy images to a new one, of any format
    Convert => convert,
    /// Create an image
    Create => create,
    /// Copy blocks from one image to another
    Dd => dd,
    /// Show facts about an image
    Info => info,
    /// Show where an image's data is
    Map => map,
    /// Say how large a new image would get
    Measure => measure,
    /// Change the backing file of an image
    Rebase => rebase,
    /// Change the size of an image
    Resize => resize,
    /// Export an image over NBD
    Serve => serve,
    /// List, take, apply or delete internal snapshots
    Snapshot => snapshot,
}

mod attach;
pub(crate) mod io;

#[derive(Parser)]
#[command(about = "Create, inspect, convert and repair disk images", disable_version_flag = true)]
struct Tool {
    /// Show the version.
    #[arg(short = 'V', long)]
    version: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

/// Runs `qemu-img ...` or `kvasir image ...`.
pub(crate) fn run(args: impl Iterator<Item = OsString>, personality: Personality) -> ExitCode {
    let program = personality.program();
    let args: Vec<OsString> = args.collect();
    let first = args.get(1).and_then(|a| a.to_str()).unwrap_or_default();
    if matches!(first, "-V" | "--version") && args.len() == 2 {
        println!("{program} version {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let parsed = match parse_one(first, program, args.get(1..).unwrap_or_default()) {
        Some(parsed) => parsed.map(|command| Tool { version: false, command: Some(command) }),
        None => {
            let tool = Tool::command().name(program).bin_name(program);
            tool.try_get_matches_from(args).and_then(|m| Tool::from_arg_matches(&m))
        }
    };
    let tool = match parsed {
        Ok(tool) => tool,
        Err(e) if e.use_stderr() => {
            eprint!("{program}: {}", e.to_string().trim_start_matches("error: "));
            return ExitCode::FAILURE;
        }
        Err(e) => {
            print!("{e}");
            return ExitCode::SUCCESS;
        }
    };
    if tool.version {
        println!("{program} version {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let Some(command) = tool.command else {
        eprintln!("{program}: Not enough arguments\nTry '{program} --help' for more information");
        return ExitCode::FAILURE;
    };
    match command.run(&Context { personality }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Error(e)) => {
            eprintln!("{program}: {e}");
            ExitCode::FAILURE
        }
        Err(Failure::Status(code)) => ExitCode::from(code),
    }
}
