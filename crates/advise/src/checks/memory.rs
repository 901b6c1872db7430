//! Memory: how much, in which pages, merged or not, and where.

use crate::{Finding, Host};

/// A size in KiB for people.
fn size(kib: u64) -> String {
    match kib {
        0..1024 => format!("{kib} KiB"),
        1024..1_048_576 => format!("{} MiB", kib / 1024),
        _ => format!("{}.{} GiB", kib >> 20, ((kib & 0xf_ffff) * 10) >> 20),
    }
}

/// What guests can have.
pub(super) fn available(host: &Host) -> Finding {
    let check = "memory";
    let (Some(total), Some(free)) = (host.meminfo("MemTotal"), host.meminfo("MemAvailable")) else {
        return Finding::warning(check, "/proc/meminfo says nothing", "mount /proc");
    };
    let found = format!("{} of {} available", size(free), size(total));
    if free < 512 * 1024 {
        return Finding::warning(check, found, "end other programs, or give guests less than that");
    }
    Finding::ok(check, found)
}

/// Huge pages set aside for those who ask.
pub(super) fn huge_pages(host: &Host) -> Finding {
    let check = "huge-pages";
    let pools = host.names("/sys/kernel/mm/hugepages");
    if pools.is_empty() {
        return Finding::missing(check, "the kernel has no hugetlbfs", "use a kernel with CONFIG_HUGETLBFS");
    }
    let pool = |name: &String| {
        let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let count = |file: &str| host.number(&format!("/sys/kernel/mm/hugepages/{name}/{file}"));
        let (all, free) = (count("nr_hugepages")?, count("free_hugepages")?);
        (all > 0).then(|| format!("{free} of {all} pages of {} free", size(kib)))
    };
    let found: Vec<String> = pools.iter().filter_map(pool).collect();
    if found.is_empty() {
        return Finding::warning(
            check,
            "none set aside; guests with huge pages asked for will not start",
            "if wanted, as root, for 2 GiB: echo 1024 >/proc/sys/vm/nr_hugepages",
        );
    }
    Finding::ok(check, found.join(", "))
}

/// Huge pages the kernel makes by itself.
pub(super) fn transparent_huge_pages(host: &Host) -> Finding {
    let check = "thp";
    let directory = "/sys/kernel/mm/transparent_hugepage";
    match host.choice(&format!("{directory}/enabled")).as_deref() {
        Some("never") => Finding::warning(
            check,
            "transparent huge pages are off: guests take more TLB misses",
            format!("as root: echo madvise >{directory}/enabled"),
        ),
        Some(mode) => {
            let shared =
                host.choice(&format!("{directory}/shmem_enabled")).unwrap_or_else(|| "unknown".into());
            Finding::ok(check, format!("{mode}; for shared memory {shared}"))
        }
        None => Finding::missing(
            check,
            "the kernel has no transparent huge pages",
            "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE",
        ),
    }
}

/// Merging of equal pages.
pub(super) fn merging(host: &Host) -> Finding {
    let check = "ksm";
    let saved = || {
        let pages = host.number("/sys/kernel/mm/ksm/pages_sharing").unwrap_or_default();
        size(pages.saturating_mul(4))
    };
    match host.number("/sys/kernel/mm/ksm/run") {
        Some(1) => Finding::ok(check, format!("equal pages are merged; {} saved", saved())),
        Some(_) => Finding::ok(check, "off (on saves memory among similar guests, and costs time)"),
        None => {
            Finding::missing(check, "the kernel cannot merge equal pages", "use a kernel with CONFIG_KSM")
        }
    }
}

/// Processors and memory that are nearer to each other than to others.
pub(super) fn numa(host: &Host) -> Finding {
    let check = "numa";
    let is_node =
        |name: &String| name.strip_prefix("node").is_some_and(|number| number.parse::<u32>().is_ok());
    let nodes = host.names("/sys/devices/system/node").iter().filter(|name| is_node(name)).count();
    match nodes {
        0 | 1 => Finding::ok(check, "one node: nothing to place"),
        _ if host.number("/proc/sys/kernel/numa_balancing") == Some(0) => Finding::warning(
            check,
            format!("{nodes} nodes, and the kernel does not move memory towards its users"),
            "bind guests to nodes, or as root: echo 1 >/proc/sys/kernel/numa_balancing",
        ),
        _ => Finding::ok(check, format!("{nodes} nodes; the kernel balances guests that are not bound")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use crate::host::fake::Fake;

    #[test]
    fn sizes() {
        assert_eq!(size(4), "4 KiB");
        assert_eq!(size(2048), "2 MiB");
        assert_eq!(size(1_048_576 + 524_288), "1.5 GiB");
    }

    #[test]
    fn free_memory() {
        let with = |free: u64| {
            available(
                &Fake::new()
                    .with("/proc/meminfo", &format!("MemTotal: 4194304 kB\nMemAvailable: {free} kB\n"))
                    .host,
            )
        };
        assert_eq!(with(2_097_152).found, "2.0 GiB of 4.0 GiB available");
        assert_eq!(with(1024).status, Status::Warning);
        assert_eq!(available(&Fake::new().host).status, Status::Warning);
    }

    #[test]
    fn pools_of_huge_pages() {
        let pool = "/sys/kernel/mm/hugepages/hugepages-2048kB";
        let with = |all: &str, free: &str| {
            let fake = Fake::new().with(&format!("{pool}/nr_hugepages"), all);
            huge_pages(&fake.with(&format!("{pool}/free_hugepages"), free).host)
        };
        assert_eq!(with("8\n", "3\n").found, "3 of 8 pages of 2 MiB free");
        assert_eq!(with("0\n", "0\n").status, Status::Warning);
        assert_eq!(huge_pages(&Fake::new().host).status, Status::Missing);
    }

    #[test]
    fn transparent() {
        let enabled = "/sys/kernel/mm/transparent_hugepage/enabled";
        let with = |text: &str| transparent_huge_pages(&Fake::new().with(enabled, text).host);
        assert_eq!(with("always [madvise] never").status, Status::Ok);
        assert_eq!(with("always madvise [never]").status, Status::Warning);
        assert_eq!(transparent_huge_pages(&Fake::new().host).status, Status::Missing);
    }

    #[test]
    fn merged_pages() {
        let with = |run: &str| {
            Fake::new().with("/sys/kernel/mm/ksm/run", run).with("/sys/kernel/mm/ksm/pages_sharing", "512")
        };
        assert!(merging(&with("1").host).found.contains("2 MiB saved"));
        assert!(merging(&with("0").host).found.starts_with("off"));
        assert_eq!(merging(&Fake::new().host).status, Status::Missing);
    }

    #[test]
    fn nodes() {
        let base = "/sys/devices/system/node";
        let one = Fake::new().with_directory(&format!("{base}/node0")).with(&format!("{base}/online"), "0");
        assert!(numa(&one.host).found.starts_with("one node"));
        let two = one.with_directory(&format!("{base}/node1"));
        assert!(numa(&two.host).found.starts_with("2 nodes"));
        let unbalanced = two.with("/proc/sys/kernel/numa_balancing", "0\n");
        assert_eq!(numa(&unbalanced.host).status, Status::Warning);
    }
}
