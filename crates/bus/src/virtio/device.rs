//! The trait of virtio devices, and what a transport gives them.

use super::Queue;
use crate::{State, StateError};
use base::EventFd;
use memory::GuestMemory;
use std::io;
use std::sync::{Arc, Mutex};

/// A queue shared between its device's threads and the transport.
pub type SharedQueue = Arc<Mutex<Queue>>;

/// Where a device's interrupts go; implemented by transports.
pub trait InterruptSink: Send + Sync {
    /// Used buffers of a queue.
    fn queue(&self, queue: u16);
    /// A change of configuration space.
    fn config(&self);
    /// The device cannot go on: sets NEEDS_RESET and tells the driver.
    fn fail(&self, reason: &str);
}

/// A device's way to interrupt its driver; any thread may use it.
#[derive(Clone)]
pub struct Interrupt(Arc<dyn InterruptSink>);

impl Interrupt {
    /// Interrupts delivered by `sink`.
    pub fn new(sink: Arc<dyn InterruptSink>) -> Self {
        Self(sink)
    }

    /// Tells the driver about used buffers, when [`Queue::publish`] said that it wants to know.
    pub fn queue(&self, queue: u16) {
        self.0.queue(queue);
    }

    /// Tells the driver that configuration space changed. Called while holding the lock that
    /// [`VirtioDevice::read_config`] takes, so that the change and the new generation are seen together.
    pub fn config_changed(&self) {
        self.0.config();
    }

    /// Marks the device broken: a ring or request that the driver must not have made (virtio 1.2, 2.1.1).
    /// Nothing more is processed until the driver resets the device.
    pub fn fail(&self, reason: &str) {
        self.0.fail(reason);
    }
}

impl std::fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Interrupt")
    }
}

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// The queues, by index; `None` for those that the driver does not use.
    pub queues: Vec<Option<SharedQueue>>,
    /// Negotiated features.
    pub features: u64,
    /// Guest RAM.
    pub memory: GuestMemory,
    /// The way to the driver.
    pub interrupt: Interrupt,
}

/// A virtio device, free of its transport.
///
/// # Lifecycle
/// Created stopped and inactive. `start` and `pause` follow the machine (see [`crate::Device`]); `activate` and
/// `reset` follow the driver. A device moves data only while it is both started and active. On `start` an active
/// device looks into all its queues, since notifications may have been lost while it was paused. After `pause` or
/// `reset` has returned it touches neither guest memory nor queues and raises no interrupt.
/// `save` and `load` are called while paused; the ring positions are the transport's, which activates the device after
/// `load` if it was active.
pub trait VirtioDevice: Send {
    /// Name of the model: `virtio-blk`.
    fn name(&self) -> &'static str;
    /// Device type (virtio 1.2, 5).
    fn device_id(&self) -> u32;
    /// Features offered: the device type's own and the ring features ([`super::feature::RING_DEFAULT`]); the
    /// transport adds VERSION_1.
    fn features(&self) -> u64;
    /// Largest size of each queue (powers of two, at most 32768); their number is the number of queues.
    fn queue_sizes(&self) -> Vec<u16>;
    /// The driver has accepted these features; configuration space may depend on them. Called before `activate`, at
    /// most once between resets.
    fn features_accepted(&mut self, _features: u64) {}
    /// Reads device-specific configuration; `data` arrives zeroed, and what lies past its end stays so.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes device-specific configuration.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready.
    ///
    /// # Errors
    /// What the host refused (thread, ring); the transport then sets NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;
    /// The eventfd that wakes the device for a queue, of devices that process it on a thread of their own. Valid from
    /// `activate` to `reset`. With kernel doorbells the guest's notification goes straight there.
    fn doorbell(&self, _queue: u16) -> Option<&EventFd> {
        None
    }
    /// The driver has made buffers of a queue available; called on a vCPU thread for queues without a kernel doorbell.
    fn notify(&mut self, queue: u16) {
        if let Some(doorbell) = self.doorbell(queue) {
            doorbell.signal();
        }
    }
    /// Drops queues and requests; returns when idle.
    fn reset(&mut self);
    /// Begins to work; see [`crate::Device::start`].
    ///
    /// # Errors
    /// What the host refused.
    fn start(&mut self) -> io::Result<()>;
    /// Returns when quiescent: every chain that was popped has been pushed and published.
    ///
    /// # Errors
    /// Requests that cannot be finished.
    fn pause(&mut self) -> io::Result<()>;
    /// Guest-visible state beside the transport's.
    ///
    /// # Errors
    /// A state that cannot be saved now.
    fn save(&self) -> Result<State, StateError>;
    /// Restores [`Self::save`].
    ///
    /// # Errors
    /// A state that does not fit.
    fn load(&mut self, state: State) -> Result<(), StateError>;
}
