//! INTx: a function's interrupt pin.

use crate::IrqLine;
use std::sync::{Mutex, MutexGuard};

/// Where a slot's interrupt pin leads, for ACPI's `_PRT` (ACPI specification, 6.2.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Device number.
    pub slot: u8,
    /// 0 for INTA to 3 for INTD.
    pub pin: u8,
    /// Global system interrupt; level-triggered, active high inside, as ISA-style routing to the IOAPIC expects.
    pub gsi: u32,
}

/// A function's interrupt pin, shared between its configuration space and whoever raises it.
///
/// Level-triggered: the device holds it until the driver has acknowledged (PCI 3.0, 2.2.6).
#[derive(Debug)]
pub struct Intx(Mutex<State>);

#[derive(Debug)]
struct State {
    line: IrqLine,
    asserted: bool,
    disabled: bool,
}

impl Default for Intx {
    fn default() -> Self {
        Self(Mutex::new(State { line: IrqLine::unconnected(), asserted: false, disabled: false }))
    }
}

impl State {
    fn drive(&self) {
        self.line.set(self.asserted && !self.disabled);
    }
}

impl Intx {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Asserts or deasserts the pin.
    pub fn set(&self, asserted: bool) {
        let mut s = self.lock();
        s.asserted = asserted;
        s.drive();
    }

    /// Whether the device asserts the pin, also where the command register keeps it from the line.
    pub fn asserted(&self) -> bool {
        self.lock().asserted
    }

    pub(super) fn set_disabled(&self, disabled: bool) {
        let mut s = self.lock();
        s.disabled = disabled;
        s.drive();
    }

    pub(super) fn connect(&self, line: IrqLine) {
        let mut s = self.lock();
        s.line.set(false);
        s.line = line;
        s.drive();
    }
}
