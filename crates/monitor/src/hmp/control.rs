//! Start, stop, reset, quit, and other single words.

use super::{Entry, entry, need, word};
use crate::qmp::Error;
use serde_json::{Map, Value, json};

pub(super) const COMMANDS: &[Entry] = &[
    entry("stop|s", "", "stop emulation", |s, _| s.qmp("stop", Value::Null).map(|_| String::new())),
    entry("cont|c", "", "resume emulation", |s, _| s.qmp("cont", Value::Null).map(|_| String::new())),
    entry("system_reset", "", "reset the system", |s, _| {
        s.qmp("system_reset", Value::Null).map(|_| String::new())
    }),
    entry("system_powerdown", "", "send system power down event", |s, _| {
        s.qmp("system_powerdown", Value::Null).map(|_| String::new())
    }),
    entry("system_wakeup", "", "wakeup guest from suspend", |s, _| {
        s.qmp("system_wakeup", Value::Null).map(|_| String::new())
    }),
    entry("quit|q", "", "quit the emulator", |s, _| s.qmp("quit", Value::Null).map(|_| String::new())),
    entry("nmi", "", "inject an NMI", |s, _| s.qmp("inject-nmi", Value::Null).map(|_| String::new())),
    entry("cpu", "index", "set the default CPU", |s, args| {
        let index = need(args, "index")?.parse().map_err(|_| Error::generic("invalid CPU index"))?;
        s.select_cpu(index).map(|()| String::new())
    }),
    entry("balloon", "target", "request VM to change its memory allocation (in MB)", |s, args| {
        let bytes =
            memory::parse_size(need(args, "target")?, 'M').map_err(|e| Error::generic(e.to_string()))?;
        s.qmp("balloon", json!({ "value": bytes })).map(|_| String::new())
    }),
    entry(
        "set_action",
        "[reboot=...] [shutdown=...] [panic=...] [watchdog=...]",
        "what to do at the guest's ends",
        |s, args| {
            let mut map = Map::new();
            for part in args.split_whitespace() {
                let (key, value) =
                    part.split_once('=').ok_or_else(|| Error::generic("expected ACTION=WHAT"))?;
                map.insert(key.into(), value.into());
            }
            s.qmp("set-action", Value::Object(map)).map(|_| String::new())
        },
    ),
    entry("watchdog_action", "action", "change watchdog action", |s, args| {
        s.qmp("watchdog-set-action", json!({ "action": need(args, "action")? })).map(|_| String::new())
    }),
    entry("log", "items", "activate logging of the specified items", |_, _| {
        Err(Error::generic("logs are chosen at the start: -d, or KVASIR_LOG in the environment"))
    }),
    entry("closefd", "name", "close a descriptor that was passed", |s, args| {
        s.qmp("closefd", json!({ "fdname": word(need(args, "name")?).0 })).map(|_| String::new())
    }),
];
