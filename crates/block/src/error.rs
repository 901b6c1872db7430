//! The one error type of the block layer.

use std::io;

/// What can go wrong with an image or with the storage below it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused an operation.
    #[error("{what}: {}", strerror(source))]
    Io {
        /// What was being done, with the name of the file or peer.
        what: String,
        /// The host's answer.
        source: io::Error,
    },
    /// The image's contents contradict its format, or go past what this program supports.
    #[error("{0}")]
    Invalid(String),
    /// The image is well-formed but uses something that cannot be served.
    #[error("{0}")]
    Unsupported(String),
    /// The image is marked corrupt, or was found to be while in use.
    #[error("{0}")]
    Corrupt(String),
    /// A write to something opened read-only.
    #[error("{0} is read-only")]
    ReadOnly(String),
    /// Another process holds the image in a way that conflicts.
    #[error("{0}")]
    Locked(String),
    /// A request beyond the end of the disk.
    #[error("request at offset {offset:#x}, {len} bytes long, is beyond the end of the disk ({size} bytes)")]
    OutOfRange {
        /// Start of the request in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// The caller asked for something that makes no sense (option names and values, ranges).
    #[error("{0}")]
    Usage(String),
    /// Nothing recognises the image.
    #[error("{0}")]
    NotFound(String),
    /// Another error with a preface saying what it spoilt.
    #[error("{what}: {source}")]
    Context {
        /// What failed.
        what: String,
        /// Why.
        source: Box<Error>,
    },
}

/// Result of the block layer.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The host's words for an error, without Rust's "(os error N)".
pub fn strerror(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

impl Error {
    /// An error of the host, with what was being done.
    pub fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Error::Io { what: what.into(), source: source.into() }
    }

    /// Malformed image.
    pub fn invalid(message: impl Into<String>) -> Self {
        Error::Invalid(message.into())
    }

    /// Well-formed but unsupported.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Error::Unsupported(message.into())
    }

    /// A caller's mistake.
    pub fn usage(message: impl Into<String>) -> Self {
        Error::Usage(message.into())
    }

    /// Puts `what: ` before the message.
    pub fn context(self, what: impl Into<String>) -> Self {
        Error::Context { what: what.into(), source: Box::new(self) }
    }

    /// The `errno` a device or an NBD server reports for this error.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Error::Invalid(_) | Error::Usage(_) => libc::EINVAL,
            Error::OutOfRange { .. } => libc::EINVAL,
            Error::Unsupported(_) => libc::ENOTSUP,
            Error::ReadOnly(_) => libc::EPERM,
            Error::NotFound(_) => libc::ENOENT,
            Error::Corrupt(_) => libc::EIO,
            Error::Locked(_) => libc::EAGAIN,
            Error::Context { source, .. } => source.errno(),
        }
    }
}

/// Adds context to results.
pub trait Context<T> {
    /// Puts `what: ` before the error's message; `what` is built only on failure.
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| e.context(what()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_errors_read_like_strerror() {
        let e = Error::io("Could not open 'x'", io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(e.to_string(), "Could not open 'x': No such file or directory");
        assert_eq!(e.context("y").errno(), libc::ENOENT);
    }
}
