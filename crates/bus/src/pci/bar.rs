//! Base address registers, and the table of what they currently decode.

use crate::{Bus, Device, RamWindow, RegionId, Space};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes this register and the next.
    Memory64,
}

/// A base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// What it decodes.
    pub kind: BarKind,
    /// Bytes; a power of two, at least 4 for ports and 16 for memory.
    pub size: u64,
    /// Reads have no side effects that matter (memory only).
    pub prefetchable: bool,
}

impl Bar {
    /// `size` ports.
    pub const fn io(size: u64) -> Self {
        Self { kind: BarKind::Io, size, prefetchable: false }
    }

    /// `size` bytes of memory below 4 GiB.
    pub const fn memory32(size: u64) -> Self {
        Self { kind: BarKind::Memory32, size, prefetchable: false }
    }

    /// `size` bytes of memory anywhere.
    pub const fn memory64(size: u64) -> Self {
        Self { kind: BarKind::Memory64, size, prefetchable: false }
    }

    /// Marked prefetchable.
    #[must_use]
    pub const fn prefetchable(mut self) -> Self {
        self.prefetchable = true;
        self
    }

    /// Whether the size is possible.
    pub(super) fn is_valid(&self) -> bool {
        let (least, most) = match self.kind {
            BarKind::Io => (4, 256),
            BarKind::Memory32 => (16, 1 << 31),
            BarKind::Memory64 => (16, 1 << 51),
        };
        self.size.is_power_of_two() && (least..=most).contains(&self.size)
    }

    /// Read-only low bits of the register (PCI 3.0, 6.2.5.1).
    pub(super) fn flags(&self) -> u32 {
        let kind = match self.kind {
            BarKind::Io => return 1,
            BarKind::Memory32 => 0,
            BarKind::Memory64 => 0b100,
        };
        kind | u32::from(self.prefetchable) << 3
    }

    /// The address space it decodes in.
    pub fn space(&self) -> Space {
        match self.kind {
            BarKind::Io => Space::Port,
            _ => Space::Memory,
        }
    }

    /// End of what its register can express.
    pub(super) fn limit(&self) -> u64 {
        match self.kind {
            BarKind::Io => 1 << 16,
            BarKind::Memory32 => 1 << 32,
            BarKind::Memory64 => 1 << 52,
        }
    }
}

/// A place that a BAR claims.
struct Claim {
    owner: u64,
    bar: u8,
    space: Space,
    start: u64,
    len: u64,
    name: Arc<str>,
    device: Weak<Mutex<dyn Device>>,
    memory: Option<Arc<RamWindow>>,
    mapped: bool,
}

/// All claims of a PCI hierarchy on the buses.
///
/// A guest may put BARs over one another or over fixed devices, if only for a moment while it moves them. Who was
/// there first keeps answering; the other claim waits and is served once the place is free. Lock order: taken under
/// function locks, and takes the bus maps' locks.
pub(super) struct Decoder {
    /// Weak: the bus holds the devices, and they hold this.
    bus: Weak<Bus>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    claims: Vec<Claim>,
    next_owner: u64,
}

impl Decoder {
    pub(super) fn new(bus: &Arc<Bus>) -> Arc<Self> {
        Arc::new(Self { bus: Arc::downgrade(bus), table: Mutex::default() })
    }

    /// A number for a function that will make claims.
    pub(super) fn owner(&self) -> u64 {
        let mut table = self.lock();
        table.next_owner += 1;
        table.next_owner
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Maps what waits and now can be.
    fn settle(&self, table: &mut Table) {
        let Some(bus) = self.bus.upgrade() else { return };
        for claim in table.claims.iter_mut().filter(|c| !c.mapped) {
            let Some(device) = claim.device.upgrade() else { continue };
            let region = RegionId(claim.bar.into());
            match bus.map_shared(claim.space, claim.start, claim.len, &claim.name, device, region) {
                Ok(()) => {
                    claim.mapped = true;
                    // Memory lies over the device's own registers.
                    if let Some(memory) = &claim.memory {
                        memory.place(Some(claim.start));
                    }
                }
                Err(e) => tracing::debug!("BAR {} stays unmapped: {e}", claim.bar),
            }
        }
    }

    pub(super) fn claim(
        &self,
        plug: &Plug,
        name: &str,
        bar: u8,
        memory: Option<Arc<RamWindow>>,
        (space, start, len): (Space, u64, u64),
    ) {
        let mut table = self.lock();
        table.claims.push(Claim {
            owner: plug.owner,
            bar,
            space,
            start,
            len,
            name: name.into(),
            device: plug.device.clone(),
            memory,
            mapped: false,
        });
        self.settle(&mut table);
    }

    pub(super) fn release(&self, plug: &Plug, bar: u8) {
        let mut table = self.lock();
        if let Some(i) = table.claims.iter().position(|c| c.owner == plug.owner && c.bar == bar) {
            let claim = table.claims.swap_remove(i);
            if let Some(memory) = &claim.memory {
                memory.place(None);
            }
            if let (true, Some(bus)) = (claim.mapped, self.bus.upgrade()) {
                bus.unmap(claim.space, claim.start);
                self.settle(&mut table);
            }
        }
    }
}

/// A function's connection to the buses.
pub(super) struct Plug {
    pub(super) decoder: Arc<Decoder>,
    pub(super) owner: u64,
    pub(super) device: Weak<Mutex<dyn Device>>,
}
