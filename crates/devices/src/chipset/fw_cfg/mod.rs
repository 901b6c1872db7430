//! Firmware configuration device (QEMU, docs/specs/fw_cfg): named pieces of data for firmware and kernels, read by port
//! or by DMA.

mod contents;
mod dma;

pub use contents::{Bytes, FwCfgItems, key};

use bus::{Device, RegionId, State, StateError};
use contents::Item;
use memory::GuestMemory;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const KIND: &str = "fw-cfg";

/// What the DMA address register reads as: "QEMU CFG".
const SIGNATURE: [u8; 8] = *b"QEMU CFG";

/// Makes items anew; see [`FwCfg::refresh_with`].
type Refresh = Box<dyn Fn() -> Vec<(u16, Bytes)> + Send>;

/// The device: [`Self::PORTS`] ports at [`Self::PORT`]: selector, data, DMA address.
pub struct FwCfg {
    memory: GuestMemory,
    items: BTreeMap<u16, Item>,
    refresh: Option<(Vec<u16>, Refresh)>,
    fresh: bool,
    selected: u16,
    offset: u64,
    dma_high: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    selected: u16,
    offset: u64,
    dma_high: u32,
    fresh: bool,
    /// Contents of items that the guest may write.
    written: BTreeMap<u16, Vec<u8>>,
}

impl FwCfg {
    /// First port.
    pub const PORT: u16 = 0x510;
    /// Number of ports.
    pub const PORTS: u16 = 12;

    /// A device with these items.
    pub fn new(items: FwCfgItems, memory: GuestMemory) -> Self {
        Self {
            memory,
            items: items.finish(),
            refresh: None,
            fresh: false,
            selected: 0,
            offset: 0,
            dma_high: 0,
        }
    }

    /// Has `make` give the contents of items again when the guest first selects one of `keys` after a reset: by then
    /// firmware has placed the PCI devices, which the ACPI tables tell of. The lengths must be those of the items that
    /// the device was made with, for firmware has read the directory already; others are ignored.
    pub fn refresh_with(&mut self, keys: Vec<u16>, make: impl Fn() -> Vec<(u16, Bytes)> + Send + 'static) {
        self.refresh = Some((keys, Box::new(make)));
    }

    /// The key of a file.
    pub fn key_of(&self, name: &str) -> Option<u16> {
        contents::key_of(&self.items, name)
    }

    fn select(&mut self, key: u16) {
        self.selected = key;
        self.offset = 0;
        let Some((keys, make)) = &self.refresh else { return };
        if self.fresh || !keys.contains(&key) {
            return;
        }
        self.fresh = true;
        for (key, bytes) in make() {
            match self.items.get_mut(&key) {
                Some(item) if item.len() == (*bytes).as_ref().len() => item.set(bytes),
                _ => tracing::warn!("firmware item {key:#x} changed its length; the guest sees the old one"),
            }
        }
    }

    /// The next bytes of the selected item; zeros behind its end.
    fn read_selected(&mut self, out: &mut [u8]) {
        out.fill(0);
        if let Some(item) = self.items.get(&self.selected) {
            let rest = usize::try_from(self.offset).ok().and_then(|at| item.bytes().get(at..));
            let rest = rest.unwrap_or_default();
            let n = rest.len().min(out.len());
            out[..n].copy_from_slice(&rest[..n]);
        }
        self.offset = self.offset.saturating_add(out.len() as u64);
    }
}

impl Device for FwCfg {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, _: RegionId, offset: u64, data: &mut [u8]) {
        match offset {
            1 if data.len() == 1 => self.read_selected(data),
            4.. => {
                let at = (offset - 4) as usize; // the region ends at 12
                for (byte, sign) in data.iter_mut().zip(SIGNATURE.iter().skip(at)) {
                    *byte = *sign;
                }
            }
            _ => data.fill(0),
        }
    }

    fn write(&mut self, _: RegionId, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [low, high]) => self.select(u16::from_le_bytes([*low, *high])),
            // Writing by the data port went out of use before DMA came.
            (4, [a, b, c, d]) => self.dma_high = u32::from_be_bytes([*a, *b, *c, *d]),
            (8, [a, b, c, d]) => {
                let low = u32::from_be_bytes([*a, *b, *c, *d]);
                let at = u64::from(std::mem::take(&mut self.dma_high)) << 32 | u64::from(low);
                self.transfer(at);
            }
            (4, [a, b, c, d, e, f, g, h]) => {
                self.dma_high = 0;
                self.transfer(u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]));
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.selected = 0;
        self.offset = 0;
        self.dma_high = 0;
        self.fresh = false;
        for item in self.items.values_mut() {
            item.reset();
        }
    }

    fn save(&self) -> Result<State, StateError> {
        let written = self.items.iter().filter(|(_, i)| i.is_writable());
        let saved = Saved {
            selected: self.selected,
            offset: self.offset,
            dma_high: self.dma_high,
            fresh: self.fresh,
            written: written.map(|(k, i)| (*k, i.bytes().to_vec())).collect(),
        };
        State::new(KIND, 1, &saved)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(KIND, 1)?;
        for (key, bytes) in &saved.written {
            let fits = self.items.get(key).is_some_and(|i| i.is_writable() && i.len() == bytes.len());
            if !fits {
                let reason = format!("there is no writable item {key:#x} of {} bytes here", bytes.len());
                return Err(StateError::Invalid { kind: KIND.into(), reason });
            }
        }
        self.selected = saved.selected;
        self.offset = saved.offset;
        self.dma_high = saved.dma_high;
        self.fresh = saved.fresh;
        for (key, bytes) in saved.written {
            if let Some(item) = self.items.get_mut(&key) {
                item.write(0, &bytes);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
