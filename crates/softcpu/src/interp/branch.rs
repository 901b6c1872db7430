//! Near branches: JMP, Jcc, CALL, RET, LOOP, JCXZ; and the pseudo-operations that end blocks without one.

use super::data::by_condition;
use super::{Ea, follow, target};
use crate::decode::operand::{Kind, dst, kind};
use crate::decode::{Ctx, Flow};
use crate::fault::Res;
use crate::flags::Condition;
use crate::mmu::canonical;
use crate::op::{Handler, Next, Op, OpPtr, asize};
use crate::state::{Cpu, Mode, reg, seg};
use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind};

const RSP: usize = reg::RSP as usize / 8;

/// Pseudo-operation: continues behind the block, in the same page.
pub(crate) fn fallthrough(cpu: &mut Cpu, op: OpPtr) -> Next {
    cpu.rip = cpu.ip_at(op.off);
    follow(cpu, 0)
}

/// Pseudo-operation: continues behind the block, anywhere.
pub(crate) fn fallthrough_far(cpu: &mut Cpu, op: OpPtr) -> Next {
    cpu.rip = cpu.ip_at(op.off);
    cpu.next_block()
}

/// Width of an instruction pointer, and whether a target can be linked.
trait Form: 'static {
    const BYTES: u32;
    const LINK: bool;
}

macro_rules! forms {
    ($($name:ident $bytes:literal $link:literal),*) => {$(
        struct $name;
        impl Form for $name {
            const BYTES: u32 = $bytes;
            const LINK: bool = $link;
        }
    )*};
}
forms!(Near64 8 true, Far64 8 false, Near32 4 true, Far32 4 false, Far16 2 false);

/// Goes to a direct target. In 64-bit mode a target can leave the canonical range only by running off its end, which
/// the fetch reports.
#[inline(always)]
fn go<F: Form>(cpu: &mut Cpu, to: u64, slot: usize) -> Next {
    cpu.rip = to;
    if F::LINK { follow(cpu, slot) } else { cpu.next_block() }
}

/// Checks a branch target before anything is committed.
#[inline(always)]
fn check<F: Form>(cpu: &mut Cpu, to: u64) -> Res<()> {
    let ok = if F::BYTES == 8 {
        canonical(to)
    } else {
        !cpu.mode.contains(Mode::LIMITED) || to <= cpu.seg[seg::CS].limit as u64
    };
    if ok { Ok(()) } else { Err(cpu.gp(0)) }
}

fn jmp<F: Form>(cpu: &mut Cpu, op: OpPtr) -> Next {
    let to = target(cpu, &op, F::BYTES);
    if !F::LINK
        && let Err(f) = check::<F>(cpu, to)
    {
        return op.fault(cpu, f);
    }
    go::<F>(cpu, to, 1)
}

fn jcc<F: Form, N: Form, C: Condition>(cpu: &mut Cpu, op: OpPtr) -> Next {
    if C::holds(cpu.cc) {
        let to = target(cpu, &op, F::BYTES);
        if !F::LINK
            && let Err(f) = check::<F>(cpu, to)
        {
            return op.fault(cpu, f);
        }
        go::<F>(cpu, to, 1)
    } else {
        let to = cpu.ip_at(op.next_off());
        go::<N>(cpu, to, 0)
    }
}

fn call64<F: Form>(cpu: &mut Cpu, op: OpPtr) -> Next {
    let to = target(cpu, &op, 8);
    if !F::LINK
        && let Err(f) = check::<F>(cpu, to)
    {
        return op.fault(cpu, f);
    }
    let back = cpu.regs[reg::RIP as usize / 8].wrapping_add(op.next_off() as u64);
    let sp = cpu.regs[RSP].wrapping_sub(8);
    if let Err(f) = cpu.write(seg::SS, sp, back) {
        return op.fault(cpu, f);
    }
    cpu.regs[RSP] = sp;
    go::<F>(cpu, to, 1)
}

fn ret64(cpu: &mut Cpu, op: OpPtr) -> Next {
    let sp = cpu.regs[RSP];
    match cpu.read::<u64>(seg::SS, sp) {
        Ok(to) => {
            if let Err(f) = check::<Far64>(cpu, to) {
                return op.fault(cpu, f);
            }
            cpu.regs[RSP] = sp.wrapping_add(8).wrapping_add(op.imm);
            cpu.rip = to;
            cpu.next_block()
        }
        Err(f) => op.fault(cpu, f),
    }
}

/// Indirect jump or call in 64-bit mode: register.
fn indirect64_r<const CALL: bool>(cpu: &mut Cpu, op: OpPtr) -> Next {
    let to = cpu.get::<u64>(op.dst);
    indirect64::<CALL>(cpu, op, to)
}

fn indirect64_m<const CALL: bool, E: Ea>(cpu: &mut Cpu, op: OpPtr) -> Next {
    match E::at(cpu, &op, 8, false).and_then(|lin| cpu.read::<u64>(op.seg(), lin)) {
        Ok(to) => indirect64::<CALL>(cpu, op, to),
        Err(f) => op.fault(cpu, f),
    }
}

#[inline(always)]
fn indirect64<const CALL: bool>(cpu: &mut Cpu, op: OpPtr, to: u64) -> Next {
    // The stack comes first: a fault there hides one of the target.
    if CALL && !canonical(to) {
        let sp = cpu.regs[RSP].wrapping_sub(8);
        if let Err(f) = cpu.probe_write(seg::SS, sp, 8) {
            return op.fault(cpu, f);
        }
    }
    if let Err(f) = check::<Far64>(cpu, to) {
        return op.fault(cpu, f);
    }
    if CALL {
        let back = cpu.regs[reg::RIP as usize / 8].wrapping_add(op.next_off() as u64);
        let sp = cpu.regs[RSP].wrapping_sub(8);
        if let Err(f) = cpu.write(seg::SS, sp, back) {
            return op.fault(cpu, f);
        }
        cpu.regs[RSP] = sp;
    }
    cpu.rip = to;
    cpu.next_block()
}

/// The same for 16 and 32 bits: how the target is found is told by the operation.
fn legacy<const CALL: bool>(cpu: &mut Cpu, op: OpPtr) -> Next {
    match legacy_branch::<CALL>(cpu, op) {
        Ok(()) => cpu.next_block(),
        Err(f) => op.fault(cpu, f),
    }
}

/// `op.src` of the legacy forms.
mod via {
    pub(super) const RELATIVE: u8 = 0;
    pub(super) const REGISTER: u8 = 1;
    pub(super) const MEMORY: u8 = 2;
    /// Added for 32-bit operands.
    pub(super) const WIDE: u8 = 0x80;
}

fn legacy_branch<const CALL: bool>(cpu: &mut Cpu, op: OpPtr) -> Res<()> {
    let bytes = if op.src & via::WIDE != 0 { 4 } else { 2 };
    let to = match op.src & !via::WIDE {
        via::RELATIVE => target(cpu, &op, bytes),
        via::REGISTER if bytes == 4 => cpu.get::<u32>(op.dst) as u64,
        via::REGISTER => cpu.get::<u16>(op.dst) as u64,
        _ => {
            let lin = cpu.address(&op, bytes, false)?;
            if bytes == 4 {
                cpu.read::<u32>(op.seg(), lin)? as u64
            } else {
                cpu.read::<u16>(op.seg(), lin)? as u64
            }
        }
    };
    if cpu.mode.is64() {
        // A 16-bit operand in 64-bit mode: AMD truncates the target.
        if CALL {
            let back = cpu.ip_at(op.next_off());
            cpu.push_sized(2, back)?;
        }
    } else {
        if CALL && to > cpu.seg[seg::CS].limit as u64 {
            // The stack comes first here, too.
            let lin = cpu.stack(-(bytes as i64), bytes, true)?;
            cpu.probe_write(seg::SS, lin, bytes as usize)?;
        }
        check::<Far32>(cpu, to)?;
        if CALL {
            let back = cpu.ip_at(op.next_off());
            cpu.push_sized(bytes as u8, back)?;
        }
    }
    cpu.rip = to;
    Ok(())
}

/// RET with 16 or 32-bit operand (`op.src` bytes).
fn legacy_ret(cpu: &mut Cpu, op: OpPtr) -> Next {
    let r = cpu.peek_stack(0, op.src).and_then(|to| {
        if !cpu.mode.is64() {
            check::<Far32>(cpu, to)?;
        }
        cpu.add_sp(op.src as u64 + op.imm);
        cpu.rip = to;
        Ok(())
    });
    match r {
        Ok(()) => cpu.next_block(),
        Err(f) => op.fault(cpu, f),
    }
}

/// LOOP, LOOPE, LOOPNE, JCXZ: `op.src` holds which, `op.dst` the bytes of the target.
mod repeat {
    pub(super) const LOOP: u8 = 0;
    pub(super) const LOOPE: u8 = 1;
    pub(super) const LOOPNE: u8 = 2;
    pub(super) const JCXZ: u8 = 3;
}

fn looping(cpu: &mut Cpu, op: OpPtr) -> Next {
    let mask = match op.asize() {
        asize::A64 => u64::MAX,
        asize::A32 => 0xffff_ffff,
        _ => 0xffff,
    };
    let rcx = cpu.regs[reg::RCX as usize / 8];
    let zf = cpu.cc & crate::flags::cc::ZF != 0;
    let counts = op.src != repeat::JCXZ;
    let count = if counts { rcx.wrapping_sub(1) } else { rcx } & mask;
    let taken = match op.src {
        repeat::LOOP => count != 0,
        repeat::LOOPE => count != 0 && zf,
        repeat::LOOPNE => count != 0 && !zf,
        _ => count == 0,
    };
    let mut to = cpu.ip_at(op.next_off());
    if taken {
        to = target(cpu, &op, op.dst as u32);
        let ok = if op.dst == 8 { check::<Far64>(cpu, to) } else { check::<Far32>(cpu, to) };
        if let Err(f) = ok {
            return op.fault(cpu, f);
        }
    }
    if counts {
        match op.asize() {
            asize::A64 => cpu.set(reg::RCX, count),
            asize::A32 => cpu.set(reg::RCX, count as u32),
            _ => cpu.set(reg::RCX, count as u16),
        }
    }
    cpu.rip = to;
    cpu.next_block()
}

/// Width of a near branch's instruction pointer in bytes.
fn branch_bytes(i: &Instruction) -> u32 {
    match i.op0_kind() {
        OpKind::NearBranch64 => 8,
        OpKind::NearBranch32 => 4,
        _ => 2,
    }
}

/// Lowers the instructions of this family.
pub(super) fn lower(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    let mnemonic = i.mnemonic();
    match mnemonic {
        Mnemonic::Jmp | Mnemonic::Call => near(ctx, i, op, mnemonic == Mnemonic::Call)?,
        Mnemonic::Ret => ret(i, op),
        Mnemonic::Loop
        | Mnemonic::Loope
        | Mnemonic::Loopne
        | Mnemonic::Jcxz
        | Mnemonic::Jecxz
        | Mnemonic::Jrcxz => {
            op.imm = i.near_branch_target().wrapping_sub(ctx.rip);
            op.dst = branch_bytes(i) as u8;
            op.src = match mnemonic {
                Mnemonic::Loop => repeat::LOOP,
                Mnemonic::Loope => repeat::LOOPE,
                Mnemonic::Loopne => repeat::LOOPNE,
                _ => repeat::JCXZ,
            };
            op.ea = counter_size(i);
            op.handler = looping;
        }
        _ if i.is_jcc_short_or_near() => conditional(ctx, i, op)?,
        _ => return None,
    }
    Some(Flow::End)
}

/// Address size of LOOP and JCXZ, which selects CX, ECX or RCX.
fn counter_size(i: &Instruction) -> u8 {
    use Code::*;
    match i.code() {
        Loopne_rel8_16_CX | Loopne_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loop_rel8_16_CX
        | Loop_rel8_32_CX | Jcxz_rel8_16 | Jcxz_rel8_32 => asize::A16,
        Loopne_rel8_16_RCX | Loopne_rel8_64_RCX | Loope_rel8_16_RCX | Loope_rel8_64_RCX
        | Loop_rel8_16_RCX | Loop_rel8_64_RCX | Jrcxz_rel8_16 | Jrcxz_rel8_64 => asize::A64,
        _ => asize::A32,
    }
}

fn near(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op, call: bool) -> Option<()> {
    let relative = matches!(i.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    if relative {
        op.imm = i.near_branch_target().wrapping_sub(ctx.rip);
    }
    let link = ctx.linkable(op.imm);
    if relative && branch_bytes(i) == 8 {
        op.handler = match (call, link) {
            (false, true) => jmp::<Near64>,
            (false, false) => jmp::<Far64>,
            (true, true) => call64::<Near64>,
            (true, false) => call64::<Far64>,
        };
        return Some(());
    }
    if relative && !call {
        op.handler = match (branch_bytes(i), link) {
            (4, true) => jmp::<Near32>,
            (4, false) => jmp::<Far32>,
            _ => jmp::<Far16>,
        };
        return Some(());
    }
    let (kind, bytes) = match kind(i, 0) {
        Kind::Reg => {
            dst(i, 0, op);
            (via::REGISTER, i.op0_register().size())
        }
        Kind::Mem => (via::MEMORY, i.memory_size().size()),
        _ if relative => (via::RELATIVE, branch_bytes(i) as usize),
        _ => return None,
    };
    // Far pointers in memory are another family's.
    if !(relative || i.is_jmp_near_indirect() || i.is_call_near_indirect()) {
        return None;
    }
    if bytes == 8 {
        op.handler = match (kind, ctx.flat(op), call) {
            (via::REGISTER, _, false) => indirect64_r::<false>,
            (via::REGISTER, _, true) => indirect64_r::<true>,
            (_, true, false) => indirect64_m::<false, super::Flat>,
            (_, true, true) => indirect64_m::<true, super::Flat>,
            (_, false, false) => indirect64_m::<false, super::General>,
            (_, false, true) => indirect64_m::<true, super::General>,
        };
        return Some(());
    }
    op.src = kind | if bytes == 4 { via::WIDE } else { 0 };
    op.handler = if call { legacy::<true> } else { legacy::<false> };
    Some(())
}

fn ret(i: &Instruction, op: &mut Op) {
    op.imm = if i.op_count() == 1 { i.immediate16() as u64 } else { 0 };
    match i.code() {
        Code::Retnq | Code::Retnq_imm16 => op.handler = ret64,
        Code::Retnd | Code::Retnd_imm16 => (op.src, op.handler) = (4, legacy_ret),
        _ => (op.src, op.handler) = (2, legacy_ret),
    }
}

fn conditional(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<()> {
    op.imm = i.near_branch_target().wrapping_sub(ctx.rip);
    let (taken, not_taken) = (ctx.linkable(op.imm), ctx.linkable(ctx.end as u64));
    macro_rules! pick64 {
        ($c:ty) => {
            match (taken, not_taken) {
                (true, true) => jcc::<Near64, Near64, $c> as Handler,
                (true, false) => jcc::<Near64, Far64, $c>,
                (false, true) => jcc::<Far64, Near64, $c>,
                (false, false) => jcc::<Far64, Far64, $c>,
            }
        };
    }
    macro_rules! pick32 {
        ($c:ty) => {
            if taken && not_taken { jcc::<Near32, Near32, $c> as Handler } else { jcc::<Far32, Far32, $c> }
        };
    }
    macro_rules! pick16 {
        ($c:ty) => {
            jcc::<Far16, Far32, $c> as Handler
        };
    }
    op.handler = match branch_bytes(i) {
        8 => by_condition!(i, pick64),
        4 => by_condition!(i, pick32),
        _ => by_condition!(i, pick16),
    };
    Some(())
}
