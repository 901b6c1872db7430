//! The VM's clock: where the paravirtual clock starts, and that the vCPUs' time-stamp counters stay together.

use accel::{Error, Result};
use serde::{Deserialize, Serialize};
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Counters whose values are that close are meant to run together. Saving and loading takes as long as a busy host
/// makes it, so this is generous.
const TOGETHER: Duration = Duration::from_secs(60);

/// Clock of a VM.
#[derive(Debug)]
pub struct Clock {
    inner: Mutex<Inner>,
}

#[derive(Clone, Debug)]
struct Inner {
    /// Host TSC at zero of the paravirtual clock: when the VM was made.
    zero: u64,
    /// Time of day then.
    time: SystemTime,
    /// The counters that were last loaded together.
    group: Option<Group>,
    /// The clock was restored, and with it counters that have nothing to do with those so far.
    restored: bool,
}

/// Counters that run together.
#[derive(Clone, Debug)]
struct Group {
    /// Value of the first.
    value: u64,
    /// Guest TSC minus host TSC.
    offset: u64,
    /// Their vCPUs.
    members: Vec<u32>,
}

/// Whether two counter values, or offsets, are close.
fn near(a: u64, b: u64) -> bool {
    (a.wrapping_sub(b) as i64).unsigned_abs() < base::tsc::ticks(TOGETHER)
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
        let inner = Inner { zero: base::tsc::now(), time: SystemTime::now(), group: None, restored: false };
        Self { inner: Mutex::new(inner) }
    }
}

impl Clock {
    fn get(&self) -> Inner {
        self.inner.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Host TSC at zero of the paravirtual clock.
    pub fn zero(&self) -> u64 {
        self.get().zero
    }

    /// Time of day at zero of the paravirtual clock.
    pub fn zero_time(&self) -> SystemTime {
        self.get().time
    }

    /// The offset (guest TSC minus host TSC) for the counter of vCPU `index`, which is `current` so far and is loaded with
    /// `value` now.
    ///
    /// The counters of several vCPUs are saved and loaded one after the other, but ran together, and must go on together:
    /// guests read the time of one with the clock of another. So a counter that is loaded with about what it holds
    /// (registers were set, with all the rest) goes on as it was, and one that is loaded after another of about the same
    /// value gets that one's offset.
    pub fn settle(&self, index: u32, value: u64, current: u64) -> u64 {
        let now = base::tsc::now();
        let mut inner = self.inner.lock().unwrap_or_else(|e| e.into_inner());
        let again = inner.group.as_ref().is_some_and(|group| group.members.contains(&index));
        if again {
            inner.restored = false;
        }
        if !inner.restored && near(value, now.wrapping_add(current)) {
            return current;
        }
        match &mut inner.group {
            Some(group) if !again && near(value, group.value) => {
                group.members.push(index);
                group.offset
            }
            group => {
                let offset = value.wrapping_sub(now);
                *group = Some(Group { value, offset, members: vec![index] });
                offset
            }
        }
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
        (inner.group, inner.restored) = (None, true);
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
        assert!(
            b.zero_time().duration_since(a.zero_time()).unwrap_or_else(|e| e.duration())
                < Duration::from_secs(1)
        );
        assert!(b.load(b"{}").is_err());
        assert!(b.load(br#"{"version":2,"elapsed":0,"time":0}"#).is_err());
    }

    #[test]
    fn counters_that_ran_together_stay_together() {
        let seconds = |n| base::tsc::ticks(Duration::from_secs(n));
        let c = Clock::default();
        let birth = c.zero().wrapping_neg();
        // The first vCPU gets its registers, seconds after its state was asked for: its counter stays with the others.
        assert_eq!(c.settle(0, seconds(1), birth), birth);
        // A reset, hours later: both start anew, together.
        let old = birth.wrapping_add(seconds(7200));
        let first = c.settle(0, 1000, old);
        assert!(near(first, base::tsc::now().wrapping_neg()));
        assert_eq!(c.settle(1, seconds(5), old), first);
        // Other values are another thing.
        assert_ne!(c.settle(2, seconds(100_000), old), first);
        // A restored machine's counters go back, even by little.
        let rest = c.save();
        c.load(&rest).unwrap();
        let current = seconds(20).wrapping_sub(base::tsc::now());
        let back = c.settle(0, seconds(10), current);
        assert_ne!(back, current);
        assert_eq!(c.settle(1, seconds(10) + 7, current), back);
        // After that, registers may be set again.
        assert_eq!(c.settle(0, seconds(11), back), back);
    }
}
