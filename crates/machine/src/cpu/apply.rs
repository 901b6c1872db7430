//! From what is asked for and what the accelerator has to the CPUID a guest sees.

use super::features::{self, FEATURES, Feature, Word};
use super::models::{AMD, INTEL};
use super::request::{Base, Request};
use super::{CpuError, caches};
use accel::Cpuid;
use std::collections::BTreeSet;

/// A processor as a guest will see it, without topology.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The table.
    pub cpuid: Cpuid,
    /// What was left out because the accelerator does not have it.
    pub missing: Vec<&'static Feature>,
}

/// Features of models that a guest is not given where the accelerator has none, without a word: virtual 8086 extensions, waiting
/// on memory, thermal control and nested virtualization are no loss to a guest, and accelerators commonly lack them.
const OPTIONAL: &[&str] = &["vme", "monitor", "acpi", "svm", "npt", "nrip-save", "svme-addr-chk"];
/// What the topology decides.
const TOPOLOGY: &[&str] = &["ht", "cmp-legacy"];
/// What every guest gets whatever its model: the virtual machine's own.
const ALWAYS: &[&str] = &["hypervisor", "x2apic", "tsc-deadline"];
/// What cannot move to another host.
const UNMIGRATABLE: &[&str] = &["invtsc"];
/// Features that need another one.
const NEEDS: &[(&str, &str)] = &[
    ("xsaveopt", "xsave"),
    ("xsavec", "xsave"),
    ("xgetbv1", "xsave"),
    ("xsaves", "xsave"),
    ("avx", "xsave"),
    ("mpx", "xsave"),
    ("pku", "xsave"),
    ("f16c", "avx"),
    ("fma", "avx"),
    ("avx2", "avx"),
    ("vaes", "avx"),
    ("vpclmulqdq", "avx"),
    ("fma4", "avx"),
    ("xop", "avx"),
    ("avx-vnni", "avx2"),
    ("avx-ifma", "avx2"),
    ("avx-vnni-int8", "avx2"),
    ("avx-ne-convert", "avx2"),
    ("avx512f", "avx2"),
    ("avx512dq", "avx512f"),
    ("avx512ifma", "avx512f"),
    ("avx512cd", "avx512f"),
    ("avx512bw", "avx512f"),
    ("avx512vl", "avx512f"),
    ("avx512vbmi", "avx512f"),
    ("avx512vbmi2", "avx512f"),
    ("avx512vnni", "avx512f"),
    ("avx512bitalg", "avx512f"),
    ("avx512-vpopcntdq", "avx512f"),
    ("avx512-4vnniw", "avx512f"),
    ("avx512-4fmaps", "avx512f"),
    ("avx512-vp2intersect", "avx512f"),
    ("avx512-bf16", "avx512f"),
    ("avx512-fp16", "avx512f"),
    ("amx-tile", "xsave"),
    ("amx-bf16", "amx-tile"),
    ("amx-int8", "amx-tile"),
    ("amx-fp16", "amx-tile"),
    ("npt", "svm"),
    ("nrip-save", "svm"),
    ("svme-addr-chk", "svm"),
    ("vgif", "svm"),
    ("vnmi", "svm"),
];
/// State components of XCR0 (Intel SDM vol. 1, 13.1) and what they are for; x87 and SSE are always there.
const COMPONENTS: &[(u32, &str)] = &[
    (2, "avx"),
    (3, "mpx"),
    (4, "mpx"),
    (5, "avx512f"),
    (6, "avx512f"),
    (7, "avx512f"),
    (9, "pku"),
    (17, "amx-tile"),
    (18, "amx-tile"),
];
/// Bits of leaf 0x8000_0001 EDX that repeat leaf 1 on AMD's processors.
const REPEATED: u32 = 0x0183_f3ff;

type Set = BTreeSet<&'static str>;

fn register(cpuid: &Cpuid, word: Word) -> u32 {
    cpuid.query(word.leaf, word.subleaf.unwrap_or(0))[word.register]
}

/// Whether a table has a feature.
pub(super) fn has(cpuid: &Cpuid, feature: &Feature) -> bool {
    register(cpuid, feature.word) >> feature.bit & 1 != 0
}

/// The features of a table, by name.
pub(super) fn names(cpuid: &Cpuid) -> Set {
    FEATURES.iter().filter(|f| has(cpuid, f)).map(|f| f.name).collect()
}

/// The vendor string of a table.
pub(super) fn vendor(cpuid: &Cpuid) -> String {
    let [_, b, c, d] = cpuid.query(0, 0);
    String::from_utf8_lossy(&[b, d, c].map(u32::to_le_bytes).concat()).into_owned()
}

/// Features asked for (in the sense of QEMU's static expansion), and what of them the accelerator lacks.
fn choose(request: &Request, supported: &Set) -> Result<(Set, Vec<&'static Feature>), CpuError> {
    let asked = |name: &str| request.features.iter().find(|(f, _)| f.name == name).map(|(_, on)| *on);
    let mut wanted: Set = match request.base {
        Base::Accelerator => supported.clone(),
        Base::Nothing => Set::new(),
        Base::Model(model) => {
            let keep = |name: &&str| !OPTIONAL.contains(name) || supported.contains(name);
            let virtual_machine = FEATURES.iter().filter(|f| f.word.leaf == 0x4000_0001).map(|f| f.name);
            let given = virtual_machine.chain(ALWAYS.iter().copied()).filter(|name| supported.contains(name));
            model.features().into_iter().filter(keep).chain(given).collect()
        }
    };
    // Without it an AMD guest would see threads as cores.
    let amd = match request.base {
        Base::Model(model) => [AMD, ""].contains(&model.vendor),
        _ => false,
    };
    if amd && supported.contains("topoext") {
        wanted.insert("topoext");
    }
    if request.spec.migratable {
        wanted.retain(|name| !UNMIGRATABLE.contains(name));
    }
    for (feature, on) in &request.features {
        if *on {
            wanted.insert(feature.name);
        } else {
            wanted.remove(feature.name);
        }
    }
    let lacking = |name: &&&str| !supported.contains(**name) && !TOPOLOGY.contains(*name);
    let missing: Vec<&'static str> = wanted.iter().filter(lacking).copied().collect();
    let refused: Vec<&'static Feature> = missing
        .iter()
        .filter(|name| match request.spec.enforce {
            Some(all) => all,
            None => asked(name) == Some(true),
        })
        .filter_map(|name| features::find(name))
        .collect();
    if !refused.is_empty() {
        let list: Vec<String> = refused.iter().map(ToString::to_string).collect();
        return Err(CpuError::Missing { model: request.name.clone(), features: list.join(", ") });
    }
    wanted.retain(|name| supported.contains(name) || TOPOLOGY.contains(name));
    // The table is in an order such that one pass suffices.
    for (name, needed) in NEEDS {
        if wanted.contains(name) && !wanted.contains(needed) {
            if asked(name) == Some(true) {
                let text = format!("{name} needs {needed}");
                return Err(CpuError::Unsupported { model: request.name.clone(), text });
            }
            wanted.remove(name);
        }
    }
    Ok((wanted, missing.iter().filter_map(|name| features::find(name)).collect()))
}

/// The CPUID of a processor asked for, on an accelerator that can give `supported`.
///
/// # Errors
/// Something that the accelerator does not have.
pub fn resolve(request: &Request, supported: &Cpuid) -> Result<Resolved, CpuError> {
    let unsupported = |text: String| CpuError::Unsupported { model: request.name.clone(), text };
    let (wanted, missing) = choose(request, &names(supported))?;
    let spec = &request.spec;
    if spec.pmu && supported.query(0xa, 0)[0] & 0xff == 0 {
        return Err(unsupported("this accelerator has no performance counters; leave out pmu=on".into()));
    }
    let mut cpuid = supported.clone();
    set_features(&mut cpuid, request, &wanted);
    if !spec.pmu {
        cpuid.remove(0xa);
    }
    set_identity(&mut cpuid, request, supported).map_err(unsupported)?;
    if let Some(bits) = spec.phys_bits {
        let most = supported.query(0x8000_0008, 0)[0] & 0xff;
        if bits < 32 || bits > most {
            return Err(unsupported(format!("phys-bits={bits} is out of range; use 32 to {most}")));
        }
        let e = cpuid.entry(0x8000_0008, 0, false);
        e.eax = e.eax & !0xff | bits;
    }
    set_components(&mut cpuid, &wanted);
    if !spec.l3_cache {
        caches::without_l3(&mut cpuid);
    }
    if !spec.kvm {
        cpuid.entries.retain(|e| e.leaf >> 28 != 4);
    }
    set_levels(&mut cpuid, request, &wanted);
    Ok(Resolved { cpuid, missing })
}

fn set_features(cpuid: &mut Cpuid, request: &Request, wanted: &Set) {
    let words: BTreeSet<Word> = FEATURES.iter().map(|f| f.word).collect();
    for word in words {
        let of_word = || FEATURES.iter().filter(|f| f.word == word);
        let named = of_word().fold(0u32, |bits, f| bits | 1 << f.bit);
        let on = of_word().filter(|f| wanted.contains(f.name)).fold(0u32, |bits, f| bits | 1 << f.bit);
        let have = register(cpuid, word);
        // Bits without a name go to guests that are to have all there is, and to no other.
        let value = match request.base {
            Base::Accelerator => have & !named | on,
            _ => on,
        };
        if value == have {
            continue;
        }
        let (subleaf, indexed) = (word.subleaf.unwrap_or(0), word.subleaf.is_some());
        let e = cpuid.entry(word.leaf, subleaf, indexed);
        *[&mut e.eax, &mut e.ebx, &mut e.ecx, &mut e.edx][word.register] = value;
    }
    if !matches!(request.base, Base::Accelerator) {
        for e in &mut cpuid.entries {
            match (e.leaf, e.subleaf) {
                (7, 1) => (e.ebx, e.ecx) = (0, 0),
                (7, 2..) => (e.eax, e.ebx, e.ecx) = (0, 0, 0),
                (0x8000_0021, _) => (e.ebx, e.ecx, e.edx) = (0, 0, 0),
                _ => {}
            }
        }
    }
    let last = (0..=2).rev().find(|i| cpuid.query(7, *i) != [0; 4] && *i > 0).unwrap_or(0);
    if cpuid.get(7, 0).is_some() && !matches!(request.base, Base::Accelerator) {
        cpuid.entry(7, 0, true).eax = last;
    }
    if !wanted.contains("svm") {
        cpuid.remove(0x8000_000a);
    }
}

/// Family, model and stepping as leaf 1 EAX encodes them (Intel SDM vol. 2, CPUID, figure "Version Information").
fn signature(family: u32, model: u32, stepping: u32) -> u32 {
    let (base, extended) = if family > 15 { (15, family - 15) } else { (family, 0) };
    extended << 20 | (model >> 4) << 16 | base << 8 | (model & 15) << 4 | stepping
}

/// The inverse of [`signature`].
pub(super) fn family_model_stepping(eax: u32) -> (u32, u32, u32) {
    let base = eax >> 8 & 15;
    let family = if base == 15 { base + (eax >> 20 & 0xff) } else { base };
    (family, eax >> 4 & 15 | (eax >> 16 & 15) << 4, eax & 15)
}

fn set_identity(cpuid: &mut Cpuid, request: &Request, supported: &Cpuid) -> Result<(), String> {
    let spec = &request.spec;
    let own = vendor(supported);
    let model = match request.base {
        Base::Model(model) => Some(model),
        _ => None,
    };
    let name = spec.vendor.as_deref().or(model.map(|m| m.vendor)).filter(|v| !v.is_empty()).unwrap_or(&own);
    let bytes: [u8; 12] =
        name.as_bytes().try_into().map_err(|_| format!("vendor={name}: it must have 12 characters"))?;
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let amd = name == AMD || name == "HygonGenuine";
    for leaf in [0, 0x8000_0000] {
        let e = cpuid.entry(leaf, 0, false);
        // Intel's extended leaf 0 has no vendor.
        let shown = leaf == 0 || amd;
        (e.ebx, e.edx, e.ecx) = if shown { (word(0), word(4), word(8)) } else { (0, 0, 0) };
    }
    let (family, number, stepping) = match model {
        Some(model) => model.signature,
        None => family_model_stepping(supported.query(1, 0)[0]),
    };
    let in_range = |what: &str, value: u32, most: u32| match value <= most {
        true => Ok(value),
        false => Err(format!("{what}={value} is out of range; use 0 to {most}")),
    };
    let eax = signature(
        in_range("family", spec.family.unwrap_or(family), 270)?,
        in_range("model", spec.model.unwrap_or(number), 255)?,
        in_range("stepping", spec.stepping.unwrap_or(stepping), 15)?,
    );
    // What has no model keeps bits of the signature that have no name (the processor type).
    let changed = model.is_some() || spec.family.or(spec.model).or(spec.stepping).is_some();
    if changed {
        cpuid.entry(1, 0, false).eax = eax;
    }
    let eax = cpuid.query(1, 0)[0];
    let repeated = cpuid.query(1, 0)[3] & REPEATED;
    let e = cpuid.entry(0x8000_0001, 0, false);
    e.eax = if amd { eax } else { 0 };
    // PAT and PSE-36 among others have no feature name of their own there.
    e.edx = e.edx & !REPEATED | if amd { repeated } else { 0 };
    if let Some(brand) = spec.model_id.as_deref().or(model.map(|m| m.brand)) {
        if brand.len() > 48 {
            return Err(format!("model-id={brand}: it must have at most 48 characters"));
        }
        let mut text = [0u8; 48];
        text[..brand.len()].copy_from_slice(brand.as_bytes());
        for (i, part) in text.chunks_exact(16).enumerate() {
            let word = |at: usize| u32::from_le_bytes([part[at], part[at + 1], part[at + 2], part[at + 3]]);
            let e = cpuid.entry(0x8000_0002 + i as u32, 0, false);
            (e.eax, e.ebx, e.ecx, e.edx) = (word(0), word(4), word(8), word(12));
        }
    }
    let own_amd = own == AMD || own == "HygonGenuine";
    if amd && !own_amd {
        for leaf in [2, 4] {
            cpuid.remove(leaf);
        }
        caches::amd(cpuid);
    } else if name == INTEL && own != INTEL {
        for leaf in [0x8000_0005, 0x8000_001d, 0x8000_001e] {
            cpuid.remove(leaf);
        }
        let e = cpuid.entry(0x8000_0006, 0, false);
        (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0x0200_6040, 0);
        caches::intel(cpuid);
    }
    Ok(())
}

/// Leaf 0xd: the state components of the features there are.
fn set_components(cpuid: &mut Cpuid, wanted: &Set) {
    if !wanted.contains("xsave") {
        cpuid.remove(0xd);
        return;
    }
    let gone = COMPONENTS.iter().filter(|(_, name)| !wanted.contains(name));
    let mask = !gone.fold(0u64, |mask, (bit, _)| mask | 1 << bit);
    let all = cpuid.query(0xd, 0);
    let kept = (u64::from(all[0]) | u64::from(all[3]) << 32) & mask;
    // Components of IA32_XSS need XSAVES.
    let supervisor = cpuid.query(0xd, 1)[2] & if wanted.contains("xsaves") { u32::MAX } else { 0 };
    cpuid.entries.retain(|e| {
        e.leaf != 0xd
            || e.subleaf < 2
            || e.subleaf < 64 && (kept >> e.subleaf | u64::from(supervisor) >> e.subleaf) & 1 != 0
    });
    // The legacy region and the header; then each component has its place in the standard format.
    let sizes = cpuid.entries.iter().filter(|e| e.leaf == 0xd && e.subleaf >= 2 && e.ecx & 1 == 0);
    let size = sizes.map(|e| e.ebx.saturating_add(e.eax)).fold(576, u32::max);
    let e = cpuid.entry(0xd, 0, true);
    (e.eax, e.edx, e.ecx) = (kept as u32, (kept >> 32) as u32, size);
    e.ebx = e.ebx.min(size);
    let e = cpuid.entry(0xd, 1, true);
    e.ecx = supervisor;
    e.ebx = e.ebx.min(size);
}

/// The highest leaves, and nothing above them.
fn set_levels(cpuid: &mut Cpuid, request: &Request, wanted: &Set) {
    let own = (cpuid.query(0, 0)[0], cpuid.query(0x8000_0000, 0)[0]);
    let (level, xlevel) = match request.base {
        Base::Accelerator => own,
        Base::Nothing => (0, 0x8000_0000),
        Base::Model(model) => (model.level, model.xlevel),
    };
    let needed = |range: std::ops::Range<u32>| {
        let used = FEATURES.iter().filter(|f| wanted.contains(f.name) && range.contains(&f.word.leaf));
        used.map(|f| f.word.leaf).max().unwrap_or(range.start)
    };
    // An older model may do with fewer; the frequency of the TSC is worth a higher level on what reads it.
    let frequency = match vendor(cpuid) == INTEL && cpuid.query(0x15, 0)[1..3].iter().all(|r| *r != 0) {
        true if level >= 7 => 0x15,
        _ => 0,
    };
    let topology = if wanted.contains("topoext") { 0x8000_001e } else { 0 };
    let level = request.spec.level.unwrap_or(level.max(needed(0..0x4000_0000)).max(frequency));
    let xlevel = request.spec.xlevel.unwrap_or(xlevel.max(topology).max(needed(0x8000_0000..0xc000_0000)));
    cpuid.entry(0, 0, false).eax = level;
    cpuid.entry(0x8000_0000, 0, false).eax = xlevel;
    cpuid.entries.retain(|e| match e.leaf {
        0..0x4000_0000 => e.leaf <= level,
        0x8000_0000..0xc000_0000 => e.leaf <= xlevel,
        0xc000_0000.. => matches!(request.base, Base::Accelerator) || wanted.contains("xstore"),
        _ => true,
    });
}

#[cfg(test)]
mod tests {
    use super::super::models::MODELS;
    use super::super::request::parse;
    use super::*;

    fn supported() -> Cpuid {
        softcpu::cpuid::supported()
    }

    fn request(text: &str) -> Request {
        Request::new(&parse(text).expect(text)).expect(text)
    }

    fn table(text: &str) -> Cpuid {
        resolve(&request(text), &supported()).expect(text).cpuid
    }

    fn feature(cpuid: &Cpuid, name: &str) -> bool {
        has(cpuid, features::find(name).expect(name))
    }

    #[test]
    fn host_is_what_the_accelerator_has() {
        assert_eq!(table("host"), supported());
        assert!(!feature(&table("host,migratable=on"), "invtsc"));
        let less = table("host,-avx");
        assert!(!feature(&less, "avx") && !feature(&less, "avx2") && !feature(&less, "fma"));
        assert_eq!(less.query(0xd, 0)[0] & 4, 0);
        assert_eq!((less.query(0xd, 0)[2], less.query(0xd, 2)), (576, [0; 4]));
    }

    #[test]
    fn identity_of_a_model() {
        let t = table("Nehalem");
        assert_eq!(vendor(&t), INTEL);
        assert_eq!(family_model_stepping(t.query(1, 0)[0]), (6, 26, 3));
        assert_eq!(t.query(0x8000_0001, 0)[0], 0);
        assert_eq!(t.query(0x8000_0000, 0)[1..], [0, 0, 0]);
        assert_eq!(&t.query(0x8000_0002, 0)[0].to_le_bytes(), b"Inte");
        assert_eq!(t.query(4, 0)[0] & 0x1f, 1, "Intel's cache leaf");
        assert_eq!(t.query(4, 4), [0; 4]);
        assert!(!feature(&t, "avx") && feature(&t, "sse4.2") && feature(&t, "hypervisor"));
        assert_eq!(t.query(0xd, 0), [0; 4]);
        let own = table("x86-64-v3,vendor=GenuineIntel,family=6,model=85,model-id=My processor,,mine");
        assert_eq!(family_model_stepping(own.query(1, 0)[0]), (6, 85, 1));
        assert_eq!(&own.query(0x8000_0002, 0)[0].to_le_bytes(), b"My p");
        for (family, model, stepping) in [(6, 143, 8), (15, 107, 1), (25, 17, 1), (5, 2, 0)] {
            assert_eq!(family_model_stepping(signature(family, model, stepping)), (family, model, stepping));
        }
    }

    #[test]
    fn missing_features_are_named() {
        let supported = supported();
        let r = resolve(&request("Skylake-Server"), &supported).expect("without them");
        let missing: Vec<_> = r.missing.iter().map(|f| f.name).collect();
        assert!(missing.contains(&"avx512f") && missing.contains(&"rtm") && !missing.contains(&"vme"));
        assert!(!feature(&r.cpuid, "avx512f"));
        let error = |text: &str| resolve(&request(text), &supported).expect_err(text).to_string();
        assert!(error("Skylake-Server,enforce").contains("avx512f (CPUID.7H.0:EBX bit 16)"));
        assert!(error("x86-64-v2,+avx512f").contains("avx512f") && error("host,+rtm").contains("rtm"));
        assert!(resolve(&request("x86-64-v2,+avx512f,enforce=off"), &supported).is_ok());
        assert!(error("host,-avx,+avx2").contains("avx2 needs avx"));
        assert!(error("host,pmu=on").contains("performance"));
        assert!(error("host,phys-bits=60").contains("32 to 40"));
        assert!(error("host,vendor=me").contains("12 characters"));
        assert!(resolve(&request("EPYC"), &supported).is_ok_and(|r| {
            let names: Vec<_> = r.missing.iter().map(|f| f.name).collect();
            !names.contains(&"svm") && !names.contains(&"avx2")
        }));
    }

    #[test]
    fn every_model_gives_a_consistent_table() {
        let supported = supported();
        let could = names(&supported);
        for model in MODELS {
            let r = resolve(&request(model.name), &supported).expect(model.name);
            let t = &r.cpuid;
            assert!(names(t).is_subset(&could), "{}", model.name);
            let (level, xlevel) = (t.query(0, 0)[0], t.query(0x8000_0000, 0)[0]);
            for e in &t.entries {
                let limit = match e.leaf >> 28 {
                    0 => level,
                    4 => t.query(0x4000_0000, 0)[0],
                    8 => xlevel,
                    _ => 0,
                };
                assert!(e.leaf <= limit, "{}: {:#x}", model.name, e.leaf);
            }
            let mut pairs: Vec<_> = t.entries.iter().map(|e| (e.leaf, e.subleaf)).collect();
            pairs.sort_unstable();
            pairs.dedup();
            assert_eq!(pairs.len(), t.entries.len(), "{}", model.name);
            assert_eq!(feature(t, "xsave"), t.query(0xd, 0)[0] & 3 == 3, "{}", model.name);
            assert_eq!(feature(t, "avx"), t.query(0xd, 0)[0] & 4 != 0, "{}", model.name);
        }
    }

    #[test]
    fn hypervisor_and_cache_can_be_hidden() {
        let t = table("host,kvm=off,-hypervisor,l3-cache=off");
        assert_eq!(t.query(0x4000_0000, 0), [0; 4]);
        assert!(!feature(&t, "hypervisor"));
        assert_eq!((t.query(0x8000_001d, 3), t.query(0x8000_0006, 0)[3]), ([0; 4], 0));
        let t = table("host,-kvmclock,level=7,xlevel=0x80000008");
        assert!(!feature(&t, "kvmclock") && feature(&t, "kvmclock-stable-bit"));
        assert_eq!((t.query(0, 0)[0], t.query(0xd, 0), t.query(0x8000_0021, 0)), (7, [0; 4], [0; 4]));
    }
}
