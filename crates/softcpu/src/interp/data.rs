//! MOV, MOVZX, MOVSX, LEA, CMOVcc, SETcc, BSWAP, MOVBE, sign extension of the accumulator, XCHG of registers, XLAT, LAHF.

use super::{Ea, h, sized, sized_ea, sized_wide, sized_wide_ea};
use crate::decode::operand::{Kind, dst, imm, kind, size, src};
use crate::decode::{Ctx, Flow};
use crate::fault::Res;
use crate::flags::{self, Condition};
use crate::op::{Op, asize};
use crate::state::{Cpu, Int, reg};
use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind};

/// Calls a macro with the type of the instruction's condition.
macro_rules! by_condition {
    ($i:expr, $m:ident) => {
        match $i.condition_code() {
            ConditionCode::o => $m!(crate::flags::O),
            ConditionCode::no => $m!(crate::flags::No),
            ConditionCode::b => $m!(crate::flags::B),
            ConditionCode::ae => $m!(crate::flags::Ae),
            ConditionCode::e => $m!(crate::flags::E),
            ConditionCode::ne => $m!(crate::flags::Ne),
            ConditionCode::be => $m!(crate::flags::Be),
            ConditionCode::a => $m!(crate::flags::A),
            ConditionCode::s => $m!(crate::flags::S),
            ConditionCode::ns => $m!(crate::flags::Ns),
            ConditionCode::p => $m!(crate::flags::P),
            ConditionCode::np => $m!(crate::flags::Np),
            ConditionCode::l => $m!(crate::flags::L),
            ConditionCode::ge => $m!(crate::flags::Ge),
            ConditionCode::le => $m!(crate::flags::Le),
            ConditionCode::g => $m!(crate::flags::G),
            ConditionCode::None => return None,
        }
    };
}
pub(super) use by_condition;

#[inline(always)]
fn mov_rr<T: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let v = cpu.get::<T>(op.src);
    cpu.set(op.dst, v);
    Ok(())
}

#[inline(always)]
fn mov_ri<T: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.set(op.dst, T::from_u64(op.imm));
    Ok(())
}

#[inline(always)]
fn mov_rm<T: Int, E: Ea>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, false)?;
    let v = cpu.read::<T>(op.seg(), lin)?;
    cpu.set(op.dst, v);
    Ok(())
}

#[inline(always)]
fn mov_mr<T: Int, E: Ea>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, true)?;
    let v = cpu.get::<T>(op.src);
    cpu.write(op.seg(), lin, v)
}

#[inline(always)]
fn mov_mi<T: Int, E: Ea>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, true)?;
    cpu.write(op.seg(), lin, T::from_u64(op.imm))
}

#[inline(always)]
fn movzx_rr<T: Int, S: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let v = cpu.get::<S>(op.src);
    cpu.set(op.dst, T::from_u64(v.to_u64()));
    Ok(())
}

#[inline(always)]
fn movzx_rm<T: Int, E: Ea, S: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<S>() as u32, false)?;
    let v = cpu.read::<S>(op.seg(), lin)?;
    cpu.set(op.dst, T::from_u64(v.to_u64()));
    Ok(())
}

#[inline(always)]
fn movsx_rr<T: Int, S: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let v = cpu.get::<S>(op.src);
    cpu.set(op.dst, T::from_u64(v.sext()));
    Ok(())
}

#[inline(always)]
fn movsx_rm<T: Int, E: Ea, S: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<S>() as u32, false)?;
    let v = cpu.read::<S>(op.seg(), lin)?;
    cpu.set(op.dst, T::from_u64(v.sext()));
    Ok(())
}

#[inline(always)]
fn lea<T: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let v = cpu.offset(op);
    cpu.set(op.dst, T::from_u64(v));
    Ok(())
}

/// LEA with 64-bit addressing.
#[inline(always)]
fn lea64<T: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let index = cpu.get::<u64>(op.index) << (op.scale & 63);
    let v = cpu.get::<u64>(op.base).wrapping_add(index).wrapping_add(op.disp);
    cpu.set(op.dst, T::from_u64(v));
    Ok(())
}

#[inline(always)]
fn cmov_rr<T: Int, C: Condition>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (a, b) = (cpu.get::<T>(op.dst), cpu.get::<T>(op.src));
    cpu.set(op.dst, if C::holds(cpu.cc) { b } else { a });
    Ok(())
}

#[inline(always)]
fn cmov_rm<T: Int, E: Ea, C: Condition>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, false)?;
    let b = cpu.read::<T>(op.seg(), lin)?;
    let a = cpu.get::<T>(op.dst);
    cpu.set(op.dst, if C::holds(cpu.cc) { b } else { a });
    Ok(())
}

#[inline(always)]
fn set_r<T: Int, C: Condition>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.set(op.dst, T::from_u64(C::holds(cpu.cc) as u64));
    Ok(())
}

#[inline(always)]
fn set_m<T: Int, E: Ea, C: Condition>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, 1, true)?;
    cpu.write(op.seg(), lin, T::from_u64(C::holds(cpu.cc) as u64))
}

fn swap_bytes<T: Int>(v: T) -> T {
    T::from_u64(v.to_u64().swap_bytes() >> (64 - T::BITS))
}

fn bswap<T: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let v = cpu.get::<T>(op.dst);
    cpu.set(op.dst, swap_bytes(v));
    Ok(())
}

/// BSWAP of a 16-bit register is undefined; processors clear it.
fn bswap16(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.set(op.dst, 0u16);
    Ok(())
}

fn movbe_rm<T: Int, E: Ea>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, false)?;
    let v = cpu.read::<T>(op.seg(), lin)?;
    cpu.set(op.dst, swap_bytes(v));
    Ok(())
}

fn movbe_mr<T: Int, E: Ea>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, true)?;
    let v = cpu.get::<T>(op.src);
    cpu.write(op.seg(), lin, swap_bytes(v))
}

/// CBW, CWDE, CDQE: from the half of the given type.
fn extend<T: Int, S: Int>(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    let v = cpu.get::<S>(reg::RAX).sext();
    cpu.set(reg::RAX, T::from_u64(v));
    Ok(())
}

/// CWD, CDQ, CQO.
fn extend_dx<T: Int>(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    let v = cpu.get::<T>(reg::RAX).sext() as i64 >> 63;
    cpu.set(reg::RDX, T::from_u64(v as u64));
    Ok(())
}

#[inline(always)]
fn xchg<T: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (a, b) = (cpu.get::<T>(op.dst), cpu.get::<T>(op.src));
    cpu.set(op.dst, b);
    cpu.set(op.src, a);
    Ok(())
}

fn xlat(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let at = cpu.get::<u64>(reg::RBX).wrapping_add(cpu.get::<u8>(reg::RAX) as u64);
    let offset = match op.asize() {
        asize::A64 => at,
        asize::A32 => at as u32 as u64,
        _ => at as u16 as u64,
    };
    let lin = cpu.linear(op.seg(), offset, 1, false)?;
    let v = cpu.read::<u8>(op.seg(), lin)?;
    cpu.set(reg::RAX, v);
    Ok(())
}

fn lahf(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    cpu.set(reg::RAX + 1, (flags::to_rflags(cpu.cc) & 0xd5 | 2) as u8);
    Ok(())
}

fn sahf(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    let ah = cpu.get::<u8>(reg::RAX + 1) as u64;
    cpu.cc = flags::from_rflags(ah & 0xd5) | cpu.cc & flags::cc::OF;
    Ok(())
}

#[inline(always)]
fn nop(_cpu: &mut Cpu, _op: &Op) -> Res<()> {
    Ok(())
}

/// A memory operand that is computed but not accessed (multi-byte NOP, prefetches).
fn hint(i: &Instruction, op: &mut Op) -> Option<Flow> {
    let _ = i;
    op.handler = h!(nop);
    Some(Flow::Continue)
}

fn mov(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    let n = size(i, 0);
    op.handler = match (kind(i, 0), kind(i, 1)) {
        (Kind::Reg, Kind::Reg) => {
            dst(i, 0, op);
            src(i, 1, op);
            sized!(n, mov_rr)
        }
        (Kind::Reg, Kind::Imm) => {
            dst(i, 0, op);
            op.imm = imm(i, 1);
            sized!(n, mov_ri)
        }
        (Kind::Reg, Kind::Mem) => {
            dst(i, 0, op);
            sized_ea!(ctx, op, n, mov_rm)
        }
        (Kind::Mem, Kind::Reg) => {
            src(i, 1, op);
            sized_ea!(ctx, op, n, mov_mr)
        }
        (Kind::Mem, Kind::Imm) => {
            op.imm = imm(i, 1);
            sized_ea!(ctx, op, n, mov_mi)
        }
        _ => return None,
    };
    Some(Flow::Continue)
}

/// Lowers the instructions of this family.
pub(super) fn lower(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    macro_rules! widening {
        ($rr:ident, $rm:ident) => {{
            dst(i, 0, op);
            let n = size(i, 0);
            match (kind(i, 1), size(i, 1)) {
                (Kind::Reg, 1) => {
                    src(i, 1, op);
                    op.handler = sized_wide!(n, $rr, u8);
                }
                (Kind::Reg, 2) => {
                    src(i, 1, op);
                    op.handler = sized_wide!(n, $rr, u16);
                }
                (Kind::Reg, 4) => {
                    src(i, 1, op);
                    op.handler = sized_wide!(n, $rr, u32);
                }
                (Kind::Mem, 1) => op.handler = sized_wide_ea!(ctx, op, n, $rm, u8),
                (Kind::Mem, 2) => op.handler = sized_wide_ea!(ctx, op, n, $rm, u16),
                (Kind::Mem, 4) => op.handler = sized_wide_ea!(ctx, op, n, $rm, u32),
                _ => return None,
            }
            Some(Flow::Continue)
        }};
    }
    match i.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movnti => mov(ctx, i, op),
        Mnemonic::Movzx => widening!(movzx_rr, movzx_rm),
        Mnemonic::Movsx | Mnemonic::Movsxd => widening!(movsx_rr, movsx_rm),
        Mnemonic::Lea => {
            dst(i, 0, op);
            let n = size(i, 0);
            op.handler = if op.asize() == asize::A64 { sized_wide!(n, lea64) } else { sized_wide!(n, lea) };
            Some(Flow::Continue)
        }
        Mnemonic::Bswap => {
            dst(i, 0, op);
            op.handler = match size(i, 0) {
                2 => h!(bswap16),
                4 => h!(bswap::<u32>),
                _ => h!(bswap::<u64>),
            };
            Some(Flow::Continue)
        }
        Mnemonic::Movbe => {
            let n = size(i, 0);
            if kind(i, 0) == Kind::Reg {
                dst(i, 0, op);
                op.handler = sized_wide_ea!(ctx, op, n, movbe_rm);
            } else {
                src(i, 1, op);
                op.handler = sized_wide_ea!(ctx, op, n, movbe_mr);
            }
            Some(Flow::Continue)
        }
        Mnemonic::Cbw => simple(op, h!(extend::<u16, u8>)),
        Mnemonic::Cwde => simple(op, h!(extend::<u32, u16>)),
        Mnemonic::Cdqe => simple(op, h!(extend::<u64, u32>)),
        Mnemonic::Cwd => simple(op, h!(extend_dx::<u16>)),
        Mnemonic::Cdq => simple(op, h!(extend_dx::<u32>)),
        Mnemonic::Cqo => simple(op, h!(extend_dx::<u64>)),
        Mnemonic::Xchg if kind(i, 0) == Kind::Reg && kind(i, 1) == Kind::Reg => {
            dst(i, 0, op);
            src(i, 1, op);
            let n = size(i, 0);
            op.handler = sized!(n, xchg);
            Some(Flow::Continue)
        }
        Mnemonic::Xlatb => {
            op.ea = op.ea & 7
                | match i.memory_base().size() {
                    2 => asize::A16,
                    4 => asize::A32,
                    _ => asize::A64,
                };
            simple(op, h!(xlat))
        }
        Mnemonic::Lahf => simple(op, h!(lahf)),
        Mnemonic::Sahf => simple(op, h!(sahf)),
        Mnemonic::Nop | Mnemonic::Reservednop | Mnemonic::Endbr32 | Mnemonic::Endbr64 => hint(i, op),
        Mnemonic::Prefetch
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1
        | Mnemonic::Cldemote => hint(i, op),
        // Guest memory is ordered as the host's; nothing is reordered around an operation.
        Mnemonic::Lfence | Mnemonic::Sfence => hint(i, op),
        Mnemonic::Mfence => simple(op, h!(mfence)),
        // Only waste time here.
        Mnemonic::Pause => simple(op, h!(pause)),
        _ => conditional(ctx, i, op),
    }
}

fn simple(op: &mut Op, handler: crate::op::Handler) -> Option<Flow> {
    op.handler = handler;
    Some(Flow::Continue)
}

fn mfence(_cpu: &mut Cpu, _op: &Op) -> Res<()> {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

fn pause(_cpu: &mut Cpu, _op: &Op) -> Res<()> {
    std::hint::spin_loop();
    Ok(())
}

fn conditional(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    use Mnemonic::*;
    let cmov = matches!(
        i.mnemonic(),
        Cmovo
            | Cmovno
            | Cmovb
            | Cmovae
            | Cmove
            | Cmovne
            | Cmovbe
            | Cmova
            | Cmovs
            | Cmovns
            | Cmovp
            | Cmovnp
            | Cmovl
            | Cmovge
            | Cmovle
            | Cmovg
    );
    let set = matches!(
        i.mnemonic(),
        Seto | Setno
            | Setb
            | Setae
            | Sete
            | Setne
            | Setbe
            | Seta
            | Sets
            | Setns
            | Setp
            | Setnp
            | Setl
            | Setge
            | Setle
            | Setg
    );
    let mem = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    if cmov {
        dst(i, 0, op);
        let n = size(i, 0);
        if mem {
            macro_rules! pick {
                ($c:ty) => {
                    sized_wide_ea!(ctx, op, n, cmov_rm, $c)
                };
            }
            op.handler = by_condition!(i, pick);
        } else {
            src(i, 1, op);
            macro_rules! pick {
                ($c:ty) => {
                    sized_wide!(n, cmov_rr, $c)
                };
            }
            op.handler = by_condition!(i, pick);
        }
        Some(Flow::Continue)
    } else if set {
        if mem {
            macro_rules! pick {
                ($c:ty) => {
                    if ctx.flat(op) {
                        h!(set_m::<u8, super::Flat, $c>)
                    } else {
                        h!(set_m::<u8, super::General, $c>)
                    }
                };
            }
            op.handler = by_condition!(i, pick);
        } else {
            dst(i, 0, op);
            macro_rules! pick {
                ($c:ty) => {
                    h!(set_r::<u8, $c>)
                };
            }
            op.handler = by_condition!(i, pick);
        }
        Some(Flow::Continue)
    } else {
        None
    }
}
