//! A guest for tests: takes frames, and makes its own.

use crate::wire::tcp::Tcp;
use crate::wire::{ETHERNET, ethertype, ip, protocol, pseudo_header};
use crate::{Frame, MacAddr, Port, Receiver, Room, VnetHeader};
use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// The guest's address.
pub const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
/// How long a test waits for something.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where frames for the guest end up.
pub struct Inbox {
    /// Frames, with their headers.
    pub frames: VecDeque<Vec<u8>>,
    /// How many more the guest has room for.
    pub buffers: usize,
    /// Size of the largest frame.
    pub largest: usize,
    room: Room<'static>,
}

impl Default for Inbox {
    fn default() -> Self {
        // The tests' few boxes stay until the end.
        let memory: &'static mut [u8] = Box::leak(vec![0; 1 << 17].into_boxed_slice());
        Self { frames: VecDeque::new(), buffers: usize::MAX, largest: 1 << 16, room: Room::of(memory) }
    }
}

impl Receiver for Inbox {
    fn reserve(&mut self, len: usize) -> Option<&Room<'_>> {
        assert!(len <= self.largest, "frame of {len} bytes");
        (self.buffers > 0).then_some(&self.room)
    }

    fn commit(&mut self, len: usize) {
        self.buffers -= 1;
        let mut frame = vec![0; len];
        self.room.copy_to(0, &mut frame);
        self.frames.push_back(frame);
    }

    fn largest(&self) -> usize {
        self.largest
    }
}

/// An IP packet as the guest gets it.
#[derive(Clone, Debug)]
pub struct Got {
    /// The header before the frame.
    pub vnet: VnetHeader,
    /// The IP header.
    pub ip: ip::Ip,
    /// Its payload.
    pub payload: Vec<u8>,
}

impl Got {
    /// Parses a frame and checks what a kernel would check.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let vnet = VnetHeader::from_bytes(frame.first_chunk().unwrap());
        let b = &frame[VnetHeader::LEN..];
        let kind = u16::from_be_bytes([b[12], b[13]]);
        if kind != ethertype::IPV4 && kind != ethertype::IPV6 {
            return None;
        }
        let ip = ip::Ip::parse(&b[ETHERNET..]).expect("a valid IP header");
        let payload = b[ETHERNET + ip.payload..].to_vec();
        assert_eq!(payload.len(), ip.len, "IP length and frame length");
        if vnet.flags & VnetHeader::NEEDS_CSUM == 0
            && ip.fragment.is_none()
            && [protocol::TCP, protocol::UDP].contains(&ip.protocol)
        {
            let sum = pseudo_header(ip.src, ip.dst, ip.protocol, ip.len).bytes(&payload).finish();
            assert_eq!(sum, 0, "checksum");
        }
        Some(Self { vnet, ip, payload })
    }

    /// The TCP header and its payload.
    pub fn tcp(&self) -> (Tcp, &[u8]) {
        assert_eq!(self.ip.protocol, protocol::TCP);
        let tcp = Tcp::parse(&self.payload).expect("a TCP header");
        (tcp, &self.payload[tcp.header..])
    }
}

/// A port and its guest.
pub struct Cable<P: Port> {
    /// The port.
    pub port: P,
    /// Frames for the guest.
    pub inbox: Inbox,
    /// The gateway's hardware address.
    pub gateway: MacAddr,
}

impl<P: Port> Cable<P> {
    /// Plugs a guest in.
    pub fn new(port: P, gateway: MacAddr) -> Self {
        Self { port, inbox: Inbox::default(), gateway }
    }

    /// Sends a frame with a header of zeros.
    pub fn send_ethernet(&mut self, to: MacAddr, kind: u16, payload: &[u8]) {
        let mut b = VnetHeader::default().to_bytes().to_vec();
        b.extend_from_slice(&to.0);
        b.extend_from_slice(&MAC.0);
        b.extend_from_slice(&kind.to_be_bytes());
        b.extend_from_slice(payload);
        self.port.send(&Frame::of(&b));
        self.port.receive(&mut self.inbox).unwrap();
    }

    /// Sends an IP packet whose payload's checksum is in place.
    pub fn send_ip(&mut self, src: IpAddr, dst: IpAddr, protocol: u8, ttl: u8, payload: &[u8]) {
        let mut b = vec![0; ip::header_len(src)];
        ip::write(&mut b, src, dst, protocol, ttl, payload.len());
        b.extend_from_slice(payload);
        let kind = if src.is_ipv4() { ethertype::IPV4 } else { ethertype::IPV6 };
        self.send_ethernet(self.gateway, kind, &b);
    }

    /// Sends a UDP datagram.
    pub fn send_udp(&mut self, src: (IpAddr, u16), dst: (IpAddr, u16), payload: &[u8]) {
        let len = 8 + payload.len();
        let mut b = [src.1, dst.1, len as u16, 0].map(u16::to_be_bytes).concat();
        b.extend_from_slice(payload);
        let sum = pseudo_header(src.0, dst.0, protocol::UDP, len).bytes(&b).finish();
        b[6..8].copy_from_slice(&sum.to_be_bytes());
        self.send_ip(src.0, dst.0, protocol::UDP, 64, &b);
    }

    /// Sends a TCP segment.
    pub fn send_tcp(&mut self, src: IpAddr, dst: IpAddr, header: &Tcp, payload: &[u8]) {
        let mut b = vec![0; 60];
        let len = header.write(&mut b);
        b.truncate(len);
        b.extend_from_slice(payload);
        let sum = pseudo_header(src, dst, protocol::TCP, b.len()).bytes(&b).finish();
        b[16..18].copy_from_slice(&sum.to_be_bytes());
        self.send_ip(src, dst, protocol::TCP, 64, &b);
    }

    /// Lets the port work until `done` gives something.
    pub fn until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            self.port.receive(&mut self.inbox).unwrap();
            if let Some(t) = done(self) {
                return t;
            }
            assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The next IP packet that the guest gets.
    pub fn next_ip(&mut self, what: &str) -> Got {
        self.until(what, |c| {
            while let Some(frame) = c.inbox.frames.pop_front() {
                if let Some(got) = Got::parse(&frame) {
                    return Some(got);
                }
            }
            None
        })
    }

    /// Lets the port work for a moment, after which the guest has got nothing.
    pub fn expect_silence(&mut self) {
        for _ in 0..20 {
            self.port.receive(&mut self.inbox).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(self.inbox.frames.is_empty(), "{:02x?}", self.inbox.frames);
    }
}
