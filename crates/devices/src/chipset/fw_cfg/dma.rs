//! Transfers by DMA: the guest writes the address of a descriptor, the device does what that says.

use super::FwCfg;

const ERROR: u32 = 1;
const READ: u32 = 1 << 1;
const SKIP: u32 = 1 << 2;
const SELECT: u32 = 1 << 3;
const WRITE: u32 = 1 << 4;

impl FwCfg {
    /// Serves the descriptor at `at`: control, length and address, big-endian. The control word becomes 0, or
    /// the error bit.
    pub(super) fn transfer(&mut self, at: u64) {
        let mut raw = [0; 16];
        if self.memory.read(at, &mut raw).is_err() {
            tracing::debug!("firmware configuration: no memory at {at:#x} for a DMA descriptor");
            return;
        }
        let [c0, c1, c2, c3, l0, l1, l2, l3, a @ ..] = raw;
        let control = u32::from_be_bytes([c0, c1, c2, c3]);
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        if control & SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        let address = u64::from_be_bytes(a);
        let done = match control & (READ | WRITE | SKIP) {
            c if c & READ != 0 => self.copy_out(address, length),
            c if c & WRITE != 0 => self.copy_in(address, length),
            c if c & SKIP != 0 => {
                self.offset = self.offset.saturating_add(length.into());
                true
            }
            _ => true,
        };
        let result = if done { 0 } else { ERROR };
        // The descriptor was readable; where it is now no memory, nobody waits for an answer.
        let _ = self.memory.write(at, &u32::to_be_bytes(result));
    }

    /// The next `length` bytes of the selected item to guest memory, zeros behind its end.
    fn copy_out(&mut self, address: u64, length: u32) -> bool {
        let bytes = self.items.get(&self.selected).map(|i| i.bytes()).unwrap_or_default();
        let from = usize::try_from(self.offset).unwrap_or(usize::MAX).min(bytes.len());
        let rest = &bytes[from..];
        let n = rest.len().min(length as usize);
        self.offset = self.offset.saturating_add(length.into());
        let zeros = u64::from(length) - n as u64;
        self.memory.write(address, &rest[..n]).is_ok()
            && self.memory.fill(address.wrapping_add(n as u64), zeros, 0).is_ok()
    }

    /// `length` bytes of guest memory into the selected item, which must be writable and have room for them.
    fn copy_in(&mut self, address: u64, length: u32) -> bool {
        let at = usize::try_from(self.offset).unwrap_or(usize::MAX);
        let Some(item) = self.items.get_mut(&self.selected).filter(|i| i.is_writable()) else { return false };
        let fits = at.checked_add(length as usize).is_some_and(|end| end <= item.len());
        if !fits {
            return false;
        }
        let mut data = vec![0; length as usize]; // no more than the item
        let done = self.memory.read(address, &mut data).is_ok() && item.write(at, &data);
        self.offset = self.offset.saturating_add(length.into());
        done
    }
}
