//! DHCP for IPv4 (RFC 2131, 2132), which also answers BOOTP clients (RFC 951).

use super::{array, be16, be32};
use crate::MacAddr;
use std::net::Ipv4Addr;

/// Ports of server and client.
pub const SERVER_PORT: u16 = 67;
/// The client's.
pub const CLIENT_PORT: u16 = 68;

/// Length of the fixed part, with the magic number.
const FIXED: usize = 240;
const MAGIC: u32 = 0x6382_5363;

/// Option codes (RFC 2132).
pub mod option {
    /// Subnet mask.
    pub const MASK: u8 = 1;
    /// Routers.
    pub const ROUTER: u8 = 3;
    /// Name servers.
    pub const DNS: u8 = 6;
    /// The client's host name.
    pub const HOST_NAME: u8 = 12;
    /// Domain name.
    pub const DOMAIN: u8 = 15;
    /// Largest IP packet.
    pub const MTU: u8 = 26;
    /// Broadcast address.
    pub const BROADCAST: u8 = 28;
    /// Address that the client asks for.
    pub const REQUESTED: u8 = 50;
    /// Seconds that the lease lasts.
    pub const LEASE: u8 = 51;
    /// Message type.
    pub const TYPE: u8 = 53;
    /// The server.
    pub const SERVER: u8 = 54;
    /// A text for people.
    pub const MESSAGE: u8 = 56;
    /// Longest message that the client takes.
    pub const MAX_SIZE: u8 = 57;
    /// TFTP server's name.
    pub const TFTP_SERVER: u8 = 66;
    /// Boot file's name.
    pub const BOOT_FILE: u8 = 67;
    /// Domains to search (RFC 3397).
    pub const SEARCH: u8 = 119;
}

/// Message types (RFC 2132, 9.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs)] // the protocol's own names
pub enum Kind {
    Discover = 1,
    Offer = 2,
    Request = 3,
    Decline = 4,
    Ack = 5,
    Nak = 6,
    Release = 7,
    Inform = 8,
}

/// A client's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `None` for BOOTP.
    pub kind: Option<Kind>,
    /// Transaction.
    pub xid: u32,
    /// Flags; 0x8000 asks for a broadcast answer.
    pub flags: u16,
    /// The address that the client has.
    pub client: Ipv4Addr,
    /// The relay.
    pub relay: Ipv4Addr,
    /// The client's hardware address.
    pub mac: MacAddr,
    /// The address it asks for.
    pub requested: Option<Ipv4Addr>,
    /// The server it chose.
    pub server: Option<Ipv4Addr>,
    /// Its name.
    pub host_name: Option<String>,
}

impl Request {
    /// Parses a UDP payload. `None`: not a request of an Ethernet client.
    pub fn parse(b: &[u8]) -> Option<Self> {
        if b.len() < FIXED - 4 || b[0] != 1 || b[1] != 1 || b[2] != 6 {
            return None;
        }
        let mut request = Self {
            kind: None,
            xid: be32(b, 4),
            flags: be16(b, 10),
            client: Ipv4Addr::from(array::<4>(b, 12)),
            relay: Ipv4Addr::from(array::<4>(b, 24)),
            mac: MacAddr(array(b, 28)),
            requested: None,
            server: None,
            host_name: None,
        };
        if b.len() < FIXED || be32(b, FIXED - 4) != MAGIC {
            return Some(request); // BOOTP
        }
        let mut at = FIXED;
        while let Some(&code) = b.get(at) {
            match code {
                0 => at += 1,
                255 => break,
                _ => {
                    let value = b.get(at + 1).and_then(|n| b.get(at + 2..at + 2 + usize::from(*n)))?;
                    request.option(code, value)?;
                    at += 2 + value.len();
                }
            }
        }
        Some(request)
    }

    fn option(&mut self, code: u8, value: &[u8]) -> Option<()> {
        let addr = || Some(Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?));
        match code {
            option::TYPE => {
                self.kind = Some(match value {
                    [1] => Kind::Discover,
                    [3] => Kind::Request,
                    [4] => Kind::Decline,
                    [7] => Kind::Release,
                    [8] => Kind::Inform,
                    _ => return None,
                });
            }
            option::REQUESTED => self.requested = Some(addr()?),
            option::SERVER => self.server = Some(addr()?),
            option::HOST_NAME => {
                // Only what may stand in a name; the rest is not shown to anyone.
                let name: String =
                    value.iter().map(|b| *b as char).take_while(|c| c.is_ascii_graphic()).collect();
                self.host_name = Some(name).filter(|n| !n.is_empty());
            }
            _ => {}
        }
        Some(())
    }
}

/// The server's answer.
#[derive(Clone, Debug)]
pub struct Reply(Vec<u8>);

impl Reply {
    /// An answer to `request`. `kind` is `None` for BOOTP; `yours` is the client's address (unspecified in a refusal),
    /// `next` the server to boot from, `file` the file to boot.
    pub fn new(request: &Request, kind: Option<Kind>, yours: Ipv4Addr, next: Ipv4Addr, file: &str) -> Self {
        let mut b = vec![0; FIXED];
        b[..3].copy_from_slice(&[2, 1, 6]);
        b[4..8].copy_from_slice(&request.xid.to_be_bytes());
        b[10..12].copy_from_slice(&request.flags.to_be_bytes());
        if kind != Some(Kind::Nak) {
            b[12..16].copy_from_slice(&request.client.octets());
        }
        b[16..20].copy_from_slice(&yours.octets());
        b[20..24].copy_from_slice(&next.octets());
        b[24..28].copy_from_slice(&request.relay.octets());
        b[28..34].copy_from_slice(&request.mac.0);
        let file = &file.as_bytes()[..file.len().min(127)];
        b[108..108 + file.len()].copy_from_slice(file);
        b[FIXED - 4..].copy_from_slice(&MAGIC.to_be_bytes());
        let mut reply = Self(b);
        if let Some(kind) = kind {
            reply.add(option::TYPE, &[kind as u8]);
        }
        reply
    }

    /// Adds an option; a value too long for one is left out.
    pub fn add(&mut self, code: u8, value: &[u8]) {
        if let Ok(len) = u8::try_from(value.len()) {
            self.0.extend_from_slice(&[code, len]);
            self.0.extend_from_slice(value);
        }
    }

    /// The UDP payload, not shorter than BOOTP clients expect.
    pub fn finish(mut self) -> Vec<u8> {
        self.0.push(255);
        let len = self.0.len().max(300);
        self.0.resize(len, 0);
        self.0
    }
}

/// Domain names as DNS and the search option have them, not compressed. Names that cannot be written so are left out.
pub fn encode_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<u8> {
    let mut out = Vec::new();
    for name in names {
        let labels: Vec<&str> = name.trim_end_matches('.').split('.').collect();
        if name.len() > 253 || labels.iter().any(|l| l.is_empty() || l.len() > 63) {
            continue;
        }
        for label in labels {
            out.push(label.len() as u8); // at most 63
            out.extend_from_slice(label.as_bytes());
        }
        out.push(0);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A client's message with options.
    fn message(options: &[(u8, &[u8])]) -> Vec<u8> {
        let mut b = vec![0; FIXED];
        b[..3].copy_from_slice(&[1, 1, 6]);
        b[4..8].copy_from_slice(&[1, 2, 3, 4]);
        b[28..34].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        b[FIXED - 4..].copy_from_slice(&MAGIC.to_be_bytes());
        for (code, value) in options {
            b.extend_from_slice(&[*code, value.len() as u8]);
            b.extend_from_slice(value);
        }
        b.push(255);
        b
    }

    #[test]
    fn requests() {
        let b = message(&[(53, &[3]), (50, &[10, 0, 2, 15]), (54, &[10, 0, 2, 2]), (12, b"box\x1b[1m")]);
        let r = Request::parse(&b).unwrap();
        assert_eq!((r.kind, r.xid, r.mac), (Some(Kind::Request), 0x0102_0304, MacAddr([2, 0, 0, 0, 0, 1])));
        assert_eq!((r.requested, r.server), (Some([10, 0, 2, 15].into()), Some([10, 0, 2, 2].into())));
        assert_eq!(r.host_name.as_deref(), Some("box"));
        assert_eq!(Request::parse(&message(&[(53, &[9])])), None);
        assert_eq!(Request::parse(&message(&[(53, &[1, 1])])), None);
        let mut cut = message(&[(53, &[1]), (50, &[10, 0, 2, 15])]);
        cut.truncate(cut.len() - 3);
        assert_eq!(Request::parse(&cut), None);
        assert_eq!(Request::parse(&b[..236]).unwrap().kind, None);
    }

    #[test]
    fn names() {
        assert_eq!(encode_names(["a.bc", "", "x..y"]), b"\x01a\x02bc\0");
    }

    proptest! {
        #[test]
        fn any_bytes(head in prop::collection::vec(any::<u8>(), 0..300), valid: bool) {
            let mut b = if valid { message(&[]) } else { vec![] };
            b.pop();
            b.extend(head);
            let _ = Request::parse(&b);
        }
    }
}
