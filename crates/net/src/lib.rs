//! Network backends: what is at the other end of a network card's cable. No VM in sight.
//!
//! A [`Netdev`] has one [`Port`] for each pair of queues. Whoever drives it (a device's worker thread, a hub, a test)
//! owns the port, hands it the frames that the guest sends and offers it room for those that the guest gets. Both are
//! lists of pieces of memory ([`Frame`], [`Room`]), so that system calls move the bytes straight between guest memory and
//! the host; and both begin with a [`VnetHeader`], so that checksums and segmentation are left to whoever does them
//! best, and large segments travel whole.
//!
//! Nothing here has threads of its own: a port says which descriptor to wait for and until when.

pub mod bridge;
pub mod buffer;
pub mod header;
mod netdev;
mod port;
pub mod socket;
mod sys;
pub mod tap;
#[cfg(test)]
mod testing;
pub mod user;
pub mod wire;
pub mod wrap;

pub use buffer::{Frame, Room};
pub use header::{Offloads, VnetHeader};
pub use netdev::{KINDS, NetdevSpec, Opened, REPEATABLE, find_kind, open, parse};
pub use port::{Counters, Link, MacAddr, Netdev, Port, Receiver, Sent};

/// A backend that cannot be made or cannot go on: what, why, what to do instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Options that make no sense.
    #[error("{0}")]
    Config(String),
    /// A bad property.
    #[error(transparent)]
    Property(#[from] base::props::PropError),
    /// The host's refusal.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: String,
        /// The host's reason.
        source: std::io::Error,
    },
}

impl Error {
    pub(crate) fn host(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
