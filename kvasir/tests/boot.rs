//! Boots an unmodified Debian kernel on the software CPU: boards, entry points, vCPUs, ends.
#![allow(clippy::unwrap_used)] // a test that cannot set itself up may panic

mod common;

use common::{READY, Run, guest, kvasir};
use std::process::Stdio;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(300);

/// Boots the test guest with `test=` on its command line, and more arguments.
fn boot(kernel: &str, test: &str, more: &[&str]) -> Run {
    let (kernel, initrd) = (guest(kernel), guest("initramfs.cpio"));
    let append = format!("console=ttyS0 quiet panic=-1 kvasir.test={test}");
    let mut args =
        vec!["run", "--accel", "soft", "--kernel", &kernel, "--initrd", &initrd, "--append", &append];
    args.extend(more);
    let mut command = kvasir(&args);
    command.stdin(Stdio::piped());
    Run::start(command, LIMIT)
}

fn boots_and_powers_off(kernel: &str, more: &[&str]) {
    let end = boot(kernel, "poweroff", more).finish();
    assert!(end.stdout.contains(READY), "{}\n{}", end.stdout, end.stderr);
    assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
    assert!(end.stderr.contains("software CPU"), "says which accelerator: {}", end.stderr);
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn q35_bzimage() {
    boots_and_powers_off("bzImage", &["--machine", "q35"]);
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn q35_bzimage_32_bit_entry() {
    boots_and_powers_off("bzImage", &["--entry", "32"]);
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn q35_two_vcpus() {
    let end = boot("vmlinux", "report", &["--cpus", "2,sockets=2"]).finish();
    assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
    for fact in ["CPUS 2", "TOPOLOGY 2 sockets", "ACPI FACP", "ACPI MCFG", "QEMU/Standard PC"] {
        assert!(end.stdout.contains(fact), "{fact}: {}", end.stdout);
    }
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn processor_models_and_topology_are_as_asked() {
    for (model, brand) in [("Nehalem,-pcid", "Nehalem Class Core i7"), ("EPYC", "AMD EPYC Processor")] {
        let end =
            boot("vmlinux", "report", &["--cpu", model, "--cpus", "4,sockets=1,cores=2,threads=2"]).finish();
        assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
        for fact in [brand, "CPUS 4", "TOPOLOGY 1 sockets 2 cores", "HYPERVISOR KVM"] {
            assert!(end.stdout.contains(fact), "{model}: {fact}: {}", end.stdout);
        }
    }
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn microvm_pvh() {
    boots_and_powers_off("vmlinux", &["--machine", "microvm"]);
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn microvm_two_vcpus_bzimage() {
    let end = boot("bzImage", "report", &["--machine", "microvm", "--cpus", "2"]).finish();
    assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
    assert!(end.stdout.contains("CPUS 2"), "{}", end.stdout);
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn ram_above_the_hole() {
    let end = boot("vmlinux", "report", &["--memory", "5G"]).finish();
    assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
    let kib: u64 =
        end.stdout.split("MEM ").nth(1).and_then(|t| t.split_whitespace().next()).unwrap().parse().unwrap();
    assert!(kib > (4 << 20) + (1 << 19), "{kib} KiB");
}

fn disk(machine: &str) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(32 << 20).unwrap();
    let path = image.path().to_str().unwrap();
    let disk = format!("{path},format=raw");
    let end = boot("vmlinux", "disk", &["--machine", machine, "--disk", &disk]).finish();
    assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
    assert!(end.stdout.contains("DISK-RESULT ok"), "{}", end.stdout);
    assert!(end.stdout.contains("DISK-SIZE 33554432"), "{}", end.stdout);
    // The guest discarded the first megabyte and wrote random bytes to the others: the host sees the same.
    let bytes = std::fs::read(path).unwrap();
    assert!(bytes[..1 << 20].iter().all(|b| *b == 0));
    assert!(bytes[2 << 20..3 << 20].iter().any(|b| *b != 0));
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn disk_on_pci() {
    disk("q35");
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn disk_on_mmio() {
    disk("microvm");
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn devices_are_found() {
    let devices = ["--device", "virtio-rng-pci", "--device", "pvpanic"];
    let end = boot("vmlinux", "report", &devices).finish();
    assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
    assert!(end.stdout.contains("driver virtio_rng"), "{}", end.stdout);
    assert!(end.stdout.contains("HWRNG 16 bytes"), "{}", end.stdout);
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn a_reset_restarts_or_ends_the_run() {
    let end = boot("vmlinux", "reboot", &["--no-reboot"]).finish();
    assert_eq!(end.status, Some(3), "{}\n{}", end.stdout, end.stderr);
    let end = boot("vmlinux", "panic", &["--no-reboot"]).finish();
    assert_eq!(end.status, Some(3), "{}\n{}", end.stdout, end.stderr);

    let mut twice = boot("vmlinux", "reboot", &["--machine", "microvm"]);
    twice.wait_for(READY);
    let first = READY.to_owned();
    // The second boot prints the line again.
    while !twice.seen_twice(&first) {
        twice.more();
    }
    twice.send(b"\x01x");
    assert_eq!(twice.finish().status, Some(0));
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn the_shell_answers_and_ctrl_a_x_quits() {
    let mut shell = boot("vmlinux", "", &[]);
    shell.wait_for("# ");
    shell.send(b"echo $((6*7))-$(uname -m)\n");
    shell.wait_for("42-x86_64");
    shell.send(b"\x01x");
    assert_eq!(shell.finish().status, Some(0));
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn the_power_button_is_heard() {
    for machine in ["q35", "microvm"] {
        let mut idle = boot("vmlinux", "button", &["--machine", machine]);
        idle.wait_for("BUTTON-WAIT");
        // The guest says so shortly before it listens.
        idle.wait_doing("POWER-BUTTON", |run| run.send(b"\x01p"));
        let end = idle.finish();
        assert!(end.stdout.contains("POWER-BUTTON"), "{machine}: {}", end.stdout);
        assert_eq!(end.status, Some(0));
    }
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn the_interpreter_alone_boots_both_boards() {
    for machine in ["q35", "microvm"] {
        let (kernel, initrd) = (guest("vmlinux"), guest("initramfs.cpio"));
        let args = [
            "run",
            "--accel",
            "soft,translate=off",
            "--machine",
            machine,
            "--cpus",
            "2",
            "--kernel",
            &kernel,
        ];
        let append = "console=ttyS0 quiet panic=-1 kvasir.test=report";
        let end =
            Run::start(kvasir(&[&args[..], &["--initrd", &initrd, "--append", append]].concat()), LIMIT)
                .finish();
        assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
        assert!(end.stdout.contains("CPUS 2"), "{}", end.stdout);
    }
}
