//! Processor features by the names that QEMU and libvirt use, and the CPUID bits they stand for.
//!
//! The names are an interface shared by monitors, libvirt and configuration files; the bits are those of Intel SDM vol. 2
//! (CPUID), AMD APM vol. 3 appendix E and Linux `Documentation/virt/kvm/x86/cpuid.rst`.

/// A CPUID output register that holds features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Word {
    /// Leaf (EAX on input).
    pub leaf: u32,
    /// Subleaf, where the leaf has any.
    pub subleaf: Option<u32>,
    /// Output register: 0 EAX, 1 EBX, 2 ECX, 3 EDX.
    pub register: usize,
}

impl Word {
    /// Name of the output register.
    pub fn register_name(self) -> &'static str {
        ["EAX", "EBX", "ECX", "EDX"][self.register]
    }
}

/// A feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Its name.
    pub name: &'static str,
    /// Other spellings.
    pub aliases: &'static [&'static str],
    /// Where its bit is.
    pub word: Word,
    /// Number of the bit.
    pub bit: u32,
}

impl std::fmt::Display for Feature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (leaf, register) = (self.word.leaf, self.word.register_name());
        write!(f, "{} (CPUID.{leaf:X}H", self.name)?;
        if let Some(subleaf) = self.word.subleaf {
            write!(f, ".{subleaf}")?;
        }
        write!(f, ":{register} bit {})", self.bit)
    }
}

/// The feature of this name or alias.
pub fn find(name: &str) -> Option<&'static Feature> {
    FEATURES.iter().find(|f| f.name == name || f.aliases.contains(&name))
}

const fn word(leaf: u32, subleaf: Option<u32>, register: usize) -> Word {
    Word { leaf, subleaf, register }
}

const ONE_ECX: Word = word(0x1, None, 2);
const ONE_EDX: Word = word(0x1, None, 3);
const SIX_EAX: Word = word(0x6, None, 0);
const SEVEN_EBX: Word = word(0x7, Some(0), 1);
const SEVEN_ECX: Word = word(0x7, Some(0), 2);
const SEVEN_EDX: Word = word(0x7, Some(0), 3);
const SEVEN_1_EAX: Word = word(0x7, Some(1), 0);
const SEVEN_1_EDX: Word = word(0x7, Some(1), 3);
const SEVEN_2_EDX: Word = word(0x7, Some(2), 3);
const XSAVE_EAX: Word = word(0xd, Some(1), 0);
const SGX_EAX: Word = word(0x12, Some(0), 0);
const SGX_EBX: Word = word(0x12, Some(0), 1);
const SGX_1_EAX: Word = word(0x12, Some(1), 0);
const TRACE_ECX: Word = word(0x14, Some(0), 2);
const AVX10_EBX: Word = word(0x24, Some(0), 1);
const KVM_EAX: Word = word(0x4000_0001, None, 0);
const KVM_EDX: Word = word(0x4000_0001, None, 3);
const EXT_ECX: Word = word(0x8000_0001, None, 2);
const EXT_EDX: Word = word(0x8000_0001, None, 3);
const EXT_7_EBX: Word = word(0x8000_0007, None, 1);
const EXT_7_EDX: Word = word(0x8000_0007, None, 3);
const EXT_8_EBX: Word = word(0x8000_0008, None, 1);
const SVM_EDX: Word = word(0x8000_000a, None, 3);
const EXT_21_EAX: Word = word(0x8000_0021, None, 0);
const PERF_EAX: Word = word(0x8000_0022, None, 0);
const CENTAUR_EDX: Word = word(0xc000_0001, None, 3);

const fn f(name: &'static str, aliases: &'static [&'static str], word: Word, bit: u32) -> Feature {
    Feature { name, aliases, word, bit }
}

/// All features that have a name, in the order of their bits.
#[rustfmt::skip] // a table: one line each
pub const FEATURES: &[Feature] = &[
    f("pni", &["sse3"], ONE_ECX, 0),
    f("pclmulqdq", &["pclmuldq"], ONE_ECX, 1),
    f("dtes64", &[], ONE_ECX, 2),
    f("monitor", &[], ONE_ECX, 3),
    f("ds-cpl", &["ds_cpl"], ONE_ECX, 4),
    f("vmx", &[], ONE_ECX, 5),
    f("smx", &[], ONE_ECX, 6),
    f("est", &[], ONE_ECX, 7),
    f("tm2", &[], ONE_ECX, 8),
    f("ssse3", &[], ONE_ECX, 9),
    f("cid", &[], ONE_ECX, 10),
    f("fma", &[], ONE_ECX, 12),
    f("cx16", &[], ONE_ECX, 13),
    f("xtpr", &[], ONE_ECX, 14),
    f("pdcm", &[], ONE_ECX, 15),
    f("pcid", &[], ONE_ECX, 17),
    f("dca", &[], ONE_ECX, 18),
    f("sse4.1", &["sse4-1", "sse4_1"], ONE_ECX, 19),
    f("sse4.2", &["sse4-2", "sse4_2"], ONE_ECX, 20),
    f("x2apic", &[], ONE_ECX, 21),
    f("movbe", &[], ONE_ECX, 22),
    f("popcnt", &[], ONE_ECX, 23),
    f("tsc-deadline", &[], ONE_ECX, 24),
    f("aes", &[], ONE_ECX, 25),
    f("xsave", &[], ONE_ECX, 26),
    f("avx", &[], ONE_ECX, 28),
    f("f16c", &[], ONE_ECX, 29),
    f("rdrand", &[], ONE_ECX, 30),
    f("hypervisor", &[], ONE_ECX, 31),
    f("fpu", &[], ONE_EDX, 0),
    f("vme", &[], ONE_EDX, 1),
    f("de", &[], ONE_EDX, 2),
    f("pse", &[], ONE_EDX, 3),
    f("tsc", &[], ONE_EDX, 4),
    f("msr", &[], ONE_EDX, 5),
    f("pae", &[], ONE_EDX, 6),
    f("mce", &[], ONE_EDX, 7),
    f("cx8", &[], ONE_EDX, 8),
    f("apic", &[], ONE_EDX, 9),
    f("sep", &[], ONE_EDX, 11),
    f("mtrr", &[], ONE_EDX, 12),
    f("pge", &[], ONE_EDX, 13),
    f("mca", &[], ONE_EDX, 14),
    f("cmov", &[], ONE_EDX, 15),
    f("pat", &[], ONE_EDX, 16),
    f("pse36", &[], ONE_EDX, 17),
    f("pn", &[], ONE_EDX, 18),
    f("clflush", &[], ONE_EDX, 19),
    f("ds", &[], ONE_EDX, 21),
    f("acpi", &[], ONE_EDX, 22),
    f("mmx", &[], ONE_EDX, 23),
    f("fxsr", &[], ONE_EDX, 24),
    f("sse", &[], ONE_EDX, 25),
    f("sse2", &[], ONE_EDX, 26),
    f("ss", &[], ONE_EDX, 27),
    f("ht", &[], ONE_EDX, 28),
    f("tm", &[], ONE_EDX, 29),
    f("ia64", &[], ONE_EDX, 30),
    f("pbe", &[], ONE_EDX, 31),
    f("arat", &[], SIX_EAX, 2),
    f("fsgsbase", &[], SEVEN_EBX, 0),
    f("tsc-adjust", &["tsc_adjust"], SEVEN_EBX, 1),
    f("sgx", &[], SEVEN_EBX, 2),
    f("bmi1", &[], SEVEN_EBX, 3),
    f("hle", &[], SEVEN_EBX, 4),
    f("avx2", &[], SEVEN_EBX, 5),
    f("fdp-excptn-only", &[], SEVEN_EBX, 6),
    f("smep", &[], SEVEN_EBX, 7),
    f("bmi2", &[], SEVEN_EBX, 8),
    f("erms", &[], SEVEN_EBX, 9),
    f("invpcid", &[], SEVEN_EBX, 10),
    f("rtm", &[], SEVEN_EBX, 11),
    f("zero-fcs-fds", &[], SEVEN_EBX, 13),
    f("mpx", &[], SEVEN_EBX, 14),
    f("avx512f", &[], SEVEN_EBX, 16),
    f("avx512dq", &[], SEVEN_EBX, 17),
    f("rdseed", &[], SEVEN_EBX, 18),
    f("adx", &[], SEVEN_EBX, 19),
    f("smap", &[], SEVEN_EBX, 20),
    f("avx512ifma", &[], SEVEN_EBX, 21),
    f("pcommit", &[], SEVEN_EBX, 22),
    f("clflushopt", &[], SEVEN_EBX, 23),
    f("clwb", &[], SEVEN_EBX, 24),
    f("intel-pt", &[], SEVEN_EBX, 25),
    f("avx512pf", &[], SEVEN_EBX, 26),
    f("avx512er", &[], SEVEN_EBX, 27),
    f("avx512cd", &[], SEVEN_EBX, 28),
    f("sha-ni", &[], SEVEN_EBX, 29),
    f("avx512bw", &[], SEVEN_EBX, 30),
    f("avx512vl", &[], SEVEN_EBX, 31),
    f("avx512vbmi", &[], SEVEN_ECX, 1),
    f("umip", &[], SEVEN_ECX, 2),
    f("pku", &[], SEVEN_ECX, 3),
    f("waitpkg", &[], SEVEN_ECX, 5),
    f("avx512vbmi2", &[], SEVEN_ECX, 6),
    f("gfni", &[], SEVEN_ECX, 8),
    f("vaes", &[], SEVEN_ECX, 9),
    f("vpclmulqdq", &[], SEVEN_ECX, 10),
    f("avx512vnni", &[], SEVEN_ECX, 11),
    f("avx512bitalg", &[], SEVEN_ECX, 12),
    f("avx512-vpopcntdq", &[], SEVEN_ECX, 14),
    f("la57", &[], SEVEN_ECX, 16),
    f("rdpid", &[], SEVEN_ECX, 22),
    f("bus-lock-detect", &[], SEVEN_ECX, 24),
    f("cldemote", &[], SEVEN_ECX, 25),
    f("movdiri", &[], SEVEN_ECX, 27),
    f("movdir64b", &[], SEVEN_ECX, 28),
    f("sgxlc", &[], SEVEN_ECX, 30),
    f("pks", &[], SEVEN_ECX, 31),
    f("avx512-4vnniw", &[], SEVEN_EDX, 2),
    f("avx512-4fmaps", &[], SEVEN_EDX, 3),
    f("fsrm", &[], SEVEN_EDX, 4),
    f("avx512-vp2intersect", &[], SEVEN_EDX, 8),
    f("md-clear", &[], SEVEN_EDX, 10),
    f("serialize", &[], SEVEN_EDX, 14),
    f("tsx-ldtrk", &[], SEVEN_EDX, 16),
    f("arch-lbr", &[], SEVEN_EDX, 19),
    f("amx-bf16", &[], SEVEN_EDX, 22),
    f("avx512-fp16", &[], SEVEN_EDX, 23),
    f("amx-tile", &[], SEVEN_EDX, 24),
    f("amx-int8", &[], SEVEN_EDX, 25),
    f("spec-ctrl", &[], SEVEN_EDX, 26),
    f("stibp", &[], SEVEN_EDX, 27),
    f("flush-l1d", &[], SEVEN_EDX, 28),
    f("arch-capabilities", &[], SEVEN_EDX, 29),
    f("core-capability", &[], SEVEN_EDX, 30),
    f("ssbd", &[], SEVEN_EDX, 31),
    f("sha512", &[], SEVEN_1_EAX, 0),
    f("sm3", &[], SEVEN_1_EAX, 1),
    f("sm4", &[], SEVEN_1_EAX, 2),
    f("avx-vnni", &[], SEVEN_1_EAX, 4),
    f("avx512-bf16", &[], SEVEN_1_EAX, 5),
    f("cmpccxadd", &[], SEVEN_1_EAX, 7),
    f("fzrm", &[], SEVEN_1_EAX, 10),
    f("fsrs", &[], SEVEN_1_EAX, 11),
    f("fsrc", &[], SEVEN_1_EAX, 12),
    f("fred", &[], SEVEN_1_EAX, 17),
    f("lkgs", &[], SEVEN_1_EAX, 18),
    f("wrmsrns", &[], SEVEN_1_EAX, 19),
    f("amx-fp16", &[], SEVEN_1_EAX, 21),
    f("avx-ifma", &[], SEVEN_1_EAX, 23),
    f("lam", &[], SEVEN_1_EAX, 26),
    f("avx-vnni-int8", &[], SEVEN_1_EDX, 4),
    f("avx-ne-convert", &[], SEVEN_1_EDX, 5),
    f("amx-complex", &[], SEVEN_1_EDX, 8),
    f("avx-vnni-int16", &[], SEVEN_1_EDX, 10),
    f("prefetchiti", &[], SEVEN_1_EDX, 14),
    f("avx10", &[], SEVEN_1_EDX, 19),
    f("intel-psfd", &[], SEVEN_2_EDX, 0),
    f("ipred-ctrl", &[], SEVEN_2_EDX, 1),
    f("rrsba-ctrl", &[], SEVEN_2_EDX, 2),
    f("ddpd-u", &[], SEVEN_2_EDX, 3),
    f("bhi-ctrl", &[], SEVEN_2_EDX, 4),
    f("mcdt-no", &[], SEVEN_2_EDX, 5),
    f("xsaveopt", &[], XSAVE_EAX, 0),
    f("xsavec", &[], XSAVE_EAX, 1),
    f("xgetbv1", &[], XSAVE_EAX, 2),
    f("xsaves", &[], XSAVE_EAX, 3),
    f("xfd", &[], XSAVE_EAX, 4),
    f("sgx1", &[], SGX_EAX, 0),
    f("sgx2", &[], SGX_EAX, 1),
    f("sgx-edeccssa", &[], SGX_EAX, 11),
    f("sgx-exinfo", &[], SGX_EBX, 0),
    f("sgx-debug", &[], SGX_1_EAX, 1),
    f("sgx-mode64", &[], SGX_1_EAX, 2),
    f("sgx-provisionkey", &[], SGX_1_EAX, 4),
    f("sgx-tokenkey", &[], SGX_1_EAX, 5),
    f("sgx-kss", &[], SGX_1_EAX, 7),
    f("sgx-aex-notify", &[], SGX_1_EAX, 10),
    f("intel-pt-lip", &[], TRACE_ECX, 31),
    f("avx10-128", &[], AVX10_EBX, 16),
    f("avx10-256", &[], AVX10_EBX, 17),
    f("avx10-512", &[], AVX10_EBX, 18),
    f("kvm-nopiodelay", &["kvm_nopiodelay"], KVM_EAX, 1),
    f("kvm-mmu", &["kvm_mmu"], KVM_EAX, 2),
    f("kvmclock", &[], KVM_EAX, 3),
    f("kvm-asyncpf", &["kvm_asyncpf"], KVM_EAX, 4),
    f("kvm-steal-time", &["kvm_steal_time"], KVM_EAX, 5),
    f("kvm-pv-eoi", &["kvm_pv_eoi"], KVM_EAX, 6),
    f("kvm-pv-unhalt", &["kvm_pv_unhalt"], KVM_EAX, 7),
    f("kvm-pv-tlb-flush", &["kvm_pv_tlb_flush"], KVM_EAX, 9),
    f("kvm-asyncpf-vmexit", &["kvm_asyncpf_vmexit"], KVM_EAX, 10),
    f("kvm-pv-ipi", &["kvm_pv_ipi"], KVM_EAX, 11),
    f("kvm-poll-control", &["kvm_poll_control"], KVM_EAX, 12),
    f("kvm-pv-sched-yield", &["kvm_pv_sched_yield"], KVM_EAX, 13),
    f("kvm-asyncpf-int", &["kvm_asyncpf_int"], KVM_EAX, 14),
    f("kvm-msi-ext-dest-id", &["kvm_msi_ext_dest_id"], KVM_EAX, 15),
    f("kvmclock-stable-bit", &["kvmclock_stable_bit"], KVM_EAX, 24),
    f("kvm-hint-dedicated", &[], KVM_EDX, 0),
    f("lahf-lm", &["lahf_lm"], EXT_ECX, 0),
    f("cmp-legacy", &["cmp_legacy"], EXT_ECX, 1),
    f("svm", &[], EXT_ECX, 2),
    f("extapic", &[], EXT_ECX, 3),
    f("cr8legacy", &[], EXT_ECX, 4),
    f("abm", &[], EXT_ECX, 5),
    f("sse4a", &[], EXT_ECX, 6),
    f("misalignsse", &[], EXT_ECX, 7),
    f("3dnowprefetch", &[], EXT_ECX, 8),
    f("osvw", &[], EXT_ECX, 9),
    f("ibs", &[], EXT_ECX, 10),
    f("xop", &[], EXT_ECX, 11),
    f("skinit", &[], EXT_ECX, 12),
    f("wdt", &[], EXT_ECX, 13),
    f("lwp", &[], EXT_ECX, 15),
    f("fma4", &[], EXT_ECX, 16),
    f("tce", &[], EXT_ECX, 17),
    f("nodeid-msr", &["nodeid_msr"], EXT_ECX, 19),
    f("tbm", &[], EXT_ECX, 21),
    f("topoext", &[], EXT_ECX, 22),
    f("perfctr-core", &["perfctr_core"], EXT_ECX, 23),
    f("perfctr-nb", &["perfctr_nb"], EXT_ECX, 24),
    f("syscall", &[], EXT_EDX, 11),
    f("nx", &["xd"], EXT_EDX, 20),
    f("mmxext", &[], EXT_EDX, 22),
    f("fxsr-opt", &["ffxsr", "fxsr_opt"], EXT_EDX, 25),
    f("pdpe1gb", &[], EXT_EDX, 26),
    f("rdtscp", &[], EXT_EDX, 27),
    f("lm", &["i64"], EXT_EDX, 29),
    f("3dnowext", &[], EXT_EDX, 30),
    f("3dnow", &[], EXT_EDX, 31),
    f("overflow-recov", &[], EXT_7_EBX, 0),
    f("succor", &[], EXT_7_EBX, 1),
    f("invtsc", &[], EXT_7_EDX, 8),
    f("clzero", &[], EXT_8_EBX, 0),
    f("xsaveerptr", &[], EXT_8_EBX, 2),
    f("wbnoinvd", &[], EXT_8_EBX, 9),
    f("ibpb", &[], EXT_8_EBX, 12),
    f("ibrs", &[], EXT_8_EBX, 14),
    f("amd-stibp", &[], EXT_8_EBX, 15),
    f("stibp-always-on", &[], EXT_8_EBX, 17),
    f("amd-ssbd", &[], EXT_8_EBX, 24),
    f("virt-ssbd", &[], EXT_8_EBX, 25),
    f("amd-no-ssb", &[], EXT_8_EBX, 26),
    f("amd-psfd", &[], EXT_8_EBX, 28),
    f("npt", &[], SVM_EDX, 0),
    f("lbrv", &[], SVM_EDX, 1),
    f("svm-lock", &["svm_lock"], SVM_EDX, 2),
    f("nrip-save", &["nrip_save"], SVM_EDX, 3),
    f("tsc-scale", &["tsc_scale"], SVM_EDX, 4),
    f("vmcb-clean", &["vmcb_clean"], SVM_EDX, 5),
    f("flushbyasid", &[], SVM_EDX, 6),
    f("decodeassists", &[], SVM_EDX, 7),
    f("pause-filter", &["pause_filter"], SVM_EDX, 10),
    f("pfthreshold", &[], SVM_EDX, 12),
    f("avic", &[], SVM_EDX, 13),
    f("v-vmsave-vmload", &[], SVM_EDX, 15),
    f("vgif", &[], SVM_EDX, 16),
    f("vnmi", &[], SVM_EDX, 25),
    f("svme-addr-chk", &[], SVM_EDX, 28),
    f("no-nested-data-bp", &[], EXT_21_EAX, 0),
    f("lfence-always-serializing", &[], EXT_21_EAX, 2),
    f("null-sel-clr-base", &[], EXT_21_EAX, 6),
    f("auto-ibrs", &[], EXT_21_EAX, 8),
    f("eraps", &[], EXT_21_EAX, 24),
    f("sbpb", &[], EXT_21_EAX, 27),
    f("ibpb-brtype", &[], EXT_21_EAX, 28),
    f("srso-no", &[], EXT_21_EAX, 29),
    f("srso-user-kernel-no", &[], EXT_21_EAX, 30),
    f("perfmon-v2", &[], PERF_EAX, 0),
    f("xstore", &[], CENTAUR_EDX, 2),
    f("xstore-en", &[], CENTAUR_EDX, 3),
    f("xcrypt", &[], CENTAUR_EDX, 6),
    f("xcrypt-en", &[], CENTAUR_EDX, 7),
    f("ace2", &[], CENTAUR_EDX, 8),
    f("ace2-en", &[], CENTAUR_EDX, 9),
    f("phe", &[], CENTAUR_EDX, 10),
    f("phe-en", &[], CENTAUR_EDX, 11),
    f("pmm", &[], CENTAUR_EDX, 12),
    f("pmm-en", &[], CENTAUR_EDX, 13),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_and_bits_are_unique() {
        let mut names = BTreeSet::new();
        let mut bits = BTreeSet::new();
        for feature in FEATURES {
            assert!(bits.insert((feature.word, feature.bit)), "{feature}");
            for name in feature.aliases.iter().chain([&feature.name]) {
                assert!(names.insert(*name), "{name}");
            }
        }
    }

    #[test]
    fn spellings() {
        assert_eq!(find("sse4_2"), find("sse4.2"));
        assert_eq!(find("pcid").map(ToString::to_string).as_deref(), Some("pcid (CPUID.1H:ECX bit 17)"));
        assert_eq!(find("avx2").map(ToString::to_string).as_deref(), Some("avx2 (CPUID.7H.0:EBX bit 5)"));
        assert!(find("AVX2").is_none());
    }
}
