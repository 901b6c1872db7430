//! The header before each frame (virtio 1.2, 5.1.6), which also tap devices speak.

use bitflags::bitflags;

bitflags! {
    /// What one side leaves to the other.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// Checksums that are not filled in.
        const CSUM = 1;
        /// TCP segments over IPv4 larger than the link's.
        const TSO4 = 1 << 1;
        /// TCP segments over IPv6 larger than the link's.
        const TSO6 = 1 << 2;
        /// Large TCP segments with congestion marks.
        const ECN = 1 << 3;
        /// Large UDP datagrams to be fragmented.
        const UFO = 1 << 4;
        /// Several UDP datagrams of one size in one, over IPv4.
        const USO4 = 1 << 5;
        /// The same over IPv6.
        const USO6 = 1 << 6;
    }
}

/// `virtio_net_hdr_v1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// [`Self::NEEDS_CSUM`], [`Self::DATA_VALID`].
    pub flags: u8,
    /// How to segment the frame; [`Self::ECN`] is a flag beside.
    pub gso_type: u8,
    /// Length of all headers of a frame to be segmented. A hint.
    pub hdr_len: u16,
    /// Payload of each segment.
    pub gso_size: u16,
    /// Where the checksum starts to be computed, from the start of the Ethernet frame.
    pub csum_start: u16,
    /// Where it is stored, from there.
    pub csum_offset: u16,
    /// Guest buffers that the frame takes, filled in by the device.
    pub num_buffers: u16,
}

impl VnetHeader {
    /// Length in bytes.
    pub const LEN: usize = 12;
    /// The checksum is that of the pseudo-header only.
    pub const NEEDS_CSUM: u8 = 1;
    /// The checksum has been verified.
    pub const DATA_VALID: u8 = 2;
    /// Not to be segmented.
    pub const GSO_NONE: u8 = 0;
    /// TCP over IPv4.
    pub const GSO_TCPV4: u8 = 1;
    /// UDP to be fragmented.
    pub const GSO_UDP: u8 = 3;
    /// TCP over IPv6.
    pub const GSO_TCPV6: u8 = 4;
    /// UDP datagrams of one size.
    pub const GSO_UDP_L4: u8 = 5;
    /// Flag in `gso_type`: TCP with CWR set, which only the first segment keeps.
    pub const ECN: u8 = 0x80;

    /// As it lies in memory.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut b = [0; Self::LEN];
        b[0] = self.flags;
        b[1] = self.gso_type;
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        for (i, word) in words.into_iter().enumerate() {
            b[2 + 2 * i..4 + 2 * i].copy_from_slice(&word.to_le_bytes());
        }
        b
    }

    /// From memory.
    pub fn from_bytes(b: &[u8; Self::LEN]) -> Self {
        let word = |i: usize| u16::from_le_bytes([b[i], b[i + 1]]);
        Self {
            flags: b[0],
            gso_type: b[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }

    /// The kind of segmentation without the congestion flag.
    pub fn gso(&self) -> u8 {
        self.gso_type & !Self::ECN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_back() {
        let header = VnetHeader {
            flags: 1,
            gso_type: 4,
            hdr_len: 74,
            gso_size: 1440,
            csum_start: 54,
            csum_offset: 16,
            num_buffers: 3,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes, [1, 4, 74, 0, 0xa0, 5, 54, 0, 16, 0, 3, 0]);
        assert_eq!(VnetHeader::from_bytes(&bytes), header);
    }
}
