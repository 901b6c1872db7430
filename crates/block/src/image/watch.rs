//! What stands between a request and its execution: throttling, pauses, and those who watch changes.

use super::Image;
use crate::{Result, jobs::Watcher, throttle::Throttle};
use std::sync::{
    Arc, RwLock, RwLockReadGuard,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

/// Watchers by number, the throttle, and the gate that changes pass through.
#[derive(Default)]
pub(super) struct Watch {
    /// Held shared over each change, exclusively while changes are paused. Taken before range locks.
    gate: RwLock<()>,
    watchers: RwLock<Vec<(u64, Arc<dyn Watcher>)>>,
    watched: AtomicBool,
    next: AtomicU64,
    throttle: RwLock<Option<Arc<Throttle>>>,
    throttled: AtomicBool,
    /// Requests that go round the image to its file (see [`crate::queue`]).
    direct: AtomicU64,
}

impl Watch {
    /// Whether I/O has to come through the image to be seen or slowed.
    pub(super) fn is_active(&self) -> bool {
        self.watched.load(Ordering::SeqCst) || self.throttled.load(Ordering::SeqCst)
    }
}

/// A change in progress; dropping it tells the watchers that it is over.
pub(super) struct Change<'a> {
    image: &'a Image,
    offset: u64,
    len: u64,
    _gate: RwLockReadGuard<'a, ()>,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        if self.image.watch.watched.load(Ordering::Acquire) {
            for (_, watcher) in self.image.watch.watchers.read().unwrap_or_else(|e| e.into_inner()).iter() {
                watcher.after_change(self.offset, self.len);
            }
        }
    }
}

impl Image {
    /// Shows every change to a watcher from now on; the number serves to end it. [`Image::direct`] refuses meanwhile. Waits for
    /// requests that a [`crate::queue::Queue`] has in flight, whose thread must not be the one that calls this.
    pub fn watch(&self, watcher: Arc<dyn Watcher>) -> u64 {
        let id = self.watch.next.fetch_add(1, Ordering::Relaxed);
        self.watch.watchers.write().unwrap_or_else(|e| e.into_inner()).push((id, watcher));
        self.watch.watched.store(true, Ordering::SeqCst);
        self.await_direct();
        id
    }

    /// A request goes round the image from now on, if [`Image::direct`] still allows it.
    pub(crate) fn enter_direct(&self) {
        self.watch.direct.fetch_add(1, Ordering::SeqCst);
    }

    /// It is over, or does not go round after all.
    pub(crate) fn leave_direct(&self) {
        self.watch.direct.fetch_sub(1, Ordering::SeqCst);
    }

    /// Waits for requests that went round the image before it was to be watched.
    fn await_direct(&self) {
        while self.watch.direct.load(Ordering::SeqCst) > 0 {
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    }

    /// Ends what [`Image::watch`] began.
    pub fn unwatch(&self, id: u64) {
        let mut watchers = self.watch.watchers.write().unwrap_or_else(|e| e.into_inner());
        watchers.retain(|(n, _)| *n != id);
        self.watch.watched.store(!watchers.is_empty(), Ordering::Release);
    }

    /// Limits requests from now on; `None` lifts the limits. Images that share a throttle share its limits.
    pub fn set_throttle(&self, throttle: Option<Arc<Throttle>>) {
        let throttle = throttle.filter(|t| !t.limits().is_unlimited());
        self.watch.throttled.store(throttle.is_some(), Ordering::Release);
        *self.watch.throttle.write().unwrap_or_else(|e| e.into_inner()) = throttle;
    }

    /// Runs `f` while no change is in progress and none begins. Reads go on. `f` must not change the image.
    pub fn paused<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let _gate = self.watch.gate.write().unwrap_or_else(|e| e.into_inner());
        f()
    }

    /// Waits for the throttle's leave.
    pub(super) fn throttle(&self, write: bool, bytes: u64) {
        if self.watch.throttled.load(Ordering::Acquire) {
            let throttle = self.watch.throttle.read().unwrap_or_else(|e| e.into_inner()).clone();
            if let Some(throttle) = throttle {
                throttle.wait(write, bytes);
            }
        }
    }

    /// Announces a change; held until it is over.
    pub(super) fn begin_change(&self, offset: u64, len: u64) -> Result<Change<'_>> {
        let gate = self.watch.gate.read().unwrap_or_else(|e| e.into_inner());
        let change = Change { image: self, offset, len, _gate: gate };
        if self.watch.watched.load(Ordering::Acquire) {
            let watchers: Vec<_> = self.watch.watchers.read().unwrap_or_else(|e| e.into_inner()).clone();
            for (_, watcher) in watchers {
                watcher.before_change(offset, len)?;
            }
        }
        Ok(change)
    }
}
