//! What the tests of the block layer share.
#![allow(dead_code)] // each test program uses a part

use std::{path::Path, process::Command};

pub mod siblings;

/// A program of QEMU's, from `KVASIR_QEMU_BIN` or the path; `None` (with a note) where it is not installed.
pub fn qemu(program: &str) -> Option<Command> {
    let path = match std::env::var_os("KVASIR_QEMU_BIN") {
        Some(dir) => Path::new(&dir).join(program),
        None => program.into(),
    };
    match Command::new(&path).arg("--version").output() {
        Ok(o) if o.status.success() => Some(Command::new(path)),
        _ => {
            eprintln!("{program} is not installed: the comparison with it is skipped");
            None
        }
    }
}

/// Runs `qemu-img` and returns what it printed; panics if it fails.
pub fn qemu_img(args: &[&str]) -> Option<String> {
    let output = qemu("qemu-img")?.args(args).output().expect("qemu-img runs");
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Small fast random numbers, the same on every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Compressible bytes that differ from call to call.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let (a, b) = (self.next() as u8, self.below(200) as usize + 3);
        (0..len).map(|i| a.wrapping_add((i / b) as u8) | 1).collect()
    }
}
