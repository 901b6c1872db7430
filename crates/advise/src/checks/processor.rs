//! What the processor offers.

use crate::{Finding, Host};

/// The processor flag that says it can run guests, and that extension's name.
pub(super) fn extension(host: &Host) -> Option<&'static str> {
    let flags = host.cpu_flags();
    let has = |name: &str| flags.iter().any(|flag| flag == name);
    if has("vmx") {
        Some("Intel VT-x")
    } else if has("svm") {
        Some("AMD-V")
    } else {
        None
    }
}

/// Whether this machine is a guest itself.
pub(super) fn is_guest(host: &Host) -> bool {
    host.cpu_flags().iter().any(|flag| flag == "hypervisor")
}

/// Hardware virtualization.
pub(super) fn virtualization(host: &Host) -> Finding {
    let check = "virtualization";
    match extension(host) {
        Some(name) => Finding::ok(check, name),
        None if is_guest(host) => Finding::missing(
            check,
            "the processor shows neither vmx nor svm: this host is a guest itself, without nested virtualization",
            "turn on nested virtualization in the hypervisor around it; until then guests run on the software CPU",
        ),
        None => Finding::missing(
            check,
            "the processor shows neither vmx nor svm",
            "turn on VT-x or AMD-V (SVM) in the firmware setup; until then guests run on the software CPU",
        ),
    }
}

/// Second-level address translation in hardware.
pub(super) fn nested_paging(host: &Host) -> Finding {
    let check = "nested-paging";
    let flags = host.cpu_flags();
    match flags.iter().find(|flag| *flag == "ept" || *flag == "npt") {
        Some(flag) if flag == "ept" => Finding::ok(check, "extended page tables (EPT)"),
        Some(_) => Finding::ok(check, "nested page tables (NPT)"),
        None if extension(host).is_none() => {
            Finding::missing(check, "not without hardware virtualization", "see virtualization")
        }
        None => Finding::warning(
            check,
            "the processor shows neither ept nor npt: the kernel shadows page tables, which is slow",
            "use a newer processor, or turn the feature on in the hypervisor around this host",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use crate::host::fake::Fake;

    #[test]
    fn intel_amd_and_none() {
        assert_eq!(virtualization(&Fake::new().with_cpu("vmx ept").host).found, "Intel VT-x");
        assert_eq!(virtualization(&Fake::new().with_cpu("svm npt").host).found, "AMD-V");
        let none = virtualization(&Fake::new().with_cpu("svm_lock").host);
        assert_eq!(none.status, Status::Missing);
        assert!(none.remedy.is_some_and(|remedy| remedy.contains("firmware")));
        let guest = virtualization(&Fake::new().with_cpu("hypervisor").host);
        assert!(guest.remedy.is_some_and(|remedy| remedy.contains("nested")));
    }

    #[test]
    fn address_translation() {
        assert!(nested_paging(&Fake::new().with_cpu("vmx ept").host).found.contains("EPT"));
        assert!(nested_paging(&Fake::new().with_cpu("svm npt").host).found.contains("NPT"));
        assert_eq!(nested_paging(&Fake::new().with_cpu("vmx").host).status, Status::Warning);
        assert_eq!(nested_paging(&Fake::new().with_cpu("sse").host).status, Status::Missing);
    }
}
