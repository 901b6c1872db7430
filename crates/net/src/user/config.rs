//! Properties of a user-mode network, and what they mean.

use crate::{Error, Result};
use schemars::JsonSchema;
use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

/// Properties of `--netdev user`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Spec {
    /// Have IPv4.
    pub ipv4: bool,
    /// Have IPv6.
    pub ipv6: bool,
    /// Network that the guest is in: ADDRESS[/BITS or /MASK].
    pub net: Option<String>,
    /// Address of the host as the guest sees it, which is its gateway; the second of the network if not given.
    pub host: Option<Ipv4Addr>,
    /// Address of the name server that the guest sees; the third of the network if not given.
    pub dns: Option<Ipv4Addr>,
    /// First address that DHCP gives; the 15th of the network if not given.
    pub dhcpstart: Option<Ipv4Addr>,
    /// IPv6 prefix that the guest is in: PREFIX[/BITS].
    #[serde(alias = "ipv6-prefix")]
    pub ipv6_net: Option<String>,
    /// IPv6 address of the host as the guest sees it.
    pub ipv6_host: Option<Ipv6Addr>,
    /// IPv6 address of the name server that the guest sees.
    pub ipv6_dns: Option<Ipv6Addr>,
    /// Keep the guest from everything but forwarded ports.
    pub restrict: bool,
    /// Let the guest reach services that listen on the host's loopback, at the gateway's address.
    pub host_loopback: bool,
    /// Host name that DHCP gives.
    pub hostname: Option<String>,
    /// Domain name that DHCP gives.
    pub domainname: Option<String>,
    /// Domains to search, given by DHCP; may be repeated.
    pub dnssearch: Vec<String>,
    /// Largest IP packet.
    pub mtu: Option<u16>,
    /// Forward a port of the host to the guest: PROTOCOL:[ADDRESS]:PORT-[ADDRESS]:PORT; may be repeated.
    pub hostfwd: Vec<String>,
    /// Forward an address and port that the guest sees: tcp:ADDRESS:PORT-TARGET, where TARGET is cmd:COMMAND,
    /// tcp:ADDRESS:PORT or unix:PATH; may be repeated.
    pub guestfwd: Vec<String>,
    /// Directory whose files the guest can get by TFTP.
    pub tftp: Option<PathBuf>,
    /// Name of the TFTP server that DHCP gives.
    pub tftp_server_name: Option<String>,
    /// File to boot, given by DHCP.
    pub bootfile: Option<String>,
    /// Connections of each protocol at most.
    pub max_connections: u32,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            ipv4: true,
            ipv6: true,
            net: None,
            host: None,
            dns: None,
            dhcpstart: None,
            ipv6_net: None,
            ipv6_host: None,
            ipv6_dns: None,
            restrict: false,
            host_loopback: false,
            hostname: None,
            domainname: None,
            dnssearch: Vec::new(),
            mtu: None,
            hostfwd: Vec::new(),
            guestfwd: Vec::new(),
            tftp: None,
            tftp_server_name: None,
            bootfile: None,
            max_connections: 4096,
        }
    }
}

/// The IPv4 network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Net4 {
    /// Its first address.
    pub net: Ipv4Addr,
    /// Length of the prefix.
    pub bits: u8,
    /// The host, which is the gateway.
    pub host: Ipv4Addr,
    /// The name server.
    pub dns: Ipv4Addr,
    /// First address for guests.
    pub first: Ipv4Addr,
}

/// The IPv6 network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Net6 {
    /// Its first address.
    pub net: Ipv6Addr,
    /// Length of the prefix.
    pub bits: u8,
    /// The host.
    pub host: Ipv6Addr,
    /// The name server.
    pub dns: Ipv6Addr,
}

/// What a guest's packet is addressed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The host's name servers.
    Resolver,
    /// A socket address on the host or beyond.
    Address(SocketAddr),
    /// Something that the guest may not have, or that is not there.
    Refused,
}

fn bad<T>(text: String) -> Result<T> {
    Err(Error::Config(format!("netdev user: {text}")))
}

impl Net4 {
    /// The mask.
    pub fn mask(&self) -> Ipv4Addr {
        Ipv4Addr::from(mask(self.bits))
    }

    /// The broadcast address.
    pub fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.net) | !mask(self.bits))
    }

    /// Whether an address is in the network.
    pub fn contains(&self, ip: Ipv4Addr) -> bool {
        u32::from(ip) & mask(self.bits) == u32::from(self.net)
    }

    fn new(spec: &Spec) -> Result<Self> {
        let text = spec.net.as_deref().unwrap_or("10.0.2.0/24");
        let (addr, rest) = text.split_once('/').map_or((text, None), |(a, r)| (a, Some(r)));
        let Ok(addr) = addr.parse::<Ipv4Addr>() else {
            return bad(format!("net={text} is not an IPv4 network such as 10.0.2.0/24"));
        };
        let bits = match rest {
            // As the classes of old have it.
            None => match addr.octets()[0] {
                0..=127 => 8,
                128..=191 => 16,
                _ => 24,
            },
            Some(rest) => {
                let by_mask = || {
                    let m = u32::from(rest.parse::<Ipv4Addr>().ok()?);
                    (m.leading_ones() + m.trailing_zeros() == 32).then_some(m.leading_ones() as u8)
                };
                match rest.parse::<u8>().ok().or_else(by_mask) {
                    Some(bits @ 4..=27) => bits,
                    _ => return bad(format!("net={text}: the prefix must have 4 to 27 bits")),
                }
            }
        };
        let net = u32::from(addr) & mask(bits);
        let nth = |n: u32| Ipv4Addr::from(net | n);
        let net4 = Self {
            net: nth(0),
            bits,
            host: spec.host.unwrap_or(nth(2)),
            dns: spec.dns.unwrap_or(nth(3)),
            first: spec.dhcpstart.unwrap_or(nth(15)),
        };
        for (name, ip) in [("host", net4.host), ("dns", net4.dns), ("dhcpstart", net4.first)] {
            if !net4.contains(ip) || ip == net4.net || ip == net4.broadcast() {
                return bad(format!("{name}={ip} is not a host's address in {}/{bits}", net4.net));
            }
        }
        if net4.host == net4.dns {
            return bad("host= and dns= must differ".into());
        }
        if [net4.host, net4.dns].contains(&net4.first) {
            return bad("dhcpstart= must differ from host= and dns=".into());
        }
        Ok(net4)
    }
}

fn mask(bits: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0)
}

impl Net6 {
    /// Whether an address is in the network.
    pub fn contains(&self, ip: Ipv6Addr) -> bool {
        u128::from(ip) & mask6(self.bits) == u128::from(self.net)
    }

    fn new(spec: &Spec) -> Result<Self> {
        let text = spec.ipv6_net.as_deref().unwrap_or("fec0::/64");
        let (addr, bits) = text.split_once('/').unwrap_or((text, "64"));
        let (Ok(addr), Ok(bits)) = (addr.parse::<Ipv6Addr>(), bits.parse::<u8>()) else {
            return bad(format!("ipv6-net={text} is not an IPv6 prefix such as fec0::/64"));
        };
        if !(1..=126).contains(&bits) {
            return bad(format!("ipv6-net={text}: the prefix must have 1 to 126 bits"));
        }
        let net = u128::from(addr) & mask6(bits);
        let nth = |n: u128| Ipv6Addr::from(net | n);
        let net6 = Self {
            net: nth(0),
            bits,
            host: spec.ipv6_host.unwrap_or(nth(2)),
            dns: spec.ipv6_dns.unwrap_or(nth(3)),
        };
        for (name, ip) in [("ipv6-host", net6.host), ("ipv6-dns", net6.dns)] {
            if !net6.contains(ip) {
                return bad(format!("{name}={ip} is not in {}/{bits}", net6.net));
            }
        }
        if net6.host == net6.dns {
            return bad("ipv6-host= and ipv6-dns= must differ".into());
        }
        Ok(net6)
    }
}

fn mask6(bits: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0)
}

/// A checked [`Spec`].
#[derive(Clone, Debug)]
pub struct Config {
    /// The IPv4 network.
    pub v4: Option<Net4>,
    /// The IPv6 network.
    pub v6: Option<Net6>,
    /// Largest IP packet.
    pub mtu: u16,
    /// The rest.
    pub spec: Spec,
}

impl Config {
    /// Checks properties.
    ///
    /// # Errors
    /// Those that make no sense.
    pub fn new(spec: &Spec) -> Result<Self> {
        if !spec.ipv4 && !spec.ipv6 {
            return bad("ipv4=off and ipv6=off leave nothing; leave one out".into());
        }
        let mtu = spec.mtu.unwrap_or(1500);
        if !(1280..=65520).contains(&mtu) {
            return bad(format!("mtu={mtu} must be from 1280 to 65520"));
        }
        if !(1..=65536).contains(&spec.max_connections) {
            return bad("max-connections= must be from 1 to 65536".into());
        }
        if let Some(dir) = &spec.tftp
            && !dir.is_dir()
        {
            return bad(format!("tftp={} is not a directory", dir.display()));
        }
        for (name, text) in [("hostname", &spec.hostname), ("domainname", &spec.domainname)] {
            if text.as_ref().is_some_and(|t| t.is_empty() || t.len() > 253) {
                return bad(format!("{name}= must have 1 to 253 characters"));
            }
        }
        if spec.bootfile.as_ref().is_some_and(|f| f.len() > 127) {
            return bad("bootfile= must have at most 127 characters".into());
        }
        let v4 = if spec.ipv4 { Some(Net4::new(spec)?) } else { None };
        let v6 = if spec.ipv6 { Some(Net6::new(spec)?) } else { None };
        Ok(Self { v4, v6, mtu, spec: spec.clone() })
    }

    /// Whether an address is one of ours on the guest's network.
    pub fn is_ours(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => self.v4.is_some_and(|n| ip == n.host || ip == n.dns),
            IpAddr::V6(ip) => self.v6.is_some_and(|n| ip == n.host || ip == n.dns),
        }
    }

    /// Whether an address is on the guest's network.
    pub fn is_local(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => self.v4.is_some_and(|n| n.contains(ip)),
            IpAddr::V6(ip) => self.v6.is_some_and(|n| n.contains(ip)) || ip.is_unicast_link_local(),
        }
    }

    /// The host's address on the guest's network, of the same family as `like`.
    pub fn host(&self, like: IpAddr) -> Option<IpAddr> {
        match like {
            IpAddr::V4(_) => self.v4.map(|n| n.host.into()),
            IpAddr::V6(_) => self.v6.map(|n| n.host.into()),
        }
    }

    /// Where a connection or datagram of the guest's to `ip:port` goes. Never to the host's loopback unless that was
    /// asked for: neither by its addresses nor by the unspecified ones, which mean the same to the kernel.
    pub fn target(&self, ip: IpAddr, port: u16) -> Target {
        let dns = match ip {
            IpAddr::V4(ip) => self.v4.is_some_and(|n| ip == n.dns),
            IpAddr::V6(ip) => self.v6.is_some_and(|n| ip == n.dns),
        };
        if self.spec.restrict {
            return Target::Refused;
        }
        if dns {
            return if port == 53 { Target::Resolver } else { Target::Refused };
        }
        if Some(ip) == self.host(ip) {
            let loopback: IpAddr =
                if ip.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
            return if self.spec.host_loopback {
                Target::Address((loopback, port).into())
            } else {
                Target::Refused
            };
        }
        let special = match ip {
            // "This network", loopback, reserved and broadcast; the rest of 169.254 is somebody's cloud service.
            IpAddr::V4(ip) => matches!(ip.octets()[0], 0 | 127 | 240..=255) || ip.is_multicast(),
            IpAddr::V6(ip) => {
                ip.is_loopback()
                    || ip.is_unspecified()
                    || ip.is_multicast()
                    || ip.is_unicast_link_local()
                    || ip.to_ipv4().is_some()
            }
        };
        if special || self.is_local(ip) || port == 0 {
            return Target::Refused;
        }
        Target::Address((ip, port).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(change: impl FnOnce(&mut Spec)) -> Result<Config> {
        let mut spec = Spec::default();
        change(&mut spec);
        Config::new(&spec)
    }

    #[test]
    fn networks() {
        let n = config(|_| ()).unwrap().v4.unwrap();
        assert_eq!(
            (n.host, n.dns, n.first),
            ([10, 0, 2, 2].into(), [10, 0, 2, 3].into(), [10, 0, 2, 15].into())
        );
        assert_eq!((n.mask(), n.broadcast()), ([255, 255, 255, 0].into(), [10, 0, 2, 255].into()));
        let n = config(|s| s.net = Some("192.168.5.77/255.255.255.128".into())).unwrap().v4.unwrap();
        assert_eq!((n.net, n.bits, n.first), ([192, 168, 5, 0].into(), 25, [192, 168, 5, 15].into()));
        assert_eq!(config(|s| s.net = Some("172.16.0.0".into())).unwrap().v4.unwrap().bits, 16);
        for bad in ["x", "10.0.0.0/33", "10.0.0.0/255.0.255.0", "10.0.0.0/30"] {
            assert!(config(|s| s.net = Some(bad.into())).is_err(), "{bad}");
        }
        assert!(config(|s| s.host = Some([10, 0, 3, 2].into())).is_err());
        assert!(config(|s| s.dns = Some([10, 0, 2, 2].into())).is_err());
        assert!(config(|s| s.ipv6_net = Some("fec0::/x".into())).is_err());
        assert!(config(|s| (s.ipv4, s.ipv6) = (false, false)).is_err());
    }

    #[test]
    fn the_hosts_loopback_is_out_of_reach() {
        let c = config(|_| ()).unwrap();
        for ip in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "0.1.2.3",
            "255.255.255.255",
            "224.0.0.1",
            "10.0.2.2",
            "10.0.2.77",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::127.0.0.1",
            "fe80::1",
            "ff02::1",
            "fec0::2",
            "fec0::77",
        ] {
            assert_eq!(c.target(ip.parse().unwrap(), 80), Target::Refused, "{ip}");
        }
        assert_eq!(c.target([10, 0, 2, 3].into(), 53), Target::Resolver);
        assert_eq!(c.target([10, 0, 2, 3].into(), 80), Target::Refused);
        let out = "192.0.2.1:80".parse().unwrap();
        assert_eq!(c.target([192, 0, 2, 1].into(), 80), Target::Address(out));
        let asked = config(|s| s.host_loopback = true).unwrap();
        assert_eq!(asked.target([10, 0, 2, 2].into(), 80), Target::Address("127.0.0.1:80".parse().unwrap()));
        assert_eq!(asked.target("127.0.0.1".parse().unwrap(), 80), Target::Refused);
        let restricted = config(|s| s.restrict = true).unwrap();
        assert_eq!(restricted.target([192, 0, 2, 1].into(), 80), Target::Refused);
    }
}
