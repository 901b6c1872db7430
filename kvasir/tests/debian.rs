//! A Debian machine made from packages, as the README's reader makes one: firmware, GRUB, systemd, a login over SSH.
#![allow(clippy::unwrap_used)] // a test that cannot set itself up may panic

mod common;

use common::{Run, kvasir};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(900);

fn with_home(args: &[&str], home: &Path) -> Command {
    let mut command = kvasir(args);
    command.env("KVASIR_HOME", home);
    command
}

/// Runs `kvasir` to its end and returns what it printed.
fn done(args: &[&str], home: &Path) -> String {
    let end = Run::start(with_home(args, home), LIMIT).finish();
    assert_eq!(end.status, Some(0), "{args:?}\n{}\n{}", end.stdout, end.stderr);
    end.stdout
}

/// Runs a command in the guest through the printed SSH command, as soon as it lets us in.
fn ssh(command: &str, remote: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(240);
    loop {
        let options = "-o BatchMode=yes -o ConnectTimeout=20";
        let script = format!("{} {remote:?}", command.replacen("ssh ", &format!("ssh {options} "), 1));
        let out = Command::new("sh").args(["-c", &script]).stdin(Stdio::null()).output().unwrap();
        if out.status.success() {
            return String::from_utf8_lossy(&out.stdout).into_owned();
        }
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(Instant::now() < deadline, "{script}: {error}");
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// One after the other: each has a directory of machines of its own, and so they would choose the same port.
static TURN: Mutex<()> = Mutex::new(());

fn debian(name: &str, firmware: &str) {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let home = tempfile::tempdir().unwrap();
    let create = [
        "create",
        name,
        "--from",
        "debian:12",
        "--firmware",
        firmware,
        "--user",
        "ann",
        "--password",
        "se'cret",
        "--disk-size",
        "11G",
        "--cpus",
        "1",
    ];
    let said = done(&create, home.path());
    let login = said.lines().find_map(|l| l.split_once("once it runs: ")).unwrap().1.to_owned();
    assert!(done(&["ls"], home.path()).contains("shut off"));

    let mut command = with_home(&["start", name, "--", "--accel", "soft"], home.path());
    command.stdin(Stdio::piped());
    let mut run = Run::start(command, LIMIT);
    run.wait_for(&format!("{name} login:"));
    assert!(done(&["ls", "--json"], home.path()).contains("\"running\""));
    // The password works on the console.
    run.send(b"ann\n");
    run.wait_for("Password:");
    run.send(b"se'cret\n");
    run.wait_for("ann@");

    let facts = ssh(
        &login,
        "hostname; id -un; sudo id -un; df --output=size -BG / | tail -n 1; systemctl is-system-running; ls -d /sys/firmware/efi 2>/dev/null; true",
    );
    let facts: Vec<_> = facts.lines().map(str::trim).collect();
    assert_eq!(facts[..3], [name, "ann", "root"], "{facts:?}");
    let gib: u32 = facts[3].trim_end_matches('G').parse().unwrap();
    assert!(gib >= 10, "the file system fills the disk: {facts:?}");
    assert_eq!(facts.contains(&"/sys/firmware/efi"), firmware == "uefi", "{facts:?}");

    ssh(&login, "sudo systemctl --no-block poweroff");
    let end = run.finish();
    assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
    done(&["rm", name], home.path());
    assert_eq!(done(&["ls", "-q"], home.path()), "");
}

#[test]
#[ignore = "makes a disk from Debian's packages"]
fn debian_under_bios() {
    debian("deb-bios", "bios");
}

#[test]
#[ignore = "makes a disk from Debian's packages"]
fn debian_under_uefi() {
    debian("deb-uefi", "uefi");
}
