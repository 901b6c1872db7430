//! Memory for generated code, mapped twice: once writable, once executable, never both at one address.
#![allow(unsafe_code)] // memory mapping

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::Mutex;

/// Room for thunks. Every instruction there is, in its normalised form with every immediate, fits several times over;
/// only pages in use cost memory.
pub const CAPACITY: usize = 64 << 20;

/// Alignment of a thunk.
const ALIGN: usize = 16;

/// Thunks of one VM, shared by its vCPUs. Equal code exists once.
#[derive(Debug)]
pub struct Arena {
    write: NonNull<u8>,
    exec: NonNull<u8>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    used: usize,
    known: HashMap<Box<[u8]>, usize>,
}

// SAFETY: the writable mapping is only used under the lock; the executable one holds code that never changes once it
// has been handed out.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// An empty arena.
    ///
    /// # Errors
    /// The host refuses the memory, or to execute it.
    pub fn new() -> io::Result<Self> {
        let file = memfd()?;
        let write = map(&file, libc::PROT_READ | libc::PROT_WRITE)?;
        match map(&file, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(exec) => Ok(Self { write, exec, inner: Mutex::default() }),
            Err(e) => {
                unmap(write);
                Err(e)
            }
        }
    }

    /// Address of executable code equal to `code`. `None` if the arena is full, which takes more distinct thunks than
    /// there are instructions.
    pub fn install(&self, code: &[u8]) -> Option<NonNull<u8>> {
        let mut inner = self.inner.lock().unwrap_or_else(|e| e.into_inner());
        let at = match inner.known.get(code) {
            Some(at) => *at,
            None => {
                let at = inner.used;
                let end = at.checked_add(code.len())?.checked_next_multiple_of(ALIGN)?;
                if end > CAPACITY {
                    return None;
                }
                // SAFETY: the range lies inside the writable mapping, and nothing executes it yet.
                unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.as_ptr().add(at), code.len()) };
                inner.used = end;
                inner.known.insert(code.into(), at);
                at
            }
        };
        // SAFETY: below the capacity.
        Some(unsafe { self.exec.add(at) })
    }

    /// Bytes of code, and number of thunks.
    pub fn usage(&self) -> (usize, usize) {
        let inner = self.inner.lock().unwrap_or_else(|e| e.into_inner());
        (inner.used, inner.known.len())
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        unmap(self.write);
        unmap(self.exec);
    }
}

fn memfd() -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated literal; the result is checked.
    let fd = unsafe { libc::memfd_create(c"kvasir-thunks".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just created, owned by nothing else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(CAPACITY as u64)?;
    Ok(file)
}

fn map(file: &File, protection: i32) -> io::Result<NonNull<u8>> {
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    // SAFETY: a new mapping where the kernel likes; the result is checked.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), CAPACITY, protection, flags, file.as_raw_fd(), 0) };
    if p == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(p.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

fn unmap(at: NonNull<u8>) {
    // SAFETY: made by `map` with this length; the owner is going away.
    unsafe { libc::munmap(at.as_ptr().cast(), CAPACITY) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn installs_once_and_runs() {
        let arena = Arena::new().unwrap();
        let code = [0xb8, 42, 0, 0, 0, 0xc3]; // mov eax, 42; ret
        let a = arena.install(&code).unwrap();
        assert_eq!(a, arena.install(&code).unwrap());
        assert_ne!(a, arena.install(&[0xc3]).unwrap());
        assert_eq!(arena.usage(), (2 * ALIGN, 2));
        // SAFETY: the code is the function written above.
        let f: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute(a.as_ptr()) };
        assert_eq!(f(), 42);
    }

    #[test]
    fn full_is_none() {
        let arena = Arena::new().unwrap();
        assert!(arena.install(&vec![0x90; CAPACITY + 1]).is_none());
    }
}
