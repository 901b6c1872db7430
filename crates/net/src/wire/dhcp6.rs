//! DHCP for IPv6 (RFC 8415): what a server needs to tell clients their name servers and give them one address.

use super::{array, be16, be32};
use std::net::Ipv6Addr;

/// Ports of server and client.
pub const SERVER_PORT: u16 = 547;
/// The client's.
pub const CLIENT_PORT: u16 = 546;

/// Message types.
pub mod kind {
    /// A client looks for servers.
    pub const SOLICIT: u8 = 1;
    /// A server answers.
    pub const ADVERTISE: u8 = 2;
    /// A client asks for what was advertised.
    pub const REQUEST: u8 = 3;
    /// A client moved, and asks whether its address still holds.
    pub const CONFIRM: u8 = 4;
    /// A client prolongs its lease.
    pub const RENEW: u8 = 5;
    /// The same, of any server.
    pub const REBIND: u8 = 6;
    /// A server's answer.
    pub const REPLY: u8 = 7;
    /// A client gives its address back.
    pub const RELEASE: u8 = 8;
    /// A client found its address in use.
    pub const DECLINE: u8 = 9;
    /// A client wants options only.
    pub const INFORMATION: u8 = 11;
}

/// Option codes.
pub mod option {
    /// The client's identifier.
    pub const CLIENT_ID: u16 = 1;
    /// The server's.
    pub const SERVER_ID: u16 = 2;
    /// Addresses.
    pub const IA_NA: u16 = 3;
    /// An address among them.
    pub const IA_ADDR: u16 = 5;
    /// A result.
    pub const STATUS: u16 = 13;
    /// Answer with a reply at once.
    pub const RAPID_COMMIT: u16 = 14;
    /// Name servers (RFC 3646).
    pub const DNS: u16 = 23;
    /// Domains to search.
    pub const SEARCH: u16 = 24;
    /// Boot file's URL (RFC 5970).
    pub const BOOT_URL: u16 = 59;
}

/// A client's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// [`kind`].
    pub kind: u8,
    /// Transaction, 24 bits.
    pub xid: u32,
    /// The client's identifier, to be sent back.
    pub client_id: Vec<u8>,
    /// The server it addresses.
    pub server_id: Option<Vec<u8>>,
    /// Identifier of the set of addresses it wants, and those it has.
    pub addresses: Option<(u32, Vec<Ipv6Addr>)>,
    /// It takes a reply at once.
    pub rapid: bool,
}

/// Walks options; `None` if they are malformed.
fn options<'a>(mut b: &'a [u8], mut each: impl FnMut(u16, &'a [u8]) -> Option<()>) -> Option<()> {
    while !b.is_empty() {
        if b.len() < 4 {
            return None;
        }
        let value = b.get(4..4 + usize::from(be16(b, 2)))?;
        each(be16(b, 0), value)?;
        b = &b[4 + value.len()..];
    }
    Some(())
}

impl Request {
    /// Parses a UDP payload.
    pub fn parse(b: &[u8]) -> Option<Self> {
        if b.len() < 4 {
            return None;
        }
        let mut request = Self {
            kind: b[0],
            xid: be32(b, 0) & 0xff_ffff,
            client_id: Vec::new(),
            server_id: None,
            addresses: None,
            rapid: false,
        };
        options(&b[4..], |code, value| {
            match code {
                // RFC 8415, 11.1: at most 130 bytes.
                option::CLIENT_ID if value.len() <= 130 => request.client_id = value.to_vec(),
                option::SERVER_ID if value.len() <= 130 => request.server_id = Some(value.to_vec()),
                option::RAPID_COMMIT => request.rapid = true,
                option::IA_NA if value.len() >= 12 => {
                    let mut list = Vec::new();
                    options(&value[12..], |code, value| {
                        if code == option::IA_ADDR && value.len() >= 24 && list.len() < 8 {
                            list.push(Ipv6Addr::from(array::<16>(value, 0)));
                        }
                        Some(())
                    })?;
                    request.addresses = Some((be32(value, 0), list));
                }
                _ => {}
            }
            Some(())
        })?;
        Some(request)
    }
}

/// The server's answer.
#[derive(Clone, Debug)]
pub struct Reply(Vec<u8>);

impl Reply {
    /// An answer of a [`kind`].
    pub fn new(kind: u8, xid: u32) -> Self {
        let mut b = xid.to_be_bytes().to_vec();
        b[0] = kind;
        Self(b)
    }

    /// Adds an option; a value too long for one is left out.
    pub fn add(&mut self, code: u16, value: &[u8]) {
        if let Ok(len) = u16::try_from(value.len()) {
            self.0.extend_from_slice(&code.to_be_bytes());
            self.0.extend_from_slice(&len.to_be_bytes());
            self.0.extend_from_slice(value);
        }
    }

    /// The UDP payload.
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests() {
        let mut b = vec![1, 0, 1, 2, 0, 1, 0, 3, 9, 9, 9, 0, 14, 0, 0];
        b.extend([0, 3, 0, 12, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0]);
        let r = Request::parse(&b).unwrap();
        assert_eq!((r.kind, r.xid, r.client_id.as_slice(), r.rapid), (1, 0x102, &[9, 9, 9][..], true));
        assert_eq!(r.addresses, Some((7, vec![])));
        assert_eq!(Request::parse(&b[..b.len() - 1]), None);
    }

    proptest! {
        #[test]
        fn any_bytes(b in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::parse(&b);
        }
    }
}
