//! Cables to other virtual machines, as QEMU's `socket` netdev frames them: over a stream, each Ethernet frame after its
//! length in four bytes; over UDP, each in a datagram.

use crate::{Counters, Error, Frame, Link, Netdev, Offloads, Port, Receiver, Result, Sent, VnetHeader, sys};
use rustix::net::{RecvFlags, SendFlags, SocketFlags, SocketType};
use schemars::JsonSchema;
use serde::Deserialize;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

/// Properties of `--netdev socket`: one of `listen`, `connect`, `udp`, `mcast`, `fd`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Spec {
    /// Wait for the other side: [HOST]:PORT or unix:PATH.
    pub listen: Option<String>,
    /// Connect to the other side: HOST:PORT or unix:PATH.
    pub connect: Option<String>,
    /// Send datagrams to HOST:PORT; localaddr= says where to get them.
    pub udp: Option<String>,
    /// Join the multicast group ADDRESS:PORT.
    pub mcast: Option<String>,
    /// Own address: HOST:PORT with udp=, HOST with mcast=.
    pub localaddr: Option<String>,
    /// Descriptor of a connected socket.
    pub fd: Option<i32>,
}

/// Largest frame on the wire.
const LARGEST: usize = 65536 + 18;
/// Bytes that may wait for the other side before the guest has to.
const MOST_WAITING: usize = 256 << 10;
/// Frames handed over before the guest's own have their turn.
const BATCH: usize = 64;

enum Socket {
    /// Nobody is there; whoever comes is let in.
    Listening,
    Stream(OwnedFd),
    Datagram(OwnedFd, Option<SocketAddr>),
    Closed,
}

struct SocketPort {
    listener: Option<OwnedFd>,
    socket: Socket,
    /// Part of the stream that is not a whole frame yet, and what the other side has not taken.
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    buffer: Vec<u8>,
}

fn bad<T>(text: String) -> Result<T> {
    Err(Error::Config(format!("netdev socket: {text}")))
}

fn address(text: &str, what: &str, any: bool) -> Result<SocketAddr> {
    let full = if any && text.starts_with(':') { format!("0.0.0.0{text}") } else { text.into() };
    match full.to_socket_addrs().map(|mut list| list.next()) {
        Ok(Some(address)) => Ok(address),
        _ => bad(format!("{what}={text} is not HOST:PORT")),
    }
}

impl SocketPort {
    fn open(spec: &Spec) -> Result<(Self, String)> {
        let given = [
            spec.listen.is_some(),
            spec.connect.is_some(),
            spec.udp.is_some(),
            spec.mcast.is_some(),
            spec.fd.is_some(),
        ];
        if given.iter().filter(|g| **g).count() != 1 {
            return bad("exactly one of listen=, connect=, udp=, mcast= and fd= is needed".into());
        }
        if spec.localaddr.is_some() && spec.udp.is_none() && spec.mcast.is_none() {
            return bad("localaddr= needs udp= or mcast=".into());
        }
        let (listener, socket, about) = if let Some(text) = &spec.listen {
            (Some(listen(text)?), Socket::Listening, format!("listening at {text}"))
        } else if let Some(text) = &spec.connect {
            (None, Socket::Stream(connect(text)?), format!("connected to {text}"))
        } else if let Some(text) = &spec.udp {
            let to = address(text, "udp", false)?;
            let local = spec.localaddr.as_deref().unwrap_or_default();
            if local.is_empty() {
                return bad("udp= needs localaddr=HOST:PORT".into());
            }
            let local = address(local, "localaddr", true)?;
            let fd = sys::bind(local, SocketType::DGRAM)
                .map_err(Error::host(format!("netdev socket: cannot bind to {local}")))?;
            (None, Socket::Datagram(fd, Some(to)), format!("datagrams to {to}"))
        } else if let Some(text) = &spec.mcast {
            let (fd, group) = multicast(text, spec.localaddr.as_deref())?;
            (None, Socket::Datagram(fd, Some(group)), format!("multicast group {group}"))
        } else {
            let fd = crate::tap::inherited(spec.fd.unwrap_or(-1))?;
            let kind = rustix::net::sockopt::socket_type(&fd)
                .map_err(|e| Error::host("netdev socket: fd=")(e.into()))?;
            let socket =
                if kind == SocketType::STREAM { Socket::Stream(fd) } else { Socket::Datagram(fd, None) };
            (None, socket, "inherited socket".into())
        };
        let port =
            Self { listener, socket, incoming: Vec::new(), outgoing: Vec::new(), buffer: vec![0; 128 << 10] };
        Ok((port, about))
    }

    /// The other side is gone.
    fn close(&mut self, why: &str) {
        let listening = self.listener.is_some();
        self.socket = if listening { Socket::Listening } else { Socket::Closed };
        self.incoming.clear();
        self.outgoing.clear();
        tracing::warn!(
            "network socket: {why}; {}",
            if listening { "waiting for another connection" } else { "the guest's link is dead" }
        );
    }

    fn accept(&mut self) -> io::Result<()> {
        let Some(listener) = &self.listener else { return Ok(()) };
        match rustix::net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(fd) => self.socket = Socket::Stream(fd),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }

    /// Sends what waits; `false` if some still does.
    fn flush(&mut self) -> bool {
        while !self.outgoing.is_empty() {
            let Socket::Stream(fd) = &self.socket else { break };
            match rustix::net::send(fd, &self.outgoing, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => drop(self.outgoing.drain(..n)),
                Err(rustix::io::Errno::AGAIN) => return false,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => self.close(&e.to_string()),
            }
        }
        true
    }

    /// Hands over whole frames of the stream; `false` if the guest has no room.
    fn deliver(&mut self, to: &mut dyn Receiver) -> bool {
        let mut at = 0;
        let mut room = true;
        while let Some(head) = self.incoming.get(at..).and_then(|b| b.first_chunk::<4>()) {
            let len = u32::from_be_bytes(*head) as usize;
            if len > LARGEST {
                self.close("the other side does not speak this protocol");
                return true;
            }
            let Some(frame) = self.incoming.get(at + 4..at + 4 + len) else { break };
            if !give(frame, to) {
                room = false;
                break;
            }
            at += 4 + len;
        }
        self.incoming.drain(..at);
        room
    }
}

/// Hands over one frame; `false` if the guest has no room. One that it can never take is dropped.
fn give(frame: &[u8], to: &mut dyn Receiver) -> bool {
    let len = VnetHeader::LEN + frame.len();
    if frame.len() < crate::wire::ETHERNET || len > to.largest() {
        return true;
    }
    let Some(room) = to.reserve(len) else { return false };
    room.write(0, &VnetHeader::default().to_bytes());
    room.write(VnetHeader::LEN, frame);
    to.commit(len);
    true
}

fn listen(text: &str) -> Result<OwnedFd> {
    let what = || Error::host(format!("netdev socket: cannot listen at {text}"));
    if let Some(path) = text.strip_prefix("unix:") {
        let listener = UnixListener::bind(path).map_err(what())?;
        listener.set_nonblocking(true).map_err(what())?;
        return Ok(listener.into());
    }
    sys::bind(address(text, "listen", true)?, SocketType::STREAM).map_err(what())
}

fn connect(text: &str) -> Result<OwnedFd> {
    let what = || Error::host(format!("netdev socket: cannot connect to {text}"));
    let fd: OwnedFd = if let Some(path) = text.strip_prefix("unix:") {
        UnixStream::connect(path).map_err(what())?.into()
    } else {
        let stream = std::net::TcpStream::connect(address(text, "connect", false)?).map_err(what())?;
        stream.set_nodelay(true).map_err(what())?;
        stream.into()
    };
    rustix::io::ioctl_fionbio(&fd, true).map_err(|e| what()(e.into()))?;
    Ok(fd)
}

fn multicast(text: &str, local: Option<&str>) -> Result<(OwnedFd, SocketAddr)> {
    let group = address(text, "mcast", false)?;
    let IpAddr::V4(ip) = group.ip() else { return bad(format!("mcast={text} is not an IPv4 group")) };
    if !ip.is_multicast() {
        return bad(format!("mcast={text} is not a multicast group; those are 224.0.0.0 to 239.255.255.255"));
    }
    let interface = match local {
        None => Ipv4Addr::UNSPECIFIED,
        Some(t) => match t.parse() {
            Ok(ip) => ip,
            Err(_) => return bad(format!("localaddr={t} is not an IPv4 address")),
        },
    };
    let set_up = || -> rustix::io::Result<OwnedFd> {
        use rustix::net::sockopt;
        let fd = rustix::net::socket_with(
            rustix::net::AddressFamily::INET,
            SocketType::DGRAM,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            None,
        )?;
        sockopt::set_socket_reuseaddr(&fd, true)?;
        rustix::net::bind(&fd, &group)?;
        sockopt::set_ip_add_membership(&fd, &ip, &interface)?;
        // Others on this host are in the group too.
        sockopt::set_ip_multicast_loop(&fd, true)?;
        if !interface.is_unspecified() {
            sockopt::set_ip_multicast_if(&fd, &interface)?;
        }
        Ok(fd)
    };
    let fd = set_up().map_err(|e| Error::host(format!("netdev socket: cannot join {group}"))(e.into()))?;
    Ok((fd, group))
}

/// Opens a socket netdev.
///
/// # Errors
/// Options that contradict each other, or the host's refusal.
pub fn open(id: &str, spec: &Spec) -> Result<Netdev> {
    let (port, about) = SocketPort::open(spec)?;
    Ok(Netdev {
        id: id.into(),
        kind: "socket",
        about,
        takes: Offloads::empty(),
        gives: Offloads::empty(),
        mtu: None,
        link: Arc::new(Link::default()),
        counters: Arc::<Counters>::default(),
        ports: vec![Box::new(port)],
    })
}

impl Port for SocketPort {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.socket {
            Socket::Listening => self.listener.as_ref().map(AsFd::as_fd),
            Socket::Stream(fd) | Socket::Datagram(fd, _) => Some(fd.as_fd()),
            Socket::Closed => None,
        }
    }

    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        let len = frame.len().saturating_sub(VnetHeader::LEN);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match &self.socket {
            Socket::Stream(_) => {
                if self.outgoing.len() > MOST_WAITING && !self.flush() {
                    return Sent::Busy;
                }
                self.outgoing.extend_from_slice(&(len as u32).to_be_bytes());
                frame.append_to(VnetHeader::LEN, len, &mut self.outgoing);
                self.flush();
            }
            Socket::Datagram(fd, to) => {
                let mut bytes = Vec::new();
                frame.append_to(VnetHeader::LEN, len, &mut bytes);
                // What is not taken is lost, as on any network.
                let _ = match to {
                    Some(to) => rustix::net::sendto(fd, &bytes, flags, to),
                    None => rustix::net::send(fd, &bytes, flags),
                };
            }
            Socket::Listening | Socket::Closed => {}
        }
        Sent::Done
    }

    fn receive(&mut self, to: &mut dyn Receiver) -> io::Result<bool> {
        if matches!(self.socket, Socket::Listening) {
            self.accept()?;
        }
        self.flush();
        for _ in 0..BATCH {
            if !self.deliver(to) {
                return Ok(false);
            }
            match &self.socket {
                Socket::Stream(fd) => {
                    match rustix::net::recv(fd, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                        Ok((0, _)) => self.close("the other side has left"),
                        Ok((n, _)) => self.incoming.extend_from_slice(&self.buffer[..n]),
                        Err(rustix::io::Errno::AGAIN) => return Ok(false),
                        Err(rustix::io::Errno::INTR) => {}
                        Err(e) => self.close(&e.to_string()),
                    }
                }
                Socket::Datagram(fd, _) => {
                    // Room first: a datagram that was read cannot be put back.
                    if to.reserve(VnetHeader::LEN + 1514).is_none() {
                        return Ok(false);
                    }
                    match rustix::net::recv(fd, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                        Ok((n, _)) => drop(give(&self.buffer[..n], to)),
                        Err(rustix::io::Errno::AGAIN) => return Ok(false),
                        Err(_) => {}
                    }
                }
                Socket::Listening | Socket::Closed => return Ok(false),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MacAddr;
    use crate::testing::Cable;

    fn cable(spec: &Spec) -> Cable<SocketPort> {
        Cable::new(SocketPort::open(spec).unwrap().0, MacAddr::BROADCAST)
    }

    fn exchange(a: &mut Cable<SocketPort>, b: &mut Cable<SocketPort>) {
        for (i, len) in [46usize, 1500, 1].into_iter().enumerate() {
            let payload = vec![i as u8; len];
            a.send_ethernet(MacAddr::BROADCAST, 0x88b5, &payload);
            let frame = b.until("a frame", |b| b.inbox.frames.pop_front());
            assert_eq!(frame[VnetHeader::LEN + 14..], payload);
        }
    }

    #[test]
    fn streams_carry_frames_and_are_accepted_again() {
        let dir = tempfile::tempdir().unwrap();
        let at = format!("unix:{}", dir.path().join("s").display());
        let mut a = cable(&Spec { listen: Some(at.clone()), ..Spec::default() });
        for _ in 0..2 {
            let mut b = cable(&Spec { connect: Some(at.clone()), ..Spec::default() });
            a.until("a connection", |a| matches!(a.port.socket, Socket::Stream(_)).then_some(()));
            exchange(&mut a, &mut b);
            exchange(&mut b, &mut a);
            drop(b);
            a.until("the end", |a| matches!(a.port.socket, Socket::Listening).then_some(()));
        }
    }

    #[test]
    fn a_stranger_is_shown_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut a = cable(&Spec { listen: Some(format!("unix:{}", path.display())), ..Spec::default() });
        let mut stranger = UnixStream::connect(&path).unwrap();
        a.until("a connection", |a| matches!(a.port.socket, Socket::Stream(_)).then_some(()));
        io::Write::write_all(&mut stranger, b"GET / HTTP/1.0\r\n\r\n").unwrap();
        a.until("the end", |a| matches!(a.port.socket, Socket::Listening).then_some(()));
    }

    #[test]
    fn datagrams_carry_frames() {
        let free = || std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let (x, y) = (free(), free());
        let spec = |to: &str, from: &str| Spec {
            udp: Some(to.into()),
            localaddr: Some(from.into()),
            ..Spec::default()
        };
        let (mut a, mut b) = (cable(&spec(&x, &y)), cable(&spec(&y, &x)));
        exchange(&mut a, &mut b);
        exchange(&mut b, &mut a);
    }

    #[test]
    fn options_that_make_no_sense() {
        for spec in [
            Spec::default(),
            Spec { listen: Some("x".into()), connect: Some("y".into()), ..Spec::default() },
            Spec { mcast: Some("10.0.0.1:99".into()), ..Spec::default() },
            Spec { udp: Some("127.0.0.1:1".into()), ..Spec::default() },
            Spec { connect: Some("nonsense".into()), ..Spec::default() },
        ] {
            assert!(SocketPort::open(&spec).is_err(), "{spec:?}");
        }
    }
}
