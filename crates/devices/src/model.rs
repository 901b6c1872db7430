//! The table of models that users can name (`--device NAME,...`).

use crate::place::{ChildBus, PciDevice, PciPlace, PlaceSpec};
use crate::storage;
use crate::usb;
use crate::virtio::{self, VirtioDevice};
use crate::{chipset, display};
use accel::{Doorbells, Irqs};
use base::props::{Bag, PropError, Properties};
use base::{Timers, nearest};
use bus::{Chardev, System};
use memory::GuestMemory;
use std::sync::Arc;

/// What a model may take from the machine while it is built.
pub trait Parts {
    /// Guest RAM.
    fn memory(&self) -> &GuestMemory;
    /// The timer service.
    fn timers(&self) -> &Timers;
    /// The guest's passing time.
    fn clock(&self) -> chipset::Clock {
        chipset::Clock::new(self.timers())
    }
    /// Requests to the machine.
    fn system(&self) -> &System;
    /// A line into ISA interrupt `irq` (0..16).
    ///
    /// # Errors
    /// The machine has no such interrupt.
    fn isa_irq(&mut self, irq: u8) -> Result<bus::IrqLine, CreateError> {
        Err(CreateError::Other(format!("this machine has no ISA interrupts, so no IRQ {irq}")))
    }
    /// Interrupts, for message-signalled ones.
    fn irqs(&self) -> Arc<dyn Irqs>;
    /// Shortcuts between queues and interrupts, where the accelerator has them.
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        None
    }
    /// The virtual machine, for devices whose memory the guest sees as memory.
    ///
    /// # Errors
    /// There is none to show memory in.
    fn vm(&self) -> Result<Arc<dyn accel::Vm>, CreateError> {
        Err(CreateError::Other("devices with memory of their own cannot be built here".into()))
    }
    /// The machine's screens, keyboards and pointers.
    ///
    /// # Errors
    /// It has none.
    fn displays(&self) -> Result<Arc<::display::Displays>, CreateError> {
        Err(CreateError::Other("this machine has no screens".into()))
    }
    /// Tells that the device being created brings a bus along. The machine names it after the device.
    fn offer_bus(&mut self, bus: ChildBus);
    /// Tells that firmware can boot from the device being created: what it is, its `bootindex=`, and its Open Firmware path
    /// below the PCI function (`disk@0,0`). virtio-blk and network cards need not: the machine knows them.
    fn bootable(&mut self, class: crate::BootClass, index: Option<u32>, path: &str) {
        let _ = (class, index, path);
    }
    /// Number of vCPUs, for devices whose queues default to one for each.
    fn vcpus(&self) -> u32 {
        1
    }
    /// The disk image named by `drive=`; each can be taken once.
    ///
    /// # Errors
    /// No such image, or it is in use by another device.
    fn take_drive(&mut self, id: &str) -> Result<Arc<block::Image>, CreateError>;
    /// How long the iothread object of this id polls at most before it sleeps, in nanoseconds, if it says.
    ///
    /// # Errors
    /// There is none.
    fn iothread(&mut self, id: &str) -> Result<Option<u64>, CreateError> {
        Err(CreateError::Other(format!("there is no iothread object '{id}'; add --object iothread,id={id}")))
    }
    /// Tells of a drive whose medium can be changed, or whose image may be resized, while the machine runs.
    fn offer_drive(&mut self, _drive: &Arc<crate::storage::Drive>) {}
    /// Tells of the machine's balloon.
    ///
    /// # Errors
    /// There is one already.
    fn offer_balloon(&mut self, _balloon: &Arc<virtio::balloon::Balloon>) -> Result<(), CreateError> {
        Ok(())
    }
    /// The character device named by `chardev=`; each can be taken once.
    ///
    /// # Errors
    /// No such character device, or it is in use.
    fn take_chardev(&mut self, id: &str) -> Result<Arc<dyn Chardev>, CreateError>;
    /// The network backend named by `netdev=`; each can be taken once.
    ///
    /// # Errors
    /// No such backend, or it is in use by another device.
    fn take_netdev(&mut self, id: &str) -> Result<Cable, CreateError>;
}

/// A network backend for one card, and the address of that card if its properties name none.
#[derive(Debug)]
pub struct Cable {
    /// The backend.
    pub netdev: net::Netdev,
    /// The address.
    pub mac: net::MacAddr,
}

/// A device that cannot be created: what, why, what to do instead.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// A bad property.
    #[error(transparent)]
    Property(#[from] PropError),
    /// Anything else.
    #[error("{0}")]
    Other(String),
    /// The host's refusal.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: String,
        /// The host's reason.
        source: std::io::Error,
    },
}

/// An ISA device and the ports it answers at.
pub struct IsaDevice {
    /// The device.
    pub device: bus::SharedDevice,
    /// First port and number of ports; region 0 of the device.
    pub ports: (u16, u16),
}

/// Builds a virtio device from its properties.
pub type CreateVirtio = fn(&Bag, &mut dyn Parts) -> Result<Box<dyn VirtioDevice>, CreateError>;

/// How a model is built and plugged.
#[derive(Clone, Copy)]
pub enum Kind {
    /// A virtio device; the machine wraps it in the transport the name says (`-pci`, or `-device` for virtio-mmio).
    Virtio(CreateVirtio),
    /// A device on ISA ports.
    Isa(fn(&Bag, &mut dyn Parts) -> Result<IsaDevice, CreateError>),
    /// A PCI function.
    Pci(fn(&Bag, &mut dyn Parts, &PciPlace) -> Result<PciDevice, CreateError>),
    /// A device on a bus that another device brings ([`ChildBus::kind`]); it attaches itself.
    Child {
        /// The kind of bus.
        bus: &'static str,
        /// Builds and attaches it.
        create: CreateChild,
    },
}

/// Builds a device and attaches it to the bus.
pub type CreateChild = fn(&Bag, &mut dyn Parts, &ChildBus) -> Result<(), CreateError>;

/// A model: one `pub const MODEL` in its file, one line in [`models`].
pub struct Model {
    /// QEMU's name; for virtio without the transport's suffix (`virtio-blk`).
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// Properties, from the `Spec`.
    pub properties: fn() -> Properties,
    /// How it is built.
    pub kind: Kind,
}

impl Model {
    /// The names it answers to. Virtio models have one for each transport: `NAME-pci`, `NAME-device` (virtio-mmio) and
    /// the bare name, which takes what the machine has.
    pub fn names(&self) -> Vec<String> {
        match self.kind {
            Kind::Virtio(_) => ["-pci", "-device", ""].map(|suffix| self.name.to_owned() + suffix).into(),
            Kind::Isa(_) | Kind::Pci(_) | Kind::Child { .. } => vec![self.name.into()],
        }
    }

    /// All properties, those of its place among them.
    pub fn all_properties(&self) -> Properties {
        let mut all = (self.properties)();
        match self.kind {
            Kind::Virtio(_) | Kind::Pci(_) => {
                // An NVMe controller's place in the boot order is its namespace's.
                let own: Vec<String> = all.names().map(String::from).collect();
                all.0.extend(PlaceSpec::properties().0.into_iter().filter(|p| !own.contains(&p.name)));
            }
            Kind::Isa(_) | Kind::Child { .. } => {}
        }
        all
    }
}

/// All models.
pub fn models() -> &'static [&'static Model] {
    &[
        &chipset::bridge::I82801B11,
        &chipset::bridge::IOH3420,
        &chipset::bridge::PCI_BRIDGE,
        &chipset::bridge::PCIE_PCI_BRIDGE,
        &chipset::bridge::ROOT_PORT,
        &chipset::debug_exit::MODEL,
        &chipset::debugcon::MODEL,
        &chipset::i6300esb::MODEL,
        &chipset::pvpanic::MODEL,
        &chipset::serial::MODEL,
        &storage::ahci::MODEL,
        &storage::ata::CD,
        &storage::ata::HD,
        &storage::nvme::MODEL,
        &storage::nvme::NAMESPACE,
        &storage::piix::PIIX3,
        &storage::piix::PIIX4,
        &storage::scsi::CD,
        &storage::scsi::HD,
        &display::vga::MODEL,
        &virtio::balloon::MODEL,
        &virtio::blk::MODEL,
        &virtio::console::MODEL,
        &virtio::net::MODEL,
        &usb::KEYBOARD,
        &usb::MOUSE,
        &usb::TABLET,
        &usb::HUB,
        &usb::xhci::MODEL,
        &virtio::blk::MODEL,
        &virtio::console::MODEL,
        &virtio::gpu::MODEL,
        &virtio::input::KEYBOARD,
        &virtio::input::MOUSE,
        &virtio::input::TABLET,
        &virtio::rng::MODEL,
        &virtio::scsi::MODEL,
    ]
}

/// The model a user names, by one of its [`Model::names`].
///
/// # Errors
/// Says which name is nearest.
pub fn find_model(name: &str) -> Result<&'static Model, CreateError> {
    models().iter().find(|m| m.names().iter().any(|n| n == name)).copied().ok_or_else(|| {
        let names: Vec<String> = models().iter().filter_map(|m| m.names().into_iter().next()).collect();
        let hint = match nearest(name, names.iter().map(String::as_str)) {
            Some(near) => format!("did you mean '{near}'?"),
            None => "'--device help' lists what there is".into(),
        };
        CreateError::Other(format!("unknown device '{name}'; {hint}"))
    })
}
