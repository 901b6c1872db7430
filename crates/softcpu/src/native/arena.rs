//! Memory for generated code, mapped twice: once writable, once executable, never both at one address.
#![allow(unsafe_code)] // memory mapping

use super::Thunk;
use super::emit::Entry;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::{Mutex, OnceLock};

/// Room for thunks. Every instruction there is, in its normalised form with every immediate, fits several times over;
/// only pages in use cost memory.
pub const CAPACITY: usize = 64 << 20;

/// Alignment of a thunk.
const ALIGN: usize = 16;

/// The two mappings.
#[derive(Debug)]
struct Mappings {
    write: NonNull<u8>,
    exec: NonNull<u8>,
}

/// Thunks of one VM, shared by its vCPUs. Equal code exists once. Memory is mapped when the first one is installed.
#[derive(Debug, Default)]
pub struct Arena {
    mappings: OnceLock<Option<Mappings>>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    used: usize,
    code: HashMap<Box<[u8]>, usize>,
    thunks: HashMap<Thunk, Box<Thunk>>,
}

// SAFETY: the writable mapping is only used under the lock; the executable one holds code that never changes once it
// has been handed out.
unsafe impl Send for Mappings {}
// SAFETY: as above.
unsafe impl Sync for Mappings {}

impl Arena {
    /// An empty arena.
    pub fn new() -> Self {
        Self::default()
    }

    /// Address of executable code equal to `code`. `None` if the host gives no memory that can be executed, or if the
    /// arena is full, which takes more distinct thunks than there are instructions.
    pub(super) fn install(&self, code: &[u8]) -> Option<Entry> {
        let mappings = self.mappings.get_or_init(|| match Mappings::new() {
            Ok(m) => Some(m),
            Err(e) => {
                tracing::error!("cannot map memory for generated code: {e}");
                None
            }
        });
        let mappings = mappings.as_ref()?;
        let mut inner = self.inner.lock().unwrap_or_else(|e| e.into_inner());
        let at = match inner.code.get(code) {
            Some(at) => *at,
            None => {
                let at = inner.used;
                let end = at.checked_add(code.len())?.checked_next_multiple_of(ALIGN)?;
                if end > CAPACITY {
                    return None;
                }
                // SAFETY: the range lies inside the writable mapping, and nothing executes it yet.
                unsafe {
                    std::ptr::copy_nonoverlapping(code.as_ptr(), mappings.write.as_ptr().add(at), code.len())
                };
                inner.used = end;
                inner.code.insert(code.into(), at);
                at
            }
        };
        // SAFETY: below the capacity; and the code at a multiple of the alignment is a thunk made by `emit`.
        Some(unsafe { std::mem::transmute::<*mut u8, Entry>(mappings.exec.as_ptr().add(at)) })
    }

    /// Address, valid as long as the arena, of a thunk equal to `thunk`.
    pub(super) fn intern(&self, thunk: Thunk) -> *const Thunk {
        let mut inner = self.inner.lock().unwrap_or_else(|e| e.into_inner());
        &raw const **inner.thunks.entry(thunk).or_insert_with(|| Box::new(thunk))
    }

    /// Bytes of code, and number of thunks.
    pub fn usage(&self) -> (usize, usize) {
        let inner = self.inner.lock().unwrap_or_else(|e| e.into_inner());
        (inner.used, inner.thunks.len())
    }
}

impl Mappings {
    fn new() -> io::Result<Self> {
        let file = memfd()?;
        let write = map(&file, libc::PROT_READ | libc::PROT_WRITE)?;
        match map(&file, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(exec) => Ok(Self { write, exec }),
            Err(e) => {
                unmap(write);
                Err(e)
            }
        }
    }
}

impl Drop for Mappings {
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
        let arena = Arena::new();
        let code = [0xb8, 42, 0, 0, 0, 0xc3]; // mov eax, 42; ret
        let a = arena.install(&code).unwrap();
        assert_eq!(a as usize, arena.install(&code).unwrap() as usize);
        assert_ne!(a as usize, arena.install(&[0xc3]).unwrap() as usize);
        assert_eq!(arena.usage().0, 2 * ALIGN);
        // SAFETY: the code written above uses none of the arguments.
        let r = unsafe { a(std::ptr::null_mut(), 0, 0, 0, std::ptr::null_mut()) };
        assert_eq!(r, 42);
    }

    #[test]
    fn full_is_none() {
        let arena = Arena::new();
        assert!(arena.install(&vec![0x90; CAPACITY + 1]).is_none());
    }
}
