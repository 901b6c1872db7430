//! PCI bridges: PCI Express root ports, and bridges to conventional PCI (PCI Express Base Specification 5.0, 7.5;
//! PCI-to-PCI Bridge Architecture Specification 1.2). The identities are QEMU's.

use crate::{ChildBus, CreateError, Kind, Model, Parts, PciDevice, PciPlace};
use base::props::{Bag, Properties};
use bus::pci::{Config, ConfigSaved, Identity, PciBus, PciFunction, capability};
use bus::{Device, RegionId, State, StateError};
use schemars::JsonSchema;
use serde::Deserialize;
use std::sync::Arc;

const RED_HAT: u16 = 0x1b36;
const INTEL: u16 = 0x8086;
const BRIDGE_CLASS: u32 = 0x06_0400;
/// Windows of subtractive decoding, as the ICH's bridge to legacy PCI has.
const SUBTRACTIVE_CLASS: u32 = 0x06_0401;

/// Properties of root ports.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct PortSpec {
    /// Port number.
    pub port: u8,
    /// Chassis number, which with the slot number names the slot.
    pub chassis: u8,
    /// Slot number; the port's own device number if not given.
    pub slot: Option<u16>,
}

/// Properties of bridges to conventional PCI.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields, default)]
pub struct BridgeSpec {
    /// Chassis number.
    pub chassis_nr: u8,
}

/// Properties of bridges that have none.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NoSpec {}

/// The table entry of `pcie-root-port`.
pub const ROOT_PORT: Model = Model {
    name: "pcie-root-port",
    about: "PCI Express root port (one device behind it)",
    properties: Properties::of::<PortSpec>,
    kind: Kind::Pci(root_port),
};

/// The table entry of `ioh3420`.
pub const IOH3420: Model = Model {
    name: "ioh3420",
    about: "PCI Express root port of Intel's IOH",
    properties: Properties::of::<PortSpec>,
    kind: Kind::Pci(ioh3420),
};

/// The table entry of `pci-bridge`.
pub const PCI_BRIDGE: Model = Model {
    name: "pci-bridge",
    about: "Bridge from PCI to PCI",
    properties: Properties::of::<BridgeSpec>,
    kind: Kind::Pci(pci_bridge),
};

/// The table entry of `pcie-pci-bridge`.
pub const PCIE_PCI_BRIDGE: Model = Model {
    name: "pcie-pci-bridge",
    about: "Bridge from PCI Express to PCI",
    properties: Properties::of::<NoSpec>,
    kind: Kind::Pci(pcie_pci_bridge),
};

/// The table entry of `i82801b11-bridge`.
pub const I82801B11: Model = Model {
    name: "i82801b11-bridge",
    about: "Bridge to PCI of Intel's ICH9 (DMI to PCI)",
    properties: Properties::of::<NoSpec>,
    kind: Kind::Pci(i82801b11),
};

fn root_port(bag: &Bag, parts: &mut dyn Parts, at: &PciPlace) -> Result<PciDevice, CreateError> {
    port(bag, parts, at, ROOT_PORT.name, identity(RED_HAT, 0x000c, BRIDGE_CLASS))
}

fn ioh3420(bag: &Bag, parts: &mut dyn Parts, at: &PciPlace) -> Result<PciDevice, CreateError> {
    port(bag, parts, at, IOH3420.name, Identity { revision: 2, ..identity(INTEL, 0x3420, BRIDGE_CLASS) })
}

fn port(
    bag: &Bag,
    parts: &mut dyn Parts,
    at: &PciPlace,
    name: &'static str,
    id: Identity,
) -> Result<PciDevice, CreateError> {
    let spec: PortSpec = bag.spec()?;
    if !at.bus.is_root() {
        return Err(CreateError::Other(format!("{name}: root ports belong on the machine's own bus")));
    }
    let mut config = Config::bridge(name, id);
    config.add_intx(1);
    config.add_msi(parts.irqs(), 0);
    add_express(&mut config, ExpressKind::RootPort, spec.port, spec.slot.unwrap_or(at.slot.into()));
    let below = PciBus::behind_port(&at.bus, at.slot, at.function);
    Ok(finish(name, config, below, parts))
}

fn pci_bridge(bag: &Bag, parts: &mut dyn Parts, at: &PciPlace) -> Result<PciDevice, CreateError> {
    let spec: BridgeSpec = bag.spec()?;
    let mut config = Config::bridge(PCI_BRIDGE.name, identity(RED_HAT, 0x0001, BRIDGE_CLASS));
    // Slot numbering (PCI-to-PCI Bridge Architecture Specification 1.2, 13.4): first in chassis.
    const FIRST_IN_CHASSIS: u8 = 1 << 5;
    config.add_capability(SLOT_NUMBERING, &[FIRST_IN_CHASSIS, spec.chassis_nr], &[0, 0xff]);
    let below = PciBus::behind(&at.bus, at.slot, at.function);
    Ok(finish(PCI_BRIDGE.name, config, below, parts))
}

fn pcie_pci_bridge(bag: &Bag, parts: &mut dyn Parts, at: &PciPlace) -> Result<PciDevice, CreateError> {
    let NoSpec {} = bag.spec()?;
    let mut config = Config::bridge(PCIE_PCI_BRIDGE.name, identity(RED_HAT, 0x000e, BRIDGE_CLASS));
    add_express(&mut config, ExpressKind::ToPci, 0, 0);
    let below = PciBus::behind(&at.bus, at.slot, at.function);
    Ok(finish(PCIE_PCI_BRIDGE.name, config, below, parts))
}

fn i82801b11(bag: &Bag, parts: &mut dyn Parts, at: &PciPlace) -> Result<PciDevice, CreateError> {
    let NoSpec {} = bag.spec()?;
    let id = Identity { revision: 0x92, ..identity(INTEL, 0x244e, SUBTRACTIVE_CLASS) };
    let config = Config::bridge(I82801B11.name, id);
    let below = PciBus::behind(&at.bus, at.slot, at.function);
    Ok(finish(I82801B11.name, config, below, parts))
}

fn identity(vendor: u16, device: u16, class: u32) -> Identity {
    Identity { vendor, device, class, revision: 0, subsystem_vendor: 0, subsystem: 0 }
}

fn finish(name: &'static str, config: Config, below: Arc<PciBus>, parts: &mut dyn Parts) -> PciDevice {
    parts.offer_bus(ChildBus::Pci(below.clone()));
    PciDevice::new(Bridge { name, config, below })
}

/// Capability identifier of slot numbering.
const SLOT_NUMBERING: u8 = 0x04;

/// What a function is in the hierarchy of PCI Express.
#[derive(Clone, Copy, PartialEq)]
enum ExpressKind {
    RootPort = 4,
    ToPci = 7,
}

/// The PCI Express capability (7.5.3). The slot offers no hot plug.
fn add_express(config: &mut Config, kind: ExpressKind, port: u8, slot: u16) {
    const VERSION: u16 = 2;
    const SLOT: u16 = 1 << 8;
    const ROLE_BASED_ERRORS: u32 = 1 << 15;
    /// 16 GT/s, 32 lanes, reports whether the link is up.
    const LINK: u32 = 4 | 32 << 4 | 1 << 20;
    const LINK_UP: u16 = 4 | 32 << 4 | 1 << 13;
    const PRESENT: u16 = 1 << 6;
    let root = kind == ExpressKind::RootPort;
    let mut body = [0u8; 0x3a];
    let mut mask = [0u8; 0x3a];
    // Offsets are the specification's; the capability's first two bytes are not in the body.
    let mut put = |at: usize, value: &[u8]| body[at - 2..at - 2 + value.len()].copy_from_slice(value);
    put(0x02, &(VERSION | (kind as u16) << 4 | if root { SLOT } else { 0 }).to_le_bytes());
    put(0x04, &ROLE_BASED_ERRORS.to_le_bytes());
    put(0x0c, &(LINK | u32::from(port) << 24).to_le_bytes());
    put(0x12, &LINK_UP.to_le_bytes());
    if root {
        put(0x14, &(u32::from(slot & 0x1fff) << 19).to_le_bytes());
        put(0x1a, &PRESENT.to_le_bytes());
        put(0x24, &(1u32 << 5 | 1 << 4).to_le_bytes()); // completion timeouts can be off; ARI is forwarded
    }
    let mut allow = |at: usize, bits: &[u8]| mask[at - 2..at - 2 + bits.len()].copy_from_slice(bits);
    allow(0x08, &[0xff, 0x7f]); // device control
    allow(0x10, &[0xfb, 0x0f]); // link control
    if root {
        allow(0x18, &[0xff, 0x1f]); // slot control
        allow(0x1c, &[0x0f, 0]); // root control
        allow(0x28, &[0x3f, 0]); // device control 2
    }
    config.add_capability(capability::EXPRESS, &body, &mask);
}

/// A bridge with its bus.
struct Bridge {
    name: &'static str,
    config: Config,
    below: Arc<PciBus>,
}

impl Device for Bridge {
    fn name(&self) -> &str {
        self.name
    }

    fn read(&mut self, _: RegionId, _: u64, _: &mut [u8]) {}

    fn write(&mut self, _: RegionId, _: u64, _: &[u8]) {}

    fn reset(&mut self) {
        self.config.reset();
    }

    fn save(&self) -> Result<State, StateError> {
        State::new(self.name, 1, &self.config.save())
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        self.config.load(state.unpack::<ConfigSaved>(self.name, 1)?).map(drop)
    }
}

impl PciFunction for Bridge {
    fn config(&self) -> &Config {
        &self.config
    }

    fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }

    fn secondary(&self) -> Option<Arc<PciBus>> {
        Some(self.below.clone())
    }
}
