//! Processor models by the names that QEMU and libvirt use.
//!
//! A model is an identity (vendor, family, model, stepping, brand) and the features of that processor, so that guests see
//! the same on every host that can give it and can move between them. The first version of a model lists its features; later ones
//! say what differs from the one before. Bits of MSR_IA32_ARCH_CAPABILITIES belong to the accelerator and are no part of a model.

/// Processor vendors' CPUID strings.
pub const INTEL: &str = "GenuineIntel";
/// AMD.
pub const AMD: &str = "AuthenticAMD";
const HYGON: &str = "HygonGenuine";
const CENTAUR: &str = "CentaurHauls";

/// A processor model.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// Its name, with version.
    pub name: &'static str,
    /// Names without version, or for what is special about the version.
    pub aliases: &'static [&'static str],
    /// CPUID vendor string; empty for the accelerator's own.
    pub vendor: &'static str,
    /// Family, model, stepping.
    pub signature: (u32, u32, u32),
    /// Highest basic leaf.
    pub level: u32,
    /// Highest extended leaf.
    pub xlevel: u32,
    /// Brand string.
    pub brand: &'static str,
    /// Model whose features these differ from.
    base: Option<&'static str>,
    /// Names of features; with a base, each after `+` or `-`.
    features: &'static str,
}

impl Model {
    /// Names of its features.
    pub fn features(&self) -> Vec<&'static str> {
        let mut names = self.base.and_then(find).map(Model::features).unwrap_or_default();
        for word in self.features.split_whitespace() {
            match word.strip_prefix('-') {
                Some(gone) => names.retain(|name| *name != gone),
                None => names.push(word.strip_prefix('+').unwrap_or(word)),
            }
        }
        names
    }
}

/// The model of this name or alias.
pub fn find(name: &str) -> Option<&'static Model> {
    MODELS.iter().find(|m| m.name == name || m.aliases.contains(&name))
}

/// All models, versions of one after another.
pub const MODELS: &[Model] = &[
    Model {
        name: "486-v1",
        aliases: &["486"],
        vendor: INTEL,
        signature: (4, 8, 0),
        level: 0x1,
        xlevel: 0x0000_0000,
        brand: "",
        base: None,
        features: "fpu vme pse",
    },
    Model {
        name: "Broadwell-v1",
        aliases: &["Broadwell"],
        vendor: INTEL,
        signature: (6, 61, 2),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Core Processor (Broadwell)",
        base: None,
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave avx f16c \
            rdrand fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 arat fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm rdseed adx smap xsaveopt lahf-lm abm \
            3dnowprefetch syscall nx rdtscp lm",
    },
    Model {
        name: "Broadwell-v2",
        aliases: &["Broadwell-noTSX"],
        vendor: INTEL,
        signature: (6, 61, 2),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Core Processor (Broadwell, no TSX)",
        base: Some("Broadwell-v1"),
        features: "-hle -rtm",
    },
    Model {
        name: "Broadwell-v3",
        aliases: &["Broadwell-IBRS"],
        vendor: INTEL,
        signature: (6, 61, 2),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Core Processor (Broadwell, IBRS)",
        base: Some("Broadwell-v2"),
        features: "+hle +rtm +spec-ctrl",
    },
    Model {
        name: "Broadwell-v4",
        aliases: &["Broadwell-noTSX-IBRS"],
        vendor: INTEL,
        signature: (6, 61, 2),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Core Processor (Broadwell, no TSX, IBRS)",
        base: Some("Broadwell-v3"),
        features: "-hle -rtm",
    },
    Model {
        name: "Cascadelake-Server-v1",
        aliases: &["Cascadelake-Server"],
        vendor: INTEL,
        signature: (6, 85, 6),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Cascadelake)",
        base: None,
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave avx f16c \
            rdrand fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 arat fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm avx512f avx512dq rdseed adx smap \
            clflushopt clwb avx512cd avx512bw avx512vl pku avx512vnni spec-ctrl ssbd xsaveopt xsavec xgetbv1 \
            lahf-lm abm 3dnowprefetch syscall nx pdpe1gb rdtscp lm",
    },
    Model {
        name: "Cascadelake-Server-v2",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 85, 6),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Cascadelake)",
        base: Some("Cascadelake-Server-v1"),
        features: "+arch-capabilities",
    },
    Model {
        name: "Cascadelake-Server-v3",
        aliases: &["Cascadelake-Server-noTSX"],
        vendor: INTEL,
        signature: (6, 85, 6),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Cascadelake)",
        base: Some("Cascadelake-Server-v2"),
        features: "-hle -rtm",
    },
    Model {
        name: "Cascadelake-Server-v4",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 85, 6),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Cascadelake)",
        base: Some("Cascadelake-Server-v3"),
        features: "",
    },
    Model {
        name: "Cascadelake-Server-v5",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 85, 6),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Cascadelake)",
        base: Some("Cascadelake-Server-v4"),
        features: "+xsaves",
    },
    Model {
        name: "ClearwaterForest-v1",
        aliases: &["ClearwaterForest"],
        vendor: INTEL,
        signature: (6, 221, 0),
        level: 0x23,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (ClearwaterForest)",
        base: None,
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave avx f16c \
            rdrand fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 ss arat fsgsbase tsc-adjust bmi1 avx2 smep bmi2 erms invpcid rdseed adx smap clflushopt clwb \
            sha-ni umip pku gfni vaes vpclmulqdq rdpid bus-lock-detect cldemote movdiri movdir64b fsrm serialize \
            spec-ctrl arch-capabilities ssbd sha512 sm3 sm4 avx-vnni cmpccxadd fsrs avx-ifma lam avx-vnni-int8 \
            avx-ne-convert avx-vnni-int16 prefetchiti intel-psfd ipred-ctrl rrsba-ctrl ddpd-u bhi-ctrl mcdt-no \
            xsaveopt xsavec xgetbv1 xsaves lahf-lm abm 3dnowprefetch syscall nx pdpe1gb rdtscp lm wbnoinvd",
    },
    Model {
        name: "Conroe-v1",
        aliases: &["Conroe"],
        vendor: INTEL,
        signature: (6, 15, 3),
        level: 0xa,
        xlevel: 0x8000_0008,
        brand: "Intel Celeron_4x0 (Conroe/Merom Class Core 2)",
        base: None,
        features: "pni ssse3 fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr \
            sse sse2 lahf-lm syscall nx lm",
    },
    Model {
        name: "Cooperlake-v1",
        aliases: &["Cooperlake"],
        vendor: INTEL,
        signature: (6, 85, 10),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Cooperlake)",
        base: None,
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave avx f16c \
            rdrand fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 arat fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm avx512f avx512dq rdseed adx smap \
            clflushopt clwb avx512cd avx512bw avx512vl pku avx512vnni spec-ctrl stibp arch-capabilities ssbd \
            avx512-bf16 xsaveopt xsavec xgetbv1 lahf-lm abm 3dnowprefetch syscall nx pdpe1gb rdtscp lm",
    },
    Model {
        name: "Cooperlake-v2",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 85, 10),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Cooperlake)",
        base: Some("Cooperlake-v1"),
        features: "+xsaves",
    },
    Model {
        name: "Denverton-v1",
        aliases: &["Denverton"],
        vendor: INTEL,
        signature: (6, 95, 1),
        level: 0x15,
        xlevel: 0x8000_0008,
        brand: "Intel Atom Processor (Denverton)",
        base: None,
        features: "pni pclmulqdq monitor ssse3 cx16 sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave rdrand fpu \
            vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat \
            fsgsbase smep erms mpx rdseed smap clflushopt sha-ni spec-ctrl arch-capabilities ssbd xsaveopt \
            xsavec xgetbv1 lahf-lm 3dnowprefetch syscall nx pdpe1gb rdtscp lm",
    },
    Model {
        name: "Denverton-v2",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 95, 1),
        level: 0x15,
        xlevel: 0x8000_0008,
        brand: "Intel Atom Processor (Denverton)",
        base: Some("Denverton-v1"),
        features: "-monitor -mpx",
    },
    Model {
        name: "Denverton-v3",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 95, 1),
        level: 0x15,
        xlevel: 0x8000_0008,
        brand: "Intel Atom Processor (Denverton)",
        base: Some("Denverton-v2"),
        features: "+xsaves",
    },
    Model {
        name: "Dhyana-v1",
        aliases: &["Dhyana"],
        vendor: HYGON,
        signature: (24, 0, 1),
        level: 0xd,
        xlevel: 0x8000_001e,
        brand: "Hygon Dhyana Processor",
        base: None,
        features: "pni monitor ssse3 fma cx16 sse4.1 sse4.2 movbe popcnt xsave avx f16c rdrand fpu vme de pse tsc msr \
            pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat fsgsbase bmi1 avx2 \
            smep bmi2 rdseed adx smap clflushopt xsaveopt xsavec xgetbv1 lahf-lm svm cr8legacy abm sse4a \
            misalignsse 3dnowprefetch osvw topoext syscall nx mmxext fxsr-opt pdpe1gb rdtscp lm ibpb npt \
            nrip-save",
    },
    Model {
        name: "Dhyana-v2",
        aliases: &[],
        vendor: HYGON,
        signature: (24, 0, 1),
        level: 0xd,
        xlevel: 0x8000_001e,
        brand: "Hygon Dhyana Processor",
        base: Some("Dhyana-v1"),
        features: "+xsaves",
    },
    Model {
        name: "EPYC-v1",
        aliases: &["EPYC"],
        vendor: AMD,
        signature: (23, 1, 2),
        level: 0xd,
        xlevel: 0x8000_001e,
        brand: "AMD EPYC Processor",
        base: None,
        features: "pni pclmulqdq monitor ssse3 fma cx16 sse4.1 sse4.2 movbe popcnt aes xsave avx f16c rdrand fpu vme de \
            pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat fsgsbase \
            bmi1 avx2 smep bmi2 rdseed adx smap clflushopt sha-ni xsaveopt xsavec xgetbv1 lahf-lm svm cr8legacy \
            abm sse4a misalignsse 3dnowprefetch osvw topoext syscall nx mmxext fxsr-opt pdpe1gb rdtscp lm npt \
            nrip-save",
    },
    Model {
        name: "EPYC-v2",
        aliases: &["EPYC-IBPB"],
        vendor: AMD,
        signature: (23, 1, 2),
        level: 0xd,
        xlevel: 0x8000_001e,
        brand: "AMD EPYC Processor (with IBPB)",
        base: Some("EPYC-v1"),
        features: "+ibpb",
    },
    Model {
        name: "EPYC-v3",
        aliases: &[],
        vendor: AMD,
        signature: (23, 1, 2),
        level: 0xd,
        xlevel: 0x8000_001e,
        brand: "AMD EPYC Processor",
        base: Some("EPYC-v2"),
        features: "+xsaves +perfctr-core +clzero +xsaveerptr",
    },
    Model {
        name: "EPYC-v4",
        aliases: &[],
        vendor: AMD,
        signature: (23, 1, 2),
        level: 0xd,
        xlevel: 0x8000_001e,
        brand: "AMD EPYC-v4 Processor",
        base: Some("EPYC-v3"),
        features: "",
    },
    Model {
        name: "EPYC-Genoa-v1",
        aliases: &["EPYC-Genoa"],
        vendor: AMD,
        signature: (25, 17, 0),
        level: 0xd,
        xlevel: 0x8000_0022,
        brand: "AMD EPYC-Genoa Processor",
        base: None,
        features: "pni pclmulqdq monitor ssse3 fma cx16 pcid sse4.1 sse4.2 movbe popcnt aes xsave avx f16c rdrand fpu \
            vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat \
            fsgsbase bmi1 avx2 smep bmi2 erms invpcid avx512f avx512dq rdseed adx smap avx512ifma clflushopt \
            clwb avx512cd sha-ni avx512bw avx512vl avx512vbmi umip pku avx512vbmi2 gfni vaes vpclmulqdq \
            avx512vnni avx512bitalg avx512-vpopcntdq la57 rdpid fsrm avx512-bf16 xsaveopt xsavec xgetbv1 xsaves \
            lahf-lm svm cr8legacy abm sse4a misalignsse 3dnowprefetch osvw topoext perfctr-core syscall nx \
            mmxext fxsr-opt pdpe1gb rdtscp lm clzero xsaveerptr wbnoinvd ibpb ibrs amd-stibp stibp-always-on \
            amd-ssbd amd-psfd npt nrip-save vnmi svme-addr-chk no-nested-data-bp lfence-always-serializing \
            null-sel-clr-base auto-ibrs",
    },
    Model {
        name: "EPYC-Milan-v1",
        aliases: &["EPYC-Milan"],
        vendor: AMD,
        signature: (25, 1, 1),
        level: 0xd,
        xlevel: 0x8000_001e,
        brand: "AMD EPYC-Milan Processor",
        base: None,
        features: "pni pclmulqdq monitor ssse3 fma cx16 pcid sse4.1 sse4.2 movbe popcnt aes xsave avx f16c rdrand fpu \
            vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat \
            fsgsbase bmi1 avx2 smep bmi2 erms invpcid rdseed adx smap clflushopt clwb sha-ni umip pku rdpid fsrm \
            xsaveopt xsavec xgetbv1 xsaves lahf-lm svm cr8legacy abm sse4a misalignsse 3dnowprefetch osvw \
            topoext perfctr-core syscall nx mmxext fxsr-opt pdpe1gb rdtscp lm clzero xsaveerptr wbnoinvd ibpb \
            ibrs amd-stibp amd-ssbd npt nrip-save svme-addr-chk",
    },
    Model {
        name: "EPYC-Milan-v2",
        aliases: &[],
        vendor: AMD,
        signature: (25, 1, 1),
        level: 0xd,
        xlevel: 0x8000_0021,
        brand: "AMD EPYC-Milan-v2 Processor",
        base: Some("EPYC-Milan-v1"),
        features: "+vaes +vpclmulqdq +stibp-always-on +amd-psfd +no-nested-data-bp +lfence-always-serializing \
            +null-sel-clr-base",
    },
    Model {
        name: "EPYC-Rome-v1",
        aliases: &["EPYC-Rome"],
        vendor: AMD,
        signature: (23, 49, 0),
        level: 0xd,
        xlevel: 0x8000_001e,
        brand: "AMD EPYC-Rome Processor",
        base: None,
        features: "pni pclmulqdq monitor ssse3 fma cx16 sse4.1 sse4.2 movbe popcnt aes xsave avx f16c rdrand fpu vme de \
            pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat fsgsbase \
            bmi1 avx2 smep bmi2 rdseed adx smap clflushopt clwb sha-ni umip rdpid xsaveopt xsavec xgetbv1 xsaves \
            lahf-lm svm cr8legacy abm sse4a misalignsse 3dnowprefetch osvw topoext perfctr-core syscall nx \
            mmxext fxsr-opt pdpe1gb rdtscp lm clzero xsaveerptr wbnoinvd ibpb amd-stibp npt nrip-save",
    },
    Model {
        name: "EPYC-Rome-v2",
        aliases: &[],
        vendor: AMD,
        signature: (23, 49, 0),
        level: 0xd,
        xlevel: 0x8000_001e,
        brand: "AMD EPYC-Rome Processor",
        base: Some("EPYC-Rome-v1"),
        features: "+ibrs +amd-ssbd",
    },
    Model {
        name: "EPYC-Rome-v3",
        aliases: &[],
        vendor: AMD,
        signature: (23, 49, 0),
        level: 0xd,
        xlevel: 0x8000_001e,
        brand: "AMD EPYC-Rome-v3 Processor",
        base: Some("EPYC-Rome-v2"),
        features: "",
    },
    Model {
        name: "EPYC-Rome-v4",
        aliases: &[],
        vendor: AMD,
        signature: (23, 49, 0),
        level: 0xd,
        xlevel: 0x8000_001e,
        brand: "AMD EPYC-Rome-v4 Processor (no XSAVES)",
        base: Some("EPYC-Rome-v3"),
        features: "-xsaves",
    },
    Model {
        name: "GraniteRapids-v1",
        aliases: &["GraniteRapids"],
        vendor: INTEL,
        signature: (6, 173, 0),
        level: 0x20,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (GraniteRapids)",
        base: None,
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave avx f16c \
            rdrand fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 arat fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm avx512f avx512dq rdseed adx smap \
            avx512ifma clflushopt clwb avx512cd sha-ni avx512bw avx512vl avx512vbmi umip pku avx512vbmi2 gfni \
            vaes vpclmulqdq avx512vnni avx512bitalg avx512-vpopcntdq la57 rdpid bus-lock-detect fsrm serialize \
            tsx-ldtrk amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl arch-capabilities ssbd avx-vnni \
            avx512-bf16 fzrm fsrs fsrc amx-fp16 prefetchiti mcdt-no xsaveopt xsavec xgetbv1 xsaves xfd lahf-lm \
            abm 3dnowprefetch syscall nx pdpe1gb rdtscp lm wbnoinvd",
    },
    Model {
        name: "GraniteRapids-v2",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 173, 1),
        level: 0x24,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (GraniteRapids)",
        base: Some("GraniteRapids-v1"),
        features: "+ss +tsc-adjust +cldemote +movdiri +movdir64b +avx10 +avx10-128 +avx10-256 +avx10-512",
    },
    Model {
        name: "Haswell-v1",
        aliases: &["Haswell"],
        vendor: INTEL,
        signature: (6, 60, 4),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Core Processor (Haswell)",
        base: None,
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave avx f16c \
            rdrand fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 arat fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm xsaveopt lahf-lm abm syscall nx rdtscp \
            lm",
    },
    Model {
        name: "Haswell-v2",
        aliases: &["Haswell-noTSX"],
        vendor: INTEL,
        signature: (6, 60, 1),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Core Processor (Haswell, no TSX)",
        base: Some("Haswell-v1"),
        features: "-hle -rtm",
    },
    Model {
        name: "Haswell-v3",
        aliases: &["Haswell-IBRS"],
        vendor: INTEL,
        signature: (6, 60, 4),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Core Processor (Haswell, IBRS)",
        base: Some("Haswell-v2"),
        features: "+hle +rtm +spec-ctrl",
    },
    Model {
        name: "Haswell-v4",
        aliases: &["Haswell-noTSX-IBRS"],
        vendor: INTEL,
        signature: (6, 60, 1),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Core Processor (Haswell, no TSX, IBRS)",
        base: Some("Haswell-v3"),
        features: "-hle -rtm",
    },
    Model {
        name: "Icelake-Server-v1",
        aliases: &["Icelake-Server"],
        vendor: INTEL,
        signature: (6, 134, 0),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Icelake)",
        base: None,
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave avx f16c \
            rdrand fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 arat fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm avx512f avx512dq rdseed adx smap \
            clflushopt clwb avx512cd avx512bw avx512vl avx512vbmi umip pku avx512vbmi2 gfni vaes vpclmulqdq \
            avx512vnni avx512bitalg avx512-vpopcntdq la57 spec-ctrl ssbd xsaveopt xsavec xgetbv1 lahf-lm abm \
            3dnowprefetch syscall nx pdpe1gb rdtscp lm wbnoinvd",
    },
    Model {
        name: "Icelake-Server-v2",
        aliases: &["Icelake-Server-noTSX"],
        vendor: INTEL,
        signature: (6, 134, 0),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Icelake)",
        base: Some("Icelake-Server-v1"),
        features: "-hle -rtm",
    },
    Model {
        name: "Icelake-Server-v3",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 134, 0),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Icelake)",
        base: Some("Icelake-Server-v2"),
        features: "+arch-capabilities",
    },
    Model {
        name: "Icelake-Server-v4",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 106, 0),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Icelake)",
        base: Some("Icelake-Server-v3"),
        features: "+avx512ifma +sha-ni +rdpid +fsrm",
    },
    Model {
        name: "Icelake-Server-v5",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 106, 0),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Icelake)",
        base: Some("Icelake-Server-v4"),
        features: "+xsaves",
    },
    Model {
        name: "Icelake-Server-v6",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 106, 0),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Icelake)",
        base: Some("Icelake-Server-v5"),
        features: "",
    },
    Model {
        name: "Icelake-Server-v7",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 106, 0),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Icelake)",
        base: Some("Icelake-Server-v6"),
        features: "+hle +rtm",
    },
    Model {
        name: "IvyBridge-v1",
        aliases: &["IvyBridge"],
        vendor: INTEL,
        signature: (6, 58, 9),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon E3-12xx v2 (Ivy Bridge)",
        base: None,
        features: "pni pclmulqdq ssse3 cx16 sse4.1 sse4.2 x2apic popcnt tsc-deadline aes xsave avx f16c rdrand fpu vme \
            de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat \
            fsgsbase smep erms xsaveopt lahf-lm syscall nx rdtscp lm",
    },
    Model {
        name: "IvyBridge-v2",
        aliases: &["IvyBridge-IBRS"],
        vendor: INTEL,
        signature: (6, 58, 9),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon E3-12xx v2 (Ivy Bridge, IBRS)",
        base: Some("IvyBridge-v1"),
        features: "+spec-ctrl",
    },
    Model {
        name: "KnightsMill-v1",
        aliases: &["KnightsMill"],
        vendor: INTEL,
        signature: (6, 133, 0),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Phi Processor (Knights Mill)",
        base: None,
        features: "pni pclmulqdq ssse3 fma cx16 sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave avx f16c \
            rdrand fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 ss arat fsgsbase bmi1 avx2 smep bmi2 erms avx512f rdseed adx avx512pf avx512er avx512cd \
            avx512-vpopcntdq avx512-4vnniw avx512-4fmaps xsaveopt lahf-lm abm 3dnowprefetch syscall nx pdpe1gb \
            rdtscp lm",
    },
    Model {
        name: "Nehalem-v1",
        aliases: &["Nehalem"],
        vendor: INTEL,
        signature: (6, 26, 3),
        level: 0xb,
        xlevel: 0x8000_0008,
        brand: "Intel Core i7 9xx (Nehalem Class Core i7)",
        base: None,
        features: "pni ssse3 cx16 sse4.1 sse4.2 popcnt fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov \
            pat pse36 clflush mmx fxsr sse sse2 lahf-lm syscall nx lm",
    },
    Model {
        name: "Nehalem-v2",
        aliases: &["Nehalem-IBRS"],
        vendor: INTEL,
        signature: (6, 26, 3),
        level: 0xb,
        xlevel: 0x8000_0008,
        brand: "Intel Core i7 9xx (Nehalem Core i7, IBRS update)",
        base: Some("Nehalem-v1"),
        features: "+spec-ctrl",
    },
    Model {
        name: "Opteron_G1-v1",
        aliases: &["Opteron_G1"],
        vendor: AMD,
        signature: (15, 6, 1),
        level: 0x5,
        xlevel: 0x8000_0008,
        brand: "AMD Opteron 240 (Gen 1 Class Opteron)",
        base: None,
        features: "pni fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 syscall nx lm",
    },
    Model {
        name: "Opteron_G2-v1",
        aliases: &["Opteron_G2"],
        vendor: AMD,
        signature: (15, 6, 1),
        level: 0x5,
        xlevel: 0x8000_000a,
        brand: "AMD Opteron 22xx (Gen 2 Class Opteron)",
        base: None,
        features: "pni cx16 fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr \
            sse sse2 lahf-lm svm syscall nx lm",
    },
    Model {
        name: "Opteron_G3-v1",
        aliases: &["Opteron_G3"],
        vendor: AMD,
        signature: (16, 2, 3),
        level: 0x5,
        xlevel: 0x8000_000a,
        brand: "AMD Opteron 23xx (Gen 3 Class Opteron)",
        base: None,
        features: "pni monitor cx16 popcnt fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 \
            clflush mmx fxsr sse sse2 lahf-lm svm abm sse4a misalignsse syscall nx rdtscp lm",
    },
    Model {
        name: "Opteron_G4-v1",
        aliases: &["Opteron_G4"],
        vendor: AMD,
        signature: (21, 1, 2),
        level: 0xd,
        xlevel: 0x8000_001a,
        brand: "AMD Opteron 62xx class CPU",
        base: None,
        features: "pni pclmulqdq ssse3 cx16 sse4.1 sse4.2 popcnt aes xsave avx fpu vme de pse tsc msr pae mce cx8 apic \
            sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 lahf-lm svm abm sse4a misalignsse \
            3dnowprefetch xop fma4 syscall nx pdpe1gb rdtscp lm npt nrip-save",
    },
    Model {
        name: "Opteron_G5-v1",
        aliases: &["Opteron_G5"],
        vendor: AMD,
        signature: (21, 2, 0),
        level: 0xd,
        xlevel: 0x8000_001a,
        brand: "AMD Opteron 63xx class CPU",
        base: None,
        features: "pni pclmulqdq ssse3 fma cx16 sse4.1 sse4.2 popcnt aes xsave avx f16c fpu vme de pse tsc msr pae mce \
            cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 lahf-lm svm abm sse4a misalignsse \
            3dnowprefetch xop fma4 tbm syscall nx pdpe1gb rdtscp lm npt nrip-save",
    },
    Model {
        name: "Penryn-v1",
        aliases: &["Penryn"],
        vendor: INTEL,
        signature: (6, 23, 3),
        level: 0xa,
        xlevel: 0x8000_0008,
        brand: "Intel Core 2 Duo P9xxx (Penryn Class Core 2)",
        base: None,
        features: "pni ssse3 cx16 sse4.1 fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 \
            clflush mmx fxsr sse sse2 lahf-lm syscall nx lm",
    },
    Model {
        name: "SandyBridge-v1",
        aliases: &["SandyBridge"],
        vendor: INTEL,
        signature: (6, 42, 1),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon E312xx (Sandy Bridge)",
        base: None,
        features: "pni pclmulqdq ssse3 cx16 sse4.1 sse4.2 x2apic popcnt tsc-deadline aes xsave avx fpu vme de pse tsc \
            msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat xsaveopt lahf-lm \
            syscall nx rdtscp lm",
    },
    Model {
        name: "SandyBridge-v2",
        aliases: &["SandyBridge-IBRS"],
        vendor: INTEL,
        signature: (6, 42, 1),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon E312xx (Sandy Bridge, IBRS update)",
        base: Some("SandyBridge-v1"),
        features: "+spec-ctrl",
    },
    Model {
        name: "SapphireRapids-v1",
        aliases: &["SapphireRapids"],
        vendor: INTEL,
        signature: (6, 143, 4),
        level: 0x20,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (SapphireRapids)",
        base: None,
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave avx f16c \
            rdrand fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 arat fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm avx512f avx512dq rdseed adx smap \
            avx512ifma clflushopt clwb avx512cd sha-ni avx512bw avx512vl avx512vbmi umip pku avx512vbmi2 gfni \
            vaes vpclmulqdq avx512vnni avx512bitalg avx512-vpopcntdq la57 rdpid bus-lock-detect fsrm serialize \
            tsx-ldtrk amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl arch-capabilities ssbd avx-vnni \
            avx512-bf16 fzrm fsrs fsrc xsaveopt xsavec xgetbv1 xsaves xfd lahf-lm abm 3dnowprefetch syscall nx \
            pdpe1gb rdtscp lm wbnoinvd",
    },
    Model {
        name: "SapphireRapids-v2",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 143, 4),
        level: 0x20,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (SapphireRapids)",
        base: Some("SapphireRapids-v1"),
        features: "",
    },
    Model {
        name: "SapphireRapids-v3",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 143, 4),
        level: 0x20,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (SapphireRapids)",
        base: Some("SapphireRapids-v2"),
        features: "+ss +tsc-adjust +cldemote +movdiri +movdir64b",
    },
    Model {
        name: "SierraForest-v1",
        aliases: &["SierraForest"],
        vendor: INTEL,
        signature: (6, 175, 0),
        level: 0x23,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (SierraForest)",
        base: None,
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave avx f16c \
            rdrand fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 arat fsgsbase bmi1 avx2 smep bmi2 erms invpcid rdseed adx smap clflushopt clwb sha-ni umip pku \
            gfni vaes vpclmulqdq rdpid bus-lock-detect fsrm serialize spec-ctrl arch-capabilities ssbd avx-vnni \
            cmpccxadd fsrs avx-ifma avx-vnni-int8 avx-ne-convert mcdt-no xsaveopt xsavec xgetbv1 xsaves lahf-lm \
            abm 3dnowprefetch syscall nx pdpe1gb rdtscp lm wbnoinvd",
    },
    Model {
        name: "SierraForest-v2",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 175, 3),
        level: 0x23,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (SierraForest)",
        base: Some("SierraForest-v1"),
        features: "+ss +tsc-adjust +cldemote +movdiri +movdir64b +lam +intel-psfd +ipred-ctrl +rrsba-ctrl +bhi-ctrl",
    },
    Model {
        name: "Skylake-Client-v1",
        aliases: &["Skylake-Client"],
        vendor: INTEL,
        signature: (6, 94, 3),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Core Processor (Skylake)",
        base: None,
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave avx f16c \
            rdrand fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 arat fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm rdseed adx smap xsaveopt xsavec xgetbv1 \
            lahf-lm abm 3dnowprefetch syscall nx rdtscp lm",
    },
    Model {
        name: "Skylake-Client-v2",
        aliases: &["Skylake-Client-IBRS"],
        vendor: INTEL,
        signature: (6, 94, 3),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Core Processor (Skylake, IBRS)",
        base: Some("Skylake-Client-v1"),
        features: "+spec-ctrl",
    },
    Model {
        name: "Skylake-Client-v3",
        aliases: &["Skylake-Client-noTSX-IBRS"],
        vendor: INTEL,
        signature: (6, 94, 3),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Core Processor (Skylake, IBRS, no TSX)",
        base: Some("Skylake-Client-v2"),
        features: "-hle -rtm",
    },
    Model {
        name: "Skylake-Client-v4",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 94, 3),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Core Processor (Skylake, IBRS, no TSX)",
        base: Some("Skylake-Client-v3"),
        features: "+xsaves",
    },
    Model {
        name: "Skylake-Server-v1",
        aliases: &["Skylake-Server"],
        vendor: INTEL,
        signature: (6, 85, 4),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Skylake)",
        base: None,
        features: "pni pclmulqdq ssse3 fma cx16 pcid sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave avx f16c \
            rdrand fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 arat fsgsbase bmi1 hle avx2 smep bmi2 erms invpcid rtm avx512f avx512dq rdseed adx smap \
            clflushopt clwb avx512cd avx512bw avx512vl pku xsaveopt xsavec xgetbv1 lahf-lm abm 3dnowprefetch \
            syscall nx pdpe1gb rdtscp lm",
    },
    Model {
        name: "Skylake-Server-v2",
        aliases: &["Skylake-Server-IBRS"],
        vendor: INTEL,
        signature: (6, 85, 4),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Skylake, IBRS)",
        base: Some("Skylake-Server-v1"),
        features: "+spec-ctrl -clflushopt",
    },
    Model {
        name: "Skylake-Server-v3",
        aliases: &["Skylake-Server-noTSX-IBRS"],
        vendor: INTEL,
        signature: (6, 85, 4),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Skylake, IBRS, no TSX)",
        base: Some("Skylake-Server-v2"),
        features: "-hle -rtm",
    },
    Model {
        name: "Skylake-Server-v4",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 85, 4),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Skylake, IBRS, no TSX)",
        base: Some("Skylake-Server-v3"),
        features: "",
    },
    Model {
        name: "Skylake-Server-v5",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 85, 4),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Intel Xeon Processor (Skylake, IBRS, no TSX)",
        base: Some("Skylake-Server-v4"),
        features: "+xsaves",
    },
    Model {
        name: "Snowridge-v1",
        aliases: &["Snowridge"],
        vendor: INTEL,
        signature: (6, 134, 1),
        level: 0x1b,
        xlevel: 0x8000_0008,
        brand: "Intel Atom Processor (SnowRidge)",
        base: None,
        features: "pni pclmulqdq monitor ssse3 cx16 sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave rdrand fpu \
            vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat \
            fsgsbase smep erms mpx rdseed smap clflushopt clwb sha-ni umip gfni cldemote movdiri movdir64b \
            spec-ctrl arch-capabilities core-capability ssbd xsaveopt xsavec xgetbv1 lahf-lm 3dnowprefetch \
            syscall nx pdpe1gb rdtscp lm",
    },
    Model {
        name: "Snowridge-v2",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 134, 1),
        level: 0x1b,
        xlevel: 0x8000_0008,
        brand: "Intel Atom Processor (Snowridge, no MPX)",
        base: Some("Snowridge-v1"),
        features: "-mpx",
    },
    Model {
        name: "Snowridge-v3",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 134, 1),
        level: 0x1b,
        xlevel: 0x8000_0008,
        brand: "Intel Atom Processor (Snowridge, no MPX)",
        base: Some("Snowridge-v2"),
        features: "+xsaves",
    },
    Model {
        name: "Snowridge-v4",
        aliases: &[],
        vendor: INTEL,
        signature: (6, 134, 1),
        level: 0x1b,
        xlevel: 0x8000_0008,
        brand: "Intel Atom Processor (Snowridge, no MPX)",
        base: Some("Snowridge-v3"),
        features: "-core-capability",
    },
    Model {
        name: "Westmere-v1",
        aliases: &["Westmere"],
        vendor: INTEL,
        signature: (6, 44, 1),
        level: 0xb,
        xlevel: 0x8000_0008,
        brand: "Westmere E56xx/L56xx/X56xx (Nehalem-C)",
        base: None,
        features: "pni pclmulqdq ssse3 cx16 sse4.1 sse4.2 popcnt aes fpu vme de pse tsc msr pae mce cx8 apic sep mtrr \
            pge mca cmov pat pse36 clflush mmx fxsr sse sse2 arat lahf-lm syscall nx lm",
    },
    Model {
        name: "Westmere-v2",
        aliases: &["Westmere-IBRS"],
        vendor: INTEL,
        signature: (6, 44, 1),
        level: 0xb,
        xlevel: 0x8000_0008,
        brand: "Westmere E56xx/L56xx/X56xx (IBRS update)",
        base: Some("Westmere-v1"),
        features: "+spec-ctrl",
    },
    Model {
        name: "YongFeng-v1",
        aliases: &["YongFeng"],
        vendor: CENTAUR,
        signature: (7, 11, 3),
        level: 0x1f,
        xlevel: 0x8000_0008,
        brand: "Zhaoxin YongFeng Processor",
        base: None,
        features: "pni pclmulqdq monitor ssse3 fma cx16 pcid sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave \
            avx f16c rdrand fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush acpi \
            mmx fxsr sse sse2 ss fsgsbase bmi1 avx2 smep bmi2 invpcid rdseed adx smap sha-ni umip pku rdpid \
            spec-ctrl arch-capabilities xsaveopt lahf-lm abm 3dnowprefetch syscall nx pdpe1gb rdtscp lm invtsc \
            xstore xstore-en xcrypt xcrypt-en ace2 phe phe-en pmm pmm-en",
    },
    Model {
        name: "YongFeng-v2",
        aliases: &[],
        vendor: CENTAUR,
        signature: (7, 91, 3),
        level: 0x1f,
        xlevel: 0x8000_0008,
        brand: "Zhaoxin YongFeng Processor",
        base: Some("YongFeng-v1"),
        features: "",
    },
    Model {
        name: "athlon-v1",
        aliases: &["athlon"],
        vendor: AMD,
        signature: (6, 2, 3),
        level: 0x2,
        xlevel: 0x8000_0008,
        brand: "QEMU Virtual CPU version 2.5+",
        base: None,
        features: "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 mmx fxsr sse sse2 mmxext \
            3dnowext 3dnow",
    },
    Model {
        name: "core2duo-v1",
        aliases: &["core2duo"],
        vendor: INTEL,
        signature: (6, 15, 11),
        level: 0xa,
        xlevel: 0x8000_0008,
        brand: "Intel(R) Core(TM)2 Duo CPU     T7700  @ 2.40GHz",
        base: None,
        features: "pni monitor ssse3 cx16 fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 \
            clflush acpi mmx fxsr sse sse2 ss lahf-lm syscall nx lm",
    },
    Model {
        name: "coreduo-v1",
        aliases: &["coreduo"],
        vendor: INTEL,
        signature: (6, 14, 8),
        level: 0xa,
        xlevel: 0x8000_0008,
        brand: "Genuine Intel(R) CPU           T2600  @ 2.16GHz",
        base: None,
        features: "pni monitor fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat clflush acpi mmx fxsr \
            sse sse2 ss nx",
    },
    Model {
        name: "kvm32-v1",
        aliases: &["kvm32"],
        vendor: INTEL,
        signature: (15, 6, 1),
        level: 0x5,
        xlevel: 0x8000_0008,
        brand: "Common 32-bit KVM processor",
        base: None,
        features: "pni fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2",
    },
    Model {
        name: "kvm64-v1",
        aliases: &["kvm64"],
        vendor: INTEL,
        signature: (15, 6, 1),
        level: 0xd,
        xlevel: 0x8000_0008,
        brand: "Common KVM processor",
        base: None,
        features: "pni cx16 fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr \
            sse sse2 syscall nx lm",
    },
    Model {
        name: "n270-v1",
        aliases: &["n270"],
        vendor: INTEL,
        signature: (6, 28, 2),
        level: 0xa,
        xlevel: 0x8000_0008,
        brand: "Intel(R) Atom(TM) CPU N270   @ 1.60GHz",
        base: None,
        features: "pni monitor ssse3 movbe fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat clflush \
            acpi mmx fxsr sse sse2 ss lahf-lm nx",
    },
    Model {
        name: "pentium-v1",
        aliases: &["pentium"],
        vendor: INTEL,
        signature: (5, 4, 3),
        level: 0x1,
        xlevel: 0x0000_0000,
        brand: "",
        base: None,
        features: "fpu vme de pse tsc msr mce cx8 apic mmx",
    },
    Model {
        name: "pentium2-v1",
        aliases: &["pentium2"],
        vendor: INTEL,
        signature: (6, 5, 2),
        level: 0x2,
        xlevel: 0x0000_0000,
        brand: "",
        base: None,
        features: "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 mmx fxsr",
    },
    Model {
        name: "pentium3-v1",
        aliases: &["pentium3"],
        vendor: INTEL,
        signature: (6, 7, 3),
        level: 0x3,
        xlevel: 0x0000_0000,
        brand: "",
        base: None,
        features: "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 mmx fxsr sse",
    },
    Model {
        name: "phenom-v1",
        aliases: &["phenom"],
        vendor: AMD,
        signature: (16, 2, 3),
        level: 0x5,
        xlevel: 0x8000_001a,
        brand: "AMD Phenom(tm) 9550 Quad-Core Processor",
        base: None,
        features: "pni monitor cx16 popcnt fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 \
            clflush mmx fxsr sse sse2 lahf-lm svm abm sse4a syscall nx mmxext fxsr-opt pdpe1gb rdtscp lm \
            3dnowext 3dnow npt",
    },
    Model {
        name: "qemu32-v1",
        aliases: &["qemu32"],
        vendor: INTEL,
        signature: (6, 6, 3),
        level: 0x4,
        xlevel: 0x8000_0004,
        brand: "QEMU Virtual CPU version 2.5+",
        base: None,
        features: "pni fpu de pse tsc msr pae mce cx8 apic sep pge cmov pat mmx fxsr sse sse2",
    },
    Model {
        name: "qemu64-v1",
        aliases: &["qemu64"],
        vendor: AMD,
        signature: (15, 107, 1),
        level: 0xd,
        xlevel: 0x8000_000a,
        brand: "QEMU Virtual CPU version 2.5+",
        base: None,
        features: "pni cx16 fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 lahf-lm svm syscall nx lm",
    },
    Model {
        name: "x86-64-v1",
        aliases: &[],
        vendor: "",
        signature: (15, 107, 1),
        level: 0xd,
        xlevel: 0x8000_000a,
        brand: "x86-64-v1 Processor",
        base: None,
        features: "pni cx16 fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
            sse2 lahf-lm syscall nx lm",
    },
    Model {
        name: "x86-64-v2",
        aliases: &[],
        vendor: "",
        signature: (15, 107, 1),
        level: 0xd,
        xlevel: 0x8000_000a,
        brand: "x86-64-v2 Processor",
        base: Some("x86-64-v1"),
        features: "+popcnt +sse4.1 +sse4.2 +ssse3",
    },
    Model {
        name: "x86-64-v3",
        aliases: &[],
        vendor: "",
        signature: (15, 107, 1),
        level: 0xd,
        xlevel: 0x8000_000a,
        brand: "x86-64-v3 Processor",
        base: Some("x86-64-v2"),
        features: "+avx +avx2 +bmi1 +bmi2 +f16c +fma +abm +movbe +xsave",
    },
    Model {
        name: "x86-64-v4",
        aliases: &[],
        vendor: "",
        signature: (15, 107, 1),
        level: 0xd,
        xlevel: 0x8000_000a,
        brand: "x86-64-v4 Processor",
        base: Some("x86-64-v3"),
        features: "+avx512f +avx512bw +avx512cd +avx512dq +avx512vl",
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::features;
    use std::collections::BTreeSet;

    #[test]
    fn models_are_well_formed() {
        let mut names = BTreeSet::new();
        for model in MODELS {
            for name in model.aliases.iter().chain([&model.name]) {
                assert!(names.insert(*name), "{name}");
            }
            assert!(model.base.is_none_or(|base| find(base).is_some()), "{}", model.name);
            assert!(model.brand.len() <= 48 && (model.vendor.is_empty() || model.vendor.len() == 12));
            let own = model.features();
            assert_eq!(own.len(), own.iter().collect::<BTreeSet<_>>().len(), "{}: twice", model.name);
            for name in own {
                assert!(features::find(name).is_some_and(|f| f.name == name), "{}: {name}", model.name);
            }
        }
    }

    #[test]
    fn versions_differ_from_their_base() {
        let features = |name: &str| find(name).expect(name).features();
        assert!(features("Skylake-Server").contains(&"hle"));
        assert!(!features("Skylake-Server-noTSX-IBRS").contains(&"hle"));
        assert!(features("EPYC-Milan").contains(&"vme") && features("x86-64-v3").contains(&"sse4.2"));
        assert!(!features("x86-64-v3").contains(&"avx512f") && !features("x86-64-v2").contains(&"avx"));
    }
}
