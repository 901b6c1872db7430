//! Address resolution for IPv4 over Ethernet (RFC 826).

use super::{array, be16, ethertype};
use crate::MacAddr;
use std::net::Ipv4Addr;

/// Length of a packet.
pub const LEN: usize = 28;
/// Operation: who has the target address?
pub const REQUEST: u16 = 1;
/// Operation: I have.
pub const REPLY: u16 = 2;

/// A packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// [`REQUEST`] or [`REPLY`].
    pub operation: u16,
    /// The sender's hardware address.
    pub sender_mac: MacAddr,
    /// The sender's protocol address.
    pub sender: Ipv4Addr,
    /// The target's hardware address (zero in requests).
    pub target_mac: MacAddr,
    /// The target's protocol address.
    pub target: Ipv4Addr,
}

impl Arp {
    /// Parses what follows the Ethernet header. `None`: not ARP for IPv4 over Ethernet.
    pub fn parse(b: &[u8]) -> Option<Self> {
        if b.len() < LEN || be16(b, 0) != 1 || be16(b, 2) != ethertype::IPV4 || b[4] != 6 || b[5] != 4 {
            return None;
        }
        Some(Self {
            operation: be16(b, 6),
            sender_mac: MacAddr(array(b, 8)),
            sender: Ipv4Addr::from(array::<4>(b, 14)),
            target_mac: MacAddr(array(b, 18)),
            target: Ipv4Addr::from(array::<4>(b, 24)),
        })
    }

    /// As it is sent.
    pub fn to_bytes(&self) -> [u8; LEN] {
        let mut b = [0; LEN];
        b[..6].copy_from_slice(&[0, 1, 8, 0, 6, 4]);
        b[6..8].copy_from_slice(&self.operation.to_be_bytes());
        b[8..14].copy_from_slice(&self.sender_mac.0);
        b[14..18].copy_from_slice(&self.sender.octets());
        b[18..24].copy_from_slice(&self.target_mac.0);
        b[24..].copy_from_slice(&self.target.octets());
        b
    }
}
