//! Transports.

use super::Echo;
use crate::pci::{PciFunction, capability, reg};
use crate::virtio::testing::{Guest, TRANSPORTS, Transport};
use crate::virtio::{QueueConfig, feature, status};
use crate::{RegionId, Space};
use accel::IoAddress;
use proptest::prelude::*;

const ALL: u64 = feature::RING_DEFAULT | feature::RING_PACKED | 1;

fn echo_once(guest: &mut Guest, queue: u16) {
    guest.mem.write(0x10_0000, b"kvasir").unwrap();
    guest.mem.write(0x10_1000, &[0; 6]).unwrap();
    assert_eq!(guest.request(queue, &[(0x10_0000, 6, false), (0x10_1000, 6, true)]), 6);
    let mut back = [0; 6];
    guest.mem.read(0x10_1000, &mut back).unwrap();
    assert_eq!(&back, b"kvasir");
}

#[test]
fn requests_go_through_and_interrupt() {
    for transport in TRANSPORTS {
        for features in [0, ALL & !feature::RING_PACKED, ALL] {
            let mut guest = Guest::new(Echo::new(false), transport, false);
            assert_eq!(guest.bring_up(features, 2) & ALL, features);
            for queue in [0, 1, 0] {
                echo_once(&mut guest, queue);
                assert!(guest.take_interrupt(queue), "{transport:?}");
                assert!(!guest.take_interrupt(queue), "{transport:?}: once");
            }
        }
    }
}

#[test]
fn features_must_be_offered_and_modern() {
    for transport in TRANSPORTS {
        let guest = Guest::new(Echo::new(false), transport, false);
        assert_eq!(guest.offered(), ALL | feature::VERSION_1);
        for bad in [0, 1, feature::VERSION_1 | 2, feature::VERSION_1 | 1 << 63] {
            guest.set_status(0);
            guest.accept(bad);
            assert_eq!(guest.status() & status::FEATURES_OK, 0, "{bad:#x}");
        }
        guest.set_status(0);
        guest.accept(feature::VERSION_1 | 1);
        assert_ne!(guest.status() & status::FEATURES_OK, 0);
        // Settled: no later change, and the status stays until reset.
        guest.accept(feature::VERSION_1 | 2);
        assert_ne!(guest.status() & status::FEATURES_OK, 0);
        guest.set_status(status::ACKNOWLEDGE);
        assert_ne!(guest.status() & status::FEATURES_OK, 0);
        guest.set_status(0);
        assert_eq!(guest.status(), 0);
    }
}

#[test]
fn a_driver_without_negotiation_or_with_bad_rings_is_told() {
    for transport in TRANSPORTS {
        let mut guest = Guest::new(Echo::new(false), transport, false);
        guest.ready(); // sets FEATURES_OK with no features: refused
        assert_ne!(guest.status() & status::NEEDS_RESET, 0);
        let features = guest.negotiate(0);
        guest.add_queue(None, features);
        guest.set_up(1, &QueueConfig { size: 32, ready: true, descriptors: 1 << 40, driver: 0, device: 0 });
        guest.ready();
        assert_ne!(guest.status() & status::NEEDS_RESET, 0, "{transport:?}");
        assert!(guest.take_config_interrupt());
        guest.bring_up(0, 2);
        echo_once(&mut guest, 1);
    }
}

#[test]
fn a_hostile_ring_stops_the_device_until_reset() {
    for transport in TRANSPORTS {
        let mut guest = Guest::new(Echo::new(false), transport, false);
        guest.bring_up(0, 2);
        guest.submit(0, &[(1 << 40, 8, true)]).unwrap();
        assert_ne!(guest.status() & status::NEEDS_RESET, 0);
        assert!(guest.take_config_interrupt());
        guest.submit(1, &[(0x10_0000, 8, true)]).unwrap();
        assert!(guest.rings[1].poll().is_none(), "nothing moves any more");
        guest.bring_up(0, 2);
        echo_once(&mut guest, 0);
    }
}

#[test]
fn unused_queues_stay_unused() {
    for transport in TRANSPORTS {
        let mut guest = Guest::new(Echo::new(false), transport, false);
        guest.bring_up(0, 1);
        echo_once(&mut guest, 0);
        guest.notify(1);
        guest.notify(77);
        assert_eq!(guest.max_size(0), 16);
        assert_eq!(guest.max_size(2), 0, "no such queue");
        assert_eq!(guest.status() & status::NEEDS_RESET, 0);
    }
}

#[test]
fn configuration_changes_show_in_generation_and_interrupt() {
    for transport in TRANSPORTS {
        let mut guest = Guest::new(Echo::new(false), transport, false);
        guest.bring_up(0, 2);
        let before = guest.generation();
        guest.write_config(1, &[7]);
        assert_eq!(guest.read_config::<4>(0), [0, 7, 0, 0]);
        assert_eq!(guest.read_config::<2>(60), [0, 0]);
        assert_ne!(guest.generation(), before);
        assert!(guest.take_config_interrupt());
        assert!(!guest.take_interrupt(0));
    }
}

#[test]
fn doorbells_are_attached_while_the_driver_drives() {
    for transport in [Transport::Pci, Transport::Mmio] {
        let mut guest = Guest::new(Echo::new(true), transport, true);
        let bells = guest.bells.clone().unwrap();
        assert!(bells.places().is_empty());
        guest.bring_up(0, 2);
        let places = bells.places();
        assert_eq!(places.len(), 2);
        if transport == Transport::Mmio {
            assert_eq!(places[1], (IoAddress::Mmio(0xd000_0050), 4, Some(1)));
        } else {
            let bar = guest.function().unwrap().config().bar_address(4).unwrap();
            assert_eq!(places[1], (IoAddress::Mmio(bar + 0x3004), 0, None));
            // The guest moves the BAR: the doorbells follow; and go when it stops decoding.
            guest.function().unwrap().write_config(reg::BAR0 + 16, &0xc800_0000u32.to_le_bytes());
            assert_eq!(bells.places()[0].0, IoAddress::Mmio(0xc800_3000));
            guest.function().unwrap().write_config(reg::COMMAND, &[0, 0]);
            assert!(bells.places().is_empty());
            guest.function().unwrap().write_config(reg::COMMAND, &[2, 0]);
            assert_eq!(bells.places().len(), 2);
        }
        guest.set_status(0);
        if transport == Transport::Mmio {
            assert!(bells.places().is_empty());
        }
        guest.device().reset();
        assert!(bells.places().is_empty());
    }
}

#[test]
fn state_moves_to_another_process() {
    for transport in TRANSPORTS {
        for features in [0, ALL] {
            let mut guest = Guest::new(Echo::new(false), transport, false);
            guest.bring_up(features, 2);
            guest.write_config(0, &[1, 2]);
            for _ in 0..21 {
                echo_once(&mut guest, 0);
            }
            // A request that is under way while the device is paused is served on the other side.
            guest.device().pause().unwrap();
            let id = guest.submit(1, &[(0x10_0000, 6, false), (0x10_1000, 6, true)]).unwrap();
            assert!(guest.rings[1].poll().is_none());
            let mut guest = guest.migrate(Echo::new(false));
            assert_eq!(guest.wait_used(1), (id, 6));
            assert!(guest.take_interrupt(1));
            assert_eq!(guest.read_config::<4>(0), [1, 2, 0, 0]);
            echo_once(&mut guest, 0);
            guest.bring_up(features, 2);
            echo_once(&mut guest, 1);
        }
    }
}

#[test]
fn foreign_states_are_refused() {
    let pci = Guest::new(Echo::new(false), Transport::Pci, false);
    let mmio = Guest::new(Echo::new(false), Transport::Mmio, false);
    let state = mmio.device().save().unwrap();
    assert!(pci.device().load(state).is_err());
    let mut state = pci.device().save().unwrap();
    state.data["core"]["queues"] = serde_json::json!([]);
    assert!(pci.device().load(state).is_err());
    let mut state = pci.device().save().unwrap();
    state.data["core"]["status"] = 15.into();
    state.data["core"]["driver_features"] = (1u64 << 40).into();
    assert!(pci.device().load(state).is_err());
}

#[test]
fn the_configuration_window_reaches_the_bars() {
    let guest = Guest::new(Echo::new(false), Transport::Pci, false);
    let mut f = guest.function().unwrap();
    let mut at = u16::from(f.config().get_u8(reg::CAPABILITIES));
    while !(f.config().get_u8(at) == capability::VENDOR && f.config().get_u8(at + 3) == 5) {
        at = f.config().get_u8(at + 1).into();
        assert_ne!(at, 0, "no window");
    }
    let mut access = |bar: u8, offset: u32, len: u32, write: Option<u32>| {
        f.write_config(at + 4, &[bar]);
        f.write_config(at + 8, &offset.to_le_bytes());
        f.write_config(at + 12, &len.to_le_bytes());
        if let Some(value) = write {
            f.write_config(at + 16, &value.to_le_bytes());
        }
        let mut data = [0; 4];
        f.read_config(at + 16, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(access(4, 18, 2, None), 2, "number of queues");
    access(4, 20, 1, Some(1));
    assert_eq!(access(4, 20, 1, None), 1, "status");
    assert_eq!(access(4, 0x2000, 4, Some(0x0403_0201)), 0x0403_0201);
    // Impossible settings reach nothing.
    for (bar, offset, len) in [(9, 0, 4), (0, 0, 4), (4, 0x4000, 4), (4, 1, 4), (4, 0, 3), (4, 0, u32::MAX)] {
        access(bar, offset, len, Some(0x55));
    }
    drop(f);
    assert_eq!(guest.status(), 1);
}

#[test]
fn pci_identity_is_what_drivers_look_for() {
    let guest = Guest::new(Echo::new(false), Transport::Pci, false);
    let f = guest.function().unwrap();
    assert_eq!(f.config().get_u32(0), 0x106a_1af4);
    assert_eq!(f.config().get_u8(reg::REVISION), 1);
    assert_eq!(f.config().get_u8(reg::INTERRUPT_PIN), 1);
    assert_eq!(f.config().msix().unwrap().vectors.count(), 3);
}

#[test]
fn vectors_that_do_not_exist_read_back_as_none() {
    let guest = Guest::new(Echo::new(false), Transport::Pci, false);
    let bar = guest.function().unwrap().config().bar_address(4).unwrap();
    for (value, back) in [(2u16, 2u16), (3, 0xffff), (0xffff, 0xffff)] {
        guest.bus.write(Space::Memory, bar + 16, &value.to_le_bytes());
        assert_eq!(u16::from_le_bytes(guest.read(bar + 16)), back);
        guest.bus.write(Space::Memory, bar + 26, &value.to_le_bytes());
        assert_eq!(u16::from_le_bytes(guest.read(bar + 26)), back);
    }
}

#[derive(Clone, Debug)]
enum Access {
    Read(u32, u64, usize),
    Write(u32, u64, Vec<u8>),
    ConfigRead(u16, usize),
    ConfigWrite(u16, Vec<u8>),
    Reset,
    Pause,
    Start,
    SaveLoad,
}

fn accesses() -> impl Strategy<Value = Vec<Access>> {
    let len = prop::sample::select(vec![1usize, 2, 4, 8]);
    let data =
        len.clone().prop_flat_map(|n| prop::collection::vec(prop_oneof![Just(0u8), 0u8..16, any::<u8>()], n));
    let offset = prop_oneof![4 => 0u64..0x100, 1 => 0u64..0x4000, 1 => 0x2ff0u64..0x3100];
    let region = prop::sample::select(vec![0u32, 1, 4]);
    let one = prop_oneof![
        4 => (region.clone(), offset.clone(), len.clone()).prop_map(|(r, o, n)| Access::Read(r, o, n)),
        12 => (region, offset, data.clone()).prop_map(|(r, o, d)| Access::Write(r, o, d)),
        2 => (0u16..260, len).prop_map(|(o, n)| Access::ConfigRead(o, n.min(4))),
        4 => (0u16..260, data).prop_map(|(o, d)| Access::ConfigWrite(o, d[..d.len().min(4)].to_vec())),
        1 => Just(Access::Reset),
        1 => Just(Access::Pause),
        1 => Just(Access::Start),
        1 => Just(Access::SaveLoad),
    ];
    prop::collection::vec(one, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Registers take anything at any time.
    #[test]
    fn any_register_access_is_survived(
        transport in prop::sample::select(TRANSPORTS.to_vec()),
        up in any::<bool>(),
        list in accesses(),
    ) {
        let mut guest = Guest::new(Echo::new(true), transport, true);
        if up {
            guest.bring_up(ALL, 2);
        }
        for access in list {
            match access {
                Access::Read(region, offset, len) => {
                    guest.device().read(RegionId(region), offset, &mut vec![0xff; len]);
                }
                Access::Write(region, offset, data) => guest.device().write(RegionId(region), offset, &data),
                Access::ConfigRead(offset, len) => {
                    if let Some(mut f) = guest.function() {
                        f.read_config(offset, &mut vec![0; len]);
                    }
                }
                Access::ConfigWrite(offset, data) => {
                    if let Some(mut f) = guest.function() {
                        f.write_config(offset, &data);
                    }
                }
                Access::Reset => guest.reset(),
                Access::Pause => guest.device().pause().unwrap(),
                Access::Start => guest.device().start().unwrap(),
                Access::SaveLoad => {
                    guest.device().pause().unwrap();
                    let state = guest.device().save().unwrap();
                    guest.device().load(state.clone()).unwrap();
                    prop_assert_eq!(guest.device().save().unwrap(), state);
                    guest.device().start().unwrap();
                }
            }
        }
        guest.device().reset();
        guest.device().reset();
        prop_assert_eq!(guest.bells.as_ref().unwrap().places().len(), 0);
    }
}
