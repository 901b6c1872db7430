//! The `kvasir` program: dispatch only. Called by the name of one of QEMU's tools (through a link), it is that tool.

use image::Personality;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_else(|| "kvasir".into());
    let personality = match called(&name) {
        Some("qemu-img") => Some(Personality::QemuImg),
        Some("qemu-nbd") => Some(Personality::QemuNbd),
        Some("qemu-io") => Some(Personality::QemuIo),
        _ => None,
    };
    if let Some(personality) = personality {
        return image::main(std::iter::once(name).chain(args), personality);
    }
    if called(&name) == Some("qemu-system-x86_64") {
        return qemu::main(std::iter::once(name).chain(args));
    }
    let mut rest = args.peekable();
    if rest.peek().is_some_and(|first| first == "qemu") {
        rest.next();
        return qemu::main(std::iter::once("qemu-system-x86_64".into()).chain(rest));
    }
    if rest.peek().is_some_and(|first| first == "image") {
        return image::main(rest, Personality::Kvasir);
    }
    cli::main(std::iter::once(name).chain(rest))
}

/// The last part of the program's name.
fn called(name: &OsString) -> Option<&str> {
    Path::new(name).file_name().and_then(OsStr::to_str)
}
