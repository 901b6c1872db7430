//! Random cases: for each instruction, operands of every form, registers and memory with values worth trying.

use crate::case::*;
use crate::rng::Rng;
use iced_x86::{Code, Encoder, Instruction, Mnemonic, OpCodeOperandKind as K, OpKind, Register};

const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;
const RBP: usize = 5;
const RSI: usize = 6;
const RDI: usize = 7;

/// Flags that POPF may load without making the rest of the case, or the child process, something else.
const POPF: u64 = 0x0cd5;

/// Makes cases of the given instructions.
pub struct Generator<'a> {
    rng: Rng,
    codes: &'a [Code],
    patterns: &'a Patterns,
}

/// A case in the making.
struct Draft<'a> {
    rng: &'a mut Rng,
    case: Case,
    patterns: &'a Patterns,
    /// General registers whose values have been chosen for a purpose.
    pinned: u16,
}

impl<'a> Generator<'a> {
    pub fn new(seed: u64, codes: &'a [Code], patterns: &'a Patterns) -> Self {
        Self { rng: Rng::new(seed), codes, patterns }
    }

    /// The next case.
    pub fn case(&mut self) -> Case {
        loop {
            if let Some(case) = self.attempt() {
                return case;
            }
        }
    }

    /// A case, unless the draw was an impossible combination.
    pub fn attempt(&mut self) -> Option<Case> {
        let count = if self.rng.chance(25) { 2 + self.rng.below(3) } else { 1 };
        let codes: Vec<Code> = (0..count).map(|_| self.rng.pick(self.codes)).collect();
        let mut draft = Draft { case: Case::new(), patterns: self.patterns, pinned: 0, rng: &mut self.rng };
        draft.registers();
        let mut undefined = 0u32;
        for (n, code) in codes.iter().enumerate() {
            let last = n + 1 == codes.len();
            let at = draft.case.code_len as usize;
            let ip = CODE + u64::from(draft.case.entry) + at as u64;
            let (i, bytes) = draft.instruction(*code, ip)?;
            // What may differ must not be read by what follows.
            let compared = last || draft.case.ignore[0].1 == 0;
            if !compared || at + bytes.len() > CODE_MAX || !last && may_leave_undefined(&i) || flags(i.rflags_read()) & undefined != 0 {
                return None;
            }
            if i.is_vsib() {
                // Some processors let a single-step trap in between two elements.
                draft.case.regs.rflags &= !0x100;
            }
            draft.case.code[at..at + bytes.len()].copy_from_slice(&bytes);
            draft.case.code_len += bytes.len() as u32;
            let settled = flags(i.rflags_written() | i.rflags_cleared() | i.rflags_set());
            if !writes_flags_conditionally(&i) {
                undefined &= !settled;
            }
            undefined |= flags(i.rflags_undefined());
            draft.case.undefined |= undefined;
        }
        if draft.rng.chance(2) && draft.case.ignore[0].1 == 0 {
            // At the end of the page: what follows cannot be fetched; or not even the instruction can, whole.
            let cut = draft.rng.below(u64::from(draft.case.code_len)) as u32;
            let cut = if draft.rng.chance(50) { 0 } else { cut };
            draft.case.entry = 4096 - draft.case.code_len + cut;
            draft.case.code_len -= cut;
            draft.case.regs.rip = CODE + u64::from(draft.case.entry);
        }
        Some(draft.case)
    }
}

/// Maps iced's flag bits to RFLAGS.
fn flags(bits: u32) -> u32 {
    use iced_x86::RflagsBits as F;
    [(F::CF, 0), (F::PF, 2), (F::AF, 4), (F::ZF, 6), (F::SF, 7), (F::DF, 10), (F::OF, 11)]
        .iter()
        .fold(0, |sum, (theirs, bit)| if bits & theirs != 0 { sum | 1 << bit } else { sum })
}

/// Whether a result other than flags may be undefined.
fn may_leave_undefined(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr | Mnemonic::Shld | Mnemonic::Shrd)
}

/// Whether the flags may stay as they are.
fn writes_flags_conditionally(i: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        i.mnemonic(),
        Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd | Cmpsb | Cmpsw | Cmpsd | Cmpsq | Scasb | Scasw | Scasd | Scasq
    )
}

impl Draft<'_> {
    /// Random registers.
    fn registers(&mut self) {
        let rng = &mut *self.rng;
        let c = &mut self.case;
        let r = &mut c.regs;
        for g in &mut r.gpr {
            *g = rng.integer();
        }
        r.rflags = 0x202 | rng.next() & 0x8d5;
        if rng.chance(15) {
            r.rflags |= 0x400;
        }
        if rng.chance(1) {
            r.rflags |= 0x100;
        }
        for v in &mut r.vec {
            *v = rng.vector();
        }
        for st in &mut r.st {
            *st = rng.extended();
        }
        r.mxcsr = 0x1f80;
        if rng.chance(40) {
            r.mxcsr |= rng.next() as u32 & 0xe07f;
        }
        if rng.chance(10) {
            r.mxcsr &= !(rng.next() as u32 & 0x1f80);
        }
        r.fcw = 0x37f;
        if rng.chance(40) {
            r.fcw = 0x7f | rng.next() as u16 & 0x0f00;
        }
        if rng.chance(10) {
            r.fcw &= !(rng.next() as u16 & 0x3f);
        }
        r.fsw = (rng.next() as u16) & 0x7f00;
        if rng.chance(30) {
            r.fsw |= rng.next() as u16 & 0x7f;
        }
        if r.fsw & !r.fcw & 0x3f != 0 {
            if rng.chance(80) {
                r.fsw &= !(!r.fcw & 0x3f);
            } else {
                r.fsw |= 0x8080;
            }
        }
        r.ftw = match rng.below(4) {
            0 => 0xff,
            1 => 0,
            _ => rng.next() as u16 & 0xff,
        };
        if r.fsw & 0x80 != 0 {
            r.fop = rng.next() as u16 & 0x7ff;
            r.fip = rng.next() & 0x7fff_ffff_ffff;
            r.fdp = rng.next() & 0x7fff_ffff_ffff;
        }
        c.pattern = 1 + rng.below(PATTERNS as u64 - 1) as u32;
        c.entry = rng.below(0xe00) as u32;
        r.rip = CODE + u64::from(c.entry);
    }

    fn pin(&mut self, register: usize, value: u64) {
        self.case.regs.gpr[register] = value;
        self.pinned |= 1 << register;
    }

    /// Notes bytes of memory that may differ. `None` if there is no more room for such notes.
    fn ignore(&mut self, at: u32, len: u32) -> Option<()> {
        *self.case.ignore.iter_mut().find(|i| i.1 == 0)? = (at, len);
        Some(())
    }

    fn patch(&mut self, at: u64, bytes: &[u8]) {
        let at = at.wrapping_sub(DATA);
        if self.case.patch_len == 0 && at < DATA_LEN as u64 && bytes.len() <= PATCH_MAX {
            self.case.patch_at = at as u32;
            self.case.patch_len = bytes.len() as u32;
            self.case.patch[..bytes.len()].copy_from_slice(bytes);
        }
    }

    /// An address for an access of `size` bytes.
    fn target(&mut self, size: u64) -> u64 {
        let rng = &mut *self.rng;
        let size = size.max(1);
        let room = DATA_LEN as u64;
        match rng.below(40) {
            0 | 1 => DATA + 0x1000 - rng.below(size.max(2)),
            2 => READ_ONLY - rng.below(size.max(2)),
            3 | 4 => READ_ONLY + rng.below(READ_ONLY_LEN as u64),
            5 => DATA.wrapping_sub(rng.below(size.max(2))),
            6 => READ_ONLY + READ_ONLY_LEN as u64 - rng.below(size.max(2)),
            7 => rng.integer(),
            8 => 0x8000_0000_0000 - rng.below(size.max(2)),
            9 | 10 => DATA + rng.below(room - size.min(room)),
            _ => {
                // Aligned, more or less.
                let align = 1 << rng.below(11).min(6);
                DATA + (64 + rng.below(room - 2048)) / align * align
            }
        }
    }

    /// A place in the code page, away from the instructions, for branches.
    fn code_target(&mut self) -> u64 {
        let entry = u64::from(self.case.entry);
        loop {
            let at = self.rng.below(4095);
            if at.abs_diff(entry) > 100 || self.rng.chance(1) && at > entry + CODE_MAX as u64 {
                return CODE + at;
            }
        }
    }

    /// Sets up what instruction `i` needs beyond its operands.
    fn implicit(&mut self, code: Code, i: &mut Instruction) -> Option<()> {
        use Mnemonic::*;
        let m = code.mnemonic();
        let op = code.op_code();
        if op.is_stack_instruction() || matches!(m, Enter | Leave) {
            let mut at = if self.rng.chance(90) { DATA + 0x800 + self.rng.below(0x1000) } else { self.target(8) };
            if self.pinned >> RSP & 1 == 0 {
                self.pin(RSP, at);
            } else {
                at = self.case.regs.gpr[RSP];
            }
            if matches!(m, Enter | Leave) {
                let at = if self.rng.chance(80) { DATA + 0x900 + self.rng.below(0x800) } else { self.target(8) };
                self.pin(RBP, at);
            }
            if m == Ret && self.rng.chance(80) {
                let to = self.code_target();
                self.patch(at, &to.to_le_bytes());
            }
            if matches!(m, Popf | Popfd | Popfq) {
                let value = self.rng.next() & POPF | 0x202;
                if self.case.patch_len != 0 {
                    return None;
                }
                let at = if at.wrapping_sub(DATA) > DATA_LEN as u64 - 8 { DATA + 0x1000 } else { at };
                // What other instructions did to the stack pointer is not known here.
                if self.case.code_len != 0 {
                    return None;
                }
                self.pin(RSP, at);
                self.patch(at, &value.to_le_bytes());
            }
        }
        if matches!(m, Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz) && self.rng.chance(70) {
            let n = self.rng.below(3);
            self.pin(RCX, n);
        }
        if op.op_kinds().contains(&K::cl) && self.rng.chance(70) {
            let n = self.rng.below(72);
            self.pin(RCX, n);
        }
        match m {
            Div | Idiv => {
                if self.rng.chance(80) {
                    let high = if self.rng.chance(50) { 0 } else { self.rng.below(4).wrapping_sub(2) };
                    self.pin(RDX, high);
                    // AH is the high half of the narrowest form.
                    let low = self.rng.integer();
                    let low = if self.rng.chance(50) { low & !0xff00 } else { low };
                    self.pin(0, low);
                } else {
                    self.pinned |= 1 << RDX | 1;
                }
            }
            Pcmpestri | Pcmpestrm | Pcmpestri64 | Pcmpestrm64 | Vpcmpestri | Vpcmpestrm | Vpcmpestri64 | Vpcmpestrm64 => {
                for r in [0, RDX] {
                    if self.rng.chance(80) {
                        let n = self.rng.below(40).wrapping_sub(20);
                        self.pin(r, n);
                    }
                }
            }
            Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xrstor | Xrstor64 => {
                let mask = self.rng.below(8);
                self.pin(0, mask);
                self.pin(RDX, 0);
            }
            _ => {}
        }
        let string = op.op_kinds().iter().any(|k| matches!(k, K::seg_rSI | K::es_rDI));
        if string {
            for r in [RSI, RDI] {
                let at = self.target(64);
                self.pin(r, at);
            }
            if op.can_use_rep_prefix() && self.rng.chance(60) {
                let n = match self.rng.below(10) {
                    0 => 0,
                    1 => self.rng.below(3000),
                    2 => self.rng.integer(),
                    _ => self.rng.below(40),
                };
                self.pin(RCX, n);
                if op.can_use_repne_prefix() && self.rng.chance(50) {
                    i.set_has_repne_prefix(true);
                } else {
                    i.set_has_rep_prefix(true);
                }
            }
        }
        if op.op_kinds().contains(&K::seg_rDI) {
            let at = self.target(16);
            self.pin(RDI, at);
        }
        Some(())
    }

    /// A register operand, or `None` if the operand is none.
    fn register(&mut self, k: K) -> Option<Register> {
        let n = self.rng.below(16) as u32;
        Some(match k {
            K::r8_or_mem | K::r8_reg | K::r8_opcode => Register::AL + self.rng.below(20) as u32,
            K::r16_or_mem | K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode => Register::AX + n,
            K::r32_or_mem | K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode | K::r32_vvvv => Register::EAX + n,
            K::r64_or_mem | K::r64_reg | K::r64_reg_mem | K::r64_rm | K::r64_opcode | K::r64_vvvv => Register::RAX + n,
            K::mm_or_mem | K::mm_reg | K::mm_rm => Register::MM0 + n % 8,
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => Register::XMM0 + n,
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => Register::YMM0 + n,
            K::seg_reg => Register::ES + n % 6,
            K::es => Register::ES,
            K::cs => Register::CS,
            K::ss => Register::SS,
            K::ds => Register::DS,
            K::fs => Register::FS,
            K::gs => Register::GS,
            K::al => Register::AL,
            K::cl => Register::CL,
            K::ax => Register::AX,
            K::dx => Register::DX,
            K::eax => Register::EAX,
            K::rax => Register::RAX,
            K::st0 => Register::ST0,
            K::sti_opcode => Register::ST0 + n % 8,
            _ => return None,
        })
    }

    /// Fills in memory operand `n`, of `size` bytes, so that it reaches `target`.
    fn memory(&mut self, i: &mut Instruction, n: u32, target: u64, vsib: Option<Register>) {
        i.set_op_kind(n, OpKind::Memory);
        let mut address = target;
        if self.rng.chance(5) {
            i.set_segment_prefix(Register::GS);
            address = address.wrapping_sub(GS_BASE);
        }
        let narrow = self.rng.chance(5) && (address as i64 >= 0 && address < 1 << 32 || self.rng.chance(10));
        let first = if narrow { Register::EAX } else { Register::RAX };
        let mut form = self.rng.below(20);
        if vsib.is_some() {
            form = 6;
        }
        let near = address.wrapping_sub(self.case.regs.rip) as i64;
        match form {
            0 | 1 if !narrow && i64::from(near as i32) == near => {
                i.set_memory_base(Register::RIP);
                i.set_memory_displacement64(address);
                i.set_memory_displ_size(8);
                return;
            }
            2 if address < 1 << 31 => {
                i.set_memory_displacement64(address);
                i.set_memory_displ_size(if narrow { 4 } else { 8 });
                return;
            }
            _ => {}
        }
        let free: Vec<usize> = (0..16).filter(|r| self.pinned >> r & 1 == 0).collect();
        let displacement = match self.rng.below(4) {
            0 => 0,
            1 | 2 => self.rng.below(256) as i64 - 128,
            _ => self.rng.next() as i32 as i64,
        };
        if free.is_empty() {
            i.set_memory_base(first + 8);
            return;
        }
        let base = self.rng.pick(&free);
        let mut value = address.wrapping_sub(displacement as u64);
        i.set_memory_base(first + base as u32);
        if let Some(index) = vsib {
            i.set_memory_index(index);
            i.set_memory_index_scale(1 << self.rng.below(4));
        } else if form >= 12 {
            let index = self.rng.below(16) as usize;
            if index != base && index != RSP {
                let scale = 1u32 << self.rng.below(4);
                i.set_memory_index(first + index as u32);
                i.set_memory_index_scale(scale);
                self.pinned |= 1 << index;
                let mut by = self.case.regs.gpr[index];
                if narrow {
                    by &= 0xffff_ffff;
                }
                value = value.wrapping_sub(by.wrapping_mul(u64::from(scale)));
            }
        }
        if narrow {
            value = value & 0xffff_ffff | self.rng.next() << 32;
        }
        self.pin(base, value);
        i.set_memory_displacement64(if narrow { displacement as u32 as u64 } else { displacement as u64 });
        i.set_memory_displ_size(match displacement {
            0 => 0,
            -128..=127 => 1,
            _ if narrow => 4,
            _ => 8,
        });
    }

    /// Structured contents for instructions that load state from memory.
    fn image(&mut self, m: Mnemonic, at: u64) {
        use Mnemonic::*;
        let mut other = Draft { rng: self.rng, case: Case::new(), patterns: self.patterns, pinned: 0 };
        other.registers();
        let r = other.case.regs;
        let mut image = [0; PATCH_MAX];
        crate::soft::pack(&r, &mut image);
        match m {
            Ldmxcsr | Vldmxcsr => {
                let mut value = r.mxcsr;
                if self.rng.chance(10) {
                    // Any reserved bit but 17, which AMD has a use for.
                    value |= 1 << self.rng.pick(&[16, 18, 19, 24, 31]);
                }
                self.patch(at, &value.to_le_bytes());
            }
            Fldcw => self.patch(at, &r.fcw.to_le_bytes()),
            Fxrstor | Fxrstor64 => {
                if self.rng.chance(10) {
                    image[26] = 1;
                }
                self.patch(at, &image[..512]);
            }
            Xrstor | Xrstor64 => {
                let bv = self.rng.below(8);
                image[512..520].copy_from_slice(&bv.to_le_bytes());
                if self.rng.chance(50) {
                    let format = bv | self.rng.below(8) | 1 << 63;
                    image[520..528].copy_from_slice(&format.to_le_bytes());
                }
                if self.rng.chance(10) {
                    let n = 512 + self.rng.below(64) as usize;
                    image[n] ^= 1 << self.rng.below(8);
                    // Components that the guest does not have, but the processor may.
                    image[512] &= 7;
                    image[513] = 0;
                    image[520] &= 7;
                    image[521] = 0;
                }
                self.patch(at, &image);
            }
            Xsave | Xsave64 | Xsaveopt | Xsaveopt64 => {
                // The header's other bits stay.
                let mut header = [0; 64];
                header[0] = self.rng.below(8) as u8;
                self.patch(at.wrapping_add(512), &header);
            }
            Fldenv | Frstor => {
                // Both sizes have the control word first; fill both layouts from one set of words.
                let wide = self.rng.chance(50);
                let step = if wide { 4 } else { 2 };
                let mut b = [0u8; 108];
                for x in &mut b {
                    *x = self.rng.next() as u8;
                }
                b[..2].copy_from_slice(&r.fcw.to_le_bytes());
                b[step..step + 2].copy_from_slice(&r.fsw.to_le_bytes());
                for (n, st) in r.st.iter().enumerate() {
                    let at = 7 * step + n * 10;
                    b[at..at + 10].copy_from_slice(st);
                }
                self.patch(at, &b);
            }
            _ => {}
        }
    }

    /// An instruction with operands, at `ip`, and its bytes.
    fn instruction(&mut self, code: Code, ip: u64) -> Option<(Instruction, Vec<u8>)> {
        let op = code.op_code();
        let m = code.mnemonic();
        let mut i = Instruction::new();
        i.set_code(code);
        self.implicit(code, &mut i)?;
        let kinds = op.op_kinds();
        let mut immediates = 0;
        for (n, k) in kinds.iter().enumerate() {
            let n = n as u32;
            let size = op.memory_size().size() as u64;
            let memory = match k {
                K::mem | K::mem_mib | K::sibmem => true,
                K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem | K::mm_or_mem | K::xmm_or_mem
                | K::ymm_or_mem => self.rng.chance(50),
                _ => false,
            };
            if memory {
                let size = if size == 0 { 832 } else { size };
                let mut target = self.target(size);
                let state = size > 64 || matches!(m, Fldenv | Fnstenv);
                if state && self.rng.chance(90) {
                    let align = if size > 128 { 64 } else { 1 };
                    target = (DATA + self.rng.below(DATA_LEN as u64 - 1024)) / align * align;
                }
                self.image(m, target);
                let patched = self.case.patch_len != 0 && self.case.patch_at as u64 == target.wrapping_sub(DATA);
                if matches!(m, Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr) && !patched && self.rng.chance(90) {
                    return None;
                }
                if matches!(m, Mnemonic::Jmp | Mnemonic::Call) && self.rng.chance(80) {
                    let to = self.code_target();
                    self.patch(target, &to.to_le_bytes());
                }
                // The x87 pointers (see `compare`), and MXCSR_MASK, which is the processor's own.
                let at = |offset: u32| (target.wrapping_sub(DATA) as u32).wrapping_add(offset);
                if matches!(m, Mnemonic::Fxsave | Mnemonic::Fxsave64) || format!("{m:?}").starts_with("Xsave") {
                    self.ignore(at(6), 18)?;
                    self.ignore(at(28), 4)?;
                } else if matches!(m, Mnemonic::Fnstenv | Mnemonic::Fnsave) {
                    let wide = matches!(code, Code::Fnstenv_m28byte | Code::Fnsave_m108byte);
                    if wide { self.ignore(at(12), 14)? } else { self.ignore(at(6), 8)? }
                }
                self.memory(&mut i, n, target, None);
                continue;
            }
            if let Some(r) = self.register(*k) {
                i.set_op_register(n, r);
                i.set_op_kind(n, OpKind::Register);
                if r.is_gpr() && matches!(m, Mnemonic::Jmp | Mnemonic::Call) && self.rng.chance(80) {
                    let to = self.code_target();
                    let n = r.full_register().number();
                    if self.pinned >> n & 1 == 0 {
                        self.pin(n, to);
                    }
                }
                continue;
            }
            let value = if self.rng.chance(50) { self.rng.integer() } else { self.rng.next() };
            match k {
                K::imm8 => {
                    immediates += 1;
                    if immediates == 1 {
                        i.set_op_kind(n, OpKind::Immediate8);
                        i.set_immediate8(value as u8);
                    } else {
                        i.set_op_kind(n, OpKind::Immediate8_2nd);
                        // ENTER's nesting level: mostly low.
                        let low = m == Mnemonic::Enter && self.rng.chance(70);
                        i.set_immediate8_2nd(if low { value as u8 & 0xe3 } else { value as u8 });
                    }
                }
                K::imm8_const_1 => {
                    i.set_op_kind(n, OpKind::Immediate8);
                    i.set_immediate8(1);
                }
                K::imm4_m2z => {
                    i.set_op_kind(n, OpKind::Immediate8);
                    i.set_immediate8(value as u8 & 15);
                }
                K::imm8sex16 => {
                    i.set_op_kind(n, OpKind::Immediate8to16);
                    i.set_immediate8to16(value as i8 as i16);
                }
                K::imm8sex32 => {
                    i.set_op_kind(n, OpKind::Immediate8to32);
                    i.set_immediate8to32(value as i8 as i32);
                }
                K::imm8sex64 => {
                    i.set_op_kind(n, OpKind::Immediate8to64);
                    i.set_immediate8to64(value as i8 as i64);
                }
                K::imm16 => {
                    immediates += 1;
                    i.set_op_kind(n, OpKind::Immediate16);
                    // ENTER's frame, RET's parameters: mostly small.
                    let small = self.rng.chance(70) && matches!(m, Mnemonic::Enter | Mnemonic::Ret);
                    i.set_immediate16(if small { value as u16 & 0x1ff } else { value as u16 });
                }
                K::imm32 => {
                    i.set_op_kind(n, OpKind::Immediate32);
                    i.set_immediate32(value as u32);
                }
                K::imm32sex64 => {
                    i.set_op_kind(n, OpKind::Immediate32to64);
                    i.set_immediate32to64(value as i32 as i64);
                }
                K::imm64 => {
                    i.set_op_kind(n, OpKind::Immediate64);
                    i.set_immediate64(value);
                }
                K::br64_1 | K::br64_4 => {
                    i.set_op_kind(n, OpKind::NearBranch64);
                    let to = if *k == K::br64_1 {
                        ip.wrapping_add(20 + self.rng.below(100))
                    } else if self.rng.chance(95) {
                        self.code_target()
                    } else {
                        ip.wrapping_add(self.rng.next() as i32 as u64 & 0x7fff_fff0)
                    };
                    i.set_near_branch64(to);
                }
                K::mem_offs => {
                    let size = op.memory_size().size() as u64;
                    let at = self.target(size);
                    i.set_op_kind(n, OpKind::Memory);
                    i.set_memory_displacement64(at);
                    i.set_memory_displ_size(8);
                }
                K::seg_rSI => i.set_op_kind(n, OpKind::MemorySegRSI),
                K::es_rDI => i.set_op_kind(n, OpKind::MemoryESRDI),
                K::seg_rDI => i.set_op_kind(n, OpKind::MemorySegRDI),
                K::seg_rBX_al => {
                    i.set_op_kind(n, OpKind::Memory);
                    i.set_memory_base(Register::RBX);
                    i.set_memory_index(Register::AL);
                    let at = self.target(256);
                    self.pin(RBX, at);
                }
                K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y => {
                    let wide = matches!(k, K::mem_vsib32y | K::mem_vsib64y);
                    let step = if matches!(k, K::mem_vsib32x | K::mem_vsib32y) { 4 } else { 8 };
                    let number = self.rng.below(16) as u32;
                    let index = if wide { Register::YMM0 } else { Register::XMM0 } + number;
                    let at = DATA + 0x800 + self.rng.below(0x1000);
                    self.memory(&mut i, n, at, Some(index));
                    // Small indices, with now and then one that leads astray.
                    for n in 0..32 / step {
                        let mut by = self.rng.below(256) as i64 - 128;
                        if self.rng.chance(3) {
                            by = self.rng.integer() as i64;
                        }
                        self.case.regs.vec[number as usize][n * step..(n + 1) * step]
                            .copy_from_slice(&by.to_le_bytes()[..step]);
                    }
                }
                _ => return None,
            }
        }
        self.adjust(&mut i);
        if op.can_use_lock_prefix() && i.op0_kind() == OpKind::Memory && self.rng.chance(25) {
            i.set_has_lock_prefix(true);
        }
        let mut encoder = Encoder::new(64);
        encoder.encode(&i, ip).ok()?;
        let bytes = encoder.take_buffer();
        Some((i, bytes))
    }

    /// Gives some instructions better odds of doing something interesting.
    fn adjust(&mut self, i: &mut Instruction) {
        use Mnemonic::*;
        let register = |n: u32, i: &Instruction| {
            (i.op_count() > n && i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr())
                .then(|| i.op_register(n).full_register().number())
        };
        match i.mnemonic() {
            // A bit offset that keeps to the neighbourhood.
            Bt | Bts | Btr | Btc if i.op0_kind() == OpKind::Memory => {
                if let Some(r) = register(1, i)
                    && self.pinned >> r & 1 == 0
                    && self.rng.chance(80)
                {
                    let by = self.rng.below(2000).wrapping_sub(1000);
                    self.case.regs.gpr[r] = by;
                }
            }
            Cmpxchg if self.rng.chance(50) => {
                let value = match register(0, i) {
                    Some(r) => self.case.regs.gpr[r],
                    None => self.operand_value(i),
                };
                if self.pinned & 1 == 0 {
                    self.case.regs.gpr[0] = value;
                }
            }
            Cmpxchg8b | Cmpxchg16b if self.rng.chance(50) && self.pinned & 5 == 0 => {
                let mut b = [0; 16];
                let at = self.operand_address(i).wrapping_sub(DATA);
                if at < DATA_LEN as u64 {
                    self.case.memory(self.patterns, at as usize, &mut b);
                    let quad = |n: usize| u64::from_le_bytes(b[n..n + 8].try_into().unwrap());
                    let (low, high) = if i.mnemonic() == Cmpxchg8b {
                        (quad(0) & 0xffff_ffff, quad(0) >> 32)
                    } else {
                        (quad(0), quad(8))
                    };
                    (self.case.regs.gpr[0], self.case.regs.gpr[RDX]) = (low, high);
                }
            }
            Shld | Shrd => {
                // Counts above the operand size leave the result undefined.
                let limit = if i.op_register(1).size() == 2 { 16 } else { 255 };
                if i.op2_kind() == OpKind::Immediate8 {
                    if i.immediate8() & 31 > limit {
                        i.set_immediate8(i.immediate8() & 15);
                    }
                } else if limit == 16 {
                    let n = self.case.regs.gpr[RCX];
                    if n & 31 > 16 {
                        self.case.regs.gpr[RCX] = n & !0x10;
                    }
                }
            }
            _ => {}
        }
    }

    /// Address of the memory operand as the registers are now.
    fn operand_address(&self, i: &Instruction) -> u64 {
        i.virtual_address(
            (0..i.op_count()).find(|n| i.op_kind(*n) == OpKind::Memory).unwrap_or(0),
            0,
            |r, _, _| match r {
                Register::GS => Some(GS_BASE),
                r if r.is_segment_register() => Some(0),
                r if r.is_gpr() => {
                    let v = self.case.regs.gpr[r.full_register().number()];
                    Some(if r.size() == 4 { v & 0xffff_ffff } else { v })
                }
                _ => Some(0),
            },
        )
        .unwrap_or(0)
    }

    fn operand_value(&self, i: &Instruction) -> u64 {
        let at = self.operand_address(i).wrapping_sub(DATA);
        let mut b = [0; 8];
        if at < DATA_LEN as u64 {
            self.case.memory(self.patterns, at as usize, &mut b);
        }
        u64::from_le_bytes(b)
    }
}

use Mnemonic::{Fldenv, Fnstenv};
