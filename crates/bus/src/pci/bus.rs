//! Buses: which function is where.

use super::bar::{Decoder, Plug};
use super::{PciFunction, Route, reg};
use crate::{Bus, IrqPin, SharedDevice};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

/// A function shared between its bus, its owner and its own threads.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// A function that cannot be plugged.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// No such device or function number.
    #[error("PCI address {slot:02x}.{function} is not possible: devices are 0 to 1f, functions 0 to 7")]
    Address {
        /// Device number.
        slot: u8,
        /// Function number.
        function: u8,
    },
    /// A PCI Express port has one device.
    #[error("PCI address {slot:02x} is not possible behind a PCI Express port: use addr=0")]
    Port {
        /// Device number.
        slot: u8,
    },
    /// Something is there.
    #[error("PCI address {slot:02x}.{function} is taken by {other}; choose another addr=")]
    Taken {
        /// Device number.
        slot: u8,
        /// Function number.
        function: u8,
        /// Who is there.
        other: String,
    },
}

#[derive(Clone)]
struct Slot {
    function: SharedFunction,
    device: SharedDevice,
}

enum Wiring {
    /// The root: interrupt inputs, and which of them a slot's pin leads to.
    Pins(Vec<Arc<IrqPin>>, Swizzle),
    /// Behind the bridge in a slot of another bus, whose pins it uses.
    Behind { parent: Arc<PciBus>, slot: u8, function: u8 },
}

/// A PCI bus: 32 devices of 8 functions.
///
/// Lock order: the table of slots is a leaf (cloned out of), then the function's lock, downwards from bridge to
/// function.
pub struct PciBus {
    /// Device numbers that there are.
    devices: std::ops::RangeInclusive<u8>,
    slots: RwLock<BTreeMap<u8, Slot>>,
    wiring: Wiring,
    decoder: Arc<Decoder>,
}

impl std::fmt::Debug for PciBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.table().keys().map(|k| format!("{:02x}.{}", k >> 3, k & 7))).finish()
    }
}

/// Which interrupt input of a root bus a slot's pin (0 for INTA) leads to.
pub type Swizzle = fn(slot: u8, pin: u8) -> usize;

pub(super) fn lock(function: &SharedFunction) -> MutexGuard<'_, dyn PciFunction + 'static> {
    function.lock().unwrap_or_else(|e| e.into_inner())
}

impl PciBus {
    /// Bus 0. BARs decode on `bus` (which is not kept alive). INTx pins are spread over `pins` (PC: eight, IOAPIC inputs 16 to 23); none leaves
    /// them unconnected.
    pub fn root(bus: Arc<Bus>, pins: Vec<Arc<IrqPin>>) -> Arc<Self> {
        Self::root_with(bus, pins, |slot, pin| usize::from(slot) + usize::from(pin))
    }

    /// Bus 0 of a chipset with its own way of spreading INTx pins; `swizzle` is taken modulo the number of pins.
    pub fn root_with(bus: Arc<Bus>, pins: Vec<Arc<IrqPin>>, swizzle: Swizzle) -> Arc<Self> {
        let wiring = Wiring::Pins(pins, swizzle);
        Arc::new(Self { devices: 0..=31, slots: RwLock::default(), wiring, decoder: Decoder::new(&bus) })
    }

    /// The bus behind the bridge that is or will be plugged in at `slot` and `function` of `parent`.
    pub fn behind(parent: &Arc<Self>, slot: u8, function: u8) -> Arc<Self> {
        Self::below(parent, slot, function, 0..=31)
    }

    /// The link behind a PCI Express port: it has device 0 only.
    pub fn behind_port(parent: &Arc<Self>, slot: u8, function: u8) -> Arc<Self> {
        Self::below(parent, slot, function, 0..=0)
    }

    fn below(parent: &Arc<Self>, slot: u8, function: u8, devices: std::ops::RangeInclusive<u8>) -> Arc<Self> {
        Arc::new(Self {
            devices,
            slots: RwLock::default(),
            wiring: Wiring::Behind { parent: parent.clone(), slot, function },
            decoder: parent.decoder.clone(),
        })
    }

    fn table(&self) -> BTreeMap<u8, Slot> {
        self.slots.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn at(&self, devfn: u8) -> Option<Slot> {
        self.slots.read().unwrap_or_else(|e| e.into_inner()).get(&devfn).cloned()
    }

    /// Plugs a function in. Its model has finished building its configuration space.
    ///
    /// # Errors
    /// [`PciError`].
    pub fn add<F: PciFunction + 'static>(
        &self,
        slot: u8,
        function: u8,
        device: &Arc<Mutex<F>>,
    ) -> Result<(), PciError> {
        self.add_shared(slot, function, device.clone(), device.clone())
    }

    /// [`Self::add`] for a function whose type is erased; `device` is the same object as a device.
    ///
    /// # Errors
    /// [`PciError`].
    pub fn add_shared(
        &self,
        slot: u8,
        function: u8,
        object: SharedFunction,
        device: SharedDevice,
    ) -> Result<(), PciError> {
        if slot > 31 || function > 7 {
            return Err(PciError::Address { slot, function });
        }
        if !self.devices.contains(&slot) {
            return Err(PciError::Port { slot });
        }
        let devfn = slot << 3 | function;
        {
            let mut slots = self.slots.write().unwrap_or_else(|e| e.into_inner());
            if let Some(other) = slots.get(&devfn).cloned() {
                drop(slots);
                let other = lock(&other.function).config().name().to_owned();
                return Err(PciError::Taken { slot, function, other });
            }
            slots.insert(devfn, Slot { function: object.clone(), device: device.clone() });
        }
        let plug = Plug {
            decoder: self.decoder.clone(),
            owner: self.decoder.owner(),
            device: Arc::downgrade(&device),
        };
        let pin = lock(&object).config().get_u8(reg::INTERRUPT_PIN);
        let line = pin.checked_sub(1).and_then(|pin| self.pin(slot, pin)).map(|pin| pin.line());
        lock(&object).config_mut().connect(plug, line);
        // Function 0 announces that there are others (PCI 3.0, 6.2.1).
        let several = (1..8).any(|f| self.at(slot << 3 | f).is_some());
        if several && let Some(first) = self.at(slot << 3) {
            lock(&first.function).config_mut().set_multifunction();
        }
        Ok(())
    }

    /// Takes a function out: its BARs vanish and its interrupt line falls. The caller has paused it.
    pub fn remove(&self, slot: u8, function: u8) -> Option<SharedFunction> {
        let devfn = slot.checked_mul(8)?.checked_add(function.min(7))?;
        let removed = self.slots.write().unwrap_or_else(|e| e.into_inner()).remove(&devfn)?;
        lock(&removed.function).config_mut().disconnect();
        Some(removed.function)
    }

    /// Whether this is bus 0.
    pub fn is_root(&self) -> bool {
        matches!(self.wiring, Wiring::Pins(..))
    }

    /// The lowest device number that is free: from 1 up, but 0 behind a PCI Express port.
    pub fn free_slot(&self) -> Option<u8> {
        let slots = self.table();
        let first = u8::from(*self.devices.end() > 0);
        (first..=*self.devices.end()).find(|slot| slots.range(slot << 3..=(slot << 3 | 7)).next().is_none())
    }

    /// All functions of this bus: device number, function number, function.
    pub fn functions(&self) -> Vec<(u8, u8, SharedFunction)> {
        self.table().into_iter().map(|(k, s)| (k >> 3, k & 7, s.function)).collect()
    }

    /// The functions as devices, for start, pause, reset, save and load; those behind bridges too.
    pub fn devices(&self) -> Vec<SharedDevice> {
        let mut all = Vec::new();
        for slot in self.table().into_values() {
            let behind = lock(&slot.function).secondary();
            all.push(slot.device);
            all.extend(behind.map(|bus| bus.devices()).unwrap_or_default());
        }
        all
    }

    /// The interrupt input of a slot's pin (0 for INTA). Behind a bridge pins rotate by device number
    /// (PCI-to-PCI Bridge Architecture Specification 1.2, 9.1).
    pub fn pin(&self, slot: u8, pin: u8) -> Option<Arc<IrqPin>> {
        match &self.wiring {
            Wiring::Pins(pins, _) if pins.is_empty() => None,
            Wiring::Pins(pins, swizzle) => Some(pins[swizzle(slot, pin) % pins.len()].clone()),
            Wiring::Behind { parent, slot: bridge, .. } => parent.pin(*bridge, slot.wrapping_add(pin) % 4),
        }
    }

    /// Open Firmware path of the bus (IEEE 1275, PCI bus binding), by which firmware is told what to boot.
    pub fn firmware_path(&self) -> String {
        match &self.wiring {
            Wiring::Pins(..) => "/pci@i0cf8".into(),
            Wiring::Behind { parent, slot, function } => {
                format!("{}/{}", parent.firmware_path(), firmware_node(0x06_0400, 0, 0, *slot, *function))
            }
        }
    }

    /// All functions, those behind bridges too; a bridge comes before what is behind it.
    pub fn all_functions(&self) -> Vec<SharedFunction> {
        let mut all = Vec::new();
        for slot in self.table().into_values() {
            let below = lock(&slot.function).secondary();
            all.push(slot.function);
            all.extend(below.into_iter().flat_map(|b| b.all_functions()));
        }
        all
    }

    /// Interrupt routing of all 32 slots, for `_PRT`.
    pub fn interrupt_routes(&self) -> Vec<Route> {
        let all = (0..32u8).flat_map(|slot| (0..4u8).map(move |pin| (slot, pin)));
        all.filter_map(|(slot, pin)| self.pin(slot, pin).map(|p| Route { slot, pin, gsi: p.gsi() })).collect()
    }

    /// The function at a bus number, as the guest has numbered the buses. Called on bus 0.
    fn find(&self, bus: u8, devfn: u8) -> Option<Slot> {
        if bus == 0 {
            return self.at(devfn);
        }
        let mut at = None;
        let mut slots = self.table();
        // Each step goes down one level of a finite tree.
        loop {
            let next = slots.values().find_map(|slot| {
                let f = lock(&slot.function);
                let (secondary, subordinate) =
                    (f.config().get_u8(reg::PRIMARY_BUS + 1), f.config().get_u8(reg::PRIMARY_BUS + 2));
                let reaches =
                    f.config().is_bridge() && secondary != 0 && (secondary..=subordinate).contains(&bus);
                if reaches { f.secondary().map(|b| (secondary, b)) } else { None }
            });
            let Some((secondary, below)) = next else { return at };
            if secondary == bus {
                at = below.at(devfn);
                return at;
            }
            slots = below.table();
        }
    }

    /// A configuration read by the host. Called on bus 0. `data` (1, 2 or 4 bytes within a double word) keeps its
    /// contents where nothing answers.
    pub fn config_read(&self, bus: u8, devfn: u8, offset: u16, data: &mut [u8]) {
        if let Some(slot) = self.find(bus, devfn) {
            lock(&slot.function).read_config(offset, data);
        }
    }

    /// A configuration write by the host. Called on bus 0.
    pub fn config_write(&self, bus: u8, devfn: u8, offset: u16, data: &[u8]) {
        if let Some(slot) = self.find(bus, devfn) {
            lock(&slot.function).write_config(offset, data);
        }
    }
}

/// Open Firmware node of a function: its kind by class (`0xCCSSPP`), and its address.
pub fn firmware_node(class: u32, vendor: u16, device: u16, slot: u8, function: u8) -> String {
    let name = match class >> 8 {
        0x0100 => "scsi",
        0x0101 => "ide",
        0x0102 => "fdc",
        0x0104 => "raid",
        0x0200 => "ethernet",
        0x0300 => "display",
        0x0601 => "isa",
        0x0604 => "pci-bridge",
        0x0c03 => "usb",
        _ => "",
    };
    let name = if name.is_empty() { format!("pci{vendor:x},{device:x}") } else { name.into() };
    if function == 0 { format!("{name}@{slot:x}") } else { format!("{name}@{slot:x},{function:x}") }
}
