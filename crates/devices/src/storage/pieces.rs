//! Positioned vectored I/O between a descriptor and guest memory.
#![allow(unsafe_code)] // system calls on guest memory, wrapped here

use memory::GuestSlice;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Pieces of guest memory, as the kernel takes them. The memory outlives it: whoever builds one keeps the
/// `GuestMemory` that the slices came from.
#[derive(Debug, Default)]
pub(crate) struct Pieces(Vec<libc::iovec>);

// SAFETY: the pointers are to guest memory, which is shared between threads by its nature; see `memory::Mapping`.
unsafe impl Send for Pieces {}

/// Most pieces that one call takes (UIO_MAXIOV).
pub(crate) const MOST: usize = 1024;

impl Pieces {
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    pub(crate) fn push(&mut self, slice: GuestSlice<'_>) {
        self.0.push(libc::iovec { iov_base: slice.as_ptr().cast(), iov_len: slice.len() as usize });
    }

    pub(crate) fn as_slice(&self) -> &[libc::iovec] {
        &self.0
    }

    /// Whether addresses and lengths are all multiples of `alignment`.
    pub(crate) fn aligned(&self, alignment: usize) -> bool {
        let odd = |v: &libc::iovec| !(v.iov_base as usize | v.iov_len).is_multiple_of(alignment);
        alignment <= 1 || !self.0.iter().any(odd)
    }

    /// Drops the first `n` bytes, which have been transferred.
    fn advance(&mut self, mut n: usize) {
        let whole = self.0.iter().take_while(|v| {
            let fits = v.iov_len <= n;
            n -= if fits { v.iov_len } else { 0 };
            fits
        });
        let count = whole.count();
        self.0.drain(..count);
        if let Some(first) = self.0.first_mut() {
            // SAFETY: n is below the piece's length, so the pointer stays inside it.
            first.iov_base = unsafe { first.iov_base.cast::<u8>().add(n) }.cast();
            first.iov_len -= n;
        }
    }

    /// Reads until all pieces are full, from `offset`; `done` bytes have been read already. Returns how many bytes
    /// there were before the end of the file.
    pub(crate) fn read_all(&mut self, fd: BorrowedFd<'_>, offset: u64, done: u64) -> io::Result<u64> {
        self.transfer(done, |v, at| {
            // SAFETY: the pieces are valid guest memory (see the type), and the kernel checks its arguments.
            unsafe { libc::preadv(fd.as_raw_fd(), v.as_ptr(), v.len() as i32, (offset + at) as i64) }
        })
    }

    /// Writes all pieces at `offset`; `done` bytes have been written already. `durable`: each write reaches the disk.
    pub(crate) fn write_all(
        &mut self,
        fd: BorrowedFd<'_>,
        offset: u64,
        done: u64,
        durable: bool,
    ) -> io::Result<u64> {
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        self.transfer(done, |v, at| {
            // SAFETY: as above.
            unsafe { libc::pwritev2(fd.as_raw_fd(), v.as_ptr(), v.len() as i32, (offset + at) as i64, flags) }
        })
    }

    fn transfer(&mut self, mut done: u64, call: impl Fn(&[libc::iovec], u64) -> isize) -> io::Result<u64> {
        self.advance(done as usize);
        while !self.0.is_empty() {
            let n = call(&self.0[..self.0.len().min(MOST)], done);
            if n < 0 {
                let e = io::Error::last_os_error();
                if e.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(e);
            }
            if n == 0 {
                break;
            }
            self.advance(n as usize);
            done += n as u64;
        }
        Ok(done)
    }
}

/// Whether a file is on a file system that lives in memory (statfs(2)).
pub(crate) fn in_memory(fd: BorrowedFd<'_>) -> bool {
    /// tmpfs, ramfs, hugetlbfs.
    const IN_MEMORY: [u64; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6];
    rustix::fs::fstatfs(fd).is_ok_and(|s| IN_MEMORY.contains(&(s.f_type as u64 & 0xffff_ffff)))
}
