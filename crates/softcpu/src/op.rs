//! Decoded instructions as the interpreter runs them.
#![allow(unsafe_code)] // stepping through a block's array of operations without bounds checks

use crate::{Cpu, Fault, Res};
use std::ops::Deref;

/// Executes one operation and, through [`OpPtr::next`] in tail position, the rest of its block.
///
/// Where the compiler makes the tail call a jump (optimised builds), dispatch costs one indirect jump at the end of
/// each handler. Where it does not, the stack grows by one frame an operation, bounded by the length of a block.
pub type Handler = fn(&mut Cpu, OpPtr) -> Next;

/// A decoded instruction. Registers are byte offsets into [`Cpu::regs`], so that AH is just offset 1.
///
/// Every block ends with an operation that does not continue: a branch, or the pseudo-operation that continues with
/// the next block. One more pseudo-operation follows a branch, so that [`OpPtr::next_off`] is always there.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Op {
    /// What runs it.
    pub handler: Handler,
    /// Immediate operand, sign-extended; relative branches: target as an offset from the start of the block.
    pub imm: u64,
    /// Displacement of the memory operand, sign-extended. RIP-relative: relative to the start of the block.
    pub disp: u64,
    /// First register operand.
    pub dst: u8,
    /// Second register operand.
    pub src: u8,
    /// Base register of the memory operand ([`crate::state::reg::ZERO`] if none, [`crate::state::reg::RIP`] if
    /// RIP-relative).
    pub base: u8,
    /// Index register of the memory operand ([`crate::state::reg::ZERO`] if none).
    pub index: u8,
    /// Scale of the index, as a shift: 0..=3.
    pub scale: u8,
    /// Segment of the memory operand (bits 0-2, encoding order), address size (bits 4-5: 0 = 16, 1 = 32, 2 = 64).
    pub ea: u8,
    /// Offset of the instruction from the start of the block.
    pub off: u16,
}

/// Address size in [`Op::ea`].
pub mod asize {
    /// 16 bits.
    pub const A16: u8 = 0;
    /// 32 bits.
    pub const A32: u8 = 1 << 4;
    /// 64 bits.
    pub const A64: u8 = 2 << 4;
}

impl Op {
    /// Segment of the memory operand.
    #[inline(always)]
    pub fn seg(&self) -> usize {
        (self.ea & 7) as usize
    }

    /// Address size as in [`asize`].
    #[inline(always)]
    pub fn asize(&self) -> u8 {
        self.ea & 0x30
    }
}

/// Points at an operation in a block that is kept alive by the run loop (also after the block was dropped).
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct OpPtr(*const Op);

impl Deref for OpPtr {
    type Target = Op;

    #[inline(always)]
    fn deref(&self) -> &Op {
        // SAFETY: pointers come from `OpPtr::new`, whose caller vouches for the block.
        unsafe { &*self.0 }
    }
}

impl OpPtr {
    /// Points at `op`.
    ///
    /// # Safety
    /// `op` is in the array of a block that outlives the execution of the block, and is followed by further
    /// operations up to and including one that does not continue.
    #[inline(always)]
    pub unsafe fn new(op: *const Op) -> Self {
        Self(op)
    }

    /// The address.
    #[inline(always)]
    pub fn as_ptr(self) -> *const Op {
        self.0
    }

    /// Runs the operation after this one. To be called in tail position.
    #[inline(always)]
    pub fn next(self, cpu: &mut Cpu) -> Next {
        // SAFETY: only operations that continue call this, and the invariant of `new` says that another follows.
        // The handler is read through the raw pointer since dropping a block replaces the handlers of all its
        // operations, also of those about to run.
        let next = unsafe { self.0.add(1) };
        // SAFETY: as above.
        let handler = unsafe { (*next).handler };
        handler(cpu, OpPtr(next))
    }

    /// Offset of the following instruction from the start of the block.
    #[inline(always)]
    pub fn next_off(self) -> u16 {
        // SAFETY: every operation that stands for an instruction is followed by another operation.
        unsafe { (*self.0.add(1)).off }
    }

    /// Ends an operation: continues with the next one, or leaves the block with the fault.
    #[inline(always)]
    pub fn finish(self, cpu: &mut Cpu, result: Res<()>) -> Next {
        match result {
            Ok(()) => self.next(cpu),
            Err(fault) => self.fault(cpu, fault),
        }
    }

    /// Leaves the block because this operation faulted.
    #[cold]
    #[inline(never)]
    pub fn fault(self, cpu: &mut Cpu, _fault: Fault) -> Next {
        cpu.rip = cpu.ip_at(self.off);
        cpu.fault_op = self.0;
        Next::FAULT
    }
}

/// What follows when a block returns to the run loop: a code, or the address of the next block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Next(pub usize);

impl Next {
    /// Look the next block up by [`Cpu::rip`].
    pub const LOOKUP: Next = Next(0);
    /// An exception is in [`Cpu::exception`]; [`Cpu::rip`] is that of the instruction.
    pub const FAULT: Next = Next(1);
    /// Something for the run loop to do is in [`Cpu::request`].
    pub const REQUEST: Next = Next(2);
    /// Smallest value that is an address.
    pub const LEAST_ADDRESS: usize = 4096;
}

impl OpPtr {
    /// Leaves the block because this operation, which had moved RIP on already, faulted. A trap leaves RIP there.
    #[cold]
    #[inline(never)]
    pub fn fault_ended(self, cpu: &mut Cpu, _fault: Fault) -> Next {
        if !cpu.exception.trap {
            cpu.rip = cpu.ip_at(self.off);
        }
        cpu.fault_op = self.0;
        Next::FAULT
    }
}
