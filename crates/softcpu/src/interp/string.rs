//! MOVS, STOS, LODS, CMPS, SCAS, with and without repetition.
//!
//! A repeated instruction works in pieces: as many elements at once as lie in one page on either side and are plain
//! memory, else one by one. Between pieces it stops if a signal is pending; RIP then stays on it.
#![allow(unsafe_code)] // REP MOVS and REP STOS on host addresses

use crate::alu::Alu;
use crate::decode::{Ctx, Flow};
use crate::fault::Res;
use crate::flags::cc;
use crate::op::{Handler, Next, Op, OpPtr, asize};
use crate::state::{Cpu, Int, Mode, fl, reg, seg};
use iced_x86::{Instruction, Mnemonic};
use std::arch::asm;

/// Values of `op.imm`.
pub(super) mod rep {
    pub(crate) const NONE: u64 = 0;
    pub(crate) const REP: u64 = 1;
    pub(crate) const REPNE: u64 = 2;
}

/// Elements at most in one piece, so that signals are seen.
const PIECE: u64 = 4096;

#[inline(always)]
fn mask(op: &Op) -> u64 {
    match op.asize() {
        asize::A64 => u64::MAX,
        asize::A32 => 0xffff_ffff,
        _ => 0xffff,
    }
}

/// Value of an index or count register.
#[inline(always)]
pub(super) fn index(cpu: &Cpu, op: &Op, r: u8) -> u64 {
    cpu.get::<u64>(r) & mask(op)
}

/// Sets an index or count register, as wide as the address size.
#[inline(always)]
pub(super) fn set_index(cpu: &mut Cpu, op: &Op, r: u8, v: u64) {
    match op.asize() {
        asize::A64 => cpu.set(r, v),
        asize::A32 => cpu.set(r, v as u32),
        _ => cpu.set(r, v as u16),
    }
}

/// Moves an index register on by `n` elements.
#[inline(always)]
pub(super) fn advance<T>(cpu: &mut Cpu, op: &Op, r: u8, n: u64) {
    let by = n * size_of::<T>() as u64;
    let v = cpu.get::<u64>(r);
    let v = if cpu.flags & fl::DF != 0 { v.wrapping_sub(by) } else { v.wrapping_add(by) };
    set_index(cpu, op, r, v);
}

/// One of the instructions: does up to `most` elements and returns how many, and whether a comparison ended it.
trait Step: 'static {
    fn step<T: Alu>(cpu: &mut Cpu, op: &Op, most: u64) -> Res<(u64, bool)>;
}

/// Elements of a forward run from `offset` that stay within a page (as far as the linear address tells).
#[inline(always)]
fn in_page<T>(lin: u64) -> u64 {
    (4096 - (lin & 0xfff)) / size_of::<T>() as u64
}

/// Elements from `offset` before the index register wraps.
#[inline(always)]
fn before_wrap<T>(op: &Op, offset: u64) -> u64 {
    (mask(op) - offset) / size_of::<T>() as u64
}

struct Movs;
impl Step for Movs {
    #[inline(always)]
    fn step<T: Alu>(cpu: &mut Cpu, op: &Op, most: u64) -> Res<(u64, bool)> {
        let size = size_of::<T>() as u64;
        let (si, di) = (index(cpu, op, reg::RSI), index(cpu, op, reg::RDI));
        if most > 1 && cpu.flags & fl::DF == 0 {
            let n = most.min(before_wrap::<T>(op, si)).min(before_wrap::<T>(op, di));
            let from = cpu.linear(op.seg(), si, size as u32, false)?;
            let to = cpu.linear(seg::ES, di, size as u32, true)?;
            let n = n.min(in_page::<T>(from)).min(in_page::<T>(to));
            if n > 1 && whole_run(cpu, op, si, di, n * size) {
                let len = (n * size) as usize;
                let a = cpu.host_read(op.seg(), from, len)?;
                // The second look-up may take the first one's place in the TLB, but not its page away.
                if let (Some(a), Some(b)) = (a, cpu.host_write(seg::ES, to, len)?) {
                    // SAFETY: both are good for `len` bytes.
                    unsafe { rep_movs::<T>(a, b, n) };
                    advance::<T>(cpu, op, reg::RSI, n);
                    advance::<T>(cpu, op, reg::RDI, n);
                    return Ok((n, false));
                }
            }
        }
        let from = cpu.linear(op.seg(), si, size as u32, false)?;
        let v = cpu.read::<T>(op.seg(), from)?;
        let to = cpu.linear(seg::ES, di, size as u32, true)?;
        cpu.write(seg::ES, to, v)?;
        advance::<T>(cpu, op, reg::RSI, 1);
        advance::<T>(cpu, op, reg::RDI, 1);
        Ok((1, false))
    }
}

/// Whether the segments' limits allow a whole run (always in 64-bit mode).
#[inline(always)]
fn whole_run(cpu: &mut Cpu, op: &Op, si: u64, di: u64, len: u64) -> bool {
    if cpu.mode.is64() {
        return true;
    }
    cpu.linear(op.seg(), si, len as u32, false).is_ok() && cpu.linear(seg::ES, di, len as u32, true).is_ok()
}

/// # Safety
/// Both addresses are good for `n` elements.
#[inline(always)]
unsafe fn rep_movs<T: Int>(from: *const u8, to: *mut u8, n: u64) {
    macro_rules! go {
        ($ins:literal) => {
            // SAFETY: the caller's. The same instruction as the guest's, so overlapping runs behave the same.
            unsafe {
                asm!($ins, inout("rcx") n => _, inout("rsi") from => _, inout("rdi") to => _,
                    options(nostack, preserves_flags))
            }
        };
    }
    match T::BITS {
        8 => go!("rep movsb"),
        16 => go!("rep movsw"),
        32 => go!("rep movsd"),
        _ => go!("rep movsq"),
    }
}

struct Stos;
impl Step for Stos {
    #[inline(always)]
    fn step<T: Alu>(cpu: &mut Cpu, op: &Op, most: u64) -> Res<(u64, bool)> {
        let size = size_of::<T>() as u64;
        let di = index(cpu, op, reg::RDI);
        let to = cpu.linear(seg::ES, di, size as u32, true)?;
        if most > 1 && cpu.flags & fl::DF == 0 {
            let n = most.min(before_wrap::<T>(op, di)).min(in_page::<T>(to));
            let fits = cpu.mode.is64() || cpu.linear(seg::ES, di, (n * size) as u32, true).is_ok();
            if n > 1
                && fits
                && let Some(p) = cpu.host_write(seg::ES, to, (n * size) as usize)?
            {
                let v = cpu.regs[0];
                macro_rules! go {
                    ($ins:literal) => {
                        // SAFETY: the address is good for `n` elements.
                        unsafe {
                            asm!($ins, inout("rcx") n => _, inout("rdi") p => _, in("rax") v,
                                options(nostack, preserves_flags))
                        }
                    };
                }
                match T::BITS {
                    8 => go!("rep stosb"),
                    16 => go!("rep stosw"),
                    32 => go!("rep stosd"),
                    _ => go!("rep stosq"),
                }
                advance::<T>(cpu, op, reg::RDI, n);
                return Ok((n, false));
            }
        }
        let v = cpu.get::<T>(reg::RAX);
        cpu.write(seg::ES, to, v)?;
        advance::<T>(cpu, op, reg::RDI, 1);
        Ok((1, false))
    }
}

struct Lods;
impl Step for Lods {
    #[inline(always)]
    fn step<T: Alu>(cpu: &mut Cpu, op: &Op, _most: u64) -> Res<(u64, bool)> {
        let si = index(cpu, op, reg::RSI);
        let from = cpu.linear(op.seg(), si, size_of::<T>() as u32, false)?;
        let v = cpu.read::<T>(op.seg(), from)?;
        cpu.set(reg::RAX, v);
        advance::<T>(cpu, op, reg::RSI, 1);
        Ok((1, false))
    }
}

/// Whether a comparison ends the repetition.
#[inline(always)]
fn ends(op: &Op, flags: u16) -> bool {
    let equal = flags & cc::ZF != 0;
    op.imm == rep::REP && !equal || op.imm == rep::REPNE && equal
}

struct Cmps;
impl Step for Cmps {
    #[inline(always)]
    fn step<T: Alu>(cpu: &mut Cpu, op: &Op, _most: u64) -> Res<(u64, bool)> {
        let len = size_of::<T>() as u32;
        let (si, di) = (index(cpu, op, reg::RSI), index(cpu, op, reg::RDI));
        let from = cpu.linear(op.seg(), si, len, false)?;
        let a = cpu.read::<T>(op.seg(), from)?;
        let to = cpu.linear(seg::ES, di, len, false)?;
        let b = cpu.read::<T>(seg::ES, to)?;
        cpu.cc = T::cmp(a, b);
        advance::<T>(cpu, op, reg::RSI, 1);
        advance::<T>(cpu, op, reg::RDI, 1);
        Ok((1, ends(op, cpu.cc)))
    }
}

struct Scas;
impl Step for Scas {
    #[inline(always)]
    fn step<T: Alu>(cpu: &mut Cpu, op: &Op, _most: u64) -> Res<(u64, bool)> {
        let di = index(cpu, op, reg::RDI);
        let to = cpu.linear(seg::ES, di, size_of::<T>() as u32, false)?;
        let b = cpu.read::<T>(seg::ES, to)?;
        cpu.cc = T::cmp(cpu.get(reg::RAX), b);
        advance::<T>(cpu, op, reg::RDI, 1);
        Ok((1, ends(op, cpu.cc)))
    }
}

fn string<T: Alu, S: Step>(cpu: &mut Cpu, op: OpPtr) -> Next {
    if op.imm == rep::NONE {
        let r = S::step::<T>(cpu, &op, 1).map(|_| ());
        return op.finish(cpu, r);
    }
    repeat(cpu, op, |cpu, op, most| S::step::<T>(cpu, op, most))
}

/// Repeats until the count in (E/R)CX is used up, a comparison ends it, or something is pending.
#[inline(always)]
pub(super) fn repeat(
    cpu: &mut Cpu,
    op: OpPtr,
    mut step: impl FnMut(&mut Cpu, &Op, u64) -> Res<(u64, bool)>,
) -> Next {
    let mut budget = PIECE;
    loop {
        let count = index(cpu, &op, reg::RCX);
        if count == 0 {
            return op.next(cpu);
        }
        let single = cpu.mode.contains(Mode::STEP) && !cpu.traced;
        let most = if single { 1 } else { count.min(PIECE) };
        match step(cpu, &op, most) {
            Ok((n, ended)) => {
                set_index(cpu, &op, reg::RCX, count - n);
                if ended || count == n {
                    return op.next(cpu);
                }
                budget = budget.saturating_sub(n);
                if single || budget == 0 && !cpu.signals.pending().is_empty() {
                    return again(cpu, op);
                }
                if budget == 0 {
                    budget = PIECE;
                }
            }
            Err(f) => return op.fault(cpu, f),
        }
    }
}

/// Leaves the block with RIP on this instruction, to go on with it later.
#[cold]
fn again(cpu: &mut Cpu, op: OpPtr) -> Next {
    cpu.rip = cpu.ip_at(op.off);
    cpu.unretire(op);
    cpu.link = std::ptr::null();
    Next::LOOKUP
}

/// Lowers the instructions of this family.
pub(super) fn lower(_ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    macro_rules! all {
        ($s:ident) => {
            (string::<u8, $s>, string::<u16, $s>, string::<u32, $s>, string::<u64, $s>)
        };
    }
    let forms: (Handler, Handler, Handler, Handler) = match i.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => all!(Movs),
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => all!(Stos),
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => all!(Lods),
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => all!(Cmps),
        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => all!(Scas),
        _ => return None,
    };
    // MOVSD and CMPSD are also the names of SSE instructions.
    if !i.is_string_instruction() {
        return None;
    }
    op.handler = match i.memory_size().size() {
        1 => forms.0,
        2 => forms.1,
        4 => forms.2,
        _ => forms.3,
    };
    op.imm = repetition(i);
    Some(Flow::Continue)
}

/// Kind of repetition prefix.
pub(super) fn repetition(i: &Instruction) -> u64 {
    if i.has_rep_prefix() {
        rep::REP
    } else if i.has_repne_prefix() {
        rep::REPNE
    } else {
        rep::NONE
    }
}
