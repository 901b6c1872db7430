//! Segment descriptors: loading segment registers, stacks of other privilege levels (Intel SDM vol. 3, chapters 3 and 6).

use crate::fault::{Res, vector};
use crate::mmu::{Privilege, canonical};
use crate::op::Next;
use crate::state::{Cpu, Request, Seg, attr, seg};

/// A descriptor as it lies in memory (the first eight bytes of it).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    /// The eight bytes.
    pub(crate) raw: u64,
    /// Where it is (linear).
    pub(crate) at: u64,
}

impl Descriptor {
    pub(crate) fn base(self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000
    }

    pub(crate) fn limit(self) -> u32 {
        let l = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.attr() & attr::G != 0 { l << 12 | 0xfff } else { l }
    }

    pub(crate) fn attr(self) -> u32 {
        (self.raw >> 40) as u32 & 0xf0ff
    }

    /// Type with the S bit: below 16 is a system descriptor.
    pub(crate) fn kind(self) -> u32 {
        self.attr() & 0x1f
    }

    pub(crate) fn is_code(self) -> bool {
        self.kind() & 0x18 == 0x18
    }

    pub(crate) fn is_conforming_code(self) -> bool {
        self.kind() & 0x1c == 0x1c
    }

    pub(crate) fn is_writable_data(self) -> bool {
        self.kind() & 0x1a == 0x12
    }

    pub(crate) fn present(self) -> bool {
        self.attr() & attr::P != 0
    }

    pub(crate) fn dpl(self) -> u8 {
        (self.attr() >> attr::DPL_SHIFT & 3) as u8
    }

    /// As a segment register, with the accessed bit set for code and data.
    pub(crate) fn load(self, selector: u16) -> Seg {
        let a = self.attr();
        let accessed = if a & attr::S != 0 { attr::ACCESSED } else { 0 };
        Seg { base: self.base(), limit: self.limit(), attr: a | accessed, selector }
    }
}

/// A stack that is being built for another privilege level, or the current one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack {
    /// Segment.
    pub(crate) ss: Seg,
    /// Stack pointer.
    pub(crate) sp: u64,
    /// Width of the stack pointer.
    pub(crate) mask: u64,
    /// With whose privilege it is accessed.
    pub(crate) privilege: Privilege,
    /// Long mode: no limits, no base.
    pub(crate) long: bool,
    /// Error code of a stack fault.
    pub(crate) error: u32,
}

impl Stack {
    fn linear(&self, cpu: &mut Cpu, sp: u64, len: u32, write: bool) -> Res<u64> {
        if self.long {
            let end = sp.wrapping_add(len as u64 - 1);
            return if canonical(sp) && canonical(end) {
                Ok(sp)
            } else {
                Err(cpu.raise_with(vector::SS, self.error))
            };
        }
        cpu.linear_in(&self.ss, seg::SS, sp as u32, len, write, self.error)
    }

    /// Pushes 2, 4 or 8 bytes.
    pub(crate) fn push(&mut self, cpu: &mut Cpu, bytes: u8, value: u64) -> Res<()> {
        let sp = self.sp.wrapping_sub(bytes as u64);
        let at = sp & self.mask;
        let lin = self.linear(cpu, at, bytes as u32, true)?;
        match bytes {
            2 => cpu.write_as(self.privilege, seg::SS, lin, value as u16)?,
            4 => cpu.write_as(self.privilege, seg::SS, lin, value as u32)?,
            _ => cpu.write_as(self.privilege, seg::SS, lin, value)?,
        }
        self.sp = self.sp & !self.mask | at;
        Ok(())
    }

    /// Pops 2, 4 or 8 bytes.
    pub(crate) fn pop(&mut self, cpu: &mut Cpu, bytes: u8) -> Res<u64> {
        let at = self.sp & self.mask;
        let lin = self.linear(cpu, at, bytes as u32, false)?;
        let v = match bytes {
            2 => cpu.read_as::<u16>(self.privilege, seg::SS, lin)? as u64,
            4 => cpu.read_as::<u32>(self.privilege, seg::SS, lin)? as u64,
            _ => cpu.read_as::<u64>(self.privilege, seg::SS, lin)?,
        };
        self.skip(bytes as u64);
        Ok(v)
    }

    /// Moves the stack pointer up.
    pub(crate) fn skip(&mut self, n: u64) {
        self.sp = self.sp & !self.mask | self.sp.wrapping_add(n) & self.mask;
    }
}

/// Width of the stack pointer that a stack segment has outside 64-bit mode.
pub(crate) fn stack_mask(ss: &Seg) -> u64 {
    if ss.attr & attr::DB != 0 { 0xffff_ffff } else { 0xffff }
}

/// A null selector's segment.
pub(crate) fn null(selector: u16) -> Seg {
    Seg { base: 0, limit: 0, attr: attr::UNUSABLE, selector }
}

/// A flat code segment.
pub(crate) fn flat_code(selector: u16, dpl: u8, long: bool) -> Seg {
    let size = if long { attr::L } else { attr::DB };
    let attr = 0xb | attr::S | (dpl as u32) << attr::DPL_SHIFT | attr::P | attr::G | size;
    Seg { base: 0, limit: u32::MAX, attr, selector }
}

/// A flat data segment.
pub(crate) fn flat_data(selector: u16, dpl: u8) -> Seg {
    let attr = 3 | attr::S | (dpl as u32) << attr::DPL_SHIFT | attr::P | attr::G | attr::DB;
    Seg { base: 0, limit: u32::MAX, attr, selector }
}

impl Cpu {
    /// The descriptor of a selector; `None` if it lies outside its table.
    pub(crate) fn find_descriptor(&mut self, selector: u16) -> Res<Option<Descriptor>> {
        let offset = (selector & !7) as u32;
        let (base, limit) = if selector & 4 != 0 {
            if !self.ldtr.usable() {
                return Ok(None);
            }
            (self.ldtr.base, self.ldtr.limit)
        } else {
            (self.gdtr.base, self.gdtr.limit as u32)
        };
        if offset + 7 > limit {
            return Ok(None);
        }
        let at = base.wrapping_add(offset as u64);
        Ok(Some(Descriptor { raw: self.sys_read(at)?, at }))
    }

    /// The descriptor of a selector that must not be null; faults with `vector` and the selector.
    pub(crate) fn descriptor(&mut self, selector: u16, v: u8) -> Res<Descriptor> {
        if selector & !3 == 0 {
            return Err(self.raise_with(v, 0));
        }
        match self.find_descriptor(selector)? {
            Some(d) => Ok(d),
            None => Err(self.raise_with(v, (selector & !3) as u32)),
        }
    }

    /// The upper half of a 16-byte system descriptor: bits 32 to 63 of the base.
    pub(crate) fn descriptor_high(&mut self, d: Descriptor, selector: u16, v: u8) -> Res<u64> {
        let limit = if selector & 4 != 0 { self.ldtr.limit } else { self.gdtr.limit as u32 };
        if (selector & !7) as u32 + 15 > limit {
            return Err(self.raise_with(v, (selector & !3) as u32));
        }
        let high = self.sys_read::<u64>(d.at.wrapping_add(8))?;
        // The type field of the upper half must be zero.
        if high >> 40 & 0x1f != 0 {
            return Err(self.raise_with(v, (selector & !3) as u32));
        }
        Ok(high << 32)
    }

    /// Sets the accessed bit of a code or data descriptor in memory.
    pub(crate) fn mark_accessed(&mut self, d: Descriptor) -> Res<()> {
        if d.attr() & (attr::S | attr::ACCESSED) == attr::S {
            self.sys_write(d.at.wrapping_add(5), (d.raw >> 40) as u8 | 1)?;
        }
        Ok(())
    }

    /// Loads ES, SS, DS, FS or GS.
    pub(crate) fn load_segment(&mut self, s: usize, selector: u16) -> Res<()> {
        if !self.protected() || self.v86() {
            self.load_real(s, selector);
            return Ok(());
        }
        let rpl = (selector & 3) as u8;
        let code = (selector & !3) as u32;
        if selector & !3 == 0 {
            if s == seg::SS && !(self.mode.is64() && self.cpl < 3 && rpl == self.cpl) {
                return Err(self.gp(0));
            }
            self.seg[s] = null(selector);
            if s == seg::SS {
                self.seg[s].attr |= (self.cpl as u32) << attr::DPL_SHIFT;
            }
            if s == seg::SS || !self.mode.is64() {
                self.update_mode();
            }
            return Ok(());
        }
        let d = self.descriptor(selector, vector::GP)?;
        if s == seg::SS {
            if rpl != self.cpl || d.dpl() != self.cpl || !d.is_writable_data() {
                return Err(self.gp(code));
            }
            if !d.present() {
                return Err(self.raise_with(vector::SS, code));
            }
        } else {
            let readable = d.attr() & attr::S != 0 && (!d.is_code() || d.attr() & attr::RW != 0);
            let allowed = d.is_conforming_code() || rpl <= d.dpl() && self.cpl <= d.dpl();
            if !readable || !allowed {
                return Err(self.gp(code));
            }
            if !d.present() {
                return Err(self.raise_with(vector::NP, code));
            }
        }
        self.mark_accessed(d)?;
        self.seg[s] = d.load(selector);
        if s == seg::SS || !self.mode.is64() {
            self.update_mode();
        }
        Ok(())
    }

    /// Loads a segment register the way of real and virtual-8086 mode. Real mode leaves limit and attributes alone.
    pub(crate) fn load_real(&mut self, s: usize, selector: u16) {
        let g = &mut self.seg[s];
        g.selector = selector;
        g.base = (selector as u64) << 4;
        if self.flags & crate::state::fl::VM != 0 {
            g.limit = 0xffff;
            g.attr = 0xf3;
        } else {
            // What protected mode left unusable can be used again.
            if g.attr & attr::UNUSABLE != 0 {
                g.attr = 0x93;
                g.limit = 0xffff;
            }
        }
    }

    /// What follows an instruction that loaded a segment register: SS shields the next instruction from interrupts.
    pub(crate) fn after_segment_load(&mut self, s: usize) -> Next {
        if s == seg::SS {
            self.request = Request::StackShadow;
            return Next::REQUEST;
        }
        self.next_block()
    }

    /// Checks a stack selector for a new privilege level; faults with `v` (#TS when it comes from a TSS).
    pub(crate) fn stack_segment(&mut self, selector: u16, cpl: u8, v: u8) -> Res<Seg> {
        let code = (selector & !3) as u32;
        let d = self.descriptor(selector, v)?;
        if (selector & 3) as u8 != cpl || d.dpl() != cpl || !d.is_writable_data() {
            return Err(self.raise_with(v, code));
        }
        if !d.present() {
            return Err(self.raise_with(vector::SS, code));
        }
        self.mark_accessed(d)?;
        Ok(d.load(selector))
    }

    /// Stack of an inner privilege level, from the TSS.
    pub(crate) fn inner_stack(&mut self, cpl: u8) -> Res<Stack> {
        let tr = self.tr;
        let error = (tr.selector & !3) as u32;
        if self.long_mode() {
            let sp = self.tss_pointer(4 + cpl as u32 * 8)?;
            let mut ss = null(cpl as u16);
            ss.attr |= (cpl as u32) << attr::DPL_SHIFT;
            return Ok(Stack { ss, sp, mask: u64::MAX, privilege: privilege_of(cpl), long: true, error: 0 });
        }
        let wide = tr.attr & 8 != 0;
        let (at, len) = if wide { (4 + cpl as u32 * 8, 6) } else { (2 + cpl as u32 * 4, 4) };
        if at + len - 1 > tr.limit {
            return Err(self.raise_with(vector::TS, error));
        }
        let at = tr.base.wrapping_add(at as u64);
        let (sp, selector) = if wide {
            (self.sys_read::<u32>(at)? as u64, self.sys_read::<u16>(at.wrapping_add(4))?)
        } else {
            (self.sys_read::<u16>(at)? as u64, self.sys_read::<u16>(at.wrapping_add(2))?)
        };
        let ss = self.stack_segment(selector, cpl, vector::TS)?;
        let error = (selector & !3) as u32;
        Ok(Stack { ss, sp, mask: stack_mask(&ss), privilege: privilege_of(cpl), long: false, error })
    }

    /// A 64-bit pointer in the TSS.
    pub(crate) fn tss_pointer(&mut self, at: u32) -> Res<u64> {
        let tr = self.tr;
        if at + 7 > tr.limit {
            return Err(self.raise_with(vector::TS, (tr.selector & !3) as u32));
        }
        self.sys_read(tr.base.wrapping_add(at as u64))
    }

    /// The current stack.
    pub(crate) fn current_stack(&self) -> Stack {
        Stack {
            ss: self.seg[seg::SS],
            sp: self.regs[4],
            mask: self.stack_mask(),
            privilege: privilege_of(self.cpl),
            long: self.mode.is64(),
            error: 0,
        }
    }

    /// Makes a stack current.
    pub(crate) fn use_stack(&mut self, s: &Stack) {
        self.seg[seg::SS] = s.ss;
        self.regs[4] = s.sp;
    }

    /// After a return to an outer level: data segments that it may not use become null. FS and GS keep their bases, which
    /// matter to 64-bit code.
    pub(crate) fn drop_inner_segments(&mut self) {
        for s in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let g = self.seg[s];
            let conforming = g.attr & (attr::CODE | attr::EC) == attr::CODE | attr::EC;
            if g.usable() && g.dpl() < self.cpl && !conforming {
                self.seg[s].selector = 0;
                self.seg[s].attr |= attr::UNUSABLE;
            }
        }
        self.update_mode();
    }
}

/// Privilege of stack accesses at a CPL. AC does not matter to pushes of the processor itself.
pub(crate) fn privilege_of(cpl: u8) -> Privilege {
    if cpl == 3 { Privilege::User } else { Privilege::Supervisor }
}
