//! A bootable Debian disk, made from the packages of the mirror: kernel, systemd, GRUB for BIOS and UEFI, OpenSSH, the
//! guest agent, and a first boot that reads a [`crate::seed`].
//!
//! `mmdebstrap` installs the packages (as root, or in a user namespace), `mke2fs` makes the file system, and
//! [`crate::disk`] the disk.

mod release;
mod run;

pub use release::{RELEASES, Release};

use crate::{Error, Progress, Result, disk};
use block::{Create, Image, OpenOptions, create_image};
use run::{Program, is_root};
use std::fs;
use std::path::{Path, PathBuf};

/// Packages of every disk.
const PACKAGES: &[&str] = &[
    "ca-certificates",
    "cloud-guest-utils",
    "curl",
    "dbus",
    "e2fsprogs",
    "fdisk",
    "grub-efi-amd64-bin",
    "grub-pc-bin",
    "grub2-common",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "linux-image-cloud-amd64",
    "nano",
    "openssh-server",
    "procps",
    "qemu-guest-agent",
    "sudo",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
    "zstd",
];

/// Files put into the root file system before `customize.sh` runs.
const FILES: &[(&str, &str)] = &[
    ("/usr/lib/kvasir/first-boot", include_str!("first-boot.sh")),
    ("/etc/systemd/system/kvasir-first-boot.service", include_str!("first-boot.service")),
    ("/boot/grub/grub.cfg", include_str!("grub.cfg")),
    ("/tmp/customize.sh", include_str!("customize.sh")),
];
/// Changes when a disk made before should not be used any more.
const RECIPE: u32 = 1;

/// How to build a disk.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Mirror of the distribution; `mmdebstrap`'s own default if not given.
    pub mirror: Option<String>,
    /// More packages.
    pub packages: Vec<String>,
}

impl Options {
    /// File name of the disk in the cache: one for each recipe, release and choice of packages.
    fn file_name(&self, release: &Release) -> String {
        use sha2::{Digest, Sha256};
        let mut hash = Sha256::new();
        for text in FILES.iter().map(|f| f.1).chain(PACKAGES.iter().copied()) {
            hash.update(text);
        }
        hash.update(self.packages.join(" "));
        let hash: String = hash.finalize()[..4].iter().map(|b| format!("{b:02x}")).collect();
        format!("debian-{}-{RECIPE}-{hash}.qcow2", release.version)
    }
}

/// The disk of a release in `cache`, built first if it is not there. Several processes may ask at the same time: one
/// builds, the others wait.
///
/// # Errors
/// A missing program (the error names its package), a package that cannot be had, or the host's refusal.
pub fn disk(
    release: &Release,
    options: &Options,
    cache: &Path,
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    fs::create_dir_all(cache).map_err(Error::io(cache))?;
    let path = cache.join(options.file_name(release));
    let lock_path = path.with_extension("lock");
    let lock = fs::File::create(&lock_path).map_err(Error::io(&lock_path))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|e| Error::io(&lock_path)(e.into()))?;
    if !path.exists() {
        build(release, options, &path, cache, progress)?;
    }
    Ok(path)
}

fn build(
    release: &Release,
    options: &Options,
    path: &Path,
    cache: &Path,
    progress: &mut dyn Progress,
) -> Result<()> {
    let mmdebstrap = Program::find("mmdebstrap", "to make a disk from packages", "mmdebstrap")?;
    let mke2fs = Program::find("mke2fs", "to make a disk from packages", "e2fsprogs")?;
    // Beside the result: it needs room for the file system twice, which /tmp may not have.
    let work = tempfile::Builder::new().prefix("building-").tempdir_in(cache).map_err(Error::io(cache))?;
    let at = |name: &str| work.path().join(name);

    progress.step("installing packages");
    let mut command = mmdebstrap.command();
    command.args(["--variant=minbase", "--format=tar"]);
    command.arg(if is_root() { "--mode=root" } else { "--mode=unshare" });
    let packages: Vec<&str> =
        PACKAGES.iter().copied().chain(options.packages.iter().map(String::as_str)).collect();
    command.arg(format!("--include={}", packages.join(",")));
    for dropped in ["man", "locale", "doc", "info"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{dropped}/*"));
    }
    command.arg("--dpkgopt=path-include=/usr/share/doc/*/copyright");
    for (n, (to, text)) in FILES.iter().enumerate() {
        let from = at(&format!("file{n}"));
        fs::write(&from, text).map_err(Error::io(&from))?;
        if let Some(parent) = Path::new(to).parent() {
            command.arg(format!("--customize-hook=mkdir -p \"$1{}\"", parent.display()));
        }
        command.arg(format!("--customize-hook=upload {} {to}", shell_word(&from)?));
    }
    command.arg("--customize-hook=chroot \"$1\" sh /tmp/customize.sh");
    command.arg("--customize-hook=rm \"$1/tmp/customize.sh\"");
    for (from, to) in [
        ("/usr/lib/kvasir/core.img", "core.img"),
        ("/usr/lib/kvasir/grub.efi", "grub.efi"),
        ("/usr/lib/grub/i386-pc/boot.img", "boot.img"),
    ] {
        command.arg(format!("--customize-hook=download {from} {}", shell_word(&at(to))?));
    }
    command.arg(release.suite).arg(at("root.tar"));
    command.args(&options.mirror);
    run::run(command, |line| {
        if let Some(step) = line.strip_prefix("I: ") {
            progress.step(step.trim_end_matches('.'));
        }
    })?;

    progress.step("making the file system");
    let tar_len = fs::metadata(at("root.tar")).map_err(Error::io(at("root.tar")))?.len();
    // Half as much again for the tables of the file system and a first upgrade.
    let root_len = (tar_len * 3 / 2).next_multiple_of(256 << 20).max(1 << 30);
    let script = "set -e; mkdir \"$1/root\"; tar -C \"$1/root\" --numeric-owner --xattrs --xattrs-include='*' -xf \"$1/root.tar\"; rm \"$1/root.tar\"; \
                  \"$2\" -q -F -t ext4 -L kvasir-root -O ^metadata_csum_seed,^orphan_file -E lazy_itable_init=1,nodiscard \
                  -d \"$1/root\" \"$1/root.ext4\" \"$3\"; rm -rf \"$1/root\"";
    let mut command = if is_root() {
        std::process::Command::new("sh")
    } else {
        let mut command = mmdebstrap.command();
        command.args(["--unshare-helper", "sh"]);
        command
    };
    command
        .args(["-c", script, "sh"])
        .arg(work.path())
        .arg(mke2fs.path())
        .arg(format!("{}k", root_len >> 10));
    run::run(command, |_| {})?;

    progress.step("writing the disk");
    let read = |name: &str| fs::read(at(name)).map_err(Error::io(at(name)));
    let parts = disk::Parts {
        root: at("root.ext4"),
        boot_image: read("boot.img")?,
        core_image: read("core.img")?,
        efi_image: read("grub.efi")?,
    };
    let unfinished = at("disk.qcow2");
    let name = unfinished.to_str().ok_or_else(|| {
        Error::Usage(format!("the cache directory {} has a name that is not UTF-8", cache.display()))
    })?;
    let size = disk::disk_size(root_len);
    create_image(&Create {
        size: Some(size),
        name: name.into(),
        format: "qcow2".into(),
        ..Create::default()
    })
    .map_err(Error::image(&unfinished))?;
    let image = Image::open(name, &OpenOptions::writer(Some("qcow2"))).map_err(Error::image(&unfinished))?;
    disk::assemble(&image, &unfinished, &parts, progress)?;
    image.close().map_err(Error::image(&unfinished))?;
    fs::rename(&unfinished, path).map_err(Error::io(path))
}

/// A path that `mmdebstrap`'s own splitting of hooks into words leaves alone.
fn shell_word(path: &Path) -> Result<&str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@%=:".contains(c);
    path.to_str().filter(|p| p.chars().all(plain)).ok_or_else(|| {
        Error::Usage(format!(
            "the cache directory is {}, whose name has spaces or other special characters: set KVASIR_CACHE to another",
            path.display()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_tells_choices_apart() {
        let name = |packages: &[&str]| {
            let packages = packages.iter().map(|p| (*p).to_owned()).collect();
            Options { packages, ..Options::default() }.file_name(&RELEASES[0])
        };
        assert_eq!(name(&[]), name(&[]));
        assert_ne!(name(&[]), name(&["gcc"]));
        assert!(name(&[]).starts_with("debian-12-"), "{}", name(&[]));
    }

    #[test]
    fn odd_directories_are_refused() {
        assert!(shell_word(Path::new("/a b")).unwrap_err().to_string().contains("KVASIR_CACHE"));
        assert_eq!(shell_word(Path::new("/a-b/c.d")).unwrap(), "/a-b/c.d");
    }
}
