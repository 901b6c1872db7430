//! The proleptic Gregorian calendar, for the real-time clock.

/// Seconds in a day.
pub(super) const DAY: i64 = 86_400;

/// A date and time of day. Fields may be out of range (a guest wrote them): they count on from the start of the year.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    pub(super) year: i64,
    /// 1 to 12.
    pub(super) month: u8,
    /// 1 to 31.
    pub(super) day: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
}

/// Days from 1970-01-01 to the first of a month. The year starts in March here, so that leap days come last.
fn days_before_month(year: i64, month: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    // Months of 31, 30, 31, 30, 31 days, twice, and the rest: 153 days in five months.
    year * 365 + leap_days + (153 * month + 2) / 5 - 719_468
}

impl DateTime {
    /// The time `seconds` after 1970.
    pub(super) fn from_unix(seconds: i64) -> Self {
        let (days, rest) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        // An average Gregorian year is 146,097 / 400 days; the guess is off by one at most.
        let mut year = 1970 + (days * 400).div_euclid(146_097);
        while days_before_month(year, 1) > days {
            year -= 1;
        }
        while days_before_month(year + 1, 1) <= days {
            year += 1;
        }
        let month = (1..=12).rev().find(|m| days_before_month(year, *m) <= days).unwrap_or(1);
        let day = days - days_before_month(year, month) + 1;
        Self {
            year,
            month: month as u8, // 1 to 12
            day: day as u8,     // 1 to 31
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }

    /// Days since 1970.
    fn days(&self) -> i64 {
        let months = i64::from(self.month) - 1;
        let (year, month) = (self.year + months.div_euclid(12), months.rem_euclid(12) + 1);
        days_before_month(year, month) + i64::from(self.day) - 1
    }

    /// Seconds since 1970.
    pub(super) fn to_unix(self) -> i64 {
        let time = i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        self.days() * DAY + time
    }

    /// Day of the week, 0 for Sunday.
    pub(super) fn weekday(&self) -> u8 {
        (self.days() + 4).rem_euclid(7) as u8 // 1970 began on a Thursday
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_days() {
        let date = |year, month, day| DateTime { year, month, day, hour: 0, minute: 0, second: 0 };
        for (d, days, weekday) in [
            (date(1970, 1, 1), 0, 4),
            (date(2000, 2, 29), 11_016, 2),
            (date(2000, 3, 1), 11_017, 3),
            (date(2038, 1, 19), 24_855, 2),
            (date(1900, 3, 1), -25_508, 4),
        ] {
            assert_eq!((d.to_unix(), d.weekday()), (days * DAY, weekday), "{d:?}");
            assert_eq!(DateTime::from_unix(days * DAY), d);
        }
    }

    proptest! {
        #[test]
        fn round_trip(seconds in -(1i64 << 42)..1 << 42) {
            let d = DateTime::from_unix(seconds);
            prop_assert!((1..=12).contains(&d.month) && (1..=31).contains(&d.day));
            prop_assert_eq!(d.to_unix(), seconds);
        }
    }
}
