//! `pty`: a pseudo-terminal that users open with a terminal program; its name is logged and shown by monitors.

use crate::pump::Pump;
use crate::{Kind, Result, host, stream};
use base::props::Properties;
use bus::{CharEvent, CharFrontend, Chardev};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use schemars::JsonSchema;
use serde::Deserialize;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Spec {
    /// Symbolic link to make to the terminal.
    path: Option<PathBuf>,
}

pub(crate) const KIND: Kind = Kind {
    name: "pty",
    about: "A new pseudo-terminal",
    properties: Properties::of::<Spec>,
    open: |bag| {
        let spec: Spec = bag.spec()?;
        Ok(open(spec)?)
    },
};

/// How often a terminal that nobody has open is looked at.
const LOOK: Duration = Duration::from_millis(100);

struct Pty {
    master: OwnedFd,
    name: String,
    link: Option<PathBuf>,
    open: AtomicBool,
    pump: Pump,
}

fn open(spec: Spec) -> Result<Arc<Pty>> {
    let fail = |e: rustix::io::Errno| host("cannot make a pseudo-terminal")(e.into());
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).map_err(fail)?;
    grantpt(&master).map_err(fail)?;
    unlockpt(&master).map_err(fail)?;
    let name = ptsname(&master, Vec::new()).map_err(fail)?;
    let name = name.to_string_lossy().into_owned();
    {
        // The line discipline must not echo what the guest says back to it.
        let slave =
            std::fs::File::options().read(true).write(true).open(&name).map_err(host(name.clone()))?;
        let mut mode = tcgetattr(&slave).map_err(fail)?;
        mode.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &mode).map_err(fail)?;
    }
    stream::nonblocking(&master).map_err(host("pseudo-terminal"))?;
    if let Some(link) = &spec.path {
        std::os::unix::fs::symlink(&name, link)
            .map_err(host(format!("cannot make the link '{}'", link.display())))?;
    }
    let pty =
        Arc::new(Pty { master, name, link: spec.path, open: AtomicBool::new(false), pump: Pump::default() });
    let mine = Arc::downgrade(&pty);
    stream::thread("pty", move || {
        while let Some(pty) = mine.upgrade() {
            pty.step();
        }
    })?;
    Ok(pty)
}

impl Pty {
    /// Reads once, or notices that somebody came or went.
    fn step(&self) {
        let mut buffer = [0; 4096];
        // With no slave open, reads of the master fail with EIO and poll reports a hang-up.
        match rustix::io::read(&self.master, &mut buffer) {
            Ok(0) | Err(rustix::io::Errno::IO) => {
                self.set_open(false);
                std::thread::sleep(LOOK);
            }
            Ok(n) => {
                self.set_open(true);
                self.pump.deliver(&buffer[..n]);
            }
            Err(rustix::io::Errno::AGAIN) => {
                self.set_open(true);
                let timeout = rustix::time::Timespec { tv_sec: 1, tv_nsec: 0 };
                // An error shows in the next read.
                let _ = poll(&mut [PollFd::new(&self.master, PollFlags::IN)], Some(&timeout));
            }
            Err(_) => std::thread::sleep(LOOK),
        }
    }

    fn set_open(&self, open: bool) {
        if self.open.swap(open, Ordering::SeqCst) != open {
            self.pump.event(if open { CharEvent::Opened } else { CharEvent::Closed });
        }
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        if let Some(link) = &self.link {
            // It may have been removed already.
            let _ = std::fs::remove_file(link);
        }
    }
}

impl Chardev for Pty {
    fn write(&self, data: &[u8]) {
        if self.open.load(Ordering::SeqCst) {
            stream::write(self.master.as_fd(), data, false);
        }
    }

    fn write_all(&self, data: &[u8]) {
        if self.open.load(Ordering::SeqCst) {
            stream::write(self.master.as_fd(), data, true);
        }
    }

    fn attach(&self, frontend: Arc<dyn CharFrontend>) {
        self.pump.attach(frontend);
    }

    fn resume_input(&self) {
        self.pump.resume();
    }

    fn filename(&self) -> String {
        format!("pty:{}", self.name)
    }
}
