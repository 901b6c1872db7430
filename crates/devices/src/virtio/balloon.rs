//! Memory balloon (virtio 1.2, 5.5): the guest gives memory back when asked to, and reports pages that it does not use.

use super::{RingSpec, VirtioDevice, read_structure};
use crate::model::{CreateError, Kind, Model, Parts};
use base::props::{Bag, Properties};
use base::{Timer, Timers};
use bus::virtio::{Activation, Chain, Interrupt, QueueError, SharedQueue, device_id};
use bus::{State, StateError, System, SystemRequest};
use memory::GuestMemory;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant, SystemTime};

/// The model.
pub const MODEL: Model = Model {
    name: "virtio-balloon",
    about: "virtio memory balloon",
    properties: Properties::of::<Spec>,
    kind: Kind::Virtio(|bag, parts| create(bag, parts)),
};

/// Properties of `virtio-balloon`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Spec {
    /// Let the guest take memory out of the balloon rather than kill its processes.
    #[serde(rename = "deflate-on-oom")]
    pub deflate_on_oom: bool,
    /// Give the host what the guest reports as free, without being asked.
    #[serde(rename = "free-page-reporting")]
    pub free_page_reporting: bool,
    /// Seconds between questions for the guest's statistics; 0 asks never.
    #[serde(rename = "guest-stats-polling-interval")]
    pub guest_stats_polling_interval: u32,
    /// Ring features.
    #[serde(flatten)]
    pub ring: RingSpec,
}

const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATS: u16 = 2;
/// Queues are numbered without gaps, as QEMU and Linux number them where there is no hinting queue.
const REPORTING: u16 = 3;
const QUEUE_SIZE: u16 = 128;
/// The unit of the balloon in bytes, whatever the guest's page size.
const PAGE: u64 = 4096;
/// Page numbers that a request may name: Linux names 256 at a time.
const PAGES_MAX: u64 = 1 << 16;
/// Names of the statistics by tag (virtio 1.2, 5.5.6.4), as QEMU calls them.
const STAT_NAMES: [&str; 10] = [
    "stat-swap-in",
    "stat-swap-out",
    "stat-major-faults",
    "stat-minor-faults",
    "stat-free-memory",
    "stat-total-memory",
    "stat-available-memory",
    "stat-disk-caches",
    "stat-htlb-pgalloc",
    "stat-htlb-pgfail",
];

/// What the guest last said of its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// When; none if it never did.
    pub updated: Option<SystemTime>,
    /// Value by name ([QEMU's](https://www.qemu.org/docs/master/interop/virtio-balloon-stats.html)), in bytes or events.
    pub values: BTreeMap<&'static str, u64>,
}

/// Changes are told at most this often, the latest of them in any case: a guest may make any number.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

struct Work {
    running: bool,
    queues: Vec<Option<SharedQueue>>,
    link: Option<(GuestMemory, Interrupt)>,
    chain: Chain,
    /// Pages the guest is asked to have in the balloon.
    target: u32,
    /// Pages it has there.
    actual: u32,
    /// Buffer of statistics that waits to be given back, which asks for new ones.
    held: Option<Chain>,
    statistics: Statistics,
    interval: Duration,
    /// When the last change was told.
    told: Option<Instant>,
}

/// A handle on a balloon, for who decides how much memory the guest has.
pub struct Balloon {
    work: Mutex<Work>,
    timer: Timer,
    tell: Timer,
    total: u64,
    system: System,
}

/// The device.
struct Device {
    spec: Spec,
    shared: Arc<Balloon>,
}

fn create(bag: &Bag, parts: &mut dyn Parts) -> Result<Box<dyn VirtioDevice>, CreateError> {
    let spec = bag.spec::<Spec>()?;
    let balloon = Balloon::new(&spec, parts.memory().total(), parts.timers(), parts.system());
    parts.offer_balloon(&balloon)?;
    Ok(Box::new(Device { spec, shared: balloon }))
}

impl std::fmt::Debug for Balloon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Balloon").field("actual", &self.actual()).finish_non_exhaustive()
    }
}

impl Balloon {
    fn new(spec: &Spec, total: u64, timers: &Timers, system: &System) -> Arc<Self> {
        Arc::new_cyclic(|me: &Weak<Self>| {
            let calling = |f: fn(&Self)| {
                let me = me.clone();
                timers.timer(move || {
                    if let Some(balloon) = me.upgrade() {
                        f(&balloon);
                    }
                })
            };
            let work = Work {
                running: false,
                queues: Vec::new(),
                link: None,
                chain: Chain::new(),
                target: 0,
                actual: 0,
                held: None,
                statistics: Statistics::default(),
                interval: Duration::from_secs(spec.guest_stats_polling_interval.into()),
                told: None,
            };
            let (timer, tell) = (calling(Self::poll), calling(Self::tell));
            Self { work: Mutex::new(work), timer, tell, total, system: system.clone() }
        })
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Memory that the guest has for itself now, in bytes.
    pub fn actual(&self) -> u64 {
        self.total.saturating_sub(u64::from(self.lock().actual) * PAGE)
    }

    /// Asks the guest to do with `bytes` of memory, at most what it was given. It takes its time, and may refuse.
    pub fn set_target(&self, bytes: u64) {
        let mut work = self.lock();
        let pages = (self.total - bytes.min(self.total)) / PAGE;
        work.target = u32::try_from(pages).unwrap_or(u32::MAX);
        if let Some((_, interrupt)) = &work.link {
            interrupt.config_changed();
        }
    }

    /// What the guest last said of its memory.
    pub fn statistics(&self) -> Statistics {
        self.lock().statistics.clone()
    }

    /// Seconds between questions for statistics; 0 stops them.
    pub fn set_polling_interval(&self, seconds: u32) {
        let mut work = self.lock();
        work.interval = Duration::from_secs(seconds.into());
        self.arm(&work);
    }

    /// Seconds between questions for statistics.
    pub fn polling_interval(&self) -> u64 {
        self.lock().interval.as_secs()
    }

    /// Tells of a change, now or when the last is long enough ago.
    fn changed(&self, work: &Work) {
        let now = Instant::now();
        self.tell.arm(work.told.map_or(now, |t| now.max(t + TELL_INTERVAL)));
    }

    fn tell(&self) {
        self.lock().told = Some(Instant::now());
        let data = serde_json::json!({ "actual": self.actual() });
        self.system.request(SystemRequest::Notice("BALLOON_CHANGE", data));
    }

    fn arm(&self, work: &Work) {
        if work.running && !work.interval.is_zero() {
            self.timer.arm(Instant::now() + work.interval);
        } else {
            self.timer.disarm();
        }
    }

    /// Asks for new statistics, by giving back the buffer of the last.
    fn poll(&self) {
        let mut work = self.lock();
        if work.running
            && let Some(chain) = work.held.take()
        {
            work.on_queue(STATS, |queue, _, _| queue.push(&chain, 0));
        }
        self.arm(&work);
    }
}

impl Work {
    /// Does something with a queue, tells the driver about what was used, and marks the device broken if it must be.
    fn on_queue(
        &mut self,
        index: u16,
        act: impl FnOnce(&mut bus::virtio::Queue, &GuestMemory, &mut Chain) -> Result<(), QueueError>,
    ) {
        let Some((memory, interrupt)) = &self.link else { return };
        let Some(Some(queue)) = self.queues.get(usize::from(index)) else { return };
        let mut queue = queue.lock().unwrap_or_else(|e| e.into_inner());
        if queue.is_broken() {
            return;
        }
        match act(&mut queue, memory, &mut self.chain).and_then(|()| queue.publish()) {
            Ok(true) => interrupt.queue(index),
            Ok(false) => {}
            Err(e) => interrupt.fail(&format!("queue {index}: {e}")),
        }
    }

    /// Serves all requests of the queue for which `each` takes a chain.
    fn serve(&mut self, index: u16, each: fn(&GuestMemory, &Chain) -> Result<(), QueueError>) {
        if self.running {
            self.on_queue(index, |queue, memory, chain| {
                // A ringful at a time, so that no vCPU is held here.
                for _ in 0..queue.size() {
                    if !queue.pop_or_listen(chain)? {
                        break;
                    }
                    each(memory, chain)?;
                    queue.push(chain, 0)?;
                }
                Ok(())
            });
        }
    }

    /// Takes the buffer of statistics that the driver made available.
    fn take_statistics(&mut self) {
        if !self.running || self.held.is_some() {
            return;
        }
        let mut held = None;
        let mut statistics = None;
        self.on_queue(STATS, |queue, memory, _| {
            let mut chain = Chain::new();
            if queue.pop_or_listen(&mut chain)? {
                statistics = Some(read_statistics(memory, &chain)?);
                held = Some(chain);
            }
            Ok(())
        });
        self.held = held;
        if let Some(statistics) = statistics {
            self.statistics = statistics;
        }
    }
}

fn read_statistics(memory: &GuestMemory, chain: &Chain) -> Result<Statistics, QueueError> {
    let mut reader = chain.reader(memory);
    let mut values = BTreeMap::new();
    // Each is a tag of 16 and a value of 64 bits, packed; what is unknown is skipped, and there are not many.
    for _ in 0..64 {
        if reader.remaining() < 10 {
            break;
        }
        let tag = u16::from_le_bytes(reader.read_array()?);
        let value = u64::from_le_bytes(reader.read_array()?);
        if let Some(name) = STAT_NAMES.get(usize::from(tag)) {
            values.insert(*name, value);
        }
    }
    Ok(Statistics { updated: Some(SystemTime::now()), values })
}

/// Gives the pages of an inflate request back to the host: an array of 32-bit page numbers.
fn inflate(memory: &GuestMemory, chain: &Chain) -> Result<(), QueueError> {
    let mut reader = chain.reader(memory);
    let mut run: Option<(u64, u64)> = None;
    let give = |run: Option<(u64, u64)>| {
        if let Some((start, len)) = run
            && memory.give_back(start, len).is_err()
        {
            tracing::debug!("virtio-balloon: {len:#x} bytes at {start:#x} are not all RAM");
        }
    };
    for _ in 0..PAGES_MAX {
        if reader.remaining() < 4 {
            break;
        }
        let page = u64::from(u32::from_le_bytes(reader.read_array()?)) * PAGE;
        run = match run {
            Some((start, len)) if start + len == page => Some((start, len + PAGE)),
            // Linux names pages from the top down.
            Some((start, len)) if page + PAGE == start => Some((page, len + PAGE)),
            before => {
                give(before);
                Some((page, PAGE))
            }
        };
    }
    give(run);
    Ok(())
}

/// Taking pages out of the balloon needs nothing: the host finds memory when they are touched.
fn deflate(_: &GuestMemory, _: &Chain) -> Result<(), QueueError> {
    Ok(())
}

/// Gives reported free pages back: they are the request's buffers themselves.
fn report(memory: &GuestMemory, chain: &Chain) -> Result<(), QueueError> {
    for segment in chain.writable() {
        if memory.give_back(segment.addr, segment.len.into()).is_err() {
            tracing::debug!("virtio-balloon: reported pages at {:#x} are not RAM", segment.addr);
        }
    }
    Ok(())
}

/// Saved state.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    target: u32,
    actual: u32,
}

impl VirtioDevice for Device {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn device_id(&self) -> u32 {
        device_id::BALLOON
    }

    fn features(&self) -> u64 {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        self.spec.ring.features()
            | F_STATS_VQ
            | bit(self.spec.deflate_on_oom, F_DEFLATE_ON_OOM)
            | bit(self.spec.free_page_reporting, F_REPORTING)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; if self.spec.free_page_reporting { 4 } else { 3 }]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let work = self.shared.lock();
        let mut config = [0; 8];
        config[..4].copy_from_slice(&work.target.to_le_bytes());
        config[4..].copy_from_slice(&work.actual.to_le_bytes());
        read_structure(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let (4, Ok(value)) = (offset, <[u8; 4]>::try_from(data)) else { return };
        let most = self.shared.total / PAGE;
        let actual = u32::from_le_bytes(value).min(u32::try_from(most).unwrap_or(u32::MAX));
        let mut work = self.shared.lock();
        if std::mem::replace(&mut work.actual, actual) != actual {
            self.shared.changed(&work);
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let mut work = self.shared.lock();
        work.queues = activation.queues;
        work.link = Some((activation.memory, activation.interrupt));
        Ok(())
    }

    fn notify(&mut self, queue: u16) {
        let mut work = self.shared.lock();
        match queue {
            INFLATE => work.serve(INFLATE, inflate),
            DEFLATE => work.serve(DEFLATE, deflate),
            STATS => work.take_statistics(),
            REPORTING => work.serve(REPORTING, report),
            _ => {}
        }
    }

    fn reset(&mut self) {
        let mut work = self.shared.lock();
        work.queues.clear();
        work.link = None;
        work.held = None;
        work.actual = 0;
        work.statistics = Statistics::default();
    }

    fn start(&mut self) -> io::Result<()> {
        let mut work = self.shared.lock();
        work.running = true;
        self.shared.arm(&work);
        drop(work);
        (0..self.queue_sizes().len() as u16).for_each(|q| self.notify(q));
        Ok(())
    }

    fn pause(&mut self) -> io::Result<()> {
        self.shared.timer.disarm();
        let mut work = self.shared.lock();
        // The driver's buffer is taken anew on start.
        if let Some(chain) = work.held.take() {
            work.on_queue(STATS, |queue, _, _| {
                queue.unpop(&chain);
                Ok(())
            });
        }
        work.running = false;
        Ok(())
    }

    fn save(&self) -> Result<State, StateError> {
        let work = self.shared.lock();
        State::new(MODEL.name, 1, &Saved { target: work.target, actual: work.actual })
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(MODEL.name, 1)?;
        if u64::from(saved.actual) * PAGE > self.shared.total {
            return Err(StateError::Invalid {
                kind: MODEL.name.into(),
                reason: "more in the balloon than there is memory".into(),
            });
        }
        let mut work = self.shared.lock();
        (work.target, work.actual) = (saved.target, saved.actual);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bus::virtio::testing::{Guest, TRANSPORTS, Transport};
    use std::sync::mpsc::channel;

    fn device(spec: &Spec, timers: &Timers, system: &System) -> (Device, Arc<Balloon>) {
        let total = bus::virtio::testing::ram().total();
        let shared = Balloon::new(spec, total, timers, system);
        (Device { spec: spec.clone(), shared: shared.clone() }, shared)
    }

    fn guest(spec: &Spec, transport: Transport, system: &System) -> (Guest, Arc<Balloon>, Timers) {
        let timers = Timers::new();
        let (device, balloon) = device(spec, &timers, system);
        let queues = device.queue_sizes().len() as u16;
        let mut guest = Guest::new(Box::new(device), transport, true);
        guest.bring_up(u64::MAX, queues);
        (guest, balloon, timers)
    }

    fn put(guest: &Guest, at: u64, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|p| p.to_le_bytes()).collect();
        guest.mem.write(at, &bytes).unwrap();
    }

    #[test]
    fn pages_go_to_the_host_and_the_target_reaches_the_driver() {
        for transport in TRANSPORTS {
            let (tx, told) = channel();
            let system = System::new(move |request| tx.send(request).unwrap());
            let (mut guest, balloon, _timers) = guest(&Spec::default(), transport, &system);
            let total = balloon.actual();

            guest.mem.fill(0x18_0000, 0x4000, 9).unwrap();
            // 0x180 and 0x181 from the top down orders, and a page that is no RAM.
            put(&guest, 0x10_0000, &[0x181, 0x180, 0x183, 0xffff_ffff]);
            guest.request(INFLATE, &[(0x10_0000, 16, false)]);
            let byte = |at| guest.mem.read_obj::<u8>(at).unwrap();
            assert_eq!([0x18_0000, 0x18_1000, 0x18_2000, 0x18_3000].map(byte), [0, 0, 9, 0]);
            guest.request(DEFLATE, &[(0x10_0000, 16, false)]);

            balloon.set_target(total - (1 << 20));
            assert_eq!(guest.read_config::<4>(0), 256u32.to_le_bytes());
            assert!(guest.take_config_interrupt());
            guest.write_config(4, &256u32.to_le_bytes());
            assert_eq!(balloon.actual(), total - (1 << 20));
            let data = serde_json::json!({ "actual": total - (1 << 20) });
            assert_eq!(told.recv(), Ok(SystemRequest::Notice("BALLOON_CHANGE", data)));
            // A guest that claims more than there is.
            guest.write_config(4, &[0xff; 4]);
            assert_eq!(balloon.actual(), 0);
            guest.write_config(5, &[0xff; 8]);
        }
    }

    #[test]
    fn free_pages_are_reported() {
        let spec = Spec { free_page_reporting: true, ..Spec::default() };
        let (mut guest, _balloon, _timers) = guest(&spec, Transport::Pci, &System::new(|_| {}));
        guest.mem.fill(0x18_0000, 0x3000, 9).unwrap();
        guest.request(REPORTING, &[(0x18_1000, 0x1000, true)]);
        let byte = |at| guest.mem.read_obj::<u8>(at).unwrap();
        assert_eq!([0x18_0000, 0x18_1000, 0x18_2000].map(byte), [9, 0, 9]);
    }

    #[test]
    fn statistics_come_round() {
        let (mut guest, balloon, timers) = guest(&Spec::default(), Transport::Pci, &System::new(|_| {}));
        assert_eq!(balloon.statistics(), Statistics::default());
        let mut stats = Vec::new();
        for (tag, value) in [(4u16, 1000u64), (5, 2000), (99, 1)] {
            stats.extend(tag.to_le_bytes());
            stats.extend(value.to_le_bytes());
        }
        guest.mem.write(0x10_0000, &stats).unwrap();
        let id = guest.submit(STATS, &[(0x10_0000, 30, false)]).unwrap();
        let got = balloon.statistics();
        assert_eq!(
            got.values.into_iter().collect::<Vec<_>>(),
            [("stat-free-memory", 1000), ("stat-total-memory", 2000)]
        );
        assert!(got.updated.is_some());
        assert!(guest.rings[usize::from(STATS)].poll().is_none(), "kept until the next question");
        balloon.set_polling_interval(1);
        assert_eq!(balloon.polling_interval(), 1);
        balloon.poll();
        assert_eq!(guest.wait_used(STATS), (id, 0));

        // A buffer that is held when the machine pauses is there for the next process.
        let id = guest.submit(STATS, &[(0x10_0000, 10, false)]).unwrap();
        let (device, balloon) = device(&Spec::default(), &timers, &System::new(|_| {}));
        let mut guest = guest.migrate(Box::new(device));
        assert_eq!(balloon.statistics().values.len(), 1);
        balloon.poll();
        assert_eq!(guest.wait_used(STATS), (id, 0));
    }
}
