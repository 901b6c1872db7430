//! Finds the instructions of a block, what to do with each, and which arithmetic flags are live after it.

use crate::native::Special;
use crate::native::recipe::{Class, recipe};
use iced_x86::{
    Code, CodeSize, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
};

/// All arithmetic flags, in the bits of `iced_x86::RflagsBits`.
pub const ALL: u8 = 0x3f;
/// Guest instructions in a block, at most.
pub const MAX: usize = 64;
/// Conditional branches that a block goes on after, at most.
const MAX_SIDE_EXITS: usize = 3;
/// Instructions looked at beyond the end of a block to find out which flags are dead.
const PEEK: usize = 6;

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Re-encoded with other registers and another memory operand.
    Generic,
    /// Nothing to do.
    Nop,
    /// LEA.
    Lea,
    /// Shift or rotate by CL.
    ShiftCl,
    /// MUL, one-operand IMUL.
    Mul,
    /// DIV.
    Div,
    /// IDIV.
    Idiv,
    /// CMPXCHG.
    Cmpxchg,
    /// CBW, CWDE, CDQE, CWD, CDQ, CQO.
    Extend,
    /// PUSH.
    Push,
    /// POP to a register.
    Pop,
    /// LEAVE.
    Leave,
    /// CLI.
    Cli,
    /// STI.
    Sti,
    /// PUSHF.
    Pushf,
    /// POPF.
    Popf,
    /// RDTSC, RDTSCP.
    Rdtsc,
    /// SSE or AVX; `avx` tells which.
    Vector {
        /// VEX-encoded.
        avx: bool,
        /// The memory operand must be aligned to this.
        align: u8,
        /// RCX is written implicitly.
        writes_rcx: bool,
    },
    /// x87 or MMX; `mmx` tells which.
    Fp {
        /// MMX.
        mmx: bool,
    },
    /// FNSTSW AX.
    Fnstsw,
    /// Conditional branch.
    Jcc,
    /// Direct jump.
    Jmp,
    /// Indirect jump.
    JmpIndirect,
    /// Direct call.
    Call,
    /// Indirect call.
    CallIndirect,
    /// Near return.
    Ret,
    /// Left to the interpreter, within the block.
    Interpret,
    /// Left to the interpreter, and the block ends with it.
    End,
}

/// An instruction of a block.
#[derive(Clone, Copy, Debug)]
pub struct Inst {
    /// Decoded, normalised.
    pub i: Instruction,
    /// What to do.
    pub kind: Kind,
    /// Arithmetic flags read.
    pub reads: u8,
    /// Arithmetic flags written or left undefined, always.
    pub kills: u8,
    /// Arithmetic flags that it may change.
    pub modifies: u8,
    /// Flags live after it.
    pub live_out: u8,
    /// Flags live if it faults.
    pub live_fault: u8,
}

impl Inst {
    /// Flags live before it.
    pub fn live_in(&self) -> u8 {
        self.reads | self.live_out & !self.kills | self.live_fault
    }
}

/// The instructions of a block.
#[derive(Debug, Default)]
pub struct Scan {
    /// The instructions; empty if the first cannot be translated.
    pub insts: Vec<Inst>,
    /// Address after the last instruction.
    pub end: u64,
    /// The block ended because the next instruction is not for us.
    pub stopped: bool,
}

fn flags(bits: u32) -> u8 {
    bits as u8 & ALL
}

/// Rewrites forms with an accumulator, and with a 64-bit absolute address, as those that take any register.
fn normalise(i: &mut Instruction) {
    use Code::*;
    let code = match i.code() {
        Add_AL_imm8 => Add_rm8_imm8,
        Add_AX_imm16 => Add_rm16_imm16,
        Add_EAX_imm32 => Add_rm32_imm32,
        Add_RAX_imm32 => Add_rm64_imm32,
        Or_AL_imm8 => Or_rm8_imm8,
        Or_AX_imm16 => Or_rm16_imm16,
        Or_EAX_imm32 => Or_rm32_imm32,
        Or_RAX_imm32 => Or_rm64_imm32,
        Adc_AL_imm8 => Adc_rm8_imm8,
        Adc_AX_imm16 => Adc_rm16_imm16,
        Adc_EAX_imm32 => Adc_rm32_imm32,
        Adc_RAX_imm32 => Adc_rm64_imm32,
        Sbb_AL_imm8 => Sbb_rm8_imm8,
        Sbb_AX_imm16 => Sbb_rm16_imm16,
        Sbb_EAX_imm32 => Sbb_rm32_imm32,
        Sbb_RAX_imm32 => Sbb_rm64_imm32,
        And_AL_imm8 => And_rm8_imm8,
        And_AX_imm16 => And_rm16_imm16,
        And_EAX_imm32 => And_rm32_imm32,
        And_RAX_imm32 => And_rm64_imm32,
        Sub_AL_imm8 => Sub_rm8_imm8,
        Sub_AX_imm16 => Sub_rm16_imm16,
        Sub_EAX_imm32 => Sub_rm32_imm32,
        Sub_RAX_imm32 => Sub_rm64_imm32,
        Xor_AL_imm8 => Xor_rm8_imm8,
        Xor_AX_imm16 => Xor_rm16_imm16,
        Xor_EAX_imm32 => Xor_rm32_imm32,
        Xor_RAX_imm32 => Xor_rm64_imm32,
        Cmp_AL_imm8 => Cmp_rm8_imm8,
        Cmp_AX_imm16 => Cmp_rm16_imm16,
        Cmp_EAX_imm32 => Cmp_rm32_imm32,
        Cmp_RAX_imm32 => Cmp_rm64_imm32,
        Test_AL_imm8 => Test_rm8_imm8,
        Test_AX_imm16 => Test_rm16_imm16,
        Test_EAX_imm32 => Test_rm32_imm32,
        Test_RAX_imm32 => Test_rm64_imm32,
        Xchg_r16_AX => Xchg_rm16_r16,
        Xchg_r32_EAX => Xchg_rm32_r32,
        Xchg_r64_RAX => Xchg_rm64_r64,
        Mov_AL_moffs8 => Mov_r8_rm8,
        Mov_AX_moffs16 => Mov_r16_rm16,
        Mov_EAX_moffs32 => Mov_r32_rm32,
        Mov_RAX_moffs64 => Mov_r64_rm64,
        Mov_moffs8_AL => Mov_rm8_r8,
        Mov_moffs16_AX => Mov_rm16_r16,
        Mov_moffs32_EAX => Mov_rm32_r32,
        Mov_moffs64_RAX => Mov_rm64_r64,
        Inc_r16 => Inc_rm16,
        Inc_r32 => Inc_rm32,
        Dec_r16 => Dec_rm16,
        Dec_r32 => Dec_rm32,
        _ => return,
    };
    i.set_code(code);
}

/// Whether the host has what a general-purpose instruction needs, and a guest is promised it only then.
fn host_can(i: &Instruction) -> bool {
    use iced_x86::CpuidFeature::*;
    i.code().cpuid_features().iter().all(|f| match f {
        INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | X64 | CMOV | MULTIBYTENOP | SSE2 | SSE => {
            true
        }
        POPCNT => std::arch::is_x86_feature_detected!("popcnt"),
        LZCNT => std::arch::is_x86_feature_detected!("lzcnt"),
        BMI1 => std::arch::is_x86_feature_detected!("bmi1"),
        BMI2 => std::arch::is_x86_feature_detected!("bmi2"),
        MOVBE => std::arch::is_x86_feature_detected!("movbe"),
        ADX => std::arch::is_x86_feature_detected!("adx"),
        SSE4_2 => std::arch::is_x86_feature_detected!("sse4.2"),
        _ => false,
    })
}

fn has_register_bit_offset(i: &Instruction) -> bool {
    i.op0_kind() == OpKind::Memory && i.op1_kind() == OpKind::Register
}

/// Whether a memory operand, if there is one, is addressed as is usual: not with an address-size prefix, and in 32-bit
/// code only through the flat segments.
fn plain_operand(i: &Instruction, narrow: bool) -> bool {
    if !(0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory) {
        return true;
    }
    let (base, index) = (i.memory_base(), i.memory_index());
    if narrow {
        let fits = |r: Register| r == Register::None || r.is_gpr32();
        let prefixed = matches!(i.segment_prefix(), Register::CS | Register::FS | Register::GS);
        return fits(base) && fits(index) && i.memory_displ_size() != 2 && !prefixed;
    }
    let other = |r: Register| r.is_gpr32() || r == Register::EIP;
    let absolute = base == Register::None && index == Register::None && i.memory_displ_size() == 4;
    !other(base) && !other(index) && !absolute
}

fn classify(i: &Instruction) -> Kind {
    use Mnemonic::*;
    let narrow = i.code_size() == CodeSize::Code32;
    let near = if narrow { OpKind::NearBranch32 } else { OpKind::NearBranch64 };
    let is = |wide: Code, short: Code| i.code() == if narrow { short } else { wide };
    match i.flow_control() {
        FlowControl::Next => {}
        FlowControl::ConditionalBranch => {
            return if i.is_jcc_short_or_near() && i.op0_kind() == near { Kind::Jcc } else { Kind::End };
        }
        FlowControl::UnconditionalBranch if i.op0_kind() == near => return Kind::Jmp,
        FlowControl::Call if i.op0_kind() == near => return Kind::Call,
        FlowControl::IndirectBranch if is(Code::Jmp_rm64, Code::Jmp_rm32) && plain_operand(i, narrow) => {
            return Kind::JmpIndirect;
        }
        FlowControl::IndirectCall if is(Code::Call_rm64, Code::Call_rm32) && plain_operand(i, narrow) => {
            return Kind::CallIndirect;
        }
        FlowControl::Return if is(Code::Retnq, Code::Retnd) || is(Code::Retnq_imm16, Code::Retnd_imm16) => {
            return Kind::Ret;
        }
        _ => return Kind::End,
    }
    if !plain_operand(i, narrow) {
        return Kind::Interpret;
    }
    if i.op_count() > 0
        && (0..i.op_count()).any(|k| {
            let r = if i.op_kind(k) == OpKind::Register { i.op_register(k) } else { Register::None };
            r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr()
        })
    {
        return Kind::Interpret;
    }
    let generic = |ok: bool| if ok && host_can(i) { Kind::Generic } else { Kind::Interpret };
    match i.mnemonic() {
        Nop | Endbr64 | Endbr32 | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchnta | Prefetchw => Kind::Nop,
        Pause | Mfence | Lfence | Sfence => Kind::Generic,
        Lea => Kind::Lea,
        Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr if i.op1_kind() == OpKind::Register => Kind::ShiftCl,
        Shld | Shrd if i.op2_kind() == OpKind::Register => Kind::ShiftCl,
        Mov | Movzx | Movsx | Movsxd | Add | Or | Adc | Sbb | And | Sub | Xor | Cmp | Test | Not | Neg
        | Inc | Dec | Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd | Bsf | Bsr | Tzcnt
        | Lzcnt | Popcnt | Bswap | Xchg | Xadd | Movbe | Andn | Bextr | Blsi | Blsmsk | Blsr | Bzhi
        | Pdep | Pext | Rorx | Sarx | Shlx | Shrx | Adcx | Adox | Crc32 | Movnti | Cmc | Stc | Clc => {
            generic(true)
        }
        Bt | Bts | Btr | Btc => generic(!has_register_bit_offset(i)),
        Cmova | Cmovae | Cmovb | Cmovbe | Cmove | Cmovg | Cmovge | Cmovl | Cmovle | Cmovne | Cmovno
        | Cmovnp | Cmovns | Cmovo | Cmovp | Cmovs => generic(true),
        Seta | Setae | Setb | Setbe | Sete | Setg | Setge | Setl | Setle | Setne | Setno | Setnp | Setns
        | Seto | Setp | Sets => generic(true),
        Imul if i.op_count() > 1 => generic(true),
        Imul | Mul => Kind::Mul,
        Div if !matches!(i.code(), Code::Div_rm8) => Kind::Div,
        Idiv if !matches!(i.code(), Code::Idiv_rm8) => Kind::Idiv,
        Mulx => generic(true),
        Cmpxchg => Kind::Cmpxchg,
        Cbw | Cwde | Cdqe | Cwd | Cdq | Cqo => Kind::Extend,
        Push if is(Code::Push_r64, Code::Push_r32)
            || is(Code::Pushq_imm8, Code::Pushd_imm8)
            || is(Code::Pushq_imm32, Code::Pushd_imm32)
            || is(Code::Push_rm64, Code::Push_rm32) =>
        {
            Kind::Push
        }
        Pop if is(Code::Pop_r64, Code::Pop_r32)
            || is(Code::Pop_rm64, Code::Pop_rm32) && i.op0_kind() == OpKind::Register =>
        {
            Kind::Pop
        }
        Leave if is(Code::Leaveq, Code::Leaved) => Kind::Leave,
        Cli => Kind::Cli,
        Sti => Kind::Sti,
        Pushfq => Kind::Pushf,
        Popfq => Kind::Popf,
        Rdtsc | Rdtscp => Kind::Rdtsc,
        _ => vector(i),
    }
}

fn vector(i: &Instruction) -> Kind {
    let Some(r) = recipe(i) else { return Kind::Interpret };
    if matches!(r.class, Class::X87 | Class::Mmx) {
        return match r.special {
            None | Some(Special::Emms | Special::Fnstcw) => Kind::Fp { mmx: r.class == Class::Mmx },
            Some(Special::FnstswAx) => Kind::Fnstsw,
            Some(_) => Kind::Interpret,
        };
    }
    let narrow = i.code_size() == CodeSize::Code32;
    if narrow && r.special == Some(Special::Vzeroupper) {
        // It leaves registers alone that 32-bit code cannot name.
        return Kind::Interpret;
    }
    if r.special.is_some_and(|s| s != Special::Vzeroupper) || r.x87 {
        return Kind::Interpret;
    }
    let avx = match r.class {
        Class::Sse => false,
        Class::Avx => true,
        _ => return Kind::Interpret,
    };
    let hidden = crate::native::recipe::implicit(i);
    if hidden.reads_lengths {
        return Kind::Interpret;
    }
    Kind::Vector { avx, align: r.align, writes_rcx: hidden.writes_rcx }
}

fn analyse(mut i: Instruction) -> Inst {
    let kind = classify(&i);
    let (reads, mut modifies) = (flags(i.rflags_read()), flags(i.rflags_modified()));
    let through_carry = matches!(i.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr);
    if through_carry && kind != Kind::Interpret {
        // Even where they rotate by nothing (a byte by nine) the host may change OF.
        modifies |= (iced_x86::RflagsBits::CF | iced_x86::RflagsBits::OF) as u8;
    }
    let kills = match kind {
        // A count of zero leaves all flags as they were, and REP may do nothing.
        Kind::ShiftCl | Kind::Interpret | Kind::End => 0,
        _ if through_carry => 0,
        _ => modifies,
    };
    normalise(&mut i);
    Inst { i, kind, reads, kills, modifies, live_out: ALL, live_fault: 0 }
}

/// Flags that may be read at `ip` before they are written, as far as the code there tells. `page` holds the code of
/// the page at `page_ip`.
fn peek(page: &[u8], page_ip: u64, ip: u64, bits: u32) -> u8 {
    let offset = ip.wrapping_sub(page_ip);
    if offset >= page.len() as u64 {
        return ALL;
    }
    let mut pending = ALL;
    let mut live = 0;
    let decoder = Decoder::with_ip(bits, &page[offset as usize..], ip, DecoderOptions::NONE);
    for i in decoder.into_iter().take(PEEK) {
        let a = if i.is_invalid() { return live | pending } else { light(&i) };
        live |= a.0 & pending;
        pending &= !a.1;
        if pending == 0 {
            break;
        }
        if i.flow_control() != FlowControl::Next {
            break;
        }
    }
    live | pending
}

/// Flags read, and flags certainly overwritten.
fn light(i: &Instruction) -> (u8, u8) {
    use Mnemonic::*;
    match i.mnemonic() {
        Mov | Movzx | Movsx | Movsxd | Lea | Push | Pop | Nop | Endbr64 => (0, 0),
        Add | And | Or | Xor | Sub | Cmp | Test | Neg => (0, ALL),
        Inc | Dec => (0, ALL & !(iced_x86::RflagsBits::CF as u8)),
        Adc | Sbb => (iced_x86::RflagsBits::CF as u8, ALL),
        _ if i.is_jcc_short_or_near() => (flags(i.rflags_read()), 0),
        _ => (ALL, 0),
    }
}

/// Decodes the block at `ip`, of 64-bit or 32-bit code. `exact`: all flags are live wherever an instruction may fault. `page` holds the code of the page that `ip` is in.
pub fn scan(page: &[u8], ip: u64, bits: u32, exact: bool) -> Scan {
    let page_ip = ip & !0xfff;
    let mut out = Scan { end: ip, ..Scan::default() };
    let mut side_exits = 0;
    let mut decoder = Decoder::with_ip(bits, &page[(ip & 0xfff) as usize..], ip, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() && out.insts.len() < MAX {
        decoder.decode_out(&mut instruction);
        if instruction.is_invalid() || bits == 32 && instruction.next_ip() > u64::from(u32::MAX) {
            // Undefined, or reaching over the end of the page, or of the address space.
            out.stopped = true;
            break;
        }
        let mut inst = analyse(instruction);
        inst.live_fault = if exact { ALL } else { 0 };
        out.insts.push(inst);
        out.end = instruction.next_ip();
        match inst.kind {
            Kind::Jcc => {
                side_exits += 1;
                if side_exits > MAX_SIDE_EXITS || instruction.near_branch_target() <= instruction.ip() {
                    break;
                }
            }
            Kind::Jmp | Kind::JmpIndirect | Kind::Call | Kind::CallIndirect | Kind::Ret | Kind::End => break,
            _ => {}
        }
    }
    liveness(&mut out, page, page_ip, bits);
    out
}

fn liveness(out: &mut Scan, page: &[u8], page_ip: u64, bits: u32) {
    let end = out.end;
    let mut live = match out.insts.last() {
        None => return,
        _ if out.stopped => ALL,
        Some(last) => match last.kind {
            Kind::Jmp => peek(page, page_ip, last.i.near_branch_target(), bits),
            Kind::JmpIndirect | Kind::Call | Kind::CallIndirect | Kind::Ret | Kind::End => ALL,
            _ => peek(page, page_ip, end, bits),
        },
    };
    for inst in out.insts.iter_mut().rev() {
        if inst.kind == Kind::Jcc {
            live |= peek(page, page_ip, inst.i.near_branch_target(), bits);
        }
        inst.live_out = live;
        live = inst.live_in();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(code: &[u8]) -> Vec<u8> {
        let mut p = code.to_vec();
        p.resize(4096, 0x90);
        p
    }

    #[test]
    fn flags_that_a_later_instruction_overwrites_are_dead() {
        // add eax, ebx; mov ecx, [rdx]; cmp eax, ecx; jb +0; xor eax, eax; ret
        let s = scan(
            &page(&[0x01, 0xd8, 0x8b, 0x0a, 0x39, 0xc8, 0x72, 0x00, 0x31, 0xc0, 0xc3]),
            0x1000,
            64,
            false,
        );
        assert_eq!(s.insts.len(), 6);
        assert_eq!(s.insts[0].live_out, 0);
        assert_eq!(s.insts[1].live_in(), 0);
        assert_eq!(s.insts[2].live_out, iced_x86::RflagsBits::CF as u8);
        assert_eq!(s.insts[4].live_out, ALL); // a return leads anywhere
    }

    #[test]
    fn increments_keep_carry() {
        // stc; inc eax; adc ebx, 0; jmp .-0 (to itself: flags all live)
        let s = scan(&page(&[0xf9, 0xff, 0xc0, 0x83, 0xd3, 0x00, 0xeb, 0xfe]), 0x1000, 64, false);
        assert_eq!(s.insts[0].live_out & iced_x86::RflagsBits::CF as u8, iced_x86::RflagsBits::CF as u8);
        assert_eq!(s.insts[1].live_out, iced_x86::RflagsBits::CF as u8);
    }

    #[test]
    fn blocks_end_with_what_only_the_interpreter_can_do() {
        let s = scan(&page(&[0x90, 0x0f, 0x05]), 0x1000, 64, false); // nop; syscall
        assert!(!s.stopped && s.insts.len() == 2 && s.insts[1].kind == Kind::End);
        let mut p = vec![0x90; 4096];
        p[4095] = 0xe9; // a jump that reaches into the next page
        let s = scan(&p, 0x1ff0, 64, false);
        assert!(s.stopped && s.end == 0x1fff);
    }
}
