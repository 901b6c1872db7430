//! The adapter against a small driver.

use super::*;
use crate::storage::ata::tests::{cdrom, disk};
use bus::pci::{PciBus, reg};
use bus::virtio::testing::{Notes, ram};
use bus::{Bus, IrqPin, shared};
use proptest::prelude::*;
use std::sync::Mutex;
use tempfile::NamedTempFile;

const LIST: u64 = 0x1_0000;
const FIS: u64 = 0x1_1000;
const TABLE: u64 = 0x1_2000;
const DATA: u64 = 0x4_0000;
const LINE: u32 = 16;

struct Bench {
    notes: Arc<Notes>,
    memory: GuestMemory,
    ahci: Arc<Mutex<Ahci>>,
    file: NamedTempFile,
    _bus: (Arc<Bus>, Arc<PciBus>),
}

/// A slot's command.
#[derive(Clone, Default)]
struct Slot {
    command: u8,
    features: u16,
    count: u16,
    lba: u64,
    write: bool,
    packet: Option<[u8; 12]>,
    data: Vec<(u64, u32)>,
}

impl Bench {
    fn new() -> Self {
        let notes = Arc::new(Notes::default());
        let memory = ram();
        let bus = Arc::new(Bus::new());
        let pci = PciBus::root(bus.clone(), vec![IrqPin::new(notes.clone(), LINE)]);
        let ahci = shared(Ahci::new(memory.clone(), notes.clone()));
        let (file, drive) = disk(1 << 20);
        assert!(ahci.lock().unwrap().buses()[0].attach(0, &drive));
        assert!(ahci.lock().unwrap().buses()[1].attach(0, &cdrom(1 << 20).1));
        pci.add(1, 0, &ahci).unwrap();
        let bench = Self { notes, memory, ahci, file, _bus: (bus, pci) };
        bench.device().write_config(reg::COMMAND, &(reg::COMMAND_MASTER | reg::COMMAND_MEMORY).to_le_bytes());
        bench.device().start().unwrap();
        for port in 0..2 {
            let at = LIST + port * 0x4_0000;
            bench.set(port as usize, 0x00, at as u32);
            bench.set(port as usize, 0x08, (at + FIS - LIST) as u32);
            bench.set(port as usize, 0x14, u32::MAX);
            bench.set(port as usize, 0x18, 0x11);
        }
        bench.write(4, 2);
        bench
    }

    fn device(&self) -> std::sync::MutexGuard<'_, Ahci> {
        self.ahci.lock().unwrap()
    }

    fn read(&self, register: u64) -> u32 {
        let mut b = [0; 4];
        self.device().read(RegionId(5), register, &mut b);
        u32::from_le_bytes(b)
    }

    fn write(&self, register: u64, value: u32) {
        self.device().write(RegionId(5), register, &value.to_le_bytes());
    }

    fn get(&self, port: usize, register: u64) -> u32 {
        self.read(0x100 + 0x80 * port as u64 + register)
    }

    fn set(&self, port: usize, register: u64, value: u32) {
        self.write(0x100 + 0x80 * port as u64 + register, value);
    }

    fn fill(&self, port: usize, slot: u32, s: &Slot) {
        let base = port as u64 * 0x4_0000;
        let table = TABLE + base + u64::from(slot) * 0x400;
        let mut flags = 5 | u32::from(s.write) << 6 | (s.data.len() as u32) << 16;
        let mut fis = [0; 0x50];
        fis[..4].copy_from_slice(&[0x27, 0x80, s.command, s.features as u8]);
        let l = s.lba.to_le_bytes();
        fis[4..7].copy_from_slice(&l[..3]);
        fis[7] = 0x40;
        fis[8..11].copy_from_slice(&l[3..6]);
        fis[11] = (s.features >> 8) as u8;
        fis[12..14].copy_from_slice(&s.count.to_le_bytes());
        if let Some(packet) = &s.packet {
            fis[0x40..0x4c].copy_from_slice(packet);
            flags |= 1 << 5;
        }
        self.memory.write(table, &fis).unwrap();
        for (i, (at, len)) in s.data.iter().enumerate() {
            let mut entry = [0; 16];
            entry[..8].copy_from_slice(&at.to_le_bytes());
            entry[12..].copy_from_slice(&(len - 1).to_le_bytes());
            self.memory.write(table + 0x80 + 16 * i as u64, &entry).unwrap();
        }
        let mut header = [0; 16];
        header[..4].copy_from_slice(&flags.to_le_bytes());
        header[8..].copy_from_slice(&table.to_le_bytes());
        self.memory.write(LIST + base + u64::from(slot) * 32, &header).unwrap();
    }

    /// One command; returns the interrupt bits and the task file.
    fn run(&self, port: usize, s: &Slot) -> (u32, u32) {
        self.fill(port, 3, s);
        self.set(port, 0x38, 1 << 3);
        self.notes.wait("the command", || self.get(port, 0x10) != 0);
        let bits = self.get(port, 0x10);
        self.set(port, 0x10, bits);
        self.write(8, u32::MAX);
        (bits, self.get(port, 0x20))
    }

    fn restart(&self, port: usize) {
        self.set(port, 0x18, 0x10);
        self.notes.wait("the port to stop", || self.get(port, 0x18) & 0x8000 == 0);
        self.set(port, 0x18, 0x11);
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.memory.read(at, &mut b).unwrap();
        b
    }
}

#[test]
fn ports_show_what_hangs_on_them() {
    let b = Bench::new();
    assert_eq!(b.read(0x0c), 0x3f);
    assert_eq!((b.get(0, 0x24), b.get(1, 0x24), b.get(2, 0x24)), (0x101, 0xeb14_0101, 0xffff_ffff));
    assert_eq!((b.get(0, 0x28) & 0xf, b.get(2, 0x28)), (3, 0));
    assert_eq!(b.get(0, 0x20) & 0x89, 0);
    assert_eq!(b.bytes(FIS + 0x40, 1), [0x34], "the first frame came with FRE");
    // The same registers by index and data.
    b.device().write(RegionId(4), 0x10, &0x124u32.to_le_bytes());
    let mut word = [0; 4];
    b.device().read(RegionId(4), 0x14, &mut word);
    assert_eq!(u32::from_le_bytes(word), 0x101);
    b.set(0, 0x2c, 0x301);
    assert_eq!(b.get(0, 0x28), 0);
    b.set(0, 0x2c, 0x300);
    assert_eq!((b.get(0, 0x28) & 0xf, b.get(0, 0x30) >> 26 & 1), (3, 1));
}

#[test]
fn dma_and_pio_commands() {
    let b = Bench::new();
    b.memory.write(DATA, &[0x6b; 4096]).unwrap();
    let data = vec![(DATA, 1024), (DATA + 0x1000, 512), (DATA + 1024, 2560)];
    b.memory.write(DATA + 0x1000, &[0x6c; 512]).unwrap();
    let write = Slot { command: 0x35, count: 8, lba: 16, write: true, data: data.clone(), ..Slot::default() };
    assert_eq!(b.run(0, &write), (1, 0x50));
    assert!(b.notes.take_lines().contains(&(LINE, true)), "interrupt");
    assert!(!b.notes.level(LINE), "acknowledged");
    let disk = std::fs::read(b.file.path()).unwrap();
    assert_eq!((disk[16 * 512 - 1], disk[16 * 512], disk[18 * 512], disk[19 * 512]), (0, 0x6b, 0x6c, 0x6b));
    assert_eq!(b.bytes(LIST + 3 * 32 + 4, 4), 4096u32.to_le_bytes(), "bytes moved");
    let read = Slot { command: 0x25, count: 1, lba: 18, data: vec![(DATA + 0x2000, 512)], ..Slot::default() };
    assert_eq!(b.run(0, &read), (1, 0x50));
    assert_eq!(b.bytes(DATA + 0x2000, 512), [0x6c; 512]);
    let identify = Slot { command: 0xec, data: vec![(DATA, 512)], ..Slot::default() };
    assert_eq!(b.run(0, &identify), (2, 0x50));
    assert_eq!(b.bytes(FIS + 0x20, 3)[2], 0x58);
    assert_eq!(b.bytes(DATA + 54, 2), *b"EQ");
    // Less memory than data.
    let short = Slot { command: 0x25, count: 2, lba: 18, data: vec![(DATA, 512)], ..Slot::default() };
    let (bits, task) = b.run(0, &short);
    assert_eq!((bits & 1 << 30 != 0, task), (true, 0x451));
    // Nothing goes until the port was stopped.
    b.set(0, 0x38, 1 << 4);
    assert_eq!(b.get(0, 0x38), 1 << 3 | 1 << 4);
    b.restart(0);
    assert_eq!(b.run(0, &read), (1, 0x50));
}

#[test]
fn queued_commands_run_side_by_side() {
    let b = Bench::new();
    for round in 0..20u64 {
        for tag in 0..32u32 {
            let at = DATA + u64::from(tag) * 0x1000;
            b.memory.write(at, &[tag as u8 ^ round as u8; 512]).unwrap();
            let lba = u64::from(tag);
            let (command, count) = (0x61, (tag as u16) << 3);
            b.fill(
                0,
                tag,
                &Slot {
                    command,
                    features: 1,
                    count,
                    lba,
                    write: true,
                    data: vec![(at, 512)],
                    ..Slot::default()
                },
            );
        }
        b.set(0, 0x34, u32::MAX);
        b.set(0, 0x38, u32::MAX);
        b.notes.wait("all of them", || b.get(0, 0x34) == 0);
        assert_eq!((b.get(0, 0x38), b.get(0, 0x20)), (0, 0x50));
        let disk = std::fs::read(b.file.path()).unwrap();
        for tag in 0..32 {
            assert_eq!(disk[tag * 512], tag as u8 ^ round as u8);
        }
    }
    // One that fails: its bit stays, and the log tells.
    let bad = Slot {
        command: 0x60,
        features: 1,
        count: 7 << 3,
        lba: 1 << 30,
        data: vec![(DATA, 512)],
        ..Slot::default()
    };
    b.fill(0, 7, &bad);
    b.set(0, 0x10, u32::MAX);
    b.set(0, 0x34, 1 << 7);
    b.set(0, 0x38, 1 << 7);
    b.notes.wait("the error", || b.get(0, 0x10) & 1 << 30 != 0);
    assert_eq!(b.get(0, 0x34), 1 << 7);
    b.restart(0);
    let log = Slot { command: 0x2f, count: 1, lba: 0x10, data: vec![(DATA, 512)], ..Slot::default() };
    b.set(0, 0x10, u32::MAX);
    assert_eq!(b.run(0, &log).1, 0x50);
    assert_eq!(b.bytes(DATA, 4)[0], 7);
}

#[test]
fn packets() {
    let b = Bench::new();
    let mut packet = [0; 12];
    let (bits, task) = b.run(1, &Slot { command: 0xa0, packet: Some(packet), ..Slot::default() });
    assert_eq!((bits & 1 << 30 != 0, task >> 12), (true, 6), "unit attention");
    b.restart(1);
    (packet[0], packet[8]) = (0x28, 2);
    let read = Slot {
        command: 0xa0,
        features: 1,
        packet: Some(packet),
        data: vec![(DATA, 4096)],
        ..Slot::default()
    };
    assert_eq!(b.run(1, &read), (1, 0x50));
    assert_eq!(b.bytes(LIST + 0x4_0000 + 3 * 32 + 4, 4), 4096u32.to_le_bytes());
}

#[test]
fn message_signalled_and_state_goes_over() {
    let b = Bench::new();
    {
        let mut device = b.device();
        let cap = u16::from(device.config().get_u8(0x34));
        let msi = (0..4).scan(cap, |at, _| {
            let this = *at;
            *at = device.config().get_u8(this + 1).into();
            Some(this)
        });
        let at = msi.into_iter().find(|at| device.config().get_u8(*at) == 5).unwrap();
        device.write_config(at + 4, &0xfee0_0000u32.to_le_bytes());
        device.write_config(at + 12, &0x41u16.to_le_bytes());
        device.write_config(at + 2, &1u16.to_le_bytes());
    }
    let flush = Slot { command: 0xea, ..Slot::default() };
    b.run(0, &flush);
    assert_eq!(b.notes.take_messages(), [(0xfee0_0000, 0x41)]);
    b.device().pause().unwrap();
    let state = b.device().save().unwrap();
    let other = Bench::new();
    other.device().pause().unwrap();
    other.device().load(state.clone()).unwrap();
    assert_eq!(other.device().save().unwrap(), state);
    other.device().start().unwrap();
    assert_eq!(other.get(0, 0x00), LIST as u32);
    assert!(other.device().load(State::new("toaster", 1, &()).unwrap()).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Any registers, any tables, with commands under way.
    #[test]
    fn any_guest_is_survived(list in prop::collection::vec(step(), 1..80)) {
        let b = Bench::new();
        for step in list {
            match step {
                Step::Write(at, data) => b.device().write(RegionId(5), at, &data),
                Step::Read(at, n) => b.device().read(RegionId(5), at, &mut vec![0; n]),
                Step::Memory(at, data) => b.memory.write(at, &data).unwrap(),
                Step::Command(port, slot, command, count, lba, len, write) => {
                    let data = vec![(DATA, len.max(1)), (DATA + 0x8000, 512)];
                    let packet = (command == 0xa0).then_some([lba as u8, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
                    let s = Slot { command, features: count, count: u16::from(slot) << 3, lba, write, packet, data };
                    b.fill(port, slot.into(), &s);
                    b.set(port, 0x34, 1 << slot);
                    b.set(port, 0x38, 1 << slot);
                }
                Step::PauseSaveLoadStart => {
                    let mut device = b.device();
                    device.pause().unwrap();
                    let state = device.save().unwrap();
                    device.load(state).unwrap();
                    device.start().unwrap();
                }
                Step::Reset => b.device().reset(),
            }
        }
        b.device().pause().unwrap();
        b.device().reset();
        b.device().reset();
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Memory(u64, Vec<u8>),
    Command(usize, u8, u8, u16, u64, u32, bool),
    PauseSaveLoadStart,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop::sample::select(vec![1usize, 2, 4, 8]);
    let byte = || prop_oneof![Just(0u8), any::<u8>()];
    let data = len.clone().prop_flat_map(move |n| prop::collection::vec(byte(), n));
    let at = || prop_oneof![6 => 0x100u64..0x200, 1 => 0u64..0x20, 1 => 0u64..0xff8];
    let command = prop_oneof![
        any::<u8>(),
        prop::sample::select(vec![0x25u8, 0x35, 0x60, 0x61, 0xec, 0xa0, 0x06, 0x2f, 0xea, 0xc4])
    ];
    prop_oneof![
        4 => (at(), data.clone()).prop_map(|(a, d)| Step::Write(a, d)),
        1 => (at(), len).prop_map(|(a, n)| Step::Read(a, n)),
        2 => (LIST..LIST + 0x3000, data).prop_map(|(a, d)| Step::Memory(a, d)),
        8 => (0usize..2, 0u8..32, command, 0u16..20, 0u64..3000, 1u32..6000, any::<bool>())
            .prop_map(|(p, s, c, n, l, d, w)| Step::Command(p, s, c, n, l, d, w)),
        1 => Just(Step::PauseSaveLoadStart),
        1 => Just(Step::Reset),
    ]
}
