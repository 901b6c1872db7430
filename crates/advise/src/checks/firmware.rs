//! Firmware that comes from the distribution's packages.

use crate::{Finding, Host};

/// The first of these files that is there.
fn find<'a>(host: &Host, files: &[&'a str]) -> Option<&'a str> {
    files.iter().copied().find(|file| host.exists(file))
}

/// Firmware for guests that start like an old PC.
pub(super) fn seabios(host: &Host) -> Finding {
    let check = "seabios";
    let files = ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin"];
    match find(host, &files) {
        Some(file) => Finding::ok(check, file),
        None => Finding::missing(
            check,
            "no SeaBIOS: guests cannot start from a disk the old way (a kernel given directly needs no firmware)",
            "as root: apt-get install seabios",
        ),
    }
}

/// Firmware for guests that start with UEFI.
pub(super) fn ovmf(host: &Host) -> Finding {
    let check = "ovmf";
    let code = ["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE.fd"];
    let variables = ["/usr/share/OVMF/OVMF_VARS_4M.fd", "/usr/share/OVMF/OVMF_VARS.fd"];
    match (find(host, &code), find(host, &variables)) {
        (Some(file), Some(_)) => Finding::ok(check, file),
        _ => Finding::missing(
            check,
            "no OVMF: guests cannot start with UEFI (a kernel given directly needs no firmware)",
            "as root: apt-get install ovmf",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use crate::host::fake::Fake;

    #[test]
    fn files_of_debian() {
        assert_eq!(
            seabios(&Fake::new().with("/usr/share/seabios/bios-256k.bin", "").host).status,
            Status::Ok
        );
        assert!(seabios(&Fake::new().host).remedy.is_some_and(|remedy| remedy.ends_with("seabios")));
        let half = Fake::new().with("/usr/share/OVMF/OVMF_CODE_4M.fd", "");
        assert_eq!(ovmf(&half.host).status, Status::Missing, "without its variables");
        assert_eq!(ovmf(&half.with("/usr/share/OVMF/OVMF_VARS_4M.fd", "").host).status, Status::Ok);
    }
}
