//! Cache leaves for a guest whose vendor is not the accelerator's: each vendor describes caches its own way.

use accel::Cpuid;

/// A level of cache. Who shares it is the topology's business.
struct Cache {
    /// 1 data, 2 instructions, 3 both (Intel SDM vol. 2, CPUID leaf 4).
    kind: u32,
    level: u32,
    ways: u32,
    sets: u32,
    /// Leaf 4 EDX: inclusive, complex indexing.
    flags: u32,
}

/// L1 32 KiB each, L2 512 KiB, L3 16 MiB, lines of 64 bytes.
const CACHES: [Cache; 4] = [
    Cache { kind: 1, level: 1, ways: 8, sets: 64, flags: 0 },
    Cache { kind: 2, level: 1, ways: 8, sets: 64, flags: 0 },
    Cache { kind: 3, level: 2, ways: 8, sets: 1024, flags: 0 },
    Cache { kind: 3, level: 3, ways: 16, sets: 16384, flags: 2 },
];

fn deterministic(cpuid: &mut Cpuid, leaf: u32) {
    cpuid.remove(leaf);
    for (i, c) in CACHES.iter().enumerate() {
        let e = cpuid.entry(leaf, i as u32, true);
        e.eax = c.kind | c.level << 5 | 1 << 8;
        (e.ebx, e.ecx, e.edx) = ((c.ways - 1) << 22 | 63, c.sets - 1, c.flags);
    }
    *cpuid.entry(leaf, CACHES.len() as u32, true) =
        accel::CpuidEntry { leaf, subleaf: CACHES.len() as u32, indexed: true, ..Default::default() };
}

/// Intel's leaves 2 and 4.
pub(super) fn intel(cpuid: &mut Cpuid) {
    let e = cpuid.entry(2, 0, false);
    // One query suffices (AL); descriptor 0xff: leaf 4 says it.
    (e.eax, e.ebx, e.ecx, e.edx) = (0x0000_ff01, 0, 0, 0);
    deterministic(cpuid, 4);
}

/// AMD's leaves 0x8000_0005, 0x8000_0006 and 0x8000_001d (APM vol. 3, appendix E).
pub(super) fn amd(cpuid: &mut Cpuid) {
    let e = cpuid.entry(0x8000_0005, 0, false);
    (e.eax, e.ebx, e.ecx, e.edx) = (0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140);
    let e = cpuid.entry(0x8000_0006, 0, false);
    (e.eax, e.ebx, e.ecx, e.edx) = (0x4800_4400, 0x6800_4400, 0x0200_6140, 0x0080_8140);
    deterministic(cpuid, 0x8000_001d);
}

/// Takes the level 3 cache out.
pub(super) fn without_l3(cpuid: &mut Cpuid) {
    for leaf in [4, 0x8000_001d] {
        let level3 = |e: &accel::CpuidEntry| e.leaf == leaf && e.eax & 0x1f != 0 && e.eax >> 5 & 7 >= 3;
        for e in cpuid.entries.iter_mut().filter(|e| level3(e)) {
            (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0);
        }
    }
    if cpuid.get(0x8000_0006, 0).is_some() {
        cpuid.entry(0x8000_0006, 0, false).edx = 0;
    }
}
