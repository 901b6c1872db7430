//! Guest RAM.
//!
//! [`GuestMemory`] is what every other part sees: a handful of [`Region`]s of host memory at guest physical
//! addresses, accessed by copy (never by reference: the guest may write at any time), with a [`PageTracker`]
//! each that knows which pages were written (dirty log) and which hold translated guest code.
//!
//! The crate is our own rather than `vm-memory` because the software CPU, the dirty log and the devices share
//! one tracker per page, and because the virtqueue hot path wants a look-up that inlines to a few instructions.

mod backing;
mod guest;
mod layout;
mod size;
mod tracker;
mod view;

pub use backing::{Backing, Mapping};
pub use guest::{GuestMemory, GuestSlice, Region};
pub use layout::{Layout, MMIO_HOLE_END, Range};
pub use size::{format_size, parse_size};
pub use tracker::PageTracker;
pub use view::FileView;

/// Size of a page, in bytes; the unit of tracking.
pub const PAGE_SIZE: u64 = 4096;

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An access that is not wholly inside guest RAM.
    #[error("guest address {addr:#x} (length {len:#x}) is not RAM")]
    OutOfRange {
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The host refused to provide memory.
    #[error("cannot allocate {size} of guest memory ({backing}): {source}; {remedy}")]
    Host {
        /// Size, human-readable.
        size: String,
        /// The backing asked for.
        backing: String,
        /// The host's reason.
        source: std::io::Error,
        /// What the user can do.
        remedy: String,
    },
    /// A memory size that cannot be used.
    #[error("{0}")]
    BadSize(String),
}

/// Result of guest memory operations.
pub type Result<T> = std::result::Result<T, Error>;
