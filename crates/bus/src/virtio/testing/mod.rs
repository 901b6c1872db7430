//! The other side, for tests: a guest driver on a small guest memory, and an accelerator that only takes notes.

mod guest;
mod ring;

pub use guest::{Guest, TRANSPORTS, Transport};
pub use ring::{Buffer, DriverRing};

use accel::{Doorbells, IoAddress, IrqFd, Irqs};
use base::EventFd;
use memory::{Backing, GuestMemory, Layout};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// Guest RAM of 2 MiB at zero and 1 MiB at 4 GiB.
pub fn ram() -> GuestMemory {
    let layout = Layout::pc(3 << 20, 2 << 20).expect("a valid layout");
    GuestMemory::new(&layout, &Backing::Anonymous, false).expect("3 MiB")
}

/// How long a test waits for another thread before it fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// Interrupt inputs that remember what came.
#[derive(Default)]
pub struct Notes {
    state: Mutex<NotesState>,
    changed: Condvar,
}

#[derive(Default)]
struct NotesState {
    messages: Vec<(u64, u32)>,
    lines: Vec<(u32, bool)>,
}

impl Notes {
    fn lock(&self) -> MutexGuard<'_, NotesState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes the messages that came so far.
    pub fn take_messages(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.lock().messages)
    }

    /// Takes the changes of lines that came so far.
    pub fn take_lines(&self) -> Vec<(u32, bool)> {
        std::mem::take(&mut self.lock().lines)
    }

    /// Level of a line.
    pub fn level(&self, gsi: u32) -> bool {
        self.lock().lines.iter().rev().find(|(g, _)| *g == gsi).is_some_and(|(_, level)| *level)
    }

    /// Waits until `done` holds, looking again after each interrupt (and now and then).
    ///
    /// # Panics
    /// When it does not within a generous time.
    pub fn wait(&self, what: &str, mut done: impl FnMut() -> bool) {
        let start = std::time::Instant::now();
        while !done() {
            assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
            let guard = self.lock();
            let step = Duration::from_millis(2);
            drop(self.changed.wait_timeout(guard, step).unwrap_or_else(|e| e.into_inner()));
        }
    }
}

impl Irqs for Notes {
    fn set_line(&self, gsi: u32, level: bool) {
        self.lock().lines.push((gsi, level));
        self.changed.notify_all();
    }

    fn msi(&self, address: u64, data: u32) {
        self.lock().messages.push((address, data));
        self.changed.notify_all();
    }
}

/// Doorbells that a test rings by hand.
#[derive(Default)]
pub struct Bells {
    attached: Mutex<Vec<Bell>>,
    routes: Arc<Mutex<Routes>>,
}

/// Place, access length, value, and the eventfd that is signalled.
type Bell = (IoAddress, u32, Option<u64>, EventFd);
/// The messages that interrupt eventfds are routed to.
pub type Routes = Vec<Option<(u64, u32)>>;

impl Bells {
    /// A guest write; returns whether some doorbell took it.
    pub fn ring(&self, at: IoAddress, len: u32, value: u64) -> bool {
        let attached = self.attached.lock().unwrap_or_else(|e| e.into_inner());
        let mut rung = false;
        for (a, l, m, fd) in attached.iter() {
            if *a == at && (*l == 0 || *l == len) && m.is_none_or(|m| m == value) {
                fd.signal();
                rung = true;
            }
        }
        rung
    }

    /// Where doorbells are attached.
    pub fn places(&self) -> Vec<(IoAddress, u32, Option<u64>)> {
        let attached = self.attached.lock().unwrap_or_else(|e| e.into_inner());
        attached.iter().map(|(a, l, m, _)| (*a, *l, *m)).collect()
    }

    /// The routes of the interrupt eventfds, in the order of their creation.
    pub fn routes(&self) -> Routes {
        self.routes.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

impl Doorbells for Bells {
    fn attach(&self, at: IoAddress, len: u32, datamatch: Option<u64>, fd: &EventFd) -> accel::Result<()> {
        let fd = fd.try_clone().map_err(|source| accel::Error::Host { what: "dup".into(), source })?;
        self.attached.lock().unwrap_or_else(|e| e.into_inner()).push((at, len, datamatch, fd));
        Ok(())
    }

    fn detach(&self, at: IoAddress, len: u32, datamatch: Option<u64>, _: &EventFd) -> accel::Result<()> {
        let mut attached = self.attached.lock().unwrap_or_else(|e| e.into_inner());
        match attached.iter().position(|(a, l, m, _)| (*a, *l, *m) == (at, len, datamatch)) {
            Some(i) => {
                attached.remove(i);
                Ok(())
            }
            None => Err(accel::Error::Unsupported("nothing is attached there".into())),
        }
    }

    fn irqfd(&self, _: &EventFd) -> accel::Result<Box<dyn IrqFd>> {
        let mut routes = self.routes.lock().unwrap_or_else(|e| e.into_inner());
        routes.push(None);
        Ok(Box::new(NotedRoute { index: routes.len() - 1, routes: self.routes.clone() }))
    }
}

struct NotedRoute {
    index: usize,
    routes: Arc<Mutex<Routes>>,
}

impl IrqFd for NotedRoute {
    fn route(&self, message: Option<(u64, u32)>) -> accel::Result<()> {
        self.routes.lock().unwrap_or_else(|e| e.into_inner())[self.index] = message;
        Ok(())
    }
}
