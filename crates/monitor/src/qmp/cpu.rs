//! vCPUs and CPU models.

use super::{Command, Empty, Error, Result, command};
use crate::Context;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub(super) const COMMANDS: &[Command] = &[
    command!("query-cpus-fast", cpus_fast),
    command!("query-hotpluggable-cpus", hotpluggable),
    command!("query-cpu-definitions", definitions),
    command!("query-cpu-model-expansion", expansion),
];

/// Where a vCPU sits.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Place {
    socket_id: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    die_id: Option<u32>,
    core_id: Option<u32>,
    thread_id: Option<u32>,
}

/// A vCPU.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct CpuFast {
    cpu_index: u32,
    qom_path: String,
    thread_id: i32,
    props: Place,
    target: &'static str,
}

/// The path of a vCPU in the object tree.
pub(crate) fn path(index: u32) -> String {
    format!("/machine/unattached/device[{index}]")
}

fn place(topology: &machine::topology::Topology, index: u32) -> Place {
    let (t, c, d) = (topology.threads.max(1), topology.cores.max(1), topology.dies.max(1));
    Place {
        socket_id: Some(index / (t * c * d)),
        die_id: Some(index / (t * c) % d),
        core_id: Some(index / t % c),
        thread_id: Some(index % t),
    }
}

fn cpus_fast(c: &Context, _: Empty) -> Result<Vec<CpuFast>> {
    c.machine(|m| {
        let topology = m.topology();
        (0..m.vcpu_count())
            .map(|i| CpuFast {
                cpu_index: i,
                qom_path: path(i),
                thread_id: m.vcpu_thread(i).unwrap_or_default(),
                props: place(&topology, i),
                target: "x86_64",
            })
            .collect()
    })
}

/// A place for a vCPU.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Hotpluggable {
    #[serde(rename = "type")]
    kind: String,
    vcpus_count: u32,
    props: Place,
    #[serde(skip_serializing_if = "Option::is_none")]
    qom_path: Option<String>,
}

fn hotpluggable(c: &Context, _: Empty) -> Result<Vec<Hotpluggable>> {
    let (count, topology, model) = c.machine(|m| (m.vcpu_count(), m.topology(), m.cpu_model()))?;
    if count == 0 {
        return Err(Error::generic("The feature 'query-hotpluggable-cpus' is not enabled"));
    }
    // The highest number first, as QEMU lists them.
    Ok((0..count)
        .rev()
        .map(|i| Hotpluggable {
            kind: format!("{model}-x86_64-cpu"),
            vcpus_count: 1,
            props: place(&topology, i),
            qom_path: Some(path(i)),
        })
        .collect())
}

/// A CPU model.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Definition {
    name: String,
    typename: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    alias_of: Option<String>,
    #[serde(rename = "static")]
    is_static: bool,
    migration_safe: bool,
    deprecated: bool,
    unavailable_features: Vec<String>,
}

fn definitions(c: &Context, _: Empty) -> Result<Vec<Definition>> {
    c.machine(|m| {
        let models = machine::cpu::definitions(m.supported_cpuid()).into_iter();
        models
            .map(|d| Definition {
                name: d.name.into(),
                typename: format!("{}-x86_64-cpu", d.name),
                alias_of: d.alias_of.map(str::to_owned),
                is_static: d.is_static,
                migration_safe: d.migration_safe,
                deprecated: false,
                unavailable_features: d.unavailable.into_iter().map(str::to_owned).collect(),
            })
            .collect()
    })
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum ExpansionType {
    Static,
    Full,
}

/// A model with changes.
#[derive(Serialize, Deserialize, JsonSchema)]
struct Model {
    name: String,
    #[serde(default)]
    props: Map<String, Value>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Expansion {
    #[serde(rename = "type")]
    kind: ExpansionType,
    model: Model,
}

#[derive(Serialize, JsonSchema)]
struct Expanded {
    model: Model,
}

fn expansion(c: &Context, a: Expansion) -> Result<Expanded> {
    let mut bag = base::props::Bag { driver: a.model.name, id: None, props: a.model.props };
    // What the accelerator lacks is off in the answer.
    bag.props.entry("enforce").or_insert(Value::Bool(false));
    let generic = |e: &dyn std::fmt::Display| Error::generic(e.to_string());
    let request = machine::cpu::Request::new(&bag).map_err(|e| generic(&e))?;
    let full = a.kind == ExpansionType::Full;
    let expanded = c.machine(move |m| machine::cpu::expand(&request, m.supported_cpuid(), full))?;
    let expanded = expanded.map_err(|e| generic(&e))?;
    Ok(Expanded { model: Model { name: expanded.name, props: expanded.props } })
}
