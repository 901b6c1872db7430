//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST, INC, DEC, NEG, NOT.
#![allow(unsafe_code)] // locked forms on host addresses

use super::{Ea, h, sized, sized_ea};
use crate::alu::{Adc, Add, Alu, And, Binary, Cmp, Locked as LockedAlu, Or, Sbb, Sub, Test, Xor};
use crate::decode::operand::{Kind, dst, imm, kind, size, src};
use crate::decode::{Ctx, Flow};
use crate::fault::Res;
use crate::mmu::Locked;
use crate::op::Op;
use crate::state::Cpu;
use iced_x86::{Instruction, Mnemonic};

#[inline(always)]
fn rr<T: Alu, O: Binary>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (v, cc) = O::run::<T>(cpu.get(op.dst), cpu.get(op.src), cpu.cc);
    if O::WRITES {
        cpu.set(op.dst, v);
    }
    cpu.cc = cc;
    Ok(())
}

#[inline(always)]
fn ri<T: Alu, O: Binary>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (v, cc) = O::run::<T>(cpu.get(op.dst), T::from_u64(op.imm), cpu.cc);
    if O::WRITES {
        cpu.set(op.dst, v);
    }
    cpu.cc = cc;
    Ok(())
}

#[inline(always)]
fn rm<T: Alu, E: Ea, O: Binary>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, false)?;
    let b = cpu.read::<T>(op.seg(), lin)?;
    let (v, cc) = O::run::<T>(cpu.get(op.dst), b, cpu.cc);
    if O::WRITES {
        cpu.set(op.dst, v);
    }
    cpu.cc = cc;
    Ok(())
}

/// Memory and a second operand.
#[inline(always)]
fn m<T: Alu, E: Ea, O: Binary>(cpu: &mut Cpu, op: &Op, b: T) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, O::WRITES)?;
    if O::WRITES {
        let old = cpu.cc;
        cpu.cc = cpu.rmw::<T, u16>(op.seg(), lin, |a| O::run(a, b, old))?;
    } else {
        let a = cpu.read::<T>(op.seg(), lin)?;
        cpu.cc = O::run(a, b, cpu.cc).1;
    }
    Ok(())
}

#[inline(always)]
fn mr<T: Alu, E: Ea, O: Binary>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let b = cpu.get(op.src);
    m::<T, E, O>(cpu, op, b)
}

#[inline(always)]
fn mi<T: Alu, E: Ea, O: Binary>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    m::<T, E, O>(cpu, op, T::from_u64(op.imm))
}

/// LOCK, memory and a second operand.
#[inline(always)]
fn locked<T: LockedAlu, E: Ea, O: Binary>(cpu: &mut Cpu, op: &Op, b: T) -> Res<()> {
    let len = size_of::<T>();
    let lin = E::at(cpu, op, len as u32, true)?;
    match cpu.locked(op.seg(), lin, len)? {
        // SAFETY: the address is good for the access.
        Locked::Host(p) => cpu.cc = unsafe { O::locked(p, b, cpu.cc) },
        Locked::Split => cpu.cc = cpu.split::<T>(op.seg(), lin, |a, cc| O::run(a, b, cc))?,
    }
    Ok(())
}

fn lock_mr<T: LockedAlu, E: Ea, O: Binary>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let b = cpu.get(op.src);
    locked::<T, E, O>(cpu, op, b)
}

fn lock_mi<T: LockedAlu, E: Ea, O: Binary>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    locked::<T, E, O>(cpu, op, T::from_u64(op.imm))
}

impl Cpu {
    /// A locked operation that no host instruction can do: returns what `f` returns beside the new value.
    pub(super) fn split<T: Alu>(
        &mut self,
        seg: usize,
        lin: u64,
        f: impl FnOnce(T, u16) -> (T, u16),
    ) -> Res<u16> {
        let mut buf = [0u8; 16];
        let len = size_of::<T>();
        let mut out = self.cc;
        self.locked_rmw(seg, lin, &mut buf[..len], |b| {
            let mut whole = [0; 16];
            whole[..len].copy_from_slice(b);
            let (v, cc) = f(T::from_buf(&whole), out);
            out = cc;
            b.copy_from_slice(&v.to_buf()[..len]);
        })?;
        Ok(out)
    }
}

/// A one-operand instruction.
trait Unary: 'static {
    fn run<T: Alu>(a: T, cc: u16) -> (T, u16);
    /// # Safety
    /// `p` is valid for the access.
    unsafe fn locked<T: LockedAlu>(p: *mut u8, cc: u16) -> u16;
}

macro_rules! unary {
    ($($name:ident $f:ident $lock:ident),*) => {$(
        struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn run<T: Alu>(a: T, cc: u16) -> (T, u16) {
                T::$f(a, cc)
            }
            #[inline(always)]
            unsafe fn locked<T: LockedAlu>(p: *mut u8, cc: u16) -> u16 {
                // SAFETY: the caller's.
                unsafe { T::$lock(p, cc) }
            }
        }
    )*};
}
unary!(Inc inc lock_inc, Dec dec lock_dec, Neg neg lock_neg);

struct Not;
impl Unary for Not {
    #[inline(always)]
    fn run<T: Alu>(a: T, cc: u16) -> (T, u16) {
        (T::from_u64(!a.to_u64()), cc)
    }
    #[inline(always)]
    unsafe fn locked<T: LockedAlu>(p: *mut u8, cc: u16) -> u16 {
        // SAFETY: the caller's.
        unsafe { T::lock_not(p) };
        cc
    }
}

#[inline(always)]
fn r<T: Alu, O: Unary>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (v, cc) = O::run::<T>(cpu.get(op.dst), cpu.cc);
    cpu.set(op.dst, v);
    cpu.cc = cc;
    Ok(())
}

#[inline(always)]
fn mem<T: Alu, E: Ea, O: Unary>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, true)?;
    let old = cpu.cc;
    cpu.cc = cpu.rmw::<T, u16>(op.seg(), lin, |a| O::run(a, old))?;
    Ok(())
}

fn lock_mem<T: LockedAlu, E: Ea, O: Unary>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let len = size_of::<T>();
    let lin = E::at(cpu, op, len as u32, true)?;
    match cpu.locked(op.seg(), lin, len)? {
        // SAFETY: the address is good for the access.
        Locked::Host(p) => cpu.cc = unsafe { O::locked::<T>(p, cpu.cc) },
        Locked::Split => cpu.cc = cpu.split::<T>(op.seg(), lin, |a, cc| O::run(a, cc))?,
    }
    Ok(())
}

/// Lowers the instructions of this family.
pub(super) fn lower(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    macro_rules! binary {
        ($o:ident) => {{
            let n = size(i, 0);
            let lock = i.has_lock_prefix();
            match (kind(i, 0), kind(i, 1)) {
                (Kind::Reg, Kind::Reg) => {
                    dst(i, 0, op);
                    src(i, 1, op);
                    op.handler = sized!(n, rr, $o);
                }
                (Kind::Reg, Kind::Imm) => {
                    dst(i, 0, op);
                    op.imm = imm(i, 1);
                    op.handler = sized!(n, ri, $o);
                }
                (Kind::Reg, Kind::Mem) => {
                    dst(i, 0, op);
                    op.handler = sized_ea!(ctx, op, n, rm, $o);
                }
                (Kind::Mem, Kind::Reg) => {
                    src(i, 1, op);
                    op.handler =
                        if lock { sized_ea!(ctx, op, n, lock_mr, $o) } else { sized_ea!(ctx, op, n, mr, $o) };
                }
                (Kind::Mem, Kind::Imm) => {
                    op.imm = imm(i, 1);
                    op.handler =
                        if lock { sized_ea!(ctx, op, n, lock_mi, $o) } else { sized_ea!(ctx, op, n, mi, $o) };
                }
                _ => return None,
            }
            Some(Flow::Continue)
        }};
    }
    macro_rules! unary {
        ($o:ident) => {{
            let n = size(i, 0);
            match kind(i, 0) {
                Kind::Reg => {
                    dst(i, 0, op);
                    op.handler = sized!(n, r, $o);
                }
                Kind::Mem if i.has_lock_prefix() => op.handler = sized_ea!(ctx, op, n, lock_mem, $o),
                Kind::Mem => op.handler = sized_ea!(ctx, op, n, mem, $o),
                _ => return None,
            }
            Some(Flow::Continue)
        }};
    }
    match i.mnemonic() {
        Mnemonic::Add => binary!(Add),
        Mnemonic::Or => binary!(Or),
        Mnemonic::Adc => binary!(Adc),
        Mnemonic::Sbb => binary!(Sbb),
        Mnemonic::And => binary!(And),
        Mnemonic::Sub => binary!(Sub),
        Mnemonic::Xor => binary!(Xor),
        Mnemonic::Cmp => binary!(Cmp),
        Mnemonic::Test => binary!(Test),
        Mnemonic::Inc => unary!(Inc),
        Mnemonic::Dec => unary!(Dec),
        Mnemonic::Neg => unary!(Neg),
        Mnemonic::Not => unary!(Not),
        _ => None,
    }
}
