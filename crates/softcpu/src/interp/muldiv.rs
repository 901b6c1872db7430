//! MUL, IMUL, DIV, IDIV.

use super::{Ea, General, h, sized_wide, sized_wide_ea};
use crate::alu::{self, MulDiv};
use crate::decode::operand::{Kind, dst, imm, kind, size, src};
use crate::decode::{Ctx, Flow};
use crate::fault::{Res, vector};
use crate::op::Op;
use crate::state::{Cpu, reg};
use iced_x86::{Instruction, Mnemonic};

/// Two-operand IMUL, and three operands with the immediate.
#[inline(always)]
fn imul_rr<T: MulDiv>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (v, cc) = T::imul2(cpu.get(op.dst), cpu.get(op.src), cpu.cc);
    cpu.set(op.dst, v);
    cpu.cc = cc;
    Ok(())
}

#[inline(always)]
fn imul_rm<T: MulDiv, E: Ea>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, false)?;
    let b = cpu.read::<T>(op.seg(), lin)?;
    let (v, cc) = T::imul2(cpu.get(op.dst), b, cpu.cc);
    cpu.set(op.dst, v);
    cpu.cc = cc;
    Ok(())
}

#[inline(always)]
fn imul_rri<T: MulDiv>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (v, cc) = T::imul2(cpu.get(op.src), T::from_u64(op.imm), cpu.cc);
    cpu.set(op.dst, v);
    cpu.cc = cc;
    Ok(())
}

fn imul_rmi<T: MulDiv, E: Ea>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, false)?;
    let a = cpu.read::<T>(op.seg(), lin)?;
    let (v, cc) = T::imul2(a, T::from_u64(op.imm), cpu.cc);
    cpu.set(op.dst, v);
    cpu.cc = cc;
    Ok(())
}

/// The operand of the one-operand forms.
#[inline(always)]
fn operand<T: MulDiv, E: Ea, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Res<T> {
    if MEM {
        let lin = E::at(cpu, op, size_of::<T>() as u32, false)?;
        cpu.read::<T>(op.seg(), lin)
    } else {
        Ok(cpu.get(op.src))
    }
}

fn multiply<T: MulDiv, E: Ea, const MEM: bool, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let b = operand::<T, E, MEM>(cpu, op)?;
    let a = cpu.get::<T>(reg::RAX);
    let (lo, hi, cc) = if SIGNED { T::imul(a, b, cpu.cc) } else { T::mul(a, b, cpu.cc) };
    cpu.set(reg::RAX, lo);
    cpu.set(reg::RDX, hi);
    cpu.cc = cc;
    Ok(())
}

fn divide<T: MulDiv, E: Ea, const MEM: bool, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let b = operand::<T, E, MEM>(cpu, op)?;
    let (lo, hi) = (cpu.get::<T>(reg::RAX), cpu.get::<T>(reg::RDX));
    let r = if SIGNED { T::idiv(lo, hi, b, cpu.cc) } else { T::div(lo, hi, b, cpu.cc) };
    let Some((q, rem, cc)) = r else { return Err(cpu.raise(vector::DE)) };
    cpu.set(reg::RAX, q);
    cpu.set(reg::RDX, rem);
    cpu.cc = cc;
    Ok(())
}

fn operand8<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Res<u8> {
    if MEM {
        let lin = General::at(cpu, op, 1, false)?;
        cpu.read::<u8>(op.seg(), lin)
    } else {
        Ok(cpu.get(op.src))
    }
}

fn multiply8<const MEM: bool, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let b = operand8::<MEM>(cpu, op)?;
    let al = cpu.get::<u8>(reg::RAX);
    let (ax, cc) = if SIGNED { alu::imul8(al, b, cpu.cc) } else { alu::mul8(al, b, cpu.cc) };
    cpu.set(reg::RAX, ax);
    cpu.cc = cc;
    Ok(())
}

fn divide8<const MEM: bool, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let b = operand8::<MEM>(cpu, op)?;
    let ax = cpu.get::<u16>(reg::RAX);
    let r = if SIGNED { alu::idiv8(ax, b, cpu.cc) } else { alu::div8(ax, b, cpu.cc) };
    let Some((ax, cc)) = r else { return Err(cpu.raise(vector::DE)) };
    cpu.set(reg::RAX, ax);
    cpu.cc = cc;
    Ok(())
}

/// Lowers the instructions of this family.
pub(super) fn lower(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    macro_rules! one {
        ($wide:ident, $byte:ident, $signed:literal) => {{
            let mem = kind(i, 0) == Kind::Mem;
            if !mem {
                src(i, 0, op);
            }
            op.handler = match (size(i, 0), mem, ctx.flat(op)) {
                (1, false, _) => h!($byte::<false, $signed>),
                (1, true, _) => h!($byte::<true, $signed>),
                (2, false, _) => h!($wide::<u16, super::Flat, false, $signed>),
                (4, false, _) => h!($wide::<u32, super::Flat, false, $signed>),
                (_, false, _) => h!($wide::<u64, super::Flat, false, $signed>),
                (2, true, _) => h!($wide::<u16, super::General, true, $signed>),
                (4, true, true) => h!($wide::<u32, super::Flat, true, $signed>),
                (4, true, false) => h!($wide::<u32, super::General, true, $signed>),
                (_, true, true) => h!($wide::<u64, super::Flat, true, $signed>),
                (_, true, false) => h!($wide::<u64, super::General, true, $signed>),
            };
            Some(Flow::Continue)
        }};
    }
    match i.mnemonic() {
        Mnemonic::Mul => one!(multiply, multiply8, false),
        Mnemonic::Imul if i.op_count() == 1 => one!(multiply, multiply8, true),
        Mnemonic::Div => one!(divide, divide8, false),
        Mnemonic::Idiv => one!(divide, divide8, true),
        Mnemonic::Imul => {
            dst(i, 0, op);
            let n = size(i, 0);
            let three = i.op_count() == 3;
            if three {
                op.imm = imm(i, 2);
            }
            op.handler = match (kind(i, 1), three) {
                (Kind::Reg, false) => {
                    src(i, 1, op);
                    sized_wide!(n, imul_rr)
                }
                (Kind::Reg, true) => {
                    src(i, 1, op);
                    sized_wide!(n, imul_rri)
                }
                (Kind::Mem, false) => sized_wide_ea!(ctx, op, n, imul_rm),
                (Kind::Mem, true) => sized_wide_ea!(ctx, op, n, imul_rmi),
                _ => return None,
            };
            Some(Flow::Continue)
        }
        _ => None,
    }
}
