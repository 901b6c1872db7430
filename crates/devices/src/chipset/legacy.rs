//! Lines that the HPET can take over: IRQ0 of the PIT and IRQ8 of the RTC.

use bus::IrqLine;
use std::sync::{Arc, Mutex};

/// An interrupt output that is cut while the HPET's legacy replacement route is on (IA-PC HPET specification,
/// 2.3.5). Clones are the same wire.
#[derive(Clone, Debug)]
pub struct LegacyLine(Arc<Mutex<Gate>>);

#[derive(Debug)]
struct Gate {
    line: IrqLine,
    level: bool,
    cut: bool,
}

impl LegacyLine {
    /// An uncut wire into `line`.
    pub fn new(line: IrqLine) -> Self {
        Self(Arc::new(Mutex::new(Gate { line, level: false, cut: false })))
    }

    /// Sets the level at the device's end.
    pub fn set(&self, level: bool) {
        self.change(|g| g.level = level);
    }

    /// A rising edge, with the level staying up.
    pub fn rise(&self) {
        self.change(|g| g.level = false);
        self.change(|g| g.level = true);
    }

    /// Cuts the wire or joins it.
    pub fn cut(&self, cut: bool) {
        self.change(|g| g.cut = cut);
    }

    /// A rising edge from the HPET, in place of the device that is cut off.
    pub(super) fn replace(&self) {
        let gate = self.0.lock().unwrap_or_else(|e| e.into_inner());
        if gate.cut {
            gate.line.pulse();
        }
    }

    /// Level at the device's end.
    pub fn level(&self) -> bool {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).level
    }

    fn change(&self, f: impl FnOnce(&mut Gate)) {
        let mut gate = self.0.lock().unwrap_or_else(|e| e.into_inner());
        f(&mut gate);
        gate.line.set(gate.level && !gate.cut);
    }
}
