use super::*;
use ::display::{Displays, Rect};
use bus::virtio::testing::ram;

struct Bench {
    adapter: Arc<Mutex<Adapter>>,
    memory: GuestMemory,
    displays: Displays,
}

fn bench() -> Bench {
    let gpu = Gpu::new(&Spec { max_outputs: 2, ..Spec::default() });
    let displays = Displays::new().unwrap();
    for i in 0..2 {
        let console = displays.add("gpu", Arc::new(Head::new(gpu.adapter.clone(), i)));
        gpu.lock().set_console(i, console);
    }
    Bench { adapter: gpu.adapter, memory: ram(), displays }
}

impl Bench {
    /// Runs a command; returns the answer's type and body.
    fn run(&self, kind: u32, words: &[u32]) -> (u32, Vec<u8>) {
        let mut raw = vec![0; 24];
        raw[..4].copy_from_slice(&kind.to_le_bytes());
        words.iter().for_each(|w| raw.extend(w.to_le_bytes()));
        let mut rest = &raw[..];
        let mut fetch = |buf: &mut [u8]| {
            let Some((now, later)) = rest.split_at_checked(buf.len()) else {
                return Err(QueueError::TooShort);
            };
            buf.copy_from_slice(now);
            rest = later;
            Ok(())
        };
        let out = command::run(&mut self.adapter.lock().unwrap(), &mut fetch, &self.memory).unwrap();
        (u32::from_le_bytes(out[..4].try_into().unwrap()), out[24..].to_vec())
    }
}

#[test]
fn a_picture_reaches_the_screen() {
    let b = bench();
    let at = 0x1000u64;
    let (ok, info) = b.run(0x100, &[]);
    assert_eq!((ok, info.len()), (0x1101, 16 * 24));
    assert_eq!(info[8..12], 1280u32.to_le_bytes());
    assert_eq!(b.run(0x101, &[1, 2, 64, 32]).0, 0x1100);
    assert_eq!(b.run(0x101, &[1, 2, 64, 32]).0, 0x1203, "taken");
    assert_eq!(b.run(0x101, &[2, 99, 64, 32]).0, 0x1205, "no such format");
    assert_eq!(b.run(0x101, &[2, 2, 16384, 16384]).0, 0x1201, "more than there is memory for");
    assert_eq!(b.run(0x106, &[1, 2, at as u32, 0, 4096, 0, at as u32 + 4096, 0, 4096, 0]).0, 0x1100);
    b.memory.fill(at, 8192, 0x55).unwrap();
    assert_eq!(b.run(0x105, &[0, 0, 64, 32, 0, 0, 1, 0]).0, 0x1100);
    assert_eq!(b.run(0x105, &[0, 0, 64, 33, 0, 0, 1, 0]).0, 0x1205, "outside");
    assert_eq!(b.run(0x105, &[0, 1, 64, 31, 4096, 0xffff_ffff, 1, 0]).0, 0x1205, "past the backing");
    assert_eq!(b.run(0x103, &[0, 0, 64, 32, 0, 1]).0, 0x1100);
    assert_eq!(b.run(0x103, &[8, 0, 64, 32, 0, 1]).0, 0x1205);
    assert_eq!(b.run(0x103, &[0, 0, 64, 32, 2, 1]).0, 0x1202);
    let console = b.displays.console(0).unwrap();
    let frame = console.capture().unwrap();
    assert_eq!((frame.width(), frame.row(31)[63]), (64, 0x55_5555));
    // Only what is flushed is drawn.
    let viewer = console.watch(|| {});
    console.refresh();
    viewer.news(|n| n.damage.take(frame.bounds()));
    b.memory.write(at + 4 * 64 * 3, &[1, 2, 3, 4]).unwrap();
    b.run(0x105, &[0, 3, 64, 1, 4 * 64 * 3, 0, 1, 0]);
    console.refresh();
    assert!(viewer.news(|n| n.damage.is_empty()));
    assert_eq!(b.run(0x104, &[0, 3, 16, 1, 1, 0]).0, 0x1100);
    console.refresh();
    assert_eq!(viewer.news(|n| n.damage.take(frame.bounds())), [Rect::new(0, 3, 16, 1)]);
    assert_eq!(console.canvas().frame().row(3)[0], 0x03_0201);
    // The pointer, and its end.
    assert_eq!(b.run(0x300, &[0, 5, 5, 0, 1, 3, 3, 0]).0, 0x1100);
    console.refresh();
    assert_eq!(console.canvas().cursor().unwrap().hot, (3, 3));
    let saved = b.adapter.lock().unwrap().save();
    let other = bench();
    other.adapter.lock().unwrap().load(saved).unwrap();
    assert_eq!(other.displays.console(0).unwrap().capture().unwrap().row(3)[0], 0x03_0201);
    assert_eq!(b.run(0x102, &[1]).0, 0x1100);
    assert_eq!(console.capture().unwrap().row(3)[0], 0, "what showed it is dark");
}

#[test]
fn monitors_and_nonsense() {
    let b = bench();
    let (ok, body) = b.run(0x10a, &[0, 0]);
    assert_eq!((ok, body.len()), (0x1104, 1032));
    assert_eq!(body[8..16], [0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
    assert_eq!(b.run(0x10a, &[7, 0]).0, 0x1202);
    assert_eq!(b.run(0x777, &[]).0, 0x1200);
    assert_eq!(b.run(0x101, &[1]).0, 0x1205, "cut off");
    assert_eq!(b.run(0x106, &[9, 0xffff_ffff]).0, 0x1203);
    assert!(!b.displays.console(0).unwrap().suggest_size(800, 600), "nobody drives it");
}
