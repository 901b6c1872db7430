//! IPv4 (RFC 791) and IPv6 (RFC 8200) headers.

use super::{Sum, array, be16};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A header, and where the payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip {
    /// Source.
    pub src: IpAddr,
    /// Destination.
    pub dst: IpAddr,
    /// Protocol of the payload, after any extension headers.
    pub protocol: u8,
    /// Hops left.
    pub ttl: u8,
    /// Offset of the payload from the start of the header.
    pub payload: usize,
    /// Length of the payload in bytes, as the header says; not checked against the frame.
    pub len: usize,
    /// The payload is a fragment.
    pub fragment: Option<Fragment>,
}

/// A fragment of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fragment {
    /// What the fragments of a packet have in common.
    pub id: u32,
    /// Where in the payload it belongs, in bytes.
    pub offset: usize,
    /// Others follow.
    pub more: bool,
}

/// Length of an IPv4 header without options.
pub const V4_LEN: usize = 20;
/// Length of an IPv6 header.
pub const V6_LEN: usize = 40;

/// Extension headers that a packet may have before we stop looking.
const MOST_EXTENSIONS: usize = 8;

impl Ip {
    /// Parses a header of either version at the start of `b`, which may be cut short after the headers.
    pub fn parse(b: &[u8]) -> Option<Self> {
        match b.first()? >> 4 {
            4 => Self::parse_v4(b),
            6 => Self::parse_v6(b),
            _ => None,
        }
    }

    fn parse_v4(b: &[u8]) -> Option<Self> {
        if b.len() < V4_LEN {
            return None;
        }
        let header = usize::from(b[0] & 15) * 4;
        let total = usize::from(be16(b, 2));
        if header < V4_LEN
            || header > b.len()
            || total < header
            || Sum::default().bytes(&b[..header]).finish() != 0
        {
            return None;
        }
        let place = be16(b, 6);
        let offset = usize::from(place & 0x1fff) * 8;
        let more = place & 0x2000 != 0;
        let fragment = (offset != 0 || more).then(|| Fragment { id: be16(b, 4).into(), offset, more });
        Some(Self {
            src: Ipv4Addr::from(array::<4>(b, 12)).into(),
            dst: Ipv4Addr::from(array::<4>(b, 16)).into(),
            protocol: b[9],
            ttl: b[8],
            payload: header,
            len: total - header,
            fragment,
        })
    }

    fn parse_v6(b: &[u8]) -> Option<Self> {
        if b.len() < V6_LEN {
            return None;
        }
        let mut next = b[6];
        let mut at = V6_LEN;
        let end = V6_LEN + usize::from(be16(b, 4));
        let mut fragment = None;
        for _ in 0..MOST_EXTENSIONS {
            // Hop-by-hop, routing, destination options; fragment; authentication.
            let len = match next {
                0 | 43 | 60 => 8 + 8 * usize::from(*b.get(at + 1)?),
                44 => 8,
                51 => 8 + 4 * usize::from(*b.get(at + 1)?),
                _ => break,
            };
            if at + len > b.len() || at + len > end {
                return None;
            }
            if next == 44 {
                let place = be16(b, at + 2);
                let offset = usize::from(place & !7);
                let more = place & 1 != 0;
                let id = u32::from_be_bytes(array(b, at + 4));
                fragment = (offset != 0 || more).then_some(Fragment { id, offset, more });
            }
            next = b[at];
            at += len;
            if fragment.is_some() {
                break; // what follows need not be a header
            }
        }
        Some(Self {
            src: Ipv6Addr::from(array::<16>(b, 8)).into(),
            dst: Ipv6Addr::from(array::<16>(b, 24)).into(),
            protocol: next,
            ttl: b[7],
            payload: at,
            len: end.checked_sub(at)?,
            fragment,
        })
    }
}

/// Length of the header that [`write`] makes for this address.
pub fn header_len(addr: IpAddr) -> usize {
    if addr.is_ipv4() { V4_LEN } else { V6_LEN }
}

/// Writes a header without options for `len` bytes of payload to the start of `b`; returns its length.
/// Both addresses are of the same family, `len` fits its length field, and `b` has room.
pub fn write(b: &mut [u8], src: IpAddr, dst: IpAddr, protocol: u8, ttl: u8, len: usize) -> usize {
    match (src, dst) {
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            b[..4].copy_from_slice(&[0x60, 0, 0, 0]);
            b[4..6].copy_from_slice(&(len as u16).to_be_bytes());
            b[6] = protocol;
            b[7] = ttl;
            b[8..24].copy_from_slice(&src.octets());
            b[24..40].copy_from_slice(&dst.octets());
            V6_LEN
        }
        (src, dst) => {
            let v4 = |a| match a {
                IpAddr::V4(a) => a,
                IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
            };
            b[..2].copy_from_slice(&[0x45, 0]);
            b[2..4].copy_from_slice(&((V4_LEN + len) as u16).to_be_bytes());
            b[4..12].copy_from_slice(&[0, 0, 0x40, 0, ttl, protocol, 0, 0]); // don't fragment
            b[12..16].copy_from_slice(&v4(src).octets());
            b[16..20].copy_from_slice(&v4(dst).octets());
            let sum = Sum::default().bytes(&b[..V4_LEN]).finish();
            b[10..12].copy_from_slice(&sum.to_be_bytes());
            V4_LEN
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_parsed() {
        for (src, dst) in [("10.0.2.2", "10.0.2.15"), ("fec0::2", "fec0::1234")] {
            let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
            let mut b = [0; 64];
            let n = write(&mut b, src, dst, 17, 64, 11);
            assert_eq!(n, header_len(src));
            let want = Ip { src, dst, protocol: 17, ttl: 64, payload: n, len: 11, fragment: None };
            assert_eq!(Ip::parse(&b), Some(want));
            assert_eq!(Ip::parse(&b[..n - 1]), None);
        }
    }

    #[test]
    fn a_wrong_checksum_is_refused() {
        let mut b = [0; 20];
        write(&mut b, "1.2.3.4".parse().unwrap(), "5.6.7.8".parse().unwrap(), 6, 64, 0);
        b[8] ^= 1;
        assert_eq!(Ip::parse(&b), None);
    }

    #[test]
    fn extension_headers_are_skipped() {
        let mut b = [0; 80];
        write(&mut b, "::1".parse().unwrap(), "::2".parse().unwrap(), 0, 64, 40);
        b[40..48].copy_from_slice(&[44, 0, 1, 4, 0, 0, 0, 0]);
        b[48..56].copy_from_slice(&[17, 0, 0, 9, 1, 2, 3, 4]);
        let ip = Ip::parse(&b).unwrap();
        assert_eq!((ip.protocol, ip.payload, ip.len), (17, 56, 24));
        assert_eq!(ip.fragment, Some(Fragment { id: 0x0102_0304, offset: 8, more: true }));
        b[41] = 200;
        assert_eq!(Ip::parse(&b), None);
    }

    proptest! {
        #[test]
        fn any_bytes(b in prop::collection::vec(any::<u8>(), 0..120), version in 0u8..16) {
            let mut b = b;
            if let Some(first) = b.first_mut() {
                *first = *first & 15 | version << 4;
            }
            if let Some(ip) = Ip::parse(&b) {
                prop_assert!(ip.payload <= b.len());
            }
        }
    }
}
