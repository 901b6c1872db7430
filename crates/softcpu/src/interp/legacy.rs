//! What 64-bit mode no longer has: AAA, AAS, AAM, AAD, DAA, DAS, BOUND, SALC; and UD0, UD1, UD2.

use super::h;
use crate::alu::Alu;
use crate::decode::operand::{dst, size};
use crate::decode::{Ctx, Flow};
use crate::fault::{Res, vector};
use crate::flags::cc;
use crate::op::Op;
use crate::state::{Cpu, reg};
use iced_x86::{Instruction, Mnemonic};

/// Flags of a result, as TEST leaves them, with CF and AF as given.
fn result_flags(v: u8, cf: bool, af: bool) -> u16 {
    let mut c = u8::test(v, v) & !(cc::CF | cc::AF | cc::OF);
    if cf {
        c |= cc::CF;
    }
    if af {
        c |= cc::AF;
    }
    c
}

fn adjust_ascii<const SUB: bool>(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    let ax = cpu.get::<u16>(reg::RAX);
    let adjust = ax & 0xf > 9 || cpu.cc & cc::AF != 0;
    let v = match (adjust, SUB) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(0x106),
    };
    cpu.set(reg::RAX, v & 0xff0f);
    cpu.cc = result_flags(v as u8 & 0xf, adjust, adjust);
    Ok(())
}

fn daa(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    let old = cpu.get::<u8>(reg::RAX);
    let (cf, af) = (cpu.cc & cc::CF != 0, cpu.cc & cc::AF != 0);
    let low = old & 0xf > 9 || af;
    let high = old > 0x99 || cf;
    let v = old.wrapping_add(if low { 6 } else { 0 }).wrapping_add(if high { 0x60 } else { 0 });
    cpu.set(reg::RAX, v);
    cpu.cc = result_flags(v, high, low);
    Ok(())
}

fn das(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    let old = cpu.get::<u8>(reg::RAX);
    let (cf, af) = (cpu.cc & cc::CF != 0, cpu.cc & cc::AF != 0);
    let low = old & 0xf > 9 || af;
    let high = old > 0x99 || cf;
    let v = old.wrapping_sub(if low { 6 } else { 0 }).wrapping_sub(if high { 0x60 } else { 0 });
    cpu.set(reg::RAX, v);
    let borrow = low && old < 6;
    cpu.cc = result_flags(v, high || borrow, low);
    Ok(())
}

fn aam(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let al = cpu.get::<u8>(reg::RAX);
    let base = op.imm as u8;
    if base == 0 {
        return Err(cpu.raise(vector::DE));
    }
    cpu.set(reg::RAX, (al / base) as u16 * 256 + (al % base) as u16);
    cpu.cc = result_flags(al % base, false, false);
    Ok(())
}

fn aad(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let ax = cpu.get::<u16>(reg::RAX);
    let v = (ax as u8).wrapping_add(((ax >> 8) as u8).wrapping_mul(op.imm as u8));
    cpu.set(reg::RAX, v as u16);
    cpu.cc = result_flags(v, false, false);
    Ok(())
}

fn salc(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    let v = if cpu.cc & cc::CF != 0 { 0xffu8 } else { 0 };
    cpu.set(reg::RAX, v);
    Ok(())
}

fn bound<const BYTES: u32>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = cpu.address(op, 2 * BYTES, false)?;
    let (s, second) = (op.seg(), lin.wrapping_add(BYTES as u64) as u32 as u64);
    let inside = if BYTES == 2 {
        let v = cpu.get::<u16>(op.dst) as i16;
        let bounds = (cpu.read::<u16>(s, lin)? as i16, cpu.read::<u16>(s, second)? as i16);
        bounds.0 <= v && v <= bounds.1
    } else {
        let v = cpu.get::<u32>(op.dst) as i32;
        let bounds = (cpu.read::<u32>(s, lin)? as i32, cpu.read::<u32>(s, second)? as i32);
        bounds.0 <= v && v <= bounds.1
    };
    if inside { Ok(()) } else { Err(cpu.raise(vector::BR)) }
}

/// Lowers the instructions of this family.
pub(super) fn lower(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    let undefined = matches!(i.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2);
    if undefined {
        op.handler = super::undefined;
        return Some(Flow::End);
    }
    if ctx.mode.is64() {
        return None;
    }
    op.handler = match i.mnemonic() {
        Mnemonic::Aaa => h!(adjust_ascii::<false>),
        Mnemonic::Aas => h!(adjust_ascii::<true>),
        Mnemonic::Daa => h!(daa),
        Mnemonic::Das => h!(das),
        Mnemonic::Aam | Mnemonic::Aad => {
            op.imm = i.immediate8() as u64;
            if i.mnemonic() == Mnemonic::Aam { h!(aam) } else { h!(aad) }
        }
        Mnemonic::Salc => h!(salc),
        Mnemonic::Bound => {
            dst(i, 0, op);
            if size(i, 0) == 2 { h!(bound::<2>) } else { h!(bound::<4>) }
        }
        _ => return None,
    };
    Some(Flow::Continue)
}
