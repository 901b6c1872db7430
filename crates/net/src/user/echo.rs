//! ICMP echo: through the host's ping sockets.

use super::Shared;
use super::slab::Slab;
use super::tcp::Packet;
use super::{Events, udp::unreachable};
use crate::wire::{icmp, protocol};
use crate::{MacAddr, sys};
use rustix::event::epoll::EventFlags;
use rustix::net::{RecvFlags, SendFlags, SocketType, recv, send};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Conversations at most, and how long each is kept.
const MOST: usize = 64;
const IDLE: Duration = Duration::from_secs(60);
/// Frames that may wait for the guest before sockets are left alone.
const MOST_WAITING: usize = 256;

/// Guest, peer, identifier.
type Key = (IpAddr, IpAddr, u16);

struct Flow {
    key: Key,
    mac: MacAddr,
    socket: OwnedFd,
    /// Hears all ICMP messages of the peer, those of IPv4 with the IP header.
    raw: bool,
    used: Instant,
}

#[derive(Default)]
pub(super) struct Echo {
    flows: Option<Slab<Flow>>,
    index: HashMap<Key, u32>,
    told: bool,
}

impl Echo {
    fn flows(&mut self) -> &mut Slab<Flow> {
        self.flows.get_or_insert_with(Slab::new)
    }

    /// An echo request of the guest's; `message` is all of it.
    pub(super) fn input(&mut self, packet: &Packet<'_>, message: &mut [u8], shared: &mut Shared<'_>) {
        let (src, dst) = (packet.ip.src, packet.ip.dst);
        let v6 = src.is_ipv6();
        let Some(echo) = icmp::echo_request(message, v6) else { return };
        if shared.config.is_ours(dst) || shared.forwards.serves(dst) || shared.is_link_local(dst) {
            message[0] = if v6 { icmp::ECHO_REPLY_V6 } else { icmp::ECHO_REPLY };
            icmp::finish(message, dst, src);
            return shared.lan.icmp(packet.mac, dst, src, message);
        }
        // The port is of no meaning here, but 0 is never a target.
        let Some(to) = shared.target(dst, 1) else {
            if !shared.config.spec.restrict && !shared.is_broadcast(dst) {
                shared.lan.unreachable(packet.mac, icmp::Unreachable::Host, packet.head);
            }
            return;
        };
        let key = (src, dst, echo.id);
        let id = match self.index.get(&key) {
            Some(id) => *id,
            None => match self.open(key, packet.mac, to, shared) {
                Ok(id) => id,
                Err(e) => {
                    if matches!(e.kind(), io::ErrorKind::PermissionDenied)
                        && !std::mem::replace(&mut self.told, true)
                    {
                        tracing::warn!(
                            "the guest cannot ping: this host does not let us ({e}); allow it with \
                             'sysctl net.ipv4.ping_group_range=\"0 2147483647\"'"
                        );
                    }
                    if let Some(why) = unreachable(&e) {
                        shared.lan.unreachable(packet.mac, why, packet.head);
                    }
                    return;
                }
            },
        };
        let Some(flow) = self.flows().get_mut(id) else { return };
        flow.used = shared.now;
        if let Err(e) = send(&flow.socket, message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
            && let Some(why) = unreachable(&e.into())
        {
            shared.lan.unreachable(packet.mac, why, packet.head);
        }
    }

    fn open(&mut self, key: Key, mac: MacAddr, to: SocketAddr, shared: &Shared<'_>) -> io::Result<u32> {
        let protocol = if to.is_ipv4() { rustix::net::ipproto::ICMP } else { rustix::net::ipproto::ICMPV6 };
        let mut raw = false;
        let socket = match sys::socket(to.ip(), SocketType::DGRAM, Some(protocol)) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                // Who may not use ping sockets may be allowed raw ones.
                raw = true;
                sys::socket(to.ip(), SocketType::RAW, Some(protocol)).map_err(|_| e)?
            }
            other => other?,
        };
        sys::connect(&socket, SocketAddr::new(to.ip(), 0))?;
        if self.flows().len() >= MOST {
            let oldest = self.flows().iter().min_by_key(|(_, f)| f.used).map(|(id, _)| id);
            oldest.into_iter().for_each(|id| self.remove(id));
        }
        let id = self.flows().insert(Flow { key, mac, socket, raw, used: shared.now });
        self.index.insert(key, id);
        let added = self
            .flows()
            .get(id)
            .map(|f| shared.events.add(f.socket.as_fd(), Events::ECHO, id, EventFlags::IN));
        if let Some(Err(e)) = added {
            self.remove(id);
            return Err(e);
        }
        Ok(id)
    }

    fn remove(&mut self, id: u32) {
        if let Some(flow) = self.flows().remove(id) {
            self.index.remove(&flow.key);
        }
    }

    /// Replies came.
    pub(super) fn event(&mut self, id: u32, shared: &mut Shared<'_>) {
        let Some(flow) = self.flows().get_mut(id) else { return };
        let mut buffer = vec![0; 1 << 16];
        while shared.lan.waiting() < MOST_WAITING {
            let n = match recv(&flow.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((n, _)) => n,
                Err(e) => {
                    if let Some(why) = unreachable(&e.into()) {
                        let (guest, peer, id) = flow.key;
                        let mut b = [0; 64];
                        let v6 = guest.is_ipv6();
                        let number = if v6 { protocol::ICMPV6 } else { protocol::ICMP };
                        let at = crate::wire::ip::write(&mut b, guest, peer, number, 64, 8);
                        b[at] = if v6 { icmp::ECHO_REQUEST_V6 } else { icmp::ECHO_REQUEST };
                        b[at + 4..at + 6].copy_from_slice(&id.to_be_bytes());
                        shared.lan.unreachable(flow.mac, why, &b[..at + 8]);
                    }
                    return;
                }
            };
            let (guest, peer, id) = flow.key;
            let reply = if guest.is_ipv6() { icmp::ECHO_REPLY_V6 } else { icmp::ECHO_REPLY };
            let skip = if flow.raw && guest.is_ipv4() { usize::from(buffer[0] & 15) * 4 } else { 0 };
            let Some(message) = buffer[..n].get_mut(skip..).filter(|m| m.len() >= 8 && m[0] == reply) else {
                continue;
            };
            if flow.raw && message[4..6] != id.to_be_bytes() {
                continue;
            }
            message[4..6].copy_from_slice(&id.to_be_bytes());
            icmp::finish(message, peer, guest);
            shared.lan.icmp(flow.mac, peer, guest, message);
        }
    }

    /// Forgets conversations that have ended.
    pub(super) fn expire(&mut self, now: Instant) {
        let old: Vec<u32> = self
            .flows()
            .iter()
            .filter(|(_, f)| now.duration_since(f.used) > IDLE)
            .map(|(id, _)| id)
            .collect();
        old.into_iter().for_each(|id| self.remove(id));
    }
}
