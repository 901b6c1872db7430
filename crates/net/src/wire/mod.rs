//! Packet formats: parsing what others sent, building our own. Every length is checked; nothing here allocates for
//! what a packet claims.

pub mod arp;
mod checksum;
pub mod dhcp;
pub mod dhcp6;
pub mod icmp;
pub mod ip;
pub mod ndp;
pub mod reassembly;
pub mod tcp;

pub use checksum::{Sum, pseudo_header};

/// Length of an Ethernet header.
pub const ETHERNET: usize = 14;

/// Types of Ethernet frames (IEEE 802).
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// A tag of a virtual LAN.
    pub const VLAN: u16 = 0x8100;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
}

/// IP protocol numbers (IANA).
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
}

/// Big-endian 16 bits at `at`; the caller has checked that they are there.
#[inline]
pub fn be16(b: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([b[at], b[at + 1]])
}

/// Big-endian 32 bits at `at`; the caller has checked that they are there.
#[inline]
pub fn be32(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// The `N` bytes at `at`; the caller has checked that they are there.
#[inline]
pub fn array<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    let mut a = [0; N];
    a.copy_from_slice(&b[at..at + N]);
    a
}
