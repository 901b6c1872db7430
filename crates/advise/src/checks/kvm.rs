//! `/dev/kvm`: there, permitted, and the processor's own.

use std::io;

use super::processor;
use crate::host::Module;
use crate::{Finding, Host};

const DEVICE: &str = "/dev/kvm";

/// The module for this processor.
fn vendor_module(host: &Host) -> &'static str {
    if host.cpu_flags().iter().any(|flag| flag == "vmx") { "kvm_intel" } else { "kvm_amd" }
}

/// The device.
pub(super) fn device(host: &Host) -> Finding {
    judge(host, host.open_device(DEVICE))
}

fn judge(host: &Host, opened: io::Result<()>) -> Finding {
    let check = "kvm";
    let hardware = processor::extension(host).is_some();
    match opened {
        Ok(()) if hardware => Finding::ok(check, format!("{DEVICE} can be used")),
        Ok(()) => Finding::warning(
            check,
            format!(
                "{DEVICE} opens, but the processor has no vmx or svm: a KVM without hardware virtualization (PVM), \
                 which cannot run an ordinary guest"
            ),
            "nothing to do: automatic choice passes it over and takes the software CPU",
        ),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Finding::missing(
            check,
            format!("{DEVICE}: permission denied"),
            "as root: adduser YOUR-NAME kvm, then log in again",
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => absent(host, hardware),
        Err(error) => Finding::missing(
            check,
            format!("{DEVICE}: {error}"),
            format!("as root: modprobe -r {0}; modprobe {0}; then see dmesg", vendor_module(host)),
        ),
    }
}

fn absent(host: &Host, hardware: bool) -> Finding {
    let check = "kvm";
    let found = format!("no {DEVICE}");
    if !hardware {
        return Finding::missing(check, found, "see virtualization; guests run on the software CPU");
    }
    let module = vendor_module(host);
    match host.module(module) {
        Module::Loadable => Finding::missing(check, found, format!("as root: modprobe {module}")),
        Module::Present => Finding::missing(
            check,
            format!("{found}, though {module} is loaded"),
            "in a container: hand in the device; else virtualization is locked in the firmware setup, see dmesg",
        ),
        Module::Absent => {
            Finding::missing(check, found, "use a kernel with KVM, such as Debian's linux-image-amd64")
        }
    }
}

/// What runs a guest unless the user says otherwise.
pub(super) fn accelerator(host: &Host) -> Finding {
    let check = "accelerator";
    if device(host).status == crate::Status::Ok {
        return Finding::ok(check, "guests run on KVM");
    }
    Finding::warning(
        check,
        "guests run on the software CPU, which is slower",
        "see virtualization and kvm above",
    )
}

/// Guests that run guests.
pub(super) fn nested(host: &Host) -> Finding {
    let check = "nested";
    let find = |module| Some((module, host.text(&format!("/sys/module/{module}/parameters/nested"))?));
    match ["kvm_intel", "kvm_amd"].into_iter().find_map(find) {
        Some((_, on)) if on == "1" || on.eq_ignore_ascii_case("y") => {
            Finding::ok(check, "guests can use hardware virtualization themselves")
        }
        Some((module, _)) => Finding::warning(
            check,
            "guests cannot use hardware virtualization themselves",
            format!(
                "as root: echo options {module} nested=1 >/etc/modprobe.d/kvasir.conf, and load the module again"
            ),
        ),
        None => Finding::missing(
            check,
            "not without the KVM module of this processor",
            "see virtualization and kvm",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use crate::host::fake::Fake;

    #[test]
    fn usable() {
        let fake = Fake::new().with_cpu("svm npt").with(DEVICE, "");
        assert_eq!(device(&fake.host).status, Status::Ok);
        assert_eq!(accelerator(&fake.host).status, Status::Ok);
    }

    #[test]
    fn a_device_without_the_flag_is_no_hardware() {
        let fake = Fake::new().with_cpu("sse").with(DEVICE, "");
        let finding = device(&fake.host);
        assert_eq!(finding.status, Status::Warning);
        assert!(finding.found.contains("PVM"), "{}", finding.found);
        assert!(accelerator(&fake.host).found.contains("software CPU"));
    }

    #[test]
    fn permission() {
        let fake = Fake::new().with_cpu("vmx");
        let finding = judge(&fake.host, Err(io::ErrorKind::PermissionDenied.into()));
        assert_eq!(finding.status, Status::Missing);
        assert!(finding.remedy.is_some_and(|remedy| remedy.contains("adduser")));
    }

    #[test]
    fn absent_device_and_what_to_do() {
        let remedy = |fake: Fake| device(&fake.host).remedy.expect("remedy");
        let intel = || Fake::new().with_cpu("vmx").with("/proc/sys/kernel/osrelease", "6.1");
        assert!(remedy(Fake::new().with_cpu("sse")).contains("software CPU"));
        assert!(remedy(intel()).contains("linux-image"));
        assert!(remedy(intel().with_directory("/sys/module/kvm_intel")).contains("firmware"));
        let loadable = intel().with("/lib/modules/6.1/modules.dep", "kernel/arch/x86/kvm/kvm-intel.ko:\n");
        assert_eq!(remedy(loadable), "as root: modprobe kvm_intel");
    }

    #[test]
    fn nested_guests() {
        let with = |module: &str, on: &str| {
            nested(&Fake::new().with(&format!("/sys/module/{module}/parameters/nested"), on).host)
        };
        assert_eq!(with("kvm_intel", "Y\n").status, Status::Ok);
        assert_eq!(with("kvm_amd", "1\n").status, Status::Ok);
        assert!(with("kvm_amd", "0\n").remedy.is_some_and(|remedy| remedy.contains("kvm_amd nested=1")));
        assert_eq!(nested(&Fake::new().host).status, Status::Missing);
    }
}
