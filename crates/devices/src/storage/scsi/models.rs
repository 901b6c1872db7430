//! `scsi-hd` and `scsi-cd`: what a user plugs into a SCSI controller.

use super::{Lun, LunAddress, LunIdentity, LunKind, ScsiBus};
use crate::model::{CreateError, Kind, Model, Parts};
use crate::place::{BootClass, ChildBus};
use crate::storage::{Drive, DriveSpec};
use base::props::{Bag, Properties};
use schemars::JsonSchema;
use serde::Deserialize;
use std::sync::Arc;

/// A SCSI disk.
pub const HD: Model = Model {
    name: "scsi-hd",
    about: "SCSI disk",
    properties: Properties::of::<Spec>,
    kind: Kind::Child { bus: "SCSI", create: |bag, parts, bus| create(bag, parts, bus, LunKind::Disk) },
};

/// A SCSI CD-ROM drive.
pub const CD: Model = Model {
    name: "scsi-cd",
    about: "SCSI CD-ROM drive",
    properties: Properties::of::<Spec>,
    kind: Kind::Child { bus: "SCSI", create: |bag, parts, bus| create(bag, parts, bus, LunKind::Cdrom) },
};

/// Properties of `scsi-hd` and `scsi-cd`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Spec {
    /// The drive.
    #[serde(flatten)]
    pub drive: DriveSpec,
    /// Place in the order in which firmware boots; lower comes first.
    pub bootindex: Option<u32>,
    /// Channel; there is only channel 0.
    pub channel: u32,
    /// Target, 0 to 255; the first free one if not given.
    #[serde(rename = "scsi-id")]
    pub scsi_id: Option<u16>,
    /// Logical unit number, 0 to 16383; 0 if not given.
    pub lun: Option<u16>,
    /// Vendor that the guest sees, up to 8 characters.
    pub vendor: Option<String>,
    /// Product that the guest sees, up to 16 characters.
    pub product: Option<String>,
    /// Revision that the guest sees, up to 4 characters.
    pub ver: Option<String>,
    /// Name in the device identification page; the serial number or id if not given.
    pub device_id: Option<String>,
}

/// Longest serial number (SPC-4 leaves it open; this is what initiators take).
const SERIAL: usize = 36;

fn create(bag: &Bag, parts: &mut dyn Parts, bus: &ChildBus, kind: LunKind) -> Result<(), CreateError> {
    let ChildBus::Scsi(bus) = bus else {
        return Err(CreateError::Other(format!("{}: not a SCSI bus", bag.driver)));
    };
    let spec: Spec = bag.spec()?;
    let model = bag.driver.as_str();
    let bad = |text: String| Err(CreateError::Other(format!("{model}: {text}")));
    spec.drive.check(model, SERIAL)?;
    for (name, value, most) in
        [("vendor", &spec.vendor, 8), ("product", &spec.product, 16), ("ver", &spec.ver, 4)]
    {
        if value.as_ref().is_some_and(|v| v.len() > most || !v.is_ascii()) {
            return bad(format!("{name}= takes up to {most} ASCII characters"));
        }
    }
    if spec.channel != 0 {
        return bad(format!("channel={} does not exist; there is only channel 0", spec.channel));
    }
    let address = place(bus, &spec).map_err(|text| CreateError::Other(format!("{model}: {text}")))?;
    let drive = open_drive(bag, &spec.drive, parts, kind == LunKind::Cdrom)?;
    let product = if kind == LunKind::Disk { "QEMU HARDDISK" } else { "QEMU CD-ROM" };
    let identity = LunIdentity {
        vendor: spec.vendor.unwrap_or_else(|| "QEMU".into()),
        product: spec.product.unwrap_or_else(|| product.into()),
        version: spec.ver.unwrap_or_else(|| "2.5+".into()),
        device_id: spec
            .device_id
            .or_else(|| spec.drive.serial.clone())
            .unwrap_or_else(|| drive.name().into()),
        serial: spec.drive.serial,
        wwn: spec.drive.wwn,
    };
    let lun = Arc::new(Lun::new(kind, drive, identity));
    if bus.attach(address, &lun) {
        let path = format!("channel@0/disk@{:x},{:x}", address.target, address.lun);
        parts.bootable(boot_class(kind == LunKind::Cdrom), spec.bootindex, &path);
        return Ok(());
    }
    bad(format!("scsi-id={},lun={} is taken or impossible", address.target, address.lun))
}

fn place(bus: &ScsiBus, spec: &Spec) -> Result<LunAddress, String> {
    let target = match spec.scsi_id {
        Some(target) => target,
        None => bus.free_target().ok_or("no target is free on this bus")?,
    };
    if target > ScsiBus::MAX_TARGET {
        return Err(format!("scsi-id={target} is above {}", ScsiBus::MAX_TARGET));
    }
    let lun = spec.lun.unwrap_or(0);
    if lun > ScsiBus::MAX_LUN {
        return Err(format!("lun={lun} is above {}", ScsiBus::MAX_LUN));
    }
    let address = LunAddress { target, lun };
    if bus.unit(address).is_some() {
        return Err(format!("scsi-id={target},lun={lun} is taken; choose another"));
    }
    Ok(address)
}

/// What firmware takes a drive for.
pub(in crate::storage) fn boot_class(cdrom: bool) -> BootClass {
    if cdrom { BootClass::Cdrom } else { BootClass::Disk }
}

/// Opens the drive that a bag describes: a disk needs an image, a CD-ROM drive may be empty.
pub(in crate::storage) fn open_drive(
    bag: &Bag,
    spec: &DriveSpec,
    parts: &mut dyn Parts,
    cdrom: bool,
) -> Result<Arc<Drive>, CreateError> {
    let name = bag.id.clone().filter(|id| !id.is_empty());
    let name =
        name.unwrap_or_else(|| if spec.drive.is_empty() { bag.driver.clone() } else { spec.drive.clone() });
    if spec.drive.is_empty() && !cdrom {
        return Err(CreateError::Other(format!("{}: drive= is missing; name a disk image", bag.driver)));
    }
    let image = if spec.drive.is_empty() { None } else { Some(parts.take_drive(&spec.drive)?) };
    let system = parts.system().clone();
    let drive = match image {
        Some(image) if !cdrom => {
            if !image.size().is_multiple_of(spec.block_size().into()) {
                return Err(CreateError::Other(format!(
                    "{}: the size of '{}', {} bytes, is not a multiple of logical_block_size={}",
                    bag.driver,
                    spec.drive,
                    image.size(),
                    spec.block_size()
                )));
            }
            Drive::disk(&name, spec, image, system)
        }
        image => Drive::cdrom(&name, spec, image, system),
    };
    let drive = Arc::new(drive);
    parts.offer_drive(&drive);
    Ok(drive)
}
