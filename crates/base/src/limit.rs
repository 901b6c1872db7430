//! Logs that a hostile guest cannot flood.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lets through `burst` events, then one more each `interval`; counts what it holds back.
#[derive(Debug)]
pub struct RateLimit {
    interval: Duration,
    burst: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    tokens: u32,
    refilled: Instant,
    suppressed: u64,
}

impl RateLimit {
    /// A limit with a full burst.
    pub fn new(burst: u32, interval: Duration) -> Self {
        Self {
            interval,
            burst,
            state: Mutex::new(State { tokens: burst, refilled: Instant::now(), suppressed: 0 }),
        }
    }

    /// `Some(number suppressed since the last)` if this event may be logged.
    pub fn allow(&self) -> Option<u64> {
        let mut s = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let now = Instant::now();
        let gained = (now - s.refilled).as_nanos() / self.interval.as_nanos().max(1);
        if gained > 0 {
            s.tokens = s.tokens.saturating_add(gained.min(u32::MAX as u128) as u32).min(self.burst);
            s.refilled = now;
        }
        if s.tokens == 0 {
            s.suppressed += 1;
            return None;
        }
        s.tokens -= 1;
        Some(std::mem::take(&mut s.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_back_after_the_burst() {
        let l = RateLimit::new(2, Duration::from_secs(3600));
        assert_eq!((l.allow(), l.allow(), l.allow()), (Some(0), Some(0), None));
    }
}
