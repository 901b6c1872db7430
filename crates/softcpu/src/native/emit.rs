//! From an instruction to its thunk: a function that loads the registers which the instruction reads from the CPU,
//! performs it on registers of our choice, and stores what it wrote.
//!
//! A thunk does not know which guest registers it serves. It is called with their numbers, so one thunk serves every
//! register combination of an instruction, and the number of thunks is bounded by the instruction set.

use super::recipe::{MemAccess, Recipe, implicit, number};
use crate::Cpu;
use crate::fpu::Fpu;
use iced_x86::{CodeSize, Encoder, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};
use std::mem::offset_of;

/// A thunk's signature: the CPU (RDI), up to three register numbers times eight (RSI, RDX, RCX), and the address of the
/// memory operand (R8). Instructions that read flags get their low byte in the second argument. The result holds the
/// flags that the instruction left, if it writes any: bits 8 to 15 as LAHF stores them, bit 0 OF.
pub type Entry = unsafe extern "sysv64" fn(*mut Cpu, u64, u64, u64, *mut u8) -> u64;

/// Register numbers, times eight, that a thunk is to be called with.
pub type Slots = [u8; 3];

/// Codes of the host registers that hold the register numbers.
const INDEX: [u8; 3] = [6, 2, 1];
/// Host registers for general operands, by slot.
const GENERAL: [Register; 3] = [Register::RAX, Register::R10, Register::R11];
/// Offset of the guest's vector registers in the CPU.
const VECTORS: u32 = (offset_of!(Cpu, fpu) + offset_of!(Fpu, vec)) as u32;
/// Offset of the guest's general registers in the CPU.
const GENERALS: u32 = offset_of!(Cpu, regs) as u32;

/// Where a thunk finds a guest register.
#[derive(Clone, Copy)]
enum Place {
    /// Its number is in an argument.
    Slot(usize),
    /// Its number is known to the thunk.
    Fixed(u16),
}

/// Bytes and slots of an instruction's thunk. `None` if the instruction does not fit the scheme.
pub fn emit(i: &Instruction, recipe: &Recipe) -> Option<(Vec<u8>, Slots)> {
    let hidden = implicit(i);
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(i);
    let mut body = *i;
    let mut slots = [0; 3];
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
        let writes = matches!(
            access,
            OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite
        );
        let reads = !matches!(access, OpAccess::Write);
        let at = used;
        used += 1;
        // Only a fourth register operand (there is just the selector of the variable blends) is part of the thunk.
        let place = if at < slots.len() { Place::Slot(at) } else { Place::Fixed(number(r)) };
        if let Place::Slot(at) = place {
            slots[at] = number(r.full_register()) as u8 * 8;
        }
        if r.is_vector_register() {
            let ours = at as u8 + 1;
            body.set_op_register(
                k,
                if r.is_ymm() { Register::YMM0 } else { Register::XMM0 } + u32::from(ours),
            );
            // Legacy encodings merge with what the register held.
            if reads || !recipe.vex {
                load_vector(&mut loads, ours, place, recipe.vex, r.is_ymm());
            }
            if writes {
                store_vector(&mut stores, ours, place, recipe.vex);
            }
        } else {
            let full = *GENERAL.get(at)?;
            let ours = match r.size() {
                8 => full,
                4 => full.full_register32(),
                _ => return None,
            };
            body.set_op_register(k, ours);
            if reads {
                move_general(&mut loads, 0x8b, full, place);
            }
            if writes {
                move_general(&mut stores, 0x89, full, place);
            }
        }
    }
    if hidden.reads_xmm0 {
        load_vector(&mut loads, 0, Place::Fixed(0), recipe.vex, false);
    }
    if hidden.writes_xmm0 {
        store_vector(&mut stores, 0, Place::Fixed(0), recipe.vex);
    }
    if hidden.reads_lengths {
        // RDX held a register number that all loads before this have used, and no store needs.
        move_general(&mut loads, 0x8b, Register::RAX, Place::Fixed(0));
        move_general(&mut loads, 0x8b, Register::RDX, Place::Fixed(2));
    }
    if hidden.writes_rcx {
        move_general(&mut stores, 0x89, Register::RCX, Place::Fixed(1));
    }
    if recipe.reads_flags {
        if used != 0 {
            return None;
        }
        loads.extend([0x89, 0xf0, 0x88, 0xc4, 0x9e]); // mov eax, esi; mov ah, al; sahf
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

/// ModRM, SIB and displacement of a guest register: `base` is the offset of register 0 in the CPU, 1 << `shift` the size
/// of a register in units of eight bytes.
fn place(out: &mut Vec<u8>, reg: u8, at: Place, base: u32, shift: u8) {
    match at {
        Place::Slot(n) => {
            out.extend([0x84 | reg << 3, shift << 6 | INDEX[n] << 3 | 7]); // [rdi + index * scale + disp32]
            out.extend(base.to_le_bytes());
        }
        Place::Fixed(n) => {
            out.push(0x87 | reg << 3); // [rdi + disp32]
            out.extend((base + ((u32::from(n) * 8) << shift)).to_le_bytes());
        }
    }
}

fn load_vector(out: &mut Vec<u8>, reg: u8, at: Place, vex: bool, wide: bool) {
    if vex {
        out.extend([0xc5, if wide { 0xfc } else { 0xf8 }, 0x28]); // vmovaps
    } else {
        out.extend([0x0f, 0x28]); // movaps
    }
    place(out, reg, at, VECTORS, 3);
}

/// VEX instructions zero what they do not write up to the register's end, so they store a whole YMM register.
fn store_vector(out: &mut Vec<u8>, reg: u8, at: Place, vex: bool) {
    if vex {
        out.extend([0xc5, 0xfc, 0x29]);
    } else {
        out.extend([0x0f, 0x29]);
    }
    place(out, reg, at, VECTORS, 3);
}

/// MOV between a full general register and a guest's.
fn move_general(out: &mut Vec<u8>, opcode: u8, r: Register, at: Place) {
    let n = r.number() as u8;
    out.extend([0x48 | (n >> 3) << 2, opcode]);
    place(out, n & 7, at, GENERALS, 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::native::recipe::recipe;
    use iced_x86::{Decoder, DecoderOptions};

    fn thunk(bytes: &[u8]) -> (Vec<u8>, Slots) {
        let i = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        emit(&i, &recipe(&i).unwrap()).unwrap()
    }

    #[test]
    fn register_numbers_do_not_matter() {
        let (a, slots) = thunk(&[0x45, 0x0f, 0x58, 0xfe]); // addps xmm15, xmm14
        assert_eq!(slots, [120, 112, 0]);
        let (b, _) = thunk(&[0x0f, 0x58, 0xc0]); // addps xmm0, xmm0
        assert_eq!(a, b);
        let d = VECTORS.to_le_bytes();
        let mut expected = vec![0x0f, 0x28, 0x8c, 0xf7]; // movaps xmm1, [rdi + rsi*8 + d]
        expected.extend(d);
        expected.extend([0x0f, 0x28, 0x94, 0xd7]); // movaps xmm2, [rdi + rdx*8 + d]
        expected.extend(d);
        expected.extend([0x0f, 0x58, 0xca, 0x0f, 0x29, 0x8c, 0xf7]); // addps xmm1, xmm2; movaps [rdi + rsi*8 + d], xmm1
        expected.extend(d);
        expected.push(0xc3);
        assert_eq!(a, expected);
    }

    #[test]
    fn memory_operands_are_redirected() {
        let (code, slots) = thunk(&[0x64, 0x66, 0x0f, 0xef, 0x44, 0x8b, 0x10]); // pxor xmm0, fs:[rbx + rcx*4 + 16]
        assert_eq!(slots, [0; 3]);
        assert_eq!(code[8..13], [0x66, 0x41, 0x0f, 0xef, 0x08]); // pxor xmm1, [r8]
    }

    #[test]
    fn flags_are_returned() {
        let (code, _) = thunk(&[0x0f, 0x2e, 0xc1]); // ucomiss xmm0, xmm1
        assert!(code.ends_with(&[0x0f, 0x2e, 0xca, 0x9f, 0x0f, 0x90, 0xc0, 0xc3]), "{code:x?}");
    }
}
