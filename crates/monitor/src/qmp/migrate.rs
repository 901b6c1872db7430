//! Migration: what can be asked about it.

use super::{Command, Empty, Error, Result, command};
use crate::Context;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(super) const COMMANDS: &[Command] = &[
    command!("query-migrate", query),
    command!("query-migrate-capabilities", capabilities),
    command!("migrate-set-capabilities", set_capabilities),
    command!("query-migrate-parameters", parameters),
];

#[derive(Serialize, JsonSchema)]
struct Info {
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<String>,
}

fn query(_: &Context, _: Empty) -> Result<Info> {
    Ok(Info { status: None })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Capability {
    Events,
}

#[derive(Serialize, Deserialize, JsonSchema)]
struct CapabilityState {
    state: bool,
    capability: Capability,
}

/// There is one capability, and it is always in effect: state changes are told.
fn capabilities(_: &Context, _: Empty) -> Result<Vec<CapabilityState>> {
    Ok(vec![CapabilityState { state: true, capability: Capability::Events }])
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Set {
    capabilities: Vec<CapabilityState>,
}

fn set_capabilities(_: &Context, a: Set) -> Result<Empty> {
    match a.capabilities.iter().find(|c| !c.state) {
        Some(c) => Err(Error::generic(format!("capability {:?} cannot be turned off", c.capability))),
        None => Ok(Empty {}),
    }
}

#[derive(Serialize, JsonSchema)]
struct Parameters {}

fn parameters(_: &Context, _: Empty) -> Result<Parameters> {
    Ok(Parameters {})
}
