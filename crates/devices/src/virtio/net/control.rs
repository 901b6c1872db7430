//! The control queue (virtio 1.2, 5.1.6.5): which frames the guest wants, and how.

use super::{Shared, feature, guest_offloads};
use bus::virtio::{Chain, Interrupt, Queue, QueueError, SharedQueue};
use memory::GuestMemory;
use net::{MacAddr, Offloads};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;

/// Addresses that a driver may list; with more it gets all of that kind.
const MOST_ADDRESSES: usize = 64;
/// Commands served in one go; the driver waits for each.
const BATCH: u32 = 64;

/// Result of a command.
const OK: u8 = 0;
const ERROR: u8 = 1;

/// Which frames the driver wants, and in which form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Control {
    pub(super) mac: MacAddr,
    /// Feature bits of offloads in effect.
    pub(super) offloads: u64,
    modes: Modes,
    unicast: Vec<MacAddr>,
    multicast: Vec<MacAddr>,
    vlans: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Modes {
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
}

/// Saved form.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Saved {
    mac: MacAddr,
    offloads: u64,
    modes: Modes,
    unicast: Vec<MacAddr>,
    multicast: Vec<MacAddr>,
    vlans: Vec<u64>,
    pub(super) pairs: u16,
}

/// Words of the VLAN bitmap.
const VLAN_WORDS: usize = 4096 / 64;

impl Control {
    pub(super) fn new(mac: MacAddr) -> Self {
        Self {
            mac,
            offloads: 0,
            // A device starts promiscuous: drivers without a control queue get everything.
            modes: Modes {
                promiscuous: true,
                all_multicast: false,
                all_unicast: false,
                no_multicast: false,
                no_unicast: false,
                no_broadcast: false,
            },
            unicast: Vec::new(),
            multicast: Vec::new(),
            vlans: vec![0; VLAN_WORDS],
        }
    }

    pub(super) fn save(&self, pairs: u16) -> Saved {
        let Self { mac, offloads, modes, unicast, multicast, vlans } = self.clone();
        Saved { mac, offloads, modes, unicast, multicast, vlans, pairs }
    }

    pub(super) fn load(saved: Saved) -> Option<Self> {
        let Saved { mac, offloads, modes, unicast, multicast, vlans, .. } = saved;
        let fits =
            unicast.len() <= MOST_ADDRESSES && multicast.len() <= MOST_ADDRESSES && vlans.len() == VLAN_WORDS;
        fits.then_some(Self { mac, offloads, modes, unicast, multicast, vlans })
    }

    /// What the guest takes now.
    pub(super) fn guest_offloads(&self) -> Offloads {
        guest_offloads(self.offloads)
    }

    /// Whether the driver wants a frame, which begins with `start` (18 bytes, for address and VLAN).
    pub(super) fn wants(&self, start: &[u8; 18], features: u64) -> bool {
        let vlan = u16::from_be_bytes([start[12], start[13]]) == 0x8100;
        if vlan && features & feature::CTRL_VLAN != 0 {
            let id = usize::from(u16::from_be_bytes([start[14], start[15]]) & 0xfff);
            if self.vlans[id / 64] & 1 << (id % 64) == 0 {
                return false;
            }
        }
        if features & (feature::CTRL_RX | feature::CTRL_RX_EXTRA) == 0 {
            return true;
        }
        let mut to = MacAddr::default();
        to.0.copy_from_slice(&start[..6]);
        let m = &self.modes;
        if to == MacAddr::BROADCAST {
            return !m.no_broadcast;
        }
        if m.promiscuous {
            return true;
        }
        if to.is_multicast() {
            return !m.no_multicast && (m.all_multicast || self.multicast.contains(&to));
        }
        !m.no_unicast && (m.all_unicast || to == self.mac || self.unicast.contains(&to))
    }

    /// Carries out a command: class, command, data.
    fn command(&mut self, b: &[u8], features: u64, shared: &Shared) -> Option<()> {
        let on = || match b {
            [_, _, value] => Some(*value != 0),
            _ => None,
        };
        let has = |bit: u64| (features & bit != 0).then_some(());
        match (*b.first()?, *b.get(1)?) {
            (0, 0) => has(feature::CTRL_RX).map(|()| self.modes.promiscuous = on().unwrap_or(true)),
            (0, 1) => has(feature::CTRL_RX).map(|()| self.modes.all_multicast = on().unwrap_or(true)),
            (0, 2) => has(feature::CTRL_RX_EXTRA).map(|()| self.modes.all_unicast = on().unwrap_or(true)),
            (0, 3) => has(feature::CTRL_RX_EXTRA).map(|()| self.modes.no_multicast = on().unwrap_or(false)),
            (0, 4) => has(feature::CTRL_RX_EXTRA).map(|()| self.modes.no_unicast = on().unwrap_or(false)),
            (0, 5) => has(feature::CTRL_RX_EXTRA).map(|()| self.modes.no_broadcast = on().unwrap_or(false)),
            (1, 0) => {
                has(feature::CTRL_RX)?;
                let (unicast, rest) = addresses(&b[2..])?;
                let (multicast, rest) = addresses(rest)?;
                if !rest.is_empty() {
                    return None;
                }
                self.modes.all_unicast |= unicast.is_none();
                self.modes.all_multicast |= multicast.is_none();
                self.unicast = unicast.unwrap_or_default();
                self.multicast = multicast.unwrap_or_default();
                Some(())
            }
            (1, 1) => {
                has(feature::CTRL_MAC_ADDR)?;
                let mac = MacAddr(b[2..].try_into().ok()?);
                self.mac = mac;
                Some(())
            }
            (2, command @ (0 | 1)) => {
                has(feature::CTRL_VLAN)?;
                let id = usize::from(u16::from_le_bytes(b[2..].try_into().ok()?));
                let word = self.vlans.get_mut(id / 64)?;
                let bit = 1 << (id % 64);
                *word = if command == 0 { *word | bit } else { *word & !bit };
                Some(())
            }
            (3, 0) => {
                has(feature::GUEST_ANNOUNCE)?;
                shared.announce.store(false, Ordering::SeqCst);
                Some(())
            }
            (4, 0) => {
                has(feature::MQ)?;
                let pairs = u16::from_le_bytes(b[2..].try_into().ok()?);
                if pairs == 0 || pairs > shared.most_pairs {
                    return None;
                }
                shared.pairs.store(pairs, Ordering::SeqCst);
                Some(())
            }
            (5, 0) => {
                has(feature::CTRL_GUEST_OFFLOADS)?;
                let offloads = u64::from_le_bytes(b[2..].try_into().ok()?);
                if offloads & !(features & feature::GUEST_OFFLOADS) != 0 {
                    return None;
                }
                self.offloads = offloads;
                Some(())
            }
            _ => None,
        }
    }
}

/// A table of addresses and what follows it; `None` instead of the table if it is too long to be kept.
fn addresses(b: &[u8]) -> Option<(Option<Vec<MacAddr>>, &[u8])> {
    let count = u32::from_le_bytes(*b.first_chunk()?);
    let len = usize::try_from(count).ok()?.checked_mul(6)?;
    let table = b.get(4..)?.get(..len)?;
    let list = table.as_chunks::<6>().0;
    let list = (list.len() <= MOST_ADDRESSES).then(|| list.iter().map(|a| MacAddr(*a)).collect());
    Some((list, &b[4 + len..]))
}

/// Longest command: two tables of many addresses. Longer ones are malformed.
const LONGEST: u64 = 64 << 10;

/// Serves what is in the queue. Returns whether something changed.
pub(super) fn serve(
    queue: &SharedQueue,
    index: u16,
    memory: &GuestMemory,
    interrupt: &Interrupt,
    shared: &Shared,
    features: u64,
) -> bool {
    let mut queue = queue.lock().unwrap_or_else(|e| e.into_inner());
    let mut changed = false;
    match serve_all(&mut queue, memory, shared, features, &mut changed) {
        Ok(true) => interrupt.queue(index),
        Ok(false) | Err(QueueError::Broken) => {}
        Err(e) => {
            queue.mark_broken();
            interrupt.fail(&format!("control queue: {e}"));
        }
    }
    changed
}

fn serve_all(
    queue: &mut Queue,
    memory: &GuestMemory,
    shared: &Shared,
    features: u64,
    changed: &mut bool,
) -> Result<bool, QueueError> {
    let mut chain = Chain::new();
    for _ in 0..BATCH {
        if !queue.pop_or_listen(&mut chain)? {
            break;
        }
        let len = chain.readable_len();
        if len < 2 || chain.writable_len() < 1 || len > LONGEST {
            return Err(QueueError::TooShort);
        }
        let mut command = vec![0; len as usize];
        chain.reader(memory).read(&mut command)?;
        let done = shared.control().command(&command, features, shared);
        *changed |= done.is_some();
        let mut writer = chain.writer(memory);
        writer.write(&[if done.is_some() { OK } else { ERROR }])?;
        queue.push(&chain, writer.written())?;
    }
    queue.publish()
}
