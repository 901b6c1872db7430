//! Sizes and tables as qemu-img prints them.

use block::formats::SnapshotInfo;

/// `196 KiB`, `1.5 GiB`: three significant digits, the next unit from 1000 on.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut unit = 0;
    let mut divisor = 1u64;
    while unit + 1 < UNITS.len() && bytes as f64 / divisor as f64 >= 1000.0 {
        unit += 1;
        divisor <<= 10;
    }
    format!("{} {}B", three_digits(bytes as f64 / divisor as f64), UNITS[unit])
}

/// C's `%.3g` for numbers from 0 to 1000.
fn three_digits(value: f64) -> String {
    let decimals = match value {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// The table of snapshots, with its heading.
pub(crate) fn snapshots(list: &[SnapshotInfo]) -> String {
    let mut out = String::from("Snapshot list:\n");
    let mut row = |id: &str, tag: &str, vm: &str, date: &str, clock: &str, icount: &str| {
        out.push_str(&format!("{id:<7} {tag:<16} {vm:>8}{date:>20}{clock:>16}{icount:>11}\n"));
    };
    row("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT");
    for s in list {
        let seconds = s.vm_clock_nsec / 1_000_000_000;
        row(
            &s.id,
            &s.name,
            &size(s.vm_state_size),
            &crate::localtime::local(u64::from(s.date_sec)),
            &format!(
                "{:04}:{:02}:{:02}.{:03}",
                seconds / 3600,
                seconds / 60 % 60,
                seconds % 60,
                s.vm_clock_nsec / 1_000_000 % 1000
            ),
            &s.icount.map_or_else(|| "--".to_owned(), |i| i.to_string()),
        );
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_read_like_qemu_img() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (200_704, "196 KiB"),
            (1 << 30, "1 GiB"),
            (3 << 29, "1.5 GiB"),
            (10_485_760, "10 MiB"),
            (590_336, "576 KiB"),
            (197_120, "192 KiB"),
            (1_288_490_189, "1.2 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(super::size(bytes), text, "{bytes}");
        }
    }
}
