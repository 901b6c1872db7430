//! The watchdog of Intel's 6300ESB (its datasheet, 16): two stages, the second of which acts.

use super::clock::{Clock, ClockTimer};
use crate::{CreateError, Kind, Model, Parts, PciDevice, PciPlace};
use base::props::{Bag, Properties};
use bus::pci::{Bar, Config, ConfigSaved, Identity, PciFunction};
use bus::{Device, RegionId, State, StateError, System, SystemRequest};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

const KIND: &str = "i6300esb";

/// Configuration registers.
const CONFIG: u16 = 0x60;
const LOCK: u16 = 0x68;
const CONFIG_REBOOT_OFF: u8 = 1 << 5;
const CONFIG_FAST: u8 = 1 << 2;
const LOCK_LOCKED: u8 = 1;
const LOCK_ENABLE: u8 = 1 << 1;
const LOCK_FREE_RUN: u8 = 1 << 2;

mod offset {
    pub const TIMER1: u64 = 0;
    pub const TIMER2: u64 = 4;
    pub const RELOAD: u64 = 0xc;
    pub const LEN: u64 = 16;
}

/// The memory registers take a write only after these two to the reload register.
const UNLOCK: [u16; 2] = [0x80, 0x86];
const RELOAD_NOW: u16 = 1 << 8;
const TIMED_OUT: u16 = 1 << 9;
/// The stages count from 20-bit numbers.
const PRELOAD_MASK: u32 = 0xf_ffff;
/// One tick of the PCI clock, about 33 MHz, in nanoseconds.
const PCI_CLOCK: u64 = 30;

/// Properties of `i6300esb`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Spec {}

/// The table entry.
pub const MODEL: Model = Model {
    name: KIND,
    about: "Watchdog timer (PCI, Intel 6300ESB)",
    properties: Properties::of::<Spec>,
    kind: Kind::Pci(create),
};

fn create(bag: &Bag, parts: &mut dyn Parts, _: &PciPlace) -> Result<PciDevice, CreateError> {
    let Spec {} = bag.spec()?;
    Ok(PciDevice::new(I6300Esb::new(&parts.clock(), parts.system().clone())))
}

/// The function.
pub struct I6300Esb {
    config: Config,
    timer: Arc<Mutex<Inner>>,
}

struct Inner {
    clock: Clock,
    timer: ClockTimer,
    system: System,
    r: Registers,
    /// Guest time at which the stage runs out, if it runs.
    due: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Registers {
    preload: [u32; 2],
    enabled: bool,
    free_run: bool,
    locked: bool,
    /// The ticks are short ones.
    fast: bool,
    reboot: bool,
    /// Second stage.
    second: bool,
    /// How much of the unlocking sequence was written.
    unlocked: usize,
    timed_out: bool,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            preload: [PRELOAD_MASK; 2],
            enabled: false,
            free_run: false,
            locked: false,
            fast: false,
            reboot: true,
            second: false,
            unlocked: 0,
            timed_out: false,
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    config: ConfigSaved,
    registers: Registers,
    /// Nanoseconds until the stage runs out, if it runs.
    left: Option<u64>,
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(|e| e.into_inner())
}

impl I6300Esb {
    /// A watchdog that tells `system` when it runs out.
    pub fn new(clock: &Clock, system: System) -> Self {
        let mut config = Config::endpoint(
            KIND,
            Identity {
                vendor: 0x8086,
                device: 0x25ab,
                class: 0x08_8000,
                revision: 0,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            },
        );
        config.add_bar(0, Bar::memory32(offset::LEN));
        let timer = Arc::new_cyclic(|inner: &Weak<Mutex<Inner>>| {
            let inner = inner.clone();
            let timer = clock.timer(move || {
                if let Some(inner) = inner.upgrade() {
                    lock(&inner).expired();
                }
            });
            Mutex::new(Inner { clock: clock.clone(), timer, system, r: Registers::default(), due: None })
        });
        Self { config, timer }
    }
}

impl Inner {
    /// Starts a stage.
    fn start(&mut self, second: bool) {
        self.r.second = second;
        let shift = if self.r.fast { 5 } else { 15 };
        let ticks = u64::from(self.r.preload[usize::from(second)]) << shift;
        self.due = self.r.enabled.then(|| self.clock.now().saturating_add(ticks * PCI_CLOCK));
        self.arm();
    }

    fn stop(&mut self) {
        self.due = None;
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
            return self.start(true);
        }
        self.r.timed_out = true;
        self.stop();
        if self.r.reboot {
            self.system.request(SystemRequest::Watchdog);
        }
        if self.r.free_run {
            self.start(false);
        }
    }

    /// Any write but the next of the unlocking sequence locks again. Returns whether the registers were open.
    fn sequence(&mut self, at: u64, value: u16) -> bool {
        if self.r.unlocked == UNLOCK.len() {
            self.r.unlocked = 0;
            return true;
        }
        let next = at == offset::RELOAD && UNLOCK.get(self.r.unlocked) == Some(&value);
        self.r.unlocked = if next { self.r.unlocked + 1 } else { 0 };
        false
    }

    fn write(&mut self, at: u64, value: u32) {
        if !self.sequence(at, value as u16) {
            return;
        }
        match at {
            offset::TIMER1 => self.r.preload[0] = value & PRELOAD_MASK,
            offset::TIMER2 => self.r.preload[1] = value & PRELOAD_MASK,
            offset::RELOAD => {
                if value as u16 & RELOAD_NOW != 0 {
                    self.start(false);
                }
                if value as u16 & TIMED_OUT != 0 {
                    self.r.timed_out = false;
                }
            }
            _ => {}
        }
    }

    fn write_lock(&mut self, value: u8) {
        if self.r.locked {
            return;
        }
        self.r.locked = value & LOCK_LOCKED != 0;
        self.r.free_run = value & LOCK_FREE_RUN != 0;
        let was = std::mem::replace(&mut self.r.enabled, value & LOCK_ENABLE != 0);
        match (was, self.r.enabled) {
            (false, true) => self.start(false),
            (true, false) => self.stop(),
            _ => {}
        }
    }
}

impl Device for I6300Esb {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, _: RegionId, offset: u64, data: &mut [u8]) {
        let s = lock(&self.timer);
        let reload = if s.r.timed_out { TIMED_OUT } else { 0 };
        let mut bytes = [0; offset::LEN as usize];
        bytes[offset::RELOAD as usize..][..2].copy_from_slice(&reload.to_le_bytes());
        let from = &bytes[(offset as usize).min(bytes.len())..];
        let n = from.len().min(data.len());
        data[..n].copy_from_slice(&from[..n]);
    }

    fn write(&mut self, _: RegionId, offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        let n = data.len().min(4);
        value[..n].copy_from_slice(&data[..n]);
        lock(&self.timer).write(offset, u32::from_le_bytes(value));
    }

    fn reset(&mut self) {
        self.config.reset();
        let mut s = lock(&self.timer);
        s.r = Registers::default();
        s.stop();
    }

    fn save(&self) -> Result<State, StateError> {
        let s = lock(&self.timer);
        let left = s.due.map(|due| due.saturating_sub(s.clock.now()));
        State::new(KIND, 1, &Saved { config: self.config.save(), registers: s.r.clone(), left })
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(KIND, 1)?;
        if saved.registers.unlocked > UNLOCK.len()
            || saved.registers.preload.iter().any(|p| *p > PRELOAD_MASK)
        {
            let reason = "impossible registers".into();
            return Err(StateError::Invalid { kind: KIND.into(), reason });
        }
        self.config.load(saved.config)?;
        let mut s = lock(&self.timer);
        s.r = saved.registers;
        s.due = saved.left.map(|left| s.clock.now().saturating_add(left));
        s.arm();
        Ok(())
    }
}

impl PciFunction for I6300Esb {
    fn config(&self) -> &Config {
        &self.config
    }

    fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }

    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        let s = lock(&self.timer);
        let bit = |on: bool, bit: u8| if on { bit } else { 0 };
        let config = bit(!s.r.reboot, CONFIG_REBOOT_OFF) | bit(s.r.fast, CONFIG_FAST);
        let locks =
            bit(s.r.free_run, LOCK_FREE_RUN) | bit(s.r.enabled, LOCK_ENABLE) | bit(s.r.locked, LOCK_LOCKED);
        drop(s);
        self.config.read(offset, data);
        for (byte, at) in data.iter_mut().zip(offset..) {
            match at {
                CONFIG => *byte = config,
                LOCK => *byte = locks,
                _ => {}
            }
        }
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        let mut s = lock(&self.timer);
        for (byte, at) in data.iter().zip(offset..) {
            match at {
                CONFIG => {
                    s.r.reboot = byte & CONFIG_REBOOT_OFF == 0;
                    s.r.fast = byte & CONFIG_FAST != 0;
                }
                LOCK => s.write_lock(*byte),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: RegionId = RegionId(0);

    fn put(d: &mut I6300Esb, at: u64, value: u32) {
        for word in UNLOCK {
            d.write(AT, offset::RELOAD, &word.to_le_bytes());
        }
        d.write(AT, at, &value.to_le_bytes());
    }

    #[test]
    fn two_stages() {
        let clock = Clock::manual();
        let seen: Arc<Mutex<Vec<SystemRequest>>> = Arc::default();
        let s = seen.clone();
        let mut d = I6300Esb::new(&clock, System::new(move |r| s.lock().unwrap().push(r)));
        // As Linux sets it: about a second for each stage.
        let second = (1_000_000_000u64 / (PCI_CLOCK << 15)) as u32;
        put(&mut d, offset::TIMER1, second);
        put(&mut d, offset::TIMER2, second);
        d.write(AT, offset::TIMER1, &1u32.to_le_bytes()); // not unlocked
        d.write_config(LOCK, &[LOCK_ENABLE]);
        for _ in 0..5 {
            clock.advance(900_000_000);
            put(&mut d, offset::RELOAD, RELOAD_NOW.into());
        }
        assert_eq!(*seen.lock().unwrap(), []);
        let state = d.save().unwrap();
        clock.advance(1_500_000_000);
        assert_eq!(*seen.lock().unwrap(), []);
        clock.advance(600_000_000);
        assert_eq!(*seen.lock().unwrap(), [SystemRequest::Watchdog]);
        let mut reload = [0; 2];
        d.read(AT, offset::RELOAD, &mut reload);
        assert_eq!(u16::from_le_bytes(reload), TIMED_OUT);
        d.load(state.clone()).unwrap();
        assert_eq!(d.save().unwrap(), state);
        d.write_config(LOCK, &[0]);
        clock.advance(10_000_000_000);
        assert_eq!(seen.lock().unwrap().len(), 1, "stopped");
    }
}
