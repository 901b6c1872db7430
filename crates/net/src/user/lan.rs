//! The guest's side of the stack: who is on the cable, and frames on their way to it.

use crate::wire::{ETHERNET, Sum, arp, array, ethertype, icmp, ip, ndp, protocol, pseudo_header};
use crate::{MacAddr, Offloads, Receiver, VnetHeader};
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Small frames that may wait for room; what comes then is dropped, as a switch does.
const MOST_WAITING: usize = 512;
/// Addresses that are remembered.
const MOST_NEIGHBORS: usize = 256;
/// Our time to live.
pub(super) const TTL: u8 = 64;
/// Bytes before the IP header.
pub(super) const LINK: usize = VnetHeader::LEN + ETHERNET;

/// The cable.
#[derive(Debug)]
pub(super) struct Lan {
    /// Our hardware address.
    pub(super) mac: MacAddr,
    /// Where neighbours are looked for from.
    pub(super) v4: Option<Ipv4Addr>,
    pub(super) v6: Option<Ipv6Addr>,
    /// Largest IP packet.
    pub(super) mtu: usize,
    /// What the guest leaves to itself.
    pub(super) offloads: Offloads,
    neighbors: HashMap<IpAddr, MacAddr>,
    waiting: VecDeque<Vec<u8>>,
    ident: u16,
}

impl Lan {
    pub(super) fn new(mac: MacAddr, v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>, mtu: usize) -> Self {
        Self {
            mac,
            v4,
            v6,
            mtu,
            offloads: Offloads::empty(),
            neighbors: HashMap::new(),
            waiting: VecDeque::new(),
            ident: 0,
        }
    }

    /// Remembers where an address is.
    pub(super) fn learn(&mut self, ip: IpAddr, mac: MacAddr) {
        if mac.is_multicast() || mac.is_zero() || ip.is_unspecified() {
            return;
        }
        if self.neighbors.len() >= MOST_NEIGHBORS && !self.neighbors.contains_key(&ip) {
            self.neighbors.clear();
        }
        self.neighbors.insert(ip, mac);
    }

    /// Where an address is. Asks on the cable if that is not known; the caller tries again later.
    pub(super) fn find(&mut self, ip: IpAddr) -> Option<MacAddr> {
        if let Some(mac) = self.neighbors.get(&ip) {
            return Some(*mac);
        }
        match (ip, self.v4, self.v6) {
            (IpAddr::V4(target), Some(sender), _) => {
                let request = arp::Arp {
                    operation: arp::REQUEST,
                    sender_mac: self.mac,
                    sender,
                    target_mac: MacAddr::default(),
                    target,
                };
                self.ethernet(MacAddr::BROADCAST, ethertype::ARP, &request.to_bytes());
            }
            (IpAddr::V6(target), _, Some(src)) => {
                let (message, group, mac) = ndp::solicit(target, src, self.mac);
                self.ip(mac, src.into(), group.into(), protocol::ICMPV6, 255, &message);
            }
            _ => {}
        }
        None
    }

    /// Queues a frame.
    fn push(&mut self, frame: Vec<u8>) {
        if self.waiting.len() < MOST_WAITING {
            self.waiting.push_back(frame);
        }
    }

    /// Frames that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Hands over what waits; `false` if there was no room for all.
    pub(super) fn drain(&mut self, to: &mut dyn Receiver) -> bool {
        while let Some(frame) = self.waiting.pop_front() {
            if frame.len() > to.largest() {
                continue;
            }
            let Some(room) = to.reserve(frame.len()) else {
                self.waiting.push_front(frame);
                return false;
            };
            room.write(0, &frame);
            to.commit(frame.len());
        }
        true
    }

    /// Queues an Ethernet frame.
    pub(super) fn ethernet(&mut self, dst: MacAddr, kind: u16, payload: &[u8]) {
        let mut frame = vec![0; LINK];
        self.link_header(&mut frame, dst, kind);
        frame.extend_from_slice(payload);
        self.push(frame);
    }

    fn link_header(&self, b: &mut [u8], dst: MacAddr, kind: u16) {
        b[..VnetHeader::LEN].copy_from_slice(&VnetHeader::default().to_bytes());
        b[VnetHeader::LEN..VnetHeader::LEN + 6].copy_from_slice(&dst.0);
        b[VnetHeader::LEN + 6..VnetHeader::LEN + 12].copy_from_slice(&self.mac.0);
        b[VnetHeader::LEN + 12..LINK].copy_from_slice(&kind.to_be_bytes());
    }

    /// Writes all headers up to and with IP's, for `len` bytes of payload; returns where the payload starts.
    pub(super) fn headers(
        &self,
        b: &mut [u8],
        mac: MacAddr,
        src: IpAddr,
        dst: IpAddr,
        protocol: u8,
        len: usize,
    ) -> usize {
        self.link_header(b, mac, if src.is_ipv4() { ethertype::IPV4 } else { ethertype::IPV6 });
        LINK + ip::write(&mut b[LINK..], src, dst, protocol, TTL, len)
    }

    /// Queues an IP packet, in fragments if it is larger than the link's packets.
    pub(super) fn ip(
        &mut self,
        mac: MacAddr,
        src: IpAddr,
        dst: IpAddr,
        protocol: u8,
        ttl: u8,
        payload: &[u8],
    ) {
        let header = ip::header_len(src);
        let kind = if src.is_ipv4() { ethertype::IPV4 } else { ethertype::IPV6 };
        if header + payload.len() <= self.mtu {
            let mut frame = vec![0; LINK + header + payload.len()];
            self.link_header(&mut frame, mac, kind);
            ip::write(&mut frame[LINK..], src, dst, protocol, ttl, payload.len());
            frame[LINK + header..].copy_from_slice(payload);
            self.push(frame);
            return;
        }
        self.ident = self.ident.wrapping_add(1);
        let extra = if src.is_ipv4() { 0 } else { 8 };
        let most = (self.mtu - header - extra) & !7;
        for (i, piece) in payload.chunks(most).enumerate() {
            let offset = i * most;
            let more = offset + piece.len() < payload.len();
            let mut frame = vec![0; LINK + header + extra];
            self.link_header(&mut frame, mac, kind);
            if src.is_ipv4() {
                ip::write(&mut frame[LINK..], src, dst, protocol, ttl, piece.len());
                let place = (offset / 8) as u16 | u16::from(more) << 13; // a packet is below 64 KiB
                frame[LINK + 4..LINK + 6].copy_from_slice(&self.ident.to_be_bytes());
                frame[LINK + 6..LINK + 8].copy_from_slice(&place.to_be_bytes());
                frame[LINK + 10..LINK + 12].fill(0);
                let sum = Sum::default().bytes(&frame[LINK..LINK + header]).finish();
                frame[LINK + 10..LINK + 12].copy_from_slice(&sum.to_be_bytes());
            } else {
                ip::write(&mut frame[LINK..], src, dst, 44, ttl, piece.len() + extra);
                let at = LINK + header;
                frame[at] = protocol;
                frame[at + 2..at + 4].copy_from_slice(&(offset as u16 | u16::from(more)).to_be_bytes());
                frame[at + 6..at + 8].copy_from_slice(&self.ident.to_be_bytes());
            }
            frame.extend_from_slice(piece);
            self.push(frame);
        }
    }

    /// Queues a UDP datagram.
    pub(super) fn udp(&mut self, mac: MacAddr, src: (IpAddr, u16), dst: (IpAddr, u16), payload: &[u8]) {
        let len = 8 + payload.len();
        if len > usize::from(u16::MAX) - ip::V4_LEN {
            return;
        }
        let mut b = Vec::with_capacity(len);
        b.extend_from_slice(&src.1.to_be_bytes());
        b.extend_from_slice(&dst.1.to_be_bytes());
        b.extend_from_slice(&(len as u16).to_be_bytes());
        b.extend_from_slice(&[0, 0]);
        b.extend_from_slice(payload);
        let sum = pseudo_header(src.0, dst.0, protocol::UDP, len).bytes(&b).finish();
        // A sum of zero means none (RFC 768).
        b[6..8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
        self.ip(mac, src.0, dst.0, protocol::UDP, TTL, &b);
    }

    /// Queues an ICMP message whose checksum is in place.
    pub(super) fn icmp(&mut self, mac: MacAddr, src: IpAddr, dst: IpAddr, message: &[u8]) {
        let protocol = if src.is_ipv4() { protocol::ICMP } else { protocol::ICMPV6 };
        self.ip(mac, src, dst, protocol, TTL, message);
    }

    /// Tells the sender of a packet, which begins with `original`, that it did not arrive.
    pub(super) fn unreachable(&mut self, mac: MacAddr, why: icmp::Unreachable, original: &[u8]) {
        let Some(packet) = ip::Ip::parse(original) else { return };
        let us = match packet.dst {
            IpAddr::V4(_) => self.v4.map(IpAddr::V4),
            IpAddr::V6(_) => self.v6.map(IpAddr::V6),
        };
        // Never about broadcasts or errors (RFC 1122, 3.2.2).
        let echo_or_other = packet.protocol != protocol::ICMP && packet.protocol != protocol::ICMPV6
            || original
                .get(packet.payload)
                .is_some_and(|t| [icmp::ECHO_REQUEST, icmp::ECHO_REQUEST_V6].contains(t));
        if let Some(us) = us
            && echo_or_other
            && !packet.dst.is_multicast()
        {
            let message = icmp::unreachable(why, original, us, packet.src);
            self.icmp(mac, us, packet.src, &message);
        }
    }
}

/// The Ethernet header of a frame from the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ethernet {
    pub(super) dst: MacAddr,
    pub(super) src: MacAddr,
    pub(super) kind: u16,
    /// Where its payload starts.
    pub(super) payload: usize,
}

impl Ethernet {
    /// Parses the start of a frame, of which `b` may hold only the beginning. A VLAN tag of 0 (priority) is skipped;
    /// frames of other VLANs are not for us.
    pub(super) fn parse(b: &[u8]) -> Option<Self> {
        if b.len() < ETHERNET {
            return None;
        }
        let mut kind = u16::from_be_bytes([b[12], b[13]]);
        let mut payload = ETHERNET;
        if kind == ethertype::VLAN {
            if b.len() < ETHERNET + 4 || u16::from_be_bytes([b[14], b[15]]) & 0xfff != 0 {
                return None;
            }
            kind = u16::from_be_bytes([b[16], b[17]]);
            payload += 4;
        }
        Some(Self { dst: MacAddr(array(b, 0)), src: MacAddr(array(b, 6)), kind, payload })
    }
}
