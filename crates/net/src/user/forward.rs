//! Forwarded ports: of the host's to the guest, and of addresses that the guest sees to programs and sockets.

use super::config::Config;
use super::slab::Slab;
use super::{Events, Shared};
use crate::{Error, Result, sys};
use rustix::event::epoll::EventFlags;
use rustix::net::SocketType;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// Connections accepted in one go.
const BATCH: usize = 64;

/// What a port is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// `hostfwd=`: a port of the host's that leads to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostForward {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where the host listens.
    pub host: SocketAddr,
    /// Where it leads.
    pub guest: (IpAddr, u16),
}

/// `guestfwd=`: an address that the guest sees and that leads to something of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestForward {
    /// The address and port.
    pub server: (IpAddr, u16),
    /// Where it leads.
    pub to: GuestTarget,
}

/// Where a [`GuestForward`] leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestTarget {
    /// A program, started for each connection, which is its standard input and output.
    Command(String),
    /// A TCP server.
    Tcp(SocketAddr),
    /// A server on a local socket.
    Unix(PathBuf),
}

/// Splits `ADDRESS:PORT`, where the address may be empty or in brackets.
fn host_and_port(text: &str) -> Option<(Option<IpAddr>, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let port = port.parse().ok()?;
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if host.is_empty() {
        return Some((None, port));
    }
    Some((Some(host.parse().ok()?), port))
}

fn protocol(text: &str) -> Option<Protocol> {
    match text {
        "tcp" | "" => Some(Protocol::Tcp),
        "udp" => Some(Protocol::Udp),
        _ => None,
    }
}

impl HostForward {
    /// Parses `PROTOCOL:[ADDRESS]:PORT-[ADDRESS]:PORT`.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(text: &str, config: &Config) -> Result<Self> {
        let bad = |why: &str| {
            Error::Config(format!(
                "netdev user: hostfwd={text}: {why}; use PROTOCOL:[ADDRESS]:PORT-[ADDRESS]:PORT, such as tcp::2222-:22"
            ))
        };
        let (kind, rest) = text.split_once(':').ok_or_else(|| bad("no protocol"))?;
        let protocol = protocol(kind).ok_or_else(|| bad("the protocol must be tcp or udp"))?;
        // Address literals have no '-'.
        let (host, guest) = rest.split_once('-').ok_or_else(|| bad("no '-' between host and guest"))?;
        let (host, host_port) =
            host_and_port(host).ok_or_else(|| bad("the host's side is not ADDRESS:PORT"))?;
        let (guest, port) =
            host_and_port(guest).ok_or_else(|| bad("the guest's side is not ADDRESS:PORT"))?;
        if port == 0 {
            return Err(bad("the guest's port must not be 0"));
        }
        let guest = match (guest, config.v4) {
            (Some(ip), _) if config.is_ours(ip) => return Err(bad("that is the host's own address")),
            (Some(ip), _) if !config.is_local(ip) => {
                return Err(bad("the guest's address is not in its network"));
            }
            (Some(ip), _) => ip,
            (None, Some(net)) => net.first.into(),
            (None, None) => return Err(bad("without IPv4 the guest's address must be given")),
        };
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        Ok(Self { protocol, host: SocketAddr::new(host.unwrap_or(any), host_port), guest: (guest, port) })
    }
}

impl GuestForward {
    /// Parses `tcp:ADDRESS:PORT-TARGET`.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(text: &str, config: &Config) -> Result<Self> {
        let bad = |why: &str| {
            Error::Config(format!(
                "netdev user: guestfwd={text}: {why}; use tcp:ADDRESS:PORT-TARGET, where TARGET is cmd:COMMAND, \
                 tcp:ADDRESS:PORT or unix:PATH"
            ))
        };
        let (kind, rest) = text.split_once(':').ok_or_else(|| bad("no protocol"))?;
        if protocol(kind) != Some(Protocol::Tcp) {
            return Err(bad("the protocol must be tcp"));
        }
        let (server, target) = rest.split_once('-').ok_or_else(|| bad("no '-' before the target"))?;
        let Some((Some(ip), port)) = host_and_port(server) else {
            return Err(bad("the server is not ADDRESS:PORT"));
        };
        if !config.is_local(ip) || port == 0 {
            return Err(bad("the server's address is not in the guest's network"));
        }
        let to = match target.split_once(':') {
            Some(("cmd", command)) if !command.is_empty() => GuestTarget::Command(command.into()),
            Some(("unix", path)) if !path.is_empty() => GuestTarget::Unix(path.into()),
            Some(("tcp", address)) => match host_and_port(address) {
                Some((Some(ip), port)) => GuestTarget::Tcp((ip, port).into()),
                _ => return Err(bad("the target is not ADDRESS:PORT")),
            },
            _ => return Err(bad("unknown target")),
        };
        Ok(Self { server: (ip, port), to })
    }
}

/// A forward at work.
pub(super) struct Listener {
    pub(super) forward: HostForward,
    pub(super) socket: OwnedFd,
}

/// All forwards.
pub(super) struct Forwards {
    pub(super) listeners: Slab<Listener>,
    guests: Vec<GuestForward>,
    children: Vec<Child>,
}

impl Forwards {
    pub(super) fn new(guests: Vec<GuestForward>) -> Self {
        Self { listeners: Slab::new(), guests, children: Vec::new() }
    }

    /// Starts to listen.
    pub(super) fn add(&mut self, forward: HostForward, events: &Events) -> Result<()> {
        let kind = match forward.protocol {
            Protocol::Tcp => SocketType::STREAM,
            Protocol::Udp => SocketType::DGRAM,
        };
        let what = || format!("netdev user: hostfwd: cannot listen at {}", forward.host);
        let socket = sys::bind(forward.host, kind).map_err(Error::host(what()))?;
        let id = self.listeners.insert(Listener { forward, socket });
        let socket = self.listeners.get(id).map(|l| l.socket.as_fd());
        match socket.map(|s| events.add(s, Events::LISTENER, id, EventFlags::IN)) {
            Some(Err(e)) => {
                self.listeners.remove(id);
                Err(Error::host(what())(e))
            }
            _ => Ok(()),
        }
    }

    /// Stops to listen; `false` if there is no such forward. Connections stay.
    pub(super) fn remove(&mut self, protocol: Protocol, host: SocketAddr) -> bool {
        let found =
            self.listeners.iter().find(|(_, l)| (l.forward.protocol, l.forward.host) == (protocol, host));
        match found.map(|(id, _)| id) {
            Some(id) => self.listeners.remove(id).is_some(),
            None => false,
        }
    }

    /// Whether an address is one that we answer for.
    pub(super) fn serves(&self, ip: IpAddr) -> bool {
        self.guests.iter().any(|g| g.server.0 == ip)
    }

    /// Connects to where an address leads, if it is forwarded.
    pub(super) fn connect(&mut self, ip: IpAddr, port: u16) -> Option<io::Result<OwnedFd>> {
        let to = &self.guests.iter().find(|g| g.server == (ip, port))?.to;
        Some(match to {
            GuestTarget::Tcp(to) => {
                sys::socket(to.ip(), SocketType::STREAM, None).and_then(|s| sys::connect(&s, *to).map(|_| s))
            }
            GuestTarget::Unix(path) => UnixStream::connect(path).and_then(|s| {
                s.set_nonblocking(true)?;
                Ok(s.into())
            }),
            GuestTarget::Command(command) => {
                self.children.retain_mut(|c| matches!(c.try_wait(), Ok(None)));
                spawn(command).map(|(socket, child)| {
                    self.children.push(child);
                    socket
                })
            }
        })
    }
}

impl Drop for Forwards {
    fn drop(&mut self) {
        for child in &mut self.children {
            // Their input has ended; those that have not do so now.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn spawn(command: &str) -> io::Result<(OwnedFd, Child)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let output = OwnedFd::from(theirs.try_clone()?);
    let child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::from(output))
        .spawn()?;
    Ok((ours.into(), child))
}

/// The peer of a forwarded connection as the guest sees it: those it could not answer are shown as the host.
pub(super) fn visible(peer: SocketAddr, guest: IpAddr, config: &Config) -> (IpAddr, u16) {
    let hidden = peer.is_ipv4() != guest.is_ipv4()
        || peer.ip().is_loopback()
        || peer.ip().is_unspecified()
        || config.is_local(peer.ip());
    let ip = if hidden { config.host(guest).unwrap_or(peer.ip()) } else { peer.ip() };
    (ip, peer.port())
}

/// Accepts what waits at a listener; `each` gets socket and peer.
pub(super) fn accept(
    socket: BorrowedFd<'_>,
    shared: &mut Shared<'_>,
    mut each: impl FnMut(OwnedFd, SocketAddr, &mut Shared<'_>),
) {
    use rustix::net::{SocketFlags, acceptfrom_with};
    for _ in 0..BATCH {
        match acceptfrom_with(socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok((connection, peer)) => {
                if let Some(peer) = peer.and_then(|p| SocketAddr::try_from(p).ok()) {
                    each(connection, peer, shared);
                }
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
            Err(rustix::io::Errno::AGAIN) => return,
            Err(e) => return shared.limit(&format!("sockets ({e})")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::user::config::Spec;

    #[test]
    fn host_forwards() {
        let config = Config::new(&Spec::default()).unwrap();
        let f = HostForward::parse("tcp::2222-:22", &config).unwrap();
        assert_eq!((f.protocol, f.host.to_string().as_str()), (Protocol::Tcp, "0.0.0.0:2222"));
        assert_eq!(f.guest, (IpAddr::from([10, 0, 2, 15]), 22));
        let f = HostForward::parse("udp:[::1]:53-[fec0::9]:5353", &config).unwrap();
        assert_eq!((f.protocol, f.host), (Protocol::Udp, "[::1]:53".parse().unwrap()));
        assert_eq!(f.guest, ("fec0::9".parse().unwrap(), 5353));
        for bad in [
            "",
            "tcp",
            "tcp:2222",
            "sctp::1-:2",
            "tcp::1-:0",
            "tcp::70000-:1",
            "tcp:x:1-:1",
            "tcp::1-10.0.3.1:1",
            "tcp::1-10.0.2.2:22",
        ] {
            let e = HostForward::parse(bad, &config).unwrap_err().to_string();
            assert!(e.contains("hostfwd=") && e.contains("tcp::2222-:22"), "{bad}: {e}");
        }
    }

    #[test]
    fn guest_forwards() {
        let config = Config::new(&Spec::default()).unwrap();
        let f = GuestForward::parse("tcp:10.0.2.100:80-cmd:cat - x:y", &config).unwrap();
        assert_eq!(f.to, GuestTarget::Command("cat - x:y".into()));
        let f = GuestForward::parse("tcp:10.0.2.100:80-tcp:127.0.0.1:99", &config).unwrap();
        assert_eq!(f.to, GuestTarget::Tcp("127.0.0.1:99".parse().unwrap()));
        for bad in
            ["udp:10.0.2.100:1-cmd:x", "tcp:10.9.9.9:1-cmd:x", "tcp:10.0.2.100:1-cmd:", "tcp:10.0.2.100:1-x"]
        {
            assert!(GuestForward::parse(bad, &config).is_err(), "{bad}");
        }
    }

    #[test]
    fn peers_are_shown_as_what_the_guest_can_answer() {
        let config = Config::new(&Spec::default()).unwrap();
        let guest = IpAddr::from([10, 0, 2, 15]);
        let shown = |peer: &str| visible(peer.parse().unwrap(), guest, &config).0.to_string();
        assert_eq!(shown("127.0.0.1:5"), "10.0.2.2");
        assert_eq!(shown("10.0.2.9:5"), "10.0.2.2");
        assert_eq!(shown("[2001:db8::1]:5"), "10.0.2.2");
        assert_eq!(shown("192.0.2.1:5"), "192.0.2.1");
    }
}
