//! Interrupt lines.

use accel::Irqs;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

/// An interrupt input that several devices may share (wired-OR, as PCI's INTx are).
pub struct IrqPin {
    irqs: Arc<dyn Irqs>,
    gsi: u32,
    raised: Mutex<u32>,
}

impl IrqPin {
    /// The input `gsi`. One per input: sharing devices take their lines from the same pin.
    pub fn new(irqs: Arc<dyn Irqs>, gsi: u32) -> Arc<Self> {
        Arc::new(Self { irqs, gsi, raised: Mutex::new(0) })
    }

    /// Global system interrupt number.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// A line into this pin.
    pub fn line(self: &Arc<Self>) -> IrqLine {
        IrqLine(Some(Arc::new(Inner { pin: self.clone(), level: AtomicBool::new(false) })))
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        self.raised.lock().unwrap_or_else(|e| e.into_inner())
    }
}

struct Inner {
    pin: Arc<IrqPin>,
    level: AtomicBool,
}

/// A device's interrupt output. Clones are the same wire.
#[derive(Clone)]
pub struct IrqLine(Option<Arc<Inner>>);

impl IrqLine {
    /// A line that leads nowhere.
    pub fn unconnected() -> Self {
        Self(None)
    }

    /// Sets the level.
    pub fn set(&self, level: bool) {
        let Some(inner) = &self.0 else { return };
        // The count and the controller's input change together, or two sharing devices could leave them apart.
        let mut raised = inner.pin.lock();
        if inner.level.swap(level, Ordering::SeqCst) == level {
            return;
        }
        let before = *raised;
        *raised = if level { before + 1 } else { before.saturating_sub(1) };
        if (before == 0) != (*raised == 0) {
            inner.pin.irqs.set_line(inner.pin.gsi, level);
        }
    }

    /// Current level of this device's output.
    pub fn level(&self) -> bool {
        self.0.as_ref().is_some_and(|i| i.level.load(Ordering::SeqCst))
    }

    /// A rising edge: up and down again.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.level.load(Ordering::SeqCst) {
            let mut raised = self.pin.lock();
            *raised = raised.saturating_sub(1);
            if *raised == 0 {
                self.pin.irqs.set_line(self.pin.gsi, false);
            }
        }
    }
}

impl fmt::Debug for IrqPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IrqPin({})", self.gsi)
    }
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(i) => write!(f, "IrqLine({})", i.pin.gsi),
            None => f.write_str("IrqLine(-)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u32, bool)>>);

    impl Irqs for Log {
        fn set_line(&self, gsi: u32, level: bool) {
            self.0.lock().unwrap().push((gsi, level));
        }
        fn msi(&self, _: u64, _: u32) {}
    }

    #[test]
    fn shared_line_is_an_or() {
        let log = Arc::new(Log::default());
        let pin = IrqPin::new(log.clone(), 11);
        let (a, b) = (pin.line(), pin.line());
        a.set(true);
        a.set(true);
        b.set(true);
        a.set(false);
        b.set(false);
        b.pulse();
        a.set(true);
        drop(a);
        assert_eq!(
            *log.0.lock().unwrap(),
            [(11, true), (11, false), (11, true), (11, false), (11, true), (11, false)]
        );
    }
}
