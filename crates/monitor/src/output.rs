//! A monitor's output: written at once where possible, queued within bounds where not.

use bus::Chardev;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Bytes that may wait for a client that does not read, before answers wait too and events are dropped.
const LIMIT: usize = 1 << 20;

/// One monitor's output.
pub(crate) struct Output {
    chardev: Arc<dyn Chardev>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Somebody is writing outside the lock.
    busy: bool,
    dropped: u64,
    closed: bool,
}

impl Output {
    /// Output to `chardev`, with the thread that writes what could not be written at once.
    pub(crate) fn start(chardev: Arc<dyn Chardev>) -> std::io::Result<Arc<Self>> {
        let output = Arc::new(Self { chardev, state: Mutex::default(), changed: Condvar::new() });
        let mine = output.clone();
        std::thread::Builder::new()
            .name("monitor-out".into())
            .stack_size(256 << 10)
            .spawn(move || mine.drain())?;
        Ok(output)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(|e| e.into_inner())
    }

    fn drain(&self) {
        let mut state = self.lock();
        while !state.closed {
            if state.busy || state.queue.is_empty() {
                state = self.wait(state);
                continue;
            }
            let Some(data) = state.queue.pop_front() else { continue };
            state.bytes -= data.len();
            state.busy = true;
            drop(state);
            self.chardev.write_all(&data);
            state = self.lock();
            state.busy = false;
            self.changed.notify_all();
        }
    }

    /// Sends an answer: waits while the client does not read.
    pub(crate) fn answer(&self, data: Vec<u8>) {
        let mut state = self.lock();
        while state.bytes > LIMIT && !state.closed {
            state = self.wait(state);
        }
        if state.queue.is_empty() && !state.busy {
            state.busy = true;
            drop(state);
            self.chardev.write_all(&data);
            self.lock().busy = false;
        } else {
            state.bytes += data.len();
            state.queue.push_back(data);
        }
        self.changed.notify_all();
    }

    /// Sends an event: never waits; dropped when too much is waiting already.
    pub(crate) fn event(&self, data: Vec<u8>) {
        let mut state = self.lock();
        if state.bytes > LIMIT {
            state.dropped += 1;
            if state.dropped.is_power_of_two() {
                tracing::warn!("{} events were dropped: a monitor's client does not read", state.dropped);
            }
            return;
        }
        state.bytes += data.len();
        state.queue.push_back(data);
        self.changed.notify_all();
    }

    /// Forgets what a client that has gone did not read.
    pub(crate) fn discard(&self) {
        let mut state = self.lock();
        state.queue.clear();
        state.bytes = 0;
        self.changed.notify_all();
    }

    /// Waits until everything has been written, or a client that does not read holds it up.
    pub(crate) fn flush(&self) {
        let mut state = self.lock();
        let until = std::time::Instant::now() + std::time::Duration::from_millis(500);
        while (state.busy || !state.queue.is_empty()) && std::time::Instant::now() < until {
            let left = until.saturating_duration_since(std::time::Instant::now());
            state = self.changed.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// Ends the thread.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}
