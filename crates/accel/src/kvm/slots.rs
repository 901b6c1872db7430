//! Memory slots of a VM.
#![allow(unsafe_code)] // hands host addresses to the kernel

use super::host;
use crate::{Error, Result, Slot, SlotId};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use memory::{GuestMemory, PAGE_SIZE};
use std::collections::BTreeMap;

/// The slots in use. Each holds its memory's mapping, so that the kernel never has an address that is gone: the
/// table must live as long as any file descriptor of the VM or of its vCPUs.
#[derive(Debug, Default)]
pub(super) struct Slots {
    used: BTreeMap<u32, Used>,
}

#[derive(Debug)]
struct Used {
    slot: Slot,
    log: bool,
}

impl Used {
    fn flags(&self) -> u32 {
        let readonly = if self.slot.readonly { KVM_MEM_READONLY } else { 0 };
        readonly | if self.log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 }
    }

    /// Tells the kernel of the slot, with the given length (0 removes it).
    fn tell(&self, vm: &VmFd, id: u32, len: u64) -> std::result::Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: id,
            flags: self.flags(),
            guest_phys_addr: self.slot.gpa,
            memory_size: len,
            userspace_addr: self.slot.region.mapping.as_ptr() as u64 + self.slot.offset,
        };
        // SAFETY: `map` checked that the range lies in the mapping, which `self` keeps alive until the kernel has
        // been told of the removal or the VM's descriptors are closed. The kernel refuses overlapping slots.
        unsafe { vm.set_user_memory_region(region) }
    }
}

impl Slots {
    pub(super) fn map(&mut self, vm: &VmFd, slot: Slot) -> Result<SlotId> {
        check(&slot)?;
        // Few slots and rare changes: the lowest free number.
        let id = (0..)
            .zip(self.used.keys())
            .find(|(i, used)| i != *used)
            .map_or(self.used.len() as u32, |(i, _)| i);
        let (gpa, len) = (slot.gpa, slot.len);
        let used = Used { slot, log: false };
        used.tell(vm, id, len).map_err(|e| match e.errno() {
            libc::EEXIST => Error::Unsupported(format!(
                "guest memory at {gpa:#x} (length {len:#x}) overlaps other memory"
            )),
            _ => host(format!("KVM refuses guest memory at {gpa:#x} (length {len:#x})"))(e),
        })?;
        self.used.insert(id, used);
        Ok(SlotId(id))
    }

    pub(super) fn unmap(&mut self, vm: &VmFd, id: SlotId) -> Result<()> {
        // Returns when no vCPU uses the slot any more: the kernel zaps its mappings before it lets go.
        self.get(id)?.tell(vm, id.0, 0).map_err(host("cannot remove guest memory"))?;
        self.used.remove(&id.0);
        Ok(())
    }

    pub(super) fn set_dirty_log(&mut self, vm: &VmFd, id: SlotId, on: bool) -> Result<()> {
        let used = self.used.get_mut(&id.0).ok_or_else(|| unknown(id))?;
        let before = std::mem::replace(&mut used.log, on);
        used.tell(vm, id.0, used.slot.len).map_err(|e| {
            used.log = before;
            host("cannot switch the dirty log of guest memory")(e)
        })
    }

    pub(super) fn take_dirty(&self, vm: &VmFd, id: SlotId, page: &mut dyn FnMut(u64)) -> Result<()> {
        let used = self.get(id)?;
        if !used.log {
            return Err(Error::Unsupported("the dirty log of this guest memory is off".into()));
        }
        let bits = vm
            .get_dirty_log(id.0, used.slot.len as usize)
            .map_err(host("cannot get the dirty log of guest memory"))?;
        for (i, mut word) in bits.into_iter().enumerate() {
            while word != 0 {
                page(i as u64 * 64 + u64::from(word.trailing_zeros()));
                word &= word - 1;
            }
        }
        Ok(())
    }

    /// Reads guest memory as far as it is there, and returns how many bytes that were. For diagnostics: slow.
    pub(super) fn read(&self, gpa: u64, buf: &mut [u8]) -> usize {
        for used in self.used.values() {
            let at = gpa.wrapping_sub(used.slot.gpa);
            if at < used.slot.len {
                let n = (used.slot.len - at).min(buf.len() as u64) as usize;
                let region = &used.slot.region;
                let memory = GuestMemory::from_regions(vec![region.clone()]);
                let start = region.start.wrapping_add(used.slot.offset).wrapping_add(at);
                return memory.read(start, &mut buf[..n]).map_or(0, |()| n);
            }
        }
        0
    }

    fn get(&self, id: SlotId) -> Result<&Used> {
        self.used.get(&id.0).ok_or_else(|| unknown(id))
    }
}

fn unknown(id: SlotId) -> Error {
    Error::Unsupported(format!("no memory slot {}", id.0))
}

fn check(slot: &Slot) -> Result<()> {
    let aligned = [slot.gpa, slot.len, slot.offset].iter().all(|n| n % PAGE_SIZE == 0);
    let inside = slot.offset.checked_add(slot.len).is_some_and(|end| end <= slot.region.len());
    let fits = slot.gpa.checked_add(slot.len).is_some();
    if aligned && inside && fits && slot.len != 0 {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "a memory slot at {:#x} of {:#x} bytes, {:#x} into memory of {:#x} bytes: it must be page-aligned and lie inside",
        slot.gpa,
        slot.len,
        slot.offset,
        slot.region.len()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::{Backing, Region};

    #[test]
    fn bad_slots_are_refused() {
        let region = Region::new(0, 4 * PAGE_SIZE, &Backing::Anonymous, false).unwrap();
        let good =
            Slot { gpa: 0x10_0000, len: 2 * PAGE_SIZE, region, offset: 2 * PAGE_SIZE, readonly: false };
        assert!(check(&good).is_ok());
        assert!(check(&Slot { len: 3 * PAGE_SIZE, ..good.clone() }).is_err());
        assert!(check(&Slot { len: 0, ..good.clone() }).is_err());
        assert!(check(&Slot { gpa: 0x10_0800, ..good.clone() }).is_err());
        assert!(check(&Slot { gpa: 0u64.wrapping_sub(PAGE_SIZE), ..good.clone() }).is_err());
        assert!(check(&Slot { offset: u64::MAX - PAGE_SIZE + 1, ..good }).is_err());
    }

    #[test]
    fn reading_stops_at_the_end_of_a_slot() {
        let region = Region::new(0x5000, 2 * PAGE_SIZE, &Backing::Anonymous, false).unwrap();
        GuestMemory::from_regions(vec![region.clone()]).write(0x6ffe, &[1, 2]).unwrap();
        let slot = Slot { gpa: 0x10_0000, len: PAGE_SIZE, region, offset: PAGE_SIZE, readonly: true };
        let slots = Slots { used: [(0, Used { slot, log: false })].into() };
        let mut buf = [9; 4];
        assert_eq!(slots.read(0x10_0ffe, &mut buf), 2);
        assert_eq!(buf, [1, 2, 9, 9]);
        assert_eq!(slots.read(0x10_1000, &mut buf), 0);
    }
}
