//! The kernel and what it offers beside virtualization.

use crate::{Finding, Host};

/// The oldest kernel that has what is used throughout: io_uring with registered files, sealed memfds, pidfds.
const OLDEST: (u32, u32) = (5, 10);

/// The running kernel.
pub(super) fn kernel(host: &Host) -> Finding {
    let check = "kernel";
    let Some(release) = host.text("/proc/sys/kernel/osrelease") else {
        return Finding::warning(check, "/proc says nothing about the kernel", "mount /proc");
    };
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < OLDEST {
        let (major, minor) = OLDEST;
        return Finding::warning(
            check,
            format!("Linux {release}"),
            format!("use Linux {major}.{minor} or newer"),
        );
    }
    Finding::ok(check, format!("Linux {release}"))
}

/// The clock guests' clocks are made from.
pub(super) fn clock(host: &Host) -> Finding {
    let check = "clock";
    match host.text("/sys/devices/system/clocksource/clocksource0/current_clocksource") {
        Some(source) if source == "tsc" || source == "kvm-clock" => Finding::ok(check, source),
        Some(source) => Finding::warning(
            check,
            format!("{source}: reading the time is slow, in guests too"),
            "if the processor's counter is sound, boot the host with tsc=reliable",
        ),
        None => Finding::warning(check, "/sys says nothing about the clock", "mount /sys"),
    }
}

/// Asynchronous disk access.
pub(super) fn io_uring(host: &Host) -> Finding {
    let check = "io-uring";
    match host.number("/proc/sys/kernel/io_uring_disabled") {
        Some(0) => Finding::ok(check, "allowed"),
        Some(1) => Finding::warning(
            check,
            "allowed to root and one group only: for others, disk requests of a guest are done one at a time",
            "as root: sysctl kernel.io_uring_disabled=0",
        ),
        Some(_) => Finding::warning(
            check,
            "forbidden: disk requests of a guest are done one at a time",
            "as root: sysctl kernel.io_uring_disabled=0",
        ),
        // The switch came with Linux 6.6; before it there was nothing to forbid it with.
        None => Finding::ok(check, "not restricted"),
    }
}

/// What confines the process of a guest.
pub(super) fn sandbox(host: &Host) -> Finding {
    let check = "sandbox";
    let seccomp = host.exists("/proc/sys/kernel/seccomp/actions_avail");
    let modules = host.text("/sys/kernel/security/lsm");
    let landlock = modules.as_ref().map(|list| list.split(',').any(|name| name == "landlock"));
    match (seccomp, landlock) {
        (true, Some(true)) => Finding::ok(check, "seccomp, Landlock"),
        (true, None) => {
            Finding::ok(check, "seccomp; whether Landlock is on cannot be seen without securityfs")
        }
        (true, Some(false)) => Finding::warning(
            check,
            "seccomp without Landlock: a guest's process is not confined to its files",
            "add landlock to the lsm= list on the host's kernel command line",
        ),
        (false, _) => Finding::missing(
            check,
            "the kernel has no seccomp filters",
            "use a kernel with CONFIG_SECCOMP_FILTER",
        ),
    }
}

/// Control groups, which share out processors, memory and disks.
pub(super) fn cgroups(host: &Host) -> Finding {
    let check = "cgroups";
    let Some(controllers) = host.text("/sys/fs/cgroup/cgroup.controllers") else {
        return Finding::missing(
            check,
            "no unified hierarchy (cgroup v2): resources of guests cannot be limited",
            "boot the host with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 on /sys/fs/cgroup",
        );
    };
    let wanted = ["cpu", "cpuset", "io", "memory"];
    let lacking: Vec<&str> =
        wanted.into_iter().filter(|name| !controllers.split_whitespace().any(|have| have == *name)).collect();
    if lacking.is_empty() {
        return Finding::ok(check, format!("version 2 with {}", wanted.join(", ")));
    }
    let lacking = lacking.join(", ");
    Finding::warning(
        check,
        format!("version 2 without {lacking}"),
        "mount no version 1 hierarchy with these controllers; the kernel lists what it has in /proc/cgroups",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use crate::host::fake::Fake;

    #[test]
    fn kernel_versions() {
        let with =
            |release: &str| kernel(&Fake::new().with("/proc/sys/kernel/osrelease", release).host).status;
        assert_eq!(with("6.1.0-56-amd64\n"), Status::Ok);
        assert_eq!(with("5.10.0\n"), Status::Ok);
        assert_eq!(with("5.4.0-1-generic\n"), Status::Warning);
        assert_eq!(with("10\n"), Status::Ok);
    }

    #[test]
    fn clocks() {
        let path = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
        assert_eq!(clock(&Fake::new().with(path, "tsc\n").host).status, Status::Ok);
        assert_eq!(clock(&Fake::new().with(path, "hpet\n").host).status, Status::Warning);
    }

    #[test]
    fn io_uring_switch() {
        let with =
            |text: &str| io_uring(&Fake::new().with("/proc/sys/kernel/io_uring_disabled", text).host).status;
        assert_eq!((with("0"), with("1"), with("2")), (Status::Ok, Status::Warning, Status::Warning));
        assert_eq!(io_uring(&Fake::new().host).status, Status::Ok);
    }

    #[test]
    fn confinement() {
        let seccomp = || Fake::new().with("/proc/sys/kernel/seccomp/actions_avail", "kill_process errno\n");
        let with = |list: &str| sandbox(&seccomp().with("/sys/kernel/security/lsm", list).host).status;
        assert_eq!(with("lockdown,capability,landlock,yama"), Status::Ok);
        assert_eq!(with("capability,apparmor"), Status::Warning);
        assert_eq!(sandbox(&seccomp().host).status, Status::Ok);
        assert_eq!(sandbox(&Fake::new().host).status, Status::Missing);
    }

    #[test]
    fn control_groups() {
        let with = |list: &str| cgroups(&Fake::new().with("/sys/fs/cgroup/cgroup.controllers", list).host);
        assert_eq!(with("cpuset cpu io memory hugetlb pids\n").status, Status::Ok);
        assert!(with("cpu memory").found.contains("cpuset, io"));
        assert_eq!(cgroups(&Fake::new().host).status, Status::Missing);
    }
}
