//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// A sum under way. Pieces are added in order; each but the last has an even length.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes.
    #[must_use]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        let mut sum = u128::from(self.0);
        let (words, rest) = bytes.as_chunks::<8>();
        // Sums of 64-bit words fold to the same as sums of 16-bit words; the wide accumulator keeps all carries.
        for word in words {
            sum += u128::from(u64::from_be_bytes(*word));
        }
        for pair in rest.chunks(2) {
            sum += u128::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
        let sum = (sum & u128::from(u64::MAX)) + (sum >> 64);
        let sum = (sum & u128::from(u64::MAX)) + (sum >> 64);
        Self(fold32(sum as u64))
    }

    /// Adds a 16-bit value.
    #[must_use]
    pub fn word(self, value: u16) -> Self {
        Self(fold32(self.0) + u64::from(value))
    }

    /// The sum, not complemented: what a partial checksum holds.
    pub fn partial(self) -> u16 {
        let mut sum = fold32(self.0);
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    /// The checksum field. Over data that includes a right checksum it is 0.
    pub fn finish(self) -> u16 {
        !self.partial()
    }
}

fn fold32(sum: u64) -> u64 {
    (sum & 0xffff_ffff) + (sum >> 32)
}

/// The sum over the pseudo-header of TCP, UDP and ICMPv6 (RFC 9293, 3.1; RFC 8200, 8.1). Addresses of different
/// families do not occur.
pub fn pseudo_header(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> Sum {
    let sum = match (src, dst) {
        (IpAddr::V4(s), IpAddr::V4(d)) => Sum::default().bytes(&s.octets()).bytes(&d.octets()),
        (IpAddr::V6(s), IpAddr::V6(d)) => Sum::default().bytes(&s.octets()).bytes(&d.octets()),
        _ => Sum::default(),
    };
    sum.bytes(&(len as u32).to_be_bytes()).word(protocol.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_header() {
        // The example of RFC 1071, section 3.
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::default().bytes(&data).partial(), 0xddf2);
    }

    proptest! {
        #[test]
        fn as_the_definition_says(data in prop::collection::vec(any::<u8>(), 0..300), split in 0usize..150) {
            let mut slow = 0u64;
            for pair in data.chunks(2) {
                slow += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            }
            while slow > 0xffff {
                slow = (slow & 0xffff) + (slow >> 16);
            }
            let at = (split * 2).min(data.len() & !1);
            let fast = Sum::default().bytes(&data[..at]).bytes(&data[at..]).partial();
            prop_assert_eq!(u64::from(fast), slow);
        }
    }
}
