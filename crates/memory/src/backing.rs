//! Host memory behind guest RAM.
#![allow(unsafe_code)] // mmap is the purpose of this file

use crate::{Error, format_size};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

/// Where guest RAM comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory.
    #[default]
    Anonymous,
    /// A memfd, shareable with other processes (vhost-user).
    Memfd,
    /// Huge pages of the given size in bytes (2 MiB, 1 GiB, ...), from the host's pool; `None` is the default size.
    HugeTlb {
        /// Page size in bytes.
        page_size: Option<u64>,
    },
    /// A file, or an unnamed file in the directory if the path is one (a hugetlbfs mount, for instance).
    File {
        /// Path of the file or directory.
        path: PathBuf,
        /// Whether writes reach the file.
        shared: bool,
    },
}

impl Backing {
    /// A file descriptor holding `len` bytes, where the backing has one.
    fn file(&self, len: u64) -> io::Result<Option<File>> {
        match self {
            Backing::Anonymous => Ok(None),
            Backing::Memfd => memfd(libc::MFD_CLOEXEC, len).map(Some),
            Backing::HugeTlb { page_size } => {
                let log2 = match page_size {
                    None => 0,
                    Some(size) if size.is_power_of_two() => size.trailing_zeros() << libc::MFD_HUGE_SHIFT,
                    Some(size) => {
                        return Err(io::Error::new(
                            io::ErrorKind::InvalidInput,
                            format!("a huge page size is a power of two, not {size}"),
                        ));
                    }
                };
                memfd(libc::MFD_CLOEXEC | libc::MFD_HUGETLB | log2, len).map(Some)
            }
            Backing::File { path, .. } => open_file(path, len).map(Some),
        }
    }

    fn remedy(&self) -> String {
        match self {
            Backing::HugeTlb { page_size } => format!(
                "reserve huge pages, for example with 'sysctl vm.nr_hugepages=N' ({} pages), or use ordinary memory",
                page_size.map_or("default-size".into(), format_size)
            ),
            Backing::File { path, .. } => {
                format!("check that '{}' exists, is writable and has room", path.display())
            }
            _ => "use less memory, or free some on the host (see 'free -h', 'ulimit -v')".into(),
        }
    }

    fn describe(&self) -> String {
        match self {
            Backing::Anonymous => "anonymous".into(),
            Backing::Memfd => "memfd, shared".into(),
            Backing::HugeTlb { .. } => "hugetlb".into(),
            Backing::File { path, .. } => format!("file {}", path.display()),
        }
    }
}

/// Alignment of guest RAM on the host: guest memory begins at multiples of it too, so that a huge page of the host can
/// back a huge page of the guest (and KVM map it as one).
const ALIGNMENT: usize = 2 << 20;

/// Reserves address space for `size` bytes at a multiple of [`ALIGNMENT`].
fn reserve_aligned(size: usize) -> io::Result<*mut libc::c_void> {
    let whole = size.checked_add(ALIGNMENT).ok_or(io::ErrorKind::OutOfMemory)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh, inaccessible mapping at an address of the kernel's choice; the result is checked.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let before = start.addr().next_multiple_of(ALIGNMENT) - start.addr();
    let page = crate::PAGE_SIZE as usize;
    let size = size.next_multiple_of(page);
    // SAFETY: the parts before and after the aligned range belong to the mapping just made.
    unsafe {
        let at = start.byte_add(before);
        if before > 0 {
            libc::munmap(start, before);
        }
        let after = whole.next_multiple_of(page) - before - size;
        if after > 0 {
            libc::munmap(at.byte_add(size), after);
        }
        Ok(at)
    }
}

fn memfd(flags: u32, len: u64) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated literal; the result is checked before use.
    let fd = unsafe { libc::memfd_create(c"kvasir-ram".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fd was just created and is owned by nothing else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    Ok(file)
}

fn open_file(path: &Path, len: u64) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.read(true).write(true);
    let file = if path.is_dir() {
        options.custom_flags(libc::O_TMPFILE).mode(0o600).open(path)?
    } else {
        options.create(true).truncate(false).mode(0o600).open(path)?
    };
    if file.metadata()?.len() < len {
        file.set_len(len)?;
    }
    Ok(file)
}

/// A mapping of host memory, unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    ptr: NonNull<u8>,
    len: usize,
    file: Option<File>,
    hugetlb: bool,
}

// SAFETY: the mapping is plain memory; all access goes through raw pointers with volatile or atomic semantics, so
// sharing it between threads is as sound as the guest's own shared memory.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes (non-zero, page-aligned) from `backing`, zero-filled unless a file holds data.
    /// With `prealloc` every page is touched now, so that the host's lack of memory shows now.
    ///
    /// # Errors
    /// [`Error::Host`] with the host's reason and a remedy.
    pub fn new(backing: &Backing, len: u64, prealloc: bool) -> Result<Self, Error> {
        Self::map(backing, len, prealloc).map_err(|source| Error::Host {
            size: format_size(len),
            backing: backing.describe(),
            source,
            remedy: backing.remedy(),
        })
    }

    fn map(backing: &Backing, len: u64, prealloc: bool) -> io::Result<Self> {
        let size = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let file = backing.file(len)?;
        let hugetlb = matches!(backing, Backing::HugeTlb { .. });
        let mut flags = match backing {
            Backing::Anonymous => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            Backing::File { shared: false, .. } => libc::MAP_PRIVATE | libc::MAP_NORESERVE,
            Backing::HugeTlb { .. } => libc::MAP_SHARED,
            _ => libc::MAP_SHARED | libc::MAP_NORESERVE,
        };
        if prealloc {
            flags |= libc::MAP_POPULATE;
        }
        let fd = file.as_ref().map_or(-1, |f| f.as_raw_fd());
        let at = if hugetlb { std::ptr::null_mut() } else { reserve_aligned(size)? };
        if !at.is_null() {
            flags |= libc::MAP_FIXED;
        }
        // SAFETY: either at an address of the kernel's choice, or over the reservation just made for it, which
        // nothing else refers to; the result is checked.
        let ptr = unsafe { libc::mmap(at, size, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        if ptr == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            if !at.is_null() {
                // SAFETY: gives back the reservation, which the failed call left alone.
                unsafe { libc::munmap(at, size) };
            }
            return Err(error);
        }
        let ptr = NonNull::new(ptr.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        if matches!(backing, Backing::Anonymous) {
            // SAFETY: advice on the mapping just made. Failure only costs speed, so it is not looked at.
            unsafe { libc::madvise(ptr.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
        }
        // Guest RAM is of no use in a core dump, and may hold secrets.
        // SAFETY: as above.
        unsafe { libc::madvise(ptr.as_ptr().cast(), size, libc::MADV_DONTDUMP) };
        Ok(Self { ptr, len: size, file, hugetlb })
    }

    /// Host address of the first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether the mapping is empty; it never is.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file behind the memory, for backings that have one (shareable at offset 0).
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// Gives the pages of a range back to the host; they read as zero afterwards.
    ///
    /// # Errors
    /// The host's refusal, or a range outside the mapping.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.len as u64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let advice =
            if self.file.is_some() || self.hugetlb { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        // SAFETY: the range was checked to lie inside this mapping.
        let r = unsafe { libc::madvise(self.ptr.as_ptr().add(offset as usize).cast(), len as usize, advice) };
        if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this address and length, and nothing outlives its owner.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}
