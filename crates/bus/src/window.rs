//! Memory of a device that the guest sees as memory: video RAM, ROM.

use accel::{Slot, SlotId, Vm};
use memory::{GuestMemory, Region};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};

#[derive(Default)]
struct Shown {
    /// Address that was asked for, and the slot there.
    at: Option<(u64, Option<SlotId>)>,
    /// Pages of the log that nobody has taken: those of slots that are gone.
    written: BTreeSet<u64>,
}

/// Memory that is shown to the guest where its owner (a BAR, for instance) says; accesses do not reach the device.
///
/// Where the accelerator refuses (other memory is there), the device's own registers answer instead, if it has mapped
/// any on the bus.
pub struct RamWindow {
    name: String,
    vm: Arc<dyn Vm>,
    region: Region,
    readonly: bool,
    logged: bool,
    shown: Mutex<Shown>,
}

impl std::fmt::Debug for RamWindow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RamWindow").field("name", &self.name).finish_non_exhaustive()
    }
}

impl RamWindow {
    /// A window on `region`, not shown yet. `logged`: [`Self::take_written`] will be used.
    pub fn new(name: &str, vm: Arc<dyn Vm>, region: Region, readonly: bool, logged: bool) -> Arc<Self> {
        if logged {
            region.tracker.set_log(true);
        }
        Arc::new(Self { name: name.into(), vm, region, readonly, logged, shown: Mutex::default() })
    }

    /// The memory, for the device: addresses are offsets.
    pub fn memory(&self) -> GuestMemory {
        GuestMemory::from_regions(vec![Region { start: 0, ..self.region.clone() }])
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.region.len()
    }

    /// Whether there is no memory; there always is.
    pub fn is_empty(&self) -> bool {
        self.region.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Shows the memory at a guest physical address, or nowhere.
    pub fn place(&self, at: Option<u64>) {
        let mut shown = self.lock();
        if shown.at.map(|(gpa, _)| gpa) == at {
            return;
        }
        if let Some((_, Some(slot))) = shown.at.take() {
            self.collect(slot, &mut shown.written);
            if let Err(e) = self.vm.unmap(slot) {
                tracing::warn!("{}: cannot take memory away: {e}", self.name);
            }
        }
        if let Some(gpa) = at {
            let slot = Slot {
                gpa,
                len: self.region.len(),
                region: self.region.clone(),
                offset: 0,
                readonly: self.readonly,
            };
            let slot = match self.vm.map(slot) {
                Ok(slot) => Some(slot),
                Err(e) => {
                    tracing::debug!("{}: memory at {gpa:#x} is not shown: {e}", self.name);
                    None
                }
            };
            if let (Some(slot), true) = (slot, self.logged) {
                // Turning the log on forgets what is in it.
                self.region.tracker.take_dirty(|page| _ = shown.written.insert(page));
                if let Err(e) = self.vm.set_dirty_log(slot, true) {
                    tracing::warn!("{}: no dirty log: {e}", self.name);
                }
            }
            shown.at = Some((gpa, slot));
        }
    }

    fn collect(&self, slot: SlotId, into: &mut BTreeSet<u64>) {
        if self.logged
            && let Err(e) = self.vm.take_written(slot, &self.region, &mut |page| _ = into.insert(page))
        {
            tracing::debug!("{}: {e}", self.name);
        }
    }

    /// Calls `page` with the index of each page written since the last call, by the guest or the device. Blocks until
    /// vCPUs note further writes; a vCPU must not be inside the guest on this thread.
    pub fn take_written(&self, mut page: impl FnMut(u64)) {
        let mut shown = self.lock();
        std::mem::take(&mut shown.written).into_iter().for_each(&mut page);
        match shown.at {
            Some((_, Some(slot))) => {
                if let Err(e) = self.vm.take_written(slot, &self.region, &mut page) {
                    tracing::debug!("{}: {e}", self.name);
                }
            }
            _ => self.region.tracker.take_dirty(page),
        }
    }
}

impl Drop for RamWindow {
    fn drop(&mut self) {
        self.place(None);
    }
}
