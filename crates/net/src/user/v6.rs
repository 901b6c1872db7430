//! What makes an IPv6 link of the cable: router and neighbour discovery, and a DHCPv6 server.

use super::config::Config;
use super::lan::Lan;
use crate::MacAddr;
use crate::wire::dhcp::encode_names;
use crate::wire::dhcp6::{CLIENT_PORT, Reply, Request, SERVER_PORT, kind, option};
use crate::wire::ndp::{ALL_NODES, Message, Router, advertise};
use crate::wire::protocol;
use std::net::{IpAddr, Ipv6Addr};

/// Our link-local address.
pub(super) const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// All DHCP servers on the link.
const ALL_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
/// Group address of the multicast "all nodes".
const ALL_NODES_MAC: MacAddr = MacAddr([0x33, 0x33, 0, 0, 0, 1]);

/// Whether a packet to this address is for us.
pub(super) fn is_ours(ip: Ipv6Addr, config: &Config) -> bool {
    ip == LINK_LOCAL || config.is_ours(ip.into())
}

/// A neighbour discovery message.
pub(super) fn ndp(message: &[u8], src: Ipv6Addr, mac: MacAddr, config: &Config, lan: &mut Lan) {
    let (Some(net), Some(message)) = (config.v6, Message::parse(message)) else { return };
    match message {
        Message::RouterSolicitation => {
            let search = encode_names(config.spec.dnssearch.iter().map(String::as_str));
            let router = Router {
                mac: lan.mac,
                link_local: LINK_LOCAL,
                lifetime: if config.spec.restrict { 0 } else { 1800 },
                prefix: net.net,
                prefix_len: net.bits,
                mtu: (config.mtu != 1500).then_some(config.mtu.into()),
                dns: Some(net.dns).filter(|_| !config.spec.restrict),
                search: &search,
            };
            let b = router.advertisement(ALL_NODES);
            lan.ip(ALL_NODES_MAC, LINK_LOCAL.into(), ALL_NODES.into(), protocol::ICMPV6, 255, &b);
        }
        Message::Solicitation { target, source } => {
            if let Some(mac) = source {
                lan.learn(src.into(), mac);
            }
            if !is_ours(target, config) {
                return;
            }
            // One that looks for a duplicate has no address yet (RFC 4862, 5.4).
            let (to, to_mac) =
                if src.is_unspecified() { (ALL_NODES, ALL_NODES_MAC) } else { (src, source.unwrap_or(mac)) };
            let b = advertise(target, lan.mac, to, !src.is_unspecified());
            lan.ip(to_mac, target.into(), to.into(), protocol::ICMPV6, 255, &b);
        }
        Message::Advertisement { target, mac } => {
            if let Some(mac) = mac {
                lan.learn(target.into(), mac);
            }
        }
    }
}

/// A DHCPv6 message; `dst` is what it was addressed to.
pub(super) fn dhcp(payload: &[u8], src: IpAddr, dst: IpAddr, mac: MacAddr, config: &Config, lan: &mut Lan) {
    if dst != IpAddr::V6(ALL_SERVERS) && dst != IpAddr::V6(LINK_LOCAL) {
        return;
    }
    let (Some(net), Some(request)) = (config.v6, Request::parse(payload)) else { return };
    // DUID of our hardware address (RFC 8415, 11.4).
    let mut server = vec![0, 3, 0, 1];
    server.extend_from_slice(&lan.mac.0);
    if request.server_id.as_ref().is_some_and(|s| *s != server) {
        return;
    }
    let answer = match request.kind {
        kind::SOLICIT if !request.rapid => kind::ADVERTISE,
        kind::SOLICIT
        | kind::REQUEST
        | kind::CONFIRM
        | kind::RENEW
        | kind::REBIND
        | kind::RELEASE
        | kind::DECLINE
        | kind::INFORMATION => kind::REPLY,
        _ => return,
    };
    let mut reply = Reply::new(answer, request.xid);
    if !request.client_id.is_empty() {
        reply.add(option::CLIENT_ID, &request.client_id);
    }
    reply.add(option::SERVER_ID, &server);
    if request.kind == kind::SOLICIT && request.rapid {
        reply.add(option::RAPID_COMMIT, &[]);
    }
    let gives = [kind::SOLICIT, kind::REQUEST, kind::RENEW, kind::REBIND].contains(&request.kind);
    if let Some((id, _)) = request.addresses.as_ref().filter(|_| gives) {
        // The address is made of the hardware address, so that it is always the same one.
        let [a, b, c, d, e, f] = mac.0;
        let tail = u128::from(u64::from_be_bytes([0, 0, a, b, c, d, e, f]));
        let host_bits = u128::MAX.checked_shr(net.bits.into()).unwrap_or(0);
        let address = Ipv6Addr::from(u128::from(net.net) | (tail & host_bits));
        let mut set = id.to_be_bytes().to_vec();
        set.extend_from_slice(&43200u32.to_be_bytes());
        set.extend_from_slice(&69120u32.to_be_bytes());
        if !config.is_ours(address.into()) {
            set.extend_from_slice(&option::IA_ADDR.to_be_bytes());
            set.extend_from_slice(&24u16.to_be_bytes());
            set.extend_from_slice(&address.octets());
            set.extend_from_slice(&86400u32.to_be_bytes());
            set.extend_from_slice(&86400u32.to_be_bytes());
            lan.learn(address.into(), mac);
        }
        reply.add(option::IA_NA, &set);
    } else if [kind::CONFIRM, kind::RELEASE, kind::DECLINE].contains(&request.kind) {
        reply.add(option::STATUS, &[0, 0]);
    }
    if !config.spec.restrict {
        reply.add(option::DNS, &net.dns.octets());
    }
    let search = encode_names(config.spec.dnssearch.iter().map(String::as_str));
    if !search.is_empty() {
        reply.add(option::SEARCH, &search);
    }
    if let Some(file) = &config.spec.bootfile
        && config.spec.tftp.is_some()
    {
        reply.add(option::BOOT_URL, format!("tftp://[{}]/{file}", net.host).as_bytes());
    }
    lan.udp(mac, (LINK_LOCAL.into(), SERVER_PORT), (src, CLIENT_PORT), &reply.finish());
}
