//! Host bridges: the Q35 memory controller hub (Intel 3 Series datasheet, 5.1) and the 82441FX of the i440FX chipset
//! (its datasheet, 3.2). Both hold the attribute map of the memory below 1 MiB; the hub also places the
//! memory-mapped configuration space.

use super::Shadow;
use super::function::chipset_function;
use bus::pci::{Config, Ecam, Identity};
use bus::{Bus, RegionId, Space};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

const KIND: &str = "pci-host";

/// Address of the configuration window.
const PCIEXBAR: u16 = 0x60;
const PCIEXBAR_ENABLE: u64 = 1;
/// First attribute register of the hub.
const Q35_PAM: u16 = 0x90;
/// System management RAM control, in both.
const Q35_SMRAM: u16 = 0x9d;
/// First attribute register of the 82441FX.
const I440FX_PAM: u16 = 0x59;
const I440FX_SMRAM: u16 = 0x72;

/// Where the configuration window is: its address, and its number of buses (0: there is none).
#[derive(Clone, Debug, Default)]
pub struct EcamPlace(Arc<(AtomicU64, AtomicU64)>);

impl EcamPlace {
    /// Address and number of buses.
    pub fn get(&self) -> (u64, u16) {
        (self.0.0.load(Ordering::SeqCst), self.0.1.load(Ordering::SeqCst) as u16) // at most 256
    }

    fn set(&self, base: u64, buses: u64) {
        self.0.0.store(base, Ordering::SeqCst);
        self.0.1.store(buses, Ordering::SeqCst);
    }
}

/// The memory-mapped way into configuration space, placed by PCIEXBAR.
struct Window {
    bus: Weak<Bus>,
    ecam: Arc<Mutex<Ecam>>,
    place: EcamPlace,
    mapped: Option<u64>,
}

impl Window {
    fn update(&mut self, register: u64) {
        let buses = match register >> 1 & 3 {
            0 => 256u64,
            1 => 128,
            2 => 64,
            _ => 0,
        };
        let len = buses << 20;
        let base = register & !(len.max(1) - 1) & ((1 << 36) - 1);
        let enabled = register & PCIEXBAR_ENABLE != 0 && buses != 0 && base != 0;
        let wanted = if enabled { (base, buses) } else { (0, 0) };
        let (old, old_buses) = self.place.get();
        if wanted == (old, old_buses.into()) {
            return;
        }
        self.place.set(wanted.0, wanted.1);
        let Some(bus) = self.bus.upgrade() else { return };
        if let Some(at) = self.mapped.take() {
            bus.unmap(Space::Memory, at);
        }
        if enabled {
            match bus.map(Space::Memory, base, len, "pci-ecam", &self.ecam, RegionId(0)) {
                Ok(()) => self.mapped = Some(base),
                Err(e) => tracing::debug!("configuration space is not shown: {e}"),
            }
        }
    }
}

/// A host bridge, device 0 of bus 0.
pub struct MemoryController {
    config: Config,
    pam: u16,
    shadow: Option<Shadow>,
    window: Option<Window>,
}

fn identity(device: u16, revision: u8) -> Identity {
    // The subsystem is how firmware made for QEMU recognises the machine.
    Identity {
        vendor: 0x8086,
        device,
        class: 0x06_0000,
        revision,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    }
}

impl MemoryController {
    fn new(mut config: Config, pam: u16, smram: u16, shadow: Option<Shadow>) -> Self {
        config.allow(pam, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]);
        // There is no system management mode, so its memory is what it is after reset: not open, not enabled.
        config.set(smram, &[0x02]);
        Self { config, pam, shadow, window: None }
    }

    /// Intel's Q35. `ecam` leads into configuration space; with `preset` (address and number of buses: 64, 128 or 256)
    /// it is placed at power-on, as firmware would do. Without `shadow` the memory below 1 MiB is always RAM.
    pub fn q35(
        bus: &Arc<Bus>,
        ecam: &Arc<Mutex<Ecam>>,
        preset: Option<(u64, u16)>,
        shadow: Option<Shadow>,
    ) -> Self {
        let mut config = Config::endpoint(KIND, identity(0x29c0, 0));
        config.allow(PCIEXBAR, &[0x07, 0, 0, 0xfc, 0x0f, 0, 0, 0]);
        if let Some((base, buses)) = preset {
            let length = match buses {
                ..=64 => 2,
                65..=128 => 1,
                _ => 0,
            };
            config.set(PCIEXBAR, &(base & !0xfff | length << 1 | PCIEXBAR_ENABLE).to_le_bytes());
        }
        let mut this = Self::new(config, Q35_PAM, Q35_SMRAM, shadow);
        this.window = Some(Window {
            bus: Arc::downgrade(bus),
            ecam: ecam.clone(),
            place: EcamPlace::default(),
            mapped: None,
        });
        this.apply();
        this
    }

    /// Intel's 82441FX.
    pub fn i440fx(shadow: Option<Shadow>) -> Self {
        Self::new(Config::endpoint(KIND, identity(0x1237, 2)), I440FX_PAM, I440FX_SMRAM, shadow)
    }

    /// Where the configuration window is, kept up to date.
    pub fn ecam_place(&self) -> EcamPlace {
        self.window.as_ref().map(|w| w.place.clone()).unwrap_or_default()
    }

    /// Does what the registers say.
    fn apply(&mut self) {
        let pam = std::array::from_fn(|i| self.config.get_u8(self.pam + i as u16));
        if let Some(shadow) = &mut self.shadow {
            shadow.set(pam);
        }
        if let Some(window) = &mut self.window {
            let (low, high) = (self.config.get_u32(PCIEXBAR), self.config.get_u32(PCIEXBAR + 4));
            window.update(u64::from(high) << 32 | u64::from(low));
        }
    }
}

chipset_function!(MemoryController, KIND);

#[cfg(test)]
mod tests {
    use super::*;
    use bus::Device;
    use bus::pci::PciBus;
    use bus::shared;

    #[test]
    fn configuration_window_moves() {
        let bus = Arc::new(Bus::new());
        let pci = PciBus::root(bus.clone(), vec![]);
        let ecam = shared(Ecam::new(pci.clone(), 256));
        let host = shared(MemoryController::q35(&bus, &ecam, None, None));
        pci.add(0, 0, &host).unwrap();
        let place = host.lock().unwrap().ecam_place();
        let at = |gpa| {
            let mut b = [0; 4];
            bus.read(Space::Memory, gpa, &mut b);
            u32::from_le_bytes(b)
        };
        assert_eq!((place.get(), at(0xb000_0000)), ((0, 0), u32::MAX));
        pci.config_write(0, 0, 0x64, &[0; 4]);
        pci.config_write(0, 0, 0x60, &0xb000_0001u32.to_le_bytes());
        assert_eq!((place.get(), at(0xb000_0000)), ((0xb000_0000, 256), 0x29c0_8086));
        let state = host.lock().unwrap().save().unwrap();
        pci.config_write(0, 0, 0x60, &0xe400_0005u32.to_le_bytes());
        assert_eq!(
            (place.get(), at(0xe400_0000), at(0xb000_0000)),
            ((0xe400_0000, 64), 0x29c0_8086, u32::MAX)
        );
        pci.config_write(0, 0, 0x60, &0xe400_0007u32.to_le_bytes());
        assert_eq!((place.get(), at(0xe400_0000)), ((0, 0), u32::MAX));
        host.lock().unwrap().load(state).unwrap();
        assert_eq!(at(0xb000_0000), 0x29c0_8086);
        host.lock().unwrap().reset();
        assert_eq!(at(0xb000_0000), u32::MAX);
    }

    #[test]
    fn preset_window_survives_reset() {
        let bus = Arc::new(Bus::new());
        let ecam = shared(Ecam::new(PciBus::root(bus.clone(), vec![]), 256));
        let mut host = MemoryController::q35(&bus, &ecam, Some((0xb000_0000, 64)), None);
        host.reset();
        assert_eq!(host.ecam_place().get(), (0xb000_0000, 64));
    }
}
