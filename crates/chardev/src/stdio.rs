//! `stdio`: the terminal that the program runs in.

use crate::pump::Pump;
use crate::{Error, Kind, Result, host, stream};
use base::props::Properties;
use bus::{CharEvent, CharFrontend, Chardev};
use rustix::termios::{OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use schemars::JsonSchema;
use serde::Deserialize;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Spec {
    /// Let Ctrl-C end the program instead of going to the guest.
    signal: bool,
}

impl Default for Spec {
    fn default() -> Self {
        Self { signal: true }
    }
}

pub(crate) const KIND: Kind = Kind {
    name: "stdio",
    about: "The terminal that the program runs in",
    properties: Properties::of::<Spec>,
    open: |bag| {
        let spec: Spec = bag.spec()?;
        Ok(Stdio::open(spec.signal)?)
    },
};

/// The mode of standard input before we changed it, for every way out: drop, panic, exit.
static SAVED: OnceLock<Termios> = OnceLock::new();
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Puts the terminal back as it was. Does nothing if it was never changed.
pub fn restore_terminal() {
    if let Some(saved) = SAVED.get() {
        // Nothing can be done about a terminal that is gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, saved);
    }
}

/// Keeps the terminal in raw mode; restores it when dropped, and when the program panics.
pub struct RawMode(());

impl RawMode {
    /// Raw mode, if standard input is a terminal; with `signal`, Ctrl-C still raises SIGINT.
    ///
    /// # Errors
    /// The host's refusal.
    pub fn enter(signal: bool) -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !rustix::termios::isatty(&stdin) {
            return Ok(None);
        }
        let saved = tcgetattr(&stdin)?;
        let mut raw = saved.clone();
        raw.make_raw();
        // Output processing stays, so that our own messages and a guest's bare line feeds look right.
        raw.output_modes = saved.output_modes;
        if signal {
            raw.local_modes |= rustix::termios::LocalModes::ISIG;
            raw.special_codes[SpecialCodeIndex::VSUSP] = 0;
        }
        if SAVED.set(saved).is_ok() {
            let previous = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore_terminal();
                previous(info);
            }));
        }
        tcsetattr(&stdin, OptionalActions::Flush, &raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// Standard input and output as a character device.
#[derive(Default)]
pub struct Stdio {
    pump: Pump,
    raw: Mutex<Option<RawMode>>,
}

impl Stdio {
    /// Takes the terminal: raw mode, and a thread that reads. There is one terminal, so this succeeds once.
    ///
    /// # Errors
    /// It is in use already, or the host's refusal.
    pub fn open(signal: bool) -> Result<Arc<Self>> {
        if TAKEN.swap(true, Ordering::SeqCst) {
            return Err(Error::Config("cannot use stdio by multiple character devices".into()));
        }
        let stdio = Arc::new(Self::default());
        let raw = RawMode::enter(signal).map_err(host("cannot set up the terminal"))?;
        *stdio.raw.lock().unwrap_or_else(|e| e.into_inner()) = raw;
        stdio.pump.event(CharEvent::Opened);
        let reader = stdio.clone();
        stream::thread("stdio", move || {
            let mut buffer = [0; 1024];
            loop {
                match rustix::io::read(io::stdin(), &mut buffer) {
                    Ok(0) => break,
                    Ok(n) => reader.pump.deliver(&buffer[..n]),
                    Err(rustix::io::Errno::INTR) => {}
                    Err(e) => {
                        tracing::debug!("standard input: {e}");
                        break;
                    }
                }
            }
            reader.pump.event(CharEvent::Closed);
        })?;
        Ok(stdio)
    }

    /// Tells the front end the size of the terminal.
    pub fn resized(&self) {
        if let Ok(size) = tcgetwinsize(io::stdout()) {
            self.pump.event(CharEvent::Resize { columns: size.ws_col, rows: size.ws_row });
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
        self.pump.attach(frontend);
        self.resized();
    }

    fn resume_input(&self) {
        self.pump.resume();
    }

    fn filename(&self) -> String {
        "stdio".into()
    }
}
