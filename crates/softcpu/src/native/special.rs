//! Instructions of the vector and floating-point units that need code of their own: those that touch state the host must
//! not show (control words, state images), and those whose memory accesses are conditional.

use iced_x86::{Code, Instruction};

/// Which instruction.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Special {
    Fninit,
    Fnclex,
    Fldcw,
    Fnstcw,
    FnstswMem,
    FnstswAx,
    Fnstenv {
        wide: bool,
    },
    Fldenv {
        wide: bool,
    },
    Fnsave {
        wide: bool,
    },
    Frstor {
        wide: bool,
    },
    Wait,
    /// FNENI, FNDISI, FNSETPM: no-operations since the 387.
    X87Nop,
    Emms,
    Ldmxcsr,
    Stmxcsr,
    Fxsave {
        wide: bool,
    },
    Fxrstor {
        wide: bool,
    },
    Xsave {
        wide: bool,
    },
    Xsaveopt {
        wide: bool,
    },
    Xsavec {
        wide: bool,
    },
    Xsaves {
        wide: bool,
    },
    Xrstor {
        wide: bool,
    },
    Xrstors {
        wide: bool,
    },
    Xgetbv,
    Xsetbv,
    Vzeroupper,
    Vzeroall,
    /// MASKMOVQ.
    MaskStoreMmx,
    /// MASKMOVDQU, VMASKMOVDQU.
    MaskStoreBytes,
    /// VMASKMOVPS, VMASKMOVPD, VPMASKMOVD, VPMASKMOVQ from memory. Sizes in bytes.
    MaskLoad {
        element: u8,
        vector: u8,
    },
    /// The same to memory.
    MaskStore {
        element: u8,
        vector: u8,
    },
    /// VGATHER*, VPGATHER*: sizes of elements and indices in bytes, number of elements.
    Gather {
        element: u8,
        index: u8,
        count: u8,
    },
}

impl Special {
    /// What `i` is, if it is special.
    pub fn of(i: &Instruction) -> Option<Self> {
        use Code::*;
        let gather = |element, index, count| Self::Gather { element, index, count };
        Some(match i.code() {
            Fninit => Self::Fninit,
            Fnclex => Self::Fnclex,
            Fldcw_m2byte => Self::Fldcw,
            Fnstcw_m2byte => Self::Fnstcw,
            Fnstsw_m2byte => Self::FnstswMem,
            Fnstsw_AX => Self::FnstswAx,
            Fnstenv_m14byte => Self::Fnstenv { wide: false },
            Fnstenv_m28byte => Self::Fnstenv { wide: true },
            Fldenv_m14byte => Self::Fldenv { wide: false },
            Fldenv_m28byte => Self::Fldenv { wide: true },
            Fnsave_m94byte => Self::Fnsave { wide: false },
            Fnsave_m108byte => Self::Fnsave { wide: true },
            Frstor_m94byte => Self::Frstor { wide: false },
            Frstor_m108byte => Self::Frstor { wide: true },
            Wait => Self::Wait,
            Fneni | Fndisi | Fnsetpm => Self::X87Nop,
            Emms => Self::Emms,
            Ldmxcsr_m32 | VEX_Vldmxcsr_m32 => Self::Ldmxcsr,
            Stmxcsr_m32 | VEX_Vstmxcsr_m32 => Self::Stmxcsr,
            Fxsave_m512byte => Self::Fxsave { wide: false },
            Fxsave64_m512byte => Self::Fxsave { wide: true },
            Fxrstor_m512byte => Self::Fxrstor { wide: false },
            Fxrstor64_m512byte => Self::Fxrstor { wide: true },
            Xsave_mem => Self::Xsave { wide: false },
            Xsave64_mem => Self::Xsave { wide: true },
            Xsaveopt_mem => Self::Xsaveopt { wide: false },
            Xsaveopt64_mem => Self::Xsaveopt { wide: true },
            Xsavec_mem => Self::Xsavec { wide: false },
            Xsavec64_mem => Self::Xsavec { wide: true },
            Xsaves_mem => Self::Xsaves { wide: false },
            Xsaves64_mem => Self::Xsaves { wide: true },
            Xrstor_mem => Self::Xrstor { wide: false },
            Xrstor64_mem => Self::Xrstor { wide: true },
            Xrstors_mem => Self::Xrstors { wide: false },
            Xrstors64_mem => Self::Xrstors { wide: true },
            Xgetbv => Self::Xgetbv,
            Xsetbv => Self::Xsetbv,
            VEX_Vzeroupper => Self::Vzeroupper,
            VEX_Vzeroall => Self::Vzeroall,
            Maskmovq_rDI_mm_mm => Self::MaskStoreMmx,
            Maskmovdqu_rDI_xmm_xmm | VEX_Vmaskmovdqu_rDI_xmm_xmm => Self::MaskStoreBytes,
            VEX_Vmaskmovps_xmm_xmm_m128 | VEX_Vpmaskmovd_xmm_xmm_m128 => {
                Self::MaskLoad { element: 4, vector: 16 }
            }
            VEX_Vmaskmovps_ymm_ymm_m256 | VEX_Vpmaskmovd_ymm_ymm_m256 => {
                Self::MaskLoad { element: 4, vector: 32 }
            }
            VEX_Vmaskmovpd_xmm_xmm_m128 | VEX_Vpmaskmovq_xmm_xmm_m128 => {
                Self::MaskLoad { element: 8, vector: 16 }
            }
            VEX_Vmaskmovpd_ymm_ymm_m256 | VEX_Vpmaskmovq_ymm_ymm_m256 => {
                Self::MaskLoad { element: 8, vector: 32 }
            }
            VEX_Vmaskmovps_m128_xmm_xmm | VEX_Vpmaskmovd_m128_xmm_xmm => {
                Self::MaskStore { element: 4, vector: 16 }
            }
            VEX_Vmaskmovps_m256_ymm_ymm | VEX_Vpmaskmovd_m256_ymm_ymm => {
                Self::MaskStore { element: 4, vector: 32 }
            }
            VEX_Vmaskmovpd_m128_xmm_xmm | VEX_Vpmaskmovq_m128_xmm_xmm => {
                Self::MaskStore { element: 8, vector: 16 }
            }
            VEX_Vmaskmovpd_m256_ymm_ymm | VEX_Vpmaskmovq_m256_ymm_ymm => {
                Self::MaskStore { element: 8, vector: 32 }
            }
            VEX_Vpgatherdd_xmm_vm32x_xmm | VEX_Vgatherdps_xmm_vm32x_xmm => gather(4, 4, 4),
            VEX_Vpgatherdd_ymm_vm32y_ymm | VEX_Vgatherdps_ymm_vm32y_ymm => gather(4, 4, 8),
            VEX_Vpgatherdq_xmm_vm32x_xmm | VEX_Vgatherdpd_xmm_vm32x_xmm => gather(8, 4, 2),
            VEX_Vpgatherdq_ymm_vm32x_ymm | VEX_Vgatherdpd_ymm_vm32x_ymm => gather(8, 4, 4),
            VEX_Vpgatherqd_xmm_vm64x_xmm | VEX_Vgatherqps_xmm_vm64x_xmm => gather(4, 8, 2),
            VEX_Vpgatherqd_xmm_vm64y_xmm | VEX_Vgatherqps_xmm_vm64y_xmm => gather(4, 8, 4),
            VEX_Vpgatherqq_xmm_vm64x_xmm | VEX_Vgatherqpd_xmm_vm64x_xmm => gather(8, 8, 2),
            VEX_Vpgatherqq_ymm_vm64y_ymm | VEX_Vgatherqpd_ymm_vm64y_ymm => gather(8, 8, 4),
            _ => return None,
        })
    }
}
