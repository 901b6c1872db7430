//! `logfile=`: a copy of the output in a file.

use crate::{Result, host};
use bus::{CharFrontend, Chardev};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

struct Logged {
    inner: Arc<dyn Chardev>,
    file: Mutex<File>,
}

pub(crate) fn wrap(inner: Arc<dyn Chardev>, path: &Path, append: bool) -> Result<Arc<dyn Chardev>> {
    let mut options = File::options();
    options.create(true).append(append).write(true).truncate(!append);
    let file = options.open(path).map_err(host(format!("cannot open the log file '{}'", path.display())))?;
    Ok(Arc::new(Logged { inner, file: Mutex::new(file) }))
}

impl Logged {
    fn log(&self, data: &[u8]) {
        let mut file = self.file.lock().unwrap_or_else(|e| e.into_inner());
        if let Err(e) = file.write_all(data) {
            tracing::warn!("character device log: {e}");
        }
    }
}

impl Chardev for Logged {
    fn write(&self, data: &[u8]) {
        self.log(data);
        self.inner.write(data);
    }

    fn write_all(&self, data: &[u8]) {
        self.log(data);
        self.inner.write_all(data);
    }

    fn attach(&self, frontend: Arc<dyn CharFrontend>) {
        self.inner.attach(frontend);
    }

    fn resume_input(&self) {
        self.inner.resume_input();
    }

    fn filename(&self) -> String {
        self.inner.filename()
    }

    fn take_fds(&self) -> Vec<OwnedFd> {
        self.inner.take_fds()
    }

    fn read_back(&self, most: usize) -> Option<Vec<u8>> {
        self.inner.read_back(most)
    }
}
