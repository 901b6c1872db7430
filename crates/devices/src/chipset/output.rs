//! Collects single bytes that a guest writes and hands them to a character device in pieces.
//!
//! A byte at a time, each would cost the back end a system call. So they wait for the end of the line, for the buffer
//! to fill, or for a moment to pass.

use base::{Timer, Timers};
use bus::Chardev;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

const CAPACITY: usize = 512;
const DELAY: Duration = Duration::from_millis(1);

/// A buffered way out. Its lock is held while the back end writes, so it must not be used under a lock that
/// [`bus::CharFrontend::receive`] takes.
pub(super) struct Output {
    shared: Arc<Shared>,
    timer: Timer,
    // Timers live as long as their service.
    _timers: Timers,
}

struct Shared {
    chardev: Arc<dyn Chardev>,
    buffer: Mutex<Buffer>,
}

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// The timer will call.
    armed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn send(&self, buffer: &mut Buffer) {
        if !buffer.bytes.is_empty() {
            self.chardev.write(&buffer.bytes);
            buffer.bytes.clear();
        }
    }
}

impl Output {
    /// A way out to `chardev`.
    pub(super) fn new(chardev: Arc<dyn Chardev>, timers: &Timers) -> Self {
        let shared = Arc::new(Shared { chardev, buffer: Mutex::default() });
        let weak = Arc::downgrade(&shared);
        let timer = timers.timer(move || {
            if let Some(shared) = weak.upgrade() {
                let mut buffer = shared.lock();
                buffer.armed = false;
                shared.send(&mut buffer);
            }
        });
        Self { shared, timer, _timers: timers.clone() }
    }

    /// The back end.
    pub(super) fn chardev(&self) -> &dyn Chardev {
        &*self.shared.chardev
    }

    /// Takes a byte.
    pub(super) fn push(&self, byte: u8) {
        let mut buffer = self.shared.lock();
        buffer.bytes.push(byte);
        if byte == b'\n' || buffer.bytes.len() >= CAPACITY {
            self.shared.send(&mut buffer);
        } else if !buffer.armed {
            buffer.armed = true;
            self.timer.arm(Instant::now() + DELAY);
        }
    }

    /// Hands over what waits.
    pub(super) fn flush(&self) {
        self.shared.send(&mut self.shared.lock());
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.flush();
    }
}

/// A back end that remembers what it was given, for tests.
#[cfg(test)]
#[derive(Default)]
pub(super) struct Recorder {
    /// The pieces written.
    pub(super) written: Mutex<Vec<Vec<u8>>>,
    /// The front end attached.
    pub(super) frontend: Mutex<Option<Arc<dyn bus::CharFrontend>>>,
    /// How often input was resumed.
    pub(super) resumed: std::sync::atomic::AtomicU32,
}

#[cfg(test)]
impl Recorder {
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.written.lock().unwrap().concat()).into_owned()
    }
    pub(super) fn pieces(&self) -> usize {
        self.written.lock().unwrap().len()
    }
}

#[cfg(test)]
impl Chardev for Recorder {
    fn write(&self, data: &[u8]) {
        self.written.lock().unwrap().push(data.to_vec());
    }
    fn attach(&self, frontend: Arc<dyn bus::CharFrontend>) {
        *self.frontend.lock().unwrap() = Some(frontend);
    }
    fn resume_input(&self) {
        self.resumed.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_go_at_once_and_the_rest_in_a_moment() {
        let recorder = Arc::new(Recorder::default());
        let output = Output::new(recorder.clone(), &Timers::new());
        b"one\ntwo\n".iter().for_each(|b| output.push(*b));
        assert_eq!((recorder.pieces(), recorder.text().as_str()), (2, "one\ntwo\n"));
        b"login: ".iter().for_each(|b| output.push(*b));
        while !recorder.text().ends_with("login: ") {
            std::thread::sleep(DELAY);
        }
        output.push(b'x');
        drop(output);
        assert!(recorder.text().ends_with("login: x"));
    }

    #[test]
    fn long_lines_go_in_pieces() {
        let recorder = Arc::new(Recorder::default());
        let output = Output::new(recorder.clone(), &Timers::new());
        (0..2 * CAPACITY).for_each(|_| output.push(b'x'));
        assert!(recorder.text().len() >= 2 * CAPACITY && recorder.pieces() < CAPACITY);
    }
}
