//! Blocks of registers whose place another register gives.

use bus::{Bus, Device, RegionId, Space};
use std::sync::{Arc, Mutex, Weak};

/// What stands at an address that a register gives.
pub(super) struct Placed {
    space: Space,
    len: u64,
    at: Option<u64>,
}

impl Placed {
    pub(super) fn new(space: Space, len: u64) -> Self {
        Self { space, len, at: None }
    }

    /// Puts it where it is wanted, or nowhere.
    pub(super) fn put<D: Device + 'static>(
        &mut self,
        bus: &Weak<Bus>,
        wanted: Option<u64>,
        device: &Arc<Mutex<D>>,
        region: RegionId,
    ) {
        let Some(bus) = bus.upgrade().filter(|_| self.at != wanted) else { return };
        if let Some(at) = self.at.take() {
            bus.unmap(self.space, at);
        }
        if let Some(at) = wanted {
            match bus.map(self.space, at, self.len, "chipset", device, region) {
                Ok(()) => self.at = Some(at),
                Err(e) => tracing::debug!("{e}"),
            }
        }
    }
}
