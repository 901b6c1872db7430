//! Schemas: checks of arguments, with QEMU's messages, and introspection (`query-qmp-schema`).

use super::{Command, Error, Result, commands, events};
use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;

/// JSON schemas of everything.
struct All {
    arguments: HashMap<&'static str, Value>,
    results: HashMap<&'static str, Value>,
    events: Vec<(&'static str, Value)>,
    definitions: Map<String, Value>,
}

fn all() -> &'static All {
    static ALL: OnceLock<All> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut settings = SchemaSettings::draft2020_12();
        settings.inline_subschemas = false;
        let mut g = SchemaGenerator::new(settings);
        let arguments = commands().map(|c| (c.name, (c.arguments)(&mut g).to_value())).collect();
        let results = commands().map(|c| (c.name, (c.result)(&mut g).to_value())).collect();
        let events = events::EVENTS.iter().map(|e| (e.name, (e.data)(&mut g).to_value())).collect();
        All { arguments, results, events, definitions: g.take_definitions(true) }
    })
}

fn resolve(schema: &'static Value, definitions: &'static Map<String, Value>) -> &'static Value {
    let target = schema.get("$ref").and_then(Value::as_str).and_then(|r| r.rsplit('/').next());
    target.and_then(|name| definitions.get(name)).unwrap_or(schema)
}

/// Checks the members of `arguments`: none unknown, none missing, the right types.
pub(super) fn check(command: &Command, arguments: &Map<String, Value>) -> Result<()> {
    let all = all();
    let Some(schema) = all.arguments.get(command.name) else { return Ok(()) };
    check_object(resolve(schema, &all.definitions), arguments, "", 0)
}

fn check_object(schema: &'static Value, object: &Map<String, Value>, path: &str, depth: usize) -> Result<()> {
    // Unions and free-form objects are left to the types.
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else {
        if object.is_empty() || schema.get("additionalProperties") != Some(&Value::Bool(false)) {
            return Ok(());
        }
        let name = object.keys().next().map(String::as_str).unwrap_or_default();
        return Err(Error::generic(format!("Parameter '{path}{name}' is unexpected")));
    };
    let closed = schema.get("additionalProperties") == Some(&Value::Bool(false));
    for (name, value) in object {
        match properties.get(name) {
            Some(property) => check_value(property, value, &format!("{path}{name}"), depth)?,
            None if closed => return Err(Error::generic(format!("Parameter '{path}{name}' is unexpected"))),
            None => {}
        }
    }
    let required = schema.get("required").and_then(Value::as_array);
    for name in required.into_iter().flatten().filter_map(Value::as_str) {
        if !object.contains_key(name) {
            return Err(Error::generic(format!("Parameter '{path}{name}' is missing")));
        }
    }
    Ok(())
}

fn check_value(schema: &'static Value, value: &Value, path: &str, depth: usize) -> Result<()> {
    if depth > 16 {
        return Ok(());
    }
    let schema = resolve(schema, &all().definitions);
    if let Some(choices) = constants(schema) {
        return match value.as_str() {
            Some(_) if choices.contains(&value) => Ok(()),
            Some(text) => Err(Error::generic(format!("Parameter '{path}' does not accept value '{text}'"))),
            None => Err(Error::generic(format!("Invalid parameter type for '{path}', expected: string"))),
        };
    }
    let kinds: Vec<&str> = match schema.get("type") {
        Some(Value::String(t)) => vec![t],
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
        _ => return Ok(()),
    };
    let fits = |kind: &str| match kind {
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        "null" => value.is_null(),
        _ => true,
    };
    if !kinds.iter().any(|k| fits(k)) {
        let expected = kinds.iter().find(|k| **k != "null").copied().unwrap_or("null");
        return Err(Error::generic(format!("Invalid parameter type for '{path}', expected: {expected}")));
    }
    match value {
        Value::String(text) => {
            if let Some(choices) = schema.get("enum").and_then(Value::as_array)
                && !choices.contains(value)
            {
                return Err(Error::generic(format!("Parameter '{path}' does not accept value '{text}'")));
            }
            Ok(())
        }
        Value::Object(object) => check_object(schema, object, &format!("{path}."), depth + 1),
        Value::Array(items) => match schema.get("items") {
            Some(item) => items
                .iter()
                .enumerate()
                .try_for_each(|(i, v)| check_value(item, v, &format!("{path}[{i}]"), depth + 1)),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

/// The values of an enumeration whose values have descriptions of their own, or an option of one.
fn constants(schema: &'static Value) -> Option<Vec<&'static Value>> {
    let list = ["anyOf", "oneOf"].iter().find_map(|k| schema.get(*k)?.as_array())?;
    let real: Vec<&'static Value> =
        list.iter().filter(|s| s.get("type").and_then(Value::as_str) != Some("null")).collect();
    if let ([one], true) = (real.as_slice(), real.len() < list.len()) {
        return constants(resolve(one, &all().definitions));
    }
    real.iter().map(|s| s.get("const")).collect()
}

/// The result of `query-qmp-schema`: QAPI's form of the schemas.
pub fn introspection() -> &'static Value {
    static DONE: OnceLock<Value> = OnceLock::new();
    DONE.get_or_init(|| {
        let all = all();
        let mut out =
            Translator { definitions: &all.definitions, entries: Vec::new(), names: BTreeMap::new() };
        for command in commands() {
            let arguments = all.arguments.get(command.name).map(|s| out.object(s));
            let result = all.results.get(command.name).map(|s| out.reference(s, 0));
            let mut entry = json!({
                "name": command.name,
                "meta-type": "command",
                "arg-type": arguments,
                "ret-type": result,
            });
            if command.oob {
                entry["allow-oob"] = true.into();
            }
            if !command.features.is_empty() {
                entry["features"] = json!(command.features);
            }
            out.entries.push(entry);
        }
        for (name, data) in &all.events {
            let data = out.object(data);
            out.entries.push(json!({ "name": name, "meta-type": "event", "arg-type": data }));
        }
        for (name, kind) in [
            ("str", "string"),
            ("int", "int"),
            ("number", "number"),
            ("bool", "boolean"),
            ("null", "null"),
            ("any", "value"),
        ] {
            out.entries.push(json!({ "name": name, "meta-type": "builtin", "json-type": kind }));
        }
        Value::Array(out.entries)
    })
}

/// From JSON schema to QAPI's introspection. Types have numbers for names, as in QEMU: clients must not rely on them.
struct Translator {
    definitions: &'static Map<String, Value>,
    entries: Vec<Value>,
    /// Schema (or the name of a definition) to type name.
    names: BTreeMap<String, String>,
}

impl Translator {
    fn fresh(&mut self, key: String) -> String {
        let name = self.names.len().to_string();
        self.names.insert(key, name.clone());
        name
    }

    /// The name of an object type: a command's arguments and an event's data must be one, if only an empty one.
    fn object(&mut self, schema: &'static Value) -> String {
        self.reference(schema, 0)
    }

    /// The name of the type that a schema describes; describes it, if that was not done yet.
    fn reference(&mut self, schema: &'static Value, depth: usize) -> String {
        if depth > 32 {
            return "any".into();
        }
        if let Some(target) = schema.get("$ref").and_then(Value::as_str).and_then(|r| r.rsplit('/').next()) {
            let key = format!("#{target}");
            if let Some(name) = self.names.get(&key) {
                return name.clone();
            }
            let Some(definition) = self.definitions.get(target) else { return "any".into() };
            return self.describe(definition, key, depth);
        }
        let key = schema.to_string();
        match self.names.get(&key) {
            Some(name) => name.clone(),
            None => self.describe(schema, key, depth),
        }
    }

    fn describe(&mut self, schema: &'static Value, key: String, depth: usize) -> String {
        if let Some(alternatives) = ["anyOf", "oneOf"].iter().find_map(|k| schema.get(*k)?.as_array()) {
            return self.alternatives(schema, alternatives, key, depth);
        }
        if let Some(values) = schema.get("enum").and_then(Value::as_array) {
            return self.enumeration(values.iter().collect(), key);
        }
        let kind = match schema.get("type") {
            Some(Value::String(t)) => t.as_str(),
            Some(Value::Array(list)) => {
                list.iter().filter_map(Value::as_str).find(|t| *t != "null").unwrap_or("null")
            }
            _ => return "any".into(),
        };
        match kind {
            "string" => match schema.get("const") {
                Some(value) => self.enumeration(vec![value], key),
                None => "str".into(),
            },
            "integer" => "int".into(),
            "number" => "number".into(),
            "boolean" => "bool".into(),
            "null" => "null".into(),
            "array" => {
                let element = schema.get("items").map_or("any".into(), |i| self.reference(i, depth + 1));
                let name = format!("[{element}]");
                if !self.names.values().any(|n| *n == name) {
                    self.names.insert(format!("array {name}"), name.clone());
                    self.entries.push(json!({ "name": name, "meta-type": "array", "element-type": element }));
                }
                name
            }
            _ => self.structure(schema, key, depth),
        }
    }

    fn members(&mut self, schema: &'static Value, skip: Option<&str>, depth: usize) -> Vec<Value> {
        let required: Vec<&str> = schema
            .get("required")
            .and_then(Value::as_array)
            .map(|r| r.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default();
        let properties = schema.get("properties").and_then(Value::as_object);
        let mut members = Vec::new();
        for (name, property) in properties.into_iter().flatten().filter(|(n, _)| Some(n.as_str()) != skip) {
            let mut member = json!({ "name": name, "type": self.reference(property, depth + 1) });
            if !required.contains(&name.as_str()) {
                member["default"] = Value::Null;
            }
            if let Some(features) = property.get("x-features") {
                member["features"] = features.clone();
            }
            members.push(member);
        }
        members
    }

    fn structure(&mut self, schema: &'static Value, key: String, depth: usize) -> String {
        let name = self.fresh(key);
        let members = self.members(schema, None, depth);
        let mut entry = json!({ "name": name, "meta-type": "object", "members": members });
        if let Some(features) = schema.get("x-features") {
            entry["features"] = features.clone();
        }
        self.entries.push(entry);
        name
    }

    fn enumeration(&mut self, values: Vec<&'static Value>, key: String) -> String {
        let name = self.fresh(key);
        let members: Vec<Value> = values.iter().map(|v| json!({ "name": v })).collect();
        self.entries.push(json!({ "name": name, "meta-type": "enum", "values": values, "members": members }));
        name
    }

    /// An option, an enumeration whose values have descriptions, a union told apart by a member, or an alternate.
    fn alternatives(
        &mut self,
        schema: &'static Value,
        list: &'static [Value],
        key: String,
        depth: usize,
    ) -> String {
        let real: Vec<&'static Value> =
            list.iter().filter(|s| s.get("type").and_then(Value::as_str) != Some("null")).collect();
        if let ([one], true) = (real.as_slice(), real.len() < list.len()) {
            return self.reference(one, depth + 1);
        }
        let constants: Option<Vec<&'static Value>> = real
            .iter()
            .map(|s| {
                s.get("const")
                    .into_iter()
                    .chain(s.get("enum").and_then(Value::as_array).into_iter().flatten())
            })
            .map(|values| {
                let values: Vec<_> = values.collect();
                (!values.is_empty()).then_some(values)
            })
            .collect::<Option<Vec<_>>>()
            .map(|lists| lists.into_iter().flatten().collect());
        if let Some(values) = constants {
            return self.enumeration(values, key);
        }
        if let Some(tag) = union_tag(&real) {
            return self.union(schema, &real, tag, key, depth);
        }
        let name = self.fresh(key);
        let members: Vec<Value> =
            real.iter().map(|s| json!({ "type": self.reference(s, depth + 1) })).collect();
        self.entries.push(json!({ "name": name, "meta-type": "alternate", "members": members }));
        name
    }

    fn union(
        &mut self,
        schema: &'static Value,
        list: &[&'static Value],
        tag: &'static str,
        key: String,
        depth: usize,
    ) -> String {
        let name = self.fresh(key.clone());
        let case =
            |s: &'static Value| s.get("properties").and_then(|p| p.get(tag)).and_then(|t| t.get("const"));
        let cases: Vec<&'static Value> = list.iter().filter_map(|s| case(s)).collect();
        let tag_type = self.enumeration(cases, format!("tag of {key}"));
        let mut variants = Vec::new();
        for s in list {
            let Some(value) = case(s) else { continue };
            let variant = self.fresh(format!("variant {value} of {key}"));
            let mut members = self.members(s, Some(tag), depth);
            if let Some(inner) = s.get("$ref").and_then(Value::as_str).and_then(|r| r.rsplit('/').next())
                && let Some(definition) = self.definitions.get(inner)
            {
                members.extend(self.members(definition, Some(tag), depth));
            }
            let mut entry = json!({ "name": variant, "meta-type": "object", "members": members });
            if let Some(features) = s.get("x-features") {
                entry["features"] = features.clone();
            }
            self.entries.push(entry);
            variants.push(json!({ "case": value, "type": variant }));
        }
        let mut members = self.members(schema, None, depth);
        members.push(json!({ "name": tag, "type": tag_type }));
        self.entries.push(json!({
            "name": name, "meta-type": "object", "members": members, "tag": tag, "variants": variants,
        }));
        name
    }
}

/// The member whose constant tells the alternatives apart.
fn union_tag(list: &[&'static Value]) -> Option<&'static str> {
    let properties = list.first()?.get("properties")?.as_object()?;
    let is_tag = |name: &&'static String| {
        list.iter().all(|s| {
            s.get("properties").and_then(|p| p.get(name.as_str())).is_some_and(|p| p.get("const").is_some())
        })
    };
    properties.keys().find(is_tag).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_type_that_is_used_is_described_once() {
        let entries = introspection().as_array().unwrap();
        let mut names = HashSet::new();
        for e in entries {
            assert!(names.insert(e["name"].as_str().unwrap().to_owned()), "{e} twice");
        }
        let used = |v: &Value| match v.as_str() {
            Some(name) => assert!(names.contains(name), "{name} is not described"),
            None => panic!("{v} is no type"),
        };
        for e in entries {
            match e["meta-type"].as_str().unwrap() {
                "command" => {
                    used(&e["arg-type"]);
                    used(&e["ret-type"]);
                }
                "event" => used(&e["arg-type"]),
                "array" => used(&e["element-type"]),
                "object" => {
                    e["members"].as_array().unwrap().iter().for_each(|m| used(&m["type"]));
                    let variants = e.get("variants").and_then(Value::as_array);
                    variants.into_iter().flatten().for_each(|v| used(&v["type"]));
                }
                "alternate" => e["members"].as_array().unwrap().iter().for_each(|m| used(&m["type"])),
                _ => {}
            }
        }
    }

    #[test]
    fn commands_are_unique() {
        let mut seen = HashSet::new();
        assert!(commands().all(|c| seen.insert(c.name)));
    }
}
