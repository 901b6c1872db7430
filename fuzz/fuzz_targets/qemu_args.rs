//! QEMU's command line: arguments are separated by line ends.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let args: Vec<&str> = text.lines().filter(|a| !a.contains("readconfig")).collect();
    let _ = qemu::parse(&args);
});
