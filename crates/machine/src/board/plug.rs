//! Plugging the devices of a blueprint into the buses of a board and of each other.

use super::Builder;
use super::parts::Context;
use crate::acpi::VirtioMmio as AcpiVirtioMmio;
use crate::firmware::Bootable;
use crate::{Error, Result};
use base::nearest;
use base::props::Bag;
use bus::pci::{PciBus, firmware_node, reg};
use bus::virtio::{Platform, VirtioDevice, VirtioMmio, VirtioPci};
use bus::{RegionId, Space};
use devices::{BootClass, ChildBus, CreateError, Kind, Model, PciDevice, PciPlace, PlaceSpec, find_model};
use std::sync::Arc;

/// A place for a virtio-mmio transport.
#[derive(Clone, Copy)]
pub(super) struct MmioSlot {
    pub(super) base: u64,
    pub(super) gsi: u32,
}

/// What a device tells of itself while it is created.
#[derive(Default)]
pub(super) struct Offered {
    pub(super) buses: Vec<ChildBus>,
    pub(super) bootable: Vec<(BootClass, Option<u32>, String)>,
    /// Open Firmware path of the device.
    pub(super) path: String,
}

/// A bus by name.
pub(super) struct NamedBus {
    pub(super) name: String,
    pub(super) bus: ChildBus,
    /// Open Firmware path of the device that brought it.
    pub(super) path: String,
}

/// A device of the blueprint, or one that came later, and where it is.
pub(crate) struct Plugged {
    /// Its description.
    pub(crate) bag: Bag,
    /// Where it is, if on PCI.
    pub(crate) pci: Option<PciPlace>,
}

impl Builder {
    /// Plugs the devices of the blueprint.
    pub(super) fn plug(&mut self, bags: &[Bag]) -> Result<()> {
        for bag in bags {
            if bag.id.is_some() && bags.iter().filter(|b| b.id == bag.id).count() > 1 {
                let id = bag.id.as_deref().unwrap_or_default();
                return Err(Error::Config(format!("there are two devices with the id '{id}'")));
            }
            self.plug_one(bag)?;
        }
        Ok(())
    }

    pub(crate) fn plug_one(&mut self, bag: &Bag) -> Result<()> {
        let model = find_model(&bag.driver)?;
        let described = bag.clone();
        let mut pci = None;
        let mut bag = bag.clone();
        let mut offered = Offered::default();
        match model.kind {
            Kind::Isa(create) => {
                let isa = create(&bag, &mut self.context(&mut offered))?;
                let (start, len) = isa.ports;
                self.bus.map_shared(
                    Space::Port,
                    start.into(),
                    len.into(),
                    model.name,
                    isa.device.clone(),
                    RegionId(0),
                )?;
                self.devices.push(isa.device);
            }
            Kind::Pci(create) => {
                let place = PlaceSpec::take(&mut bag)?;
                let at = self.pci_place(&bag.driver, &place)?;
                let device = create(&bag, &mut self.context(&mut offered), &at)?;
                for (_, index, _) in &mut offered.bootable {
                    *index = index.or(place.bootindex);
                }
                offered.path = self.add_pci(&at, &place, device)?;
                pci = Some(at);
            }
            Kind::Virtio(create) => {
                let place = PlaceSpec::take(&mut bag)?;
                let device = create(&bag, &mut self.context(&mut offered))?;
                let platform = Platform {
                    memory: self.memory.clone(),
                    irqs: self.irqs.clone(),
                    doorbells: self.vm.doorbells(),
                };
                let mmio =
                    bag.driver.ends_with("-device") || (self.pci.is_none() && bag.driver == model.name);
                if mmio && place != PlaceSpec::default() {
                    return Err(Error::Config(format!(
                        "{}: bus=, addr= and multifunction= are for PCI; a virtio-mmio device takes the next free place",
                        bag.driver
                    )));
                }
                if mmio {
                    self.plug_mmio(&bag.driver, device, &platform)?;
                } else {
                    if self.pci.is_none() {
                        return Err(Error::Config(format!(
                            "{}: this machine has no PCI bus; use {}-device",
                            bag.driver, model.name
                        )));
                    }
                    let at = self.pci_place(&bag.driver, &place)?;
                    let function = PciDevice::new(VirtioPci::new(device, &platform));
                    offered.path = self.add_pci(&at, &place, function)?;
                    let known = match model.name {
                        "virtio-blk" => Some((BootClass::Disk, "disk@0,0")),
                        "virtio-net" => Some((BootClass::Network, "ethernet-phy@0")),
                        _ => None,
                    };
                    if let Some((class, path)) = known {
                        offered.bootable.push((class, place.bootindex, path.into()));
                    }
                    pci = Some(at);
                }
            }
            Kind::Child { bus: kind, create } => {
                let wanted = match bag.props.remove("bus") {
                    None => None,
                    Some(serde_json::Value::String(name)) => Some(name),
                    Some(other) => {
                        return Err(Error::Config(format!("{}: bus={other} is not a bus name", bag.driver)));
                    }
                };
                let bus = self.child_bus(model, kind, wanted.as_deref())?;
                offered.path = bus.path.clone();
                let bus = bus.bus.clone();
                create(&bag, &mut self.context(&mut offered), &bus)?;
            }
        }
        for (class, index, path) in std::mem::take(&mut offered.bootable) {
            self.bootable.push(Bootable { index, class, path: format!("{}/{path}", offered.path) });
        }
        self.name_buses(&bag, offered);
        self.plugged.push(Plugged { bag: described, pci });
        Ok(())
    }

    fn context<'a>(&'a mut self, offered: &'a mut Offered) -> Context<'a> {
        Context {
            memory: &self.memory,
            vcpus: self.acpi.topology.count(),
            timers: &self.timers,
            clock: &self.clock,
            vm: &self.vm,
            displays: &self.displays,
            balloon: &mut self.balloon,
            system: &self.system,
            drives: &mut self.drives,
            iothreads: &self.iothreads,
            chardevs: &mut self.chardevs,
            netdevs: &mut self.netdevs,
            irqs: &self.irqs,
            doorbells: self.vm.doorbells(),
            pins: &mut self.pins,
            offered: &mut offered.buses,
            bootable: &mut offered.bootable,
        }
    }

    /// Keeps the buses that a device brought, under the names QEMU would give them.
    pub(super) fn name_buses(&mut self, bag: &Bag, offered: Offered) {
        for (n, bus) in offered.buses.into_iter().enumerate() {
            let name = match &bag.id {
                Some(id) => bus.name(id, n),
                None => {
                    let kind = bus.kind();
                    let others = self.buses.iter().filter(|b| b.bus.kind() == kind).count();
                    format!("{}.{others}", kind.to_lowercase())
                }
            };
            self.buses.push(NamedBus { name, bus, path: offered.path.clone() });
        }
    }

    /// The bus of the name, or the first of the kind with room.
    fn find_bus(&self, driver: &str, kind: &str, wanted: Option<&str>) -> Result<Option<&NamedBus>> {
        let Some(wanted) = wanted else {
            let mut of_kind = self.buses.iter().filter(|b| b.bus.kind() == kind);
            let free = of_kind.clone().find(|b| b.bus.has_room());
            return Ok(free.or_else(|| of_kind.next()));
        };
        // A bus may be named by its device, too.
        let device = format!("{wanted}.0");
        match self
            .buses
            .iter()
            .find(|b| b.name == wanted)
            .or_else(|| self.buses.iter().find(|b| b.name == device))
        {
            Some(named) if named.bus.kind() == kind => Ok(Some(named)),
            Some(named) => Err(Error::Config(format!(
                "{driver}: bus '{wanted}' is a {} bus, but the device needs a {kind} bus",
                named.bus.kind()
            ))),
            None => {
                let near = nearest(wanted, self.buses.iter().map(|b| b.name.as_str()))
                    .map(|n| format!("; did you mean '{n}'?"))
                    .unwrap_or_default();
                Err(Error::Config(format!("{driver}: there is no bus '{wanted}'{near}")))
            }
        }
    }

    fn child_bus(&self, model: &Model, kind: &str, wanted: Option<&str>) -> Result<&NamedBus> {
        self.find_bus(model.name, kind, wanted)?.ok_or_else(|| {
            Error::Config(format!(
                "{}: this machine has no {kind} bus; add a controller for it before the device",
                model.name
            ))
        })
    }

    /// Where a PCI device goes.
    fn pci_place(&self, driver: &str, place: &PlaceSpec) -> Result<PciPlace> {
        let root = self.pci.as_ref();
        let bus: Arc<PciBus> = match place.bus.as_deref() {
            None => root.cloned(),
            Some("pcie.0" | "pci.0") if root.is_some() => root.cloned(),
            wanted => self
                .find_bus(driver, "PCI", wanted)?
                .map(|named| match &named.bus {
                    ChildBus::Pci(bus) => Ok(bus.clone()),
                    other => Err(Error::Config(format!("{driver}: {other:?} is not a PCI bus"))),
                })
                .transpose()?,
        }
        .ok_or_else(|| Error::Config(format!("{driver}: this machine has no PCI bus")))?;
        let (slot, function) = match place.address()? {
            Some(address) => address,
            None => {
                let none = || CreateError::Other(format!("no PCI slot is free for {driver}"));
                (bus.free_slot().ok_or_else(none)?, 0)
            }
        };
        Ok(PciPlace { bus, slot, function })
    }

    /// Plugs a function in; returns its Open Firmware path.
    fn add_pci(&mut self, at: &PciPlace, place: &PlaceSpec, device: PciDevice) -> Result<String> {
        let (function, object) = (device.function.clone(), device.device.clone());
        at.bus
            .add_shared(at.slot, at.function, device.function, device.device)
            .map_err(|e| Error::Config(e.to_string()))?;
        let name = function.lock().unwrap_or_else(|e| e.into_inner()).config().name().to_owned();
        for (space, start, len, region) in device.fixed {
            self.bus.map_shared(space, start, len, &name, object.clone(), region)?;
        }
        if place.multifunction {
            let mut function = function.lock().unwrap_or_else(|e| e.into_inner());
            function.config_mut().set_multifunction();
        }
        let function = function.lock().unwrap_or_else(|e| e.into_inner());
        let config = function.config();
        let class = config.get_u32(reg::REVISION) >> 8;
        let (vendor, id) = (config.get_u16(reg::VENDOR), config.get_u16(reg::DEVICE));
        let node = firmware_node(class, vendor, id, at.slot, at.function);
        Ok(format!("{}/{node}", at.bus.firmware_path()))
    }

    fn plug_mmio(&mut self, name: &str, device: Box<dyn VirtioDevice>, platform: &Platform) -> Result<()> {
        if self.mmio_slots.is_empty() {
            return Err(Error::Config(format!("{name}: no virtio-mmio slot is free on this machine")));
        }
        let MmioSlot { base, gsi } = self.mmio_slots.remove(0);
        let line = self.pin(gsi).line();
        let transport = self.own(VirtioMmio::new(device, platform, base, line));
        self.bus.map(Space::Memory, base, VirtioMmio::LEN, name, &transport, RegionId(0))?;
        self.acpi.virtio_mmio.push(AcpiVirtioMmio { base: base as u32, gsi });
        Ok(())
    }
}
