//! Boots through unmodified firmware, SeaBIOS and OVMF, and GRUB, on the software CPU.
#![allow(clippy::unwrap_used)] // a test that cannot set itself up may panic

mod common;

use common::{READY, Run, guest, kvasir, run};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(600);

const GRUB_CONFIG: &str = "serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
set timeout=0
menuentry kvasir {
  linux /vmlinuz console=ttyS0 quiet panic=-1 kvasir.test=poweroff
  initrd /initrd
}
";

/// A disk image, also a CD-ROM, that GRUB boots the test guest from, by BIOS and by UEFI.
fn rescue_image(directory: &Path) -> PathBuf {
    let tree = directory.join("tree");
    std::fs::create_dir_all(tree.join("boot/grub")).unwrap();
    std::fs::copy(guest("bzImage"), tree.join("vmlinuz")).unwrap();
    std::fs::copy(guest("initramfs.cpio"), tree.join("initrd")).unwrap();
    std::fs::write(tree.join("boot/grub/grub.cfg"), GRUB_CONFIG).unwrap();
    let image = directory.join("rescue.iso");
    let made = Command::new("grub-mkrescue").arg("-o").args([&image, &tree]).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    image
}

fn boots_from_disk(more: &[&str]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let image = rescue_image(directory.path());
    let disk = format!("{},read-only,format=raw", image.display());
    let mut args = vec!["run", "--accel", "soft", "--disk", &disk];
    args.extend(more);
    let mut command = kvasir(&args);
    command.stdin(Stdio::piped());
    let end = Run::start(command, LIMIT).finish();
    assert!(end.stdout.contains(READY), "{}\n{}", end.stdout, end.stderr);
    assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
    end.stdout
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn seabios_q35() {
    let text = boots_from_disk(&["--machine", "q35"]);
    assert!(text.contains("SeaBIOS (version"), "{text}");
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn seabios_pc() {
    let text = boots_from_disk(&["--machine", "pc", "--cpus", "2"]);
    assert!(text.contains("SeaBIOS (version"), "{text}");
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn ovmf_q35() {
    let directory = tempfile::tempdir().unwrap();
    let vars = directory.path().join("vars.fd");
    let firmware = format!("uefi,vars={}", vars.display());
    boots_from_disk(&["--firmware", &firmware]);
    let template = std::fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd").unwrap();
    let kept = std::fs::read(&vars).unwrap();
    assert_eq!(kept.len(), template.len());
    assert!(kept != template, "the firmware has stored variables");
}

#[test]
fn nothing_to_boot() {
    let end = run(&["run", "--accel", "soft", "--firmware", "none"]);
    assert_eq!(end.status, Some(2), "{}", end.stderr);
    assert!(end.stderr.contains("nothing to boot"), "{}", end.stderr);
    let end = run(&["run", "--accel", "soft", "--boot", "order=x"]);
    assert_eq!(end.status, Some(2), "{}", end.stderr);
    assert!(end.stderr.contains("no device kind 'x'"), "{}", end.stderr);
}
