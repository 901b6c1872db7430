//! What the protocol itself has: commands, events, types.

use super::{Command, Empty, Result, command, commands, events};
use crate::Context;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

pub(super) const COMMANDS: &[Command] = &[
    command!("query-qmp-schema", schema),
    command!("query-commands", query_commands),
    command!("query-events", query_events),
];

fn schema(_: &Context, _: Empty) -> Result<Vec<Value>> {
    Ok(super::introspection().as_array().cloned().unwrap_or_default())
}

#[derive(Serialize, JsonSchema)]
struct Named {
    name: &'static str,
}

fn query_commands(_: &Context, _: Empty) -> Result<Vec<Named>> {
    Ok(commands().map(|c| Named { name: c.name }).collect())
}

fn query_events(_: &Context, _: Empty) -> Result<Vec<Named>> {
    Ok(events::EVENTS.iter().map(|e| Named { name: e.name }).collect())
}
