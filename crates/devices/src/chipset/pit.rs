//! The 8254 programmable interval timer and system control port B (Intel 8254 data sheet; ICH9 data sheet, 13.7).
//!
//! Nothing ticks here: a counter's value and output are computed from the time that has passed since it was loaded.
//! Only channel 0, whose output is an interrupt, has a timer.

use super::clock::{Clock, ClockTimer};
use super::legacy::LegacyLine;
use bus::{Device, RegionId, State, StateError};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// Frequency of the counters' input in Hz: a third of the NTSC colour carrier's four-fold.
pub const FREQUENCY: u64 = 1_193_182;

/// Interrupts come no faster than this, so that a guest cannot keep the timer thread busy; in nanoseconds.
const MIN_PERIOD: u64 = 50_000;
/// Half a period of the DRAM refresh signal in port 0x61, in nanoseconds.
const REFRESH: u64 = 15_085;

const KIND: &str = "i8254";

fn ticks(nanoseconds: u64) -> u64 {
    (u128::from(nanoseconds) * u128::from(FREQUENCY) / 1_000_000_000) as u64 // less than the nanoseconds
}

/// Nanoseconds after which so many ticks have passed, rounded up.
fn nanoseconds(ticks: u64) -> u64 {
    let ns = (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(FREQUENCY));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// How bytes are read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Access {
    Low,
    High,
    #[default]
    Both,
}

/// A counter. Its times are nanoseconds on the clock, `now` of its methods too.
#[derive(Clone, Debug, PartialEq)]
struct Counter {
    mode: u8,
    bcd: bool,
    access: Access,
    /// Ticks of a cycle, 1 to 65,536 (10,000 in BCD); 0 before the first count is written.
    count: u64,
    /// When the count was loaded. After a load that can be before the clock's zero, hence wrapping.
    start: u64,
    /// A count that is stopped by its gate, after so many ticks.
    held: Option<u64>,
    /// Modes 1 and 5 have been triggered.
    triggered: bool,
    /// Modes 2 and 3: the count that comes into force at this time, when the cycle ends.
    next: Option<(u64, u64)>,
    gate: bool,
    /// The low byte of a count whose high byte is to come.
    low: Option<u8>,
    /// Latched bytes still to be read.
    latch: Vec<u8>,
    status_latch: Option<u8>,
    /// Unlatched reads of two bytes: the next one is the high byte.
    read_high: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedCounter {
    mode: u8,
    bcd: bool,
    access: Access,
    count: u64,
    /// Nanoseconds since the count was loaded.
    elapsed: u64,
    held: Option<u64>,
    triggered: bool,
    /// Count, and nanoseconds until it comes into force.
    next: Option<(u64, u64)>,
    gate: bool,
    low: Option<u8>,
    latch: Vec<u8>,
    status_latch: Option<u8>,
    read_high: bool,
}

impl Counter {
    fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bcd: false,
            access: Access::Both,
            count: 0,
            start: 0,
            held: None,
            triggered: false,
            next: None,
            gate,
            low: None,
            latch: Vec::new(),
            status_latch: None,
            read_high: false,
        }
    }

    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn one_shot_by_gate(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// Loads the next count if its time has come.
    fn settle(&mut self, now: u64) {
        if let Some((count, at)) = self.next.filter(|(_, at)| *at <= now) {
            (self.count, self.start, self.next) = (count, at, None);
        }
    }

    /// Ticks since the count was loaded.
    fn elapsed(&self, now: u64) -> u64 {
        self.held.unwrap_or_else(|| ticks(now.wrapping_sub(self.start)))
    }

    /// Whether it has a count and, in the modes where the gate has to trigger it, was triggered.
    fn active(&self) -> bool {
        self.count != 0 && (!self.one_shot_by_gate() || self.triggered)
    }

    fn output(&self, now: u64) -> bool {
        if !self.active() {
            return self.mode != 0;
        }
        let d = self.elapsed(now);
        match self.mode {
            0 | 1 => d >= self.count,
            2 => !self.gate || d % self.count != self.count - 1,
            3 => !self.gate || d % self.count < self.count.div_ceil(2),
            _ => d != self.count,
        }
    }

    /// The 16 bits a read gives.
    fn value(&self, now: u64) -> u16 {
        let range = if self.bcd { 10_000 } else { 0x1_0000 };
        let value = if self.active() {
            let d = self.elapsed(now);
            match self.mode {
                2 => self.count - d % self.count,
                // Counts by two, twice a cycle.
                3 => {
                    let half = self.count.div_ceil(2).max(1);
                    (self.count - 2 * (d % self.count % half)) & !1
                }
                _ => (self.count + range - d % range) % range,
            }
        } else {
            self.count
        };
        let value = (value % range) as u16; // below 65,536
        if self.bcd { to_bcd(value) } else { value }
    }

    /// Control word for this counter, access bits not 0.
    fn control(&mut self, word: u8) {
        let gate = self.gate;
        *self = Self::new(gate);
        self.mode = match (word >> 1) & 7 {
            m @ 0..=5 => m,
            m => m - 4,
        };
        self.bcd = word & 1 != 0;
        self.access = match (word >> 4) & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
    }

    fn write(&mut self, now: u64, byte: u8) {
        let value = match self.access {
            Access::Low => u16::from(byte),
            Access::High => u16::from(byte) << 8,
            Access::Both => match self.low.take() {
                Some(low) => u16::from_le_bytes([low, byte]),
                None => {
                    self.low = Some(byte);
                    // In mode 0 the first byte stops the count.
                    if self.mode == 0 && self.count != 0 {
                        self.count = 0;
                    }
                    return;
                }
            },
        };
        let count = match (self.bcd, value) {
            (true, 0) => 10_000,
            (false, 0) => 0x1_0000,
            (true, v) => from_bcd(v),
            (false, v) => v.into(),
        };
        self.load(now, count);
    }

    fn load(&mut self, now: u64, count: u64) {
        self.settle(now);
        // A count of 1 is not possible in the periodic modes; it does no harm as 2.
        let count = if self.periodic() { count.max(2) } else { count };
        if self.periodic() && self.count != 0 && self.held.is_none() {
            let cycles = self.elapsed(now) / self.count + 1;
            let at = self.start.wrapping_add(nanoseconds(cycles * self.count));
            self.next = Some((count, at));
            return;
        }
        self.count = count;
        if self.one_shot_by_gate() && self.triggered {
            return; // in force with the next trigger; a count under way is not told apart
        }
        self.start = now;
        self.held = (!self.gate && !self.one_shot_by_gate()).then_some(0);
    }

    fn set_gate(&mut self, now: u64, gate: bool) {
        if self.gate == gate {
            return;
        }
        self.settle(now);
        self.gate = gate;
        match (self.mode, gate) {
            (0 | 4, false) => self.held = Some(self.elapsed(now)),
            (0 | 4, true) => {
                let done = self.held.take().unwrap_or(0);
                self.start = now.wrapping_sub(nanoseconds(done));
            }
            (1 | 5, true) => {
                self.triggered = true;
                self.start = now;
            }
            (2 | 3, false) => {
                self.held = Some(0);
                if let Some((count, _)) = self.next.take() {
                    self.count = count;
                }
            }
            (2 | 3, true) => {
                self.held = None;
                self.start = now;
            }
            _ => {}
        }
    }

    /// Counter latch command.
    fn latch_count(&mut self, now: u64) {
        if self.latch.is_empty() {
            let [low, high] = self.value(now).to_le_bytes();
            self.latch = match self.access {
                Access::Low => vec![low],
                Access::High => vec![high],
                Access::Both => vec![low, high],
            };
        }
    }

    fn latch_status(&mut self, now: u64) {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        };
        let null_count = self.count == 0 || self.next.is_some() || self.low.is_some();
        let status = u8::from(self.output(now)) << 7
            | u8::from(null_count) << 6
            | access << 4
            | self.mode << 1
            | u8::from(self.bcd);
        self.status_latch.get_or_insert(status);
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status_latch.take() {
            return status;
        }
        if !self.latch.is_empty() {
            return self.latch.remove(0);
        }
        let [low, high] = self.value(now).to_le_bytes();
        match self.access {
            Access::Low => low,
            Access::High => high,
            Access::Both => {
                self.read_high = !self.read_high;
                if self.read_high { low } else { high }
            }
        }
    }

    /// When the output rises next after `now`.
    fn next_rise(&self, now: u64) -> Option<u64> {
        if !self.active() || self.held.is_some() {
            return None;
        }
        let d = self.elapsed(now);
        let rise = match self.mode {
            0 | 1 => self.count,
            2 | 3 => (d / self.count + 1) * self.count,
            _ => self.count + 1,
        };
        (rise > d).then(|| self.start.wrapping_add(nanoseconds(rise)))
    }

    fn save(&self, now: u64) -> SavedCounter {
        SavedCounter {
            mode: self.mode,
            bcd: self.bcd,
            access: self.access,
            count: self.count,
            elapsed: now.wrapping_sub(self.start),
            held: self.held,
            triggered: self.triggered,
            next: self.next.map(|(count, at)| (count, at.saturating_sub(now))),
            gate: self.gate,
            low: self.low,
            latch: self.latch.clone(),
            status_latch: self.status_latch,
            read_high: self.read_high,
        }
    }

    fn load_saved(saved: SavedCounter, now: u64) -> Option<Self> {
        let count_ok = |n: u64| n <= 0x1_0000;
        let valid = saved.mode < 6
            && count_ok(saved.count)
            && saved.next.is_none_or(|(n, _)| n != 0 && count_ok(n))
            && saved.elapsed < 1 << 62
            && saved.held.is_none_or(|h| h < 1 << 60)
            && saved.latch.len() <= 2;
        valid.then(|| Self {
            mode: saved.mode,
            bcd: saved.bcd,
            access: saved.access,
            count: saved.count,
            start: now.wrapping_sub(saved.elapsed),
            held: saved.held,
            triggered: saved.triggered,
            next: saved.next.map(|(n, wait)| (n, now.saturating_add(wait))),
            gate: saved.gate,
            low: saved.low,
            latch: saved.latch,
            status_latch: saved.status_latch,
            read_high: saved.read_high,
        })
    }
}

fn to_bcd(v: u16) -> u16 {
    ((v / 1000 % 10) << 12) | ((v / 100 % 10) << 8) | ((v / 10 % 10) << 4) | (v % 10)
}

/// Digits above 9 count as what they are, as in a counter that is loaded with them.
fn from_bcd(v: u16) -> u64 {
    [12, 8, 4, 0].into_iter().fold(0, |n, shift| n * 10 + u64::from(v >> shift & 15)).min(10_000)
}

/// The timer: ports 0x40 to 0x43 and 0x61.
pub struct Pit(Arc<Mutex<Inner>>);

struct Inner {
    clock: Clock,
    irq: LegacyLine,
    timer: ClockTimer,
    counters: [Counter; 3],
    /// Port 0x61, low four bits as written.
    port_b: u8,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    counters: [SavedCounter; 3],
    port_b: u8,
    irq: bool,
}

impl Pit {
    /// Ports 0x40 to 0x43.
    pub const COUNTERS: RegionId = RegionId(0);
    /// Port 0x61.
    pub const PORT_B: RegionId = RegionId(1);

    /// A timer whose channel 0 drives `irq` (line 0).
    pub fn new(clock: &Clock, irq: LegacyLine) -> Self {
        Self(Arc::new_cyclic(|inner: &Weak<Mutex<Inner>>| {
            let inner = inner.clone();
            let timer = clock.timer(move || {
                if let Some(inner) = inner.upgrade() {
                    lock(&inner).expired();
                }
            });
            let counters = Inner::reset_counters();
            Mutex::new(Inner { clock: clock.clone(), irq, timer, counters, port_b: 0 })
        }))
    }
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(|e| e.into_inner())
}

impl Inner {
    fn reset_counters() -> [Counter; 3] {
        [Counter::new(true), Counter::new(true), Counter::new(false)]
    }

    fn expired(&mut self) {
        let now = self.clock.now();
        self.counters[0].settle(now);
        self.irq.rise();
        self.aim(now, now.saturating_add(MIN_PERIOD));
    }

    /// Arms the timer for channel 0's next rising edge, not before `earliest`.
    fn aim(&self, now: u64, earliest: u64) {
        let counter = &self.counters[0];
        // A count that waits for the end of the cycle comes into force with the edge there.
        match counter.next_rise(now) {
            Some(at) => self.timer.arm(at.max(earliest)),
            None => self.timer.disarm(),
        }
    }

    /// Channel 0 was programmed.
    fn programmed(&mut self, now: u64) {
        self.irq.set(self.counters[0].output(now));
        self.aim(now, now);
    }

    fn write_counters(&mut self, offset: u64, byte: u8) {
        let now = self.clock.now();
        for c in &mut self.counters {
            c.settle(now);
        }
        let channel = match offset {
            0..3 => {
                self.counters[offset as usize].write(now, byte);
                offset
            }
            _ if byte >> 6 == 3 => {
                // Read-back command; count latch is bit 5, status latch bit 4, both active low.
                let selected = self.counters.iter_mut().enumerate().filter(|(i, _)| byte & 2 << i != 0);
                for (_, c) in selected {
                    if byte & 0x20 == 0 {
                        c.latch_count(now);
                    }
                    if byte & 0x10 == 0 {
                        c.latch_status(now);
                    }
                }
                return;
            }
            _ => {
                let channel = u64::from(byte >> 6);
                let counter = &mut self.counters[usize::from(byte >> 6)];
                if byte & 0x30 == 0 {
                    counter.latch_count(now);
                    return;
                }
                counter.control(byte);
                channel
            }
        };
        if channel == 0 {
            self.programmed(now);
        }
    }

    fn read_port_b(&mut self) -> u8 {
        let now = self.clock.now();
        self.counters[2].settle(now);
        let refresh = now / REFRESH % 2 == 1;
        self.port_b | u8::from(refresh) << 4 | u8::from(self.counters[2].output(now)) << 5
    }

    fn write_port_b(&mut self, byte: u8) {
        self.port_b = byte & 0xf;
        let now = self.clock.now();
        self.counters[2].set_gate(now, byte & 1 != 0);
    }
}

impl Device for Pit {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, at: RegionId, offset: u64, data: &mut [u8]) {
        let mut s = lock(&self.0);
        for (i, byte) in data.iter_mut().enumerate() {
            let offset = offset + i as u64;
            if at == Self::PORT_B {
                *byte = s.read_port_b();
            } else if offset < 3 {
                let now = s.clock.now();
                let counter = &mut s.counters[offset as usize];
                counter.settle(now);
                *byte = counter.read(now);
            }
        }
    }

    fn write(&mut self, at: RegionId, offset: u64, data: &[u8]) {
        let mut s = lock(&self.0);
        for (i, byte) in data.iter().enumerate() {
            let offset = offset + i as u64;
            if at == Self::PORT_B { s.write_port_b(*byte) } else { s.write_counters(offset & 3, *byte) }
        }
    }

    fn reset(&mut self) {
        let mut s = lock(&self.0);
        s.counters = Inner::reset_counters();
        s.port_b = 0;
        s.timer.disarm();
        s.irq.set(false);
    }

    fn save(&self) -> Result<State, StateError> {
        let s = lock(&self.0);
        let now = s.clock.now();
        let counters = s.counters.each_ref().map(|c| c.save(now));
        State::new(KIND, 1, &Saved { counters, port_b: s.port_b, irq: s.irq.level() })
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(KIND, 1)?;
        let mut s = lock(&self.0);
        let now = s.clock.now();
        let [a, b, c] = saved.counters.map(|c| Counter::load_saved(c, now));
        let (Some(a), Some(b), Some(c)) = (a, b, c) else {
            let reason = "impossible counter".into();
            return Err(StateError::Invalid { kind: KIND.into(), reason });
        };
        s.counters = [a, b, c];
        s.port_b = saved.port_b & 0xf;
        s.irq.set(saved.irq);
        s.aim(now, now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel::Irqs;
    use bus::IrqPin;

    #[derive(Default)]
    struct Edges(Mutex<u32>);

    impl Irqs for Edges {
        fn set_line(&self, gsi: u32, level: bool) {
            assert_eq!(gsi, 0);
            *self.0.lock().unwrap() += u32::from(level);
        }
        fn msi(&self, _: u64, _: u32) {}
    }

    struct Rig {
        clock: Clock,
        edges: Arc<Edges>,
        pit: Pit,
    }

    impl Rig {
        fn new() -> Self {
            let (clock, edges) = (Clock::manual(), Arc::new(Edges::default()));
            let pit = Pit::new(&clock, LegacyLine::new(IrqPin::new(edges.clone(), 0).line()));
            Self { clock, edges, pit }
        }
        fn write(&mut self, port: u64, byte: u8) {
            let (at, offset) = if port == 0x61 { (Pit::PORT_B, 0) } else { (Pit::COUNTERS, port - 0x40) };
            self.pit.write(at, offset, &[byte]);
        }
        fn read(&mut self, port: u64) -> u8 {
            let (at, offset) = if port == 0x61 { (Pit::PORT_B, 0) } else { (Pit::COUNTERS, port - 0x40) };
            let mut b = [0];
            self.pit.read(at, offset, &mut b);
            b[0]
        }
        fn count(&mut self, channel: u64) -> u16 {
            self.write(0x43, (channel as u8) << 6);
            u16::from_le_bytes([self.read(0x40 + channel), self.read(0x40 + channel)])
        }
        fn program(&mut self, channel: u64, mode: u8, count: u16) {
            self.write(0x43, (channel as u8) << 6 | 0x30 | mode << 1);
            let [low, high] = count.to_le_bytes();
            self.write(0x40 + channel, low);
            self.write(0x40 + channel, high);
        }
        fn pass(&mut self, ticks: u64) {
            self.clock.advance(nanoseconds(ticks));
        }
        fn edges(&self) -> u32 {
            std::mem::take(&mut self.edges.0.lock().unwrap())
        }
        fn out2(&mut self) -> bool {
            self.read(0x61) & 0x20 != 0
        }
    }

    #[test]
    fn rate_generator_interrupts_each_cycle() {
        let mut r = Rig::new();
        r.program(0, 2, 1193);
        assert_eq!(r.edges(), 1, "the output goes up with the control word");
        r.pass(1193 * 10 + 100);
        assert_eq!(r.edges(), 10);
        assert!((1092..=1093).contains(&r.count(0)));
        // A new count waits for the end of the cycle.
        r.program_count(0, 2386);
        r.write(0x43, 0xe2);
        assert_eq!(r.read(0x40) & 0x7f, 0x74, "null count, both bytes, mode 2");
        r.pass(1093 + 2386);
        assert_eq!(r.edges(), 2);
        r.pass(2386 * 3);
        assert_eq!(r.edges(), 3);
    }

    impl Rig {
        fn program_count(&mut self, channel: u64, count: u16) {
            let [low, high] = count.to_le_bytes();
            self.write(0x40 + channel, low);
            self.write(0x40 + channel, high);
        }
    }

    #[test]
    fn fast_rates_are_held_back() {
        let mut r = Rig::new();
        r.program(0, 2, 1);
        r.pass(FREQUENCY);
        assert!(r.edges() <= 1_000_000_000 / MIN_PERIOD as u32 + 1);
    }

    #[test]
    fn terminal_count_interrupts_once() {
        let mut r = Rig::new();
        r.program(0, 0, 100);
        assert_eq!(r.edges(), 0);
        r.pass(99);
        assert_eq!(r.edges(), 0);
        r.pass(100_000);
        assert_eq!(r.edges(), 1);
        r.program(0, 4, 100);
        r.pass(1000);
        assert_eq!(r.edges(), 1, "after the strobe");
    }

    #[test]
    fn channel_2_with_its_gate() {
        let mut r = Rig::new();
        // As Linux calibrates with it: gate on, speaker off, mode 0.
        r.write(0x61, 0x01);
        r.program(2, 0, 1000);
        assert!(!r.out2());
        r.pass(400);
        assert!((599..=600).contains(&r.count(2)));
        r.write(0x61, 0);
        r.pass(5000);
        assert!((599..=600).contains(&r.count(2)), "held by the gate");
        r.write(0x61, 1);
        r.pass(550);
        assert!(!r.out2());
        r.pass(60);
        assert!(r.out2());
        assert_eq!(r.edges(), 0);
    }

    #[test]
    fn square_wave_and_one_shot() {
        let mut r = Rig::new();
        r.write(0x61, 3);
        r.program(2, 3, 1000);
        r.pass(250);
        assert!(r.out2());
        assert!(r.count(2).abs_diff(500) <= 4, "counts by two");
        r.pass(500);
        assert!(!r.out2());
        r.write(0x61, 0);
        assert!(r.out2());
        r.program(2, 1, 100);
        assert!(r.out2());
        r.write(0x61, 1);
        assert!(!r.out2());
        r.pass(101);
        assert!(r.out2());
        assert_eq!(r.read(0x61) & 0xf, 1);
    }

    #[test]
    fn latches_hold_until_read() {
        let mut r = Rig::new();
        r.program(0, 2, 0);
        r.pass(0x1234);
        r.write(0x43, 0x00);
        r.pass(500);
        r.write(0x43, 0x00);
        let v = u16::from_le_bytes([r.read(0x40), r.read(0x40)]);
        assert!(v.abs_diff(0u16.wrapping_sub(0x1234)) <= 1);
        // Read-back of status and count: status comes first.
        r.write(0x43, 0xc2);
        assert_eq!(r.read(0x40), 0xb4);
        let w = u16::from_le_bytes([r.read(0x40), r.read(0x40)]);
        assert!((v - w).abs_diff(500) <= 1);
        // Unlatched reads alternate.
        let (a, b) = (r.read(0x40), r.read(0x40));
        assert!(u16::from_le_bytes([a, b]).abs_diff(w) <= 1);
    }

    #[test]
    fn binary_coded_decimal() {
        let mut r = Rig::new();
        r.write(0x43, 0x35);
        r.write(0x40, 0x00);
        r.write(0x40, 0x10);
        r.pass(1);
        assert_eq!(r.count(0), 0x0999);
        assert_eq!((to_bcd(9876), from_bcd(0x9876), from_bcd(0xffff)), (0x9876, 9876, 10_000));
    }

    #[test]
    fn refresh_toggles() {
        let mut r = Rig::new();
        let a = r.read(0x61) & 0x10;
        r.clock.advance(REFRESH);
        assert_ne!(r.read(0x61) & 0x10, a);
    }
}
