//! What the software CPU says it is.
//!
//! It says `AuthenticAMD`: an operating system then asks for little that a virtual processor has to fake (no microcode
//! dance, no platform-information or power-limit registers), does not fear Meltdown (so it keeps kernel page-table
//! isolation, which would cost a TLB flush on each system call here, switched off), and nested virtualization will
//! be SVM. Family, model and stepping are those of a "Milan" EPYC, the last AMD server generation without AVX-512. The
//! brand string says who is really there.
//!
//! A feature is promised if this crate implements it and, where the host's own instruction does the work, if the host has
//! it. AVX-512, MONITOR, protection keys, CET, TSX and SGX are not there. Fast short REP MOVS is not promised: guests
//! that believe it replace loops of a few moves by one slow instruction.

use crate::Cpu;
use crate::fpu::{self, xcr0};
use crate::native::features::{Host, Leaf};
use crate::state::cr;
use accel::Cpuid;

/// Physical address bits. As many as most systems need: UEFI maps all of the space that they make.
pub const PHYS_BITS: u32 = 40;
/// Linear address bits.
pub const LINEAR_BITS: u32 = 48;

/// Family 19h, model 1, stepping 1.
const SIGNATURE: u32 = 0x00a0_0f11;
const VENDOR: &[u8; 12] = b"AuthenticAMD";
const BRAND: &[u8; 48] = b"Kvasir Software CPU (x86-64)\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
const HYPERVISOR: &[u8; 12] = b"KVMKVMKVM\0\0\0";

/// Highest basic, hypervisor and extended leaves.
const MAX_BASIC: u32 = 0x15;
const MAX_HYPERVISOR: u32 = 0x4000_0010;
const MAX_EXTENDED: u32 = 0x8000_0021;

/// Bits by position.
const fn bits(positions: &[u32]) -> u32 {
    let (mut word, mut i) = (0, 0);
    while i < positions.len() {
        word |= 1 << positions[i];
        i += 1;
    }
    word
}

/// Leaf 1 EDX: FPU, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE-36, CLFLUSH, MMX,
/// FXSR, SSE, SSE2.
const ONE_EDX: u32 = bits(&[0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26]);
/// Leaf 1 ECX, what needs nothing of the host: PCID, x2APIC, MOVBE, TSC deadline, XSAVE, hypervisor.
const ONE_ECX: u32 = bits(&[17, 21, 22, 24, 26, 31]);
/// Leaf 1 ECX, what the host executes: CMPXCHG16B, POPCNT, RDRAND.
const ONE_ECX_HOST: u32 = bits(&[13, 23, 30]);
/// Leaf 1 ECX: OSXSAVE, which mirrors CR4.
const OSXSAVE: u32 = 1 << 27;
/// Leaf 1 EDX: the local APIC is enabled in IA32_APIC_BASE.
const APIC: u32 = 1 << 9;
/// Leaf 7 EBX, what needs nothing of the host: FSGSBASE, TSC_ADJUST, SMEP, ERMS, INVPCID, x87 selectors deprecated, SMAP,
/// CLFLUSHOPT, CLWB.
const SEVEN_EBX: u32 = bits(&[0, 1, 7, 9, 10, 13, 20, 23, 24]);
/// Leaf 7 EBX, what the host executes: BMI1, BMI2, RDSEED, ADX.
const SEVEN_EBX_HOST: u32 = bits(&[3, 8, 18, 19]);
/// Leaf 7 ECX: UMIP, RDPID.
const SEVEN_ECX: u32 = bits(&[2, 22]);
/// Leaf 8000_0001 ECX, what needs nothing of the host: LAHF in 64-bit mode, PREFETCHW, topology extensions.
const EXT_ECX: u32 = bits(&[0, 8, 22]);
/// Leaf 8000_0001 ECX, what the host executes: LZCNT.
const EXT_ECX_HOST: u32 = bits(&[5]);
/// Leaf 8000_0001 EDX: what it repeats of leaf 1, and SYSCALL, NX, MMX extensions, 1 GiB pages, RDTSCP, long mode.
const EXT_EDX: u32 = ONE_EDX & 0x0183_f3ff | bits(&[11, 20, 22, 26, 27, 29]);
/// Leaf 8000_0008 EBX: x87 error pointers always saved; not vulnerable to speculative store bypass and branch type
/// confusion.
const EXT8_EBX: u32 = bits(&[2, 26, 29]);
/// Leaf 8000_0021 EAX: LFENCE is serializing, null selectors clear the base, automatic IBRS (so that no guest needs
/// retpolines), not vulnerable to speculative return stack overflow.
const EXT21_EAX: u32 = bits(&[2, 6, 8, 29, 30]);
/// Leaf 8000_0021 ECX: not vulnerable to transient scheduler attacks.
const EXT21_ECX: u32 = bits(&[1, 2]);
/// Hypervisor features: no delay on port accesses, kvm-clock (second generation of its MSRs), stable across vCPUs.
const KVM_FEATURES: u32 = bits(&[1, 3, 24]);

fn word(text: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]])
}

/// Everything the software CPU offers on this host; topology and APIC IDs are not filled in.
pub fn supported() -> Cpuid {
    let host = Host::get();
    let mut table = Cpuid::default();
    let mut set = |leaf: u32, [eax, ebx, ecx, edx]: [u32; 4]| {
        let e = table.entry(leaf, 0, false);
        (e.eax, e.ebx, e.ecx, e.edx) = (eax, ebx, ecx, edx);
    };
    let vendor = |max: u32| [max, word(VENDOR, 0), word(VENDOR, 8), word(VENDOR, 4)];
    set(0, vendor(MAX_BASIC));
    let one_ecx = ONE_ECX | host.vector_bits(Leaf::OneEcx) | host.word(Leaf::OneEcx) & ONE_ECX_HOST;
    set(1, [SIGNATURE, 8 << 8, one_ecx, ONE_EDX]);
    // The APIC timer runs in every power state.
    set(6, [1 << 2, 0, 0, 0]);
    set(0x15, crystal(base::tsc::frequency()));
    let khz = u32::try_from(base::tsc::frequency() / 1000).unwrap_or(u32::MAX);
    set(0x4000_0000, [MAX_HYPERVISOR, word(HYPERVISOR, 0), word(HYPERVISOR, 4), word(HYPERVISOR, 8)]);
    set(0x4000_0001, [KVM_FEATURES, 0, 0, 0]);
    // TSC and APIC timer frequency in kHz; the APIC's bus clock is 1 GHz, as KVM's.
    set(0x4000_0010, [khz, 1_000_000, 0, 0]);
    set(0x8000_0000, vendor(MAX_EXTENDED));
    let ext_ecx = EXT_ECX | host.word(Leaf::ExtEcx) & EXT_ECX_HOST;
    set(0x8000_0001, [SIGNATURE, 0x4000_0000, ext_ecx, EXT_EDX]);
    for i in 0..3 {
        let at = i as usize * 16;
        let text = [word(BRAND, at), word(BRAND, at + 4), word(BRAND, at + 8), word(BRAND, at + 12)];
        set(0x8000_0002 + i, text);
    }
    // L1: TLBs of 64 entries, fully associative; caches of 32 KiB, 8-way, lines of 64 bytes.
    set(0x8000_0005, [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140]);
    // L2: TLBs of 2048 and 1024 entries; 512 KiB, 8-way. L3: 32 MiB, 16-way.
    set(0x8000_0006, [0x4800_4400, 0x6800_4400, 0x0200_6140, 0x0100_9140]);
    // The TSC runs at a constant rate in every power state.
    set(0x8000_0007, [0, 0, 0, 1 << 8]);
    set(0x8000_0008, [PHYS_BITS | LINEAR_BITS << 8, EXT8_EBX, 0, 0]);
    // 256-bit data paths; unaligned moves are as good as aligned ones.
    set(0x8000_001a, [1 << 1 | 1 << 2, 0, 0, 0]);
    set(0x8000_001e, [0; 4]);
    set(0x8000_0021, [EXT21_EAX, 0, EXT21_ECX, 0]);

    let mut set = |leaf: u32, subleaf: u32, [eax, ebx, ecx, edx]: [u32; 4]| {
        let e = table.entry(leaf, subleaf, true);
        (e.eax, e.ebx, e.ecx, e.edx) = (eax, ebx, ecx, edx);
    };
    let seven_ebx = SEVEN_EBX | host.vector_bits(Leaf::SevenEbx) | host.word(Leaf::SevenEbx) & SEVEN_EBX_HOST;
    set(7, 0, [1, seven_ebx, SEVEN_ECX | host.vector_bits(Leaf::SevenEcx), 0]);
    set(7, 1, [host.vector_bits(Leaf::SevenOneEax), 0, 0, 0]);
    // The sizes of the area for what XCR0 enables are filled in by `query`.
    let components = fpu::components();
    let size = if components & xcr0::AVX != 0 { 832 } else { 576 };
    set(0xd, 0, [components as u32, 576, size, 0]);
    // XSAVEOPT, XSAVEC, XGETBV with ECX = 1, XSAVES.
    set(0xd, 1, [0xf, 576, 0, 0]);
    if components & xcr0::AVX != 0 {
        set(0xd, 2, [256, 576, 0, 0]);
    }
    // Deterministic cache parameters: type and level, sharing and line size, sets. Sharing is the topology's business.
    let cache = |kind: u32, level: u32, ways: u32, sets: u32, inclusive: u32| {
        [kind | level << 5 | 1 << 8, (ways - 1) << 22 | 63, sets - 1, inclusive]
    };
    set(0x8000_001d, 0, cache(1, 1, 8, 64, 0));
    set(0x8000_001d, 1, cache(2, 1, 8, 64, 0));
    set(0x8000_001d, 2, cache(3, 2, 8, 1024, 2));
    set(0x8000_001d, 3, cache(3, 3, 16, 32768, 1));
    set(0x8000_001d, 4, [0; 4]);
    table
}

/// Leaf 15h: TSC = ECX * EBX / EAX, exactly if the frequency allows.
fn crystal(hz: u64) -> [u32; 4] {
    let multiple = hz.div_ceil(u64::from(u32::MAX)).max(1);
    [1, multiple as u32, (hz / multiple) as u32, 0]
}

/// What the CPUID instruction returns (EAX, EBX, ECX, EDX) in the CPU's current state: the table, and in it what
/// mirrors control registers.
pub fn query(cpu: &Cpu, leaf: u32, subleaf: u32) -> [u32; 4] {
    let mut r = cpu.cpuid.query(leaf, subleaf);
    match (leaf, subleaf) {
        (1, _) => {
            if cpu.cr4 & cr::CR4_OSXSAVE != 0 {
                r[2] |= OSXSAVE;
            } else {
                r[2] &= !OSXSAVE;
            }
            if cpu.apic.as_ref().is_some_and(|a| a.base() & 1 << 11 == 0) {
                r[3] &= !APIC;
            }
        }
        // Both formats are alike: there is one extended component, right after the header.
        (0xd, 0) | (0xd, 1) if r != [0; 4] => r[1] = if cpu.fpu.xcr0 & xcr0::AVX != 0 { 832 } else { 576 },
        _ => {}
    }
    r
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_are_consistent() {
        let t = supported();
        let max = t.query(0x8000_0000, 0)[0];
        for e in &t.entries {
            let limit = match e.leaf >> 28 {
                0 => t.query(0, 0)[0],
                4 => t.query(0x4000_0000, 0)[0],
                _ => max,
            };
            assert!(e.leaf <= limit, "{:#x}", e.leaf);
        }
        assert_eq!(t.query(0, 0)[1], u32::from_le_bytes(*b"Auth"));
        assert_eq!(t.query(1, 0)[0], t.query(0x8000_0001, 0)[0]);
        // AVX needs its state component, AVX2 and FMA need AVX.
        let avx = t.query(1, 0)[2] >> 28 & 1 != 0;
        assert_eq!(avx, t.query(0xd, 0)[0] & 4 != 0);
        assert!(avx || t.query(7, 0)[1] & 1 << 5 == 0);
        // L3 of leaf 8000_0006 (units of 512 KiB) equals ways * sets * line of leaf 8000_001d.
        let l3 = t.query(0x8000_001d, 3);
        assert_eq!(
            (t.query(0x8000_0006, 0)[3] >> 18) as u64 * 524_288,
            ((l3[1] >> 22) as u64 + 1) * (l3[2] as u64 + 1) * 64
        );
    }

    #[test]
    fn frequency_is_exact_or_close() {
        for hz in [1_000_000, 2_595_120_000, 5_000_000_001u64, 20_000_000_000] {
            let [a, b, c, _] = crystal(hz);
            let back = u64::from(c) * u64::from(b) / u64::from(a);
            assert!(hz - back < 8, "{hz} {back}");
        }
    }
}
