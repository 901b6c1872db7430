//! Sizes as users write them: `512M`, `4G`, `1.5G`, `4096` (bytes).

use crate::Error;

/// Parses a size as QEMU's `size` options do: a number, optionally fractional, and a suffix `B`, `K`, `M`, `G`,
/// `T`, `P` or `E` (powers of 1024, any case). `default_suffix` applies where none is written (QEMU's `-m` takes
/// mebibytes).
///
/// # Errors
/// [`Error::BadSize`] with the text and what is accepted.
pub fn parse_size(text: &str, default_suffix: char) -> Result<u64, Error> {
    let bad = || {
        Error::BadSize(format!(
            "invalid size '{text}': expected a number with an optional suffix K, M, G, T, P or E, such as 512M or 4G"
        ))
    };
    let s = text.trim();
    let (number, suffix) = match s.char_indices().last() {
        Some((i, c)) if c.is_ascii_alphabetic() => (&s[..i], c.to_ascii_uppercase()),
        Some(_) => (s, default_suffix.to_ascii_uppercase()),
        None => return Err(bad()),
    };
    let shift = match suffix {
        'B' => 0,
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        'P' => 50,
        'E' => 60,
        _ => return Err(bad()),
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((w, f)) if !f.is_empty() => (w, Some(f)),
        Some(_) => return Err(bad()),
        None => (number, None),
    };
    let all_digits = |t: &str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
    if !all_digits(whole) || fraction.is_some_and(|f| !all_digits(f) || f.len() > 18) {
        return Err(bad());
    }
    let unit = 1u128 << shift;
    let mut bytes = whole.parse::<u64>().map_err(|_| bad())? as u128 * unit;
    if let Some(f) = fraction {
        bytes += f.parse::<u64>().map_err(|_| bad())? as u128 * unit / 10u128.pow(f.len() as u32);
    }
    u64::try_from(bytes).map_err(|_| bad())
}

/// Formats a size with the largest suffix that divides it: `512 MiB`, `4 GiB`, `1000 B`.
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let step = (bytes.trailing_zeros() / 10).min(6) as usize;
    if bytes == 0 {
        return "0 B".into();
    }
    format!("{} {}", bytes >> (10 * step), UNITS[step])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_users_write() {
        assert_eq!(parse_size("512M", 'M').unwrap(), 512 << 20);
        assert_eq!(parse_size("4g", 'M').unwrap(), 4 << 30);
        assert_eq!(parse_size("1024", 'M').unwrap(), 1 << 30);
        assert_eq!(parse_size("4096", 'B').unwrap(), 4096);
        assert_eq!(parse_size("1.5G", 'M').unwrap(), 3 << 29);
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in ["", "G", "-1", "1.", ".5G", "12Q", "99999999999E", "1 G", "0x10"] {
            assert!(parse_size(bad, 'M').is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_shown() {
        assert_eq!(format_size(512 << 20), "512 MiB");
        assert_eq!(format_size(1000), "1000 B");
        assert_eq!(format_size(3 << 29), "1536 MiB");
    }
}
