//! Property bags: `driver,id=x,key=value,...`, as QEMU's `-device` takes them, and their typed form.
//!
//! A bag holds text (from a command line) or JSON values (from QMP, or the JSON form of an option). [`Bag::spec`]
//! turns it into the `Spec` of the thing it configures: the schema that `schemars` derives from that type says which
//! properties there are and of what type, so one declaration gives parsing, checking, help and documentation.

use crate::nearest;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::fmt::Write as _;

/// A property bag that cannot be used, and what to do instead.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct PropError(pub String);

/// `driver` + `id` + properties.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bag {
    /// What it describes: a device model, a backend kind, a machine type.
    pub driver: String,
    /// Name by which others refer to it.
    pub id: Option<String>,
    /// Properties in alphabetical order.
    pub props: Map<String, Value>,
}

impl Bag {
    /// A bag without properties.
    pub fn new(driver: impl Into<String>) -> Self {
        Self { driver: driver.into(), id: None, props: Map::new() }
    }

    /// Adds a property.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.props.insert(key.into(), value.into());
        self
    }

    /// Parses `driver,key=value,...` (a doubled comma stands for a comma; `flag` alone for `flag=on`), or QEMU's
    /// JSON form `{"driver": ...}`. `implied` is the key that a first word without `=` gives, `driver` normally.
    ///
    /// # Errors
    /// Malformed text, a key given twice, or no driver.
    pub fn parse(text: &str, implied: &str) -> Result<Self, PropError> {
        let mut map = if text.trim_start().starts_with('{') {
            match serde_json::from_str(text) {
                Ok(Value::Object(map)) => map,
                Ok(_) => return Err(PropError(format!("'{text}' is not a JSON object"))),
                Err(e) => return Err(PropError(format!("invalid JSON in '{text}': {e}"))),
            }
        } else {
            parse_keyval(text, implied)?
        };
        let mut text_of = |key: &str| match map.remove(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(PropError(format!("'{key}' must be a string, not {other}"))),
        };
        let driver = text_of(implied)?.filter(|d| !d.is_empty());
        let id = text_of("id")?;
        if let Some(id) = &id {
            check_id(id)?;
        }
        let driver = driver.ok_or_else(|| PropError(format!("'{text}': missing {implied}")))?;
        Ok(Self { driver, id, props: map })
    }

    /// Whether the user asked for help (`driver,help` or `driver,?`).
    pub fn wants_help(&self) -> bool {
        ["help", "?"].iter().any(|k| self.props.get(*k).is_some_and(|v| v == "on"))
    }

    /// The typed form. `T` refuses nothing by itself: unknown properties are found here, by its schema.
    ///
    /// # Errors
    /// An unknown property (with the nearest valid name), or a value of the wrong type or out of range.
    pub fn spec<T: DeserializeOwned + JsonSchema>(&self) -> Result<T, PropError> {
        let schema = Properties::of::<T>();
        let mut typed = Map::new();
        for (key, value) in &self.props {
            let property = schema.find(key).ok_or_else(|| {
                let hint = match nearest(key, schema.names()) {
                    Some(near) => format!("did you mean '{near}'?"),
                    None => format!("'{},help' lists what there is", self.driver),
                };
                PropError(format!("{}: unknown property '{key}'; {hint}", self.driver))
            })?;
            let value = property
                .convert(value)
                .map_err(|e| PropError(format!("{}: property '{key}': {e}", self.driver)))?;
            typed.insert(property.name.clone(), value);
        }
        serde_json::from_value(Value::Object(typed)).map_err(|e| PropError(format!("{}: {e}", self.driver)))
    }
}

/// Identifiers as QEMU allows them: a letter, then letters, digits, `-`, `.`, `_`.
///
/// # Errors
/// Says what an identifier may be.
pub fn check_id(id: &str) -> Result<(), PropError> {
    let mut chars = id.chars();
    let good = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
    if good {
        return Ok(());
    }
    Err(PropError(format!(
        "invalid id '{id}': identifiers start with a letter and hold only letters, digits, '-', '.' and '_'"
    )))
}

/// Splits `a,b=c,,d` at single commas.
fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != ',' {
            parts.last_mut().expect("never empty").push(c); // starts with one element and only grows
        } else if chars.next_if_eq(&',').is_some() {
            parts.last_mut().expect("never empty").push(','); // as above
        } else {
            parts.push(String::new());
        }
    }
    parts
}

/// Parses `[implied,]key=value,...` into a map of strings.
///
/// # Errors
/// An empty key, or one given twice.
pub fn parse_keyval(text: &str, implied: &str) -> Result<Map<String, Value>, PropError> {
    parse_keyval_repeating(text, implied, &[])
}

/// [`parse_keyval`] where some keys may be given several times; their values become lists.
///
/// # Errors
/// An empty key, or another one given twice.
pub fn parse_keyval_repeating(
    text: &str,
    implied: &str,
    repeatable: &[&str],
) -> Result<Map<String, Value>, PropError> {
    let mut map = Map::new();
    for (i, part) in split_commas(text).into_iter().enumerate() {
        let (key, value) = match part.split_once('=') {
            Some((k, v)) => (k.to_owned(), v.to_owned()),
            None if i == 0 && !implied.is_empty() => (implied.to_owned(), part),
            None => (part, "on".to_owned()),
        };
        if key.is_empty() {
            return Err(PropError(format!("'{text}': expected key=value between commas")));
        }
        if repeatable.contains(&key.as_str()) {
            let list = map.entry(key).or_insert_with(|| Value::Array(Vec::new()));
            if let Value::Array(list) = list {
                list.push(Value::String(value));
            }
            continue;
        }
        if map.insert(key.clone(), Value::String(value)).is_some() {
            return Err(PropError(format!("'{text}': '{key}' is given twice")));
        }
    }
    Ok(map)
}

/// Format name for sizes in a schema: `#[schemars(extend("format" = "size"))]` on an integer field makes it accept
/// `512M` (bytes without a suffix).
pub const SIZE_FORMAT: &str = "size";

/// A property of a `Spec`.
#[derive(Clone, Debug)]
pub struct Property {
    /// Name.
    pub name: String,
    /// Doc comment.
    pub about: String,
    /// Type as help shows it: `bool`, `int`, `size`, `str`, or the enumeration's values.
    pub kind: String,
    /// Default, if the type has one.
    pub default: Option<Value>,
    types: Vec<String>,
    choices: Vec<String>,
    size: bool,
}

impl Property {
    fn convert(&self, value: &Value) -> Result<Value, String> {
        let Value::String(text) = value else { return Ok(value.clone()) };
        let is = |t: &str| self.types.iter().any(|x| x == t);
        if is("boolean") {
            match text.as_str() {
                "on" | "yes" | "true" | "y" => return Ok(Value::Bool(true)),
                "off" | "no" | "false" | "n" => return Ok(Value::Bool(false)),
                _ if is("string") => {}
                _ => return Err(format!("'{text}' is not a boolean: use on or off")),
            }
        }
        if is("integer") {
            let parsed = if self.size { parse_size_bytes(text) } else { parse_int(text) };
            match parsed {
                Some(n) => return Ok(Value::from(n)),
                None if is("string") => {}
                None if self.size => return Err(format!("'{text}' is not a size such as 512M or 4G")),
                None => {
                    if let Ok(n) = text.parse::<i64>() {
                        return Ok(Value::from(n));
                    }
                    return Err(format!("'{text}' is not a number"));
                }
            }
        }
        if !self.choices.is_empty() && !self.choices.contains(text) {
            let near = nearest(text, self.choices.iter().map(String::as_str))
                .map(|n| format!("; did you mean '{n}'?"))
                .unwrap_or_default();
            return Err(format!("'{text}' is not one of {}{near}", self.choices.join(", ")));
        }
        if is("array") && !is("string") {
            return Ok(Value::Array(text.split(':').map(|s| Value::String(s.into())).collect()));
        }
        Ok(value.clone())
    }
}

fn parse_int(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn parse_size_bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.chars().last()?.to_ascii_uppercase() {
        'B' => (&text[..text.len() - 1], 0),
        'K' => (&text[..text.len() - 1], 10),
        'M' => (&text[..text.len() - 1], 20),
        'G' => (&text[..text.len() - 1], 30),
        'T' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    parse_int(digits)?.checked_mul(1 << shift)
}

/// The properties of a `Spec`, from its schema.
#[derive(Clone, Debug)]
pub struct Properties(pub Vec<Property>);

impl Properties {
    /// Properties of a type that derives `JsonSchema` with named fields.
    pub fn of<T: JsonSchema>() -> Self {
        let schema = schemars::SchemaGenerator::default().into_root_schema_for::<T>();
        let root = schema.as_value();
        let mut list = Vec::new();
        if let Some(Value::Object(properties)) = root.get("properties") {
            for (name, p) in properties {
                list.push(property(name, p, root));
            }
        }
        Self(list)
    }

    /// Names, for suggestions.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|p| p.name.as_str())
    }

    fn find(&self, name: &str) -> Option<&Property> {
        // QEMU takes '-' and '_' alike in many names; the schema's spelling is the one shown.
        let same = |a: &str, b: &str| a.len() == b.len() && a.replace('_', "-") == b.replace('_', "-");
        self.0.iter().find(|p| same(&p.name, name))
    }

    /// Help text in QEMU's `-device X,help` form.
    pub fn help(&self, driver: &str) -> String {
        let mut out = format!("{driver} options:\n");
        for p in &self.0 {
            let head = format!("{}=<{}>", p.name, p.kind);
            let default = p.default.as_ref().filter(|d| !d.is_null());
            let default = default.map(|d| format!(" (default: {})", shown(d))).unwrap_or_default();
            let _ = writeln!(out, "  {head:<28} - {}{default}", p.about); // writing to a String cannot fail
        }
        out
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Bool(true) => "on".into(),
        Value::Bool(false) => "off".into(),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

fn property(name: &str, p: &Value, root: &Value) -> Property {
    let mut types = Vec::new();
    let mut choices = Vec::new();
    let mut size = false;
    collect(p, root, &mut types, &mut choices, &mut size, 0);
    let kind = if !choices.is_empty() {
        choices.join("|")
    } else if size {
        "size".into()
    } else {
        let short = |t: &str| match t {
            "boolean" => "bool",
            "integer" => "int",
            "string" => "str",
            "number" => "num",
            "array" => "list",
            _ => "json",
        };
        types.iter().map(|t| short(t)).collect::<Vec<_>>().join("|")
    };
    let about = p.get("description").and_then(Value::as_str).unwrap_or_default();
    Property {
        name: name.into(),
        about: about.split_whitespace().collect::<Vec<_>>().join(" "),
        kind,
        default: p.get("default").cloned(),
        types,
        choices,
        size,
    }
}

/// Gathers types and enumeration values through references and alternatives (`Option<T>`, documented enums).
fn collect(
    p: &Value,
    root: &Value,
    types: &mut Vec<String>,
    choices: &mut Vec<String>,
    size: &mut bool,
    depth: u32,
) {
    if depth > 8 {
        return;
    }
    let mut add = |t: &str| {
        if t != "null" && !types.iter().any(|x| x == t) {
            types.push(t.into());
        }
    };
    match p.get("type") {
        Some(Value::String(t)) => add(t),
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).for_each(&mut add),
        _ => {}
    }
    *size |= p.get("format").and_then(Value::as_str) == Some(SIZE_FORMAT);
    if let Some(Value::Array(values)) = p.get("enum") {
        choices.extend(values.iter().filter_map(Value::as_str).map(String::from));
    }
    if let Some(c) = p.get("const").and_then(Value::as_str) {
        choices.push(c.into());
        if !types.iter().any(|t| t == "string") {
            types.push("string".into());
        }
    }
    if let Some(target) =
        p.get("$ref").and_then(Value::as_str).and_then(|r| root.pointer(r.strip_prefix('#')?))
    {
        collect(target, root, types, choices, size, depth + 1);
    }
    for key in ["anyOf", "oneOf", "allOf"] {
        if let Some(Value::Array(list)) = p.get(key) {
            list.iter().for_each(|q| collect(q, root, types, choices, size, depth + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Default, Deserialize, JsonSchema, PartialEq)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
    struct Spec {
        /// Number of request queues.
        num_queues: u16,
        /// Refuse writes.
        read_only: bool,
        /// Size of the buffer.
        #[schemars(extend("format" = "size"))]
        buffer: Option<u64>,
        /// What to do on errors.
        werror: Policy,
        /// Serial number.
        serial: Option<String>,
    }

    #[derive(Debug, Default, Deserialize, JsonSchema, PartialEq)]
    #[serde(rename_all = "lowercase")]
    enum Policy {
        /// Tell the guest.
        #[default]
        Report,
        Stop,
    }

    #[test]
    fn text_becomes_typed() {
        let bag =
            Bag::parse("blk,id=d0,num_queues=0x4,read-only,buffer=2M,werror=stop,serial=a,,b", "driver")
                .unwrap();
        assert_eq!((bag.driver.as_str(), bag.id.as_deref()), ("blk", Some("d0")));
        let spec: Spec = bag.spec().unwrap();
        let want = Spec {
            num_queues: 4,
            read_only: true,
            buffer: Some(2 << 20),
            werror: Policy::Stop,
            serial: Some("a,b".into()),
        };
        assert_eq!(spec, want);
        let json = r#"{"driver":"blk","id":"d0","num-queues":4,"read-only":true,"buffer":2097152,"werror":"stop","serial":"a,b"}"#;
        assert_eq!(Bag::parse(json, "driver").unwrap().spec::<Spec>().unwrap(), want);
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| Bag::parse(text, "driver").and_then(|b| b.spec::<Spec>()).unwrap_err().0;
        assert_eq!(error("blk,num-queue=2"), "blk: unknown property 'num-queue'; did you mean 'num-queues'?");
        assert!(error("blk,xyzzy=2").contains("'blk,help' lists"));
        assert!(error("blk,read-only=maybe").contains("use on or off"));
        assert!(error("blk,werror=stopp").contains("did you mean 'stop'?"));
        assert!(
            error("blk,num-queues=70000").contains("num-queues")
                || error("blk,num-queues=70000").contains("70000")
        );
        assert!(error("blk,a=1,a=2").contains("twice"));
        assert!(error("blk,id=9x").contains("invalid id"));
        assert!(error("").contains("missing driver"));
    }

    #[test]
    fn help_comes_from_doc_comments() {
        let help = Properties::of::<Spec>().help("blk");
        assert!(help.contains("num-queues=<int>") && help.contains("Number of request queues."), "{help}");
        assert!(help.contains("werror=<report|stop>") || help.contains("werror=<stop|report>"), "{help}");
        assert!(Bag::parse("blk,help", "driver").unwrap().wants_help());
    }
}
