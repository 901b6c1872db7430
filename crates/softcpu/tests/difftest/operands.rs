//! Operands: registers, memory in every form of addressing, immediates, branch targets.

use crate::case::*;
use crate::generate::*;
use crate::segments;
use crate::select::uses_selectors;
use iced_x86::{Code, Encoder, Instruction, Mnemonic, OpCodeOperandKind as K, OpKind, Register};

impl Draft<'_> {
    fn wide(&self) -> bool {
        self.case.bits == 64
    }

    /// One of three, by the width of addresses.
    fn by_width<T>(&self, sixteen: T, thirty_two: T, sixty_four: T) -> T {
        match self.case.bits {
            16 => sixteen,
            32 => thirty_two,
            _ => sixty_four,
        }
    }

    /// Number of general or vector registers.
    fn count(&self) -> u64 {
        if self.wide() { 16 } else { 8 }
    }

    /// A register operand, or `None` if the operand is none.
    fn register(&mut self, k: K) -> Option<Register> {
        let n = self.rng.below(self.count()) as u32;
        Some(match k {
            K::r8_or_mem | K::r8_reg | K::r8_opcode => {
                Register::AL + self.rng.below(if self.wide() { 20 } else { 8 }) as u32
            }
            K::r16_or_mem | K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode => Register::AX + n,
            K::r32_or_mem | K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
                Register::EAX + n
            }
            K::r64_or_mem | K::r64_reg | K::r64_reg_mem | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
                Register::RAX + n
            }
            K::mm_or_mem | K::mm_reg | K::mm_rm => Register::MM0 + n % 8,
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
                Register::XMM0 + n
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
                Register::YMM0 + n
            }
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
        if self.case.bits != 16 && self.rng.chance(5) {
            i.set_segment_prefix(Register::GS);
            address = address.wrapping_sub(GS_BASE);
        }
        match self.case.bits {
            16 => return self.memory16(i, target, vsib),
            32 => return self.memory32(i, target, vsib),
            _ => {}
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

    /// The same in 32-bit code: 32-bit addresses, or now and then 16-bit ones.
    fn memory32(&mut self, i: &mut Instruction, target: u64, vsib: Option<Register>) {
        let displacement = match self.rng.below(4) {
            0 => 0,
            1 | 2 => self.rng.below(256) as i32 - 128,
            _ => self.rng.next() as i32,
        };
        if self.rng.chance(3) && vsib.is_none() {
            let (base, index) = self.rng.pick(&[
                (Register::BX, Register::SI),
                (Register::BX, Register::DI),
                (Register::BP, Register::SI),
                (Register::SI, Register::None),
                (Register::DI, Register::None),
                (Register::BX, Register::None),
            ]);
            i.set_memory_base(base);
            i.set_memory_index(index);
            i.set_memory_displacement64(u64::from(displacement as u16));
            i.set_memory_displ_size(2);
            return;
        }
        let form = if vsib.is_some() { 6 } else { self.rng.below(20) };
        let free: Vec<usize> = (0..8).filter(|r| self.pinned >> r & 1 == 0).collect();
        if form < 3 || free.is_empty() {
            i.set_memory_displacement64(target & 0xffff_ffff);
            i.set_memory_displ_size(4);
            return;
        }
        let base = self.rng.pick(&free);
        let mut value = (target as u32).wrapping_sub(displacement as u32);
        i.set_memory_base(Register::EAX + base as u32);
        if let Some(index) = vsib {
            i.set_memory_index(index);
            i.set_memory_index_scale(1 << self.rng.below(4));
        } else if form >= 12 {
            let index = self.rng.below(8) as usize;
            if index != base && index != RSP {
                let scale = 1u32 << self.rng.below(4);
                i.set_memory_index(Register::EAX + index as u32);
                i.set_memory_index_scale(scale);
                self.pinned |= 1 << index;
                value = value.wrapping_sub((self.case.regs.gpr[index] as u32).wrapping_mul(scale));
            }
        }
        self.pin(base, u64::from(value));
        i.set_memory_displacement64(u64::from(displacement as u32));
        i.set_memory_displ_size(match displacement {
            0 => 0,
            -128..=127 => 1,
            _ => 4,
        });
    }

    /// The same in 16-bit code: 16-bit addresses, now and then 32-bit ones, in any of the segments.
    fn memory16(&mut self, i: &mut Instruction, target: u64, vsib: Option<Register>) {
        let prefix = self
            .rng
            .chance(15)
            .then(|| self.rng.pick(&[Register::ES, Register::CS, Register::SS, Register::DS, Register::GS]));
        i.set_segment_prefix(prefix.unwrap_or(Register::None));
        let bits = self.case.bits;
        let offset =
            |default| (target as u32).wrapping_sub(segments::base(bits, prefix.unwrap_or(default)) as u32);
        let shift = self.rng.below(25);
        let displacement = if self.rng.chance(40) { 0 } else { self.rng.next() as i32 >> shift };
        let size = |d: i32, wide: u32| match d {
            0 => 0,
            -128..=127 => 1,
            _ => wide,
        };
        if vsib.is_some() || self.rng.chance(20) {
            let free: Vec<usize> = (0..8).filter(|r| self.pinned >> r & 1 == 0).collect();
            if let Some(base) = free.get(self.rng.below(free.len() as u64) as usize).copied() {
                let default = if matches!(base, RSP | RBP) { Register::SS } else { Register::DS };
                i.set_memory_base(Register::EAX + base as u32);
                if let Some(index) = vsib {
                    i.set_memory_index(index);
                }
                self.pin(base, u64::from(offset(default).wrapping_sub(displacement as u32)));
                i.set_memory_displacement64(u64::from(displacement as u32));
                i.set_memory_displ_size(size(displacement, 4));
                return;
            }
        }
        let none = Register::None;
        let (base, index) = self.rng.pick(&[
            (Register::BX, Register::SI),
            (Register::BX, Register::DI),
            (Register::BP, Register::SI),
            (Register::BP, Register::DI),
            (Register::SI, none),
            (Register::DI, none),
            (Register::BP, none),
            (Register::BX, none),
            (none, none),
        ]);
        let default = if base == Register::BP { Register::SS } else { Register::DS };
        let number = |r: Register| r.full_register().number();
        if base == none
            || self.pinned >> number(base) & 1 != 0
            || index != none && self.pinned >> number(index) & 1 != 0
        {
            i.set_memory_displacement64(u64::from(offset(Register::DS) as u16));
            i.set_memory_displ_size(2);
            return;
        }
        let displacement = i32::from(displacement as i16);
        let mut value = offset(default).wrapping_sub(displacement as u32);
        if index != none {
            value = value.wrapping_sub(self.case.regs.gpr[number(index)] as u32);
            self.pinned |= 1 << number(index);
        }
        let high = self.rng.next() & 0xffff_0000;
        self.pin(number(base), u64::from(value & 0xffff) | high);
        i.set_memory_base(base);
        i.set_memory_index(index);
        i.set_memory_displacement64(u64::from(displacement as u16));
        i.set_memory_displ_size(size(displacement, 2));
    }

    /// An instruction with operands, at `ip`, and its bytes.
    pub fn instruction(&mut self, code: Code, ip: u64) -> Option<(Instruction, Vec<u8>)> {
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
                K::r8_or_mem
                | K::r16_or_mem
                | K::r32_or_mem
                | K::r64_or_mem
                | K::mm_or_mem
                | K::xmm_or_mem
                | K::ymm_or_mem => self.rng.chance(50),
                _ => false,
            };
            if memory {
                let size = if size == 0 { 832 } else { size };
                let mut target = self.target(size);
                let state = size > 64 || matches!(m, Mnemonic::Fldenv | Mnemonic::Fnstenv);
                if state && (self.case.bits == 16 || self.rng.chance(90)) {
                    let align = if size > 128 { 64 } else { 1 };
                    target = (DATA + self.rng.below(DATA_LEN as u64 - 1024)) / align * align;
                }
                self.image(m, target);
                let patched =
                    self.case.patch_len != 0 && self.case.patch_at as u64 == target.wrapping_sub(DATA);
                if matches!(m, Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr) && !patched && self.rng.chance(90) {
                    return None;
                }
                if matches!(m, Mnemonic::Jmp | Mnemonic::Call) && self.rng.chance(80) {
                    let to = self.code_target();
                    self.patch(target, &to.to_le_bytes());
                }
                if uses_selectors(code) {
                    // A far pointer has an offset in front.
                    let selector = self.selector();
                    let offset =
                        if matches!(m, Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lss) { size - 2 } else { 0 };
                    let mut bytes = self.rng.next().to_le_bytes();
                    bytes[offset as usize..offset as usize + 2].copy_from_slice(&selector.to_le_bytes());
                    self.patch(target, &bytes[..offset as usize + 2]);
                    // Other selectors could be those of the kernel.
                    let patched =
                        self.case.patch_len != 0 && self.case.patch_at as u64 == target.wrapping_sub(DATA);
                    if !patched && target.wrapping_sub(DATA) < (DATA_LEN + READ_ONLY_LEN) as u64 {
                        return None;
                    }
                }
                // The x87 pointers (see `compare`), and MXCSR_MASK, which is the processor's own.
                let at = |offset: u32| (target.wrapping_sub(DATA) as u32).wrapping_add(offset);
                if matches!(m, Mnemonic::Fxsave | Mnemonic::Fxsave64) || format!("{m:?}").starts_with("Xsave")
                {
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
                let loads = n == 0 && r.is_segment_register() && uses_selectors(code);
                // FS and GS are the child process's own.
                let r = if loads && matches!(r, Register::FS | Register::GS) { Register::DS } else { r };
                i.set_op_register(n, r);
                i.set_op_kind(n, OpKind::Register);
                if uses_selectors(code) && r.is_gpr() {
                    if self.case.code_len != 0 || self.pinned >> r.full_register().number() & 1 != 0 {
                        return None;
                    }
                    let selector = u64::from(self.selector()) | self.rng.next() & 0xffff_0000;
                    self.pin(r.full_register().number(), selector);
                }
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
                K::br64_1 | K::br64_4 | K::br32_1 | K::br32_4 | K::br16_1 | K::br16_2 => {
                    let to = if matches!(k, K::br64_1 | K::br32_1 | K::br16_1) {
                        ip.wrapping_add(20 + self.rng.below(100))
                    } else if self.rng.chance(95) {
                        self.code_target()
                    } else {
                        ip.wrapping_add(self.rng.next() as i32 as u64 & 0x7fff_fff0)
                    };
                    if self.wide() {
                        i.set_op_kind(n, OpKind::NearBranch64);
                        i.set_near_branch64(to);
                    } else if matches!(k, K::br16_1 | K::br16_2) {
                        i.set_op_kind(n, OpKind::NearBranch16);
                        i.set_near_branch16(to as u16);
                    } else {
                        i.set_op_kind(n, OpKind::NearBranch32);
                        i.set_near_branch32(to as u32);
                    }
                }
                K::mem_offs => {
                    let size = op.memory_size().size() as u64;
                    let at = self.target(size);
                    i.set_op_kind(n, OpKind::Memory);
                    let at = at.wrapping_sub(segments::base(self.case.bits, Register::DS));
                    i.set_memory_displacement64(match self.case.bits {
                        64 => at,
                        bits => at & ((1 << bits) - 1),
                    });
                    i.set_memory_displ_size(self.case.bits / 8);
                }
                K::seg_rSI => i.set_op_kind(
                    n,
                    self.by_width(OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI),
                ),
                K::es_rDI => i.set_op_kind(
                    n,
                    self.by_width(OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI),
                ),
                K::seg_rDI => i.set_op_kind(
                    n,
                    self.by_width(OpKind::MemorySegDI, OpKind::MemorySegEDI, OpKind::MemorySegRDI),
                ),
                K::seg_rBX_al => {
                    i.set_op_kind(n, OpKind::Memory);
                    i.set_memory_base(self.by_width(Register::BX, Register::EBX, Register::RBX));
                    i.set_memory_index(Register::AL);
                    let at = self.target(256);
                    self.point(RBX, Register::DS, at);
                }
                K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y => {
                    let wide = matches!(k, K::mem_vsib32y | K::mem_vsib64y);
                    let step = if matches!(k, K::mem_vsib32x | K::mem_vsib32y) { 4 } else { 8 };
                    let number = self.rng.below(self.count()) as u32;
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
        let mut encoder = Encoder::new(self.case.bits);
        encoder.encode(&i, ip).ok()?;
        let bytes = encoder.take_buffer();
        Some((i, bytes))
    }
}
