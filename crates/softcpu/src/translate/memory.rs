//! Guest memory operands: the TLB look-up in front of an access.
//!
//! The TLB is direct-mapped; an entry gives the linear page it holds, once for reading and once for writing, and what to
//! add to a linear address to get the host's. With U and T as scratch registers:
//!
//! ```text
//! lea U, [address]; shr U, 12 - 5; and U, gs:[tlb_mask]; add U, gs:[tlb]
//! lea T, [address + size - 1]; and T, -4096; cmp T, [U + tag]; jne slow
//! mov T, [U + addend]
//! op  ..., [T + address]
//! ```
//!
//! Stack accesses nearly always hit the same page, so theirs compare with one page that is remembered (`check_stack`).
//!
//! An access that crosses into another page, or into nowhere, takes the slow path; where alignment matters the low bits
//! stay in the comparison.

use super::asm::{Label, Mem, Rm, cond, host, op};
use super::cache::site;
use super::emit::{Emitter, Stub, Unsupported};
use super::layout::{
    HOST, STACK_ADDEND, STACK_PAGE, TLB, TLB_ADDEND, TLB_MASK, TLB_READ, TLB_SHIFT, TLB_WRITE, gpr, seg_base,
};
use super::scan::Inst;
use iced_x86::{CodeSize, Instruction, Register};

/// A guest memory operand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ea {
    /// FS or GS, as a number in encoding order.
    pub seg: Option<usize>,
    /// Base register.
    pub base: Option<usize>,
    /// Index register and scale as a shift.
    pub index: Option<(usize, u8)>,
    /// Displacement, if there is a register or segment.
    pub disp: i32,
    /// The linear address itself, if it is known.
    pub absolute: Option<u64>,
    /// The address has 32 bits.
    pub narrow: bool,
}

impl Ea {
    /// The memory operand of an instruction with the usual address size.
    pub fn of(i: &Instruction) -> Result<Self, Unsupported> {
        if i.code_size() == CodeSize::Code32 {
            return Ok(Self::narrow(i));
        }
        let seg = match i.segment_prefix() {
            Register::FS => Some(crate::state::seg::FS),
            Register::GS => Some(crate::state::seg::GS),
            _ => None,
        };
        let part = |r: Register| (r != Register::None).then(|| super::operand::number(r));
        let displacement = i.memory_displacement64();
        let (base, index) = (i.memory_base(), i.memory_index());
        if base == Register::RIP || base == Register::None && index == Register::None {
            let absolute = displacement;
            if seg.is_none() {
                return Ok(Self { absolute: Some(absolute), ..Self::default() });
            }
            let disp = i32::try_from(absolute as i64).map_err(|_| Unsupported)?;
            return Ok(Self { seg, disp, ..Self::default() });
        }
        let disp = i32::try_from(displacement as i64).map_err(|_| Unsupported)?;
        // Room for the size of the access.
        disp.checked_add(64).ok_or(Unsupported)?;
        let scale = i.memory_index_scale().trailing_zeros() as u8;
        let index = part(index).map(|n| (n, scale));
        Ok(Self { seg, base: part(base), index, disp, ..Self::default() })
    }

    /// The same in 32-bit code, where all segments are flat.
    fn narrow(i: &Instruction) -> Self {
        let part = |r: Register| (r != Register::None).then(|| super::operand::number(r));
        let (base, index) = (part(i.memory_base()), part(i.memory_index()));
        let disp = i.memory_displacement32();
        if base.is_none() && index.is_none() {
            return Self { absolute: Some(disp.into()), narrow: true, ..Self::default() };
        }
        let scale = i.memory_index_scale().trailing_zeros() as u8;
        Self { base, index: index.map(|n| (n, scale)), disp: disp as i32, narrow: true, ..Self::default() }
    }
}

/// Permission and shape of an access.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// It writes (too).
    pub write: bool,
    /// Bytes.
    pub size: u8,
    /// Required alignment.
    pub align: u8,
    /// After the slow path, do not try again: the instruction accesses memory elsewhere as well.
    pub once: bool,
}

impl Emitter<'_> {
    /// Checks the memory operand of an instruction and returns where it is. Uses both scratch registers and the host's
    /// flags; afterwards `t` belongs to the operand and the other one is free.
    pub(super) fn operand(&mut self, inst: &Inst, write: bool, align: u8, t: u8) -> Result<Mem, Unsupported> {
        let i = &inst.i;
        let size = u8::try_from(i.memory_size().size()).map_err(|_| Unsupported)?;
        let locked = i.has_lock_prefix() || i.mnemonic() == iced_x86::Mnemonic::Xchg;
        let align = if locked { size.max(1) } else { align.max(1) };
        let ea = Ea::of(i)?;
        if align == 1
            && let Some(m) = self.check_group(inst, &ea, write, t)
        {
            return Ok(m);
        }
        self.check(inst, &ea, Shape { write, size, align, once: false }, t)
    }

    /// Checks a range off a base register; the addend is in `t` then.
    pub(super) fn check_range(
        &mut self,
        inst: &Inst,
        ea: &Ea,
        shape: Shape,
        t: u8,
    ) -> Result<Mem, Unsupported> {
        self.group_bits = site::GROUP;
        let r = self.check(inst, ea, shape, t);
        self.group_bits = 0;
        r
    }

    /// Checks an access.
    pub(super) fn check(&mut self, inst: &Inst, ea: &Ea, shape: Shape, t: u8) -> Result<Mem, Unsupported> {
        let Shape { write, size, align, once } = shape;
        if size == 0 || size > 128 || !align.is_power_of_two() {
            return Err(Unsupported);
        }
        let u = host::RAX + host::RCX - t;
        let tag = if write { TLB_WRITE } else { TLB_READ };
        self.clobber(inst.live_in());
        let bits = if write { site::WRITE } else { 0 } | if once { site::ONCE } else { 0 } | self.group_bits;
        if let Some(lin) = ea.absolute {
            let at = lin & 0xfff;
            if at + u64::from(size) > 4096 || lin & u64::from(align - 1) != 0 {
                return Err(Unsupported);
            }
            let site = self.site(&inst.i, size, align, bits);
            let slot = (lin >> (12 - TLB_SHIFT)) as u32 & !((1 << TLB_SHIFT) - 1);
            let page = lin & !0xfff;
            let mut from = Label::default();
            self.asm.mov_imm(u, u64::from(slot));
            self.asm.rm(false, &[0x23], u, Rm::Gs(TLB_MASK)); // and
            self.asm.alu(op::ADD, u, Rm::Gs(TLB));
            let short = i32::try_from(lin as i64).ok();
            if short.is_some() {
                let page = page as i64 as i32;
                self.asm.alu_imm(op::CMP, true, Rm::Mem(Mem::base(u, tag)), page);
            } else {
                self.asm.mov_imm(t, page);
                self.asm.alu(op::CMP, t, Rm::Mem(Mem::base(u, tag)));
            }
            self.asm.jcc_label(cond::NE, &mut from);
            self.stubs.push(Stub::Slow { from, site, ea: Some(*ea) });
            if let Some(disp) = short {
                self.asm.load(t, Rm::Mem(Mem::base(u, TLB_ADDEND)));
                return Ok(Mem::base(t, disp));
            }
            self.asm.mov_imm(t, lin);
            self.asm.alu(op::ADD, t, Rm::Mem(Mem::base(u, TLB_ADDEND)));
            return Ok(Mem::base(t, 0));
        }
        if let Ea { seg: None, base: Some(super::stack::RSP), index: None, .. } = *ea
            && align == 1
            && size.is_power_of_two()
        {
            return Ok(self.check_stack(inst, ea, shape, t, bits));
        }
        let site = self.site(&inst.i, size, align, bits);
        self.address(u, ea, 0);
        self.asm.shr32(u, 12 - TLB_SHIFT);
        self.asm.rm(false, &[0x23], u, Rm::Gs(TLB_MASK)); // and
        self.asm.alu(op::ADD, u, Rm::Gs(TLB));
        // What need not be aligned may cross pages; what is aligned cannot.
        let aligned = align >= size;
        self.address(t, ea, if aligned { 0 } else { i32::from(size) - 1 });
        let mask = !0xfff | if aligned { i32::from(align) - 1 } else { 0 };
        if !aligned && align > 1 {
            return Err(Unsupported);
        }
        self.asm.alu_imm(op::AND, true, Rm::Reg(t), mask);
        self.asm.alu(op::CMP, t, Rm::Mem(Mem::base(u, tag)));
        let mut from = Label::default();
        self.asm.jcc_label(cond::NE, &mut from);
        self.stubs.push(Stub::Slow { from, site, ea: Some(*ea) });
        self.asm.load(t, Rm::Mem(Mem::base(u, TLB_ADDEND)));
        Ok(self.complete(t, u, ea))
    }

    /// Checks an access relative to RSP: against the page in which the stack was found last.
    fn check_stack(&mut self, inst: &Inst, ea: &Ea, shape: Shape, t: u8, bits: u8) -> Mem {
        let Shape { write, size, .. } = shape;
        let site = self.site(&inst.i, size, 1, bits);
        let mut from = Label::default();
        self.address(t, ea, 0);
        self.asm.alu(op::SUB, t, Rm::Gs(STACK_PAGE));
        self.asm.alu_imm(op::CMP, true, Rm::Reg(t), 4096 - i32::from(size));
        self.asm.jcc_label(cond::A, &mut from);
        self.asm.load(t, Rm::Gs(STACK_ADDEND));
        let back = self.asm.here();
        let to = self.fixed.stack[usize::from(write)][size.trailing_zeros() as usize];
        self.stubs.push(Stub::Stack { from, site, ea: *ea, t, to, back });
        self.complete(t, host::RAX + host::RCX - t, ea)
    }

    /// The operand, `t` holding the addend.
    pub(super) fn complete(&mut self, t: u8, u: u8, ea: &Ea) -> Mem {
        if self.group_bits != 0 {
            // The addend is wanted, as it is.
            return Mem::base(t, 0);
        }
        if ea.narrow {
            self.address(u, ea, 0);
            self.asm.lea(t, Mem { base: Some(t), index: Some((u, 0)), disp: 0 });
            return Mem::base(t, 0);
        }
        if let Some(s) = ea.seg {
            self.asm.alu(op::ADD, t, Rm::Gs(seg_base(s)));
        }
        let mut m = Mem::base(t, ea.disp);
        if let Some((n, scale)) = ea.index {
            match HOST[n] {
                Some(r) => m.index = Some((r, scale)),
                None => {
                    self.asm.load(u, Rm::Gs(gpr(n)));
                    if scale != 0 {
                        self.asm.shl64(u, scale);
                    }
                    self.asm.alu(op::ADD, t, Rm::Reg(u));
                }
            }
        }
        if let Some(n) = ea.base {
            match HOST[n] {
                Some(r) if m.index.is_none() => m.index = Some((r, 0)),
                Some(r) => self.asm.alu(op::ADD, t, Rm::Reg(r)),
                None => self.asm.alu(op::ADD, t, Rm::Gs(gpr(n))),
            }
        }
        m
    }

    /// Computes a linear address plus `extra` into `d`, a scratch register. Uses the host's flags.
    pub(super) fn address(&mut self, d: u8, ea: &Ea, extra: i32) {
        if let Some(lin) = ea.absolute {
            return self.asm.mov_imm(d, lin.wrapping_add(extra as u64)); // never over the end of a page
        }
        if ea.narrow {
            // The general registers of 32-bit code are all in host registers.
            let base = ea.base.and_then(|n| HOST[n]);
            let index = ea.index.and_then(|(n, s)| HOST[n].map(|r| (r, s)));
            let disp = ea.disp.wrapping_add(extra);
            return self.asm.rm(false, &[0x8d], d, Rm::Mem(Mem { base, index, disp }));
        }
        let disp = ea.disp + extra;
        let mut started = false;
        if let Some((n, scale)) = ea.index
            && HOST[n].is_none()
        {
            self.asm.load(d, Rm::Gs(gpr(n)));
            if scale != 0 {
                self.asm.shl64(d, scale);
            }
            started = true;
        }
        let plus = |this: &mut Self, offset, started: &mut bool| {
            if *started {
                this.asm.alu(op::ADD, d, Rm::Gs(offset));
            } else {
                this.asm.load(d, Rm::Gs(offset));
            }
            *started = true;
        };
        if let Some(n) = ea.base
            && HOST[n].is_none()
        {
            plus(self, gpr(n), &mut started);
        }
        if let Some(s) = ea.seg {
            plus(self, seg_base(s), &mut started);
        }
        let base = ea.base.and_then(|n| HOST[n]);
        let index = ea.index.and_then(|(n, s)| HOST[n].map(|r| (r, s)));
        if !started {
            self.asm.lea(d, Mem { base, index, disp });
            return;
        }
        if let Some(r) = base {
            self.asm.alu(op::ADD, d, Rm::Reg(r));
        }
        if index.is_some() || disp != 0 {
            self.asm.lea(d, Mem { base: Some(d), index, disp });
        }
    }
}
