//! What boards have in common: interrupt controllers, legacy devices, plugging.

use super::Builder;
use super::parts::Context;
use crate::acpi::{HPET_BASE, SerialPort, VirtioMmio as AcpiVirtioMmio};
use crate::{Error, Result};
use base::props::Bag;
use bus::virtio::{Platform, VirtioMmio, VirtioPci};
use bus::{Device, RegionId, SharedDevice, Space, shared};
use devices::chipset::{Hpet, Irqchip, IrqchipDevice, LegacyLine, Pit, Serial};
use devices::{Kind, find_model};
use std::sync::{Arc, Mutex};

/// A place for a virtio-mmio transport.
#[derive(Clone, Copy)]
pub(super) struct MmioSlot {
    pub(super) base: u64,
    pub(super) gsi: u32,
}

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

    /// Plugs the devices of the blueprint.
    pub(super) fn plug(&mut self, bags: &[Bag]) -> Result<()> {
        for bag in bags {
            self.plug_one(bag)?;
        }
        Ok(())
    }

    fn plug_one(&mut self, bag: &Bag) -> Result<()> {
        let model = find_model(&bag.driver)?;
        let mut context = Context {
            memory: &self.memory,
            vcpus: self.acpi.topology.count(),
            timers: &self.timers,
            system: &self.system,
            drives: &mut self.drives,
            chardevs: &mut self.chardevs,
            irqs: &self.irqs,
            pins: &mut self.pins,
        };
        match model.kind {
            Kind::Isa(create) => {
                let isa = create(bag, &mut context)?;
                let (start, len) = isa.ports;
                self.bus.map_shared(
                    Space::Port,
                    start.into(),
                    len.into(),
                    model.name,
                    isa.device.clone(),
                    RegionId(0),
                )?;
                self.devices.push(isa.device);
                Ok(())
            }
            Kind::Virtio(create) => {
                let device = create(bag, &mut context)?;
                let platform = Platform {
                    memory: self.memory.clone(),
                    irqs: self.irqs.clone(),
                    doorbells: self.vm.doorbells(),
                };
                let suffix = bag.driver.strip_prefix(model.name).unwrap_or_default();
                match (suffix, self.pci.clone()) {
                    ("-pci" | "", Some(pci)) => {
                        let slot = pci.free_slot().ok_or_else(|| {
                            Error::Config(format!("no PCI slot is free for {}", bag.driver))
                        })?;
                        let function = shared(VirtioPci::new(device, &platform));
                        pci.add(slot, 0, &function).map_err(|e| Error::Config(e.to_string()))
                    }
                    ("-pci", None) => Err(Error::Config(format!(
                        "{}: this machine has no PCI bus; use {}-device",
                        bag.driver, model.name
                    ))),
                    _ => self.plug_mmio(&bag.driver, device, &platform),
                }
            }
        }
    }

    fn plug_mmio(
        &mut self,
        name: &str,
        device: Box<dyn bus::virtio::VirtioDevice>,
        platform: &Platform,
    ) -> Result<()> {
        if self.mmio_slots.is_empty() {
            return Err(Error::Config(format!("{name}: no virtio-mmio slot is free on this machine")));
        }
        let MmioSlot { base, gsi } = self.mmio_slots.remove(0);
        let line = self.pin(gsi).line();
        let transport = self.own(VirtioMmio::new(device, platform, base, line));
        self.bus.map(Space::Memory, base, VirtioMmio::LEN, name, &transport, RegionId(0))?;
        self.acpi.virtio_mmio.push(AcpiVirtioMmio { base: base as u32, gsi });
        Ok(())
    }
}
