//! Bad input: one line that names the file or option and the remedy, exit status 2.
#![allow(clippy::unwrap_used)] // a test that cannot set itself up may panic

mod common;

use common::run;

fn refused(args: &[&str], words: &[&str]) {
    let mut all = vec!["run", "--accel", "soft"];
    all.extend(args);
    let end = run(&all);
    assert_eq!(end.status, Some(2), "{args:?}\n{}", end.stderr);
    let last = end.stderr.lines().last().unwrap_or_default();
    assert!(last.starts_with("kvasir: "), "{args:?}: {}", end.stderr);
    for word in words {
        assert!(last.contains(word), "{args:?}: no '{word}' in: {last}");
    }
    assert_eq!(end.stdout, "", "{args:?}");
}

fn kernel_file(bytes: &[u8]) -> (tempfile::NamedTempFile, String) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    (file, path)
}

#[test]
fn kernels() {
    refused(&["--firmware", "none"], &["--kernel"]);
    refused(&["--kernel", "/nonexistent/vmlinuz"], &["/nonexistent/vmlinuz", "No such file"]);
    let (_keep, path) = kernel_file(b"hello");
    refused(&["--kernel", &path], &[&path, "too short"]);
    let mut arm = vec![0; 4096];
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    let (_keep, path) = kernel_file(&arm);
    refused(&["--kernel", &path], &[&path, "arm64"]);
}

#[test]
fn machine_options() {
    let (_keep, kernel) = kernel_file(&[0; 4096]);
    let refused = |args: &[&str], words: &[&str]| {
        let mut all = vec!["--kernel", kernel.as_str()];
        all.extend(args);
        refused(&all, words);
    };
    refused(&["--machine", "q53"], &["unknown machine 'q53'", "did you mean 'q35'?"]);
    refused(&["--machine", "q35,hpte=on"], &["hpte", "did you mean 'hpet'?"]);
    refused(&["--memory", "12Q"], &["12Q", "512M"]);
    refused(&["--memory", "4K"], &["too small"]);
    refused(&["--memory", "1G,hugepages=on,hugepagesize=3M"], &["power of two"]);
    refused(&["--cpus", "999"], &["999", "maximum is 64"]);
    refused(&["--cpus", "5,sockets=2"], &["not cpus (5)"]);
    refused(&["--device", "virtio-rgn-pci"], &["unknown device", "did you mean 'virtio-rng-pci'?"]);
    refused(&["--device", "virtio-rng-pci,max-bites=1"], &["max-bites", "did you mean 'max-bytes'?"]);
    refused(&["--device", "virtio-blk-pci,drive=nope"], &["nope"]);
    refused(&["--machine", "microvm", "--device", "virtio-rng-pci"], &["no PCI bus", "virtio-rng-device"]);
    refused(&["--disk", "/nonexistent/disk.raw"], &["/nonexistent/disk.raw"]);
    refused(&["--serial", "tty"], &["--serial tty", "stdio"]);
    refused(&["--chardev", "fil,id=c"], &["fil", "did you mean 'file'?"]);
}

#[test]
fn processors() {
    let (_keep, kernel) = kernel_file(&[0; 4096]);
    let refused = |cpu: &str, words: &[&str]| refused(&["--kernel", &kernel, "--cpu", cpu], words);
    refused("Skylake-Sever", &["Skylake-Sever", "'Skylake-Server'"]);
    refused("x86-64-v2,+avx512f", &["avx512f", "CPUID.7H", "enforce=off"]);
    refused("Skylake-Server,enforce", &["avx512bw", "avx512f"]);
    refused("host,+nonsense", &["nonsense", "--cpu help"]);
    refused("host,vendor=x", &["vendor=x", "12 characters"]);
    let help = run(&["run", "--accel", "soft", "--cpu", "help"]);
    assert_eq!(help.status, Some(0));
    assert!(help.stdout.contains("EPYC-Milan") && help.stdout.contains("avx512f"), "{}", help.stdout);
}

#[test]
fn accelerators() {
    let end = run(&["run", "--accel", "kwm", "--kernel", "/dev/null"]);
    assert_eq!(end.status, Some(2));
    assert!(
        end.stderr.contains("unknown accelerator 'kwm'") && end.stderr.contains("'kvm'"),
        "{}",
        end.stderr
    );
    let end = run(&["run", "--accel", "soft,cahce=1M", "--kernel", "/dev/null"]);
    assert_eq!(end.status, Some(2), "{}", end.stderr);
}

#[test]
fn a_disk_in_use_is_refused() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let path = image.path().to_str().unwrap();
    let options = block::OpenOptions { format: Some("raw".into()), exclusive: true, ..Default::default() };
    let _held = block::Image::open(path, &options).unwrap();
    let (_keep, kernel) = kernel_file(&[0; 4096]);
    refused(&["--kernel", &kernel, "--disk", &format!("{path},format=raw")], &[path, "lock"]);
}

#[test]
fn help_comes_from_the_models() {
    let end = run(&["run", "--device", "help"]);
    assert_eq!(end.status, Some(0), "{}", end.stderr);
    assert!(end.stdout.contains("virtio-blk-pci") && end.stdout.contains("isa-debug-exit"), "{}", end.stdout);
    let end = run(&["run", "--device", "virtio-blk-pci,help"]);
    assert_eq!(end.status, Some(0), "{}", end.stderr);
    assert!(end.stdout.contains("num-queues=<int>"), "{}", end.stdout);
}

#[test]
fn doctor_prints_json() {
    let end = run(&["doctor", "--json"]);
    assert_eq!(end.status, Some(0), "{}", end.stderr);
    assert!(serde_json::from_str::<serde_json::Value>(&end.stdout).is_ok(), "{}", end.stdout);
}

#[test]
fn the_image_tool_is_inside_and_answers_to_its_other_names() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.qcow2");
    let image = image.to_str().unwrap();
    let end = run(&["image", "create", "-f", "qcow2", image, "1G"]);
    assert_eq!(end.status, Some(0), "{}", end.stderr);
    let link = dir.path().join("qemu-img");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_kvasir"), &link).unwrap();
    let info = std::process::Command::new(link).args(["info", "--output=json", image]).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!((&json["format"], &json["virtual-size"]), (&"qcow2".into(), &(1u64 << 30).into()));
}
