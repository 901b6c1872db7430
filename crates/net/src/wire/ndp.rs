//! Neighbour discovery for IPv6 (RFC 4861), as far as a router on a small link needs it.

use super::{array, icmp};
use crate::MacAddr;
use std::net::Ipv6Addr;

/// Message types.
pub mod kind {
    /// A host looks for routers.
    pub const ROUTER_SOLICITATION: u8 = 133;
    /// A router describes the link.
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    /// Who has this address?
    pub const NEIGHBOR_SOLICITATION: u8 = 135;
    /// I have.
    pub const NEIGHBOR_ADVERTISEMENT: u8 = 136;
}

/// All nodes on the link.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// A message that hosts send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Looks for routers.
    RouterSolicitation,
    /// Asks for the hardware address of a target.
    Solicitation {
        /// The target.
        target: Ipv6Addr,
        /// The asker's hardware address.
        source: Option<MacAddr>,
    },
    /// Tells the hardware address of a target.
    Advertisement {
        /// The target.
        target: Ipv6Addr,
        /// Its hardware address.
        mac: Option<MacAddr>,
    },
}

/// The value of an Ethernet address option.
fn mac_option(mut b: &[u8], wanted: u8) -> Option<MacAddr> {
    while b.len() >= 8 {
        let len = usize::from(b[1]) * 8;
        if len == 0 || len > b.len() {
            return None;
        }
        if b[0] == wanted && len == 8 {
            return Some(MacAddr(array(b, 2)));
        }
        b = &b[len..];
    }
    None
}

impl Message {
    /// Parses an ICMPv6 message.
    pub fn parse(b: &[u8]) -> Option<Self> {
        match *b.first()? {
            kind::ROUTER_SOLICITATION if b.len() >= 8 => Some(Self::RouterSolicitation),
            kind::NEIGHBOR_SOLICITATION if b.len() >= 24 => Some(Self::Solicitation {
                target: Ipv6Addr::from(array::<16>(b, 8)),
                source: mac_option(&b[24..], 1),
            }),
            kind::NEIGHBOR_ADVERTISEMENT if b.len() >= 24 => Some(Self::Advertisement {
                target: Ipv6Addr::from(array::<16>(b, 8)),
                mac: mac_option(&b[24..], 2),
            }),
            _ => None,
        }
    }
}

/// A solicitation for `target`'s hardware address, and the group address it goes to.
pub fn solicit(target: Ipv6Addr, src: Ipv6Addr, mac: MacAddr) -> (Vec<u8>, Ipv6Addr, MacAddr) {
    let t = target.octets();
    let group = Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, t[13], t[14], t[15]]);
    let mut b = vec![kind::NEIGHBOR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    b.extend_from_slice(&t);
    b.extend_from_slice(&[1, 1]);
    b.extend_from_slice(&mac.0);
    icmp::finish(&mut b, src.into(), group.into());
    (b, group, MacAddr([0x33, 0x33, 0xff, t[13], t[14], t[15]]))
}

/// An advertisement that a router has `target`, from it to `dst`.
pub fn advertise(target: Ipv6Addr, mac: MacAddr, dst: Ipv6Addr, solicited: bool) -> Vec<u8> {
    let flags = 0x80 | if solicited { 0x40 } else { 0 } | 0x20;
    let mut b = vec![kind::NEIGHBOR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    b.extend_from_slice(&target.octets());
    b.extend_from_slice(&[2, 1]);
    b.extend_from_slice(&mac.0);
    icmp::finish(&mut b, target.into(), dst.into());
    b
}

/// What a router tells about its link.
#[derive(Clone, Debug)]
pub struct Router<'a> {
    /// Its hardware address.
    pub mac: MacAddr,
    /// Its link-local address, from which it speaks.
    pub link_local: Ipv6Addr,
    /// Seconds for which it routes; 0 if it routes nowhere.
    pub lifetime: u16,
    /// Prefix from which hosts make their addresses.
    pub prefix: Ipv6Addr,
    /// Its length in bits.
    pub prefix_len: u8,
    /// Largest packet, if it is to be told.
    pub mtu: Option<u32>,
    /// Name server (RFC 8106).
    pub dns: Option<Ipv6Addr>,
    /// Domains to search, encoded as for DNS.
    pub search: &'a [u8],
}

impl Router<'_> {
    /// The advertisement, to `dst`.
    pub fn advertisement(&self, dst: Ipv6Addr) -> Vec<u8> {
        // Hop limit 64; "other configuration" says that DHCPv6 knows more.
        let mut b = vec![kind::ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0x40];
        b.extend_from_slice(&self.lifetime.to_be_bytes());
        b.extend_from_slice(&[0; 8]);
        b.extend_from_slice(&[1, 1]);
        b.extend_from_slice(&self.mac.0);
        if let Some(mtu) = self.mtu {
            b.extend_from_slice(&[5, 1, 0, 0]);
            b.extend_from_slice(&mtu.to_be_bytes());
        }
        // On-link, autonomous; a day, half of it preferred.
        b.extend_from_slice(&[3, 4, self.prefix_len, 0xc0]);
        b.extend_from_slice(&86400u32.to_be_bytes());
        b.extend_from_slice(&43200u32.to_be_bytes());
        b.extend_from_slice(&[0; 4]);
        b.extend_from_slice(&self.prefix.octets());
        if let Some(dns) = self.dns {
            b.extend_from_slice(&[25, 3, 0, 0]);
            b.extend_from_slice(&3600u32.to_be_bytes());
            b.extend_from_slice(&dns.octets());
        }
        let words = (8 + self.search.len()).div_ceil(8);
        if !self.search.is_empty()
            && let Ok(words) = u8::try_from(words)
        {
            b.extend_from_slice(&[31, words, 0, 0]);
            b.extend_from_slice(&3600u32.to_be_bytes());
            b.extend_from_slice(self.search);
            b.resize(b.len().next_multiple_of(8), 0);
        }
        icmp::finish(&mut b, self.link_local.into(), dst.into());
        b
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn solicitations() {
        let mac = MacAddr([2, 3, 4, 5, 6, 7]);
        let target = "fec0::2".parse().unwrap();
        let (b, group, to) = solicit(target, "fe80::2".parse().unwrap(), mac);
        assert_eq!(Message::parse(&b), Some(Message::Solicitation { target, source: Some(mac) }));
        assert_eq!((group, to), ("ff02::1:ff00:2".parse().unwrap(), "33:33:ff:00:00:02".parse().unwrap()));
        let b = advertise(target, mac, "fe80::9".parse().unwrap(), true);
        assert_eq!(Message::parse(&b), Some(Message::Advertisement { target, mac: Some(mac) }));
    }

    #[test]
    fn advertisements_have_whole_options() {
        let router = Router {
            mac: MacAddr::default(),
            link_local: "fe80::2".parse().unwrap(),
            lifetime: 1800,
            prefix: "fec0::".parse().unwrap(),
            prefix_len: 64,
            mtu: Some(1400),
            dns: Some("fec0::3".parse().unwrap()),
            search: b"\x02ab\0",
        };
        let b = router.advertisement(ALL_NODES);
        let (mut at, mut kinds) = (16, vec![]);
        while at < b.len() {
            kinds.push(b[at]);
            assert_ne!(b[at + 1], 0);
            at += usize::from(b[at + 1]) * 8;
        }
        assert_eq!((at, kinds), (b.len(), vec![1, 5, 3, 25, 31]));
    }

    proptest! {
        #[test]
        fn any_bytes(b in prop::collection::vec(any::<u8>(), 0..80), kind in 130u8..140) {
            let mut b = b;
            if let Some(first) = b.first_mut() {
                *first = kind;
            }
            let _ = Message::parse(&b);
        }
    }
}
