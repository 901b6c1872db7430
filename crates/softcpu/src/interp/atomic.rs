//! XCHG with memory, XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B.
#![allow(unsafe_code)] // host instructions on host addresses

use super::{Ea, h, sized, sized_ea};
use crate::alu::{self, Alu, Locked as LockedAlu};
use crate::decode::operand::{Kind, dst, kind, size, src};
use crate::decode::{Ctx, Flow};
use crate::fault::Res;
use crate::flags::cc;
use crate::mmu::Locked;
use crate::op::Op;
use crate::state::{Cpu, reg};
use iced_x86::{Instruction, Mnemonic};

/// XCHG is locked with or without prefix.
fn xchg_m<T: LockedAlu, E: Ea>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let len = size_of::<T>();
    let lin = E::at(cpu, op, len as u32, true)?;
    let b = cpu.get::<T>(op.src);
    let old = match cpu.locked(op.seg(), lin, len)? {
        // SAFETY: the address is good for the access.
        Locked::Host(p) => unsafe { T::xchg(p, b) },
        Locked::Split => {
            let mut old = b;
            cpu.split::<T>(op.seg(), lin, |a, cc| {
                old = a;
                (b, cc)
            })?;
            old
        }
    };
    cpu.set(op.src, old);
    Ok(())
}

fn xadd_r<T: Alu>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (a, b) = (cpu.get::<T>(op.dst), cpu.get::<T>(op.src));
    let (v, cc) = T::add(a, b);
    cpu.set(op.src, a);
    cpu.set(op.dst, v);
    cpu.cc = cc;
    Ok(())
}

/// With or without LOCK: doing it atomically is always right.
fn xadd_m<T: LockedAlu, E: Ea>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let len = size_of::<T>();
    let lin = E::at(cpu, op, len as u32, true)?;
    let b = cpu.get::<T>(op.src);
    let (old, cc) = match cpu.locked(op.seg(), lin, len)? {
        // SAFETY: the address is good for the access.
        Locked::Host(p) => unsafe { T::lock_xadd(p, b) },
        Locked::Split => {
            let mut old = b;
            let cc = cpu.split::<T>(op.seg(), lin, |a, _| {
                old = a;
                T::add(a, b)
            })?;
            (old, cc)
        }
    };
    cpu.set(op.src, old);
    cpu.cc = cc;
    Ok(())
}

fn cmpxchg_r<T: Alu>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (acc, old, new) = (cpu.get::<T>(reg::RAX), cpu.get::<T>(op.dst), cpu.get::<T>(op.src));
    cpu.cc = T::cmp(acc, old);
    if acc == old {
        cpu.set(op.dst, new);
    } else {
        // The destination is left alone: its upper half is not cleared either.
        cpu.set(reg::RAX, old);
    }
    Ok(())
}

fn cmpxchg_m<T: LockedAlu, E: Ea>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let len = size_of::<T>();
    let lin = E::at(cpu, op, len as u32, true)?;
    let (acc, new) = (cpu.get::<T>(reg::RAX), cpu.get::<T>(op.src));
    let (old, cc) = match cpu.locked(op.seg(), lin, len)? {
        // SAFETY: the address is good for the access.
        Locked::Host(p) => unsafe { T::lock_cmpxchg(p, acc, new) },
        Locked::Split => {
            let mut old = acc;
            let cc = cpu.split::<T>(op.seg(), lin, |a, _| {
                old = a;
                (if a == acc { new } else { a }, T::cmp(acc, a))
            })?;
            (old, cc)
        }
    };
    if old != acc {
        cpu.set(reg::RAX, old);
    }
    cpu.cc = cc;
    Ok(())
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    cpu.cc = if on { cpu.cc | cc::ZF } else { cpu.cc & !cc::ZF };
}

fn cmpxchg8b(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = cpu.address(op, 8, true)?;
    let pair = |cpu: &Cpu, hi, lo| (cpu.get::<u32>(hi) as u64) << 32 | cpu.get::<u32>(lo) as u64;
    let (expected, new) = (pair(cpu, reg::RDX, reg::RAX), pair(cpu, reg::RCX, reg::RBX));
    let old = match cpu.locked(op.seg(), lin, 8)? {
        // SAFETY: the address is good for the access.
        Locked::Host(p) => unsafe { u64::lock_cmpxchg(p, expected, new).0 },
        Locked::Split => {
            let mut old = 0;
            cpu.split::<u64>(op.seg(), lin, |a, cc| {
                old = a;
                (if a == expected { new } else { a }, cc)
            })?;
            old
        }
    };
    if old != expected {
        cpu.set(reg::RAX, old as u32);
        cpu.set(reg::RDX, (old >> 32) as u32);
    }
    set_zf(cpu, old == expected);
    Ok(())
}

fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = cpu.address(op, 16, true)?;
    if lin & 15 != 0 {
        return Err(cpu.gp(0));
    }
    let pair = |cpu: &Cpu, lo, hi| (cpu.get::<u64>(lo), cpu.get::<u64>(hi));
    let (expected, new) = (pair(cpu, reg::RAX, reg::RDX), pair(cpu, reg::RBX, reg::RCX));
    let (old, done) = match cpu.locked(op.seg(), lin, 16)? {
        // SAFETY: the address is good for the access, and aligned: pages are, and the offset in the page is.
        Locked::Host(p) => unsafe { alu::lock_cmpxchg16b(p, expected, new) },
        Locked::Split => {
            let mut buf = [0; 16];
            let mut old = (0, 0);
            cpu.locked_rmw(op.seg(), lin, &mut buf, |b| {
                let v = u128::from_le_bytes(b.try_into().unwrap_or_default());
                old = (v as u64, (v >> 64) as u64);
                if old == expected {
                    b.copy_from_slice(&(new.0 as u128 | (new.1 as u128) << 64).to_le_bytes());
                }
            })?;
            (old, old == expected)
        }
    };
    if !done {
        cpu.set(reg::RAX, old.0);
        cpu.set(reg::RDX, old.1);
    }
    set_zf(cpu, done);
    Ok(())
}

/// Lowers the instructions of this family.
pub(super) fn lower(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    let n = size_or(i);
    match i.mnemonic() {
        Mnemonic::Xchg => {
            // Either operand may be the memory.
            let r = if kind(i, 0) == Kind::Mem { 1 } else { 0 };
            if kind(i, 0) != Kind::Mem && kind(i, 1) != Kind::Mem {
                return None;
            }
            src(i, r, op);
            let n = size(i, r);
            op.handler = sized_ea!(ctx, op, n, xchg_m);
        }
        Mnemonic::Xadd | Mnemonic::Cmpxchg => {
            src(i, 1, op);
            let xadd = i.mnemonic() == Mnemonic::Xadd;
            op.handler = match (kind(i, 0), xadd) {
                (Kind::Reg, true) => {
                    dst(i, 0, op);
                    sized!(n, xadd_r)
                }
                (Kind::Reg, false) => {
                    dst(i, 0, op);
                    sized!(n, cmpxchg_r)
                }
                (Kind::Mem, true) => sized_ea!(ctx, op, n, xadd_m),
                (Kind::Mem, false) => sized_ea!(ctx, op, n, cmpxchg_m),
                _ => return None,
            };
        }
        Mnemonic::Cmpxchg8b => op.handler = h!(cmpxchg8b),
        Mnemonic::Cmpxchg16b => op.handler = h!(cmpxchg16b),
        _ => return None,
    }
    Some(Flow::Continue)
}

fn size_or(i: &Instruction) -> usize {
    if i.op_count() > 0 { size(i, 0) } else { 0 }
}
