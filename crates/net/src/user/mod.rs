//! The user-mode network: a small network of the guest's own with a gateway, a name server and DHCP, which needs no
//! privileges on the host. What the guest sends leaves the host through ordinary sockets of this process.
//!
//! ```text
//!   guest 10.0.2.15 ──cable── gateway 10.0.2.2, name server 10.0.2.3 ──sockets── the world
//!         fec0::/64                   fec0::2              fec0::3
//! ```
//! One thread, that of the network card's queue, runs all of it: [`UserPort`] is a [`Port`].

mod config;
mod dhcp;
mod echo;
mod forward;
mod lan;
mod resolver;
mod ring;
mod slab;
mod tcp;
#[cfg(test)]
mod tests;
mod tftp;
mod udp;
mod v6;

pub use config::{Config, Net4, Net6, Spec, Target};
pub use forward::{GuestForward, GuestTarget, HostForward, Protocol};

use crate::wire::{arp, dhcp as wire_dhcp, dhcp6, ethertype, icmp, ip, protocol, pseudo_header};
use crate::{Error, Frame, Link, MacAddr, Netdev, Offloads, Port, Receiver, Result, Sent, VnetHeader};
use base::{EventFd, RateLimit};
use lan::{Ethernet, Lan};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A connection that nobody used for this long is forgotten (RFC 5382 wants two hours and four minutes at least).
const TCP_IDLE: Duration = Duration::from_secs(2 * 3600 + 5 * 60);
/// How often old things are looked for.
const SWEEP: Duration = Duration::from_secs(5);
/// Bytes of a frame that are copied out to be parsed: all headers there may be.
const HEAD: usize = 256;
/// Events taken at once.
const EVENTS: usize = 128;

/// The sockets' events.
struct Events(OwnedFd);

impl Events {
    const CONTROL: u32 = 0;
    const TCP: u32 = 1;
    const UDP: u32 = 2;
    const ECHO: u32 = 3;
    const LISTENER: u32 = 4;

    fn add(&self, socket: BorrowedFd<'_>, kind: u32, id: u32, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.0, socket, EventData::new_u64(u64::from(kind) << 32 | u64::from(id)), flags)?)
    }
}

/// What the protocols have in common, for the time of a call.
struct Shared<'a> {
    lan: &'a mut Lan,
    config: &'a Config,
    events: &'a Events,
    forwards: &'a mut forward::Forwards,
    resolver: &'a mut resolver::Resolver,
    log: &'a RateLimit,
    now: Instant,
}

impl Shared<'_> {
    /// Where the guest's packets to an address go.
    fn target(&mut self, ip: IpAddr, port: u16) -> Option<SocketAddr> {
        match self.config.target(ip, port) {
            Target::Address(to) => Some(to),
            Target::Resolver => self.resolver.server(self.now),
            Target::Refused => None,
        }
    }

    fn is_resolver(&self, ip: IpAddr) -> bool {
        self.config.target(ip, 53) == Target::Resolver
    }

    fn is_broadcast(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => {
                ip.is_broadcast() || self.config.v4.is_some_and(|n| ip == n.broadcast() || ip == n.net)
            }
            IpAddr::V6(ip) => ip.is_multicast(),
        }
    }

    fn is_link_local(&self, ip: IpAddr) -> bool {
        self.config.v6.is_some() && ip == IpAddr::V6(v6::LINK_LOCAL)
    }

    /// Tells that something has run out.
    fn limit(&self, what: &str) {
        if let Some(suppressed) = self.log.allow() {
            tracing::warn!(suppressed, "user-mode network: no more {what}; the guest's attempts fail");
        }
    }
}

/// What can be changed while the network is in use.
enum Command {
    Add(HostForward),
    Remove(Protocol, SocketAddr),
}

/// A change, and where its result goes.
type Asked = (Command, std::sync::mpsc::Sender<Result<bool>>);

/// Changes a user-mode network while it is in use, from any thread.
#[derive(Clone)]
pub struct Control {
    config: Arc<Config>,
    commands: Arc<(Mutex<Vec<Asked>>, EventFd)>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Control")
    }
}

impl Control {
    fn ask(&self, command: Command) -> Result<bool> {
        let (tx, rx) = std::sync::mpsc::channel();
        self.commands.0.lock().unwrap_or_else(|e| e.into_inner()).push((command, tx));
        self.commands.1.signal();
        // Nobody answers while the machine is paused; what was asked for is then done when it goes on.
        rx.recv_timeout(Duration::from_secs(2)).unwrap_or(Ok(true))
    }

    /// Adds a forward: `PROTOCOL:[ADDRESS]:PORT-[ADDRESS]:PORT`.
    ///
    /// # Errors
    /// A malformed text, or a port that is taken.
    pub fn add_host_forward(&self, text: &str) -> Result<()> {
        let forward = HostForward::parse(text, &self.config)?;
        self.ask(Command::Add(forward)).map(drop)
    }

    /// Removes a forward, named by `PROTOCOL:[ADDRESS]:PORT` of the host. Connections made through it stay.
    ///
    /// # Errors
    /// A malformed text, or no such forward.
    pub fn remove_host_forward(&self, text: &str) -> Result<()> {
        let forward = HostForward::parse(&format!("{text}-:1"), &self.config)?;
        if self.ask(Command::Remove(forward.protocol, forward.host))? {
            return Ok(());
        }
        Err(Error::Config(format!("there is no host forward {text}")))
    }
}

/// The stack, as the port that a network card is plugged into.
pub struct UserPort {
    config: Arc<Config>,
    lan: Lan,
    events: Events,
    tcp: tcp::Tcp,
    udp: udp::Udp,
    echo: echo::Echo,
    dhcp: dhcp::Dhcp,
    tftp: tftp::Tftp,
    forwards: forward::Forwards,
    resolver: resolver::Resolver,
    control: Control,
    log: RateLimit,
    swept: Instant,
    fragments: crate::wire::reassembly::Reassembly,
    /// The guest had no room: there is nothing to do until it has.
    full: bool,
}

/// Makes a user-mode network, and what changes it.
///
/// # Errors
/// Properties that make no sense, or ports that are taken.
pub fn open(id: &str, spec: &Spec) -> Result<(Netdev, Control)> {
    let port = UserPort::new(spec)?;
    let control = port.control.clone();
    let about = match (port.config.v4, port.config.v6) {
        (Some(n), _) => format!("user-mode network {}/{}", n.net, n.bits),
        (None, Some(n)) => format!("user-mode network {}/{}", n.net, n.bits),
        (None, None) => "user-mode network".into(),
    };
    let mtu = Some(port.config.mtu).filter(|m| *m != 1500);
    let all = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN;
    let netdev = Netdev {
        id: id.into(),
        kind: "user",
        about,
        takes: all | Offloads::USO4 | Offloads::USO6,
        gives: all,
        mtu,
        link: Arc::new(Link::default()),
        counters: Arc::default(),
        ports: vec![Box::new(port)],
    };
    Ok((netdev, control))
}

impl UserPort {
    /// A stack with the properties of `spec`.
    ///
    /// # Errors
    /// Properties that make no sense, or ports that are taken.
    pub fn new(spec: &Spec) -> Result<Self> {
        Self::with_resolver(spec, "/etc/resolv.conf")
    }

    fn with_resolver(spec: &Spec, resolv_conf: &str) -> Result<Self> {
        let config = Arc::new(Config::new(spec)?);
        let hosts: Vec<_> =
            spec.hostfwd.iter().map(|t| HostForward::parse(t, &config)).collect::<Result<_>>()?;
        let guests = spec.guestfwd.iter().map(|t| GuestForward::parse(t, &config)).collect::<Result<_>>()?;
        let failed = || Error::host("netdev user: cannot set up");
        let events = Events(epoll::create(CreateFlags::CLOEXEC).map_err(io::Error::from).map_err(failed())?);
        let wake = EventFd::new().map_err(failed())?;
        events.add(wake.as_fd(), Events::CONTROL, 0, EventFlags::IN).map_err(failed())?;
        let mut forwards = forward::Forwards::new(guests);
        for forward in hosts {
            forwards.add(forward, &events)?;
        }
        let v4 = config.v4.map(|n| n.host);
        let [a, b, c, d] = v4.unwrap_or(Ipv4Addr::new(10, 0, 2, 2)).octets();
        let mac = MacAddr([0x52, 0x55, a, b, c, d]);
        let lan = Lan::new(mac, v4, config.v6.map(|_| v6::LINK_LOCAL), config.mtu.into());
        let most = spec.max_connections as usize;
        let tftp = tftp::Tftp::new(spec.tftp.clone());
        Ok(Self {
            lan,
            events,
            tcp: tcp::Tcp::new(most),
            udp: udp::Udp::new(most),
            echo: echo::Echo::default(),
            dhcp: dhcp::Dhcp::default(),
            tftp,
            forwards,
            resolver: resolver::Resolver::new(resolv_conf),
            control: Control { config: config.clone(), commands: Arc::new((Mutex::default(), wake)) },
            log: RateLimit::new(3, Duration::from_secs(10)),
            swept: Instant::now(),
            fragments: crate::wire::reassembly::Reassembly::default(),
            config,
            full: false,
        })
    }

    /// Connections of TCP that there are.
    pub fn connections(&self) -> usize {
        self.tcp.connections()
    }

    /// The protocols, and what they share.
    fn parts(&mut self) -> (Shared<'_>, &mut tcp::Tcp, &mut udp::Udp, &mut echo::Echo) {
        let shared = Shared {
            lan: &mut self.lan,
            config: &self.config,
            events: &self.events,
            forwards: &mut self.forwards,
            resolver: &mut self.resolver,
            log: &self.log,
            now: Instant::now(),
        };
        (shared, &mut self.tcp, &mut self.udp, &mut self.echo)
    }

    /// A frame of the guest's. What it cannot be is dropped, as networks do.
    fn input(&mut self, frame: &Frame<'_>) -> Option<()> {
        let mut head = [0; VnetHeader::LEN + HEAD];
        let n = frame.copy_to(0, &mut head);
        let head = &head[..n];
        let vnet = VnetHeader::from_bytes(head.first_chunk()?);
        let head = &head[VnetHeader::LEN..];
        let ethernet = Ethernet::parse(head)?;
        if ethernet.src.is_multicast() || ethernet.dst != self.lan.mac && !ethernet.dst.is_multicast() {
            return None; // not for us
        }
        let start = VnetHeader::LEN + ethernet.payload;
        let head = &head[ethernet.payload..];
        match ethernet.kind {
            ethertype::ARP => self.arp(head, ethernet.src),
            ethertype::IPV4 | ethertype::IPV6 => self.ip(&vnet, ethernet.src, frame, start, head),
            _ => None,
        }
    }

    fn arp(&mut self, b: &[u8], mac: MacAddr) -> Option<()> {
        let request = arp::Arp::parse(b)?;
        let net = self.config.v4?;
        if request.sender_mac != mac {
            return None;
        }
        if net.contains(request.sender) && !self.config.is_ours(request.sender.into()) {
            self.lan.learn(request.sender.into(), mac);
        }
        let ours = self.config.is_ours(request.target.into()) || self.forwards.serves(request.target.into());
        if request.operation != arp::REQUEST || !ours {
            return None;
        }
        let reply = arp::Arp {
            operation: arp::REPLY,
            sender_mac: self.lan.mac,
            sender: request.target,
            target_mac: mac,
            target: request.sender,
        };
        self.lan.ethernet(mac, ethertype::ARP, &reply.to_bytes());
        Some(())
    }

    /// An IP packet, which starts at `start` in the frame; `head` is its beginning.
    fn ip(
        &mut self,
        vnet: &VnetHeader,
        mac: MacAddr,
        frame: &Frame<'_>,
        start: usize,
        head: &[u8],
    ) -> Option<()> {
        let ip = ip::Ip::parse(head)?;
        if start + ip.payload + ip.len > frame.len() {
            return None; // cut short
        }
        match ip.src {
            IpAddr::V4(_) => self.config.v4.map(drop)?,
            IpAddr::V6(_) => self.config.v6.map(drop)?,
        }
        if ip.fragment.is_some() {
            let mut piece = Vec::new();
            frame.append_to(start + ip.payload, ip.len, &mut piece);
            let (header, payload) = self.fragments.add(&ip, &piece, Instant::now())?;
            let mut whole = vec![0; VnetHeader::LEN];
            let at = whole.len();
            whole.resize(at + ip::header_len(header.src), 0);
            let len = ip::write(
                &mut whole[at..],
                header.src,
                header.dst,
                header.protocol,
                header.ttl,
                payload.len(),
            );
            whole.truncate(at + len);
            whole.extend_from_slice(&payload);
            let head = whole[at..].to_vec();
            let head = &head[..head.len().min(HEAD)];
            let ip = ip::Ip::parse(head)?;
            return self.packet(&VnetHeader::default(), mac, &Frame::of(&whole), at, head, &ip);
        }
        self.packet(vnet, mac, frame, start, head, &ip)
    }

    fn packet(
        &mut self,
        vnet: &VnetHeader,
        mac: MacAddr,
        frame: &Frame<'_>,
        start: usize,
        head: &[u8],
        ip: &ip::Ip,
    ) -> Option<()> {
        if !valid_checksum(vnet, frame, start + ip.payload, ip) {
            return None;
        }
        let packet = tcp::Packet { ip: *ip, mac, head, frame, payload: start + ip.payload };
        match (ip.protocol, ip.src.is_ipv4()) {
            (protocol::TCP, _) => {
                let (mut shared, tcp, ..) = self.parts();
                tcp.input(&packet, &mut shared);
            }
            (protocol::UDP, _) => self.datagram(vnet, &packet)?,
            (protocol::ICMP, true) => self.echo(&packet),
            (protocol::ICMPV6, false) => self.icmp6(&packet),
            _ => {}
        }
        // Whoever speaks from an address of the network's is where its answers go.
        if self.config.is_local(ip.src) && !self.config.is_ours(ip.src) {
            self.lan.learn(ip.src, mac);
        }
        Some(())
    }

    fn echo(&mut self, packet: &tcp::Packet<'_>) {
        let mut message = Vec::new();
        packet.frame.append_to(packet.payload, packet.ip.len, &mut message);
        let (mut shared, _, _, echo) = self.parts();
        echo.input(packet, &mut message, &mut shared);
    }

    fn icmp6(&mut self, packet: &tcp::Packet<'_>) {
        let mut message = Vec::new();
        packet.frame.append_to(packet.payload, packet.ip.len, &mut message);
        let IpAddr::V6(src) = packet.ip.src else { return };
        match message.first() {
            Some(&icmp::ECHO_REQUEST_V6) => self.echo(packet),
            // Neighbour discovery does not cross routers (RFC 4861, 6.1).
            Some(133..=137) if packet.ip.ttl == 255 => {
                v6::ndp(&message, src, packet.mac, &self.config, &mut self.lan);
            }
            _ => {}
        }
    }

    fn datagram(&mut self, vnet: &VnetHeader, packet: &tcp::Packet<'_>) -> Option<()> {
        let (src, dst, len) = udp::parse(packet.head.get(packet.ip.payload..)?, packet.ip.len)?;
        let at = packet.payload + 8;
        let payload = || {
            let mut bytes = Vec::new();
            packet.frame.append_to(at, len, &mut bytes);
            bytes
        };
        let (from, to) = (packet.ip.src, packet.ip.dst);
        match (dst, from) {
            (wire_dhcp::SERVER_PORT, IpAddr::V4(_)) if src == wire_dhcp::CLIENT_PORT => {
                self.dhcp.input(&payload(), &self.config, &mut self.lan);
            }
            (dhcp6::SERVER_PORT, IpAddr::V6(_)) => {
                v6::dhcp(&payload(), from, to, packet.mac, &self.config, &mut self.lan);
            }
            (tftp::PORT, _) if self.config.is_ours(to) => {
                self.tftp.input(&payload(), packet.mac, (from, src), (to, dst), &mut self.lan);
            }
            _ => {
                let (mut shared, _, udp, _) = self.parts();
                udp.input(packet, (src, dst), (at, len), vnet, &mut shared);
            }
        }
        Some(())
    }

    /// Takes the events that there are.
    fn poll(&mut self) -> io::Result<()> {
        let mut space = [const { MaybeUninit::<epoll::Event>::uninit() }; EVENTS];
        let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let list = match epoll::wait(&self.events.0, &mut space, Some(&timeout)) {
            Ok((list, _)) => &*list,
            Err(rustix::io::Errno::INTR) => &[],
            Err(e) => return Err(e.into()),
        };
        for event in list {
            let (data, flags) = (event.data.u64(), event.flags);
            let id = data as u32;
            let (mut shared, tcp, udp, echo) = self.parts();
            match (data >> 32) as u32 {
                Events::TCP => tcp.event(id, flags, &mut shared),
                Events::UDP => udp.event(id),
                Events::ECHO => echo.event(id, &mut shared),
                Events::LISTENER => self.listener(id)?,
                _ => self.commands(),
            }
        }
        Ok(())
    }

    fn listener(&mut self, id: u32) -> io::Result<()> {
        let Some(listener) = self.forwards.listeners.get(id) else { return Ok(()) };
        let guest = listener.forward.guest;
        if listener.forward.protocol == Protocol::Udp {
            self.udp.listener_event(id);
            return Ok(());
        }
        let socket = listener.socket.try_clone()?;
        let (mut shared, tcp, ..) = self.parts();
        forward::accept(socket.as_fd(), &mut shared, |connection, peer, shared| {
            let peer = forward::visible(peer, guest.0, shared.config);
            tcp.accept(connection, guest, peer, shared);
        });
        Ok(())
    }

    fn commands(&mut self) {
        self.control.commands.1.clear();
        let all = std::mem::take(&mut *self.control.commands.0.lock().unwrap_or_else(|e| e.into_inner()));
        for (command, answer) in all {
            let result = match command {
                Command::Add(forward) => self.forwards.add(forward, &self.events).map(|()| true),
                Command::Remove(protocol, host) => Ok(self.forwards.remove(protocol, host)),
            };
            // Whoever asked may have given up waiting.
            let _ = answer.send(result);
        }
    }

    fn sweep(&mut self, now: Instant) {
        if now.duration_since(self.swept) < SWEEP {
            return;
        }
        self.swept = now;
        self.udp.expire(now);
        self.echo.expire(now);
        self.tftp.expire(now);
        self.fragments.expire(now);
        self.tcp.expire(now, &mut self.lan);
    }
}

/// Whether the checksum of the payload is right, or need not be.
fn valid_checksum(vnet: &VnetHeader, frame: &Frame<'_>, at: usize, ip: &ip::Ip) -> bool {
    if vnet.flags & (VnetHeader::NEEDS_CSUM | VnetHeader::DATA_VALID) != 0 {
        return true;
    }
    let mut sum = match (ip.protocol, ip.src) {
        (protocol::TCP | protocol::UDP, _) | (protocol::ICMPV6, IpAddr::V6(_)) => {
            pseudo_header(ip.src, ip.dst, ip.protocol, ip.len)
        }
        (protocol::ICMP, IpAddr::V4(_)) => crate::wire::Sum::default(),
        _ => return true,
    };
    let mut buffer = [0; 2048];
    let mut done = 0;
    while done < ip.len {
        let want = (ip.len - done).min(buffer.len());
        let n = frame.copy_to(at + done, &mut buffer[..want]);
        if n < want {
            return false;
        }
        if done == 0 && ip.protocol == protocol::UDP && n >= 8 && ip.src.is_ipv4() && buffer[6..8] == [0, 0] {
            return true; // none (RFC 768)
        }
        sum = sum.bytes(&buffer[..n]);
        done += n;
    }
    sum.finish() == 0
}

impl Port for UserPort {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.events.0.as_fd())
    }

    fn deadline(&self) -> Option<Instant> {
        if self.full {
            return None; // room comes first
        }
        let tftp = self.tftp.deadline();
        [self.tcp.deadline(), tftp].into_iter().flatten().min()
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.lan.offloads = offloads;
        Ok(())
    }

    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        let _ = self.input(frame);
        Sent::Done
    }

    fn receive(&mut self, to: &mut dyn Receiver) -> io::Result<bool> {
        self.poll()?;
        let now = Instant::now();
        {
            let (mut shared, tcp, ..) = self.parts();
            tcp.tick(&mut shared);
        }
        self.tftp.tick(now, &mut self.lan);
        self.sweep(now);
        self.full = true;
        if !self.lan.drain(to) {
            return Ok(false);
        }
        {
            let (mut shared, tcp, udp, _) = self.parts();
            if !tcp.run(to, &mut shared) {
                return Ok(false);
            }
            udp.run(&mut shared);
        }
        if !self.lan.drain(to) {
            return Ok(false);
        }
        self.full = false;
        Ok(self.tcp.is_ready() || self.udp.is_ready())
    }
}
