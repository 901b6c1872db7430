//! What all transports have in common: feature negotiation, queue set-up, the status register, activation.

use super::device::{Activation, Interrupt, SharedQueue, VirtioDevice};
use super::{Queue, QueueConfig, QueuePosition, feature, status};
use crate::{State, StateError};
use accel::{Doorbells, IoAddress};
use base::RateLimit;
use memory::GuestMemory;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// State that device threads change too.
pub(super) struct Shared {
    name: &'static str,
    status: AtomicU8,
    generation: AtomicU32,
    log: RateLimit,
}

impl Shared {
    fn new(name: &'static str) -> Arc<Self> {
        Arc::new(Self {
            name,
            status: AtomicU8::new(0),
            generation: AtomicU32::new(0),
            log: RateLimit::new(5, Duration::from_secs(10)),
        })
    }

    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Configuration space has changed.
    pub(super) fn changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Marks the device broken. Returns whether the driver is to be told.
    pub(super) fn fail(&self, reason: &str) -> bool {
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        if let Some(suppressed) = self.log.allow() {
            tracing::warn!(suppressed, "{}: {reason}; the device stops until the guest resets it", self.name);
        }
        before & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }
}

/// A queue notification that the kernel turns into a signal.
struct Attached {
    at: IoAddress,
    len: u32,
    datamatch: Option<u64>,
    queue: u16,
}

/// A virtio device and its driver-visible state.
pub(super) struct Core {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) shared: Arc<Shared>,
    pub(super) queues: Vec<QueueConfig>,
    max_sizes: Vec<u16>,
    memory: GuestMemory,
    doorbells: Option<Arc<dyn Doorbells>>,
    attached: Vec<Attached>,
    /// Device features that the driver looks at (low or high half), and its own.
    pub(super) device_select: u32,
    pub(super) driver_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u16,
    active: Option<Vec<Option<SharedQueue>>>,
}

/// Saved form of [`Core`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CoreSaved {
    status: u8,
    generation: u32,
    device_select: u32,
    driver_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueConfig>,
    positions: Option<Vec<Option<QueuePosition>>>,
    device: State,
}

fn lock(queue: &SharedQueue) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(|e| e.into_inner())
}

impl Core {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        doorbells: Option<Arc<dyn Doorbells>>,
    ) -> Self {
        let max_sizes: Vec<u16> = device.queue_sizes().iter().map(|n| (*n).min(1 << 15)).collect();
        let mut core = Self {
            shared: Shared::new(device.name()),
            device,
            queues: Vec::new(),
            max_sizes,
            memory,
            doorbells,
            attached: Vec::new(),
            device_select: 0,
            driver_select: 0,
            driver_features: 0,
            queue_select: 0,
            active: None,
        };
        core.clear();
        core
    }

    fn clear(&mut self) {
        self.queues =
            self.max_sizes.iter().map(|n| QueueConfig { size: *n, ..QueueConfig::default() }).collect();
        self.device_select = 0;
        self.driver_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
    }

    pub(super) fn features(&self) -> u64 {
        self.device.features() | feature::VERSION_1
    }

    /// The half of the device's features that the driver selected.
    pub(super) fn selected_device_features(&self) -> u32 {
        half(self.features(), self.device_select)
    }

    /// The half of its own features that the driver selected.
    pub(super) fn selected_driver_features(&self) -> u32 {
        half(self.driver_features, self.driver_select)
    }

    pub(super) fn write_driver_features(&mut self, value: u32) {
        if self.shared.status() & status::FEATURES_OK != 0 {
            return; // settled
        }
        match self.driver_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
            1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    pub(super) fn queue_count(&self) -> u16 {
        self.max_sizes.len() as u16 // models have few
    }

    /// Largest size of the selected queue; 0 if there is no such queue.
    pub(super) fn selected_max(&self) -> u16 {
        self.max_sizes.get(usize::from(self.queue_select)).copied().unwrap_or(0)
    }

    /// The selected queue.
    pub(super) fn selected(&self) -> Option<&QueueConfig> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The selected queue, if the driver may still change it.
    pub(super) fn selected_mut(&mut self) -> Option<&mut QueueConfig> {
        if self.shared.status() & status::DRIVER_OK != 0 {
            return None;
        }
        self.queues.get_mut(usize::from(self.queue_select))
    }

    /// Sets the size of the selected queue; one larger than it may be is ignored.
    pub(super) fn set_size(&mut self, size: u16) {
        let max = self.selected_max();
        if let Some(queue) = self.selected_mut()
            && !queue.ready
            && (1..=max).contains(&size)
        {
            queue.size = size;
        }
    }

    /// Changes an address of the selected queue, by 32-bit halves.
    pub(super) fn set_address(
        &mut self,
        which: impl FnOnce(&mut QueueConfig) -> &mut u64,
        high: bool,
        value: u32,
    ) {
        if let Some(queue) = self.selected_mut()
            && !queue.ready
        {
            let address = which(queue);
            *address = if high {
                *address & 0xffff_ffff | u64::from(value) << 32
            } else {
                *address & !0xffff_ffff | u64::from(value)
            };
        }
    }

    /// Enables or disables the selected queue.
    pub(super) fn set_ready(&mut self, ready: bool) {
        if let Some(queue) = self.selected_mut() {
            queue.ready = ready;
        }
    }

    pub(super) fn is_active(&self) -> bool {
        self.active.is_some()
    }

    /// A write to the status register other than 0 (which the transport turns into [`Self::reset`]). Returns whether
    /// the device was activated.
    pub(super) fn write_status(&mut self, value: u8, interrupt: &Interrupt) -> bool {
        let old = self.shared.status();
        let mut rising = value & !old;
        if rising & status::FEATURES_OK != 0 {
            let agreed = self.driver_features & feature::VERSION_1 != 0
                && self.driver_features & !self.features() == 0;
            if agreed {
                self.device.features_accepted(self.driver_features);
            } else {
                rising &= !status::FEATURES_OK;
            }
        }
        let known =
            status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK | status::FEATURES_OK | status::FAILED;
        let new = self.shared.status.fetch_or(rising & known, Ordering::SeqCst) | rising & known;
        if rising & status::DRIVER_OK == 0 || self.is_active() {
            return false;
        }
        if new & status::FEATURES_OK == 0 {
            interrupt.fail("the driver did not negotiate features");
            return false;
        }
        if new & status::NEEDS_RESET != 0 {
            return false;
        }
        self.activate(interrupt, &[])
    }

    fn activate(&mut self, interrupt: &Interrupt, positions: &[Option<QueuePosition>]) -> bool {
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, config) in self.queues.iter().enumerate() {
            if !config.ready {
                queues.push(None);
                continue;
            }
            let position = positions.get(index).copied().flatten();
            match Queue::new(&self.memory, config, self.driver_features, position) {
                Ok(queue) => queues.push(Some(Arc::new(Mutex::new(queue)))),
                Err(e) => {
                    interrupt.fail(&format!("queue {index}: {e}"));
                    return false;
                }
            }
        }
        let activation = Activation {
            queues: queues.clone(),
            features: self.driver_features,
            memory: self.memory.clone(),
            interrupt: interrupt.clone(),
        };
        if let Err(e) = self.device.activate(activation) {
            interrupt.fail(&format!("cannot start: {e}"));
            self.device.reset();
            return false;
        }
        self.active = Some(queues);
        true
    }

    /// A reset by the driver or the machine.
    pub(super) fn reset(&mut self) {
        self.detach();
        // Also when inactive: features may have been accepted, or an activation half done.
        self.device.reset();
        self.active = None;
        self.shared.status.store(0, Ordering::SeqCst);
        self.clear();
    }

    /// A notification that reached us rather than the kernel.
    pub(super) fn notify(&mut self, queue: u16) {
        let exists =
            self.active.as_ref().and_then(|a| a.get(usize::from(queue))).is_some_and(Option::is_some);
        if exists && self.shared.status() & status::NEEDS_RESET == 0 {
            self.device.notify(queue);
        }
    }

    /// Lets the kernel turn notifications at `place(queue)` (address, access length, value) into signals, for the
    /// queues whose devices want that. Where the kernel refuses, the notification comes to [`Self::notify`].
    pub(super) fn attach(&mut self, place: impl Fn(u16) -> (IoAddress, u32, Option<u64>)) {
        let (Some(doorbells), Some(active)) = (&self.doorbells, &self.active) else { return };
        for queue in (0..self.queue_count()).filter(|q| active[usize::from(*q)].is_some()) {
            let Some(fd) = self.device.doorbell(queue) else { continue };
            let (at, len, datamatch) = place(queue);
            match doorbells.attach(at, len, datamatch, fd) {
                Ok(()) => self.attached.push(Attached { at, len, datamatch, queue }),
                Err(e) => tracing::debug!("{}: doorbell of queue {queue}: {e}", self.shared.name),
            }
        }
    }

    /// Undoes [`Self::attach`].
    pub(super) fn detach(&mut self) {
        let Some(doorbells) = &self.doorbells else { return };
        for a in self.attached.drain(..) {
            let Some(fd) = self.device.doorbell(a.queue) else { continue };
            if let Err(e) = doorbells.detach(a.at, a.len, a.datamatch, fd) {
                tracing::warn!("{}: doorbell of queue {}: {e}", self.shared.name, a.queue);
            }
        }
    }

    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    pub(super) fn save(&self) -> Result<CoreSaved, StateError> {
        let positions =
            self.active.as_ref().map(|a| a.iter().map(|q| q.as_ref().map(|q| lock(q).position())).collect());
        Ok(CoreSaved {
            status: self.shared.status(),
            generation: self.shared.generation(),
            device_select: self.device_select,
            driver_select: self.driver_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            queues: self.queues.clone(),
            positions,
            device: self.device.save()?,
        })
    }

    /// Checks a saved state before anything is changed.
    pub(super) fn check(&self, saved: &CoreSaved) -> Result<(), StateError> {
        let invalid =
            |reason: &str| Err(StateError::Invalid { kind: self.shared.name.into(), reason: reason.into() });
        if saved.queues.len() != self.max_sizes.len()
            || saved.positions.as_ref().is_some_and(|p| p.len() != self.max_sizes.len())
        {
            return invalid("the number of queues differs");
        }
        if saved.queues.iter().zip(&self.max_sizes).any(|(q, max)| q.size > *max) {
            return invalid(
                "a queue is larger than this device's; create the device with the same queue-size",
            );
        }
        let settled = saved.status & status::FEATURES_OK != 0;
        if settled && saved.driver_features & !self.features() != 0 {
            return invalid("the guest uses features that this device does not offer");
        }
        Ok(())
    }

    /// Restores a state; the driver's view of the device continues where it was.
    pub(super) fn load(&mut self, saved: CoreSaved, interrupt: &Interrupt) -> Result<(), StateError> {
        self.check(&saved)?;
        self.reset();
        self.device.load(saved.device)?;
        self.device_select = saved.device_select;
        self.driver_select = saved.driver_select;
        self.driver_features = saved.driver_features;
        self.queue_select = saved.queue_select;
        self.queues = saved.queues;
        self.shared.generation.store(saved.generation, Ordering::SeqCst);
        self.shared.status.store(saved.status, Ordering::SeqCst);
        if saved.status & status::FEATURES_OK != 0 {
            self.device.features_accepted(self.driver_features);
        }
        if let Some(positions) = saved.positions {
            self.activate(interrupt, &positions);
        }
        Ok(())
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // An unplugged device leaves no doorbell and no thread behind.
        self.detach();
        self.device.reset();
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}
