use super::*;
use crate::display::testing::Studio;
use crate::{Kind, PciDevice, PciPlace};
use ::display::Console;
use base::props::Bag;
use bus::pci::PciBus;
use bus::{Bus, RegionId, Space};
use proptest::prelude::*;
use std::sync::Arc;

struct Bench {
    device: PciDevice,
    console: Arc<Console>,
    bus: Arc<Bus>,
    _studio: Studio,
}

fn bench() -> Bench {
    let mut studio = Studio::new();
    let Kind::Pci(create) = MODEL.kind else { unreachable!() };
    let bus = Arc::new(Bus::new());
    let place = PciPlace { bus: PciBus::root(bus.clone(), vec![]), slot: 1, function: 0 };
    let device =
        create(&Bag::new("VGA").with("romfile", "").with("vgamem_mb", 4), &mut studio, &place).unwrap();
    for (space, start, len, region) in &device.fixed {
        bus.map_shared(*space, *start, *len, "VGA", device.device.clone(), *region).unwrap();
    }
    let console = studio.displays.console(0).unwrap();
    Bench { device, console, bus, _studio: studio }
}

impl Bench {
    fn out(&self, port: u16, data: &[u8]) {
        self.bus.write(Space::Port, port.into(), data);
    }
    fn indexed(&self, port: u16, index: u8, value: u8) {
        self.out(port, &[index, value]);
    }
    fn vbe(&self, index: u16, value: u16) {
        self.out(0x1ce, &index.to_le_bytes());
        self.out(0x1cf, &value.to_le_bytes());
    }
    fn poke(&self, at: u64, data: &[u8]) {
        self.bus.write(Space::Memory, at, data);
    }
    fn peek(&self, at: u64) -> u8 {
        let mut byte = [0];
        self.bus.read(Space::Memory, at, &mut byte);
        byte[0]
    }
    fn linear(&self, at: u64, data: &[u8]) {
        self.device.device.lock().unwrap().write(RegionId(0), at, data);
    }
    fn pixel(&self, x: u32, y: u32) -> u32 {
        self.console.capture().unwrap().row(y)[x as usize]
    }
    fn size(&self) -> (u32, u32) {
        let frame = self.console.capture().unwrap();
        (frame.width(), frame.height())
    }
}

#[test]
fn text() {
    let b = bench();
    assert_eq!(b.size(), (720, 400));
    for (i, c) in b"Kvasir".iter().enumerate() {
        b.poke(0xb_8000 + 160 + 2 * i as u64, &[*c, 0x1f]);
    }
    assert_eq!(b.console.text().unwrap().lines()[1], "Kvasir");
    assert_eq!(b.pixel(0, 20), 0x00_00aa, "background of attribute 1f");
    assert_eq!(b.peek(0xb_8000 + 160), b'K');
    // A glyph: plane 2, addressed through the window at a0000 without odd/even.
    b.indexed(0x3c4, 2, 4);
    b.indexed(0x3c4, 4, 6);
    b.indexed(0x3ce, 5, 0);
    b.indexed(0x3ce, 6, 4);
    b.poke(0xa_0000 + 32 * u64::from(b'K') + 4, &[0x80]);
    b.indexed(0x3c4, 2, 3);
    b.indexed(0x3c4, 4, 2);
    b.indexed(0x3ce, 5, 0x10);
    b.indexed(0x3ce, 6, 0x0e);
    assert_eq!((b.pixel(0, 20), b.pixel(1, 20)), (0xff_ffff, 0x00_00aa));
    // The cursor.
    b.indexed(0x3d4, 0x0f, 81);
    let screen = b.console.text().unwrap();
    assert_eq!(screen.cursor, Some((1, 1)));
    assert_eq!(b.pixel(9, 16 + 13), 0xff_ffff);
    // Scrolling by the start address.
    b.indexed(0x3d4, 0x0d, 80);
    assert_eq!(b.console.text().unwrap().lines()[0], "Kvasir");
    assert_eq!(b.pixel(0, 4), 0xff_ffff);
}

#[test]
fn planes() {
    let b = bench();
    b.linear(0, &[0; 4096]);
    // BIOS mode 12h: 640 by 480 in 16 colours.
    b.out(0x3c2, &[0xe3]);
    for (i, v) in [3u8, 1, 15, 0, 6].into_iter().enumerate() {
        b.indexed(0x3c4, i as u8, v);
    }
    b.indexed(0x3d4, 0x11, 0);
    let crtc = [
        0x5f, 0x4f, 0x50, 0x82, 0x54, 0x80, 0x0b, 0x3e, 0, 0x40, 0, 0, 0, 0, 0, 0, 0xea, 0x8c, 0xdf, 0x28, 0,
        0xe7, 4, 0xe3, 0xff,
    ];
    for (i, v) in crtc.into_iter().enumerate() {
        b.indexed(0x3d4, i as u8, v);
    }
    for (i, v) in [0u8, 0, 0, 0, 0, 0, 5, 15, 255].into_iter().enumerate() {
        b.indexed(0x3ce, i as u8, v);
    }
    assert_eq!(b.size(), (640, 480));
    // Set/reset draws a pixel in one colour through the bit mask.
    b.poke(0xa_0000, &[0; 4]);
    b.indexed(0x3ce, 0, 5);
    b.indexed(0x3ce, 1, 15);
    b.indexed(0x3ce, 8, 0x40);
    b.peek(0xa_0000 + 80);
    b.poke(0xa_0000 + 80, &[0xff]);
    b.indexed(0x3ce, 1, 0);
    b.indexed(0x3ce, 8, 0xff);
    assert_eq!((b.pixel(0, 1), b.pixel(1, 1), b.pixel(2, 1)), (0, 0xaa_00aa, 0));
    // Read mode 1 finds the pixel of the colour.
    b.indexed(0x3ce, 5, 8);
    b.indexed(0x3ce, 2, 5);
    assert_eq!(b.peek(0xa_0000 + 80), 0x40);
    // Write mode 2 takes the colour from the byte, write mode 1 copies latches.
    b.indexed(0x3ce, 5, 2);
    b.poke(0xa_0000 + 160, &[1]);
    assert_eq!(b.pixel(7, 2), 0x00_00aa);
    b.indexed(0x3ce, 5, 1);
    b.peek(0xa_0000 + 160);
    b.poke(0xa_0000 + 240, &[0]);
    assert_eq!(b.pixel(7, 3), 0x00_00aa);
    // Write mode 3 masks with the byte.
    b.indexed(0x3ce, 5, 3);
    b.indexed(0x3ce, 0, 2);
    b.peek(0xa_0000 + 320);
    b.poke(0xa_0000 + 320, &[0x01]);
    assert_eq!((b.pixel(6, 4), b.pixel(7, 4)), (0, 0x00_aa00));
}

#[test]
fn mode_13h() {
    let b = bench();
    b.linear(0, &[0; 4096]);
    b.indexed(0x3c4, 4, 0x0e);
    b.indexed(0x3c4, 2, 0x0f);
    b.indexed(0x3ce, 5, 0x40);
    b.indexed(0x3ce, 6, 0x05);
    b.indexed(0x3d4, 0x11, 0);
    b.indexed(0x3d4, 0x09, 0x41);
    b.indexed(0x3d4, 0x17, 0xa3);
    b.out(0x3c8, &[200]);
    for part in [63, 0, 1] {
        b.out(0x3c9, &[part]);
    }
    b.poke(0xa_0000 + 320 * 2 + 1, &[200]);
    assert_eq!(b.size(), (640, 400));
    assert_eq!([b.pixel(1, 4), b.pixel(2, 4), b.pixel(3, 5), b.pixel(4, 4)], [0, 0xff_0004, 0xff_0004, 0]);
}

#[test]
fn vbe() {
    let b = bench();
    for (index, value) in [(1, 640), (2, 480), (3, 32), (4, 0x41)] {
        b.vbe(index, value);
    }
    assert_eq!(b.size(), (640, 480));
    b.linear(640 * 4 * 3 + 8, &0x0012_3456u32.to_le_bytes());
    assert_eq!((b.pixel(2, 3), b.pixel(3, 3)), (0x12_3456, 0));
    // Panning, a virtual screen, depths.
    b.vbe(9, 3);
    assert_eq!(b.pixel(2, 0), 0x12_3456);
    for (bpp, bytes) in [(15, 2), (16, 2), (24, 3), (8, 1), (4, 1)] {
        b.vbe(4, 0);
        b.vbe(3, bpp);
        b.vbe(4, 0x41);
        b.linear(640 * bytes, &[0xff, 0xff, 0xff]);
        assert_eq!(b.size(), (640, 480), "{bpp}");
        assert_eq!(b.device.device.lock().unwrap().save().unwrap().version, 1);
    }
    // Modes beyond the memory are cut to it.
    b.vbe(4, 0);
    for (index, value) in [(1, 0xffff), (2, 0xffff), (3, 32), (4, 0xc1)] {
        b.vbe(index, value);
    }
    let (width, height) = b.size();
    assert!(u64::from(width) * u64::from(height) * 4 <= 4 << 20, "{width} by {height}");
}

#[test]
fn only_what_is_written_is_news() {
    let b = bench();
    for (index, value) in [(1, 800), (2, 600), (3, 32), (4, 0x41)] {
        b.vbe(index, value);
    }
    let viewer = b.console.watch(|| {});
    b.console.refresh();
    let all = ::display::Rect::new(0, 0, 800, 600);
    viewer.news(|n| n.damage.take(all));
    b.console.refresh();
    assert!(viewer.news(|n| n.damage.is_empty()));
    b.linear(800 * 4 * 100 + 400, &[1, 2, 3, 0]);
    b.console.refresh();
    assert_eq!(viewer.news(|n| n.damage.take(all)), [::display::Rect::new(96, 100, 16, 1)]);
}

/// An access to a place of the device: space, address, value, length.
fn access() -> impl Strategy<Value = (u8, u64, u64, usize, bool)> {
    let value = prop_oneof![any::<u64>(), 0..0x100u64, Just(u64::MAX), (0..64u32).prop_map(|b| 1 << b)];
    (0..4u8, any::<u64>(), value, prop_oneof![Just(1usize), Just(2), Just(4)], any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_access_leaves_a_picture(accesses in proptest::collection::vec(access(), 1..120)) {
        let b = bench();
        for (place, at, value, size, write) in accesses {
            let value = &value.to_le_bytes()[..size];
            let mut buf = [0; 8];
            let buf = &mut buf[..size];
            let ports = [0x3c0, 0x3c2, 0x3c4, 0x3c5, 0x3c8, 0x3c9, 0x3ce, 0x3cf, 0x3d4, 0x3d5, 0x3da, 0x1ce, 0x1cf];
            let mut on_bus = |space, at| if write { b.bus.write(space, at, value) } else { b.bus.read(space, at, buf) };
            match place {
                0 => on_bus(Space::Port, ports[at as usize % ports.len()]),
                1 => on_bus(Space::Memory, 0xa_0000 + at % 0x2_0000),
                place => {
                    let (region, len) = if place == 2 { (RegionId(2), 4096) } else { (RegionId(0), 4 << 20) };
                    let at = at % (len - size as u64 + 1);
                    let mut device = b.device.device.lock().unwrap();
                    if write { device.write(region, at, value) } else { device.read(region, at, buf) }
                }
            }
        }
        b.console.capture();
        b.console.text();
        let mut device = b.device.device.lock().unwrap();
        let state = device.save().unwrap();
        device.reset();
        device.reset();
        device.load(state.clone()).unwrap();
        prop_assert_eq!(device.save().unwrap(), state);
    }
}
