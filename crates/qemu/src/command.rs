//! What a command line says, option by option, before anything is made of it.

use crate::options::{self, Takes};
use crate::{Error, Result, readconfig};
use base::nearest;
use base::props::{Bag, parse_keyval};
use machine::control::Actions;
use serde_json::{Map, Value};
use std::path::PathBuf;

/// Properties as text, in order of their names.
pub(crate) type Props = Map<String, Value>;

/// The options, gathered.
#[derive(Debug, Default)]
pub struct Command {
    /// A help text or version that was asked for instead of a run.
    pub help: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) uuid: Option<String>,
    pub(crate) machine: Props,
    pub(crate) accels: Vec<Bag>,
    pub(crate) cpu: Option<String>,
    pub(crate) smp: Props,
    pub(crate) memory: Props,
    pub(crate) mem_path: Option<PathBuf>,
    pub(crate) mem_prealloc: bool,
    pub(crate) mem_lock: bool,
    pub(crate) bios: Option<PathBuf>,
    pub(crate) data_dirs: Vec<PathBuf>,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) drives: Vec<Props>,
    pub(crate) blockdevs: Vec<Bag>,
    pub(crate) devices: Vec<Bag>,
    pub(crate) objects: Vec<Bag>,
    pub(crate) netdevs: Vec<Bag>,
    pub(crate) nics: Vec<Bag>,
    pub(crate) no_nic: bool,
    pub(crate) chardevs: Vec<Bag>,
    pub(crate) serials: Vec<String>,
    pub(crate) parallels: Vec<String>,
    pub(crate) monitors: Vec<MonitorOption>,
    pub(crate) boot: Props,
    pub(crate) fw_cfg: Vec<Props>,
    pub(crate) smbios: Vec<Props>,
    pub(crate) acpi_tables: Vec<Props>,
    pub(crate) rtc: Props,
    pub(crate) vga: Option<String>,
    pub(crate) display: Option<Bag>,
    pub(crate) vnc: Vec<String>,
    pub(crate) keyboard: Option<String>,
    pub(crate) usb: bool,
    pub(crate) usb_devices: Vec<String>,
    pub(crate) globals: Vec<(String, String, String)>,
    pub(crate) actions: Actions,
    pub(crate) no_shutdown: bool,
    pub(crate) no_defaults: bool,
    pub(crate) nographic: bool,
    pub(crate) snapshot: bool,
    pub(crate) paused: bool,
    pub(crate) daemonize: bool,
    pub(crate) pidfile: Option<PathBuf>,
    pub(crate) log_file: Option<PathBuf>,
    pub(crate) log_items: Vec<String>,
    pub(crate) timestamps: bool,
    pub(crate) gdb: Option<String>,
    pub(crate) sandbox: bool,
    pub(crate) sets: Vec<(String, String, String, String)>,
}

/// A monitor, by shorthand or by chardev.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum MonitorOption {
    /// `-monitor`, `-qmp`, `-qmp-pretty` and what they were given.
    Device(String, monitor::Mode),
    /// `-mon chardev=ID,mode=...`.
    Chardev(String, monitor::Mode),
}

impl Command {
    /// Reads arguments (without the program's name).
    ///
    /// # Errors
    /// The first option that is unknown, unsupported or malformed.
    pub fn read(args: &[String]) -> Result<Self> {
        let mut command = Self::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let Some(name) = arg.strip_prefix('-').filter(|n| !n.is_empty()) else {
                command.image(arg)?;
                continue;
            };
            // QEMU takes one dash or two.
            let name = name.strip_prefix('-').unwrap_or(name);
            let option = options::find(name).ok_or_else(|| unknown(name))?;
            let value = match option.takes {
                Takes::Nothing => "",
                Takes::Value => match args.next() {
                    Some(value) => value,
                    None => return Err(Error::new(format!("-{name}: requires an argument"))),
                },
            };
            command.apply(option, value)?;
            if command.help.is_some() {
                break;
            }
        }
        Ok(command)
    }

    /// Applies one option, with its name in front of what goes wrong.
    pub(crate) fn apply(&mut self, option: &options::Opt, value: &str) -> Result<()> {
        let what = match option.takes {
            Takes::Nothing => format!("-{}", option.name),
            Takes::Value => format!("-{} {value}", option.name),
        };
        match option.action {
            options::Action::Do(f) => f(self, value).map_err(|e| Error::new(format!("{what}: {e}"))),
            options::Action::Unsupported(why) => {
                Err(Error::new(format!("-{}: not supported: {why}", option.name)))
            }
        }
    }

    /// A word that is no option: a disk image.
    fn image(&mut self, path: &str) -> Result<()> {
        let mut drive = Props::new();
        drive.insert("file".into(), path.into());
        drive.insert("index".into(), "0".into());
        drive.insert("media".into(), "disk".into());
        self.drives.push(drive);
        Ok(())
    }

    /// Merges `[implied,]key=value,...` into one of the single-valued groups; later ones win.
    pub(crate) fn merge(into: &mut Props, text: &str, implied: &str) -> Result<()> {
        let props = if text.trim_start().starts_with('{') {
            match serde_json::from_str(text) {
                Ok(Value::Object(map)) => map,
                _ => return Err(Error::new("invalid JSON")),
            }
        } else {
            parse_keyval(text, implied)?
        };
        into.extend(props);
        Ok(())
    }

    /// Reads a file of options.
    pub(crate) fn read_config(&mut self, path: &str) -> Result<()> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::new(format!("cannot read it: {e}")))?;
        readconfig::apply(self, &text)
    }
}

fn unknown(name: &str) -> Error {
    let near = nearest(name, options::OPTIONS.iter().map(|o| o.name));
    let near = near.map(|n| format!("; did you mean '-{n}'?")).unwrap_or_default();
    Error::new(format!("-{name}: invalid option{near}"))
}

/// Text of a property, whatever form it came in.
pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Bool(true) => "on".into(),
        Value::Bool(false) => "off".into(),
        other => other.to_string(),
    }
}

/// Takes a property out.
pub(crate) fn take(props: &mut Props, key: &str) -> Option<String> {
    props.remove(key).map(|v| text(&v))
}

/// Takes a switch out.
pub(crate) fn take_switch(props: &mut Props, key: &str) -> Result<Option<bool>> {
    match take(props, key).as_deref() {
        None => Ok(None),
        Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
        Some("off" | "no" | "false" | "n") => Ok(Some(false)),
        Some(other) => Err(Error::new(format!("Parameter '{key}' expects 'on' or 'off', not '{other}'"))),
    }
}

/// Fails if anything is left.
pub(crate) fn finish(what: &str, props: &Props, known: &[&str]) -> Result<()> {
    match props.keys().next() {
        None => Ok(()),
        Some(key) => {
            let near = nearest(key, known.iter().copied());
            let near = near.map(|n| format!("; did you mean '{n}'?")).unwrap_or_default();
            Err(Error::new(format!("{what}: Invalid parameter '{key}'{near}")))
        }
    }
}
