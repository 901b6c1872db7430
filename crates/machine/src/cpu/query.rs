//! What monitors and libvirt ask about processor models.

use super::apply::{family_model_stepping, has, names, resolve, vendor};
use super::features::{FEATURES, Feature};
use super::models::{self, MODELS, Model};
use super::request::{Base, Request};
use super::{CpuError, CpuSpec};
use accel::Cpuid;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// A model as a monitor lists it.
#[derive(Clone, Debug)]
pub struct Definition {
    /// Its name.
    pub name: &'static str,
    /// For a name without version: the version it stands for.
    pub alias_of: Option<&'static str>,
    /// Whether it means the same on every host.
    pub migration_safe: bool,
    /// Whether it means the same in every version of this program: only `base` does.
    pub is_static: bool,
    /// Features that the accelerator lacks; without them the model runs.
    pub unavailable: Vec<&'static str>,
}

fn unavailable(name: &str, supported: &Cpuid) -> Vec<&'static str> {
    let request = Request {
        name: name.to_owned(),
        base: models::find(name).map_or(Base::Accelerator, Base::Model),
        features: Vec::new(),
        spec: CpuSpec { enforce: Some(false), ..CpuSpec::default() },
    };
    // Without enforcement a model resolves on every accelerator.
    let missing = resolve(&request, supported).map(|r| r.missing).unwrap_or_default();
    missing.iter().map(|f| f.name).collect()
}

/// All models, beside an accelerator's CPUID.
pub fn definitions(supported: &Cpuid) -> Vec<Definition> {
    let fixed = |name, is_static| Definition {
        name,
        alias_of: None,
        migration_safe: is_static,
        is_static,
        unavailable: Vec::new(),
    };
    let mut all = vec![fixed("host", false), fixed("max", false), fixed("base", true)];
    for model in MODELS {
        let unavailable = unavailable(model.name, supported);
        let entry = |name, alias_of| Definition {
            name,
            alias_of,
            migration_safe: true,
            is_static: false,
            unavailable: unavailable.clone(),
        };
        all.extend(model.aliases.iter().map(|alias| entry(alias, Some(model.name))));
        all.push(entry(model.name, None));
    }
    all.sort_by_key(|d| d.name);
    all
}

/// All features by name, and whether a table has them.
pub fn feature_list(cpuid: &Cpuid) -> impl Iterator<Item = (&'static str, bool)> + '_ {
    FEATURES.iter().map(|feature| (feature.name, has(cpuid, feature)))
}

/// Text for `--cpu help`.
pub fn help(supported: &Cpuid) -> String {
    use std::fmt::Write as _;
    let mut text =
        String::from("CPU models:\n  host, max        everything the accelerator has (the default)\n");
    text += "  base             no features at all\n";
    for model in MODELS {
        let brand = if model.vendor.is_empty() { "level of the x86-64 psABI" } else { model.brand };
        let aliases = match model.aliases {
            [] => String::new(),
            some => format!(" ({})", some.join(", ")),
        };
        let lacks = unavailable(model.name, supported);
        let lacks = if lacks.is_empty() { String::new() } else { format!("; without {}", lacks.join(" ")) };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {:<24} {brand}{aliases}{lacks}", model.name);
    }
    text += "\nFeatures, each as +NAME, -NAME, NAME=on or NAME=off (* this accelerator has it):\n";
    let mut line = String::new();
    for feature in FEATURES {
        let mark = if has(supported, feature) { "*" } else { "" };
        if line.len() + feature.name.len() > 96 {
            let _ = writeln!(text, " {line}");
            line.clear();
        }
        let _ = write!(line, " {}{mark}", feature.name);
    }
    let _ = writeln!(text, " {line}\n");
    text + &base::props::Properties::of::<CpuSpec>().help("Properties of every model; --cpu")
}

/// A model written out.
#[derive(Clone, Debug, PartialEq)]
pub struct Expansion {
    /// `base` for a static expansion, otherwise the model's name.
    pub name: String,
    /// Properties and features.
    pub props: Map<String, Value>,
}

/// Writes a processor out: with `full`, every feature as on or off under the same name; otherwise as `base` with what
/// differs from it, which means the same everywhere.
///
/// # Errors
/// As for [`resolve`].
pub fn expand(request: &Request, supported: &Cpuid, full: bool) -> Result<Expansion, CpuError> {
    let t = resolve(request, supported)?.cpuid;
    let mut props = Map::new();
    let (family, model, stepping) = family_model_stepping(t.query(1, 0)[0]);
    let brand: Vec<u8> = (0..3)
        .flat_map(|i| t.query(0x8000_0002 + i, 0).map(u32::to_le_bytes).concat())
        .take_while(|byte| *byte != 0)
        .collect();
    for (key, value) in [
        ("vendor", json!(vendor(&t))),
        ("family", json!(family)),
        ("model", json!(model)),
        ("stepping", json!(stepping)),
        ("model-id", json!(String::from_utf8_lossy(&brand))),
        ("level", json!(t.query(0, 0)[0])),
        ("xlevel", json!(t.query(0x8000_0000, 0)[0])),
    ] {
        props.insert(key.into(), value);
    }
    for feature in FEATURES {
        let on = has(&t, feature);
        if full || on {
            props.insert(feature.name.into(), Value::Bool(on));
        }
    }
    Ok(Expansion { name: if full { request.name.clone() } else { "base".into() }, props })
}

/// How two processors compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// A guest cannot tell them apart by features and vendor.
    Identical,
    /// The first has all that the second has, and more.
    Superset,
    /// The second has all that the first has, and more.
    Subset,
    /// Each has something the other has not, or the vendors differ.
    Incompatible,
}

/// Compares what two requests give on an accelerator.
///
/// # Errors
/// As for [`resolve`].
pub fn compare(a: &Request, b: &Request, supported: &Cpuid) -> Result<Comparison, CpuError> {
    let (a, b) = (resolve(a, supported)?.cpuid, resolve(b, supported)?.cpuid);
    let (of_a, of_b) = (names(&a), names(&b));
    if vendor(&a) != vendor(&b) {
        return Ok(Comparison::Incompatible);
    }
    Ok(match (of_a.is_superset(&of_b), of_b.is_superset(&of_a)) {
        (true, true) => Comparison::Identical,
        (true, false) => Comparison::Superset,
        (false, true) => Comparison::Subset,
        (false, false) => Comparison::Incompatible,
    })
}

/// The most that both of two processors have: a model, and features to add to it.
///
/// # Errors
/// As for [`resolve`]; or different vendors, which no guest can move between.
pub fn baseline(a: &Request, b: &Request, supported: &Cpuid) -> Result<Expansion, CpuError> {
    let (of_a, of_b) = (resolve(a, supported)?.cpuid, resolve(b, supported)?.cpuid);
    if vendor(&of_a) != vendor(&of_b) {
        let text = format!("'{}' is another vendor's; there is nothing in common to start from", b.name);
        return Err(CpuError::Unsupported { model: a.name.clone(), text });
    }
    let common: BTreeSet<&'static str> = names(&of_a).intersection(&names(&of_b)).copied().collect();
    let vendor = vendor(&of_a);
    let inside = |model: &&Model| {
        (model.vendor.is_empty() || model.vendor == vendor)
            && model.features().iter().all(|name| common.contains(name))
    };
    let best = MODELS.iter().filter(inside).max_by_key(|model| model.features().len());
    let mut props = Map::new();
    let own = best.map(|model| model.features()).unwrap_or_default();
    let implied = |f: &&Feature| common.contains(f.name) && !own.contains(&f.name) && f.word.leaf >> 28 != 4;
    for feature in FEATURES.iter().filter(implied) {
        props.insert(feature.name.into(), Value::Bool(true));
    }
    Ok(Expansion { name: best.map_or("base", |model| model.name).into(), props })
}

#[cfg(test)]
mod tests {
    use super::super::request::parse;
    use super::*;

    fn request(text: &str) -> Request {
        Request::new(&parse(text).expect(text)).expect(text)
    }

    #[test]
    fn definitions_name_what_is_lacking() {
        let all = definitions(&softcpu::cpuid::supported());
        let one = |name: &str| all.iter().find(|d| d.name == name).expect(name).clone();
        assert_eq!(one("Skylake-Server").alias_of, Some("Skylake-Server-v1"));
        assert!(one("Skylake-Server-v1").unavailable.contains(&"avx512f"));
        assert!(one("x86-64-v2").unavailable.is_empty() && one("host").unavailable.is_empty());
        assert!(one("base").is_static && one("EPYC").migration_safe && !one("host").migration_safe);
    }

    #[test]
    fn a_static_expansion_means_the_same() {
        let supported = softcpu::cpuid::supported();
        for name in ["Westmere", "x86-64-v3", "host"] {
            let short = expand(&request(name), &supported, false).expect(name);
            assert_eq!(short.name, "base");
            let bag = base::props::Bag { driver: short.name, id: None, props: short.props };
            let again = Request::new(&bag).expect("its own output");
            assert_eq!(compare(&request(name), &again, &supported), Ok(Comparison::Identical), "{name}");
        }
        let full = expand(&request("Westmere"), &supported, true).expect("Westmere");
        assert_eq!((full.name.as_str(), &full.props["avx"]), ("Westmere", &Value::Bool(false)));
        assert_eq!(full.props.len(), FEATURES.len() + 7);
    }

    #[test]
    fn comparison_and_baseline() {
        let supported = softcpu::cpuid::supported();
        let compare = |a: &str, b: &str| compare(&request(a), &request(b), &supported).expect("both");
        assert_eq!(compare("x86-64-v3", "x86-64-v2"), Comparison::Superset);
        assert_eq!(compare("x86-64-v2", "x86-64-v2,-popcnt"), Comparison::Superset);
        assert_eq!(compare("Nehalem", "Westmere"), Comparison::Subset);
        assert_eq!(compare("Nehalem", "EPYC"), Comparison::Incompatible);
        let both = baseline(&request("x86-64-v3"), &request("x86-64-v2,+aes"), &supported).expect("common");
        assert_eq!(both.name, "x86-64-v2");
        assert!(!both.props.contains_key("aes"), "{both:?}");
        assert!(baseline(&request("Nehalem"), &request("EPYC"), &supported).is_err());
    }

    #[test]
    fn help_lists_models_and_features() {
        let text = help(&softcpu::cpuid::supported());
        assert!(
            text.contains("EPYC-Milan-v1") && text.contains(" sse4.2*") && text.contains("model-id=<str>")
        );
    }
}
