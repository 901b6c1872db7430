//! ROL, ROR, RCL, RCR, SHL, SHR, SAR, SHLD, SHRD.

use super::{Ea, h, sized, sized_ea, sized_wide, sized_wide_ea};
use crate::alu::{Alu, Rcl, Rcr, Rol, Ror, Sar, Shift, Shl, Shr, WideAlu};
use crate::decode::operand::{Kind, dst, kind, size, src};
use crate::decode::{Ctx, Flow};
use crate::fault::Res;
use crate::op::Op;
use crate::state::{Cpu, reg};
use iced_x86::{Instruction, Mnemonic, OpKind};

#[inline(always)]
fn ri<T: Alu, O: Shift>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (v, cc) = O::run::<T>(cpu.get(op.dst), op.imm as u8, cpu.cc);
    cpu.set(op.dst, v);
    cpu.cc = cc;
    Ok(())
}

#[inline(always)]
fn rcl<T: Alu, O: Shift>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (v, cc) = O::run::<T>(cpu.get(op.dst), cpu.get(reg::RCX), cpu.cc);
    cpu.set(op.dst, v);
    cpu.cc = cc;
    Ok(())
}

fn m<T: Alu, E: Ea, O: Shift>(cpu: &mut Cpu, op: &Op, count: u8) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, true)?;
    let old = cpu.cc;
    cpu.cc = cpu.rmw::<T, u16>(op.seg(), lin, |a| O::run(a, count, old))?;
    Ok(())
}

fn mi<T: Alu, E: Ea, O: Shift>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    m::<T, E, O>(cpu, op, op.imm as u8)
}

fn mcl<T: Alu, E: Ea, O: Shift>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let count = cpu.get(reg::RCX);
    m::<T, E, O>(cpu, op, count)
}

/// SHLD or SHRD.
trait Double: 'static {
    fn run<T: WideAlu>(a: T, b: T, count: u8, cc: u16) -> (T, u16);
}

struct Left;
struct Right;

impl Double for Left {
    #[inline(always)]
    fn run<T: WideAlu>(a: T, b: T, count: u8, cc: u16) -> (T, u16) {
        T::shld(a, b, count, cc)
    }
}

impl Double for Right {
    #[inline(always)]
    fn run<T: WideAlu>(a: T, b: T, count: u8, cc: u16) -> (T, u16) {
        T::shrd(a, b, count, cc)
    }
}

/// Count of a double shift: bit 8 of `op.imm` says that it is in CL.
fn count(cpu: &Cpu, op: &Op) -> u8 {
    if op.imm & 0x100 != 0 { cpu.get(reg::RCX) } else { op.imm as u8 }
}

fn double_r<T: WideAlu, O: Double>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (v, cc) = O::run::<T>(cpu.get(op.dst), cpu.get(op.src), count(cpu, op), cpu.cc);
    cpu.set(op.dst, v);
    cpu.cc = cc;
    Ok(())
}

fn double_m<T: WideAlu, E: Ea, O: Double>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, true)?;
    let (b, n, old) = (cpu.get::<T>(op.src), count(cpu, op), cpu.cc);
    cpu.cc = cpu.rmw::<T, u16>(op.seg(), lin, |a| O::run(a, b, n, old))?;
    Ok(())
}

/// Lowers the instructions of this family.
pub(super) fn lower(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    macro_rules! shift {
        ($o:ident) => {{
            let n = size(i, 0);
            let by_cl = i.op1_kind() == OpKind::Register;
            op.imm = if by_cl { 0 } else { i.immediate(1) & 0xff };
            op.handler = match (kind(i, 0), by_cl) {
                (Kind::Reg, false) => {
                    dst(i, 0, op);
                    sized!(n, ri, $o)
                }
                (Kind::Reg, true) => {
                    dst(i, 0, op);
                    sized!(n, rcl, $o)
                }
                (Kind::Mem, false) => sized_ea!(ctx, op, n, mi, $o),
                (Kind::Mem, true) => sized_ea!(ctx, op, n, mcl, $o),
                _ => return None,
            };
            Some(Flow::Continue)
        }};
    }
    macro_rules! double {
        ($o:ident) => {{
            let n = size(i, 0);
            src(i, 1, op);
            op.imm = if i.op2_kind() == OpKind::Register { 0x100 } else { i.immediate(2) & 0xff };
            op.handler = if kind(i, 0) == Kind::Reg {
                dst(i, 0, op);
                sized_wide!(n, double_r, $o)
            } else {
                sized_wide_ea!(ctx, op, n, double_m, $o)
            };
            Some(Flow::Continue)
        }};
    }
    match i.mnemonic() {
        Mnemonic::Rol => shift!(Rol),
        Mnemonic::Ror => shift!(Ror),
        Mnemonic::Rcl => shift!(Rcl),
        Mnemonic::Rcr => shift!(Rcr),
        Mnemonic::Shl | Mnemonic::Sal => shift!(Shl),
        Mnemonic::Shr => shift!(Shr),
        Mnemonic::Sar => shift!(Sar),
        Mnemonic::Shld => double!(Left),
        Mnemonic::Shrd => double!(Right),
        _ => None,
    }
}
