//! Exit counters.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a vCPU came back from the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) enum Counter {
    PortIn,
    PortOut,
    MmioRead,
    MmioWrite,
    Signal,
    Other,
}

const NAMES: [&str; 6] = [
    "kvm.exits.port-in",
    "kvm.exits.port-out",
    "kvm.exits.mmio-read",
    "kvm.exits.mmio-write",
    "kvm.exits.signal",
    "kvm.exits.other",
];

/// Counters of one vCPU, written by its thread alone.
#[derive(Debug, Default)]
pub(super) struct Counters([AtomicU64; NAMES.len()]);

impl Counters {
    #[inline]
    pub(super) fn count(&self, what: Counter) {
        // One writer: no locked instruction is needed.
        let counter = &self.0[what as usize];
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }
}

/// Sums by name, and their total.
pub(super) fn sum<'a>(vcpus: impl Iterator<Item = &'a Counters>) -> Vec<(String, u64)> {
    let mut sums = [0u64; NAMES.len()];
    for vcpu in vcpus {
        for (sum, counter) in sums.iter_mut().zip(&vcpu.0) {
            *sum = sum.wrapping_add(counter.load(Ordering::Relaxed));
        }
    }
    let total = sums.iter().fold(0, |a: u64, b| a.wrapping_add(*b));
    let mut out = vec![("kvm.exits".to_owned(), total)];
    out.extend(NAMES.iter().zip(sums).map(|(name, n)| ((*name).to_owned(), n)));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_over_vcpus() {
        let (a, b) = (Counters::default(), Counters::default());
        a.count(Counter::PortOut);
        b.count(Counter::PortOut);
        b.count(Counter::Other);
        let sums = sum([&a, &b].into_iter());
        assert_eq!(sums[0], ("kvm.exits".into(), 3));
        assert!(sums.contains(&("kvm.exits.port-out".into(), 2)));
        assert!(sums.contains(&("kvm.exits.other".into(), 1)));
        assert!(sums.contains(&("kvm.exits.mmio-read".into(), 0)));
    }
}
