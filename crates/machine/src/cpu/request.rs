//! What a user asks for.

use super::features::{self, FEATURES, Feature};
use super::models::{self, MODELS, Model};
use base::nearest;
use base::props::{Bag, PropError, parse_keyval};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

/// Properties of a processor beside its features.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct CpuSpec {
    /// Refuse to start when the accelerator lacks something of the model or of what is asked for; off: go without all of
    /// it. Without this property the model's own features are left out with a warning.
    pub enforce: Option<bool>,
    /// Warn about features that are left out.
    pub check: bool,
    /// CPUID vendor string, 12 characters.
    pub vendor: Option<String>,
    /// Family (0 to 270).
    pub family: Option<u32>,
    /// Model (0 to 255).
    pub model: Option<u32>,
    /// Stepping (0 to 15).
    pub stepping: Option<u32>,
    /// Brand string, at most 48 characters.
    pub model_id: Option<String>,
    /// Highest basic CPUID leaf.
    pub level: Option<u32>,
    /// Highest extended CPUID leaf.
    pub xlevel: Option<u32>,
    /// Physical address bits; the accelerator's own if not given.
    pub phys_bits: Option<u32>,
    /// Physical address bits of the accelerator (always so without phys-bits).
    pub host_phys_bits: bool,
    /// Show the guest that it runs on KVM's interface (CPUID leaf 0x40000000).
    pub kvm: bool,
    /// Show a level 3 cache.
    pub l3_cache: bool,
    /// Leave out what cannot be moved to another host.
    pub migratable: bool,
    /// Performance counters.
    pub pmu: bool,
}

impl Default for CpuSpec {
    fn default() -> Self {
        Self {
            enforce: None,
            check: true,
            vendor: None,
            family: None,
            model: None,
            stepping: None,
            model_id: None,
            level: None,
            xlevel: None,
            phys_bits: None,
            host_phys_bits: true,
            kvm: true,
            l3_cache: true,
            migratable: false,
            pmu: false,
        }
    }
}

/// Where a processor's features come from.
#[derive(Clone, Copy, Debug)]
pub enum Base {
    /// Everything the accelerator has: `host` and `max`.
    Accelerator,
    /// Nothing: `base`.
    Nothing,
    /// A model.
    Model(&'static Model),
}

/// A processor asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its name as given.
    pub name: String,
    /// What it starts from.
    pub base: Base,
    /// Features turned on and off.
    pub features: Vec<(&'static Feature, bool)>,
    /// Everything else.
    pub spec: CpuSpec,
}

/// Parses `NAME[,+feature][,-feature][,property=value]`.
///
/// # Errors
/// Malformed text.
pub fn parse(text: &str) -> Result<Bag, PropError> {
    if text.trim_start().starts_with('{') {
        return Bag::parse(text, "driver");
    }
    let mut props = Map::new();
    for (key, value) in parse_keyval(text, "driver")? {
        let (key, value) = match (key.strip_prefix('+'), key.strip_prefix('-')) {
            (Some(name), _) => (name.to_owned(), Value::from("on")),
            (_, Some(name)) => (name.to_owned(), Value::from("off")),
            _ => (key, value),
        };
        if props.insert(key.clone(), value).is_some() {
            return Err(PropError(format!("'{text}': '{key}' is given twice")));
        }
    }
    match props.remove("driver") {
        Some(Value::String(driver)) => Ok(Bag { driver, id: None, props }),
        _ => Err(PropError(format!("'{text}': the name of a CPU model is missing; 'help' lists them"))),
    }
}

impl Request {
    /// What a bag asks for.
    ///
    /// # Errors
    /// An unknown model, feature or property.
    pub fn new(bag: &Bag) -> Result<Self, PropError> {
        let base = match bag.driver.as_str() {
            "host" | "max" => Base::Accelerator,
            "base" => Base::Nothing,
            name => Base::Model(models::find(name).ok_or_else(|| unknown_model(name))?),
        };
        let mut rest = Bag::new(bag.driver.clone());
        let mut wanted = Vec::new();
        for (key, value) in &bag.props {
            match features::find(key) {
                Some(feature) => wanted.push((feature, on_off(&bag.driver, key, value)?)),
                None => check_known(&bag.driver, key, value, &mut rest)?,
            }
        }
        Ok(Self { name: bag.driver.clone(), base, features: wanted, spec: rest.spec()? })
    }
}

/// A property that is no feature: puts it into the rest, or says what to do instead.
fn check_known(model: &str, key: &str, value: &Value, rest: &mut Bag) -> Result<(), PropError> {
    let off = on_off(model, key, value) == Ok(false);
    let elsewhere = if key.starts_with("vmx-") {
        "control bits of nested VMX come from the accelerator"
    } else if key.starts_with("hv-") || key.starts_with("hv_") {
        "Hyper-V's interface is not offered to guests"
    } else if ARCH_CAPABILITIES.contains(&key) {
        "bits of MSR_IA32_ARCH_CAPABILITIES come from the accelerator"
    } else if key == "tsc-frequency" {
        "the guest's TSC runs at the host's rate"
    } else {
        let names: Vec<&str> = FEATURES.iter().map(|f| f.name).chain(properties()).collect();
        if properties().any(|name| name == key.replace('_', "-")) {
            rest.props.insert(key.into(), value.clone());
            return Ok(());
        }
        let hint = match nearest(key, names.iter().copied()) {
            Some(near) => format!("did you mean '{near}'?"),
            None => "'--cpu help' lists the features".into(),
        };
        return Err(PropError(format!("{model}: unknown CPU feature or property '{key}'; {hint}")));
    };
    if off { Ok(()) } else { Err(PropError(format!("{model}: '{key}' cannot be set: {elsewhere}"))) }
}

/// Names that other monitors have for bits of an MSR that the accelerator fills.
const ARCH_CAPABILITIES: &[&str] = &[
    "rdctl-no",
    "ibrs-all",
    "rsba",
    "skip-l1dfl-vmentry",
    "ssb-no",
    "mds-no",
    "pschange-mc-no",
    "tsx-ctrl",
    "taa-no",
    "sbdr-ssdp-no",
    "fbsdp-no",
    "psdp-no",
    "fb-clear",
    "bhi-no",
    "pbrsb-no",
    "gds-no",
    "rfds-no",
    "rfds-clear",
];

fn properties() -> impl Iterator<Item = &'static str> {
    static NAMES: std::sync::OnceLock<Vec<String>> = std::sync::OnceLock::new();
    let names =
        NAMES.get_or_init(|| base::props::Properties::of::<CpuSpec>().names().map(str::to_owned).collect());
    names.iter().map(String::as_str)
}

fn on_off(model: &str, key: &str, value: &Value) -> Result<bool, PropError> {
    match value {
        Value::Bool(on) => Ok(*on),
        Value::String(s) if matches!(s.as_str(), "on" | "yes" | "true" | "y") => Ok(true),
        Value::String(s) if matches!(s.as_str(), "off" | "no" | "false" | "n") => Ok(false),
        other => Err(PropError(format!("{model}: feature '{key}': {other} is not on or off"))),
    }
}

fn unknown_model(name: &str) -> PropError {
    let names = MODELS.iter().flat_map(|m| m.aliases.iter().chain([&m.name])).copied();
    let hint = match nearest(name, names.chain(["host", "max", "base"])) {
        Some(near) => format!("did you mean '{near}'?"),
        None => "'--cpu help' lists them".into(),
    };
    PropError(format!("unknown CPU model '{name}'; {hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Result<Request, PropError> {
        Request::new(&parse(text)?)
    }

    #[test]
    fn features_are_read_in_every_form() {
        let r = request("EPYC,+avx2,-svm,aes=on,sse4_2=off,enforce,model=3").expect("good");
        let mut wanted: Vec<_> = r.features.iter().map(|(f, on)| (f.name, *on)).collect();
        wanted.sort_unstable();
        assert_eq!(wanted, [("aes", true), ("avx2", true), ("sse4.2", false), ("svm", false)]);
        assert_eq!((r.spec.enforce, r.spec.model), (Some(true), Some(3)));
        assert!(request("host,migratable=on").is_ok_and(|r| r.spec.migratable));
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| request(text).expect_err(text).0;
        assert!(error("Skylake-Sever").contains("'Skylake-Server'"));
        assert!(error("host,+avx22").contains("avx2"));
        assert!(error("host,avx=maybe").contains("on or off"));
        assert!(error("host,+avx,-avx").contains("twice"));
        assert!(error("host,hv-time").contains("Hyper-V"));
        assert!(error("host,level=x").contains("number"));
        assert!(error(",+avx").contains("missing") || error(",+avx").contains("unknown CPU model"));
        assert!(request("host,vmx-ept=off").is_ok());
    }
}
