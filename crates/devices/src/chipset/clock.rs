//! The guest's passing time, which stops while the guest is paused, and timers that expire by it.

use base::{Timer, Timers, tsc};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock, Weak};
use std::time::{Duration, Instant};

/// Nanoseconds of guest time. Clones are the same clock.
///
/// A clock starts stopped, at zero. While it is stopped no [`ClockTimer`] expires, so devices that time themselves by
/// it need nothing of their own to pause and resume.
#[derive(Clone)]
pub struct Clock(Arc<Inner>);

struct Inner {
    /// `None` for a clock that moves only when told.
    service: Option<Timers>,
    time: RwLock<Time>,
    timers: Mutex<Vec<Weak<TimerInner>>>,
    /// Held while a callback runs, so that [`Clock::stop`] returns when none does any more.
    callback: Mutex<()>,
}

#[derive(Clone, Copy)]
struct Time {
    /// Guest time at `since`, or now if stopped.
    value: u64,
    since: Option<Instant>,
}

struct TimerInner {
    clock: Weak<Inner>,
    state: Mutex<TimerState>,
    host: OnceLock<Timer>,
    callback: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct TimerState {
    /// When the callback is due.
    due: Option<u64>,
    /// When the host timer will call, which may be earlier: a later deadline leaves it alone.
    armed: Option<u64>,
}

/// A timer on a [`Clock`]; forgotten on drop.
pub struct ClockTimer(Arc<TimerInner>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Clock {
    /// A stopped clock at zero, whose timers run on `timers`.
    pub fn new(timers: &Timers) -> Self {
        Self::with(Some(timers.clone()))
    }

    /// A clock that moves only by [`Self::advance`], for tests of what depends on time.
    pub fn manual() -> Self {
        Self::with(None)
    }

    fn with(service: Option<Timers>) -> Self {
        Self(Arc::new(Inner {
            service,
            time: RwLock::new(Time { value: 0, since: None }),
            timers: Mutex::default(),
            callback: Mutex::default(),
        }))
    }

    fn time(&self) -> Time {
        *self.0.time.read().unwrap_or_else(|e| e.into_inner())
    }

    fn change(&self, f: impl FnOnce(&mut Time)) {
        f(&mut self.0.time.write().unwrap_or_else(|e| e.into_inner()));
    }

    /// Guest time in nanoseconds.
    pub fn now(&self) -> u64 {
        let time = self.time();
        match time.since {
            Some(since) => time.value.saturating_add(nanos(since.elapsed())),
            None => time.value,
        }
    }

    /// Starts the clock, and the timers that are armed.
    pub fn start(&self) {
        if self.0.service.is_none() {
            return;
        }
        self.change(|t| t.since = t.since.or_else(|| Some(Instant::now())));
        for timer in self.timers() {
            timer.rearm(self);
        }
    }

    /// Stops the clock. On return no timer's callback runs; it must not be called from one, nor while holding a lock
    /// that one takes.
    pub fn stop(&self) {
        let _quiet = lock(&self.0.callback);
        let now = self.now();
        self.change(|t| *t = Time { value: now, since: None });
        // What the host timers were armed for says nothing about the time after a pause.
        for timer in self.timers() {
            lock(&timer.state).armed = None;
        }
    }

    /// Sets the time of a stopped clock (when a saved machine is loaded).
    pub fn set(&self, nanoseconds: u64) {
        self.change(|t| t.value = nanoseconds);
    }

    /// Moves a manual clock on, calling the timers that expire on the way in order.
    pub fn advance(&self, nanoseconds: u64) {
        let end = self.now().saturating_add(nanoseconds);
        loop {
            let timers = self.timers();
            let due = |t: &Arc<TimerInner>| lock(&t.state).due;
            let next = timers.iter().filter_map(|t| due(t).filter(|d| *d <= end).map(|d| (d, t)));
            let Some((at, timer)) = next.min_by_key(|(d, _)| *d) else { break };
            self.set(at.max(self.now()));
            lock(&timer.state).due = None;
            (timer.callback)();
        }
        self.set(end);
    }

    /// A disarmed timer that runs `callback` each time it expires. Callbacks must be short and must not block.
    pub fn timer(&self, callback: impl Fn() + Send + Sync + 'static) -> ClockTimer {
        let inner = Arc::new(TimerInner {
            clock: Arc::downgrade(&self.0),
            state: Mutex::default(),
            host: OnceLock::new(),
            callback: Box::new(callback),
        });
        if let Some(service) = &self.0.service {
            let weak = Arc::downgrade(&inner);
            let host = service.timer(move || {
                if let Some(timer) = weak.upgrade() {
                    timer.expired();
                }
            });
            let _ = inner.host.set(host); // just created, so it is empty
        }
        let mut timers = lock(&self.0.timers);
        timers.retain(|t| t.strong_count() > 0);
        timers.push(Arc::downgrade(&inner));
        ClockTimer(inner)
    }

    /// Time-stamp counter of the host; of a manual clock its time (1 GHz).
    pub fn tsc(&self) -> u64 {
        if self.0.service.is_some() { tsc::now() } else { self.now() }
    }

    /// Nanoseconds that so many ticks of [`Self::tsc`] take, rounded up.
    pub fn tsc_nanoseconds(&self, ticks: u64) -> u64 {
        if self.0.service.is_some() { nanos(tsc::duration(ticks)).saturating_add(1) } else { ticks }
    }

    fn timers(&self) -> Vec<Arc<TimerInner>> {
        lock(&self.0.timers).iter().filter_map(Weak::upgrade).collect()
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Clock({} ns)", self.now())
    }
}

impl ClockTimer {
    /// Arms the timer for a guest time in nanoseconds, replacing an earlier deadline.
    pub fn arm(&self, at: u64) {
        lock(&self.0.state).due = Some(at);
        if let Some(clock) = self.0.clock.upgrade() {
            self.0.rearm(&Clock(clock));
        }
    }

    /// Disarms the timer. A callback already under way finishes.
    pub fn disarm(&self) {
        lock(&self.0.state).due = None;
    }

    /// When it is due.
    pub fn due(&self) -> Option<u64> {
        lock(&self.0.state).due
    }
}

impl std::fmt::Debug for ClockTimer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ClockTimer({:?})", self.due())
    }
}

impl TimerInner {
    /// Sees to it that the host timer calls no later than the deadline.
    ///
    /// Guests move deadlines often, mostly to later. Letting the host timer fire early and look again costs less than
    /// moving it each time, which would wake the timer thread.
    fn rearm(&self, clock: &Clock) {
        let Some(host) = self.host.get() else { return };
        let time = clock.time();
        let Some(since) = time.since else { return };
        let mut state = lock(&self.state);
        let Some(due) = state.due else { return };
        if state.armed.is_some_and(|armed| armed <= due) {
            return;
        }
        // A deadline beyond what an Instant can express (centuries) never comes.
        let Some(at) = since.checked_add(Duration::from_nanos(due.saturating_sub(time.value))) else {
            return;
        };
        state.armed = Some(due);
        host.arm(at);
    }

    fn expired(&self) {
        let Some(clock) = self.clock.upgrade().map(Clock) else { return };
        let quiet = lock(&clock.0.callback);
        let run = {
            let mut state = lock(&self.state);
            state.armed = None;
            let now = clock.now();
            match state.due {
                Some(due) if due <= now && clock.time().since.is_some() => {
                    state.due = None;
                    true
                }
                _ => false,
            }
        };
        if run {
            (self.callback)();
        }
        drop(quiet);
        self.rearm(&clock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_stopped_clock_expires_nothing() {
        let clock = Clock::new(&Timers::new());
        let (tx, rx) = mpsc::channel();
        let timer = clock.timer(move || tx.send(()).unwrap());
        timer.arm(1000);
        clock.start();
        rx.recv().unwrap();
        assert!(clock.now() >= 1000);
        clock.stop();
        let now = clock.now();
        timer.arm(now);
        std::thread::sleep(Duration::from_millis(2));
        assert!(rx.try_recv().is_err());
        assert_eq!(clock.now(), now);
        clock.start();
        rx.recv().unwrap();
    }

    #[test]
    fn deadlines_move_both_ways() {
        let clock = Clock::new(&Timers::new());
        clock.start();
        let (tx, rx) = mpsc::channel();
        let c = clock.clone();
        let timer = clock.timer(move || tx.send(c.now()).unwrap());
        let now = clock.now();
        timer.arm(now + 2_000_000);
        timer.arm(now + 8_000_000);
        assert!(rx.recv().unwrap() >= now + 8_000_000);
        timer.arm(clock.now() + 3_600_000_000_000);
        timer.arm(clock.now());
        rx.recv().unwrap();
        timer.arm(u64::MAX);
        timer.disarm();
        assert_eq!(timer.due(), None);
    }

    #[test]
    fn manual_clock_runs_timers_in_order() {
        let clock = Clock::manual();
        let (tx, rx) = mpsc::channel();
        let make = |name: u32| {
            let (tx, clock) = (tx.clone(), clock.clone());
            clock.clone().timer(move || tx.send((name, clock.now())).unwrap())
        };
        let (a, b) = (make(1), make(2));
        a.arm(50);
        b.arm(20);
        clock.advance(40);
        assert_eq!((rx.try_iter().collect::<Vec<_>>(), clock.now()), (vec![(2, 20)], 40));
        clock.advance(100);
        assert_eq!((rx.try_iter().collect::<Vec<_>>(), clock.now()), (vec![(1, 50)], 140));
    }
}
