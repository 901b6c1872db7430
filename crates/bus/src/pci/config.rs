//! Configuration space of a function.

use super::bar::{Bar, BarKind, Plug};
use super::msix::SavedVector;
use super::{Intx, Msi, Msix, MsixVectors, capability, reg};
use crate::{IrqLine, RamWindow, StateError};
use accel::Irqs;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Length of conventional configuration space.
const CONVENTIONAL: usize = 256;
/// Length of extended configuration space.
const EXTENDED: usize = 4096;
/// Where capabilities start.
const FIRST_CAPABILITY: u16 = 0x40;

/// What a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class, subclass and programming interface: `0xCCSSPP`.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// Configuration space: registers with their write masks, BARs, capabilities, and the interrupts behind these.
///
/// Built by the function's model, then plugged into a [`super::PciBus`]. From the first guest access on, [`Self::reset`]
/// goes back to what was built.
pub struct Config {
    name: String,
    bytes: Vec<u8>,
    writable: Vec<u8>,
    clear: Vec<u8>,
    built: Option<Vec<u8>>,
    bridge: bool,
    bars: [Option<Bar>; 7],
    /// Memory that a BAR shows.
    memories: [Option<Arc<RamWindow>>; 7],
    /// Where each BAR decodes now.
    decoded: [Option<u64>; 7],
    last_capability: u16,
    next_capability: u16,
    last_extended: u16,
    next_extended: u16,
    intx: Arc<Intx>,
    msi: Option<(u16, Msi)>,
    msix: Option<(u16, Msix)>,
    plug: Option<Plug>,
}

/// Guest-visible state of a configuration space.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigSaved {
    /// The registers in hexadecimal.
    registers: String,
    intx: bool,
    msi_pending: u32,
    msix: Vec<SavedVector>,
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("name", &self.name)
            .field("decoded", &self.decoded)
            .finish_non_exhaustive()
    }
}

/// Index of the expansion ROM among the BARs.
const ROM: usize = 6;

impl Config {
    fn new(name: &str, id: Identity, bridge: bool) -> Self {
        let mut config = Self {
            name: name.into(),
            bytes: vec![0; CONVENTIONAL],
            writable: vec![0; CONVENTIONAL],
            clear: vec![0; CONVENTIONAL],
            built: None,
            bridge,
            bars: [None; 7],
            memories: Default::default(),
            decoded: [None; 7],
            last_capability: 0,
            next_capability: FIRST_CAPABILITY,
            last_extended: 0,
            next_extended: CONVENTIONAL as u16,
            intx: Arc::default(),
            msi: None,
            msix: None,
            plug: None,
        };
        config.set(reg::VENDOR, &id.vendor.to_le_bytes());
        config.set(reg::DEVICE, &id.device.to_le_bytes());
        config.set(reg::REVISION, &(id.class << 8 | u32::from(id.revision)).to_le_bytes());
        config.set(reg::HEADER_TYPE, &[u8::from(bridge)]);
        let command = reg::COMMAND_IO | reg::COMMAND_MEMORY | reg::COMMAND_MASTER | reg::COMMAND_INTX_DISABLE;
        config.allow(reg::COMMAND, &(command | 1 << 8).to_le_bytes()); // and SERR#
        config.allow(0x0c, &[0xff]); // cache line size
        config.allow(reg::INTERRUPT_LINE, &[0xff]);
        config.clear[usize::from(reg::STATUS) + 1] = 0xf9; // error bits, write one to clear
        if !bridge {
            config.set(reg::SUBSYSTEM, &id.subsystem_vendor.to_le_bytes());
            config.set(reg::SUBSYSTEM + 2, &id.subsystem.to_le_bytes());
        }
        config
    }

    /// An endpoint (type 0 header). `name` is for messages.
    pub fn endpoint(name: &str, id: Identity) -> Self {
        Self::new(name, id, false)
    }

    /// A PCI-to-PCI bridge (type 1 header; PCI-to-PCI Bridge Architecture Specification 1.2, 3.2) with 32-bit I/O,
    /// memory and 64-bit prefetchable windows.
    pub fn bridge(name: &str, id: Identity) -> Self {
        let mut config = Self::new(name, id, true);
        config.allow(reg::PRIMARY_BUS, &[0xff; 3]);
        config.set(reg::IO_BASE, &[1, 1]);
        config.allow(reg::IO_BASE, &[0xf0, 0xf0]);
        config.allow(reg::MEMORY_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        config.set(reg::PREFETCH_BASE, &[1, 0, 1, 0]);
        config.allow(reg::PREFETCH_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        config.allow(reg::PREFETCH_BASE + 4, &[0xff; 12]); // upper halves of prefetchable and I/O windows
        config.allow(reg::BRIDGE_CONTROL, &[0x5f, 0]);
        config
    }

    /// Name for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether this is a bridge's header.
    pub fn is_bridge(&self) -> bool {
        self.bridge
    }

    // --- building ---------------------------------------------------------------------------------------------------

    /// Sets read-only contents (or the power-on contents of writable bits). Also used at run time for registers that
    /// hardware changes.
    ///
    /// # Panics
    /// Past the end of the space, which is a bug in the model.
    pub fn set(&mut self, offset: u16, bytes: &[u8]) {
        self.bytes[usize::from(offset)..][..bytes.len()].copy_from_slice(bytes);
    }

    /// Makes bits writable by the guest.
    ///
    /// # Panics
    /// Past the end of the space, which is a bug in the model.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        for (w, m) in self.writable[usize::from(offset)..][..mask.len()].iter_mut().zip(mask) {
            *w |= m;
        }
    }

    /// Declares a BAR (0 to 5; bridges 0 to 1). A 64-bit one takes the next register too.
    ///
    /// # Panics
    /// On a size or place that no BAR can have, which is a bug in the model.
    pub fn add_bar(&mut self, index: u8, bar: Bar) {
        let registers = if self.bridge { 2 } else { 6 };
        let wide = bar.kind == BarKind::Memory64;
        assert!(bar.is_valid() && index + u8::from(wide) < registers, "{}: BAR {index}: {bar:?}", self.name);
        let offset = reg::BAR0 + 4 * u16::from(index);
        self.set(offset, &bar.flags().to_le_bytes());
        let low = if bar.kind == BarKind::Io { 0xffff_fffc } else { 0xffff_fff0 };
        let mask = !(bar.size - 1);
        self.allow(offset, &(mask as u32 & low).to_le_bytes());
        if wide {
            self.allow(offset + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        self.bars[usize::from(index)] = Some(bar);
    }

    /// Makes a BAR (6: the expansion ROM) show memory, as long as the BAR. Accesses reach the device only where the
    /// accelerator cannot show it.
    ///
    /// # Panics
    /// If there is no such BAR or the sizes differ, which is a bug in the model.
    pub fn back_bar(&mut self, index: u8, memory: Arc<RamWindow>) {
        let bar = self.bar(index);
        assert!(bar.is_some_and(|b| b.size == memory.len()), "{}: memory of BAR {index}", self.name);
        self.memories[usize::from(index)] = Some(memory);
    }

    /// Declares an expansion ROM of `size` bytes (a power of two from 2 KiB to 16 MiB); region 6 of the device.
    ///
    /// # Panics
    /// On another size, which is a bug in the model.
    pub fn add_rom(&mut self, size: u32) {
        assert!(
            size.is_power_of_two() && (1 << 11..=1 << 24).contains(&size),
            "{}: ROM of {size} bytes",
            self.name
        );
        let offset = if self.bridge { reg::BRIDGE_ROM } else { reg::ROM };
        self.allow(offset, &(!(size - 1) | 1).to_le_bytes());
        self.bars[ROM] = Some(Bar::memory32(size.into()));
    }

    /// Appends a capability: `body` follows ID and next pointer, `mask` says which of its bits are writable (shorter
    /// is padded with zeros). Returns its offset.
    ///
    /// # Panics
    /// When configuration space is full, which is a bug in the model.
    pub fn add_capability(&mut self, id: u8, body: &[u8], mask: &[u8]) -> u16 {
        let at = self.next_capability;
        let end = usize::from(at) + 2 + body.len();
        assert!(end <= CONVENTIONAL, "{}: no room for capability {id:#x}", self.name);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, mask);
        let link = if self.last_capability == 0 { reg::CAPABILITIES } else { self.last_capability + 1 };
        self.set(link, &[at as u8]); // below 256
        self.set(reg::STATUS, &reg::STATUS_CAPABILITIES.to_le_bytes());
        self.last_capability = at;
        self.next_capability = end.next_multiple_of(4) as u16;
        at
    }

    /// Appends an extended capability (PCIe 5.0, 7.6.3): `body` follows the 4-byte header. The space grows to 4 KiB.
    /// Returns its offset.
    ///
    /// # Panics
    /// When configuration space is full, which is a bug in the model.
    pub fn add_extended_capability(&mut self, id: u16, version: u8, body: &[u8], mask: &[u8]) -> u16 {
        for bytes in [&mut self.bytes, &mut self.writable, &mut self.clear] {
            bytes.resize(EXTENDED, 0);
        }
        let at = self.next_extended;
        let end = usize::from(at) + 4 + body.len();
        assert!(end <= EXTENDED, "{}: no room for extended capability {id:#x}", self.name);
        self.set(at, &(u32::from(id) | u32::from(version & 0xf) << 16).to_le_bytes());
        self.set(at + 4, body);
        self.allow(at + 4, mask);
        if self.last_extended != 0 {
            let header = self.get_u32(self.last_extended) | u32::from(at) << 20;
            self.set(self.last_extended, &header.to_le_bytes());
        }
        self.last_extended = at;
        self.next_extended = end.next_multiple_of(4) as u16;
        at
    }

    /// Gives the function an interrupt pin (INTA for single-function devices) and returns it.
    pub fn add_intx(&mut self, pin: u8) -> Arc<Intx> {
        self.set(reg::INTERRUPT_PIN, &[pin.clamp(1, 4)]);
        self.intx.clone()
    }

    /// Adds an MSI capability with `1 << log2_vectors` (at most 32) vectors.
    pub fn add_msi(&mut self, irqs: Arc<dyn Irqs>, log2_vectors: u8) -> Msi {
        let msi = Msi::new(irqs, log2_vectors.min(5));
        let (body, mask) = msi.capability();
        let at = self.add_capability(capability::MSI, &body, &mask);
        self.msi = Some((at, msi.clone()));
        msi
    }

    /// Adds an MSI-X capability. The function serves accesses to the table through [`Self::msix`].
    pub fn add_msix(&mut self, msix: Msix) -> MsixVectors {
        let (body, mask) = msix.capability();
        let at = self.add_capability(capability::MSIX, &body, &mask);
        let vectors = msix.vectors.clone();
        self.msix = Some((at, msix));
        vectors
    }

    /// MSI-X, if the function has it.
    pub fn msix(&self) -> Option<&Msix> {
        self.msix.as_ref().map(|(_, m)| m)
    }

    // --- access -----------------------------------------------------------------------------------------------------

    /// Reads a byte; 0xff past the end.
    pub fn get_u8(&self, offset: u16) -> u8 {
        self.bytes.get(usize::from(offset)).copied().unwrap_or(0xff)
    }

    /// Reads a 16-bit register.
    pub fn get_u16(&self, offset: u16) -> u16 {
        u16::from_le_bytes([self.get_u8(offset), self.get_u8(offset.wrapping_add(1))])
    }

    /// Reads a 32-bit register.
    pub fn get_u32(&self, offset: u16) -> u32 {
        u32::from(self.get_u16(offset)) | u32::from(self.get_u16(offset.wrapping_add(2))) << 16
    }

    /// A guest read.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::from(offset) + i;
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
            if at == usize::from(reg::STATUS) && self.intx.asserted() {
                *byte |= reg::STATUS_INTERRUPT as u8; // bit 3
            }
            if let Some((cap, msi)) = &self.msi
                && let Some(n) = at.checked_sub(usize::from(cap + Msi::PENDING)).filter(|n| *n < 4)
            {
                *byte = msi.pending().to_le_bytes()[n];
            }
        }
    }

    /// A guest write: changes writable bits and everything that hangs on them. Returns whether some BAR decodes
    /// elsewhere than before.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> bool {
        self.freeze();
        for (i, value) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            let (Some(byte), Some(mask), Some(clear)) =
                (self.bytes.get_mut(at), self.writable.get(at), self.clear.get(at))
            else {
                break;
            };
            *byte = (*byte & !mask | value & mask) & !(value & clear);
        }
        self.registers_changed()
    }

    /// What was built is what reset goes back to.
    fn freeze(&mut self) {
        if self.built.is_none() {
            self.built = Some(self.bytes.clone());
        }
    }

    fn registers_changed(&mut self) -> bool {
        self.intx.set_disabled(self.get_u16(reg::COMMAND) & reg::COMMAND_INTX_DISABLE != 0);
        if let Some((cap, msi)) = &self.msi {
            msi.sync(self, *cap);
        }
        if let Some((cap, msix)) = &self.msix {
            msix.vectors.set_function(self.get_u16(cap + 2));
        }
        self.decode()
    }

    // --- BARs -------------------------------------------------------------------------------------------------------

    /// A declared BAR (6: the expansion ROM).
    pub fn bar(&self, index: u8) -> Option<Bar> {
        self.bars.get(usize::from(index)).copied().flatten()
    }

    /// Where a BAR decodes now: its first address, if decoding is enabled and the address possible.
    pub fn bar_address(&self, index: u8) -> Option<u64> {
        self.decoded.get(usize::from(index)).copied().flatten()
    }

    /// Offset of a BAR's register.
    pub(super) fn bar_register(&self, index: usize) -> u16 {
        match index {
            ROM if self.bridge => reg::BRIDGE_ROM,
            ROM => reg::ROM,
            _ => reg::BAR0 + 4 * index as u16, // below 6
        }
    }

    fn wanted(&self, index: usize) -> Option<u64> {
        let bar = self.bars[index]?;
        let command = self.get_u16(reg::COMMAND);
        let enable = if bar.kind == BarKind::Io { reg::COMMAND_IO } else { reg::COMMAND_MEMORY };
        let register = self.bar_register(index);
        let low = self.get_u32(register);
        if command & enable == 0 || index == ROM && low & 1 == 0 {
            return None;
        }
        let high = if bar.kind == BarKind::Memory64 { self.get_u32(register + 4) } else { 0 };
        let start = (u64::from(high) << 32 | u64::from(low)) & !(bar.size - 1);
        // Zero is "not assigned", all ones is a size query: neither decodes.
        let end = start.checked_add(bar.size)?;
        (start != 0 && end < bar.limit()).then_some(start)
    }

    /// Brings the bus maps in line with the registers. Returns whether anything moved.
    fn decode(&mut self) -> bool {
        let mut moved = false;
        let wanted: [Option<u64>; 7] = std::array::from_fn(|i| self.wanted(i));
        for (i, new) in wanted.iter().enumerate().filter(|(i, new)| self.decoded[*i] != **new) {
            moved = true;
            if let Some(plug) = &self.plug {
                if self.decoded[i].is_some() {
                    plug.decoder.release(plug, i as u8);
                }
                if let (Some(start), Some(bar)) = (new, self.bars[i]) {
                    let place = (bar.space(), *start, bar.size);
                    plug.decoder.claim(plug, &self.name, i as u8, self.memories[i].clone(), place);
                }
            }
        }
        self.decoded = wanted;
        moved
    }

    // --- plugging ---------------------------------------------------------------------------------------------------

    /// Connects the function to the buses and to an interrupt line.
    pub(super) fn connect(&mut self, plug: Plug, line: Option<IrqLine>) {
        self.freeze();
        self.decoded = [None; 7];
        self.plug = Some(plug);
        if let Some(line) = line {
            self.intx.connect(line);
        }
        self.decode();
    }

    /// Disconnects it.
    pub(super) fn disconnect(&mut self) {
        if let Some(plug) = self.plug.take() {
            for bar in 0..7 {
                plug.decoder.release(&plug, bar);
            }
        }
        self.intx.connect(IrqLine::unconnected());
    }

    /// Marks the device as having several functions, also after reset.
    pub fn set_multifunction(&mut self) {
        let at = usize::from(reg::HEADER_TYPE);
        self.bytes[at] |= 0x80;
        if let Some(built) = &mut self.built {
            built[at] |= 0x80;
        }
    }

    // --- state ------------------------------------------------------------------------------------------------------

    /// Back to power-on: BARs unassigned, decoding off, interrupts off. Returns whether some BAR decoded before.
    pub fn reset(&mut self) -> bool {
        self.freeze();
        if let Some(built) = &self.built {
            self.bytes.clone_from(built);
        }
        self.intx.set(false);
        if let Some((_, msi)) = &self.msi {
            msi.set_pending(0);
        }
        if let Some((_, msix)) = &self.msix {
            msix.vectors.reset();
        }
        self.registers_changed()
    }

    /// Guest-visible state, interrupt state included.
    pub fn save(&self) -> ConfigSaved {
        ConfigSaved {
            registers: self.bytes.iter().map(|b| format!("{b:02x}")).collect(),
            intx: self.intx.asserted(),
            msi_pending: self.msi.as_ref().map_or(0, |(_, m)| m.pending()),
            msix: self.msix.as_ref().map(|(_, m)| m.vectors.save()).unwrap_or_default(),
        }
    }

    /// Restores [`Self::save`]. Returns whether some BAR decodes elsewhere than before.
    ///
    /// # Errors
    /// The state is of another kind of function.
    pub fn load(&mut self, saved: ConfigSaved) -> Result<bool, StateError> {
        let invalid = |reason: String| StateError::Invalid { kind: self.name.clone(), reason };
        let text = saved.registers.as_bytes();
        let digit = |c: u8| (c as char).to_digit(16);
        let bytes: Option<Vec<u8>> = text
            .chunks(2)
            .map(|pair| match pair {
                [a, b] => Some((digit(*a)? << 4 | digit(*b)?) as u8),
                _ => None,
            })
            .collect();
        let bytes = bytes
            .filter(|b| b.len() == self.bytes.len())
            .ok_or_else(|| invalid("configuration space is malformed or of another length".into()))?;
        if bytes[..4] != self.bytes[..4] {
            return Err(invalid("vendor and device ID differ".into()));
        }
        if saved.msix.len() != self.msix.as_ref().map_or(0, |(_, m)| usize::from(m.vectors.count())) {
            return Err(invalid(format!("{} MSI-X vectors do not fit", saved.msix.len())));
        }
        self.freeze();
        for (i, new) in bytes.iter().enumerate() {
            let mask = self.writable[i] | self.clear[i];
            self.bytes[i] = self.bytes[i] & !mask | new & mask;
        }
        self.intx.set(saved.intx);
        if let Some((_, msi)) = &self.msi {
            msi.set_pending(saved.msi_pending);
        }
        let moved = self.registers_changed();
        if let Some((_, msix)) = &self.msix {
            msix.vectors.load(saved.msix); // the length was checked above
        }
        Ok(moved)
    }
}
