//! Character devices.

use super::{Class, Command, Empty, Error, Result, command};
use crate::Context;
use crate::context::{CharEntry, lock};
use base::props::Bag;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub(super) const COMMANDS: &[Command] = &[
    command!("query-chardev", query),
    command!("query-chardev-backends", backends),
    command!("chardev-add", add),
    command!("chardev-remove", remove),
    command!("ringbuf-read", ringbuf_read),
    command!("ringbuf-write", ringbuf_write),
];

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Info {
    label: String,
    filename: String,
    frontend_open: bool,
}

fn query(c: &Context, _: Empty) -> Result<Vec<Info>> {
    let all = lock(&c.chardevs);
    Ok(all
        .iter()
        .map(|(label, entry)| Info {
            label: label.clone(),
            filename: entry.chardev.filename(),
            frontend_open: entry.used,
        })
        .collect())
}

#[derive(Serialize, JsonSchema)]
struct BackendName {
    name: &'static str,
}

fn backends(_: &Context, _: Empty) -> Result<Vec<BackendName>> {
    Ok(chardev::KINDS.iter().map(|k| BackendName { name: k.name }).collect())
}

/// The kind and its options.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Backend {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    data: Map<String, Value>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Add {
    id: String,
    backend: Backend,
}

#[derive(Serialize, JsonSchema)]
struct Added {
    #[serde(skip_serializing_if = "Option::is_none")]
    pty: Option<String>,
}

/// QMP names some members otherwise than the command line, and nests socket addresses.
fn bag(id: &str, backend: Backend) -> Result<Bag> {
    let mut bag = Bag::new(backend.kind);
    bag.id = Some(id.into());
    for (key, value) in backend.data {
        match (key.as_str(), value) {
            ("addr", Value::Object(address)) => {
                let kind = address.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
                let Some(Value::Object(data)) = address.get("data") else {
                    return Err(Error::generic("Parameter 'backend.data.addr.data' is missing"));
                };
                for (k, v) in data {
                    let k = if kind == "fd" && k == "str" { "fd" } else { k };
                    bag.props.insert(k.into(), v.clone());
                }
            }
            ("out", value) => {
                bag.props.insert("path".into(), value);
            }
            ("in", value) => {
                bag.props.insert("input-path".into(), value);
            }
            ("device", value) => {
                bag.props.insert("path".into(), value);
            }
            (_, value) => {
                bag.props.insert(key, value);
            }
        }
    }
    if bag.driver == "socket" {
        // QMP's default is to listen; it never waits unless asked to.
        bag.props.entry("server").or_insert(Value::Bool(true));
        if bag.props.get("server") == Some(&Value::Bool(true)) {
            bag.props.entry("wait").or_insert(Value::Bool(false));
        }
    }
    Ok(bag)
}

fn add(c: &Context, mut a: Add) -> Result<Added> {
    if a.backend.data.get("addr").is_some_and(|v| v.get("type").and_then(Value::as_str) == Some("fd")) {
        named_fd(c, &mut a.backend)?;
    }
    let bag = bag(&a.id, a.backend)?;
    Ok(Added { pty: c.add_chardev(&a.id, &bag)? })
}

impl Context {
    /// Opens a character device for what is added later. Returns the name of the terminal, if it is a new one.
    pub(crate) fn add_chardev(&self, id: &str, bag: &Bag) -> Result<Option<String>> {
        base::props::check_id(id)?;
        if lock(&self.chardevs).contains_key(id) {
            return Err(Error::generic(format!("Chardev with id '{id}' already exists")));
        }
        let made = chardev::open(bag).map_err(|e| Error::generic(e.to_string()))?;
        let pty = made.chardev.filename().strip_prefix("pty:").map(String::from);
        lock(&self.chardevs).insert(id.into(), CharEntry { chardev: made.chardev.clone(), used: false });
        let id = id.to_owned();
        self.machine(move |m| m.add_chardev(&id, made.chardev))?;
        Ok(pty)
    }
}

/// `fd` addresses name a descriptor that `getfd` took.
fn named_fd(c: &Context, backend: &mut Backend) -> Result<()> {
    let name = backend.data.get("addr").and_then(|a| a.pointer("/data/str")).and_then(Value::as_str);
    let name = name.unwrap_or_default().to_owned();
    if name.starts_with(|c: char| c.is_ascii_digit()) {
        return Ok(());
    }
    let fd = lock(&c.fds).named.remove(&name);
    let fd = fd.ok_or_else(|| Error::generic(format!("File descriptor named '{name}' not found")))?;
    backend.data["addr"]["data"]["str"] = std::os::fd::IntoRawFd::into_raw_fd(fd).to_string().into();
    Ok(())
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Remove {
    id: String,
}

fn remove(c: &Context, a: Remove) -> Result<Empty> {
    {
        let mut all = lock(&c.chardevs);
        match all.get(&a.id) {
            None => return Err(Error::generic(format!("Chardev '{}' not found", a.id))),
            Some(entry) if entry.used => {
                return Err(Error::generic(format!("Chardev '{}' is busy", a.id)));
            }
            Some(_) => all.remove(&a.id),
        };
    }
    c.machine(move |m| m.remove_chardev(&a.id))?;
    Ok(Empty {})
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum DataFormat {
    #[default]
    Utf8,
    Base64,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Read {
    device: String,
    size: u64,
    #[serde(default)]
    format: DataFormat,
}

fn ring(c: &Context, id: &str) -> Result<std::sync::Arc<dyn bus::Chardev>> {
    let all = lock(&c.chardevs);
    let entry =
        all.get(id).ok_or_else(|| Error::of(Class::GenericError, format!("Device '{id}' not found")))?;
    match entry.chardev.read_back(0) {
        Some(_) => Ok(entry.chardev.clone()),
        None => Err(Error::generic(format!("{id} is not a ringbuf device"))),
    }
}

fn ringbuf_read(c: &Context, a: Read) -> Result<String> {
    let size = usize::try_from(a.size).unwrap_or(usize::MAX);
    let data = ring(c, &a.device)?.read_back(size).unwrap_or_default();
    Ok(match a.format {
        DataFormat::Utf8 => String::from_utf8_lossy(&data).into_owned(),
        DataFormat::Base64 => base64(&data),
    })
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Write {
    device: String,
    data: String,
    #[serde(default)]
    format: DataFormat,
}

fn ringbuf_write(c: &Context, a: Write) -> Result<Empty> {
    let data = match a.format {
        DataFormat::Utf8 => a.data.into_bytes(),
        DataFormat::Base64 => {
            from_base64(&a.data).ok_or_else(|| Error::generic("Base64 data is not valid"))?
        }
    };
    ring(c, &a.device)?.write(&data);
    Ok(Empty {})
}

const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn base64(data: &[u8]) -> String {
    let mut out = String::new();
    for chunk in data.chunks(3) {
        let n = chunk.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = DIGITS[(n >> (18 - 6 * i) & 63) as usize];
            out.push(if i <= chunk.len() { digit.into() } else { '=' });
        }
    }
    out
}

fn from_base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end();
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let mut out = Vec::new();
    let digits = text.trim_end_matches('=');
    if text.len() - digits.len() > 2 {
        return None;
    }
    for chunk in digits.as_bytes().chunks(4) {
        let mut n = 0;
        for b in chunk {
            n = n << 6 | DIGITS.iter().position(|d| d == b)? as u32;
        }
        n <<= 6 * (4 - chunk.len());
        out.extend_from_slice(&n.to_be_bytes()[1..chunk.len()]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_both_ways() {
        for (plain, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(plain.as_bytes()), text);
            assert_eq!(from_base64(text).unwrap(), plain.as_bytes());
        }
        for bad in ["Z", "Zg=", "Z===", "Z!==", "===="] {
            assert!(from_base64(bad).is_none_or(|v| v.is_empty() && bad != "Z!=="), "{bad}");
        }
    }

    #[test]
    fn qmp_backends_become_bags() {
        let b = |text: &str| bag("a", serde_json::from_str(text).unwrap()).unwrap();
        let unix =
            b(r#"{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"/x"}},"server":true}}"#);
        assert_eq!((unix.props["path"].as_str(), &unix.props["wait"]), (Some("/x"), &Value::Bool(false)));
        let file = b(r#"{"type":"file","data":{"out":"/y","append":true}}"#);
        assert_eq!(file.props["path"], "/y");
    }
}
