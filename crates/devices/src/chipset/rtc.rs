//! The real-time clock and its memory (Motorola MC146818A data sheet; CMOS layout as PC firmware has it).
//!
//! Nothing ticks: the time is computed when somebody looks. A timer runs only while an interrupt is enabled that the
//! guest has not been given yet.

use super::calendar::{DAY, DateTime};
use super::clock::{Clock, ClockTimer};
use super::legacy::LegacyLine;
use bus::{Device, RegionId, State, StateError};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

const KIND: &str = "mc146818";

const SECOND: i128 = 1_000_000_000;
/// How long before an update the clock warns of it, in nanoseconds.
const UPDATE_WARNING: i128 = 244_000;

/// Registers.
mod reg {
    pub const SECONDS: u8 = 0;
    pub const SECONDS_ALARM: u8 = 1;
    pub const MINUTES: u8 = 2;
    pub const MINUTES_ALARM: u8 = 3;
    pub const HOURS: u8 = 4;
    pub const HOURS_ALARM: u8 = 5;
    pub const WEEKDAY: u8 = 6;
    pub const DAY: u8 = 7;
    pub const MONTH: u8 = 8;
    pub const YEAR: u8 = 9;
    pub const A: u8 = 0x0a;
    pub const B: u8 = 0x0b;
    pub const C: u8 = 0x0c;
    pub const D: u8 = 0x0d;
    pub const CENTURY: u8 = 0x32;
}

const A_UPDATING: u8 = 1 << 7;
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// Periodic, alarm and update-ended interrupt: enable bits of B, flags of C.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATE: u8 = 1 << 4;
const INTERRUPTS: u8 = PERIODIC | ALARM | UPDATE;
const C_IRQ: u8 = 1 << 7;
const D_VALID: u8 = 1 << 7;

/// Which time the clock shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RtcBase {
    /// The host's, in UTC.
    #[default]
    Utc,
    /// The host's, in its time zone.
    LocalTime,
    /// From these seconds since 1970 (UTC) on, by the host's clock.
    Start(i64),
}

/// The clock: ports 0x70 and 0x71.
pub struct Rtc(Arc<Mutex<Inner>>);

struct Inner {
    clock: Clock,
    timer: ClockTimer,
    irq: LegacyLine,
    /// For tests, whose time is the guest clock's.
    manual: bool,
    index: u8,
    cmos: [u8; 128],
    /// What the clock shows less the host's time, in nanoseconds.
    offset: i128,
    /// While setting, the clock stands still at this second.
    frozen: Option<i64>,
    /// Time up to which events are in register C already: shown time, and the guest clock's for the periodic one.
    seen: i128,
    seen_period: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    index: u8,
    cmos: Vec<u8>,
    offset: i64,
    offset_nanoseconds: u32,
    frozen: Option<i64>,
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(|e| e.into_inner())
}

fn to_bcd(v: u8) -> u8 {
    (v / 10 % 10) << 4 | (v % 10)
}

fn from_bcd(v: u8) -> u8 {
    (v >> 4) * 10 + (v & 15)
}

impl Rtc {
    /// A clock that interrupts through `irq` (line 8).
    pub fn new(clock: &Clock, irq: LegacyLine, base: RtcBase) -> Self {
        Self::with(clock, irq, base, false)
    }

    fn with(clock: &Clock, irq: LegacyLine, base: RtcBase, manual: bool) -> Self {
        Self(Arc::new_cyclic(|inner: &Weak<Mutex<Inner>>| {
            let inner = inner.clone();
            let timer = clock.timer(move || {
                if let Some(inner) = inner.upgrade() {
                    lock(&inner).update();
                }
            });
            let mut s = Inner {
                clock: clock.clone(),
                timer,
                irq,
                manual,
                index: 0,
                cmos: [0; 128],
                offset: 0,
                frozen: None,
                seen: 0,
                seen_period: 0,
            };
            s.offset = match base {
                RtcBase::Utc => 0,
                RtcBase::LocalTime => i128::from(local_offset(s.host())) * SECOND,
                RtcBase::Start(at) => i128::from(at) * SECOND - s.host(),
            };
            s.cmos[usize::from(reg::A)] = 0x26;
            s.cmos[usize::from(reg::B)] = B_24_HOURS;
            s.cmos[usize::from(reg::D)] = D_VALID;
            s.forget_past();
            Mutex::new(s)
        }))
    }

    /// Tells how much memory there is, below 4 GiB and above, in bytes, where firmware looks for it.
    pub fn set_memory(&self, below_4g: u64, above_4g: u64) {
        let mut s = lock(&self.0);
        let units = |bytes: u64, unit: u64, most: u64| (bytes / unit).min(most);
        let low = units(below_4g, 1024, 640);
        let extended = units(below_4g.saturating_sub(1 << 20), 1024, 0xffff);
        let above_16m = units(below_4g.saturating_sub(16 << 20), 64 << 10, 0xffff);
        let high = units(above_4g, 64 << 10, 0xff_ffff);
        for (at, value, bytes) in
            [(0x15, low, 2), (0x17, extended, 2), (0x30, extended, 2), (0x34, above_16m, 2), (0x5b, high, 3)]
        {
            s.cmos[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        }
    }

    /// Sets a byte of the memory (0x0e to 0x7f), as firmware set-up would.
    pub fn set_byte(&self, index: u8, value: u8) {
        if (0x0e..0x80).contains(&index) {
            lock(&self.0).cmos[usize::from(index)] = value;
        }
    }
}

/// Seconds by which local time is ahead of UTC at the given time (nanoseconds since 1970).
#[allow(unsafe_code)] // the C library's time zone rules
fn local_offset(now: i128) -> i64 {
    let seconds = libc::time_t::try_from(now.div_euclid(SECOND)).unwrap_or(0);
    // SAFETY: `tm` is plain data, for which all zeroes are valid.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live values of the right type; localtime_r writes only `tm`.
    let done = unsafe { libc::localtime_r(&seconds, &mut tm) };
    if done.is_null() { 0 } else { tm.tm_gmtoff }
}

impl Inner {
    /// The host's time in nanoseconds since 1970.
    fn host(&self) -> i128 {
        if self.manual {
            return self.clock.now().into();
        }
        match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => since.as_nanos() as i128, // far from 2^127
            Err(before) => -(before.duration().as_nanos() as i128),
        }
    }

    /// The time shown, in nanoseconds since 1970.
    fn now(&self) -> i128 {
        self.frozen.map_or_else(|| self.host() + self.offset, |s| i128::from(s) * SECOND)
    }

    fn b(&self) -> u8 {
        self.cmos[usize::from(reg::B)]
    }

    fn encode(&self, value: u8) -> u8 {
        if self.b() & B_BINARY != 0 { value } else { to_bcd(value) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.b() & B_BINARY != 0 { value } else { from_bcd(value) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.b() & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let twelve = (hour + 11) % 12 + 1;
        self.encode(twelve) | if hour >= 12 { 0x80 } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.b() & B_24_HOURS != 0 {
            return self.decode(value);
        }
        self.decode(value & 0x7f) % 12 + if value & 0x80 != 0 { 12 } else { 0 }
    }

    fn shown(&self) -> DateTime {
        DateTime::from_unix(self.now().div_euclid(SECOND) as i64) // 2^63 seconds are beyond any calendar
    }

    /// Sets the time shown, keeping the fraction of the second.
    fn set(&mut self, to: DateTime) {
        // Odd months and days carry over; the year stays one that the century byte can show.
        let to = DateTime { year: to.year.clamp(0, 9_999), ..to }.to_unix();
        if self.frozen.is_some() {
            self.frozen = Some(to);
        } else {
            let fraction = self.now().rem_euclid(SECOND);
            self.offset = i128::from(to) * SECOND + fraction - self.host();
            self.forget_past();
        }
    }

    /// Whether setting, or the divider in reset, holds the clock.
    fn held(&self) -> bool {
        self.b() & B_SET != 0 || self.cmos[usize::from(reg::A)] & 0x60 == 0x60
    }

    /// Holds the clock or lets it go, as registers A and B say.
    fn hold(&mut self) {
        match (self.held(), self.frozen) {
            (true, None) => self.frozen = Some(self.now().div_euclid(SECOND) as i64),
            (false, Some(at)) => {
                self.offset = i128::from(at) * SECOND - self.host();
                self.frozen = None;
                self.forget_past();
            }
            _ => {}
        }
    }

    /// Events before now do not count.
    fn forget_past(&mut self) {
        self.seen = self.now();
        self.seen_period = self.clock.now();
    }

    /// Period of the periodic interrupt in nanoseconds.
    fn period(&self) -> Option<u64> {
        let a = self.cmos[usize::from(reg::A)];
        // Only the 32,768 Hz time base is in use; its two fastest rates are aliases.
        let shift = match a & 0xf {
            0 => return None,
            n @ (1 | 2) => n + 6,
            n => n - 1,
        };
        (a & 0x70 == 0x20).then(|| (1_000_000_000u64 << shift) / 32_768)
    }

    /// First second after `after` (seconds since 1970) at which the alarm goes off. Alarm bytes from 0xc0 on match
    /// everything.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let byte = |r: u8| self.cmos[usize::from(r)];
        let wanted = |r: u8| (byte(r) < 0xc0).then(|| self.decode(byte(r)));
        let (second, minute) = (wanted(reg::SECONDS_ALARM), wanted(reg::MINUTES_ALARM));
        let hour = byte(reg::HOURS_ALARM);
        let hour = (hour & 0xc0 != 0xc0).then(|| self.decode_hour(hour));
        if second.is_some_and(|s| s > 59) || minute.is_some_and(|m| m > 59) || hour.is_some_and(|h| h > 23) {
            return None;
        }
        // The smallest time of day from `from` on that matches.
        let in_day = |from: i64| {
            let all = |w: Option<u8>, n: i64| (0..n).filter(move |v| w.is_none_or(|w| i64::from(w) == *v));
            all(hour, 24)
                .filter(|h| (h + 1) * 3600 > from)
                .flat_map(|h| all(minute, 60).map(move |m| h * 3600 + m * 60))
                .filter(|hm| hm + 60 > from)
                .flat_map(|hm| all(second, 60).map(move |s| hm + s))
                .find(|t| *t >= from)
        };
        let midnight = after - after.rem_euclid(DAY);
        let today = in_day(after - midnight + 1).map(|t| midnight + t);
        today.or_else(|| in_day(0).map(|t| midnight + DAY + t))
    }

    /// Puts what has happened into register C, sets the interrupt, and arms the timer for what is awaited.
    fn update(&mut self) {
        let now = self.now();
        let clock = self.clock.now();
        let (second, seen) = (now.div_euclid(SECOND), self.seen.div_euclid(SECOND));
        let mut flags = self.cmos[usize::from(reg::C)];
        if self.frozen.is_none() && second > seen {
            flags |= UPDATE;
            if self.next_alarm(seen as i64).is_some_and(|a| i128::from(a) <= second) {
                flags |= ALARM;
            }
        }
        if self.period().is_some_and(|p| clock / p > self.seen_period / p) {
            flags |= PERIODIC;
        }
        self.seen = now;
        self.seen_period = clock;
        let asserted = flags & self.b() & INTERRUPTS != 0;
        self.cmos[usize::from(reg::C)] = flags & INTERRUPTS | if asserted { C_IRQ } else { 0 };
        self.irq.set(asserted);

        // A flag that is up already says nothing new until the guest has read it.
        let awaited = self.b() & INTERRUPTS & !flags;
        let mut next: Option<u64> = None;
        let mut at = |t: u64| next = Some(next.map_or(t, |n| n.min(t)));
        let shown = |t: i128| clock.saturating_add(u64::try_from(t - now).unwrap_or(0));
        if self.frozen.is_none() && awaited & UPDATE != 0 {
            at(shown((second + 1) * SECOND));
        }
        if self.frozen.is_none()
            && awaited & ALARM != 0
            && let Some(a) = self.next_alarm(second as i64)
        {
            at(shown(i128::from(a) * SECOND));
        }
        if awaited & PERIODIC != 0
            && let Some(p) = self.period()
        {
            at((clock / p + 1).saturating_mul(p));
        }
        match next {
            Some(t) => self.timer.arm(t),
            None => self.timer.disarm(),
        }
    }

    fn read(&mut self) -> u8 {
        let t = self.shown();
        match self.index {
            reg::SECONDS => self.encode(t.second),
            reg::MINUTES => self.encode(t.minute),
            reg::HOURS => self.encode_hour(t.hour),
            reg::WEEKDAY => self.encode(t.weekday() + 1),
            reg::DAY => self.encode(t.day),
            reg::MONTH => self.encode(t.month),
            reg::YEAR => self.encode(t.year.rem_euclid(100) as u8),
            reg::CENTURY => self.encode((t.year / 100).rem_euclid(100) as u8),
            reg::A => {
                let fraction = self.now().rem_euclid(SECOND);
                let updating = self.frozen.is_none() && fraction >= SECOND - UPDATE_WARNING;
                self.cmos[usize::from(reg::A)] | if updating { A_UPDATING } else { 0 }
            }
            reg::C => {
                self.update();
                let c = std::mem::take(&mut self.cmos[usize::from(reg::C)]);
                self.update();
                c
            }
            n => self.cmos[usize::from(n)],
        }
    }

    fn write(&mut self, value: u8) {
        let mut t = self.shown();
        match self.index {
            reg::SECONDS => t.second = self.decode(value),
            reg::MINUTES => t.minute = self.decode(value),
            reg::HOURS => t.hour = self.decode_hour(value),
            reg::DAY => t.day = self.decode(value),
            reg::MONTH => t.month = self.decode(value),
            reg::YEAR => t.year = t.year - t.year.rem_euclid(100) + i64::from(self.decode(value)),
            reg::CENTURY => t.year = t.year.rem_euclid(100) + 100 * i64::from(self.decode(value)),
            reg::WEEKDAY | reg::C | reg::D => return, // the weekday follows from the date
            reg::SECONDS_ALARM | reg::MINUTES_ALARM | reg::HOURS_ALARM | reg::A | reg::B => {
                self.update();
                let value = match self.index {
                    reg::A => value & !A_UPDATING,
                    // Setting the clock turns the update-ended interrupt off.
                    reg::B if value & B_SET != 0 => value & !UPDATE,
                    _ => value,
                };
                self.cmos[usize::from(self.index)] = value;
                self.hold();
                self.update();
                return;
            }
            n => {
                self.cmos[usize::from(n)] = value;
                return;
            }
        }
        self.set(t);
        self.update();
    }
}

impl Device for Rtc {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, _: RegionId, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            // The index port is write-only.
            if (offset + i as u64) & 1 == 1 {
                *byte = lock(&self.0).read();
            }
        }
    }

    fn write(&mut self, _: RegionId, offset: u64, data: &[u8]) {
        let mut s = lock(&self.0);
        for (i, byte) in data.iter().enumerate() {
            if (offset + i as u64) & 1 == 0 {
                s.index = byte & 0x7f; // the top bit gates NMIs, of which there are none
            } else {
                s.write(*byte);
            }
        }
    }

    /// The clock has a battery: time and memory stay, interrupts are off.
    fn reset(&mut self) {
        let mut s = lock(&self.0);
        s.index = 0;
        s.cmos[usize::from(reg::B)] &= !(INTERRUPTS | B_SET);
        s.hold();
        s.forget_past();
        s.cmos[usize::from(reg::C)] = 0;
        s.update();
    }

    fn save(&self) -> Result<State, StateError> {
        let mut s = lock(&self.0);
        s.update();
        let saved = Saved {
            index: s.index,
            cmos: s.cmos.to_vec(),
            offset: s.offset.div_euclid(SECOND) as i64, // within what a DateTime can be from the host's time
            offset_nanoseconds: s.offset.rem_euclid(SECOND) as u32,
            frozen: s.frozen,
        };
        State::new(KIND, 1, &saved)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(KIND, 1)?;
        let invalid = |reason: &str| StateError::Invalid { kind: KIND.into(), reason: reason.into() };
        let cmos = saved.cmos.try_into().map_err(|_| invalid("not 128 bytes of memory"))?;
        // Within 100,000 years, so that no sum overflows.
        let sane = |seconds: i64| seconds.unsigned_abs() < 1 << 42;
        if saved.index > 0x7f || !sane(saved.offset) || saved.frozen.is_some_and(|f| !sane(f)) {
            return Err(invalid("impossible time"));
        }
        let mut s = lock(&self.0);
        s.index = saved.index;
        s.cmos = cmos;
        s.offset = i128::from(saved.offset) * SECOND + i128::from(saved.offset_nanoseconds);
        s.frozen = saved.frozen;
        s.forget_past();
        s.update();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel::Irqs;
    use bus::IrqPin;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Default)]
    struct Edges(AtomicU32);

    impl Irqs for Edges {
        fn set_line(&self, gsi: u32, level: bool) {
            assert_eq!(gsi, 8);
            self.0.fetch_add(level.into(), Ordering::SeqCst);
        }
        fn msi(&self, _: u64, _: u32) {}
    }

    struct Rig {
        clock: Clock,
        rtc: Rtc,
        edges: Arc<Edges>,
    }

    /// 2024-02-28 23:59:50 UTC, a Wednesday.
    const START: i64 = 1_709_164_790;

    impl Rig {
        fn new() -> Self {
            let (clock, edges) = (Clock::manual(), Arc::new(Edges::default()));
            let irq = LegacyLine::new(IrqPin::new(edges.clone(), 8).line());
            Self { rtc: Rtc::with(&clock, irq, RtcBase::Start(START), true), clock, edges }
        }
        fn get(&mut self, index: u8) -> u8 {
            let mut b = [0];
            self.rtc.write(RegionId(0), 0, &[index]);
            self.rtc.read(RegionId(0), 1, &mut b);
            b[0]
        }
        fn put(&mut self, index: u8, value: u8) {
            self.rtc.write(RegionId(0), 0, &[index]);
            self.rtc.write(RegionId(0), 1, &[value]);
        }
        fn seconds(&self, n: u64) {
            self.clock.advance(n * 1_000_000_000);
        }
        fn edges(&self) -> u32 {
            self.edges.0.swap(0, Ordering::SeqCst)
        }
        fn time(&mut self) -> [u8; 8] {
            [
                reg::CENTURY,
                reg::YEAR,
                reg::MONTH,
                reg::DAY,
                reg::HOURS,
                reg::MINUTES,
                reg::SECONDS,
                reg::WEEKDAY,
            ]
            .map(|r| self.get(r))
        }
    }

    #[test]
    fn time_in_all_formats() {
        let mut r = Rig::new();
        assert_eq!(r.time(), [0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x50, 4]);
        r.seconds(10);
        assert_eq!(r.time(), [0x20, 0x24, 0x02, 0x29, 0, 0, 0, 5]);
        r.put(reg::B, 0);
        assert_eq!(r.get(reg::HOURS), 0x12);
        r.seconds(13 * 3600);
        assert_eq!(r.get(reg::HOURS), 0x81);
        r.put(reg::B, B_BINARY | B_24_HOURS);
        assert_eq!(r.time(), [20, 24, 2, 29, 13, 0, 0, 5]);
    }

    #[test]
    fn setting() {
        let mut r = Rig::new();
        r.put(reg::B, B_SET | B_24_HOURS);
        for (reg, v) in [(9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x58), (0x32, 0x19)] {
            r.put(reg, v);
        }
        r.seconds(100);
        assert_eq!(r.get(0), 0x58, "standing still");
        r.put(reg::B, B_24_HOURS);
        r.seconds(3);
        assert_eq!(r.time(), [0x20, 0, 1, 1, 0, 0, 1, 7]);
        // One register alone, while running.
        r.put(reg::HOURS, 0x17);
        assert_eq!(r.time(), [0x20, 0, 1, 1, 0x17, 0, 1, 7]);
        r.put(reg::MONTH, 0xff);
        r.put(reg::DAY, 0);
        r.time();
    }

    #[test]
    fn update_in_progress() {
        let mut r = Rig::new();
        assert_eq!(r.get(reg::A), 0x26);
        r.clock.advance(999_800_000);
        assert_eq!(r.get(reg::A), 0xa6);
        r.clock.advance(200_000);
        assert_eq!(r.get(reg::A), 0x26);
    }

    #[test]
    fn update_interrupt_once_until_read() {
        let mut r = Rig::new();
        r.put(reg::A, 0x20);
        r.put(reg::B, UPDATE | B_24_HOURS);
        r.seconds(5);
        assert_eq!((r.edges(), r.get(reg::C)), (1, 0x90));
        assert_eq!(r.get(reg::C), 0);
        r.seconds(1);
        assert_eq!((r.edges(), r.get(reg::C)), (1, 0x90));
        r.put(reg::B, B_24_HOURS);
        r.seconds(1);
        assert_eq!((r.edges(), r.get(reg::C)), (0, 0x10), "the flag is there for polling");
    }

    #[test]
    fn alarm() {
        let mut r = Rig::new();
        r.put(reg::A, 0x20);
        r.put(reg::HOURS_ALARM, 0);
        r.put(reg::MINUTES_ALARM, 0xff);
        r.put(reg::SECONDS_ALARM, 0x30);
        r.get(reg::C);
        r.put(reg::B, ALARM | B_24_HOURS);
        r.seconds(39);
        assert_eq!(r.edges(), 0);
        r.seconds(1);
        assert_eq!((r.edges(), r.get(reg::C)), (1, 0xb0));
        r.seconds(60);
        assert_eq!((r.edges(), r.get(reg::C)), (1, 0xb0));
        r.put(reg::SECONDS_ALARM, 0x99);
        r.seconds(2 * 86_400);
        assert_eq!(r.edges(), 0, "never");
    }

    #[test]
    fn periodic() {
        let mut r = Rig::new();
        r.put(reg::B, PERIODIC | B_24_HOURS);
        let mut n = 0;
        for _ in 0..64 {
            r.clock.advance(15_625_000);
            n += r.edges();
            r.get(reg::C);
        }
        assert_eq!(n, 64);
        r.put(reg::A, 0x20);
        r.seconds(1);
        assert_eq!(r.edges(), 0);
        r.put(reg::A, 0x2a);
        assert_eq!(lock(&r.rtc.0).period(), Some(15_625_000));
        r.put(reg::A, 0x21);
        assert_eq!(lock(&r.rtc.0).period(), Some(3_906_250));
    }

    #[test]
    fn memory() {
        let mut r = Rig::new();
        r.rtc.set_memory(3 << 30, 5 << 30);
        let word = |r: &mut Rig, at| u16::from_le_bytes([r.get(at), r.get(at + 1)]);
        assert_eq!((word(&mut r, 0x15), word(&mut r, 0x17), word(&mut r, 0x30)), (640, 0xffff, 0xffff));
        assert_eq!(word(&mut r, 0x34), ((3u64 << 30) / 65536 - 256) as u16);
        assert_eq!([0x5b, 0x5c, 0x5d].map(|i| r.get(i)), [0, 0x40, 1]);
        r.put(0x6f, 0x42);
        r.rtc.set_byte(0x70, 0x43);
        r.rtc.set_byte(0x03, 0x43);
        r.rtc.reset();
        assert_eq!((r.get(0x6f), r.get(0x70), r.get(3)), (0x42, 0x43, 0));
        assert_eq!(r.get(reg::D), 0x80);
    }

    #[test]
    fn bases() {
        let rtc = |base| Rtc::new(&Clock::manual(), LegacyLine::new(bus::IrqLine::unconnected()), base);
        let utc = lock(&rtc(RtcBase::Utc).0).now();
        let local = lock(&rtc(RtcBase::LocalTime).0).now();
        assert!((utc - local).abs() <= 15 * 3600 * SECOND);
        assert!(utc / SECOND > 1_700_000_000);
        assert_eq!(lock(&rtc(RtcBase::Start(86_400)).0).shown().day, 2);
    }
}
