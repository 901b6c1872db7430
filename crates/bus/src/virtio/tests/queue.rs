//! Queues against an honest driver, and against hostile ones.

use super::echo;
use crate::virtio::testing::{Buffer, DriverRing, ram};
use crate::virtio::{Chain, Queue, QueueConfig, QueueError, QueuePosition, Segment, feature};
use memory::GuestMemory;
use proptest::prelude::*;

const PACKED: u64 = feature::RING_PACKED;
const INDIRECT: u64 = feature::INDIRECT_DESC;
const EVENT_IDX: u64 = feature::EVENT_IDX;

fn pair(mem: &GuestMemory, size: u16, features: u64) -> (DriverRing, Queue) {
    let driver = DriverRing::new(mem, 0, size, features);
    let queue = Queue::new(mem, &driver.config, features, None).unwrap();
    (driver, queue)
}

fn pop(queue: &mut Queue) -> Option<Chain> {
    let mut chain = Chain::new();
    queue.pop(&mut chain).unwrap().then_some(chain)
}

#[test]
fn chains_come_as_they_were_made() {
    for features in [0, PACKED, INDIRECT, PACKED | INDIRECT] {
        let mem = ram();
        let (mut driver, mut queue) = pair(&mem, 8, features);
        assert!(pop(&mut queue).is_none());
        let buffers = [(0x10_0000, 16, false), (0x10_1000, 32, false), (0x10_2000, 64, true)];
        let id = if features & INDIRECT != 0 {
            driver.add_indirect(0x11_0000, &buffers).unwrap()
        } else {
            driver.add(&buffers).unwrap()
        };
        let chain = pop(&mut queue).unwrap();
        assert_eq!(
            chain.readable(),
            [Segment { addr: 0x10_0000, len: 16 }, Segment { addr: 0x10_1000, len: 32 }]
        );
        assert_eq!(chain.writable(), [Segment { addr: 0x10_2000, len: 64 }]);
        assert_eq!((chain.readable_len(), chain.writable_len()), (48, 64));
        assert!(pop(&mut queue).is_none());
        assert_eq!(queue.in_flight(), 1);
        queue.push(&chain, 7).unwrap();
        assert_eq!(driver.poll(), None, "not published yet");
        queue.publish().unwrap();
        assert_eq!(driver.poll(), Some((id, 7)));
        assert_eq!(queue.in_flight(), 0);
    }
}

#[test]
fn a_chain_put_back_comes_again() {
    for features in [0, PACKED] {
        let mem = ram();
        let (mut driver, mut queue) = pair(&mem, 4, features);
        for _ in 0..9 {
            let id = driver.add(&[(0x10_0000, 1, true), (0x10_0100, 1, true)]).unwrap();
            let chain = pop(&mut queue).unwrap();
            queue.unpop(&chain);
            assert_eq!(queue.in_flight(), 0);
            let chain = pop(&mut queue).unwrap();
            queue.push(&chain, 2).unwrap();
            queue.publish().unwrap();
            assert_eq!(driver.poll(), Some((id, 2)));
        }
    }
}

#[test]
fn cursors_cross_buffers_and_regions() {
    let mem = ram();
    let (mut driver, mut queue) = pair(&mem, 8, 0);
    mem.write(0x10_0000, b"abc").unwrap();
    mem.write(0x10_1000, b"defgh").unwrap();
    driver
        .add(&[(0x10_0000, 3, false), (0x10_1000, 5, false), (0x10_2000, 2, true), (0x10_3000, 9, true)])
        .unwrap();
    let chain = pop(&mut queue).unwrap();
    let mut reader = chain.reader(&mem);
    assert_eq!(&reader.read_array::<4>().unwrap(), b"abcd");
    assert_eq!(reader.remaining(), 4);
    let mut pieces = vec![];
    assert_eq!(reader.clone().slices(3, |s| pieces.push(s.len())).unwrap(), 3);
    assert_eq!(pieces, [3]);
    assert_eq!(reader.skip(2).unwrap(), 2);
    assert!(reader.read_array::<3>().is_err());

    let mut writer = chain.writer(&mem);
    let mut tail = writer.split_tail(1).unwrap();
    assert!(writer.split_tail(12).is_none());
    assert_eq!(tail.write(b"!?").unwrap(), 1);
    assert_eq!(writer.write(b"0123456789").unwrap(), 10);
    assert_eq!(writer.written(), 10);
    let mut back = [0; 9];
    mem.read(0x10_3000, &mut back).unwrap();
    assert_eq!(&back, b"23456789!");
}

/// Many rounds, more than the indices' 16 bits for small rings, with batches of varying size.
#[test]
fn rings_wrap_around() {
    for features in [0, EVENT_IDX, PACKED, PACKED | EVENT_IDX] {
        let mem = ram();
        let size = if features & PACKED != 0 { 7 } else { 8 };
        let (mut driver, mut queue) = pair(&mem, size, features);
        let mut served = 0u32;
        for round in 0..30_000u32 {
            driver.set_interrupts(true);
            let mark = driver.mark();
            let mut added = vec![];
            for i in 0..=round % 3 {
                let buffers: Vec<Buffer> = (0..=(round + i) % 2).map(|_| (0x10_0000, 8, true)).collect();
                added.extend(driver.add(&buffers));
            }
            assert!(driver.wants_notification(mark), "round {round}: the device slept");
            let mut chains: Vec<Chain> = std::iter::from_fn(|| pop(&mut queue)).collect();
            assert_eq!(chains.len(), added.len());
            if round % 2 == 0 {
                chains.reverse(); // out of order
            }
            for chain in &chains {
                queue.push(chain, served).unwrap();
                served += 1;
            }
            assert!(!queue.enable_notifications().unwrap());
            assert!(queue.publish().unwrap(), "round {round}: the driver sleeps");
            let mut back: Vec<u16> = std::iter::from_fn(|| driver.poll()).map(|(id, _)| id).collect();
            back.sort_unstable();
            added.sort_unstable();
            assert_eq!(back, added);
        }
    }
}

#[test]
fn notifications_and_interrupts_are_suppressed() {
    for features in [0, EVENT_IDX, PACKED, PACKED | EVENT_IDX] {
        let mem = ram();
        let (mut driver, mut queue) = pair(&mem, 8, features);
        let buffer = [(0x10_0000, 8, true)];
        queue.disable_notifications().unwrap();
        // With split rings and event indices, the first buffer is always announced.
        driver.add(&buffer).unwrap();
        let mark = driver.mark();
        driver.add(&buffer).unwrap();
        assert!(!driver.wants_notification(mark), "{features:#x}");
        assert!(queue.enable_notifications().unwrap(), "there are two already");
        let chains = [pop(&mut queue).unwrap(), pop(&mut queue).unwrap()];
        assert!(!queue.enable_notifications().unwrap());
        let mark = driver.mark();
        driver.add(&buffer).unwrap();
        assert!(driver.wants_notification(mark));

        driver.set_interrupts(false);
        queue.push(&chains[0], 0).unwrap();
        assert!(!queue.publish().unwrap(), "{features:#x}");
        assert!(driver.poll().is_some());
        driver.set_interrupts(true);
        assert!(!queue.publish().unwrap(), "nothing new");
        queue.push(&chains[1], 0).unwrap();
        assert!(queue.publish().unwrap());
    }
}

/// A saved position continues in a new queue over the same rings.
#[test]
fn position_continues() {
    for features in [0, PACKED] {
        let mem = ram();
        let (mut driver, mut queue) = pair(&mem, 4, features);
        for round in 0..11 {
            let id = driver.add(&[(0x10_0000, 8, true)]).unwrap();
            if round % 3 == 0 {
                queue = Queue::new(&mem, &driver.config, features, Some(queue.position())).unwrap();
            }
            let chain = pop(&mut queue).unwrap();
            queue.push(&chain, round).unwrap();
            queue.publish().unwrap();
            assert_eq!(driver.poll(), Some((id, round)));
        }
        let odd = QueuePosition { next_available: 3, next_used: 1 };
        assert!(Queue::new(&mem, &driver.config, features, Some(odd)).is_err());
    }
}

#[test]
fn impossible_rings_are_refused() {
    let mem = ram();
    let good = DriverRing::new(&mem, 0, 8, 0).config;
    let bad = [
        QueueConfig { size: 0, ..good },
        QueueConfig { descriptors: 8, ..good },
        QueueConfig { driver: 0x8001, ..good },
        QueueConfig { device: 0xc002, ..good },
        QueueConfig { descriptors: 2 << 20, ..good },
        QueueConfig { driver: (2 << 20) - 16, ..good },
        QueueConfig { device: !3, ..good },
    ];
    for config in bad {
        assert!(Queue::new(&mem, &config, 0, None).is_err(), "{config:?}");
    }
    assert!(Queue::new(&mem, &QueueConfig { size: 7, ..good }, 0, None).is_err());
    assert!(Queue::new(&mem, &QueueConfig { size: 7, ..good }, PACKED, None).is_ok());
}

/// What breaks a queue: a name, and what the driver does with a fresh ring of 8.
type Attack = (&'static str, fn(&GuestMemory, &mut DriverRing));

#[test]
fn hostile_split_rings_break_the_queue() {
    fn offer(mem: &GuestMemory, d: &DriverRing, head: u16) {
        mem.write(d.config.driver + 4, &head.to_le_bytes()).unwrap();
        mem.write(d.config.driver + 2, &1u16.to_le_bytes()).unwrap();
    }
    let attacks: &[Attack] = &[
        ("loop", |mem, d| {
            d.write_descriptor(0, 0, 0x10_0000, 8, 1, 1);
            d.write_descriptor(0, 1, 0x10_0000, 8, 1, 0);
            offer(mem, d, 0);
        }),
        ("head outside", |mem, d| offer(mem, d, 8)),
        ("next outside", |mem, d| {
            d.write_descriptor(0, 0, 0x10_0000, 8, 1, 9);
            offer(mem, d, 0);
        }),
        ("index too far", |mem, d| mem.write(d.config.driver + 2, &9u16.to_le_bytes()).unwrap()),
        ("not RAM", |mem, d| {
            d.write_descriptor(0, 0, (2 << 20) - 4, 8, 0, 0);
            offer(mem, d, 0);
        }),
        ("end of address space", |mem, d| {
            d.write_descriptor(0, 0, u64::MAX - 3, 8, 0, 0);
            offer(mem, d, 0);
        }),
        ("write before read", |mem, d| {
            d.write_descriptor(0, 0, 0x10_0000, 8, 1 | 2, 1);
            d.write_descriptor(0, 1, 0x10_0000, 8, 0, 0);
            offer(mem, d, 0);
        }),
        ("ragged table", |mem, d| {
            d.write_descriptor(0, 0, 0x10_0000, 17, 4, 0);
            offer(mem, d, 0);
        }),
        ("empty table", |mem, d| {
            d.write_descriptor(0, 0, 0x10_0000, 0, 4, 0);
            offer(mem, d, 0);
        }),
        ("table and next", |mem, d| {
            d.write_descriptor(0, 0, 0x10_0000, 16, 4 | 1, 1);
            offer(mem, d, 0);
        }),
        ("table in a table", |mem, d| {
            d.write_descriptor(0, 0, 0x10_0000, 16, 4, 0);
            d.write_descriptor(0x10_0000, 0, 0x10_0000, 16, 4, 0);
            offer(mem, d, 0);
        }),
        ("loop in a table", |mem, d| {
            d.write_descriptor(0, 0, 0x10_0000, 32, 4, 0);
            d.write_descriptor(0x10_0000, 0, 0x10_0000, 16, 1, 1);
            d.write_descriptor(0x10_0000, 1, 0x10_0000, 16, 1, 0);
            offer(mem, d, 0);
        }),
        ("endless table", |mem, d| {
            d.write_descriptor(0, 0, 0x10_0000, 0xffff_fff0, 4, 0);
            for i in 0..2000 {
                d.write_descriptor(0x10_0000, i, 0x10_0000, 16, 1, i + 1);
            }
            offer(mem, d, 0);
        }),
        ("next outside the table", |mem, d| {
            d.write_descriptor(0, 0, 0x10_0000, 32, 4, 0);
            d.write_descriptor(0x10_0000, 0, 0x10_0000, 16, 1, 2);
            offer(mem, d, 0);
        }),
        ("table not RAM", |mem, d| {
            d.write_descriptor(0, 0, (2 << 20) - 16, 32, 4, 0);
            d.write_descriptor((2 << 20) - 16, 0, 0x10_0000, 16, 1, 1);
            offer(mem, d, 0);
        }),
    ];
    for (name, attack) in attacks {
        let mem = ram();
        let (mut driver, mut queue) = pair(&mem, 8, INDIRECT);
        attack(&mem, &mut driver);
        let mut chain = Chain::new();
        assert!(queue.pop(&mut chain).is_err(), "{name}");
        assert!(queue.is_broken(), "{name}");
        assert!(matches!(queue.pop(&mut chain), Err(QueueError::Broken)), "{name}");
        assert!(matches!(queue.push(&chain, 0), Err(QueueError::Broken)), "{name}");
    }
}

#[test]
fn hostile_packed_rings_break_the_queue() {
    const AVAIL: u16 = 1 << 7;
    let attacks: &[Attack] = &[
        ("loop", |_, d| {
            for i in 0..8 {
                d.write_descriptor(0, i, 0x10_0000, 8, 0, AVAIL | 1);
            }
        }),
        ("not RAM", |_, d| d.write_descriptor(0, 0, 1 << 40, 8, 0, AVAIL)),
        ("write before read", |_, d| {
            d.write_descriptor(0, 0, 0x10_0000, 8, 0, AVAIL | 1 | 2);
            d.write_descriptor(0, 1, 0x10_0000, 8, 0, AVAIL);
        }),
        ("table after a buffer", |_, d| {
            d.write_descriptor(0, 0, 0x10_0000, 8, 0, AVAIL | 1);
            d.write_descriptor(0, 1, 0x10_0000, 16, 0, AVAIL | 4);
        }),
        ("huge table", |_, d| d.write_descriptor(0, 0, 0x10_0000, 0xffff_fff0, 0, AVAIL | 4)),
        ("ragged table", |_, d| d.write_descriptor(0, 0, 0x10_0000, 15, 0, AVAIL | 4)),
    ];
    for (name, attack) in attacks {
        let mem = ram();
        let (mut driver, mut queue) = pair(&mem, 8, PACKED | INDIRECT);
        attack(&mem, &mut driver);
        let mut chain = Chain::new();
        assert!(queue.pop(&mut chain).is_err(), "{name}");
        assert!(queue.is_broken(), "{name}");
    }
}

/// Written lengths are 32 bits, so chains are shorter than that (virtio 1.2, 2.7.5.2).
#[test]
fn chains_stay_below_four_gigabytes() {
    let mem = ram();
    let config =
        QueueConfig { size: 4096, ready: true, descriptors: 0x10_0000, driver: 0x12_0000, device: 0x13_0000 };
    let mut queue = Queue::new(&mem, &config, 0, None).unwrap();
    let driver = DriverRing::new(&mem, 0, 8, 0);
    for i in 0..4096 {
        driver.write_descriptor(config.descriptors, i, 0, 2 << 20, u16::from(i < 4095), i + 1);
    }
    mem.write(config.driver + 2, &1u16.to_le_bytes()).unwrap();
    assert!(matches!(queue.pop(&mut Chain::new()), Err(QueueError::TooLong)));
}

/// A driver that offers the same chain for ever cannot get more than the ring holds in flight.
#[test]
fn no_more_in_flight_than_the_ring_holds() {
    let mem = ram();
    let (driver, mut queue) = pair(&mem, 8, 0);
    driver.write_descriptor(0, 0, 0x10_0000, 8, 0, 0);
    let mut chain = Chain::new();
    let mut taken = 0;
    for index in 1..100u16 {
        mem.write(driver.config.driver + 2, &index.to_le_bytes()).unwrap();
        match queue.pop(&mut chain) {
            Ok(there) => taken += u32::from(there),
            Err(_) => break,
        }
    }
    assert_eq!(taken, 8);
    assert!(queue.is_broken());
}

proptest! {
    /// Whatever lies in ring memory, the device ends, stays in RAM, and does not panic.
    #[test]
    fn any_ring_contents_are_survived(
        features in prop::sample::select(vec![0, EVENT_IDX | INDIRECT, PACKED, PACKED | EVENT_IDX | INDIRECT]),
        seed in any::<u64>(),
        writes in prop::collection::vec((0u64..0x200, any::<u8>()), 0..200),
        rounds in 1..6usize,
    ) {
        let mem = ram();
        let (driver, mut queue) = pair(&mem, 8, features);
        let mut state = seed | 1;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for at in (0..0x100u64).step_by(2) {
            // Likely values: small indices, flags, addresses in RAM.
            let value = (random() >> 40) as u16 & [0xffff, 0x0007, 0x0087, 0x8083][(random() >> 60) as usize & 3];
            mem.write(driver.config.descriptors + at, &value.to_le_bytes()).unwrap();
            mem.write(driver.config.driver + at, &(value & 15).to_le_bytes()).unwrap();
        }
        let mut chain = Chain::new();
        for _ in 0..rounds {
            for (at, value) in &writes {
                let base = [driver.config.descriptors, driver.config.driver, driver.config.device][*at as usize % 3];
                mem.write(base + at, &[*value]).unwrap();
            }
            for _ in 0..20 {
                match queue.pop(&mut chain) {
                    Ok(true) => {
                        prop_assert!(queue.in_flight() <= queue.size());
                        let written = echo(&chain, &mem).unwrap();
                        if queue.push(&chain, written).is_err() || queue.publish().is_err() {
                            break;
                        }
                    }
                    Ok(false) => {
                        let _ = queue.enable_notifications();
                        break;
                    }
                    Err(_) => {
                        prop_assert!(queue.is_broken());
                        break;
                    }
                }
            }
        }
    }

    /// An honest driver gets back every chain, with its own bytes, in any pattern of requests and batches.
    #[test]
    fn honest_drivers_are_served(
        features in prop::sample::select(vec![0, EVENT_IDX, INDIRECT, EVENT_IDX | INDIRECT]),
        packed in any::<bool>(),
        plan in prop::collection::vec((1u32..200, 1u32..200, any::<bool>(), any::<bool>()), 1..80),
    ) {
        let features = features | if packed { PACKED } else { 0 };
        let mem = ram();
        let (mut driver, mut queue) = pair(&mem, 8, features);
        let mut held: Vec<Chain> = vec![];
        let mut expected = std::collections::BTreeMap::new();
        for (i, (send, room, indirect, flush)) in plan.into_iter().enumerate() {
            let area = 0x10_0000 + 0x1000 * (i as u64 % 64);
            mem.write(area, &vec![i as u8; send as usize]).unwrap();
            let buffers = [(area, send, false), (area + 0x800, room, true)];
            let id = if indirect && features & INDIRECT != 0 {
                driver.add_indirect(0x18_0000 + 0x100 * (i as u64 % 64), &buffers)
            } else {
                driver.add(&buffers)
            };
            if let Some(id) = id {
                expected.insert(id, (area + 0x800, i as u8, send.min(room)));
            }
            held.extend(std::iter::from_fn(|| pop(&mut queue)));
            if flush || id.is_none() {
                for chain in held.drain(..).rev() {
                    let written = echo(&chain, &mem).unwrap();
                    queue.push(&chain, written).unwrap();
                }
                queue.publish().unwrap();
                while let Some((id, len)) = driver.poll() {
                    let (at, byte, want) = expected.remove(&id).unwrap();
                    prop_assert_eq!(len, want);
                    let mut got = vec![0; len as usize];
                    mem.read(at, &mut got).unwrap();
                    prop_assert!(got.iter().all(|b| *b == byte));
                }
                prop_assert!(expected.is_empty());
            }
        }
    }
}
