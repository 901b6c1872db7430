//! Names of exports.

use super::{
    socket::Socket,
    tls::{TlsClient, TlsCredentials},
};
use crate::{Error, Result};
use std::{collections::BTreeMap, net::TcpStream, os::unix::net::UnixStream, path::PathBuf, time::Duration};

/// Where an export is, and how to reach it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdAddress {
    /// A unix socket; otherwise TCP.
    pub socket: Option<PathBuf>,
    /// Host, for TCP.
    pub host: String,
    /// Port, for TCP.
    pub port: u16,
    /// Name of the export.
    pub export: String,
    /// Encrypt the connection.
    pub tls: Option<TlsClient>,
    /// How long to wait for a lost connection to come back before requests fail.
    pub reconnect_delay: Duration,
    /// How long to wait for the server when opening.
    pub open_timeout: Duration,
}

/// The default port.
const PORT: u16 = 10809;
/// Longest waits that options may ask for, in seconds.
const MAX_WAIT: u64 = 1 << 31;

impl Default for NbdAddress {
    fn default() -> Self {
        NbdAddress {
            socket: None,
            host: "localhost".into(),
            port: PORT,
            export: String::new(),
            tls: None,
            reconnect_delay: Duration::from_secs(1),
            open_timeout: Duration::ZERO,
        }
    }
}

impl NbdAddress {
    /// Reads `nbd://host:port/export`, `nbd+unix:///export?socket=path`, `nbd:host:port[:exportname=x]` and
    /// `nbd:unix:path[:exportname=x]`. With `nbds://` and `nbds+unix://` the connection is encrypted; credentials are named by
    /// `?tls-certificates=DIR`, `tls-hostname=NAME` and `tls-verify-peer=0`, and without a directory the host's certificate
    /// authorities are trusted.
    pub fn parse(name: &str) -> Result<Self> {
        let bad = || {
            Error::usage(format!(
                "Invalid NBD name '{name}'; use nbd://host[:port]/export or nbd+unix:///export?socket=path"
            ))
        };
        let Some((scheme, rest)) = name.split_once("://") else {
            return Self::parse_old(name).ok_or_else(bad);
        };
        let (unix, secure) = match scheme {
            "nbd" | "nbd+tcp" => (false, false),
            "nbd+unix" => (true, false),
            "nbds" | "nbds+tcp" => (false, true),
            "nbds+unix" => (true, true),
            _ => return Err(bad()),
        };
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut parameters = BTreeMap::new();
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(bad)?;
            parameters.insert(key, decode(value).ok_or_else(bad)?);
        }
        let mut address = NbdAddress::default();
        let export = if unix {
            address.socket = Some(parameters.remove("socket").ok_or_else(bad)?.into());
            address.host.clear();
            place.strip_prefix('/').unwrap_or(place)
        } else {
            let (server, export) = place.split_once('/').unwrap_or((place, ""));
            (address.host, address.port) = split_port(server).ok_or_else(bad)?;
            export
        };
        address.export = decode(export).ok_or_else(bad)?;
        if secure {
            let verify = match parameters.remove("tls-verify-peer").as_deref() {
                None | Some("1" | "on" | "true") => true,
                Some("0" | "off" | "false") => false,
                Some(_) => return Err(bad()),
            };
            let directory = parameters.remove("tls-certificates").map(PathBuf::from);
            address.tls = Some(TlsClient {
                credentials: TlsCredentials::client(directory, verify),
                hostname: parameters.remove("tls-hostname"),
            });
        }
        match parameters.keys().next() {
            Some(key) => Err(Error::usage(format!("'{name}': the parameter '{key}' is not known"))),
            None => Ok(address),
        }
    }

    fn parse_old(name: &str) -> Option<Self> {
        let rest = name.strip_prefix("nbd:")?;
        let (server, export) = match rest.split_once(":exportname=") {
            Some((server, export)) => (server, export.to_owned()),
            None => (rest, String::new()),
        };
        if let Some(path) = server.strip_prefix("unix:") {
            let socket = Some(path.into());
            return Some(NbdAddress { socket, host: String::new(), export, ..Default::default() });
        }
        let (host, port) = split_port(server)?;
        Some(NbdAddress { host, port, export, ..Default::default() })
    }

    /// Takes the options of QEMU's `nbd` driver (`host`, `port`, `path`, `server.*`, `export`, `tls-creds`, ...) out of a list.
    /// `credentials` are the TLS credentials that `tls-creds` may name.
    pub fn from_options(
        options: &mut BTreeMap<String, String>,
        credentials: &BTreeMap<String, TlsCredentials>,
    ) -> Result<Self> {
        let mut take = |key: &str| options.remove(key).or_else(|| options.remove(&format!("server.{key}")));
        let mut address = NbdAddress { socket: take("path").map(PathBuf::from), ..Default::default() };
        if address.socket.is_some() {
            address.host.clear();
        }
        if let Some(host) = take("host") {
            address.host = host;
        }
        if let Some(port) = take("port") {
            address.port = port.parse().map_err(|_| Error::usage(format!("Invalid port '{port}'")))?;
        }
        match take("type").as_deref() {
            None | Some("inet" | "unix") => {}
            Some(other) => {
                return Err(Error::usage(format!("NBD server type '{other}' is neither inet nor unix")));
            }
        }
        let mut seconds = |key: &str| -> Result<Option<Duration>> {
            take(key)
                .map(|v| {
                    let n = v.parse().ok().filter(|&n: &u64| n < MAX_WAIT);
                    n.map(Duration::from_secs)
                        .ok_or_else(|| Error::usage(format!("Parameter '{key}' expects seconds")))
                })
                .transpose()
        };
        if let Some(delay) = seconds("reconnect-delay")? {
            address.reconnect_delay = delay;
        }
        if let Some(timeout) = seconds("open-timeout")? {
            address.open_timeout = timeout;
        }
        address.export = take("export").unwrap_or_default();
        let hostname = take("tls-hostname");
        if let Some(id) = take("tls-creds") {
            let found = credentials
                .get(&id)
                .ok_or_else(|| Error::usage(format!("No TLS credentials with id '{id}'")))?;
            if found.server {
                return Err(Error::usage("Expecting TLS credentials with a client endpoint"));
            }
            address.tls = Some(TlsClient { credentials: found.clone(), hostname });
        } else if hostname.is_some() {
            return Err(Error::usage("tls-hostname needs tls-creds"));
        }
        Ok(address)
    }

    pub(super) fn connect(&self) -> std::io::Result<Socket> {
        Ok(match &self.socket {
            Some(path) => Socket::Unix(UnixStream::connect(path)?),
            None => Socket::Tcp(TcpStream::connect((self.host.as_str(), self.port))?),
        })
    }
}

impl std::fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.tls.is_some() { "nbds" } else { "nbd" };
        match &self.socket {
            Some(path) => write!(f, "{scheme}+unix:///{}?socket={}", self.export, path.display()),
            None => write!(f, "{scheme}://{}:{}/{}", self.host, self.port, self.export),
        }
    }
}

fn split_port(server: &str) -> Option<(String, u16)> {
    if server.is_empty() {
        return Some(("localhost".into(), PORT));
    }
    if let Some(rest) = server.strip_prefix('[') {
        let (host, tail) = rest.split_once(']')?;
        let port = match tail.strip_prefix(':') {
            Some(port) => port.parse().ok()?,
            None if tail.is_empty() => PORT,
            None => return None,
        };
        return Some((host.to_owned(), port));
    }
    match server.split_once(':') {
        Some((host, port)) => Some((host.to_owned(), port.parse().ok()?)),
        None => Some((server.to_owned(), PORT)),
    }
}

/// Takes %xx apart.
fn decode(text: &str) -> Option<String> {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b == b'%' {
            let digits = [bytes.next()?, bytes.next()?];
            out.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            out.push(b);
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let a = NbdAddress::parse("nbd+unix:///a%20b?socket=/tmp/s").unwrap();
        assert_eq!((a.socket.unwrap().to_str().unwrap(), a.export.as_str()), ("/tmp/s", "a b"));
        let a = NbdAddress::parse("nbd://[::1]:99/x/y").unwrap();
        assert_eq!((a.host.as_str(), a.port, a.export.as_str()), ("::1", 99, "x/y"));
        let a = NbdAddress::parse("nbd:unix:/tmp/s:exportname=e").unwrap();
        assert_eq!(a.export, "e");
        let a = NbdAddress::parse("nbd:h:1").unwrap();
        assert_eq!((a.host.as_str(), a.port), ("h", 1));
        assert_eq!(NbdAddress::parse("nbd://h").unwrap().port, PORT);
        let a = NbdAddress::parse("nbds://h/x?tls-certificates=/c&tls-hostname=n").unwrap();
        let tls = a.tls.unwrap();
        assert_eq!((tls.credentials.directory, tls.hostname), (Some("/c".into()), Some("n".into())));
        assert!(tls.credentials.verify_peer);
        for bad in
            ["nbd+unix:///x", "nbd:h:port", "http://x", "nbd://h/x?odd=1", "nbd://[::1]x/y", "nbd://h/%zz"]
        {
            assert!(NbdAddress::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn options() {
        let parse = |text: &str| {
            let mut map = crate::Options::parse(text).unwrap().into_map();
            let address = NbdAddress::from_options(&mut map, &BTreeMap::new());
            assert!(address.is_err() || map.is_empty(), "{map:?}");
            address
        };
        let a =
            parse("server.type=inet,server.host=h,server.port=7,export=e,reconnect-delay=5,open-timeout=2")
                .unwrap();
        assert_eq!((a.host.as_str(), a.port, a.export.as_str()), ("h", 7, "e"));
        assert_eq!((a.reconnect_delay, a.open_timeout), (Duration::from_secs(5), Duration::from_secs(2)));
        assert_eq!(parse("path=/s").unwrap().socket, Some("/s".into()));
        assert!(parse("host=h,tls-creds=none").is_err());
        assert!(parse("host=h,reconnect-delay=x").is_err());
    }
}
