//! Tests of configuration space, BARs, interrupts and buses.

use super::*;
use crate::virtio::testing::{Bells, Notes};
use crate::{Bus, IrqPin, RegionId, Space, State, StateError, System, SystemRequest, shared};
use proptest::prelude::*;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

/// A function with a BAR of each kind, a ROM, MSI and MSI-X, whose regions read as their number.
struct Probe {
    config: Config,
    msi: Msi,
    intx: Arc<Intx>,
    vectors: MsixVectors,
}

const ID: Identity = Identity {
    vendor: 0x1234,
    device: 0x5678,
    class: 0x01_0802,
    revision: 3,
    subsystem_vendor: 0x1af4,
    subsystem: 9,
};

impl Probe {
    fn new(notes: &Arc<Notes>, bells: Option<Arc<Bells>>) -> Self {
        let mut config = Config::endpoint("probe", ID);
        config.add_bar(0, Bar::io(32));
        config.add_bar(1, Bar::memory32(0x1000));
        config.add_bar(2, Bar::memory64(0x10_0000).prefetchable());
        config.add_bar(4, Bar::memory32(0x2000));
        config.add_rom(0x800);
        let intx = config.add_intx(1);
        let msi = config.add_msi(notes.clone(), 2);
        let doorbells = bells.map(|b| b as Arc<dyn accel::Doorbells>);
        let vectors = MsixVectors::new(notes.clone(), doorbells, 3);
        config.add_msix(Msix { vectors: vectors.clone(), bar: 4, table: 0, pba: 0x1000 });
        Self { config, msi, intx, vectors }
    }
}

impl Device for Probe {
    fn name(&self) -> &str {
        "probe"
    }
    fn read(&mut self, at: RegionId, offset: u64, data: &mut [u8]) {
        if !self.config.msix().is_some_and(|m| m.read(at.0, offset, data)) {
            data.fill(at.0 as u8);
        }
    }
    fn write(&mut self, at: RegionId, offset: u64, data: &[u8]) {
        if let Some(msix) = self.config.msix() {
            msix.write(at.0, offset, data);
        }
    }
    fn reset(&mut self) {
        self.config.reset();
    }
    fn save(&self) -> Result<State, StateError> {
        State::new("probe", 1, &self.config.save())
    }
    fn load(&mut self, state: State) -> Result<(), StateError> {
        self.config.load(state.unpack("probe", 1)?).map(drop)
    }
}

impl PciFunction for Probe {
    fn config(&self) -> &Config {
        &self.config
    }
    fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }
}

struct Machine {
    notes: Arc<Notes>,
    bus: Arc<Bus>,
    pci: Arc<PciBus>,
}

impl Machine {
    fn new() -> Self {
        let notes = Arc::new(Notes::default());
        let bus = Arc::new(Bus::new());
        let pins = (16..24).map(|gsi| IrqPin::new(notes.clone(), gsi)).collect();
        let pci = PciBus::root(bus.clone(), pins);
        Self { notes, bus, pci }
    }

    fn probe(&self, slot: u8) -> Arc<Mutex<Probe>> {
        let probe = shared(Probe::new(&self.notes, None));
        self.pci.add(slot, 0, &probe).unwrap();
        probe
    }

    fn windows() -> Windows {
        Windows {
            mmio32: 0xc000_0000..0xe000_0000,
            mmio64: 0x80_0000_0000..0x90_0000_0000,
            io: 0x1000..0x8000,
        }
    }

    fn memory(&self, at: u64) -> u8 {
        let mut data = [0];
        self.bus.read(Space::Memory, at, &mut data);
        data[0]
    }
}

fn get32(pci: &PciBus, bus: u8, devfn: u8, offset: u16) -> u32 {
    let mut data = [0xff; 4];
    pci.config_read(bus, devfn, offset, &mut data);
    u32::from_le_bytes(data)
}

fn set32(pci: &PciBus, devfn: u8, offset: u16, value: u32) {
    pci.config_write(0, devfn, offset, &value.to_le_bytes());
}

#[test]
fn header_and_capability_list() {
    let m = Machine::new();
    m.probe(2);
    let pci = &m.pci;
    assert_eq!(get32(pci, 0, 2 << 3, 0), 0x5678_1234);
    assert_eq!(get32(pci, 0, 2 << 3, 8), 0x0108_0203);
    assert_eq!(get32(pci, 0, 2 << 3, 0x2c), 0x0009_1af4);
    assert_eq!(get32(pci, 0, 2 << 3 | 1, 0), u32::MAX, "no second function");
    assert_eq!(get32(pci, 0, 3 << 3, 0), u32::MAX);
    assert_eq!(get32(pci, 1, 2 << 3, 0), u32::MAX, "no second bus");
    set32(pci, 2 << 3, 0, 0);
    assert_eq!(get32(pci, 0, 2 << 3, 0), 0x5678_1234, "read-only");
    assert_ne!(get32(pci, 0, 2 << 3, 4) >> 16 & u32::from(reg::STATUS_CAPABILITIES), 0);
    let first = get32(pci, 0, 2 << 3, 0x34) as u16;
    let header = get32(pci, 0, 2 << 3, first);
    assert_eq!(header as u8, capability::MSI);
    let second = (header >> 8) as u8;
    let header = get32(pci, 0, 2 << 3, second.into());
    assert_eq!(header & 0xffff, u32::from(capability::MSIX), "and the last");
    assert_eq!(get32(pci, 0, 2 << 3, 0x100), u32::MAX, "no extended space");
}

#[test]
fn extended_capabilities_are_linked() {
    let mut config = Config::endpoint("x", ID);
    assert_eq!(config.add_extended_capability(3, 1, &[1; 8], &[0xff]), 0x100);
    assert_eq!(config.add_extended_capability(4, 2, &[2; 4], &[]), 0x10c);
    assert_eq!((config.get_u32(0x100), config.get_u32(0x10c)), (0x10c1_0003, 0x0002_0004));
    config.write(0x104, &[0xf0, 0xf0]);
    assert_eq!(config.get_u32(0x104), 0x0101_01f0);
    assert_eq!(config.get_u32(0xffe), 0xffff_0000, "the end");
}

#[test]
fn bars_are_sized_and_placed() {
    let m = Machine::new();
    m.probe(1);
    let at = 1 << 3;
    for (bar, size_mask) in [
        (0x10, 0xffff_ffe1u32),
        (0x14, 0xffff_f000),
        (0x18, 0xfff0_000c),
        (0x1c, 0xffff_ffff),
        (0x30, 0xffff_f801),
    ] {
        set32(&m.pci, at, bar, u32::MAX);
        assert_eq!(get32(&m.pci, 0, at, bar), size_mask, "{bar:#x}");
    }
    assert_eq!(get32(&m.pci, 0, at, 0x24), 0, "not there");
    // All ones with decoding on: a size query, nothing answers anywhere.
    set32(&m.pci, at, 4, 3);
    assert_eq!(format!("{:?}", m.bus), "{}");
    set32(&m.pci, at, 0x14, 0xc000_0000);
    assert_eq!(m.memory(0xc000_0fff), 1);
    set32(&m.pci, at, 0x18, 0x4000_0000);
    set32(&m.pci, at, 0x1c, 0x12);
    assert_eq!(m.memory(0x12_4000_0000), 2);
    set32(&m.pci, at, 0x10, 0x1001);
    let mut port = [0];
    m.bus.read(Space::Port, 0x101f, &mut port);
    assert_eq!(port, [0], "region 0 answers");
    set32(&m.pci, at, 0x30, 0xd000_0001);
    assert_eq!(m.memory(0xd000_0000), 6);
    set32(&m.pci, at, 0x30, 0xd000_0000);
    assert_eq!(m.memory(0xd000_0000), 0xff, "the ROM has its own enable bit");
    // Moved, and turned off.
    set32(&m.pci, at, 0x14, 0xc100_0000);
    assert_eq!((m.memory(0xc000_0000), m.memory(0xc100_0000)), (0xff, 1));
    set32(&m.pci, at, 4, 1);
    assert_eq!(m.memory(0xc100_0000), 0xff);
    m.bus.read(Space::Port, 0x1000, &mut port);
    assert_eq!(port, [0], "ports still decode");
}

#[test]
fn overlapping_bars_wait_for_their_place() {
    let m = Machine::new();
    let (a, b) = (1 << 3, 2 << 3);
    m.probe(1);
    m.probe(2);
    set32(&m.pci, a, 0x14, 0xc000_0000);
    set32(&m.pci, b, 0x20, 0xc000_0000);
    set32(&m.pci, a, 4, 2);
    set32(&m.pci, b, 4, 2);
    assert_eq!(m.memory(0xc000_0800), 1, "first come, first served");
    set32(&m.pci, a, 0x14, 0xc100_0000);
    // BAR 4 has the MSI-X table: unused space behind the table reads as the region's number.
    assert_eq!(m.memory(0xc000_0800), 4, "the place is free now");
    assert_eq!(m.memory(0xc100_0000), 1);
    let gone = m.pci.remove(2, 0).unwrap();
    assert_eq!(m.memory(0xc000_0800), 0xff);
    drop(gone);
    m.probe(2);
}

#[test]
fn reset_and_load_move_bars() {
    let m = Machine::new();
    let probe = m.probe(1);
    m.pci.assign_resources(&mut Machine::windows()).unwrap();
    let at = probe.lock().unwrap().config.bar_address(1).unwrap();
    assert_eq!(m.memory(at), 1);
    let state = probe.lock().unwrap().save().unwrap();
    probe.lock().unwrap().reset();
    assert_eq!(m.memory(at), 0xff);
    assert_eq!(get32(&m.pci, 0, 8, 0x14), 0);
    probe.lock().unwrap().load(state.clone()).unwrap();
    assert_eq!(m.memory(at), 1);
    assert_eq!(probe.lock().unwrap().save().unwrap(), state);
    let mut odd = state;
    odd.data["registers"] = "00".into();
    assert!(probe.lock().unwrap().load(odd).is_err());
}

#[test]
fn resources_are_assigned() {
    let m = Machine::new();
    let probes: Vec<_> = (1..6).map(|slot| m.probe(slot)).collect();
    let host = shared(HostBridge::q35(Some((0xe000_0000, 256))));
    m.pci.add(0, 0, &host).unwrap();
    assert_eq!(get32(&m.pci, 0, 0, 0x60), 0xe000_0001);
    m.pci.assign_resources(&mut Machine::windows()).unwrap();
    for (i, probe) in probes.iter().enumerate() {
        for (bar, region) in [(1, 1), (2, 2)] {
            let at = probe.lock().unwrap().config.bar_address(bar).unwrap();
            assert_eq!(m.memory(at), region);
        }
        let probe = probe.lock().unwrap();
        assert!(probe.config.bar_address(0).is_some());
        // Slot s, INTA: pin s of eight.
        assert_eq!(probe.config.get_u8(reg::INTERRUPT_LINE), 16 + (i as u8 + 1));
    }
    let mut small = Windows { mmio32: 0xc000_0000..0xc030_0000, ..Machine::windows() };
    let e = m.pci.assign_resources(&mut small).unwrap_err();
    assert_eq!((e.device.as_str(), e.size), ("probe", 0x10_0000), "{e}");
}

#[test]
fn addresses_are_checked() {
    let m = Machine::new();
    let probe = m.probe(1);
    assert_eq!(m.pci.add(32, 0, &probe), Err(PciError::Address { slot: 32, function: 0 }));
    let e = m.pci.add(1, 0, &probe).unwrap_err().to_string();
    assert!(e.contains("01.0 is taken by probe"), "{e}");
    assert_eq!(m.pci.free_slot(), Some(2));
    assert!(m.pci.remove(9, 0).is_none());
}

#[test]
fn several_functions_are_announced() {
    for first in [0, 1] {
        let m = Machine::new();
        for function in [first, 1 - first] {
            let probe = shared(Probe::new(&m.notes, None));
            m.pci.add(4, function, &probe).unwrap();
        }
        let header = get32(&m.pci, 0, 4 << 3, 0x0c) >> 16 & 0xff;
        assert_eq!(header, 0x80);
        m.pci.devices()[0].lock().unwrap().reset();
        assert_eq!(get32(&m.pci, 0, 4 << 3, 0x0c) >> 16 & 0xff, 0x80);
    }
}

#[test]
fn intx_is_shared_and_can_be_disabled() {
    let m = Machine::new();
    let (a, b) = (m.probe(1), m.probe(9)); // both on pin 1 of eight
    a.lock().unwrap().intx.set(true);
    b.lock().unwrap().intx.set(true);
    assert!(m.notes.level(17));
    assert_ne!(get32(&m.pci, 0, 8, 4) >> 16 & u32::from(reg::STATUS_INTERRUPT), 0);
    a.lock().unwrap().intx.set(false);
    assert!(m.notes.level(17));
    set32(&m.pci, 9 << 3, 4, reg::COMMAND_INTX_DISABLE.into());
    assert!(!m.notes.level(17), "disabled");
    set32(&m.pci, 9 << 3, 4, 0);
    assert!(m.notes.level(17), "still asserted");
    m.pci.remove(9, 0);
    assert!(!m.notes.level(17), "unplugged");
}

#[test]
fn routing_covers_all_slots() {
    let m = Machine::new();
    let routes = m.pci.interrupt_routes();
    assert_eq!(routes.len(), 128);
    assert_eq!(routes[5], Route { slot: 1, pin: 1, gsi: 18 });
    assert!(routes.iter().all(|r| (16..24).contains(&r.gsi)));
}

#[test]
fn msi_messages() {
    let m = Machine::new();
    let probe = m.probe(1);
    let msi = probe.lock().unwrap().msi.clone();
    msi.notify(0);
    assert!(m.notes.take_messages().is_empty(), "not enabled");
    let cap = get32(&m.pci, 0, 8, 0x34) as u16;
    set32(&m.pci, 8, cap + 4, 0xfee0_1003);
    set32(&m.pci, 8, cap + 8, 0x1);
    set32(&m.pci, 8, cap + 12, 0x40);
    set32(&m.pci, 8, cap, 0x0021_0000); // enabled, four vectors of four
    for vector in [0, 3, 7] {
        msi.notify(vector);
    }
    let at = 0x1_fee0_1000;
    assert_eq!(m.notes.take_messages(), [(at, 0x40), (at, 0x43), (at, 0x43)]);
    set32(&m.pci, 8, cap + 16, 0b1000);
    msi.notify(3);
    msi.notify(3);
    assert!(m.notes.take_messages().is_empty(), "masked");
    assert_eq!(get32(&m.pci, 0, 8, cap + 20), 0b1000, "pending");
    let state = probe.lock().unwrap().save().unwrap();
    probe.lock().unwrap().load(state).unwrap();
    set32(&m.pci, 8, cap + 16, 0);
    assert_eq!(m.notes.take_messages(), [(at, 0x43)]);
    assert_eq!(get32(&m.pci, 0, 8, cap + 20), 0);
    set32(&m.pci, 8, cap, 0x0071_0000); // more than it has
    msi.notify(2);
    assert_eq!(m.notes.take_messages(), [(at, 0x42)]);
}

fn msix_cap(pci: &PciBus) -> u16 {
    let first = get32(pci, 0, 8, 0x34) as u16;
    (get32(pci, 0, 8, first) >> 8) as u8 as u16
}

#[test]
fn msix_masks_and_pending_bits() {
    let m = Machine::new();
    let probe = m.probe(1);
    m.pci.assign_resources(&mut Machine::windows()).unwrap();
    let vectors = probe.lock().unwrap().vectors.clone();
    let bar = probe.lock().unwrap().config.bar_address(4).unwrap();
    let write = |offset: u64, value: u32| m.bus.write(Space::Memory, bar + offset, &value.to_le_bytes());
    let read = |offset: u64| {
        let mut data = [0; 4];
        m.bus.read(Space::Memory, bar + offset, &mut data);
        u32::from_le_bytes(data)
    };
    let cap = msix_cap(&m.pci);
    assert_eq!(get32(&m.pci, 0, 8, cap) >> 16, 2, "table size minus one");
    assert_eq!((get32(&m.pci, 0, 8, cap + 4), get32(&m.pci, 0, 8, cap + 8)), (4, 0x1004));
    assert_eq!(read(0x1c), 1, "masked at reset");
    write(0x10, 0xfee0_0003);
    write(0x14, 7);
    write(0x18, 0x55);
    vectors.notify(1);
    assert_eq!(read(0x1000), 0, "nothing is pending while MSI-X is off");
    set32(&m.pci, 8, cap, 0x8000_0000);
    vectors.notify(1);
    assert_eq!(read(0x1000), 2, "pending, since masked");
    write(0x1c, 0);
    let message = (0x7_fee0_0000, 0x55);
    assert_eq!(m.notes.take_messages(), [message]);
    assert_eq!(read(0x1000), 0);
    set32(&m.pci, 8, cap, 0xc000_0000);
    vectors.notify(1);
    vectors.notify(1);
    vectors.notify(9);
    assert!(m.notes.take_messages().is_empty(), "function mask");
    let state = probe.lock().unwrap().save().unwrap();
    probe.lock().unwrap().reset();
    assert_eq!(read(0x1000), u32::MAX, "the BAR is gone");
    probe.lock().unwrap().load(state).unwrap();
    assert_eq!(read(0x1000), 2);
    set32(&m.pci, 8, cap, 0x8000_0000);
    assert_eq!(m.notes.take_messages(), [message]);
    // A quad word is two double words; bytes and misaligned accesses do nothing.
    m.bus.write(Space::Memory, bar + 0x10, &0x1_0000_1000u64.to_le_bytes());
    m.bus.write(Space::Memory, bar + 0x10, &[1]);
    m.bus.write(Space::Memory, bar + 0x16, &[1; 4]);
    assert_eq!((read(0x10), read(0x14), read(0x18)), (0x1000, 1, 0x55));
}

#[test]
fn msix_routes_follow_the_table() {
    let notes = Arc::new(Notes::default());
    let bells = Arc::new(Bells::default());
    let m = Machine::new();
    let probe = shared(Probe::new(&notes, Some(bells.clone())));
    m.pci.add(1, 0, &probe).unwrap();
    m.pci.assign_resources(&mut Machine::windows()).unwrap();
    let (vectors, bar) = {
        let p = probe.lock().unwrap();
        (p.vectors.clone(), p.config.bar_address(4).unwrap())
    };
    let fd = vectors.eventfd(2).unwrap();
    assert_eq!(bells.routes(), [None]);
    set32(&m.pci, 8, msix_cap(&m.pci), 0x8000_0000);
    m.bus.write(Space::Memory, bar + 0x20, &0xfee0_0000u64.to_le_bytes());
    m.bus.write(Space::Memory, bar + 0x28, &9u64.to_le_bytes()); // data, and unmasked
    assert_eq!(bells.routes(), [Some((0xfee0_0000, 9))]);
    m.bus.write(Space::Memory, bar + 0x2c, &1u32.to_le_bytes());
    assert_eq!(bells.routes(), [None]);
    fd.signal();
    let mut pending = [0];
    m.bus.read(Space::Memory, bar + 0x1000, &mut pending);
    assert_eq!(pending, [4]);
    m.bus.write(Space::Memory, bar + 0x2c, &0u32.to_le_bytes());
    assert_eq!(notes.take_messages(), [(0xfee0_0000, 9)], "what was pending is delivered");
    assert!(MsixVectors::new(notes, None, 1).eventfd(0).is_err(), "no shortcuts, no eventfd");
}

#[test]
fn configuration_ports() {
    let m = Machine::new();
    m.probe(3);
    let resets = Arc::new(AtomicU32::new(0));
    let count = resets.clone();
    let system = System::new(move |r| {
        assert_eq!(r, SystemRequest::Reset);
        count.fetch_add(1, Ordering::SeqCst);
    });
    let ports = shared(ConfigPorts::new(m.pci.clone(), Some(system)));
    m.bus.map(Space::Port, 0xcf8, 8, "pci-ports", &ports, RegionId(0)).unwrap();
    let out = |port: u64, data: &[u8]| m.bus.write(Space::Port, port, data);
    let input = |port: u64, len: usize| {
        let mut data = vec![0; len];
        m.bus.read(Space::Port, port, &mut data);
        data
    };
    out(0xcf8, &0x8000_1800u32.to_le_bytes());
    assert_eq!(input(0xcf8, 4), 0x8000_1800u32.to_le_bytes());
    assert_eq!(input(0xcfc, 4), [0x34, 0x12, 0x78, 0x56]);
    assert_eq!(input(0xcfe, 2), [0x78, 0x56]);
    assert_eq!(input(0xcff, 1), [0x56]);
    out(0xcf8, &0x8000_183cu32.to_le_bytes());
    out(0xcfc, &[7]);
    assert_eq!(input(0xcfc, 2), [7, 1]);
    out(0xcf8, &0x0000_1800u32.to_le_bytes());
    assert_eq!(input(0xcfc, 4), [0xff; 4], "not enabled");
    // The reset register between the address bytes.
    out(0xcf9, &[2]);
    assert_eq!((input(0xcf9, 1), resets.load(Ordering::SeqCst)), (vec![2], 0));
    out(0xcf9, &[6]);
    assert_eq!(resets.load(Ordering::SeqCst), 1);
    assert_eq!(input(0xcf8, 4), 0x1800u32.to_le_bytes(), "the address is not disturbed");
    let state = ports.lock().unwrap().save().unwrap();
    ports.lock().unwrap().reset();
    ports.lock().unwrap().load(state.clone()).unwrap();
    assert_eq!(ports.lock().unwrap().save().unwrap(), state);
}

#[test]
fn ecam_window() {
    let m = Machine::new();
    m.probe(3);
    let ecam = shared(Ecam::new(m.pci.clone(), 2));
    let len = ecam.lock().unwrap().window_len();
    m.bus.map(Space::Memory, 0xe000_0000, len, "ecam", &ecam, RegionId(0)).unwrap();
    let base = 0xe000_0000 + (3 << 15);
    let mut long = [0; 8];
    m.bus.read(Space::Memory, base, &mut long);
    assert_eq!(long[..4], [0x34, 0x12, 0x78, 0x56]);
    let mut odd = [0; 4];
    m.bus.read(Space::Memory, base + 2, &mut odd);
    assert_eq!(odd[..2], [0x78, 0x56], "split at the double word");
    m.bus.write(Space::Memory, base + 0x3c, &[9]);
    m.bus.read(Space::Memory, base + 0x3c, &mut odd[..1]);
    assert_eq!(odd[0], 9);
    m.bus.read(Space::Memory, 0xe010_0000, &mut long);
    assert_eq!(long, [0xff; 8], "nothing on bus 1");
}

/// A bridge with a bus behind it.
struct Bridge {
    config: Config,
    below: Arc<PciBus>,
}

impl Device for Bridge {
    fn name(&self) -> &str {
        "bridge"
    }
    fn read(&mut self, _: RegionId, _: u64, _: &mut [u8]) {}
    fn write(&mut self, _: RegionId, _: u64, _: &[u8]) {}
    fn reset(&mut self) {
        self.config.reset();
    }
    fn save(&self) -> Result<State, StateError> {
        State::new("bridge", 1, &self.config.save())
    }
    fn load(&mut self, state: State) -> Result<(), StateError> {
        self.config.load(state.unpack("bridge", 1)?).map(drop)
    }
}

impl PciFunction for Bridge {
    fn config(&self) -> &Config {
        &self.config
    }
    fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }
    fn secondary(&self) -> Option<Arc<PciBus>> {
        Some(self.below.clone())
    }
}

#[test]
fn functions_behind_bridges() {
    let m = Machine::new();
    let bridge = |parent: &Arc<PciBus>, slot: u8| {
        let below = PciBus::behind(parent, slot, 0);
        let id = Identity { class: 0x06_0400, ..ID };
        let b = shared(Bridge { config: Config::bridge("bridge", id), below: below.clone() });
        parent.add(slot, 0, &b).unwrap();
        (b, below)
    };
    let (outer, middle) = bridge(&m.pci, 2);
    let (inner, leaf) = bridge(&middle, 1);
    let probe = shared(Probe::new(&m.notes, None));
    leaf.add(5, 0, &probe).unwrap();
    m.probe(1);
    m.pci.assign_resources(&mut Machine::windows()).unwrap();
    assert_eq!(get32(&m.pci, 0, 2 << 3, 0x18) & 0xff_ffff, 0x02_0100);
    assert_eq!(get32(&m.pci, 1, 1 << 3, 0x18) & 0xff_ffff, 0x02_0201);
    assert_eq!(get32(&m.pci, 2, 5 << 3, 0), 0x5678_1234);
    assert_eq!(get32(&m.pci, 3, 5 << 3, 0), u32::MAX);
    let at = probe.lock().unwrap().config.bar_address(1).unwrap();
    assert_eq!(m.memory(at), 1);
    for b in [outer, inner] {
        let window = b.lock().unwrap().config.get_u32(reg::MEMORY_BASE);
        let (base, limit) = (u64::from(window & 0xfff0) << 16, u64::from(window | 0xf_ffff));
        assert!((base..=limit).contains(&at), "{base:#x}..{limit:#x} has {at:#x}");
    }
    // INTA of slot 5 is pin 1 of the bus, that of slot 1 pin 2 of the next, that of slot 2 pin 4 of bus 0.
    probe.lock().unwrap().intx.set(true);
    assert!(m.notes.level(16 + 4));
}

proptest! {
    /// Configuration space takes anything; what is read-only stays.
    #[test]
    fn any_configuration_write_is_survived(
        writes in prop::collection::vec((0u16..0x110, prop::collection::vec(any::<u8>(), 1..5)), 0..60),
    ) {
        let m = Machine::new();
        let probe = m.probe(1);
        for (offset, data) in writes {
            m.pci.config_write(0, 8, offset, &data);
            probe.lock().unwrap().intx.set(data[0] & 1 != 0);
            probe.lock().unwrap().msi.notify(data[0]);
            probe.lock().unwrap().vectors.notify(data[0].into());
        }
        prop_assert_eq!(get32(&m.pci, 0, 8, 0), 0x5678_1234);
        let state = probe.lock().unwrap().save().unwrap();
        probe.lock().unwrap().load(state.clone()).unwrap();
        prop_assert_eq!(probe.lock().unwrap().save().unwrap(), state);
        probe.lock().unwrap().reset();
        probe.lock().unwrap().reset();
        let fresh = Probe::new(&m.notes, None).save().unwrap();
        prop_assert_eq!(probe.lock().unwrap().save().unwrap(), fresh);
        prop_assert_eq!(format!("{:?}", m.bus), "{}");
    }
}
