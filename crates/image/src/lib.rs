//! The image tool on the block layer: `kvasir image ...`, and the same program called as `qemu-img`, `qemu-io` or `qemu-nbd`.

mod args;
mod commands;
mod copy;
mod json;
mod localtime;
mod objects;
mod overlay;
mod progress;
mod signals;
mod text;

use std::{ffi::OsString, process::ExitCode};

/// Under which name the tool runs: it decides the command line's shape and how messages begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Personality {
    /// `kvasir image`.
    Kvasir,
    /// `qemu-img`.
    QemuImg,
    /// `qemu-nbd`.
    QemuNbd,
    /// `qemu-io`.
    QemuIo,
}

impl Personality {
    /// The name that begins every message.
    pub fn program(self) -> &'static str {
        match self {
            Personality::Kvasir => "kvasir image",
            Personality::QemuImg => "qemu-img",
            Personality::QemuNbd => "qemu-nbd",
            Personality::QemuIo => "qemu-io",
        }
    }
}

/// Runs the tool. `args` begin with the program's name.
pub fn main(args: impl Iterator<Item = OsString>, personality: Personality) -> ExitCode {
    match personality {
        Personality::Kvasir | Personality::QemuImg => commands::run(args, personality),
        Personality::QemuIo => commands::io::run(args),
        Personality::QemuNbd => commands::serve::run_qemu_nbd(args),
    }
}
