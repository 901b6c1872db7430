//! Frames of a hostile guest on the user-mode network: each is a length in two bytes and that many bytes.
//! Restricted, so that nothing leaves this process.
#![no_main]

use libfuzzer_sys::fuzz_target;
use net::user::{Spec, UserPort};
use net::{Frame, Offloads, Port, Receiver, Room};

struct Nowhere<'a>(Room<'a>);

impl Receiver for Nowhere<'_> {
    fn reserve(&mut self, len: usize) -> Option<&Room<'_>> {
        assert!(len <= self.0.len());
        Some(&self.0)
    }

    fn commit(&mut self, len: usize) {
        assert!(len <= self.0.len());
    }

    fn largest(&self) -> usize {
        self.0.len()
    }
}

fuzz_target!(|data: &[u8]| {
    let spec = Spec {
        restrict: true,
        tftp: Some("/var/empty".into()).filter(|p: &std::path::PathBuf| p.is_dir()),
        ..Spec::default()
    };
    let Ok(mut port) = UserPort::new(&spec) else { return };
    let mut memory = vec![0; 1 << 17];
    let mut to = Nowhere(Room::of(&mut memory));
    if port.set_offloads(Offloads::all()).is_err() {
        return;
    }
    let mut rest = data;
    while let Some((len, more)) = rest.split_first_chunk::<2>() {
        let n = usize::from(u16::from_le_bytes(*len)).min(more.len());
        port.send(&Frame::of(&more[..n]));
        let _ = port.receive(&mut to);
        rest = &more[n..];
    }
});
