//! Running a program and learning what it took.

#![allow(unsafe_code)] // wait4(2), which tells a single child's usage, has no safe wrapper among the dependencies

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// What programs took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// From start to end.
    pub wall: Duration,
    /// Processor time, in user and kernel mode.
    pub cpu: Duration,
    /// Most memory resident at a time, in KiB.
    pub peak_kib: u64,
}

impl Usage {
    /// What any run is better than.
    pub const WORST: Usage = Usage { wall: Duration::MAX, cpu: Duration::MAX, peak_kib: u64::MAX };

    /// Adds a run that came after the others.
    pub fn add(&mut self, other: &Usage) {
        self.wall += other.wall;
        self.cpu += other.cpu;
        self.peak_kib = self.peak_kib.max(other.peak_kib);
    }

    /// Keeps the better of each.
    pub fn keep_best(&mut self, other: &Usage) {
        self.wall = self.wall.min(other.wall);
        self.cpu = self.cpu.min(other.cpu);
        self.peak_kib = self.peak_kib.min(other.peak_kib);
    }
}

/// Runs a program to its end, which must be a good one.
pub fn run_measured(command: &mut Command) -> Result<Usage> {
    let started = Instant::now();
    let child = command.spawn().with_context(|| format!("{command:?}"))?;
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: both pointers are valid for the call; the child is ours, and nobody else waits for it.
    let waited = unsafe { libc::wait4(child.id().cast_signed(), &mut status, 0, usage.as_mut_ptr()) };
    let wall = started.elapsed();
    ensure!(waited > 0, "wait4: {}", std::io::Error::last_os_error());
    ensure!(status == 0, "{command:?} failed (status {status:#x})");
    // SAFETY: all zeros is a valid value, and the call has filled it in.
    let usage = unsafe { usage.assume_init() };
    let time =
        |t: libc::timeval| Duration::from_secs(t.tv_sec as u64) + Duration::from_micros(t.tv_usec as u64);
    Ok(Usage { wall, cpu: time(usage.ru_utime) + time(usage.ru_stime), peak_kib: usage.ru_maxrss as u64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_takes_time_and_memory() {
        let usage = run_measured(Command::new("sh").args(["-c", ":"])).unwrap();
        assert!(usage.wall > Duration::ZERO && usage.peak_kib > 100, "{usage:?}");
        assert!(run_measured(Command::new("sh").args(["-c", "exit 3"])).is_err());
    }
}
