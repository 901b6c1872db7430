//! A machine's consoles and its input, and the thread that refreshes what is watched.

use crate::console::Bell;
use crate::input::Input;
use crate::{Clipboard, Console, Source};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between refreshes of a watched console: 66 a second.
const TICK: Duration = Duration::from_millis(15);

/// All consoles of a machine, and its input.
pub struct Displays {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    consoles: RwLock<Vec<Arc<Console>>>,
    input: Arc<Input>,
    clipboard: Arc<Clipboard>,
    bell: Arc<Bell>,
    stop: AtomicBool,
}

impl std::fmt::Debug for Displays {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Displays").field("consoles", &self.consoles()).finish_non_exhaustive()
    }
}

impl Displays {
    /// No consoles yet. The thread sleeps while nobody watches.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn new() -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            consoles: RwLock::default(),
            input: Arc::default(),
            clipboard: Arc::default(),
            bell: Arc::default(),
            stop: AtomicBool::new(false),
        });
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("display".into())
            .stack_size(256 << 10)
            .spawn(move || theirs.refresh_until_stopped())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Adds a console. The first is what viewers see unless they ask for another.
    pub fn add(&self, name: &str, source: Arc<dyn Source>) -> Arc<Console> {
        let console = Console::new(name, source, self.shared.bell.clone());
        self.shared.consoles.write().unwrap_or_else(|e| e.into_inner()).push(console.clone());
        console
    }

    /// All consoles, in the order in which they were added.
    pub fn consoles(&self) -> Vec<Arc<Console>> {
        self.shared.consoles()
    }

    /// The console of that number.
    pub fn console(&self, index: usize) -> Option<Arc<Console>> {
        self.consoles().get(index).cloned()
    }

    /// What was copied, for pasting.
    pub fn clipboard(&self) -> &Arc<Clipboard> {
        &self.shared.clipboard
    }

    /// Keyboards and pointers.
    pub fn input(&self) -> &Arc<Input> {
        &self.shared.input
    }
}

impl Shared {
    fn consoles(&self) -> Vec<Arc<Console>> {
        self.consoles.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn refresh_until_stopped(&self) {
        while !self.stop.load(Ordering::SeqCst) {
            let watched: Vec<_> = self.consoles().into_iter().filter(|c| c.is_watched()).collect();
            if watched.is_empty() {
                self.bell.wait(None);
                continue;
            }
            let start = Instant::now();
            watched.iter().for_each(|c| c.refresh());
            // A refresh that takes long (a huge screen on a slow host) leaves as much time to others.
            self.bell.wait(Some(TICK.saturating_sub(start.elapsed()).max(start.elapsed()).min(TICK * 8)));
        }
    }
}

impl Drop for Displays {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.bell.ring();
        if let Some(thread) = self.thread.take() {
            // Its only way to end is a panic in a source, which has been reported already.
            let _ = thread.join();
        }
    }
}
