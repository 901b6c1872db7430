//! The input side that all back ends share: it holds the front end, and gives it bytes as fast as it takes them.

use bus::{CharEvent, CharFrontend};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// The front end's side of a back end.
#[derive(Default)]
pub(crate) struct Pump {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    frontend: Option<Arc<dyn CharFrontend>>,
    resumed: bool,
    open: bool,
}

impl Pump {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Connects a front end, which hears at once whether somebody is at the other end.
    pub(crate) fn attach(&self, frontend: Arc<dyn CharFrontend>) {
        let open = {
            let mut state = self.lock();
            state.frontend = Some(frontend.clone());
            state.resumed = true;
            state.open
        };
        self.changed.notify_all();
        if open {
            frontend.event(CharEvent::Opened);
        }
    }

    /// The front end has room again.
    pub(crate) fn resume(&self) {
        self.lock().resumed = true;
        self.changed.notify_all();
    }

    /// Passes an event on.
    pub(crate) fn event(&self, event: CharEvent) {
        let frontend = {
            let mut state = self.lock();
            match event {
                CharEvent::Opened => state.open = true,
                CharEvent::Closed => state.open = false,
                _ => {}
            }
            state.frontend.clone()
        };
        self.changed.notify_all();
        if let Some(frontend) = frontend {
            frontend.event(event);
        }
    }

    /// Gives bytes to the front end, waiting while there is none or it has no room.
    pub(crate) fn deliver(&self, mut data: &[u8]) {
        while !data.is_empty() {
            let frontend = {
                let mut state = self.lock();
                while state.frontend.is_none() {
                    state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
                }
                state.resumed = false;
                state.frontend.clone()
            };
            let taken = frontend.map_or(data.len(), |f| f.receive(data));
            data = &data[taken.min(data.len())..];
            if !data.is_empty() {
                let mut state = self.lock();
                while !state.resumed {
                    state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_waits_for_a_front_end_and_for_room() {
        struct Slow(Mutex<Vec<u8>>);
        impl CharFrontend for Slow {
            fn receive(&self, data: &[u8]) -> usize {
                self.0.lock().unwrap().push(data[0]);
                1
            }
            fn event(&self, _: CharEvent) {}
        }
        let pump = Arc::new(Pump::default());
        let slow = Arc::new(Slow(Mutex::new(vec![])));
        let p = pump.clone();
        let reader = std::thread::spawn(move || p.deliver(b"abc"));
        pump.attach(slow.clone());
        while !reader.is_finished() {
            pump.resume();
            std::thread::yield_now();
        }
        assert_eq!(*slow.0.lock().unwrap(), b"abc");
    }
}
