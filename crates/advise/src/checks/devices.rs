//! Kernel parts behind networking, vsock and device assignment.

use std::io;

use crate::host::Module;
use crate::{Finding, Host};

/// A device node, the module that makes it, and what it is for.
struct Node {
    check: &'static str,
    path: &'static str,
    module: &'static str,
    purpose: &'static str,
}

impl Node {
    fn judge(&self, host: &Host, opened: io::Result<()>) -> Finding {
        let Node { check, path, module, purpose } = self;
        match opened {
            Ok(()) => Finding::ok(check, format!("{path} can be used ({purpose})")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => match host.module(module) {
                Module::Absent => Finding::missing(
                    check,
                    format!("no {path}, and this kernel has no module {module} ({purpose})"),
                    format!("use a kernel with {module}, such as Debian's linux-image-amd64"),
                ),
                _ => Finding::missing(
                    check,
                    format!("no {path} ({purpose})"),
                    format!("as root: modprobe {module}"),
                ),
            },
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Finding::missing(
                check,
                format!("{path}: permission denied ({purpose})"),
                format!("run as root or through the daemon, or give your group access to {path}"),
            ),
            Err(error) => Finding::missing(
                check,
                format!("{path}: {error} ({purpose})"),
                format!("as root: modprobe {module}; then see dmesg"),
            ),
        }
    }

    fn check(&self, host: &Host) -> Finding {
        self.judge(host, host.open_device(self.path))
    }
}

/// Network interfaces for guests.
pub(super) fn tun(host: &Host) -> Finding {
    let purpose = "guests on tap interfaces";
    Node { check: "tun", path: "/dev/net/tun", module: "tun", purpose }.check(host)
}

/// The kernel's own network back end.
pub(super) fn vhost_net(host: &Host) -> Finding {
    let purpose = "faster guest networking";
    Node { check: "vhost-net", path: "/dev/vhost-net", module: "vhost_net", purpose }.check(host)
}

/// Sockets between host and guest.
pub(super) fn vhost_vsock(host: &Host) -> Finding {
    let purpose = "sockets between host and guests";
    Node { check: "vhost-vsock", path: "/dev/vhost-vsock", module: "vhost_vsock", purpose }.check(host)
}

/// Assignment of the host's devices.
pub(super) fn vfio(host: &Host) -> Finding {
    let purpose = "assignment of host devices";
    Node { check: "vfio", path: "/dev/vfio/vfio", module: "vfio_pci", purpose }.check(host)
}

/// What keeps an assigned device from writing where it should not.
pub(super) fn iommu(host: &Host) -> Finding {
    let check = "iommu";
    let groups = host.names("/sys/kernel/iommu_groups").len();
    if groups > 0 {
        return Finding::ok(check, format!("{groups} groups"));
    }
    let intel = host.text("/proc/cpuinfo").is_some_and(|text| text.contains("GenuineIntel"));
    let option = if intel { "intel_iommu=on" } else { "amd_iommu=on" };
    Finding::missing(
        check,
        "no IOMMU groups: host devices cannot be assigned to guests",
        format!(
            "turn on VT-d or AMD-Vi in the firmware setup, and add {option} to the host's kernel command line"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use crate::host::fake::Fake;

    #[test]
    fn a_node_that_opens() {
        assert_eq!(tun(&Fake::new().with("/dev/net/tun", "").host).status, Status::Ok);
    }

    #[test]
    fn a_node_that_does_not() {
        let fake = Fake::new().with("/proc/sys/kernel/osrelease", "6.1");
        assert!(vfio(&fake.host).remedy.is_some_and(|remedy| remedy.contains("use a kernel")));
        let fake = fake.with("/lib/modules/6.1/modules.dep", "kernel/drivers/vhost/vhost_net.ko:\n");
        assert_eq!(vhost_net(&fake.host).remedy.as_deref(), Some("as root: modprobe vhost_net"));
        let node = Node { check: "x", path: "/dev/x", module: "x", purpose: "x" };
        let denied = node.judge(&fake.host, Err(io::ErrorKind::PermissionDenied.into()));
        assert!(denied.found.contains("permission denied") && denied.status == Status::Missing);
    }

    #[test]
    fn iommu_groups() {
        let fake = Fake::new().with("/proc/cpuinfo", "vendor_id : GenuineIntel\n");
        assert!(iommu(&fake.host).remedy.is_some_and(|remedy| remedy.contains("intel_iommu=on")));
        let fake =
            fake.with_directory("/sys/kernel/iommu_groups/0").with_directory("/sys/kernel/iommu_groups/1");
        assert_eq!(iommu(&fake.host).found, "2 groups");
    }
}
