//! Whether this host has KVM, for the choice of the accelerator and for the host check.

use kvm_ioctls::Kvm;
use std::io::{self, Read};

/// The `/dev/kvm` interface, stable since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// What is known of KVM on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// There is a `/dev/kvm`.
    pub exists: bool,
    /// This process may open it.
    pub permitted: bool,
    /// The processor flag of hardware virtualization, `vmx` or `svm`, if the processor shows one. A `/dev/kvm`
    /// without it is a page-table based build (PVM) that cannot run ordinary guests.
    pub extension: Option<&'static str>,
    /// One sentence: why KVM can be chosen, or why not and what to do.
    pub reason: String,
}

impl Probe {
    /// Whether KVM should be chosen when the user left the choice open.
    pub fn usable(&self) -> bool {
        self.exists && self.permitted && self.extension.is_some()
    }
}

/// Looks at `/dev/kvm` and the processor's flags.
pub fn probe() -> Probe {
    judge(open().map(drop), extension())
}

/// Opens `/dev/kvm` and checks its interface version.
pub(super) fn open() -> io::Result<Kvm> {
    let kvm = Kvm::new().map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        version => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("it speaks KVM interface version {version}, not {API_VERSION}"),
        )),
    }
}

/// One sentence for a failure of [`open`], with the remedy.
pub(super) fn explain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT) => "/dev/kvm does not exist: enable virtualization (VT-x or AMD-V) in the firmware set-up, or \
                               nested virtualization if this is a VM, and load the module with 'modprobe kvm_intel' \
                               or 'modprobe kvm_amd'"
            .into(),
        Some(libc::ENXIO | libc::ENODEV) => {
            "/dev/kvm has no driver behind it: load the module with 'modprobe kvm_intel' or 'modprobe kvm_amd'".into()
        }
        Some(libc::EACCES | libc::EPERM) => {
            "no permission to open /dev/kvm: run 'sudo usermod -aG kvm $USER' and log in again, or \
             'sudo setfacl -m u:$USER:rw /dev/kvm'"
                .into()
        }
        Some(libc::EBUSY) => {
            "/dev/kvm is busy: another hypervisor (VirtualBox, VMware) holds the processor's virtualization; stop it".into()
        }
        _ => format!("cannot use /dev/kvm: {error}"),
    }
}

fn judge(opened: io::Result<()>, extension: Option<&'static str>) -> Probe {
    let missing = [libc::ENOENT, libc::ENXIO, libc::ENODEV];
    let (exists, permitted) = match &opened {
        Ok(()) => (true, true),
        Err(e) => (!e.raw_os_error().is_some_and(|code| missing.contains(&code)), false),
    };
    let reason = match (&opened, extension) {
        (Ok(()), Some(flag)) => {
            format!("/dev/kvm works and the processor has hardware virtualization ({flag})")
        }
        (Ok(()), None) => {
            "/dev/kvm opens, but the processor shows neither vmx nor svm, so it is not hardware \
                           virtualization and cannot run ordinary guests"
                .into()
        }
        (Err(e), _) => explain(e),
    };
    Probe { exists, permitted, extension, reason }
}

/// The processor's virtualization flag as the kernel reports it. (The CPUID instruction is not asked: under PVM it
/// would answer for the outer machine.)
fn extension() -> Option<&'static str> {
    // The first processor's record is enough, and it fits easily.
    let mut text = Vec::new();
    std::fs::File::open("/proc/cpuinfo").ok()?.take(16 << 10).read_to_end(&mut text).ok()?;
    find_extension(&String::from_utf8_lossy(&text))
}

fn find_extension(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?.split_once(':')?.1;
    flags.split_whitespace().find_map(|flag| match flag {
        "vmx" => Some("vmx"),
        "svm" => Some("svm"),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(code: i32) -> Probe {
        judge(Err(io::Error::from_raw_os_error(code)), Some("svm"))
    }

    #[test]
    fn only_real_and_permitted_kvm_is_usable() {
        assert!(judge(Ok(()), Some("vmx")).usable());
        let pvm = judge(Ok(()), None);
        assert!(pvm.exists && pvm.permitted && !pvm.usable());
        assert!(pvm.reason.contains("neither vmx nor svm"));
        let denied = failed(libc::EACCES);
        assert!(denied.exists && !denied.permitted && !denied.usable());
        assert!(denied.reason.contains("usermod -aG kvm") && denied.reason.contains("setfacl"));
        let absent = failed(libc::ENOENT);
        assert!(!absent.exists && !absent.usable() && absent.reason.contains("modprobe"));
        assert!(!failed(libc::ENODEV).exists);
        assert!(failed(libc::EBUSY).reason.contains("another hypervisor"));
    }

    #[test]
    fn flags_are_whole_words_of_the_flags_line() {
        let text = "model name\t: svm 9000\nflags\t\t: fpu svmx vmx lm\n";
        assert_eq!(find_extension(text), Some("vmx"));
        assert_eq!(find_extension("flags : fpu svm_lock avmx\nother : svm\n"), None);
        assert_eq!(find_extension(""), None);
    }
}
