//! The host's side: configuration mechanism #1, ECAM, and the host bridge function.

use super::{Config, ConfigSaved, Identity, PciBus, PciFunction};
use crate::{Device, RegionId, State, StateError, System, SystemRequest};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Configuration mechanism #1 (PCI 3.0, 3.2.2.3.2), eight ports at 0xcf8: address at offset 0, data at offset 4.
///
/// The byte at offset 1 is the reset control register of PC chipsets (port 0xcf9, Intel ICH9 datasheet, 13.7.5),
/// which shares the address with the middle of the address register: that one takes only 32-bit accesses.
#[derive(Debug)]
pub struct ConfigPorts {
    root: Arc<PciBus>,
    system: Option<System>,
    address: u32,
    reset_control: u8,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PortsSaved {
    address: u32,
    reset_control: u8,
}

/// Reset control: what kind of reset, and the bit whose rise does it.
const RESET_KIND: u8 = 1 << 1 | 1 << 3;
const RESET_CPU: u8 = 1 << 2;

impl ConfigPorts {
    /// Ports that lead to `root`. With `system`, port 0xcf9 resets the machine.
    pub fn new(root: Arc<PciBus>, system: Option<System>) -> Self {
        Self { root, system, address: 0, reset_control: 0 }
    }

    /// Bus, devfn and register that an access to the data port at `lane` (0..4) addresses.
    fn target(&self, lane: u64) -> Option<(u8, u8, u16)> {
        let enabled = self.address >> 31 != 0;
        let a = self.address;
        enabled.then_some(((a >> 16) as u8, (a >> 8) as u8, (a & 0xfc) as u16 | lane as u16))
    }
}

impl Device for ConfigPorts {
    fn name(&self) -> &str {
        "pci-ports"
    }

    fn read(&mut self, _: RegionId, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (1, 1) if self.system.is_some() => data[0] = self.reset_control,
            (4..8, len) if offset + len as u64 <= 8 => {
                if let Some((bus, devfn, register)) = self.target(offset - 4) {
                    self.root.config_read(bus, devfn, register, data);
                }
            }
            _ => {}
        }
    }

    fn write(&mut self, _: RegionId, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [a, b, c, d]) => self.address = u32::from_le_bytes([*a, *b, *c, *d]) & 0x80ff_fffc,
            (1, [value]) => {
                let rose = value & RESET_CPU != 0 && self.reset_control & RESET_CPU == 0;
                self.reset_control = value & (RESET_KIND | RESET_CPU);
                if let (true, Some(system)) = (rose, &self.system) {
                    system.request(SystemRequest::Reset);
                }
            }
            (4..8, data) if offset + data.len() as u64 <= 8 => {
                if let Some((bus, devfn, register)) = self.target(offset - 4) {
                    self.root.config_write(bus, devfn, register, data);
                }
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.address = 0;
        self.reset_control = 0;
    }

    fn save(&self) -> Result<State, StateError> {
        State::new("pci-ports", 1, &PortsSaved { address: self.address, reset_control: self.reset_control })
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: PortsSaved = state.unpack("pci-ports", 1)?;
        self.address = saved.address & 0x80ff_fffc;
        self.reset_control = saved.reset_control & (RESET_KIND | RESET_CPU);
        Ok(())
    }
}

/// Memory-mapped configuration space (PCIe 5.0, 7.2.2): 4 KiB a function, 1 MiB a bus.
#[derive(Debug)]
pub struct Ecam {
    root: Arc<PciBus>,
    buses: u16,
}

impl Ecam {
    /// A window onto `buses` (1 to 256) buses from 0 up; the caller maps it, `buses` MiB long.
    pub fn new(root: Arc<PciBus>, buses: u16) -> Self {
        Self { root, buses: buses.clamp(1, 256) }
    }

    /// Length of the window in bytes.
    pub fn window_len(&self) -> u64 {
        u64::from(self.buses) << 20
    }

    /// Splits an access into ones that stay in a double word; longer ones are made of 32-bit ones, as root complexes do.
    fn split(&self, offset: u64, len: usize, mut each: impl FnMut(u8, u8, u16, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let n = (4 - (at & 3) as usize).min(len - done);
            if at < self.window_len() {
                each((at >> 20) as u8, (at >> 12) as u8, (at & 0xfff) as u16, done..done + n);
            }
            done += n;
        }
    }
}

impl Device for Ecam {
    fn name(&self) -> &str {
        "pci-ecam"
    }

    fn read(&mut self, _: RegionId, offset: u64, data: &mut [u8]) {
        let len = data.len();
        self.split(offset, len, |bus, devfn, register, part| {
            self.root.config_read(bus, devfn, register, &mut data[part]);
        });
    }

    fn write(&mut self, _: RegionId, offset: u64, data: &[u8]) {
        self.split(offset, data.len(), |bus, devfn, register, part| {
            self.root.config_write(bus, devfn, register, &data[part]);
        });
    }

    fn reset(&mut self) {}

    fn save(&self) -> Result<State, StateError> {
        State::new("pci-ecam", 1, &())
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        state.unpack("pci-ecam", 1)
    }
}

/// The host bridge function, device 0 of bus 0.
#[derive(Debug)]
pub struct HostBridge {
    config: Config,
}

/// Offset of PCIEXBAR in the Q35 memory controller hub (Intel 3 Series datasheet, 5.1.16).
const PCIEXBAR: u16 = 0x60;

impl HostBridge {
    /// Intel's Q35 memory controller hub, the subsystem QEMU's. `ecam` is where the ECAM window lies (aligned to its
    /// size) and its number of buses (64, 128 or 256), which PCIEXBAR then shows.
    pub fn q35(ecam: Option<(u64, u16)>) -> Self {
        let mut config = Config::endpoint(
            "pci-host",
            Identity {
                vendor: 0x8086,
                device: 0x29c0,
                class: 0x06_0000,
                revision: 0,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            },
        );
        if let Some((base, buses)) = ecam {
            let length = match buses {
                ..=64 => 2,
                65..=128 => 1,
                _ => 0,
            };
            config.set(PCIEXBAR, &(base & !0xfff | length << 1 | 1).to_le_bytes());
        }
        Self { config }
    }
}

impl Device for HostBridge {
    fn name(&self) -> &str {
        "pci-host"
    }

    fn read(&mut self, _: RegionId, _: u64, _: &mut [u8]) {}

    fn write(&mut self, _: RegionId, _: u64, _: &[u8]) {}

    fn reset(&mut self) {
        self.config.reset();
    }

    fn save(&self) -> Result<State, StateError> {
        State::new("pci-host", 1, &self.config.save())
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        self.config.load(state.unpack::<ConfigSaved>("pci-host", 1)?).map(drop)
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &Config {
        &self.config
    }

    fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }
}
