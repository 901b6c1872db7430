//! The guest physical address space: slots of RAM and ROM; everything else belongs to devices.
#![allow(unsafe_code)] // host addresses of guest pages

use accel::{Slot, SlotId};
use memory::{PAGE_SIZE, Region};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A slot, as [`accel::Vm::map`] got it.
#[derive(Clone, Debug)]
pub struct PhysSlot {
    /// Name.
    pub id: SlotId,
    /// First guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where the slot starts in the region.
    pub offset: u64,
    /// Writes go to the devices.
    pub readonly: bool,
    /// The memory; held so that it outlives every vCPU that uses this map.
    pub region: Region,
}

/// A page of guest physical memory that host memory backs.
#[derive(Clone, Copy, Debug)]
pub struct Page<'a> {
    /// Host address of the page.
    pub host: *mut u8,
    /// Writes go to the devices.
    pub readonly: bool,
    /// Offset of the page in its region.
    pub offset: u64,
    /// Region of the page.
    pub region: &'a Region,
}

/// All slots, sorted by address. Immutable; a change makes a new map.
#[derive(Clone, Debug, Default)]
pub struct PhysMap {
    slots: Vec<PhysSlot>,
}

impl PhysMap {
    /// With a slot more, or the reason why not.
    pub fn with(&self, id: SlotId, slot: Slot) -> Result<Self, String> {
        let misaligned = (slot.gpa | slot.len | slot.offset) & (PAGE_SIZE - 1) != 0;
        if misaligned || slot.len == 0 {
            return Err(format!(
                "memory slot at {:#x}, {:#x} bytes, is empty or not page-aligned",
                slot.gpa, slot.len
            ));
        }
        let end = slot.gpa.checked_add(slot.len).ok_or("memory slot wraps around the address space")?;
        if slot.offset.checked_add(slot.len).is_none_or(|e| e > slot.region.len()) {
            return Err(format!("memory slot at {:#x} reaches past its region", slot.gpa));
        }
        if let Some(o) = self.slots.iter().find(|o| o.gpa < end && slot.gpa < o.gpa + o.len) {
            return Err(format!(
                "memory slot {:#x}..{end:#x} overlaps {:#x}..{:#x}",
                slot.gpa,
                o.gpa,
                o.gpa + o.len
            ));
        }
        let mut slots = self.slots.clone();
        let Slot { gpa, len, region, offset, readonly } = slot;
        slots.push(PhysSlot { id, gpa, len, offset, readonly, region });
        slots.sort_by_key(|s| s.gpa);
        Ok(Self { slots })
    }

    /// Without a slot; `None` if there is none of that name.
    pub fn without(&self, id: SlotId) -> Option<Self> {
        let slots: Vec<_> = self.slots.iter().filter(|s| s.id != id).cloned().collect();
        (slots.len() < self.slots.len()).then_some(Self { slots })
    }

    /// The slot of that name.
    pub fn slot(&self, id: SlotId) -> Option<&PhysSlot> {
        self.slots.iter().find(|s| s.id == id)
    }

    /// The page at `gpa` (rounded down), if it is RAM or ROM.
    #[inline]
    pub fn page(&self, gpa: u64) -> Option<Page<'_>> {
        let gpa = gpa & !(PAGE_SIZE - 1);
        let slot = self.slots.iter().find(|s| gpa.wrapping_sub(s.gpa) < s.len)?;
        let offset = slot.offset + (gpa - slot.gpa);
        // SAFETY: the offset is inside the mapping, as checked when the slot was added.
        let host = unsafe { slot.region.mapping.as_ptr().add(offset as usize) };
        Some(Page { host, readonly: slot.readonly, offset, region: &slot.region })
    }

    /// The page that contains a host address.
    pub fn by_host(&self, host: usize) -> Option<Page<'_>> {
        self.slots.iter().find_map(|s| {
            let base = s.region.mapping.as_ptr() as usize + s.offset as usize;
            let at = host.wrapping_sub(base) as u64;
            (at < s.len).then(|| {
                let offset = (s.offset + at) & !(PAGE_SIZE - 1);
                // SAFETY: as in `page`.
                let host = unsafe { s.region.mapping.as_ptr().add(offset as usize) };
                Page { host, readonly: s.readonly, offset, region: &s.region }
            })
        })
    }

    /// Loads a naturally aligned doubleword or quadword of a paging structure. What is not memory reads as ones.
    pub fn load<const WIDE: bool>(&self, gpa: u64) -> u64 {
        let Some(page) = self.page(gpa) else { return u64::MAX };
        let at = (gpa & (PAGE_SIZE - 1)) as usize;
        // SAFETY: `at` is aligned by the caller's masks and inside the page.
        unsafe {
            let p = page.host.add(at);
            if WIDE {
                AtomicU64::from_ptr(p.cast()).load(Ordering::Relaxed)
            } else {
                AtomicU32::from_ptr(p.cast()).load(Ordering::Relaxed) as u64
            }
        }
    }

    /// Sets bits of an entry of a paging structure if it still has the given value. Returns whether it had.
    /// Entries in ROM stay as they are.
    pub fn set_bits<const WIDE: bool>(&self, gpa: u64, old: u64, bits: u64) -> bool {
        let Some(page) = self.page(gpa) else { return true };
        if page.readonly {
            return true;
        }
        let at = (gpa & (PAGE_SIZE - 1)) as usize;
        // SAFETY: as in `load`.
        let done = unsafe {
            let p = page.host.add(at);
            if WIDE {
                AtomicU64::from_ptr(p.cast())
                    .compare_exchange(old, old | bits, Ordering::SeqCst, Ordering::Relaxed)
                    .is_ok()
            } else {
                AtomicU32::from_ptr(p.cast())
                    .compare_exchange(old as u32, (old | bits) as u32, Ordering::SeqCst, Ordering::Relaxed)
                    .is_ok()
            }
        };
        if done {
            page.region.tracker.wrote(page.offset + at as u64, 8);
        }
        done
    }
}

impl Page<'_> {
    /// Stores a byte at the offset that `gpa` has within a page.
    pub fn put(&self, gpa: u64, byte: u8) {
        // SAFETY: inside the page.
        unsafe { self.host.add((gpa & (PAGE_SIZE - 1)) as usize).write_volatile(byte) };
    }
}
