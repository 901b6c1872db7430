//! Putting fragments of IP packets together again, in bounded memory.

use super::ip::Ip;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Packets under way, and how long one may take (RFC 8200, 4.5).
const MOST: usize = 16;
const PATIENCE: Duration = Duration::from_secs(30);
/// Largest packet.
const LARGEST: usize = 65535;
/// Pieces of one packet.
const PIECES: usize = 128;

#[derive(Debug)]
struct Partial {
    key: (IpAddr, IpAddr, u8, u32),
    since: Instant,
    data: Vec<u8>,
    /// What is there: start and end, in order, none overlapping.
    pieces: Vec<(usize, usize)>,
    total: Option<usize>,
}

/// Fragments that wait for others.
#[derive(Debug, Default)]
pub struct Reassembly(Vec<Partial>);

impl Reassembly {
    /// Adds a fragment with its payload. Returns header and payload of the packet when it is whole. Packets whose
    /// fragments overlap are dropped (RFC 8200, 4.5; RFC 1858 says why).
    pub fn add(&mut self, ip: &Ip, payload: &[u8], now: Instant) -> Option<(Ip, Vec<u8>)> {
        let fragment = ip.fragment?;
        let key = (ip.src, ip.dst, ip.protocol, fragment.id);
        let end = fragment.offset + payload.len();
        let misshapen =
            fragment.more && !payload.len().is_multiple_of(8) || payload.is_empty() || end > LARGEST - 40;
        let at = match self.0.iter().position(|p| p.key == key) {
            Some(at) => at,
            None if misshapen => return None,
            None => {
                if self.0.len() >= MOST {
                    self.0.remove(0);
                }
                self.0.push(Partial { key, since: now, data: Vec::new(), pieces: Vec::new(), total: None });
                self.0.len() - 1
            }
        };
        let partial = &mut self.0[at];
        let overlaps = partial.pieces.iter().any(|(s, e)| fragment.offset < *e && end > *s);
        let beyond = partial.total.is_some_and(|t| end > t || !fragment.more && end != t)
            || !fragment.more && partial.data.len() > end;
        if misshapen || overlaps || beyond || partial.pieces.len() >= PIECES {
            self.0.remove(at);
            return None;
        }
        if partial.data.len() < end {
            partial.data.resize(end, 0);
        }
        partial.data[fragment.offset..end].copy_from_slice(payload);
        partial.pieces.push((fragment.offset, end));
        if !fragment.more {
            partial.total = Some(end);
        }
        let have: usize = partial.pieces.iter().map(|(s, e)| e - s).sum();
        if partial.total != Some(have) {
            return None;
        }
        let whole = self.0.remove(at);
        Some((Ip { fragment: None, len: have, ..*ip }, whole.data))
    }

    /// Forgets packets that never became whole.
    pub fn expire(&mut self, now: Instant) {
        self.0.retain(|p| now.duration_since(p.since) < PATIENCE);
    }
}

#[cfg(test)]
mod tests {
    use super::super::ip::Fragment;
    use super::*;
    use proptest::prelude::*;

    fn piece(id: u32, offset: usize, more: bool) -> Ip {
        Ip {
            src: IpAddr::from([10, 0, 2, 15]),
            dst: IpAddr::from([192, 0, 2, 1]),
            protocol: 17,
            ttl: 64,
            payload: 20,
            len: 0,
            fragment: Some(Fragment { id, offset, more }),
        }
    }

    #[test]
    fn out_of_order_and_overlapping() {
        let now = Instant::now();
        let mut r = Reassembly::default();
        assert!(r.add(&piece(1, 16, false), b"end", now).is_none());
        assert!(r.add(&piece(2, 0, true), b"whatever", now).is_none());
        assert!(r.add(&piece(1, 0, true), b"01234567", now).is_none());
        let (ip, data) = r.add(&piece(1, 8, true), b"89abcdef", now).unwrap();
        assert_eq!((ip.len, data.as_slice()), (19, &b"0123456789abcdefend"[..]));
        assert!(r.add(&piece(2, 0, true), b"overlaps", now).is_none());
        assert!(r.0.is_empty());
        for id in 0..100 {
            assert!(r.add(&piece(id, 8, true), b"whatever", now).is_none());
        }
        assert_eq!(r.0.len(), MOST);
        r.expire(now + PATIENCE);
        assert!(r.0.is_empty());
    }

    proptest! {
        #[test]
        fn any_fragments(list in prop::collection::vec((0u32..3, 0usize..9000, any::<bool>(), 0usize..100), 0..60)) {
            let now = Instant::now();
            let mut r = Reassembly::default();
            for (id, offset, more, len) in list {
                r.add(&piece(id, offset * 8, more), &vec![0; len * 8], now);
            }
        }
    }
}
