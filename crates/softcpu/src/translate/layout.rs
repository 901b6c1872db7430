//! Where generated code finds things: which host registers hold which guest registers, and offsets into [`Cpu`], which
//! generated code reaches through the GS base.

use crate::Cpu;
use crate::fpu::Fpu;
use crate::mmu::TlbEntry;
use crate::state::Seg;
use std::mem::offset_of;

/// Host register of each guest register; `None`: in memory, at [`gpr`]. RAX and RCX of the host are free for address
/// checks (and for LAHF, SAHF and shift counts); RSP of the host is the host's stack, with the return addresses of guest
/// calls on it.
pub const HOST: [Option<u8>; 16] = [
    Some(10), // RAX
    Some(11), // RCX
    Some(2),  // RDX
    Some(3),  // RBX
    Some(15), // RSP
    Some(5),  // RBP
    Some(6),  // RSI
    Some(7),  // RDI
    Some(8),  // R8
    Some(9),  // R9
    None,     // R10
    None,     // R11
    Some(12), // R12
    Some(13), // R13
    Some(14), // R14
    None,     // R15
];

/// Offset in the vCPU as a displacement.
pub fn gs_disp(offset: usize) -> i32 {
    debug_assert!(offset < 1 << 30);
    offset as i32
}

/// Offset of a guest register.
pub fn gpr(n: usize) -> usize {
    offset_of!(Cpu, regs) + n * 8
}

/// Offset of the base of a segment register.
pub fn seg_base(n: usize) -> usize {
    offset_of!(Cpu, seg) + n * size_of::<Seg>() + offset_of!(Seg, base)
}

/// Offset of a vector register.
pub fn vector(n: usize) -> usize {
    offset_of!(Cpu, fpu) + offset_of!(Fpu, vec) + n * 64
}

/// Offset of [`Fpu::ready`].
pub const READY: usize = offset_of!(Cpu, fpu) + offset_of!(Fpu, ready);
/// Offset of [`Cpu::cc`].
pub const CC: usize = offset_of!(Cpu, cc);
/// Offset of [`Cpu::tlb`].
pub const TLB: usize = offset_of!(Cpu, tlb);
/// Offset of [`Cpu::tlb_mask`].
pub const TLB_MASK: usize = offset_of!(Cpu, tlb_mask);
/// Offset of [`Cpu::signal_word`].
pub const SIGNALS: usize = offset_of!(Cpu, signal_word);
/// Offset of [`super::State::host_rsp`].
pub const HOST_RSP: usize = offset_of!(Cpu, jit) + offset_of!(super::State, host_rsp);
/// Offset of [`super::State::saved_rsp`].
pub const SAVED_RSP: usize = offset_of!(Cpu, jit) + offset_of!(super::State, saved_rsp);
/// Offset of [`super::State::target`].
pub const TARGET: usize = offset_of!(Cpu, jit) + offset_of!(super::State, target);
/// Offset of [`super::State::key`].
pub const KEY: usize = offset_of!(Cpu, jit) + offset_of!(super::State, key);
/// Offset of [`super::State::jumps`].
pub const JUMPS: usize = offset_of!(Cpu, jit) + offset_of!(super::State, jumps);
/// Offset of [`super::State::vectors`].
pub const VECTORS: usize = offset_of!(Cpu, jit) + offset_of!(super::State, vectors);
/// Offset of [`super::State::argument`].
pub const ARGUMENT: usize = offset_of!(Cpu, jit) + offset_of!(super::State, argument);
/// Offset of [`super::State::linear`].
pub const LINEAR: usize = offset_of!(Cpu, jit) + offset_of!(super::State, linear);
/// Offset of [`super::State::depth_limit`].
pub const DEPTH_LIMIT: usize = offset_of!(Cpu, jit) + offset_of!(super::State, depth_limit);
/// Offset of [`super::State::spill`].
pub const SPILL: usize = offset_of!(Cpu, jit) + offset_of!(super::State, spill);

/// Offset of [`super::State::fresh`].
pub const FRESH: usize = offset_of!(Cpu, jit) + offset_of!(super::State, fresh);
/// Offset of [`super::State::base_return`].
pub const BASE_RETURN: usize = offset_of!(Cpu, jit) + offset_of!(super::State, base_return);
/// Offset of [`super::State::branch`].
pub const BRANCH: usize = offset_of!(Cpu, jit) + offset_of!(super::State, branch);
/// Offset of [`super::State::group`].
pub const GROUP: usize = offset_of!(Cpu, jit) + offset_of!(super::State, group);
/// Offset of [`super::State::stack_page`].
pub const STACK_PAGE: usize = offset_of!(Cpu, jit) + offset_of!(super::State, stack_page);
/// Offset of [`super::State::stack_addend`].
pub const STACK_ADDEND: usize = offset_of!(Cpu, jit) + offset_of!(super::State, stack_addend);

/// Offset of the read tag in a TLB entry.
pub const TLB_READ: i32 = offset_of!(TlbEntry, read) as i32;
/// Offset of the write tag in a TLB entry.
pub const TLB_WRITE: i32 = offset_of!(TlbEntry, write) as i32;
/// Offset of the addend in a TLB entry.
pub const TLB_ADDEND: i32 = offset_of!(TlbEntry, addend) as i32;
/// log2 of the size of a TLB entry.
pub const TLB_SHIFT: u8 = size_of::<TlbEntry>().trailing_zeros() as u8;
