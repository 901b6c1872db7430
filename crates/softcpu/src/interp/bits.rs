//! BT, BTS, BTR, BTC, BSF, BSR, POPCNT, LZCNT, TZCNT.
#![allow(unsafe_code)] // locked forms on host addresses

use super::{Ea, h, sized_wide, sized_wide_ea};
use crate::alu::{LockedBits, WideAlu};
use crate::decode::operand::{Kind, dst, imm, kind, size, src};
use crate::decode::{Ctx, Flow};
use crate::fault::Res;
use crate::mmu::Locked;
use crate::op::{Op, asize};
use crate::state::Cpu;
use iced_x86::{Instruction, Mnemonic};

/// What to do with the bit.
trait Change: 'static {
    const WRITES: bool = true;
    fn run<T: WideAlu>(a: T, bit: T, cc: u16) -> (T, u16);
    /// # Safety
    /// `p` is valid for the access.
    unsafe fn locked<T: LockedBits>(p: *mut u8, bit: T, cc: u16) -> u16;
}

macro_rules! changes {
    ($($name:ident $f:ident $lock:ident $writes:literal),*) => {$(
        struct $name;
        impl Change for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn run<T: WideAlu>(a: T, bit: T, cc: u16) -> (T, u16) {
                T::$f(a, bit, cc)
            }
            #[inline(always)]
            unsafe fn locked<T: LockedBits>(p: *mut u8, bit: T, cc: u16) -> u16 {
                // SAFETY: the caller's.
                unsafe { T::$lock(p, bit, cc) }
            }
        }
    )*};
}
// BT cannot be locked; its locked form is never used.
changes!(Bts bts lock_bts true, Btr btr lock_btr true, Btc btc lock_btc true);

struct Bt;
impl Change for Bt {
    const WRITES: bool = false;
    #[inline(always)]
    fn run<T: WideAlu>(a: T, bit: T, cc: u16) -> (T, u16) {
        (a, T::bt(a, bit, cc).1)
    }
    unsafe fn locked<T: LockedBits>(_p: *mut u8, _bit: T, cc: u16) -> u16 {
        cc
    }
}

fn rr<T: WideAlu, O: Change>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (v, cc) = O::run::<T>(cpu.get(op.dst), cpu.get(op.src), cpu.cc);
    if O::WRITES {
        cpu.set(op.dst, v);
    }
    cpu.cc = cc;
    Ok(())
}

fn ri<T: WideAlu, O: Change>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (v, cc) = O::run::<T>(cpu.get(op.dst), T::from_u64(op.imm), cpu.cc);
    if O::WRITES {
        cpu.set(op.dst, v);
    }
    cpu.cc = cc;
    Ok(())
}

/// Memory, once the linear address is known.
#[inline(always)]
fn at<T: LockedBits, O: Change>(cpu: &mut Cpu, op: &Op, lin: u64, bit: T, lock: bool) -> Res<()> {
    if !O::WRITES {
        let a = cpu.read::<T>(op.seg(), lin)?;
        cpu.cc = O::run(a, bit, cpu.cc).1;
    } else if lock {
        match cpu.locked(op.seg(), lin, size_of::<T>())? {
            // SAFETY: the address is good for the access.
            Locked::Host(p) => cpu.cc = unsafe { O::locked(p, bit, cpu.cc) },
            Locked::Split => cpu.cc = cpu.split::<T>(op.seg(), lin, |a, cc| O::run(a, bit, cc))?,
        }
    } else {
        let old = cpu.cc;
        cpu.cc = cpu.rmw::<T, u16>(op.seg(), lin, |a| O::run(a, bit, old))?;
    }
    Ok(())
}

/// Immediate bit number. `op.dst` is 1 for LOCK.
fn mi<T: LockedBits, E: Ea, O: Change>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, O::WRITES)?;
    at::<T, O>(cpu, op, lin, T::from_u64(op.imm), op.dst == 1)
}

/// Bit number in a register: it also moves the address.
fn mr<T: LockedBits, O: Change>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let bit = cpu.get::<T>(op.src);
    let shift = T::BITS.trailing_zeros();
    let away = (bit.sext() as i64 >> shift) * (T::BITS / 8) as i64;
    let offset = cpu.offset(op).wrapping_add(away as u64);
    let offset = match op.asize() {
        asize::A64 => offset,
        asize::A32 => offset as u32 as u64,
        _ => offset as u16 as u64,
    };
    let lin = cpu.linear(op.seg(), offset, size_of::<T>() as u32, O::WRITES)?;
    at::<T, O>(cpu, op, lin, bit, op.dst == 1)
}

/// BSF and the like: the old destination matters if the source is zero.
trait Scan: 'static {
    fn run<T: WideAlu>(old: T, a: T, cc: u16) -> (T, u16);
}

macro_rules! scans {
    ($($name:ident $f:ident),*) => {$(
        struct $name;
        impl Scan for $name {
            #[inline(always)]
            fn run<T: WideAlu>(old: T, a: T, cc: u16) -> (T, u16) {
                T::$f(old, a, cc)
            }
        }
    )*};
}
scans!(Bsf bsf, Bsr bsr, Lzcnt lzcnt, Tzcnt tzcnt, Popcnt popcnt);

fn scan_r<T: WideAlu, O: Scan>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let a = cpu.get(op.src);
    scan::<T, O>(cpu, op, a)
}

fn scan_m<T: WideAlu, E: Ea, O: Scan>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = E::at(cpu, op, size_of::<T>() as u32, false)?;
    let a = cpu.read::<T>(op.seg(), lin)?;
    scan::<T, O>(cpu, op, a)
}

#[inline(always)]
fn scan<T: WideAlu, O: Scan>(cpu: &mut Cpu, op: &Op, a: T) -> Res<()> {
    let old = cpu.get::<u64>(op.dst);
    let (v, cc) = O::run::<T>(T::from_u64(old), a, cpu.cc);
    // A destination that BSF or BSR leaves alone keeps its upper half too.
    if T::BITS == 32 && a == T::default() && v == T::from_u64(old) {
        cpu.cc = cc;
        if cc & crate::flags::cc::ZF != 0 && O::run::<T>(T::from_u64(!old), a, cc).0 == T::from_u64(!old) {
            return Ok(());
        }
    }
    cpu.set(op.dst, v);
    cpu.cc = cc;
    Ok(())
}

/// Lowers the instructions of this family.
pub(super) fn lower(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    macro_rules! change {
        ($o:ident) => {{
            let n = size(i, 0);
            match (kind(i, 0), kind(i, 1)) {
                (Kind::Reg, Kind::Reg) => {
                    dst(i, 0, op);
                    src(i, 1, op);
                    op.handler = sized_wide!(n, rr, $o);
                }
                (Kind::Reg, Kind::Imm) => {
                    dst(i, 0, op);
                    op.imm = imm(i, 1);
                    op.handler = sized_wide!(n, ri, $o);
                }
                (Kind::Mem, Kind::Imm) => {
                    op.dst = i.has_lock_prefix() as u8;
                    op.imm = imm(i, 1);
                    op.handler = sized_wide_ea!(ctx, op, n, mi, $o);
                }
                (Kind::Mem, Kind::Reg) => {
                    op.dst = i.has_lock_prefix() as u8;
                    src(i, 1, op);
                    op.handler = sized_wide!(n, mr, $o);
                }
                _ => return None,
            }
            Some(Flow::Continue)
        }};
    }
    macro_rules! scan {
        ($o:ident) => {{
            let n = size(i, 0);
            dst(i, 0, op);
            op.handler = if kind(i, 1) == Kind::Reg {
                src(i, 1, op);
                sized_wide!(n, scan_r, $o)
            } else {
                sized_wide_ea!(ctx, op, n, scan_m, $o)
            };
            Some(Flow::Continue)
        }};
    }
    match i.mnemonic() {
        Mnemonic::Bt => change!(Bt),
        Mnemonic::Bts => change!(Bts),
        Mnemonic::Btr => change!(Btr),
        Mnemonic::Btc => change!(Btc),
        Mnemonic::Bsf => scan!(Bsf),
        Mnemonic::Bsr => scan!(Bsr),
        Mnemonic::Lzcnt => scan!(Lzcnt),
        Mnemonic::Tzcnt => scan!(Tzcnt),
        Mnemonic::Popcnt => scan!(Popcnt),
        _ => None,
    }
}
