//! Shared and exclusive locks on ranges of a disk.

use std::sync::{Condvar, Mutex};

/// Locks on ranges of guest offsets: shared for I/O that relies on a mapping, exclusive for what changes it.
///
/// Lock order: one range per thread at a time, and always before any lock of a format.
#[derive(Debug, Default)]
pub struct RangeLock {
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    held: Vec<Held>,
    /// Exclusive requests that wait: newcomers that overlap them queue behind, so that no writer starves.
    waiting: Vec<(u64, u64, u64)>,
    /// Threads that sleep, so that giving back a range costs no system call while there are none.
    sleepers: usize,
    next: u64,
}

#[derive(Debug)]
struct Held {
    start: u64,
    end: u64,
    exclusive: bool,
    id: u64,
}

/// A held range; dropping it gives it back.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    id: u64,
}

impl RangeLock {
    /// Waits until nobody holds any of `start .. end` exclusively.
    pub fn shared(&self, start: u64, end: u64) -> RangeGuard<'_> {
        self.acquire(start, end, false)
    }

    /// Waits until nobody holds any of `start .. end`.
    pub fn exclusive(&self, start: u64, end: u64) -> RangeGuard<'_> {
        self.acquire(start, end, true)
    }

    fn acquire(&self, start: u64, end: u64, exclusive: bool) -> RangeGuard<'_> {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let id = state.next;
        state.next += 1;
        let mut queued = false;
        loop {
            let overlaps = |s: u64, e: u64| s < end && start < e;
            let blocked = state.held.iter().any(|h| (exclusive || h.exclusive) && overlaps(h.start, h.end))
                || state.waiting.iter().any(|&(s, e, w)| w < id && overlaps(s, e));
            if !blocked {
                break;
            }
            if exclusive && !queued {
                queued = true;
                state.waiting.push((start, end, id));
            }
            state.sleepers += 1;
            state = self.freed.wait(state).unwrap_or_else(|e| e.into_inner());
            state.sleepers -= 1;
        }
        if queued {
            state.waiting.retain(|w| w.2 != id);
        }
        state.held.push(Held { start, end, exclusive, id });
        RangeGuard { lock: self, id }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.lock.state.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(at) = state.held.iter().position(|h| h.id == self.id) {
            state.held.swap_remove(at);
        }
        let wake = state.sleepers > 0;
        drop(state);
        if wake {
            self.lock.freed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn exclusive_sections_do_not_overlap() {
        let lock = RangeLock::default();
        let (inside, runs) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for t in 0..4u64 {
                let (lock, inside, runs) = (&lock, &inside, &runs);
                scope.spawn(move || {
                    for i in 0..500u64 {
                        if (i + t) % 3 == 0 {
                            let _g = lock.exclusive(10, 20);
                            assert_eq!(inside.fetch_add(100, Ordering::SeqCst), 0);
                            inside.fetch_sub(100, Ordering::SeqCst);
                        } else {
                            let _g = lock.shared(15, 30);
                            assert!(inside.fetch_add(1, Ordering::SeqCst) < 100);
                            inside.fetch_sub(1, Ordering::SeqCst);
                        }
                        let _other = lock.exclusive(100 + t, 101 + t);
                        runs.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(runs.into_inner(), 2000);
    }
}
