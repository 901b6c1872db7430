//! Which instructions are tested: everything that the software CPU's CPUID promises and user code may execute with the
//! same result on the processor and in a guest.

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic};

/// Instruction families; each is a test of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Arithmetic, logic, moves, bit operations, and everything else on general registers.
    Integer,
    /// Stack and control flow.
    Flow,
    /// String instructions.
    Strings,
    X87,
    Mmx,
    /// SSE to SSE4.2.
    Sse,
    /// AVX, F16C.
    Avx,
    /// AVX2, FMA, VNNI.
    Avx2,
    /// AES, PCLMULQDQ, SHA, GFNI.
    Crypto,
    /// Control words, FXSAVE, XSAVE.
    State,
    /// Everything, as 32-bit code in compatibility mode.
    Compatibility,
    /// Everything, as 16-bit code in compatibility mode, with segments of all kinds.
    Sixteen,
}

/// CPUID bits (leaf, subleaf, register 0 to 3 = EAX to EDX, bit) and the instructions that they promise.
pub const PROMISES: &[(u32, u32, usize, u32, &[CpuidFeature])] = {
    use CpuidFeature::*;
    &[
        (1, 0, 2, 0, &[SSE3]),
        (1, 0, 2, 1, &[PCLMULQDQ]),
        (1, 0, 2, 9, &[SSSE3]),
        (1, 0, 2, 12, &[FMA]),
        (1, 0, 2, 13, &[CMPXCHG16B]),
        (1, 0, 2, 19, &[SSE4_1]),
        (1, 0, 2, 20, &[SSE4_2]),
        (1, 0, 2, 22, &[MOVBE]),
        (1, 0, 2, 23, &[POPCNT]),
        (1, 0, 2, 25, &[AES]),
        (1, 0, 2, 26, &[XSAVE]),
        (1, 0, 2, 28, &[AVX]),
        (1, 0, 2, 29, &[F16C]),
        (1, 0, 3, 0, &[FPU, FPU287, FPU387]),
        (1, 0, 3, 8, &[CX8]),
        (1, 0, 3, 15, &[CMOV]),
        (1, 0, 3, 19, &[CLFSH]),
        (1, 0, 3, 23, &[MMX]),
        (1, 0, 3, 24, &[FXSR]),
        (1, 0, 3, 25, &[SSE]),
        (1, 0, 3, 26, &[SSE2]),
        (7, 0, 1, 0, &[FSGSBASE]),
        (7, 0, 1, 3, &[BMI1]),
        (7, 0, 1, 5, &[AVX2]),
        (7, 0, 1, 8, &[BMI2]),
        (7, 0, 1, 19, &[ADX]),
        (7, 0, 1, 23, &[CLFLUSHOPT]),
        (7, 0, 1, 24, &[CLWB]),
        (7, 0, 1, 29, &[SHA]),
        (7, 0, 2, 8, &[GFNI]),
        (7, 0, 2, 9, &[VAES]),
        (7, 0, 2, 10, &[VPCLMULQDQ]),
        (7, 1, 0, 4, &[AVX_VNNI]),
        (0xd, 1, 0, 0, &[XSAVEOPT]),
        (0xd, 1, 0, 1, &[XSAVEC]),
        (0x8000_0001, 0, 2, 5, &[LZCNT]),
        (0x8000_0001, 0, 2, 8, &[PREFETCHW]),
        (0x8000_0001, 0, 3, 29, &[X64]),
    ]
};

/// Always there.
const BASE: &[CpuidFeature] = {
    use CpuidFeature::*;
    &[INTEL8086, INTEL186, INTEL286, INTEL386, INTEL486, MULTIBYTENOP, PAUSE]
};

impl Family {
    /// Width of the code: 64, 32 or 16 bits.
    pub fn bits(self) -> u32 {
        match self {
            Family::Compatibility => 32,
            Family::Sixteen => 16,
            _ => 64,
        }
    }
}

/// Results that differ from machine to machine or from call to call, or that depend on the kernel's tables.
fn excluded(code: Code, bits: u32) -> bool {
    use Mnemonic::*;
    let i = code.op_code();
    let m = code.mnemonic();
    let system = matches!(
        m,
        Cpuid
            | Rdtsc
            | Rdtscp
            | Rdpmc
            | Rdpid
            | Rdrand
            | Rdseed
            | Sgdt
            | Sidt
            | Sldt
            | Str
            | Smsw
            | Syscall
            | Sysenter
            | Int
            | Int1
            | Int3
            | Iret
            | Iretd
            | Iretq
            | Retf
            | Xgetbv
            | Wrfsbase
            | Wrgsbase
            | Rdfsbase
            | Lfs
            | Lgs
            | Loadall
            | Umov
            | Ibts
            | Xbts
            | Frstpm
            | Fnstdw
            | Fnstsg
            | Xsaves
            | Xsaves64
            | Xrstors
            | Xrstors64
            | Ud0
            | Ud1
    );
    let far =
        format!("{code:?}").contains("ptr") || matches!(m, Jmp | Call) && format!("{code:?}").contains("m16");
    let loads_segment = matches!(
        code,
        Code::Popw_FS | Code::Popw_GS | Code::Popq_FS | Code::Popq_GS | Code::Popd_FS | Code::Popd_GS
    );
    let loads_segment = loads_segment || bits == 64 && uses_selectors(code);
    // BSWAP of a 16-bit register is undefined. So is 0F 0D with a register; and UD0 and UD1 have a ModRM byte or not,
    // depending on who made the processor. Near branches with a 16-bit operand size in 64-bit mode, too, differ.
    let reserved = format!("{code:?}").contains("0F0D");
    let undefined =
        reserved || matches!(code, Code::Bswap_r16) || bits == 64 && i.operand_size() == 16 && is_branch(m);
    system || far || loads_segment || undefined
}

/// Whether an instruction loads a segment register, or looks a selector up.
pub fn uses_selectors(code: Code) -> bool {
    use Mnemonic::*;
    let tables = matches!(code.mnemonic(), Lar | Lsl | Verr | Verw | Lds | Les | Lss);
    tables
        || matches!(
            code,
            Code::Mov_Sreg_rm16
                | Code::Mov_Sreg_r32m16
                | Code::Mov_Sreg_r64m16
                | Code::Popw_ES
                | Code::Popd_ES
                | Code::Popw_SS
                | Code::Popd_SS
                | Code::Popw_DS
                | Code::Popd_DS
        )
}

fn is_branch(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Jmp | Call | Ret | Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz)
        || format!("{m:?}").starts_with('J')
}

fn family(code: Code) -> Family {
    use CpuidFeature::*;
    let features = code.cpuid_features();
    let has = |list: &[CpuidFeature]| features.iter().any(|f| list.contains(f));
    let i = code.op_code();
    let m = format!("{:?}", code.mnemonic()).to_lowercase();
    let state = [
        "fxsave", "fxrstor", "xsave", "xrstor", "fnstenv", "fldenv", "fnsave", "frstor", "ldmxcsr", "stmxcsr",
    ];
    let state = state.iter().any(|s| m.contains(s)) || m.starts_with("vzero");
    match () {
        () if state => Family::State,
        () if has(&[AES, PCLMULQDQ, SHA, GFNI, VAES, VPCLMULQDQ]) => Family::Crypto,
        () if has(&[AVX2, FMA, AVX_VNNI]) => Family::Avx2,
        () if has(&[AVX, F16C]) => Family::Avx,
        () if has(&[FPU, FPU287, FPU387]) || m == "wait" => Family::X87,
        () if i.op_kinds().iter().any(|k| format!("{k:?}").starts_with("mm_")) || m == "emms" => Family::Mmx,
        () if m == "crc32" || m == "popcnt" => Family::Integer,
        () if has(&[SSE, SSE2, SSE3, SSSE3, SSE4_1, SSE4_2]) => Family::Sse,
        () if i.op_kinds().iter().any(|k| matches!(format!("{k:?}").as_str(), "seg_rSI" | "es_rDI")) => {
            Family::Strings
        }
        () if i.is_stack_instruction() || is_branch(code.mnemonic()) => Family::Flow,
        () => Family::Integer,
    }
}

/// The instructions of a family.
pub fn codes(wanted: Family) -> Vec<Code> {
    let table = softcpu::cpuid::supported();
    let mut promised = BASE.to_vec();
    for (leaf, sub, register, bit, features) in PROMISES {
        if table.query(*leaf, *sub)[*register] >> bit & 1 != 0 {
            promised.extend(*features);
        }
    }
    Code::values()
        .filter(|c| {
            let i = c.op_code();
            i.is_instruction()
                && match wanted.bits() {
                    16 => i.mode16(),
                    32 => i.mode32(),
                    _ => i.mode64(),
                }
                && matches!(i.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
                && c.cpuid_features().iter().all(|f| promised.contains(f))
                // With a WAIT in front they are two instructions.
                && !i.fwait()
                && !i.must_be_cpl0()
                && i.cpl3()
                && !excluded(*c, wanted.bits())
                && (wanted.bits() != 64 || family(*c) == wanted)
        })
        .collect()
}
