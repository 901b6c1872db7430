//! The adapter against a small driver.

use super::*;
use crate::storage::ata::tests::{cdrom, disk};
use accel::Irqs;
use bus::IrqPin;
use bus::virtio::testing::{Notes, ram};
use proptest::prelude::*;
use tempfile::NamedTempFile;

const TABLE: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;

struct Bench {
    notes: Arc<Notes>,
    memory: GuestMemory,
    ide: PiixIde,
    file: NamedTempFile,
}

impl Bench {
    fn new() -> Self {
        let notes = Arc::new(Notes::default());
        let irqs: Arc<dyn Irqs> = notes.clone();
        let lines = [14, 15].map(|gsi| IrqPin::new(irqs.clone(), gsi).line());
        let memory = ram();
        let mut ide = PiixIde::new(Chip::Piix3, memory.clone(), lines);
        let (file, drive) = disk(4 << 20);
        assert!(ide.buses()[0].attach(0, &drive));
        assert!(ide.buses()[1].attach(1, &cdrom(1 << 20).1));
        ide.write_config(reg::COMMAND, &(reg::COMMAND_MASTER | reg::COMMAND_IO).to_le_bytes());
        ide.start().unwrap();
        Self { notes, memory, ide, file }
    }

    fn out(&mut self, channel: usize, register: u64, value: u8) {
        self.ide.write(RegionId(8 + 2 * channel as u32), register, &[value]);
    }

    fn status(&mut self, channel: usize) -> u8 {
        let mut b = [0];
        self.ide.read(RegionId(9 + 2 * channel as u32), 0, &mut b);
        b[0]
    }

    fn get(&mut self, channel: usize, register: u64) -> u8 {
        let mut b = [0];
        self.ide.read(RegionId(8 + 2 * channel as u32), register, &mut b);
        b[0]
    }

    /// Waits until the drive is not busy, reads the status (which acknowledges) and returns it.
    fn wait(&mut self, channel: usize) -> u8 {
        let notes = self.notes.clone();
        notes.wait("the drive", || self.status(channel) & 0x80 == 0);
        self.get(channel, 7)
    }

    fn command(&mut self, device: u8, lba: u32, count: u8, code: u8) {
        self.out(0, 6, device | (lba >> 24) as u8);
        self.out(0, 2, count);
        for i in 0..3 {
            self.out(0, 3 + i, (lba >> (8 * i)) as u8);
        }
        self.out(0, 7, code);
    }

    fn read_data(&mut self, channel: usize, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        for pair in data.chunks_mut(2) {
            self.ide.read(RegionId(8 + 2 * channel as u32), 0, pair);
        }
        data
    }

    fn write_data(&mut self, channel: usize, data: &[u8]) {
        for word in data.chunks(4) {
            self.ide.write(RegionId(8 + 2 * channel as u32), 0, word);
        }
    }

    fn packet(&mut self, packet: &[u8; 12], limit: u16) -> u8 {
        for (register, value) in [(6, 0xb0), (1, 0), (4, limit as u8), (5, (limit >> 8) as u8), (7, 0xa0)] {
            self.out(1, register, value);
        }
        assert_eq!((self.wait(1) & 8, self.get(1, 2)), (8, 1));
        self.write_data(1, packet);
        self.wait(1)
    }
}

#[test]
fn signatures_and_empty_places() {
    let mut b = Bench::new();
    assert_eq!((b.get(0, 2), b.get(0, 3), b.get(0, 4), b.get(0, 5), b.get(0, 7)), (1, 1, 0, 0, 0x50));
    b.out(0, 6, 0x10);
    assert_eq!(b.get(0, 7), 0, "no slave");
    b.out(0, 6, 0);
    b.out(1, 6, 0x10);
    assert_eq!((b.get(1, 4), b.get(1, 5)), (0x14, 0xeb));
    b.ide.write(RegionId(9), 0, &[4]);
    assert_eq!(b.status(0), 0x80);
    b.ide.write(RegionId(9), 0, &[0]);
    assert_eq!((b.status(0), b.get(0, 1)), (0x50, 1));
}

#[test]
fn pio_in_blocks() {
    let mut b = Bench::new();
    b.command(0xe0, 0, 0, 0xec);
    assert_eq!(b.wait(0), 0x58);
    let identify = b.read_data(0, 512);
    assert_eq!(identify[54..58], *b"EQUM");
    assert_eq!(b.status(0), 0x50);
    // 200 sectors by WRITE MULTIPLE in blocks of 16, through a buffer that holds fewer.
    b.command(0xe0, 5, 200, 0xc5);
    let data: Vec<u8> = (0..200 * 512).map(|i| (i / 512) as u8 ^ i as u8).collect();
    for (i, block) in data.chunks(16 * 512).enumerate() {
        assert_eq!(b.wait(0) & 0x89, 8, "block {i}");
        b.write_data(0, block);
    }
    assert_eq!(b.wait(0), 0x50);
    assert_eq!(std::fs::read(b.file.path()).unwrap()[5 * 512..205 * 512], data);
    b.command(0xe0, 5, 200, 0x20);
    let mut back = Vec::new();
    for _ in 0..200 {
        assert_eq!(b.wait(0), 0x58);
        back.extend(b.read_data(0, 512));
    }
    assert!(back == data);
    assert_eq!(b.status(0), 0x50);
    b.command(0xe0, 0xfff_ffff, 1, 0x20);
    assert_eq!((b.wait(0), b.get(0, 1)), (0x51, 0x10));
}

#[test]
fn bus_master() {
    let mut b = Bench::new();
    b.memory.write(DATA, &[0x42; 8192]).unwrap();
    let mut entries = [0; 16];
    entries[..4].copy_from_slice(&(DATA as u32).to_le_bytes());
    entries[4..6].copy_from_slice(&1024u16.to_le_bytes());
    entries[8..12].copy_from_slice(&(DATA as u32 + 4096).to_le_bytes());
    entries[12..].copy_from_slice(&[0, 4, 0, 0x80]);
    b.memory.write(TABLE, &entries).unwrap();
    b.ide.write(RegionId(4), 4, &(TABLE as u32).to_le_bytes());
    b.notes.take_lines();
    b.command(0xe0, 9, 4, 0xca);
    b.ide.write(RegionId(4), 0, &[1]);
    assert_eq!(b.wait(0), 0x50);
    let mut bm = [0];
    b.ide.read(RegionId(4), 2, &mut bm);
    assert_eq!(bm[0], 4, "interrupt, not active");
    b.ide.write(RegionId(4), 2, &[4]);
    b.ide.write(RegionId(4), 0, &[0]);
    assert!(b.notes.take_lines().contains(&(14, true)));
    assert_eq!(std::fs::read(b.file.path()).unwrap()[9 * 512..13 * 512], [0x42; 2048]);
    // The engine first, the command then; into other memory.
    b.ide.write(RegionId(4), 0, &[9]);
    b.memory.write(DATA, &[0; 8192]).unwrap();
    b.command(0xe0, 9, 4, 0xc8);
    assert_eq!(b.wait(0), 0x50);
    assert_eq!(b.memory.read_obj::<u8>(DATA + 5119).unwrap(), 0x42);
    // A table that is shorter than the data.
    b.ide.write(RegionId(4), 0, &[0]);
    b.command(0xe0, 9, 5, 0xc8);
    b.ide.write(RegionId(4), 0, &[9]);
    assert_eq!(b.wait(0), 0x51);
}

#[test]
fn packets_by_pio() {
    let mut b = Bench::new();
    assert_eq!((b.packet(&[0; 12], 0), b.get(1, 1) >> 4), (0x51, 6));
    let mut read = [0; 12];
    (read[0], read[8]) = (0x28, 40);
    let mut status = b.packet(&read, 2048);
    let mut total = 0;
    while status & 8 != 0 {
        assert_eq!(b.get(1, 2), 2);
        let n = usize::from(b.get(1, 4)) | usize::from(b.get(1, 5)) << 8;
        assert_eq!(n, 2048);
        b.read_data(1, n);
        total += n;
        status = b.wait(1);
    }
    assert_eq!((total, status, b.get(1, 2)), (40 * 2048, 0x50, 3));
    let mut inquiry = [0; 12];
    (inquiry[0], inquiry[4]) = (0x12, 36);
    assert_eq!(b.packet(&inquiry, 0xffff) & 8, 8);
    assert_eq!(b.read_data(1, 36)[8..12], *b"QEMU");
    assert_eq!(b.wait(1), 0x50);
}

#[test]
fn state_goes_over_in_the_middle_of_a_command() {
    let mut a = Bench::new();
    std::os::unix::fs::FileExt::write_all_at(a.file.as_file(), &[9; 1024], 0).unwrap();
    a.command(0xe0, 0, 2, 0x20);
    assert_eq!(a.wait(0), 0x58);
    a.read_data(0, 100);
    a.ide.pause().unwrap();
    let state = a.ide.save().unwrap();
    let mut b = Bench::new();
    b.ide.pause().unwrap();
    b.ide.load(state.clone()).unwrap();
    assert_eq!(b.ide.save().unwrap(), state);
    b.ide.start().unwrap();
    assert_eq!(b.read_data(0, 412), [9; 412]);
    assert_eq!(b.wait(0), 0x58);
    assert_eq!(b.read_data(0, 512), [9; 512]);
    assert_eq!(b.status(0), 0x50);
}

#[derive(Clone, Debug)]
enum Step {
    Write(u32, u64, Vec<u8>),
    Read(u32, u64, usize),
    Data(usize, bool, usize),
    Command(usize, u8, u8, u8, u8, u8),
    PauseSaveLoadStart,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let region = || prop::sample::select(vec![4u32, 8, 9, 10, 11]);
    let data = prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 1..3);
    let code = || {
        prop_oneof![
            any::<u8>(),
            prop::sample::select(vec![
                0x20u8, 0x30, 0xc4, 0xc5, 0xc8, 0xca, 0xec, 0xa0, 0xa1, 0xe7, 0x08, 0x90, 0x24, 0x25
            ])
        ]
    };
    prop_oneof![
        4 => (region(), 0u64..6, data).prop_map(|(r, o, d)| Step::Write(r, o, d)),
        2 => (region(), 0u64..7, 1usize..3).prop_map(|(r, o, n)| Step::Read(r, o, n)),
        4 => (0usize..2, any::<bool>(), 1usize..700).prop_map(|(c, w, n)| Step::Data(c, w, n)),
        6 => (0usize..2, code(), any::<u8>(), 0u8..20, any::<u8>(), any::<u8>())
            .prop_map(|(c, x, d, n, l, f)| Step::Command(c, x, d, n, l, f)),
        1 => Just(Step::PauseSaveLoadStart),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_guest_is_survived(list in prop::collection::vec(step(), 1..80)) {
        let mut b = Bench::new();
        for step in list {
            match step {
                Step::Write(r, o, d) => b.ide.write(RegionId(r), if r & !8 & 1 == 1 { 0 } else { o }, &d),
                Step::Read(r, o, n) => b.ide.read(RegionId(r), o, &mut vec![0; n]),
                Step::Data(c, true, n) => b.write_data(c, &vec![0x28; n * 2]),
                Step::Data(c, false, n) => {
                    b.read_data(c, n * 2);
                }
                Step::Command(c, code, device, count, lba, features) => {
                    for (register, value) in [(6, device), (1, features), (2, count), (3, lba), (4, 0), (5, 0), (7, code)] {
                        b.out(c, register, value);
                    }
                }
                Step::PauseSaveLoadStart => {
                    b.ide.pause().unwrap();
                    let state = b.ide.save().unwrap();
                    b.ide.load(state).unwrap();
                    b.ide.start().unwrap();
                }
                Step::Reset => b.ide.reset(),
            }
        }
        b.ide.pause().unwrap();
        b.ide.reset();
        b.ide.reset();
    }
}
