//! Character devices: the seam between a serial port (front end) and a terminal, socket or file (back end).

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
}

/// A back end that discards output and has no input.
#[derive(Clone, Copy, Debug, Default)]
pub struct NullChardev;

impl Chardev for NullChardev {
    fn write(&self, _: &[u8]) {}
    fn attach(&self, _: Arc<dyn CharFrontend>) {}
    fn resume_input(&self) {}
}
