//! What the host's processor has, as far as the software CPU hands it on.

use iced_x86::CpuidFeature;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// Features of the host.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    leaf1_ecx: u32,
    leaf7_ebx: u32,
    leaf7_ecx: u32,
    leaf7_1_eax: u32,
    ext_ecx: u32,
    avx: bool,
}

/// One optional feature: where CPUID reports it, and what iced calls its instructions.
struct Optional {
    feature: CpuidFeature,
    leaf: Leaf,
    bit: u32,
    /// Needs the AVX state to be usable.
    avx: bool,
}

/// CPUID words that report optional features handed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaf {
    /// Leaf 1, ECX.
    OneEcx,
    /// Leaf 7.0, EBX.
    SevenEbx,
    /// Leaf 7.0, ECX.
    SevenEcx,
    /// Leaf 7.1, EAX.
    SevenOneEax,
    /// Leaf 8000_0001, ECX.
    ExtEcx,
}

const fn feature(feature: CpuidFeature, leaf: Leaf, bit: u32, avx: bool) -> Optional {
    Optional { feature, leaf, bit, avx }
}

const OPTIONAL: &[Optional] = &[
    feature(CpuidFeature::SSE3, Leaf::OneEcx, 0, false),
    feature(CpuidFeature::PCLMULQDQ, Leaf::OneEcx, 1, false),
    feature(CpuidFeature::SSSE3, Leaf::OneEcx, 9, false),
    feature(CpuidFeature::FMA, Leaf::OneEcx, 12, true),
    feature(CpuidFeature::SSE4_1, Leaf::OneEcx, 19, false),
    feature(CpuidFeature::SSE4_2, Leaf::OneEcx, 20, false),
    feature(CpuidFeature::AES, Leaf::OneEcx, 25, false),
    feature(CpuidFeature::AVX, Leaf::OneEcx, 28, true),
    feature(CpuidFeature::F16C, Leaf::OneEcx, 29, true),
    feature(CpuidFeature::AVX2, Leaf::SevenEbx, 5, true),
    feature(CpuidFeature::SHA, Leaf::SevenEbx, 29, false),
    feature(CpuidFeature::GFNI, Leaf::SevenEcx, 8, false),
    feature(CpuidFeature::VAES, Leaf::SevenEcx, 9, true),
    feature(CpuidFeature::VPCLMULQDQ, Leaf::SevenEcx, 10, true),
    feature(CpuidFeature::AVX_VNNI, Leaf::SevenOneEax, 4, true),
];

impl Host {
    /// The host this runs on.
    pub fn get() -> &'static Host {
        static HOST: OnceLock<Host> = OnceLock::new();
        HOST.get_or_init(|| {
            let max = __cpuid_count(0, 0).eax;
            let leaf = |n: u32, sub: u32| if n <= max { Some(__cpuid_count(n, sub)) } else { None };
            let seven = leaf(7, 0);
            Host {
                leaf1_ecx: leaf(1, 0).map_or(0, |l| l.ecx),
                leaf7_ebx: seven.map_or(0, |l| l.ebx),
                leaf7_ecx: seven.map_or(0, |l| l.ecx),
                leaf7_1_eax: seven.filter(|l| l.eax >= 1).and_then(|_| leaf(7, 1)).map_or(0, |l| l.eax),
                ext_ecx: if __cpuid_count(0x8000_0000, 0).eax > 0x8000_0000 {
                    __cpuid_count(0x8000_0001, 0).ecx
                } else {
                    0
                },
                // Knows whether the kernel enabled the state as well.
                avx: std::arch::is_x86_feature_detected!("avx"),
            }
        })
    }

    /// Whether the kernel and processor give us AVX.
    pub fn has_avx(&self) -> bool {
        self.avx
    }

    /// A CPUID word of the host.
    pub fn word(&self, leaf: Leaf) -> u32 {
        match leaf {
            Leaf::OneEcx => self.leaf1_ecx,
            Leaf::SevenEbx => self.leaf7_ebx,
            Leaf::SevenEcx => self.leaf7_ecx,
            Leaf::SevenOneEax => self.leaf7_1_eax,
            Leaf::ExtEcx => self.ext_ecx,
        }
    }

    /// Bit `bit` of a CPUID word of the host.
    pub fn bit(&self, leaf: Leaf, bit: u32) -> bool {
        self.word(leaf) >> bit & 1 != 0
    }

    /// CPUID bits of `leaf` that vector features executed natively set for the guest.
    pub fn vector_bits(&self, leaf: Leaf) -> u32 {
        OPTIONAL.iter().filter(|o| o.leaf == leaf && self.offers(o.feature)).fold(0, |w, o| w | 1 << o.bit)
    }

    /// Whether instructions of a feature can be executed here and are offered to guests.
    pub fn offers(&self, f: CpuidFeature) -> bool {
        use CpuidFeature::*;
        match f {
            INTEL8086 | X64 | FPU | FPU287 | FPU387 | CMOV | MMX | SSE | SSE2 | FXSR => true,
            XSAVE | XSAVEC | XSAVEOPT | XSAVES => true,
            _ => OPTIONAL.iter().any(|o| o.feature == f && self.bit(o.leaf, o.bit) && (!o.avx || self.avx)),
        }
    }
}
