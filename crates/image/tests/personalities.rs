//! `qemu-io` and `qemu-nbd`: what they print, and that QEMU's tools get on with them.
#![allow(clippy::unwrap_used)] // a test that cannot be set up fails

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

/// This tool under another name.
fn own(dir: &Path, name: &str) -> PathBuf {
    let mut tool = std::env::current_exe().unwrap();
    tool.pop();
    tool.pop();
    tool.push("examples/kvasir-image");
    let link = dir.join(name);
    std::os::unix::fs::symlink(tool, &link).unwrap();
    link
}

fn reference(name: &str) -> Option<PathBuf> {
    let path = match std::env::var_os("KVASIR_QEMU_BIN") {
        Some(dir) => Path::new(&dir).join(name),
        None => name.into(),
    };
    let there = Command::new(&path).arg("--version").output().is_ok_and(|o| o.status.success());
    if !there {
        eprintln!("{name} is not installed: the comparison with it is skipped");
    }
    there.then_some(path)
}

fn run(tool: &Path, dir: &Path, args: &[&str]) -> Output {
    Command::new(tool).args(args).current_dir(dir).output().unwrap()
}

/// Standard output without times.
fn text(output: &Output) -> String {
    let all = String::from_utf8_lossy(&output.stdout);
    let lines = all.lines().map(|l| l.split("; ").next().unwrap_or(l));
    lines.collect::<Vec<_>>().join("\n")
}

const SCRIPT: [&str; 17] = [
    "write -P 5 64k 128k",
    "read -v 64k 16",
    "read -P 6 64k 512",
    "read -P 5 -s 512 -l 1k 64k 4k",
    "alloc 0 1M",
    "map",
    "length",
    "write -z 64k 4k",
    "discard 128k 64k",
    "flush",
    "aio_write -P 3 1M 4k",
    "aio_flush",
    "read -P 3 1M 4k",
    "write -c 2M 64k",
    "read 64M 1",
    "writev 0 1k 2k",
    "truncate 128M",
];

#[test]
fn qemu_io_prints_what_qemu_prints() {
    let dir = tempfile::tempdir().unwrap();
    let (img, io) = (own(dir.path(), "qemu-img"), own(dir.path(), "qemu-io"));
    let mut args = vec!["-f", "qcow2"];
    SCRIPT.iter().for_each(|c| args.extend(["-c", c]));
    let mut results = Vec::new();
    for (tool, file) in [(Some(io), "a"), (reference("qemu-io"), "b")] {
        let Some(tool) = tool else { continue };
        assert!(run(&img, dir.path(), &["create", "-q", "-f", "qcow2", file, "64M"]).status.success());
        let mut all = args.clone();
        all.push(file);
        let output = run(&tool, dir.path(), &all);
        results.push((output.status.code(), text(&output)));
    }
    assert_eq!(results[0].0, Some(1), "a verification in it fails");
    assert!(
        results[0].1.contains("Pattern verification failed at offset 65536, 512 bytes"),
        "{}",
        results[0].1
    );
    if let [ours, theirs] = &results[..] {
        assert_eq!(ours, theirs);
    }
    assert!(run(&img, dir.path(), &["check", "a"]).status.success());
}

#[test]
fn qemu_nbd_serves_in_the_background() {
    let dir = tempfile::tempdir().unwrap();
    let (img, nbd) = (own(dir.path(), "qemu-img"), own(dir.path(), "qemu-nbd"));
    let client = reference("qemu-img").unwrap_or_else(|| img.clone());
    assert!(run(&img, dir.path(), &["create", "-q", "-f", "qcow2", "disk", "16M"]).status.success());
    std::fs::write(dir.path().join("source"), vec![7u8; 16 << 20]).unwrap();
    let socket = dir.path().join("s");
    let started =
        run(&nbd, dir.path(), &["-f", "qcow2", "-x", "e", "-k", "s", "--fork", "--pid-file", "pid", "disk"]);
    assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
    let url = format!("nbd+unix:///e?socket={}", socket.display());
    // Without -t the server leaves with this one client.
    let copied = run(&client, dir.path(), &["convert", "-n", "-f", "raw", "-O", "raw", "source", &url]);
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    let begun = Instant::now();
    while dir.path().join("pid").exists() && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let compared = loop {
        let output = run(&client, dir.path(), &["compare", "-f", "raw", "-F", "qcow2", "source", "disk"]);
        // The lock goes with the process, a moment after its number's file.
        if output.status.code() != Some(2) || begun.elapsed() > Duration::from_secs(20) {
            break output;
        }
    };
    assert!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stderr));
    assert!(run(&client, dir.path(), &["check", "disk"]).status.success());
}
