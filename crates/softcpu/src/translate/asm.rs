//! A small emitter for the code around guest instructions. Guest instructions themselves go through iced's encoder.

use super::layout::gs_disp;

/// Host register numbers, as encoded.
#[allow(missing_docs)]
pub mod host {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RDI: u8 = 7;
    pub const R10: u8 = 10;
    pub const R15: u8 = 15;
}

/// A host memory operand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mem {
    /// Base register.
    pub base: Option<u8>,
    /// Index register (not RSP) and scale as a shift.
    pub index: Option<(u8, u8)>,
    /// Displacement.
    pub disp: i32,
}

impl Mem {
    /// `[base + disp]`.
    pub fn base(base: u8, disp: i32) -> Self {
        Self { base: Some(base), index: None, disp }
    }
}

/// Register or memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rm {
    /// A register.
    Reg(u8),
    /// Memory.
    Mem(Mem),
    /// State of the vCPU at an offset from its start ([`gs_disp`]).
    Gs(usize),
}

/// The arithmetic operations of opcodes 0x00 to 0x3f and group 1, by their number.
#[allow(missing_docs)]
pub mod op {
    pub const ADD: u8 = 0;
    pub const OR: u8 = 1;
    pub const AND: u8 = 4;
    pub const SUB: u8 = 5;
    pub const CMP: u8 = 7;
}

/// Condition codes, as encoded.
#[allow(missing_docs)]
pub mod cond {
    pub const B: u8 = 2;
    pub const AE: u8 = 3;
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const BE: u8 = 6;
    pub const A: u8 = 7;
}

/// A place in the code that will be bound later: positions of 32-bit relative offsets that lead to it, and of those that
/// lead to eight bytes after it.
#[derive(Debug, Default)]
pub struct Label(Vec<usize>, Vec<usize>);

/// Code under construction, for a known address.
#[derive(Debug, Default)]
pub struct Asm {
    /// The bytes.
    pub buf: Vec<u8>,
    /// Address of the first byte.
    pub base: u64,
}

impl Asm {
    /// Offset of the next byte.
    pub fn here(&self) -> usize {
        self.buf.len()
    }

    /// Appends bytes.
    pub fn bytes(&mut self, b: &[u8]) {
        self.buf.extend_from_slice(b);
    }

    fn imm32(&mut self, v: i32) {
        self.buf.extend_from_slice(&v.to_le_bytes());
    }

    /// An instruction with a ModRM operand. `imm` follows it as given.
    pub fn rm(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: Rm) {
        let mut rex = u8::from(wide) << 3 | (reg >> 3) << 2;
        match rm {
            Rm::Reg(r) => rex |= r >> 3,
            Rm::Mem(m) => rex |= m.base.unwrap_or(0) >> 3 | (m.index.map_or(0, |i| i.0) >> 3) << 1,
            Rm::Gs(_) => self.buf.push(0x65),
        }
        if rex != 0 {
            self.buf.push(0x40 | rex);
        }
        self.buf.extend_from_slice(opcode);
        let reg = (reg & 7) << 3;
        match rm {
            Rm::Reg(r) => self.buf.push(0xc0 | reg | r & 7),
            Rm::Gs(offset) => {
                self.buf.extend_from_slice(&[reg | 4, 0x25]);
                self.imm32(gs_disp(offset));
            }
            Rm::Mem(m) => self.mem(reg, m),
        }
    }

    fn mem(&mut self, reg: u8, m: Mem) {
        let Some(base) = m.base else {
            let (index, scale) = m.index.unwrap_or((host::RSP, 0));
            self.buf.extend_from_slice(&[reg | 4, scale << 6 | (index & 7) << 3 | 5]);
            return self.imm32(m.disp);
        };
        let sib = m.index.is_some() || base & 7 == host::RSP;
        let (mode, short) = match m.disp {
            0 if base & 7 != host::RBP => (0, true),
            d if i8::try_from(d).is_ok() => (0x40, true),
            _ => (0x80, false),
        };
        self.buf.push(mode | reg | if sib { 4 } else { base & 7 });
        if sib {
            let (index, scale) = m.index.unwrap_or((host::RSP, 0));
            self.buf.push(scale << 6 | (index & 7) << 3 | base & 7);
        }
        if !short {
            self.imm32(m.disp);
        } else if mode != 0 {
            self.buf.push(m.disp as u8);
        }
    }

    /// MOV r64, r/m64.
    pub fn load(&mut self, r: u8, from: Rm) {
        self.rm(true, &[0x8b], r, from);
    }

    /// MOV r32, r/m32.
    pub fn load32(&mut self, r: u8, from: Rm) {
        self.rm(false, &[0x8b], r, from);
    }

    /// MOV r/m64, r64.
    pub fn store(&mut self, to: Rm, r: u8) {
        self.rm(true, &[0x89], r, to);
    }

    /// MOV between 64-bit registers.
    pub fn mov(&mut self, to: u8, from: u8) {
        self.load(to, Rm::Reg(from));
    }

    /// MOV of a constant, the shortest way that leaves flags alone.
    pub fn mov_imm(&mut self, r: u8, v: u64) {
        if let Ok(v) = u32::try_from(v) {
            if r >= 8 {
                self.buf.push(0x41);
            }
            self.buf.push(0xb8 | r & 7);
            self.buf.extend_from_slice(&v.to_le_bytes());
        } else if let Ok(v) = i32::try_from(v as i64) {
            self.rm(true, &[0xc7], 0, Rm::Reg(r));
            self.imm32(v);
        } else {
            self.bytes(&[0x48 | r >> 3, 0xb8 | r & 7]);
            self.buf.extend_from_slice(&v.to_le_bytes());
        }
    }

    /// LEA r64.
    pub fn lea(&mut self, r: u8, m: Mem) {
        self.rm(true, &[0x8d], r, Rm::Mem(m));
    }

    /// `op r64, r/m64` ([`op`]).
    pub fn alu(&mut self, op: u8, r: u8, from: Rm) {
        self.rm(true, &[op << 3 | 3], r, from);
    }

    /// `op r/m64, imm`.
    pub fn alu_imm(&mut self, op: u8, wide: bool, to: Rm, v: i32) {
        if let Ok(b) = i8::try_from(v) {
            self.rm(wide, &[0x83], op, to);
            self.buf.push(b as u8);
        } else {
            self.rm(wide, &[0x81], op, to);
            self.imm32(v);
        }
    }

    /// `cmp byte [..], imm`.
    pub fn cmp8_imm(&mut self, m: Rm, v: u8) {
        self.rm(false, &[0x80], op::CMP, m);
        self.buf.push(v);
    }

    /// SHR r32, n.
    pub fn shr32(&mut self, r: u8, n: u8) {
        self.rm(false, &[0xc1], 5, Rm::Reg(r));
        self.buf.push(n);
    }

    /// SHL r64, n.
    pub fn shl64(&mut self, r: u8, n: u8) {
        self.rm(true, &[0xc1], 4, Rm::Reg(r));
        self.buf.push(n);
    }

    fn rel(&mut self, target: u64) {
        let next = self.base.wrapping_add(self.buf.len() as u64 + 4);
        // Everything lies in one arena of less than 2 GiB.
        self.imm32(target.wrapping_sub(next) as i32);
    }

    /// JMP to an address.
    pub fn jmp(&mut self, target: u64) {
        self.buf.push(0xe9);
        self.rel(target);
    }

    /// CALL of an address.
    pub fn call(&mut self, target: u64) {
        self.buf.push(0xe8);
        self.rel(target);
    }

    /// Jcc to an address.
    pub fn jcc(&mut self, cond: u8, target: u64) {
        self.bytes(&[0x0f, 0x80 | cond]);
        self.rel(target);
    }

    /// Jcc to a label.
    pub fn jcc_label(&mut self, cond: u8, label: &mut Label) {
        self.bytes(&[0x0f, 0x80 | cond]);
        label.0.push(self.here());
        self.imm32(0);
    }

    /// JMP to a label.
    pub fn jmp_label(&mut self, label: &mut Label) {
        self.buf.push(0xe9);
        label.0.push(self.here());
        self.imm32(0);
    }

    /// CALL of a label.
    pub fn call_label(&mut self, label: &mut Label) {
        self.buf.push(0xe8);
        label.0.push(self.here());
        self.imm32(0);
    }

    /// An instruction whose memory operand is the quadword at a label.
    pub fn rip_label(&mut self, wide: bool, opcode: &[u8], reg: u8, label: &mut Label) {
        if wide || reg >= 8 {
            self.buf.push(0x40 | u8::from(wide) << 3 | (reg >> 3) << 2);
        }
        self.buf.extend_from_slice(opcode);
        self.buf.push((reg & 7) << 3 | 5);
        label.0.push(self.here());
        self.imm32(0);
    }

    /// As [`Self::rip_label`], for the quadword after that at the label.
    pub fn rip_label_plus8(&mut self, opcode: &[u8], reg: u8, label: &mut Label) {
        self.buf.extend_from_slice(opcode);
        self.buf.push((reg & 7) << 3 | 5);
        label.1.push(self.here());
        self.imm32(0);
    }

    /// Binds a label here.
    pub fn bind(&mut self, label: &Label) {
        for at in &label.0 {
            let offset = (self.here() - at - 4) as i32;
            self.buf[*at..at + 4].copy_from_slice(&offset.to_le_bytes());
        }
        for at in &label.1 {
            let offset = (self.here() + 8 - at - 4) as i32;
            self.buf[*at..at + 4].copy_from_slice(&offset.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    fn text(a: &Asm) -> String {
        let mut out = Vec::new();
        let mut f = IntelFormatter::new();
        for i in Decoder::with_ip(64, &a.buf, a.base, DecoderOptions::NONE).iter() {
            let mut s = String::new();
            f.format(&i, &mut s);
            out.push(s);
        }
        out.join("; ")
    }

    #[test]
    fn every_base_and_index_encodes() {
        for base in 0..16 {
            for index in (0..16).filter(|i| *i != host::RSP) {
                for disp in [0, 5, -200] {
                    let mut a = Asm::default();
                    a.load(9, Rm::Mem(Mem { base: Some(base), index: Some((index, 2)), disp }));
                    let i = Decoder::new(64, &a.buf, DecoderOptions::NONE).decode();
                    assert_eq!(i.memory_base().number(), base as usize);
                    assert_eq!(i.memory_index().number(), index as usize);
                    assert_eq!(i.memory_displacement64() as i64, i64::from(disp));
                    assert_eq!(i.len(), a.buf.len());
                }
            }
        }
    }

    #[test]
    fn forms() {
        let mut a = Asm { base: 0x1000, ..Asm::default() };
        a.mov_imm(10, 5);
        a.mov_imm(3, u64::MAX);
        a.mov_imm(15, 0x1234_5678_9abc_def0);
        a.alu_imm(op::AND, true, Rm::Reg(0), -4096);
        a.shr32(1, 7);
        a.alu(op::CMP, 0, Rm::Mem(Mem::base(1, 8)));
        let mut l = Label::default();
        a.jcc_label(cond::NE, &mut l);
        a.jmp(0x1000);
        a.bind(&l);
        a.cmp8_imm(Rm::Mem(Mem::base(12, 0)), 1);
        let t = text(&a);
        assert!(t.starts_with("mov r10d,5; mov rbx,0FFFFFFFFFFFFFFFFh; mov r15,123456789ABCDEF0h; and rax,0FFFFFFFFFFFFF000h; shr ecx,7; cmp rax,[rcx+8]; jne 0000000000001030h; jmp"), "{t}");
        assert!(t.ends_with("jmp 0000000000001000h; cmp byte ptr [r12],1"), "{t}");
    }
}
