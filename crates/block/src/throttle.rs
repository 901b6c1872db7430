//! Limits on requests and bytes per second, with bursts; several images may share one.

use crate::{Error, Options, Result};
use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

/// A limit on a quantity per second.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Rate {
    /// Per second, in the long run; 0 is no limit.
    pub average: u64,
    /// Per second during a burst; 0: as much as a tenth of a second's average at once.
    pub burst: u64,
    /// Seconds a burst may last.
    pub burst_seconds: u64,
}

/// Limits of an image or of a group. The names are QEMU's: `bps-total`, `iops-read`, ...
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Limits {
    /// Bytes: total, read, written.
    pub bytes: [Rate; 3],
    /// Requests: total, read, written.
    pub requests: [Rate; 3],
    /// A request counts as one for each so many bytes of it; 0: as one.
    pub request_size: u64,
}

const KINDS: [&str; 3] = ["total", "read", "write"];

impl Limits {
    /// Takes QEMU's throttling options (`throttling.bps-total`, `throttling.iops-read-max`, ..., with or without the
    /// prefix) out of a list.
    pub fn take(options: &mut Options) -> Result<Self> {
        let mut prefixed = options.take_prefixed("throttling.");
        let mut number = |key: String| -> Result<u64> {
            match prefixed.take_size(&key)? {
                Some(n) => Ok(n),
                None => Ok(options.take_size(&key)?.unwrap_or(0)),
            }
        };
        let mut limits = Limits::default();
        for (i, kind) in KINDS.iter().enumerate() {
            for (unit, rates) in [("bps", &mut limits.bytes), ("iops", &mut limits.requests)] {
                let name = format!("{unit}-{kind}");
                rates[i] = Rate {
                    average: number(name.clone())?,
                    burst: number(format!("{name}-max"))?,
                    burst_seconds: number(format!("{name}-max-length"))?.max(1),
                };
                if rates[i].burst > 0 && rates[i].burst < rates[i].average {
                    return Err(Error::usage(format!("{name}-max cannot be lower than {name}")));
                }
            }
        }
        limits.request_size = number("iops-size".into())?;
        for rates in [&limits.bytes, &limits.requests] {
            if rates[0].average > 0 && (rates[1].average > 0 || rates[2].average > 0) {
                return Err(Error::usage(
                    "A total limit and a read or write limit cannot be used at the same time",
                ));
            }
        }
        prefixed.finish("throttling")?;
        Ok(limits)
    }

    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.bytes.iter().chain(&self.requests).all(|r| r.average == 0)
    }
}

/// Buckets that leak: `level` fills with what is done and drains at the average rate; `burst` drains at the burst rate.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    level: f64,
    burst: f64,
}

#[derive(Debug)]
struct State {
    buckets: [[Bucket; 3]; 2],
    at: Instant,
}

/// A throttle; share it between images to make a group.
#[derive(Debug)]
pub struct Throttle {
    limits: Limits,
    state: Mutex<State>,
}

impl Throttle {
    /// A throttle with empty buckets.
    pub fn new(limits: Limits) -> Self {
        Throttle { limits, state: Mutex::new(State { buckets: Default::default(), at: Instant::now() }) }
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Books a request that happens at `now`; the result is how long to wait before carrying it out.
    pub fn book(&self, write: bool, bytes: u64, now: Instant) -> Duration {
        let requests = match self.limits.request_size {
            0 => 1,
            size => bytes.div_ceil(size).max(1),
        };
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let passed = now.saturating_duration_since(state.at).as_secs_f64();
        state.at = state.at.max(now);
        let mut wait = 0f64;
        let rows = [(self.limits.bytes, bytes as f64), (self.limits.requests, requests as f64)];
        for (row, (rates, amount)) in rows.into_iter().enumerate() {
            for (column, rate) in rates.iter().enumerate() {
                if rate.average == 0 {
                    continue;
                }
                let bucket = &mut state.buckets[row][column];
                let average = rate.average as f64;
                bucket.level = (bucket.level - passed * average).max(0.0);
                bucket.burst = (bucket.burst - passed * rate.burst as f64).max(0.0);
                if column != 0 && (column == 2) != write {
                    continue;
                }
                // What the buckets hold without anyone waiting.
                let room = match rate.burst {
                    0 => average / 10.0,
                    burst => burst as f64 * rate.burst_seconds as f64,
                };
                wait = wait.max((bucket.level - room) / average);
                if rate.burst > 0 {
                    wait = wait.max((bucket.burst - rate.burst as f64 / 10.0) / rate.burst as f64);
                }
                bucket.level += amount;
                bucket.burst += amount;
            }
        }
        Duration::from_secs_f64(wait.clamp(0.0, 3600.0))
    }

    /// Books a request and waits until it may be carried out.
    pub fn wait(&self, write: bool, bytes: u64) {
        let pause = self.book(write, bytes, Instant::now());
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Time after which `count` requests made one after the other are through, by the throttle's own word.
    fn duration(throttle: &Throttle, write: bool, bytes: u64, count: u32) -> f64 {
        let start = Instant::now();
        let mut now = start;
        for _ in 0..count {
            now += throttle.book(write, bytes, now);
        }
        (now - start).as_secs_f64()
    }

    #[test]
    fn the_average_holds_in_the_long_run() {
        let limits = Limits::take(&mut Options::parse("iops-total=100").unwrap()).unwrap();
        let took = duration(&Throttle::new(limits), false, 4096, 1000);
        assert!((9.5..10.1).contains(&took), "{took}");
        let limits = Limits::take(&mut Options::parse("throttling.bps-write=1M").unwrap()).unwrap();
        let throttle = Throttle::new(limits);
        let took = duration(&throttle, true, 65536, 160);
        assert!((9.5..10.1).contains(&took), "{took}");
        assert!(duration(&throttle, false, 65536, 1000) < 0.001);
    }

    #[test]
    fn bursts_are_allowed_for_their_length() {
        let limits = Limits::take(
            &mut Options::parse("iops-total=100,iops-total-max=1000,iops-total-max-length=2").unwrap(),
        )
        .unwrap();
        let took = duration(&Throttle::new(limits), false, 512, 2000);
        assert!((1.7..2.3).contains(&took), "{took}");
    }

    #[test]
    fn large_requests_count_as_several() {
        let limits = Limits::take(&mut Options::parse("iops-total=10,iops-size=4096").unwrap()).unwrap();
        let took = duration(&Throttle::new(limits), false, 40960, 11);
        assert!((9.0..11.0).contains(&took), "{took}");
    }

    #[test]
    fn contradictions_are_refused() {
        for bad in ["bps-total=1,bps-read=1", "iops-total=10,iops-total-max=5", "throttling.nonsense=1"] {
            assert!(Limits::take(&mut Options::parse(bad).unwrap()).is_err(), "{bad}");
        }
    }
}
