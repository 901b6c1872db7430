//! The guest's console on the user's terminal.

use bus::{CharEvent, CharFrontend, Chardev};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};

/// What the user's escape sequences (Ctrl-A and a letter) ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Escape {
    /// `x`: quit.
    Quit,
    /// `h`: help.
    Help,
    /// `c`: monitor prompt.
    Monitor,
    /// `p`: power button.
    PowerButton,
    /// `r`: reset.
    Reset,
}

const CTRL_A: u8 = 1;

/// Help that `Ctrl-A h` shows.
pub(crate) const HELP: &str = "\r\nCtrl-A h  this help\r\nCtrl-A x  quit: end the virtual machine at once\r\nCtrl-A p  press the power button\r\nCtrl-A r  reset\r\nCtrl-A Ctrl-A  send Ctrl-A to the guest\r\n";

/// The mode of standard input before we changed it, for every way out: drop, panic, exit.
static SAVED: OnceLock<Termios> = OnceLock::new();

/// Puts the terminal back as it was. Does nothing if it was never changed.
pub(crate) fn restore() {
    if let Some(saved) = SAVED.get() {
        // Nothing can be done about a terminal that is gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, saved);
    }
}

/// Keeps the terminal in raw mode; restores it when dropped, and when the program panics.
pub(crate) struct RawMode(());

impl RawMode {
    /// Raw mode, if standard input is a terminal.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !rustix::termios::isatty(&stdin) {
            return Ok(None);
        }
        let saved = tcgetattr(&stdin)?;
        let mut raw = saved.clone();
        raw.make_raw();
        // Output processing stays, so that our own messages and a guest's bare line feeds look right.
        raw.output_modes = saved.output_modes;
        if SAVED.set(saved).is_ok() {
            let previous = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                previous(info);
            }));
        }
        tcsetattr(&stdin, OptionalActions::Flush, &raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Splits input into what the guest gets and what the user asks of us.
#[derive(Default)]
pub(crate) struct EscapeParser {
    escaped: bool,
}

impl EscapeParser {
    /// Appends the guest's bytes to `guest` and calls `ask` for escapes.
    pub(crate) fn feed(&mut self, input: &[u8], guest: &mut Vec<u8>, mut ask: impl FnMut(Escape)) {
        for &byte in input {
            if !std::mem::take(&mut self.escaped) {
                match byte {
                    CTRL_A => self.escaped = true,
                    _ => guest.push(byte),
                }
                continue;
            }
            match byte {
                CTRL_A | b'a' => guest.push(CTRL_A),
                b'x' => ask(Escape::Quit),
                b'h' | b'?' => ask(Escape::Help),
                b'c' => ask(Escape::Monitor),
                b'p' => ask(Escape::PowerButton),
                b'r' => ask(Escape::Reset),
                _ => {}
            }
        }
    }
}

/// Standard input and output as a character device.
#[derive(Default)]
pub(crate) struct Stdio {
    state: Mutex<State>,
    room: Condvar,
}

#[derive(Default)]
struct State {
    frontend: Option<Arc<dyn CharFrontend>>,
    resumed: bool,
}

impl Stdio {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Tells the guest the size of the terminal.
    pub(crate) fn resized(&self) {
        if let (Ok(size), Some(frontend)) = (tcgetwinsize(io::stdout()), self.lock().frontend.clone()) {
            frontend.event(CharEvent::Resize { columns: size.ws_col, rows: size.ws_row });
        }
    }

    /// Reads standard input until its end, on a thread of its own.
    pub(crate) fn spawn_reader(self: &Arc<Self>, ask: impl Fn(Escape) + Send + 'static) -> io::Result<()> {
        let this = self.clone();
        std::thread::Builder::new().name("stdin".into()).stack_size(256 << 10).spawn(move || {
            let mut parser = EscapeParser::default();
            let (mut buf, mut guest) = ([0; 1024], Vec::new());
            loop {
                let n = match rustix::io::read(io::stdin(), &mut buf) {
                    Ok(0) => return,
                    Ok(n) => n,
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(e) => {
                        tracing::debug!("standard input: {e}");
                        return;
                    }
                };
                guest.clear();
                parser.feed(&buf[..n], &mut guest, &ask);
                this.deliver(&guest);
            }
        })?;
        Ok(())
    }

    /// Gives bytes to the front end, waiting while it has no room.
    fn deliver(&self, mut data: &[u8]) {
        while !data.is_empty() {
            let frontend = {
                let mut state = self.lock();
                while state.frontend.is_none() {
                    state = self.room.wait(state).unwrap_or_else(|e| e.into_inner());
                }
                state.resumed = false;
                state.frontend.clone()
            };
            let taken = frontend.map_or(data.len(), |f| f.receive(data));
            data = &data[taken.min(data.len())..];
            if !data.is_empty() {
                let mut state = self.lock();
                while !state.resumed {
                    state = self.room.wait(state).unwrap_or_else(|e| e.into_inner());
                }
            }
        }
    }
}

impl Chardev for Stdio {
    fn write(&self, data: &[u8]) {
        let mut out = io::stdout().lock();
        // A reader that went away (a closed pipe) is no reason to stop the guest.
        let _ = out.write_all(data).and_then(|()| out.flush());
    }

    fn attach(&self, frontend: Arc<dyn CharFrontend>) {
        self.lock().frontend = Some(frontend);
        self.room.notify_all();
        self.resized();
    }

    fn resume_input(&self) {
        self.lock().resumed = true;
        self.room.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_taken_out_of_the_input() {
        let (mut guest, mut asked) = (Vec::new(), Vec::new());
        let mut p = EscapeParser::default();
        p.feed(b"ls\x01", &mut guest, |e| asked.push(e));
        p.feed(b"x\x01\x01b\x01zc", &mut guest, |e| asked.push(e));
        assert_eq!(guest, b"ls\x01bc");
        assert_eq!(asked, [Escape::Quit]);
    }

    #[test]
    fn input_waits_for_room() {
        struct Slow(Mutex<Vec<u8>>);
        impl CharFrontend for Slow {
            fn receive(&self, data: &[u8]) -> usize {
                self.0.lock().unwrap().push(data[0]);
                1
            }
            fn event(&self, _: CharEvent) {}
        }
        let stdio = Arc::new(Stdio::default());
        let slow = Arc::new(Slow(Mutex::new(vec![])));
        stdio.attach(slow.clone());
        let t = stdio.clone();
        let reader = std::thread::spawn(move || t.deliver(b"abc"));
        while !reader.is_finished() {
            stdio.resume_input();
            std::thread::yield_now();
        }
        assert_eq!(*slow.0.lock().unwrap(), b"abc");
    }
}
