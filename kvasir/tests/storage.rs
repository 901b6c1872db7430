//! Disks and CD-ROM drives on every controller that the Debian cloud kernel has drivers for: what the guest writes, the
//! host reads, and the other way round.
#![allow(clippy::unwrap_used)] // a test that cannot set itself up may panic

mod common;

use common::{Run, guest, kvasir};
use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(300);

fn boot(test: &str, more: &[&str]) -> common::Finished {
    let (kernel, initrd) = (guest("vmlinux"), guest("initramfs.cpio"));
    let append = format!("console=ttyS0 quiet panic=-1 kvasir.test={test}");
    let mut args =
        vec!["run", "--accel", "soft", "--kernel", &kernel, "--initrd", &initrd, "--append", &append];
    args.extend(more);
    let mut command = kvasir(&args);
    command.stdin(Stdio::piped());
    Run::start(command, LIMIT).finish()
}

/// The board that has the bus.
fn machine(bus: &str) -> &'static str {
    if bus == "ide" { "pc" } else { "q35" }
}

/// The guest writes 16 MiB of random bytes and tells their checksum; then it discards the first megabyte.
fn disk(bus: &str, node: &str) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(32 << 20).unwrap();
    let path = image.path().to_str().unwrap();
    let disk = format!("{path},format=raw,bus={bus},serial=KV-{bus}");
    let end = boot(&format!("disk kvasir.disk={node}"), &["--machine", machine(bus), "--disk", &disk]);
    assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
    for line in ["DISK-RESULT ok", "DISK-SIZE 33554432", "DISK-UNALIGNED", "DISK-VERIFIED 16 MiB"] {
        assert!(end.stdout.contains(line), "{bus}: {line}\n{}", end.stdout);
    }
    let bytes = std::fs::read(path).unwrap();
    assert!(bytes[2 << 20..3 << 20].iter().any(|b| *b != 0), "{bus}");
    assert!(bytes[16 << 20..].iter().all(|b| *b == 0), "{bus}: nothing else was written");
    if end.stdout.contains("DISK-DISCARDED") {
        assert!(bytes[..1 << 20].iter().all(|b| *b == 0), "{bus}");
    }
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn disk_on_virtio_scsi() {
    disk("scsi", "sda");
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn disk_on_ide() {
    disk("ide", "sda");
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn disk_on_nvme() {
    disk("nvme", "nvme0n1");
}

fn cdrom(bus: &str) {
    let mut image = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..3 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    image.write_all(&bytes).unwrap();
    let sum = std::process::Command::new("md5sum").arg(image.path()).output().unwrap().stdout;
    let sum = String::from_utf8(sum).unwrap();
    let sum = sum.split_whitespace().next().unwrap();
    let cd = format!("{},format=raw,bus={bus}", image.path().to_str().unwrap());
    let end = boot("cdrom", &["--machine", machine(bus), "--cdrom", &cd]);
    assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
    for line in ["CDROM-SIZE 3145728", &format!("CDROM-MD5 {sum}"), "CDROM-RESULT ok"] {
        assert!(end.stdout.contains(line), "{bus}: {line}\n{}", end.stdout);
    }
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn cdrom_on_virtio_scsi() {
    cdrom("scsi");
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn cdrom_on_ide() {
    cdrom("ide");
}
