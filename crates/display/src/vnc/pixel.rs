//! Pixel formats of viewers (RFC 6143, 7.4).

use std::io;

/// How a viewer wants pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PixelFormat {
    /// Bits of a pixel: 8, 16 or 32.
    pub bits: u8,
    /// Bits that mean something.
    pub depth: u8,
    /// Whether the high byte comes first.
    pub big_endian: bool,
    /// Most of red, green and blue.
    pub max: [u16; 3],
    /// Bits to the right of red, green and blue.
    pub shift: [u8; 3],
    /// The viewer wanted a colour map, and has been given one of three bits red, three green, two blue.
    pub mapped: bool,
}

impl Default for PixelFormat {
    fn default() -> Self {
        Self { bits: 32, depth: 24, big_endian: false, max: [255; 3], shift: [16, 8, 0], mapped: false }
    }
}

/// Formats that a loop of its own converts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Same,
    General,
}

impl PixelFormat {
    /// Parses the 16 bytes of the protocol.
    ///
    /// # Errors
    /// A format that no server could serve.
    pub fn parse(raw: &[u8; 16]) -> io::Result<Self> {
        let bad =
            || io::Error::new(io::ErrorKind::InvalidData, format!("impossible pixel format {raw:02x?}"));
        let bits = raw[0];
        if !matches!(bits, 8 | 16 | 32) {
            return Err(bad());
        }
        if raw[3] == 0 {
            if bits != 8 {
                return Err(bad());
            }
            let (max, shift) = ([7, 7, 3], [5, 2, 0]);
            return Ok(Self { bits, depth: 8, big_endian: false, max, shift, mapped: true });
        }
        let max = [4, 6, 8].map(|i| u16::from_be_bytes([raw[i], raw[i + 1]]));
        let shift = [raw[10], raw[11], raw[12]];
        let fits = max.iter().zip(shift).all(|(m, s)| {
            *m > 0 && s < bits && (u64::from(*m) << s) >> bits == 0 && (u32::from(*m) + 1).is_power_of_two()
        });
        if !fits {
            return Err(bad());
        }
        Ok(Self { bits, depth: raw[1], big_endian: raw[2] != 0, max, shift, mapped: false })
    }

    /// The 16 bytes of the protocol.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut out = [0; 16];
        out[0] = self.bits;
        out[1] = self.depth;
        out[2] = self.big_endian.into();
        out[3] = (!self.mapped).into();
        for (i, m) in self.max.iter().enumerate() {
            out[4 + 2 * i..6 + 2 * i].copy_from_slice(&m.to_be_bytes());
        }
        out[10..13].copy_from_slice(&self.shift);
        out
    }

    /// The colours of the colour map: red, green, blue, of 16 bits each.
    pub fn colour_map() -> impl Iterator<Item = [u16; 3]> {
        (0..256u32)
            .map(|i| [i >> 5 & 7, i >> 2 & 7, i & 3])
            .map(|[r, g, b]| [(r * 0xffff / 7) as u16, (g * 0xffff / 7) as u16, (b * 0xffff / 3) as u16])
    }

    fn way(&self) -> Way {
        if self.bits == 32 && self.max == [255; 3] && self.shift == [16, 8, 0] {
            Way::Same
        } else {
            Way::General
        }
    }

    /// A pixel 0x00RRGGBB as the number that the viewer means.
    #[inline]
    pub fn convert(&self, pixel: u32) -> u32 {
        if self.way() == Way::Same {
            return pixel & 0xff_ffff;
        }
        let part = |i: usize, at: u32| {
            let (value, max) = (pixel >> at & 0xff, u32::from(self.max[i]));
            // Maxima are of the form 2^n - 1.
            let bits = (max + 1).trailing_zeros();
            let scaled = if bits <= 8 {
                value >> (8 - bits)
            } else {
                value << (bits - 8) | value >> 8u32.saturating_sub(bits - 8)
            };
            (scaled & max) << self.shift[i]
        };
        part(0, 16) | part(1, 8) | part(2, 0)
    }

    /// Converts a row.
    pub fn convert_row(&self, row: &[u32], out: &mut Vec<u32>) {
        match self.way() {
            Way::Same => out.extend(row.iter().map(|p| p & 0xff_ffff)),
            Way::General => out.extend(row.iter().map(|p| self.convert(*p))),
        }
    }

    /// Bytes of a pixel.
    pub fn bytes(&self) -> usize {
        usize::from(self.bits / 8)
    }

    /// Appends a converted pixel.
    #[inline]
    pub fn put(&self, value: u32, out: &mut Vec<u8>) {
        match (self.bits, self.big_endian) {
            (8, _) => out.push(value as u8),
            (16, false) => out.extend((value as u16).to_le_bytes()),
            (16, true) => out.extend((value as u16).to_be_bytes()),
            (_, false) => out.extend(value.to_le_bytes()),
            (_, true) => out.extend(value.to_be_bytes()),
        }
    }

    /// Which three of the four bytes carry the pixel, where the viewer expects these only (ZRLE's CPIXEL,
    /// RFC 6143, 7.7.5): index of the first in the order sent.
    pub fn compact(&self) -> Option<usize> {
        if self.bits != 32 || self.depth > 24 {
            return None;
        }
        let all = self.max.iter().zip(self.shift).fold(0u64, |all, (m, s)| all | u64::from(*m) << s);
        if all >> 24 == 0 {
            Some(usize::from(self.big_endian))
        } else if all & 0xff == 0 {
            Some(usize::from(!self.big_endian))
        } else {
            None
        }
    }

    /// Appends a converted pixel as a CPIXEL.
    #[inline]
    pub fn put_compact(&self, compact: Option<usize>, value: u32, out: &mut Vec<u8>) {
        match compact {
            Some(from) => {
                let bytes = if self.big_endian { value.to_be_bytes() } else { value.to_le_bytes() };
                out.extend_from_slice(&bytes[from..from + 3]);
            }
            None => self.put(value, out),
        }
    }

    /// Whether Tight sends red, green and blue in three bytes (its TPIXEL).
    pub fn is_rgb(&self) -> bool {
        self.bits == 32 && self.depth == 24 && self.max == [255; 3]
    }

    /// Appends a converted pixel as a TPIXEL.
    #[inline]
    pub fn put_tight(&self, value: u32, out: &mut Vec<u8>) {
        if self.is_rgb() {
            out.extend(self.shift.map(|s| (value >> s) as u8));
        } else {
            self.put(value, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn formats() {
        let f = PixelFormat {
            bits: 16,
            depth: 16,
            big_endian: true,
            max: [31, 63, 31],
            shift: [11, 5, 0],
            mapped: false,
        };
        assert_eq!(PixelFormat::parse(&f.to_bytes()).unwrap(), f);
        let mut out = Vec::new();
        f.put(f.convert(0xff_8000), &mut out);
        assert_eq!(out, 0xfc00u16.to_be_bytes());
        assert_eq!(PixelFormat::default().compact(), Some(0));
        let shifted = PixelFormat { shift: [24, 16, 8], ..PixelFormat::default() };
        assert_eq!(shifted.compact(), Some(1));
        assert_eq!(shifted.convert(0x12_3456), 0x1234_5600);
        let mut out = Vec::new();
        shifted.put_compact(Some(1), 0x1234_5600, &mut out);
        shifted.put_tight(0x1234_5600, &mut out);
        assert_eq!(out, [0x56, 0x34, 0x12, 0x12, 0x34, 0x56]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_format_or_an_error(raw: [u8; 16], pixel: u32) {
            if let Ok(f) = PixelFormat::parse(&raw) {
                let v = f.convert(pixel);
                prop_assert!(f.bits == 32 || v >> f.bits == 0);
                let mut out = Vec::new();
                f.put(v, &mut out);
                f.put_compact(f.compact(), v, &mut out);
                f.put_tight(v, &mut out);
            }
        }
    }
}
