//! Releases that disks can be made of.

use crate::{Error, Result};

/// A release of Debian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    /// Number: `12`.
    pub version: &'static str,
    /// Code name: `bookworm`.
    pub suite: &'static str,
}

/// The releases, the default one first.
pub const RELEASES: &[Release] =
    &[Release { version: "12", suite: "bookworm" }, Release { version: "13", suite: "trixie" }];

impl Release {
    /// The release that `debian`, `debian:12` or `debian:bookworm` names; none if the text is about something else.
    ///
    /// # Errors
    /// A release of Debian that is not in [`RELEASES`].
    pub fn parse(text: &str) -> Result<Option<Self>> {
        let name = match text.strip_prefix("debian") {
            Some("") => return Ok(RELEASES.first().copied()),
            Some(rest) => rest.strip_prefix(':'),
            None => None,
        };
        let Some(name) = name else { return Ok(None) };
        match RELEASES.iter().find(|r| r.version == name || r.suite == name) {
            Some(release) => Ok(Some(*release)),
            None => {
                let known: Vec<_> = RELEASES.iter().map(|r| format!("debian:{}", r.version)).collect();
                Err(Error::Usage(format!("{text}: use {}", known.join(" or "))))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for text in ["debian", "debian:12", "debian:bookworm"] {
            assert_eq!(Release::parse(text).unwrap().unwrap().suite, "bookworm");
        }
        assert_eq!(Release::parse("debian:trixie").unwrap().unwrap().version, "13");
        for text in ["debian.qcow2", "debian12", "/x/debian:12", "https://x/debian"] {
            assert_eq!(Release::parse(text).unwrap(), None, "{text}");
        }
        assert!(Release::parse("debian:9").unwrap_err().to_string().contains("debian:12 or debian:13"));
    }
}
