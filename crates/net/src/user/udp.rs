//! UDP: each pair of guest port and peer has a connected socket of the host's, so that only the peer is heard, and
//! errors come back.

use super::forward;
use super::lan::Lan;
use super::slab::Slab;
use super::tcp::Packet;
use super::{Events, Shared};
use crate::wire::icmp::Unreachable;
use crate::wire::{be16, ip, protocol};
use crate::{MacAddr, VnetHeader, sys};
use rustix::event::epoll::EventFlags;
use rustix::net::{RecvFlags, SendFlags, SocketType, recvfrom, sendto};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long a flow is kept after its last datagram (RFC 4787 wants two minutes at least; names are asked for once).
const IDLE: Duration = Duration::from_secs(180);
const IDLE_DNS: Duration = Duration::from_secs(20);
/// Datagrams taken from one socket before the next has its turn.
const BATCH: usize = 64;
/// Frames that may wait for the guest before sockets are left alone.
const MOST_WAITING: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    guest: (IpAddr, u16),
    peer: (IpAddr, u16),
}

enum Via {
    /// A socket of its own.
    Socket(OwnedFd),
    /// The socket of a forward, to this address.
    Forward(u32, SocketAddr),
}

struct Flow {
    key: Key,
    mac: MacAddr,
    via: Via,
    dns: bool,
    used: Instant,
    queued: bool,
}

pub(super) struct Udp {
    flows: Slab<Flow>,
    index: HashMap<Key, u32>,
    ready: Vec<Ready>,
    most: usize,
    buffer: Vec<u8>,
    scratch: sys::Scratch,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ready {
    Flow(u32),
    Listener(u32),
}

impl Udp {
    pub(super) fn new(most: usize) -> Self {
        Self {
            flows: Slab::new(),
            index: HashMap::new(),
            ready: Vec::new(),
            most,
            buffer: vec![0; 1 << 16],
            scratch: sys::Scratch::default(),
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// A datagram of the guest's that no service of ours took. `at` is where its payload starts in the frame.
    pub(super) fn input(
        &mut self,
        packet: &Packet<'_>,
        ports: (u16, u16),
        payload: (usize, usize),
        vnet: &VnetHeader,
        shared: &mut Shared<'_>,
    ) {
        let key = Key { guest: (packet.ip.src, ports.0), peer: (packet.ip.dst, ports.1) };
        let id = match self.index.get(&key) {
            Some(id) => *id,
            None => match self.open(key, packet, shared) {
                Some(id) => id,
                None => return,
            },
        };
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.used = shared.now;
        let (at, len) = payload;
        let result = match &flow.via {
            Via::Socket(socket) => {
                let segment = (vnet.gso() == VnetHeader::GSO_UDP_L4 && usize::from(vnet.gso_size) < len)
                    .then_some(vnet.gso_size);
                let mut send = || self.scratch.send(socket.as_fd(), packet.frame, at, len, segment);
                // The error of an earlier datagram is told once, and this one goes out.
                match send() {
                    Err(e) if unreachable(&e).is_some() => {
                        let _ = send();
                        Err(e)
                    }
                    other => other,
                }
            }
            Via::Forward(listener, to) => {
                let Some(l) = shared.forwards.listeners.get(*listener) else {
                    self.remove(id);
                    return;
                };
                let mut bytes = Vec::new();
                packet.frame.append_to(at, len, &mut bytes);
                sendto(&l.socket, &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT, to)
                    .map_err(io::Error::from)
            }
        };
        if let Err(e) = result
            && let Some(why) = unreachable(&e)
        {
            shared.lan.unreachable(packet.mac, why, packet.head);
        }
    }

    fn open(&mut self, key: Key, packet: &Packet<'_>, shared: &mut Shared<'_>) -> Option<u32> {
        if key.peer.0.is_multicast() || key.guest.0.is_multicast() || key.guest.0.is_unspecified() {
            return None;
        }
        let Some(to) = shared.target(key.peer.0, key.peer.1) else {
            if !shared.config.spec.restrict && !shared.is_broadcast(key.peer.0) {
                shared.lan.unreachable(packet.mac, Unreachable::Port, packet.head);
            }
            return None;
        };
        let dns = shared.is_resolver(key.peer.0);
        let socket = sys::socket(to.ip(), SocketType::DGRAM, None)
            .and_then(|socket| sys::connect(&socket, to).map(|_| socket));
        let socket = match socket {
            Ok(socket) => socket,
            Err(e) => {
                if let Some(why) = unreachable(&e) {
                    shared.lan.unreachable(packet.mac, why, packet.head);
                } else {
                    shared.limit(&format!("sockets ({e})"));
                }
                return None;
            }
        };
        let flow =
            Flow { key, mac: packet.mac, via: Via::Socket(socket), dns, used: shared.now, queued: false };
        self.add(flow, shared.events)
    }

    fn add(&mut self, flow: Flow, events: &Events) -> Option<u32> {
        if self.flows.len() >= self.most {
            // The one that was idle longest makes room.
            let oldest = self.flows.iter().min_by_key(|(_, f)| f.used).map(|(id, _)| id)?;
            self.remove(oldest);
        }
        let key = flow.key;
        let id = self.flows.insert(flow);
        self.index.insert(key, id);
        if let Some(Flow { via: Via::Socket(socket), .. }) = self.flows.get(id)
            && events.add(socket.as_fd(), Events::UDP, id, EventFlags::IN | EventFlags::ET).is_err()
        {
            self.remove(id);
            return None;
        }
        Some(id)
    }

    fn remove(&mut self, id: u32) {
        if let Some(flow) = self.flows.remove(id) {
            self.index.remove(&flow.key);
            self.ready.retain(|r| *r != Ready::Flow(id));
        }
    }

    /// Something is to be read from a flow's socket.
    pub(super) fn event(&mut self, id: u32) {
        if let Some(flow) = self.flows.get_mut(id)
            && !flow.queued
        {
            flow.queued = true;
            self.ready.push(Ready::Flow(id));
        }
    }

    /// Something is to be read from a forward's socket.
    pub(super) fn listener_event(&mut self, id: u32) {
        if !self.ready.contains(&Ready::Listener(id)) {
            self.ready.push(Ready::Listener(id));
        }
    }

    /// Reads what came, as long as not too much waits for the guest.
    pub(super) fn run(&mut self, shared: &mut Shared<'_>) {
        let mut later = Vec::new();
        for ready in std::mem::take(&mut self.ready) {
            if shared.lan.waiting() >= MOST_WAITING {
                later.push(ready);
                continue;
            }
            let more = match ready {
                Ready::Flow(id) => self.read_flow(id, shared),
                Ready::Listener(id) => self.read_listener(id, shared),
            };
            if more {
                later.push(ready);
            } else if let Ready::Flow(id) = ready
                && let Some(flow) = self.flows.get_mut(id)
            {
                flow.queued = false;
            }
        }
        later.append(&mut self.ready);
        self.ready = later;
    }

    fn read_flow(&mut self, id: u32, shared: &mut Shared<'_>) -> bool {
        let Some(flow) = self.flows.get_mut(id) else { return false };
        let Via::Socket(socket) = &flow.via else { return false };
        for _ in 0..BATCH {
            if shared.lan.waiting() >= MOST_WAITING {
                return true;
            }
            match recvfrom(socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                Ok((n, _, _)) => {
                    flow.used = shared.now;
                    if flow.dns {
                        shared.resolver.answered();
                    }
                    shared.lan.udp(flow.mac, flow.key.peer, flow.key.guest, &self.buffer[..n]);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return false,
                Err(e) => {
                    if let Some(why) = unreachable(&e.into()) {
                        quote(shared.lan, flow, why);
                    }
                }
            }
        }
        true
    }

    fn read_listener(&mut self, id: u32, shared: &mut Shared<'_>) -> bool {
        for _ in 0..BATCH {
            if shared.lan.waiting() >= MOST_WAITING {
                return true;
            }
            let Some(listener) = shared.forwards.listeners.get(id) else { return false };
            let guest = listener.forward.guest;
            let (n, from) = match recvfrom(&listener.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                Ok((n, _, from)) => (n, from.and_then(|a| SocketAddr::try_from(a).ok())),
                Err(rustix::io::Errno::AGAIN) => return false,
                Err(_) => continue,
            };
            let Some(from) = from else { continue };
            let key = Key { guest, peer: forward::visible(from, guest.0, shared.config) };
            let Some(mac) = shared.lan.find(guest.0) else { continue }; // the guest is asked where it is
            let known = self.index.get(&key).copied();
            let via = Via::Forward(id, from);
            match known.and_then(|id| self.flows.get_mut(id)) {
                Some(flow) => {
                    flow.used = shared.now;
                    flow.via = via;
                }
                None => {
                    let flow = Flow { key, mac, via, dns: false, used: shared.now, queued: false };
                    if self.add(flow, shared.events).is_none() {
                        continue;
                    }
                }
            }
            shared.lan.udp(mac, key.peer, key.guest, &self.buffer[..n]);
        }
        true
    }

    /// Forgets flows that were idle for long.
    pub(super) fn expire(&mut self, now: Instant) {
        let limit = |f: &Flow| if f.dns { IDLE_DNS } else { IDLE };
        let old: Vec<u32> = self
            .flows
            .iter()
            .filter(|(_, f)| now.duration_since(f.used) > limit(f))
            .map(|(id, _)| id)
            .collect();
        old.into_iter().for_each(|id| self.remove(id));
    }
}

/// What an error of a socket means for the guest, if it is about the peer.
pub(super) fn unreachable(e: &io::Error) -> Option<Unreachable> {
    match e.raw_os_error()? {
        libc::ECONNREFUSED => Some(Unreachable::Port),
        libc::EHOSTUNREACH => Some(Unreachable::Host),
        libc::ENETUNREACH | libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT => Some(Unreachable::Network),
        libc::EACCES | libc::EPERM => Some(Unreachable::Prohibited),
        _ => None,
    }
}

/// Tells the guest about an earlier datagram of a flow.
fn quote(lan: &mut Lan, flow: &Flow, why: Unreachable) {
    let Key { guest, peer } = flow.key;
    let mut b = [0; 64];
    let at = ip::write(&mut b, guest.0, peer.0, protocol::UDP, 64, 8);
    b[at..at + 2].copy_from_slice(&guest.1.to_be_bytes());
    b[at + 2..at + 4].copy_from_slice(&peer.1.to_be_bytes());
    b[at + 4..at + 6].copy_from_slice(&8u16.to_be_bytes());
    lan.unreachable(flow.mac, why, &b[..at + 8]);
}

/// Ports and length of payload of a datagram; `head` begins with the UDP header.
pub(super) fn parse(head: &[u8], ip_len: usize) -> Option<(u16, u16, usize)> {
    if head.len() < 8 {
        return None;
    }
    let len = usize::from(be16(head, 4));
    // A large one to be segmented may say 0, as IPv6 jumbograms do; ours says its length.
    if len < 8 || len > ip_len {
        return None;
    }
    Some((be16(head, 0), be16(head, 2), len - 8))
}
