//! `ide-hd` and `ide-cd`: what a user plugs into a SATA port or an IDE channel.

use super::{AtaDrive, AtaIdentity};
use crate::model::{CreateError, Kind, Model, Parts};
use crate::place::ChildBus;
use crate::storage::DriveSpec;
use crate::storage::scsi::{Lun, LunIdentity, LunKind, boot_class, open_drive};
use base::props::{Bag, Properties};
use schemars::JsonSchema;
use serde::Deserialize;
use std::sync::Arc;

/// An ATA disk.
pub const HD: Model = Model {
    name: "ide-hd",
    about: "ATA disk, for SATA ports and IDE channels",
    properties: Properties::of::<Spec>,
    kind: Kind::Child { bus: "IDE", create: |bag, parts, bus| create(bag, parts, bus, false) },
};

/// An ATAPI CD-ROM drive.
pub const CD: Model = Model {
    name: "ide-cd",
    about: "ATAPI CD-ROM drive, for SATA ports and IDE channels",
    properties: Properties::of::<Spec>,
    kind: Kind::Child { bus: "IDE", create: |bag, parts, bus| create(bag, parts, bus, true) },
};

/// Properties of `ide-hd` and `ide-cd`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Spec {
    /// The drive.
    #[serde(flatten)]
    pub drive: DriveSpec,
    /// Place in the order in which firmware boots; lower comes first.
    pub bootindex: Option<u32>,
    /// Connector: 0 (master) or 1 (slave, on IDE channels); the first free one if not given.
    pub unit: Option<u8>,
    /// Model that the guest sees, up to 40 characters.
    pub model: Option<String>,
    /// Firmware revision that the guest sees, up to 8 characters.
    pub ver: Option<String>,
}

/// Longest serial number (ACS-3, 7.12.7.10).
const SERIAL: usize = 20;

fn create(bag: &Bag, parts: &mut dyn Parts, bus: &ChildBus, cdrom: bool) -> Result<(), CreateError> {
    let ChildBus::Ide(bus) = bus else {
        return Err(CreateError::Other(format!("{}: not an IDE bus", bag.driver)));
    };
    let spec: Spec = bag.spec()?;
    let bad = |text: String| Err(CreateError::Other(format!("{}: {text}", bag.driver)));
    spec.drive.check(&bag.driver, SERIAL)?;
    if !cdrom && spec.drive.block_size() != 512 {
        return bad(format!(
            "logical_block_size={} is not possible: ATA disks have 512",
            spec.drive.block_size()
        ));
    }
    for (name, value, most) in [("model", &spec.model, 40), ("ver", &spec.ver, 8)] {
        if value.as_ref().is_some_and(|v| v.len() > most || !v.is_ascii()) {
            return bad(format!("{name}= takes up to {most} ASCII characters"));
        }
    }
    let place = match spec.unit {
        Some(unit) => usize::from(unit),
        None => match bus.free() {
            Some(place) => place,
            None => return bad("the bus is full; name another with bus=".into()),
        },
    };
    if place >= bus.places() || bus.drive(place).is_some() {
        return bad(format!("unit={place} is taken, or there is no such connector"));
    }
    let drive = open_drive(bag, &spec.drive, parts, cdrom)?;
    let number = bus_number();
    let identity = AtaIdentity {
        model: spec.model.unwrap_or_else(|| if cdrom { "QEMU DVD-ROM" } else { "QEMU HARDDISK" }.into()),
        serial: spec.drive.serial.clone().unwrap_or_else(|| format!("QM{number:05}")),
        firmware: spec.ver.unwrap_or_else(|| "2.5+".into()),
        wwn: spec.drive.wwn,
    };
    let drive = if cdrom {
        let unit = LunIdentity {
            vendor: "QEMU".into(),
            product: identity.model.chars().take(16).collect(),
            version: identity.firmware.chars().take(4).collect(),
            serial: spec.drive.serial.clone(),
            device_id: drive.name().into(),
            wwn: spec.drive.wwn,
        };
        AtaDrive::cdrom(Lun::new(LunKind::Cdrom, drive, unit), identity)
    } else {
        AtaDrive::disk(drive, identity)
    };
    if !bus.attach(place, &Arc::new(drive)) {
        return bad("the connector is taken".into());
    }
    parts.bootable(boot_class(cdrom), spec.bootindex, &format!("drive@{:x}/disk@{place:x}", bus.number()));
    Ok(())
}

/// Serial numbers of drives that are given none count up, as QEMU's do.
fn bus_number() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
