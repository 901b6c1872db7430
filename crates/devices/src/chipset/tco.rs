//! The TCO watchdog of the ICH9 (Intel ICH9 datasheet, 13.9), part of the power management block.

use super::clock::{Clock, ClockTimer};
use bus::{System, SystemRequest};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// One tick of the timer, in nanoseconds.
const TICK: u64 = 600_000_000;

/// Offsets from the start of the TCO registers, which are 32 ports.
mod offset {
    pub const RELOAD: u64 = 0x00;
    pub const DATA_IN: u64 = 0x02;
    pub const DATA_OUT: u64 = 0x03;
    pub const STATUS1: u64 = 0x04;
    pub const STATUS2: u64 = 0x06;
    pub const CONTROL1: u64 = 0x08;
    pub const CONTROL2: u64 = 0x0a;
    pub const MESSAGE1: u64 = 0x0c;
    pub const MESSAGE2: u64 = 0x0d;
    pub const WATCHDOG_CONTROL: u64 = 0x0e;
    pub const SOFTWARE_IRQ: u64 = 0x10;
    pub const TIMER: u64 = 0x12;
}

const STATUS1_TIMEOUT: u16 = 1 << 3;
const STATUS2_SECOND_TIMEOUT: u16 = 1 << 1;
const STATUS2_BOOT: u16 = 1 << 2;
const CONTROL1_HALT: u16 = 1 << 11;
const CONTROL1_LOCK: u16 = 1 << 12;
/// The timer counts from this many ticks at most.
const TIMER_MASK: u16 = 0x3ff;

/// Whether the chipset's configuration keeps the watchdog from doing anything. Clones are one switch.
#[derive(Clone, Debug, Default)]
pub struct NoReboot(Arc<AtomicBool>);

impl NoReboot {
    /// Sets it.
    pub fn set(&self, on: bool) {
        self.0.store(on, Ordering::SeqCst);
    }

    /// Whether it is set.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// The registers and the timer.
pub(super) struct Tco(Arc<Mutex<Inner>>);

struct Inner {
    clock: Clock,
    timer: ClockTimer,
    system: System,
    no_reboot: NoReboot,
    r: Registers,
    /// Guest time at which the timer runs out, if it runs.
    due: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Registers {
    data_in: u8,
    data_out: u8,
    status1: u16,
    status2: u16,
    control1: u16,
    control2: u16,
    message: [u8; 2],
    watchdog_control: u8,
    software_irq: u8,
    timer: u16,
    /// The timer has run out once, and counts for the second time.
    second: bool,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            data_in: 0,
            data_out: 0,
            status1: 0,
            status2: 0,
            control1: 0,
            control2: 8,
            message: [0; 2],
            watchdog_control: 0,
            software_irq: 3,
            timer: 4,
            second: false,
        }
    }
}

/// Saved state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Saved {
    registers: Registers,
    /// Nanoseconds until the timer runs out, if it runs.
    left: Option<u64>,
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(|e| e.into_inner())
}

impl Tco {
    pub(super) fn new(clock: &Clock, system: System, no_reboot: NoReboot) -> Self {
        let tco = Self(Arc::new_cyclic(|inner: &Weak<Mutex<Inner>>| {
            let inner = inner.clone();
            let timer = clock.timer(move || {
                if let Some(inner) = inner.upgrade() {
                    lock(&inner).expired();
                }
            });
            let r = Registers::default();
            Mutex::new(Inner { clock: clock.clone(), timer, system, no_reboot, r, due: None })
        }));
        tco.reset();
        tco
    }

    pub(super) fn read(&self, at: u64) -> u8 {
        let s = lock(&self.0);
        let r = &s.r;
        let word = |v: u16, first: u64| v.to_le_bytes()[((at - first) & 1) as usize];
        match at {
            offset::RELOAD..offset::DATA_IN => word(s.left(), offset::RELOAD),
            offset::DATA_IN => r.data_in,
            offset::DATA_OUT => r.data_out,
            offset::STATUS1..offset::STATUS2 => word(r.status1, offset::STATUS1),
            offset::STATUS2..offset::CONTROL1 => word(r.status2, offset::STATUS2),
            offset::CONTROL1..offset::CONTROL2 => word(r.control1, offset::CONTROL1),
            offset::CONTROL2..offset::MESSAGE1 => word(r.control2, offset::CONTROL2),
            offset::MESSAGE1 | offset::MESSAGE2 => r.message[(at - offset::MESSAGE1) as usize],
            offset::WATCHDOG_CONTROL => r.watchdog_control,
            offset::SOFTWARE_IRQ => r.software_irq,
            offset::TIMER..0x14 => word(r.timer, offset::TIMER),
            _ => 0,
        }
    }

    pub(super) fn write(&self, at: u64, value: u8) {
        let mut s = lock(&self.0);
        let put = |v: u16, first: u64| {
            let mut bytes = v.to_le_bytes();
            bytes[((at - first) & 1) as usize] = value;
            u16::from_le_bytes(bytes)
        };
        let clear = |v: u16, first: u64| v & !(u16::from(value) << (8 * ((at - first) & 1)));
        match at {
            offset::RELOAD..offset::DATA_IN => {
                s.r.second = false;
                s.reload();
            }
            offset::DATA_IN => s.r.data_in = value,
            offset::DATA_OUT => s.r.data_out = value,
            offset::STATUS1..offset::STATUS2 => s.r.status1 = clear(s.r.status1, offset::STATUS1),
            offset::STATUS2..offset::CONTROL1 => s.r.status2 = clear(s.r.status2, offset::STATUS2),
            offset::CONTROL1..offset::CONTROL2 => {
                let was = s.r.control1;
                let locked = was & CONTROL1_LOCK;
                s.r.control1 = put(was, offset::CONTROL1) & (CONTROL1_HALT | CONTROL1_LOCK | 0x700) | locked;
                if (was ^ s.r.control1) & CONTROL1_HALT != 0 {
                    s.reload();
                }
            }
            offset::CONTROL2..offset::MESSAGE1 => s.r.control2 = put(s.r.control2, offset::CONTROL2),
            offset::MESSAGE1 | offset::MESSAGE2 => s.r.message[(at - offset::MESSAGE1) as usize] = value,
            offset::WATCHDOG_CONTROL => s.r.watchdog_control = value,
            offset::SOFTWARE_IRQ => s.r.software_irq = value & 3,
            offset::TIMER..0x14 => s.r.timer = put(s.r.timer, offset::TIMER) & TIMER_MASK,
            _ => {}
        }
    }

    pub(super) fn reset(&self) {
        let mut s = lock(&self.0);
        s.r = Registers::default();
        // It waits for the guest's first word, so that machines nobody watches need no timer.
        s.due = None;
        s.arm();
    }

    pub(super) fn save(&self) -> Saved {
        let s = lock(&self.0);
        let left = s.due.map(|due| due.saturating_sub(s.clock.now()));
        Saved { registers: s.r.clone(), left }
    }

    pub(super) fn load(&self, saved: Saved) {
        let mut s = lock(&self.0);
        s.r = saved.registers;
        s.r.timer &= TIMER_MASK;
        s.due = saved.left.map(|left| s.clock.now().saturating_add(left));
        s.arm();
    }
}

impl Inner {
    /// Ticks left.
    fn left(&self) -> u16 {
        let left = self.due.map_or(0, |due| due.saturating_sub(self.clock.now()).div_ceil(TICK));
        (left as u16) & TIMER_MASK // at most what it was loaded with
    }

    /// Counts from the start, unless it is halted. Fewer than two ticks cannot be counted.
    fn reload(&mut self) {
        let ticks = u64::from(self.r.timer & TIMER_MASK);
        let runs = self.r.control1 & CONTROL1_HALT == 0 && ticks >= 2;
        self.due = runs.then(|| self.clock.now().saturating_add(ticks * TICK));
        self.arm();
    }

    fn arm(&self) {
        match self.due {
            Some(due) => self.timer.arm(due),
            None => self.timer.disarm(),
        }
    }

    fn expired(&mut self) {
        if self.due.is_none_or(|due| due > self.clock.now()) {
            return self.arm();
        }
        if !self.r.second {
            // The first time a system management interrupt would give firmware a chance.
            self.r.second = true;
            self.r.status1 |= STATUS1_TIMEOUT;
            return self.reload();
        }
        self.r.second = false;
        self.r.status2 |= STATUS2_SECOND_TIMEOUT | STATUS2_BOOT;
        self.due = None;
        if self.no_reboot.get() {
            self.reload();
        } else {
            self.system.request(SystemRequest::Watchdog);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_timeout_acts() {
        let clock = Clock::manual();
        let seen: Arc<Mutex<Vec<SystemRequest>>> = Arc::default();
        let s = seen.clone();
        let switch = NoReboot::default();
        let tco = Tco::new(&clock, System::new(move |r| s.lock().unwrap().push(r)), switch.clone());
        tco.write(offset::CONTROL1 + 1, 0x08);
        tco.write(offset::TIMER, 10);
        clock.advance(100 * TICK);
        assert_eq!(tco.read(offset::STATUS1), 0, "halted");
        tco.write(offset::CONTROL1 + 1, 0);
        clock.advance(9 * TICK);
        assert_eq!((tco.read(offset::RELOAD), tco.read(offset::STATUS1)), (1, 0));
        tco.write(offset::RELOAD, 1);
        clock.advance(9 * TICK);
        let saved = tco.save();
        clock.advance(TICK);
        assert_eq!(tco.read(offset::STATUS1), STATUS1_TIMEOUT as u8);
        assert_eq!(*seen.lock().unwrap(), []);
        clock.advance(10 * TICK);
        assert_eq!(*seen.lock().unwrap(), [SystemRequest::Watchdog]);
        tco.load(saved.clone());
        assert_eq!(tco.save(), saved);
        switch.set(true);
        clock.advance(11 * TICK);
        assert_eq!(tco.read(offset::STATUS2), 6);
        assert_eq!(seen.lock().unwrap().len(), 1, "switched off");
    }
}
