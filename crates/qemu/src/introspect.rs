//! What `query-command-line-options` says: the options' parameters, as far as clients look at them.

use serde_json::{Value, json};

/// Parameters by option: name and type.
const PARAMETERS: &[(&str, &[(&str, &str)])] = &[
    (
        "machine",
        &[
            ("type", "string"),
            ("accel", "string"),
            ("kernel", "string"),
            ("initrd", "string"),
            ("append", "string"),
            ("usb", "boolean"),
            ("dump-guest-core", "boolean"),
            ("mem-merge", "boolean"),
            ("memory-backend", "string"),
            ("hpet", "boolean"),
        ],
    ),
    ("accel", &[("accel", "string")]),
    ("memory", &[("size", "size"), ("slots", "number"), ("maxmem", "size")]),
    (
        "smp-opts",
        &[
            ("cpus", "number"),
            ("sockets", "number"),
            ("dies", "number"),
            ("cores", "number"),
            ("threads", "number"),
            ("maxcpus", "number"),
        ],
    ),
    ("name", &[("guest", "string"), ("debug-threads", "boolean")]),
    ("msg", &[("timestamp", "boolean")]),
    ("overcommit", &[("mem-lock", "boolean"), ("cpu-pm", "boolean")]),
    ("boot-opts", &[("order", "string"), ("once", "string"), ("menu", "boolean"), ("strict", "boolean")]),
    ("rtc", &[("base", "string"), ("clock", "string"), ("driftfix", "string")]),
    ("action", &[("reboot", "string"), ("shutdown", "string"), ("panic", "string"), ("watchdog", "string")]),
    ("mon", &[("chardev", "string"), ("mode", "string"), ("pretty", "boolean")]),
    (
        "chardev",
        &[
            ("backend", "string"),
            ("path", "string"),
            ("host", "string"),
            ("port", "string"),
            ("fd", "string"),
            ("server", "boolean"),
            ("wait", "boolean"),
            ("reconnect", "number"),
            ("telnet", "boolean"),
            ("mux", "boolean"),
            ("logfile", "string"),
            ("logappend", "boolean"),
            ("append", "boolean"),
            ("size", "size"),
            ("signal", "boolean"),
        ],
    ),
    (
        "drive",
        &[
            ("file", "string"),
            ("if", "string"),
            ("format", "string"),
            ("media", "string"),
            ("index", "number"),
            ("bus", "number"),
            ("unit", "number"),
            ("id", "string"),
            ("snapshot", "boolean"),
            ("cache", "string"),
            ("aio", "string"),
            ("discard", "string"),
            ("detect-zeroes", "string"),
            ("read-only", "boolean"),
            ("werror", "string"),
            ("rerror", "string"),
            ("throttling.iops-total", "number"),
            ("throttling.bps-total", "number"),
        ],
    ),
    ("device", &[]),
    ("object", &[]),
    ("netdev", &[]),
    ("global", &[("driver", "string"), ("property", "string"), ("value", "string")]),
];

/// The result.
pub(crate) fn command_line() -> Value {
    PARAMETERS
        .iter()
        .map(|(option, parameters)| {
            let parameters: Vec<Value> =
                parameters.iter().map(|(name, kind)| json!({ "name": name, "type": kind })).collect();
            json!({ "option": option, "parameters": parameters })
        })
        .collect()
}
