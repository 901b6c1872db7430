//! Host files and block devices.

use super::{Held, Permissions, Storage, StorageOptions, ZEROS, ZeroFlags, Zeroing, lock};
use crate::{Error, Result};
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::{
    fs::File,
    io::IoSlice,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

/// Alignment that `O_DIRECT` demands of offsets, lengths and memory.
#[derive(Clone, Copy, Debug)]
pub struct DirectAlignment(pub u32);

/// A regular file or block device.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    path: PathBuf,
    block_device: bool,
    direct: Option<DirectAlignment>,
    no_flush: bool,
    discard: bool,
    opened_read_only: bool,
    read_only: AtomicBool,
    locks: Option<Mutex<Permissions>>,
    /// Held over read-modify-write of blocks that `O_DIRECT` cannot write partially.
    unaligned: Mutex<()>,
    no_zero_range: AtomicBool,
    no_punch: AtomicBool,
}

impl FileStorage {
    /// Opens an existing file or block device.
    pub fn open(path: &Path, options: &StorageOptions) -> Result<Self> {
        let name = path.display();
        let mut flags = OFlags::CLOEXEC | OFlags::LARGEFILE;
        flags |= if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        if options.cache.direct {
            flags |= OFlags::DIRECT;
        }
        if options.cache.writethrough {
            flags |= OFlags::DSYNC;
        }
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| match e {
            Errno::INVAL if options.cache.direct => Error::unsupported(format!(
                "Could not open '{name}': filesystem does not support O_DIRECT; use another cache mode"
            )),
            e => Error::io(format!("Could not open '{name}'"), e),
        })?;
        Self::from_file(File::from(fd), path, options)
    }

    /// Creates or truncates a regular file; an existing block device is only opened, and must be large enough.
    pub fn create(path: &Path, size: u64) -> Result<Self> {
        let name = path.display().to_string();
        // Truncating before the locks are held would destroy an image in use.
        let flags = OFlags::CLOEXEC | OFlags::LARGEFILE | OFlags::RDWR | OFlags::CREATE;
        let fd = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644))
            .map_err(|e| Error::io(format!("Could not create '{name}'"), e))?;
        let storage = Self::from_file(File::from(fd), path, &StorageOptions::default())?;
        storage.set_permissions(Permissions {
            used: Permissions::WRITE | Permissions::RESIZE,
            unshared: Permissions::READ | Permissions::WRITE | Permissions::RESIZE,
        })?;
        if storage.block_device {
            let held = storage.size()?;
            if held < size {
                return Err(Error::usage(format!(
                    "The block device '{name}' is {held} bytes, less than {size}"
                )));
            }
        } else {
            storage.set_size(0)?;
            storage.set_size(size)?;
        }
        storage.set_permissions(Permissions::NONE)?;
        Ok(storage)
    }

    fn from_file(file: File, path: &Path, options: &StorageOptions) -> Result<Self> {
        let name = path.display();
        let stat = rustix::fs::fstat(&file).map_err(|e| Error::io(format!("Could not stat '{name}'"), e))?;
        let block_device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => {
                refuse_zoned(stat.st_rdev, &name.to_string())?;
                true
            }
            FileType::Directory => {
                return Err(Error::io(
                    format!("Could not open '{name}'"),
                    std::io::Error::from_raw_os_error(libc::EISDIR),
                ));
            }
            FileType::CharacterDevice => false,
            _ => {
                return Err(Error::usage(format!(
                    "'{name}' is neither a regular file nor a block device; name a file or device"
                )));
            }
        };
        Ok(FileStorage {
            direct: options.cache.direct.then(|| direct_alignment(&file)),
            file,
            path: path.to_owned(),
            block_device,
            no_flush: options.cache.no_flush,
            discard: options.discard,
            opened_read_only: options.read_only,
            read_only: AtomicBool::new(options.read_only),
            locks: (!options.no_locks).then(|| Mutex::new(Permissions::NONE)),
            unaligned: Mutex::new(()),
            no_zero_range: AtomicBool::new(false),
            no_punch: AtomicBool::new(false),
        })
    }

    fn error(&self, what: &str, e: Errno) -> Error {
        Error::io(format!("{what} '{}'", self.path.display()), e)
    }

    fn writable(&self) -> Result<()> {
        if self.read_only() { Err(Error::ReadOnly(self.name())) } else { Ok(()) }
    }

    /// `fallocate`, with "the host cannot" as `Unsupported`.
    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> Result<Zeroing> {
        loop {
            return match rustix::fs::fallocate(&self.file, flags, offset, len) {
                Ok(()) => Ok(Zeroing::Done),
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL | Errno::TXTBSY) => {
                    Ok(Zeroing::Unsupported)
                }
                Err(e) => Err(self.error("Could not allocate space in", e)),
            };
        }
    }

    /// Punches a hole; the size stays.
    fn punch(&self, offset: u64, len: u64) -> Result<Zeroing> {
        if self.no_punch.load(Ordering::Relaxed) {
            return Ok(Zeroing::Unsupported);
        }
        let done = self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)?;
        if done == Zeroing::Unsupported {
            self.no_punch.store(true, Ordering::Relaxed);
        }
        Ok(done)
    }

    fn pread(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        // No file reaches so far; the system call would refuse what its offset type cannot hold.
        if offset > i64::MAX as u64 - buf.len() as u64 {
            buf.fill(0);
            return Ok(());
        }
        while !buf.is_empty() {
            match rustix::io::pread(&self.file, &mut *buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    break;
                }
                Ok(n) => {
                    buf = &mut buf[n..];
                    offset += n as u64;
                    if self.misaligned(offset, buf.len(), buf.as_ptr()) && !buf.is_empty() {
                        // A direct read that stops at no block boundary has met the end.
                        buf.fill(0);
                        break;
                    }
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.error("Could not read from", e)),
            }
        }
        Ok(())
    }

    fn pwrite(&self, mut buf: &[u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            match rustix::io::pwrite(&self.file, buf, offset) {
                Ok(0) => return Err(self.error("Could not write to", Errno::NOSPC)),
                Ok(n) => {
                    buf = &buf[n..];
                    offset += n as u64;
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.error("Could not write to", e)),
            }
        }
        Ok(())
    }

    fn misaligned(&self, offset: u64, len: usize, at: *const u8) -> bool {
        self.direct.is_some_and(|DirectAlignment(a)| {
            let a = a as usize;
            !(offset as usize).is_multiple_of(a) || !len.is_multiple_of(a) || !(at as usize).is_multiple_of(a)
        })
    }

    /// Runs `f` over aligned pieces that cover `offset..offset + len`, each in an aligned buffer: `f(piece's offset, buffer,
    /// part of the buffer that belongs to the request, where in the request that part starts)`.
    fn bounce(
        &self,
        align: usize,
        offset: u64,
        len: usize,
        mut f: impl FnMut(u64, &mut [u8], std::ops::Range<usize>, usize) -> Result<()>,
    ) -> Result<()> {
        const PIECE: usize = 1 << 18;
        let mut memory = vec![0u8; PIECE.max(align) + align];
        let skip = memory.as_ptr().align_offset(align).min(align);
        let memory = &mut memory[skip..];
        let room = (PIECE / align).max(1) * align;
        let (mut at, end) = (offset, offset + len as u64);
        while at < end {
            let start = at - at % align as u64;
            let stop = end.next_multiple_of(align as u64).min(start + room as u64);
            let piece = &mut memory[..(stop - start) as usize];
            let part = (at - start) as usize..(end.min(stop) - start) as usize;
            f(start, piece, part, (at - offset) as usize)?;
            at = stop;
        }
        Ok(())
    }

    fn write_bounced(&self, align: usize, buf: &[u8], offset: u64) -> Result<()> {
        let _guard = self.unaligned.lock().unwrap_or_else(|e| e.into_inner());
        let size = self.size()?;
        let end = offset + buf.len() as u64;
        self.bounce(align, offset, buf.len(), |start, piece, part, at| {
            if part.start != 0 || part.end != piece.len() {
                self.pread(piece, start)?;
            }
            let n = part.len();
            piece[part].copy_from_slice(&buf[at..at + n]);
            self.pwrite(piece, start)
        })?;
        let exact = size.max(end);
        if !self.block_device
            && !exact.is_multiple_of(align as u64)
            && end.next_multiple_of(align as u64) > size
        {
            rustix::fs::ftruncate(&self.file, exact).map_err(|e| self.error("Could not resize", e))?;
        }
        Ok(())
    }
}

/// What `O_DIRECT` needs on this file: asked from the kernel, else the page size, which satisfies every device.
fn direct_alignment(file: &File) -> DirectAlignment {
    let default = DirectAlignment(4096);
    let Ok(x) = rustix::fs::statx(
        file,
        "",
        rustix::fs::AtFlags::EMPTY_PATH,
        rustix::fs::StatxFlags::from_bits_retain(0x2000), // STATX_DIOALIGN
    ) else {
        return default;
    };
    let align = x.stx_dio_offset_align.max(x.stx_dio_mem_align);
    if align.is_power_of_two() && align <= 1 << 16 { DirectAlignment(align.max(512)) } else { default }
}

/// Host-managed zoned devices take only sequential writes, which no image format gives.
fn refuse_zoned(device: u64, name: &str) -> Result<()> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    match std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/queue/zoned")) {
        Ok(model) if model.trim() == "host-managed" => Err(Error::unsupported(format!(
            "'{name}' is a host-managed zoned device, which takes only sequential writes; use a conventional device or \
             put dm-zoned on it"
        ))),
        _ => Ok(()),
    }
}

impl Storage for FileStorage {
    fn size(&self) -> Result<u64> {
        if self.block_device {
            // Not the descriptor's position but its end is asked for; nothing here depends on the position.
            return rustix::fs::seek(&self.file, SeekFrom::End(0))
                .map_err(|e| self.error("Could not size", e));
        }
        let stat = rustix::fs::fstat(&self.file).map_err(|e| self.error("Could not stat", e))?;
        Ok(stat.st_size as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if let Some(DirectAlignment(align)) = self.direct
            && self.misaligned(offset, buf.len(), buf.as_ptr())
        {
            return self.bounce(align as usize, offset, buf.len(), |start, piece, part, at| {
                self.pread(piece, start)?;
                buf[at..at + part.len()].copy_from_slice(&piece[part]);
                Ok(())
            });
        }
        self.pread(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.writable()?;
        if let Some(DirectAlignment(align)) = self.direct
            && self.misaligned(offset, buf.len(), buf.as_ptr())
        {
            return self.write_bounced(align as usize, buf, offset);
        }
        self.pwrite(buf, offset)
    }

    fn write_vectored_at(&self, bufs: &[&[u8]], mut offset: u64) -> Result<()> {
        self.writable()?;
        if self.direct.is_none() && bufs.len() > 1 && bufs.len() <= 16 {
            let slices: Vec<IoSlice<'_>> = bufs.iter().map(|b| IoSlice::new(b)).collect();
            let total: usize = bufs.iter().map(|b| b.len()).sum();
            if matches!(rustix::io::pwritev(&self.file, &slices, offset), Ok(n) if n == total) {
                return Ok(());
            }
        }
        for buf in bufs {
            self.write_at(buf, offset)?;
            offset += buf.len() as u64;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        if self.no_flush || self.opened_read_only {
            return Ok(());
        }
        rustix::fs::fdatasync(&self.file).map_err(|e| self.error("Could not flush", e))
    }

    fn set_size(&self, size: u64) -> Result<()> {
        self.writable()?;
        if self.block_device {
            let held = self.size()?;
            return if size <= held {
                Ok(())
            } else {
                Err(Error::usage(format!("Cannot grow device '{}' past {held} bytes", self.path.display())))
            };
        }
        rustix::fs::ftruncate(&self.file, size).map_err(|e| self.error("Could not resize", e))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.writable()?;
        if !self.discard || len == 0 {
            return Ok(());
        }
        self.punch(offset, len).map(drop)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<Zeroing> {
        self.writable()?;
        if len == 0 {
            return Ok(Zeroing::Done);
        }
        let end = offset.saturating_add(len);
        if flags.unmap || self.no_zero_range.load(Ordering::Relaxed) {
            // Growing a file leaves a hole, which reads as zeros; within the file a hole is punched.
            let size = self.size()?;
            if !self.block_device && end > size {
                self.set_size(end)?;
            }
            if !self.block_device && offset >= size {
                return Ok(Zeroing::Done);
            }
            if self.punch(offset, len)? == Zeroing::Done {
                if !flags.unmap {
                    self.allocate(offset, len)?;
                }
                return Ok(Zeroing::Done);
            }
        }
        if self.no_zero_range.load(Ordering::Relaxed) {
            return Ok(Zeroing::Unsupported);
        }
        let done = self.fallocate(FallocateFlags::ZERO_RANGE, offset, len)?;
        if done == Zeroing::Unsupported {
            self.no_zero_range.store(true, Ordering::Relaxed);
            return self.write_zeroes(offset, len, flags);
        }
        Ok(done)
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<Zeroing> {
        self.writable()?;
        if len == 0 {
            return Ok(Zeroing::Done);
        }
        self.fallocate(FallocateFlags::empty(), offset, len)
    }

    fn held(&self, offset: u64, len: u64) -> Result<(Held, u64)> {
        let size = self.size()?;
        if offset >= size {
            return Ok((Held::Hole, len));
        }
        let inside = len.min(size - offset);
        if self.block_device {
            return Ok((Held::Data, inside));
        }
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok((Held::Hole, (data - offset).min(inside))),
            Ok(_) => match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => Ok((Held::Data, (hole - offset).min(inside))),
                _ => Ok((Held::Data, inside)),
            },
            Err(Errno::NXIO) => Ok((Held::Hole, inside)),
            Err(_) => Ok((Held::Data, inside)),
        }
    }

    fn allocated_size(&self) -> Option<u64> {
        rustix::fs::fstat(&self.file).ok().map(|s| s.st_blocks as u64 * 512)
    }

    fn raw_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn alignment(&self) -> u32 {
        self.direct.map_or(1, |a| a.0)
    }

    fn read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    fn set_read_only(&self, read_only: bool) -> Result<()> {
        if !read_only && self.opened_read_only {
            return Err(Error::ReadOnly(self.name()));
        }
        self.read_only.store(read_only, Ordering::Relaxed);
        Ok(())
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn protocol(&self) -> &'static str {
        if self.block_device { "host_device" } else { "file" }
    }

    fn grows_with_zeros(&self) -> bool {
        !self.block_device
    }

    fn set_permissions(&self, want: Permissions) -> Result<()> {
        let Some(locks) = &self.locks else { return Ok(()) };
        let mut have = locks.lock().unwrap_or_else(|e| e.into_inner());
        lock::apply(self.file.as_fd(), &self.name(), *have, want)?;
        *have = want;
        Ok(())
    }
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // The first bytes decide most non-zero buffers; then whole blocks compare as fast as memory allows.
    if bytes.first().is_some_and(|&b| b != 0) || bytes.last().is_some_and(|&b| b != 0) {
        return false;
    }
    bytes.chunks(ZEROS.len()).all(|piece| {
        let (head, words, tail) = (piece.len() % 64, piece.chunks_exact(64), piece.len());
        words.clone().all(|w| w.iter().fold(0u8, |acc, &b| acc | b) == 0)
            && piece[tail - head..].iter().all(|&b| b == 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::CacheMode;

    #[test]
    fn zero_detection_sees_every_position() {
        for len in [0usize, 1, 63, 64, 65, 4096, 70000] {
            let mut v = vec![0u8; len];
            assert!(is_zero(&v));
            for at in (0..len).step_by(61).chain(len.checked_sub(1)) {
                v[at] = 1;
                assert!(!is_zero(&v), "{len} {at}");
                v[at] = 0;
            }
        }
    }

    #[test]
    fn holes_data_and_zeroing() {
        let dir = tempfile::tempdir().unwrap();
        let s = FileStorage::create(&dir.path().join("f"), 1 << 20).unwrap();
        s.write_at(&[1; 8192], 65536).unwrap();
        assert_eq!(s.held(0, 1 << 20).unwrap(), (Held::Hole, 65536));
        assert_eq!(s.held(65536, 1 << 20).unwrap(), (Held::Data, 8192));
        assert_eq!(s.held(2 << 20, 5).unwrap(), (Held::Hole, 5));
        assert_eq!(s.write_zeroes(65536, 4096, ZeroFlags { unmap: true }).unwrap(), Zeroing::Done);
        let mut b = vec![9; 8192];
        s.read_at(&mut b, 65536).unwrap();
        assert!(is_zero(&b[..4096]) && b[4096..].iter().all(|&x| x == 1));
        s.write_zeroes(1 << 20, 4096, ZeroFlags { unmap: true }).unwrap();
        assert_eq!(s.size().unwrap(), (1 << 20) + 4096);
    }

    #[test]
    fn direct_io_takes_any_alignment() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("f");
        FileStorage::create(&path, 10_000).unwrap();
        let options =
            StorageOptions { cache: CacheMode { direct: true, ..Default::default() }, ..Default::default() };
        let s = match FileStorage::open(&path, &options) {
            Ok(s) => s,
            Err(Error::Unsupported(_)) => return, // this file system has no O_DIRECT
            Err(e) => panic!("{e}"),
        };
        let data: Vec<u8> = (0..700_000u32).map(|i| (i % 251) as u8).collect();
        s.write_at(&data, 777).unwrap();
        assert_eq!(s.size().unwrap(), 777 + 700_000);
        s.write_at(b"hello", 1000).unwrap();
        assert_eq!(s.size().unwrap(), 777 + 700_000);
        let mut back = vec![7; 700_020];
        s.read_at(&mut back, 770).unwrap();
        assert!(is_zero(&back[..7]) && is_zero(&back[700_007..]));
        assert_eq!(&back[7..230], &data[..223]);
        assert_eq!(&back[230..235], b"hello");
        assert_eq!(&back[235..700_007], &data[228..]);
    }

    #[test]
    fn creating_over_a_locked_file_leaves_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let s = FileStorage::create(&path, 100).unwrap();
        s.set_permissions(Permissions { used: 3, unshared: 2 }).unwrap();
        assert!(matches!(FileStorage::create(&path, 5), Err(Error::Locked(_))));
        assert_eq!(s.size().unwrap(), 100);
    }
}
