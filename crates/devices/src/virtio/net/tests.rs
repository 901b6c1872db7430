//! The card, with a port that gives back what it is sent.

use super::*;
use bus::virtio::testing::{Guest, TRANSPORTS, Transport};
use net::{Frame, Receiver, Sent, VnetHeader};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};

/// Gives back what it is sent, and notes what it is told.
struct Mirror {
    frames: VecDeque<Vec<u8>>,
    wake: EventFd,
    told: Arc<Mutex<Told>>,
}

#[derive(Debug, Default, PartialEq)]
struct Told {
    offloads: Offloads,
    enabled: bool,
}

impl Port for Mirror {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.told.lock().unwrap().offloads = offloads;
        Ok(())
    }
    fn set_enabled(&mut self, enabled: bool) {
        self.told.lock().unwrap().enabled = enabled;
    }
    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        self.frames.push_back(frame.to_vec());
        self.wake.signal();
        Sent::Done
    }
    fn receive(&mut self, to: &mut dyn Receiver) -> io::Result<bool> {
        self.wake.clear();
        while let Some(frame) = self.frames.front() {
            let Some(room) = to.reserve(frame.len()) else {
                self.wake.signal();
                return Ok(false);
            };
            room.write(0, frame);
            to.commit(frame.len());
            self.frames.pop_front();
        }
        Ok(false)
    }
}

type AllTold = Vec<Arc<Mutex<Told>>>;

fn card(change: impl FnOnce(&mut Spec), pairs: usize) -> (Box<Net>, Arc<Link>, AllTold) {
    let told: AllTold = (0..pairs).map(|_| Arc::default()).collect();
    let port = |told: &Arc<Mutex<Told>>| -> Box<dyn Port> {
        Box::new(Mirror { frames: VecDeque::new(), wake: EventFd::new().unwrap(), told: told.clone() })
    };
    let all = Offloads::all();
    let link = Arc::new(Link::default());
    let netdev = Netdev {
        id: "n".into(),
        kind: "mirror",
        about: String::new(),
        takes: all,
        gives: all,
        mtu: None,
        link: link.clone(),
        counters: Arc::default(),
        ports: told.iter().map(port).collect(),
    };
    let mut spec = Spec::default();
    change(&mut spec);
    (Box::new(Net::new(&spec, netdev, MacAddr::default_for(0)).unwrap()), link, told)
}

const TX: u64 = 0x10_0000;
const RX: u64 = 0x12_0000;
const CONTROL: u64 = 0x14_0000;

/// A frame to the card's own address.
fn frame(len: usize) -> Vec<u8> {
    let mut b = VnetHeader::default().to_bytes().to_vec();
    b.extend_from_slice(&MacAddr::default_for(0).0);
    b.extend((0..len - 6).map(|i| i as u8));
    b
}

/// Sends a frame, in two pieces.
fn send(guest: &mut Guest, queue: u16, bytes: &[u8]) {
    guest.mem.write(TX, bytes).unwrap();
    let half = bytes.len() as u32 / 2;
    guest.request(queue, &[(TX, half, false), (TX + u64::from(half), bytes.len() as u32 - half, false)]);
}

/// What the driver gets of a frame in these buffers.
fn received(guest: &mut Guest, queue: u16, count: usize, size: u32) -> Vec<u8> {
    let mut all = Vec::new();
    for i in 0..count as u64 {
        let (_, len) = guest.wait_used(queue);
        let mut b = vec![0; len as usize];
        guest.mem.read(RX + i * u64::from(size), &mut b).unwrap();
        all.extend_from_slice(&b);
    }
    all
}

/// A command; returns its result.
fn command(guest: &mut Guest, queue: u16, bytes: &[u8]) -> u8 {
    guest.mem.write(CONTROL, bytes).unwrap();
    guest.mem.write(CONTROL + 0x1000, &[0xff]).unwrap();
    guest.request(queue, &[(CONTROL, bytes.len() as u32, false), (CONTROL + 0x1000, 1, true)]);
    let mut result = [0];
    guest.mem.read(CONTROL + 0x1000, &mut result).unwrap();
    result[0]
}

#[test]
fn frames_come_back_in_as_many_buffers_as_they_need() {
    for transport in TRANSPORTS {
        for features in [u64::MAX, !feature::MRG_RXBUF] {
            let (device, _, _) = card(|_| (), 1);
            let mut guest = Guest::new(device, transport, true);
            guest.bring_up(features & !(1 << 34), 3);
            let mergeable = features & feature::MRG_RXBUF != 0;
            let (size, count) = if mergeable { (512, 4) } else { (4096, 1) };
            for i in 0..count {
                guest.submit(0, &[(RX + i * u64::from(size), size, true)]).unwrap();
            }
            let want = frame(1514);
            send(&mut guest, 1, &want);
            let needed = if mergeable { 3 } else { 1 };
            let got = received(&mut guest, 0, needed, size);
            assert_eq!(got.len(), want.len(), "{transport:?}");
            assert_eq!(got[10], needed as u8, "number of buffers");
            assert_eq!(got[12..], want[12..]);
            // The buffer that is left is still the card's.
            if mergeable {
                send(&mut guest, 1, &frame(100));
                guest.mem.write(RX, &[0; 512]).unwrap();
                let (_, len) = guest.wait_used(0);
                assert_eq!(len, 112);
            }
        }
    }
}

#[test]
fn frames_wait_for_buffers() {
    let (device, _, _) = card(|_| (), 1);
    let mut guest = Guest::new(device, Transport::Pci, true);
    guest.bring_up(!(1 << 34), 3);
    send(&mut guest, 1, &frame(200));
    assert!(guest.rings[0].poll().is_none());
    guest.submit(0, &[(RX, 2048, true)]).unwrap();
    assert_eq!(received(&mut guest, 0, 1, 2048)[12..], frame(200)[12..]);
}

#[test]
fn the_driver_chooses_what_it_gets() {
    let (device, _, _) = card(|_| (), 1);
    let mut guest = Guest::new(device, Transport::Pci, true);
    guest.bring_up(!(1 << 34), 3);
    for i in 0..8 {
        guest.submit(0, &[(RX + i * 2048, 2048, true)]).unwrap();
    }
    let to = |mac: [u8; 6]| {
        let mut b = frame(100);
        b[12..18].copy_from_slice(&mac);
        b
    };
    // All at first; then its own, listed groups and broadcasts.
    send(&mut guest, 1, &to([2, 9, 9, 9, 9, 9]));
    guest.wait_used(0);
    assert_eq!(command(&mut guest, 2, &[0, 0, 0]), 0);
    let mut table = vec![1, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    table.extend_from_slice(&[1, 0, 0x5e, 0, 0, 1]);
    assert_eq!(command(&mut guest, 2, &table), 0);
    for (mac, wanted) in [
        ([2, 9, 9, 9, 9, 9], false),
        ([1, 0, 0x5e, 0, 0, 2], false),
        ([1, 0, 0x5e, 0, 0, 1], true),
        ([0xff; 6], true),
        (MacAddr::default_for(0).0, true),
    ] {
        send(&mut guest, 1, &to(mac));
        if wanted {
            let (_, len) = guest.wait_used(0);
            assert_eq!(len, 112, "{mac:02x?}");
        }
    }
    assert_eq!(command(&mut guest, 2, &[1, 1, 2, 9, 9, 9, 9, 9]), 0);
    assert_eq!(guest.read_config::<6>(0), [2, 9, 9, 9, 9, 9]);
    send(&mut guest, 1, &to([2, 9, 9, 9, 9, 9]));
    guest.wait_used(0);
    // Commands that make no sense.
    for bad in [&[1, 1, 2][..], &[9, 9], &[2, 0, 0xff, 0xff], &[1, 0, 9, 0, 0, 0], &[4, 0, 0, 0]] {
        assert_eq!(command(&mut guest, 2, bad), 1, "{bad:?}");
    }
}

#[test]
fn offloads_are_what_was_agreed_and_then_chosen() {
    let (device, _, told) = card(|_| (), 1);
    let mut guest = Guest::new(device, Transport::Pci, true);
    guest.bring_up(
        feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::CTRL_VQ | feature::CTRL_GUEST_OFFLOADS,
        3,
    );
    send(&mut guest, 1, &frame(60));
    assert_eq!(told[0].lock().unwrap().offloads, Offloads::CSUM | Offloads::TSO4);
    let set = |bits: u64| [&[5, 0][..], &bits.to_le_bytes()].concat();
    assert_eq!(command(&mut guest, 2, &set(feature::GUEST_TSO6)), 1, "never agreed on");
    assert_eq!(command(&mut guest, 2, &set(0)), 0);
    let told = told[0].clone();
    guest.notes.clone().wait("no offloads", || told.lock().unwrap().offloads.is_empty());
}

#[test]
fn queue_pairs_are_used_when_the_driver_says_so() {
    let (device, _, told) = card(|_| (), 2);
    let mut guest = Guest::new(device, Transport::Pci, true);
    assert_eq!(guest.read_config::<2>(8), [2, 0]);
    guest.bring_up(!(1 << 34), 5);
    guest.submit(2, &[(RX, 2048, true)]).unwrap();
    let enabled = |told: &AllTold| told.iter().map(|t| t.lock().unwrap().enabled).collect::<Vec<_>>();
    assert_eq!(command(&mut guest, 4, &[4, 0, 3, 0]), 1);
    assert_eq!(command(&mut guest, 4, &[4, 0, 2, 0]), 0);
    guest.notes.clone().wait("both", || enabled(&told) == [true, true]);
    send(&mut guest, 3, &frame(80));
    assert_eq!(received(&mut guest, 2, 1, 2048)[12..], frame(80)[12..]);
    // Without the feature the control queue is the third.
    let (device, _, _) = card(|_| (), 2);
    let mut guest = Guest::new(device, Transport::Pci, true);
    guest.bring_up(!(feature::MQ | 1 << 34), 3);
    assert_eq!(command(&mut guest, 2, &[0, 0, 1]), 0);
}

#[test]
fn the_cable_can_be_pulled() {
    let (device, link, _) = card(|_| (), 1);
    let mut guest = Guest::new(device, Transport::Pci, true);
    guest.bring_up(!(1 << 34), 3);
    guest.submit(0, &[(RX, 2048, true)]).unwrap();
    assert_eq!(guest.read_config::<2>(6), [1, 0]);
    link.set(false);
    assert!(guest.take_config_interrupt());
    assert_eq!(guest.read_config::<2>(6), [0, 0]);
    send(&mut guest, 1, &frame(60));
    link.set(true);
    assert!(guest.take_config_interrupt());
    send(&mut guest, 1, &frame(70));
    assert_eq!(received(&mut guest, 0, 1, 2048).len(), 82, "the first was lost");
}

#[test]
fn a_card_that_moved_announces_itself() {
    let (device, _, _) = card(|_| (), 1);
    let mut guest = Guest::new(device, Transport::Pci, true);
    guest.bring_up(!(1 << 34), 3);
    assert_eq!(command(&mut guest, 2, &[1, 1, 2, 0, 0, 0, 0, 7]), 0);
    let mut guest = guest.migrate(card(|_| (), 1).0);
    assert_eq!(guest.read_config::<6>(0), [2, 0, 0, 0, 0, 7]);
    assert_eq!(guest.read_config::<2>(6), [3, 0]);
    assert_eq!(command(&mut guest, 2, &[3, 0]), 0);
    assert_eq!(guest.read_config::<2>(6), [1, 0]);
}

#[test]
fn properties_that_make_no_sense() {
    let new = |change: fn(&mut Spec)| {
        let mut spec = Spec::default();
        change(&mut spec);
        let (netdev, _) = net::user::open("n", &net::user::Spec::default()).unwrap();
        Net::new(&spec, netdev, MacAddr::default_for(0))
    };
    assert!(new(|s| s.mac = Some("01:00:00:00:00:00".into())).is_err());
    assert!(new(|s| s.mac = Some("x".into())).is_err());
    assert!(new(|s| s.rx_queue_size = 100).is_err());
    assert!(new(|s| s.host_mtu = Some(10)).is_err());
    assert!(new(|s| s.mac = Some("02:00:00:00:00:01".into())).is_ok());
}
