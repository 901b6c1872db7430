//! PUSH, POP, PUSHA, POPA, PUSHF, POPF, ENTER, LEAVE, and the stack primitives that others use.

use super::{Ea, ending, h};
use crate::decode::operand::{Kind, dst, imm, kind, segment, src};
use crate::decode::{Ctx, Flow};
use crate::fault::Res;
use crate::op::{Next, Op};
use crate::state::{Cpu, Mode, cr, fl, reg, seg};
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

const RSP: usize = reg::RSP as usize / 8;

impl Cpu {
    /// Adds to the stack pointer, as wide as it is in the current mode.
    #[inline]
    pub(crate) fn add_sp(&mut self, n: u64) {
        let sp = self.regs[RSP].wrapping_add(n);
        self.set_sp(sp);
    }

    /// Sets the stack pointer, as wide as it is in the current mode.
    #[inline]
    pub(crate) fn set_sp(&mut self, sp: u64) {
        if self.mode.is64() {
            self.regs[RSP] = sp;
        } else if self.mode.contains(Mode::STACK32) {
            self.set(reg::RSP, sp as u32);
        } else {
            self.set(reg::RSP, sp as u16);
        }
    }

    /// Pushes 2, 4 or 8 bytes.
    pub(crate) fn push_sized(&mut self, bytes: u8, value: u64) -> Res<()> {
        let lin = self.stack(-(bytes as i64), bytes as u32, true)?;
        match bytes {
            2 => self.write(seg::SS, lin, value as u16)?,
            4 => self.write(seg::SS, lin, value as u32)?,
            _ => self.write(seg::SS, lin, value)?,
        }
        self.add_sp((bytes as u64).wrapping_neg());
        Ok(())
    }

    /// Reads 2, 4 or 8 bytes at `offset` above the top of the stack.
    pub(crate) fn peek_stack(&mut self, offset: u64, bytes: u8) -> Res<u64> {
        let lin = self.stack(offset as i64, bytes as u32, false)?;
        Ok(match bytes {
            2 => self.read::<u16>(seg::SS, lin)? as u64,
            4 => self.read::<u32>(seg::SS, lin)? as u64,
            _ => self.read::<u64>(seg::SS, lin)?,
        })
    }

    /// Pops 2, 4 or 8 bytes.
    pub(crate) fn pop_sized(&mut self, bytes: u8) -> Res<u64> {
        let v = self.peek_stack(0, bytes)?;
        self.add_sp(bytes as u64);
        Ok(v)
    }
}

#[inline(always)]
fn push64(cpu: &mut Cpu, value: u64) -> Res<()> {
    let sp = cpu.regs[RSP].wrapping_sub(8);
    cpu.write(seg::SS, sp, value)?;
    cpu.regs[RSP] = sp;
    Ok(())
}

#[inline(always)]
fn push_r64(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let v = cpu.get(op.src);
    push64(cpu, v)
}

fn push_i64(cpu: &mut Cpu, op: &Op) -> Res<()> {
    push64(cpu, op.imm)
}

fn push_m64<E: Ea>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, 8, false)?;
    let v = cpu.read::<u64>(op.seg(), lin)?;
    push64(cpu, v)
}

#[inline(always)]
fn pop_r64(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let sp = cpu.regs[RSP];
    let v = cpu.read::<u64>(seg::SS, sp)?;
    cpu.regs[RSP] = sp.wrapping_add(8);
    cpu.set(op.dst, v);
    Ok(())
}

/// Other operand sizes: bytes in `op.scale` where there is no memory operand.
fn push_r(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let v = cpu.get::<u64>(op.src);
    cpu.push_sized(op.scale, v)
}

fn push_i(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.push_sized(op.scale, op.imm)
}

fn push_m<const BYTES: u8>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = cpu.address(op, BYTES as u32, false)?;
    let v = match BYTES {
        2 => cpu.read::<u16>(op.seg(), lin)? as u64,
        4 => cpu.read::<u32>(op.seg(), lin)? as u64,
        _ => cpu.read::<u64>(op.seg(), lin)?,
    };
    cpu.push_sized(BYTES, v)
}

/// PUSH of a segment register (`op.src`): the selector, zero-extended.
fn push_seg(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let selector = cpu.seg[op.src as usize % 6].selector;
    if op.scale == 4 && !cpu.is_amd() {
        // Intel's processors only write the low half.
        let lin = cpu.stack(-4, 4, true)?;
        cpu.write(seg::SS, lin, selector)?;
        cpu.add_sp(4u64.wrapping_neg());
        return Ok(());
    }
    cpu.push_sized(op.scale, selector as u64)
}

fn pop_r(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let v = cpu.pop_sized(op.scale)?;
    match op.scale {
        2 => cpu.set(op.dst, v as u16),
        4 => cpu.set(op.dst, v as u32),
        _ => cpu.set(op.dst, v),
    }
    Ok(())
}

/// POP to memory. An address based on the stack pointer uses its value after the pop.
fn pop_m<const BYTES: u8>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let v = cpu.peek_stack(0, BYTES)?;
    let old = cpu.regs[RSP];
    cpu.add_sp(BYTES as u64);
    let r = cpu.address(op, BYTES as u32, true).and_then(|lin| match BYTES {
        2 => cpu.write(op.seg(), lin, v as u16),
        4 => cpu.write(op.seg(), lin, v as u32),
        _ => cpu.write(op.seg(), lin, v),
    });
    if r.is_err() {
        cpu.regs[RSP] = old;
    }
    r
}

/// POP of a segment register (`op.dst`).
fn pop_seg(cpu: &mut Cpu, op: &Op) -> Res<Next> {
    let v = cpu.peek_stack(0, op.scale)?;
    let old = cpu.mode;
    let wide = op.scale as u64;
    let sp = cpu.regs[RSP].wrapping_add(wide);
    // Loading SS may change the stack's width; the pointer moves by the old one.
    cpu.load_segment(op.dst as usize % 6, v as u16)?;
    let new = std::mem::replace(&mut cpu.mode, old);
    cpu.set_sp(sp);
    cpu.mode = new;
    Ok(cpu.after_segment_load(op.dst as usize))
}

fn pusha<const BYTES: u8>(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    let total = BYTES as i64 * 8;
    // All or nothing: see that the whole range can be written.
    for n in 1..=8 {
        let lin = cpu.stack(-(n * BYTES as i64), BYTES as u32, true)?;
        cpu.probe_write(seg::SS, lin, BYTES as usize)?;
    }
    for n in 0..8i64 {
        let lin = cpu.stack(-((n + 1) * BYTES as i64), BYTES as u32, true)?;
        let v = cpu.regs[n as usize];
        if BYTES == 2 { cpu.write(seg::SS, lin, v as u16)? } else { cpu.write(seg::SS, lin, v as u32)? }
    }
    cpu.add_sp((total as u64).wrapping_neg());
    Ok(())
}

fn popa<const BYTES: u8>(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    let mut values = [0; 8];
    for (n, v) in values.iter_mut().enumerate() {
        *v = cpu.peek_stack(n as u64 * BYTES as u64, BYTES)?;
    }
    cpu.add_sp(8 * BYTES as u64);
    for (n, v) in values.iter().enumerate() {
        let r = (7 - n as u8) * 8;
        if r == reg::RSP {
            continue;
        }
        if BYTES == 2 { cpu.set(r, *v as u16) } else { cpu.set(r, *v as u32) }
    }
    Ok(())
}

fn pushf(cpu: &mut Cpu, op: &Op) -> Res<()> {
    if cpu.v86() && cpu.flags & fl::IOPL != fl::IOPL {
        return Err(cpu.gp(0));
    }
    let v = cpu.rflags() & !(fl::RF | fl::VM);
    cpu.push_sized(op.scale, v)
}

fn popf(cpu: &mut Cpu, op: &Op) -> Res<Next> {
    if cpu.v86() && cpu.flags & fl::IOPL != fl::IOPL {
        return Err(cpu.gp(0));
    }
    let v = cpu.pop_sized(op.scale)?;
    let mut may = fl::ARITH | fl::TF | fl::DF | fl::NT | fl::AC | fl::ID;
    if cpu.cpl == 0 {
        may |= fl::IOPL;
    }
    if cpu.cpl as u64 <= cpu.flags >> 12 & 3 {
        may |= fl::IF;
    }
    if op.scale == 2 {
        may &= 0xffff;
    }
    let old = cpu.rflags();
    cpu.set_flags(old & !may & !fl::RF | v & may);
    Ok(cpu.next_block())
}

fn leave64(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    let bp = cpu.get::<u64>(reg::RBP);
    let v = cpu.read::<u64>(seg::SS, bp)?;
    cpu.regs[RSP] = bp.wrapping_add(8);
    cpu.set(reg::RBP, v);
    Ok(())
}

fn leave(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let old = cpu.regs[RSP];
    let bp = cpu.get::<u64>(reg::RBP);
    cpu.set_sp(bp);
    match cpu.pop_sized(op.scale) {
        Ok(v) if op.scale == 2 => cpu.set(reg::RBP, v as u16),
        Ok(v) if op.scale == 4 => cpu.set(reg::RBP, v as u32),
        Ok(v) => cpu.set(reg::RBP, v),
        Err(f) => {
            cpu.regs[RSP] = old;
            return Err(f);
        }
    }
    Ok(())
}

/// ENTER: frame size in `op.imm`, nesting level in `op.dst`.
fn enter(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let old = cpu.regs[RSP];
    let r = enter_frame(cpu, op);
    if r.is_err() {
        cpu.regs[RSP] = old;
    }
    r
}

fn enter_frame(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let bytes = op.scale;
    let level = op.dst & 31;
    let bp = cpu.get::<u64>(reg::RBP);
    cpu.push_sized(bytes, bp)?;
    let frame = cpu.regs[RSP];
    if level > 0 {
        for n in 1..level {
            let at = bp.wrapping_sub(n as u64 * bytes as u64) & cpu.stack_mask();
            let lin = cpu.linear(seg::SS, at, bytes as u32, false)?;
            let v = match bytes {
                2 => cpu.read::<u16>(seg::SS, lin)? as u64,
                4 => cpu.read::<u32>(seg::SS, lin)? as u64,
                _ => cpu.read::<u64>(seg::SS, lin)?,
            };
            cpu.push_sized(bytes, v)?;
        }
        cpu.push_sized(bytes, frame)?;
    }
    cpu.add_sp(op.imm.wrapping_neg());
    // The new top of the stack must be writable.
    let lin = cpu.stack(0, bytes as u32, true)?;
    cpu.probe_write(seg::SS, lin, bytes as usize)?;
    match bytes {
        2 => cpu.set(reg::RBP, frame as u16),
        4 => cpu.set(reg::RBP, frame as u32),
        _ => cpu.set(reg::RBP, frame),
    }
    Ok(())
}

/// CLI and STI live here for their kinship with POPF.
fn cli(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    cpu.check_iopl_flag()?;
    cpu.flags &= !fl::IF;
    Ok(())
}

fn sti(cpu: &mut Cpu, _op: &Op) -> Res<Next> {
    cpu.check_iopl_flag()?;
    if cpu.flags & fl::IF != 0 {
        return Ok(cpu.next_block());
    }
    let f = cpu.rflags() | fl::IF;
    cpu.set_flags(f);
    cpu.request = crate::state::Request::Shadow;
    Ok(Next::REQUEST)
}

impl Cpu {
    /// Whether CLI and STI are allowed (no VME or PVI).
    fn check_iopl_flag(&mut self) -> Res<()> {
        let iopl = (self.flags >> 12 & 3) as u8;
        if self.cr0 & cr::CR0_PE != 0 && self.cpl > iopl { Err(self.gp(0)) } else { Ok(()) }
    }
}

fn stac(cpu: &mut Cpu, op: &Op) -> Res<()> {
    if cpu.cpl != 0 {
        return Err(cpu.ud());
    }
    cpu.flags = cpu.flags & !fl::AC | op.imm;
    cpu.retable();
    Ok(())
}

fn cld(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    cpu.flags &= !fl::DF;
    Ok(())
}

fn std(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    cpu.flags |= fl::DF;
    Ok(())
}

fn carry<const OP: u8>(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    use crate::flags::cc::CF;
    match OP {
        0 => cpu.cc &= !CF,
        1 => cpu.cc |= CF,
        _ => cpu.cc ^= CF,
    }
    Ok(())
}

/// Bytes that a stack instruction moves.
fn width(i: &Instruction) -> u8 {
    i.stack_pointer_increment().unsigned_abs() as u8
}

fn lower_push(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    let n = width(i);
    let fast = n == 8 && ctx.mode.is64();
    match kind(i, 0) {
        Kind::Reg => {
            src(i, 0, op);
            op.scale = n;
            op.handler = if fast { h!(push_r64) } else { h!(push_r) };
        }
        Kind::Imm => {
            op.imm = imm(i, 0);
            op.scale = n;
            op.handler = if fast { h!(push_i64) } else { h!(push_i) };
        }
        Kind::Mem => {
            op.handler = match n {
                8 if ctx.flat(op) => h!(push_m64::<super::Flat>),
                8 => h!(push_m64::<super::General>),
                4 => h!(push_m::<4>),
                _ => h!(push_m::<2>),
            };
        }
        Kind::Other => {
            op.src = segment(i.op0_register())?;
            op.scale = n;
            op.handler = h!(push_seg);
        }
    }
    Some(Flow::Continue)
}

fn lower_pop(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    let n = width(i);
    match kind(i, 0) {
        Kind::Reg => {
            dst(i, 0, op);
            op.scale = n;
            op.handler = if n == 8 && ctx.mode.is64() { h!(pop_r64) } else { h!(pop_r) };
        }
        Kind::Mem => {
            op.handler = match n {
                8 => h!(pop_m::<8>),
                4 => h!(pop_m::<4>),
                _ => h!(pop_m::<2>),
            };
        }
        _ => {
            if i.op0_kind() != OpKind::Register {
                return None;
            }
            op.dst = segment(i.op0_register())?;
            op.scale = n;
            op.handler = ending!(pop_seg);
            return Some(Flow::End);
        }
    }
    Some(Flow::Continue)
}

/// Lowers the instructions of this family.
pub(super) fn lower(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    let go = |op: &mut Op, handler| {
        op.handler = handler;
        Some(Flow::Continue)
    };
    match i.mnemonic() {
        Mnemonic::Push => lower_push(ctx, i, op),
        Mnemonic::Pop => lower_pop(ctx, i, op),
        Mnemonic::Pusha => go(op, h!(pusha::<2>)),
        Mnemonic::Pushad => go(op, h!(pusha::<4>)),
        Mnemonic::Popa => go(op, h!(popa::<2>)),
        Mnemonic::Popad => go(op, h!(popa::<4>)),
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => {
            op.scale = width(i);
            go(op, h!(pushf))
        }
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
            op.scale = width(i);
            op.handler = ending!(popf);
            Some(Flow::End)
        }
        Mnemonic::Leave => {
            op.scale = match i.code() {
                Code::Leavew => 2,
                Code::Leaved => 4,
                _ => 8,
            };
            go(op, if op.scale == 8 { h!(leave64) } else { h!(leave) })
        }
        Mnemonic::Enter => {
            op.scale = match i.code() {
                Code::Enterw_imm16_imm8 => 2,
                Code::Enterd_imm16_imm8 => 4,
                _ => 8,
            };
            op.imm = i.immediate16() as u64;
            op.dst = i.immediate8_2nd();
            go(op, h!(enter))
        }
        Mnemonic::Cli => go(op, h!(cli)),
        Mnemonic::Sti => {
            op.handler = ending!(sti);
            Some(Flow::End)
        }
        Mnemonic::Stac => {
            op.imm = fl::AC;
            go(op, h!(stac))
        }
        Mnemonic::Clac => go(op, h!(stac)),
        Mnemonic::Cld => go(op, h!(cld)),
        Mnemonic::Std => go(op, h!(std)),
        Mnemonic::Clc => go(op, h!(carry::<0>)),
        Mnemonic::Stc => go(op, h!(carry::<1>)),
        Mnemonic::Cmc => go(op, h!(carry::<2>)),
        _ => None,
    }
}
