//! `--disk` and `--cdrom`: a file, the bus it goes on, and the properties of image and drive.

use crate::Failure;
use base::nearest;
use base::props::{Bag, Properties, parse_keyval};
use machine::blueprint::{BlockSpec, Blueprint};
use serde_json::Value;

/// What a disk can be plugged into: name, model of a disk, model of a CD-ROM drive.
const BUSES: [(&str, Option<&str>, Option<&str>); 6] = [
    ("virtio", Some("virtio-blk"), None),
    ("scsi", Some("scsi-hd"), Some("scsi-cd")),
    ("sata", Some("ide-hd"), Some("ide-cd")),
    ("ide", Some("ide-hd"), Some("ide-cd")),
    ("nvme", Some("nvme"), None),
    ("none", None, None),
];

/// Properties that concern both the image and the drive.
const SHARED: [&str; 1] = ["discard"];

fn same(a: &str, b: &str) -> bool {
    a.replace('_', "-") == b.replace('_', "-")
}

/// Adds a disk (or with `cdrom` a CD-ROM drive) to the blueprint, and the controller that it needs.
pub(super) fn add(blueprint: &mut Blueprint, text: &str, cdrom: bool) -> Result<(), Failure> {
    let option = if cdrom { "--cdrom" } else { "--disk" };
    let mut props = parse_keyval(text, "file")?;
    let mut take = |key: &str| match props.remove(key) {
        Some(Value::String(s)) => Some(s),
        _ => None,
    };
    let number = blueprint.blockdevs.len();
    let id = take("id").unwrap_or_else(|| format!("{}{number}", if cdrom { "cd" } else { "disk" }));
    let sata = blueprint.machine.driver == "q35";
    let default = match (cdrom, sata) {
        (false, _) => "virtio",
        (true, true) => "sata",
        (true, false) => "ide",
    };
    let bus = take("bus").unwrap_or_else(|| default.into());
    let Some((_, disk, cd)) = BUSES.iter().find(|(name, ..)| *name == bus) else {
        let names: Vec<&str> = BUSES.iter().map(|(name, ..)| *name).collect();
        let near = nearest(&bus, names.iter().copied()).map(|n| format!("; did you mean '{n}'?"));
        return Err(Failure::usage(format!(
            "{option} {text}: there is no bus '{bus}': use one of {}{}",
            names.join(", "),
            near.unwrap_or_default()
        )));
    };
    let model = if cdrom { cd } else { disk };
    if cdrom && model.is_none() {
        return Err(Failure::usage(format!(
            "{option} {text}: a CD-ROM drive goes on scsi, sata or ide, not on {bus}"
        )));
    }
    let known = Properties::of::<BlockSpec>();
    let mut image = Bag { driver: "blockdev".into(), id: Some(id.clone()), ..Bag::default() };
    let mut device = Bag::new(model.unwrap_or("none"));
    for (key, value) in props {
        let of_image = known.names().any(|n| same(n, &key));
        if of_image {
            image.props.insert(key.clone(), value.clone());
        }
        if !of_image || SHARED.iter().any(|s| same(s, &key)) {
            device.props.insert(key, value);
        }
    }
    if cdrom {
        image.props.entry("read-only").or_insert(Value::Bool(true));
    }
    image.spec::<BlockSpec>()?;
    blueprint.blockdevs.push(image);
    let Some(_) = model else {
        let of_image = |key: &String| SHARED.iter().any(|s| same(s, key));
        return match device.props.keys().find(|k| !of_image(k)) {
            Some(key) => Err(Failure::usage(format!(
                "{option} {text}: {key}= is of a device, but with bus=none there is none"
            ))),
            None => Ok(()),
        };
    };
    if let Some((controller, bus_name)) = controller(blueprint, &bus) {
        if !blueprint.devices.iter().any(|d| d.id.as_deref() == Some(bus_name)) {
            let bag = Bag { driver: controller.into(), id: Some(bus_name.into()), ..Bag::default() };
            blueprint.devices.push(bag);
        }
        // A SATA port takes one drive: which one is free is the machine's to find.
        if bus == "scsi" {
            device.props.insert("bus".into(), format!("{bus_name}.0").into());
        }
    }
    blueprint.devices.push(device.with("drive", id));
    Ok(())
}

/// The controller that a bus needs and the machine does not have by itself, and the name it is given.
fn controller(blueprint: &Blueprint, bus: &str) -> Option<(&'static str, &'static str)> {
    match (bus, blueprint.machine.driver.as_str()) {
        ("scsi", _) => Some(("virtio-scsi", "scsi")),
        ("sata", "q35") | ("ide", "pc") => None,
        ("sata", _) => Some(("ich9-ahci", "sata")),
        ("ide", _) => Some(("piix3-ide", "ide")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(machine: &str, text: &str, cdrom: bool) -> Result<Blueprint, String> {
        let mut blueprint = Blueprint { machine: Bag::new(machine), ..Blueprint::default() };
        add(&mut blueprint, text, cdrom).map_err(|f| f.message)?;
        Ok(blueprint)
    }

    #[test]
    fn properties_find_their_owner() {
        let b = plan("q35", "a.img,bus=scsi,serial=X1,format=raw,werror=stop,discard=off", false).unwrap();
        assert_eq!(
            b.devices.iter().map(|d| d.driver.as_str()).collect::<Vec<_>>(),
            ["virtio-scsi", "scsi-hd"]
        );
        let disk = &b.devices[1].props;
        assert_eq!((disk["serial"].as_str(), disk["bus"].as_str()), (Some("X1"), Some("scsi.0")));
        assert!(!disk.contains_key("format") && disk.contains_key("discard"));
        assert_eq!(b.blockdevs[0].props["format"], "raw");
        let b = plan("q35", "a.iso", true).unwrap();
        assert_eq!((b.devices.len(), b.devices[0].driver.as_str()), (1, "ide-cd"));
        assert_eq!(b.blockdevs[0].props["read-only"], true);
        assert_eq!(plan("q35", "a.img,bus=ide", false).unwrap().devices[0].driver, "piix3-ide");
        assert_eq!(plan("q35", "a.img,bus=none,id=d0", false).unwrap().devices.len(), 0);
    }

    #[test]
    fn mistakes_are_named() {
        assert!(plan("q35", "a.img,bus=stata", false).unwrap_err().contains("did you mean 'sata'?"));
        assert!(plan("q35", "a.iso,bus=virtio", true).unwrap_err().contains("scsi, sata or ide"));
        assert!(plan("q35", "a.img,bus=none,serial=1", false).unwrap_err().contains("serial="));
    }
}
