//! SCSI host (virtio 1.2, 5.6): any number of disks and CD-ROM drives behind one device.
//!
//! A thread that exists while the driver drives and the machine runs takes requests from the queues. What goes to an
//! image is done by [`Workers`], several at once; the rest on the spot.

mod events;
mod lanes;
#[cfg(test)]
mod tests;

use super::{RingSpec, VirtioDevice, read_structure};
use crate::model::{CreateError, Kind, Model, Parts};
use crate::place::ChildBus;
use crate::storage::Workers;
use crate::storage::scsi::{ScsiBus, ScsiBusSaved};
use base::EventFd;
use base::props::{Bag, Properties};
use bus::virtio::{Activation, device_id};
use bus::{State, StateError};
use events::Events;
use lanes::{Lanes, Sizes};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

/// The model.
pub const MODEL: Model = Model {
    name: "virtio-scsi",
    about: "virtio SCSI host; disks are scsi-hd and scsi-cd on its bus",
    properties: Properties::of::<Spec>,
    kind: Kind::Virtio(|bag, parts| create(bag, parts)),
};

/// Properties of `virtio-scsi`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Spec {
    /// Number of request queues; one for each vCPU if not given.
    pub num_queues: Option<u16>,
    /// Entries of each queue, a power of two.
    pub virtqueue_size: u16,
    /// Most 512-byte sectors of a request.
    pub max_sectors: u32,
    /// Commands that a driver should have under way on one unit.
    pub cmd_per_lun: u32,
    /// Tell the guest of units that come and go.
    pub hotplug: bool,
    /// Tell the guest of units that change.
    pub param_change: bool,
    /// Ring features.
    #[serde(flatten)]
    pub ring: RingSpec,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            num_queues: None,
            virtqueue_size: 256,
            max_sectors: 0xffff,
            cmd_per_lun: 128,
            hotplug: true,
            param_change: true,
            ring: RingSpec::default(),
        }
    }
}

fn create(bag: &Bag, parts: &mut dyn Parts) -> Result<Box<dyn VirtioDevice>, CreateError> {
    let spec: Spec = bag.spec()?;
    let bus = ScsiBus::new();
    let device = Scsi::new(&spec, bus.clone(), parts.vcpus())?;
    parts.offer_bus(ChildBus::Scsi(bus));
    Ok(Box::new(device))
}

/// Feature bits (virtio 1.2, 5.6.3).
const FEATURE_HOTPLUG: u64 = 1 << 1;
const FEATURE_CHANGE: u64 = 1 << 2;

/// The queues before the request queues.
const CONTROL: u16 = 0;
const EVENT: u16 = 1;
const FIRST_REQUEST: u16 = 2;

/// Bytes of an event (virtio 1.2, 5.6.6.3).
const EVENT_LEN: u32 = 16;
/// Threads that go to images.
const THREADS: usize = 8;
/// Request queues at most.
const MOST_QUEUES: u16 = 256;

/// The device.
pub struct Scsi {
    spec: Spec,
    queues: u16,
    bus: Arc<ScsiBus>,
    workers: Arc<Workers>,
    events: Arc<Events>,
    sizes: Sizes,
    running: bool,
    active: Option<Active>,
}

struct Active {
    lanes: Arc<Lanes>,
    kick: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    sizes: Sizes,
    events_missed: bool,
    units: ScsiBusSaved,
}

impl Scsi {
    /// A host for the units of `bus`; `vcpus` is the default number of request queues.
    ///
    /// # Errors
    /// Properties that make no sense.
    pub fn new(spec: &Spec, bus: Arc<ScsiBus>, vcpus: u32) -> Result<Self, CreateError> {
        let bad = |text: String| Err(CreateError::Other(format!("virtio-scsi: {text}")));
        if !spec.virtqueue_size.is_power_of_two() || !(4..=1024).contains(&spec.virtqueue_size) {
            return bad(format!(
                "virtqueue_size={} must be a power of two from 4 to 1024",
                spec.virtqueue_size
            ));
        }
        if spec.num_queues.is_some_and(|n| !(1..=MOST_QUEUES).contains(&n)) {
            return bad(format!("num_queues= must be from 1 to {MOST_QUEUES}"));
        }
        if !(1..=0xffff).contains(&spec.max_sectors) {
            return bad(format!("max_sectors={} must be from 1 to 65535", spec.max_sectors));
        }
        let events = Arc::new(Events::default());
        let heard = events.clone();
        bus.listen(move |event| heard.happened(event));
        Ok(Self {
            queues: spec.num_queues.unwrap_or(vcpus.clamp(1, MOST_QUEUES.into()) as u16),
            spec: spec.clone(),
            bus,
            workers: Arc::new(Workers::new("virtio-scsi", THREADS)),
            events,
            sizes: Sizes::default(),
            running: false,
            active: None,
        })
    }

    /// The configuration structure (virtio 1.2, 5.6.4).
    fn config(&self) -> [u8; 36] {
        let mut c = [0; 36];
        let words = [
            self.queues.into(),
            u32::from(self.spec.virtqueue_size - 2),
            self.spec.max_sectors,
            self.spec.cmd_per_lun,
            EVENT_LEN,
            self.sizes.sense,
            self.sizes.cdb,
            u32::from(ScsiBus::MAX_TARGET) << 16, // and channel 0
            ScsiBus::MAX_LUN.into(),
        ];
        for (to, word) in c.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        c
    }

    fn run(&mut self) -> io::Result<()> {
        let Some(active) = self.active.as_mut().filter(|_| self.running) else { return Ok(()) };
        if active.thread.is_none() {
            for (_, unit) in self.bus.units() {
                unit.drive().set_workers(&self.workers);
            }
            active.lanes.go();
            self.workers.resume();
            let lanes = active.lanes.clone();
            let thread = std::thread::Builder::new().name("virtio-scsi".into()).stack_size(256 << 10);
            active.thread = Some(thread.spawn(move || lanes.serve())?);
            self.events.connect(&active.lanes);
        }
        Ok(())
    }

    fn halt(&mut self) {
        self.events.disconnect();
        if let Some(active) = &mut self.active
            && let Some(thread) = active.thread.take()
        {
            active.lanes.stop();
            active.kick.signal();
            if thread.join().is_err() {
                tracing::error!("virtio-scsi: the thread panicked; requests may be lost");
            }
        }
        self.workers.drain();
    }
}

impl VirtioDevice for Scsi {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn device_id(&self) -> u32 {
        device_id::SCSI
    }

    fn features(&self) -> u64 {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        self.spec.ring.features()
            | bit(self.spec.hotplug, FEATURE_HOTPLUG)
            | bit(self.spec.param_change, FEATURE_CHANGE)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.spec.virtqueue_size; usize::from(FIRST_REQUEST + self.queues)]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_structure(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let Ok(value) = <[u8; 4]>::try_from(data) {
            self.sizes.set(offset, u32::from_le_bytes(value));
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let kick = Arc::new(EventFd::new()?);
        let features = activation.features;
        let lanes = Lanes::new(
            activation,
            self.sizes,
            self.bus.clone(),
            self.workers.clone(),
            self.events.clone(),
            kick.clone(),
        );
        self.events.agreed(features & FEATURE_HOTPLUG != 0, features & FEATURE_CHANGE != 0);
        self.active = Some(Active { lanes: Arc::new(lanes), kick, thread: None });
        self.run()
    }

    fn doorbell(&self, _queue: u16) -> Option<&EventFd> {
        self.active.as_ref().map(|a| &*a.kick)
    }

    fn reset(&mut self) {
        self.halt();
        self.workers.abandon();
        self.active = None;
        self.events.clear();
        self.sizes = Sizes::default();
        self.bus.reset();
    }

    fn start(&mut self) -> io::Result<()> {
        self.running = true;
        self.run()
    }

    fn pause(&mut self) -> io::Result<()> {
        self.running = false;
        self.halt();
        Ok(())
    }

    fn save(&self) -> Result<State, StateError> {
        if self.workers.stalled() > 0 {
            let reason = "requests wait for an I/O error to be resolved; let the machine go on first".into();
            return Err(StateError::Invalid { kind: MODEL.name.into(), reason });
        }
        let saved = Saved { sizes: self.sizes, events_missed: self.events.missed(), units: self.bus.save() };
        State::new(MODEL.name, 1, &saved)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(MODEL.name, 1)?;
        self.bus.load(saved.units)?;
        self.sizes = saved.sizes.checked();
        if saved.events_missed {
            self.events.miss();
        }
        Ok(())
    }
}

impl Drop for Scsi {
    fn drop(&mut self) {
        self.halt();
        self.workers.abandon();
    }
}
