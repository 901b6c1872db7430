//! Devices, objects and back ends.

use super::{Entry, entry, need, unquote};
use crate::qmp::{Error, Result};
use base::props::Bag;
use serde_json::{Value, json};

pub(super) const COMMANDS: &[Entry] = &[
    entry(
        "device_add",
        "driver[,prop=value][,...]",
        "add device, like -device on the command line",
        |s, args| {
            let args = need(args, "driver")?;
            if args == "help" || args == "?" {
                return s.run_info("qdm");
            }
            let bag = Bag::parse(args, "driver")?;
            if bag.wants_help() {
                let model = ::devices::find_model(&bag.driver)?;
                return Ok(model.all_properties().help(&bag.driver));
            }
            s.qmp("device_add", members(bag, "driver")).map(|_| String::new())
        },
    ),
    entry("device_del", "device", "remove device", |s, args| {
        s.qmp("device_del", json!({ "id": need(args, "id")? })).map(|_| String::new())
    }),
    entry("object_add", "type,id=id[,prop=value][,...]", "create QOM object", |s, args| {
        let bag = Bag::parse(need(args, "object")?, "qom-type")?;
        s.qmp("object-add", members(bag, "qom-type")).map(|_| String::new())
    }),
    entry("object_del", "id", "destroy QOM object", |s, args| {
        s.qmp("object-del", json!({ "id": need(args, "id")? })).map(|_| String::new())
    }),
    entry("chardev-add", "backend,id=id[,prop=value]", "add chardev", |s, args| {
        let bag = Bag::parse(need(args, "args")?, "backend")?;
        let id = bag.id.clone().ok_or_else(|| Error::generic("Parameter 'id' is missing"))?;
        s.context.add_chardev(&id, &bag).map(|_| String::new())
    }),
    entry("chardev-remove", "id", "remove chardev", |s, args| {
        s.qmp("chardev-remove", json!({ "id": need(args, "id")? })).map(|_| String::new())
    }),
    entry("ringbuf_read", "device size", "read from a ring buffer character device", |s, args| {
        let (device, size) = super::word(need(args, "device")?);
        let size: u64 = need(size, "size")?.parse().map_err(|_| Error::generic("size is no number"))?;
        let text = s.qmp("ringbuf-read", json!({ "device": device, "size": size }))?;
        Ok(format!("{}\n", text.as_str().unwrap_or_default()))
    }),
    entry("ringbuf_write", "device data", "write to a ring buffer character device", |s, args| {
        let (device, data) = super::word(need(args, "device")?);
        s.qmp("ringbuf-write", json!({ "device": device, "data": unquote(data) })).map(|_| String::new())
    }),
    entry("qom-list", "path", "list QOM properties", |s, args| {
        let all = s.qmp("qom-list", json!({ "path": need(args, "path")? }))?;
        let line = |p: &Value| {
            let get = |k: &str| p.get(k).and_then(Value::as_str).unwrap_or_default();
            format!("{} ({})\n", get("name"), get("type"))
        };
        Ok(all.as_array().into_iter().flatten().map(line).collect())
    }),
    entry("qom-get", "path property", "print QOM property", |s, args| {
        let (path, property) = super::word(need(args, "path")?);
        let value = s.qmp("qom-get", json!({ "path": path, "property": need(property, "property")? }))?;
        Ok(format!("{value:#}\n"))
    }),
    entry("qom-set", "path property value", "set QOM property", |s, args| {
        let (path, rest) = super::word(need(args, "path")?);
        let (property, value) = super::word(need(rest, "property")?);
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(unquote(value)));
        s.qmp("qom-set", json!({ "path": path, "property": property, "value": value })).map(|_| String::new())
    }),
];

/// A bag as QMP's arguments.
fn members(bag: Bag, kind: &str) -> Value {
    let mut map = bag.props;
    map.insert(kind.into(), bag.driver.into());
    if let Some(id) = bag.id {
        map.insert("id".into(), id.into());
    }
    Value::Object(map)
}

impl super::Shell<'_> {
    /// Runs an `info` command.
    pub(super) fn run_info(&mut self, name: &str) -> Result<String> {
        match super::find(&[super::info::COMMANDS], name) {
            Some(e) => (e.run)(self, ""),
            None => Err(Error::generic(format!("there is no 'info {name}'"))),
        }
    }
}
