//! Where a device is plugged: the properties that every PCI device has, and the buses that devices bring along.

use crate::CreateError;
use crate::storage::ata::IdeBus;
use crate::storage::nvme::NvmeBus;
use crate::storage::scsi::ScsiBus;
use crate::usb::UsbBus;
use base::props::{Bag, PropError, Properties};
use bus::pci::{PciBus, PciFunction, SharedFunction};
use bus::{RegionId, SharedDevice, Space, shared};
use schemars::JsonSchema;
use serde::Deserialize;
use std::sync::Arc;

/// A bus that a device brings along, for other devices to be plugged into.
#[derive(Clone)]
#[non_exhaustive]
pub enum ChildBus {
    /// Behind a PCI bridge or PCI Express port.
    Pci(Arc<PciBus>),
    /// A SATA port or IDE channel.
    Ide(Arc<IdeBus>),
    /// The namespaces of an NVMe controller.
    Nvme(Arc<NvmeBus>),
    /// Behind a SCSI controller.
    Scsi(Arc<ScsiBus>),
    /// The ports of a USB controller and of the hubs behind them.
    Usb(UsbBus),
}

impl ChildBus {
    /// The kind of bus, as QEMU calls it (`info qdev-tree`); models of [`crate::Kind::Child`] name it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Pci(_) => "PCI",
            Self::Ide(_) => "IDE",
            Self::Nvme(_) => "NVMe",
            Self::Scsi(_) => "SCSI",
            Self::Usb(_) => "usb-bus",
        }
    }

    /// Whether another device fits.
    pub fn has_room(&self) -> bool {
        match self {
            Self::Pci(bus) => bus.free_slot().is_some(),
            Self::Ide(bus) => bus.free().is_some(),
            Self::Nvme(bus) => bus.free().is_some(),
            Self::Scsi(bus) => bus.free_target().is_some(),
            Self::Usb(bus) => bus.has_room(),
        }
    }

    /// The name of the `n`th bus of the device `id` (QEMU's: a bridge's is the bridge's own).
    pub fn name(&self, id: &str, n: usize) -> String {
        match self {
            Self::Pci(_) if n == 0 => id.into(),
            _ => format!("{id}.{n}"),
        }
    }
}

impl std::fmt::Debug for ChildBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bus", self.kind())
    }
}

/// What firmware may boot from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootClass {
    /// Floppy disk.
    Floppy,
    /// Hard disk.
    Disk,
    /// CD-ROM.
    Cdrom,
    /// Network card.
    Network,
}

impl BootClass {
    /// Its letters in a boot order.
    pub fn letters(self) -> &'static str {
        match self {
            Self::Floppy => "ab",
            Self::Disk => "c",
            Self::Cdrom => "d",
            Self::Network => "n",
        }
    }
}

/// A place on a PCI bus.
#[derive(Clone, Debug)]
pub struct PciPlace {
    /// The bus.
    pub bus: Arc<PciBus>,
    /// Device number, 0 to 31.
    pub slot: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

/// A PCI function, built.
pub struct PciDevice {
    /// As a function.
    pub function: SharedFunction,
    /// The same object as a device.
    pub device: SharedDevice,
    /// Addresses where it answers whatever its BARs say: space, first, length, region (the VGA's ports).
    pub fixed: Vec<(Space, u64, u64, RegionId)>,
}

impl PciDevice {
    /// Wraps a function.
    pub fn new<F: PciFunction + 'static>(function: F) -> Self {
        let function = shared(function);
        Self { function: function.clone(), device: function, fixed: Vec::new() }
    }

    /// Adds a place where the function answers whatever its BARs say.
    pub fn fix(&mut self, space: Space, start: u64, len: u64, region: RegionId) {
        self.fixed.push((space, start, len, region));
    }
}

/// Properties of every PCI device, virtio or not.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields, default)]
pub struct PlaceSpec {
    /// Bus to plug into: the id of a bridge or root port, or the board's own (pcie.0).
    pub bus: Option<String>,
    /// Slot and function in hexadecimal (05, 0x5.1); the first free slot if not given.
    pub addr: Option<String>,
    /// More functions of the same slot follow.
    pub multifunction: bool,
    /// Place in the order in which firmware boots; lower comes first.
    pub bootindex: Option<u32>,
}

impl PlaceSpec {
    const NAMES: [&str; 4] = ["bus", "addr", "multifunction", "bootindex"];

    /// Takes the properties of the place out of a device's bag; what remains is the model's own.
    ///
    /// # Errors
    /// Values that are no bus name, address or switch.
    pub fn take(bag: &mut Bag) -> Result<Self, PropError> {
        let mut own = Bag::new(bag.driver.clone());
        for name in Self::NAMES {
            if let Some(mut value) = bag.props.remove(name) {
                // QMP gives the slot and function as one number.
                if let (true, Some(devfn)) = (name == "addr", value.as_u64()) {
                    value = format!("{:x}.{:x}", devfn >> 3, devfn & 7).into();
                }
                own.props.insert(name.into(), value);
            }
        }
        own.spec()
    }

    /// Slot and function of `addr=`.
    ///
    /// # Errors
    /// Not `SLOT[.FUNCTION]` with a slot up to 1f and a function up to 7.
    pub fn address(&self) -> Result<Option<(u8, u8)>, CreateError> {
        let Some(text) = &self.addr else { return Ok(None) };
        let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
        let hex = |digits: &str| u8::from_str_radix(digits.strip_prefix("0x").unwrap_or(digits), 16).ok();
        match (hex(slot), hex(function)) {
            (Some(slot @ 0..=31), Some(function @ 0..=7)) => Ok(Some((slot, function))),
            _ => Err(CreateError::Other(format!(
                "addr={text}: use SLOT[.FUNCTION] in hexadecimal, slot 0 to 1f, function 0 to 7"
            ))),
        }
    }

    /// What there is, for `--device NAME,help`.
    pub fn properties() -> Properties {
        Properties::of::<Self>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let at = |addr: &str| PlaceSpec { addr: Some(addr.into()), ..PlaceSpec::default() }.address();
        for (text, place) in [("5", (5, 0)), ("0x5.1", (5, 1)), ("1f.7", (31, 7)), ("05.0", (5, 0))] {
            assert_eq!(at(text).unwrap(), Some(place), "{text}");
        }
        for text in ["", "20", "1.8", "x", "1.", "-1", "1.1.1"] {
            assert!(at(text).unwrap_err().to_string().contains("SLOT[.FUNCTION]"), "{text}");
        }
        assert_eq!(PlaceSpec::default().address().unwrap(), None);
    }

    #[test]
    fn the_place_is_taken_out_of_the_bag() {
        let mut bag =
            Bag::parse("virtio-rng-pci,bus=pcie.0,addr=3.1,multifunction=on,packed=on", "driver").unwrap();
        let place = PlaceSpec::take(&mut bag).unwrap();
        assert_eq!((place.bus.as_deref(), place.address().unwrap()), (Some("pcie.0"), Some((3, 1))));
        assert!(place.multifunction);
        assert_eq!(bag.props.keys().collect::<Vec<_>>(), ["packed"]);

        let mut bag = Bag::parse(r#"{"driver": "x", "addr": 25}"#, "driver").unwrap();
        assert_eq!(PlaceSpec::take(&mut bag).unwrap().address().unwrap(), Some((3, 1)));
        let mut bag = Bag::parse("x,multifunction=perhaps", "driver").unwrap();
        assert!(PlaceSpec::take(&mut bag).is_err());
    }
}
