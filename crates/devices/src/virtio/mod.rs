//! Virtio devices, one file each. The transports are in `bus::virtio`.
//!
//! Short work (console output, random numbers) is done on the vCPU thread that asks for it, within bounds; the rest
//! goes on a [`base::Timers`] callback or, where there is real I/O, on a worker thread that exists while the driver
//! drives and the machine runs.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod gpu;
pub mod input;
pub mod net;
pub mod rng;
pub mod scsi;
#[cfg(test)]
mod tests;

pub use bus::virtio::VirtioDevice;

use bus::virtio::feature;
use schemars::JsonSchema;
use serde::Deserialize;

/// Properties of every virtio device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RingSpec {
    /// Offer notification suppression by ring index (VIRTIO_F_EVENT_IDX).
    pub event_idx: bool,
    /// Offer indirect descriptors (VIRTIO_F_INDIRECT_DESC).
    pub indirect_desc: bool,
    /// Offer the packed ring layout (VIRTIO_F_RING_PACKED).
    pub packed: bool,
}

impl Default for RingSpec {
    fn default() -> Self {
        Self { event_idx: true, indirect_desc: true, packed: false }
    }
}

impl RingSpec {
    /// The feature bits.
    pub fn features(&self) -> u64 {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        bit(self.event_idx, feature::EVENT_IDX)
            | bit(self.indirect_desc, feature::INDIRECT_DESC)
            | bit(self.packed, feature::RING_PACKED)
    }
}

/// Copies the part of a configuration structure that starts at `offset` into `data`; the rest of `data` stays.
fn read_structure(structure: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|o| structure.get(o..)).unwrap_or_default();
    let n = rest.len().min(data.len());
    data[..n].copy_from_slice(&rest[..n]);
}
