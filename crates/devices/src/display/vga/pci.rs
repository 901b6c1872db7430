//! The VGA on PCI.

use super::{Ports, Vga, VgaSource};
use crate::display::OptionRom;
use crate::display::edid::{Monitor, edid};
use crate::{CreateError, Kind, Model, Parts, PciDevice, PciPlace};
use ::display::Console;
use base::props::{Bag, Properties, SIZE_FORMAT};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bus::pci::{Bar, Config, ConfigSaved, Identity, PciFunction};
use bus::{Device, RamWindow, RegionId, Space, State, StateError};
use memory::{Backing, Region};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::sync::{Arc, Mutex, MutexGuard};

const KIND: &str = "VGA";
const STANDARD_ROM: &str = "vgabios-stdvga.bin";

/// Region of the legacy ports: the offset is the port number.
pub(crate) const LEGACY: RegionId = RegionId(16);
/// Region of the window at 0xa0000.
const WINDOW: RegionId = RegionId(17);
const REGISTERS: RegionId = RegionId(2);
const LINEAR: RegionId = RegionId(0);

/// Properties of `VGA`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Spec {
    /// Video memory (4M to 256M, a power of two).
    #[serde(rename = "vgamem_mb")]
    pub vgamem_mb: Option<u64>,
    /// Video memory in bytes or with a suffix, instead of vgamem_mb.
    #[schemars(extend("format" = SIZE_FORMAT))]
    pub vram: Option<u64>,
    /// Preferred width of the monitor.
    pub xres: u32,
    /// Preferred height of the monitor.
    pub yres: u32,
    /// Tell the guest of the monitor (EDID).
    pub edid: bool,
    /// Video BIOS; none if empty. The one of the SeaBIOS package if not given.
    pub romfile: Option<String>,
}

impl Default for Spec {
    fn default() -> Self {
        Self { vgamem_mb: None, vram: None, xres: 1280, yres: 800, edid: true, romfile: None }
    }
}

impl Spec {
    /// Video memory in bytes.
    fn memory(&self) -> Result<u64, CreateError> {
        let size = match (self.vram, self.vgamem_mb) {
            (Some(_), Some(_)) => {
                return Err(CreateError::Other("VGA: give vram= or vgamem_mb=, not both".into()));
            }
            (Some(bytes), None) => bytes,
            (None, Some(mib)) => mib.saturating_mul(1 << 20),
            (None, None) => 16 << 20,
        };
        if size.is_power_of_two() && (4 << 20..=256 << 20).contains(&size) {
            return Ok(size);
        }
        Err(CreateError::Other(format!(
            "VGA: video memory of {size} bytes: use a power of two from 4M to 256M"
        )))
    }
}

/// The table entry.
pub const MODEL: Model = Model {
    name: KIND,
    about: "Standard VGA with Bochs VBE (PCI)",
    properties: Properties::of::<Spec>,
    kind: Kind::Pci(create),
};

fn create(bag: &Bag, parts: &mut dyn Parts, _: &PciPlace) -> Result<PciDevice, CreateError> {
    let spec: Spec = bag.spec()?;
    let identity = Identity {
        vendor: 0x1234,
        device: 0x1111,
        class: 0x03_0000,
        revision: 2,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    };
    let size = spec.memory()?;
    let mut config = Config::endpoint(KIND, identity);
    config.add_bar(0, Bar::memory32(size).prefetchable());
    config.add_bar(2, Bar::memory32(4096));
    let region =
        Region::new(0, size, &Backing::Anonymous, false).map_err(|e| CreateError::Other(e.to_string()))?;
    let window = RamWindow::new(KIND, parts.vm()?, region, false, true);
    config.back_bar(0, window.clone());
    let rom = OptionRom::load(KIND, spec.romfile.as_deref(), STANDARD_ROM)?;
    if let Some(rom) = &rom {
        rom.plug(&mut config, parts.vm()?)?;
    }
    let vga = Arc::new(Mutex::new(Vga::new(window)));
    let console = parts.displays()?.add(KIND, Arc::new(VgaSource::new(vga.clone())));
    let font = rom.as_ref().and_then(OptionRom::font).copied();
    let edid = spec.edid.then(|| edid(Monitor { width: spec.xres, height: spec.yres, head: 0 }));
    let mut device = VgaPci { config, vga, edid, font, console };
    device.power_on();
    let mut device = PciDevice::new(device);
    plug_legacy(&mut device);
    Ok(device)
}

/// The fixed places of a VGA: its ports, and the window below 1 MiB.
pub(crate) fn plug_legacy(device: &mut PciDevice) {
    for (first, number) in Ports::VGA.into_iter().chain([Ports::VBE]) {
        device.fix(Space::Port, first.into(), number.into(), RegionId(LEGACY.0 | u32::from(first) << 8));
    }
    device.fix(Space::Memory, 0xa_0000, 0x2_0000, WINDOW);
}

/// A VGA as a PCI function.
struct VgaPci {
    config: Config,
    vga: Arc<Mutex<Vga>>,
    edid: Option<[u8; 256]>,
    font: Option<[u8; 4096]>,
    console: Arc<Console>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    config: ConfigSaved,
    registers: super::core::Registers,
    /// Video memory, compressed by zlib, in Base64.
    memory: String,
}

impl VgaPci {
    fn lock(&self) -> MutexGuard<'_, Vga> {
        self.vga.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn power_on(&mut self) {
        let mut vga = self.lock();
        vga.reset();
        // Kernels that are started without firmware expect what a video BIOS leaves; firmware sets its own.
        vga.post(self.font.as_ref());
    }

    /// BAR 2: EDID, the VGA's ports from 3c0 on, VBE registers, extensions.
    fn read_register(&self, offset: u64, data: &mut [u8]) {
        match offset {
            0..0x400 => {
                for (i, byte) in data.iter_mut().enumerate() {
                    let known = self.edid.as_ref().and_then(|e| e.get(offset as usize + i));
                    *byte = known.copied().unwrap_or(if self.edid.is_some() { 0 } else { 0xff });
                }
            }
            0x400..0x420 => self.lock().read_port((offset - 0x400) as u16 + 0x3c0, data),
            0x500..0x516 => {
                let value = self.lock().read_vbe(((offset - 0x500) / 2) as u16);
                for (d, v) in data.iter_mut().zip(value.to_le_bytes().into_iter().chain([0; 6])) {
                    *d = v;
                }
            }
            // Length of the extension registers, and the byte order (little: 1e by 4).
            0x600 => data.iter_mut().zip([8u8, 0, 0, 0, 0, 0, 0, 0]).for_each(|(d, v)| *d = v),
            0x604 => data.fill(0x1e),
            _ => data.fill(0xff),
        }
    }

    fn write_register(&mut self, offset: u64, data: &[u8]) {
        match offset {
            0x400..0x420 => self.lock().write_port((offset - 0x400) as u16 + 0x3c0, data),
            0x500..0x516 => {
                let value = u16::from_le_bytes([data[0], data.get(1).copied().unwrap_or(0)]);
                self.lock().write_vbe(((offset - 0x500) / 2) as u16, value);
            }
            _ => {}
        }
    }

    fn port(at: RegionId, offset: u64) -> Option<u16> {
        (at.0 & 0xff == LEGACY.0).then_some((at.0 >> 8) as u16 + offset as u16)
    }
}

impl Device for VgaPci {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, at: RegionId, offset: u64, data: &mut [u8]) {
        match (at, Self::port(at, offset)) {
            (_, Some(port @ 0x1ce..0x1d2)) => self.lock().read_vbe_port(port, data),
            (_, Some(port)) => self.lock().read_port(port, data),
            (WINDOW, _) => self.lock().read_window(offset, data),
            (LINEAR, _) => self.lock().load(offset, data),
            (REGISTERS, _) => self.read_register(offset, data),
            _ => {}
        }
    }

    fn write(&mut self, at: RegionId, offset: u64, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        match (at, Self::port(at, offset)) {
            (_, Some(port @ 0x1ce..0x1d2)) => self.lock().write_vbe_port(port, data),
            (_, Some(port)) => self.lock().write_port(port, data),
            (WINDOW, _) => self.lock().write_window(offset, data),
            (LINEAR, _) => self.lock().store(offset, data),
            (REGISTERS, _) => self.write_register(offset, data),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.config.reset();
        self.power_on();
        self.console.kick();
    }

    fn save(&self) -> Result<State, StateError> {
        let vga = self.lock();
        let mut memory = vec![0; vga.size as usize];
        vga.load(0, &mut memory);
        let saved = Saved { config: self.config.save(), registers: vga.r.clone(), memory: pack(&memory) };
        State::new(KIND, 1, &saved)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let mut saved: Saved = state.unpack(KIND, 1)?;
        let invalid = |reason: &str| StateError::Invalid { kind: KIND.into(), reason: reason.into() };
        if !saved.registers.is_valid() {
            return Err(invalid("registers that no VGA has"));
        }
        let size = self.lock().size;
        let memory =
            unpack(&saved.memory, size as usize).ok_or_else(|| invalid("video memory of another size"))?;
        saved.registers.vbe.loaded(size);
        self.config.load(saved.config)?;
        let mut vga = self.lock();
        vga.store(0, &memory);
        vga.r = saved.registers;
        vga.generation += 1;
        Ok(())
    }
}

impl PciFunction for VgaPci {
    fn config(&self) -> &Config {
        &self.config
    }

    fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }
}

/// Memory as text for a saved state.
pub(crate) fn pack(memory: &[u8]) -> String {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    // Writing to a vector cannot fail.
    let packed = encoder.write_all(memory).and_then(|()| encoder.finish()).unwrap_or_default();
    BASE64.encode(packed)
}

/// The reverse of [`pack`], if it gives exactly `size` bytes.
pub(crate) fn unpack(text: &str, size: usize) -> Option<Vec<u8>> {
    let packed = BASE64.decode(text).ok()?;
    let mut out = Vec::new();
    let limit = size as u64 + 1;
    flate2::read::ZlibDecoder::new(&packed[..]).take(limit).read_to_end(&mut out).ok()?;
    (out.len() == size).then_some(out)
}
