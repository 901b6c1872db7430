//! What boards have in common: interrupt controllers, legacy devices.

use super::Builder;
use crate::acpi::{HPET_BASE, SerialPort};
use crate::{Error, Result};
use bus::{Device, RegionId, SharedDevice, Space, shared};
use devices::chipset::{Hpet, Irqchip, IrqchipDevice, LegacyLine, Pit, Serial};
use std::sync::{Arc, Mutex};

/// First port and interrupt of the PC's serial ports.
const SERIAL_PORTS: [(u16, u32); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

impl Builder {
    /// Keeps a device for start, pause, reset, and so on.
    pub(super) fn own<D: Device + 'static>(&mut self, device: D) -> Arc<Mutex<D>> {
        let device = shared(device);
        self.devices.push(device.clone() as SharedDevice);
        device
    }

    /// Maps ports.
    pub(super) fn ports<D: Device + 'static>(
        &self,
        device: &Arc<Mutex<D>>,
        start: u16,
        len: u16,
        name: &str,
        region: RegionId,
    ) -> Result<()> {
        Ok(self.bus.map(Space::Port, start.into(), len.into(), name, device, region)?)
    }

    /// The interrupt controllers' registers, and the timer chip, where the accelerator has none.
    pub(super) fn software_irqchip(&mut self, chip: &Arc<Irqchip>) -> Result<()> {
        let device = self.own(IrqchipDevice::new(chip.clone()));
        self.ports(&device, 0x20, 2, "pic", IrqchipDevice::MASTER)?;
        self.ports(&device, 0xa0, 2, "pic", IrqchipDevice::SLAVE)?;
        self.ports(&device, 0x4d0, 2, "elcr", IrqchipDevice::ELCR)?;
        self.bus.map(
            Space::Memory,
            IrqchipDevice::IOAPIC_ADDRESS,
            0x1000,
            "ioapic",
            &device,
            IrqchipDevice::IOAPIC,
        )?;
        Ok(())
    }

    /// The 8254 where the accelerator has none; its output goes through `line`.
    pub(super) fn software_pit(&mut self, line: LegacyLine) -> Result<()> {
        let pit = self.own(Pit::new(&self.clock, line));
        self.ports(&pit, 0x40, 4, "pit", Pit::COUNTERS)?;
        self.ports(&pit, 0x61, 1, "pit", Pit::PORT_B)
    }

    /// The HPET, which can take over the lines of PIT and RTC.
    pub(super) fn hpet(&mut self, pit: &LegacyLine, rtc: &LegacyLine) -> Result<()> {
        let irqs = self.irqs.clone();
        let hpet = Hpet::new(&self.clock, irqs, pit.clone(), rtc.clone());
        let hpet = self.own(hpet);
        self.bus.map(Space::Memory, HPET_BASE, 0x400, "hpet", &hpet, RegionId(0))?;
        self.acpi.hpet = true;
        Ok(())
    }

    /// Serial ports, each connected as the blueprint says.
    pub(super) fn serial_ports(&mut self) -> Result<()> {
        let ids = std::mem::take(&mut self.serials);
        if ids.len() > SERIAL_PORTS.len() {
            return Err(Error::Config(format!("{} serial ports are more than the 4 a PC has", ids.len())));
        }
        for (id, (port, gsi)) in ids.iter().zip(SERIAL_PORTS) {
            let chardev = self.take_chardev(id)?;
            let line = self.pin(gsi).line();
            let serial = self.own(Serial::new(chardev, line, &self.timers));
            self.ports(&serial, port, 8, "serial", RegionId(0))?;
            self.acpi.serial.push(SerialPort { port, gsi });
        }
        Ok(())
    }

    fn take_chardev(&mut self, id: &str) -> Result<Arc<dyn bus::Chardev>> {
        Ok(super::parts::take_chardev(&mut self.chardevs, id)?)
    }
}
