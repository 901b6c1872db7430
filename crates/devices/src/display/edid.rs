//! What a monitor says of itself (VESA Enhanced EDID Standard, release A, revision 2; EDID 1.4).

/// Description of the monitor that a display device pretends to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Monitor {
    /// Preferred width, in pixels.
    pub width: u32,
    /// Preferred height, in pixels.
    pub height: u32,
    /// Number of the head, which makes the serial number.
    pub head: u32,
}

/// Length of an EDID with one extension.
pub const LENGTH: usize = 256;

/// Byte and bit among the established timings.
type Established = Option<(usize, u8)>;

/// Standard timings that are offered: width, height, and (for those that have one) place and bit in the established timings.
const MODES: &[(u32, u32, Established)] = &[
    (640, 480, Some((35, 5))),
    (800, 600, Some((35, 0))),
    (1024, 768, Some((36, 3))),
    (1280, 720, None),
    (1280, 800, None),
    (1280, 1024, None),
    (1440, 900, None),
    (1600, 900, None),
    (1680, 1050, None),
    (1920, 1080, None),
];

/// Aspect ratio code of a standard timing.
fn aspect(width: u32, height: u32) -> Option<u8> {
    let is = |a: u32, b: u32| width * b == height * a;
    match () {
        () if is(16, 10) => Some(0),
        () if is(4, 3) => Some(1),
        () if is(5, 4) => Some(2),
        () if is(16, 9) => Some(3),
        () => None,
    }
}

/// A detailed timing descriptor (3.10.2) with reduced blanking at 60 Hz.
fn detailed(width: u32, height: u32) -> [u8; 18] {
    let (w, h) = (width.clamp(64, 4095), height.clamp(64, 4095));
    let (hblank, vblank) = (160, (h / 32).clamp(12, 255));
    let clock = u64::from(w + hblank) * u64::from(h + vblank) * 60 / 10_000; // in units of 10 kHz
    let clock = clock.min(0xffff) as u16;
    let (hfront, hsync, vfront, vsync) = (48, 32, 3, 6);
    // Millimetres, at 100 dots an inch.
    let (mm_w, mm_h) = (w * 254 / 1000, h * 254 / 1000);
    let mut d = [0; 18];
    d[..2].copy_from_slice(&clock.to_le_bytes());
    d[2] = w as u8;
    d[3] = hblank as u8;
    d[4] = ((w >> 8) << 4 | hblank >> 8) as u8;
    d[5] = h as u8;
    d[6] = vblank as u8;
    d[7] = ((h >> 8) << 4 | vblank >> 8) as u8;
    d[8] = hfront;
    d[9] = hsync;
    d[10] = vfront << 4 | vsync;
    d[12] = mm_w as u8;
    d[13] = mm_h as u8;
    d[14] = ((mm_w >> 8) << 4 | (mm_h >> 8) & 0xf) as u8;
    d[17] = 0x18;
    d
}

fn text(kind: u8, text: &str) -> [u8; 18] {
    let mut d = [b' '; 18];
    d[..5].copy_from_slice(&[0, 0, 0, kind, 0]);
    let bytes = &text.as_bytes()[..text.len().min(13)];
    d[5..5 + bytes.len()].copy_from_slice(bytes);
    if bytes.len() < 13 {
        d[5 + bytes.len()] = b'\n';
    }
    d
}

fn checksum(block: &mut [u8]) {
    let sum = block[..127].iter().fold(0u8, |a, b| a.wrapping_add(*b));
    block[127] = 0u8.wrapping_sub(sum);
}

/// The EDID: a base block and a CTA-861 extension without data.
pub fn edid(monitor: Monitor) -> [u8; LENGTH] {
    let mut e = [0; LENGTH];
    e[..8].copy_from_slice(&[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
    // Manufacturer "KVR" (three letters of five bits), product 1.
    let letters = b"KVR".iter().fold(0u16, |a, c| a << 5 | u16::from(c - b'A' + 1));
    e[8..10].copy_from_slice(&letters.to_be_bytes());
    e[10] = 1;
    e[12..16].copy_from_slice(&(monitor.head + 1).to_le_bytes());
    (e[16], e[17]) = (1, 36); // week, year since 1990
    (e[18], e[19]) = (1, 4);
    e[20] = 0xa5; // digital, 8 bits a colour, DisplayPort
    let cm = |pixels: u32| (pixels * 254 / 10_000).clamp(1, 255) as u8;
    (e[21], e[22]) = (cm(monitor.width), cm(monitor.height));
    e[23] = 120; // gamma 2.2
    e[24] = 0x06; // sRGB, preferred timing is native
    // sRGB primaries.
    e[25..35].copy_from_slice(&[0xee, 0x91, 0xa3, 0x54, 0x4c, 0x99, 0x26, 0x0f, 0x50, 0x54]);
    let mut standard = 38;
    e[38..54].fill(1);
    for (w, h, established) in MODES {
        if let Some((at, bit)) = established {
            e[*at] |= 1 << bit;
        } else if let (Some(aspect), true) = (aspect(*w, *h), standard < 54) {
            e[standard] = (w / 8 - 31) as u8;
            e[standard + 1] = aspect << 6;
            standard += 2;
        }
    }
    e[54..72].copy_from_slice(&detailed(monitor.width, monitor.height));
    let mut range = text(0xfd, "");
    range[4..18].copy_from_slice(&[0, 50, 125, 30, 160, 120, 0, b'\n', b' ', b' ', b' ', b' ', b' ', b' ']);
    e[72..90].copy_from_slice(&range);
    e[90..108].copy_from_slice(&text(0xfc, "Kvasir"));
    e[108..126].copy_from_slice(&text(0xff, &format!("{}", monitor.head + 1)));
    e[126] = 1;
    checksum(&mut e[..128]);
    e[128..132].copy_from_slice(&[0x02, 0x03, 0x04, 0x00]);
    checksum(&mut e[128..]);
    e
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_consistent() {
        for (width, height) in [(1280, 800), (1024, 768), (3840, 2160), (64, 64), (16384, 16384)] {
            let e = edid(Monitor { width, height, head: 0 });
            for block in e.chunks(128) {
                assert_eq!(block.iter().fold(0u8, |a, b| a.wrapping_add(*b)), 0);
            }
            let w = u32::from(e[56]) | u32::from(e[58] >> 4) << 8;
            let h = u32::from(e[59]) | u32::from(e[61] >> 4) << 8;
            assert_eq!((w, h), (width.min(4095), height.min(4095)));
        }
    }
}
