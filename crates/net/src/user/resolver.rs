//! The host's name servers.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// How often the file is looked at.
const FRESH: Duration = Duration::from_secs(1);
/// How long a server may take before the next question goes to another.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Servers that are tried.
const MOST: usize = 8;

/// What `/etc/resolv.conf` says, as it is now.
#[derive(Debug)]
pub(super) struct Resolver {
    path: PathBuf,
    servers: Vec<SocketAddr>,
    current: usize,
    looked: Option<Instant>,
    modified: Option<SystemTime>,
    /// When the oldest question was asked that has no answer.
    asked: Option<Instant>,
}

impl Resolver {
    pub(super) fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), servers: Vec::new(), current: 0, looked: None, modified: None, asked: None }
    }

    /// Where to send the next question.
    pub(super) fn server(&mut self, now: Instant) -> Option<SocketAddr> {
        self.refresh(now);
        if self.asked.is_some_and(|t| now.duration_since(t) > PATIENCE) {
            self.current += 1;
            self.asked = None;
        }
        self.asked.get_or_insert(now);
        self.servers.get(self.current % self.servers.len().max(1)).copied()
    }

    /// A server has answered.
    pub(super) fn answered(&mut self) {
        self.asked = None;
    }

    fn refresh(&mut self, now: Instant) {
        if self.looked.is_some_and(|t| now.duration_since(t) < FRESH) {
            return;
        }
        self.looked = Some(now);
        let modified = std::fs::metadata(&self.path).and_then(|m| m.modified()).ok();
        if modified.is_some() && modified == self.modified {
            return;
        }
        self.modified = modified;
        self.current = 0;
        // Without the file there are no servers, and questions are refused.
        self.servers = parse(&std::fs::read_to_string(&self.path).unwrap_or_default());
    }
}

/// The servers of a resolver configuration (resolv.conf(5)).
fn parse(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some("nameserver") {
            return None;
        }
        let word = words.next()?;
        match word.split_once('%') {
            None => word.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, 53)),
            Some((ip, scope)) => {
                let index = scope.parse().ok().or_else(|| interface(scope))?;
                let ip = ip.parse::<Ipv6Addr>().ok()?;
                Some(SocketAddrV6::new(ip, 53, 0, index).into())
            }
        }
    };
    text.lines().filter_map(server).take(MOST).collect()
}

/// Index of a network interface.
fn interface(name: &str) -> Option<u32> {
    if name.contains('/') {
        return None;
    }
    std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations() {
        let text = "# nameserver 9.9.9.9\nnameserver 127.0.0.53 # local\nsearch x\nnameserver ::1\nnameserver fe80::1%3\n\
                    nameserver bad\n";
        let want = ["127.0.0.53:53", "[::1]:53", "[fe80::1%3]:53"];
        assert_eq!(parse(text).iter().map(ToString::to_string).collect::<Vec<_>>(), want);
    }

    #[test]
    fn a_silent_server_is_left() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "nameserver 192.0.2.1\nnameserver 192.0.2.2\n").unwrap();
        let mut resolver = Resolver::new(file.path());
        let start = Instant::now();
        let ask = |r: &mut Resolver, ms| r.server(start + Duration::from_millis(ms)).unwrap().to_string();
        assert_eq!(ask(&mut resolver, 0), "192.0.2.1:53");
        assert_eq!(ask(&mut resolver, 1000), "192.0.2.1:53");
        assert_eq!(ask(&mut resolver, 2000), "192.0.2.2:53");
        resolver.answered();
        assert_eq!(ask(&mut resolver, 9000), "192.0.2.2:53");
        assert_eq!(ask(&mut resolver, 9001 + 1500), "192.0.2.1:53");
    }
}
