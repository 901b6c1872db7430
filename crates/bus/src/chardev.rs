//! Character devices: the seam between a serial port (front end) and a terminal, socket or file (back end).

use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What a back end tells a front end besides data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CharEvent {
    /// Somebody is at the other end now.
    Opened,
    /// Nobody is any more.
    Closed,
    /// A break condition.
    Break,
    /// On a multiplexer: input comes here from now on.
    Focused,
    /// On a multiplexer: input goes elsewhere from now on.
    Unfocused,
    /// The terminal at the other end has this size, in character cells.
    Resize {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
}

/// The guest's side: a UART, a virtio console port.
pub trait CharFrontend: Send + Sync {
    /// Takes bytes from the outside; returns how many it had room for. When it took less than all, it calls
    /// [`Chardev::resume_input`] once there is room again.
    fn receive(&self, data: &[u8]) -> usize;
    /// Something happened at the other end.
    fn event(&self, event: CharEvent);
}

/// The outside: a terminal, a socket, a file.
pub trait Chardev: Send + Sync {
    /// Sends bytes out. Never fails towards the guest: what a broken or full back end cannot take is dropped there.
    fn write(&self, data: &[u8]);
    /// Connects the front end (replacing an earlier one); input flows to it from now on.
    fn attach(&self, frontend: Arc<dyn CharFrontend>);
    /// The front end has room for input again.
    fn resume_input(&self);
    /// As [`Self::write`], but waits until the other end takes everything (or goes away). For monitors, whose clients
    /// must not lose bytes and may be slow; never called on a vCPU thread.
    fn write_all(&self, data: &[u8]) {
        self.write(data);
    }
    /// What it is, as monitors show it: `pty:/dev/pts/3`, `unix:/run/x,server=on`.
    fn filename(&self) -> String {
        "null".into()
    }
    /// Descriptors that came with the input (Unix sockets), oldest first.
    fn take_fds(&self) -> Vec<OwnedFd> {
        Vec::new()
    }
    /// A share for one more front end, where several can use it (multiplexers).
    fn share(&self) -> Option<Arc<dyn Chardev>> {
        None
    }
    /// Output kept in memory, at most `most` bytes of the oldest (ring buffers).
    fn read_back(&self, _most: usize) -> Option<Vec<u8>> {
        None
    }
}

/// A back end that discards output and has no input.
#[derive(Clone, Copy, Debug, Default)]
pub struct NullChardev;

impl Chardev for NullChardev {
    fn write(&self, _: &[u8]) {}
    fn attach(&self, _: Arc<dyn CharFrontend>) {}
    fn resume_input(&self) {}
}
