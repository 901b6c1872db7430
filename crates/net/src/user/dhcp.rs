//! The DHCP and BOOTP server: gives guests addresses and tells them about the network.

use super::config::{Config, Net4};
use super::lan::Lan;
use crate::MacAddr;
use crate::wire::dhcp::{CLIENT_PORT, Kind, Reply, Request, SERVER_PORT, encode_names, option};
use std::collections::HashMap;
use std::net::Ipv4Addr;

/// Addresses that can be given out.
const POOL: u32 = 64;
/// Seconds that a lease lasts. The guest is alone here; it is long.
const LEASE: u32 = 86400;

/// The leases. They last as long as the network: a guest that comes back gets its address again.
#[derive(Debug, Default)]
pub(super) struct Dhcp {
    leases: HashMap<MacAddr, Ipv4Addr>,
}

impl Dhcp {
    /// The client's address: the one it has, or wants, or the next that is free.
    fn address(&mut self, net: &Net4, mac: MacAddr, wanted: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
        if let Some(ip) = self.leases.get(&mac) {
            return Some(*ip);
        }
        let usable =
            |ip: &Ipv4Addr| net.contains(*ip) && ![net.net, net.broadcast(), net.host, net.dns].contains(ip);
        let first = u32::from(net.first);
        let free = |ip: &Ipv4Addr| usable(ip) && !self.leases.values().any(|l| l == ip);
        let in_pool = |ip: &Ipv4Addr| u32::from(*ip).wrapping_sub(first) < POOL;
        let pool = (0..POOL).map_while(|i| first.checked_add(i)).map(Ipv4Addr::from);
        let ip = wanted.filter(|ip| in_pool(ip) && free(ip)).or_else(|| pool.into_iter().find(free))?;
        self.leases.insert(mac, ip);
        Some(ip)
    }

    /// A message of a client's: answers it.
    pub(super) fn input(&mut self, payload: &[u8], config: &Config, lan: &mut Lan) {
        let (Some(net), Some(request)) = (config.v4, Request::parse(payload)) else { return };
        if request.mac.is_multicast() || request.mac.is_zero() {
            return;
        }
        // Another server's business.
        if request.server.is_some_and(|s| s != net.host) {
            return;
        }
        let wanted = request.requested.or(Some(request.client).filter(|ip| !ip.is_unspecified()));
        let (kind, yours) = match request.kind {
            None => (None, self.address(&net, request.mac, None)),
            Some(Kind::Discover) => (Some(Kind::Offer), self.address(&net, request.mac, request.requested)),
            Some(Kind::Request) => {
                let given = self.address(&net, request.mac, wanted);
                let right = given.is_some() && wanted.is_none_or(|w| Some(w) == given);
                (Some(if right { Kind::Ack } else { Kind::Nak }), given.filter(|_| right))
            }
            Some(Kind::Inform) => (Some(Kind::Ack), Some(Ipv4Addr::UNSPECIFIED)),
            Some(Kind::Release | Kind::Decline) => {
                self.leases.remove(&request.mac);
                return;
            }
            Some(_) => return,
        };
        let refusal = kind == Some(Kind::Nak);
        let Some(yours) = yours.or(refusal.then_some(Ipv4Addr::UNSPECIFIED)) else { return };
        let spec = &config.spec;
        let file = spec.bootfile.as_deref().filter(|_| !refusal).unwrap_or_default();
        let mut reply = Reply::new(&request, kind, yours, net.host, file);
        reply.add(option::SERVER, &net.host.octets());
        if refusal {
            reply.add(option::MESSAGE, b"requested address is not available");
        } else {
            options(&mut reply, &net, config, kind.is_some() && request.kind != Some(Kind::Inform));
        }
        // To a client that has no address yet by its hardware address, unless it cannot take that.
        let broadcast = refusal || request.flags & 0x8000 != 0;
        let (mac, to) = match (broadcast, request.client.is_unspecified()) {
            (true, _) => (MacAddr::BROADCAST, Ipv4Addr::BROADCAST),
            (false, true) => (request.mac, yours),
            (false, false) => (request.mac, request.client),
        };
        if !refusal && !yours.is_unspecified() {
            lan.learn(yours.into(), request.mac);
        }
        lan.udp(mac, (net.host.into(), SERVER_PORT), (to.into(), CLIENT_PORT), &reply.finish());
    }
}

fn options(reply: &mut Reply, net: &Net4, config: &Config, lease: bool) {
    let spec = &config.spec;
    reply.add(option::MASK, &net.mask().octets());
    reply.add(option::BROADCAST, &net.broadcast().octets());
    if !spec.restrict {
        reply.add(option::ROUTER, &net.host.octets());
        reply.add(option::DNS, &net.dns.octets());
    }
    if lease {
        reply.add(option::LEASE, &LEASE.to_be_bytes());
    }
    if config.mtu != 1500 {
        reply.add(option::MTU, &config.mtu.to_be_bytes());
    }
    for (code, text) in [
        (option::HOST_NAME, &spec.hostname),
        (option::DOMAIN, &spec.domainname),
        (option::TFTP_SERVER, &spec.tftp_server_name),
        (option::BOOT_FILE, &spec.bootfile),
    ] {
        if let Some(text) = text {
            reply.add(code, text.as_bytes());
        }
    }
    let search = encode_names(spec.dnssearch.iter().map(String::as_str));
    // A long list goes in several options that the client puts together (RFC 3396).
    for part in search.chunks(255) {
        reply.add(option::SEARCH, part);
    }
}
