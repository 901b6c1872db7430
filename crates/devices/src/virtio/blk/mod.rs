//! Block device (virtio 1.2, 5.2).
//!
//! Requests are served by one worker thread a device, which exists while the driver drives and the machine runs. It
//! sleeps in io_uring, where it also submits reads and writes straight between guest memory and the image's
//! descriptor; images that are more than a flat file are called instead (see [`worker`]).

mod poll;
mod request;
#[cfg(test)]
mod tests;
mod uring;
mod worker;

use super::{RingSpec, VirtioDevice, read_structure};
use crate::model::{CreateError, Kind, Model, Parts};
use crate::storage::{Drive, DriveEvent, DriveSpec, OnError};
use base::EventFd;
use base::props::{Bag, Properties};
use block::Image;
use bus::System;
use bus::virtio::{Activation, Interrupt, SharedQueue, device_id};
use bus::{State, StateError};
use memory::GuestMemory;
use request::Request;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use worker::{Engine, Worker};

/// The model.
pub const MODEL: Model = Model {
    name: "virtio-blk",
    about: "virtio disk",
    properties: Properties::of::<Spec>,
    kind: Kind::Virtio(|bag, parts| create(bag, parts)),
};

/// Properties of `virtio-blk`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Spec {
    /// Disk image (required).
    pub drive: String,
    /// Serial number that the guest sees, up to 20 characters.
    pub serial: Option<String>,
    /// Number of request queues; one for each vCPU if not given.
    #[serde(rename = "num-queues")]
    pub num_queues: Option<u16>,
    /// Entries of each queue, a power of two.
    #[serde(rename = "queue-size")]
    pub queue_size: u16,
    /// Refuse writes.
    #[serde(rename = "read-only")]
    pub read_only: bool,
    /// Sector size that the guest sees, in bytes.
    #[schemars(extend("format" = "size"))]
    pub logical_block_size: u32,
    /// Size in bytes of what the disk writes at once.
    #[schemars(extend("format" = "size"))]
    pub physical_block_size: u32,
    /// Smallest efficient request in bytes; 0 does not say.
    #[schemars(extend("format" = "size"))]
    pub min_io_size: u32,
    /// Best request size in bytes; 0 does not say.
    #[schemars(extend("format" = "size"))]
    pub opt_io_size: u32,
    /// Granularity of discards in bytes; the logical block size if not given.
    #[schemars(extend("format" = "size"))]
    pub discard_granularity: Option<u32>,
    /// Let the guest discard.
    pub discard: bool,
    /// Let the guest write zeros without sending them.
    #[serde(rename = "write-zeroes")]
    pub write_zeroes: bool,
    /// Present a write-back cache; without it every write is durable when it completes.
    #[serde(rename = "write-cache")]
    pub write_cache: bool,
    /// Let the guest switch the cache mode.
    #[serde(rename = "config-wce")]
    pub config_wce: bool,
    /// What to do when the host cannot read.
    pub rerror: OnError,
    /// What to do when the host cannot write.
    pub werror: OnError,
    /// Object of the kind iothread that the disk's thread is named after. Each disk has a thread of its own in any case.
    pub iothread: Option<String>,
    /// Ring features.
    #[serde(flatten)]
    pub ring: RingSpec,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            drive: String::new(),
            serial: None,
            num_queues: None,
            queue_size: 256,
            read_only: false,
            logical_block_size: 512,
            physical_block_size: 512,
            min_io_size: 0,
            opt_io_size: 0,
            discard_granularity: None,
            discard: true,
            write_zeroes: true,
            write_cache: true,
            config_wce: true,
            rerror: OnError::Report,
            werror: OnError::Enospc,
            iothread: None,
            ring: RingSpec::default(),
        }
    }
}

fn create(bag: &Bag, parts: &mut dyn Parts) -> Result<Box<dyn VirtioDevice>, CreateError> {
    let spec: Spec = bag.spec()?;
    if spec.drive.is_empty() {
        return Err(CreateError::Other("virtio-blk: drive= is missing; name a disk image".into()));
    }
    check(&spec)?;
    let poll = match &spec.iothread {
        Some(id) => parts.iothread(id)?,
        None => None,
    };
    let vcpus = parts.vcpus();
    let image = parts.take_drive(&spec.drive)?;
    let name = bag.id.as_deref().filter(|id| !id.is_empty()).unwrap_or(&spec.drive);
    let mut blk = Blk::new(&spec, name, image, vcpus, parts.system().clone())?;
    if let Some(poll) = poll {
        blk.poll = Duration::from_nanos(poll);
    }
    parts.offer_drive(&blk.disk.drive);
    Ok(Box::new(blk))
}

/// Feature bits (virtio 1.2, 5.2.3).
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const CONFIG_WCE: u64 = 1 << 11;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Unit of addresses and capacities in the protocol, whatever the block size.
const SECTOR: u64 = 512;
/// Offset of the cache mode in configuration space.
const WRITEBACK: u64 = 32;
/// Length of the serial number.
const SERIAL_LEN: usize = 20;
/// Sectors and segments that one discard or zeroing request may name.
const MAX_RANGE_SECTORS: u32 = 1 << 22;
const MAX_RANGES: u32 = 32;

/// What requests are checked against and carried out on; shared with the worker.
struct Disk {
    image: Arc<Image>,
    /// What the user sees of it: its name, and what becomes of errors.
    drive: Arc<Drive>,
    serial: [u8; SERIAL_LEN],
    read_only: bool,
    block_size: u32,
    /// The cache is write-back; without that every write is made durable.
    writeback: AtomicBool,
}

impl Disk {
    fn sectors(&self) -> u64 {
        self.image.size() / SECTOR
    }
}

/// The device.
pub struct Blk {
    spec: Spec,
    queues: u16,
    features: u64,
    accepted: u64,
    disk: Arc<Disk>,
    engine: Engine,
    /// How long the worker polls at most before it sleeps.
    poll: Duration,
    running: bool,
    active: Option<Active>,
    /// Requests that an error stopped; tried again when the machine goes on.
    stopped: Vec<Request>,
    resized: Arc<Mutex<Resized>>,
}

/// The way to tell the driver of another size.
#[derive(Default)]
struct Resized {
    /// While the device may interrupt.
    interrupt: Option<Interrupt>,
    due: bool,
}

fn lock(resized: &Mutex<Resized>) -> MutexGuard<'_, Resized> {
    resized.lock().unwrap_or_else(|e| e.into_inner())
}

/// What an active device has.
struct Active {
    queues: Vec<(u16, SharedQueue)>,
    memory: GuestMemory,
    interrupt: Interrupt,
    kick: Arc<EventFd>,
    worker: Option<Worker>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    writeback: bool,
}

/// Checks properties that a type cannot express.
fn check(spec: &Spec) -> Result<(), CreateError> {
    let bad = |text: String| Err(CreateError::Other(format!("virtio-blk: {text}")));
    if !spec.queue_size.is_power_of_two() || !(4..=1024).contains(&spec.queue_size) {
        return bad(format!("queue-size={} must be a power of two from 4 to 1024", spec.queue_size));
    }
    if spec.num_queues.is_some_and(|n| !(1..=256).contains(&n)) {
        return bad("num-queues= must be from 1 to 256".into());
    }
    for (name, size) in
        [("logical_block_size", spec.logical_block_size), ("physical_block_size", spec.physical_block_size)]
    {
        if !size.is_power_of_two() || !(512..=2 << 20).contains(&size) {
            return bad(format!("{name}={size} must be a power of two from 512 to 2M"));
        }
    }
    let block = spec.logical_block_size;
    if spec.physical_block_size < block {
        return bad("physical_block_size= must not be below logical_block_size=".into());
    }
    let granularity = spec.discard_granularity.unwrap_or(block);
    for (name, size) in [
        ("min_io_size", spec.min_io_size),
        ("opt_io_size", spec.opt_io_size),
        ("discard_granularity", granularity),
    ] {
        if !size.is_multiple_of(block) {
            return bad(format!("{name}={size} must be a multiple of the logical block size, {block}"));
        }
    }
    if spec.min_io_size / block > u32::from(u16::MAX) {
        return bad(format!("min_io_size={} is too large", spec.min_io_size));
    }
    if spec.serial.as_ref().is_some_and(|s| s.len() > SERIAL_LEN) {
        return bad(format!("serial= is longer than {SERIAL_LEN} characters"));
    }
    if spec.rerror == OnError::Enospc {
        return bad("rerror=enospc makes no sense: reading needs no space; use report, ignore or stop".into());
    }
    Ok(())
}

impl Blk {
    /// A disk with the properties of `spec` on `image`; `vcpus` is the default number of queues, and `system` hears of
    /// errors.
    ///
    /// # Errors
    /// Properties that make no sense.
    pub fn new(
        spec: &Spec,
        name: &str,
        image: Arc<Image>,
        vcpus: u32,
        system: System,
    ) -> Result<Self, CreateError> {
        check(spec)?;
        let policy = DriveSpec { rerror: spec.rerror, werror: spec.werror, ..DriveSpec::default() };
        let drive = Arc::new(Drive::disk(name, &policy, image.clone(), system));
        let resized = Arc::<Mutex<Resized>>::default();
        let heard = Arc::downgrade(&resized);
        drive.listen(move |event| {
            let Some(resized) = heard.upgrade().filter(|_| event == DriveEvent::Resized) else { return };
            let mut resized = lock(&resized);
            match &resized.interrupt {
                Some(interrupt) => interrupt.config_changed(),
                None => resized.due = true,
            }
        });
        let read_only = spec.read_only || image.is_read_only();
        let queues = spec.num_queues.unwrap_or(vcpus.clamp(1, 256) as u16);
        let mut features = feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::MQ
            | spec.ring.features();
        for (on, bit) in [
            (read_only, feature::RO),
            (spec.config_wce, feature::CONFIG_WCE),
            (spec.discard && !read_only, feature::DISCARD),
            (spec.write_zeroes && !read_only, feature::WRITE_ZEROES),
        ] {
            features |= if on { bit } else { 0 };
        }
        let mut serial = [0; SERIAL_LEN];
        let text = spec.serial.as_deref().unwrap_or_default().as_bytes();
        serial[..text.len()].copy_from_slice(text);
        let disk = Disk {
            image,
            serial,
            read_only,
            block_size: spec.logical_block_size,
            writeback: AtomicBool::new(spec.write_cache),
            drive,
        };
        Ok(Self {
            spec: spec.clone(),
            queues,
            features,
            accepted: 0,
            disk: Arc::new(disk),
            engine: Engine::default(),
            poll: poll::default(),
            running: false,
            active: None,
            stopped: Vec::new(),
            resized,
        })
    }

    /// The configuration structure (virtio 1.2, 5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut c = [0; 60];
        let spec = &self.spec;
        let mut put = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk.sectors().to_le_bytes());
        // Two descriptors of the queue go to header and status.
        put(12, &u32::from(spec.queue_size - 2).to_le_bytes());
        put(20, &spec.logical_block_size.to_le_bytes());
        let exponent = (spec.physical_block_size / spec.logical_block_size).trailing_zeros();
        put(24, &[exponent as u8, 0]); // at most 12
        put(26, &((spec.min_io_size / spec.logical_block_size) as u16).to_le_bytes()); // checked at creation
        put(28, &(spec.opt_io_size / spec.logical_block_size).to_le_bytes());
        put(32, &[self.disk.writeback.load(Ordering::Relaxed).into()]);
        put(34, &self.queues.to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        let granularity = spec.discard_granularity.unwrap_or(spec.logical_block_size);
        put(44, &(granularity / SECTOR as u32).to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]); // zeroing may unmap
        c
    }

    /// Starts the worker if there is something for it to do.
    fn run_worker(&mut self) -> io::Result<()> {
        let Some(active) = self.active.as_mut().filter(|_| self.running) else { return Ok(()) };
        if active.worker.is_none() {
            active.worker = Some(Worker::start(worker::Setup {
                disk: self.disk.clone(),
                queues: active.queues.clone(),
                memory: active.memory.clone(),
                interrupt: active.interrupt.clone(),
                kick: active.kick.clone(),
                engine: self.engine,
                poll: self.poll,
                name: self.spec.iothread.clone().unwrap_or_else(|| MODEL.name.into()),
                stopped: std::mem::take(&mut self.stopped),
            })?);
            let mut resized = lock(&self.resized);
            resized.interrupt = Some(active.interrupt.clone());
            if std::mem::take(&mut resized.due) {
                active.interrupt.config_changed();
            }
        }
        Ok(())
    }

    /// Stops the worker; returns when it has finished what it had begun.
    fn stop_worker(&mut self) {
        lock(&self.resized).interrupt = None;
        if let Some(active) = &mut self.active
            && let Some(worker) = active.worker.take()
        {
            self.stopped = worker.stop(&active.kick);
        }
    }
}

impl VirtioDevice for Blk {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn device_id(&self) -> u32 {
        device_id::BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.spec.queue_size; self.queues.into()]
    }

    fn features_accepted(&mut self, features: u64) {
        self.accepted = features;
        // A driver that can neither flush nor switch the cache mode expects writes to be durable
        // (virtio 1.2, 5.2.6.2).
        if features & feature::CONFIG_WCE == 0 {
            let writeback = self.spec.write_cache && features & feature::FLUSH != 0;
            self.disk.writeback.store(writeback, Ordering::Relaxed);
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_structure(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (WRITEBACK, [value]) = (offset, data)
            && self.accepted & feature::CONFIG_WCE != 0
        {
            self.disk.writeback.store(value & 1 != 0, Ordering::Relaxed);
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { queues, memory, interrupt, .. } = activation;
        let queues = (0..).zip(queues).filter_map(|(i, q)| Some((i, q?))).collect();
        let kick = Arc::new(EventFd::new()?);
        self.active = Some(Active { queues, memory, interrupt, kick, worker: None });
        self.run_worker()
    }

    fn doorbell(&self, _queue: u16) -> Option<&EventFd> {
        self.active.as_ref().map(|a| &*a.kick)
    }

    fn reset(&mut self) {
        self.stop_worker();
        self.active = None;
        self.stopped.clear();
        lock(&self.resized).due = false;
        self.accepted = 0;
        self.disk.writeback.store(self.spec.write_cache, Ordering::Relaxed);
    }

    fn start(&mut self) -> io::Result<()> {
        self.running = true;
        self.run_worker()
    }

    fn pause(&mut self) -> io::Result<()> {
        self.running = false;
        self.stop_worker();
        Ok(())
    }

    fn save(&self) -> Result<State, StateError> {
        if !self.stopped.is_empty() {
            let reason = "requests wait for an I/O error to be resolved; let the machine go on first".into();
            return Err(StateError::Invalid { kind: MODEL.name.into(), reason });
        }
        State::new(MODEL.name, 1, &Saved { writeback: self.disk.writeback.load(Ordering::Relaxed) })
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(MODEL.name, 1)?;
        self.disk.writeback.store(saved.writeback, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        self.stop_worker();
    }
}
