//! Devices and objects: adding, removing, properties.

use super::{Command, Empty, Error, Result, command};
use crate::Context;
use base::props::{Bag, Properties};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub(super) const COMMANDS: &[Command] = &[
    command!("device-list-properties", list_properties),
    command!("device_add", device_add).features(&["json-cli", "json-cli-hotplug"]),
    command!("device_del", device_del),
    command!("object-add", object_add),
    command!("object-del", object_del),
];

/// A property.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct PropertyInfo {
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) description: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) default_value: Option<Value>,
}

/// Properties as QMP shows them.
pub(super) fn properties(all: &Properties) -> Vec<PropertyInfo> {
    all.0
        .iter()
        .map(|p| PropertyInfo {
            name: p.name.clone(),
            kind: match p.kind.as_str() {
                "size" => "size".into(),
                "int" => "uint64".into(),
                other if other.contains('|') => "str".into(),
                other => other.into(),
            },
            description: (!p.about.is_empty()).then(|| p.about.clone()),
            default_value: p.default.clone().filter(|d| !d.is_null()),
        })
        .collect()
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TypeName {
    typename: String,
}

fn list_properties(_: &Context, a: TypeName) -> Result<Vec<PropertyInfo>> {
    match devices::find_model(&a.typename) {
        Ok(model) => Ok(properties(&model.all_properties())),
        Err(_) => Err(Error::no_device(&a.typename)),
    }
}

#[derive(Deserialize, JsonSchema)]
struct DeviceAdd {
    /// The model.
    driver: String,
    /// The bus to plug into.
    bus: Option<String>,
    /// The id.
    id: Option<String>,
    /// The model's own properties.
    #[serde(flatten)]
    properties: Map<String, Value>,
}

fn device_add(c: &Context, a: DeviceAdd) -> Result<Empty> {
    let mut bag = Bag::new(a.driver);
    if let Some(id) = &a.id {
        base::props::check_id(id)?;
    }
    bag.id = a.id;
    bag.props = a.properties;
    if let Some(bus) = a.bus {
        bag.props.insert("bus".into(), bus.into());
    }
    c.machine(move |m| m.add_device(&bag))??;
    Ok(Empty {})
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Id {
    id: String,
}

fn device_del(c: &Context, a: Id) -> Result<Empty> {
    let id = a.id.rsplit('/').next().unwrap_or_default().to_owned();
    let known = c.machine(move |m| m.remove_device(&id))?;
    match known {
        Ok(()) => Ok(Empty {}),
        Err(machine::Error::Config(text)) if text.is_empty() => Err(Error::no_device(&a.id)),
        Err(e) => Err(e.into()),
    }
}

/// Objects of the machine.
pub(super) fn objects(c: &Context) -> Vec<Bag> {
    c.machine(|m| m.objects().to_vec()).unwrap_or_default()
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct ObjectAdd {
    /// The kind.
    qom_type: String,
    /// The id.
    id: String,
    /// The kind's own properties.
    #[serde(flatten)]
    properties: Map<String, Value>,
}

fn object_add(c: &Context, a: ObjectAdd) -> Result<Empty> {
    base::props::check_id(&a.id)?;
    let mut bag = Bag::new(a.qom_type);
    bag.id = Some(a.id);
    bag.props = a.properties;
    c.machine(move |m| m.add_object(bag))??;
    Ok(Empty {})
}

fn object_del(c: &Context, a: Id) -> Result<Empty> {
    c.machine(move |m| m.remove_object(&a.id))??;
    Ok(Empty {})
}
