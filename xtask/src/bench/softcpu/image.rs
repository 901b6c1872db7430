//! The programs of the comparison: built from `lab/speed` and taken from Debian packages, in one tree that runs on this
//! machine (in a chroot) and, packed into an initramfs, in the guests.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::apt::Package;
use crate::{cpio, guest, paths};

/// Packages that the tree is made of.
const PACKAGES: &[&str] = &[
    "7zip",
    "gzip",
    "openssl",
    "libssl3",
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libexpat1",
    "zlib1g",
    "libgcc-s1",
    "libstdc++6",
    "libc6",
];

/// What of them nobody needs here.
const LEFT_OUT: &[&str] = &["usr/share", "usr/lib/x86_64-linux-gnu/gconv", "etc", "var", "sbin", "usr/sbin"];

/// Sources of the measuring program.
const SOURCES: &[&str] =
    &["main.c", "integer.c", "calls.c", "float.c", "memory.c", "system.c", "patch.c", "disk.c"];

/// Size of the disk that is read, MiB.
const DISK: u64 = 128;

/// Everything the runs need.
pub struct Image {
    /// The tree, for a chroot.
    pub root: PathBuf,
    /// Test guest's initramfs followed by the tree.
    pub initramfs: PathBuf,
    /// A raw disk full of noise, in memory where there is a file system for that.
    pub disk: PathBuf,
    /// The test guest as it is.
    pub guest: guest::Guest,
}

/// Builds what is missing or old.
pub fn prepare() -> Result<Image> {
    let guest = guest::prepare(false)?;
    let _lock = paths::lock_cache()?;
    let directory = paths::cache()?.join("speed");
    std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let image = Image {
        root: directory.join("root"),
        initramfs: directory.join("initramfs.cpio"),
        disk: disk(&directory)?,
        guest,
    };
    let packages = PACKAGES.iter().map(|name| Package::require(name)).collect::<Result<Vec<_>>>()?;
    let busybox = Package::require("busybox-static")?;
    let base = std::fs::read(image.guest.initramfs())?;
    let stamp = directory.join("stamp");
    let want = stamp_of(&packages, &base)?;
    let current = std::fs::read_to_string(&stamp).is_ok_and(|have| have == want);
    if current && image.initramfs.is_file() && image.root.is_dir() {
        return Ok(image);
    }
    eprintln!("xtask: preparing the programs of the speed comparison");
    if image.root.exists() {
        std::fs::remove_dir_all(&image.root).with_context(|| image.root.display().to_string())?;
    }
    for package in &packages {
        copy_tree(&package.unpacked()?, &image.root, Path::new(""))?;
    }
    for mount in ["dev", "proc", "sys", "tmp"] {
        std::fs::create_dir_all(image.root.join(mount))?;
    }
    copy_file(&guest::busybox_program(&busybox)?, &image.root.join("bin/busybox"))?;
    for applet in ["sh", "awk"] {
        std::os::unix::fs::symlink("busybox", image.root.join("bin").join(applet))?;
    }
    programs(&image.root)?;
    let mut archive = cpio::Archive::new();
    pack(&mut archive, &image.root, Path::new(""))?;
    // The kernel unpacks one archive after the other.
    let bytes = [base, archive.finish()?].concat();
    paths::write_atomically(&image.initramfs, &bytes)?;
    paths::write_atomically(&stamp, want.as_bytes())?;
    Ok(image)
}

/// What the tree depends on.
fn stamp_of(packages: &[Package], base: &[u8]) -> Result<String> {
    let mut text = format!("base {:016x}\n", guest::fnv1a(base));
    for package in packages {
        text += &format!("{}\n", package.label());
    }
    let mut names: Vec<_> = std::fs::read_dir(sources())?.collect::<std::io::Result<Vec<_>>>()?;
    names.sort_by_key(std::fs::DirEntry::file_name);
    for entry in names {
        let data = std::fs::read(entry.path())?;
        text += &format!("{} {:016x}\n", entry.file_name().to_string_lossy(), guest::fnv1a(&data));
    }
    text += &format!("{:016x}\n", guest::fnv1a(include_bytes!("image.rs")));
    Ok(text)
}

fn sources() -> PathBuf {
    paths::workspace().join("lab/speed")
}

/// A file of noise: a disk that cannot be read by not reading it.
fn disk(directory: &Path) -> Result<PathBuf> {
    let shared = Path::new("/dev/shm");
    let user = rustix::process::getuid().as_raw();
    let path = if shared.is_dir() {
        shared.join(format!("kvasir-speed-{user}.raw"))
    } else {
        directory.join("disk.raw")
    };
    if std::fs::metadata(&path).is_ok_and(|have| have.len() == DISK << 20) {
        return Ok(path);
    }
    let mut state = 88_172_645_463_325_252u64;
    let mut bytes = Vec::with_capacity((DISK << 20) as usize);
    while bytes.len() < (DISK << 20) as usize {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    paths::write_atomically(&path, &bytes)?;
    Ok(path)
}

fn is_left_out(path: &Path) -> bool {
    LEFT_OUT.iter().any(|prefix| path.starts_with(prefix))
}

/// Copies a tree over another, without the parts left out.
fn copy_tree(from: &Path, to: &Path, below: &Path) -> Result<()> {
    let source = from.join(below);
    std::fs::create_dir_all(to.join(below))?;
    for entry in std::fs::read_dir(&source).with_context(|| source.display().to_string())? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        let kind = entry.file_type()?;
        if is_left_out(&path) {
            continue;
        }
        let target = to.join(&path);
        if kind.is_dir() {
            copy_tree(from, to, &path)?;
        } else if kind.is_symlink() {
            let text = std::fs::read_link(entry.path())?;
            if target.symlink_metadata().is_err() {
                std::os::unix::fs::symlink(text, &target).with_context(|| target.display().to_string())?;
            }
        } else {
            copy_file(&entry.path(), &target)?;
        }
    }
    Ok(())
}

fn copy_file(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::copy(from, to).map(drop).with_context(|| format!("{} to {}", from.display(), to.display()))
}

/// Builds the measuring program and the data it works on.
fn programs(root: &Path) -> Result<()> {
    let directory = root.join("speed");
    std::fs::create_dir_all(&directory)?;
    for file in ["row", "init", "loop.py"] {
        copy_file(&sources().join(file), &directory.join(file))?;
    }
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-static", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-s", "-o"]);
    gcc.arg(directory.join("speed")).args(SOURCES).arg("-lm").current_dir(sources());
    let status = gcc.status().context("gcc: cannot run; install gcc and libc6-dev")?;
    ensure!(status.success(), "lab/speed: does not compile");
    let library = root.join("usr/lib/x86_64-linux-gnu/libcrypto.so.3");
    let mut data = std::fs::read(&library).with_context(|| library.display().to_string())?;
    data.truncate(2 << 20);
    std::fs::write(directory.join("data"), data)?;
    for (name, command) in [
        ("data.gz", &["/bin/gzip", "-6", "-n", "-c", "/speed/data"][..]),
        ("data.xz", &["/usr/bin/7zz", "a", "-txz", "-mx=1", "-mmt=1", "-bd", "-so", "x", "/speed/data"][..]),
    ] {
        let path = directory.join(name);
        let file = std::fs::File::create(&path).with_context(|| path.display().to_string())?;
        let status = chroot(root, command).stdout(file).stderr(Stdio::null()).status();
        ensure!(status.context("unshare: cannot run")?.success(), "{}: cannot make it", path.display());
    }
    Ok(())
}

/// A command inside the tree, with the system's devices and a temporary directory of its own.
pub fn chroot(root: &Path, command: &[&str]) -> Command {
    const INSIDE: &str =
        "mount --rbind /dev \"$0/dev\" && mount -t tmpfs tmpfs \"$0/tmp\" && exec chroot \"$0\" \"$@\"";
    let mut unshare = Command::new("unshare");
    if !rustix::process::getuid().is_root() {
        unshare.args(["--user", "--map-root-user"]);
    }
    unshare.args(["--mount", "sh", "-c", INSIDE]).arg(root).args(command);
    unshare.stdin(Stdio::null());
    unshare
}

/// Adds a tree to an initramfs.
fn pack(archive: &mut cpio::Archive, root: &Path, below: &Path) -> Result<()> {
    let mut entries = std::fs::read_dir(root.join(below))?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = below.join(entry.file_name());
        let name = format!("/{}", path.display());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            archive.directory(&name)?;
            pack(archive, root, &path)?;
        } else if kind.is_symlink() {
            archive.symlink(&name, &std::fs::read_link(entry.path())?.to_string_lossy())?;
        } else {
            archive.copy(&entry.path(), &name)?;
        }
    }
    Ok(())
}
