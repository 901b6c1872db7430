//! What other threads tell a software vCPU: interrupts, INIT, SIPI, NMI, kicks.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Instant;

bitflags::bitflags! {
    /// Signals pending for a vCPU.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Signal: u32 {
        /// The local APIC (or PIC) may have an interrupt: ask it.
        const INTERRUPT = 1 << 0;
        /// Non-maskable interrupt.
        const NMI = 1 << 1;
        /// INIT.
        const INIT = 1 << 2;
        /// Start-up IPI; its vector is [`CpuSignals::sipi_vector`].
        const SIPI = 1 << 3;
        /// System management interrupt.
        const SMI = 1 << 4;
        /// Somebody wants the vCPU to leave [`crate::Vcpu::run`].
        const KICK = 1 << 5;
        /// The CPU's own business with its siblings: drop cached translations or code.
        const FLUSH = 1 << 6;
    }
}

/// Mailbox of one software vCPU. Senders [`raise`](Self::raise); the vCPU polls [`pending`](Self::pending) (one
/// relaxed load) and sleeps in [`wait`](Self::wait) when halted.
#[derive(Debug, Default)]
pub struct CpuSignals {
    bits: AtomicU32,
    sipi: AtomicU8,
    sleeping: Mutex<bool>,
    wake: Condvar,
}

impl CpuSignals {
    /// An empty mailbox.
    pub fn new() -> Self {
        Self::default()
    }

    /// Address of the pending word, for code that polls it without calling.
    pub fn word(&self) -> &AtomicU32 {
        &self.bits
    }

    /// Raises signals and wakes the vCPU if it sleeps.
    pub fn raise(&self, signal: Signal) {
        let old = self.bits.fetch_or(signal.bits(), Ordering::SeqCst);
        if old & signal.bits() != signal.bits() {
            // Taking the lock orders this with a vCPU about to sleep: it either sees the bit or the wake-up.
            if *self.sleeping.lock().unwrap_or_else(|e| e.into_inner()) {
                self.wake.notify_one();
            }
        }
    }

    /// Raises a start-up IPI with its vector.
    pub fn raise_sipi(&self, vector: u8) {
        self.sipi.store(vector, Ordering::SeqCst);
        self.raise(Signal::SIPI);
    }

    /// Vector of the last start-up IPI: execution starts at `vector << 12`.
    pub fn sipi_vector(&self) -> u8 {
        self.sipi.load(Ordering::SeqCst)
    }

    /// What is pending.
    #[inline(always)]
    pub fn pending(&self) -> Signal {
        Signal::from_bits_retain(self.bits.load(Ordering::Relaxed))
    }

    /// Takes the given signals: clears them and returns which were set.
    pub fn take(&self, which: Signal) -> Signal {
        Signal::from_bits_retain(self.bits.fetch_and(!which.bits(), Ordering::SeqCst)) & which
    }

    /// Sleeps until any of `until` is pending or the deadline passes.
    pub fn wait(&self, until: Signal, deadline: Option<Instant>) {
        let mut sleeping = self.sleeping.lock().unwrap_or_else(|e| e.into_inner());
        *sleeping = true;
        while self.bits.load(Ordering::SeqCst) & until.bits() == 0 {
            match deadline {
                None => sleeping = self.wake.wait(sleeping).unwrap_or_else(|e| e.into_inner()),
                Some(t) => {
                    let now = Instant::now();
                    if now >= t {
                        break;
                    }
                    sleeping = self.wake.wait_timeout(sleeping, t - now).unwrap_or_else(|e| e.into_inner()).0;
                }
            }
        }
        *sleeping = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn wakes_and_takes() {
        let s = Arc::new(CpuSignals::new());
        let t = s.clone();
        let thread = std::thread::spawn(move || {
            t.wait(Signal::SIPI, None);
            (t.take(Signal::all()), t.sipi_vector())
        });
        s.raise(Signal::NMI);
        s.raise_sipi(0x9a);
        assert_eq!(thread.join().unwrap(), (Signal::NMI | Signal::SIPI, 0x9a));
        assert_eq!(s.pending(), Signal::empty());
    }
}
