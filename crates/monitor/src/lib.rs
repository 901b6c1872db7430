//! Monitors of a running machine: QMP, which programs speak, and the human monitor.
//!
//! - [`Context`]: what commands work on; one for a machine, shared by its monitors.
//! - [`qmp`]: the protocol, the table of commands, introspection.
//! - [`hmp`]: the human monitor.
//! - [`serve`]: a monitor on a character device.

mod context;
pub mod gdb;
pub mod hmp;
mod output;
pub mod qmp;

pub use context::{CharEntry, Context, Fds, Settings};

use bus::Chardev;
use std::sync::Arc;

/// How a monitor talks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// QMP.
    Control,
    /// QMP, with JSON indented for human readers.
    ControlPretty,
    /// The human monitor.
    Readline,
}

/// Serves a monitor on a character device, for as long as the context lives.
///
/// # Errors
/// The host gives no thread.
pub fn serve(context: &Arc<Context>, chardev: Arc<dyn Chardev>, mode: Mode) -> std::io::Result<()> {
    match mode {
        Mode::Control => qmp::session::serve(context, chardev, false),
        Mode::ControlPretty => qmp::session::serve(context, chardev, true),
        Mode::Readline => hmp::session::serve(context, chardev),
    }
}
