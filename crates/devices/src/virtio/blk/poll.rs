//! When to watch the queues for a while before sleeping.
//!
//! A driver that has its answer often asks again at once. Whoever still looks then saves the guest's notification (an exit),
//! the wake-up, and the way there; whoever looks in vain wastes a processor. So the time grows while sleeps turn out to be
//! short, and goes back to nothing when they are long.

use std::time::{Duration, Instant};

/// Longest time to poll by default; none on a host with one processor, where the guest would have to wait.
pub(super) fn default() -> Duration {
    let several = std::thread::available_parallelism().is_ok_and(|n| n.get() > 1);
    if several { Duration::from_nanos(32_768) } else { Duration::ZERO }
}

/// The first step up.
const FIRST: Duration = Duration::from_nanos(4096);
/// Looks between two looks at the clock.
const LOOKS: u32 = 16;

/// How long to poll now.
#[derive(Debug)]
pub(super) struct Poll {
    most: Duration,
    now: Duration,
}

impl Poll {
    pub(super) fn new(most: Duration) -> Self {
        Self { most, now: Duration::ZERO }
    }

    /// Looks until `there` or the time is over. Returns whether it was there.
    pub(super) fn run(&self, mut there: impl FnMut() -> bool) -> bool {
        if self.now.is_zero() {
            return false;
        }
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if there() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= self.now {
                return false;
            }
        }
    }

    /// Learns from a sleep that ended with a notification.
    pub(super) fn slept(&mut self, time: Duration) {
        if time > self.most {
            self.now = Duration::ZERO;
        } else if time > self.now {
            self.now = (self.now * 2).max(FIRST).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_grows_with_short_sleeps_and_ends_with_long_ones() {
        let mut poll = Poll::new(Duration::from_micros(32));
        assert!(!poll.run(|| true), "nothing is learnt yet");
        for _ in 0..5 {
            poll.slept(Duration::from_micros(20));
        }
        assert_eq!(poll.now, Duration::from_micros(32));
        assert!(poll.run(|| true) && !poll.run(|| false));
        poll.slept(Duration::from_millis(1));
        assert!(poll.now.is_zero());
        let mut never = Poll::new(Duration::ZERO);
        never.slept(Duration::from_nanos(1));
        assert!(never.now.is_zero());
    }
}
