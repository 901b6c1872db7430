//! NVMe controller (NVM Express 1.4): many queues, several namespaces, MSI-X.
//!
//! Doorbells are taken on vCPU threads; commands are fetched and carried out by [`Workers`], which know the
//! [`Controller`] only. Lock order: the PCI function, the controller's state, interrupts.

mod admin;
mod command;
mod controller;
mod identify;
mod io;
mod namespace;
mod queues;
#[cfg(test)]
mod tests;

pub use namespace::{MODEL as NAMESPACE, NvmeBus};

use super::DriveSaved;
use crate::model::{CreateError, Kind, Model, Parts};
use crate::place::{ChildBus, PciDevice};
use base::props::{Bag, Properties};
use bus::pci::{Bar, Config, ConfigSaved, Identity, Msix, MsixVectors, PciFunction, reg};
use bus::{Device, RegionId, State, StateError};
use controller::{Controller, ControllerSaved};
use identify::Names;
use memory::GuestMemory;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::io as stdio;
use std::sync::Arc;

/// The model.
pub const MODEL: Model = Model {
    name: "nvme",
    about: "NVMe controller; namespaces are its drive=, or nvme-ns on its bus",
    properties: Properties::of::<Spec>,
    kind: Kind::Pci(|bag, parts, _| create(bag, parts)),
};

/// Properties of `nvme`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Spec {
    /// The drive of namespace 1, if there is one here; `serial` is the controller's.
    #[serde(flatten)]
    pub namespace: namespace::Spec,
    /// Pairs of I/O queues that a driver may create, 1 to 128.
    pub max_ioqpairs: u16,
    /// MSI-X vectors, 1 to 129; as many as queues if not given.
    pub msix_qsize: Option<u16>,
    /// Model that the guest sees, up to 40 characters.
    pub model: String,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            namespace: namespace::Spec::default(),
            max_ioqpairs: 64,
            msix_qsize: None,
            model: "QEMU NVMe Ctrl".into(),
        }
    }
}

/// Version register.
const VERSION: u32 = 0x0001_0400;
/// Largest transfer: pages of 4 KiB, as a power of two.
const MDTS: u8 = 7;
/// BARs of registers and of MSI-X.
const REGISTERS: u8 = 0;
const MSIX_BAR: u8 = 4;
/// Threads that go to images.
const THREADS: usize = 16;

/// Properties of the namespace that a controller without a drive has no use for.
const OF_NAMESPACE: [&str; 2] = ["nsid", "eui64"];

fn create(bag: &Bag, parts: &mut dyn Parts) -> Result<PciDevice, CreateError> {
    let spec: Spec = bag.spec()?;
    let bad = |text: String| Err(CreateError::Other(format!("nvme: {text}")));
    if !(1..=128).contains(&spec.max_ioqpairs) {
        return bad(format!("max_ioqpairs={} must be from 1 to 128", spec.max_ioqpairs));
    }
    let vectors = spec.msix_qsize.unwrap_or(spec.max_ioqpairs + 1);
    if !(1..=129).contains(&vectors) {
        return bad(format!("msix_qsize={vectors} must be from 1 to 129"));
    }
    if spec.model.len() > 40 || !spec.model.is_ascii() {
        return bad("model= takes up to 40 ASCII characters".into());
    }
    spec.namespace.drive.check("nvme", 20)?;
    let bus = Arc::new(NvmeBus::default());
    if !spec.namespace.drive.drive.is_empty() {
        namespace::plug(bag, &spec.namespace, parts, &bus)?;
    } else if let Some(name) = OF_NAMESPACE.iter().find(|n| bag.props.contains_key(**n)) {
        return bad(format!("{name}= is of a namespace, but there is no drive=; give it to nvme-ns"));
    }
    let names = Names {
        serial: spec.namespace.drive.serial.clone().unwrap_or_else(|| "kvasir".into()),
        model: spec.model.clone(),
        firmware: "1.0".into(),
    };
    let msix = MsixVectors::new(parts.irqs(), parts.doorbells(), vectors);
    let nvme = Nvme::new(names, spec.max_ioqpairs, bus.clone(), parts.memory().clone(), msix);
    parts.offer_bus(ChildBus::Nvme(bus));
    Ok(PciDevice::new(nvme))
}

/// The device.
pub struct Nvme {
    config: Config,
    controller: Arc<Controller>,
    size: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    config: ConfigSaved,
    controller: ControllerSaved,
    namespaces: Vec<(u32, DriveSaved)>,
}

impl Nvme {
    fn new(names: Names, pairs: u16, bus: Arc<NvmeBus>, memory: GuestMemory, vectors: MsixVectors) -> Self {
        let mut config = Config::endpoint(
            MODEL.name,
            Identity {
                vendor: 0x1b36,
                device: 0x0010,
                class: 0x01_0802,
                revision: 2,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            },
        );
        let size = 0x4000;
        config.add_bar(REGISTERS, Bar::memory64(size));
        config.add_bar(MSIX_BAR, Bar::memory32(0x2000));
        let intx = config.add_intx(1);
        let msix = Msix { vectors: vectors.clone(), bar: MSIX_BAR, table: 0, pba: 0x1000 };
        config.add_msix(msix);
        let controller = Controller::new(names, pairs, bus, memory, intx, vectors);
        Self { config, controller, size }
    }
}

impl Device for Nvme {
    fn name(&self) -> &str {
        MODEL.name
    }

    fn read(&mut self, at: RegionId, offset: u64, data: &mut [u8]) {
        if self.config.msix().is_some_and(|m| m.read(at.0, offset, data)) {
            return;
        }
        data.fill(0);
        if at.0 == u32::from(REGISTERS) && offset < self.size {
            self.controller.read(offset, data);
        }
    }

    fn write(&mut self, at: RegionId, offset: u64, data: &[u8]) {
        if self.config.msix().is_some_and(|m| m.write(at.0, offset, data)) {
            return;
        }
        if at.0 != u32::from(REGISTERS) {
            return;
        }
        // Registers are 32 bits wide, and may be written in pairs (3.1).
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return;
        }
        for (i, word) in data.as_chunks::<4>().0.iter().enumerate() {
            self.controller.write(offset + 4 * i as u64, u32::from_le_bytes(*word));
        }
    }

    fn start(&mut self) -> stdio::Result<()> {
        self.controller.start();
        Ok(())
    }

    fn pause(&mut self) -> stdio::Result<()> {
        self.controller.pause();
        Ok(())
    }

    fn reset(&mut self) {
        self.config.reset();
        self.controller.power_on();
    }

    fn save(&self) -> Result<State, StateError> {
        let saved = Saved {
            config: self.config.save(),
            controller: self.controller.save(),
            namespaces: self.controller.bus.save(),
        };
        State::new(MODEL.name, 1, &saved)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(MODEL.name, 1)?;
        let invalid = |reason: &str| StateError::Invalid { kind: MODEL.name.into(), reason: reason.into() };
        if !self.controller.fits(&saved.controller) {
            return Err(invalid("of a controller with other queues"));
        }
        if !self.controller.bus.load(&saved.namespaces) {
            return Err(invalid("the namespaces are others than were saved"));
        }
        self.config.load(saved.config)?;
        self.controller.load(saved.controller);
        Ok(())
    }
}

impl PciFunction for Nvme {
    fn config(&self) -> &Config {
        &self.config
    }

    fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        let command = self.config.get_u16(reg::COMMAND);
        self.controller.set_master(command & reg::COMMAND_MASTER != 0);
    }
}

impl Drop for Nvme {
    fn drop(&mut self) {
        self.controller.power_on();
    }
}
