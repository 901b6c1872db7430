//! The PIIX3's ISA bridge and the PIIX4's power management, as the i440FX boards of virtual machines have them (Intel
//! 82371SB datasheet, 2.2; Intel 82371AB datasheet, 7.1 and 7.2).

use super::function::chipset_function;
use super::placed::Placed;
use super::{AcpiPm, PirqRouter, SmBus};
use bus::pci::{Config, Identity};
use bus::{Bus, RegionId, Space};
use std::sync::{Arc, Mutex, Weak};

const ISA: &str = "piix3-isa";
const PM: &str = "piix4-pm";

/// Routing registers of PIRQ A to D.
const PIRQ_A: u16 = 0x60;

const PM_BASE: u16 = 0x40;
/// Device activity; its bit 25 says that commands raise system management interrupts.
const SMI_ON_COMMAND: u16 = 0x5b;
const PM_CONTROL: u16 = 0x80;
const PM_ENABLE: u8 = 1;
const SMBUS_BASE: u16 = 0x90;
const SMBUS_CONTROL: u16 = 0xd2;
const SMBUS_ENABLE: u8 = 1;

fn identity(device: u16, class: u32, revision: u8) -> Identity {
    Identity { vendor: 0x8086, device, class, revision, subsystem_vendor: 0x1af4, subsystem: 0x1100 }
}

/// The ISA bridge, device 1 function 0.
pub struct Piix3 {
    config: Config,
    pirqs: Arc<PirqRouter>,
}

impl Piix3 {
    /// A bridge that routes `pirqs`; `preset` are the interrupts of PIRQ A to D at power-on, for a machine without
    /// firmware.
    pub fn new(pirqs: Arc<PirqRouter>, preset: Option<[u8; 4]>) -> Self {
        let mut config = Config::endpoint(ISA, identity(0x7000, 0x06_0100, 0));
        config.set(0x4c, &[0x4d]); // recovery times
        config.set(0x4e, &[0x03, 0]);
        config.allow(0x4e, &[0xff, 0xff]);
        config.set(PIRQ_A, &preset.unwrap_or([super::pirq::ROUTE_OFF; 4]));
        config.allow(PIRQ_A, &[0x8f; 4]);
        config.set(0x69, &[0x02]);
        let mut this = Self { config, pirqs };
        this.apply();
        this
    }

    fn apply(&mut self) {
        for n in 0..4 {
            self.pirqs.route(usize::from(n), self.config.get_u8(PIRQ_A + n));
        }
    }
}

/// The power management function, device 1 function 3.
pub struct Piix4Pm {
    config: Config,
    bus: Weak<Bus>,
    pm: Arc<Mutex<AcpiPm>>,
    smbus: Arc<Mutex<SmBus>>,
    pm_ports: Placed,
    smbus_ports: Placed,
}

impl Piix4Pm {
    /// A function that places `pm` and `smbus`; with `preset` they are at those ports at power-on.
    pub fn new(
        bus: &Arc<Bus>,
        pm: &Arc<Mutex<AcpiPm>>,
        smbus: &Arc<Mutex<SmBus>>,
        preset: Option<(u16, u16)>,
    ) -> Self {
        let mut config = Config::endpoint(PM, identity(0x7113, 0x06_8000, 3));
        config.add_intx(1);
        config.set(0x3c, &[9]);
        config.set(PM_BASE, &[1]);
        config.allow(PM_BASE, &[0xc0, 0xff]);
        // System management mode looks set up already, so that firmware leaves it alone: there is none.
        config.set(SMI_ON_COMMAND, &[2]);
        config.allow(PM_CONTROL, &[1]);
        config.set(SMBUS_BASE, &[1]);
        config.allow(SMBUS_BASE, &[0xf0, 0xff]);
        config.allow(SMBUS_CONTROL, &[0x0f]);
        if let Some((pm, smbus)) = preset {
            config.set(PM_BASE, &(pm | 1).to_le_bytes());
            config.set(PM_CONTROL, &[PM_ENABLE]);
            config.set(SMBUS_BASE, &(smbus | 1).to_le_bytes());
            config.set(SMBUS_CONTROL, &[SMBUS_ENABLE]);
        }
        let mut this = Self {
            config,
            bus: Arc::downgrade(bus),
            pm: pm.clone(),
            smbus: smbus.clone(),
            pm_ports: Placed::new(Space::Port, AcpiPm::LENGTH),
            smbus_ports: Placed::new(Space::Port, SmBus::PORTS),
        };
        this.apply();
        this
    }

    fn apply(&mut self) {
        let c = &self.config;
        let place = |base: u16, mask: u16, control: u16, enable: u8| {
            let at = u64::from(c.get_u16(base) & mask);
            (c.get_u8(control) & enable != 0 && at != 0).then_some(at)
        };
        let pm = place(PM_BASE, 0xffc0, PM_CONTROL, PM_ENABLE);
        let smbus = place(SMBUS_BASE, 0xfff0, SMBUS_CONTROL, SMBUS_ENABLE);
        self.pm_ports.put(&self.bus, pm, &self.pm, AcpiPm::BLOCK);
        self.smbus_ports.put(&self.bus, smbus, &self.smbus, RegionId(0));
    }
}

chipset_function!(Piix3, ISA);
chipset_function!(Piix4Pm, PM);
