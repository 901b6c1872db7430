//! What operations do: one file per instruction family, each with its part of the decoder (`lower`) beside the semantics.
//!
//! An operation either completes or changes nothing that the guest can see, so that every fault is precise: memory is
//! read, then written, then come registers and flags.

mod arith;
mod atomic;
mod bits;
mod bmi;
mod branch;
mod data;
mod far;
mod io;
mod legacy;
mod muldiv;
mod shift;
mod stack;
mod string;
mod system;
mod tables;

use crate::block::Block;
use crate::decode::{Ctx, Flow};
use crate::fault::Res;
use crate::op::{Next, Op, OpPtr};
use crate::state::{Cpu, reg};
use iced_x86::Instruction;

pub(crate) use branch::{fallthrough, fallthrough_far};

/// How the linear address of a memory operand is computed.
pub(crate) trait Ea: 'static {
    /// The linear address of `len` bytes.
    fn at(cpu: &mut Cpu, op: &Op, len: u32, write: bool) -> Res<u64>;
}

/// 64-bit addressing in a segment without base.
pub(crate) struct Flat;

impl Ea for Flat {
    #[inline(always)]
    fn at(cpu: &mut Cpu, op: &Op, _len: u32, _write: bool) -> Res<u64> {
        let index = cpu.get::<u64>(op.index) << (op.scale & 63);
        Ok(cpu.get::<u64>(op.base).wrapping_add(index).wrapping_add(op.disp))
    }
}

/// Any addressing.
pub(crate) struct General;

impl Ea for General {
    #[inline(always)]
    fn at(cpu: &mut Cpu, op: &Op, len: u32, write: bool) -> Res<u64> {
        cpu.address(op, len, write)
    }
}

/// Makes a handler of a function that takes the CPU and the operation and may fault.
macro_rules! h {
    ($f:path) => {{
        fn run(cpu: &mut crate::state::Cpu, op: crate::op::OpPtr) -> crate::op::Next {
            let r = $f(cpu, &op);
            op.finish(cpu, r)
        }
        run as crate::op::Handler
    }};
}

/// As `h`, for operations that end their block: continues with a look-up at RIP, which is set to the next
/// instruction before the function runs.
macro_rules! ending {
    ($f:path) => {{
        fn run(cpu: &mut crate::state::Cpu, op: crate::op::OpPtr) -> crate::op::Next {
            cpu.rip = cpu.ip_at(op.next_off());
            match $f(cpu, &op) {
                Ok(next) => next,
                Err(f) => op.fault_ended(cpu, f),
            }
        }
        run as crate::op::Handler
    }};
}

/// Picks the instance of a generic function for an operand size, then makes a handler.
macro_rules! sized {
    ($size:expr, $f:ident $(, $g:ty)*) => {
        match $size {
            1 => h!($f::<u8 $(, $g)*>),
            2 => h!($f::<u16 $(, $g)*>),
            4 => h!($f::<u32 $(, $g)*>),
            8 => h!($f::<u64 $(, $g)*>),
            _ => return None,
        }
    };
}

/// As `sized`, without bytes.
macro_rules! sized_wide {
    ($size:expr, $f:ident $(, $g:ty)*) => {
        match $size {
            2 => h!($f::<u16 $(, $g)*>),
            4 => h!($f::<u32 $(, $g)*>),
            8 => h!($f::<u64 $(, $g)*>),
            _ => return None,
        }
    };
}

/// As `sized`, for a function whose second parameter is an addressing form.
macro_rules! sized_ea {
    ($ctx:expr, $op:expr, $size:expr, $f:ident $(, $g:ty)*) => {
        if $ctx.flat($op) { sized!($size, $f, crate::interp::Flat $(, $g)*) } else { sized!($size, $f, crate::interp::General $(, $g)*) }
    };
}

/// As `sized_ea`, without bytes.
macro_rules! sized_wide_ea {
    ($ctx:expr, $op:expr, $size:expr, $f:ident $(, $g:ty)*) => {
        if $ctx.flat($op) {
            sized_wide!($size, $f, crate::interp::Flat $(, $g)*)
        } else {
            sized_wide!($size, $f, crate::interp::General $(, $g)*)
        }
    };
}

pub(crate) use {ending, h, sized, sized_ea, sized_wide, sized_wide_ea};

/// Fills in the operation for an instruction of one of the families; `None` if it is none of theirs.
pub(crate) fn lower(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    // `None` means both "not ours" and "ours, but not this form", which is the same to the caller.
    arith::lower(ctx, i, op)
        .or_else(|| data::lower(ctx, i, op))
        .or_else(|| branch::lower(ctx, i, op))
        .or_else(|| stack::lower(ctx, i, op))
        .or_else(|| shift::lower(ctx, i, op))
        .or_else(|| bits::lower(ctx, i, op))
        .or_else(|| bmi::lower(ctx, i, op))
        .or_else(|| muldiv::lower(ctx, i, op))
        .or_else(|| string::lower(ctx, i, op))
        .or_else(|| atomic::lower(ctx, i, op))
        .or_else(|| far::lower(ctx, i, op))
        .or_else(|| io::lower(ctx, i, op))
        .or_else(|| tables::lower(ctx, i, op))
        .or_else(|| system::lower(ctx, i, op))
        .or_else(|| legacy::lower(ctx, i, op))
}

/// Handler of what is no instruction: #UD.
pub(crate) fn undefined(cpu: &mut Cpu, op: OpPtr) -> Next {
    let f = cpu.ud();
    op.fault(cpu, f)
}

/// Handler of instructions of more than 15 bytes: #GP.
pub(crate) fn too_long(cpu: &mut Cpu, op: OpPtr) -> Next {
    let f = cpu.gp(0);
    op.fault(cpu, f)
}

/// Sets RIP to the branch target in `op.imm`, truncated to `bytes`.
#[inline(always)]
pub(crate) fn target(cpu: &Cpu, op: &Op, bytes: u32) -> u64 {
    let ip = cpu.regs[reg::RIP as usize / 8].wrapping_add(op.imm);
    match bytes {
        8 => ip,
        4 => ip as u32 as u64,
        _ => ip as u16 as u64,
    }
}

/// Link slot `n` of the running block.
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) fn follow(cpu: &mut Cpu, n: usize) -> Next {
    // SAFETY: handlers only run within a block, and `block` is that block.
    let b: &Block = unsafe { &*cpu.block };
    let link = &b.links[n];
    cpu.link = link;
    Next(link.get() as usize)
}
