//! The controller on PCI.

use super::core::{Core, INTERRUPTERS, Interrupts, PORTS, SLOTS, State as CoreState};
use super::registers::{LENGTH, MSIX_PENDING, MSIX_TABLE};
use crate::usb::{UsbBus, Waker};
use crate::{ChildBus, CreateError, Kind, Model, Parts, PciDevice, PciPlace};
use base::props::{Bag, Properties};
use bus::pci::{Bar, Config, ConfigSaved, Identity, Msix, MsixVectors, PciFunction};
use bus::{Device, RegionId, State, StateError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

const KIND: &str = "qemu-xhci";

/// Properties of `qemu-xhci`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Spec {}

/// The table entry.
pub const MODEL: Model = Model {
    name: KIND,
    about: "USB controller (xHCI, PCI)",
    properties: Properties::of::<Spec>,
    kind: Kind::Pci(create),
};

fn create(bag: &Bag, parts: &mut dyn Parts, _: &PciPlace) -> Result<PciDevice, CreateError> {
    let Spec {} = bag.spec()?;
    let identity = Identity {
        vendor: 0x1b36,
        device: 0x000d,
        class: 0x0c_0330,
        revision: 1,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    };
    let mut config = Config::endpoint(KIND, identity);
    config.add_bar(0, Bar::memory64(LENGTH));
    config.set(0x60, &[0x30]); // USB 3.0
    let vectors = MsixVectors::new(parts.irqs(), parts.doorbells(), INTERRUPTERS as u16);
    let msix = config.add_msix(Msix { vectors, bar: 0, table: MSIX_TABLE, pba: MSIX_PENDING });
    let msi = config.add_msi(parts.irqs(), 2);
    let intx = config.add_intx(1);
    let core = Core::new(parts.memory().clone(), Interrupts { msix, msi, intx });
    let core = Arc::new(Mutex::new(core));
    let weak: Weak<Mutex<Core>> = Arc::downgrade(&core);
    let waker: Waker = Arc::new(move || {
        if let Some(core) = weak.upgrade() {
            core.lock().unwrap_or_else(|e| e.into_inner()).wake();
        }
    });
    core.lock().unwrap_or_else(|e| e.into_inner()).waker = Some(waker);
    parts.offer_bus(ChildBus::Usb(UsbBus(Arc::downgrade(&core))));
    Ok(PciDevice::new(XhciPci { config, core }))
}

/// The function.
struct XhciPci {
    config: Config,
    core: Arc<Mutex<Core>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    config: ConfigSaved,
    core: CoreState,
    devices: Vec<Option<State>>,
}

impl XhciPci {
    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Device for XhciPci {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, _: RegionId, offset: u64, data: &mut [u8]) {
        if self.config.msix().is_some_and(|m| m.read(0, offset, data)) {
            return;
        }
        let mut core = self.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            // Double words; what is narrower or wider is taken from them.
            let at = offset + i as u64;
            *byte = core.read_register(at & !3).to_le_bytes()[(at & 3) as usize];
        }
    }

    fn write(&mut self, _: RegionId, offset: u64, data: &[u8]) {
        if self.config.msix().is_some_and(|m| m.write(0, offset, data)) {
            return;
        }
        let mut core = self.lock();
        if offset & 3 != 0 || !data.len().is_multiple_of(4) {
            return; // registers are written whole (xHCI 1.2, 5.1)
        }
        for (i, word) in data.as_chunks::<4>().0.iter().enumerate() {
            core.write_register(offset + 4 * i as u64, u32::from_le_bytes(*word));
        }
    }

    fn start(&mut self) -> std::io::Result<()> {
        let mut core = self.lock();
        core.running = true;
        core.wake();
        Ok(())
    }

    fn pause(&mut self) -> std::io::Result<()> {
        self.lock().running = false;
        Ok(())
    }

    fn reset(&mut self) {
        self.config.reset();
        self.lock().reset();
    }

    fn save(&self) -> Result<State, StateError> {
        let core = self.lock();
        let devices: Result<Vec<_>, _> =
            core.devices.iter().map(|d| d.as_ref().map(|d| d.save()).transpose()).collect();
        let saved = Saved { config: self.config.save(), core: core.s.clone(), devices: devices? };
        State::new(KIND, 1, &saved)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(KIND, 1)?;
        let invalid = |reason: &str| StateError::Invalid { kind: KIND.into(), reason: reason.into() };
        if saved.core.slots.len() != SLOTS + 1 || saved.devices.len() != PORTS {
            return Err(invalid("another number of slots or ports"));
        }
        if saved.core.interrupters.iter().any(|i| i.segment.1 > 4096 || i.index >= i.segment.1.max(1)) {
            return Err(invalid("an event ring that cannot be"));
        }
        self.config.load(saved.config)?;
        let mut core = self.lock();
        if core.devices.iter().zip(&saved.devices).any(|(device, saved)| device.is_some() != saved.is_some())
        {
            return Err(invalid("other devices are plugged in"));
        }
        for (device, state) in core.devices.iter_mut().zip(saved.devices) {
            if let (Some(device), Some(state)) = (device, state) {
                device.load(state)?;
            }
        }
        core.s = saved.core;
        core.update_line();
        Ok(())
    }
}

impl PciFunction for XhciPci {
    fn config(&self) -> &Config {
        &self.config
    }

    fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }
}
