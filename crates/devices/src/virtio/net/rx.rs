//! Frames on their way into the guest's buffers.

use super::Shared;
use super::control::Control;
use bus::virtio::{Chain, Queue, QueueError};
use memory::GuestMemory;
use net::{Counters, Receiver, Room, VnetHeader};
use std::sync::MutexGuard;

/// Largest frame with its header: an IP packet of 64 KiB in a tagged Ethernet frame.
pub(super) const LARGEST: usize = VnetHeader::LEN + 18 + 65535;
/// The same where the guest takes no large segments: jumbo frames.
const LARGEST_PLAIN: usize = VnetHeader::LEN + 18 + 9216;

/// What stays between batches.
pub(super) struct Rx<'m> {
    pub(super) memory: &'m GuestMemory,
    /// Chains taken and not used, in the order in which they were taken.
    held: Vec<Chain>,
    held_len: usize,
    spare: Vec<Chain>,
    room: Room<'m>,
    /// Chains that the room is made of; 0: it leads nowhere.
    taken: usize,
    /// Where frames go that nobody wants.
    nowhere: Room<'m>,
    pub(super) mergeable: bool,
    pub(super) largest: usize,
    pub(super) features: u64,
    /// The guest has no more buffers.
    pub(super) full: bool,
}

impl<'m> Rx<'m> {
    pub(super) fn new(memory: &'m GuestMemory, nowhere: Room<'m>, mergeable: bool, features: u64) -> Self {
        Self {
            memory,
            held: Vec::new(),
            held_len: 0,
            spare: Vec::new(),
            room: Room::new(),
            taken: 0,
            nowhere,
            mergeable,
            largest: LARGEST,
            features,
            full: false,
        }
    }

    /// Sets the largest frame: that of large segments, or of a packet on the link. What does not fit the buffer that
    /// the guest then gives is dropped.
    pub(super) fn set_largest(&mut self, large: bool) {
        self.largest = if large || self.mergeable { LARGEST } else { LARGEST_PLAIN };
    }
}

/// A batch: the queue is locked for as long as it lasts.
pub(super) struct Batch<'a, 'm> {
    pub(super) rx: &'a mut Rx<'m>,
    pub(super) queue: MutexGuard<'a, Queue>,
    pub(super) control: &'a Control,
    pub(super) shared: &'a Shared,
    /// The link is down, or the driver does not use this pair.
    pub(super) closed: bool,
    pub(super) error: Option<QueueError>,
    pub(super) packets: u64,
    pub(super) bytes: u64,
}

impl Batch<'_, '_> {
    /// Takes chains until they hold `len` bytes.
    fn take(&mut self, len: usize) -> Result<bool, QueueError> {
        while self.rx.held.is_empty() || self.rx.mergeable && self.rx.held_len < len {
            let mut chain = self.rx.spare.pop().unwrap_or_default();
            if !self.queue.pop(&mut chain)? {
                self.rx.spare.push(chain);
                return Ok(false);
            }
            let n = chain.writable_len() as usize; // below 4 GiB
            if n < VnetHeader::LEN {
                return Err(QueueError::TooShort);
            }
            self.rx.held_len += n;
            self.rx.held.push(chain);
        }
        Ok(true)
    }

    /// Makes the room of the first chains that hold `len` bytes.
    fn make_room(&mut self, len: usize) -> Result<(), QueueError> {
        let rx = &mut *self.rx;
        rx.room.clear();
        rx.taken = 0;
        for chain in &rx.held {
            if rx.room.len() >= len {
                break;
            }
            for segment in chain.writable() {
                let (mut at, mut left) = (segment.addr, u64::from(segment.len));
                while left > 0 {
                    let slice = rx.memory.chunk(at, left)?;
                    rx.room.push(slice);
                    at += slice.len();
                    left -= slice.len();
                }
            }
            rx.taken += 1;
        }
        Ok(())
    }

    /// Gives the first chains back with `len` bytes in them.
    fn give(&mut self, len: usize) -> Result<(), QueueError> {
        let rx = &mut *self.rx;
        let mut left = len;
        let mut count = 0u16;
        for chain in &rx.held[..rx.taken] {
            if left == 0 {
                break;
            }
            left -= left.min(chain.writable_len() as usize);
            count += 1;
        }
        rx.room.write(VnetHeader::LEN - 2, &count.to_le_bytes());
        let mut left = len as u64;
        for chain in rx.held.drain(..usize::from(count)) {
            let n = chain.writable_len();
            rx.held_len -= n as usize;
            let written = n.min(left);
            left -= written;
            mark_written(&chain, rx.memory, written)?;
            self.queue.push(&chain, written as u32)?; // chains are below 4 GiB
            rx.spare.push(chain);
        }
        Ok(())
    }

    /// Puts back what was not used, and shows the driver what was. Returns whether it wants an interrupt.
    pub(super) fn finish(&mut self) -> Result<bool, QueueError> {
        let rx = &mut *self.rx;
        while let Some(chain) = rx.held.pop() {
            self.queue.unpop(&chain);
            rx.spare.push(chain);
        }
        rx.held_len = 0;
        rx.room.clear();
        Counters::add(&self.shared.counters.rx_packets, self.packets);
        Counters::add(&self.shared.counters.rx_bytes, self.bytes);
        match self.error.take() {
            Some(e) => Err(e),
            None => self.queue.publish(),
        }
    }

    fn attempt(&mut self, len: usize) -> Result<bool, QueueError> {
        if !self.take(len)? {
            return Ok(false);
        }
        self.make_room(len)?;
        Ok(true)
    }
}

/// Tells the page tracker what a chain's first bytes were written.
fn mark_written(chain: &Chain, memory: &GuestMemory, len: u64) -> Result<(), QueueError> {
    let mut left = len;
    for segment in chain.writable() {
        let mut at = segment.addr;
        let mut here = left.min(segment.len.into());
        left -= here;
        while here > 0 {
            let slice = memory.chunk(at, here)?;
            slice.wrote();
            at += slice.len();
            here -= slice.len();
        }
    }
    Ok(())
}

impl Receiver for Batch<'_, '_> {
    fn reserve(&mut self, len: usize) -> Option<&Room<'_>> {
        if self.error.is_some() {
            return None;
        }
        if !self.closed {
            match self.attempt(len) {
                Ok(true) => {}
                Ok(false) => {
                    self.rx.full = true;
                    return None;
                }
                Err(e) => {
                    self.error = Some(e);
                    return None;
                }
            }
        }
        if self.closed || self.rx.room.len() < len {
            self.rx.taken = 0;
            return Some(&self.rx.nowhere);
        }
        Some(&self.rx.room)
    }

    fn commit(&mut self, len: usize) {
        if self.error.is_some() {
            return;
        }
        let mut start = [0; 18];
        if self.rx.taken > 0 {
            self.rx.room.copy_to(VnetHeader::LEN, &mut start);
        }
        if self.rx.taken == 0 || !self.control.wants(&start, self.rx.features) {
            Counters::add(&self.shared.counters.rx_dropped, 1);
            return;
        }
        let len = len.min(self.rx.room.len());
        if let Err(e) = self.give(len) {
            self.error = Some(e);
        }
        self.packets += 1;
        self.bytes += (len - VnetHeader::LEN.min(len)) as u64;
    }

    fn largest(&self) -> usize {
        self.rx.largest
    }
}
