//! Each image format by name, whatever its signature: headers, tables, logs and descriptors, read, checked, repaired and written.
#![no_main]

use block::{
    Image, OpenOptions, Options,
    formats::{FORMATS, Repair},
    storage::MemoryStorage,
};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

fuzz_target!(|bytes: &[u8]| {
    let Some((&choice, bytes)) = bytes.split_first() else { return };
    let driver = FORMATS[usize::from(choice) % FORMATS.len()];
    for read_only in [true, false] {
        let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
        let options = OpenOptions {
            read_only,
            no_backing: true,
            // Keys take their time by design; without them headers are still read.
            no_io: matches!(driver.name, "luks"),
            options: Options::new(),
            ..OpenOptions::writer(Some(driver.name))
        };
        let Ok(image) = Image::open_storage(storage, "fuzzed", &options) else { continue };
        if image.size() > 1 << 40 {
            continue;
        }
        let _ = image.info();
        let mut buf = [0; 4096];
        for offset in [0, 65536, image.size() / 2, image.size().saturating_sub(4096)] {
            let _ = image.read_at(&mut buf, offset);
        }
        let mut entries = Vec::new();
        let _ = image.map(0, image.size(), &mut entries);
        let _ = image.format().check(Repair::None);
        if !read_only {
            let _ = image.write_at(&[1; 600], 1000);
            let _ = image.write_zeroes(0, image.size().min(1 << 20), true);
            let _ = image.discard(0, image.size().min(1 << 20));
            let _ = image.flush();
            let _ = image.quiesced(|f| f.check(Repair::All));
        }
    }
});
