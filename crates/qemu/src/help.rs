//! Help texts, and options that are mostly help.

use crate::command::Command;
use crate::options::{Action, OPTIONS, Takes};
use crate::{Error, Result};
use base::props::{Bag, Properties};
use machine::BOARDS;
use machine::blueprint::BoardSpec;
use std::fmt::Write;

/// The version line that scripts parse.
pub(crate) fn version_text() -> String {
    let (major, minor, micro) = monitor::qmp::VERSION;
    format!(
        "QEMU emulator version {major}.{minor}.{micro} ({})\nQEMU's command line and monitor, by Kvasir\n",
        monitor::qmp::PACKAGE
    )
}

pub(crate) fn version(c: &mut Command) -> Result<()> {
    c.help = Some(version_text());
    Ok(())
}

pub(crate) fn all(c: &mut Command) -> Result<()> {
    let mut out = version_text();
    out += "usage: qemu-system-x86_64 [options] [disk_image]\n\n'disk_image' is a raw or other hard disk image for the first hard disk\n\n";
    for o in OPTIONS {
        if let Action::Do(_) = o.action {
            let head = match o.takes {
                Takes::Nothing => format!("-{}", o.name),
                Takes::Value => format!("-{} ...", o.name),
            };
            let _ = writeln!(out, "{head:<20} {}", o.about); // writing to a String cannot fail
        }
    }
    out += "\nDuring emulation on a terminal: Ctrl-A h shows the keys.\n";
    c.help = Some(out);
    Ok(())
}

/// `-machine`.
pub(crate) fn machine_option(c: &mut Command, text: &str) -> Result<()> {
    if text == "help" || text == "?" {
        c.help = Some(machines());
        return Ok(());
    }
    let bag = base::props::parse_keyval(text, "type")?;
    if bag.contains_key("help") || bag.contains_key("?") {
        let board = bag.get("type").map(crate::command::text).unwrap_or_else(|| "pc".into());
        c.help = Some(Properties::of::<BoardSpec>().help(&board));
        return Ok(());
    }
    Command::merge(&mut c.machine, text, "type")
}

fn machines() -> String {
    let mut out = "Supported machines are:\n".to_owned();
    let (major, minor, _) = monitor::qmp::VERSION;
    for b in BOARDS {
        let versioned = match b.name {
            "q35" => Some(format!("pc-q35-{major}.{minor}")),
            "pc" => Some(format!("pc-i440fx-{major}.{minor}")),
            _ => None,
        };
        match versioned {
            Some(full) => {
                let default = if b.name == "pc" { " (default)" } else { "" };
                let _ = writeln!(out, "{:<20} {} (alias of {full})", b.name, b.about);
                let _ = writeln!(out, "{full:<20} {}{default}", b.about);
            }
            None => {
                let _ = writeln!(out, "{:<20} {}", b.name, b.about);
            }
        }
    }
    out
}

pub(crate) fn accels() -> String {
    "Accelerators supported in QEMU binary:\nkvm\ntcg\nsoft\n".into()
}

pub(crate) fn cpus() -> String {
    let mut out = "Available CPUs:\n".to_owned();
    let mut models: Vec<(&str, &str)> = vec![
        ("base", "base CPU model type with no features enabled"),
        ("host", "processor with all supported host features"),
        ("max", "Enables all features supported by the accelerator in the current host"),
    ];
    for model in machine::cpu::models::MODELS {
        models.extend(model.aliases.iter().map(|alias| (*alias, "(alias configured by machine type)")));
        models.push((model.name, model.brand));
    }
    models.sort_unstable();
    for (name, about) in models {
        let _ = writeln!(out, "x86 {name:<24}  {about}");
    }
    out += "\nRecognized CPUID flags:\n";
    let mut line = String::new();
    for feature in machine::cpu::features::FEATURES {
        if line.len() + feature.name.len() > 76 {
            let _ = writeln!(out, " {line}");
            line.clear();
        }
        let _ = write!(line, " {}", feature.name);
    }
    let _ = writeln!(out, " {line}");
    out
}

pub(crate) fn devices(bag: Option<&Bag>) -> Result<String> {
    if let Some(bag) = bag {
        let model = devices::find_model(&bag.driver)?;
        return Ok(model.all_properties().help(&bag.driver));
    }
    let mut out = String::new();
    for model in devices::models() {
        for name in model
            .names()
            .iter()
            .filter(|n| n.ends_with("-pci") || n.ends_with("-device") || model.names().len() == 1)
        {
            let bus = match model.kind {
                devices::Kind::Isa(_) => "ISA",
                devices::Kind::Child { bus, .. } => bus,
                devices::Kind::Virtio(_) if name.ends_with("-device") => "virtio-bus",
                _ => "PCI",
            };
            let _ = writeln!(out, "name \"{name}\", bus {bus}, desc \"{}\"", model.about);
        }
    }
    Ok(out)
}

pub(crate) fn objects(bag: Option<&Bag>) -> Result<String> {
    if let Some(bag) = bag {
        let kind = machine::objects::KINDS.iter().find(|k| k.name == bag.driver);
        let kind = kind.ok_or_else(|| Error::new(format!("invalid object type: {}", bag.driver)))?;
        return Ok((kind.properties)().help(kind.name));
    }
    let mut out = "List of user creatable objects:\n".to_owned();
    for kind in machine::objects::KINDS {
        let _ = writeln!(out, "  {}", kind.name);
    }
    Ok(out)
}

pub(crate) fn chardevs(bag: Option<&Bag>) -> Result<String> {
    if let Some(bag) = bag {
        let kind = chardev::find(&bag.driver)?;
        return Ok((kind.properties)().help(kind.name));
    }
    let mut out = "Available chardev backend types: \n".to_owned();
    for kind in chardev::KINDS {
        let _ = writeln!(out, "  {}", kind.name);
    }
    Ok(out)
}

/// Checks a UUID and gives it in lower case with dashes.
pub(crate) fn uuid(text: &str) -> Result<String> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let good = digits.len() == 32
        && digits.chars().all(|c| c.is_ascii_hexdigit())
        && (text.len() == 32 || text.len() == 36);
    if !good {
        return Err(Error::new("failed to parse UUID string: wrong format"));
    }
    let d = digits.to_lowercase();
    Ok(format!("{}-{}-{}-{}-{}", &d[..8], &d[8..12], &d[12..16], &d[16..20], &d[20..]))
}

/// Items of `-d` and the log targets they stand for.
const LOG_ITEMS: &[(&str, &str, &str)] = &[
    ("guest_errors", "bus=debug,devices=debug", "what the guest does that makes no sense"),
    ("unimp", "bus=debug,devices=debug", "accesses that are not implemented"),
    ("in_asm", "softcpu::instructions=trace", "instructions as they are executed (software CPU)"),
    ("exec", "softcpu::instructions=trace", "the same"),
    ("cpu_reset", "machine=info", "resets"),
];

/// `-d`.
pub(crate) fn log_items(c: &mut Command, text: &str) -> Result<()> {
    if text == "help" || text == "?" {
        let mut out = "Log items (comma separated):\n".to_owned();
        for (name, _, about) in LOG_ITEMS {
            let _ = writeln!(out, "{name:<15} {about}");
        }
        c.help = Some(out);
        return Ok(());
    }
    for item in text.split(',') {
        let row = LOG_ITEMS.iter().find(|(name, ..)| *name == item);
        let row = row.ok_or_else(|| {
            let near = base::nearest(item, LOG_ITEMS.iter().map(|(n, ..)| *n));
            let near = near.map(|n| format!("; did you mean '{n}'?")).unwrap_or_default();
            Error::new(format!("unknown log item '{item}'{near}"))
        })?;
        c.log_items.push(row.1.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids() {
        let full = "11111111-2222-3333-4444-55555555000a";
        assert_eq!(uuid("111111112222333344445555 5555000A".replace(' ', "").as_str()).unwrap(), full);
        assert_eq!(uuid(full).unwrap(), full);
        assert!(uuid("1111").is_err() && uuid("x1111111-2222-3333-4444-55555555000a").is_err());
    }
}
