//! Virtio over PCI, modern interface only (virtio 1.2, 4.1).

use super::core::{Core, CoreSaved, Shared};
use super::{Interrupt, InterruptSink, Platform, VirtioDevice, device_id};
use crate::pci::{Bar, Config, ConfigSaved, Identity, Intx, Msix, MsixVectors, PciFunction, capability};
use crate::{Device, RegionId, State, StateError};
use accel::IoAddress;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// BAR of the MSI-X table, and that of the registers; the numbers QEMU uses.
const MSIX_BAR: u8 = 1;
const REGISTER_BAR: u8 = 4;
/// Pages of the register BAR, one a structure.
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const PAGE: u64 = 0x1000;
/// Distance of the queues' notification addresses.
const NOTIFY_STEP: u32 = 4;

/// Structure types (virtio 1.2, 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// "No vector" (virtio 1.2, 4.1.4.3).
const NO_VECTOR: u16 = 0xffff;

/// Where the interrupts go, and the registers that say so.
struct Sink {
    shared: Arc<Shared>,
    vectors: MsixVectors,
    intx: Arc<Intx>,
    isr: Mutex<u8>,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
}

impl Sink {
    fn isr(&self) -> MutexGuard<'_, u8> {
        self.isr.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn raise(&self, vector: &AtomicU16, bit: u8) {
        if self.vectors.enabled() {
            let vector = vector.load(Ordering::SeqCst);
            if vector != NO_VECTOR {
                self.vectors.notify(vector);
            }
            return;
        }
        let mut isr = self.isr();
        *isr |= bit;
        self.intx.set(true);
    }

    fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        let mut isr = self.isr();
        *isr = 0;
        self.intx.set(false);
    }
}

impl InterruptSink for Sink {
    fn queue(&self, queue: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.raise(vector, 1);
        }
    }

    fn config(&self) {
        self.shared.changed();
        self.raise(&self.config_vector, 2);
    }

    fn fail(&self, reason: &str) {
        if self.shared.fail(reason) {
            self.raise(&self.config_vector, 2);
        }
    }
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    core: Core,
    config: Config,
    sink: Arc<Sink>,
    interrupt: Interrupt,
    /// Offset of the PCI configuration access capability.
    window: u16,
    /// Where the kernel watches for notifications.
    doorbells_at: Option<u64>,
}

impl std::fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("VirtioPci").field(&self.config).finish()
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    config: ConfigSaved,
    core: CoreSaved,
    isr: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

/// Version of [`Saved`].
const VERSION: u32 = 1;

/// Class code of a device type (PCI Code and ID Assignment Specification), as drivers know it from QEMU.
fn class(id: u32) -> u32 {
    match id {
        device_id::NET => 0x02_0000,
        device_id::BLOCK | device_id::SCSI => 0x01_0000,
        device_id::CONSOLE | device_id::VSOCK => 0x07_8000,
        device_id::P9 => 0x00_0200,
        device_id::GPU => 0x03_8000,
        device_id::INPUT => 0x09_8000,
        device_id::FS => 0x01_8000,
        _ => 0x00_ff00,
    }
}

/// A structure's capability without ID and next pointer (virtio 1.2, 4.1.4).
fn structure(kind: u8, offset: u64, len: u64, extra: Option<u32>) -> Vec<u8> {
    let cap_len = 16 + if extra.is_some() { 4 } else { 0 };
    let mut body = vec![cap_len, kind, REGISTER_BAR, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes()); // below 16 KiB
    body.extend((len as u32).to_le_bytes());
    body.extend(extra.map(u32::to_le_bytes).iter().flatten());
    body
}

impl VirtioPci {
    /// Makes a function of a device, with an MSI-X vector for each queue and one for configuration changes.
    pub fn new(device: Box<dyn VirtioDevice>, platform: &Platform) -> Self {
        let id = device.device_id();
        let mut config = Config::endpoint(
            device.name(),
            Identity {
                vendor: 0x1af4,
                device: 0x1040 + id as u16, // device types are small
                class: class(id),
                revision: 1,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            },
        );
        let core = Core::new(device, platform.memory.clone(), platform.doorbells.clone());
        let queues = core.queue_count();
        let vectors =
            MsixVectors::new(platform.irqs.clone(), platform.doorbells.clone(), queues.saturating_add(1));
        let msix = Msix { vectors: vectors.clone(), bar: MSIX_BAR, table: 0, pba: 0 };
        let pba = msix.table_len().next_multiple_of(0x800);
        let size = (pba + msix.pba_len()).next_power_of_two().max(PAGE);
        config.add_bar(MSIX_BAR, Bar::memory32(size));
        config.add_bar(REGISTER_BAR, Bar::memory64(4 * PAGE).prefetchable());
        config.add_msix(Msix { pba: pba as u32, ..msix }); // at most 2048 vectors
        config.add_capability(capability::VENDOR, &structure(CFG_COMMON, COMMON, PAGE, None), &[]);
        config.add_capability(capability::VENDOR, &structure(CFG_ISR, ISR, PAGE, None), &[]);
        config.add_capability(capability::VENDOR, &structure(CFG_DEVICE, DEVICE, PAGE, None), &[]);
        let notify = structure(CFG_NOTIFY, NOTIFY, PAGE, Some(NOTIFY_STEP));
        config.add_capability(capability::VENDOR, &notify, &[]);
        // The window's BAR, offset, length and data are the driver's to set; a window nobody set reaches nothing.
        let mut window = structure(CFG_PCI, 0, 0, Some(0));
        window[2] = 0;
        let mask =
            [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let window = config.add_capability(capability::VENDOR, &window, &mask);
        let intx = config.add_intx(1);
        let sink = Arc::new(Sink {
            shared: core.shared.clone(),
            vectors,
            intx,
            isr: Mutex::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        });
        let interrupt = Interrupt::new(sink.clone());
        Self { core, config, sink, interrupt, window, doorbells_at: None }
    }

    /// Keeps the kernel's doorbells where the notification BAR is.
    fn place_doorbells(&mut self) {
        let base = self.config.bar_address(REGISTER_BAR).filter(|_| self.core.is_active());
        let wanted = base.map(|b| b + NOTIFY);
        if wanted == self.doorbells_at {
            return;
        }
        self.core.detach();
        self.doorbells_at = wanted;
        if let Some(at) = wanted {
            let place = |queue| (IoAddress::Mmio(at + u64::from(queue) * u64::from(NOTIFY_STEP)), 0, None);
            self.core.attach(place);
        }
    }

    fn driver_reset(&mut self) {
        self.core.reset();
        self.doorbells_at = None;
        self.sink.reset();
    }

    fn vector(&self, queue: u16) -> Option<&AtomicU16> {
        self.sink.queue_vectors.get(usize::from(queue))
    }

    /// The common configuration structure (virtio 1.2, 4.1.4.3) as it reads now.
    fn common(&self) -> [u8; 64] {
        let mut r = [0; 64];
        let core = &self.core;
        let mut put = |at: usize, bytes: &[u8]| r[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &core.device_select.to_le_bytes());
        put(4, &core.selected_device_features().to_le_bytes());
        put(8, &core.driver_select.to_le_bytes());
        put(12, &core.selected_driver_features().to_le_bytes());
        put(16, &self.sink.config_vector.load(Ordering::SeqCst).to_le_bytes());
        put(18, &core.queue_count().to_le_bytes());
        put(20, &[core.shared.status(), core.shared.generation() as u8]);
        put(22, &core.queue_select.to_le_bytes());
        let vector = self.vector(core.queue_select).map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst));
        put(26, &vector.to_le_bytes());
        if let Some(queue) = core.selected() {
            put(24, &queue.size.to_le_bytes());
            put(28, &u16::from(queue.ready).to_le_bytes());
            put(30, &core.queue_select.to_le_bytes());
            put(32, &queue.descriptors.to_le_bytes());
            put(40, &queue.driver.to_le_bytes());
            put(48, &queue.device.to_le_bytes());
            put(56, &core.queue_select.to_le_bytes());
        }
        r
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (20, [value, ..]) => self.write_status(*value),
            (_, [a, b]) => self.write_common_16(offset, u16::from_le_bytes([*a, *b])),
            (_, [a, b, c, d]) => self.write_common_32(offset, u32::from_le_bytes([*a, *b, *c, *d])),
            (32 | 40 | 48, [low @ .., _, _, _, _]) if data.len() == 8 => {
                self.write_common(offset, low);
                self.write_common(offset + 4, &data[4..]);
            }
            _ => {}
        }
    }

    fn write_common_16(&mut self, offset: u64, value: u16) {
        // A vector that does not exist reads back as none, which tells the driver (virtio 1.2, 4.1.5.1.2.1).
        let checked = if value < self.sink.vectors.count() { value } else { NO_VECTOR };
        match offset {
            16 => self.sink.config_vector.store(checked, Ordering::SeqCst),
            22 => self.core.queue_select = value,
            24 => self.core.set_size(value),
            26 => {
                if let Some(vector) = self.vector(self.core.queue_select) {
                    vector.store(checked, Ordering::SeqCst);
                }
            }
            // Only reset disables a queue.
            28 if value == 1 => self.core.set_ready(true),
            _ => {}
        }
    }

    fn write_common_32(&mut self, offset: u64, value: u32) {
        match offset {
            0 => self.core.device_select = value,
            8 => self.core.driver_select = value,
            12 => self.core.write_driver_features(value),
            32 | 36 => self.core.set_address(|q| &mut q.descriptors, offset == 36, value),
            40 | 44 => self.core.set_address(|q| &mut q.driver, offset == 44, value),
            48 | 52 => self.core.set_address(|q| &mut q.device, offset == 52, value),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            self.driver_reset();
        } else if self.core.write_status(value, &self.interrupt) {
            self.place_doorbells();
        }
    }

    fn read_bar(&mut self, bar: u32, offset: u64, data: &mut [u8]) {
        if self.config.msix().is_some_and(|m| m.read(bar, offset, data)) || bar != u32::from(REGISTER_BAR) {
            return;
        }
        let at = offset % PAGE;
        match offset - at {
            COMMON => {
                let registers = self.common();
                for (i, byte) in data.iter_mut().enumerate() {
                    *byte = registers.get(at as usize + i).copied().unwrap_or(0);
                }
            }
            ISR => {
                data.fill(0);
                if at == 0 {
                    let mut isr = self.sink.isr();
                    data[0] = std::mem::take(&mut *isr);
                    self.sink.intx.set(false);
                }
            }
            DEVICE => self.core.read_config(at, data),
            _ => data.fill(0), // notification addresses are for writing
        }
    }

    fn write_bar(&mut self, bar: u32, offset: u64, data: &[u8]) {
        if self.config.msix().is_some_and(|m| m.write(bar, offset, data)) || bar != u32::from(REGISTER_BAR) {
            return;
        }
        let at = offset % PAGE;
        match offset - at {
            COMMON => self.write_common(at, data),
            DEVICE => self.core.device.write_config(at, data),
            NOTIFY => self.core.notify((at / u64::from(NOTIFY_STEP)) as u16), // below 1024
            _ => {}
        }
    }

    /// BAR, offset and length that the configuration access window is set to, if that is possible
    /// (virtio 1.2, 4.1.4.9).
    fn window_target(&self) -> Option<(u32, u64, usize)> {
        let bar = self.config.get_u8(self.window + 4);
        let offset = u64::from(self.config.get_u32(self.window + 8));
        let len = u64::from(self.config.get_u32(self.window + 12));
        let size = self.config.bar(bar)?.size;
        let possible = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len) && offset < size;
        possible.then_some((bar.into(), offset, len as usize))
    }

    /// Whether an access to configuration space is to the window's data.
    fn in_window(&self, offset: u16) -> bool {
        (self.window + 16..self.window + 20).contains(&offset)
    }
}

impl Device for VirtioPci {
    fn name(&self) -> &str {
        self.config.name()
    }

    fn read(&mut self, at: RegionId, offset: u64, data: &mut [u8]) {
        self.read_bar(at.0, offset, data);
    }

    fn write(&mut self, at: RegionId, offset: u64, data: &[u8]) {
        self.write_bar(at.0, offset, data);
    }

    fn start(&mut self) -> io::Result<()> {
        self.core.device.start()
    }

    fn pause(&mut self) -> io::Result<()> {
        self.core.device.pause()
    }

    fn reset(&mut self) {
        self.driver_reset();
        self.config.reset();
    }

    fn save(&self) -> Result<State, StateError> {
        let saved = Saved {
            config: self.config.save(),
            core: self.core.save()?,
            isr: *self.sink.isr(),
            config_vector: self.sink.config_vector.load(Ordering::SeqCst),
            queue_vectors: self.sink.queue_vectors.iter().map(|v| v.load(Ordering::SeqCst)).collect(),
        };
        State::new(&format!("{}-pci", self.config.name()), VERSION, &saved)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let kind = format!("{}-pci", self.config.name());
        let saved: Saved = state.unpack(&kind, VERSION)?;
        if saved.queue_vectors.len() != self.sink.queue_vectors.len() {
            return Err(StateError::Invalid { kind, reason: "the number of queues differs".into() });
        }
        self.core.check(&saved.core)?;
        self.driver_reset();
        self.config.load(saved.config)?;
        let checked = |v: u16| if v < self.sink.vectors.count() { v } else { NO_VECTOR };
        self.sink.config_vector.store(checked(saved.config_vector), Ordering::SeqCst);
        for (vector, value) in self.sink.queue_vectors.iter().zip(saved.queue_vectors) {
            vector.store(checked(value), Ordering::SeqCst);
        }
        *self.sink.isr() = saved.isr & 3;
        self.core.load(saved.core, &self.interrupt)?;
        self.place_doorbells();
        Ok(())
    }
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &Config {
        &self.config
    }

    fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }

    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        if self.in_window(offset)
            && let Some((bar, at, len)) = self.window_target()
        {
            let mut value = [0; 4];
            self.read_bar(bar, at, &mut value[..len]);
            self.config.set(self.window + 16, &value);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        if self.config.write(offset, data) {
            self.place_doorbells();
        }
        if self.in_window(offset)
            && let Some((bar, at, len)) = self.window_target()
        {
            let value = self.config.get_u32(self.window + 16).to_le_bytes();
            self.write_bar(bar, at, &value[..len]);
        }
    }
}
