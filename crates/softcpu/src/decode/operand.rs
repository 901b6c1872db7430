//! Operands of decoded instructions.

use crate::native::Arena;
use crate::op::{Handler, Op, asize};
use crate::state::{Mode, reg};
use iced_x86::{Instruction, OpKind, Register};

/// What lowering an instruction depends on, beside the instruction.
#[derive(Debug)]
pub struct Ctx<'a> {
    /// Mode of the code.
    pub mode: Mode,
    /// Instruction pointer at the start of the block, as decoded.
    pub rip: u64,
    /// Offset of the block in its page.
    pub page_offset: u32,
    /// Offset of the end of the instruction from the start of the block.
    pub end: u16,
    /// Where thunks go.
    pub arena: &'a Arena,
}

impl Ctx<'_> {
    /// Whether a branch to an offset from the start of the block stays in the page, and may be linked.
    pub fn linkable(&self, offset: u64) -> bool {
        !self.mode.intersects(Mode::STEP | Mode::LIMITED)
            && (self.page_offset as u64).wrapping_add(offset) < 4096
    }

    /// Handler that continues behind the last instruction.
    pub fn fallthrough(&self) -> Handler {
        if self.linkable(self.end as u64) {
            crate::interp::fallthrough
        } else {
            crate::interp::fallthrough_far
        }
    }

    /// Whether memory operands of the instruction need no segment arithmetic at all.
    pub fn flat(&self, op: &Op) -> bool {
        self.mode.is64() && op.asize() == asize::A64 && op.seg() < crate::state::seg::FS
    }
}

/// Byte offset of a general register in the register file.
pub fn gpr(r: Register) -> u8 {
    match r {
        Register::AH | Register::CH | Register::DH | Register::BH => (r as u8 - Register::AH as u8) * 8 + 1,
        _ if r.is_gpr() => r.full_register().number() as u8 * 8,
        _ => reg::ZERO,
    }
}

/// Number of a segment register; `None` if it is none.
pub fn segment(r: Register) -> Option<u8> {
    r.is_segment_register().then(|| r.number() as u8)
}

/// Fills in the memory operand.
pub fn memory(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) {
    let (base, index) = (i.memory_base(), i.memory_index());
    let size = match base.size().max(if index.is_gpr() { index.size() } else { 0 }) {
        0 => i.memory_displ_size() as usize,
        n => n,
    };
    let asize = match size {
        8 => asize::A64,
        4 => asize::A32,
        2 => asize::A16,
        // A lone vector index or nothing: the mode's own.
        _ if ctx.mode.is64() => asize::A64,
        _ if ctx.mode.contains(Mode::CODE32) => asize::A32,
        _ => asize::A16,
    };
    op.ea = segment(i.memory_segment()).unwrap_or(crate::state::seg::DS as u8) | asize;
    op.disp = i.memory_displacement64();
    match base {
        Register::RIP | Register::EIP => {
            op.base = reg::RIP;
            op.disp = op.disp.wrapping_sub(ctx.rip);
        }
        Register::None => op.base = reg::ZERO,
        r => op.base = gpr(r),
    }
    op.index = if index.is_gpr() { gpr(index) } else { reg::ZERO };
    op.scale = i.memory_index_scale().trailing_zeros() as u8;
}

/// Operand as far as lowering cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// General register.
    Reg,
    /// Memory.
    Mem,
    /// Immediate.
    Imm,
    /// Anything else.
    Other,
}

/// Kind of operand `n`.
pub fn kind(i: &Instruction, n: u32) -> Kind {
    if n >= i.op_count() {
        return Kind::Other;
    }
    match i.op_kind(n) {
        OpKind::Register if i.op_register(n).is_gpr() => Kind::Reg,
        OpKind::Memory => Kind::Mem,
        OpKind::Immediate8
        | OpKind::Immediate8_2nd
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Kind::Imm,
        _ => Kind::Other,
    }
}

/// Size of operand `n` (register or memory) in bytes.
pub fn size(i: &Instruction, n: u32) -> usize {
    match i.op_kind(n) {
        OpKind::Register => i.op_register(n).size(),
        _ => i.memory_size().size(),
    }
}

/// Fills register `n` into `dst`.
pub fn dst(i: &Instruction, n: u32, op: &mut Op) {
    op.dst = gpr(i.op_register(n));
}

/// Fills register `n` into `src`.
pub fn src(i: &Instruction, n: u32, op: &mut Op) {
    op.src = gpr(i.op_register(n));
}

/// Immediate operand `n`, sign-extended.
pub fn imm(i: &Instruction, n: u32) -> u64 {
    match i.op_kind(n) {
        OpKind::Immediate8 | OpKind::Immediate8_2nd => i.immediate(n) as i8 as i64 as u64,
        OpKind::Immediate16 => i.immediate(n) as i16 as i64 as u64,
        OpKind::Immediate32 => i.immediate(n) as i32 as i64 as u64,
        _ => i.immediate(n),
    }
}

/// Address size of instructions with implied memory operands (strings, XLAT, MASKMOV), with the segment of the source.
pub fn implied(i: &Instruction, op: &mut Op) {
    let mut size = asize::A64;
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => size = asize::A16,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => size = asize::A32,
            _ => {}
        }
    }
    let s = segment(i.memory_segment()).unwrap_or(crate::state::seg::DS as u8);
    op.ea = s | size;
}
