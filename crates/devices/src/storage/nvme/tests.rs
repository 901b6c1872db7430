//! The controller against a small driver.

use super::*;
use crate::storage::{Drive, DriveSpec};
use ::block::{Image, OpenOptions, formats::Preallocation};
use bus::System;
use bus::virtio::testing::{Notes, ram};
use proptest::prelude::*;
use tempfile::NamedTempFile;

const ASQ: u64 = 0x1_0000;
const ACQ: u64 = 0x1_1000;
const SQ: u64 = 0x1_2000;
const CQ: u64 = 0x1_3000;
const LIST: u64 = 0x1_4000;
const DATA: u64 = 0x2_0000;
const ENTRIES: u32 = 16;

struct Bench {
    notes: Arc<Notes>,
    memory: GuestMemory,
    nvme: Nvme,
    bus: Arc<NvmeBus>,
    image: Arc<Image>,
    drive: Arc<Drive>,
    file: NamedTempFile,
    /// Tail of the submission, head of the completion queue, for admin and I/O.
    at: [(u32, u32); 2],
    next: u16,
}

impl Bench {
    fn new() -> Self {
        let notes = Arc::new(Notes::default());
        let memory = ram();
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(4 << 20).unwrap();
        let options = OpenOptions { format: Some("raw".into()), ..OpenOptions::default() };
        let image = Arc::new(Image::open(file.path().to_str().unwrap(), &options).unwrap());
        let spec = DriveSpec::default();
        let drive = Arc::new(Drive::disk("n0", &spec, image.clone(), System::new(|_| {})));
        let bus = Arc::new(NvmeBus::default());
        assert!(bus.attach(1, drive.clone(), 0x5254_0000_0000_0001));
        let names = Names { serial: "KV-1".into(), model: "QEMU NVMe Ctrl".into(), firmware: "1.0".into() };
        let vectors = MsixVectors::new(notes.clone(), None, 3);
        let mut nvme = Nvme::new(names, 4, bus.clone(), memory.clone(), vectors);
        nvme.write_config(reg::COMMAND, &(reg::COMMAND_MASTER | reg::COMMAND_MEMORY).to_le_bytes());
        nvme.start().unwrap();
        Self { notes, memory, nvme, bus, image, drive, file, at: [(0, 0); 2], next: 0 }
    }

    fn up() -> Self {
        let mut b = Self::new();
        b.enable();
        b.create_queues();
        b
    }

    fn get(&mut self, at: u64) -> u32 {
        let mut word = [0; 4];
        self.nvme.read(RegionId(0), at, &mut word);
        u32::from_le_bytes(word)
    }

    fn set(&mut self, at: u64, value: u32) {
        self.nvme.write(RegionId(0), at, &value.to_le_bytes());
    }

    fn enable(&mut self) {
        // Completions of another time must not be taken for new ones.
        self.memory.fill(ACQ, 0x1000, 0).unwrap();
        self.memory.fill(CQ, 0x1000, 0).unwrap();
        self.set(0x24, (ENTRIES - 1) << 16 | (ENTRIES - 1));
        self.nvme.write(RegionId(0), 0x28, &ASQ.to_le_bytes());
        self.nvme.write(RegionId(0), 0x30, &ACQ.to_le_bytes());
        self.set(0x14, 0x0046_0001);
        assert_eq!(self.get(0x1c), 1, "ready");
        self.at = [(0, 0); 2];
    }

    fn create_queues(&mut self) {
        let size = (ENTRIES - 1) << 16 | 1;
        assert_eq!(self.admin(0x05, 0, CQ, [size, 3, 0, 0, 0, 0]).0, 0);
        assert_eq!(self.admin(0x01, 0, SQ, [size, 1 << 16 | 1, 0, 0, 0, 0]).0, 0);
    }

    fn put(&mut self, queue: usize, opcode: u8, nsid: u32, prp: (u64, u64), words: [u32; 6]) {
        self.next += 1;
        let mut e = [0; 64];
        e[..4].copy_from_slice(&(u32::from(opcode) | u32::from(self.next) << 16).to_le_bytes());
        e[4..8].copy_from_slice(&nsid.to_le_bytes());
        e[24..32].copy_from_slice(&prp.0.to_le_bytes());
        e[32..40].copy_from_slice(&prp.1.to_le_bytes());
        for (i, w) in words.iter().enumerate() {
            e[40 + 4 * i..44 + 4 * i].copy_from_slice(&w.to_le_bytes());
        }
        let base = [ASQ, SQ][queue];
        let tail = self.at[queue].0;
        self.memory.write(base + u64::from(tail) * 64, &e).unwrap();
        self.at[queue].0 = (tail + 1) % ENTRIES;
        let tail = self.at[queue].0;
        self.set(0x1000 + 8 * queue as u64, tail);
    }

    /// The next completion: status, result, identifier.
    fn wait(&mut self, queue: usize) -> (u16, u32, u16) {
        let base = [ACQ, CQ][queue];
        let head = self.at[queue].1;
        let at = base + u64::from(head % ENTRIES) * 16;
        let phase = u16::from((head / ENTRIES).is_multiple_of(2));
        let (memory, notes) = (self.memory.clone(), self.notes.clone());
        let status = || memory.read_obj::<u16>(at + 14).unwrap();
        notes.wait("a completion", || status() & 1 == phase);
        let result = memory.read_obj::<u32>(at).unwrap();
        let id = memory.read_obj::<u16>(at + 12).unwrap();
        self.at[queue].1 = head + 1;
        self.set(0x1004 + 8 * queue as u64, (head + 1) % ENTRIES);
        (status() >> 1, result, id)
    }

    fn admin(&mut self, opcode: u8, nsid: u32, prp: u64, words: [u32; 6]) -> (u16, u32) {
        self.put(0, opcode, nsid, (prp, 0), words);
        let (status, result, id) = self.wait(0);
        assert_eq!(id, self.next);
        (status & 0x7ff, result)
    }

    fn io(&mut self, opcode: u8, prp: (u64, u64), words: [u32; 6]) -> u16 {
        self.put(1, opcode, 1, prp, words);
        self.wait(1).0 & 0x7ff
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.memory.read(at, &mut b).unwrap();
        b
    }
}

#[test]
fn identify_pages_and_features() {
    let mut b = Bench::up();
    assert_eq!(b.admin(6, 0, DATA, [1, 0, 0, 0, 0, 0]).0, 0);
    let c = b.bytes(DATA, 4096);
    assert_eq!((&c[4..8], c[77], c[512]), (b"KV-1".as_slice(), 7, 0x66));
    assert_eq!(b.admin(6, 1, DATA, [0, 0, 0, 0, 0, 0]).0, 0);
    let n = b.bytes(DATA, 4096);
    assert_eq!((n[..8].to_vec(), n[130]), (8192u64.to_le_bytes().to_vec(), 9));
    assert_eq!(b.admin(6, 2, DATA, [0, 0, 0, 0, 0, 0]).0, 0, "not there: zeros");
    assert!(b.bytes(DATA, 4096).iter().all(|b| *b == 0));
    assert_eq!(b.admin(6, 0, DATA, [2, 0, 0, 0, 0, 0]).0, 0);
    assert_eq!(b.bytes(DATA, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(b.admin(6, 1, DATA, [3, 0, 0, 0, 0, 0]).0, 0);
    assert_eq!(b.bytes(DATA, 12)[..6], [1, 8, 0, 0, 0x52, 0x54]);
    assert_eq!(b.admin(6, 0, DATA, [0x77, 0, 0, 0, 0, 0]).0, 2);
    assert_eq!(b.admin(9, 0, 0, [7, 0x001f_001f, 0, 0, 0, 0]), (0, 0x0003_0003));
    assert_eq!(b.admin(10, 0, 0, [6, 0, 0, 0, 0, 0]), (0, 1));
    assert_eq!(b.admin(9, 0, 0, [6, 0, 0, 0, 0, 0]).0, 0);
    assert!(!b.drive.writeback());
    assert_eq!(b.admin(2, u32::MAX, DATA, [127 << 16 | 2, 0, 0, 0, 0, 0]).0, 0);
    assert_eq!(b.bytes(DATA, 512)[3], 100);
    assert_eq!(b.admin(0x99, 0, 0, [0; 6]).0, 1);
    assert_eq!(b.admin(5, 0, CQ, [0xf << 16 | 9, 3, 0, 0, 0, 0]).0, 0x101);
    assert_eq!(b.admin(4, 0, 0, [1, 0, 0, 0, 0, 0]).0, 0x10c, "its submission queue is there");
    assert_eq!(b.admin(0, 0, 0, [1, 0, 0, 0, 0, 0]).0, 0);
    assert_eq!(b.admin(4, 0, 0, [1, 0, 0, 0, 0, 0]).0, 0);
}

#[test]
fn data_by_one_page_two_and_a_list() {
    let mut b = Bench::up();
    for (i, (offset, blocks)) in [(0u64, 8u32), (512, 8), (0, 16), (1024, 200)].into_iter().enumerate() {
        let len = blocks as usize * 512;
        let pages = (offset as usize + len).div_ceil(4096);
        // Pages in reverse order, so that each has to be looked up.
        let page = |n: usize| DATA + 4096 * (pages - 1 - n) as u64;
        let second = if pages <= 2 { page(1.min(pages - 1)) } else { LIST + 4096 - 16 };
        if pages > 2 {
            // The list starts at the end of a page, and goes on in another.
            b.memory.write_obj(LIST + 4096 - 16, &page(1)).unwrap();
            b.memory.write_obj(LIST + 4096 - 8, &if pages == 3 { page(2) } else { LIST + 0x1000 }).unwrap();
            for n in 2..pages {
                b.memory.write_obj(LIST + 0x1000 + 8 * (n as u64 - 2), &page(n)).unwrap();
            }
        }
        let data: Vec<u8> = (0..len).map(|x| (x / 256 + i) as u8).collect();
        let mut done = 0;
        for n in 0..pages {
            let skip = if n == 0 { offset as usize } else { 0 };
            let part = (4096 - skip).min(len - done);
            b.memory.write(page(n) + skip as u64, &data[done..done + part]).unwrap();
            done += part;
        }
        let prp = (page(0) + offset, second);
        assert_eq!(b.io(1, prp, [100, 0, blocks - 1, 0, 0, 0]), 0, "write {i}");
        assert_eq!(std::fs::read(b.file.path()).unwrap()[100 * 512..][..len], data);
        assert_eq!(b.io(5, prp, [100, 0, blocks - 1, 0, 0, 0]), 0, "compare {i}");
        b.memory.fill(DATA, pages as u64 * 4096, 0).unwrap();
        assert_eq!(b.io(2, prp, [100, 0, blocks - 1, 0, 0, 0]), 0, "read {i}");
        assert_eq!(b.bytes(page(0) + offset, 512), data[..512]);
        assert_eq!(b.io(5, prp, [100, 0, blocks - 1, 0, 0, 0]), 0, "compare again {i}");
    }
    assert_eq!(b.io(2, (DATA, 0), [8192, 0, 0, 0, 0, 0]), 0x80);
    assert_eq!(b.io(2, (DATA, 0), [0, 0, 0xffff, 0, 0, 0]), 0x80);
    assert_eq!(b.io(2, (1 << 40, 0), [0, 0, 0, 0, 0, 0]), 4);
    assert_eq!(b.io(2, (DATA, DATA + 8), [0, 0, 15, 0, 0, 0]), 0x13);
    assert_eq!(b.io(0, (0, 0), [0; 6]), 0, "flush");
    assert_eq!(b.io(8, (0, 0), [100, 0, 7, 0, 0, 0]), 0, "write zeroes");
    assert!(std::fs::read(b.file.path()).unwrap()[100 * 512..108 * 512].iter().all(|b| *b == 0));
    let mut range = [0; 16];
    (range[4], range[8]) = (8, 100);
    b.memory.write(DATA, &range).unwrap();
    assert_eq!(b.io(9, (DATA, 0), [0, 4, 0, 0, 0, 0]), 0, "deallocate");
    assert_eq!(b.io(12, (0, 0), [0, 0, 99, 0, 0, 0]), 0, "verify");
}

#[test]
fn deep_queues_wrap_and_full_ones_wait() {
    let mut b = Bench::up();
    for round in 0..40u32 {
        for i in 0..15u32 {
            let at = DATA + u64::from(i) * 4096;
            b.memory.write(at, &[(i + round) as u8; 512]).unwrap();
            b.put(1, 1, 1, (at, 0), [i, 0, 0, 0, 0, 0]);
        }
        for _ in 0..15 {
            assert_eq!(b.wait(1).0, 0);
        }
        let disk = std::fs::read(b.file.path()).unwrap();
        for i in 0..15u32 {
            assert_eq!(disk[i as usize * 512], (i + round) as u8);
        }
    }
    // Completions that nobody takes: the controller waits, and goes on when there is room.
    for _ in 0..40 {
        b.put(1, 0, 1, (0, 0), [0; 6]);
        if b.at[1].0.is_multiple_of(8) {
            let notes = b.notes.clone();
            notes.wait("some to be fetched", || {
                let s = b.nvme.controller.lock();
                let sq = &s.s.sqs[&1];
                (sq.tail + ENTRIES - sq.head) % ENTRIES < 8 || !s.s.cqs[&1].waiting.is_empty()
            });
        }
        if !b.nvme.controller.lock().s.cqs[&1].waiting.is_empty() {
            break;
        }
    }
    assert_eq!(b.wait(1).0, 0);
}

#[test]
fn namespaces_that_change_are_told_of() {
    let mut b = Bench::up();
    b.put(0, 0x0c, 0, (0, 0), [0; 6]);
    let request = b.next;
    assert_eq!(b.admin(9, 0, 0, [11, 1 << 8, 0, 0, 0, 0]).0, 0);
    // Namespace 1 was attached before the queues were: nothing yet. Then it grows.
    b.image.resize(8 << 20, Preallocation::Off).unwrap();
    b.drive.resized();
    let (status, result, id) = b.wait(0);
    assert_eq!((status, result, id), (0, 2 | 4 << 16, request));
    assert_eq!(b.admin(2, u32::MAX, DATA, [1023 << 16 | 4, 0, 0, 0, 0, 0]).0, 0);
    assert_eq!(b.bytes(DATA, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert!(!b.bus.detach(2));
}

#[test]
fn shutdown_reset_and_mistakes() {
    let mut b = Bench::up();
    b.set(0x14, 0x0046_4001);
    let notes = b.notes.clone();
    notes.wait("shutdown", || b.get(0x1c) & 0xc == 8);
    b.set(0x14, 0x0046_0000);
    notes.wait("the end", || b.get(0x1c) & 1 == 0);
    b.enable();
    b.create_queues();
    assert_eq!(b.io(0, (0, 0), [0; 6]), 0);
    b.set(0x14, 0);
    notes.wait("the end", || b.get(0x1c) & 1 == 0);
    b.set(0x24, 0);
    b.set(0x14, 0x0046_0001);
    assert_eq!(b.get(0x1c), 2, "queues of one entry");
}

#[test]
fn state_goes_over() {
    let mut a = Bench::up();
    a.memory.write(DATA, &[3; 512]).unwrap();
    assert_eq!(a.io(1, (DATA, 0), [5, 0, 0, 0, 0, 0]), 0);
    a.nvme.pause().unwrap();
    let state = a.nvme.save().unwrap();
    let mut b = Bench::new();
    b.nvme.pause().unwrap();
    b.nvme.load(state.clone()).unwrap();
    assert_eq!(b.nvme.save().unwrap(), state);
    b.at = a.at;
    b.next = a.next;
    // The driver's memory comes along.
    let mut all = vec![0; 1 << 20];
    a.memory.read(0, &mut all).unwrap();
    b.memory.write(0, &all).unwrap();
    b.nvme.start().unwrap();
    assert_eq!(b.io(2, (DATA + 4096, 0), [5, 0, 0, 0, 0, 0]), 0);
    let mut other = state;
    other.data["controller"]["sqs"]["1"]["cq"] = 77.into();
    assert!(b.nvme.load(other).is_err());
}

#[derive(Clone, Debug)]
enum Step {
    Write(u32, u64, Vec<u8>),
    Read(u32, u64, usize),
    Command(usize, u8, u32, u64, u64, [u32; 6]),
    Take(usize, u32),
    PauseSaveLoadStart,
    Reset,
    Up,
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop::sample::select(vec![1usize, 2, 4, 8]);
    let byte = || prop_oneof![Just(0u8), any::<u8>()];
    let data = len.clone().prop_flat_map(move |n| prop::collection::vec(byte(), n));
    let at = || prop_oneof![2 => 0u64..0x40, 4 => 0x1000u64..0x1030, 1 => 0u64..0x2000];
    let region = || prop::sample::select(vec![0u32, 0, 0, 4]);
    let prp = || prop_oneof![Just(DATA), Just(LIST), Just(LIST + 0xff8), 0u64..0x40_0000, any::<u64>()];
    let word = || prop_oneof![Just(0u32), 0u32..32, any::<u32>()];
    let words = (word(), word(), 0u32..300, word()).prop_map(|(a, b, c, d)| [a, b, c, d, 0, 0]);
    prop_oneof![
        4 => (region(), at(), data).prop_map(|(r, a, d)| Step::Write(r, a, d)),
        1 => (region(), at(), len).prop_map(|(r, a, n)| Step::Read(r, a, n)),
        10 => (0usize..2, prop_oneof![0u8..16, any::<u8>()], 0u32..3, prp(), prp(), words)
            .prop_map(|(q, o, n, a, b, w)| Step::Command(q, o, n, a, b, w)),
        3 => (0usize..2, 0u32..20).prop_map(|(q, n)| Step::Take(q, n)),
        1 => Just(Step::PauseSaveLoadStart),
        1 => Just(Step::Reset),
        1 => Just(Step::Up),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_guest_is_survived(list in prop::collection::vec(step(), 1..60)) {
        let mut b = Bench::up();
        for step in list {
            match step {
                Step::Write(r, a, d) => b.nvme.write(RegionId(r), a, &d),
                Step::Read(r, a, n) => b.nvme.read(RegionId(r), a, &mut vec![0; n]),
                Step::Command(q, o, n, p1, p2, w) => b.put(q, o, n, (p1, p2), w),
                Step::Take(q, n) => b.set(0x1004 + 8 * q as u64, n),
                Step::PauseSaveLoadStart => {
                    b.nvme.pause().unwrap();
                    let state = b.nvme.save().unwrap();
                    b.nvme.load(state).unwrap();
                    b.nvme.start().unwrap();
                }
                Step::Reset => b.nvme.reset(),
                Step::Up => {
                    b.nvme.reset();
                    b.nvme.write_config(reg::COMMAND, &(reg::COMMAND_MASTER | reg::COMMAND_MEMORY).to_le_bytes());
                    b.enable();
                    b.create_queues();
                }
            }
        }
        b.nvme.pause().unwrap();
        b.nvme.reset();
        b.nvme.reset();
    }
}
