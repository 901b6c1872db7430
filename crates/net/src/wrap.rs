//! What any backend can have around it: a dump of all frames, rate limits, and a filter against forged addresses.

use crate::wire::{ETHERNET, arp::Arp, be16, ethertype, ip};
use crate::{Error, Frame, MacAddr, Netdev, Offloads, Port, Receiver, Result, Room, Sent, VnetHeader};
use schemars::JsonSchema;
use serde::Deserialize;
use std::fs::File;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

/// Properties of every netdev.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Spec {
    /// File to which all frames are written (pcap).
    pub dump: Option<PathBuf>,
    /// Bytes of each frame that are written.
    #[schemars(extend("format" = "size"))]
    pub dump_maxlen: Option<u32>,
    /// Bytes a second that the guest may send.
    #[schemars(extend("format" = "size"))]
    pub tx_rate: Option<u64>,
    /// Bytes a second that the guest may get.
    #[schemars(extend("format" = "size"))]
    pub rx_rate: Option<u64>,
    /// Hardware address that the guest must send from.
    pub only_mac: Option<String>,
    /// IP addresses that the guest must send from, separated by ';'.
    pub only_ip: Option<String>,
}

impl Spec {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Tokens that come at a rate; a tenth of a second's worth may be saved up.
#[derive(Debug)]
struct Bucket {
    rate: u64,
    /// May be below zero: the last frame counts whole.
    tokens: i64,
    filled: Instant,
}

impl Bucket {
    fn new(rate: u64) -> Self {
        Self { rate, tokens: Self::burst(rate), filled: Instant::now() }
    }

    fn burst(rate: u64) -> i64 {
        i64::try_from(rate / 10).unwrap_or(i64::MAX).max(1)
    }

    fn open(&mut self, now: Instant) -> bool {
        let gained = now.duration_since(self.filled).as_nanos() * u128::from(self.rate) / 1_000_000_000;
        if gained > 0 {
            let gained = i64::try_from(gained).unwrap_or(i64::MAX);
            self.tokens = self.tokens.saturating_add(gained).min(Self::burst(self.rate));
            self.filled = now;
        }
        self.tokens > 0
    }

    fn take(&mut self, bytes: usize) {
        self.tokens = self.tokens.saturating_sub(bytes as i64);
    }

    /// When there are tokens again, if there are none.
    fn due(&self) -> Option<Instant> {
        let missing = u64::try_from(1i64.saturating_sub(self.tokens)).ok().filter(|m| *m > 0)?;
        let nanos = u128::from(missing) * 1_000_000_000 / u128::from(self.rate.max(1));
        Some(
            self.filled
                + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX).min(3_600_000_000_000)),
        )
    }
}

/// A capture file (the classic pcap format, with nanoseconds), shared by all queues.
#[derive(Debug)]
struct Dump {
    file: File,
    most: usize,
    failed: bool,
}

impl Dump {
    fn create(spec: &Spec) -> Result<Option<Arc<Mutex<Self>>>> {
        let Some(path) = &spec.dump else { return Ok(None) };
        let what = || Error::host(format!("netdev: dump={}", path.display()));
        let mut file = File::create(path).map_err(what())?;
        let most = spec.dump_maxlen.unwrap_or(65536 + 64);
        let mut header = 0xa1b2_3c4du32.to_ne_bytes().to_vec();
        header.extend_from_slice(&2u16.to_ne_bytes());
        header.extend_from_slice(&4u16.to_ne_bytes());
        header.extend_from_slice(&[0; 8]);
        header.extend_from_slice(&most.to_ne_bytes());
        header.extend_from_slice(&1u32.to_ne_bytes()); // Ethernet
        file.write_all(&header).map_err(what())?;
        Ok(Some(Arc::new(Mutex::new(Self { file, most: most as usize, failed: false }))))
    }

    fn write(&mut self, frame: &[u8]) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let kept = &frame[..frame.len().min(self.most)];
        let mut record = Vec::with_capacity(16 + kept.len());
        for word in [now.as_secs() as u32, now.subsec_nanos(), kept.len() as u32, frame.len() as u32] {
            record.extend_from_slice(&word.to_ne_bytes());
        }
        record.extend_from_slice(kept);
        if let Err(e) = self.file.write_all(&record)
            && !std::mem::replace(&mut self.failed, true)
        {
            tracing::warn!("the network dump cannot be written: {e}; it is incomplete");
        }
    }
}

/// Who a guest is: what it sends must come from there.
#[derive(Clone, Debug)]
struct Identity {
    mac: Option<MacAddr>,
    ips: Option<Vec<IpAddr>>,
}

impl Identity {
    fn new(spec: &Spec) -> Result<Option<Self>> {
        let bad = |e: String| Error::Config(format!("netdev: {e}"));
        let mac =
            spec.only_mac.as_ref().map(|m| m.parse().map_err(|e: String| bad(format!("only-mac=: {e}"))));
        let ips = spec.only_ip.as_ref().map(|list| {
            let parse =
                |t: &str| t.parse().map_err(|_| bad(format!("only-ip={list}: '{t}' is not an IP address")));
            list.split(';').map(parse).collect::<Result<Vec<IpAddr>>>()
        });
        let identity = Self { mac: mac.transpose()?, ips: ips.transpose()? };
        Ok((identity.mac.is_some() || identity.ips.is_some()).then_some(identity))
    }

    /// Whether a frame, of which this is the start, is from who it should be.
    fn allows(&self, b: &[u8]) -> bool {
        if b.len() < ETHERNET {
            return false;
        }
        let src = MacAddr(crate::wire::array(b, 6));
        if self.mac.is_some_and(|mac| mac != src) {
            return false;
        }
        let payload = &b[ETHERNET..];
        match be16(b, 12) {
            ethertype::ARP => Arp::parse(payload).is_some_and(|arp| {
                arp.sender_mac == src && (arp.sender.is_unspecified() || self.has(arp.sender.into()))
            }),
            ethertype::IPV4 | ethertype::IPV6 => {
                ip::Ip::parse(payload).is_some_and(|ip| self.may_send(ip.src))
            }
            // Nothing else has addresses that could be checked, tagged frames included.
            _ => self.ips.is_none() && be16(b, 12) != ethertype::VLAN,
        }
    }

    fn has(&self, ip: IpAddr) -> bool {
        self.ips.as_ref().is_none_or(|ips| ips.contains(&ip))
    }

    fn may_send(&self, ip: IpAddr) -> bool {
        // Who asks for an address has none yet.
        let none = ip == IpAddr::V4(Ipv4Addr::UNSPECIFIED) || ip == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        let link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        none || link_local || self.has(ip)
    }
}

struct Wrapped {
    inner: Box<dyn Port>,
    dump: Option<Arc<Mutex<Dump>>>,
    identity: Option<Identity>,
    tx: Option<Bucket>,
    rx: Option<Bucket>,
    buffer: Vec<u8>,
}

/// Puts around the ports of a netdev what `spec` wants.
///
/// # Errors
/// Malformed addresses, or a file that cannot be written.
pub fn wrap(mut netdev: Netdev, spec: &Spec) -> Result<Netdev> {
    if spec.is_empty() {
        return Ok(netdev);
    }
    if spec.tx_rate == Some(0) || spec.rx_rate == Some(0) {
        return Err(Error::Config(
            "netdev: a rate of 0 lets nothing through; leave it out for no limit".into(),
        ));
    }
    if spec.dump.is_none() && spec.dump_maxlen.is_some() {
        return Err(Error::Config("netdev: dump-maxlen= needs dump=".into()));
    }
    let (dump, identity) = (Dump::create(spec)?, Identity::new(spec)?);
    let queues = netdev.ports.len().max(1) as u64;
    let bucket = |rate: Option<u64>| rate.map(|r| Bucket::new((r / queues).max(1)));
    netdev.ports = netdev
        .ports
        .into_iter()
        .map(|inner| -> Box<dyn Port> {
            Box::new(Wrapped {
                inner,
                dump: dump.clone(),
                identity: identity.clone(),
                tx: bucket(spec.tx_rate),
                rx: bucket(spec.rx_rate),
                buffer: Vec::new(),
            })
        })
        .collect();
    Ok(netdev)
}

/// Looks at what passes to the guest.
struct Watcher<'a> {
    to: &'a mut dyn Receiver,
    /// With a dump, frames are put together here first.
    copy: Option<(&'a Mutex<Dump>, Room<'a>)>,
    bytes: usize,
}

impl Receiver for Watcher<'_> {
    fn reserve(&mut self, len: usize) -> Option<&Room<'_>> {
        match &self.copy {
            Some((_, room)) => self.to.reserve(len).is_some().then_some(room),
            None => self.to.reserve(len),
        }
    }

    fn commit(&mut self, len: usize) {
        self.bytes += len.saturating_sub(VnetHeader::LEN);
        if let Some((dump, room)) = &self.copy {
            let mut frame = vec![0; len];
            room.copy_to(0, &mut frame);
            // It was there a moment ago.
            let Some(to) = self.to.reserve(len) else { return };
            to.write(0, &frame);
            if len > VnetHeader::LEN {
                dump.lock().unwrap_or_else(|e| e.into_inner()).write(&frame[VnetHeader::LEN..]);
            }
        }
        self.to.commit(len);
    }

    fn largest(&self) -> usize {
        self.to.largest()
    }
}

impl Port for Wrapped {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        let shut = self.rx.as_ref().is_some_and(|b| b.tokens <= 0);
        self.inner.fd().filter(|_| !shut)
    }

    fn deadline(&self) -> Option<Instant> {
        let buckets = [&self.tx, &self.rx].into_iter().flatten().filter_map(Bucket::due);
        self.inner.deadline().into_iter().chain(buckets).min()
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.inner.set_offloads(offloads)
    }

    fn set_enabled(&mut self, enabled: bool) {
        self.inner.set_enabled(enabled);
    }

    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        if let Some(bucket) = &mut self.tx
            && !bucket.open(Instant::now())
        {
            return Sent::Busy;
        }
        if let Some(identity) = &self.identity {
            let mut start = [0; 128];
            let n = frame.copy_to(VnetHeader::LEN, &mut start);
            if !identity.allows(&start[..n]) {
                return Sent::Done; // dropped
            }
        }
        let sent = self.inner.send(frame);
        if sent == Sent::Done {
            let len = frame.len().saturating_sub(VnetHeader::LEN);
            if let Some(bucket) = &mut self.tx {
                bucket.take(len);
            }
            if let Some(dump) = &self.dump {
                let mut bytes = Vec::new();
                frame.append_to(VnetHeader::LEN, len, &mut bytes);
                dump.lock().unwrap_or_else(|e| e.into_inner()).write(&bytes);
            }
        }
        sent
    }

    fn receive(&mut self, to: &mut dyn Receiver) -> io::Result<bool> {
        if let Some(bucket) = &mut self.rx
            && !bucket.open(Instant::now())
        {
            return Ok(false);
        }
        let copy = self.dump.as_ref().map(|dump| {
            self.buffer.resize(1 << 17, 0);
            (&**dump, Room::of(&mut self.buffer))
        });
        let mut watcher = Watcher { to, copy, bytes: 0 };
        let more = self.inner.receive(&mut watcher)?;
        if let Some(bucket) = &mut self.rx {
            bucket.take(watcher.bytes);
            return Ok(more && bucket.tokens > 0);
        }
        Ok(more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Cable, MAC};
    use crate::user;

    const GATEWAY: MacAddr = MacAddr([0x52, 0x55, 10, 0, 2, 2]);

    fn cable(spec: &Spec) -> Cable<Box<dyn Port>> {
        let (netdev, _) = user::open("n", &user::Spec::default()).unwrap();
        let port = wrap(netdev, spec).unwrap().ports.remove(0);
        Cable::new(port, GATEWAY)
    }

    fn ask(c: &mut Cable<Box<dyn Port>>, sender_mac: MacAddr, sender: [u8; 4]) -> bool {
        let request = Arp {
            operation: 1,
            sender_mac,
            sender: sender.into(),
            target_mac: MacAddr::default(),
            target: [10, 0, 2, 2].into(),
        };
        c.send_ethernet(MacAddr::BROADCAST, ethertype::ARP, &request.to_bytes());
        c.inbox.frames.pop_front().is_some()
    }

    #[test]
    fn forged_addresses_do_not_pass() {
        let spec = Spec {
            only_mac: Some(MAC.to_string()),
            only_ip: Some("10.0.2.15;10.0.2.16".into()),
            ..Spec::default()
        };
        let mut c = cable(&spec);
        assert!(ask(&mut c, MAC, [10, 0, 2, 15]) && ask(&mut c, MAC, [10, 0, 2, 16]));
        assert!(!ask(&mut c, MAC, [10, 0, 2, 99]), "another's IP address");
        assert!(!ask(&mut c, MacAddr([2; 6]), [10, 0, 2, 15]), "another's hardware address");
        let other = Spec { only_mac: Some("02:00:00:00:00:01".into()), ..Spec::default() };
        assert!(!ask(&mut cable(&other), MAC, [10, 0, 2, 15]));
        assert!(Identity::new(&Spec { only_ip: Some("x".into()), ..Spec::default() }).is_err());
    }

    #[test]
    fn rates_hold_frames_back() {
        let mut bucket = Bucket::new(1000);
        let start = bucket.filled;
        bucket.take(1100);
        assert!(!bucket.open(start));
        let due = bucket.due().unwrap();
        assert!(due >= start + Duration::from_secs(1) && due < start + Duration::from_millis(1100));
        assert!(bucket.open(due + Duration::from_millis(1)));
        let mut c = cable(&Spec { rx_rate: Some(100), ..Spec::default() });
        assert!(ask(&mut c, MAC, [10, 0, 2, 15]), "the first is within the burst");
        assert!(!ask(&mut c, MAC, [10, 0, 2, 15]));
        assert!(c.port.fd().is_none() && c.port.deadline().is_some());
    }

    #[test]
    fn dumps_hold_both_directions() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut c = cable(&Spec { dump: Some(file.path().into()), ..Spec::default() });
        assert!(ask(&mut c, MAC, [10, 0, 2, 15]));
        let b = std::fs::read(file.path()).unwrap();
        let record = 16 + 14 + 28;
        assert_eq!(b.len(), 24 + 2 * record);
        assert_eq!(b[..4], 0xa1b2_3c4du32.to_ne_bytes());
        let frame = |i: usize| &b[24 + i * record + 16..24 + (i + 1) * record];
        assert_eq!((&frame(0)[..6], &frame(1)[..6]), (&[0xff; 6][..], &MAC.0[..]));
    }
}
