//! What a video BIOS does at power-on, for kernels that are started without one: text mode of 80 by 25 characters.

use super::Vga;
use super::core::ATTRIBUTE_SCREEN_ON;

/// Registers of BIOS mode 3 (IBM VGA BIOS, video parameter table).
const SEQUENCER: [u8; 5] = [0x03, 0x00, 0x03, 0x00, 0x02];
const GRAPHICS: [u8; 9] = [0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x0e, 0x0f, 0xff];
const CRTC: [u8; 25] = [
    0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0x00, 0x4f, 0x0d, 0x0e, 0x00, 0x00, 0x00, 0x00, 0x9c,
    0x8e, 0x8f, 0x28, 0x1f, 0x96, 0xb9, 0xa3, 0xff,
];
const ATTRIBUTES: [u8; 20] = [
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x14, 0x07, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e, 0x3f, 0x0c,
    0x00, 0x0f, 0x08,
];

impl Vga {
    /// Sets text mode 3 with an empty screen, and the font.
    pub fn post(&mut self, font: Option<&[u8; 4096]>) {
        let r = &mut self.r;
        r.misc = 0x67;
        r.seq[..SEQUENCER.len()].copy_from_slice(&SEQUENCER);
        r.gfx[..GRAPHICS.len()].copy_from_slice(&GRAPHICS);
        r.crtc = CRTC;
        r.attr[..ATTRIBUTES.len()].copy_from_slice(&ATTRIBUTES);
        r.attr_index = ATTRIBUTE_SCREEN_ON;
        // The 64 colours of the EGA: bits of two thirds for red, green and blue, then of one third.
        for i in 0..64u8 {
            let part = |high: u8, low: u8| (i >> high & 1) * 0x2a + (i >> low & 1) * 0x15;
            r.palette[usize::from(i) * 3..][..3].copy_from_slice(&[part(2, 5), part(1, 4), part(0, 3)]);
        }
        let blank: Vec<u8> = [b' ', 0x07, 0, 0].repeat(0x4000);
        self.store(0, &blank);
        if let Some(font) = font {
            for (ch, glyph) in font.as_chunks::<16>().0.iter().enumerate() {
                for (y, bits) in glyph.iter().enumerate() {
                    // Plane 2: the other planes of these addresses hold characters.
                    self.store((ch * 128 + y * 4 + 2) as u64, &[*bits]);
                }
            }
        }
        self.generation += 1;
    }
}
