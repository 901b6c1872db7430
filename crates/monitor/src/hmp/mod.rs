//! The human monitor: commands that people type.
//!
//! A command is a row of a table; a group of commands is a file and a line in [`GROUPS`].

mod control;
mod devices;
mod expression;
mod info;
mod line;
mod memory;
mod registers;
pub(crate) mod session;

use crate::Context;
use crate::qmp::{Error, Result};
use serde_json::{Map, Value};

/// A row of the table.
pub(crate) struct Entry {
    /// Name, and shorter ones after `|`.
    names: &'static str,
    args: &'static str,
    about: &'static str,
    run: fn(&mut Shell<'_>, &str) -> Result<String>,
}

/// A row.
const fn entry(
    names: &'static str,
    args: &'static str,
    about: &'static str,
    run: fn(&mut Shell<'_>, &str) -> Result<String>,
) -> Entry {
    Entry { names, args, about, run }
}

const GROUPS: &[&[Entry]] = &[control::COMMANDS, devices::COMMANDS, memory::COMMANDS, INFO, HELP];

const INFO: &[Entry] =
    &[entry("info", "[subcommand]", "show various information about the system state", |shell, args| {
        let (name, rest) = word(args);
        if name.is_empty() {
            return Ok(list(info::COMMANDS, "info "));
        }
        match find(&[info::COMMANDS], name) {
            Some(e) => (e.run)(shell, rest),
            None => Ok(unknown(&format!("info {name}"), &[info::COMMANDS], name)),
        }
    })];

const HELP: &[Entry] = &[entry("help|?", "[cmd]", "show the help", |_, args| {
    let (name, rest) = word(args);
    if name == "info" && !rest.is_empty() {
        return Ok(find(&[info::COMMANDS], rest).map(|e| described(e, "info ")).unwrap_or_default());
    }
    if name.is_empty() {
        return Ok(GROUPS.iter().map(|g| list(g, "")).collect());
    }
    Ok(match find(GROUPS, name) {
        Some(e) => described(e, ""),
        None => unknown(name, GROUPS, name),
    })
})];

/// One user's view: the vCPU that commands look at.
pub struct Shell<'a> {
    context: &'a Context,
    cpu: u32,
}

impl<'a> Shell<'a> {
    /// A fresh one.
    pub fn new(context: &'a Context) -> Self {
        Self { context, cpu: 0 }
    }

    /// Looks at another vCPU from now on.
    ///
    /// # Errors
    /// There is no such vCPU.
    pub fn select_cpu(&mut self, index: u32) -> Result<()> {
        if index >= self.context.machine(|m| m.vcpu_count())? {
            return Err(Error::generic("invalid CPU index"));
        }
        self.cpu = index;
        Ok(())
    }

    /// Runs a command line; returns what it prints.
    pub fn run(&mut self, line: &str) -> String {
        let line = line.trim();
        let (name, args) = split(line);
        if name.is_empty() {
            return String::new();
        }
        match find(GROUPS, name) {
            None => unknown(name, GROUPS, name),
            Some(e) => match (e.run)(self, args) {
                Ok(text) => text,
                Err(error) => format!("Error: {}\n", error.desc),
            },
        }
    }

    /// Runs a QMP command.
    fn qmp(&self, name: &str, arguments: Value) -> Result<Value> {
        let arguments = match arguments {
            Value::Object(map) => map,
            _ => Map::new(),
        };
        crate::qmp::execute(self.context, name, arguments)
    }

    /// What could follow `text` on a command line: whole words, and where in `text` they begin.
    pub(crate) fn complete(&self, text: &str) -> (usize, Vec<String>) {
        let at = text.rfind(' ').map_or(0, |i| i + 1);
        let (before, part) = text.split_at(at);
        let mut all: Vec<String> = match before.trim() {
            "" | "help" | "?" => GROUPS.iter().flat_map(|g| g.iter()).map(first_name).collect(),
            "info" | "help info" => info::COMMANDS.iter().map(first_name).collect(),
            other => self.arguments_of(word(other).0),
        };
        all.retain(|w| w.starts_with(part));
        all.sort();
        all.dedup();
        (at, all)
    }

    /// Words that a command may be given.
    fn arguments_of(&self, command: &str) -> Vec<String> {
        let ids =
            |f: fn(&machine::Machine) -> Vec<String>| self.context.machine(move |m| f(m)).unwrap_or_default();
        match command {
            "device_add" => ::devices::models().iter().flat_map(|m| m.names()).collect(),
            "device_del" => ids(|m| m.devices().into_iter().filter_map(|b| b.id).collect()),
            "object_add" => machine::objects::KINDS.iter().map(|k| k.name.to_owned()).collect(),
            "object_del" => ids(|m| m.objects().iter().filter_map(|b| b.id.clone()).collect()),
            _ => Vec::new(),
        }
    }
}

fn first_name(e: &Entry) -> String {
    e.names.split('|').next().unwrap_or_default().into()
}

fn find(groups: &[&'static [Entry]], name: &str) -> Option<&'static Entry> {
    groups.iter().flat_map(|g| g.iter()).find(|e| e.names.split('|').any(|n| n == name))
}

fn described(e: &Entry, prefix: &str) -> String {
    format!("{prefix}{} {} -- {}\n", e.names, e.args, e.about)
}

fn list(entries: &[Entry], prefix: &str) -> String {
    entries.iter().map(|e| described(e, prefix)).collect()
}

fn unknown(shown: &str, groups: &[&'static [Entry]], name: &str) -> String {
    let names: Vec<&str> = groups.iter().flat_map(|g| g.iter()).flat_map(|e| e.names.split('|')).collect();
    let near = base::nearest(name, names).map(|n| format!("; did you mean '{n}'?")).unwrap_or_default();
    format!("unknown command: '{shown}'{near}\n")
}

/// First word and the rest.
fn word(text: &str) -> (&str, &str) {
    let text = text.trim();
    match text.split_once(char::is_whitespace) {
        Some((first, rest)) => (first, rest.trim()),
        None => (text, ""),
    }
}

/// Command and arguments: a format may follow the name without a space (`x/4xw 0`).
fn split(line: &str) -> (&str, &str) {
    let (name, rest) = word(line);
    match name.find('/') {
        Some(i) if i > 0 => (&name[..i], line[i..].trim()),
        _ => (name, rest),
    }
}

/// Takes the quotes off a word.
fn unquote(text: &str) -> String {
    let text = text.trim();
    match text.strip_prefix('"').and_then(|t| t.strip_suffix('"')) {
        Some(inner) => inner.replace("\\\"", "\"").replace("\\\\", "\\"),
        None => text.into(),
    }
}

/// Requires a word.
fn need<'t>(text: &'t str, what: &str) -> Result<&'t str> {
    if text.is_empty() { Err(Error::generic(format!("Parameter '{what}' is missing"))) } else { Ok(text) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn words() {
        assert_eq!(split("x/4xw 0x10"), ("x", "/4xw 0x10"));
        assert_eq!(split("x /4xw 0x10"), ("x", "/4xw 0x10"));
        assert_eq!(split("  info   cpus "), ("info", "cpus"));
        assert_eq!(unquote("\"a b\""), "a b");
        assert!(unknown("stpo", GROUPS, "stpo").contains("did you mean 'stop'"));
    }

    #[test]
    fn names_are_unique() {
        for groups in [GROUPS, &[info::COMMANDS]] {
            let mut seen = HashSet::new();
            for name in groups.iter().flat_map(|g| g.iter()).flat_map(|e| e.names.split('|')) {
                assert!(seen.insert(name), "{name} twice");
            }
        }
    }
}
