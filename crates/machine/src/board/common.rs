//! What boards have in common: interrupt controllers, legacy devices.

use super::Builder;
use crate::acpi::{HPET_BASE, SerialPort};
use crate::blueprint::BoardSpec;
use crate::{Error, Result};
use bus::{Device, RegionId, SharedDevice, Space, shared};
use devices::chipset::{
    AcpiPm, Hpet, I8042, Irqchip, IrqchipDevice, LegacyLine, Pit, Rtc, RtcBase, Serial, SystemPorts,
};
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

    /// What every PC has: timers, clock, keyboard controller, odd ports.
    pub(super) fn legacy(&mut self, spec: &BoardSpec) -> Result<()> {
        let pit_line = LegacyLine::new(self.pin(0).line());
        let rtc_line = LegacyLine::new(self.pin(8).line());
        if self.irqchip.is_some() {
            self.software_pit(pit_line.clone())?;
        }
        // With KVM the timer chip is in the kernel, out of the HPET's reach.
        if spec.hpet.unwrap_or(self.irqchip.is_some()) {
            self.hpet(&pit_line, &rtc_line)?;
        }
        let rtc = self.own(Rtc::new(&self.clock.clone(), rtc_line, RtcBase::Utc));
        self.ports(&rtc, 0x70, 2, "rtc", RegionId(0))?;
        self.cmos(&rtc);
        self.acpi.rtc = true;

        let (keyboard, mouse) = (self.pin(1).line(), self.pin(12).line());
        let i8042 = self.own(I8042::new(self.system.clone(), keyboard, mouse));
        self.ports(&i8042, 0x60, 1, "i8042", I8042::DATA)?;
        self.ports(&i8042, 0x64, 1, "i8042", I8042::COMMAND)?;
        I8042::connect_input(&i8042, self.displays.input());
        self.acpi.i8042 = true;
        let ports = self.own(SystemPorts::new(self.system.clone()));
        self.ports(&ports, 0x80, 1, "post", SystemPorts::POST)?;
        self.ports(&ports, 0x92, 1, "port92", SystemPorts::CONTROL)?;
        self.ports(&ports, 0xed, 1, "delay", SystemPorts::DELAY)?;
        Ok(())
    }

    /// The power button is that of `pm`.
    pub(super) fn press_through(&mut self, pm: &Arc<Mutex<AcpiPm>>) {
        let button = pm.clone();
        self.power_button = Some(Box::new(move || {
            if !button.lock().unwrap_or_else(|e| e.into_inner()).press_power_button() {
                tracing::warn!("the guest does not listen to the power button");
            }
        }));
    }

    /// What firmware looks for in the real-time clock's memory.
    pub(super) fn cmos(&self, rtc: &Arc<Mutex<Rtc>>) {
        const CPUS: u8 = 0x5f;
        const BOOT_ORDER: [u8; 2] = [0x3d, 0x38];
        let rtc = rtc.lock().unwrap_or_else(|e| e.into_inner());
        let low = self.memory.regions()[0].len();
        rtc.set_memory(low, self.memory.total() - low);
        rtc.set_byte(CPUS, (self.acpi.topology.count() - 1).min(255) as u8);
        let (first, second) = self.boot.cmos(true);
        rtc.set_byte(BOOT_ORDER[0], first);
        rtc.set_byte(BOOT_ORDER[1], second);
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
