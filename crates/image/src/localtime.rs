//! Times as people read them.

#![allow(unsafe_code)] // localtime_r(3) has no safe wrapper among the dependencies

/// `2026-11-22 21:21:50` in the local time zone.
pub(crate) fn local(seconds: u64) -> String {
    let time = seconds as libc::time_t;
    // SAFETY: `tm` is plain old data (its zone pointer may be null), and both pointers are valid for the call.
    let tm = unsafe {
        let mut tm: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&time, &mut tm).is_null() {
            return seconds.to_string();
        }
        tm
    };
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        i64::from(tm.tm_year) + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec
    )
}
