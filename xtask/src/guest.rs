//! The test guest: an unmodified Debian cloud kernel and an initramfs of busybox and one script.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::apt::Package;
use crate::modules::{self, Modules};
use crate::{cpio, kernel, paths, stress};

/// Raised when this file changes in a way that existing caches do not show.
const FORMAT: u32 = 1;

/// Drivers in the initramfs; the init script loads those whose device is there.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "virtio_scsi",
    "vmw_vsock_virtio_transport",
    "sd_mod",
    "sr_mod",
    "ata_piix",
    "nvme",
    "evdev",
    "button",
];

#[derive(clap::Args)]
pub struct Options {
    /// Also write initramfs.cpio.gz
    #[arg(long)]
    gzip: bool,
    /// Prepare again even if what is there is current
    #[arg(long)]
    force: bool,
}

/// The files of a prepared guest.
pub struct Guest {
    pub directory: PathBuf,
}

impl Guest {
    /// The kernel as packaged: a compressed image with a setup header.
    pub fn bzimage(&self) -> PathBuf {
        self.directory.join("bzImage")
    }

    /// The same kernel uncompressed: an ELF file with a PVH entry note.
    pub fn vmlinux(&self) -> PathBuf {
        self.directory.join("vmlinux")
    }

    /// The initramfs, not compressed.
    pub fn initramfs(&self) -> PathBuf {
        self.directory.join("initramfs.cpio")
    }

    /// Beside the initramfs, the program that loads disks.
    pub fn diskload(&self) -> PathBuf {
        self.directory.join("diskload.cpio")
    }

    /// The kernel's build configuration.
    pub fn config(&self) -> PathBuf {
        self.directory.join("config")
    }

    fn is_complete(&self) -> bool {
        [self.bzimage(), self.vmlinux(), self.initramfs(), self.diskload(), self.config()]
            .iter()
            .all(|file| file.is_file())
    }
}

pub fn task(options: &Options) -> Result<ExitCode> {
    let guest = prepare(options.force)?;
    stress::prepare(&guest)?;
    if options.gzip {
        let plain = std::fs::read(guest.initramfs())?;
        let packed = guest.directory.join("initramfs.cpio.gz");
        paths::write_atomically(&packed, &compress(&plain)?)?;
    }
    println!("{}", guest.directory.display());
    Ok(ExitCode::SUCCESS)
}

fn compress(data: &[u8]) -> Result<Vec<u8>> {
    let input = tempfile_with(data)?;
    let output = std::process::Command::new("gzip").args(["-9nc"]).stdin(input).output();
    let output = output.context("gzip: cannot run; install it")?;
    if !output.status.success() {
        bail!("gzip: {}", output.status);
    }
    Ok(output.stdout)
}

/// An open, unnamed file that holds the data, positioned at its start.
fn tempfile_with(data: &[u8]) -> Result<std::fs::File> {
    use std::io::{Seek, Write};
    let file = rustix::fs::memfd_create("initramfs", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(file);
    file.write_all(data)?;
    file.rewind()?;
    Ok(file)
}

/// Makes sure the guest is in the cache, and current.
pub fn prepare(force: bool) -> Result<Guest> {
    let _lock = paths::lock_cache()?;
    let guest = Guest { directory: paths::cache()?.join("guest") };
    let stamp = guest.directory.join("stamp");
    let have = std::fs::read_to_string(&stamp).ok().filter(|_| guest.is_complete() && !force);

    let init = paths::workspace().join("lab/guest/init");
    let init = std::fs::read(&init).with_context(|| init.display().to_string())?;
    let load = paths::workspace().join("lab/guest/diskload.c");
    let load = std::fs::read(&load).with_context(|| load.display().to_string())?;
    let Some(meta) = Package::find("linux-image-cloud-amd64")? else {
        if have.is_some() {
            eprintln!("xtask: no package lists; using the guest prepared earlier");
            return Ok(guest);
        }
        bail!("no Debian package lists to get the guest's kernel from; as root, run: apt-get update");
    };
    let image = meta.behind("linux-image-")?;
    let busybox = Package::require("busybox-static")?;
    let want = format!(
        "format {FORMAT}\n{}\n{}\ninit {:016x}\ndiskload {:016x}\nmodules {}\n",
        image.label(),
        busybox.label(),
        fnv1a(&init),
        fnv1a(&load),
        MODULES.join(" ")
    );
    if have.as_deref() == Some(&want) {
        return Ok(guest);
    }
    eprintln!("xtask: preparing the test guest ({} {})", image.name, image.version);
    std::fs::create_dir_all(&guest.directory).with_context(|| guest.directory.display().to_string())?;
    if stamp.exists() {
        std::fs::remove_file(&stamp)?;
    }
    let image = image.unpacked()?;
    install_kernel(&guest, &image)?;
    let initramfs = initramfs(&init, &busybox_program(&busybox)?, &Modules::open(&image)?)?;
    paths::write_atomically(&guest.initramfs(), &initramfs)?;
    let mut archive = cpio::Archive::new();
    archive.file("/bin/diskload", 0o755, &diskload(&guest.directory)?)?;
    paths::write_atomically(&guest.diskload(), &archive.finish()?)?;
    paths::write_atomically(&stamp, want.as_bytes())?;
    Ok(guest)
}

/// The busybox program inside its package.
pub fn busybox_program(package: &Package) -> Result<PathBuf> {
    let tree = package.unpacked()?;
    let candidates = ["bin/busybox", "usr/bin/busybox"].map(|path| tree.join(path));
    let found = candidates.into_iter().find(|path| path.is_file());
    found.with_context(|| format!("{}: no busybox program in it", package.label()))
}

/// The kernel image in an unpacked kernel package.
pub fn vmlinuz(package: &Path) -> Result<PathBuf> {
    boot_file(package, "vmlinuz-")
}

fn boot_file(package: &Path, prefix: &str) -> Result<PathBuf> {
    let boot = package.join("boot");
    for entry in std::fs::read_dir(&boot).with_context(|| boot.display().to_string())? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    bail!("{}: no file {prefix}*", boot.display())
}

fn install_kernel(guest: &Guest, package: &Path) -> Result<()> {
    let path = vmlinuz(package)?;
    let image = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let kernel = kernel::extract(&image).with_context(|| path.display().to_string())?;
    paths::write_atomically(&guest.vmlinux(), &kernel)?;
    paths::write_atomically(&guest.bzimage(), &image)?;
    let config = boot_file(package, "config-")?;
    let config = std::fs::read(&config).with_context(|| config.display().to_string())?;
    paths::write_atomically(&guest.config(), &config)
}

fn initramfs(init: &[u8], busybox: &Path, available: &Modules) -> Result<Vec<u8>> {
    let mut archive = cpio::Archive::new();
    for directory in ["/dev", "/proc", "/sys", "/tmp", "/root", "/run", "/mnt"] {
        archive.directory(directory)?;
    }
    // The kernel opens the console before the script can mount a file system with device nodes.
    archive.character_device("/dev/console", 5, 1)?;
    archive.character_device("/dev/null", 1, 3)?;
    archive.file("/init", 0o755, init)?;
    archive.copy(busybox, "/bin/busybox")?;
    let modules = available.with_dependencies(MODULES)?;
    modules::install(&mut archive, available.release(), &modules)?;
    archive.finish()
}

/// The program that loads disks, for measurements.
fn diskload(directory: &Path) -> Result<Vec<u8>> {
    let source = paths::workspace().join("lab/guest/diskload.c");
    let program = directory.join(format!("diskload.{}", std::process::id()));
    let mut cc = std::process::Command::new("cc");
    let status = cc.args(["-Os", "-s", "-static", "-o"]).arg(&program).arg(&source).status();
    if !status.context("cc: cannot run; install gcc")?.success() {
        bail!("{}: does not compile", source.display());
    }
    let bytes = std::fs::read(&program).with_context(|| program.display().to_string());
    std::fs::remove_file(&program)?;
    bytes
}

/// The FNV-1a hash: tells whether a file changed.
pub fn fnv1a(data: &[u8]) -> u64 {
    data.iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_of_known_strings() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
    }
}
