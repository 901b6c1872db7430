//! Saved device state: versioned, and consumed whole.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What a device saves. The payload is a `Saved` struct of its own (with `deny_unknown_fields`), never the runtime
/// type, so that code and format change independently.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// What saved it.
    pub kind: String,
    /// Version of the payload.
    pub version: u32,
    /// The payload.
    pub data: serde_json::Value,
}

/// A state that cannot be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Not this device's state, or of a version it does not know.
    #[error(
        "state of {found} version {found_version} where {expected} version {expected_version} is expected"
    )]
    Mismatch {
        /// What the state says it is.
        found: String,
        /// Its version.
        found_version: u32,
        /// What was expected.
        expected: String,
        /// The version expected.
        expected_version: u32,
    },
    /// A payload that does not fit.
    #[error("state of {kind} is invalid: {reason}")]
    Invalid {
        /// What saved it.
        kind: String,
        /// What is wrong.
        reason: String,
    },
}

impl State {
    /// Packs a payload.
    ///
    /// # Errors
    /// [`StateError::Invalid`] if it does not serialise, which is a bug in the device.
    pub fn new(kind: &str, version: u32, saved: &impl Serialize) -> Result<Self, StateError> {
        let data = serde_json::to_value(saved)
            .map_err(|e| StateError::Invalid { kind: kind.into(), reason: e.to_string() })?;
        Ok(Self { kind: kind.into(), version, data })
    }

    /// Unpacks a payload of the given kind and version.
    ///
    /// # Errors
    /// [`StateError`], saying what is wrong.
    pub fn unpack<T: DeserializeOwned>(self, kind: &str, version: u32) -> Result<T, StateError> {
        if self.kind != kind || self.version != version {
            return Err(StateError::Mismatch {
                found: self.kind,
                found_version: self.version,
                expected: kind.into(),
                expected_version: version,
            });
        }
        serde_json::from_value(self.data)
            .map_err(|e| StateError::Invalid { kind: kind.into(), reason: e.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    #[serde(deny_unknown_fields)]
    struct Saved {
        a: u8,
    }

    #[test]
    fn round_trip_and_refusals() {
        let s = State::new("uart", 1, &Saved { a: 7 }).unwrap();
        assert_eq!(s.clone().unpack::<Saved>("uart", 1).unwrap(), Saved { a: 7 });
        assert!(matches!(s.clone().unpack::<Saved>("uart", 2), Err(StateError::Mismatch { .. })));
        assert!(matches!(s.clone().unpack::<Saved>("rtc", 1), Err(StateError::Mismatch { .. })));
        let mut extra = s;
        extra.data["b"] = 1.into();
        assert!(matches!(extra.unpack::<Saved>("uart", 1), Err(StateError::Invalid { .. })));
    }
}
