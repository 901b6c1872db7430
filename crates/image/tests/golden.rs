//! The same command lines given to `qemu-img` and to this tool print the same and exit alike.
//!
//! Skipped, with a note, where `qemu-img` is not installed (or is too old to print the same). `KVASIR_QEMU_BIN` names the
//! directory it is in.
#![allow(clippy::unwrap_used)] // a test that cannot be set up fails

use std::{
    path::{Path, PathBuf},
    process::Command,
};

fn reference() -> Option<PathBuf> {
    let path = match std::env::var_os("KVASIR_QEMU_BIN") {
        Some(dir) => Path::new(&dir).join("qemu-img"),
        None => "qemu-img".into(),
    };
    let version = Command::new(&path).arg("--version").output().ok().filter(|o| o.status.success());
    let text = version.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let major =
        text.split("version ").nth(1).and_then(|v| v.split('.').next()).and_then(|v| v.parse::<u32>().ok());
    match major {
        Some(10) => Some(path),
        other => {
            eprintln!("qemu-img 10 is not installed (found {other:?}): the comparison with it is skipped");
            None
        }
    }
}

/// This tool, under the name that makes it behave as `qemu-img`.
fn own(dir: &Path) -> PathBuf {
    let mut tool = std::env::current_exe().unwrap();
    tool.pop();
    tool.pop();
    tool.push("examples/kvasir-image");
    assert!(tool.exists(), "the example program is built with the tests: {}", tool.display());
    let link = dir.join("qemu-img");
    std::os::unix::fs::symlink(tool, &link).unwrap();
    link
}

/// What differs between any two runs: times, and how much of a file the host holds.
fn settle(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let line = match line {
            l if l.trim_start().starts_with("disk size:") => "disk size",
            l if l.contains("\"actual-size\"") => "actual-size",
            l if l.contains("\"date-") => "date",
            l if l.starts_with("Run completed in") => "run completed",
            l => l,
        };
        out.push_str(line);
        out.push('\n');
    }
    out
}

fn without_dates(text: &str) -> String {
    // Snapshot rows: id, tag, size, unit, date, time, clock, icount.
    text.lines()
        .map(|l| {
            let mut words: Vec<&str> = l.split_whitespace().collect();
            if words.len() == 8 && words[4].len() == 10 && words[5].len() == 8 {
                words[4] = "date";
                words[5] = "time";
                return words.join(" ");
            }
            l.to_owned()
        })
        .collect::<Vec<_>>()
        .join("\n")
}

fn run(tool: &Path, dir: &Path, line: &str) -> (Option<i32>, String, String) {
    let args: Vec<&str> = line.split_whitespace().map(|a| if a == "''" { "" } else { a }).collect();
    let output = Command::new(tool).args(args).current_dir(dir).output().unwrap();
    let text = |b: &[u8]| without_dates(&settle(&String::from_utf8_lossy(b)));
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn same_command_lines_print_the_same() {
    let Some(reference) = reference() else { return };
    let dir = tempfile::tempdir().unwrap();
    let own = own(dir.path());
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    for d in [&a, &b] {
        std::fs::create_dir(d).unwrap();
        let mut bytes = vec![b'a'; 300_000];
        bytes.resize(10 << 20, 0);
        bytes[5_000_000..5_000_005].copy_from_slice(b"hello");
        std::fs::write(d.join("src"), bytes).unwrap();
    }
    for line in include_str!("golden.txt").lines().filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let (code, out, err) = run(&reference, &a, line);
        let (own_code, own_out, own_err) = run(&own, &b, line);
        assert_eq!(
            (own_code, &own_out),
            (code, &out),
            "qemu-img {line}\nqemu's errors: {err}\nown errors: {own_err}"
        );
        assert_eq!(own_err.is_empty(), err.is_empty(), "qemu-img {line}: {err} | {own_err}");
    }
}

#[test]
fn options_that_qemu_has_are_understood() {
    let dir = tempfile::tempdir().unwrap();
    let own = own(dir.path());
    for command in [
        "amend", "bench", "bitmap", "check", "commit", "compare", "convert", "create", "dd", "info", "map",
        "measure", "rebase", "resize", "snapshot", "serve",
    ] {
        let (code, out, _) = run(&own, dir.path(), &format!("{command} --help"));
        assert_eq!(code, Some(0), "{command}");
        assert!(out.contains("Usage:"), "{command}");
    }
}
