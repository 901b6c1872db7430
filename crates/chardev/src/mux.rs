//! The multiplexer: several front ends share one back end; Ctrl-A c switches where the input goes.

use crate::escape::{Escape, EscapeParser, Input};
use bus::{CharEvent, CharFrontend, Chardev};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

type Ask = Arc<dyn Fn(Escape) + Send + Sync>;

/// What `Ctrl-A h` shows.
const HELP: &str = "\r\nC-a h    print this help\r\nC-a x    exit the emulator\r\nC-a p    press the power button\r\nC-a r    reset\r\nC-a b    send break (magic sysrq)\r\nC-a c    switch between console and monitor\r\nC-a C-a  sends C-a\r\n";

/// A multiplexer. Each [`Chardev::share`] gives a port for one front end.
pub struct Mux {
    inner: Arc<dyn Chardev>,
    state: Mutex<State>,
    me: Weak<Mux>,
}

#[derive(Default)]
struct State {
    ports: Vec<Slot>,
    focus: usize,
    parser: EscapeParser,
    open: bool,
    ask: Option<Ask>,
    /// Input that the front end had no room for.
    held: Vec<u8>,
}

struct Slot {
    frontend: Option<Arc<dyn CharFrontend>>,
}

impl Mux {
    /// A multiplexer in front of `inner`.
    pub fn new(inner: Arc<dyn Chardev>) -> Arc<Self> {
        let mux = Arc::new_cyclic(|me| Self { inner, state: Mutex::default(), me: me.clone() });
        mux.inner.attach(Arc::new(Hub(Arc::downgrade(&mux))));
        mux
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Who answers escapes that the multiplexer cannot: quit, power button, reset.
    pub fn on_escape(&self, ask: impl Fn(Escape) + Send + Sync + 'static) {
        self.lock().ask = Some(Arc::new(ask));
    }

    /// Gives the input to front end `port` (in the order of [`Chardev::share`]).
    pub fn focus(&self, port: usize) {
        let (old, new) = {
            let mut state = self.lock();
            if port >= state.ports.len() || port == state.focus {
                return;
            }
            let old = state.ports.get(state.focus).and_then(|p| p.frontend.clone());
            state.focus = port;
            (old, state.ports[port].frontend.clone())
        };
        if let Some(old) = old {
            old.event(CharEvent::Unfocused);
        }
        if let Some(new) = new {
            new.event(CharEvent::Focused);
        }
    }

    fn focused(&self) -> Option<Arc<dyn CharFrontend>> {
        let state = self.lock();
        state.ports.get(state.focus)?.frontend.clone()
    }

    fn escape(&self, escape: Escape) {
        match escape {
            Escape::Help => self.inner.write(HELP.as_bytes()),
            Escape::Switch => {
                let next = {
                    let state = self.lock();
                    if state.ports.is_empty() { 0 } else { (state.focus + 1) % state.ports.len() }
                };
                self.focus(next);
            }
            Escape::Break => {
                if let Some(frontend) = self.focused() {
                    frontend.event(CharEvent::Break);
                }
            }
            other => {
                let ask = self.lock().ask.clone();
                if let Some(ask) = ask {
                    ask(other);
                }
            }
        }
    }
}

/// The multiplexer as front end of its back end.
struct Hub(Weak<Mux>);

impl CharFrontend for Hub {
    fn receive(&self, data: &[u8]) -> usize {
        let Some(mux) = self.0.upgrade() else { return data.len() };
        if !mux.flush() {
            return 0;
        }
        for &byte in data {
            let mut state = mux.lock();
            match state.parser.next(byte) {
                Input::Byte(b) => state.held.push(b),
                Input::Nothing => {}
                Input::Escape(escape) => {
                    drop(state);
                    // What does not fit before a switch is lost, as on a real line.
                    mux.flush();
                    mux.lock().held.clear();
                    mux.escape(escape);
                }
            }
        }
        // What does not fit now is kept; it is no more than one read of the back end.
        mux.flush();
        data.len()
    }

    fn event(&self, event: CharEvent) {
        let Some(mux) = self.0.upgrade() else { return };
        let all: Vec<_> = {
            let mut state = mux.lock();
            match event {
                CharEvent::Opened => state.open = true,
                CharEvent::Closed => state.open = false,
                _ => {}
            }
            state.ports.iter().filter_map(|p| p.frontend.clone()).collect()
        };
        all.iter().for_each(|f| f.event(event));
    }
}

impl Mux {
    /// Gives the front end with the focus what is held for it. Returns whether it took all.
    fn flush(&self) -> bool {
        let held = std::mem::take(&mut self.lock().held);
        if held.is_empty() {
            return true;
        }
        let taken = self.focused().map_or(held.len(), |f| f.receive(&held));
        if let Some(rest) = held.get(taken..).filter(|r| !r.is_empty()) {
            self.lock().held = rest.to_vec();
            return false;
        }
        true
    }

    fn resume(&self) {
        if self.flush() {
            self.inner.resume_input();
        }
    }
}

/// One front end's side.
struct Port {
    mux: Arc<Mux>,
    index: usize,
}

impl Chardev for Port {
    fn write(&self, data: &[u8]) {
        self.mux.inner.write(data);
    }

    fn write_all(&self, data: &[u8]) {
        self.mux.inner.write_all(data);
    }

    fn attach(&self, frontend: Arc<dyn CharFrontend>) {
        let (open, focused) = {
            let mut state = self.mux.lock();
            if let Some(slot) = state.ports.get_mut(self.index) {
                slot.frontend = Some(frontend.clone());
            }
            (state.open, state.focus == self.index)
        };
        if !focused {
            frontend.event(CharEvent::Unfocused);
        }
        if open {
            frontend.event(CharEvent::Opened);
        }
        self.mux.resume();
    }

    fn resume_input(&self) {
        self.mux.resume();
    }

    fn filename(&self) -> String {
        "mux".into()
    }
}

impl Chardev for Mux {
    fn write(&self, data: &[u8]) {
        self.inner.write(data);
    }

    fn attach(&self, frontend: Arc<dyn CharFrontend>) {
        if let Some(port) = self.share() {
            port.attach(frontend);
        }
    }

    fn resume_input(&self) {
        self.resume();
    }

    fn filename(&self) -> String {
        "mux".into()
    }

    fn share(&self) -> Option<Arc<dyn Chardev>> {
        let mux = self.me.upgrade()?;
        let index = {
            let mut state = self.lock();
            state.ports.push(Slot { frontend: None });
            state.ports.len() - 1
        };
        Some(Arc::new(Port { mux, index }))
    }

    fn take_fds(&self) -> Vec<OwnedFd> {
        self.inner.take_fds()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bus::NullChardev;

    #[derive(Default)]
    struct End {
        data: Mutex<Vec<u8>>,
        events: Mutex<Vec<CharEvent>>,
    }

    impl CharFrontend for End {
        fn receive(&self, data: &[u8]) -> usize {
            self.data.lock().unwrap().extend_from_slice(data);
            data.len()
        }
        fn event(&self, event: CharEvent) {
            self.events.lock().unwrap().push(event);
        }
    }

    #[test]
    fn input_goes_to_the_focus_and_escapes_move_it() {
        let mux = Mux::new(Arc::new(NullChardev));
        let (serial, monitor) = (Arc::new(End::default()), Arc::new(End::default()));
        mux.share().unwrap().attach(serial.clone());
        mux.share().unwrap().attach(monitor.clone());
        let asked: Arc<Mutex<Vec<Escape>>> = Arc::default();
        let a = asked.clone();
        Mux::on_escape(&mux, move |e| a.lock().unwrap().push(e));
        let hub = Hub(Arc::downgrade(&mux));
        assert_eq!(hub.receive(b"ab\x01cinfo\x01"), 9);
        assert_eq!(hub.receive(b"cx\x01x\x01b"), 6);
        assert_eq!(*serial.data.lock().unwrap(), b"abx");
        assert_eq!(*monitor.data.lock().unwrap(), b"info");
        assert_eq!(*asked.lock().unwrap(), [Escape::Quit]);
        assert_eq!(
            *monitor.events.lock().unwrap(),
            [CharEvent::Unfocused, CharEvent::Focused, CharEvent::Unfocused]
        );
        assert!(serial.events.lock().unwrap().contains(&CharEvent::Break));
    }
}
