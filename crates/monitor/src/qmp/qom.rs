//! The object tree as clients of QEMU know it, made up from the machine's own lists.

use super::device::{PropertyInfo, properties};
use super::{Class, Command, Empty, Error, Result, command};
use crate::Context;
use machine::Machine;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub(super) const COMMANDS: &[Command] = &[
    command!("qom-list", list),
    command!("qom-get", get),
    command!("qom-set", set),
    command!("qom-list-types", list_types),
    command!("qom-list-properties", list_properties),
];

/// An object, with how to read its properties.
pub(crate) struct Node {
    pub(crate) kind: String,
    pub(crate) children: Vec<(String, String)>,
    pub(crate) properties: Vec<(String, String, Value)>,
}

impl Node {
    fn new(kind: impl Into<String>) -> Self {
        Self { kind: kind.into(), children: Vec::new(), properties: Vec::new() }
    }

    fn child(&mut self, name: impl Into<String>, kind: impl Into<String>) {
        self.children.push((name.into(), kind.into()));
    }

    fn property(&mut self, name: &str, kind: &str, value: impl Into<Value>) {
        self.properties.push((name.into(), kind.into(), value.into()));
    }
}

fn machine_type(m: &Machine) -> String {
    format!("{}-machine", super::info::versioned(&m.blueprint().machine.driver))
}

fn device_node(bag: &base::props::Bag) -> Node {
    let mut node = Node::new(bag.driver.clone());
    if let Ok(model) = devices::find_model(&bag.driver) {
        for p in model.all_properties().0 {
            let given = bag.props.get(&p.name).cloned();
            let value = given.or(p.default.clone()).unwrap_or(Value::Null);
            node.properties.push((p.name, p.kind, value));
        }
    }
    node.property("realized", "bool", true);
    node.property("hotplugged", "bool", false);
    node.property("hotpluggable", "bool", true);
    if let Some(id) = &bag.id {
        node.property("id", "string", id.as_str());
    }
    node
}

/// The object at a path.
pub(crate) fn node(m: &Machine, path: &str) -> Option<Node> {
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
    let devices = m.devices();
    Some(match parts.as_slice() {
        [] => {
            let mut n = Node::new("container");
            n.child("machine", machine_type(m));
            n.child("objects", "container");
            n.child("chardevs", "container");
            n
        }
        ["machine"] => {
            let mut n = Node::new(machine_type(m));
            for name in ["peripheral", "peripheral-anon", "unattached"] {
                n.child(name, "container");
            }
            n.property("accel", "string", m.accel_name());
            n.property("smp-cpus", "int", m.vcpu_count());
            n.property("memory-size", "int", m.memory().total());
            n
        }
        ["machine", "peripheral"] => {
            let mut n = Node::new("container");
            for bag in &devices {
                if let Some(id) = &bag.id {
                    n.child(id.clone(), bag.driver.clone());
                }
            }
            n
        }
        ["machine", "peripheral-anon"] => {
            let mut n = Node::new("container");
            for (i, bag) in devices.iter().filter(|b| b.id.is_none()).enumerate() {
                n.child(format!("device[{i}]"), bag.driver.clone());
            }
            n
        }
        ["machine", "peripheral", id] | [id] if devices.iter().any(|b| b.id.as_deref() == Some(id)) => {
            let bag = devices.iter().find(|b| b.id.as_deref() == Some(id))?;
            let mut n = device_node(bag);
            if let (true, Some(balloon)) = (bag.driver.starts_with("virtio-balloon"), m.balloon()) {
                let s = balloon.statistics();
                let updated = s.updated.and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
                let stats: serde_json::Map<String, Value> =
                    s.values.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
                let updated = updated.map_or(0, |t| t.as_secs());
                n.property(
                    "guest-stats",
                    "guest statistics",
                    json!({ "last-update": updated, "stats": stats }),
                );
                n.property(POLLING, "int", balloon.polling_interval());
            }
            n
        }
        ["machine", "peripheral", id, "virtio-backend"] => {
            let bag =
                devices.iter().find(|b| b.id.as_deref() == Some(id) && b.driver.starts_with("virtio"))?;
            device_node(bag)
        }
        ["machine", "peripheral-anon", which] => {
            let i = index(which)?;
            device_node(devices.iter().filter(|b| b.id.is_none()).nth(i)?)
        }
        ["machine", "unattached"] => {
            let mut n = Node::new("container");
            for i in 0..m.vcpu_count() {
                n.child(format!("device[{i}]"), format!("{}-x86_64-cpu", m.cpu_model()));
            }
            n
        }
        ["machine", "unattached", which] => {
            let i = u32::try_from(index(which)?).ok().filter(|i| *i < m.vcpu_count())?;
            let mut n = Node::new(format!("{}-x86_64-cpu", m.cpu_model()));
            n.property("realized", "bool", true);
            n.property("hotplugged", "bool", false);
            n.property("hotpluggable", "bool", false);
            n.property("thread-id", "int", i);
            n.property("core-id", "int", i);
            n.property("apic-id", "uint32", m.topology().apic_id(i));
            for (name, on) in m.cpu_features() {
                n.properties.push((name, "bool".into(), on.into()));
            }
            n
        }
        ["objects"] => {
            let mut n = Node::new("container");
            for bag in m.objects() {
                n.child(bag.id.clone().unwrap_or_default(), bag.driver.clone());
            }
            n
        }
        ["objects", id] => {
            let bag = m.objects().iter().find(|b| b.id.as_deref() == Some(id))?;
            let mut n = Node::new(bag.driver.clone());
            for (name, value) in &bag.props {
                n.property(name, kind_of(value), value.clone());
            }
            n
        }
        ["chardevs"] => Node::new("container"),
        _ => return None,
    })
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Bool(_) => "bool",
        Value::Number(_) => "int",
        _ => "string",
    }
}

/// Seconds between two looks at a guest's memory statistics.
const POLLING: &str = "guest-stats-polling-interval";

/// `device[3]` is 3.
fn index(name: &str) -> Option<usize> {
    name.strip_prefix("device[")?.strip_suffix(']')?.parse().ok()
}

fn not_found(path: &str) -> Error {
    Error::of(Class::DeviceNotFound, format!("Device '{path}' not found"))
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Path {
    path: String,
}

fn list(c: &Context, a: Path) -> Result<Vec<PropertyInfo>> {
    let node = c.machine({
        let path = a.path.clone();
        move |m| node(m, &path)
    })?;
    let node = node.ok_or_else(|| not_found(&a.path))?;
    let info =
        |name: String, kind: String| PropertyInfo { name, kind, description: None, default_value: None };
    let mut all = vec![info("type".into(), "string".into())];
    all.extend(node.properties.into_iter().map(|(name, kind, _)| info(name, kind)));
    all.extend(node.children.into_iter().map(|(name, kind)| info(name, format!("child<{kind}>"))));
    Ok(all)
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Get {
    path: String,
    property: String,
}

fn get(c: &Context, a: Get) -> Result<Value> {
    let Get { path, property } = a;
    c.machine(move |m| {
        let node = node(m, &path).ok_or_else(|| not_found(&path))?;
        if property == "type" {
            return Ok(node.kind.into());
        }
        if let Some((_, _, value)) = node.properties.iter().find(|(name, ..)| *name == property) {
            return Ok(value.clone());
        }
        if node.children.iter().any(|(name, _)| *name == property) {
            return Ok(json!(format!("{}/{property}", path.trim_end_matches('/'))));
        }
        Err(Error::generic(format!("Property '{}.{property}' not found", node.kind)))
    })?
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Set {
    path: String,
    property: String,
    value: Value,
}

fn set(c: &Context, a: Set) -> Result<Empty> {
    let Set { path, property, value } = a;
    c.machine(move |m| {
        let node = node(m, &path).ok_or_else(|| not_found(&path))?;
        if let (true, Some(balloon)) =
            (property == POLLING && node.kind.starts_with("virtio-balloon"), m.balloon())
        {
            let seconds = value.as_u64().and_then(|s| u32::try_from(s).ok());
            let seconds = seconds.ok_or_else(|| Error::generic("timer value must be greater than zero"))?;
            balloon.set_polling_interval(seconds);
            return Ok(Empty {});
        }
        if node.properties.iter().any(|(name, ..)| *name == property) {
            return Err(Error::generic(format!(
                "Property '{property}' of {} cannot be changed now",
                node.kind
            )));
        }
        Err(Error::generic(format!("Property '{}.{property}' not found", node.kind)))
    })?
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ListTypes {
    implements: Option<String>,
    #[serde(rename = "abstract")]
    include_abstract: Option<bool>,
}

/// A type.
#[derive(Serialize, JsonSchema)]
struct TypeInfo {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<&'static str>,
}

fn list_types(_: &Context, a: ListTypes) -> Result<Vec<TypeInfo>> {
    let _ = a.include_abstract;
    let wanted = |parent: &str| a.implements.as_deref().is_none_or(|i| i == parent || i == "object");
    let mut all = Vec::new();
    let mut add = |name: String, parent: &'static str| {
        if wanted(parent) {
            all.push(TypeInfo { name, parent: Some(parent) });
        }
    };
    for model in devices::models() {
        for name in model.names() {
            add(name, "device");
        }
    }
    for board in machine::BOARDS {
        add(format!("{}-machine", super::info::versioned(board.name)), "machine");
    }
    for kind in machine::objects::KINDS {
        add(kind.name.into(), "object");
    }
    for accel in ["kvm-accel", "tcg-accel"] {
        add(accel.into(), "accel");
    }
    Ok(all)
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TypeName {
    typename: String,
}

fn list_properties(_: &Context, a: TypeName) -> Result<Vec<PropertyInfo>> {
    if let Ok(model) = devices::find_model(&a.typename) {
        return Ok(properties(&model.all_properties()));
    }
    if let Some(kind) = machine::objects::KINDS.iter().find(|k| k.name == a.typename) {
        return Ok(properties(&(kind.properties)()));
    }
    if a.typename.ends_with("-machine") {
        return Ok(properties(&base::props::Properties::of::<machine::blueprint::BoardSpec>()));
    }
    Err(Error::of(Class::DeviceNotFound, format!("Class '{}' not found", a.typename)))
}
