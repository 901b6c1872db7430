//! Hard work on the software CPU with two vCPUs: code that changes itself, processes, mappings, vector registers, faults, and a C
//! compiler whose object files are those it makes on the host. `cargo xtask stress --scale N` runs the same for longer.
#![allow(clippy::unwrap_used)] // a test that cannot set itself up may panic

mod common;

use common::{Run, guest, kvasir};
use std::path::PathBuf;
use std::time::Duration;

/// A file beside the test guest's directory.
fn stress(name: &str) -> PathBuf {
    let path = PathBuf::from(guest("vmlinux")).parent().unwrap().parent().unwrap().join("stress").join(name);
    assert!(path.exists(), "{} is missing: run 'cargo xtask guest'", path.display());
    path
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn results_under_stress_are_right() {
    let initrd = stress("initramfs.cpio");
    let args = ["run", "--accel", "soft", "--cpus", "2", "--memory", "1G", "--no-reboot"];
    let append = "console=ttyS0 quiet panic=-1 rdinit=/stress/init";
    let (kernel, initrd) = (guest("vmlinux"), initrd.to_str().unwrap());
    let more = ["--kernel", &kernel, "--initrd", initrd, "--append", append];
    let end = Run::start(kvasir(&[&args[..], &more].concat()), Duration::from_secs(600)).finish();
    assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
    for what in ["patch", "forks", "maps", "vectors", "clocks", "faults", "compile", "together"] {
        assert!(end.stdout.contains(&format!("STRESS-OK {what}")), "{what}: {}", end.stdout);
    }
    for line in std::fs::read_to_string(stress("expected")).unwrap().lines() {
        assert!(end.stdout.contains(line), "{line}: {}", end.stdout);
    }
}
