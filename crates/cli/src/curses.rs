//! `--display curses`: the guest's text screen live in this terminal.

use crate::terminal::{Escape, EscapeParser};
use display::input::Keymap;
use display::terminal::{KeyDecoder, Painter, notice};
use display::{Console, Displays};
use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex};

#[derive(Default)]
struct Flags {
    news: bool,
    stop: bool,
}

/// A screen in the terminal; the terminal is restored when it is dropped.
pub(crate) struct Curses {
    flags: Arc<(Mutex<Flags>, Condvar)>,
    painter: Option<std::thread::JoinHandle<()>>,
}

fn screen(console: &Console) -> display::TextScreen {
    console.text().unwrap_or_else(|| {
        let (width, height) = console.canvas().size();
        notice(&format!("The guest shows graphics, {width} by {height}: look at it by VNC or a screenshot."))
    })
}

fn signal(flags: &(Mutex<Flags>, Condvar), set: impl FnOnce(&mut Flags)) {
    set(&mut flags.0.lock().unwrap_or_else(|e| e.into_inner()));
    flags.1.notify_all();
}

impl Curses {
    /// Shows the first console, and passes keys to the guest; `ask` gets what the user asks of us by Ctrl-A.
    pub(crate) fn start(
        displays: &Arc<Displays>,
        keymap: Keymap,
        ask: impl Fn(Escape) + Send + 'static,
    ) -> io::Result<Self> {
        let console = displays.console(0).ok_or_else(|| {
            io::Error::other("there is no screen: give the machine a display device (--vga std)")
        })?;
        let flags: Arc<(Mutex<Flags>, Condvar)> = Arc::default();
        let theirs = flags.clone();
        let painter =
            std::thread::Builder::new().name("curses".into()).stack_size(256 << 10).spawn(move || {
                let wake = theirs.clone();
                let _viewer = console.watch(move || signal(&wake, |f| f.news = true));
                let mut painter = Painter::default();
                let mut out = io::stdout();
                loop {
                    // A terminal that is gone sees nothing; the guest goes on.
                    let _ =
                        out.write_all(painter.paint(&screen(&console)).as_bytes()).and_then(|()| out.flush());
                    let flags = theirs.0.lock().unwrap_or_else(|e| e.into_inner());
                    let waited = theirs.1.wait_while(flags, |f| !f.news && !f.stop);
                    let mut flags = waited.unwrap_or_else(|e| e.into_inner());
                    flags.news = false;
                    if flags.stop {
                        break;
                    }
                }
                let _ = out.write_all(painter.leave().as_bytes()).and_then(|()| out.flush()); // as above
            })?;
        let input = displays.input().clone();
        // Not joined: it waits for the user's next key.
        std::thread::Builder::new().name("curses-keys".into()).stack_size(128 << 10).spawn(move || {
            let (mut parser, mut decoder) = (EscapeParser::default(), KeyDecoder::new(keymap));
            let mut buf = [0; 256];
            while let Ok(n @ 1..) = io::stdin().read(&mut buf) {
                let mut guest = Vec::new();
                parser.feed(&buf[..n], &mut guest, &ask);
                for event in decoder.decode(&guest) {
                    input.send(&[event]);
                }
            }
        })?;
        Ok(Self { flags, painter: Some(painter) })
    }
}

impl Drop for Curses {
    fn drop(&mut self) {
        signal(&self.flags, |f| f.stop = true);
        if let Some(thread) = self.painter.take() {
            // A panic there has been reported.
            let _ = thread.join();
        }
    }
}
