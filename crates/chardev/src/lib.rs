//! Character device back ends: what is at the other end of a serial port, a console or a monitor.
//!
//! A kind is one file and one line of [`KINDS`]. [`open`] makes one from a property bag, and puts a multiplexer or a log
//! in front of it where the bag asks for one. [`shorthand`] reads the compact form of `-serial` and `-monitor`
//! (`tcp::4444,server=on`, `file:out.txt`).

mod escape;
mod file;
mod log;
mod mux;
mod null;
mod pipe;
mod pty;
mod pump;
mod ringbuf;
mod shorthand;
mod socket;
mod stdio;
mod stream;

pub use escape::{Escape, EscapeParser};
pub use mux::Mux;
pub use ringbuf::RingBuf;
pub use shorthand::shorthand;
pub use socket::remove_sockets;
pub use stdio::{RawMode, Stdio, restore_terminal};

use base::nearest;
use base::props::{Bag, PropError, Properties};
use bus::Chardev;
use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;

/// A back end that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A bad property.
    #[error(transparent)]
    Property(#[from] PropError),
    /// A description that makes no sense.
    #[error("{0}")]
    Config(String),
    /// The host's refusal.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: String,
        /// The host's reason.
        source: std::io::Error,
    },
}

pub(crate) fn host(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.into();
    move |source| Error::Host { what, source }
}

/// Result of opening.
pub type Result<T> = std::result::Result<T, Error>;

/// A kind of back end.
pub struct Kind {
    /// QEMU's name.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// Properties, from the `Spec`.
    pub properties: fn() -> Properties,
    open: fn(&Bag) -> Result<Arc<dyn Chardev>>,
}

/// All kinds.
pub const KINDS: &[Kind] = &[
    null::KIND,
    stdio::KIND,
    file::KIND,
    pipe::KIND,
    pty::KIND,
    socket::KIND,
    ringbuf::KIND,
    ringbuf::MEMORY,
];

/// What [`open`] made.
pub struct Backend {
    /// The back end, with whatever was put in front of it.
    pub chardev: Arc<dyn Chardev>,
    /// The multiplexer, if there is one.
    pub mux: Option<Arc<Mux>>,
}

/// Makes the back end that a bag describes: `driver` is the kind; `mux=on` lets several front ends share it, `logfile=`
/// (with `logappend=`) keeps a copy of the output.
///
/// # Errors
/// An unknown kind (with the nearest name), a bad property, or the host's refusal.
pub fn open(bag: &Bag) -> Result<Backend> {
    let mut bag = bag.clone();
    let mux = take_bool(&mut bag, "mux")?;
    let append = take_bool(&mut bag, "logappend")?;
    let log = match bag.props.remove("logfile") {
        None => None,
        Some(Value::String(path)) => Some(PathBuf::from(path)),
        Some(other) => return Err(Error::Config(format!("chardev: logfile= must be a path, not {other}"))),
    };
    let kind = find(&bag.driver)?;
    let mut chardev = (kind.open)(&bag)?;
    if let Some(path) = log {
        chardev = log::wrap(chardev, &path, append)?;
    }
    if !mux {
        return Ok(Backend { chardev, mux: None });
    }
    let mux = Mux::new(chardev);
    Ok(Backend { chardev: mux.clone(), mux: Some(mux) })
}

/// The kind of that name.
///
/// # Errors
/// Says which name is nearest.
pub fn find(name: &str) -> Result<&'static Kind> {
    KINDS.iter().find(|k| k.name == name).ok_or_else(|| {
        let known = KINDS.iter().map(|k| k.name);
        let near = nearest(name, known.clone()).map(|n| format!("; did you mean '{n}'?")).unwrap_or_default();
        let known = known.collect::<Vec<_>>().join(", ");
        Error::Config(format!("unknown character device back end '{name}': use one of {known}{near}"))
    })
}

fn take_bool(bag: &mut Bag, key: &str) -> Result<bool> {
    match bag.props.remove(key) {
        None => Ok(false),
        Some(Value::Bool(b)) => Ok(b),
        Some(Value::String(s)) if ["on", "yes", "true", "y"].contains(&s.as_str()) => Ok(true),
        Some(Value::String(s)) if ["off", "no", "false", "n"].contains(&s.as_str()) => Ok(false),
        Some(other) => Err(Error::Config(format!("chardev: {key}={other}: use on or off"))),
    }
}
