//! A writer for initramfs images: the "newc" cpio format of the Linux kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`.
//!
//! Writing the archive here rather than with `cpio` needs neither that program nor root for device nodes, and gives
//! the same bytes for the same input.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// An initramfs under construction. Paths are absolute; parent directories appear by themselves.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
    names: BTreeSet<String>,
}

impl Archive {
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether an entry of this absolute path is there already.
    pub fn contains(&self, path: &str) -> bool {
        self.names.contains(path.trim_start_matches('/'))
    }

    /// Adds a directory, and those above it, unless already there.
    pub fn directory(&mut self, path: &str) -> Result<()> {
        let name = path.trim_matches('/');
        if name.is_empty() || self.contains(name) {
            return Ok(());
        }
        self.parents(name)?;
        self.entry(name, S_IFDIR | 0o755, (0, 0), &[])
    }

    /// Adds a regular file. `mode` holds the permission bits.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.leaf(path, S_IFREG | (mode & 0o7777), (0, 0), data)
    }

    /// Adds a file of this machine, with its contents and whether it may be executed.
    pub fn copy(&mut self, from: &Path, path: &str) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let data = std::fs::read(from).with_context(|| from.display().to_string())?;
        let mode = std::fs::metadata(from).with_context(|| from.display().to_string())?.permissions().mode();
        self.file(path, if mode & 0o111 != 0 { 0o755 } else { 0o644 }, &data)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.leaf(path, S_IFLNK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device node.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        self.leaf(path, S_IFCHR | 0o600, (major, minor), &[])
    }

    /// Ends the archive. Archives may follow one another: the kernel unpacks them all.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.header("TRAILER!!!", 0, (0, 0), 0)?;
        self.pad();
        Ok(self.bytes)
    }

    fn leaf(&mut self, path: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        let name = path.trim_matches('/');
        ensure!(!name.is_empty(), "{path:?}: not a path inside an initramfs");
        if self.contains(name) {
            bail!("/{name}: added to the initramfs twice");
        }
        self.parents(name)?;
        self.entry(name, mode, device, data)
    }

    fn parents(&mut self, name: &str) -> Result<()> {
        match name.rsplit_once('/') {
            Some((parent, _)) => self.directory(parent),
            None => Ok(()),
        }
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        let size =
            u32::try_from(data.len()).with_context(|| format!("/{name}: too large for an initramfs"))?;
        self.inode += 1;
        self.header(name, mode, device, size)?;
        self.bytes.extend_from_slice(data);
        self.pad();
        self.names.insert(name.to_owned());
        Ok(())
    }

    fn header(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), size: u32) -> Result<()> {
        let name_size = u32::try_from(name.len() + 1).context("name too long")?;
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        let (owner, time, file_device, check) = (0, 0, 0, 0);
        let fields = [
            self.inode,
            mode,
            owner,
            owner,
            links,
            time,
            size,
            file_device,
            file_device,
            major,
            minor,
            name_size,
            check,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sample() -> Archive {
        let mut archive = Archive::new();
        archive.file("/sbin/deep/init", 0o755, b"hello").expect("file");
        archive.symlink("/init", "sbin/deep/init").expect("link");
        archive.character_device("/dev/console", 5, 1).expect("node");
        archive.directory("/dev").expect("directory");
        archive
    }

    #[test]
    fn layout_is_newc() {
        let bytes = sample().finish().expect("archive");
        assert_eq!(bytes.len() % 4, 0);
        let first = std::str::from_utf8(&bytes[..110]).expect("text header");
        assert_eq!(&first[..14], "07070100000001");
        assert_eq!(&first[14..22], "000041ed", "a directory comes first: the parent");
        assert_eq!(&bytes[110..115], b"sbin\0");
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 7, "sbin sbin/deep init link dev console trailer");
        assert!(text.contains("TRAILER!!!"));
    }

    #[test]
    fn the_same_name_twice_is_refused() {
        let mut archive = sample();
        assert!(archive.file("/init", 0o644, b"").is_err());
        assert!(archive.file("/", 0o644, b"").is_err());
    }

    /// `busybox cpio` or `cpio`, where there is one, must list what was put in.
    #[test]
    fn another_program_reads_it() {
        use std::io::Write;
        let bytes = sample().finish().expect("archive");
        let child = Command::new("cpio").arg("-itv").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut child) = child else { return };
        child.stdin.take().expect("pipe").write_all(&bytes).expect("write");
        let listing = child.wait_with_output().expect("listing").stdout;
        let listing = String::from_utf8_lossy(&listing);
        assert!(listing.contains("init -> sbin/deep/init"), "{listing}");
        assert!(
            listing.lines().any(|line| line.starts_with("crw-------") && line.contains("5,   1")),
            "{listing}"
        );
    }
}
