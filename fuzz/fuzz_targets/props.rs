//! Property bags from text.
#![no_main]

use base::props::Bag;
use libfuzzer_sys::fuzz_target;
use machine::blueprint::MemorySpec;

fuzz_target!(|text: &str| {
    if let Ok(bag) = Bag::parse(text, "driver") {
        let _ = bag.spec::<MemorySpec>();
    }
    let _ = memory::parse_size(text, 'M');
});
