//! Network card (virtio 1.2, 5.1).
//!
//! Each pair of queues has a worker thread, which exists while the driver drives and the machine runs. It owns the
//! backend's port for that pair: frames of the guest's go to it as they lie in guest memory, and it writes those for
//! the guest into the guest's buffers. The control queue is served where it is notified.

mod control;
mod rx;
#[cfg(test)]
mod tests;
mod worker;

use super::{RingSpec, VirtioDevice, read_structure};
use crate::model::{CreateError, Kind, Model, Parts};
use base::EventFd;
use base::props::{Bag, Properties};
use bus::virtio::{Activation, Interrupt, SharedQueue, device_id};
use bus::{State, StateError};
use control::{Control, Saved};
use memory::GuestMemory;
use net::{Counters, Link, MacAddr, Netdev, Offloads, Port};
use schemars::JsonSchema;
use serde::Deserialize;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use worker::Worker;

/// The model.
pub const MODEL: Model = Model {
    name: "virtio-net",
    about: "virtio network card",
    properties: Properties::of::<Spec>,
    kind: Kind::Virtio(|bag, parts| create(bag, parts)),
};

/// Properties of `virtio-net`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Spec {
    /// Network backend (required).
    pub netdev: String,
    /// Hardware address; 52:54:00:12:34:56 and following if not given.
    pub mac: Option<String>,
    /// Offer as many queue pairs as the backend has.
    pub mq: bool,
    /// Entries of each receive queue, a power of two.
    pub rx_queue_size: u16,
    /// Entries of each transmit queue, a power of two.
    pub tx_queue_size: u16,
    /// Largest packet to tell the guest, in bytes; the backend's if not given.
    pub host_mtu: Option<u16>,
    /// Speed to tell the guest, in Mbit/s.
    pub speed: Option<u32>,
    /// Duplex to tell the guest: full or half.
    pub duplex: Option<Duplex>,
    /// Let the guest leave checksums to the host.
    pub csum: bool,
    /// Give the guest frames without checksums.
    pub guest_csum: bool,
    /// Let the guest leave TCP segmentation over IPv4 to the host.
    pub host_tso4: bool,
    /// The same over IPv6.
    pub host_tso6: bool,
    /// The same with congestion marks.
    pub host_ecn: bool,
    /// Let the guest leave UDP fragmentation to the host.
    pub host_ufo: bool,
    /// Let the guest leave UDP segmentation to the host.
    pub host_uso: bool,
    /// Give the guest large TCP segments over IPv4.
    pub guest_tso4: bool,
    /// The same over IPv6.
    pub guest_tso6: bool,
    /// The same with congestion marks.
    pub guest_ecn: bool,
    /// Give the guest large UDP datagrams.
    pub guest_ufo: bool,
    /// Give the guest UDP segments of one size in one, over IPv4.
    pub guest_uso4: bool,
    /// The same over IPv6.
    pub guest_uso6: bool,
    /// Put frames into several of the guest's buffers.
    pub mrg_rxbuf: bool,
    /// Tell the guest whether the link is up.
    pub status: bool,
    /// Have a control queue.
    pub ctrl_vq: bool,
    /// Let the guest choose which frames it gets.
    pub ctrl_rx: bool,
    /// The same, further modes.
    pub ctrl_rx_extra: bool,
    /// Let the guest choose VLANs.
    pub ctrl_vlan: bool,
    /// Let the guest change its hardware address.
    pub ctrl_mac_addr: bool,
    /// Let the guest change offloads while it runs.
    pub ctrl_guest_offloads: bool,
    /// Have the guest announce itself after a migration.
    pub guest_announce: bool,
    /// Ring features.
    #[serde(flatten)]
    pub ring: RingSpec,
}

/// Whether both sides may send at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Duplex {
    /// One at a time.
    Half,
    /// Both at once.
    Full,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            netdev: String::new(),
            mac: None,
            mq: true,
            rx_queue_size: 256,
            tx_queue_size: 256,
            host_mtu: None,
            speed: None,
            duplex: None,
            csum: true,
            guest_csum: true,
            host_tso4: true,
            host_tso6: true,
            host_ecn: true,
            host_ufo: true,
            host_uso: true,
            guest_tso4: true,
            guest_tso6: true,
            guest_ecn: true,
            guest_ufo: true,
            guest_uso4: true,
            guest_uso6: true,
            mrg_rxbuf: true,
            status: true,
            ctrl_vq: true,
            ctrl_rx: true,
            ctrl_rx_extra: true,
            ctrl_vlan: true,
            ctrl_mac_addr: true,
            ctrl_guest_offloads: true,
            guest_announce: true,
            ring: RingSpec::default(),
        }
    }
}

fn create(bag: &Bag, parts: &mut dyn Parts) -> Result<Box<dyn VirtioDevice>, CreateError> {
    let spec: Spec = bag.spec()?;
    if spec.netdev.is_empty() {
        return Err(CreateError::Other("virtio-net: netdev= is missing; name a network backend".into()));
    }
    let card = parts.take_netdev(&spec.netdev)?;
    Ok(Box::new(Net::new(&spec, card.netdev, card.mac)?))
}

/// Feature bits (virtio 1.2, 5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const GUEST_UFO: u64 = 1 << 10;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const HOST_UFO: u64 = 1 << 14;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const CTRL_RX: u64 = 1 << 18;
    pub(super) const CTRL_VLAN: u64 = 1 << 19;
    pub(super) const CTRL_RX_EXTRA: u64 = 1 << 20;
    pub(super) const GUEST_ANNOUNCE: u64 = 1 << 21;
    pub(super) const MQ: u64 = 1 << 22;
    pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;
    pub(super) const GUEST_USO4: u64 = 1 << 54;
    pub(super) const GUEST_USO6: u64 = 1 << 55;
    pub(super) const HOST_USO: u64 = 1 << 56;
    pub(super) const SPEED_DUPLEX: u64 = 1 << 63;

    /// Those that say what the guest takes.
    pub(super) const GUEST_OFFLOADS: u64 =
        GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO | GUEST_USO4 | GUEST_USO6;
}

/// Entries of the control queue.
const CONTROL_SIZE: u16 = 64;
/// Queue pairs at most (virtio 1.2, 5.1.4 allows more than anyone has).
const MOST_PAIRS: usize = 128;

/// What the driver has agreed to take, from its feature bits.
fn guest_offloads(features: u64) -> Offloads {
    if features & feature::GUEST_CSUM == 0 {
        return Offloads::empty(); // all others build on it (virtio 1.2, 5.1.3.1)
    }
    let table = [
        (feature::GUEST_TSO4, Offloads::TSO4),
        (feature::GUEST_TSO6, Offloads::TSO6),
        (feature::GUEST_ECN, Offloads::ECN),
        (feature::GUEST_UFO, Offloads::UFO),
        (feature::GUEST_USO4, Offloads::USO4),
        (feature::GUEST_USO6, Offloads::USO6),
    ];
    table.into_iter().filter(|(bit, _)| features & bit != 0).fold(Offloads::CSUM, |all, (_, o)| all | o)
}

/// What workers and the control queue share.
struct Shared {
    link: Arc<Link>,
    counters: Arc<Counters>,
    control: Mutex<Control>,
    /// Counts changes of `control`, so that workers need not lock it for each frame.
    generation: AtomicU32,
    /// Queue pairs in use, and those that there are.
    pairs: AtomicU16,
    most_pairs: u16,
    /// The driver is asked to announce itself.
    announce: AtomicBool,
    interrupt: Mutex<Option<Interrupt>>,
}

impl Shared {
    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Tells the driver that configuration space has changed.
    fn config_changed(&self) {
        if let Some(interrupt) = &*self.interrupt.lock().unwrap_or_else(|e| e.into_inner()) {
            interrupt.config_changed();
        }
    }
}

/// The device.
pub struct Net {
    spec: Spec,
    features: u64,
    accepted: u64,
    mac: MacAddr,
    mtu: Option<u16>,
    pairs: u16,
    shared: Arc<Shared>,
    /// The backend's ports, while no worker has them.
    ports: Vec<Option<Box<dyn Port>>>,
    running: bool,
    loaded: bool,
    active: Option<Active>,
}

struct Active {
    pairs: Vec<Pair>,
    control: Option<(u16, SharedQueue)>,
    memory: GuestMemory,
    interrupt: Interrupt,
}

struct Pair {
    index: u16,
    rx: SharedQueue,
    tx: SharedQueue,
    kick: Arc<EventFd>,
    worker: Option<Worker>,
}

/// Checks properties that a type cannot express.
fn check(spec: &Spec) -> Result<(), CreateError> {
    let bad = |text: String| Err(CreateError::Other(format!("virtio-net: {text}")));
    for (name, size) in [("rx_queue_size", spec.rx_queue_size), ("tx_queue_size", spec.tx_queue_size)] {
        if !size.is_power_of_two() || !(64..=4096).contains(&size) {
            return bad(format!("{name}={size} must be a power of two from 64 to 4096"));
        }
    }
    if spec.host_mtu.is_some_and(|m| m < 68) {
        return bad("host_mtu= must be at least 68".into());
    }
    Ok(())
}

impl Net {
    /// A card with the properties of `spec` at `netdev`; `mac` is its address if they name none.
    ///
    /// # Errors
    /// Properties that make no sense.
    pub fn new(spec: &Spec, netdev: Netdev, mac: MacAddr) -> Result<Self, CreateError> {
        check(spec)?;
        let mac = match &spec.mac {
            Some(text) => text.parse().map_err(|e| CreateError::Other(format!("virtio-net: mac=: {e}")))?,
            None => mac,
        };
        if mac.is_multicast() || mac.is_zero() {
            return Err(CreateError::Other(format!("virtio-net: mac={mac} is not the address of one card")));
        }
        let mtu = spec.host_mtu.or(netdev.mtu);
        let pairs = if spec.mq && spec.ctrl_vq { netdev.ports.len().min(MOST_PAIRS) } else { 1 };
        let features = features(spec, &netdev, mtu.is_some(), pairs > 1);
        let shared = Arc::new(Shared {
            link: netdev.link.clone(),
            counters: netdev.counters.clone(),
            control: Mutex::new(Control::new(mac)),
            generation: AtomicU32::new(0),
            pairs: AtomicU16::new(1),
            most_pairs: pairs as u16, // at most 128
            announce: AtomicBool::new(false),
            interrupt: Mutex::new(None),
        });
        let watcher = Arc::downgrade(&shared);
        netdev.link.watch(move |_| {
            if let Some(shared) = watcher.upgrade() {
                shared.config_changed();
            }
        });
        Ok(Self {
            spec: spec.clone(),
            features,
            accepted: 0,
            mac,
            mtu,
            pairs: pairs as u16, // at most 128
            shared,
            ports: netdev.ports.into_iter().map(Some).collect(),
            running: false,
            loaded: false,
            active: None,
        })
    }

    /// Index of the control queue, which depends on what was negotiated (virtio 1.2, 5.1.2).
    fn control_index(&self) -> u16 {
        if self.accepted & feature::MQ != 0 { 2 * self.pairs } else { 2 }
    }

    /// The configuration structure (virtio 1.2, 5.1.4).
    fn config(&self) -> [u8; 17] {
        let mut c = [0; 17];
        c[..6].copy_from_slice(&self.shared.control().mac.0);
        let mut status = u16::from(self.shared.link.is_up());
        if self.shared.announce.load(Ordering::SeqCst) {
            status |= 2;
        }
        c[6..8].copy_from_slice(&status.to_le_bytes());
        c[8..10].copy_from_slice(&self.pairs.to_le_bytes());
        c[10..12].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        c[12..16].copy_from_slice(&self.spec.speed.unwrap_or(u32::MAX).to_le_bytes());
        c[16] = match self.spec.duplex {
            Some(Duplex::Half) => 0,
            Some(Duplex::Full) => 1,
            None => 0xff,
        };
        c
    }

    /// Starts the workers if there is something for them to do.
    fn run_workers(&mut self) -> io::Result<()> {
        let Some(active) = self.active.as_mut().filter(|_| self.running) else { return Ok(()) };
        for pair in &mut active.pairs {
            let Some(port) = self.ports.get_mut(usize::from(pair.index)) else { continue };
            if pair.worker.is_some() || port.is_none() {
                continue;
            }
            let setup = worker::Setup {
                index: pair.index,
                rx: pair.rx.clone(),
                tx: pair.tx.clone(),
                kick: pair.kick.clone(),
                memory: active.memory.clone(),
                interrupt: active.interrupt.clone(),
                shared: self.shared.clone(),
                features: self.accepted,
            };
            pair.worker = Some(Worker::start(setup, port)?);
        }
        Ok(())
    }

    /// Stops the workers; returns when nothing moves any more.
    fn stop_workers(&mut self) {
        let Some(active) = &mut self.active else { return };
        for pair in &mut active.pairs {
            if let Some(worker) = pair.worker.take() {
                self.ports[usize::from(pair.index)] = worker.stop(&pair.kick);
            }
        }
    }

    /// Serves the control queue.
    fn serve_control(&mut self) {
        let Some(active) = self.active.as_ref().filter(|_| self.running) else { return };
        let Some((index, queue)) = &active.control else { return };
        let changed =
            control::serve(queue, *index, &active.memory, &active.interrupt, &self.shared, self.accepted);
        if changed {
            self.shared.generation.fetch_add(1, Ordering::SeqCst);
            active.pairs.iter().for_each(|p| p.kick.signal());
        }
    }
}

/// What the device offers.
fn features(spec: &Spec, netdev: &Netdev, mtu: bool, mq: bool) -> u64 {
    let (takes, gives) = (netdev.takes, netdev.gives);
    let csum = spec.csum && takes.contains(Offloads::CSUM);
    let guest_csum = spec.guest_csum && gives.contains(Offloads::CSUM);
    let uso = takes.contains(Offloads::USO4 | Offloads::USO6);
    let control = spec.ctrl_vq;
    let table = [
        (csum, feature::CSUM),
        (csum && spec.host_tso4 && takes.contains(Offloads::TSO4), feature::HOST_TSO4),
        (csum && spec.host_tso6 && takes.contains(Offloads::TSO6), feature::HOST_TSO6),
        (csum && spec.host_ecn && takes.contains(Offloads::ECN), feature::HOST_ECN),
        (csum && spec.host_ufo && takes.contains(Offloads::UFO), feature::HOST_UFO),
        (csum && spec.host_uso && uso, feature::HOST_USO),
        (guest_csum, feature::GUEST_CSUM),
        (guest_csum && spec.guest_tso4 && gives.contains(Offloads::TSO4), feature::GUEST_TSO4),
        (guest_csum && spec.guest_tso6 && gives.contains(Offloads::TSO6), feature::GUEST_TSO6),
        (guest_csum && spec.guest_ecn && gives.contains(Offloads::ECN), feature::GUEST_ECN),
        (guest_csum && spec.guest_ufo && gives.contains(Offloads::UFO), feature::GUEST_UFO),
        (guest_csum && spec.guest_uso4 && gives.contains(Offloads::USO4), feature::GUEST_USO4),
        (guest_csum && spec.guest_uso6 && gives.contains(Offloads::USO6), feature::GUEST_USO6),
        (guest_csum && control && spec.ctrl_guest_offloads, feature::CTRL_GUEST_OFFLOADS),
        (mtu, feature::MTU),
        (true, feature::MAC),
        (spec.mrg_rxbuf, feature::MRG_RXBUF),
        (spec.status, feature::STATUS),
        (control, feature::CTRL_VQ),
        (control && spec.ctrl_rx, feature::CTRL_RX),
        (control && spec.ctrl_rx_extra, feature::CTRL_RX_EXTRA),
        (control && spec.ctrl_vlan, feature::CTRL_VLAN),
        (control && spec.ctrl_mac_addr, feature::CTRL_MAC_ADDR),
        (control && spec.status && spec.guest_announce, feature::GUEST_ANNOUNCE),
        (control && mq, feature::MQ),
        (spec.speed.is_some() || spec.duplex.is_some(), feature::SPEED_DUPLEX),
    ];
    table.into_iter().filter(|(on, _)| *on).fold(spec.ring.features(), |all, (_, bit)| all | bit)
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn device_id(&self) -> u32 {
        device_id::NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = [self.spec.rx_queue_size, self.spec.tx_queue_size].repeat(self.pairs.into());
        if self.spec.ctrl_vq {
            sizes.push(CONTROL_SIZE);
        }
        sizes
    }

    fn features_accepted(&mut self, features: u64) {
        self.accepted = features;
        self.shared.control().offloads = features & feature::GUEST_OFFLOADS;
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_structure(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { mut queues, memory, interrupt, features } = activation;
        self.accepted = features;
        let mq = features & feature::MQ != 0;
        let control = if features & feature::CTRL_VQ == 0 {
            None
        } else {
            let index = self.control_index();
            queues.get_mut(usize::from(index)).and_then(Option::take).map(|q| (index, q))
        };
        let count = if mq { self.pairs } else { 1 };
        let mut pairs = Vec::new();
        for index in 0..count {
            let at = 2 * usize::from(index);
            let mut take = |i: usize| queues.get_mut(i).and_then(Option::take);
            if let (Some(rx), Some(tx)) = (take(at), take(at + 1)) {
                let kick = Arc::new(EventFd::new()?);
                pairs.push(Pair { index, rx, tx, kick, worker: None });
            }
        }
        *self.shared.interrupt.lock().unwrap_or_else(|e| e.into_inner()) = Some(interrupt.clone());
        self.active = Some(Active { pairs, control, memory, interrupt });
        if std::mem::take(&mut self.loaded) && features & feature::GUEST_ANNOUNCE != 0 {
            // It runs elsewhere now: switches must hear of it (virtio 1.2, 5.1.6.5.4).
            self.shared.announce.store(true, Ordering::SeqCst);
        }
        self.run_workers()
    }

    fn doorbell(&self, queue: u16) -> Option<&EventFd> {
        let active = self.active.as_ref()?;
        if active.control.as_ref().is_some_and(|(index, _)| *index == queue) {
            return None;
        }
        active.pairs.iter().find(|p| p.index == queue / 2).map(|p| &*p.kick)
    }

    fn notify(&mut self, queue: u16) {
        match self.doorbell(queue) {
            Some(doorbell) => doorbell.signal(),
            None => self.serve_control(),
        }
    }

    fn reset(&mut self) {
        self.stop_workers();
        self.active = None;
        self.accepted = 0;
        self.loaded = false;
        *self.shared.control() = Control::new(self.mac);
        self.shared.pairs.store(1, Ordering::SeqCst);
        self.shared.announce.store(false, Ordering::SeqCst);
        *self.shared.interrupt.lock().unwrap_or_else(|e| e.into_inner()) = None;
    }

    fn start(&mut self) -> io::Result<()> {
        self.running = true;
        self.run_workers()?;
        self.serve_control();
        if self.shared.announce.load(Ordering::SeqCst) {
            self.shared.config_changed();
        }
        Ok(())
    }

    fn pause(&mut self) -> io::Result<()> {
        self.running = false;
        self.stop_workers();
        Ok(())
    }

    fn save(&self) -> Result<State, StateError> {
        let saved = self.shared.control().save(self.shared.pairs.load(Ordering::SeqCst));
        State::new(MODEL.name, 1, &saved)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(MODEL.name, 1)?;
        let pairs = saved.pairs;
        let invalid = |reason: &str| StateError::Invalid { kind: MODEL.name.into(), reason: reason.into() };
        if pairs == 0 || pairs > self.pairs {
            return Err(invalid(
                "more queue pairs are in use than this card has; give it a backend with as many",
            ));
        }
        let control = Control::load(saved).ok_or_else(|| invalid("an address table is malformed"))?;
        *self.shared.control() = control;
        self.shared.pairs.store(pairs, Ordering::SeqCst);
        self.loaded = true;
        Ok(())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.stop_workers();
    }
}
