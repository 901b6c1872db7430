//! Messages of VNC viewers.
#![no_main]

use display::vnc::{Rx, read_message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut rx = Rx::new(data);
    while read_message(&mut rx).is_ok() {}
});
