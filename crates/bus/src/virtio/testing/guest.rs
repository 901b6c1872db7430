//! A guest driver for either transport.

use super::{Bells, DriverRing, Notes, ram};
use crate::pci::{PciBus, PciFunction, Windows, capability, reg};
use crate::virtio::{Platform, VirtioDevice, VirtioMmio, VirtioPci, feature, status};
use crate::{Bus, Device, IrqPin, RegionId, Space, State, shared};
use accel::{IoAddress, Irqs};
use memory::GuestMemory;
use std::sync::{Arc, Mutex};

/// How the guest reaches its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// PCI with MSI-X.
    Pci,
    /// PCI with an interrupt line.
    PciIntx,
    /// MMIO.
    Mmio,
}

/// All transports.
pub const TRANSPORTS: [Transport; 3] = [Transport::Pci, Transport::PciIntx, Transport::Mmio];

enum Wrapped {
    Pci(Arc<Mutex<VirtioPci>>),
    Mmio(Arc<Mutex<VirtioMmio>>),
}

/// A small machine with one virtio device and its driver.
pub struct Guest {
    /// Guest RAM. The first megabyte is for rings (queue n at n * 64 KiB), the rest for the test.
    pub mem: GuestMemory,
    /// What interrupts came.
    pub notes: Arc<Notes>,
    /// The doorbells, if the accelerator has them.
    pub bells: Option<Arc<Bells>>,
    /// The buses.
    pub bus: Arc<Bus>,
    /// Rings of the queues that are set up.
    pub rings: Vec<DriverRing>,
    device: Wrapped,
    pci: Option<Arc<PciBus>>,
    transport: Transport,
    common: u64,
    isr: u64,
    config: u64,
    notify: u64,
}

const MMIO_BASE: u64 = 0xd000_0000;
const LINE: u32 = 5;

fn windows() -> Windows {
    Windows { mmio32: 0xc000_0000..0xd000_0000, mmio64: 0..0, io: 0x1000..0x2000 }
}

fn lock<T: ?Sized>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Guest {
    /// Plugs a device in and starts it. With `bells` the accelerator has doorbells.
    pub fn new(device: Box<dyn VirtioDevice>, transport: Transport, bells: bool) -> Self {
        Self::with_memory(device, transport, bells, ram())
    }

    /// [`Self::new`] on memory that another guest had before (migration).
    pub fn with_memory(
        device: Box<dyn VirtioDevice>,
        transport: Transport,
        bells: bool,
        mem: GuestMemory,
    ) -> Self {
        let notes = Arc::new(Notes::default());
        let irqs: Arc<dyn Irqs> = notes.clone();
        let bells = bells.then(|| Arc::new(Bells::default()));
        let platform = Platform {
            memory: mem.clone(),
            irqs: irqs.clone(),
            doorbells: bells.clone().map(|b| b as Arc<dyn accel::Doorbells>),
        };
        let bus = Arc::new(Bus::new());
        let mut root = None;
        let wrapped = if transport == Transport::Mmio {
            let line = IrqPin::new(irqs, LINE).line();
            let mmio = shared(VirtioMmio::new(device, &platform, MMIO_BASE, line));
            bus.map(Space::Memory, MMIO_BASE, VirtioMmio::LEN, "virtio", &mmio, RegionId(0)).expect("free");
            Wrapped::Mmio(mmio)
        } else {
            let pci = PciBus::root(bus.clone(), vec![IrqPin::new(irqs, LINE)]);
            let function = shared(VirtioPci::new(device, &platform));
            pci.add(1, 0, &function).expect("free");
            pci.assign_resources(&mut windows()).expect("room");
            root = Some(pci);
            Wrapped::Pci(function)
        };
        let mut guest = Self {
            mem,
            notes,
            bells,
            bus,
            rings: Vec::new(),
            device: wrapped,
            pci: root,
            transport,
            common: 0,
            isr: 0,
            config: MMIO_BASE + 0x100,
            notify: MMIO_BASE + 0x50,
        };
        guest.find_structures();
        guest.device().start().expect("start");
        guest
    }

    /// The device, locked.
    pub fn device(&self) -> std::sync::MutexGuard<'_, dyn Device + 'static> {
        match &self.device {
            Wrapped::Pci(d) => lock::<dyn Device>(&**d),
            Wrapped::Mmio(d) => lock::<dyn Device>(&**d),
        }
    }

    /// A reset of the machine, and what its firmware then does.
    pub fn reset(&mut self) {
        self.device().reset();
        if let Some(pci) = &self.pci {
            pci.assign_resources(&mut windows()).expect("room");
        }
        self.find_structures();
    }

    /// The PCI function, if it is one.
    pub fn function(&self) -> Option<std::sync::MutexGuard<'_, VirtioPci>> {
        match &self.device {
            Wrapped::Pci(d) => Some(lock(d)),
            Wrapped::Mmio(_) => None,
        }
    }

    /// Walks the capability list as a driver does.
    fn find_structures(&mut self) {
        let Some(function) = self.function() else { return };
        let config = function.config();
        let (mut common, mut isr, mut device, mut notify) = (0, 0, 0, 0);
        let mut at = u16::from(config.get_u8(reg::CAPABILITIES));
        while at != 0 {
            if config.get_u8(at) == capability::VENDOR {
                let bar = config.bar_address(config.get_u8(at + 4)).unwrap_or(0);
                let place = bar + u64::from(config.get_u32(at + 8));
                match config.get_u8(at + 3) {
                    1 => common = place,
                    2 => notify = place,
                    3 => isr = place,
                    4 => device = place,
                    _ => {}
                }
            }
            at = config.get_u8(at + 1).into();
        }
        drop(function);
        (self.common, self.isr, self.config, self.notify) = (common, isr, device, notify);
    }

    /// Reads guest physical memory that belongs to devices.
    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut data = [0; N];
        self.bus.read(Space::Memory, at, &mut data);
        data
    }

    fn write(&self, at: u64, data: &[u8]) {
        self.bus.write(Space::Memory, at, data);
    }

    fn mmio(&self) -> bool {
        self.transport == Transport::Mmio
    }

    /// The status register.
    pub fn status(&self) -> u8 {
        if self.mmio() { self.read::<4>(MMIO_BASE + 0x70)[0] } else { self.read::<1>(self.common + 20)[0] }
    }

    /// Writes the status register.
    pub fn set_status(&self, value: u8) {
        if self.mmio() {
            self.write(MMIO_BASE + 0x70, &u32::from(value).to_le_bytes());
        } else {
            self.write(self.common + 20, &[value]);
        }
    }

    /// Reads device-specific configuration.
    pub fn read_config<const N: usize>(&self, offset: u64) -> [u8; N] {
        self.read(self.config + offset)
    }

    /// Writes device-specific configuration.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        self.write(self.config + offset, data);
    }

    /// Configuration generation.
    pub fn generation(&self) -> u32 {
        if self.mmio() {
            u32::from_le_bytes(self.read(MMIO_BASE + 0xfc))
        } else {
            self.read::<1>(self.common + 21)[0].into()
        }
    }

    /// The features that the device offers.
    pub fn offered(&self) -> u64 {
        let half = |n: u32| {
            let (select, value) = if self.mmio() {
                (MMIO_BASE + 0x14, MMIO_BASE + 0x10)
            } else {
                (self.common, self.common + 4)
            };
            self.write(select, &n.to_le_bytes());
            u64::from(u32::from_le_bytes(self.read(value)))
        };
        half(0) | half(1) << 32
    }

    /// Resets the device and negotiates `features`, as far as they are offered. Returns those agreed on.
    pub fn negotiate(&mut self, features: u64) -> u64 {
        self.rings.clear();
        self.set_status(0);
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        let agreed = self.offered() & (features | feature::VERSION_1);
        self.accept(agreed);
        agreed
    }

    /// Writes the driver's features and FEATURES_OK.
    pub fn accept(&self, features: u64) {
        for n in 0..2u32 {
            let (select, value) = if self.mmio() {
                (MMIO_BASE + 0x24, MMIO_BASE + 0x20)
            } else {
                (self.common + 8, self.common + 12)
            };
            self.write(select, &n.to_le_bytes());
            self.write(value, &((features >> (32 * n)) as u32).to_le_bytes());
        }
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
    }

    /// Largest size of a queue.
    pub fn max_size(&self, queue: u16) -> u16 {
        if self.mmio() {
            self.write(MMIO_BASE + 0x30, &u32::from(queue).to_le_bytes());
            u32::from_le_bytes(self.read(MMIO_BASE + 0x34)) as u16
        } else {
            self.write(self.common + 22, &queue.to_le_bytes());
            u16::from_le_bytes(self.read(self.common + 24))
        }
    }

    /// Sets up the next queue with a ring of `size` entries (or its largest), and an interrupt vector of its own.
    pub fn add_queue(&mut self, size: Option<u16>, features: u64) {
        let queue = self.rings.len() as u16;
        let size = size.unwrap_or_else(|| self.max_size(queue));
        let ring = DriverRing::new(&self.mem, u64::from(queue) << 16, size, features);
        self.set_up(queue, &ring.config);
        self.rings.push(ring);
    }

    /// Writes a queue's registers.
    pub fn set_up(&self, queue: u16, config: &crate::virtio::QueueConfig) {
        let places = [config.descriptors, config.driver, config.device];
        if self.mmio() {
            let write = |at: u64, value: u32| self.write(MMIO_BASE + at, &value.to_le_bytes());
            write(0x30, queue.into());
            write(0x38, config.size.into());
            for (at, place) in [0x80, 0x90, 0xa0].into_iter().zip(places) {
                write(at, place as u32);
                write(at + 4, (place >> 32) as u32);
            }
            write(0x44, 1);
            return;
        }
        self.write(self.common + 22, &queue.to_le_bytes());
        self.write(self.common + 24, &config.size.to_le_bytes());
        if self.transport == Transport::Pci {
            self.enable_vector(queue + 1);
            self.write(self.common + 26, &(queue + 1).to_le_bytes());
        }
        for (at, place) in [32, 40, 48].into_iter().zip(places) {
            self.write(self.common + at, &place.to_le_bytes());
        }
        self.write(self.common + 28, &1u16.to_le_bytes());
    }

    /// Programs an MSI-X vector: message data is the vector's number.
    fn enable_vector(&self, vector: u16) {
        let Some(table) = self.function().and_then(|f| f.config().bar_address(1)) else { return };
        let entry = table + 16 * u64::from(vector);
        self.write(entry, &0xfee0_0000u64.to_le_bytes());
        self.write(entry + 8, &u32::from(vector).to_le_bytes());
        self.write(entry + 12, &0u32.to_le_bytes());
    }

    /// Declares the driver ready. With MSI-X, vector 0 is for configuration changes.
    pub fn ready(&self) {
        if self.transport == Transport::Pci {
            self.enable_vector(0);
            self.write(self.common + 16, &0u16.to_le_bytes());
            if let Some(mut f) = self.function() {
                let mut at = u16::from(f.config().get_u8(reg::CAPABILITIES));
                while f.config().get_u8(at) != capability::MSIX {
                    at = f.config().get_u8(at + 1).into();
                }
                f.write_config(at + 2, &0x8000u16.to_le_bytes());
            }
        }
        let all = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.set_status(all);
    }

    /// Everything at once: negotiates, sets up all queues, and goes.
    pub fn bring_up(&mut self, features: u64, queues: u16) -> u64 {
        let agreed = self.negotiate(features);
        assert!(self.status() & status::FEATURES_OK != 0, "features were refused");
        for _ in 0..queues {
            self.add_queue(None, agreed);
        }
        self.ready();
        assert_eq!(self.status() & (status::DRIVER_OK | status::NEEDS_RESET), status::DRIVER_OK);
        agreed
    }

    /// Notifies the device of a queue, through a doorbell if there is one.
    pub fn notify(&self, queue: u16) {
        let (at, value, len) = if self.mmio() {
            (self.notify, u32::from(queue), 4)
        } else {
            (self.notify + 4 * u64::from(queue), queue.into(), 2)
        };
        if let Some(bells) = &self.bells
            && bells.ring(IoAddress::Mmio(at), len, value.into())
        {
            return;
        }
        self.write(at, &value.to_le_bytes()[..len as usize]);
    }

    /// Adds a chain and notifies the device if it wants to know.
    pub fn submit(&mut self, queue: u16, buffers: &[(u64, u32, bool)]) -> Option<u16> {
        let ring = &mut self.rings[usize::from(queue)];
        ring.set_interrupts(true);
        let mark = ring.mark();
        let id = ring.add(buffers)?;
        if ring.wants_notification(mark) {
            self.notify(queue);
        }
        Some(id)
    }

    /// Waits for the next used chain of a queue.
    pub fn wait_used(&mut self, queue: u16) -> (u16, u32) {
        let notes = self.notes.clone();
        let ring = &mut self.rings[usize::from(queue)];
        let mut used = None;
        notes.wait("a used buffer", || {
            used = ring.poll();
            used.is_some()
        });
        used.expect("just seen")
    }

    /// Submits a chain and waits until it comes back; returns the number of bytes written.
    pub fn request(&mut self, queue: u16, buffers: &[(u64, u32, bool)]) -> u32 {
        let id = self.submit(queue, buffers).expect("room in the ring");
        let (used, len) = self.wait_used(queue);
        assert_eq!(used, id);
        len
    }

    /// Whether a queue's interrupt is there (and acknowledges it).
    pub fn take_interrupt(&self, queue: u16) -> bool {
        match self.transport {
            Transport::Pci => self.notes.take_messages().contains(&(0xfee0_0000, u32::from(queue) + 1)),
            _ => self.take_isr() & 1 != 0,
        }
    }

    /// Whether a configuration change interrupt is there (and acknowledges it).
    pub fn take_config_interrupt(&self) -> bool {
        match self.transport {
            Transport::Pci => self.notes.take_messages().contains(&(0xfee0_0000, 0)),
            _ => self.take_isr() & 2 != 0,
        }
    }

    fn take_isr(&self) -> u8 {
        let level = self.notes.level(LINE);
        let isr = if self.mmio() {
            let isr = self.read::<4>(MMIO_BASE + 0x60);
            self.write(MMIO_BASE + 0x64, &isr);
            isr[0]
        } else {
            self.read::<1>(self.isr)[0]
        };
        assert_eq!(level, isr != 0, "line and status disagree");
        isr
    }

    /// Pauses the device, saves it, and gives memory and state to another guest with `device`.
    pub fn migrate(self, device: Box<dyn VirtioDevice>) -> Self {
        self.device().pause().expect("pause");
        let state: State = self.device().save().expect("save");
        let text = serde_json::to_string(&state).expect("serialisable");
        let mut there = Self::with_memory(device, self.transport, self.bells.is_some(), self.mem.clone());
        there.device().pause().expect("pause");
        there.device().load(serde_json::from_str(&text).expect("readable")).expect("load");
        there.rings = self.rings;
        if there.transport != Transport::Mmio {
            there.find_structures();
        }
        assert_eq!(there.device().save().expect("save"), state);
        there.device().start().expect("start");
        there
    }
}
