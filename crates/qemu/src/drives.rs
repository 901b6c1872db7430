//! `-drive` and its short forms, and `-blockdev`: disk images and the devices they are connected to.

use crate::command::{Props, finish, take, take_switch, text};
use crate::translate::Plan;
use crate::{Error, Result};
use base::props::Bag;
use serde_json::Value;
use std::collections::BTreeMap;

/// Options of `-drive` that are passed on to the image by QEMU's own names.
const THROTTLE: &[(&str, &str)] = &[
    ("bps", "throttling.bps-total"),
    ("bps_rd", "throttling.bps-read"),
    ("bps_wr", "throttling.bps-write"),
    ("iops", "throttling.iops-total"),
    ("iops_rd", "throttling.iops-read"),
    ("iops_wr", "throttling.iops-write"),
    ("bps_max", "throttling.bps-total-max"),
    ("bps_rd_max", "throttling.bps-read-max"),
    ("bps_wr_max", "throttling.bps-write-max"),
    ("iops_max", "throttling.iops-total-max"),
    ("iops_rd_max", "throttling.iops-read-max"),
    ("iops_wr_max", "throttling.iops-write-max"),
    ("iops_size", "throttling.iops-size"),
];

const KNOWN: &[&str] = &[
    "file",
    "if",
    "format",
    "media",
    "index",
    "bus",
    "unit",
    "id",
    "snapshot",
    "cache",
    "aio",
    "discard",
    "detect-zeroes",
    "readonly",
    "read-only",
    "copy-on-read",
    "werror",
    "rerror",
    "serial",
    "auto-read-only",
    "bps",
    "iops",
];

/// Where a drive without `if=` goes, by board.
fn default_interface(plan: &Plan) -> &'static str {
    match plan.blueprint.machine.driver.as_str() {
        "microvm" => "virtio",
        _ => "ide",
    }
}

/// Numbers drives of one kind as QEMU does.
#[derive(Default)]
pub(crate) struct Numbers(BTreeMap<String, u32>);

impl Numbers {
    fn next(&mut self, interface: &str, index: Option<u32>) -> u32 {
        let next = self.0.entry(interface.into()).or_default();
        let n = index.unwrap_or(*next);
        *next = (*next).max(n + 1);
        n
    }
}

/// Adds one drive.
pub(crate) fn drive(plan: &mut Plan, numbers: &mut Numbers, mut p: Props, snapshot: bool) -> Result<()> {
    let shown = p.iter().map(|(k, v)| format!("{k}={}", text(v))).collect::<Vec<_>>().join(",");
    let at = |e: Error| Error::new(format!("-drive {shown}: {e}"));
    let interface = take(&mut p, "if").unwrap_or_else(|| default_interface(plan).into());
    let media = take(&mut p, "media").unwrap_or_else(|| "disk".into());
    let number = |p: &mut Props, key: &str| match take(p, key) {
        None => Ok(None),
        Some(t) => t.parse::<u32>().map(Some).map_err(|_| Error::new(format!("{key}={t} is not a number"))),
    };
    if !["disk", "cdrom"].contains(&media.as_str()) {
        return Err(at(Error::new(format!("'{media}' invalid media: use disk or cdrom"))));
    }
    let (bus, unit) = (number(&mut p, "bus").map_err(at)?, number(&mut p, "unit").map_err(at)?);
    let index = number(&mut p, "index").map_err(at)?;
    let index =
        index.or_else(|| (bus.is_some() || unit.is_some()).then(|| bus.unwrap_or(0) * 2 + unit.unwrap_or(0)));
    let n = numbers.next(&interface, index);
    let given = take(&mut p, "id");
    let id = given.clone().unwrap_or_else(|| {
        let kind = if media == "cdrom" { "-cd" } else { "-hd" };
        match interface.as_str() {
            "virtio" => format!("virtio{n}"),
            "none" => format!("none{n}"),
            other => format!("{other}{}{kind}{}", n / 2, n % 2),
        }
    });
    let file = take(&mut p, "file").filter(|f| !f.is_empty());
    let mut device = device_of(&interface, &media, n).map_err(at)?;
    for key in ["werror", "rerror", "serial"] {
        if let Some(value) = take(&mut p, key) {
            match &mut device {
                Some(d) => d.props.insert(key.into(), value.into()),
                None => return Err(at(Error::new(format!("{key}= belongs to the -device")))),
            };
        }
    }
    match file {
        Some(file) => {
            let bag = image(&id, file, &media, p, snapshot).map_err(at)?;
            plan.blueprint.blockdevs.push(bag);
            if interface == "pflash" {
                return Err(at(Error::new("if=pflash: give firmware by -bios")));
            }
            if let Some(device) = device {
                plan.blueprint.devices.push(device.with("drive", id));
            }
        }
        None if media == "cdrom" || interface == "floppy" => {
            if let Some(device) = device {
                plan.blueprint.devices.push(device);
            }
        }
        None => return Err(at(Error::new("no file= is given"))),
    }
    Ok(())
}

/// The device that a drive without `-device` gets.
fn device_of(interface: &str, media: &str, n: u32) -> Result<Option<Bag>> {
    let unsupported = |why: &str| Err(Error::new(format!("if={interface} is not supported: {why}")));
    Ok(match (interface, media) {
        ("none" | "pflash", _) => None,
        ("virtio", "disk") => Some(Bag::new("virtio-blk-pci")),
        ("virtio", _) => return unsupported("a CD-ROM needs if=ide or if=scsi"),
        ("ide", "disk") => Some(Bag::new("ide-hd").with("bus", format!("ide.{}", n / 2)).with("unit", n % 2)),
        ("ide", _) => Some(Bag::new("ide-cd").with("bus", format!("ide.{}", n / 2)).with("unit", n % 2)),
        ("scsi", "disk") => Some(Bag::new("scsi-hd")),
        ("scsi", _) => Some(Bag::new("scsi-cd")),
        ("floppy", _) => return unsupported("there is no floppy controller"),
        ("sd" | "mtd" | "xen", _) => return unsupported("a PC has none; use virtio, ide, scsi or none"),
        _ => {
            return Err(Error::new(format!(
                "unsupported bus type '{interface}': use virtio, ide, scsi or none"
            )));
        }
    })
}

/// The image of a `-drive`.
fn image(id: &str, file: String, media: &str, mut p: Props, snapshot: bool) -> Result<Bag> {
    let mut bag = Bag::new("blockdev").with("file", file);
    bag.id = Some(id.into());
    if let Some(format) = take(&mut p, "format") {
        bag = bag.with("format", format);
    }
    let (old, new) = (take_switch(&mut p, "readonly")?, take_switch(&mut p, "read-only")?);
    if old.or(new).unwrap_or(media == "cdrom") {
        bag = bag.with("read-only", true);
    }
    let own = take_switch(&mut p, "snapshot")?;
    if own.unwrap_or(snapshot) && media != "cdrom" {
        bag = bag.with("snapshot", true);
    }
    if take_switch(&mut p, "copy-on-read")? == Some(true) {
        return Err(Error::new("copy-on-read=on is not supported"));
    }
    // Images are opened for writing only where that is asked for, so nothing changes by itself.
    take_switch(&mut p, "auto-read-only")?;
    if let Some(cache) = take(&mut p, "cache") {
        bag = bag.with("cache", cache);
    }
    match take(&mut p, "aio").as_deref() {
        // Each disk uses io_uring where the host has it, and threads where not.
        None | Some("threads" | "io_uring" | "native") => {}
        Some(other) => {
            return Err(Error::new(format!("aio: '{other}' is unknown: use threads, native or io_uring")));
        }
    }
    discard(&mut bag, take(&mut p, "discard"))?;
    if let Some(detect) = take(&mut p, "detect-zeroes") {
        bag = bag.with("detect-zeroes", detect);
    }
    let mut more = Vec::new();
    for (old, new) in THROTTLE {
        if let Some(value) = take(&mut p, old) {
            more.push(format!("{new}={value}"));
        }
    }
    let dotted: Vec<String> =
        p.keys().filter(|k| k.starts_with("throttling.") || k.starts_with("file.")).cloned().collect();
    for key in dotted {
        let value = take(&mut p, &key).unwrap_or_default();
        more.push(format!("{key}={}", value.replace(',', ",,")));
    }
    if !more.is_empty() {
        bag = bag.with("options", more.join(","));
    }
    finish("drive", &p, KNOWN)?;
    Ok(bag)
}

fn discard(bag: &mut Bag, value: Option<String>) -> Result<()> {
    let on = match value.as_deref() {
        None | Some("unmap" | "on") => true,
        Some("ignore" | "off") => false,
        Some(other) => {
            return Err(Error::new(format!("discard: '{other}' is unknown: use unmap or ignore")));
        }
    };
    bag.props.insert("discard".into(), on.into());
    Ok(())
}

/// Nodes of `-blockdev`, not yet images.
#[derive(Default)]
pub(crate) struct Nodes(BTreeMap<String, Bag>);

/// Drivers that are storage, not formats.
const PROTOCOLS: &[&str] = &["file", "host_device", "nbd", "null-co", "null-aio"];

impl Nodes {
    /// Takes a `-blockdev`.
    pub(crate) fn add(&mut self, bag: &Bag) -> Result<()> {
        let name = bag.props.get("node-name").map(text);
        let name =
            name.ok_or_else(|| Error::new("-blockdev: 'node-name' must be specified for the root node"))?;
        base::props::check_id(&name)?;
        if self.0.insert(name.clone(), bag.clone()).is_some() {
            return Err(Error::new(format!("-blockdev: Duplicate nodes with node-name='{name}'")));
        }
        Ok(())
    }

    /// Makes images of the nodes that no other node is built on.
    pub(crate) fn images(&self) -> Result<Vec<Bag>> {
        let used: Vec<String> = self
            .0
            .values()
            .flat_map(|b| {
                ["file", "backing"].iter().filter_map(|k| b.props.get(*k)).filter_map(Value::as_str)
            })
            .map(String::from)
            .collect();
        let top = self.0.iter().filter(|(name, _)| !used.contains(name));
        top.map(|(name, bag)| self.image(name, bag).map_err(|e| Error::new(format!("-blockdev {name}: {e}"))))
            .collect()
    }

    /// One image, from its format node and the storage node below it.
    pub(crate) fn image(&self, name: &str, bag: &Bag) -> Result<Bag> {
        let mut p = bag.props.clone();
        p.remove("node-name");
        let (format, storage) = if PROTOCOLS.contains(&bag.driver.as_str()) {
            ("raw".to_owned(), bag.clone())
        } else {
            (bag.driver.clone(), self.storage(&mut p)?)
        };
        let mut out = Bag::new("blockdev").with("file", location(&storage)?).with("format", format);
        out.id = Some(name.into());
        let read_only = take_switch(&mut p, "read-only")?;
        let below = storage.props.get("read-only").is_some_and(|v| text(v) == "on");
        if read_only.unwrap_or(below) {
            out = out.with("read-only", true);
        }
        let unmap = take(&mut p, "discard").or_else(|| storage.props.get("discard").map(text));
        discard(&mut out, unmap)?;
        if let Some(detect) = take(&mut p, "detect-zeroes") {
            out = out.with("detect-zeroes", detect);
        }
        if let Some(cache) =
            cache(p.remove("cache").or_else(|| storage.props.get("cache").cloned()), &storage.props)
        {
            out = out.with("cache", cache);
        }
        // A backing chain is the image's own; null cuts it, which an image without one does not notice.
        match p.remove("backing") {
            None | Some(Value::Null) | Some(Value::String(_)) => {}
            Some(_) => return Err(Error::new("backing= must name a node or be null")),
        }
        if PROTOCOLS.contains(&bag.driver.as_str()) {
            return Ok(out);
        }
        let mut more = Vec::new();
        for (key, value) in &p {
            if ["auto-read-only", "force-share"].contains(&key.as_str()) {
                continue;
            }
            more.push(format!("{key}={}", text(value).replace(',', ",,")));
        }
        if p.get("force-share").is_some_and(|v| text(v) == "on") {
            out = out.with("force-share", true);
        }
        if !more.is_empty() {
            out = out.with("options", more.join(","));
        }
        Ok(out)
    }

    /// The storage node under a format node: named, nested (JSON), or dotted (`file.filename=`).
    fn storage(&self, p: &mut Props) -> Result<Bag> {
        match p.remove("file") {
            Some(Value::String(name)) => self
                .0
                .get(&name)
                .cloned()
                .ok_or_else(|| Error::new(format!("Cannot find device='' nor node-name='{name}'"))),
            Some(Value::Object(mut inner)) => {
                let driver = take(&mut inner, "driver").unwrap_or_else(|| "file".into());
                Ok(Bag { driver, id: None, props: inner })
            }
            Some(_) => Err(Error::new("file= must name a node or be an object")),
            None => {
                let keys: Vec<String> = p.keys().filter(|k| k.starts_with("file.")).cloned().collect();
                let mut inner = Props::new();
                for key in keys {
                    if let Some(value) = p.remove(&key) {
                        inner.insert(key["file.".len()..].to_owned(), value);
                    }
                }
                if inner.is_empty() {
                    return Err(Error::new("A block device must be specified for \"file\""));
                }
                let driver = take(&mut inner, "driver").unwrap_or_else(|| "file".into());
                Ok(Bag { driver, id: None, props: inner })
            }
        }
    }
}

/// Name of a storage node's file or server.
fn location(storage: &Bag) -> Result<String> {
    match storage.driver.as_str() {
        "file" | "host_device" => {
            let name = storage.props.get("filename").map(text);
            name.filter(|n| !n.is_empty()).ok_or_else(|| Error::new("A block device must have a filename"))
        }
        "nbd" => {
            let get = |key: &str| {
                let nested = storage.props.get("server").and_then(|s| s.get(key)).map(text);
                nested.or_else(|| storage.props.get(&format!("server.{key}")).map(text))
            };
            let export = storage.props.get("export").map(text).unwrap_or_default();
            match (get("path"), get("host"), get("port")) {
                (Some(path), ..) => Ok(format!("nbd+unix:///{export}?socket={path}")),
                (_, Some(host), port) => {
                    Ok(format!("nbd://{host}:{}/{export}", port.unwrap_or_else(|| "10809".into())))
                }
                _ => Err(Error::new("nbd: server.path or server.host must be given")),
            }
        }
        "null-co" | "null-aio" => Ok(format!("{}://", storage.driver)),
        other => Err(Error::new(format!(
            "driver '{other}' is not supported for storage: use file, host_device or nbd"
        ))),
    }
}

/// The cache mode that `cache.direct` and `cache.no-flush` mean.
fn cache(value: Option<Value>, props: &Props) -> Option<&'static str> {
    let flag = |key: &str| {
        let nested = value.as_ref().and_then(|v| v.get(key)).map(text);
        nested.or_else(|| props.get(&format!("cache.{key}")).map(text)).is_some_and(|v| v == "on")
    };
    match (flag("direct"), flag("no-flush")) {
        (true, false) => Some("none"),
        (false, true) => Some("unsafe"),
        (true, true) => Some("unsafe"),
        (false, false) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(all: &[&str]) -> Result<Vec<Bag>> {
        let mut nodes = Nodes::default();
        for text in all {
            nodes.add(&Bag::parse(text, "driver").unwrap())?;
        }
        nodes.images()
    }

    #[test]
    fn format_over_storage_is_one_image() {
        let all = nodes(&[
            r#"{"driver":"file","filename":"a.qcow2","node-name":"s","auto-read-only":true,"discard":"unmap"}"#,
            r#"{"node-name":"f","read-only":false,"driver":"qcow2","file":"s","backing":null}"#,
        ])
        .unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].id.as_deref(), Some("f"));
        assert_eq!(
            (text(&all[0].props["file"]), text(&all[0].props["format"])),
            ("a.qcow2".into(), "qcow2".into())
        );
        let all =
            nodes(&["raw,node-name=n,file.driver=file,file.filename=b.img,read-only=on,cache.direct=on"])
                .unwrap();
        assert_eq!(all[0].props["read-only"], true);
        assert_eq!(all[0].props["cache"], "none");
        let all = nodes(&["file,node-name=p,filename=c.img"]).unwrap();
        assert_eq!(all[0].props["format"], "raw");
    }

    #[test]
    fn mistakes_in_nodes() {
        for (all, word) in [
            (vec!["qcow2,file=x"], "node-name"),
            (vec!["qcow2,node-name=a,file=x"], "node-name='x'"),
            (vec!["file,node-name=a,filename=x", "file,node-name=a,filename=y"], "Duplicate"),
            (vec!["qcow2,node-name=a"], "must be specified"),
            (vec!["ssh,node-name=a"], "must be specified"),
            (vec!["raw,node-name=a,file.driver=rbd,file.x=y"], "not supported"),
        ] {
            let e = nodes(&all).unwrap_err().to_string();
            assert!(e.contains(word), "{e}");
        }
    }
}
