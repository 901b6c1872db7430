//! What an instruction that the host can execute needs: which units, which registers, what memory. Facts only, shared by
//! whoever generates code.

use super::features::Host;
use super::special::Special;
use iced_x86::{
    Code, CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpCodeOperandKind, OpKind, Register, RflagsBits,
};

/// Which unit an instruction belongs to, for the checks of CR0, CR4 and XCR0 (Intel SDM vol. 3, 2.5 and table 13-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// x87: #NM if CR0.EM or CR0.TS.
    X87,
    /// MMX: #UD if CR0.EM, #NM if CR0.TS.
    Mmx,
    /// Legacy-encoded SSE and its successors: #UD if CR0.EM or not CR4.OSFXSR, #NM if CR0.TS.
    Sse,
    /// VEX-encoded: #UD unless CR4.OSXSAVE and XCR0 has SSE and AVX, #NM if CR0.TS.
    Avx,
}

/// How an instruction uses its memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemAccess {
    /// It has none.
    None,
    /// It reads.
    Read,
    /// It writes, the whole operand.
    Write,
}

/// Arithmetic flags, as in RFLAGS.
pub mod flags {
    /// Carry.
    pub const CF: u32 = 1;
    /// Parity.
    pub const PF: u32 = 1 << 2;
    /// Auxiliary carry.
    pub const AF: u32 = 1 << 4;
    /// Zero.
    pub const ZF: u32 = 1 << 6;
    /// Sign.
    pub const SF: u32 = 1 << 7;
    /// Overflow.
    pub const OF: u32 = 1 << 11;
}

/// Facts about an instruction.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Unit.
    pub class: Class,
    /// Dedicated code; `None`: the host's own instruction does it all.
    pub special: Option<Special>,
    /// Memory operand.
    pub access: MemAccess,
    /// Size of the memory operand in bytes.
    pub size: u16,
    /// Alignment that the memory operand must have (#GP), in bytes.
    pub align: u8,
    /// The host may insist on alignment where the guest does not.
    pub host_aligned: bool,
    /// It uses x87 or MMX registers, so a pending x87 exception comes first (#MF).
    pub x87: bool,
    /// It is an x87 instruction that records FOP, FIP and FDP.
    pub records: bool,
    /// It reads arithmetic flags.
    pub reads_flags: bool,
    /// Arithmetic flags that it writes, as in RFLAGS.
    pub writes_flags: u32,
    /// It has VEX encoding.
    pub vex: bool,
    /// It uses a 256-bit register.
    pub wide: bool,
}

/// Instructions whose 16-byte memory operand need not be aligned, in legacy encoding (see the exception
/// class of each in Intel SDM vol. 2).
fn unaligned_legacy(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Movups
            | Movupd
            | Movdqu
            | Lddqu
            | Pcmpestri
            | Pcmpestri64
            | Pcmpestrm
            | Pcmpestrm64
            | Pcmpistri
            | Pcmpistrm
    )
}

/// VEX instructions whose memory operand must be aligned.
fn aligned_vex(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa)
}

/// Maps iced's flag bits to RFLAGS.
fn rflags(bits: u32) -> u32 {
    [
        (RflagsBits::CF, flags::CF),
        (RflagsBits::PF, flags::PF),
        (RflagsBits::AF, flags::AF),
        (RflagsBits::ZF, flags::ZF),
        (RflagsBits::SF, flags::SF),
        (RflagsBits::OF, flags::OF),
    ]
    .iter()
    .fold(0, |sum, (theirs, ours)| if bits & theirs != 0 { sum | ours } else { sum })
}

/// x87 instructions that leave FOP, FIP and FDP alone (Intel SDM vol. 1, 8.1.8).
fn x87_control(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Fninit
            | Fnclex
            | Fldcw
            | Fnstcw
            | Fnstsw
            | Fnstenv
            | Fldenv
            | Fnsave
            | Frstor
            | Wait
            | Fneni
            | Fndisi
            | Fnsetpm
    )
}

/// Facts about `i`, if it is an instruction of a vector or floating-point unit that this host can execute and that the
/// software CPU offers.
pub fn recipe(i: &Instruction) -> Option<Recipe> {
    let code = i.code();
    let features = code.cpuid_features();
    if !features.iter().all(|f| Host::get().offers(*f)) {
        return None;
    }
    let vex = match i.encoding() {
        EncodingKind::Legacy => false,
        EncodingKind::VEX => true,
        _ => return None,
    };
    let special = Special::of(i);
    let x87_unit = code == Code::Wait || features.iter().any(|f| is_x87(*f));
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(i);
    let (mut vector, mut mm, mut wide) = (names_vector(code), false, false);
    let (mut access, mut gpr) = (MemAccess::None, 0);
    for k in 0..i.op_count() {
        match i.op_kind(k) {
            OpKind::Register => {
                let r = i.op_register(k);
                vector |= r.is_vector_register();
                wide |= r.is_ymm();
                mm |= r.is_mm();
                gpr += u32::from(r.is_gpr());
                if !(r.is_xmm() || r.is_ymm() || r.is_mm() || r.is_st() || r.is_gpr()) {
                    return None;
                }
            }
            OpKind::Memory => {
                access = match info.op_access(k) {
                    OpAccess::Read | OpAccess::CondRead => MemAccess::Read,
                    OpAccess::Write | OpAccess::CondWrite => MemAccess::Write,
                    _ if special.is_some() => MemAccess::None,
                    _ => return None,
                };
            }
            OpKind::Immediate8 | OpKind::Immediate8_2nd => {}
            _ if special.is_some() => {}
            _ => return None,
        }
    }
    if special.is_none() && !(x87_unit || vector || mm) || gpr > 2 {
        return None;
    }
    if special.is_none() && x87_unit && matches!(code, Code::Frstpm | Code::Fnstdw_AX | Code::Fnstsg_AX) {
        return None;
    }
    let class = match () {
        () if x87_unit => Class::X87,
        () if vex => Class::Avx,
        () if mm && !vector => Class::Mmx,
        () if code == Code::Emms => Class::Mmx,
        () => Class::Sse,
    };
    let size = i.memory_size().size() as u16;
    let mnemonic = i.mnemonic();
    // AMD's processors do not insist on alignment for SHA.
    let sha = features.contains(&CpuidFeature::SHA);
    let align = match class {
        Class::Sse if size == 16 && !unaligned_legacy(mnemonic) && !sha => 16,
        Class::Avx if aligned_vex(mnemonic) => size as u8,
        _ => 1,
    };
    // Conversions from memory do not touch the MMX registers, and do not wait for x87 exceptions (AMD).
    let x87 = x87_unit || mm || class == Class::Mmx;
    Some(Recipe {
        class,
        access,
        size,
        align,
        host_aligned: sha,
        x87,
        records: x87_unit && !x87_control(mnemonic) && special.is_none(),
        reads_flags: rflags(i.rflags_read()) != 0,
        writes_flags: rflags(i.rflags_modified()),
        vex,
        wide,
        special,
    })
}

/// Whether an operand may be a vector register, even if it is memory in the case at hand.
fn names_vector(code: Code) -> bool {
    use OpCodeOperandKind::{xmm_or_mem, ymm_or_mem};
    code.op_code().op_kinds().iter().any(|k| matches!(k, xmm_or_mem | ymm_or_mem))
}

fn is_x87(f: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(f, FPU | FPU287 | FPU387)
}

/// Registers used without being named: the legacy encodings' XMM0, and those of the string comparisons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Implicit {
    /// Reads XMM0.
    pub reads_xmm0: bool,
    /// Writes XMM0.
    pub writes_xmm0: bool,
    /// Reads (E/R)AX and (E/R)DX.
    pub reads_lengths: bool,
    /// Writes ECX (zero-extended).
    pub writes_rcx: bool,
}

/// Unnamed registers of `i`.
pub fn implicit(i: &Instruction) -> Implicit {
    use Mnemonic::*;
    match i.mnemonic() {
        Blendvps | Blendvpd | Pblendvb | Sha256rnds2 => Implicit { reads_xmm0: true, ..Default::default() },
        Pcmpistri | Vpcmpistri => Implicit { writes_rcx: true, ..Default::default() },
        Pcmpistrm | Vpcmpistrm => Implicit { writes_xmm0: true, ..Default::default() },
        Pcmpestri | Vpcmpestri | Pcmpestri64 | Vpcmpestri64 => {
            Implicit { reads_lengths: true, writes_rcx: true, ..Default::default() }
        }
        Pcmpestrm | Vpcmpestrm | Pcmpestrm64 | Vpcmpestrm64 => {
            Implicit { reads_lengths: true, writes_xmm0: true, ..Default::default() }
        }
        _ => Implicit::default(),
    }
}

/// Number (0 to 15) of a register within its kind.
pub fn number(r: Register) -> u16 {
    r.number() as u16 & 15
}
