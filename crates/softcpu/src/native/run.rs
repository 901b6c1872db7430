//! Handlers of operations that call a thunk.
#![allow(unsafe_code)] // calling generated code

use super::check::Exceptions;
use super::recipe::{Class, MemAccess};
use super::special::Special;
use super::{Code, Thunk};
use crate::fault::Res;
use crate::fpu::ready;
use crate::interp::{Ea, Flat};
use crate::op::{Handler, Next, Op, OpPtr};
use crate::state::Cpu;

/// Room for a memory operand that has no host address: the widest is 32 bytes.
#[repr(C, align(64))]
pub(super) struct Bounce(pub(super) [u8; 64]);

/// The handler of a thunk. `flat`: the memory operand's linear address is just its offset.
pub(super) fn handler(t: &Thunk, flat: bool) -> Handler {
    if t.special.is_some() {
        return special;
    }
    if t.entry.is_none() {
        return no_code;
    }
    // Flags as input, or both the x87 and a vector unit: rare enough for one general handler.
    if t.reads_flags || t.x87 && matches!(t.class, Class::Sse | Class::Avx) {
        return general;
    }
    macro_rules! by_access {
        ($unit:ident) => {
            match (t.access, flat) {
                (MemAccess::None, _) => register::<{ ready::$unit }>,
                (MemAccess::Read, false) => load::<{ ready::$unit }, false>,
                (MemAccess::Read, true) => load::<{ ready::$unit }, true>,
                (MemAccess::Write, false) => store::<{ ready::$unit }, false>,
                (MemAccess::Write, true) => store::<{ ready::$unit }, true>,
            }
        };
    }
    match t.class {
        Class::Sse => by_access!(SSE),
        Class::Avx => by_access!(AVX),
        Class::Mmx => by_access!(MMX),
        Class::X87 => by_access!(X87),
    }
}

/// What a lowered operation refers to.
#[inline(always)]
pub(super) fn thunk(op: &Op) -> &'static Thunk {
    // SAFETY: `lower` put the address of an interned thunk there; it lives as long as the arena, which the VM owns,
    // and the reference does not leave the handler. Bits 56 and up hold a register number.
    unsafe { &*((op.imm & 0x00ff_ffff_ffff_ffff) as *const Thunk) }
}

/// Third register slot.
#[inline(always)]
pub(super) fn third(op: &Op) -> u64 {
    op.imm >> 56
}

/// Calls the code of a thunk.
#[inline(always)]
pub(super) fn call(cpu: &mut Cpu, op: &Op, t: &Thunk, mem: *mut u8) -> u64 {
    let Some(Code(entry)) = t.entry else { return 0 };
    let first = if t.reads_flags { u64::from(cpu.cc >> 8) } else { u64::from(op.dst) };
    // SAFETY: the code was made by `emit` for this instruction: it touches the registers of `cpu` that the slots name
    // (numbers below 16, times 8), `t.size` bytes at `mem`, which the caller has made valid, and nothing else that the
    // ABI does not let it touch. The x87 unit is the guest's while it is live.
    unsafe { entry(cpu, first, u64::from(op.src), third(op), mem) }
}

/// No memory operand.
fn register<const READY: u8>(cpu: &mut Cpu, op: OpPtr) -> Next {
    if cpu.fpu.ready & READY == 0 {
        return general(cpu, op);
    }
    let t = thunk(&op);
    let flags = call(cpu, &op, t, std::ptr::null_mut());
    finish(cpu, &op, t, flags);
    op.next(cpu)
}

/// Memory source.
fn load<const READY: u8, const FLAT: bool>(cpu: &mut Cpu, op: OpPtr) -> Next {
    if cpu.fpu.ready & READY == 0 {
        return general(cpu, op);
    }
    let t = thunk(&op);
    match source::<FLAT>(cpu, &op, t, |cpu, mem| call(cpu, &op, t, mem)) {
        Ok(flags) => {
            finish(cpu, &op, t, flags);
            op.next(cpu)
        }
        Err(f) => op.fault(cpu, f),
    }
}

/// Memory destination.
fn store<const READY: u8, const FLAT: bool>(cpu: &mut Cpu, op: OpPtr) -> Next {
    if cpu.fpu.ready & READY == 0 {
        return general(cpu, op);
    }
    let t = thunk(&op);
    match destination::<FLAT>(cpu, &op, t, |cpu, mem| call(cpu, &op, t, mem)) {
        Ok(()) => {
            finish(cpu, &op, t, 0);
            op.next(cpu)
        }
        Err(f) => op.fault(cpu, f),
    }
}

/// Linear address of the memory operand, in 64-bit mode without a segment base.
#[inline(always)]
fn flat(cpu: &mut Cpu, op: &Op, t: &Thunk) -> Res<u64> {
    let lin = Flat::at(cpu, op, u32::from(t.size), false)?;
    if lin & (u64::from(t.align) - 1) != 0 {
        return Err(cpu.gp(0));
    }
    Ok(lin)
}

/// Linear address of the memory operand.
#[inline(always)]
pub(super) fn linear(cpu: &mut Cpu, op: &Op, t: &Thunk, write: bool) -> Res<u64> {
    if t.align > 1 {
        return aligned(cpu, op, t, write);
    }
    cpu.address(op, u32::from(t.size), write)
}

/// The same, for an operand that must be aligned. That is checked before the segment's limit.
#[inline]
fn aligned(cpu: &mut Cpu, op: &Op, t: &Thunk, write: bool) -> Res<u64> {
    let based = !cpu.mode.is64() || op.seg() >= crate::state::seg::FS;
    let base = if based { cpu.seg[op.seg()].base } else { 0 };
    if base.wrapping_add(cpu.offset(op)) & (u64::from(t.align) - 1) != 0 {
        return Err(cpu.gp(0));
    }
    cpu.address(op, u32::from(t.size), write)
}

/// Runs `f` with the address of the memory operand's bytes: guest memory itself, or a copy.
#[inline(always)]
pub(super) fn source<const FLAT: bool>(
    cpu: &mut Cpu,
    op: &Op,
    t: &Thunk,
    f: impl FnOnce(&mut Cpu, *mut u8) -> u64,
) -> Res<u64> {
    let lin = if FLAT { flat(cpu, op, t)? } else { linear(cpu, op, t, false)? };
    match cpu.host_read(op.seg(), lin, usize::from(t.size))? {
        Some(p) if !t.host_aligned || (p as usize).is_multiple_of(16) => Ok(f(cpu, p.cast_mut())),
        _ => {
            let mut bounce = Bounce([0; 64]);
            cpu.read_bytes(op.seg(), lin, &mut bounce.0[..usize::from(t.size)])?;
            // Reading may have called a device, which parks the host's units.
            get_ready_again(cpu, t)?;
            Ok(f(cpu, bounce.0.as_mut_ptr()))
        }
    }
}

/// Runs `f` with the address where the memory operand is to be stored.
#[inline(always)]
pub(super) fn destination<const FLAT: bool>(
    cpu: &mut Cpu,
    op: &Op,
    t: &Thunk,
    f: impl FnOnce(&mut Cpu, *mut u8) -> u64,
) -> Res<()> {
    let lin = if FLAT { flat(cpu, op, t)? } else { linear(cpu, op, t, true)? };
    match cpu.host_write(op.seg(), lin, usize::from(t.size))? {
        Some(p) => {
            f(cpu, p);
            Ok(())
        }
        None => {
            let mut bounce = Bounce([0; 64]);
            f(cpu, bounce.0.as_mut_ptr());
            // Cannot fault any more: `host_write` has checked every byte.
            cpu.write_bytes(op.seg(), lin, &bounce.0[..usize::from(t.size)])
        }
    }
}

#[cold]
fn get_ready_again(cpu: &mut Cpu, t: &Thunk) -> Res<()> {
    cpu.make_ready(t).map(|_| ())
}

/// Any thunk, in any state.
fn general(cpu: &mut Cpu, op: OpPtr) -> Next {
    let result = execute(cpu, &op);
    op.finish(cpu, result)
}

fn execute(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let t = thunk(op);
    let mixed = t.x87 && matches!(t.class, Class::Sse | Class::Avx);
    let needed = t.class.ready() | if mixed { ready::MMX } else { 0 };
    if cpu.fpu.ready & needed != needed && cpu.make_ready(t)? == Exceptions::Unmasked {
        return cpu.execute_unmasked(op, t);
    }
    let flags = match t.access {
        MemAccess::None => call(cpu, op, t, std::ptr::null_mut()),
        MemAccess::Read => source::<false>(cpu, op, t, |cpu, mem| call(cpu, op, t, mem))?,
        MemAccess::Write => {
            destination::<false>(cpu, op, t, |cpu, mem| call(cpu, op, t, mem))?;
            0
        }
    };
    finish(cpu, op, t, flags);
    Ok(())
}

/// What follows an instruction that was executed: flags, and what x87 instructions record.
#[inline(always)]
pub(super) fn finish(cpu: &mut Cpu, op: &Op, t: &Thunk, flags: u64) {
    if t.cc != 0 {
        cpu.cc = cpu.cc & !t.cc | flags as u16 & t.cc;
    }
    if t.records {
        cpu.fpu.fop = u16::from(op.dst) | u16::from(op.src) << 8;
        cpu.fpu.fip = cpu.ip_at(op.off);
        if t.access != MemAccess::None {
            cpu.fpu.fdp = cpu.offset(op);
        }
    }
}

fn special(cpu: &mut Cpu, op: OpPtr) -> Next {
    let t = thunk(&op);
    let Some(which) = t.special else { return no_code(cpu, op) };
    let result = run_special(cpu, &op, t, which);
    op.finish(cpu, result)
}

fn run_special(cpu: &mut Cpu, op: &Op, t: &Thunk, which: Special) -> Res<()> {
    use crate::fpu::Save;
    match which {
        Special::Fninit => cpu.fninit(),
        Special::Fnclex => cpu.fnclex(),
        Special::Fldcw => cpu.fldcw(op),
        Special::Fnstcw => cpu.fnstcw(op),
        Special::FnstswMem => cpu.fnstsw(op),
        Special::FnstswAx => cpu.fnstsw_ax(),
        Special::Fnstenv { wide } => cpu.fnstenv(op, wide),
        Special::Fldenv { wide } => cpu.fldenv(op, wide),
        Special::Fnsave { wide } => cpu.fnsave(op, wide),
        Special::Frstor { wide } => cpu.frstor(op, wide),
        Special::Wait => cpu.fwait(),
        Special::X87Nop => cpu.check_x87_available(),
        Special::Emms => {
            cpu.check_unit(Class::Mmx)?;
            cpu.check_x87_pending()?;
            cpu.fpu.emms();
            Ok(())
        }
        Special::Ldmxcsr => {
            cpu.check_unit(t.class)?;
            cpu.ldmxcsr(op)
        }
        Special::Stmxcsr => {
            cpu.check_unit(t.class)?;
            cpu.stmxcsr(op)
        }
        Special::Fxsave { wide } => cpu.fxsave(op, wide),
        Special::Fxrstor { wide } => cpu.fxrstor(op, wide),
        Special::Xsave { wide } => cpu.xsave(op, wide, Save::Plain),
        Special::Xsaveopt { wide } => cpu.xsave(op, wide, Save::Optimised),
        Special::Xsavec { wide } => cpu.xsave(op, wide, Save::Compacted),
        Special::Xsaves { wide } => cpu.xsaves(op, wide),
        Special::Xrstor { wide } => cpu.xrstor(op, wide),
        Special::Xrstors { wide } => cpu.xrstors(op, wide),
        Special::Xgetbv => cpu.xgetbv(),
        Special::Xsetbv => cpu.xsetbv(),
        Special::Vzeroupper => {
            cpu.check_unit(Class::Avx)?;
            let count = cpu.vector_count();
            cpu.fpu.vzeroupper(count);
            Ok(())
        }
        Special::Vzeroall => {
            cpu.check_unit(Class::Avx)?;
            let count = cpu.vector_count();
            cpu.fpu.vzeroall(count);
            Ok(())
        }
        Special::MaskStoreMmx => cpu.mask_store_mmx(op),
        Special::MaskStoreBytes => cpu.mask_store_bytes(op, t.class),
        Special::MaskLoad { element, vector } => cpu.mask_load(op, usize::from(element), usize::from(vector)),
        Special::MaskStore { element, vector } => {
            cpu.mask_store(op, usize::from(element), usize::from(vector))
        }
        Special::Gather { element, index, count } => {
            cpu.gather(op, usize::from(element), usize::from(index), usize::from(count))
        }
    }
}

/// Stands in where a thunk could not be installed.
fn no_code(cpu: &mut Cpu, op: OpPtr) -> Next {
    let fault = cpu.raise_internal("the host gives no memory for generated code");
    op.fault(cpu, fault)
}
