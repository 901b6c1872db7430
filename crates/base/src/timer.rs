//! Timers: one thread that calls back when a deadline passes.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::Instant;

type Callback = Arc<dyn Fn() + Send + Sync>;

/// A service that runs callbacks at deadlines, on one thread of its own, which exists from the first timer that is
/// armed until the last handle is dropped.
///
/// Callbacks must be short and must not block; they may arm timers, their own included.
#[derive(Clone, Default)]
pub struct Timers(Arc<Service>);

#[derive(Default)]
struct Service {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    by_time: BTreeMap<(Instant, u64), ()>,
    timers: HashMap<u64, Entry>,
    next_id: u64,
    running: bool,
    closed: bool,
}

struct Entry {
    deadline: Option<Instant>,
    callback: Callback,
}

/// A timer; disarmed and forgotten on drop.
pub struct Timer {
    id: u64,
    service: Weak<Shared>,
}

impl std::fmt::Debug for Timers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Timers")
    }
}

impl std::fmt::Debug for Timer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Timer({})", self.id)
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, Queue> {
    shared.queue.lock().unwrap_or_else(|e| e.into_inner())
}

impl Timers {
    /// A service with no timers and no thread yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A disarmed timer that runs `callback` each time it expires.
    pub fn timer(&self, callback: impl Fn() + Send + Sync + 'static) -> Timer {
        let mut q = lock(&self.0.shared);
        let id = q.next_id;
        q.next_id += 1;
        q.timers.insert(id, Entry { deadline: None, callback: Arc::new(callback) });
        Timer { id, service: Arc::downgrade(&self.0.shared) }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        lock(&self.shared).closed = true;
        self.shared.changed.notify_all();
    }
}

impl Timer {
    /// Arms the timer for `deadline`, replacing an earlier one; a deadline in the past expires at once.
    pub fn arm(&self, deadline: Instant) {
        self.set(Some(deadline));
    }

    /// Disarms the timer. A callback already under way finishes.
    pub fn disarm(&self) {
        self.set(None);
    }

    fn set(&self, deadline: Option<Instant>) {
        let Some(shared) = self.service.upgrade() else { return };
        let mut q = lock(&shared);
        let Some(entry) = q.timers.get_mut(&self.id) else { return };
        let old = std::mem::replace(&mut entry.deadline, deadline);
        if let Some(old) = old {
            q.by_time.remove(&(old, self.id));
        }
        let Some(deadline) = deadline else { return };
        q.by_time.insert((deadline, self.id), ());
        let first = q.by_time.first_key_value().is_some_and(|((_, id), ())| *id == self.id);
        if !q.running {
            q.running = true;
            drop(q);
            let thread_shared = shared.clone();
            let spawned = std::thread::Builder::new()
                .name("timers".into())
                .stack_size(256 << 10)
                .spawn(move || run(&thread_shared));
            if spawned.is_err() {
                lock(&shared).running = false;
            }
        } else if first {
            shared.changed.notify_one();
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let Some(shared) = self.service.upgrade() else { return };
        let mut q = lock(&shared);
        if let Some(Entry { deadline: Some(t), .. }) = q.timers.remove(&self.id) {
            q.by_time.remove(&(t, self.id));
        }
    }
}

fn run(shared: &Shared) {
    let mut q = lock(shared);
    while !q.closed {
        let Some((&(deadline, id), ())) = q.by_time.first_key_value() else {
            q = shared.changed.wait(q).unwrap_or_else(|e| e.into_inner());
            continue;
        };
        let now = Instant::now();
        if deadline > now {
            q = shared.changed.wait_timeout(q, deadline - now).unwrap_or_else(|e| e.into_inner()).0;
            continue;
        }
        q.by_time.pop_first();
        let callback = q.timers.get_mut(&id).map(|t| {
            t.deadline = None;
            t.callback.clone()
        });
        drop(q);
        if let Some(callback) = callback {
            callback();
        }
        q = lock(shared);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn timers_fire_in_order_and_can_be_disarmed() {
        let timers = Timers::new();
        let (tx, rx) = mpsc::channel();
        let make = |n: u32| {
            let tx = tx.clone();
            timers.timer(move || tx.send(n).unwrap())
        };
        let (a, b, c) = (make(1), make(2), make(3));
        let now = Instant::now();
        a.arm(now + Duration::from_millis(30));
        b.arm(now + Duration::from_millis(10));
        c.arm(now + Duration::from_millis(20));
        c.disarm();
        assert_eq!(rx.recv().unwrap(), 2);
        assert_eq!(rx.recv().unwrap(), 1);
        assert!(rx.try_recv().is_err());
        b.arm(now);
        assert_eq!(rx.recv().unwrap(), 2);
    }
}
