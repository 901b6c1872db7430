//! Ports: the contract between whoever has frames and whoever takes them.

use crate::{Frame, Offloads, Room};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Taken (or dropped, as networks may).
    Done,
    /// Not taken: offer it again when the descriptor or the deadline says so.
    Busy,
}

/// Where frames for the guest go.
pub trait Receiver {
    /// Room for a frame of `len` bytes, header included: at least that much, in one or more buffers of the guest's.
    /// `None` if the guest has not given enough buffers: the port keeps what it has and waits until it is called again.
    fn reserve(&mut self, len: usize) -> Option<&Room<'_>>;
    /// The first `len` bytes of the room last reserved are a frame.
    fn commit(&mut self, len: usize);
    /// Largest frame, header included, for which [`Self::reserve`] can ever give room. Larger ones are to be dropped.
    fn largest(&self) -> usize;
}

/// One pair of queues of a backend: what one thread drives.
pub trait Port: Send {
    /// Becomes readable when [`Self::receive`] has something to do.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
    /// When [`Self::receive`] is to be called even if nothing becomes readable.
    fn deadline(&self) -> Option<Instant> {
        None
    }
    /// What the guest leaves to us in frames that it gets; called before the first frame and when the guest changes
    /// its mind.
    ///
    /// # Errors
    /// The host's refusal.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;
    /// Whether the guest uses this pair of queues.
    fn set_enabled(&mut self, _enabled: bool) {}
    /// Takes a frame from the guest.
    fn send(&mut self, frame: &Frame<'_>) -> Sent;
    /// Gives the guest what there is, until there is no more or no room.
    /// Called after each batch of [`Self::send`] too. Returns whether there is more that fits at once.
    ///
    /// # Errors
    /// The backend cannot go on.
    fn receive(&mut self, to: &mut dyn Receiver) -> io::Result<bool>;
}

impl<P: Port + ?Sized> Port for Box<P> {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        (**self).fd()
    }
    fn deadline(&self) -> Option<Instant> {
        (**self).deadline()
    }
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        (**self).set_offloads(offloads)
    }
    fn set_enabled(&mut self, enabled: bool) {
        (**self).set_enabled(enabled);
    }
    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        (**self).send(frame)
    }
    fn receive(&mut self, to: &mut dyn Receiver) -> io::Result<bool> {
        (**self).receive(to)
    }
}

/// A network backend.
pub struct Netdev {
    /// Name by which devices refer to it.
    pub id: String,
    /// Its kind, as in `--netdev KIND`.
    pub kind: &'static str,
    /// One line for people.
    pub about: String,
    /// What the guest may leave to us in frames it sends.
    pub takes: Offloads,
    /// What the guest can be given in frames it gets, if it wants.
    pub gives: Offloads,
    /// Largest IP packet, if it is not Ethernet's usual 1500.
    pub mtu: Option<u16>,
    /// Whether the cable is in.
    pub link: Arc<Link>,
    /// What went through.
    pub counters: Arc<Counters>,
    /// One for each pair of queues; at least one.
    pub ports: Vec<Box<dyn Port>>,
}

impl fmt::Debug for Netdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Netdev({} {}, {} ports)", self.kind, self.id, self.ports.len())
    }
}

/// Hears of changes of a link.
type Watcher = Box<dyn Fn(bool) + Send>;

/// Whether a cable is in.
#[derive(Default)]
pub struct Link {
    down: AtomicBool,
    watchers: Mutex<Vec<Watcher>>,
}

impl Link {
    /// Whether it is in.
    pub fn is_up(&self) -> bool {
        !self.down.load(Ordering::SeqCst)
    }

    /// Pulls the cable or puts it in; whoever watches is told of a change.
    pub fn set(&self, up: bool) {
        if self.down.swap(!up, Ordering::SeqCst) == up {
            self.watchers.lock().unwrap_or_else(|e| e.into_inner()).iter().for_each(|w| w(up));
        }
    }

    /// Calls `watcher` on each change, from the thread that makes it.
    pub fn watch(&self, watcher: impl Fn(bool) + Send + 'static) {
        self.watchers.lock().unwrap_or_else(|e| e.into_inner()).push(Box::new(watcher));
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_up() { "up" } else { "down" })
    }
}

/// What went through a netdev, from the guest's point of view. A large segment counts as one packet.
#[derive(Debug, Default)]
pub struct Counters {
    /// Packets that the guest got.
    pub rx_packets: AtomicU64,
    /// Bytes of these, without the header.
    pub rx_bytes: AtomicU64,
    /// Packets for which the guest had no room, or that it does not want.
    pub rx_dropped: AtomicU64,
    /// Packets that the guest sent.
    pub tx_packets: AtomicU64,
    /// Bytes of these.
    pub tx_bytes: AtomicU64,
    /// Packets of the guest's that could not be sent.
    pub tx_dropped: AtomicU64,
}

impl Counters {
    /// Adds to a counter; each has one writer at a time, or does not mind.
    pub fn add(counter: &AtomicU64, n: u64) {
        if n > 0 {
            counter.fetch_add(n, Ordering::Relaxed);
        }
    }
}

/// A hardware address.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// All of them.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it names a group (broadcast included).
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether it is all zeros.
    pub fn is_zero(self) -> bool {
        self.0 == [0; 6]
    }

    /// The address that QEMU gives its network card number `index` (from 0): 52:54:00:12:34:56 and so on.
    pub fn default_for(index: u8) -> Self {
        Self([0x52, 0x54, 0, 0x12, 0x34, 0x56u8.wrapping_add(index)])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("'{text}' is not a MAC address such as 52:54:00:12:34:56");
        let mut mac = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut mac {
            let part = parts.next().filter(|p| (1..=2).contains(&p.len())).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(Self(mac))
    }
}

impl TryFrom<String> for MacAddr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let mac: MacAddr = "52:54:00:12:34:56".parse().unwrap();
        assert_eq!((mac, mac.to_string().as_str()), (MacAddr::default_for(0), "52:54:00:12:34:56"));
        assert!(!mac.is_multicast() && MacAddr::BROADCAST.is_multicast());
        for bad in ["", "52:54", "52:54:00:12:34:5g", "52:54:00:12:34:56:78", "525:4:00:12:34:56"] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn watchers_hear_of_changes_only() {
        let link = Link::default();
        let seen = Arc::new(AtomicU64::new(0));
        let counter = seen.clone();
        link.watch(move |up| Counters::add(&counter, if up { 1 } else { 10 }));
        link.set(true);
        link.set(false);
        link.set(false);
        link.set(true);
        assert_eq!(seen.load(Ordering::Relaxed), 11);
    }
}
