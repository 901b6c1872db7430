//! Memory for requests: page-aligned, as `O_DIRECT` wants it, and where possible registered with the ring.

#![allow(unsafe_code)] // parts of one registered region are handed out one by one, which slices cannot express

use std::{
    cell::UnsafeCell,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex},
};

/// Alignment of every buffer in bytes.
pub(super) const ALIGN: usize = 4096;

/// One byte that several parts of the program may point into.
#[repr(transparent)]
struct Cell(UnsafeCell<u8>);

/// A region of equal slots. Its memory does not move, so that the kernel may keep its address.
pub(super) struct Region {
    memory: Box<[Cell]>,
    /// First aligned byte.
    start: usize,
    slot: usize,
    free: Mutex<Vec<u16>>,
}

// SAFETY: bytes of a slot are reached only through the one `Buffer` that holds the slot's number, which leaves `free` when
// the buffer is made and comes back when it is dropped.
unsafe impl Sync for Region {}
// SAFETY: as above; the memory itself belongs to no thread.
unsafe impl Send for Region {}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region").field("slot", &self.slot).finish_non_exhaustive()
    }
}

impl Region {
    pub(super) fn new(slots: u16, slot: usize) -> Arc<Self> {
        let slot = slot.next_multiple_of(ALIGN);
        let memory: Box<[Cell]> =
            (0..usize::from(slots) * slot + ALIGN).map(|_| Cell(UnsafeCell::new(0))).collect();
        let start = memory.as_ptr().align_offset(ALIGN);
        Arc::new(Region { memory, start, slot, free: Mutex::new((0..slots).rev().collect()) })
    }

    /// Address and length of each slot, for registering.
    pub(super) fn slots(&self) -> Vec<libc::iovec> {
        let count = (self.memory.len() - self.start) / self.slot;
        (0..count)
            .map(|i| libc::iovec {
                iov_base: self.memory[self.start + i * self.slot].0.get().cast(),
                iov_len: self.slot,
            })
            .collect()
    }

    fn take(self: &Arc<Self>, len: usize) -> Option<Buffer> {
        if len > self.slot {
            return None;
        }
        let index = self.free.lock().unwrap_or_else(|e| e.into_inner()).pop()?;
        Some(Buffer { kind: Kind::Slot { region: Arc::clone(self), index }, len })
    }
}

enum Kind {
    Slot { region: Arc<Region>, index: u16 },
    Heap { memory: Vec<u8>, start: usize },
}

/// Memory of a request.
pub struct Buffer {
    kind: Kind,
    len: usize,
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len).field("slot", &self.slot()).finish()
    }
}

impl Buffer {
    /// `len` bytes, from the region while it has room. What they hold is left over from earlier requests, or zeros.
    pub(super) fn new(region: Option<&Arc<Region>>, len: usize) -> Self {
        if let Some(buffer) = region.and_then(|r| r.take(len)) {
            return buffer;
        }
        let memory = vec![0; if len == 0 { 0 } else { len + ALIGN }];
        let start = if len == 0 { 0 } else { memory.as_ptr().align_offset(ALIGN).min(ALIGN) };
        Buffer { kind: Kind::Heap { memory, start }, len }
    }

    /// A buffer of no bytes, for requests that carry none.
    pub fn empty() -> Self {
        Self::new(None, 0)
    }

    /// Number of the registered slot, if it is one.
    pub(super) fn slot(&self) -> Option<u16> {
        match self.kind {
            Kind::Slot { index, .. } => Some(index),
            Kind::Heap { .. } => None,
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.kind {
            Kind::Heap { memory, start } => &memory[*start..*start + self.len],
            Kind::Slot { region, index } => {
                let at = region.start + usize::from(*index) * region.slot;
                let cells = &region.memory[at..at + self.len];
                // SAFETY: the slot is ours alone while we hold its number, and `Cell` is a byte.
                unsafe { std::slice::from_raw_parts(cells.as_ptr().cast(), cells.len()) }
            }
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.kind {
            Kind::Heap { memory, start } => &mut memory[*start..*start + self.len],
            Kind::Slot { region, index } => {
                let at = region.start + usize::from(*index) * region.slot;
                let cells = &region.memory[at..at + self.len];
                // SAFETY: the slot is ours alone while we hold its number, `&mut self` makes this the only reference, and the
                // bytes are in `UnsafeCell`s.
                unsafe { std::slice::from_raw_parts_mut(cells.as_ptr().cast::<u8>().cast_mut(), cells.len()) }
            }
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Kind::Slot { region, index } = &self.kind {
            region.free.lock().unwrap_or_else(|e| e.into_inner()).push(*index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_apart_and_come_back() {
        let region = Region::new(3, 5000);
        let mut held: Vec<Buffer> = (0..3).map(|_| Buffer::new(Some(&region), 5000)).collect();
        for (i, b) in held.iter_mut().enumerate() {
            assert_eq!(b.as_ptr() as usize % ALIGN, 0);
            b.fill(i as u8 + 1);
        }
        assert!(held.iter().enumerate().all(|(i, b)| b.iter().all(|&x| x == i as u8 + 1)));
        let heap = Buffer::new(Some(&region), 100);
        assert!(heap.slot().is_none() && (heap.as_ptr() as usize).is_multiple_of(ALIGN) && heap.len() == 100);
        held.pop();
        assert!(Buffer::new(Some(&region), 4096).slot().is_some());
        assert!(Buffer::new(Some(&region), 9000).slot().is_none());
    }
}
