//! ICMP (RFC 792) and the error messages of ICMPv6 (RFC 4443).

use super::{Sum, be16, pseudo_header};
use std::net::IpAddr;

/// Type: echo request, ICMPv4.
pub const ECHO_REQUEST: u8 = 8;
/// Type: echo reply, ICMPv4.
pub const ECHO_REPLY: u8 = 0;
/// Type: echo request, ICMPv6.
pub const ECHO_REQUEST_V6: u8 = 128;
/// Type: echo reply, ICMPv6.
pub const ECHO_REPLY_V6: u8 = 129;

/// Why a packet did not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    /// No route to the network.
    Network,
    /// The host does not answer.
    Host,
    /// Nobody listens on the port.
    Port,
    /// A firewall does not allow it.
    Prohibited,
}

impl Unreachable {
    /// Type and code for an address family.
    pub fn codes(self, v6: bool) -> (u8, u8) {
        match (v6, self) {
            (false, Self::Network) => (3, 0),
            (false, Self::Host) => (3, 1),
            (false, Self::Port) => (3, 3),
            (false, Self::Prohibited) => (3, 13),
            (true, Self::Network) => (1, 0),
            (true, Self::Host) => (1, 3),
            (true, Self::Port) => (1, 4),
            (true, Self::Prohibited) => (1, 1),
        }
    }
}

/// An echo request or reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echo {
    /// Identifier.
    pub id: u16,
    /// Sequence number.
    pub sequence: u16,
}

/// Parses an echo request at the start of a message.
pub fn echo_request(b: &[u8], v6: bool) -> Option<Echo> {
    let wanted = if v6 { ECHO_REQUEST_V6 } else { ECHO_REQUEST };
    if b.len() < 8 || b[0] != wanted || b[1] != 0 {
        return None;
    }
    Some(Echo { id: be16(b, 4), sequence: be16(b, 6) })
}

/// Fills in the checksum of a message.
pub fn finish(b: &mut [u8], src: IpAddr, dst: IpAddr) {
    b[2..4].fill(0);
    let start = match src {
        IpAddr::V4(_) => Sum::default(),
        IpAddr::V6(_) => pseudo_header(src, dst, super::protocol::ICMPV6, b.len()),
    };
    let sum = start.bytes(b).finish();
    b[2..4].copy_from_slice(&sum.to_be_bytes());
}

/// An "unreachable" message about a packet that started with `original` (IP header and some payload). It goes from
/// `src` to `dst`.
pub fn unreachable(why: Unreachable, original: &[u8], src: IpAddr, dst: IpAddr) -> Vec<u8> {
    let v6 = src.is_ipv6();
    // IPv4 hosts expect the header and 8 bytes at least; neither message may be long.
    let original = &original[..original.len().min(if v6 { 1000 } else { 128 })];
    let (kind, code) = why.codes(v6);
    let mut b = vec![kind, code, 0, 0, 0, 0, 0, 0];
    b.extend_from_slice(original);
    finish(&mut b, src, dst);
    b
}
