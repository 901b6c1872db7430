//! IDE adapter of the PIIX3 and PIIX4 (Intel 82371): two channels at the PC's fixed ports, with two drives each, PIO and
//! bus-master DMA.
//!
//! References are to ATA/ATAPI-6 (registers, protocols) and the Programming Interface for Bus Master IDE Controller 1.0.

mod channel;
#[cfg(test)]
mod tests;
mod transfer;

use super::Workers;
use super::ata::{AtaSaved, IdeBus};
use crate::model::{CreateError, Kind, Model, Parts};
use crate::place::{ChildBus, PciDevice};
use base::props::{Bag, Properties};
use bus::pci::{Bar, Config, ConfigSaved, Identity, PciFunction, reg};
use bus::{Device, IrqLine, RegionId, Space, State, StateError};
use channel::{Channel, ChannelSaved};
use memory::GuestMemory;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;

/// The adapter of the PIIX3 (`pc`).
pub const PIIX3: Model = Model {
    name: "piix3-ide",
    about: "IDE adapter (PIIX3); disks are ide-hd and ide-cd on its buses",
    properties: Properties::of::<Spec>,
    kind: Kind::Pci(|bag, parts, _| create(bag, parts, Chip::Piix3)),
};

/// The adapter of the PIIX4.
pub const PIIX4: Model = Model {
    name: "piix4-ide",
    about: "IDE adapter (PIIX4); disks are ide-hd and ide-cd on its buses",
    properties: Properties::of::<Spec>,
    kind: Kind::Pci(|bag, parts, _| create(bag, parts, Chip::Piix4)),
};

/// Properties of `piix3-ide` and `piix4-ide`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Spec {}

/// Which chip it is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chip {
    /// 82371SB.
    Piix3,
    /// 82371AB.
    Piix4,
}

fn create(bag: &Bag, parts: &mut dyn Parts, chip: Chip) -> Result<PciDevice, CreateError> {
    bag.spec::<Spec>()?;
    let lines = [parts.isa_irq(PiixIde::IRQS[0])?, parts.isa_irq(PiixIde::IRQS[1])?];
    let ide = PiixIde::new(chip, parts.memory().clone(), lines);
    for bus in ide.buses() {
        parts.offer_bus(ChildBus::Ide(bus));
    }
    let mut device = PciDevice::new(ide);
    for (first, count, region) in PiixIde::PORTS {
        device.fix(Space::Port, first.into(), count.into(), region);
    }
    Ok(device)
}

/// BAR of the bus-master registers.
const MASTER_BAR: u32 = 4;
/// Threads that go to images: a channel does one command at a time.
const THREADS: usize = 2;

/// The device.
pub struct PiixIde {
    config: Config,
    name: &'static str,
    channels: [Arc<Channel>; 2],
    workers: Arc<Workers>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    config: ConfigSaved,
    channels: [ChannelSaved; 2],
    drives: [Vec<Option<AtaSaved>>; 2],
}

impl PiixIde {
    /// ISA interrupts of the channels.
    pub const IRQS: [u8; 2] = [14, 15];
    /// First channel: command and control registers.
    pub const PRIMARY: [RegionId; 2] = [RegionId(8), RegionId(9)];
    /// Second channel.
    pub const SECONDARY: [RegionId; 2] = [RegionId(10), RegionId(11)];
    /// The fixed ports: first, how many, which region.
    pub const PORTS: [(u16, u16, RegionId); 4] = [
        (0x1f0, 8, Self::PRIMARY[0]),
        (0x3f6, 1, Self::PRIMARY[1]),
        (0x170, 8, Self::SECONDARY[0]),
        (0x376, 1, Self::SECONDARY[1]),
    ];

    /// An adapter without drives; `lines` are its interrupts.
    pub fn new(chip: Chip, memory: GuestMemory, lines: [IrqLine; 2]) -> Self {
        let (name, device) = match chip {
            Chip::Piix3 => (PIIX3.name, 0x7010),
            Chip::Piix4 => (PIIX4.name, 0x7111),
        };
        let mut config = Config::endpoint(
            name,
            Identity {
                vendor: 0x8086,
                device,
                class: 0x01_0180,
                revision: if chip == Chip::Piix3 { 0 } else { 1 },
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            },
        );
        config.set(0x40, &[0, 0x80, 0, 0x80]); // timing: both channels decode
        config.allow(0x40, &[0xff; 9]); // and slave timing, and DMA control
        config.allow(0x4a, &[0xff; 2]);
        config.add_bar(MASTER_BAR as u8, Bar::io(16));
        let workers = Arc::new(Workers::new("ide", THREADS));
        let [first, second] = lines;
        let channels = [(0, first), (1, second)]
            .map(|(n, line)| Arc::new(Channel::new(n, memory.clone(), line, workers.clone())));
        Self { config, name, channels, workers }
    }

    /// The channels' cables.
    pub fn buses(&self) -> [Arc<IdeBus>; 2] {
        self.channels.each_ref().map(|c| c.bus().clone())
    }

    fn decodes(&self, channel: usize) -> bool {
        self.config.get_u8(0x41 + 2 * channel as u16) & 0x80 != 0
    }

    /// The channel and whether it is its control register, of the fixed regions.
    fn place(at: RegionId) -> Option<(usize, bool)> {
        let n = at.0.checked_sub(Self::PRIMARY[0].0).filter(|n| *n < 4)?;
        Some(((n / 2) as usize, n % 2 == 1))
    }
}

impl Device for PiixIde {
    fn name(&self) -> &str {
        self.name
    }

    fn read(&mut self, at: RegionId, offset: u64, data: &mut [u8]) {
        match Self::place(at) {
            Some((channel, _)) if !self.decodes(channel) => {}
            Some((channel, true)) => data.fill(self.channels[channel].alternate_status()),
            Some((channel, false)) => self.channels[channel].read(offset as u8, data),
            None if at.0 == MASTER_BAR => {
                for (i, byte) in data.iter_mut().enumerate() {
                    let at = offset as usize + i;
                    *byte = self.channels[at >> 3 & 1].read_master(at & 7);
                }
            }
            None => data.fill(0),
        }
    }

    fn write(&mut self, at: RegionId, offset: u64, data: &[u8]) {
        match Self::place(at) {
            Some((channel, _)) if !self.decodes(channel) => {}
            Some((channel, true)) => self.channels[channel].write_control(data[0]),
            Some((channel, false)) => self.channels[channel].write(offset as u8, data),
            None if at.0 == MASTER_BAR => {
                for (i, byte) in data.iter().enumerate() {
                    let at = offset as usize + i;
                    self.channels[at >> 3 & 1].write_master(at & 7, *byte);
                }
            }
            None => {}
        }
    }

    fn start(&mut self) -> io::Result<()> {
        for channel in &self.channels {
            channel.start();
        }
        self.workers.resume();
        Ok(())
    }

    fn pause(&mut self) -> io::Result<()> {
        for channel in &self.channels {
            channel.pause();
        }
        self.workers.drain();
        Ok(())
    }

    fn reset(&mut self) {
        self.config.reset();
        for channel in &self.channels {
            channel.forget();
        }
        self.workers.abandon();
        for channel in &self.channels {
            channel.power_on();
        }
    }

    fn save(&self) -> Result<State, StateError> {
        let saved = Saved {
            config: self.config.save(),
            channels: self.channels.each_ref().map(|c| c.save()),
            drives: self.channels.each_ref().map(|c| c.bus().save()),
        };
        State::new(self.name, 1, &saved)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(self.name, 1)?;
        for channel in &self.channels {
            channel.forget();
        }
        self.workers.abandon();
        for (channel, drives) in self.channels.iter().zip(saved.drives) {
            channel.bus().load(drives)?;
        }
        self.config.load(saved.config)?;
        for (channel, saved) in self.channels.iter().zip(saved.channels) {
            channel.load(saved);
        }
        Ok(())
    }
}

impl PciFunction for PiixIde {
    fn config(&self) -> &Config {
        &self.config
    }

    fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        let on = self.config.get_u16(reg::COMMAND) & reg::COMMAND_MASTER != 0;
        for channel in &self.channels {
            channel.set_master(on);
        }
    }
}

impl Drop for PiixIde {
    fn drop(&mut self) {
        for channel in &self.channels {
            channel.forget();
        }
        self.workers.abandon();
    }
}
