//! Programs of this machine, taken into an initramfs together with the shared libraries they need.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cpio::Archive;

/// What QEMU reads at run time to boot a guest with a kernel, or from a disk through its firmware.
const QEMU_DATA: &[&str] = &[
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/seabios/bios-microvm.bin",
    "/usr/share/seabios/vgabios-stdvga.bin",
    "/usr/share/qemu/qboot.rom",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/qemu/multiboot_dma.bin",
    "/usr/share/qemu/pvh.bin",
];

/// Where QEMU is installed by Debian's package.
pub const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Adds a program under `path`, and the libraries it is linked with where the loader looks for them.
pub fn add(archive: &mut Archive, program: &Path, path: &str) -> Result<()> {
    archive.copy(program, path)?;
    for library in libraries(program)? {
        if !archive.contains(&library) {
            archive.copy(Path::new(&library), &library)?;
        }
    }
    Ok(())
}

/// Adds QEMU with the firmware it needs.
pub fn add_qemu(archive: &mut Archive) -> Result<()> {
    ensure!(Path::new(QEMU).is_file(), "{QEMU}: not there; as root, run: apt-get install qemu-system-x86");
    add(archive, Path::new(QEMU), QEMU)?;
    for file in QEMU_DATA {
        archive.copy(Path::new(file), file)?;
    }
    archive.symlink("/usr/share/qemu/bios-microvm.bin", "qboot.rom")
}

/// The libraries, and the loader, that a program is started with.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(program).output().context("ldd: cannot run")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("not a dynamic executable") {
        return Ok(Vec::new());
    }
    ensure!(output.status.success(), "ldd {}: {}", program.display(), said.trim());
    parse_ldd(&text).with_context(|| program.display().to_string())
}

/// Lines are `name => path (address)`, `path (address)` for the loader, and the kernel's own `linux-vdso`.
fn parse_ldd(text: &str) -> Result<Vec<String>> {
    let mut libraries = Vec::new();
    for line in text.lines().map(str::trim) {
        ensure!(!line.ends_with("not found"), "a library is missing: {line}");
        let path =
            line.split_once("=> ").map_or(line, |(_, path)| path).split(" (").next().unwrap_or_default();
        if path.starts_with('/') {
            libraries.push(path.to_owned());
        }
    }
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_ldd() {
        let text = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x2)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x3)\n";
        let found = parse_ldd(text).expect("parses");
        assert_eq!(found, ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert!(parse_ldd("\tlibx.so => not found\n").is_err());
        assert_eq!(parse_ldd("\tstatically linked\n").expect("parses"), Vec::<String>::new());
    }

    #[test]
    fn this_program_has_libraries_that_exist() {
        let own = std::env::current_exe().expect("path");
        assert!(libraries(&own).expect("lists").iter().all(|library| Path::new(library).is_file()));
    }
}
