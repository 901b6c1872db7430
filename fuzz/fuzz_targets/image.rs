//! Disk images of any format: opened read-only, mapped and read.
#![no_main]

use block::{Image, OpenOptions};
use libfuzzer_sys::fuzz_target;
use std::io::Write;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut file) = tempfile::NamedTempFile::new() else { return };
    if file.write_all(bytes).is_err() {
        return;
    }
    let Some(name) = file.path().to_str() else { return };
    let options = OpenOptions { no_backing: true, ..OpenOptions::reader(None) };
    if let Ok(image) = Image::open(name, &options) {
        let mut buf = [0; 4096];
        for offset in [0, 65536, image.size().saturating_sub(4096)] {
            let _ = image.read_at(&mut buf, offset);
        }
    }
});
