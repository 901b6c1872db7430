//! LOCK-prefixed accesses.
#![allow(unsafe_code)]

use super::Access;
use super::slow::Target;
use crate::fault::Res;
use crate::state::Cpu;

/// Where a locked access goes.
#[derive(Debug)]
pub enum Locked {
    /// Plain memory within a cache line or page: a locked host instruction does it. The pointer is valid until the
    /// next access that may fault, call a device or change the TLB.
    Host(*mut u8),
    /// Device registers, or two pages: read, compute and write under the VM's lock ([`Cpu::locked_rmw`]). The
    /// permissions have been checked.
    Split,
}

impl Cpu {
    /// Where a locked access of `len` bytes at `lin` goes.
    #[inline(always)]
    pub fn locked(&mut self, seg: usize, lin: u64, len: usize) -> Res<Locked> {
        match self.peek_write(lin, len) {
            Some(p) => Ok(Locked::Host(p)),
            None => self.locked_slow(seg, lin, len),
        }
    }

    #[cold]
    #[inline(never)]
    fn locked_slow(&mut self, seg: usize, lin: u64, len: usize) -> Res<Locked> {
        let p = self.privilege();
        if lin as usize & 0xfff <= 4096 - len {
            if !self.mmu.watched.is_empty() {
                self.check_data_breakpoints(lin, len as u64, true);
            }
            if let Target::Host(page) = self.target(p, seg, lin, Access::Write)? {
                // SAFETY: inside the page.
                return Ok(Locked::Host(unsafe { page.add(lin as usize & 0xfff) }));
            }
            return Ok(Locked::Split);
        }
        self.probe_write(seg, lin, len)?;
        Ok(Locked::Split)
    }

    /// The slow form of a locked access ([`Locked::Split`]): atomic with regard to other such accesses. The guest
    /// never sees more of it than of a split lock on a bus that cannot lock.
    #[cold]
    pub fn locked_rmw(&mut self, seg: usize, lin: u64, buf: &mut [u8], f: impl FnOnce(&mut [u8])) -> Res<()> {
        let vm = self.vm.clone();
        // A device that one of the accesses reaches may wait for all vCPUs, so nobody waits for the lock while it
        // counts as running.
        let guard = self.paused(|| vm.split_lock.lock().unwrap_or_else(|e| e.into_inner()));
        let result = self.read_bytes(seg, lin, buf).and_then(|()| {
            f(buf);
            self.write_bytes(seg, lin, buf)
        });
        drop(guard);
        result
    }
}
