//! QMP: the protocol that programs speak to a machine.
//!
//! A command is a row of a table: its name, a function from an argument struct to a result, and what else is special. The
//! structs' schemas give argument checks and `query-qmp-schema`, so that introspection is true to what is served. A group
//! of commands is one file and one line in [`GROUPS`].

pub mod events;
mod framing;
mod schema;
pub(crate) mod session;

mod block;
mod chardev;
mod control;
mod cpu;
mod device;
mod display;
mod fds;
mod info;
mod introspect;
mod memory;
mod migrate;
mod pci;
mod qom;

pub use framing::Framer;
pub use schema::introspection;

use crate::Context;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::sync::OnceLock;

/// The version of QEMU whose interface is served.
pub const VERSION: (u32, u32, u32) = (7, 2, 22);
/// What follows it: who we are.
pub const PACKAGE: &str = concat!("Kvasir ", env!("CARGO_PKG_VERSION"));

/// QMP's error classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Class {
    /// Anything else.
    GenericError,
    /// There is no such command (now).
    CommandNotFound,
    /// A device that is needed is not active.
    DeviceNotActive,
    /// There is no such device.
    DeviceNotFound,
    /// KVM lacks a capability.
    #[serde(rename = "KVMMissingCap")]
    KvmMissingCap,
}

/// A command's failure.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct Error {
    /// The class.
    pub class: Class,
    /// One line for the user.
    pub desc: String,
}

impl Error {
    /// An error of the class for anything.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self { class: Class::GenericError, desc: desc.into() }
    }

    /// An error of another class.
    pub fn of(class: Class, desc: impl Into<String>) -> Self {
        Self { class, desc: desc.into() }
    }

    /// A device that does not exist.
    pub fn no_device(id: &str) -> Self {
        Self::of(Class::DeviceNotFound, format!("Device '{id}' not found"))
    }
}

impl From<machine::Error> for Error {
    fn from(e: machine::Error) -> Self {
        Self::generic(e.to_string())
    }
}

impl From<devices::CreateError> for Error {
    fn from(e: devices::CreateError) -> Self {
        Self::generic(e.to_string())
    }
}

impl From<base::props::PropError> for Error {
    fn from(e: base::props::PropError) -> Self {
        Self::generic(e.to_string())
    }
}

/// Result of commands.
pub type Result<T> = std::result::Result<T, Error>;

/// No arguments, or no result.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Empty {}

/// A row of the table.
pub struct Command {
    /// QMP's name.
    pub name: &'static str,
    run: fn(&Context, Value) -> Result<Value>,
    arguments: fn(&mut SchemaGenerator) -> Schema,
    result: fn(&mut SchemaGenerator) -> Schema,
    oob: bool,
    features: &'static [&'static str],
}

impl Command {
    /// May be sent out of band.
    const fn oob(mut self) -> Self {
        self.oob = true;
        self
    }

    /// Feature names that introspection shows.
    const fn features(mut self, features: &'static [&'static str]) -> Self {
        self.features = features;
        self
    }
}

fn typed<A: DeserializeOwned, R: Serialize>(
    f: fn(&Context, A) -> Result<R>,
    context: &Context,
    arguments: Value,
) -> Result<Value> {
    let arguments = serde_json::from_value(arguments).map_err(|e| Error::generic(e.to_string()))?;
    let result = f(context, arguments)?;
    serde_json::to_value(result).map_err(|e| Error::generic(e.to_string()))
}

fn argument_schema<A: JsonSchema, R>(_: fn(&Context, A) -> Result<R>, g: &mut SchemaGenerator) -> Schema {
    g.subschema_for::<A>()
}

fn result_schema<A, R: JsonSchema>(_: fn(&Context, A) -> Result<R>, g: &mut SchemaGenerator) -> Schema {
    g.subschema_for::<R>()
}

/// A row: `command!("query-status", query_status)`.
macro_rules! command {
    ($name:literal, $f:path) => {
        $crate::qmp::Command {
            name: $name,
            run: |context, arguments| $crate::qmp::typed($f, context, arguments),
            arguments: |g| $crate::qmp::argument_schema($f, g),
            result: |g| $crate::qmp::result_schema($f, g),
            oob: false,
            features: &[],
        }
    };
}
use command;

/// All groups of commands.
const GROUPS: &[&[Command]] = &[
    control::COMMANDS,
    block::COMMANDS,
    display::COMMANDS,
    info::COMMANDS,
    introspect::COMMANDS,
    cpu::COMMANDS,
    memory::COMMANDS,
    chardev::COMMANDS,
    device::COMMANDS,
    fds::COMMANDS,
    migrate::COMMANDS,
    pci::COMMANDS,
    qom::COMMANDS,
];

/// All commands.
pub fn commands() -> impl Iterator<Item = &'static Command> {
    GROUPS.iter().flat_map(|g| g.iter())
}

fn find(name: &str) -> Option<&'static Command> {
    static BY_NAME: OnceLock<HashMap<&'static str, &'static Command>> = OnceLock::new();
    BY_NAME.get_or_init(|| commands().map(|c| (c.name, c)).collect()).get(name).copied()
}

impl Command {
    /// Runs it, after the checks that its schema asks for.
    fn call(&self, context: &Context, arguments: Map<String, Value>) -> Result<Value> {
        schema::check(self, &arguments)?;
        (self.run)(context, Value::Object(arguments))
    }
}

/// Runs a command from within the program, without its checks of protocol.
///
/// # Errors
/// The command's.
pub fn execute(context: &Context, name: &str, arguments: Map<String, Value>) -> Result<Value> {
    let command = find(name)
        .ok_or_else(|| Error::of(Class::CommandNotFound, format!("The command {name} has not been found")))?;
    command.call(context, arguments)
}

/// The text of an event, with its line end.
pub(crate) fn event_text(name: &str, data: &Value) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let mut event = json!({
        "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
        "event": name,
    });
    if !data.is_null() {
        event["data"] = data.clone();
    }
    format!("{event}\r\n")
}
