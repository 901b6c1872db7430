//! A machine's memory slots, for tests of what maps memory.

use accel::{Irqs, Result, Slot, SlotId, Vcpu, VcpuConfig, Vm};
use memory::GuestMemory;
use std::sync::{Arc, Mutex};

/// Remembers slots.
#[derive(Default)]
pub(super) struct Slots(pub(super) Mutex<Vec<Option<Slot>>>);

impl Vm for Slots {
    fn vcpu(&self, _: VcpuConfig) -> Result<Box<dyn Vcpu>> {
        Err(accel::Error::Unsupported("none".into()))
    }
    fn map(&self, slot: Slot) -> Result<SlotId> {
        let mut all = self.0.lock().unwrap();
        let overlap = |o: &Slot| o.gpa < slot.gpa + slot.len && slot.gpa < o.gpa + o.len;
        assert!(!all.iter().flatten().any(overlap), "{:#x}", slot.gpa);
        all.push(Some(slot));
        Ok(SlotId(all.len() as u32 - 1))
    }
    fn unmap(&self, slot: SlotId) -> Result<()> {
        assert!(self.0.lock().unwrap()[slot.0 as usize].take().is_some());
        Ok(())
    }
    fn take_dirty(&self, _: SlotId, _: &mut dyn FnMut(u64)) -> Result<()> {
        Ok(())
    }
    fn set_dirty_log(&self, _: SlotId, _: bool) -> Result<()> {
        Ok(())
    }
    fn irqs(&self) -> Option<Arc<dyn Irqs>> {
        None
    }
    fn save(&self) -> Result<Vec<u8>> {
        Ok(vec![])
    }
    fn load(&self, _: &[u8]) -> Result<()> {
        Ok(())
    }
}

impl Slots {
    /// The byte at an address, and whether it can be written.
    pub(super) fn at(&self, gpa: u64) -> Option<(u8, bool)> {
        let all = self.0.lock().unwrap();
        let slot = all.iter().flatten().find(|s| gpa.wrapping_sub(s.gpa) < s.len)?;
        let memory = GuestMemory::from_regions(vec![slot.region.clone()]);
        let byte = memory.read_obj(slot.region.start + slot.offset + gpa - slot.gpa).unwrap();
        Some((byte, !slot.readonly))
    }
}
