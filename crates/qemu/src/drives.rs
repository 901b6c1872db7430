//! `-drive` and its short forms: disk images and the devices they are connected to.

use crate::command::{Props, finish, take, take_switch, text};
use crate::translate::Plan;
use crate::{Error, Result};
use base::props::Bag;
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
    let mut device = device_of(&plan.blueprint.machine.driver, &interface, &media, n).map_err(at)?;
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
            if interface == "pflash" {
                let firmware = &mut plan.blueprint.firmware;
                match n {
                    0 => firmware.kind = file,
                    1 => firmware.vars = Some(file.into()),
                    _ => return Err(at(Error::new("there are two flash chips at most"))),
                }
                for key in ["format", "readonly", "read-only", "snapshot"] {
                    p.remove(key);
                }
                return finish("drive", &p, KNOWN).map_err(at);
            }
            let bag = image(&id, file, &media, p, snapshot).map_err(at)?;
            plan.blueprint.blockdevs.push(bag);
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
fn device_of(board: &str, interface: &str, media: &str, n: u32) -> Result<Option<Bag>> {
    let unsupported = |why: &str| Err(Error::new(format!("if={interface} is not supported: {why}")));
    Ok(match (interface, media) {
        ("none" | "pflash", _) => None,
        ("virtio", "disk") => Some(Bag::new("virtio-blk-pci")),
        ("virtio", _) => return unsupported("a CD-ROM needs if=ide or if=scsi"),
        ("ide", _) => {
            let driver = if media == "disk" { "ide-hd" } else { "ide-cd" };
            // SATA has one device on each bus, IDE two.
            Some(match board {
                "q35" => Bag::new(driver).with("bus", format!("ide.{n}")),
                _ => Bag::new(driver).with("bus", format!("ide.{}", n / 2)).with("unit", n % 2),
            })
        }
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
