//! The SMBus host controller of the PIIX4 and the ICH9 (Intel ICH9 datasheet, 19.2; Intel 82371AB datasheet, 7.2).
//! No device is on its bus, so every transaction ends with the error that nobody answered.

use bus::pci::{Bar, Config, ConfigSaved, Identity, PciFunction};
use bus::{Device, RegionId, State, StateError};
use serde::{Deserialize, Serialize};

const KIND: &str = "smbus";
const FUNCTION: &str = "ich9-smbus";

mod offset {
    pub const STATUS: u64 = 0;
    pub const CONTROL: u64 = 2;
    pub const COMMAND: u64 = 3;
    pub const ADDRESS: u64 = 4;
    pub const DATA0: u64 = 5;
    pub const DATA1: u64 = 6;
    pub const BLOCK: u64 = 7;
    pub const AUXILIARY_CONTROL: u64 = 13;
}

/// Status: somebody uses the controller (a semaphore: reading sets it).
const IN_USE: u8 = 1 << 6;
const DEVICE_ERROR: u8 = 1 << 2;
/// Status bits that writing a one clears.
const CLEARED: u8 = 0xfe;
const START: u8 = 1 << 6;

/// The registers.
pub struct SmBus {
    r: Registers,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Registers {
    status: u8,
    control: u8,
    command: u8,
    address: u8,
    data: [u8; 2],
    block: u8,
    auxiliary_control: u8,
}

impl Default for SmBus {
    fn default() -> Self {
        Self::new()
    }
}

impl SmBus {
    /// Number of ports.
    pub const PORTS: u64 = 16;

    /// A controller after reset.
    pub fn new() -> Self {
        Self { r: Registers::default() }
    }

    fn read_byte(&mut self, at: u64) -> u8 {
        let r = &mut self.r;
        match at {
            offset::STATUS => {
                let status = r.status;
                r.status |= IN_USE;
                status
            }
            offset::CONTROL => r.control & !START,
            offset::COMMAND => r.command,
            offset::ADDRESS => r.address,
            offset::DATA0 | offset::DATA1 => r.data[(at - offset::DATA0) as usize],
            offset::BLOCK => r.block,
            offset::AUXILIARY_CONTROL => r.auxiliary_control,
            _ => 0,
        }
    }

    fn write_byte(&mut self, at: u64, value: u8) {
        let r = &mut self.r;
        match at {
            offset::STATUS => r.status &= !(value & CLEARED),
            offset::CONTROL => {
                r.control = value;
                if value & START != 0 {
                    r.status |= DEVICE_ERROR;
                }
            }
            offset::COMMAND => r.command = value,
            offset::ADDRESS => r.address = value,
            offset::DATA0 | offset::DATA1 => r.data[(at - offset::DATA0) as usize] = value,
            offset::BLOCK => r.block = value,
            offset::AUXILIARY_CONTROL => r.auxiliary_control = value & 3,
            _ => {}
        }
    }
}

impl Device for SmBus {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, _: RegionId, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = self.read_byte(at);
        }
    }

    fn write(&mut self, _: RegionId, offset: u64, data: &[u8]) {
        for (byte, at) in data.iter().zip(offset..) {
            self.write_byte(at, *byte);
        }
    }

    fn reset(&mut self) {
        self.r = Registers::default();
    }

    fn save(&self) -> Result<State, StateError> {
        State::new(KIND, 1, &self.r)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        self.r = state.unpack(KIND, 1)?;
        Ok(())
    }
}

/// The ICH9's controller as a PCI function, device 31 function 3.
pub struct Ich9SmBus {
    config: Config,
    smbus: SmBus,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    config: ConfigSaved,
    registers: Registers,
}

impl Default for Ich9SmBus {
    fn default() -> Self {
        Self::new()
    }
}

impl Ich9SmBus {
    /// Which BAR has the ports.
    const BAR: u8 = 4;

    /// A function after reset.
    pub fn new() -> Self {
        let mut config = Config::endpoint(
            FUNCTION,
            Identity {
                vendor: 0x8086,
                device: 0x2930,
                class: 0x0c_0500,
                revision: 2,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            },
        );
        config.add_intx(1);
        config.add_bar(Self::BAR, Bar::io(32));
        config.allow(0x40, &[0x0f]); // host configuration
        config.set(0x40, &[1]); // enabled
        Self { config, smbus: SmBus::new() }
    }
}

impl Device for Ich9SmBus {
    fn name(&self) -> &str {
        FUNCTION
    }

    fn read(&mut self, at: RegionId, offset: u64, data: &mut [u8]) {
        if at == RegionId(Self::BAR.into()) {
            self.smbus.read(at, offset, data);
        }
    }

    fn write(&mut self, at: RegionId, offset: u64, data: &[u8]) {
        if at == RegionId(Self::BAR.into()) {
            self.smbus.write(at, offset, data);
        }
    }

    fn reset(&mut self) {
        self.config.reset();
        self.smbus.reset();
    }

    fn save(&self) -> Result<State, StateError> {
        State::new(FUNCTION, 1, &Saved { config: self.config.save(), registers: self.smbus.r })
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(FUNCTION, 1)?;
        self.config.load(saved.config)?;
        self.smbus.r = saved.registers;
        Ok(())
    }
}

impl PciFunction for Ich9SmBus {
    fn config(&self) -> &Config {
        &self.config
    }

    fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_answers() {
        let mut s = SmBus::new();
        let get = |s: &mut SmBus, at| {
            let mut b = [0];
            s.read(RegionId(0), at, &mut b);
            b[0]
        };
        assert_eq!((get(&mut s, 0), get(&mut s, 0)), (0, IN_USE));
        s.write(RegionId(0), 4, &[0xa1]);
        s.write(RegionId(0), 2, &[0x48]);
        assert_eq!((get(&mut s, 0), get(&mut s, 2)), (IN_USE | DEVICE_ERROR, 8));
        s.write(RegionId(0), 0, &[0xff]);
        assert_eq!(get(&mut s, 0), 0);
    }
}
