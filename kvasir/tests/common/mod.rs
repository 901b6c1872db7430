//! Runs the program as a user would, with a time limit.
#![allow(dead_code)] // each test program uses its part

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// First line that the test guest's init prints.
pub const READY: &str = "KVASIR-GUEST-READY";

/// A file of the prepared guest.
pub fn guest(name: &str) -> String {
    let cache = std::env::var_os("KVASIR_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        base.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"))
            .join("kvasir")
    });
    let path = cache.join("guest").join(name);
    assert!(path.exists(), "{} is missing: run 'cargo xtask guest'", path.display());
    path.into_os_string().into_string().expect("the cache has a UTF-8 path")
}

/// The program under test.
pub fn kvasir(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvasir"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A finished run.
pub struct Finished {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// A run under way: its output is collected, and searched with [`Run::wait_for`].
pub struct Run {
    child: Child,
    output: Receiver<(bool, Vec<u8>)>,
    stdout: String,
    stderr: String,
    deadline: Instant,
}

impl Run {
    /// Starts it; everything must be over in `limit`.
    pub fn start(mut command: Command, limit: Duration) -> Self {
        let mut child = command.spawn().expect("the program starts");
        let (tx, output) = channel();
        let streams: [(bool, Option<Box<dyn Read + Send>>); 2] = [
            (false, child.stdout.take().map(|s| Box::new(s) as _)),
            (true, child.stderr.take().map(|s| Box::new(s) as _)),
        ];
        for (is_err, stream) in streams {
            let (Some(mut stream), tx) = (stream, tx.clone()) else { continue };
            std::thread::spawn(move || {
                let mut buf = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut buf) {
                    if tx.send((is_err, buf[..n].to_vec())).is_err() {
                        return;
                    }
                }
            });
        }
        Self { child, output, stdout: String::new(), stderr: String::new(), deadline: Instant::now() + limit }
    }

    fn pump(&mut self) -> bool {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.output.recv_timeout(left) {
            Ok((is_err, bytes)) => {
                let text = if is_err { &mut self.stderr } else { &mut self.stdout };
                text.push_str(&String::from_utf8_lossy(&bytes));
                true
            }
            Err(RecvTimeoutError::Disconnected) => false,
            Err(RecvTimeoutError::Timeout) => {
                let _ = self.child.kill();
                panic!("not finished in time\n--- stdout\n{}\n--- stderr\n{}", self.stdout, self.stderr);
            }
        }
    }

    /// Waits until the guest has printed `text`.
    pub fn wait_for(&mut self, text: &str) {
        while !self.stdout.contains(text) {
            assert!(
                self.pump(),
                "ended without '{text}'\n--- stdout\n{}\n--- stderr\n{}",
                self.stdout,
                self.stderr
            );
        }
    }

    /// Waits until the guest has printed `text`, doing something each time nothing happens for half a second.
    pub fn wait_doing(&mut self, text: &str, mut act: impl FnMut(&mut Self)) {
        while !self.stdout.contains(text) {
            act(self);
            let whole = std::mem::replace(&mut self.deadline, Instant::now() + Duration::from_millis(500));
            while !self.stdout.contains(text) && self.pump_until_deadline() {}
            assert!(Instant::now() < whole, "no '{text}' in time\n--- stdout\n{}", self.stdout);
            self.deadline = whole;
        }
    }

    /// As `pump`, but a deadline that passes is no failure.
    fn pump_until_deadline(&mut self) -> bool {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let Ok((is_err, bytes)) = self.output.recv_timeout(left) else { return false };
        let text = if is_err { &mut self.stderr } else { &mut self.stdout };
        text.push_str(&String::from_utf8_lossy(&bytes));
        true
    }

    /// Waits for more output, whatever it is.
    pub fn more(&mut self) {
        assert!(self.pump(), "ended\n--- stdout\n{}\n--- stderr\n{}", self.stdout, self.stderr);
    }

    /// Whether the guest has printed `text` twice.
    pub fn seen_twice(&self, text: &str) -> bool {
        self.stdout.matches(text).count() >= 2
    }

    /// Types something.
    pub fn send(&mut self, bytes: &[u8]) {
        let stdin = self.child.stdin.as_mut().expect("started with a pipe");
        stdin.write_all(bytes).and_then(|()| stdin.flush()).expect("it reads its input");
    }

    /// Waits for the end.
    pub fn finish(mut self) -> Finished {
        while self.pump() {}
        let status = self.child.wait().expect("it was started").code();
        Finished {
            status,
            stdout: std::mem::take(&mut self.stdout),
            stderr: std::mem::take(&mut self.stderr),
        }
    }
}

/// Runs to the end.
pub fn run(args: &[&str]) -> Finished {
    Run::start(kvasir(args), Duration::from_secs(60)).finish()
}
