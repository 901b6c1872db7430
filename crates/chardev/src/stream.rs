//! Descriptors that are read and written: what sockets, ptys and pipes have in common.

use crate::pump::Pump;
use rustix::event::{PollFd, PollFlags, poll};
use std::os::fd::{AsFd, BorrowedFd};

/// Longest time, in milliseconds, that a guest's output waits for a full back end before it is dropped.
const PATIENCE: i64 = 20;

/// Writes bytes to a non-blocking descriptor. With `wait` until all is taken or the other end goes; otherwise what it
/// does not take in a moment is dropped. Returns false if the other end has gone.
pub(crate) fn write(fd: BorrowedFd<'_>, mut data: &[u8], wait: bool) -> bool {
    let timeout = (!wait).then_some(rustix::time::Timespec { tv_sec: 0, tv_nsec: PATIENCE * 1_000_000 });
    while !data.is_empty() {
        match rustix::io::write(fd, data) {
            Ok(0) => return false,
            Ok(n) => data = &data[n..],
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => {
                match poll(&mut [PollFd::new(&fd, PollFlags::OUT)], timeout.as_ref()) {
                    Ok(0) => {
                        tracing::debug!(
                            "{} bytes of output dropped: the other end does not read",
                            data.len()
                        );
                        return true;
                    }
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(_) => return false,
                }
            }
            Err(_) => return false,
        }
    }
    true
}

/// Reads until the end, delivering everything.
pub(crate) fn read_all(fd: BorrowedFd<'_>, pump: &Pump, mut filter: impl FnMut(&mut Vec<u8>)) {
    let mut buffer = [0; 4096];
    let mut data = Vec::new();
    loop {
        match rustix::io::read(fd, &mut buffer) {
            Ok(0) => return,
            Ok(n) => {
                data.clear();
                data.extend_from_slice(&buffer[..n]);
                filter(&mut data);
                pump.deliver(&data);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => {
                // An error shows in the next read.
                let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], None);
            }
            Err(e) => {
                tracing::debug!("character device input: {e}");
                return;
            }
        }
    }
}

/// Makes reads and writes return at once.
pub(crate) fn nonblocking(fd: impl AsFd) -> std::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    Ok(rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}

/// Starts a back end's thread.
pub(crate) fn thread(name: &str, f: impl FnOnce() + Send + 'static) -> crate::Result<()> {
    std::thread::Builder::new()
        .name(format!("char-{name}"))
        .stack_size(1 << 20)
        .spawn(f)
        .map(drop)
        .map_err(crate::host("cannot start a character device's thread"))
}
