//! Hardware task switches with 32-bit and 16-bit task state segments (Intel SDM vol. 3, chapter 9).

use crate::exec::dr6;
use crate::fault::{Exception, Res, vector};
use crate::segments::{Descriptor, null};
use crate::state::{Cpu, Seg, attr, cr, fl, seg};

/// Why tasks are switched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// JMP: the old task is no longer busy.
    Jump,
    /// CALL: the new task is nested in the old one.
    Call,
    /// An interrupt or exception through a task gate: nested, too.
    Interrupt,
    /// IRET with NT set: back to the outer task.
    Return,
}

/// The registers in a task state segment.
#[derive(Clone, Copy, Debug, Default)]
struct Image {
    cr3: u32,
    ip: u32,
    flags: u32,
    gpr: [u32; 8],
    seg: [u16; 6],
    ldt: u16,
    trap: bool,
}

const BUSY: u64 = 1 << 41;

impl Cpu {
    /// Switches to the task of a TSS selector. `error` is pushed on the new stack.
    pub(crate) fn task_switch(&mut self, selector: u16, reason: Reason, error: Option<u32>) -> Res<()> {
        let fault = if reason == Reason::Return { vector::TS } else { vector::GP };
        let code = (selector & !3) as u32;
        if selector & 4 != 0 {
            return Err(self.raise_with(fault, code));
        }
        let d = self.descriptor(selector, fault)?;
        let busy = d.kind() & 2 != 0;
        if !matches!(d.kind(), 1 | 3 | 9 | 11) || busy != (reason == Reason::Return) {
            return Err(self.raise_with(fault, code));
        }
        if !d.present() {
            return Err(self.raise_with(vector::NP, code));
        }
        let wide = d.kind() & 8 != 0;
        if d.limit() < if wide { 0x67 } else { 0x2b } {
            return Err(self.raise_with(vector::TS, code));
        }
        let old = self.tr;
        let old_wide = old.attr & 8 != 0;
        let new_base = d.base();
        let image = self.read_tss(new_base, wide)?;
        // Both must be writable before anything changes.
        let privilege = crate::mmu::Privilege::Supervisor;
        self.probe_write_as(privilege, seg::DS, old.base, if old_wide { 0x60 } else { 0x2a })?;
        self.probe_write_as(privilege, seg::DS, new_base, 4)?;

        let mut flags = self.rflags();
        if reason == Reason::Return {
            flags &= !fl::NT;
        }
        self.save_tss(old, old_wide, flags)?;
        if matches!(reason, Reason::Jump | Reason::Return) {
            self.set_busy(old.selector, false)?;
        }
        let nested = matches!(reason, Reason::Call | Reason::Interrupt);
        if nested {
            self.sys_write(new_base, old.selector)?;
        }
        if reason != Reason::Return {
            self.set_busy(selector, true)?;
        }

        // From here on, faults happen in the new task.
        self.tr = Descriptor { raw: d.raw | BUSY, at: d.at }.load(selector);
        self.cr0 |= cr::CR0_TS;
        self.enter_task(image, wide, nested)?;
        if let Some(e) = error {
            let mut stack = self.current_stack();
            stack.push(self, if wide { 4 } else { 2 }, e as u64)?;
            self.use_stack(&stack);
        }
        if self.rip > self.seg[seg::CS].limit as u64 {
            return Err(self.gp(0));
        }
        if image.trap {
            return Err(self.raise_exception(Exception {
                vector: vector::DB,
                dr6: dr6::BT,
                trap: true,
                ..Default::default()
            }));
        }
        Ok(())
    }

    fn read_tss(&mut self, base: u64, wide: bool) -> Res<Image> {
        let mut i = Image::default();
        if wide {
            let dword = |cpu: &mut Cpu, at: u64| cpu.sys_read::<u32>(base.wrapping_add(at));
            i.cr3 = dword(self, 0x1c)?;
            i.ip = dword(self, 0x20)?;
            i.flags = dword(self, 0x24)?;
            for n in 0..8 {
                i.gpr[n] = dword(self, 0x28 + 4 * n as u64)?;
            }
            for n in 0..6 {
                i.seg[n] = dword(self, 0x48 + 4 * n as u64)? as u16;
            }
            i.ldt = dword(self, 0x60)? as u16;
            i.trap = dword(self, 0x64)? & 1 != 0;
        } else {
            let word = |cpu: &mut Cpu, at: u64| cpu.sys_read::<u16>(base.wrapping_add(at));
            i.ip = word(self, 0x0e)? as u32;
            i.flags = word(self, 0x10)? as u32;
            for n in 0..8 {
                i.gpr[n] = word(self, 0x12 + 2 * n as u64)? as u32 | 0xffff_0000;
            }
            for n in 0..4 {
                i.seg[n] = word(self, 0x22 + 2 * n as u64)?;
            }
            i.ldt = word(self, 0x2a)?;
        }
        Ok(i)
    }

    fn save_tss(&mut self, tr: Seg, wide: bool, flags: u64) -> Res<()> {
        let base = tr.base;
        if wide {
            self.sys_write(base.wrapping_add(0x20), self.rip as u32)?;
            self.sys_write(base.wrapping_add(0x24), flags as u32)?;
            for n in 0..8 {
                self.sys_write(base.wrapping_add(0x28 + 4 * n as u64), self.regs[n] as u32)?;
            }
            for n in 0..6 {
                self.sys_write(base.wrapping_add(0x48 + 4 * n as u64), self.seg[n].selector)?;
            }
        } else {
            self.sys_write(base.wrapping_add(0x0e), self.rip as u16)?;
            self.sys_write(base.wrapping_add(0x10), flags as u16)?;
            for n in 0..8 {
                self.sys_write(base.wrapping_add(0x12 + 2 * n as u64), self.regs[n] as u16)?;
            }
            for n in 0..4 {
                self.sys_write(base.wrapping_add(0x22 + 2 * n as u64), self.seg[n].selector)?;
            }
        }
        Ok(())
    }

    fn set_busy(&mut self, selector: u16, busy: bool) -> Res<()> {
        if let Some(d) = self.find_descriptor(selector & !7)? {
            let raw = if busy { d.raw | BUSY } else { d.raw & !BUSY };
            self.sys_write(d.at.wrapping_add(5), (raw >> 40) as u8)?;
        }
        Ok(())
    }

    fn enter_task(&mut self, i: Image, wide: bool, nested: bool) -> Res<()> {
        if wide && self.cr0 & cr::CR0_PG != 0 {
            self.load_cr3(i.cr3 as u64)?;
        }
        self.rip = i.ip as u64;
        for n in 0..8 {
            self.regs[n] = i.gpr[n] as u64;
        }
        let nt = if nested { fl::NT } else { 0 };
        self.dr7 &= !0x155;
        self.set_flags(i.flags as u64 | nt);
        // Selectors are in place before descriptors are checked, as faults below show.
        for n in 0..6 {
            self.seg[n] = null(i.seg[n]);
        }
        self.ldtr = null(i.ldt);
        if i.ldt & !3 != 0 {
            let code = (i.ldt & !3) as u32;
            let d = match self.find_descriptor(i.ldt & !4)? {
                Some(d) if i.ldt & 4 == 0 && d.kind() == 2 && d.present() => d,
                _ => return Err(self.raise_with(vector::TS, code)),
            };
            self.ldtr = d.load(i.ldt);
        }
        if self.v86() {
            self.cpl = 3;
            for n in 0..6 {
                self.load_real(n, i.seg[n]);
            }
            self.update_mode();
            return Ok(());
        }
        let cs = i.seg[seg::CS];
        self.cpl = (cs & 3) as u8;
        let code = (cs & !3) as u32;
        let d = self.descriptor(cs, vector::TS)?;
        let privilege = if d.is_conforming_code() { d.dpl() <= self.cpl } else { d.dpl() == self.cpl };
        if !d.is_code() || !privilege {
            return Err(self.raise_with(vector::TS, code));
        }
        if !d.present() {
            return Err(self.raise_with(vector::NP, code));
        }
        self.mark_accessed(d)?;
        self.seg[seg::CS] = d.load(cs);
        self.seg[seg::SS] = self.stack_segment(i.seg[seg::SS], self.cpl, vector::TS)?;
        self.update_mode();
        for s in [seg::ES, seg::DS, seg::FS, seg::GS] {
            if let Err(f) = self.load_segment(s, i.seg[s]) {
                if self.exception.vector == vector::GP {
                    self.exception.vector = vector::TS;
                }
                return Err(f);
            }
        }
        Ok(())
    }

    /// The outer task of the current one.
    pub(crate) fn task_return(&mut self) -> Res<()> {
        let link = self.sys_read::<u16>(self.tr.base)?;
        self.task_switch(link, Reason::Return, None)
    }

    /// Whether a descriptor is that of an available TSS of this mode.
    pub(crate) fn is_available_tss(&self, d: &Descriptor) -> bool {
        if self.long_mode() { d.kind() == 9 } else { matches!(d.kind(), 1 | 9) && d.attr() & attr::S == 0 }
    }
}
