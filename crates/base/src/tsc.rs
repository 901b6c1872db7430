//! The host's time-stamp counter.
#![allow(unsafe_code)] // RDTSC and one mmap

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Reads the host's TSC.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC; Linux enables it for user space.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Reads the host's TSC after everything before it in program order, so that what one thread reads and then
/// publishes is never ahead of what another reads next.
#[inline(always)]
pub fn now_ordered() -> u64 {
    // SAFETY: as in `now`; LFENCE is part of SSE2, which x86-64 includes.
    unsafe {
        std::arch::x86_64::_mm_lfence();
        std::arch::x86_64::_rdtsc()
    }
}

/// Frequency of the host's TSC in Hz, measured once a process.
///
/// The kernel's own scale is read from a perf event page when it allows that (exact and instant), otherwise the
/// counter is compared with the monotonic clock for two milliseconds.
pub fn frequency() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| from_kernel().unwrap_or_else(measure))
}

/// Ticks of the TSC in `d`.
pub fn ticks(d: Duration) -> u64 {
    (d.as_nanos() * frequency() as u128 / 1_000_000_000) as u64
}

/// Time that `ticks` of the TSC take.
pub fn duration(ticks: u64) -> Duration {
    let hz = frequency() as u128;
    Duration::from_nanos((ticks as u128 * 1_000_000_000 / hz).min(u64::MAX as u128) as u64)
}

fn measure() -> u64 {
    let (t0, i0) = (now(), Instant::now());
    while i0.elapsed() < Duration::from_millis(2) {
        std::hint::spin_loop();
    }
    let (t1, elapsed) = (now(), i0.elapsed());
    ((t1 - t0) as u128 * 1_000_000_000 / elapsed.as_nanos().max(1)) as u64
}

/// perf_event_open(2), "cap_user_time": ns = (cycles * time_mult) >> time_shift.
fn from_kernel() -> Option<u64> {
    // struct perf_event_attr, of which only type (PERF_TYPE_SOFTWARE), size and config (PERF_COUNT_SW_DUMMY) are set;
    // the flags word has `disabled` and `exclude_kernel`, so that no privilege is needed.
    let mut attr = [0u64; 16];
    attr[0] = 1 | (128 << 32);
    attr[1] = 9;
    attr[5] = 1 | (1 << 5);
    // SAFETY: the attribute block is as long as it says; the descriptor is checked and closed below.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attr.as_ptr(), 0, -1, -1, 8) } as i32;
    if fd < 0 {
        return None;
    }
    // SAFETY: maps the event's control page read-only at an address of the kernel's choice.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, fd, 0) };
    let mut hz = None;
    if page != libc::MAP_FAILED {
        // Offsets in struct perf_event_mmap_page: capabilities 40, time_shift 50 (u16), time_mult 52 (u32).
        // SAFETY: the page is mapped, and the fields are aligned.
        let (caps, shift, mult) = unsafe {
            let p = page.cast::<u8>();
            (
                p.add(40).cast::<u64>().read_volatile(),
                p.add(50).cast::<u16>().read_volatile(),
                p.add(52).cast::<u32>().read_volatile(),
            )
        };
        let cap_user_time = caps & (1 << 3) != 0;
        if cap_user_time && mult != 0 && shift < 64 {
            hz = u64::try_from((1_000_000_000u128 << shift) / mult as u128).ok();
        }
        // SAFETY: unmaps what was mapped above.
        unsafe { libc::munmap(page, 4096) };
    }
    // SAFETY: closes the descriptor opened above.
    unsafe { libc::close(fd) };
    hz.filter(|hz| *hz > 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_and_measurement_agree() {
        let measured = measure();
        let hz = frequency();
        assert!(hz.abs_diff(measured) < measured / 20, "{hz} {measured}");
        assert!(ticks(duration(1_000_000)).abs_diff(1_000_000) < 100);
    }
}
