//! Start, stop, reset, quit.

use super::{Command, Empty, Error, Result, command};
use crate::Context;
use machine::control::{Actions, PanicAction, RebootAction, ShutdownAction, WatchdogAction};
use machine::{Cause, RunState};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(super) const COMMANDS: &[Command] = &[
    command!("qmp_capabilities", capabilities),
    command!("query-status", status),
    command!("stop", stop),
    command!("cont", cont),
    command!("system_reset", reset),
    command!("system_powerdown", powerdown),
    command!("system_wakeup", wakeup),
    command!("quit", quit).oob(),
    command!("inject-nmi", nmi),
    command!("set-action", set_action).features(&["allow-preconfig"]),
    command!("watchdog-set-action", watchdog_set_action),
    command!("human-monitor-command", human),
];

#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Capability {
    Oob,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Capabilities {
    /// Capabilities to use.
    #[serde(rename = "enable")]
    _enable: Option<Vec<Capability>>,
}

/// Served by the session; it is here for introspection.
fn capabilities(_: &Context, _: Capabilities) -> Result<Empty> {
    Err(Error::of(
        super::Class::CommandNotFound,
        "Capabilities negotiation is already complete, command ignored",
    ))
}

#[derive(Serialize, JsonSchema)]
struct Status {
    status: RunState,
    singlestep: bool,
    running: bool,
}

fn status(c: &Context, _: Empty) -> Result<Status> {
    let status = c.remote.state();
    Ok(Status { status, singlestep: false, running: status == RunState::Running })
}

fn stop(c: &Context, _: Empty) -> Result<Empty> {
    c.machine(machine::Machine::pause)?;
    Ok(Empty {})
}

fn cont(c: &Context, _: Empty) -> Result<Empty> {
    c.machine(machine::Machine::resume)??;
    Ok(Empty {})
}

fn reset(c: &Context, _: Empty) -> Result<Empty> {
    c.remote.reset_because(Cause::HostQmpSystemReset);
    Ok(Empty {})
}

fn powerdown(c: &Context, _: Empty) -> Result<Empty> {
    c.remote.power_button();
    Ok(Empty {})
}

fn wakeup(c: &Context, _: Empty) -> Result<Empty> {
    if c.remote.state() != RunState::Suspended {
        return Err(Error::generic("Unable to wake up: guest is not in suspended state"));
    }
    Ok(Empty {})
}

fn quit(c: &Context, _: Empty) -> Result<Empty> {
    c.remote.quit_because(Cause::HostQmpQuit);
    Ok(Empty {})
}

fn nmi(c: &Context, _: Empty) -> Result<Empty> {
    c.machine(|m| m.inject_nmi())??;
    Ok(Empty {})
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SetAction {
    reboot: Option<RebootAction>,
    shutdown: Option<ShutdownAction>,
    panic: Option<PanicAction>,
    watchdog: Option<WatchdogAction>,
}

fn set_action(c: &Context, a: SetAction) -> Result<Empty> {
    c.machine(move |m| {
        let old = m.actions;
        m.actions = Actions {
            reboot: a.reboot.unwrap_or(old.reboot),
            shutdown: a.shutdown.unwrap_or(old.shutdown),
            panic: a.panic.unwrap_or(old.panic),
            watchdog: a.watchdog.unwrap_or(old.watchdog),
            ..old
        };
    })?;
    Ok(Empty {})
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct WatchdogSetAction {
    action: WatchdogAction,
}

fn watchdog_set_action(c: &Context, a: WatchdogSetAction) -> Result<Empty> {
    c.machine(move |m| m.actions.watchdog = a.action)?;
    Ok(Empty {})
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Human {
    /// What a user would type.
    command_line: String,
    /// The vCPU that the command looks at.
    cpu_index: Option<u32>,
}

fn human(c: &Context, a: Human) -> Result<String> {
    let mut shell = crate::hmp::Shell::new(c);
    if let Some(index) = a.cpu_index {
        shell.select_cpu(index)?;
    }
    Ok(shell.run(&a.command_line).replace('\n', "\r\n"))
}
