//! The driver's side of a virtqueue, split or packed.

use crate::virtio::{QueueConfig, feature};
use memory::GuestMemory;
use std::collections::BTreeMap;
use std::sync::atomic::{Ordering, fence};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// A virtqueue as its driver sees it. Addresses are fixed from `base` up: 64 KiB belong to it.
pub struct DriverRing {
    /// Where everything lies.
    pub config: QueueConfig,
    mem: GuestMemory,
    packed: bool,
    event_idx: bool,
    free: Vec<u16>,
    out: BTreeMap<u16, Vec<u16>>,
    next_available: u16,
    next_used: u16,
    available_wrap: bool,
    used_wrap: bool,
}

/// A buffer: address, length, whether the device writes it.
pub type Buffer = (u64, u32, bool);

impl DriverRing {
    /// A ring of `size` entries at `base`, its memory cleared.
    pub fn new(mem: &GuestMemory, base: u64, size: u16, features: u64) -> Self {
        mem.fill(base, 0x1_0000, 0).expect("ring memory");
        Self {
            config: QueueConfig {
                size,
                ready: true,
                descriptors: base,
                driver: base + 0x8000,
                device: base + 0xc000,
            },
            mem: mem.clone(),
            packed: features & feature::RING_PACKED != 0,
            event_idx: features & feature::EVENT_IDX != 0,
            free: (0..size).rev().collect(),
            out: BTreeMap::new(),
            next_available: 0,
            next_used: 0,
            available_wrap: true,
            used_wrap: true,
        }
    }

    /// Writes descriptor `index` of the table at `table`: the two last words as the layout has them.
    pub fn write_descriptor(&self, table: u64, index: u16, addr: u64, len: u32, a: u16, b: u16) {
        let mut d = [0; 16];
        d[..8].copy_from_slice(&addr.to_le_bytes());
        d[8..12].copy_from_slice(&len.to_le_bytes());
        d[12..14].copy_from_slice(&a.to_le_bytes());
        d[14..].copy_from_slice(&b.to_le_bytes());
        self.mem.write(table + 16 * u64::from(index), &d).expect("descriptor table");
    }

    /// Entries that are free.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Makes buffers available as one chain; returns its ID, or `None` if the ring is full.
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let entries: Vec<_> =
            buffers.iter().map(|(addr, len, write)| (*addr, *len, if *write { WRITE } else { 0 })).collect();
        self.add_entries(&entries)
    }

    /// The same through an indirect table at `table`.
    pub fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> Option<u16> {
        let last = buffers.len() - 1;
        for (i, (addr, len, write)) in buffers.iter().enumerate() {
            let flags = if *write { WRITE } else { 0 };
            let i = i as u16;
            if self.packed {
                self.write_descriptor(table, i, *addr, *len, 0, flags);
            } else {
                let next = if usize::from(i) == last { 0 } else { NEXT };
                self.write_descriptor(table, i, *addr, *len, flags | next, i + 1);
            }
        }
        self.add_entries(&[(table, 16 * buffers.len() as u32, INDIRECT)])
    }

    fn add_entries(&mut self, entries: &[(u64, u32, u16)]) -> Option<u16> {
        if entries.len() > self.free.len() {
            return None;
        }
        let slots: Vec<u16> = entries.iter().map(|_| self.free.pop().expect("counted")).collect();
        let id = slots[0];
        if self.packed {
            self.add_packed(entries, id);
        } else {
            self.add_split(entries, &slots);
        }
        self.out.insert(id, slots);
        Some(id)
    }

    fn add_split(&mut self, entries: &[(u64, u32, u16)], slots: &[u16]) {
        for (i, (addr, len, flags)) in entries.iter().enumerate() {
            let next = slots.get(i + 1).copied();
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            self.write_descriptor(self.config.descriptors, slots[i], *addr, *len, flags, next.unwrap_or(0));
        }
        let at = self.config.driver + 4 + 2 * u64::from(self.next_available % self.config.size);
        self.mem.store_u16(at, slots[0], Ordering::Relaxed).expect("ring");
        self.next_available = self.next_available.wrapping_add(1);
        self.mem.store_u16(self.config.driver + 2, self.next_available, Ordering::Release).expect("ring");
    }

    fn add_packed(&mut self, entries: &[(u64, u32, u16)], id: u16) {
        let mut first = None;
        for (i, (addr, len, flags)) in entries.iter().enumerate() {
            let next = if i + 1 < entries.len() { NEXT } else { 0 };
            let marks = if self.available_wrap { AVAILABLE } else { USED };
            let flags = flags | next | marks;
            let index = self.next_available;
            if first.is_none() {
                first = Some((index, flags));
                let old = self.mem.load_u16(self.slot(index) + 14, Ordering::Relaxed).expect("ring");
                self.write_descriptor(self.config.descriptors, index, *addr, *len, id, old);
            } else {
                self.write_descriptor(self.config.descriptors, index, *addr, *len, id, flags);
            }
            self.next_available += 1;
            if self.next_available == self.config.size {
                self.next_available = 0;
                self.available_wrap = !self.available_wrap;
            }
        }
        let (index, flags) = first.expect("at least one buffer");
        self.mem.store_u16(self.slot(index) + 14, flags, Ordering::Release).expect("ring");
    }

    fn slot(&self, index: u16) -> u64 {
        self.config.descriptors + 16 * u64::from(index)
    }

    /// Whether the device wants to be notified of what was added since `old` (a value of [`Self::mark`]).
    pub fn wants_notification(&self, old: u16) -> bool {
        fence(Ordering::SeqCst);
        let load = |at| self.mem.load_u16(at, Ordering::Acquire).expect("ring");
        if self.packed {
            let (place, flags) = (load(self.config.device), load(self.config.device + 2) & 3);
            return match flags {
                0 => true,
                1 => false,
                _ => {
                    let event = place & 0x7fff;
                    let behind = (place >> 15 != 0) != self.available_wrap;
                    let event = if behind { event.wrapping_sub(self.config.size) } else { event };
                    let new = self.next_available;
                    // `old` is a ring index: count it from this lap.
                    let old = if old > new { old.wrapping_sub(self.config.size) } else { old };
                    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
                }
            };
        }
        if self.event_idx {
            let event = load(self.config.device + 4 + 8 * u64::from(self.config.size));
            let new = self.next_available;
            return new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        }
        load(self.config.device) & 1 == 0
    }

    /// The place up to which buffers were added.
    pub fn mark(&self) -> u16 {
        self.next_available
    }

    /// Asks for interrupts about the next used buffer, or for none.
    pub fn set_interrupts(&mut self, on: bool) {
        if self.packed {
            let (place, flags) = match (on, self.event_idx) {
                (false, _) => (0, 1),
                (true, false) => (0, 0),
                (true, true) => (self.next_used | if self.used_wrap { 1 << 15 } else { 0 }, 2),
            };
            self.mem.store_u16(self.config.driver, place, Ordering::Relaxed).expect("ring");
            self.mem.store_u16(self.config.driver + 2, flags, Ordering::Release).expect("ring");
        } else if self.event_idx {
            let event = if on { self.next_used } else { self.next_used.wrapping_sub(1) };
            let at = self.config.driver + 4 + 2 * u64::from(self.config.size);
            self.mem.store_u16(at, event, Ordering::Release).expect("ring");
        } else {
            self.mem.store_u16(self.config.driver, u16::from(!on), Ordering::Release).expect("ring");
        }
        fence(Ordering::SeqCst);
    }

    /// Takes the next used chain: its ID and the number of bytes written.
    ///
    /// # Panics
    /// When the device gives back what it was not given.
    pub fn poll(&mut self) -> Option<(u16, u32)> {
        let (id, len) = if self.packed { self.poll_packed()? } else { self.poll_split()? };
        let slots = self.out.remove(&id).expect("the device gave back a chain that was not out");
        if self.packed {
            self.next_used += slots.len() as u16;
            if self.next_used >= self.config.size {
                self.next_used -= self.config.size;
                self.used_wrap = !self.used_wrap;
            }
        }
        self.free.extend(slots.iter().rev());
        Some((id, len))
    }

    fn poll_split(&mut self) -> Option<(u16, u32)> {
        if self.mem.load_u16(self.config.device + 2, Ordering::Acquire).expect("ring") == self.next_used {
            return None;
        }
        let at = self.config.device + 4 + 8 * u64::from(self.next_used % self.config.size);
        let id = self.mem.load_u32(at, Ordering::Relaxed).expect("ring");
        let len = self.mem.load_u32(at + 4, Ordering::Relaxed).expect("ring");
        self.next_used = self.next_used.wrapping_add(1);
        Some((u16::try_from(id).expect("a descriptor index"), len))
    }

    fn poll_packed(&mut self) -> Option<(u16, u32)> {
        let at = self.slot(self.next_used);
        let flags = self.mem.load_u16(at + 14, Ordering::Acquire).expect("ring");
        let (available, used) = (flags & AVAILABLE != 0, flags & USED != 0);
        if available != used || used != self.used_wrap {
            return None;
        }
        let len = self.mem.load_u32(at + 8, Ordering::Relaxed).expect("ring");
        Some((self.mem.load_u16(at + 12, Ordering::Relaxed).expect("ring"), len))
    }
}
