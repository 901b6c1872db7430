//! Limits of the process that would run a guest.

use crate::{Finding, Host};

/// The soft and hard value of a line of `/proc/self/limits`; `None` is unlimited.
fn limit(host: &Host, name: &str) -> Option<(Option<u64>, Option<u64>)> {
    let text = host.text("/proc/self/limits")?;
    let mut words = text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace();
    let mut value = || match words.next()? {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    };
    Some((value()?, value()?))
}

fn word(limit: Option<u64>) -> String {
    limit.map_or_else(|| "unlimited".into(), |limit| limit.to_string())
}

/// Open files: every disk, queue and interrupt takes one.
pub(super) fn open_files(host: &Host) -> Finding {
    let check = "open-files";
    let Some((soft, hard)) = limit(host, "Max open files") else {
        return Finding::warning(check, "/proc/self/limits says nothing", "mount /proc");
    };
    let found = format!("{} at once, {} at most", word(soft), word(hard));
    if hard.is_some_and(|hard| hard < 4096) {
        return Finding::warning(
            check,
            found,
            "large guests need more: raise nofile in /etc/security/limits.conf, or LimitNOFILE= of the service",
        );
    }
    Finding::ok(check, found)
}

/// Memory that stays in place: assigned devices need all of their guest's.
pub(super) fn locked_memory(host: &Host) -> Finding {
    let check = "locked-memory";
    let Some((_, hard)) = limit(host, "Max locked memory") else {
        return Finding::warning(check, "/proc/self/limits says nothing", "mount /proc");
    };
    let Some(bytes) = hard else { return Finding::ok(check, "unlimited") };
    let found = format!("{} MiB at most", bytes >> 20);
    let memory = host.meminfo("MemTotal").unwrap_or_default().saturating_mul(1024);
    if bytes < memory / 2 {
        return Finding::warning(
            check,
            format!("{found}: guests with assigned host devices, or locked in memory, must be smaller"),
            "raise memlock in /etc/security/limits.conf, or LimitMEMLOCK= of the service",
        );
    }
    Finding::ok(check, found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use crate::host::fake::Fake;

    fn with(files: &str, locked: &str) -> Fake {
        let text = format!(
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max open files            {files}                files     \n\
             Max locked memory         {locked}              bytes     \n"
        );
        Fake::new().with("/proc/self/limits", &text).with("/proc/meminfo", "MemTotal: 1048576 kB\n")
    }

    #[test]
    fn files() {
        assert_eq!(open_files(&with("1024 1048576", "0 0").host).found, "1024 at once, 1048576 at most");
        assert_eq!(open_files(&with("256 1024", "0 0").host).status, Status::Warning);
        assert_eq!(open_files(&Fake::new().host).status, Status::Warning);
    }

    #[test]
    fn memory() {
        assert_eq!(locked_memory(&with("1 1", "unlimited unlimited").host).found, "unlimited");
        assert_eq!(locked_memory(&with("1 1", "8388608 8388608").host).status, Status::Warning);
        assert_eq!(locked_memory(&with("1 1", "8388608 1073741824").host).status, Status::Ok);
    }
}
