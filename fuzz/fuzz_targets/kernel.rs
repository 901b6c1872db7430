//! Kernel images: bzImage and ELF headers, notes, segments.
#![no_main]

use libfuzzer_sys::fuzz_target;
use machine::kernel::{E820, KernelSpec, Tables, load};
use memory::{Backing, GuestMemory, Layout};
use std::io::Write;

fuzz_target!(|image: &[u8]| {
    let (Ok(mut file), Ok(layout)) = (tempfile::NamedTempFile::new(), Layout::pc(64 << 20, 1 << 31)) else { return };
    let Ok(memory) = GuestMemory::new(&layout, &Backing::Anonymous, false) else { return };
    if file.write_all(image).is_err() {
        return;
    }
    let ram = E820 { start: 1 << 20, len: 63 << 20, kind: E820::RAM };
    let spec = KernelSpec { kernel: file.path().into(), ..KernelSpec::default() };
    let _ = load(&spec, &memory, &Tables { rsdp: None, e820: vec![ram] });
});
