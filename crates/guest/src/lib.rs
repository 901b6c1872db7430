//! Guests made ready, with no VM in sight: bootable disks from a distribution's packages ([`debian`]), disk images
//! fetched or copied ([`cloud`]), and the seed that tells a guest its name, user and keys on its first boot ([`seed`]).

pub mod cloud;
pub mod debian;
pub mod disk;
pub mod seed;
mod view;

pub use view::View;

use std::io;
use std::path::PathBuf;

/// What went wrong, where, and what to do instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request cannot be fulfilled as it is.
    #[error("{0}")]
    Usage(String),
    /// A program this needs is missing.
    #[error("{program} is needed {why}; install the package '{package}'")]
    Missing {
        /// The program.
        program: &'static str,
        /// What for.
        why: &'static str,
        /// Debian's package.
        package: &'static str,
    },
    /// A program failed.
    #[error("{program} failed ({status}): {last}")]
    Failed {
        /// The program.
        program: String,
        /// Its exit status.
        status: String,
        /// Its last words.
        last: String,
    },
    /// The host refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The disk image layer refused.
    #[error("{path}: {source}")]
    Image {
        /// The image.
        path: PathBuf,
        /// The reason.
        source: block::Error,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn image(path: impl Into<PathBuf>) -> impl FnOnce(block::Error) -> Self {
        let path = path.into();
        move |source| Self::Image { path, source }
    }
}

/// Where a long piece of work tells how far it is.
pub trait Progress {
    /// What it is doing now, in a few words.
    fn step(&mut self, text: &str);
    /// Bytes done, and of how many if that is known.
    fn bytes(&mut self, done: u64, total: Option<u64>);
}

/// Tells nobody.
pub struct Quiet;

impl Progress for Quiet {
    fn step(&mut self, _: &str) {}
    fn bytes(&mut self, _: u64, _: Option<u64>) {}
}
