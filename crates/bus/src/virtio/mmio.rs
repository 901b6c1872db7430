//! Virtio over MMIO, version 2 (virtio 1.2, 4.2).

use super::core::{Core, CoreSaved, Shared};
use super::{Interrupt, InterruptSink, Platform, VirtioDevice};
use crate::{Device, IrqLine, RegionId, State, StateError};
use accel::IoAddress;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// What we put as the subsystem vendor: Red Hat's PCI vendor ID, as for virtio-pci.
const VENDOR: u32 = 0x1af4;

/// Register offsets (virtio 1.2, 4.2.2).
mod reg {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(super) const QUEUE_NUM: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC: u64 = 0x080;
    pub(super) const QUEUE_DRIVER: u64 = 0x090;
    pub(super) const QUEUE_DEVICE: u64 = 0x0a0;
    pub(super) const SHM_LEN: u64 = 0x0b0;
    pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(super) const GENERATION: u64 = 0x0fc;
    pub(super) const CONFIG: u64 = 0x100;
}

struct Sink {
    shared: Arc<Shared>,
    line: IrqLine,
    status: Mutex<u8>,
}

impl Sink {
    fn status(&self) -> MutexGuard<'_, u8> {
        self.status.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn raise(&self, bit: u8) {
        let mut status = self.status();
        *status |= bit;
        self.line.set(true);
    }

    fn acknowledge(&self, bits: u8) {
        let mut status = self.status();
        *status &= !bits;
        if *status == 0 {
            self.line.set(false);
        }
    }
}

impl InterruptSink for Sink {
    fn queue(&self, _: u16) {
        self.raise(1);
    }

    fn config(&self) {
        self.shared.changed();
        self.raise(2);
    }

    fn fail(&self, reason: &str) {
        if self.shared.fail(reason) {
            self.raise(2);
        }
    }
}

/// A virtio device behind memory-mapped registers at a fixed address, with an interrupt line of its own.
pub struct VirtioMmio {
    core: Core,
    sink: Arc<Sink>,
    interrupt: Interrupt,
    base: u64,
}

impl std::fmt::Debug for VirtioMmio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VirtioMmio({} at {:#x})", self.core.device.name(), self.base)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    core: CoreSaved,
    interrupt_status: u8,
}

/// Version of [`Saved`].
const VERSION: u32 = 1;

impl VirtioMmio {
    /// Bytes that the registers take.
    pub const LEN: u64 = 0x200;

    /// Wraps a device. The owner maps [`Self::LEN`] bytes at `base` to region 0.
    pub fn new(device: Box<dyn VirtioDevice>, platform: &Platform, base: u64, line: IrqLine) -> Self {
        let core = Core::new(device, platform.memory.clone(), platform.doorbells.clone());
        let sink = Arc::new(Sink { shared: core.shared.clone(), line, status: Mutex::new(0) });
        let interrupt = Interrupt::new(sink.clone());
        Self { core, sink, interrupt, base }
    }

    fn attach_doorbells(&mut self) {
        let at = IoAddress::Mmio(self.base + reg::QUEUE_NOTIFY);
        self.core.attach(|queue| (at, 4, Some(queue.into())));
    }

    fn driver_reset(&mut self) {
        self.core.reset();
        self.sink.acknowledge(0xff);
    }

    fn read_register(&self, offset: u64) -> u32 {
        let core = &self.core;
        match offset {
            reg::MAGIC => MAGIC,
            reg::VERSION => 2,
            reg::DEVICE_ID => core.device.device_id(),
            reg::VENDOR_ID => VENDOR,
            reg::DEVICE_FEATURES => core.selected_device_features(),
            reg::QUEUE_NUM_MAX => core.selected_max().into(),
            reg::QUEUE_READY => core.selected().is_some_and(|q| q.ready).into(),
            reg::INTERRUPT_STATUS => (*self.sink.status()).into(),
            reg::STATUS => core.shared.status().into(),
            // There is no shared memory: length and address read as ones.
            reg::SHM_LEN..=reg::SHM_BASE_HIGH => u32::MAX,
            reg::GENERATION => core.shared.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let core = &mut self.core;
        match offset {
            reg::DEVICE_FEATURES_SEL => core.device_select = value,
            reg::DRIVER_FEATURES => core.write_driver_features(value),
            reg::DRIVER_FEATURES_SEL => core.driver_select = value,
            reg::QUEUE_SEL => core.queue_select = value.min(u16::MAX.into()) as u16,
            reg::QUEUE_NUM => core.set_size(value.min(u16::MAX.into()) as u16),
            reg::QUEUE_READY => core.set_ready(value & 1 != 0),
            reg::QUEUE_NOTIFY => {
                if let Ok(queue) = value.try_into() {
                    core.notify(queue);
                }
            }
            reg::INTERRUPT_ACK => self.sink.acknowledge(value as u8),
            reg::STATUS if value == 0 => self.driver_reset(),
            reg::STATUS => {
                let activated = core.write_status(value as u8, &self.interrupt);
                if activated {
                    self.attach_doorbells();
                }
            }
            o if o & !4 == reg::QUEUE_DESC => core.set_address(|q| &mut q.descriptors, o & 4 != 0, value),
            o if o & !4 == reg::QUEUE_DRIVER => core.set_address(|q| &mut q.driver, o & 4 != 0, value),
            o if o & !4 == reg::QUEUE_DEVICE => core.set_address(|q| &mut q.device, o & 4 != 0, value),
            _ => {}
        }
    }
}

impl Device for VirtioMmio {
    fn name(&self) -> &str {
        self.core.device.name()
    }

    fn read(&mut self, _: RegionId, offset: u64, data: &mut [u8]) {
        if offset >= reg::CONFIG {
            self.core.read_config(offset - reg::CONFIG, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        } else {
            data.fill(0);
        }
    }

    fn write(&mut self, _: RegionId, offset: u64, data: &[u8]) {
        if offset >= reg::CONFIG {
            self.core.device.write_config(offset - reg::CONFIG, data);
        } else if let ([a, b, c, d], true) = (data, offset.is_multiple_of(4)) {
            self.write_register(offset, u32::from_le_bytes([*a, *b, *c, *d]));
        }
    }

    fn start(&mut self) -> io::Result<()> {
        self.core.device.start()
    }

    fn pause(&mut self) -> io::Result<()> {
        self.core.device.pause()
    }

    fn reset(&mut self) {
        self.driver_reset();
    }

    fn save(&self) -> Result<State, StateError> {
        let saved = Saved { core: self.core.save()?, interrupt_status: *self.sink.status() };
        State::new(&format!("{}-mmio", self.core.device.name()), VERSION, &saved)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(&format!("{}-mmio", self.core.device.name()), VERSION)?;
        self.core.check(&saved.core)?;
        self.driver_reset();
        if saved.interrupt_status != 0 {
            self.sink.raise(saved.interrupt_status & 3);
        }
        self.core.load(saved.core, &self.interrupt)?;
        self.attach_doorbells();
        Ok(())
    }
}
