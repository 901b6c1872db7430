//! Facts about the program and the machine.

use super::{Command, Empty, Error, PACKAGE, Result, VERSION, command};
use crate::Context;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

pub(super) const COMMANDS: &[Command] = &[
    command!("query-version", version),
    command!("query-target", target),
    command!("query-kvm", kvm),
    command!("query-name", name),
    command!("query-uuid", uuid),
    command!("query-machines", machines),
    command!("query-current-machine", current_machine),
    command!("query-command-line-options", command_line),
    command!("query-iothreads", iothreads),
    command!("query-tpm-models", tpm_models),
    command!("query-tpm-types", tpm_types),
    command!("query-tpm", tpm),
    command!("query-sev-capabilities", sev),
    command!("query-sgx-capabilities", sgx),
    command!("query-vm-generation-id", generation_id),
    command!("rtc-reset-reinjection", rtc_reset),
];

#[derive(Serialize, JsonSchema)]
struct Triple {
    major: u32,
    minor: u32,
    micro: u32,
}

#[derive(Serialize, JsonSchema)]
struct Version {
    qemu: Triple,
    package: &'static str,
}

fn version(_: &Context, _: Empty) -> Result<Version> {
    let (major, minor, micro) = VERSION;
    Ok(Version { qemu: Triple { major, minor, micro }, package: PACKAGE })
}

#[derive(Serialize, JsonSchema)]
struct Target {
    arch: &'static str,
}

fn target(_: &Context, _: Empty) -> Result<Target> {
    Ok(Target { arch: "x86_64" })
}

#[derive(Serialize, JsonSchema)]
struct Kvm {
    enabled: bool,
    present: bool,
}

fn kvm(c: &Context, _: Empty) -> Result<Kvm> {
    Ok(Kvm { enabled: c.settings.kvm, present: c.settings.kvm_present })
}

#[derive(Serialize, JsonSchema)]
struct Name {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
}

fn name(c: &Context, _: Empty) -> Result<Name> {
    Ok(Name { name: c.settings.name.clone() })
}

#[derive(Serialize, JsonSchema)]
struct Uuid {
    #[serde(rename = "UUID")]
    uuid: String,
}

fn uuid(c: &Context, _: Empty) -> Result<Uuid> {
    Ok(Uuid { uuid: c.settings.uuid.clone() })
}

/// A kind of machine.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct MachineInfo {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    alias: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    is_default: Option<bool>,
    cpu_max: u32,
    hotpluggable_cpus: bool,
    numa_mem_supported: bool,
    deprecated: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    default_cpu_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    default_ram_id: Option<String>,
}

/// QEMU's versioned name of a board.
pub(crate) fn versioned(board: &str) -> String {
    let (major, minor, _) = VERSION;
    match board {
        "q35" => format!("pc-q35-{major}.{minor}"),
        "pc" => format!("pc-i440fx-{major}.{minor}"),
        other => other.into(),
    }
}

fn machines(_: &Context, _: Empty) -> Result<Vec<MachineInfo>> {
    Ok(machine::BOARDS
        .iter()
        .map(|b| {
            let name = versioned(b.name);
            let real = b.name != "none";
            MachineInfo {
                alias: (name != b.name).then(|| b.name.to_owned()),
                is_default: (b.name == "pc").then_some(true),
                name,
                cpu_max: if real { machine::topology::MAX_VCPUS } else { 1 },
                hotpluggable_cpus: false,
                numa_mem_supported: false,
                deprecated: false,
                default_cpu_type: real.then(|| "qemu64-x86_64-cpu".into()),
                default_ram_id: Some(if b.name == "microvm" { "microvm.ram" } else { "pc.ram" }.into()),
            }
        })
        .collect())
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct CurrentMachine {
    wakeup_suspend_support: bool,
}

fn current_machine(_: &Context, _: Empty) -> Result<CurrentMachine> {
    Ok(CurrentMachine { wakeup_suspend_support: false })
}

/// What an option takes.
#[derive(Serialize, JsonSchema)]
struct OptionParameter {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    help: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    default: Option<String>,
}

/// A command line option.
#[derive(Serialize, JsonSchema)]
struct OptionInfo {
    option: String,
    parameters: Vec<OptionParameter>,
}

#[derive(serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct OptionName {
    option: Option<String>,
}

fn command_line(c: &Context, a: OptionName) -> Result<Vec<OptionInfo>> {
    let text = |v: Option<&Value>| v.and_then(Value::as_str).map(String::from);
    let mut all = Vec::new();
    for entry in c.settings.command_line.as_array().into_iter().flatten() {
        let option = text(entry.get("option")).unwrap_or_default();
        if a.option.as_ref().is_some_and(|o| *o != option) {
            continue;
        }
        let parameters = entry.get("parameters").and_then(Value::as_array).into_iter().flatten();
        let parameters = parameters
            .map(|p| OptionParameter {
                name: text(p.get("name")).unwrap_or_default(),
                kind: text(p.get("type")).unwrap_or_default(),
                help: text(p.get("help")),
                default: text(p.get("default")),
            })
            .collect();
        all.push(OptionInfo { option, parameters });
    }
    match (&a.option, all.is_empty()) {
        (Some(option), true) => Err(Error::generic(format!("invalid option name: {option}"))),
        _ => Ok(all),
    }
}

/// An I/O thread.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct IoThread {
    id: String,
    thread_id: i32,
    poll_max_ns: u64,
    poll_grow: u64,
    poll_shrink: u64,
    aio_max_batch: u64,
}

/// Objects of the kind `iothread` name no thread of their own here: disks have theirs.
fn iothreads(c: &Context, _: Empty) -> Result<Vec<IoThread>> {
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    let objects = super::device::objects(c);
    let threads = objects.iter().filter(|o| o.driver == "iothread");
    Ok(threads
        .map(|o| IoThread {
            id: o.id.clone().unwrap_or_default(),
            thread_id: pid,
            poll_max_ns: 32768,
            poll_grow: 0,
            poll_shrink: 0,
            aio_max_batch: 0,
        })
        .collect())
}

fn tpm_models(_: &Context, _: Empty) -> Result<Vec<String>> {
    Ok(Vec::new())
}

fn tpm_types(_: &Context, _: Empty) -> Result<Vec<String>> {
    Ok(Vec::new())
}

fn tpm(_: &Context, _: Empty) -> Result<Vec<Value>> {
    Ok(Vec::new())
}

fn sev(_: &Context, _: Empty) -> Result<Empty> {
    Err(Error::generic("SEV is not supported"))
}

fn sgx(_: &Context, _: Empty) -> Result<Empty> {
    Err(Error::generic("SGX is not supported"))
}

fn generation_id(_: &Context, _: Empty) -> Result<Empty> {
    Err(Error::generic("VM Generation ID device not found"))
}

/// Ticks that a guest could not take are not made up for after it was stopped: there is nothing to forget.
fn rtc_reset(_: &Context, _: Empty) -> Result<Empty> {
    Ok(Empty {})
}
