//! Packed virtqueues (virtio 1.2, 2.8).

use super::{
    Descriptor, INDIRECT, LONGEST_CHAIN, NEXT, QueueConfig, QueueError, QueuePosition, WRITE, passes,
};
use crate::virtio::{Chain, feature};
use memory::GuestMemory;
use std::sync::atomic::{Ordering, fence};

const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Event suppression (virtio 1.2, 2.8.10): notifications on, off, or at one descriptor.
const EVENTS_ENABLE: u16 = 0;
const EVENTS_DISABLE: u16 = 1;
const EVENTS_DESCRIPTOR: u16 = 2;

const WRAP: u16 = 1 << 15;

/// A place in the ring and the wrap counter there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    fn advanced(self, by: u16, size: u16) -> Self {
        let sum = u32::from(self.index) + u32::from(by);
        if sum >= u32::from(size) {
            Self { index: (sum - u32::from(size)) as u16, wrap: !self.wrap } // `by` is at most the size
        } else {
            Self { index: sum as u16, wrap: self.wrap }
        }
    }

    fn retreated(self, by: u16, size: u16) -> Self {
        match self.index.checked_sub(by) {
            Some(index) => Self { index, wrap: self.wrap },
            None => Self { index: self.index + (size - by), wrap: !self.wrap },
        }
    }

    fn pack(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    fn unpack(word: u16) -> Self {
        Self { index: word & !WRAP, wrap: word & WRAP != 0 }
    }
}

#[derive(Debug)]
pub(super) struct Packed {
    pub(super) size: u16,
    pub(super) in_flight: u16,
    /// Ring slots of the chains in flight.
    slots_out: u16,
    indirect: bool,
    event_idx: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
    next_available: Place,
    next_used: Place,
    /// Flags of the first descriptor pushed since the last publication, written last.
    first: Option<(u64, u16)>,
    /// Slots used since the last publication.
    unpublished: u16,
}

impl Packed {
    pub(super) fn new(
        mem: &GuestMemory,
        config: &QueueConfig,
        features: u64,
        position: Option<QueuePosition>,
    ) -> Result<Self, QueueError> {
        let QueueConfig { size, descriptors, driver, device, .. } = *config;
        let aligned = descriptors.is_multiple_of(16) && driver.is_multiple_of(4) && device.is_multiple_of(4);
        if size == 0 || size > 1 << 15 || !aligned {
            return Err(QueueError::Layout { size });
        }
        mem.slice(descriptors, u64::from(size) * Descriptor::LEN)?;
        mem.slice(driver, 4)?;
        mem.slice(device, 4)?;
        let start = QueuePosition { next_available: WRAP, next_used: WRAP };
        let at = position.unwrap_or(start);
        let (next_available, next_used) = (Place::unpack(at.next_available), Place::unpack(at.next_used));
        // A saved queue has nothing in flight.
        if next_available != next_used || next_available.index >= size {
            return Err(QueueError::Layout { size });
        }
        Ok(Self {
            size,
            in_flight: 0,
            slots_out: 0,
            indirect: features & feature::INDIRECT_DESC != 0,
            event_idx: features & feature::EVENT_IDX != 0,
            descriptors,
            driver,
            device,
            next_available,
            next_used,
            first: None,
            unpublished: 0,
        })
    }

    pub(super) fn position(&self) -> QueuePosition {
        QueuePosition { next_available: self.next_available.pack(), next_used: self.next_used.pack() }
    }

    fn slot(&self, index: u16) -> u64 {
        self.descriptors + u64::from(index) * Descriptor::LEN
    }

    /// Whether there is something to take. With all slots out, what lies at the next one is the driver's old descriptor.
    pub(super) fn look(&self, mem: &GuestMemory) -> Result<bool, QueueError> {
        if self.slots_out == self.size {
            return Ok(false);
        }
        let flags = mem.load_u16(self.slot(self.next_available.index) + 14, Ordering::Acquire)?;
        let (available, used) = (flags & AVAILABLE != 0, flags & USED != 0);
        Ok(available == self.next_available.wrap && used != self.next_available.wrap)
    }

    pub(super) fn pop(&mut self, mem: &GuestMemory, chain: &mut Chain) -> Result<bool, QueueError> {
        if !self.look(mem)? {
            return Ok(false);
        }
        let mut at = self.next_available;
        // The driver makes a list available by its first descriptor, written last, so the rest is there.
        for taken in 1..=self.size - self.slots_out {
            let d = Descriptor::read(mem, self.slot(at.index))?;
            let flags = d.b;
            at = at.advanced(1, self.size);
            if flags & INDIRECT != 0 {
                // An indirect descriptor stands alone (virtio 1.2, 2.8.7).
                if !self.indirect || flags & NEXT != 0 || taken != 1 {
                    return Err(QueueError::Indirect);
                }
                self.read_table(mem, &d, chain)?;
            } else {
                chain.append(mem, d.addr, d.len, flags & WRITE != 0)?;
            }
            if flags & NEXT == 0 {
                chain.id = d.a;
                chain.slots = taken;
                self.next_available = at;
                self.slots_out += taken;
                self.in_flight += 1;
                return Ok(true);
            }
        }
        Err(QueueError::Loop)
    }

    /// An indirect table: all its entries in order, of which only WRITE has a meaning.
    fn read_table(&self, mem: &GuestMemory, table: &Descriptor, chain: &mut Chain) -> Result<(), QueueError> {
        let entries = table.table_entries()?;
        if entries > LONGEST_CHAIN.max(self.size.into()) {
            return Err(QueueError::Loop);
        }
        for i in 0..entries {
            let at = table.addr.checked_add(u64::from(i) * Descriptor::LEN).ok_or(QueueError::Indirect)?;
            let d = Descriptor::read(mem, at)?;
            chain.append(mem, d.addr, d.len, d.b & WRITE != 0)?;
        }
        Ok(())
    }

    pub(super) fn unpop(&mut self, chain: &Chain) {
        self.next_available = self.next_available.retreated(chain.slots.min(self.size), self.size);
        self.slots_out = self.slots_out.saturating_sub(chain.slots);
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    pub(super) fn push(&mut self, mem: &GuestMemory, chain: &Chain, written: u32) -> Result<(), QueueError> {
        let at = self.slot(self.next_used.index);
        let id_and_len = u64::from(chain.id) << 32 | u64::from(written);
        mem.write(at + 8, &id_and_len.to_le_bytes()[..6])?;
        let mut flags = if self.next_used.wrap { AVAILABLE | USED } else { 0 };
        if written != 0 {
            flags |= WRITE;
        }
        // The driver reads used descriptors in order, so the batch appears with the flags of its first.
        if self.first.is_none() {
            self.first = Some((at + 14, flags));
        } else {
            mem.store_u16(at + 14, flags, Ordering::Release)?;
        }
        self.next_used = self.next_used.advanced(chain.slots.min(self.size), self.size);
        self.unpublished = self.unpublished.saturating_add(chain.slots);
        self.slots_out = self.slots_out.saturating_sub(chain.slots);
        self.in_flight = self.in_flight.saturating_sub(1);
        Ok(())
    }

    pub(super) fn publish(&mut self, mem: &GuestMemory) -> Result<bool, QueueError> {
        let Some((at, flags)) = self.first.take() else { return Ok(false) };
        let slots = std::mem::take(&mut self.unpublished);
        mem.store_u16(at, flags, Ordering::Release)?;
        // See the split ring.
        fence(Ordering::SeqCst);
        let suppression = mem.load_u32(self.driver, Ordering::Acquire)?;
        let (place, flags) = (Place::unpack(suppression as u16), (suppression >> 16) as u16 & 3);
        Ok(match flags {
            EVENTS_ENABLE => true,
            EVENTS_DESCRIPTOR if self.event_idx => {
                let new = self.next_used.index;
                let old = new.wrapping_sub(slots);
                let lap_behind = place.wrap != self.next_used.wrap;
                let event = if lap_behind { place.index.wrapping_sub(self.size) } else { place.index };
                passes(event, new, old)
            }
            _ => false,
        })
    }

    fn set_events(&self, mem: &GuestMemory, place: u16, flags: u16) -> Result<(), QueueError> {
        Ok(mem.store_u32(self.device, u32::from(place) | u32::from(flags) << 16, Ordering::Release)?)
    }

    pub(super) fn disable_notifications(&mut self, mem: &GuestMemory) -> Result<(), QueueError> {
        self.set_events(mem, 0, EVENTS_DISABLE)
    }

    pub(super) fn enable_notifications(&mut self, mem: &GuestMemory) -> Result<bool, QueueError> {
        if self.event_idx {
            self.set_events(mem, self.next_available.pack(), EVENTS_DESCRIPTOR)?;
        } else {
            self.set_events(mem, 0, EVENTS_ENABLE)?;
        }
        fence(Ordering::SeqCst);
        Ok(self.slots_out < self.size && self.look(mem)?)
    }
}
