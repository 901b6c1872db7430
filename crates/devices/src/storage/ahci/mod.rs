//! AHCI host adapter (Serial ATA AHCI 1.3.1), as the ICH9 has: six ports, native command queueing, 64-bit addresses,
//! MSI.
//!
//! Register accesses come through the PCI function; commands are carried out by [`Workers`], which know the [`Hba`]
//! only. Lock order: the function, the adapter's state, interrupts.

mod fis;
mod hba;
mod port;
#[cfg(test)]
mod tests;

use super::Workers;
use super::ata::{AtaSaved, IdeBus};
use crate::model::{CreateError, Kind, Model, Parts};
use crate::place::{ChildBus, PciDevice};
use base::props::{Bag, Properties};
use bus::pci::{Bar, Config, ConfigSaved, Identity, PciFunction};
use bus::{Device, RegionId, State, StateError};
use hba::{Hba, HbaSaved};
use memory::GuestMemory;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;

/// The model.
pub const MODEL: Model = Model {
    name: "ich9-ahci",
    about: "SATA adapter with six ports (AHCI); disks are ide-hd and ide-cd on its buses",
    properties: Properties::of::<Spec>,
    kind: Kind::Pci(|bag, parts, _| create(bag, parts)),
};

/// Properties of `ich9-ahci`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Spec {}

fn create(bag: &Bag, parts: &mut dyn Parts) -> Result<PciDevice, CreateError> {
    bag.spec::<Spec>()?;
    let ahci = Ahci::new(parts.memory().clone(), parts.irqs());
    for bus in ahci.buses() {
        parts.offer_bus(ChildBus::Ide(bus.clone()));
    }
    Ok(PciDevice::new(ahci))
}

/// Number of ports.
pub const PORTS: usize = 6;
/// The registers' BAR, and that of their index and data pair.
const ABAR: u8 = 5;
const INDEX_BAR: u8 = 4;
/// Bytes of registers.
const REGISTERS: u64 = 0x1000;
/// Threads that go to images.
const THREADS: usize = 8;

/// The device.
pub struct Ahci {
    config: Config,
    hba: Arc<Hba>,
    /// Register that the data port shows.
    index: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    config: ConfigSaved,
    index: u32,
    hba: HbaSaved,
    drives: Vec<Vec<Option<AtaSaved>>>,
}

impl Ahci {
    /// An adapter without drives.
    pub fn new(memory: GuestMemory, irqs: Arc<dyn accel::Irqs>) -> Self {
        let mut config = Config::endpoint(
            MODEL.name,
            Identity {
                vendor: 0x8086,
                device: 0x2922,
                class: 0x01_0601,
                revision: 2,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            },
        );
        config.set(0x90, &[1 << 6]); // map register: AHCI mode
        config.add_bar(INDEX_BAR, Bar::io(32));
        config.add_bar(ABAR, Bar::memory32(REGISTERS));
        let intx = config.add_intx(1);
        let msi = config.add_msi(irqs, 0);
        // SATA capability (AHCI 1.3.1, 2.4): the index and data pair is at 0x10 of BAR 4.
        config.add_capability(0x12, &[0x10, 0, 0x48, 0, 0, 0], &[]);
        let hba = Hba::new(memory, intx, msi, Arc::new(Workers::new("ahci", THREADS)));
        Self { config, hba: Arc::new(hba), index: 0 }
    }

    /// The ports' cables.
    pub fn buses(&self) -> &[Arc<IdeBus>] {
        self.hba.buses()
    }

    fn read_register(&self, offset: u64, data: &mut [u8]) {
        // Registers are 32 bits wide; other accesses see the parts of them.
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset + i as u64;
            let word = self.hba.read((at & !3) as u32); // below 0x1000
            *byte = word.to_le_bytes()[(at & 3) as usize];
        }
    }

    fn write_register(&self, offset: u64, data: &[u8]) {
        match data.len() {
            4 | 8 if offset.is_multiple_of(4) => {
                for (i, word) in data.as_chunks::<4>().0.iter().enumerate() {
                    self.hba.write(offset as u32 + 4 * i as u32, u32::from_le_bytes(*word));
                }
            }
            // Narrow writes are not what the specification allows (2.2); the other bytes go unchanged, as far as
            // they are not cleared by ones.
            _ => {
                let register = (offset & !3) as u32;
                let mut word = self.hba.stored(register).to_le_bytes();
                let at = (offset & 3) as usize;
                for (to, from) in word[at..].iter_mut().zip(data) {
                    *to = *from;
                }
                self.hba.write(register, u32::from_le_bytes(word));
            }
        }
    }
}

impl Device for Ahci {
    fn name(&self) -> &str {
        MODEL.name
    }

    fn read(&mut self, at: RegionId, offset: u64, data: &mut [u8]) {
        match (at.0 as u8, offset) {
            (ABAR, _) => self.read_register(offset, data),
            (INDEX_BAR, 0x10) => {
                let bytes = self.index.to_le_bytes();
                let n = data.len().min(4);
                data[..n].copy_from_slice(&bytes[..n]);
            }
            (INDEX_BAR, 0x14) => self.read_register(self.index.into(), data),
            _ => data.fill(0),
        }
    }

    fn write(&mut self, at: RegionId, offset: u64, data: &[u8]) {
        match (at.0 as u8, offset) {
            (ABAR, _) => self.write_register(offset, data),
            (INDEX_BAR, 0x10) => {
                if let Ok(word) = <[u8; 4]>::try_from(data) {
                    self.index = u32::from_le_bytes(word) & (REGISTERS as u32 - 4);
                }
            }
            (INDEX_BAR, 0x14) if data.len() == 4 => self.write_register(self.index.into(), data),
            _ => {}
        }
    }

    fn start(&mut self) -> io::Result<()> {
        self.hba.start();
        Ok(())
    }

    fn pause(&mut self) -> io::Result<()> {
        self.hba.pause();
        Ok(())
    }

    fn reset(&mut self) {
        self.config.reset();
        self.index = 0;
        self.hba.power_on();
    }

    fn save(&self) -> Result<State, StateError> {
        let drives = self.buses().iter().map(|b| b.save()).collect();
        let saved = Saved { config: self.config.save(), index: self.index, hba: self.hba.save(), drives };
        State::new(MODEL.name, 1, &saved)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(MODEL.name, 1)?;
        let invalid = |reason: &str| StateError::Invalid { kind: MODEL.name.into(), reason: reason.into() };
        if saved.drives.len() != PORTS || !saved.hba.fits() {
            return Err(invalid("not of six ports"));
        }
        for (bus, drives) in self.buses().iter().zip(saved.drives) {
            bus.load(drives)?;
        }
        self.config.load(saved.config)?;
        self.index = saved.index & (REGISTERS as u32 - 4);
        self.hba.load(saved.hba);
        Ok(())
    }
}

impl PciFunction for Ahci {
    fn config(&self) -> &Config {
        &self.config
    }

    fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        let command = self.config.get_u16(bus::pci::reg::COMMAND);
        self.hba.set_master(command & bus::pci::reg::COMMAND_MASTER != 0);
    }
}

impl Drop for Ahci {
    fn drop(&mut self) {
        self.hba.power_on();
    }
}
