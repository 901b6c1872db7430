//! The LPC bridge of the ICH9 (Intel ICH9 datasheet, 13.1): where power management and the chipset's own registers are,
//! and which ISA interrupts PCI's go to.

use super::function::chipset_function;
use super::placed::Placed;
use super::{AcpiPm, PirqRouter};
use bus::pci::{Config, Identity};
use bus::{Bus, Device, RegionId, Space, State, StateError};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, Weak};

const KIND: &str = "ich9-lpc";

mod offset {
    pub const PMBASE: u16 = 0x40;
    pub const ACPI_CONTROL: u16 = 0x44;
    pub const GPIO_BASE: u16 = 0x48;
    pub const GPIO_CONTROL: u16 = 0x4c;
    pub const PIRQ_A: u16 = 0x60;
    pub const SERIAL_IRQ: u16 = 0x64;
    pub const PIRQ_E: u16 = 0x68;
    pub const IO_DECODE: u16 = 0x80;
    pub const GENERIC_DECODE: u16 = 0x84;
    pub const GEN_PMCON_1: u16 = 0xa0;
    pub const RCBA: u16 = 0xf0;
}

const ACPI_ENABLE: u8 = 1 << 7;
const RCBA_ENABLE: u32 = 1;
const RCBA_LEN: u64 = 0x4000;
/// The part of the chipset configuration registers that there is.
const CHIPSET: std::ops::Range<u64> = 0x3000..0x3800;
/// Interrupt routes of devices 25 to 31: pin n to PIRQ n, as interrupts are wired.
const INTERRUPT_ROUTES: [u64; 7] = [0x3140, 0x3144, 0x3146, 0x3148, 0x314c, 0x3150, 0x3160];
const ROUTE_IN_ORDER: u16 = 0x3210;
/// General control and status; its bit 5 says that the TCO timer does not reboot the machine.
const GENERAL_CONTROL: u64 = 0x3410;
/// See [`GENERAL_CONTROL`].
const NO_REBOOT: u32 = 1 << 5;

/// What firmware would have set, for a machine without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LpcPreset {
    /// Ports of power management.
    pub pm_base: u16,
    /// Address of the chipset's registers, a multiple of 16 KiB.
    pub rcba: u32,
}

/// The bridge, device 31 function 0.
pub struct Lpc {
    config: Config,
    bus: Weak<Bus>,
    pirqs: Arc<PirqRouter>,
    pm: Arc<Mutex<AcpiPm>>,
    chipset: Arc<Mutex<ChipsetRegisters>>,
    pm_ports: Placed,
    chipset_memory: Placed,
}

impl Lpc {
    /// A bridge that places `pm` and `chipset`, and routes `pirqs`.
    pub fn new(
        bus: &Arc<Bus>,
        pirqs: Arc<PirqRouter>,
        pm: &Arc<Mutex<AcpiPm>>,
        chipset: &Arc<Mutex<ChipsetRegisters>>,
        preset: Option<LpcPreset>,
    ) -> Self {
        let mut config = Config::endpoint(
            KIND,
            Identity {
                vendor: 0x8086,
                device: 0x2918,
                class: 0x06_0100,
                revision: 2,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            },
        );
        config.set(offset::PMBASE, &[1]);
        config.allow(offset::PMBASE, &[0x80, 0xff]);
        config.allow(offset::ACPI_CONTROL, &[0x87]);
        config.set(offset::GPIO_BASE, &[1]);
        config.allow(offset::GPIO_BASE, &[0x80, 0xff]);
        config.allow(offset::GPIO_CONTROL, &[0x10]);
        for pirq in [offset::PIRQ_A, offset::PIRQ_E] {
            config.set(pirq, &[super::pirq::ROUTE_OFF; 4]);
            config.allow(pirq, &[0x8f; 4]);
        }
        config.set(offset::SERIAL_IRQ, &[0x10]);
        config.allow(offset::SERIAL_IRQ, &[0xc3]);
        config.allow(offset::IO_DECODE, &[0x77, 0x13, 0xff, 0x3f]);
        config.allow(offset::GENERIC_DECODE, &[0xfd, 0xff, 0xfc, 0].repeat(4));
        config.allow(offset::GEN_PMCON_1, &[0x1f, 0x06]);
        config.allow(offset::RCBA, &[1, 0xc0, 0xff, 0xff]);
        if let Some(preset) = preset {
            config.set(offset::PMBASE, &(preset.pm_base | 1).to_le_bytes());
            config.set(offset::ACPI_CONTROL, &[ACPI_ENABLE]);
            config.set(offset::RCBA, &(preset.rcba | RCBA_ENABLE).to_le_bytes());
        }
        let mut this = Self {
            config,
            bus: Arc::downgrade(bus),
            pirqs,
            pm: pm.clone(),
            chipset: chipset.clone(),
            pm_ports: Placed::new(Space::Port, AcpiPm::LENGTH),
            chipset_memory: Placed::new(Space::Memory, RCBA_LEN),
        };
        this.apply();
        this
    }

    fn apply(&mut self) {
        let c = &self.config;
        for n in 0..4 {
            self.pirqs.route(usize::from(n), c.get_u8(offset::PIRQ_A + n));
            self.pirqs.route(usize::from(n) + 4, c.get_u8(offset::PIRQ_E + n));
        }
        let pm = u64::from(c.get_u16(offset::PMBASE) & 0xff80);
        let pm = (c.get_u8(offset::ACPI_CONTROL) & ACPI_ENABLE != 0 && pm != 0).then_some(pm);
        let rcba = c.get_u32(offset::RCBA);
        let rcba = (rcba & RCBA_ENABLE != 0).then_some(u64::from(rcba & !0x3fff)).filter(|a| *a != 0);
        self.pm_ports.put(&self.bus, pm, &self.pm, AcpiPm::BLOCK);
        self.chipset_memory.put(&self.bus, rcba, &self.chipset, RegionId(0));
    }
}

chipset_function!(Lpc, KIND);

/// The chipset configuration registers (10.1), 16 KiB of memory at RCBA. Software reads back what it wrote.
pub struct ChipsetRegisters {
    bytes: Vec<u8>,
    no_reboot: super::tco::NoReboot,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    bytes: Vec<u8>,
}

impl ChipsetRegisters {
    /// The registers after reset; `no_reboot` follows their bit of that name.
    pub fn new(no_reboot: super::tco::NoReboot) -> Self {
        let mut this = Self { bytes: Vec::new(), no_reboot };
        this.reset();
        this
    }

    fn index(offset: u64) -> Option<usize> {
        CHIPSET.contains(&offset).then(|| (offset - CHIPSET.start) as usize)
    }

    fn apply(&self) {
        let at = (GENERAL_CONTROL - CHIPSET.start) as usize;
        self.no_reboot.set(u32::from(self.bytes[at]) & NO_REBOOT != 0);
    }
}

impl Device for ChipsetRegisters {
    fn name(&self) -> &str {
        "ich9-chipset"
    }

    fn read(&mut self, _: RegionId, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = Self::index(at).map_or(0, |i| self.bytes[i]);
        }
    }

    fn write(&mut self, _: RegionId, offset: u64, data: &[u8]) {
        for (byte, at) in data.iter().zip(offset..) {
            if let Some(i) = Self::index(at) {
                self.bytes[i] = *byte;
            }
        }
        self.apply();
    }

    fn reset(&mut self) {
        self.bytes = vec![0; (CHIPSET.end - CHIPSET.start) as usize];
        let put = |bytes: &mut [u8], at: u64, value: &[u8]| {
            let at = (at - CHIPSET.start) as usize;
            bytes[at..at + value.len()].copy_from_slice(value);
        };
        for at in INTERRUPT_ROUTES {
            put(&mut self.bytes, at, &ROUTE_IN_ORDER.to_le_bytes());
        }
        put(&mut self.bytes, GENERAL_CONTROL, &NO_REBOOT.to_le_bytes());
        self.apply();
    }

    fn save(&self) -> Result<State, StateError> {
        State::new("ich9-chipset", 1, &Saved { bytes: self.bytes.clone() })
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack("ich9-chipset", 1)?;
        if saved.bytes.len() != self.bytes.len() {
            let reason = "not 2 KiB of registers".into();
            return Err(StateError::Invalid { kind: "ich9-chipset".into(), reason });
        }
        self.bytes = saved.bytes;
        self.apply();
        Ok(())
    }
}
