//! Which pages were written, and which hold guest code that a software CPU has decoded.

use crate::PAGE_SIZE;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

const DIRTY: u8 = 1;
const CODE: u8 = 2;

type CodeListener = Box<dyn Fn(u64) + Send + Sync>;

/// One byte per page of a region: the dirty log of software writers (devices, the software CPU), and the marks of
/// code pages. KVM keeps its own dirty log for what vCPUs write; the two are merged by whoever migrates.
///
/// Costs one relaxed load per write while nothing is tracked.
pub struct PageTracker {
    pages: Box<[AtomicU8]>,
    /// Set while any page may need work on a write: the dirty log is on, or code was marked.
    active: AtomicBool,
    log: AtomicBool,
    listener: OnceLock<CodeListener>,
}

impl std::fmt::Debug for PageTracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageTracker").field("pages", &self.pages.len()).finish_non_exhaustive()
    }
}

impl PageTracker {
    /// A tracker for `len` bytes with nothing marked.
    pub fn new(len: u64) -> Self {
        let pages = len.div_ceil(PAGE_SIZE) as usize;
        // Zeroed through the allocator so that large trackers stay untouched (not resident) until used.
        let zeroed: Box<[u8]> = vec![0u8; pages].into_boxed_slice();
        Self {
            pages: zeroed_atomics(zeroed),
            active: AtomicBool::new(false),
            log: AtomicBool::new(false),
            listener: OnceLock::new(),
        }
    }

    /// Sets who is told (with the byte offset of the page) when a code page is written. Once; later calls are refused.
    pub fn set_code_listener(&self, listener: CodeListener) -> bool {
        self.listener.set(listener).is_ok()
    }

    /// Turns the dirty log on (clean) or off.
    pub fn set_log(&self, on: bool) {
        for page in &self.pages {
            page.fetch_and(!DIRTY, Ordering::Relaxed);
        }
        self.log.store(on, Ordering::SeqCst);
        if on {
            self.active.store(true, Ordering::SeqCst);
        }
    }

    /// Whether the dirty log is on.
    #[inline]
    pub fn is_logging(&self) -> bool {
        self.log.load(Ordering::Relaxed)
    }

    /// Must be called after each write of `len` bytes at `offset` by anyone but a KVM vCPU.
    #[inline]
    pub fn wrote(&self, offset: u64, len: u64) {
        if self.active.load(Ordering::Relaxed) && len != 0 {
            self.wrote_slow(offset, len);
        }
    }

    #[cold]
    fn wrote_slow(&self, offset: u64, len: u64) {
        let first = (offset / PAGE_SIZE) as usize;
        let last = (offset.saturating_add(len - 1) / PAGE_SIZE) as usize;
        let log = self.log.load(Ordering::Relaxed);
        for page in first..=last.min(self.pages.len().saturating_sub(1)) {
            let flags = self.pages[page].load(Ordering::Relaxed);
            if log && flags & DIRTY == 0 {
                self.pages[page].fetch_or(DIRTY, Ordering::Relaxed);
            }
            if flags & CODE != 0 {
                // Cleared by whoever drops the code, through `clear_code`.
                if let Some(listener) = self.listener.get() {
                    listener(page as u64 * PAGE_SIZE);
                }
            }
        }
    }

    /// Marks the page at byte `offset` as holding decoded guest code. Returns whether it was unmarked before.
    pub fn mark_code(&self, offset: u64) -> bool {
        self.active.store(true, Ordering::SeqCst);
        self.pages
            .get((offset / PAGE_SIZE) as usize)
            .is_some_and(|p| p.fetch_or(CODE, Ordering::SeqCst) & CODE == 0)
    }

    /// Removes the code mark of the page at byte `offset`.
    pub fn clear_code(&self, offset: u64) {
        if let Some(p) = self.pages.get((offset / PAGE_SIZE) as usize) {
            p.fetch_and(!CODE, Ordering::SeqCst);
        }
    }

    /// Whether the page at byte `offset` holds decoded guest code.
    #[inline]
    pub fn is_code(&self, offset: u64) -> bool {
        self.pages.get((offset / PAGE_SIZE) as usize).is_some_and(|p| p.load(Ordering::SeqCst) & CODE != 0)
    }

    /// Takes the dirty log: calls `f` with the page index of every page written since the last call, and forgets it.
    pub fn take_dirty(&self, mut f: impl FnMut(u64)) {
        for (i, page) in self.pages.iter().enumerate() {
            if page.load(Ordering::Relaxed) & DIRTY != 0
                && page.fetch_and(!DIRTY, Ordering::SeqCst) & DIRTY != 0
            {
                f(i as u64);
            }
        }
    }
}

/// Reinterprets zeroed bytes as atomics, keeping the (lazily touched) allocation.
#[allow(unsafe_code)]
fn zeroed_atomics(bytes: Box<[u8]>) -> Box<[AtomicU8]> {
    let raw = Box::into_raw(bytes) as *mut [AtomicU8];
    // SAFETY: AtomicU8 has the size, alignment and bit validity of u8, and the box came from `Box::into_raw`.
    unsafe { Box::from_raw(raw) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn dirty_log_sees_every_page_of_a_write_once() {
        let t = PageTracker::new(16 * PAGE_SIZE);
        t.wrote(0, 1);
        t.set_log(true);
        t.wrote(PAGE_SIZE - 1, 2);
        t.wrote(5 * PAGE_SIZE, PAGE_SIZE);
        t.wrote(20 * PAGE_SIZE, 8); // outside: ignored
        let mut seen = vec![];
        t.take_dirty(|p| seen.push(p));
        assert_eq!(seen, [0, 1, 5]);
        t.take_dirty(|p| panic!("page {p} reported twice"));
    }

    #[test]
    fn writes_to_code_reach_the_listener() {
        let t = PageTracker::new(4 * PAGE_SIZE);
        let seen = Arc::new(Mutex::new(vec![]));
        let sink = seen.clone();
        assert!(t.set_code_listener(Box::new(move |o| sink.lock().unwrap().push(o))));
        assert!(t.mark_code(2 * PAGE_SIZE + 5));
        t.wrote(PAGE_SIZE, 4);
        t.wrote(2 * PAGE_SIZE, 4);
        assert_eq!(*seen.lock().unwrap(), [2 * PAGE_SIZE]);
        t.clear_code(2 * PAGE_SIZE);
        t.wrote(2 * PAGE_SIZE, 4);
        assert_eq!(seen.lock().unwrap().len(), 1);
    }
}
