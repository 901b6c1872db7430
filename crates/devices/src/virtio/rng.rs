//! Entropy source (virtio 1.2, 5.4).

use super::{RingSpec, VirtioDevice};
use crate::model::{CreateError, Kind, Model, Parts};
use base::props::{Bag, Properties};
use base::{Timer, Timers};
use bus::virtio::{Activation, Chain, Interrupt, QueueError, SharedQueue, device_id};
use bus::{State, StateError};
use memory::GuestMemory;
use rustix::rand::{GetRandomFlags, getrandom};
use schemars::JsonSchema;
use serde::Deserialize;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

/// The model.
pub const MODEL: Model = Model {
    name: "virtio-rng",
    about: "virtio entropy source",
    properties: Properties::of::<Spec>,
    kind: Kind::Virtio(|bag, parts| create(bag, parts)),
};

/// Properties of `virtio-rng`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Spec {
    /// Bytes the guest may take in a period; unlimited if not given.
    #[serde(rename = "max-bytes")]
    #[schemars(extend("format" = "size"))]
    pub max_bytes: Option<u64>,
    /// Length of the period in milliseconds.
    pub period: u32,
    /// Ring features.
    #[serde(flatten)]
    pub ring: RingSpec,
}

impl Default for Spec {
    fn default() -> Self {
        Self { max_bytes: None, period: 65536, ring: RingSpec::default() }
    }
}

fn create(bag: &Bag, parts: &mut dyn Parts) -> Result<Box<dyn VirtioDevice>, CreateError> {
    Ok(Box::new(Rng::new(&bag.spec::<Spec>()?, parts.timers())?))
}

/// Entries of the request queue. Drivers have one request out at a time, or a few.
const QUEUE_SIZE: u16 = 8;
/// Bytes given to one request at most: the driver takes less than it asked for and asks again.
const MOST: u64 = 4096;

/// The device.
pub struct Rng {
    ring: RingSpec,
    shared: Arc<Shared>,
}

/// What vCPU threads and the timer share.
struct Shared {
    state: Mutex<Work>,
    timer: Timer,
}

struct Work {
    running: bool,
    active: Option<(SharedQueue, GuestMemory, Interrupt)>,
    limit: Option<Limit>,
    chain: Chain,
}

/// How much may still be given out in the current period.
struct Limit {
    most: u64,
    period: Duration,
    left: u64,
    until: Instant,
}

impl Limit {
    /// Bytes left now.
    fn left(&mut self) -> u64 {
        let now = Instant::now();
        if now >= self.until {
            self.left = self.most;
            self.until = now + self.period;
        }
        self.left
    }
}

impl Rng {
    /// A source with the properties of `spec`; `timers` wakes it for the next period.
    ///
    /// # Errors
    /// A limit that would never give anything.
    pub fn new(spec: &Spec, timers: &Timers) -> Result<Self, CreateError> {
        if spec.max_bytes == Some(0) || spec.period == 0 {
            let text = "virtio-rng: max-bytes= and period= must be at least 1; leave them out for no limit";
            return Err(CreateError::Other(text.into()));
        }
        let limit = spec.max_bytes.map(|most| Limit {
            most,
            period: Duration::from_millis(spec.period.into()),
            left: 0,
            until: Instant::now(),
        });
        let state = Mutex::new(Work { running: false, active: None, limit, chain: Chain::new() });
        let shared = Arc::new_cyclic(|me: &Weak<Shared>| {
            let me = me.clone();
            let timer = timers.timer(move || {
                if let Some(shared) = me.upgrade() {
                    shared.process();
                }
            });
            Shared { state, timer }
        });
        Ok(Self { ring: spec.ring.clone(), shared })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Serves what is there, up to a ringful; more than that is left to the timer, so that no vCPU is held here.
    fn process(&self) {
        let mut work = self.lock();
        if !work.running {
            return;
        }
        let Work { active: Some((queue, memory, interrupt)), limit, chain, .. } = &mut *work else { return };
        let mut queue = queue.lock().unwrap_or_else(|e| e.into_inner());
        if queue.is_broken() {
            return;
        }
        let mut again = None;
        let result = (|| {
            for _ in 0..queue.size() {
                let left = limit.as_mut().map_or(u64::MAX, Limit::left);
                if left == 0 {
                    again = limit.as_ref().map(|l| l.until);
                    break;
                }
                if !queue.pop_or_listen(chain)? {
                    break;
                }
                let given = fill(chain, memory, left.min(MOST))?;
                if let Some(limit) = limit {
                    limit.left -= u64::from(given);
                }
                queue.push(chain, given)?;
            }
            if again.is_none() && queue.enable_notifications()? {
                again = Some(Instant::now());
            }
            queue.publish()
        })();
        match result {
            Ok(true) => interrupt.queue(0),
            Ok(false) => {}
            Err(e) => interrupt.fail(&format!("request queue: {e}")),
        }
        if let Some(at) = again {
            self.timer.arm(at);
        }
    }
}

/// Fills a request with random bytes, at most `most`; returns how many.
fn fill(chain: &Chain, memory: &GuestMemory, most: u64) -> Result<u32, QueueError> {
    let mut writer = chain.writer(memory);
    let mut buffer = [0; 256];
    let mut left = most;
    while left > 0 {
        let n = left.min(buffer.len() as u64).min(writer.remaining()) as usize;
        if n == 0 {
            break;
        }
        // Up to 256 bytes come whole (getrandom(2)); a signal or an early boot only ends the request sooner.
        let Ok(got) = getrandom(&mut buffer[..n], GetRandomFlags::empty()) else { break };
        writer.write(&buffer[..got])?;
        left -= got as u64;
    }
    Ok(writer.written())
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn device_id(&self) -> u32 {
        device_id::RNG
    }

    fn features(&self) -> u64 {
        self.ring.features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { mut queues, memory, interrupt, .. } = activation;
        if let Some(queue) = queues.pop().flatten() {
            self.shared.lock().active = Some((queue, memory, interrupt));
        }
        Ok(())
    }

    fn notify(&mut self, _: u16) {
        self.shared.process();
    }

    fn reset(&mut self) {
        self.shared.timer.disarm();
        self.shared.lock().active = None;
    }

    fn start(&mut self) -> io::Result<()> {
        self.shared.lock().running = true;
        self.shared.process();
        Ok(())
    }

    fn pause(&mut self) -> io::Result<()> {
        self.shared.timer.disarm();
        self.shared.lock().running = false;
        Ok(())
    }

    fn save(&self) -> Result<State, StateError> {
        State::new(MODEL.name, 1, &())
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        state.unpack(MODEL.name, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bus::virtio::testing::{Guest, TRANSPORTS, Transport};

    fn guest(spec: &Spec, transport: Transport) -> (Guest, Timers) {
        let timers = Timers::new();
        let mut guest = Guest::new(Box::new(Rng::new(spec, &timers).unwrap()), transport, true);
        guest.bring_up(u64::MAX, 1);
        (guest, timers)
    }

    #[test]
    fn buffers_are_filled() {
        for transport in TRANSPORTS {
            let (mut guest, _timers) = guest(&Spec::default(), transport);
            assert_eq!(guest.request(0, &[(0x10_0000, 100, true), (0x10_0100, 300, true)]), 400);
            assert!(guest.take_interrupt(0));
            let mut got = [0; 100];
            guest.mem.read(0x10_0000, &mut got).unwrap();
            assert!(got.iter().filter(|b| **b == 0).count() < 20, "{got:?}");
            // One answer has its bounds, and a request without room gets nothing.
            assert_eq!(guest.request(0, &[(0x10_0000, 0x10000, true)]), MOST as u32);
            assert_eq!(guest.request(0, &[(0x10_0000, 100, false)]), 0);
        }
    }

    #[test]
    fn the_limit_holds_and_the_next_period_brings_more() {
        let spec = Spec { max_bytes: Some(64), period: 30, ..Spec::default() };
        let (mut guest, _timers) = guest(&spec, Transport::Pci);
        let start = Instant::now();
        let mut total = 0;
        while total < 256 {
            total += guest.request(0, &[(0x10_0000, 48, true)]);
        }
        assert!(start.elapsed() >= Duration::from_millis(60), "three periods' worth came too soon");
        for bad in [Spec { max_bytes: Some(0), ..Spec::default() }, Spec { period: 0, ..Spec::default() }] {
            assert!(Rng::new(&bad, &Timers::new()).is_err());
        }
    }

    #[test]
    fn nothing_moves_while_paused() {
        let (mut guest, timers) = guest(&Spec::default(), Transport::Pci);
        guest.device().pause().unwrap();
        let id = guest.submit(0, &[(0x10_0000, 8, true)]).unwrap();
        assert!(guest.rings[0].poll().is_none());
        let mut guest = guest.migrate(Box::new(Rng::new(&Spec::default(), &timers).unwrap()));
        assert_eq!(guest.wait_used(0), (id, 8));
    }
}
