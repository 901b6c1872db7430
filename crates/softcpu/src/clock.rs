//! The VM's clock: where the paravirtual clock starts, and that the vCPUs' time-stamp counters stay together.

use accel::{Error, Result};
use serde::{Deserialize, Serialize};
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Counters loaded within this time of each other are meant to run together.
const TOGETHER: Duration = Duration::from_secs(1);

/// Clock of a VM.
#[derive(Debug)]
pub struct Clock {
    inner: Mutex<Inner>,
}

#[derive(Clone, Copy, Debug)]
struct Inner {
    /// Host TSC at zero of the paravirtual clock: when the VM was made.
    zero: u64,
    /// Time of day then.
    time: SystemTime,
    /// The counter loaded last: host TSC then, value, and the offset that it got.
    loaded: Option<(u64, u64, u64)>,
}

/// A clock at rest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    version: u32,
    /// Nanoseconds since zero.
    elapsed: u64,
    /// Time of day at zero, in nanoseconds since 1970.
    time: u64,
}

impl Default for Clock {
    fn default() -> Self {
        let inner = Inner { zero: base::tsc::now(), time: SystemTime::now(), loaded: None };
        Self { inner: Mutex::new(inner) }
    }
}

impl Clock {
    fn get(&self) -> Inner {
        *self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Host TSC at zero of the paravirtual clock.
    pub fn zero(&self) -> u64 {
        self.get().zero
    }

    /// Time of day at zero of the paravirtual clock.
    pub fn zero_time(&self) -> SystemTime {
        self.get().time
    }

    /// The offset (guest TSC minus host TSC) for a counter that is loaded with `value` now. The counters of several
    /// vCPUs are saved and loaded one after the other, but ran together; those that differ by no more than the time
    /// this takes get the same offset.
    pub fn settle(&self, value: u64) -> u64 {
        let now = base::tsc::now();
        let mut inner = self.inner.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((then, held, offset)) = inner.loaded {
            let near = base::tsc::ticks(TOGETHER);
            if now.wrapping_sub(then) < near && value.abs_diff(held) < near {
                return offset;
            }
        }
        let offset = value.wrapping_sub(now);
        inner.loaded = Some((now, value, offset));
        offset
    }

    /// The clock as bytes.
    pub fn save(&self) -> Vec<u8> {
        let inner = self.get();
        let elapsed = base::tsc::duration(base::tsc::now().wrapping_sub(inner.zero)).as_nanos() as u64;
        let time = inner.time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        serde_json::to_vec(&Saved { version: 1, elapsed, time }).unwrap_or_default()
    }

    /// Goes on from a saved clock. To be loaded before the vCPUs.
    ///
    /// # Errors
    /// The bytes are not a saved clock.
    pub fn load(&self, bytes: &[u8]) -> Result<()> {
        let saved: Saved = serde_json::from_slice(bytes)
            .map_err(|e| Error::BadState(format!("the software CPU's clock: {e}")))?;
        if saved.version != 1 {
            return Err(Error::BadState(format!(
                "the software CPU's clock has version {}; 1 is known",
                saved.version
            )));
        }
        let ticks = base::tsc::ticks(Duration::from_nanos(saved.elapsed));
        let mut inner = self.inner.lock().unwrap_or_else(|e| e.into_inner());
        inner.zero = base::tsc::now().wrapping_sub(ticks);
        inner.time = UNIX_EPOCH + Duration::from_nanos(saved.time);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_goes_on_where_it_was() {
        let a = Clock::default();
        a.inner.lock().unwrap().zero =
            base::tsc::now().wrapping_sub(base::tsc::ticks(Duration::from_secs(500)));
        let b = Clock::default();
        b.load(&a.save()).unwrap();
        let elapsed = base::tsc::duration(base::tsc::now().wrapping_sub(b.zero()));
        assert!(elapsed >= Duration::from_secs(499) && elapsed < Duration::from_secs(600), "{elapsed:?}");
        assert!(b.zero_time().duration_since(a.zero_time()).unwrap_or_else(|e| e.duration()) < TOGETHER);
        assert!(b.load(b"{}").is_err());
        assert!(b.load(br#"{"version":2,"elapsed":0,"time":0}"#).is_err());
    }

    #[test]
    fn counters_that_ran_together_stay_together() {
        let c = Clock::default();
        let first = c.settle(1 << 40);
        assert_eq!(c.settle((1 << 40) + 5000), first);
        assert_ne!(c.settle(1 << 50), first);
    }
}
