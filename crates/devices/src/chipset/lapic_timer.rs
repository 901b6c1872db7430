//! The local APIC's timer (Intel SDM vol. 3, 11.5.4): one-shot, periodic, TSC-deadline.
//!
//! The counter's input is a fixed 1 GHz bus clock, so a count of divider 1 is a nanosecond of guest time.

use super::clock::{Clock, ClockTimer};
use std::sync::{Mutex, MutexGuard};

/// Periodic timers re-arm no faster than this, so that a guest cannot keep the timer thread busy.
const MIN_PERIOD: u64 = 50_000;

/// Timer mode, bits 17 and 18 of the LVT entry; the reserved value counts as one-shot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mode {
    #[default]
    OneShot,
    Periodic,
    TscDeadline,
}

impl Mode {
    pub(super) fn from_lvt(lvt: u32) -> Self {
        match (lvt >> 17) & 3 {
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::OneShot,
        }
    }
}

/// The timer of one local APIC.
pub(super) struct ApicTimer {
    clock: Clock,
    timer: ClockTimer,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    mode: Mode,
    divider: u64,
    initial: u32,
    /// When counting down from `initial` began. After a load that can be before the clock's zero, hence wrapping.
    start: u64,
    /// When the next interrupt is due.
    due: Option<u64>,
    /// Guest TSC at which the TSC-deadline timer expires; 0 if disarmed.
    deadline: u64,
    tsc_offset: u64,
}

impl State {
    fn period(&self) -> u64 {
        u64::from(self.initial) * self.divider
    }

    /// Current count: what the counter shows at `now`.
    fn count(&self, now: u64) -> u32 {
        let period = self.period();
        let elapsed = now.wrapping_sub(self.start);
        if period == 0 || (self.mode != Mode::Periodic && elapsed >= period) {
            return 0;
        }
        // Less than the initial count, rounded up, so within 32 bits.
        (period - elapsed % period).div_ceil(self.divider) as u32
    }
}

/// Decodes the divide configuration register.
fn divider(dcr: u32) -> u64 {
    match (dcr & 3) | ((dcr >> 1) & 4) {
        7 => 1,
        n => 2 << n,
    }
}

impl ApicTimer {
    /// A stopped timer; `expired` is to call [`Self::expire`] and deliver the interrupt if that says so.
    pub(super) fn new(clock: &Clock, expired: impl Fn() + Send + Sync + 'static) -> Self {
        let state = State { divider: 2, ..State::default() };
        Self { clock: clock.clone(), timer: clock.timer(expired), state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Back to the state after reset. The TSC offset is the CPU's, and stays.
    pub(super) fn reset(&self) {
        let mut s = self.lock();
        *s = State { divider: 2, tsc_offset: s.tsc_offset, ..State::default() };
        self.timer.disarm();
    }

    /// Whether an interrupt is due now. Advances a periodic timer, stops others.
    pub(super) fn expire(&self) -> bool {
        let mut s = self.lock();
        let now = self.clock.now();
        let Some(due) = s.due else { return false };
        if due > now {
            self.timer.arm(due);
            return false;
        }
        s.due = None;
        match s.mode {
            Mode::Periodic => {
                let period = s.period().max(1);
                let next = now.saturating_add(period - now.wrapping_sub(s.start) % period);
                self.arm(&mut s, next.max(due.saturating_add(MIN_PERIOD)));
            }
            Mode::TscDeadline => s.deadline = 0,
            Mode::OneShot => {}
        }
        true
    }

    fn arm(&self, s: &mut State, at: u64) {
        s.due = Some(at);
        self.timer.arm(at);
    }

    fn stop(&self, s: &mut State) {
        s.due = None;
        self.timer.disarm();
    }

    /// The LVT entry's mode changed.
    pub(super) fn set_mode(&self, mode: Mode) {
        let mut s = self.lock();
        // A periodic count that becomes a one-shot one goes on from where it is.
        let elapsed = self.clock.now().wrapping_sub(s.start);
        if s.mode == Mode::Periodic && s.period() != 0 {
            s.start = s.start.wrapping_add(elapsed - elapsed % s.period());
        }
        let old = std::mem::replace(&mut s.mode, mode);
        if (old == Mode::TscDeadline) != (mode == Mode::TscDeadline) {
            (s.initial, s.deadline) = (0, 0);
            self.stop(&mut s);
        } else if old != mode && s.due.is_none() && s.initial != 0 {
            // A one-shot count that has run out starts over when it becomes periodic.
            self.begin(&mut s);
        }
    }

    /// Starts counting down from the initial count.
    fn begin(&self, s: &mut State) {
        s.start = self.clock.now();
        match s.period() {
            0 => self.stop(s),
            period => {
                let at = s.start.saturating_add(period);
                self.arm(s, at);
            }
        }
    }

    /// Writes the divide configuration register: the count goes on from where it is at the new rate.
    pub(super) fn set_divider(&self, dcr: u32) {
        let mut s = self.lock();
        let now = self.clock.now();
        let (old, new) = (s.divider, divider(dcr));
        if old == new {
            return;
        }
        let count = s.count(now);
        s.divider = new;
        if s.due.is_some() && s.mode != Mode::TscDeadline {
            let done = u64::from(s.initial - count.min(s.initial));
            s.start = now.wrapping_sub(done * new);
            self.arm(&mut s, now.saturating_add(u64::from(count) * new));
        }
    }

    /// Writes the initial count; 0 stops the timer. Ignored in TSC-deadline mode.
    pub(super) fn set_initial(&self, count: u32) {
        let mut s = self.lock();
        if s.mode == Mode::TscDeadline {
            return;
        }
        s.initial = count;
        self.begin(&mut s);
    }

    pub(super) fn initial(&self) -> u32 {
        self.lock().initial
    }

    pub(super) fn count(&self) -> u32 {
        let s = self.lock();
        if s.mode == Mode::TscDeadline { 0 } else { s.count(self.clock.now()) }
    }

    pub(super) fn deadline(&self) -> u64 {
        let s = self.lock();
        if s.mode == Mode::TscDeadline { s.deadline } else { 0 }
    }

    /// Writes IA32_TSC_DEADLINE. Returns whether the deadline has passed already, so that the caller delivers at
    /// once. Ignored in other modes.
    #[must_use]
    pub(super) fn set_deadline(&self, deadline: u64) -> bool {
        let mut s = self.lock();
        if s.mode != Mode::TscDeadline {
            return false;
        }
        s.deadline = deadline;
        self.aim(&mut s)
    }

    pub(super) fn set_tsc_offset(&self, offset: u64) -> bool {
        let mut s = self.lock();
        s.tsc_offset = offset;
        s.mode == Mode::TscDeadline && self.aim(&mut s)
    }

    /// Arms for the deadline; true, and the timer is disarmed, if that has passed.
    fn aim(&self, s: &mut State) -> bool {
        if s.deadline == 0 {
            self.stop(s);
            return false;
        }
        let guest = self.clock.tsc().wrapping_add(s.tsc_offset);
        let Some(ahead) = s.deadline.checked_sub(guest).filter(|t| *t > 0) else {
            s.deadline = 0;
            self.stop(s);
            return true;
        };
        let at = self.clock.now().saturating_add(self.clock.tsc_nanoseconds(ahead));
        self.arm(s, at);
        false
    }

    /// Restores the registers, counting on from `count`.
    pub(super) fn load(&self, mode: Mode, dcr: u32, initial: u32, count: u32) {
        let mut s = self.lock();
        *s = State { mode, divider: divider(dcr), tsc_offset: s.tsc_offset, ..State::default() };
        self.timer.disarm();
        if mode == Mode::TscDeadline {
            return;
        }
        let now = self.clock.now();
        let count = if mode == Mode::Periodic && count == 0 { initial } else { count.min(initial) };
        s.initial = initial;
        s.start = now.wrapping_sub(u64::from(initial - count) * s.divider);
        if count > 0 {
            let at = now.saturating_add(u64::from(count) * s.divider);
            self.arm(&mut s, at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, OnceLock, Weak};

    /// A timer that notes when it fires.
    struct Rig {
        clock: Clock,
        timer: Arc<ApicTimer>,
        fired: Arc<Mutex<Vec<u64>>>,
    }

    fn rig() -> Rig {
        let clock = Clock::manual();
        let fired = Arc::new(Mutex::new(Vec::new()));
        let own: Arc<OnceLock<Weak<ApicTimer>>> = Arc::default();
        let (c, f, o) = (clock.clone(), fired.clone(), own.clone());
        let timer = Arc::new(ApicTimer::new(&clock, move || {
            if o.get().unwrap().upgrade().unwrap().expire() {
                f.lock().unwrap().push(c.now());
            }
        }));
        own.set(Arc::downgrade(&timer)).unwrap();
        Rig { clock, timer, fired }
    }

    #[test]
    fn dividers() {
        let all: Vec<u64> = [0, 1, 2, 3, 8, 9, 10, 11].into_iter().map(divider).collect();
        assert_eq!(all, [2, 4, 8, 16, 32, 64, 128, 1]);
    }

    #[test]
    fn one_shot_counts_down_once() {
        let r = rig();
        r.timer.set_divider(3);
        r.timer.set_initial(1000);
        r.clock.advance(1600);
        assert_eq!(r.timer.count(), 900);
        // A new divider keeps the count and changes the rate.
        r.timer.set_divider(11);
        assert_eq!(r.timer.count(), 900);
        r.clock.advance(100_000);
        assert_eq!((r.timer.count(), r.timer.initial()), (0, 1000));
        assert_eq!(*r.fired.lock().unwrap(), [2500]);
    }

    #[test]
    fn periodic_keeps_its_beat_and_never_floods() {
        let r = rig();
        r.timer.set_mode(Mode::Periodic);
        r.timer.set_divider(11);
        r.timer.set_initial(1_000_000);
        r.clock.advance(3_500_000);
        assert_eq!(*r.fired.lock().unwrap(), [1_000_000, 2_000_000, 3_000_000]);
        assert_eq!(r.timer.count(), 500_000);
        r.timer.set_initial(1);
        r.clock.advance(1_000_000);
        assert!(r.fired.lock().unwrap().len() < 30);
        r.timer.set_initial(0);
        let n = r.fired.lock().unwrap().len();
        r.clock.advance(10_000_000);
        assert_eq!(r.fired.lock().unwrap().len(), n);
    }

    #[test]
    fn tsc_deadline() {
        let r = rig();
        assert!(!r.timer.set_deadline(5));
        assert_eq!(r.timer.deadline(), 0, "ignored in other modes");
        r.timer.set_mode(Mode::TscDeadline);
        r.clock.advance(100);
        assert!(!r.timer.set_tsc_offset(1000));
        assert!(r.timer.set_deadline(1100), "passed already");
        assert!(!r.timer.set_deadline(1500));
        assert_eq!(r.timer.deadline(), 1500);
        r.clock.advance(1000);
        assert_eq!(*r.fired.lock().unwrap(), [500]);
        assert_eq!(r.timer.deadline(), 0);
        assert!(!r.timer.set_deadline(9000));
        assert!(r.timer.set_tsc_offset(9000), "the TSC jumped past the deadline");
        assert!(!r.timer.set_deadline(u64::MAX));
        r.timer.set_mode(Mode::OneShot);
        assert_eq!(r.timer.deadline(), 0);
    }

    #[test]
    fn load_goes_on_counting() {
        let r = rig();
        r.clock.advance(77);
        r.timer.load(Mode::Periodic, 11, 1000, 400);
        assert_eq!(r.timer.count(), 400);
        r.clock.advance(400);
        assert_eq!(*r.fired.lock().unwrap(), [477]);
        r.timer.load(Mode::OneShot, 11, 1000, 0);
        assert_eq!((r.timer.count(), r.timer.initial()), (0, 1000));
        r.clock.advance(5000);
        assert_eq!(r.fired.lock().unwrap().len(), 1);
    }
}
