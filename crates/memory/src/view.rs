//! A file, mapped for reading.
#![allow(unsafe_code)] // mmap is the purpose of this file

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// The contents of a file as bytes, without copying them. For files that are read once and whole, such as kernels.
///
/// A file that somebody truncates while it is mapped ends the program (SIGBUS), so map late and drop early.
#[derive(Debug)]
pub struct FileView {
    ptr: NonNull<u8>,
    len: usize,
}

impl FileView {
    /// Maps the first `len` bytes (more than none) of `file`, which has at least as many.
    ///
    /// # Errors
    /// The host's refusal: some file systems cannot be mapped.
    pub fn new(file: &File, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // Not populated: faults map many pages at once, and what lies between the parts of use stays out.
        let flags = libc::MAP_PRIVATE;
        // SAFETY: a fresh read-only mapping at an address of the kernel's choice; the result is checked.
        let ptr =
            unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, flags, file.as_raw_fd(), 0) };
        if ptr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { ptr: NonNull::new(ptr.cast()).ok_or(io::ErrorKind::OutOfMemory)?, len })
    }
}

impl Deref for FileView {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped for reading with this length until drop. The mapping is private; a writer of the file could
        // still change bytes under us, which plain byte copies tolerate: what is loaded is checked after the copy, by
        // the guest.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for FileView {
    fn drop(&mut self) {
        // SAFETY: unmaps what `new` mapped.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_the_file() {
        let file = File::open("/proc/self/exe").unwrap();
        let view = FileView::new(&file, 4).unwrap();
        assert_eq!(&*view, b"\x7fELF");
    }
}
