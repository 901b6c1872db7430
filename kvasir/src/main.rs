//! The `kvasir` program: dispatch only. Called by the name of one of QEMU's tools (through a link), it is that tool.

use image::Personality;
use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_else(|| "kvasir".into());
    let personality = match Path::new(&name).file_name().and_then(OsStr::to_str) {
        Some("qemu-img") => Some(Personality::QemuImg),
        Some("qemu-nbd") => Some(Personality::QemuNbd),
        Some("qemu-io") => Some(Personality::QemuIo),
        _ => None,
    };
    if let Some(personality) = personality {
        return image::main(std::iter::once(name).chain(args), personality);
    }
    let mut rest = args.peekable();
    if rest.peek().is_some_and(|first| first == "image") {
        return image::main(rest, Personality::Kvasir);
    }
    cli::main(std::iter::once(name).chain(rest))
}
