//! The image tool on its own, named by how it is called: `qemu-img`, `qemu-io`, or anything else for `kvasir image`.

use image::Personality;
use std::{path::Path, process::ExitCode};

fn main() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    let personality = match Path::new(&name).file_name().and_then(|n| n.to_str()) {
        Some("qemu-img") => Personality::QemuImg,
        Some("qemu-io") => Personality::QemuIo,
        Some("qemu-nbd") => Personality::QemuNbd,
        _ => Personality::Kvasir,
    };
    image::main(std::env::args_os(), personality)
}
