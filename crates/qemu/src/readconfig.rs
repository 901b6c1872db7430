//! `-readconfig`: options in a file of sections.
//!
//! `[device "net0"]` and lines `key = "value"` say the same as `-device id=net0,key=value`.

use crate::command::{Command, Props};
use crate::options;
use crate::{Error, Result};

/// Applies the sections of `text`.
pub(crate) fn apply(command: &mut Command, text: &str) -> Result<()> {
    let mut section: Option<(String, Props, usize)> = None;
    for (i, line) in text.lines().enumerate() {
        let number = i + 1;
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(head) = line.strip_prefix('[') {
            if let Some(done) = section.take() {
                finish(command, done)?;
            }
            let head = head.strip_suffix(']').ok_or_else(|| bad(number, "expected ]"))?;
            let (group, id) = match head.split_once(char::is_whitespace) {
                Some((group, id)) => {
                    (group, Some(unquote(id.trim()).ok_or_else(|| bad(number, "expected \"ID\""))?))
                }
                None => (head, None),
            };
            let mut props = Props::new();
            if let Some(id) = id {
                props.insert("id".into(), id.into());
            }
            section = Some((group.into(), props, number));
            continue;
        }
        let (key, value) = line.split_once('=').ok_or_else(|| bad(number, "expected key = \"value\""))?;
        let value = unquote(value.trim()).ok_or_else(|| bad(number, "expected a value in double quotes"))?;
        match &mut section {
            Some((_, props, _)) => props.insert(key.trim().into(), value.into()),
            None => return Err(bad(number, "no section was begun: expected [GROUP \"ID\"]")),
        };
    }
    match section {
        Some(done) => finish(command, done),
        None => Ok(()),
    }
}

fn bad(line: usize, what: &str) -> Error {
    Error::new(format!("line {line}: {what}"))
}

fn unquote(text: &str) -> Option<&str> {
    text.strip_prefix('"')?.strip_suffix('"')
}

fn finish(command: &mut Command, (group, props, line): (String, Props, usize)) -> Result<()> {
    let option = match group.as_str() {
        "memory" => "m",
        "smp-opts" => "smp",
        "boot-opts" => "boot",
        other => other,
    };
    let option = options::find(option).ok_or_else(|| {
        let near = base::nearest(&group, options::OPTIONS.iter().map(|o| o.name));
        let near = near.map(|n| format!("; did you mean '{n}'?")).unwrap_or_default();
        bad(line, &format!("there is no group '{group}'{near}"))
    })?;
    // As text, so that there is one way to read options.
    let text: Vec<String> =
        props.iter().map(|(k, v)| format!("{k}={}", crate::command::text(v).replace(',', ",,"))).collect();
    command.apply(option, &text.join(",")).map_err(|e| bad(line, &e.to_string()))
}
