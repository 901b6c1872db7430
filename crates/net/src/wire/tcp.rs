//! TCP headers (RFC 9293) and the options that matter here (RFC 7323).

use super::{be16, be32};

/// Length of a header without options.
pub const LEN: usize = 20;

/// Flag bits.
pub mod flag {
    /// No more data.
    pub const FIN: u8 = 1;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 2;
    /// Reset.
    pub const RST: u8 = 4;
    /// Hand over to the application.
    pub const PSH: u8 = 8;
    /// The acknowledgment number counts.
    pub const ACK: u8 = 16;
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tcp {
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
    /// Sequence number of the first byte.
    pub seq: u32,
    /// Next byte expected.
    pub ack: u32,
    /// [`flag`]s.
    pub flags: u8,
    /// Window, not scaled.
    pub window: u16,
    /// Length of the header.
    pub header: usize,
    /// Largest segment that the sender takes.
    pub mss: Option<u16>,
    /// How many bits the sender's windows are shifted by.
    pub scale: Option<u8>,
}

impl Tcp {
    /// Parses a header, which is whole in `b`.
    pub fn parse(b: &[u8]) -> Option<Self> {
        if b.len() < LEN {
            return None;
        }
        let header = usize::from(b[12] >> 4) * 4;
        if header < LEN || header > b.len() {
            return None;
        }
        let mut tcp = Self {
            src: be16(b, 0),
            dst: be16(b, 2),
            seq: be32(b, 4),
            ack: be32(b, 8),
            flags: b[13],
            window: be16(b, 14),
            header,
            mss: None,
            scale: None,
        };
        if tcp.flags & flag::SYN != 0 {
            tcp.options(&b[LEN..header]);
        }
        Some(tcp)
    }

    /// Options; a malformed one ends them.
    fn options(&mut self, mut b: &[u8]) {
        while let [kind, rest @ ..] = b {
            match kind {
                0 => return,
                1 => b = rest,
                _ => {
                    let Some(len) =
                        rest.first().map(|l| usize::from(*l)).filter(|l| (2..=b.len()).contains(l))
                    else {
                        return;
                    };
                    match (kind, len) {
                        (2, 4) => self.mss = Some(be16(b, 2)),
                        // RFC 7323, 2.3: larger shifts count as 14.
                        (3, 3) => self.scale = Some(b[2].min(14)),
                        _ => {}
                    }
                    b = &b[len..];
                }
            }
        }
    }

    /// Writes ports, numbers, flags and window, with a checksum of zero; options of a SYN if they are given.
    /// Returns the length.
    pub fn write(&self, b: &mut [u8]) -> usize {
        b[..2].copy_from_slice(&self.src.to_be_bytes());
        b[2..4].copy_from_slice(&self.dst.to_be_bytes());
        b[4..8].copy_from_slice(&self.seq.to_be_bytes());
        b[8..12].copy_from_slice(&self.ack.to_be_bytes());
        let mut len = LEN;
        if let Some(mss) = self.mss {
            b[len..len + 2].copy_from_slice(&[2, 4]);
            b[len + 2..len + 4].copy_from_slice(&mss.to_be_bytes());
            len += 4;
        }
        if let Some(scale) = self.scale {
            b[len..len + 4].copy_from_slice(&[1, 3, 3, scale]);
            len += 4;
        }
        b[12] = (len as u8 / 4) << 4;
        b[13] = self.flags;
        b[14..16].copy_from_slice(&self.window.to_be_bytes());
        b[16..20].fill(0);
        len
    }
}

/// Whether sequence number `a` comes before `b`.
pub fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_parsed() {
        let syn = Tcp {
            src: 1,
            dst: 0xfffe,
            seq: 7,
            ack: u32::MAX,
            flags: flag::SYN | flag::ACK,
            window: 65535,
            header: 28,
            mss: Some(1460),
            scale: Some(7),
        };
        let mut b = [0xff; 28];
        assert_eq!(syn.write(&mut b), 28);
        assert_eq!(Tcp::parse(&b), Some(syn));
        assert_eq!(Tcp::parse(&b[..27]), None);
        assert!(before(u32::MAX, 0) && !before(0, 0) && before(5, 6));
    }

    proptest! {
        #[test]
        fn any_bytes(mut b in prop::collection::vec(any::<u8>(), 20..60), flags: u8) {
            b[12] = b[12] & 0x0f | ((b.len() / 4) as u8) << 4;
            b[13] = flags;
            let tcp = Tcp::parse(&b).unwrap();
            prop_assert!(tcp.header <= b.len());
        }
    }
}
