//! Split virtqueues (virtio 1.2, 2.7).

use super::{
    Descriptor, INDIRECT, LONGEST_CHAIN, NEXT, QueueConfig, QueueError, QueuePosition, WRITE, passes,
};
use crate::virtio::{Chain, feature};
use memory::GuestMemory;
use std::sync::atomic::{Ordering, fence};

/// Available ring: the driver does not want interrupts.
const NO_INTERRUPT: u16 = 1;
/// Used ring: the device does not want notifications.
const NO_NOTIFY: u16 = 1;

#[derive(Debug)]
pub(super) struct Split {
    pub(super) size: u16,
    pub(super) in_flight: u16,
    indirect: bool,
    event_idx: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    /// Index of the next chain to take, and the driver's index as last read.
    next_available: u16,
    known_available: u16,
    /// Index of the next used entry, and up to which the driver has been told.
    next_used: u16,
    published: u16,
}

impl Split {
    pub(super) fn new(
        mem: &GuestMemory,
        config: &QueueConfig,
        features: u64,
        position: Option<QueuePosition>,
    ) -> Result<Self, QueueError> {
        let QueueConfig { size, descriptors, driver, device, .. } = *config;
        let aligned = descriptors.is_multiple_of(16) && driver.is_multiple_of(2) && device.is_multiple_of(4);
        if !size.is_power_of_two() || size > 1 << 15 || !aligned {
            return Err(QueueError::Layout { size });
        }
        let n = u64::from(size);
        mem.slice(descriptors, n * Descriptor::LEN)?;
        mem.slice(driver, 6 + 2 * n)?;
        mem.slice(device, 6 + 8 * n)?;
        let at = position.unwrap_or(QueuePosition { next_available: 0, next_used: 0 });
        let ring = Self {
            size,
            in_flight: 0,
            indirect: features & feature::INDIRECT_DESC != 0,
            event_idx: features & feature::EVENT_IDX != 0,
            descriptors,
            available: driver,
            used: device,
            next_available: at.next_available,
            known_available: at.next_available,
            next_used: at.next_used,
            published: at.next_used,
        };
        // A saved queue has nothing in flight.
        if at.next_available != at.next_used {
            return Err(QueueError::Layout { size });
        }
        Ok(ring)
    }

    pub(super) fn position(&self) -> QueuePosition {
        QueuePosition { next_available: self.next_available, next_used: self.next_used }
    }

    fn mask(&self) -> u16 {
        self.size - 1
    }

    /// Reads the driver's index; says whether there is something to take.
    pub(super) fn look(&mut self, mem: &GuestMemory) -> Result<bool, QueueError> {
        let index = mem.load_u16(self.available + 2, Ordering::Acquire)?;
        if index.wrapping_sub(self.next_available) > self.size {
            return Err(QueueError::Overflow);
        }
        self.known_available = index;
        Ok(index != self.next_available)
    }

    pub(super) fn pop(&mut self, mem: &GuestMemory, chain: &mut Chain) -> Result<bool, QueueError> {
        if self.known_available == self.next_available && !self.look(mem)? {
            return Ok(false);
        }
        if self.in_flight == self.size {
            return Err(QueueError::Overflow);
        }
        let slot = u64::from(self.next_available & self.mask());
        let head = mem.load_u16(self.available + 4 + 2 * slot, Ordering::Relaxed)?;
        self.walk(mem, head, chain)?;
        chain.id = head;
        chain.slots = 1;
        self.next_available = self.next_available.wrapping_add(1);
        self.in_flight += 1;
        Ok(true)
    }

    fn walk(&self, mem: &GuestMemory, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        let mut index = head;
        for _ in 0..self.size {
            if index >= self.size {
                return Err(QueueError::Index(index));
            }
            let d = Descriptor::read(mem, self.descriptors + u64::from(index) * Descriptor::LEN)?;
            if d.a & INDIRECT != 0 {
                if !self.indirect || d.a & NEXT != 0 {
                    return Err(QueueError::Indirect);
                }
                return self.walk_table(mem, &d, chain);
            }
            chain.append(mem, d.addr, d.len, d.a & WRITE != 0)?;
            if d.a & NEXT == 0 {
                return Ok(());
            }
            index = d.b;
        }
        Err(QueueError::Loop)
    }

    fn walk_table(&self, mem: &GuestMemory, table: &Descriptor, chain: &mut Chain) -> Result<(), QueueError> {
        let entries = table.table_entries()?;
        let mut index = 0;
        for _ in 0..entries.min(LONGEST_CHAIN.max(self.size.into())) {
            if u32::from(index) >= entries {
                return Err(QueueError::Index(index));
            }
            let at =
                table.addr.checked_add(u64::from(index) * Descriptor::LEN).ok_or(QueueError::Indirect)?;
            let d = Descriptor::read(mem, at)?;
            if d.a & INDIRECT != 0 {
                return Err(QueueError::Indirect);
            }
            chain.append(mem, d.addr, d.len, d.a & WRITE != 0)?;
            if d.a & NEXT == 0 {
                return Ok(());
            }
            index = d.b;
        }
        Err(QueueError::Loop)
    }

    pub(super) fn unpop(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    pub(super) fn push(&mut self, mem: &GuestMemory, chain: &Chain, written: u32) -> Result<(), QueueError> {
        let entry = u64::from(written) << 32 | u64::from(chain.id);
        let slot = u64::from(self.next_used & self.mask());
        mem.write(self.used + 4 + 8 * slot, &entry.to_le_bytes())?;
        self.next_used = self.next_used.wrapping_add(1);
        self.in_flight = self.in_flight.saturating_sub(1);
        Ok(())
    }

    pub(super) fn publish(&mut self, mem: &GuestMemory) -> Result<bool, QueueError> {
        if self.published == self.next_used {
            return Ok(false);
        }
        let old = std::mem::replace(&mut self.published, self.next_used);
        mem.store_u16(self.used + 2, self.next_used, Ordering::Release)?;
        // The index must be visible before we look whether the driver wants to hear of it, or both sides could miss
        // each other (virtio 1.2, 2.7.13.4).
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = mem.load_u16(self.available + 4 + 2 * u64::from(self.size), Ordering::Relaxed)?;
            Ok(passes(event, self.next_used, old))
        } else {
            Ok(mem.load_u16(self.available, Ordering::Relaxed)? & NO_INTERRUPT == 0)
        }
    }

    pub(super) fn disable_notifications(&mut self, mem: &GuestMemory) -> Result<(), QueueError> {
        // With event indices, one that stays behind does it.
        if !self.event_idx {
            mem.store_u16(self.used, NO_NOTIFY, Ordering::Relaxed)?;
        }
        Ok(())
    }

    pub(super) fn enable_notifications(&mut self, mem: &GuestMemory) -> Result<bool, QueueError> {
        if self.event_idx {
            let at = self.used + 4 + 8 * u64::from(self.size);
            mem.store_u16(at, self.next_available, Ordering::Relaxed)?;
        } else {
            mem.store_u16(self.used, 0, Ordering::Relaxed)?;
        }
        // As in `publish`, the other way round.
        fence(Ordering::SeqCst);
        self.look(mem)
    }
}
