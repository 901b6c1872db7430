//! From an instruction to its thunk: a function that loads the registers which the instruction reads from their slots,
//! performs it on registers of our choice, and stores what it wrote.
//!
//! A thunk does not know which guest registers it serves. It is called with the addresses of their slots, so one thunk
//! serves every register combination of an instruction, and the number of thunks is bounded by the instruction set.

use super::recipe::{MemAccess, Recipe, implicit, number};
use iced_x86::{CodeSize, Encoder, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};

/// A thunk's signature: addresses of up to four register slots (in RDI, RSI, RDX, RCX), of the memory operand (R8), and
/// of general register 0 (R9). For instructions that read flags the fourth argument is the flags' low byte. The result
/// holds the flags that the instruction left: bits 8 to 15 as LAHF stores them, bit 0 OF.
pub type Entry = unsafe extern "sysv64" fn(*mut u8, *mut u8, *mut u8, *mut u8, *mut u8, *mut u64) -> u64;

/// Which guest register a thunk's argument points to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Slot {
    /// None: the thunk ignores the argument.
    #[default]
    Unused,
    /// A vector register.
    Vector(u8),
    /// A general register.
    General(u8),
}

/// ModRM r/m codes of the registers that hold the slots' addresses.
const POINTER: [u8; 4] = [7, 6, 2, 1];
/// Host registers for general operands, by slot.
const GENERAL: [Register; 3] = [Register::RAX, Register::R10, Register::R11];

/// Bytes and slots of an instruction's thunk. `None` if the instruction does not fit the scheme.
pub fn emit(i: &Instruction, recipe: &Recipe) -> Option<(Vec<u8>, [Slot; 4])> {
    let hidden = implicit(i);
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(i);
    let mut body = *i;
    let mut slots = [Slot::Unused; 4];
    let mut used = 0;
    let (mut loads, mut stores) = (Vec::new(), Vec::new());
    for k in 0..i.op_count() {
        match i.op_kind(k) {
            OpKind::Register => {}
            OpKind::Memory => continue,
            OpKind::Immediate8 | OpKind::Immediate8_2nd => continue,
            _ => return None,
        }
        let r = i.op_register(k);
        if r.is_mm() || r.is_st() {
            continue;
        }
        let access = info.op_access(k);
        let writes =
            matches!(access, OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite);
        let reads = !matches!(access, OpAccess::Write);
        if used >= 4 {
            return None;
        }
        let at = used;
        used += 1;
        if r.is_vector_register() {
            slots[at] = Slot::Vector(number(r) as u8);
            let ours = at as u32 + 1;
            body.set_op_register(k, if r.is_ymm() { Register::YMM0 } else { Register::XMM0 } + ours);
            // Legacy encodings merge with what the register held.
            if reads || !recipe.vex {
                load_vector(&mut loads, ours as u8, POINTER[at], recipe.vex, r.is_ymm());
            }
            if writes {
                store_vector(&mut stores, ours as u8, POINTER[at], recipe.vex);
            }
        } else {
            let full = *GENERAL.get(at)?;
            slots[at] = Slot::General(number(r.full_register()) as u8);
            let ours = match r.size() {
                8 => full,
                4 => full.full_register32(),
                _ => return None,
            };
            body.set_op_register(k, ours);
            if reads {
                move_general(&mut loads, 0x8b, full, POINTER[at]);
            }
            if writes {
                move_general(&mut stores, 0x89, full, POINTER[at]);
            }
        }
    }
    if hidden.reads_xmm0 || hidden.writes_xmm0 {
        if used > 3 {
            return None;
        }
        slots[3] = Slot::Vector(0);
    }
    if hidden.reads_xmm0 {
        load_vector(&mut loads, 0, POINTER[3], recipe.vex, false);
    }
    if hidden.writes_xmm0 {
        store_vector(&mut stores, 0, POINTER[3], recipe.vex);
    }
    if hidden.reads_lengths {
        loads.extend([0x49, 0x8b, 0x01]); // mov rax, [r9]
        loads.extend([0x49, 0x8b, 0x51, 0x10]); // mov rdx, [r9 + 16]
    }
    if hidden.writes_rcx {
        stores.extend([0x49, 0x89, 0x49, 0x08]); // mov [r9 + 8], rcx
    }
    if recipe.reads_flags {
        if used > 3 {
            return None;
        }
        loads.extend([0x89, 0xc8, 0x88, 0xc4, 0x9e]); // mov eax, ecx; mov ah, al; sahf
    }
    if recipe.access != MemAccess::None {
        point_memory_at(&mut body, Register::R8);
    }
    body.set_code_size(CodeSize::Code64);
    body.set_has_rep_prefix(false);
    body.set_has_repne_prefix(false);
    body.set_has_lock_prefix(false);
    let mut encoder = Encoder::new(64);
    encoder.encode(&body, 0).ok()?;
    let mut code = loads;
    code.extend(encoder.take_buffer());
    if recipe.writes_flags != 0 {
        code.extend([0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
    }
    code.extend(stores);
    if recipe.wide {
        code.extend([0xc5, 0xf8, 0x77]); // vzeroupper
    }
    code.push(0xc3);
    Some((code, slots))
}

/// Makes `[base]` the memory operand.
fn point_memory_at(i: &mut Instruction, base: Register) {
    i.set_segment_prefix(Register::None);
    i.set_memory_base(base);
    i.set_memory_index(Register::None);
    i.set_memory_index_scale(1);
    i.set_memory_displacement64(0);
    i.set_memory_displ_size(0);
}

fn modrm(reg: u8, pointer: u8) -> u8 {
    reg << 3 | pointer
}

fn load_vector(out: &mut Vec<u8>, reg: u8, pointer: u8, vex: bool, wide: bool) {
    if vex {
        out.extend([0xc5, if wide { 0xfc } else { 0xf8 }, 0x28, modrm(reg, pointer)]); // vmovaps
    } else {
        out.extend([0x0f, 0x28, modrm(reg, pointer)]); // movaps
    }
}

/// VEX instructions zero what they do not write up to the register's end, so they store a whole YMM register.
fn store_vector(out: &mut Vec<u8>, reg: u8, pointer: u8, vex: bool) {
    if vex {
        out.extend([0xc5, 0xfc, 0x29, modrm(reg, pointer)]);
    } else {
        out.extend([0x0f, 0x29, modrm(reg, pointer)]);
    }
}

/// MOV between a full general register and memory.
fn move_general(out: &mut Vec<u8>, opcode: u8, r: Register, pointer: u8) {
    let n = r.number() as u8;
    out.extend([0x48 | (n >> 3) << 2, opcode, modrm(n & 7, pointer)]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::native::recipe::recipe;
    use iced_x86::{Decoder, DecoderOptions};

    fn thunk(bytes: &[u8]) -> (Vec<u8>, [Slot; 4]) {
        let i = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        emit(&i, &recipe(&i).unwrap()).unwrap()
    }

    #[test]
    fn register_numbers_do_not_matter() {
        let (a, slots) = thunk(&[0x45, 0x0f, 0x58, 0xfe]); // addps xmm15, xmm14
        assert_eq!(slots[..2], [Slot::Vector(15), Slot::Vector(14)]);
        let (b, _) = thunk(&[0x0f, 0x58, 0xc0]); // addps xmm0, xmm0
        assert_eq!(a, b);
        assert_eq!(a, [0x0f, 0x28, 0x0f, 0x0f, 0x28, 0x16, 0x0f, 0x58, 0xca, 0x0f, 0x29, 0x0f, 0xc3]);
    }

    #[test]
    fn memory_operands_are_redirected() {
        let (code, slots) = thunk(&[0x64, 0x66, 0x0f, 0xef, 0x44, 0x8b, 0x10]); // pxor xmm0, fs:[rbx + rcx*4 + 16]
        assert_eq!(slots, [Slot::Vector(0), Slot::Unused, Slot::Unused, Slot::Unused]);
        assert_eq!(code, [0x0f, 0x28, 0x0f, 0x66, 0x41, 0x0f, 0xef, 0x08, 0x0f, 0x29, 0x0f, 0xc3]);
    }

    #[test]
    fn flags_are_returned() {
        let (code, _) = thunk(&[0x0f, 0x2e, 0xc1]); // ucomiss xmm0, xmm1
        assert!(code.ends_with(&[0x0f, 0x2e, 0xca, 0x9f, 0x0f, 0x90, 0xc0, 0xc3]), "{code:x?}");
    }
}
