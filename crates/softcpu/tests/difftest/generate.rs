//! Random cases: for each instruction, operands of every form, registers and memory with values worth trying.

use crate::case::*;
use crate::rng::Rng;
use crate::segments;
use crate::select::uses_selectors;
use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpCodeOperandKind as K,
    OpKind, Register,
};

pub const RCX: usize = 1;
pub const RDX: usize = 2;
pub const RBX: usize = 3;
pub const RSP: usize = 4;
pub const RBP: usize = 5;
pub const RSI: usize = 6;
pub const RDI: usize = 7;

/// Flags that POPF may load without making the rest of the case, or the child process, something else.
const POPF: u64 = 0x0cd5;

/// Makes cases of the given instructions.
pub struct Generator<'a> {
    bits: u32,
    rng: Rng,
    codes: &'a [Code],
    patterns: &'a Patterns,
}

/// A case in the making.
pub struct Draft<'a> {
    pub rng: &'a mut Rng,
    pub case: Case,
    patterns: &'a Patterns,
    /// General registers whose values have been chosen for a purpose.
    pub pinned: u16,
}

impl<'a> Generator<'a> {
    /// Cases of the given instructions, in 64-bit or (32) compatibility mode.
    pub fn new(seed: u64, bits: u32, codes: &'a [Code], patterns: &'a Patterns) -> Self {
        Self { bits, rng: Rng::new(seed), codes, patterns }
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
        draft.case.bits = self.bits;
        draft.registers();
        let mut undefined = 0u32;
        let mut branches = false;
        let mut written = Vec::new();
        let mut factory = InstructionInfoFactory::new();
        for (n, code) in codes.iter().enumerate() {
            let last = n + 1 == codes.len();
            let at = draft.case.code_len as usize;
            let ip = draft.case.code_base() + u64::from(draft.case.entry) + at as u64;
            let (i, bytes) = draft.instruction(*code, ip)?;
            // What may differ must be where it is thought to be, and must not be read by what follows.
            let ignoring = draft.case.ignore[0].1 != 0;
            let moved =
                [i.memory_base(), i.memory_index()].iter().any(|r| written.contains(&r.full_register()))
                    || written.iter().any(|r: &Register| r.is_segment_register());
            if ignoring && (!last || moved)
                || at + bytes.len() > CODE_MAX
                || !last && may_leave_undefined(&i)
                || flags(i.rflags_read()) & undefined != 0
            {
                return None;
            }
            branches |= i.flow_control() != FlowControl::Next;
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
            let used = factory.info(&i).used_registers();
            written.extend(
                used.iter().filter(|u| u.access() != OpAccess::Read).map(|u| u.register().full_register()),
            );
        }
        // A branch right before the end of a segment now and then faults on a real processor even if it is taken.
        if draft.rng.chance(2) && draft.case.ignore[0].1 == 0 && !(branches && self.bits == 16) {
            // At the end of the page: what follows cannot be fetched; or not even the instruction can, whole.
            let cut = draft.rng.below(u64::from(draft.case.code_len)) as u32;
            let cut = if draft.rng.chance(50) { 0 } else { cut };
            draft.case.entry = 4096 - draft.case.code_len + cut;
            draft.case.code_len -= cut;
            draft.case.regs.rip = draft.case.code_base() + u64::from(draft.case.entry);
        }
        if self.bits != 64 {
            // What the mode cannot name is not kept by every switch between modes.
            draft.case.regs.gpr[8..].fill(0);
            draft.case.regs.gpr.iter_mut().for_each(|g| *g &= 0xffff_ffff);
            if self.bits == 16 {
                draft.case.regs.gpr[RSP] &= 0xffff;
            }
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
        Shl | Sal
            | Shr
            | Sar
            | Rol
            | Ror
            | Rcl
            | Rcr
            | Shld
            | Shrd
            | Cmpsb
            | Cmpsw
            | Cmpsd
            | Cmpsq
            | Scasb
            | Scasw
            | Scasd
            | Scasq
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
        c.regs.rip = c.code_base() + u64::from(c.entry);
        c.regs.segments = segments::initial(c.bits);
    }

    pub fn pin(&mut self, register: usize, value: u64) {
        self.case.regs.gpr[register] = value;
        self.pinned |= 1 << register;
    }

    /// A selector to be loaded or looked up.
    pub fn selector(&mut self) -> u16 {
        if self.rng.chance(5) { self.rng.next() as u16 | 7 } else { self.rng.pick(&segments::selectors()) }
    }

    /// Makes a register point to linear address `at` in a segment.
    pub fn point(&mut self, register: usize, segment: Register, at: u64) {
        let offset = at.wrapping_sub(segments::base(self.case.bits, segment));
        self.pin(
            register,
            if segments::base(self.case.bits, segment) == 0 { at } else { offset & 0xffff_ffff },
        );
    }

    /// Notes bytes of memory that may differ. `None` if there is no more room for such notes.
    pub fn ignore(&mut self, at: u32, len: u32) -> Option<()> {
        *self.case.ignore.iter_mut().find(|i| i.1 == 0)? = (at, len);
        Some(())
    }

    pub fn patch(&mut self, at: u64, bytes: &[u8]) {
        let at = at.wrapping_sub(DATA);
        if self.case.patch_len == 0 && at < DATA_LEN as u64 && bytes.len() <= PATCH_MAX {
            self.case.patch_at = at as u32;
            self.case.patch_len = bytes.len() as u32;
            self.case.patch[..bytes.len()].copy_from_slice(bytes);
        }
    }

    /// An address for an access of `size` bytes.
    pub fn target(&mut self, size: u64) -> u64 {
        let rng = &mut *self.rng;
        let size = size.max(1);
        let room = DATA_LEN as u64;
        match rng.below(40) {
            0 | 1 => DATA + 0x1000 - rng.below(size.max(2)),
            2 => READ_ONLY - rng.below(size.max(2)),
            3 | 4 => READ_ONLY + rng.below(READ_ONLY_LEN as u64),
            5 => DATA.wrapping_sub(rng.below(size.max(2))),
            6 => READ_ONLY + READ_ONLY_LEN as u64 - rng.below(size.max(2)),
            7 if self.case.bits != 64 => rng.integer() & 0xffff_ffff,
            7 => rng.integer(),
            8 if self.case.bits != 64 => 0u64.wrapping_sub(rng.below(size.max(2))) & 0xffff_ffff,
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
    pub fn code_target(&mut self) -> u64 {
        let entry = u64::from(self.case.entry);
        loop {
            let at = self.rng.below(4095);
            if at.abs_diff(entry) > 100 || self.rng.chance(1) && at > entry + CODE_MAX as u64 {
                return self.case.code_base() + at;
            }
        }
    }

    /// Sets up what instruction `i` needs beyond its operands.
    pub fn implicit(&mut self, code: Code, i: &mut Instruction) -> Option<()> {
        use Mnemonic::*;
        let m = code.mnemonic();
        let op = code.op_code();
        if op.is_stack_instruction() || matches!(m, Enter | Leave) {
            let mut at =
                if self.rng.chance(90) { DATA + 0x800 + self.rng.below(0x1000) } else { self.target(8) };
            if self.pinned >> RSP & 1 == 0 {
                self.point(RSP, Register::SS, at);
            } else {
                at = self.case.regs.gpr[RSP].wrapping_add(segments::base(self.case.bits, Register::SS));
            }
            if matches!(m, Enter | Leave) {
                let at =
                    if self.rng.chance(80) { DATA + 0x900 + self.rng.below(0x800) } else { self.target(8) };
                self.point(RBP, Register::SS, at);
            }
            if uses_selectors(code) {
                // Other selectors could be those of the kernel.
                if self.case.code_len != 0 {
                    return None;
                }
                let selector = self.selector();
                self.patch(at, &selector.to_le_bytes());
                if self.case.patch_len == 0 && at.wrapping_sub(DATA) < (DATA_LEN + READ_ONLY_LEN) as u64 {
                    return None;
                }
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
                self.point(RSP, Register::SS, at);
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
            Pcmpestri | Pcmpestrm | Pcmpestri64 | Pcmpestrm64 | Vpcmpestri | Vpcmpestrm | Vpcmpestri64
            | Vpcmpestrm64 => {
                for r in [0, RDX] {
                    if self.rng.chance(80) {
                        let n = self.rng.below(40).wrapping_sub(20);
                        self.pin(r, n);
                    }
                }
            }
            Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xrstor | Xrstor64 => {
                // The processor has components that the guest does not, so the mask must be what it is here.
                if self.case.code_len != 0 {
                    return None;
                }
                let mask = self.rng.below(8);
                self.pin(0, mask);
                self.pin(RDX, 0);
            }
            _ => {}
        }
        let string = op.op_kinds().iter().any(|k| matches!(k, K::seg_rSI | K::es_rDI));
        if string {
            for (r, segment) in [(RSI, Register::DS), (RDI, Register::ES)] {
                let at = self.target(64);
                self.point(r, segment, at);
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
            self.point(RDI, Register::DS, at);
        }
        Some(())
    }

    /// Structured contents for instructions that load state from memory.
    pub fn image(&mut self, m: Mnemonic, at: u64) {
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

    /// Gives some instructions better odds of doing something interesting.
    pub fn adjust(&mut self, i: &mut Instruction) {
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
                r if r.is_segment_register() => Some(segments::base(self.case.bits, r)),
                r if r.is_gpr() => {
                    let v = self.case.regs.gpr[r.full_register().number()];
                    Some(match r.size() {
                        2 => v & 0xffff,
                        4 => v & 0xffff_ffff,
                        _ => v,
                    })
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
