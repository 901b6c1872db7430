//! What the driver is told without asking: units that come, go and change (virtio 1.2, 5.6.6.3).

use super::lanes::Lanes;
use crate::storage::scsi::{LunAddress, ScsiBusEvent, Sense};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// Events kept for a driver that gives no buffers; then some are missed, and it is told that.
const KEPT: usize = 16;

const MISSED: u32 = 0x8000_0000;
const TRANSPORT_RESET: u32 = 1;
const PARAM_CHANGE: u32 = 3;
const REASON_RESCAN: u32 = 1;
const REASON_REMOVED: u32 = 2;

/// Event, unit, reason.
type Record = (u32, LunAddress, u32);

#[derive(Default)]
struct State {
    waiting: VecDeque<Record>,
    missed: bool,
    hotplug: bool,
    changes: bool,
    lanes: Weak<Lanes>,
}

/// The events that wait for buffers.
#[derive(Default)]
pub(super) struct Events(Mutex<State>);

impl Events {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What the driver understands.
    pub(super) fn agreed(&self, hotplug: bool, changes: bool) {
        let mut state = self.lock();
        (state.hotplug, state.changes) = (hotplug, changes);
    }

    /// A change of the bus.
    pub(super) fn happened(&self, event: ScsiBusEvent) {
        let lanes = {
            let mut state = self.lock();
            let (wanted, record) = match event {
                ScsiBusEvent::Added(a) => (state.hotplug, (TRANSPORT_RESET, a, REASON_RESCAN)),
                ScsiBusEvent::Removed(a) => (state.hotplug, (TRANSPORT_RESET, a, REASON_REMOVED)),
                ScsiBusEvent::Changed(a, Sense { asc, ascq, .. }) => {
                    (state.changes, (PARAM_CHANGE, a, u32::from(asc) | u32::from(ascq) << 8))
                }
            };
            if !wanted {
                return;
            }
            if state.waiting.len() < KEPT {
                state.waiting.push_back(record);
            } else {
                state.missed = true;
            }
            state.lanes.upgrade()
        };
        if let Some(lanes) = lanes {
            lanes.wake();
        }
    }

    /// Takes the next event, as the driver gets it.
    pub(super) fn take(&self) -> Option<[u8; 16]> {
        let mut state = self.lock();
        let missed = std::mem::take(&mut state.missed);
        let (event, address, reason) = match state.waiting.pop_front() {
            Some((event, address, reason)) => (event, Some(address), reason),
            None if missed => (0, None, 0),
            None => return None,
        };
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&(event | if missed { MISSED } else { 0 }).to_le_bytes());
        if let Some(a) = address {
            let [high, low] = a.lun.to_be_bytes();
            bytes[4..8].copy_from_slice(&[1, a.target as u8, 0x40 | high, low]); // targets are below 256
        }
        bytes[12..].copy_from_slice(&reason.to_le_bytes());
        Some(bytes)
    }

    /// Whether there is something to tell.
    pub(super) fn any(&self) -> bool {
        let state = self.lock();
        state.missed || !state.waiting.is_empty()
    }

    pub(super) fn missed(&self) -> bool {
        self.any()
    }

    pub(super) fn miss(&self) {
        self.lock().missed = true;
    }

    pub(super) fn connect(&self, lanes: &Arc<Lanes>) {
        self.lock().lanes = Arc::downgrade(lanes);
        if self.any() {
            lanes.wake();
        }
    }

    pub(super) fn disconnect(&self) {
        self.lock().lanes = Weak::new();
    }

    pub(super) fn clear(&self) {
        *self.lock() = State::default();
    }
}
