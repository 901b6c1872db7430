//! QEMU's disk image tools to compare with: those of `$KVASIR_QEMU_BIN`, or the newest that the package lists offer, or those
//! that are installed.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::apt::Package;

/// The directory with `qemu-img`, `qemu-nbd` and `qemu-io`.
pub fn tools() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("KVASIR_QEMU_BIN") {
        return Ok(dir.into());
    }
    // Backports are newer than what a stable release installs; they need no other libraries than it has.
    if let Some(package) = Package::find_newest("qemu-utils")? {
        let dir = package.unpacked()?.join("usr/bin");
        if Command::new(dir.join("qemu-img")).arg("--version").output().is_ok_and(|o| o.status.success()) {
            return Ok(dir);
        }
    }
    let path = std::env::var_os("PATH").context("PATH is not set")?;
    match std::env::split_paths(&path).find(|dir| dir.join("qemu-img").is_file()) {
        Some(dir) => Ok(dir),
        None => bail!("qemu-img: not found; as root, run: apt-get install qemu-utils"),
    }
}

/// Prints the directory, for `KVASIR_QEMU_BIN=$(cargo xtask qemu-tools)`.
pub fn task() -> Result<ExitCode> {
    println!("{}", tools()?.display());
    Ok(ExitCode::SUCCESS)
}
