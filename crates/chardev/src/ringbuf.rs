//! `ringbuf` (and its old name `memory`): the last output is kept in memory, for a monitor to read.

use crate::{Error, Kind, Result};
use base::props::{Properties, SIZE_FORMAT};
use bus::{CharFrontend, Chardev};
use schemars::JsonSchema;
use serde::Deserialize;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Spec {
    /// Bytes kept, a power of two.
    #[schemars(extend("format" = SIZE_FORMAT))]
    size: u64,
}

impl Default for Spec {
    fn default() -> Self {
        Self { size: 65536 }
    }
}

pub(crate) const KIND: Kind = Kind {
    name: "ringbuf",
    about: "Keeps the last output in memory",
    properties: Properties::of::<Spec>,
    open: |bag| {
        let spec: Spec = bag.spec()?;
        Ok(Arc::new(RingBuf::new(spec.size)?))
    },
};

pub(crate) const MEMORY: Kind = Kind { name: "memory", about: "Old name of ringbuf", ..KIND };

/// Most bytes a ring may keep.
const LARGEST: u64 = 64 << 20;

/// The ring.
pub struct RingBuf {
    size: usize,
    data: Mutex<VecDeque<u8>>,
}

impl RingBuf {
    /// A ring of `size` bytes.
    ///
    /// # Errors
    /// A size that is no power of two, or more than 64 MiB.
    pub fn new(size: u64) -> Result<Self> {
        if !size.is_power_of_two() || size > LARGEST {
            return Err(Error::Config("size of ringbuf chardev must be a power of two, at most 64M".into()));
        }
        Ok(Self { size: size as usize, data: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.data.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Chardev for RingBuf {
    fn write(&self, data: &[u8]) {
        let mut ring = self.lock();
        let data = &data[data.len().saturating_sub(self.size)..];
        let over = (ring.len() + data.len()).saturating_sub(self.size);
        ring.drain(..over);
        ring.extend(data);
    }

    fn attach(&self, _: Arc<dyn CharFrontend>) {}

    fn resume_input(&self) {}

    fn filename(&self) -> String {
        "ringbuf".into()
    }

    fn read_back(&self, most: usize) -> Option<Vec<u8>> {
        let mut ring = self.lock();
        let n = most.min(ring.len());
        Some(ring.drain(..n).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last() {
        let ring = RingBuf::new(8).unwrap();
        ring.write(b"abcdef");
        ring.write(b"ghij");
        assert_eq!(ring.read_back(3).unwrap(), b"cde");
        ring.write(b"0123456789");
        assert_eq!(ring.read_back(100).unwrap(), b"23456789");
        assert!(RingBuf::new(9).is_err());
        assert!(RingBuf::new(1 << 40).is_err());
    }
}
