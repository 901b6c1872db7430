//! From the first byte until a viewer is let in (RFC 6143, 7.1 to 7.3; VeNCrypt).

use super::auth::{self, CHALLENGE};
use super::server::Options;
use super::transport::{Link, Rx};
use rustls::{ServerConfig, ServerConnection};
use std::io;
use std::sync::Arc;

const NONE: u8 = 1;
const VNC: u8 = 2;
const VENCRYPT: u8 = 19;

const X509_NONE: u32 = 260;
const X509_VNC: u32 = 261;

/// A version of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Version {
    V3_3,
    V3_7,
    V3_8,
}

fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

fn version(raw: &[u8; 12]) -> io::Result<Version> {
    let number = |at: usize| std::str::from_utf8(&raw[at..at + 3]).ok().and_then(|t| t.parse::<u16>().ok());
    match (raw.starts_with(b"RFB "), number(4), number(8), raw[7], raw[11]) {
        (true, Some(3), Some(8..), b'.', b'\n') => Ok(Version::V3_8),
        (true, Some(4..), Some(_), b'.', b'\n') => Ok(Version::V3_8),
        (true, Some(3), Some(7), b'.', b'\n') => Ok(Version::V3_7),
        (true, Some(3), Some(_), b'.', b'\n') => Ok(Version::V3_3),
        _ => Err(bad("not a VNC viewer")),
    }
}

/// What protects the server.
pub(super) struct Protection {
    pub(super) password: Option<String>,
    /// A password is wanted, whether or not it has been set.
    pub(super) wants_password: bool,
    pub(super) tls: Option<Arc<ServerConfig>>,
}

impl Protection {
    pub(super) fn new(options: &Options, password: Option<String>) -> Self {
        Self { wants_password: options.password || password.is_some(), password, tls: options.tls.clone() }
    }
}

fn refuse(link: &Link, version: Version, reason: &str) -> io::Error {
    let mut out = match version {
        Version::V3_3 => vec![0, 0, 0, 0],
        _ => vec![0],
    };
    out.extend((reason.len() as u32).to_be_bytes());
    out.extend_from_slice(reason.as_bytes());
    let _ = link.send(&out); // it is let go in any case
    bad(reason)
}

/// Does everything up to the security result. A viewer that may not come in gets a reason and an error is returned.
pub(super) fn authenticate(link: &mut Link, protection: &Protection) -> io::Result<()> {
    link.send(b"RFB 003.008\n")?;
    let version = version(&Rx::cautious(&mut *link).array()?)?;
    // Inside TLS already (a secure WebSocket) no more of it is needed.
    let tls = protection.tls.as_ref().filter(|_| !link.has_tls());
    if version == Version::V3_3 {
        if tls.is_some() {
            return Err(refuse(link, version, "this server wants encryption, which RFB 3.3 does not know"));
        }
        let security = if protection.wants_password { VNC } else { NONE };
        link.send(&u32::from(security).to_be_bytes())?;
        return password(link, version, protection);
    }
    let security = match (tls, protection.wants_password) {
        (Some(_), _) => VENCRYPT,
        (None, true) => VNC,
        (None, false) => NONE,
    };
    link.send(&[1, security])?;
    let chosen = Rx::cautious(&mut *link).u8()?;
    if chosen != security {
        return Err(bad(format!("security type {chosen} was not offered")));
    }
    if let Some(tls) = tls {
        vencrypt(link, tls, protection)?;
    }
    password(link, version, protection)
}

fn vencrypt(link: &mut Link, tls: &Arc<ServerConfig>, protection: &Protection) -> io::Result<()> {
    link.send(&[0, 2])?;
    let version: [u8; 2] = Rx::cautious(&mut *link).array()?;
    if version != [0, 2] {
        link.send(&[0xff])?;
        return Err(bad(format!("VeNCrypt {}.{} is not spoken here, only 0.2", version[0], version[1])));
    }
    let kind = if protection.wants_password { X509_VNC } else { X509_NONE };
    let mut out = vec![0, 1];
    out.extend(kind.to_be_bytes());
    link.send(&out)?;
    let chosen = Rx::cautious(&mut *link).u32()?;
    if chosen != kind {
        link.send(&[0])?;
        return Err(bad(format!("VeNCrypt subtype {chosen} was not offered")));
    }
    link.send(&[1])?;
    let connection = ServerConnection::new(tls.clone()).map_err(io::Error::other)?;
    link.start_tls(connection)
}

/// The password, if one is wanted, and the result.
fn password(link: &mut Link, version: Version, protection: &Protection) -> io::Result<()> {
    if !protection.wants_password {
        // Before 3.8 no result is sent where nothing was asked for.
        return if version == Version::V3_8 { link.send(&[0; 4]) } else { Ok(()) };
    }
    let mut challenge = [0; CHALLENGE];
    rustix::rand::getrandom(&mut challenge, rustix::rand::GetRandomFlags::empty())?;
    link.send(&challenge)?;
    let response = Rx::cautious(&mut *link).array()?;
    let right = protection
        .password
        .as_ref()
        .is_some_and(|password| auth::equal(&response, &auth::response(password, &challenge)));
    if right {
        return link.send(&[0; 4]);
    }
    let mut out = vec![0, 0, 0, 1];
    if version == Version::V3_8 {
        let reason = b"the password is wrong";
        out.extend((reason.len() as u32).to_be_bytes());
        out.extend_from_slice(reason);
    }
    link.send(&out)?;
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "the password is wrong"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        for (text, wanted) in [
            ("RFB 003.003\n", Version::V3_3),
            ("RFB 003.005\n", Version::V3_3),
            ("RFB 003.007\n", Version::V3_7),
            ("RFB 003.008\n", Version::V3_8),
            ("RFB 003.889\n", Version::V3_8),
            ("RFB 004.001\n", Version::V3_8),
        ] {
            assert_eq!(version(text.as_bytes().try_into().unwrap()).unwrap(), wanted, "{text}");
        }
        for text in ["GET / HTTP/1", "RFB 002.000\n", "RFB 003,008\n", "RFB xxx.yyy\n"] {
            assert!(version(text.as_bytes().try_into().unwrap()).is_err(), "{text}");
        }
    }
}
