//! Accesses that the TLB does not answer: misses, page-crossing accesses, device registers, watched pages.
#![allow(unsafe_code)]

use super::mem::{copy_in, copy_out};
use super::tlb::{SLOW, TlbEntry, info};
use super::{Access, Mem, NO_TAG, PAGE_MASK, Privilege, canonical};
use crate::fault::{Res, vector};
use crate::state::{Cpu, seg};

/// What a page is, for one access.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    /// Host address of the page.
    Host(*mut u8),
    /// Physical address of the page; for devices.
    Device(u64),
}

impl Cpu {
    /// The page of `lin`, from the TLB or by a walk that fills the TLB.
    pub(super) fn target(&mut self, p: Privilege, s: usize, lin: u64, access: Access) -> Res<Target> {
        let page = lin & PAGE_MASK;
        loop {
            let e = self.mmu.tlb.get(p, lin);
            let tag = if access == Access::Write { e.write } else { e.read };
            if tag & !SLOW == page {
                let device = e.info & info::MMIO != 0 || access == Access::Write && e.info & info::ROM != 0;
                return Ok(if device {
                    Target::Device(e.info & PAGE_MASK)
                } else {
                    Target::Host(page.wrapping_add(e.addend) as *mut u8)
                });
            }
            if self.long_mode() && !canonical(lin) {
                let v = if s == seg::SS { vector::SS } else { vector::GP };
                return Err(self.raise_with(v, 0));
            }
            self.fill(p, lin, access)?;
        }
    }

    /// Walks, and enters the translation of `lin` into a data table.
    fn fill(&mut self, p: Privilege, lin: u64, access: Access) -> Res<()> {
        self.stats.tlb_fills += 1;
        let w = self.walk(lin, access, p).map_err(|code| self.raise_pf(lin, code))?;
        let linear = lin & PAGE_MASK;
        let global = if w.global { info::GLOBAL } else { 0 };
        let mut slow = if self.mmu.watched.contains(&linear) { SLOW } else { 0 };
        let found = if self.mmu.apic_page == Some(w.page) { None } else { self.mmu.phys.page(w.page) };
        let entry = match found {
            None => {
                slow = SLOW;
                let write = if w.writable { linear | slow } else { NO_TAG };
                TlbEntry { read: linear | slow, write, addend: 0, info: w.page | info::MMIO | global }
            }
            Some(page) => {
                let host = page.host;
                let addend = (host as u64).wrapping_sub(linear);
                let (mut write, mut rom) = (NO_TAG, 0);
                if page.readonly {
                    rom = info::ROM;
                    if w.writable {
                        write = linear | SLOW;
                    }
                } else if w.writable {
                    let tracker = page.region.tracker.clone();
                    let offset = page.offset;
                    let code = tracker.is_code(offset);
                    if access == Access::Write {
                        // From here on this vCPU may write the page unseen. Whoever decodes code in it later looks
                        // at this note and asks us to stop (`Shared::protect`); or we see its mark.
                        self.me.note_writable(host as usize);
                        while tracker.is_code(offset) {
                            tracker.clear_code(offset);
                            self.stats.code_writes += 1;
                            self.drop_code_everywhere(host as usize);
                        }
                        tracker.wrote(offset, 1);
                        write = linear | slow;
                    } else if !code && !tracker.is_logging() {
                        self.me.note_writable(host as usize);
                        if !tracker.is_code(offset) {
                            write = linear | slow;
                        }
                    }
                }
                TlbEntry { read: linear | slow, write, addend, info: w.page | rom | global }
            }
        };
        self.mmu.tlb.fill(p, lin, entry, w.large);
        // The table may have grown.
        self.retable();
        Ok(())
    }

    /// Takes note of data breakpoints that an access meets.
    fn watch(&mut self, lin: u64, len: usize, access: Access) {
        if !self.mmu.watched.is_empty() {
            self.check_data_breakpoints(lin, len as u64, access == Access::Write);
        }
    }

    /// Linear address `n` bytes on, truncated as the mode demands.
    fn further(&self, lin: u64, n: u64) -> u64 {
        let at = lin.wrapping_add(n);
        if self.long_mode() { at } else { at as u32 as u64 }
    }

    /// Linear address at which the second page of an access that crosses pages begins. All of an access must be
    /// canonical before any of its translation is looked at.
    fn second_page(&mut self, s: usize, lin: u64) -> Res<u64> {
        let second = self.further(lin & PAGE_MASK, 4096);
        if self.long_mode() && !(canonical(lin) && canonical(second)) {
            let v = if s == seg::SS { vector::SS } else { vector::GP };
            return Err(self.raise_with(v, 0));
        }
        Ok(second)
    }

    #[cold]
    #[inline(never)]
    pub(super) fn read_slow<T: Mem>(&mut self, s: usize, lin: u64) -> Res<T> {
        self.read_as(self.privilege(), s, lin)
    }

    #[cold]
    #[inline(never)]
    pub(super) fn write_slow<T: Mem>(&mut self, s: usize, lin: u64, value: T) -> Res<()> {
        self.write_as(self.privilege(), s, lin, value)
    }

    /// Reads what will be written: faults as the write would.
    #[cold]
    #[inline(never)]
    pub fn read_for_write<T: Mem>(&mut self, s: usize, lin: u64) -> Res<T> {
        let p = self.privilege();
        let len = size_of::<T>();
        if (lin & !PAGE_MASK) as usize + len > 4096 {
            let second = self.second_page(s, lin)?;
            self.target(p, s, lin, Access::Write)?;
            self.target(p, s, second, Access::Write)?;
        } else {
            self.target(p, s, lin, Access::Write)?;
        }
        self.read_as(p, s, lin)
    }

    /// Reads with a given privilege.
    pub fn read_as<T: Mem>(&mut self, p: Privilege, s: usize, lin: u64) -> Res<T> {
        let len = size_of::<T>();
        if (lin & !PAGE_MASK) as usize + len <= 4096 {
            let at = (lin & !PAGE_MASK) as usize;
            self.watch(lin, len, Access::Read);
            if let Target::Host(page) = self.target(p, s, lin, Access::Read)? {
                // SAFETY: the access stays inside the page.
                return Ok(unsafe { T::load(page.add(at)) });
            }
        }
        let mut buf = [0; 16];
        self.read_bytes_as(p, s, lin, &mut buf[..len])?;
        Ok(T::from_buf(&buf))
    }

    /// Writes with a given privilege.
    pub fn write_as<T: Mem>(&mut self, p: Privilege, s: usize, lin: u64, value: T) -> Res<()> {
        let len = size_of::<T>();
        if (lin & !PAGE_MASK) as usize + len <= 4096 {
            let at = (lin & !PAGE_MASK) as usize;
            self.watch(lin, len, Access::Write);
            if let Target::Host(page) = self.target(p, s, lin, Access::Write)? {
                // SAFETY: the access stays inside the page.
                unsafe { value.store(page.add(at)) };
                return Ok(());
            }
        }
        let buf = value.to_buf();
        self.write_bytes_as(p, s, lin, &buf[..len])
    }

    /// Reads bytes (at most a page) with the current privilege.
    pub fn read_bytes(&mut self, s: usize, lin: u64, buf: &mut [u8]) -> Res<()> {
        self.read_bytes_as(self.privilege(), s, lin, buf)
    }

    /// Writes bytes (at most a page) with the current privilege. Nothing is written if any of them cannot be.
    pub fn write_bytes(&mut self, s: usize, lin: u64, buf: &[u8]) -> Res<()> {
        self.write_bytes_as(self.privilege(), s, lin, buf)
    }

    /// Reads bytes (at most a page) with a given privilege.
    pub fn read_bytes_as(&mut self, p: Privilege, s: usize, lin: u64, buf: &mut [u8]) -> Res<()> {
        self.watch(lin, buf.len(), Access::Read);
        let first = buf.len().min(4096 - (lin & !PAGE_MASK) as usize);
        let (a, b) = buf.split_at_mut(first);
        if b.is_empty() {
            let one = self.target(p, s, lin, Access::Read)?;
            self.read_target(one, lin, a);
            return Ok(());
        }
        let second = self.second_page(s, lin)?;
        let one = self.target(p, s, lin, Access::Read)?;
        let two = self.target(p, s, second, Access::Read)?;
        self.read_target(one, lin, a);
        self.read_target(two, second, b);
        Ok(())
    }

    /// Writes bytes (at most a page) with a given privilege.
    pub fn write_bytes_as(&mut self, p: Privilege, s: usize, lin: u64, buf: &[u8]) -> Res<()> {
        self.watch(lin, buf.len(), Access::Write);
        let first = buf.len().min(4096 - (lin & !PAGE_MASK) as usize);
        let (a, b) = buf.split_at(first);
        if b.is_empty() {
            let one = self.target(p, s, lin, Access::Write)?;
            self.write_target(one, lin, a);
            return Ok(());
        }
        let second = self.second_page(s, lin)?;
        let one = self.target(p, s, lin, Access::Write)?;
        let two = self.target(p, s, second, Access::Write)?;
        self.write_target(one, lin, a);
        self.write_target(two, second, b);
        Ok(())
    }

    fn read_target(&mut self, t: Target, lin: u64, buf: &mut [u8]) {
        let at = lin & !PAGE_MASK;
        match t {
            // SAFETY: the callers keep within the page.
            Target::Host(page) => unsafe { copy_out(page.add(at as usize), buf) },
            Target::Device(page) => self.device_read(page + at, buf),
        }
    }

    fn write_target(&mut self, t: Target, lin: u64, buf: &[u8]) {
        let at = lin & !PAGE_MASK;
        match t {
            // SAFETY: the callers keep within the page.
            Target::Host(page) => unsafe { copy_in(buf, page.add(at as usize)) },
            Target::Device(page) => self.device_write(page + at, buf),
        }
    }

    /// Host address for an access within a page of plain memory; the permissions of all of it are checked.
    #[cold]
    #[inline(never)]
    pub(super) fn host_slow(
        &mut self,
        s: usize,
        lin: u64,
        len: usize,
        access: Access,
    ) -> Res<Option<*mut u8>> {
        let p = self.privilege();
        let at = (lin & !PAGE_MASK) as usize;
        if at + len > 4096 {
            let second = self.second_page(s, lin)?;
            self.target(p, s, lin, access)?;
            self.target(p, s, second, access)?;
            return Ok(None);
        }
        let one = self.target(p, s, lin, access)?;
        if !self.mmu.watched.is_empty() {
            return Ok(None);
        }
        Ok(match one {
            // SAFETY: inside the page.
            Target::Host(page) => Some(unsafe { page.add(at) }),
            Target::Device(_) => None,
        })
    }

    /// Reads device registers in naturally aligned pieces of at most eight bytes.
    fn device_read(&mut self, gpa: u64, buf: &mut [u8]) {
        for (at, n) in pieces(gpa, buf.len()) {
            self.device_read_one(gpa + at as u64, &mut buf[at..at + n]);
        }
    }

    fn device_write(&mut self, gpa: u64, buf: &[u8]) {
        for (at, n) in pieces(gpa, buf.len()) {
            self.device_write_one(gpa + at as u64, &buf[at..at + n]);
        }
    }

    fn device_read_one(&mut self, gpa: u64, buf: &mut [u8]) {
        if self.mmu.apic_page == Some(gpa & PAGE_MASK)
            && let Some(apic) = self.apic.clone()
        {
            self.stats.apic += 1;
            return apic.read(gpa & !PAGE_MASK, buf);
        }
        self.stats.mmio += 1;
        self.outside(|io| io.mmio_read(gpa, buf));
    }

    fn device_write_one(&mut self, gpa: u64, buf: &[u8]) {
        if self.mmu.apic_page == Some(gpa & PAGE_MASK)
            && let Some(apic) = self.apic.clone()
        {
            self.stats.apic += 1;
            return apic.write(gpa & !PAGE_MASK, buf);
        }
        self.stats.mmio += 1;
        self.outside(|io| io.mmio_write(gpa, buf));
    }

    /// Host address of the page to fetch instructions from.
    pub(crate) fn fetch_page(&mut self, lin: u64) -> Res<usize> {
        let user = self.cpl == 3;
        if let Some(e) = self.mmu.tlb.exec(user, lin) {
            return Ok(e.host);
        }
        self.fetch_fill(lin)
    }

    #[cold]
    fn fetch_fill(&mut self, lin: u64) -> Res<usize> {
        if self.long_mode() && !canonical(lin) {
            return Err(self.gp(0));
        }
        self.stats.tlb_fills += 1;
        let user = self.cpl == 3;
        let p = if user { Privilege::User } else { Privilege::Supervisor };
        let w = self.walk(lin, Access::Exec, p).map_err(|code| self.raise_pf(lin, code))?;
        let Some(host) = self.mmu.phys.page(w.page).map(|p| p.host as usize) else {
            return Err(self.raise_internal("instruction fetch from an address that is neither RAM nor ROM"));
        };
        self.mmu.tlb.fill_exec(user, lin, host, w.global, w.large);
        Ok(host)
    }

    /// Supervisor read by the processor itself (descriptor tables, task state), whatever the CPL.
    pub fn sys_read<T: Mem>(&mut self, lin: u64) -> Res<T> {
        let lin = self.further(lin, 0);
        self.read_as(Privilege::Supervisor, seg::DS, lin)
    }

    /// Supervisor write by the processor itself.
    pub fn sys_write<T: Mem>(&mut self, lin: u64, value: T) -> Res<()> {
        let lin = self.further(lin, 0);
        self.write_as(Privilege::Supervisor, seg::DS, lin, value)
    }

    /// Makes sure that a write of `len` bytes (at most a page) with the current privilege will not fault.
    pub fn probe_write(&mut self, s: usize, lin: u64, len: usize) -> Res<()> {
        let p = self.privilege();
        self.probe_write_as(p, s, lin, len)
    }

    /// Makes sure that a write of `len` bytes (at most a page) will not fault.
    pub fn probe_write_as(&mut self, p: Privilege, s: usize, lin: u64, len: usize) -> Res<()> {
        if (lin & !PAGE_MASK) as usize + len > 4096 {
            let second = self.second_page(s, lin)?;
            self.target(p, s, lin, Access::Write)?;
            self.target(p, s, second, Access::Write)?;
        } else {
            self.target(p, s, lin, Access::Write)?;
        }
        Ok(())
    }
}

/// Cuts an access into naturally aligned pieces of 1, 2, 4 or 8 bytes; an access that is such a size itself stays
/// whole even if it is misaligned, as devices see it on real buses that have byte enables.
fn pieces(gpa: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= len {
            return None;
        }
        let left = len - at;
        let n = if at == 0 && matches!(len, 1 | 2 | 4 | 8) {
            len
        } else {
            let align = 1usize << (gpa + at as u64).trailing_zeros().min(3);
            let mut n = align;
            while n > left {
                n /= 2;
            }
            n
        };
        let start = at;
        at += n;
        Some((start, n))
    })
}

#[cfg(test)]
mod tests {
    use super::pieces;

    #[test]
    fn device_accesses_are_cut_naturally() {
        assert_eq!(pieces(0x1000, 4).collect::<Vec<_>>(), [(0, 4)]);
        assert_eq!(pieces(0x1000, 32).count(), 4);
        assert_eq!(pieces(0x1001, 7).collect::<Vec<_>>(), [(0, 1), (1, 2), (3, 4)]);
        assert_eq!(pieces(0x1000, 3).collect::<Vec<_>>(), [(0, 2), (2, 1)]);
    }
}
