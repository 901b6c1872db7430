//! Threads that carry out the commands of a controller.
//!
//! vCPU threads only put commands in; what waits for a disk waits here. Jobs must not take the controller's outer lock
//! (the one that register accesses hold), since [`Workers::drain`] is called under it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// A command to carry out.
pub type Job = Box<dyn FnOnce() + Send>;

/// What became of a command that waited for the user (`werror=stop`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The machine runs again: try once more.
    Retry,
    /// The controller was reset: give up.
    Abandon,
}

/// A few threads, made when they are needed, and their queue.
pub struct Workers(Arc<Shared>);

struct Shared {
    name: String,
    most: usize,
    state: Mutex<State>,
    /// There is work, or an end to it.
    work: Condvar,
    /// Something finished, or stalled.
    settled: Condvar,
    /// Stalled jobs may go on.
    verdict: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
    running: usize,
    stalled: usize,
    /// Counts verdicts; a stalled job waits for the next.
    verdicts: u64,
    abandon: bool,
    ending: bool,
}

/// The deepest stack is a format's with a backing chain below it.
const STACK: usize = 512 << 10;

impl Workers {
    /// Up to `most` threads called `name`.
    pub fn new(name: &str, most: usize) -> Self {
        Self(Arc::new(Shared {
            name: name.into(),
            most: most.max(1),
            state: Mutex::default(),
            work: Condvar::new(),
            settled: Condvar::new(),
            verdict: Condvar::new(),
        }))
    }

    /// Has a job done soon. Where the host gives no thread at all it is done here and now.
    pub fn submit(&self, job: Job) {
        let mut state = self.0.lock();
        state.queue.push_back(job);
        if state.idle > 0 || state.threads >= self.0.most {
            drop(state);
            self.0.work.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let shared = self.0.clone();
        let spawned = std::thread::Builder::new()
            .name(self.0.name.clone())
            .stack_size(STACK)
            .spawn(move || shared.work());
        if let Err(e) = spawned {
            tracing::debug!("{}: no thread: {e}", self.0.name);
            let mut state = self.0.lock();
            state.threads -= 1;
            let orphan = if state.threads == 0 { state.queue.pop_back() } else { None };
            drop(state);
            if let Some(job) = orphan {
                job();
            }
        }
    }

    /// Waits until every job is done, or waits for the user.
    pub fn drain(&self) {
        let mut state = self.0.lock();
        while !state.queue.is_empty() && state.threads > state.stalled || state.running > state.stalled {
            state = self.0.settled.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// Jobs that wait for the user.
    pub fn stalled(&self) -> usize {
        let state = self.0.lock();
        state.stalled + if state.stalled > 0 { state.queue.len() } else { 0 }
    }

    /// Called from a job: waits for [`Self::resume`] or [`Self::abandon`].
    pub fn stall(&self) -> Verdict {
        let mut state = self.0.lock();
        if state.ending {
            return Verdict::Abandon;
        }
        state.stalled += 1;
        self.0.settled.notify_all();
        let seen = state.verdicts;
        while state.verdicts == seen {
            state = self.0.verdict.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        if state.abandon { Verdict::Abandon } else { Verdict::Retry }
    }

    fn judge(&self, abandon: bool, ending: bool) {
        let mut state = self.0.lock();
        state.verdicts += 1;
        state.stalled = 0;
        state.abandon = abandon;
        state.ending |= ending;
        drop(state);
        self.0.verdict.notify_all();
        self.0.work.notify_all();
    }

    /// Lets stalled jobs try again.
    pub fn resume(&self) {
        self.judge(false, false);
    }

    /// Lets stalled jobs give up, and waits until all are done.
    pub fn abandon(&self) {
        self.judge(true, false);
        self.drain();
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.judge(true, true);
    }
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Workers({})", self.0.name)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                state.running += 1;
                drop(state);
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err() {
                    tracing::error!("{}: a command panicked; the guest will not hear of it", self.name);
                }
                state = self.lock();
                state.running -= 1;
                if state.running == state.stalled {
                    self.settled.notify_all();
                }
            } else if state.ending {
                state.threads -= 1;
                return;
            } else {
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(|e| e.into_inner());
                state.idle -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn draining_waits_for_all() {
        let workers = Workers::new("test", 3);
        let done = Arc::new(AtomicUsize::new(0));
        for _ in 0..100 {
            let done = done.clone();
            workers.submit(Box::new(move || {
                done.fetch_add(1, Ordering::SeqCst);
            }));
        }
        workers.drain();
        assert_eq!(done.load(Ordering::SeqCst), 100);
    }

    #[test]
    fn stalled_jobs_count_as_quiet_and_go_on_later() {
        let workers = Arc::new(Workers::new("test", 2));
        let log = Arc::new(Mutex::new(Vec::new()));
        for _ in 0..2 {
            let (w, log) = (workers.clone(), log.clone());
            workers.submit(Box::new(move || {
                loop {
                    let verdict = w.stall();
                    log.lock().unwrap().push(verdict);
                    if verdict == Verdict::Abandon {
                        break;
                    }
                }
            }));
        }
        while workers.stalled() < 2 {
            std::thread::yield_now();
        }
        workers.drain();
        workers.resume();
        while workers.stalled() < 2 {
            std::thread::yield_now();
        }
        workers.abandon();
        let mut log = log.lock().unwrap().clone();
        log.sort_by_key(|v| *v == Verdict::Abandon);
        assert_eq!(log, [Verdict::Retry, Verdict::Retry, Verdict::Abandon, Verdict::Abandon]);
    }
}
