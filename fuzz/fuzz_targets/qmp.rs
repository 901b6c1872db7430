//! What a QMP client sends: framing does not depend on how the bytes arrive.
#![no_main]

use libfuzzer_sys::fuzz_target;
use monitor::qmp::Framer;

fuzz_target!(|bytes: &[u8]| {
    let (mut whole, mut split) = (Vec::new(), Vec::new());
    Framer::default().feed(bytes, |f| whole.push(f));
    let mut framer = Framer::default();
    for b in bytes {
        framer.feed(std::slice::from_ref(b), |f| split.push(f));
    }
    assert_eq!(whole, split);
});
