//! `-daemonize`: the parent waits until the machine is ready, the child goes to the background.
#![allow(unsafe_code)] // fork has no safe form

use crate::{Error, Result};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The child's side: tells the parent when it is ready.
pub(crate) struct Daemon(OwnedFd);

/// Forks. Returns in the child only; the parent waits for it and exits with its status.
///
/// Must be called before there are threads.
pub(crate) fn fork() -> Result<Daemon> {
    let fail = |what: &str, e: std::io::Error| Error::new(format!("-daemonize: {what}: {e}"));
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|e| fail("cannot make a pipe", e.into()))?;
    // SAFETY: the process has one thread, so the child may go on as usual.
    match unsafe { libc::fork() } {
        -1 => Err(fail("cannot fork", std::io::Error::last_os_error())),
        0 => {
            drop(reader);
            rustix::process::setsid().map_err(|e| fail("cannot make a session", e.into()))?;
            Ok(Daemon(writer))
        }
        _ => {
            drop(writer);
            let mut status = [1];
            let ready = std::fs::File::from(reader).read_exact(&mut status).is_ok() && status[0] == 0;
            // What went wrong was printed by the child.
            std::process::exit(if ready { 0 } else { 1 });
        }
    }
}

impl Daemon {
    /// Lets the parent go, and leaves its terminal.
    pub(crate) fn ready(self) -> Result<()> {
        let fail = |e: std::io::Error| Error::new(format!("-daemonize: {e}"));
        rustix::process::chdir("/").map_err(|e| fail(e.into()))?;
        let null = std::fs::File::options().read(true).write(true).open("/dev/null").map_err(fail)?;
        rustix::stdio::dup2_stdin(&null).map_err(|e| fail(e.into()))?;
        rustix::stdio::dup2_stdout(&null).map_err(|e| fail(e.into()))?;
        let told = std::fs::File::from(self.0).write_all(&[0]);
        rustix::stdio::dup2_stderr(&null).map_err(|e| fail(e.into()))?;
        told.map_err(fail)
    }
}

/// A pid file, locked while the process lives, removed at its end.
pub(crate) struct PidFile {
    path: PathBuf,
    _file: std::fs::File,
}

impl PidFile {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let fail = |e: std::io::Error| Error::new(format!("cannot create PID file {}: {e}", path.display()));
        let mut options = std::fs::File::options();
        let mut file =
            options.create(true).read(true).write(true).truncate(false).open(path).map_err(fail)?;
        let lock = rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
        lock.map_err(|e| fail(e.into()))?;
        file.set_len(0).map_err(fail)?;
        let pid = rustix::process::getpid().as_raw_nonzero();
        file.write_all(format!("{pid}\n").as_bytes()).map_err(fail)?;
        let path = std::fs::canonicalize(path).map_err(fail)?;
        Ok(Self { path, _file: file })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // It may have been removed already.
        let _ = std::fs::remove_file(&self.path);
    }
}
