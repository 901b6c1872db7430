//! x87, MMX, SSE, AVX and their kin, executed by the host's own instructions.
//!
//! The guest's instructions are the host's instructions, so the host does the arithmetic: [`lower`] makes, for each
//! decoded instruction, a small function (a *thunk*, see `emit`) around the very same instruction, and the handlers here
//! call it on the guest's registers. What a thunk must not decide is done around it: whether the unit may be used, where
//! memory is, whether a store may happen, exceptions. Guest bytes are never executed: a thunk's instruction is encoded
//! afresh from its decoded form, with registers and memory operand of our choice.
//!
//! * `features`: what the host has of all that.
//! * `recipe`: facts about an instruction; `emit`: its thunk; `arena`: where thunks live.
//! * `check`: #UD, #NM, #MF, and getting the host's units ready.
//! * `run`: handlers that call thunks; `unmasked`: the slow way when an exception may have to be delivered.
//! * `special`, `masked`: instructions with code of their own.

mod arena;
mod check;
mod emit;
pub mod features;
mod masked;
pub mod recipe;
mod run;
mod special;
mod unmasked;

pub use arena::Arena;
pub use special::Special;

use crate::op::{Op, asize};
use crate::state::{Mode, seg};
use emit::Entry;
use iced_x86::{Instruction, OpKind, Register};
use recipe::{Class, MemAccess, Recipe};

/// Code in the arena. Equal thunks have one address, so the address tells them apart.
#[derive(Clone, Copy, Debug)]
struct Code(Entry);

impl PartialEq for Code {
    fn eq(&self, other: &Self) -> bool {
        self.0 as usize == other.0 as usize
    }
}

impl Eq for Code {}

impl std::hash::Hash for Code {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (self.0 as usize).hash(state);
    }
}

/// What the handlers know about an instruction, beside the operation itself. One exists for each distinct thunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Thunk {
    /// The code; absent for special instructions.
    entry: Option<Code>,
    /// Dedicated code.
    special: Option<Special>,
    /// Flags it writes, as in [`crate::Cpu::cc`].
    cc: u16,
    /// Size of the memory operand.
    size: u16,
    /// Alignment that it must have.
    align: u8,
    /// The host may insist on alignment where the guest does not.
    host_aligned: bool,
    /// Unit.
    class: Class,
    /// Memory operand.
    access: MemAccess,
    /// Uses x87 or MMX registers.
    x87: bool,
    /// Records FOP, FIP and FDP.
    records: bool,
    /// Reads flags.
    reads_flags: bool,
}

/// Mask within [`crate::Cpu::cc`] of RFLAGS bits.
fn cc_mask(rflags: u32) -> u16 {
    ((rflags & 0xd5) << 8) as u16 | (rflags >> 11 & 1) as u16
}

/// Makes `op` execute the instruction `i`, decoded from `bytes` in `mode`. Its memory operand ([`Op::base`] and the
/// rest) has been filled in as for any instruction, except that a vector index counts as none. Returns `false`, with
/// `op` untouched, if the instruction is not one of these units, or one that the software CPU does not offer (#UD).
pub fn lower(i: &Instruction, bytes: &[u8], mode: Mode, arena: &Arena, op: &mut Op) -> bool {
    let Some(recipe) = recipe::recipe(i) else { return false };
    if recipe.vex && mode.contains(Mode::REAL) {
        return false;
    }
    let Some((entry, slots)) = code(i, &recipe, arena) else { return false };
    let Recipe { class, special, access, size, align, host_aligned, x87, records, reads_flags, .. } = recipe;
    let cc = cc_mask(recipe.writes_flags);
    let thunk =
        Thunk { entry, special, cc, size, align, host_aligned, class, access, x87, records, reads_flags };
    let flat = mode.is64() && op.asize() == asize::A64 && op.seg() < seg::FS;
    op.handler = run::handler(&thunk, flat);
    let thunk = arena.intern(thunk) as u64;
    if records {
        // No register slots in x87 instructions, but an opcode to be recorded.
        let fop = x87_opcode(bytes);
        (op.dst, op.src, op.imm) = (fop as u8, (fop >> 8) as u8, thunk);
    } else {
        (op.dst, op.src, op.imm) = (slots[0], slots[1], thunk | u64::from(slots[2]) << 56);
    }
    if let OpKind::MemorySegRDI | OpKind::MemorySegEDI | OpKind::MemorySegDI = i.op0_kind() {
        op.base = crate::state::reg::RDI;
    }
    true
}

/// A thunk's entry if it needs one, and the register slots.
fn code(i: &Instruction, recipe: &Recipe, arena: &Arena) -> Option<(Option<Code>, emit::Slots)> {
    if recipe.special.is_some() {
        let mut slots = [0; 3];
        let registers =
            (0..i.op_count()).filter(|k| i.op_kind(*k) == OpKind::Register).map(|k| i.op_register(k));
        // A gather's index comes last: it stands in the memory operand.
        let index = Some(i.memory_index()).filter(|r| r.is_vector_register());
        let registers = registers.chain(index).filter(|r| *r != Register::None);
        for (slot, r) in slots.iter_mut().zip(registers) {
            *slot = recipe::number(r.full_register()) as u8 * 8;
        }
        return Some((None, slots));
    }
    let (bytes, slots) = emit::emit(i, recipe)?;
    Some((arena.install(&bytes).map(Code), slots))
}

/// The 11 bits of an x87 opcode that FOP holds.
fn x87_opcode(bytes: &[u8]) -> u16 {
    let at = bytes.iter().position(|b| (0xd8..=0xdf).contains(b));
    match at.and_then(|at| bytes.get(at..at + 2)) {
        Some([opcode, modrm]) => u16::from(opcode & 7) << 8 | u16::from(*modrm),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Code as Iced, Decoder, DecoderOptions, EncodingKind, Register};

    #[test]
    fn x87_opcodes_are_found_behind_prefixes() {
        assert_eq!(x87_opcode(&[0xd8, 0xc1]), 0x0c1);
        assert_eq!(x87_opcode(&[0x65, 0x41, 0xdd, 0x40, 0xd9]), 0x540);
    }

    /// Everything of these units that the host has can be lowered: nothing that CPUID promises is forgotten.
    #[test]
    fn every_code_has_a_thunk() {
        let host = features::Host::get();
        let mut missing = Vec::new();
        for code in Iced::values() {
            let kinds = code.op_code().op_kinds();
            let names = format!("{kinds:?}");
            let ours = ["xmm", "ymm", "mm_", "st0", "sti"].iter().any(|n| names.contains(n));
            let encoded = matches!(code.op_code().encoding(), EncodingKind::Legacy | EncodingKind::VEX);
            let offered = code.cpuid_features().iter().all(|f| host.offers(*f));
            if !ours || !encoded || !offered || names.contains("zmm") || names.contains("tmm") {
                continue;
            }
            let lowered = [false, true].map(|memory| lowers(code, memory));
            if lowered != [true; 2] {
                missing.push(code);
            }
        }
        assert!(missing.is_empty(), "no thunk for {missing:?}");
        // The test itself looks at what it means to.
        let i = Decoder::new(64, &[0x0f, 0x58, 0xc1], DecoderOptions::NONE).decode();
        assert!(recipe::recipe(&i).is_some());
    }

    /// Whether an instruction can be lowered, with memory where there may be some, or with registers.
    fn lowers(code: Iced, memory: bool) -> bool {
        let kinds = code.op_code().op_kinds();
        let mut i = Instruction::new();
        i.set_code(code);
        for (n, k) in kinds.iter().enumerate() {
            let name = format!("{k:?}");
            let register = match () {
                () if memory && name.ends_with("_or_mem") => Register::None,
                () if name.starts_with("xmm") => Register::XMM5,
                () if name.starts_with("ymm") => Register::YMM5,
                () if name.starts_with("mm_") => Register::MM5,
                () if name.starts_with("st") => Register::ST0,
                () if name.starts_with("r64") => Register::RBX,
                () if name.starts_with("r32") => Register::EBX,
                () => Register::None,
            };
            if register != Register::None {
                i.set_op_register(n as u32, register);
            } else if name.starts_with("imm") {
                i.set_op_kind(n as u32, OpKind::Immediate8);
            } else if name.starts_with("seg_rDI") {
                i.set_op_kind(n as u32, OpKind::MemorySegRDI);
            } else {
                i.set_op_kind(n as u32, OpKind::Memory);
                i.set_memory_base(Register::RBX);
                if name.contains("vsib") {
                    i.set_memory_index(if name.ends_with('y') { Register::YMM6 } else { Register::XMM6 });
                }
            }
        }
        recipe::recipe(&i).is_some_and(|r| r.special.is_some() || emit::emit(&i, &r).is_some())
    }
}
