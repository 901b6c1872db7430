//! Image locks that QEMU and this program both honour.
//!
//! QEMU keeps, on the image file, open-file-description locks on single bytes: byte 100 + *p* says "I use permission *p*",
//! byte 200 + *p* says "others must not use permission *p*". Both are read (shared) locks, so that they add up; a conflict
//! is found by asking whether a write lock could be placed on the opposite byte.

#![allow(unsafe_code)] // fcntl(2) with open-file-description locks has no safe wrapper

use crate::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd};

const USED: i64 = 100;
const UNSHARED: i64 = 200;
const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];

/// What a user of a storage does with it, and what it suffers others doing. Bits: 0 consistent read, 1 write,
/// 2 write unchanged data, 3 resize.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Permissions {
    /// Used by us.
    pub used: u8,
    /// Not to be used by others.
    pub unshared: u8,
}

impl Permissions {
    /// Reads see a consistent image.
    pub const READ: u8 = 1;
    /// Writes.
    pub const WRITE: u8 = 2;
    /// Size changes.
    pub const RESIZE: u8 = 8;

    /// Nothing used, all shared: what `--force-share` leaves of the demands on others.
    pub const NONE: Permissions = Permissions { used: 0, unshared: 0 };
}

fn lock(fd: BorrowedFd<'_>, command: i32, kind: i32, at: i64) -> std::io::Result<i16> {
    // SAFETY: `flock` is plain old data, for which all zeros is a valid value.
    let mut region: libc::flock = unsafe { std::mem::zeroed() };
    region.l_type = kind as i16;
    region.l_whence = libc::SEEK_SET as i16;
    region.l_start = at;
    region.l_len = 1;
    // SAFETY: the descriptor is valid while borrowed, and `region` outlives the call.
    if unsafe { libc::fcntl(fd.as_raw_fd(), command, &mut region) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(region.l_type)
}

/// Places the locks for `want`, releasing those of `have` that are no longer wanted. On conflict nothing is kept beyond
/// `have`.
pub(super) fn apply(fd: BorrowedFd<'_>, name: &str, have: Permissions, want: Permissions) -> Result<()> {
    let result = acquire(fd, name, have, want);
    let (keep, drop) = if result.is_ok() { (want, have) } else { (have, want) };
    for (base, keep, drop) in [(USED, keep.used, drop.used), (UNSHARED, keep.unshared, drop.unshared)] {
        for bit in 0..NAMES.len() as u8 {
            if drop & !keep & (1 << bit) != 0 {
                // Unlocking can only fail on a bad descriptor, and then the lock is gone with it.
                let _ = lock(fd, libc::F_OFD_SETLK, libc::F_UNLCK, base + i64::from(bit));
            }
        }
    }
    result
}

fn acquire(fd: BorrowedFd<'_>, name: &str, have: Permissions, want: Permissions) -> Result<()> {
    let refused = |shared: bool, bit: usize| {
        Error::Locked(format!(
            "Failed to get {}\"{}\" lock\nIs another process using the image [{name}]?",
            if shared { "shared " } else { "" },
            NAMES[bit],
        ))
    };
    for (base, bits, held) in [(USED, want.used, have.used), (UNSHARED, want.unshared, have.unshared)] {
        for bit in 0..NAMES.len() {
            if bits & !held & (1 << bit) == 0 {
                continue;
            }
            match lock(fd, libc::F_OFD_SETLK, libc::F_RDLCK, base + bit as i64) {
                Ok(_) => {}
                // Some network file systems have no locks at all; QEMU goes on without, and so do we.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOLCK | libc::ENOTSUP)) => {
                    return Ok(());
                }
                Err(_) => return Err(refused(base == UNSHARED, bit)),
            }
        }
    }
    for (base, bits, shared) in [(UNSHARED, want.used, false), (USED, want.unshared, true)] {
        for bit in 0..NAMES.len() {
            if bits & (1 << bit) == 0 {
                continue;
            }
            match lock(fd, libc::F_OFD_GETLK, libc::F_WRLCK, base + bit as i64) {
                Ok(kind) if i32::from(kind) == libc::F_UNLCK => {}
                Ok(_) => return Err(refused(shared, bit)),
                Err(_) => return Ok(()),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn writers_exclude_each_other_and_readers_do_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (file.reopen().unwrap(), file.reopen().unwrap());
        let writer = Permissions {
            used: Permissions::READ | Permissions::WRITE,
            unshared: Permissions::WRITE | Permissions::RESIZE,
        };
        let reader = Permissions { used: Permissions::READ, unshared: 0 };
        apply(a.as_fd(), "x", Permissions::NONE, writer).unwrap();
        assert!(apply(b.as_fd(), "x", Permissions::NONE, writer).is_err());
        apply(b.as_fd(), "x", Permissions::NONE, reader).unwrap();
        apply(a.as_fd(), "x", writer, Permissions::NONE).unwrap();
        apply(b.as_fd(), "x", reader, writer).unwrap();
        assert!(apply(a.as_fd(), "x", Permissions::NONE, writer).is_err());
    }
}
