//! Placing BARs where no firmware does it (direct kernel boot).

use super::bus::lock;
use super::{BarKind, PciBus, SharedFunction, reg};
use std::ops::Range;

/// Address ranges that may be given out. They shrink from below while resources are assigned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Memory below 4 GiB.
    pub mmio32: Range<u64>,
    /// Memory for large 64-bit BARs; may be empty.
    pub mmio64: Range<u64>,
    /// Ports.
    pub io: Range<u64>,
}

/// The windows are too small.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("no room for BAR {bar} of {device} ({size:#x} bytes of {what}): use fewer or smaller devices")]
pub struct AssignError {
    /// The device.
    pub device: String,
    /// The BAR.
    pub bar: usize,
    /// Its size in bytes.
    pub size: u64,
    /// Which window is full.
    pub what: &'static str,
}

/// 64-bit BARs from this size up go above 4 GiB; smaller ones stay where 32-bit kernels reach them.
const LARGE: u64 = 64 << 20;

/// Takes `size` bytes, aligned to `align`, from the front of a window.
fn take(window: &mut Range<u64>, size: u64, align: u64) -> Option<u64> {
    let start = window.start.checked_next_multiple_of(align)?;
    let end = start.checked_add(size).filter(|end| *end <= window.end)?;
    window.start = end;
    Some(start)
}

/// Rounds a window's start up, for a bridge's boundaries.
fn align(window: &mut Range<u64>, to: u64) {
    window.start = window.start.next_multiple_of(to).min(window.end.max(window.start));
}

struct Want {
    function: SharedFunction,
    bar: usize,
    size: u64,
    kind: BarKind,
}

impl PciBus {
    /// Does what firmware does: places every BAR of this bus and of those behind its bridges, numbers the buses, opens
    /// the bridges' windows, enables decoding, and writes each function's interrupt line (the GSI its pin leads to).
    /// Called on bus 0, after each reset, with fresh windows.
    ///
    /// # Errors
    /// [`AssignError`] names the BAR that does not fit.
    pub fn assign_resources(&self, windows: &mut Windows) -> Result<(), AssignError> {
        let mut last_bus = 0;
        self.assign(windows, 0, &mut last_bus)
    }

    fn assign(&self, windows: &mut Windows, bus: u8, last_bus: &mut u8) -> Result<(), AssignError> {
        let mut wants = Vec::new();
        for (_, _, function) in self.functions() {
            let f = lock(&function);
            for bar in 0..6u8 {
                if let Some(b) = f.config().bar(bar) {
                    let function = function.clone();
                    wants.push(Want { function, bar: bar.into(), size: b.size, kind: b.kind });
                }
            }
        }
        // Largest first: every BAR is aligned to its size, so nothing is lost between them.
        wants.sort_by_key(|w| std::cmp::Reverse(w.size));
        for want in &wants {
            place(want, windows)?;
        }
        for (slot, _, function) in self.functions() {
            self.enable(slot, &function);
            let below = lock(&function).secondary();
            if let Some(below) = below {
                bridge(&function, &below, windows, bus, last_bus)?;
            }
        }
        Ok(())
    }

    fn enable(&self, slot: u8, function: &SharedFunction) {
        let mut f = lock(function);
        let pin = f.config().get_u8(reg::INTERRUPT_PIN);
        if let Some(input) = pin.checked_sub(1).and_then(|pin| self.pin(slot, pin)) {
            f.write_config(reg::INTERRUPT_LINE, &[input.gsi().min(0xff) as u8]);
        }
        let command = f.config().get_u16(reg::COMMAND) | reg::COMMAND_IO | reg::COMMAND_MEMORY;
        f.write_config(reg::COMMAND, &command.to_le_bytes());
    }
}

fn place(want: &Want, windows: &mut Windows) -> Result<(), AssignError> {
    let high = want.kind == BarKind::Memory64 && want.size >= LARGE && !windows.mmio64.is_empty();
    let (window, what) = match want.kind {
        BarKind::Io => (&mut windows.io, "ports"),
        _ if high => (&mut windows.mmio64, "memory above 4 GiB"),
        _ => (&mut windows.mmio32, "memory below 4 GiB"),
    };
    let mut f = lock(&want.function);
    let address = take(window, want.size, want.size).ok_or_else(|| AssignError {
        device: f.config().name().into(),
        bar: want.bar,
        size: want.size,
        what,
    })?;
    let register = f.config().bar_register(want.bar);
    f.write_config(register, &(address as u32).to_le_bytes());
    if want.kind == BarKind::Memory64 {
        f.write_config(register + 4, &((address >> 32) as u32).to_le_bytes());
    }
    Ok(())
}

/// Numbers the bus behind a bridge, assigns what is there, and opens the bridge's windows around it
/// (PCI-to-PCI Bridge Architecture Specification 1.2, 3.2.5).
fn bridge(
    function: &SharedFunction,
    below: &PciBus,
    windows: &mut Windows,
    bus: u8,
    last_bus: &mut u8,
) -> Result<(), AssignError> {
    const MIB: u64 = 1 << 20;
    align(&mut windows.mmio32, MIB);
    align(&mut windows.mmio64, MIB);
    align(&mut windows.io, 4096);
    let before = windows.clone();
    let Some(secondary) = last_bus.checked_add(1) else { return Ok(()) }; // no bus number left: stays closed
    *last_bus = secondary;
    lock(function).write_config(reg::PRIMARY_BUS, &[bus, secondary, 0xff]);
    below.assign(windows, secondary, last_bus)?;
    align(&mut windows.mmio32, MIB);
    align(&mut windows.mmio64, MIB);
    align(&mut windows.io, 4096);

    let mut f = lock(function);
    f.write_config(reg::PRIMARY_BUS + 2, &[*last_bus]);
    // A window whose base is above its limit is closed.
    let bounds = |start: u64, end: u64, unit: u64| if end > start { (start, end - 1) } else { (unit, 0) };
    let (base, limit) = bounds(before.mmio32.start, windows.mmio32.start, MIB);
    let memory = (limit >> 16 & 0xfff0) << 16 | base >> 16 & 0xfff0;
    f.write_config(reg::MEMORY_BASE, &(memory as u32).to_le_bytes());
    let (base, limit) = bounds(before.mmio64.start, windows.mmio64.start, MIB);
    let prefetch = (limit >> 16 & 0xfff0) << 16 | base >> 16 & 0xfff0;
    f.write_config(reg::PREFETCH_BASE, &(prefetch as u32).to_le_bytes());
    f.write_config(reg::PREFETCH_BASE + 4, &((base >> 32) as u32).to_le_bytes());
    f.write_config(reg::PREFETCH_BASE + 8, &((limit >> 32) as u32).to_le_bytes());
    let (base, limit) = bounds(before.io.start, windows.io.start, 4096);
    f.write_config(reg::IO_BASE, &[(base >> 8 & 0xf0) as u8, (limit >> 8 & 0xf0) as u8]);
    let command = f.config().get_u16(reg::COMMAND) | reg::COMMAND_MASTER;
    f.write_config(reg::COMMAND, &command.to_le_bytes());
    Ok(())
}
