//! The high precision event timer (IA-PC HPET specification 1.0a).

use super::clock::{Clock, ClockTimer};
use super::legacy::LegacyLine;
use accel::Irqs;
use bus::{Device, IrqLine, RegionId, State, StateError};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

const KIND: &str = "hpet";

/// Comparators.
const TIMERS: usize = 3;
/// Period of the main counter: 10 ns.
const NANOSECONDS_PER_TICK: u64 = 10;
/// Interrupts of a periodic comparator come no faster than this, so that a guest cannot keep the timer thread busy;
/// in nanoseconds.
const MIN_PERIOD: u64 = 50_000;

/// Capabilities: revision 1, three timers, 64-bit counter, legacy replacement, Intel, 10^7 femtoseconds.
const CAPABILITIES: u64 = 1
    | ((TIMERS as u64 - 1) << 8)
    | 1 << 13
    | 1 << 15
    | 0x8086 << 16
    | ((NANOSECONDS_PER_TICK * 1_000_000) << 32);

/// Registers.
mod offset {
    pub const CAPABILITIES: u64 = 0x000;
    pub const CONFIG: u64 = 0x010;
    pub const STATUS: u64 = 0x020;
    pub const COUNTER: u64 = 0x0f0;
    pub const TIMERS: u64 = 0x100;
}

const CONFIG_ENABLE: u64 = 1;
const CONFIG_LEGACY: u64 = 1 << 1;

/// Configuration of a comparator.
mod timer {
    pub const LEVEL: u64 = 1 << 1;
    pub const ENABLE: u64 = 1 << 2;
    pub const PERIODIC: u64 = 1 << 3;
    pub const PERIODIC_CAPABLE: u64 = 1 << 4;
    pub const SIZE_64: u64 = 1 << 5;
    pub const SET_VALUE: u64 = 1 << 6;
    pub const MODE_32: u64 = 1 << 8;
    pub const ROUTE_SHIFT: u64 = 9;
    pub const ROUTE: u64 = 0x1f << ROUTE_SHIFT;
    pub const MESSAGE: u64 = 1 << 14;
    pub const MESSAGE_CAPABLE: u64 = 1 << 15;
    pub const WRITABLE: u64 = LEVEL | ENABLE | PERIODIC | SET_VALUE | MODE_32 | ROUTE | MESSAGE;
}

/// Where interrupts go.
struct Routes {
    /// Outputs of PIT and RTC, which are cut in legacy replacement mode, where comparators 0 and 1 take their place.
    legacy: [LegacyLine; 2],
    /// Lines that comparators can be routed to, with their GSIs (below 32).
    lines: Vec<(u32, [IrqLine; TIMERS])>,
    /// For message-signalled interrupts.
    irqs: Arc<dyn Irqs>,
}

/// The timer block. Region 0 is its registers, [`Hpet::LENGTH`] bytes.
pub struct Hpet(Arc<Mutex<Inner>>);

struct Inner {
    clock: Clock,
    routes: Routes,
    timers: [ClockTimer; TIMERS],
    r: Registers,
    /// Counter at clock zero while it runs; its value while it does not.
    base: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Registers {
    config: u64,
    status: u64,
    comparators: [Comparator; TIMERS],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Comparator {
    config: u64,
    value: u64,
    period: u64,
    message: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    registers: Registers,
    counter: u64,
}

impl Registers {
    fn new() -> Self {
        let comparator = Comparator { value: u64::MAX, ..Comparator::default() };
        Self { config: 0, status: 0, comparators: [comparator; TIMERS] }
    }
}

impl Comparator {
    /// Bits that the comparator compares.
    fn mask(&self) -> u64 {
        if self.config & timer::MODE_32 != 0 { 0xffff_ffff } else { u64::MAX }
    }

    fn periodic(&self) -> bool {
        self.config & timer::PERIODIC != 0
    }

    fn route(&self) -> u32 {
        ((self.config & timer::ROUTE) >> timer::ROUTE_SHIFT) as u32 // five bits
    }
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(|e| e.into_inner())
}

impl Hpet {
    /// Length of the register block.
    pub const LENGTH: u64 = 0x400;

    /// A timer block that can take over the lines of PIT and RTC, and sends messages to `irqs`.
    pub fn new(clock: &Clock, irqs: Arc<dyn Irqs>, pit: LegacyLine, rtc: LegacyLine) -> Self {
        let routes = Routes { legacy: [pit, rtc], lines: Vec::new(), irqs };
        Self(Arc::new_cyclic(|inner: &Weak<Mutex<Inner>>| {
            let timers = std::array::from_fn(|n| {
                let inner = inner.clone();
                clock.timer(move || {
                    if let Some(inner) = inner.upgrade() {
                        lock(&inner).expired(n);
                    }
                })
            });
            Mutex::new(Inner { clock: clock.clone(), routes, timers, r: Registers::new(), base: 0 })
        }))
    }

    /// Lets comparators be routed to input `gsi` (below 32), each by a line of its own.
    pub fn add_route(&self, gsi: u32, lines: [IrqLine; TIMERS]) {
        lock(&self.0).routes.lines.push((gsi & 31, lines));
    }
}

impl Inner {
    fn running(&self) -> bool {
        self.r.config & CONFIG_ENABLE != 0
    }

    fn legacy(&self) -> bool {
        self.r.config & CONFIG_LEGACY != 0
    }

    fn counter(&self) -> u64 {
        if self.running() {
            (self.clock.now() / NANOSECONDS_PER_TICK).wrapping_add(self.base)
        } else {
            self.base
        }
    }

    fn set_counter(&mut self, value: u64) {
        self.base =
            if self.running() { value.wrapping_sub(self.clock.now() / NANOSECONDS_PER_TICK) } else { value };
    }

    /// Arms comparator `n`'s timer for the next match, not before `earliest` (clock nanoseconds).
    fn aim(&mut self, n: usize, earliest: u64) {
        let c = self.r.comparators[n];
        if !self.running() {
            self.timers[n].disarm();
            return;
        }
        let left = c.value.wrapping_sub(self.counter()) & c.mask();
        // The next tick that equals the comparator; a match now has been dealt with.
        let left = if left == 0 { c.mask() } else { left };
        let ticks_at = (self.clock.now() / NANOSECONDS_PER_TICK).saturating_add(left);
        self.timers[n].arm(ticks_at.saturating_mul(NANOSECONDS_PER_TICK).max(earliest));
    }

    /// The counter has reached comparator `n`.
    fn expired(&mut self, n: usize) {
        if !self.running() {
            return;
        }
        let counter = self.counter();
        let c = &mut self.r.comparators[n];
        let mut earliest = 0;
        if c.periodic() && c.period & c.mask() != 0 {
            // On to the first multiple of the period after now, were it that periods were missed.
            let (period, mask) = (c.period & c.mask(), c.mask());
            let behind = counter.wrapping_sub(c.value) & mask;
            let steps = (behind / period).saturating_add(1);
            c.value = c.value.wrapping_add(steps.wrapping_mul(period)) & mask;
            earliest = self.clock.now().saturating_add(MIN_PERIOD);
        }
        self.fire(n);
        self.aim(n, earliest);
    }

    fn fire(&mut self, n: usize) {
        let c = self.r.comparators[n];
        let level = c.config & timer::LEVEL != 0;
        if level {
            // The status shows levels, whether they interrupt or not.
            self.r.status |= 1 << n;
        }
        if c.config & timer::ENABLE == 0 {
            return;
        }
        if self.legacy() && n < 2 {
            self.routes.legacy[n].replace(); // an edge, whatever the comparator says
        } else if c.config & timer::MESSAGE != 0 {
            self.routes.irqs.msi(c.message >> 32, c.message as u32);
        } else if level {
            self.update_lines();
        } else if let Some(line) = self.line(n) {
            line.pulse();
        }
    }

    /// The line that comparator `n` is routed to.
    fn line(&self, n: usize) -> Option<&IrqLine> {
        let route = self.r.comparators[n].route();
        self.routes.lines.iter().find(|(gsi, _)| *gsi == route).map(|(_, lines)| &lines[n])
    }

    /// Sets all level-triggered lines as status and routes say.
    fn update_lines(&self) {
        for n in 0..TIMERS {
            let c = self.r.comparators[n];
            let by_line = c.config & timer::MESSAGE == 0 && !(self.legacy() && n < 2);
            let wanted = c.config & timer::LEVEL != 0 && c.config & timer::ENABLE != 0;
            let on = wanted && by_line && self.r.status & 1 << n != 0;
            for (gsi, lines) in &self.routes.lines {
                lines[n].set(on && *gsi == c.route());
            }
        }
    }

    /// Bits of the lines that a comparator can be routed to.
    fn route_capabilities(&self) -> u64 {
        self.routes.lines.iter().fold(0, |all, (gsi, _)| all | 1 << (gsi & 31))
    }

    fn read_register(&self, at: u64) -> u64 {
        match at {
            offset::CAPABILITIES => CAPABILITIES,
            offset::CONFIG => self.r.config,
            offset::STATUS => self.r.status,
            offset::COUNTER => self.counter(),
            offset::TIMERS.. => {
                let Some(c) = self.r.comparators.get(((at - offset::TIMERS) / 0x20) as usize) else {
                    return 0;
                };
                match at & 0x1f {
                    0x00 => {
                        let capable = timer::PERIODIC_CAPABLE | timer::SIZE_64 | timer::MESSAGE_CAPABLE;
                        c.config | capable | self.route_capabilities() << 32
                    }
                    0x08 => c.value,
                    0x10 => c.message,
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    /// Writes the bits of `mask` of a register.
    fn write_register(&mut self, at: u64, value: u64, mask: u64) {
        let merge = |old: u64| old & !mask | value & mask;
        match at {
            offset::CONFIG => {
                let (counter, was_legacy) = (self.counter(), self.legacy());
                self.r.config = merge(self.r.config) & (CONFIG_ENABLE | CONFIG_LEGACY);
                self.set_counter(counter);
                if self.legacy() != was_legacy {
                    self.cut_legacy();
                }
                self.rearm();
            }
            offset::STATUS => {
                self.r.status &= !(value & mask);
                self.update_lines();
            }
            offset::COUNTER => {
                let counter = merge(self.counter());
                self.set_counter(counter);
                self.rearm();
            }
            offset::TIMERS.. => {
                let n = ((at - offset::TIMERS) / 0x20) as usize;
                if n < TIMERS {
                    self.write_comparator(n, at & 0x1f, value, mask);
                }
            }
            _ => {}
        }
    }

    fn write_comparator(&mut self, n: usize, at: u64, value: u64, mask: u64) {
        let merge = |old: u64| old & !mask | value & mask;
        let c = &mut self.r.comparators[n];
        match at {
            0x00 => {
                c.config = merge(c.config) & timer::WRITABLE;
                if c.config & timer::LEVEL == 0 {
                    self.r.status &= !(1 << n);
                }
                self.update_lines();
                self.aim(n, 0);
            }
            0x08 => {
                // A periodic comparator's value is set only if that was announced; otherwise it is the period.
                if !c.periodic() || c.config & timer::SET_VALUE != 0 {
                    c.value = merge(c.value) & c.mask();
                }
                if c.periodic() {
                    c.period = merge(c.period) & c.mask();
                }
                c.config &= !timer::SET_VALUE;
                self.aim(n, 0);
            }
            0x10 => c.message = merge(c.message),
            _ => {}
        }
    }

    fn rearm(&mut self) {
        (0..TIMERS).for_each(|n| self.aim(n, 0));
    }

    fn cut_legacy(&self) {
        for line in &self.routes.legacy {
            line.cut(self.legacy());
        }
        self.update_lines();
    }
}

impl Device for Hpet {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, _: RegionId, offset: u64, data: &mut [u8]) {
        let s = lock(&self.0);
        data.fill(0);
        let bytes = s.read_register(offset & !7).to_le_bytes();
        for (d, b) in data.iter_mut().zip(&bytes[(offset & 7) as usize..]) {
            *d = *b;
        }
    }

    fn write(&mut self, _: RegionId, offset: u64, data: &[u8]) {
        // Registers are written by doubleword or whole; anything else is not defined, and ignored.
        let (value, mask) = match data.len() {
            4 if offset & 3 == 0 => {
                (u64::from(u32::from_le_bytes([data[0], data[1], data[2], data[3]])), 0xffff_ffff)
            }
            8 if offset & 7 == 0 => (data.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)), u64::MAX),
            _ => return,
        };
        let shift = (offset & 7) * 8;
        lock(&self.0).write_register(offset & !7, value << shift, mask << shift);
    }

    fn reset(&mut self) {
        let mut s = lock(&self.0);
        s.r = Registers::new();
        s.base = 0;
        s.cut_legacy();
        s.rearm();
    }

    fn save(&self) -> Result<State, StateError> {
        let s = lock(&self.0);
        State::new(KIND, 1, &Saved { registers: s.r.clone(), counter: s.counter() })
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(KIND, 1)?;
        let r = &saved.registers;
        let valid = r.config & !(CONFIG_ENABLE | CONFIG_LEGACY) == 0
            && r.status < 1 << TIMERS
            && r.comparators.iter().all(|c| c.config & !timer::WRITABLE == 0);
        if !valid {
            let reason = "impossible register contents".into();
            return Err(StateError::Invalid { kind: KIND.into(), reason });
        }
        let mut s = lock(&self.0);
        s.r = saved.registers;
        s.set_counter(saved.counter);
        s.cut_legacy();
        s.rearm();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bus::IrqPin;

    #[derive(Default)]
    struct Log(Mutex<Vec<String>>);

    impl Irqs for Log {
        fn set_line(&self, gsi: u32, level: bool) {
            if level {
                self.0.lock().unwrap().push(format!("line {gsi}"));
            }
        }
        fn msi(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push(format!("msi {address:x} {data:x}"));
        }
    }

    struct Rig {
        clock: Clock,
        hpet: Hpet,
        log: Arc<Log>,
        pit: LegacyLine,
    }

    impl Rig {
        fn new() -> Self {
            let (clock, log) = (Clock::manual(), Arc::new(Log::default()));
            let pin = |gsi| IrqPin::new(log.clone(), gsi);
            let [pit, rtc] = [0, 8].map(|gsi| LegacyLine::new(pin(gsi).line()));
            let hpet = Hpet::new(&clock, log.clone(), pit.clone(), rtc);
            for gsi in [16, 20] {
                let pin = pin(gsi);
                hpet.add_route(gsi, [pin.line(), pin.line(), pin.line()]);
            }
            Self { hpet, clock, log, pit }
        }
        fn get(&mut self, at: u64) -> u64 {
            let mut b = [0; 8];
            self.hpet.read(RegionId(0), at, &mut b);
            u64::from_le_bytes(b)
        }
        fn put(&mut self, at: u64, value: u64) {
            self.hpet.write(RegionId(0), at, &value.to_le_bytes());
        }
        fn put32(&mut self, at: u64, value: u32) {
            self.hpet.write(RegionId(0), at, &value.to_le_bytes());
        }
        fn log(&self) -> Vec<String> {
            std::mem::take(&mut self.log.0.lock().unwrap())
        }
    }

    const CONFIG: u64 = 0x10;
    const STATUS: u64 = 0x20;
    const COUNTER: u64 = 0xf0;
    const T0: u64 = 0x100;
    const T2: u64 = 0x140;

    #[test]
    fn counter() {
        let mut r = Rig::new();
        assert_eq!(r.get(0), 0x0098_9680_8086_a201);
        r.clock.advance(1000);
        assert_eq!(r.get(COUNTER), 0);
        r.put(COUNTER, 5);
        r.put32(CONFIG, 1);
        r.clock.advance(1000);
        assert_eq!(r.get(COUNTER), 105);
        r.put32(CONFIG, 0);
        r.clock.advance(1000);
        assert_eq!(r.get(COUNTER), 105);
        r.put32(COUNTER + 4, 1);
        assert_eq!(r.get(COUNTER), 0x1_0000_0069);
        let mut half = [0; 4];
        r.hpet.read(RegionId(0), COUNTER + 4, &mut half);
        assert_eq!(half, [1, 0, 0, 0]);
    }

    #[test]
    fn one_shot_by_line_edge_and_level() {
        let mut r = Rig::new();
        r.put32(CONFIG, 1);
        r.put32(T2, 1 << 2 | 20 << 9);
        r.put(T2 + 8, 100);
        r.clock.advance(999);
        assert_eq!(r.log(), [""; 0]);
        r.clock.advance(1);
        assert_eq!((r.log(), r.get(STATUS)), (vec!["line 20".into()], 0));
        r.clock.advance(1_000_000);
        assert_eq!(r.log(), [""; 0]);
        r.put32(T2, 1 << 1 | 1 << 2 | 16 << 9);
        let at = r.get(COUNTER) + 10;
        r.put(T2 + 8, at);
        r.clock.advance(100);
        assert_eq!((r.log(), r.get(STATUS)), (vec!["line 16".into()], 4));
        r.put(STATUS, 4);
        assert_eq!(r.get(STATUS), 0);
        assert_eq!(r.get(T2) >> 32, 1 << 16 | 1 << 20);
    }

    #[test]
    fn a_32_bit_comparator_wraps() {
        let mut r = Rig::new();
        r.put(COUNTER, 0xffff_fff0);
        r.put32(CONFIG, 1);
        r.put32(T2, 1 << 2 | 1 << 8 | 16 << 9);
        r.put32(T2 + 8, 0x10);
        r.clock.advance(0x20 * 10);
        assert_eq!(r.log(), ["line 16"]);
    }

    #[test]
    fn periodic_as_linux_programs_it() {
        let mut r = Rig::new();
        r.put32(CONFIG, 3);
        r.put32(T0, 0x4c | 1 << 8);
        let now = r.get(COUNTER) as u32;
        r.put32(T0 + 8, now + 100_000);
        r.put32(T0 + 8, 100_000);
        r.clock.advance(3_500_000);
        assert_eq!(r.log(), ["line 0"; 3]);
        // A period of a tick does not flood.
        r.put32(T0 + 8, 1);
        r.clock.advance(1_500_000);
        assert!(r.log().len() < 40);
    }

    #[test]
    fn legacy_replacement_cuts_the_pit() {
        let mut r = Rig::new();
        r.pit.set(true);
        assert_eq!(r.log(), ["line 0"]);
        r.put32(CONFIG, 2);
        r.pit.rise();
        assert_eq!(r.log(), [""; 0]);
        r.put32(CONFIG, 0);
        assert_eq!(r.log(), ["line 0"]);
    }

    #[test]
    fn messages() {
        let mut r = Rig::new();
        r.put32(CONFIG, 1);
        r.put(T2 + 0x10, 0xfee0_1000_0000_4041);
        r.put32(T2, 1 << 2 | 1 << 14);
        r.put(T2 + 8, 7);
        r.clock.advance(70);
        assert_eq!(r.log(), ["msi fee01000 4041"]);
    }

    #[test]
    fn save_and_load() {
        let mut a = Rig::new();
        a.put32(CONFIG, 1);
        a.put32(T2, 1 << 2 | 20 << 9);
        a.put(T2 + 8, 100);
        a.clock.advance(500);
        let mut b = Rig::new();
        b.clock.advance(77_777);
        b.hpet.load(a.hpet.save().unwrap()).unwrap();
        assert_eq!(b.get(COUNTER), 50);
        b.clock.advance(600);
        assert_eq!(b.log(), ["line 20"]);
    }
}
