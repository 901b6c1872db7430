//! The disk against a driver, on every transport and engine.

use super::worker::Engine;
use super::*;
use block::{DetectZeroes, OpenOptions};
use bus::virtio::testing::{Guest, TRANSPORTS, Transport};
use bus::virtio::{feature as ring, status};
use bus::{System, SystemRequest};
use proptest::prelude::*;
use std::io::Write;
use tempfile::NamedTempFile;

const ENGINES: [Engine; 3] = [Engine::Auto, Engine::Uring, Engine::Poll];
const ALL: u64 = u64::MAX;
const DATA: u64 = 0x11_0000;
const HEADER: u64 = 0x10_0000;
const STATUS: u64 = 0x10_0100;

/// A disk of `sectors`, each filled with its number.
fn disk_file(sectors: u32) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    for sector in 0..sectors {
        file.write_all(&[sector as u8; 512]).unwrap();
    }
    file
}

fn open(file: &NamedTempFile, read_only: bool) -> Arc<Image> {
    let options = OpenOptions { format: Some("raw".into()), read_only, ..OpenOptions::default() };
    Arc::new(Image::open(file.path().to_str().unwrap(), &options).unwrap())
}

fn spec() -> Spec {
    Spec { queue_size: 16, num_queues: Some(2), serial: Some("KV-0001".into()), ..Spec::default() }
}

fn device(image: Arc<Image>, engine: Engine) -> Box<dyn VirtioDevice> {
    let mut blk = Blk::new(&spec(), "d0", image, 1, System::new(|_| {})).unwrap();
    blk.engine = engine;
    Box::new(blk)
}

fn header(guest: &Guest, at: u64, kind: u32, sector: u64) {
    let mut h = [0; 16];
    h[..4].copy_from_slice(&kind.to_le_bytes());
    h[8..].copy_from_slice(&sector.to_le_bytes());
    guest.mem.write(at, &h).unwrap();
}

/// One request; returns its status and the used length.
fn request(guest: &mut Guest, queue: u16, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
    header(guest, HEADER, kind, sector);
    guest.mem.write(STATUS, &[0xee]).unwrap();
    let mut buffers = vec![(HEADER, 16, false)];
    buffers.extend(data.iter().filter(|b| !b.2));
    buffers.extend(data.iter().filter(|b| b.2));
    buffers.push((STATUS, 1, true));
    let len = guest.request(queue, &buffers);
    (guest.mem.read_obj::<u8>(STATUS).unwrap(), len)
}

fn bytes(guest: &Guest, at: u64, len: usize) -> Vec<u8> {
    let mut b = vec![0; len];
    guest.mem.read(at, &mut b).unwrap();
    b
}

#[test]
fn reads_and_writes_on_every_transport_and_engine() {
    for transport in TRANSPORTS {
        for engine in ENGINES {
            for (bells, features) in [(false, 0), (true, ALL & !ring::RING_PACKED), (true, ALL)] {
                let file = disk_file(64);
                let mut guest = Guest::new(device(open(&file, false), engine), transport, bells);
                guest.bring_up(features, 2);
                // Two buffers, of which one is odd in length.
                let into = [(DATA, 1000, true), (DATA + 0x1000, 24, true)];
                assert_eq!(request(&mut guest, 0, 0, 5, &into), (0, 1025), "{transport:?} {engine:?}");
                assert!(guest.take_interrupt(0));
                assert_eq!(bytes(&guest, DATA, 512), [5; 512]);
                assert_eq!(bytes(&guest, DATA + 0x1000, 24), [6; 24]);

                guest.mem.write(DATA, &[0xa5; 1024]).unwrap();
                let from = [(DATA, 512, false), (DATA + 512, 512, false)];
                assert_eq!(request(&mut guest, 1, 1, 10, &from), (0, 1));
                assert_eq!(request(&mut guest, 0, 4, 0, &[]), (0, 1), "flush");
                let now = std::fs::read(file.path()).unwrap();
                assert_eq!(
                    (now[10 * 512 - 1], now[10 * 512], now[12 * 512 - 1], now[12 * 512]),
                    (9, 0xa5, 0xa5, 12)
                );
                assert_eq!(guest.status() & status::NEEDS_RESET, 0);
            }
        }
    }
}

#[test]
fn a_full_queue_of_requests_is_served() {
    for engine in ENGINES {
        let file = disk_file(64);
        let mut guest = Guest::new(device(open(&file, false), engine), Transport::Pci, true);
        guest.bring_up(ALL & !ring::INDIRECT_DESC & !ring::RING_PACKED, 2);
        for round in 0..50u64 {
            let mut ids = vec![];
            for i in 0..5 {
                let at = HEADER + 0x40 * i;
                header(&guest, at, 0, (i + round) % 64);
                let buffers = [(at, 16, false), (DATA + 0x1000 * i, 512, true), (at + 0x20, 1, true)];
                ids.push(guest.submit(i as u16 % 2, &buffers).unwrap());
            }
            for i in 0..5 {
                guest.wait_used(i as u16 % 2);
            }
            for i in 0..5 {
                assert_eq!(bytes(&guest, DATA + 0x1000 * i, 512), [((i + round) % 64) as u8; 512]);
            }
        }
    }
}

#[test]
fn identity_discard_and_zeroes() {
    let file = disk_file(64);
    let mut guest = Guest::new(device(open(&file, false), Engine::Auto), Transport::Pci, false);
    guest.bring_up(ALL, 2);
    assert_eq!(request(&mut guest, 0, 8, 0, &[(DATA, 20, true)]), (0, 21));
    assert_eq!(&bytes(&guest, DATA, 20), b"KV-0001\0\0\0\0\0\0\0\0\0\0\0\0\0");
    let range = |guest: &Guest, sector: u64, count: u32, flags: u32| {
        guest.mem.write(DATA, &sector.to_le_bytes()).unwrap();
        guest.mem.write(DATA + 8, &count.to_le_bytes()).unwrap();
        guest.mem.write(DATA + 12, &flags.to_le_bytes()).unwrap();
    };
    let data = [(DATA, 16, false)];
    for flags in [0, 1] {
        range(&guest, 3, 2, flags);
        assert_eq!(request(&mut guest, 0, 13, 0, &data), (0, 1));
    }
    let now = std::fs::read(file.path()).unwrap();
    assert!(now[3 * 512..5 * 512].iter().all(|b| *b == 0));
    assert_eq!((now[3 * 512 - 1], now[5 * 512]), (2, 5));
    range(&guest, 8, 8, 0);
    assert_eq!(request(&mut guest, 0, 11, 0, &data), (0, 1));
    range(&guest, 8, 8, 1);
    assert_eq!(request(&mut guest, 0, 11, 0, &data).0, 2, "discards take no flags");
    range(&guest, 8, 8, 2);
    assert_eq!(request(&mut guest, 0, 13, 0, &data).0, 2, "an unknown flag");
    for (sector, count) in [(64, 1), (60, 5), (u64::MAX, 2), (0, u32::MAX)] {
        range(&guest, sector, count, 0);
        assert_eq!(request(&mut guest, 0, 11, 0, &data).0, 1, "{sector} {count}");
        assert_eq!(request(&mut guest, 0, 13, 0, &data).0, 1, "{sector} {count}");
    }
    assert_eq!(request(&mut guest, 0, 13, 0, &[(DATA, 15, false)]).0, 1, "ragged");
    assert_eq!(request(&mut guest, 0, 13, 0, &[]).0, 1, "no range");
    assert_eq!(request(&mut guest, 0, 77, 0, &[]).0, 2, "unknown request");
}

#[test]
fn requests_outside_the_disk_fail() {
    for engine in ENGINES {
        let file = disk_file(64);
        let mut guest = Guest::new(device(open(&file, false), engine), Transport::Mmio, false);
        guest.bring_up(0, 2);
        for (sector, len) in [(64, 512), (63, 1024), (u64::MAX, 512), (1 << 55, 512), (0, 511), (0, 513)] {
            assert_eq!(request(&mut guest, 0, 0, sector, &[(DATA, len, true)]), (1, 1), "{sector} {len}");
            assert_eq!(request(&mut guest, 0, 1, sector, &[(DATA, len, false)]), (1, 1), "{sector} {len}");
        }
        assert_eq!(request(&mut guest, 0, 0, 63, &[(DATA, 512, true)]), (0, 513));
        assert_eq!(request(&mut guest, 0, 0, 0, &[]), (0, 1), "nothing is nothing");
        assert_eq!(std::fs::read(file.path()).unwrap().len(), 64 * 512);
    }
}

#[test]
fn malformed_requests_stop_the_device() {
    for buffers in
        [vec![(HEADER, 15, false), (STATUS, 1, true)], vec![(HEADER, 16, false)], vec![(STATUS, 1, true)]]
    {
        let file = disk_file(8);
        let mut guest = Guest::new(device(open(&file, false), Engine::Auto), Transport::Pci, true);
        guest.bring_up(0, 2);
        header(&guest, HEADER, 0, 0);
        guest.submit(0, &buffers).unwrap();
        let notes = guest.notes.clone();
        notes.wait("NEEDS_RESET", || guest.status() & status::NEEDS_RESET != 0);
        guest.bring_up(0, 2);
        assert_eq!(request(&mut guest, 0, 0, 1, &[(DATA, 512, true)]), (0, 513));
    }
}

#[test]
fn read_only_disks_refuse_writes() {
    let file = disk_file(8);
    let mut guest = Guest::new(device(open(&file, true), Engine::Auto), Transport::Pci, false);
    let offered = guest.offered();
    assert_ne!(offered & feature::RO, 0);
    assert_eq!(offered & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    guest.bring_up(ALL, 2);
    for kind in [1, 11, 13] {
        assert_eq!(request(&mut guest, 0, kind, 0, &[(DATA, 512, false)]).0, 1, "{kind}");
    }
    assert_eq!(request(&mut guest, 0, 4, 0, &[]).0, 0, "flushing nothing works");
    assert_eq!(request(&mut guest, 0, 0, 7, &[(DATA, 512, true)]).0, 0);
}

/// An image that must see every write (zero detection), so that nothing goes to its descriptor directly.
#[test]
fn images_that_are_more_than_a_file() {
    let file = disk_file(2048);
    let options =
        OpenOptions { format: Some("raw".into()), detect_zeroes: DetectZeroes::On, ..OpenOptions::default() };
    let image = Arc::new(Image::open(file.path().to_str().unwrap(), &options).unwrap());
    assert!(image.direct().is_none());
    let mut guest = Guest::new(device(image, Engine::Auto), Transport::Pci, true);
    guest.bring_up(ALL, 2);
    // Larger than the bounce buffer.
    let len = 300 << 10;
    assert_eq!(request(&mut guest, 0, 0, 1, &[(DATA, len, true)]), (0, len + 1));
    for (i, sector) in bytes(&guest, DATA, len as usize).chunks(512).enumerate() {
        assert!(sector.iter().all(|b| *b == (i + 1) as u8));
    }
    assert_eq!(request(&mut guest, 1, 1, 100, &[(DATA, len, false)]), (0, 1));
    let now = std::fs::read(file.path()).unwrap();
    assert_eq!((now[100 * 512], now[100 * 512 + len as usize - 1]), (1, (len / 512) as u8));
}

#[test]
fn the_end_of_a_ragged_file_reads_as_zeros() {
    for engine in ENGINES {
        let mut file = disk_file(3);
        file.write_all(b"xyz").unwrap();
        let mut guest = Guest::new(device(open(&file, false), engine), Transport::Pci, false);
        guest.bring_up(ALL, 2);
        guest.mem.write(DATA, &[0x77; 1024]).unwrap();
        assert_eq!(request(&mut guest, 0, 0, 2, &[(DATA, 600, true), (DATA + 600, 424, true)]), (0, 1025));
        let got = bytes(&guest, DATA, 1024);
        assert_eq!((&got[..512], &got[512..515]), (&[2; 512][..], &b"xyz"[..]));
        assert!(got[515..].iter().all(|b| *b == 0));
    }
}

#[test]
fn configuration_space() {
    let file = disk_file(64);
    let spec = Spec {
        logical_block_size: 4096,
        physical_block_size: 16384,
        min_io_size: 8192,
        opt_io_size: 65536,
        discard_granularity: Some(65536),
        ..spec()
    };
    let blk = Blk::new(&spec, "d0", open(&file, false), 1, System::new(|_| {})).unwrap();
    let mut guest = Guest::new(Box::new(blk), Transport::Pci, false);
    guest.bring_up(ALL, 2);
    assert_eq!(u64::from_le_bytes(guest.read_config(0)), 64);
    assert_eq!(u32::from_le_bytes(guest.read_config(12)), 14, "segments");
    assert_eq!(u32::from_le_bytes(guest.read_config(20)), 4096);
    assert_eq!(guest.read_config::<4>(24), [2, 0, 2, 0]);
    assert_eq!(u32::from_le_bytes(guest.read_config(28)), 16);
    assert_eq!(u16::from_le_bytes(guest.read_config(34)), 2);
    assert_eq!(u32::from_le_bytes(guest.read_config(44)), 128);
    assert_eq!(guest.read_config::<1>(32), [1], "write-back");
    guest.write_config(32, &[0]);
    assert_eq!(guest.read_config::<1>(32), [0]);
    // Block size is what requests must be multiples of.
    assert_eq!(request(&mut guest, 0, 0, 0, &[(DATA, 512, true)]).0, 1);
    assert_eq!(request(&mut guest, 0, 1, 8, &[(DATA, 4096, false)]).0, 0, "write-through");
    // A driver without flush and without the switch gets write-through.
    guest.bring_up(ring::EVENT_IDX, 2);
    assert_eq!(guest.read_config::<1>(32), [0]);
    guest.bring_up(feature::FLUSH, 2);
    assert_eq!(guest.read_config::<1>(32), [1]);
}

#[test]
fn properties_are_checked() {
    let file = disk_file(8);
    let bad = [
        Spec { queue_size: 100, ..spec() },
        Spec { queue_size: 2, ..spec() },
        Spec { num_queues: Some(0), ..spec() },
        Spec { logical_block_size: 1000, ..spec() },
        Spec { physical_block_size: 512, logical_block_size: 4096, ..spec() },
        Spec { min_io_size: 100, ..spec() },
        Spec { serial: Some("123456789012345678901".into()), ..spec() },
    ];
    for spec in bad {
        let e = Blk::new(&spec, "d0", open(&file, true), 1, System::new(|_| {})).err().unwrap().to_string();
        assert!(e.starts_with("virtio-blk: "), "{e}");
    }
    assert_eq!(
        Blk::new(&Spec { num_queues: None, ..spec() }, "d0", open(&file, true), 3, System::new(|_| {}))
            .unwrap()
            .queues,
        3
    );
}

#[test]
fn a_disk_moves_with_its_requests() {
    for engine in ENGINES {
        for transport in TRANSPORTS {
            let file = disk_file(64);
            let image = open(&file, false);
            let mut guest = Guest::new(device(image.clone(), engine), transport, true);
            guest.bring_up(ALL, 2);
            guest.write_config(32, &[0]);
            assert_eq!(request(&mut guest, 1, 0, 9, &[(DATA, 512, true)]).0, 0);
            guest.device().pause().unwrap();
            guest.device().pause().unwrap();
            header(&guest, HEADER, 0, 33);
            guest.submit(1, &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]).unwrap();
            let mut guest = guest.migrate(device(image, engine));
            guest.wait_used(1);
            assert_eq!(bytes(&guest, DATA, 512), [33; 512]);
            assert_eq!(guest.read_config::<1>(32), [0]);
            assert_eq!(request(&mut guest, 0, 0, 1, &[(DATA, 512, true)]).0, 0);
        }
    }
}

#[test]
fn pausing_again_and_again_loses_nothing() {
    for engine in ENGINES {
        let file = disk_file(64);
        let mut guest = Guest::new(device(open(&file, false), engine), Transport::Pci, true);
        guest.bring_up(ALL, 2);
        for round in 0..40u64 {
            header(&guest, HEADER, 0, round);
            guest.submit(0, &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]).unwrap();
            guest.device().pause().unwrap();
            guest.device().start().unwrap();
            guest.wait_used(0);
            assert_eq!(bytes(&guest, DATA, 512), [round as u8; 512]);
        }
        guest.device().reset();
        guest.device().reset();
    }
}

/// Not a test but a measurement: `cargo test --release -p devices throughput -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn throughput() {
    for directory in ["/dev/shm", "/var/tmp"] {
        for engine in ENGINES {
            for depth in [1u64, 4] {
                let file = tempfile::Builder::new().tempfile_in(directory).unwrap();
                file.as_file().set_len(1 << 20).unwrap();
                std::fs::write(file.path(), vec![7; 1 << 20]).unwrap();
                let mut guest = Guest::new(device(open(&file, false), engine), Transport::Pci, true);
                guest.bring_up(ALL & !ring::RING_PACKED, 2);
                let (start, mut done, mut sent) = (std::time::Instant::now(), 0u64, 0u64);
                while done < 20_000 {
                    while sent - done < depth {
                        let at = HEADER + 0x40 * (sent % depth);
                        header(&guest, at, 0, sent * 8 % 2048);
                        let data = DATA + 0x1000 * (sent % depth);
                        guest
                            .submit(0, &[(at, 16, false), (data, 4096, true), (at + 0x20, 1, true)])
                            .unwrap();
                        sent += 1;
                    }
                    while guest.rings[0].poll().is_none() {
                        std::thread::yield_now();
                    }
                    done += 1;
                }
                let time = start.elapsed() / 20_000;
                let messages = guest.notes.take_messages().len();
                println!(
                    "{directory} {engine:?} depth {depth}: {time:?} a request, {messages} interrupts for {done}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Any header and any buffers: the disk answers or stops, and nothing outside the disk changes.
    #[test]
    fn any_request_is_survived(
        engine in prop::sample::select(ENGINES.to_vec()),
        list in prop::collection::vec(
            (
                prop_oneof![0u32..16, any::<u32>()],
                prop_oneof![0u64..70, any::<u64>()],
                prop::collection::vec((0u64..0x2000, 0u32..3000, any::<bool>()), 0..4),
                0u32..20,
            ),
            1..20,
        ),
    ) {
        let file = disk_file(64);
        let mut guest = Guest::new(device(open(&file, false), engine), Transport::Pci, true);
        guest.bring_up(ALL & !ring::RING_PACKED, 2);
        for (kind, sector, data, header_len) in list {
            header(&guest, HEADER, kind, sector);
            let mut buffers = vec![(HEADER, header_len.max(1), false)];
            buffers.extend(data.iter().filter(|b| !b.2).map(|b| (DATA + b.0, b.1, false)));
            buffers.extend(data.iter().filter(|b| b.2).map(|b| (DATA + b.0, b.1, true)));
            let Some(id) = guest.submit(0, &buffers) else { break };
            let notes = guest.notes.clone();
            let mut used = None;
            notes.wait("an answer", || {
                used = guest.rings[0].poll();
                used.is_some() || guest.status() & status::NEEDS_RESET != 0
            });
            match used {
                Some((back, _)) => prop_assert_eq!(back, id),
                None => {
                    guest.bring_up(ALL & !ring::RING_PACKED, 2);
                }
            }
        }
        drop(guest);
        prop_assert_eq!(std::fs::metadata(file.path()).unwrap().len(), 64 * 512);
    }
}

#[test]
fn the_driver_hears_of_another_size() {
    for transport in TRANSPORTS {
        let file = disk_file(64);
        let image = open(&file, false);
        let blk = Blk::new(&spec(), "d0", image.clone(), 1, System::new(|_| {})).unwrap();
        let drive = blk.disk.drive.clone();
        let mut guest = Guest::new(Box::new(blk), transport, true);
        guest.bring_up(ALL & !ring::RING_PACKED, 2);
        let sectors = |guest: &Guest| u64::from_le_bytes(guest.read_config::<8>(0));
        assert_eq!(sectors(&guest), 64);
        guest.device().pause().unwrap();
        image.resize(128 * 512, block::formats::Preallocation::Off).unwrap();
        drive.resized();
        let before = guest.generation();
        guest.device().start().unwrap();
        assert_eq!(sectors(&guest), 128, "{transport:?}");
        assert_ne!(guest.generation(), before, "{transport:?}");
        image.resize(256 * 512, block::formats::Preallocation::Off).unwrap();
        drive.resized();
        assert_eq!(sectors(&guest), 256, "{transport:?}");
    }
}

#[test]
fn an_error_stops_the_machine_and_the_request_is_tried_again() {
    use std::sync::atomic::AtomicU32;
    let file = disk_file(64);
    let asked = Arc::new(AtomicU32::new(0));
    let count = asked.clone();
    let system = System::new(move |r| {
        if matches!(r, SystemRequest::IoError(_)) {
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    let image = open(&file, false);
    let gate = Arc::new(Gate { shut: AtomicBool::new(true) });
    image.watch(gate.clone());
    let spec = Spec { werror: OnError::Stop, ..spec() };
    let blk = Blk::new(&spec, "d0", image, 1, system).unwrap();
    let mut guest = Guest::new(Box::new(blk), Transport::Pci, true);
    guest.bring_up(ALL & !ring::RING_PACKED, 2);
    guest.mem.write(DATA, &[0x77; 512]).unwrap();
    header(&guest, HEADER, 1, 3);
    guest.submit(0, &[(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)]).unwrap();
    let notes = guest.notes.clone();
    notes.wait("the wish to stop", || asked.load(Ordering::SeqCst) == 1);
    guest.device().pause().unwrap();
    assert!(guest.device().save().is_err(), "a request is not lost silently");
    guest.device().start().unwrap();
    notes.wait("another", || asked.load(Ordering::SeqCst) == 2);
    guest.device().pause().unwrap();
    gate.shut.store(false, Ordering::SeqCst);
    guest.device().start().unwrap();
    guest.wait_used(0);
    assert_eq!(guest.mem.read_obj::<u8>(STATUS).unwrap(), 0);
    assert_eq!(std::fs::read(file.path()).unwrap()[3 * 512..4 * 512], [0x77; 512]);
}

/// Lets no change through while it is shut.
struct Gate {
    shut: AtomicBool,
}

impl block::jobs::Watcher for Gate {
    fn before_change(&self, _: u64, _: u64) -> block::Result<()> {
        if self.shut.load(Ordering::SeqCst) {
            return Err(block::Error::io("write", std::io::Error::from_raw_os_error(libc::ENOSPC)));
        }
        Ok(())
    }
    fn after_change(&self, _: u64, _: u64) {}
}
