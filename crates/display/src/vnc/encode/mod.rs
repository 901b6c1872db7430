//! Encodings of rectangles (RFC 6143, 7.7, and the community's RFB protocol for Tight).

mod hextile;
mod palette;
mod tight;
mod zrle;

use super::pixel::PixelFormat;
use crate::{Frame, Rect};
use flate2::{Compress, Compression, FlushCompress};
use palette::Palette;

/// An encoding that the server can send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Pixels as they are.
    Raw,
    /// Tiles of 16 by 16 with rectangles in them.
    Hextile,
    /// Raw, deflated.
    Zlib,
    /// Fills, palettes, JPEG, deflated.
    Tight,
    /// Tiles of 64 by 64 with palettes and runs, deflated.
    Zrle,
}

impl Encoding {
    /// The encoding of that number.
    pub fn from_number(number: i32) -> Option<Self> {
        Some(match number {
            0 => Self::Raw,
            5 => Self::Hextile,
            6 => Self::Zlib,
            7 => Self::Tight,
            16 => Self::Zrle,
            _ => return None,
        })
    }

    fn number(self) -> i32 {
        match self {
            Self::Raw => 0,
            Self::Hextile => 5,
            Self::Zlib => 6,
            Self::Tight => 7,
            Self::Zrle => 16,
        }
    }
}

/// Appends the header of a rectangle.
pub fn header(rect: Rect, encoding: i32, out: &mut Vec<u8>) {
    for n in [rect.x, rect.y, rect.w, rect.h] {
        out.extend((n as u16).to_be_bytes()); // sides are at most 16384
    }
    out.extend(encoding.to_be_bytes());
}

/// A deflate stream that lasts as long as the connection.
struct Stream {
    state: Option<Compress>,
}

impl Stream {
    const fn new() -> Self {
        Self { state: None }
    }

    /// Deflates everything up to a byte boundary.
    fn deflate(&mut self, level: u32, input: &[u8], out: &mut Vec<u8>) {
        let state = self.state.get_or_insert_with(|| Compress::new(Compression::new(level.min(9)), true));
        let start = state.total_in();
        loop {
            out.reserve((input.len() / 4).max(1024));
            let done = (state.total_in() - start) as usize;
            // The only errors are a stream that was finished and missing room, neither of which is possible here.
            if state.compress_vec(&input[done..], out, FlushCompress::Sync).is_err() {
                return;
            }
            let done = (state.total_in() - start) as usize;
            if done == input.len() && out.len() < out.capacity() {
                return;
            }
        }
    }
}

/// Encodes rectangles for one viewer.
pub struct Encoder {
    /// How the viewer wants pixels.
    pub format: PixelFormat,
    /// The encoding it likes best.
    pub encoding: Encoding,
    /// JPEG quality, 0 to 9, of viewers that take it.
    pub quality: Option<u8>,
    /// Effort of compression, 0 to 9; the server's choice if not given.
    pub level: Option<u8>,
    zlib: Stream,
    zrle: Stream,
    tight: [Stream; 4],
    palette: Palette,
    pixels: Vec<u32>,
    plain: Vec<u8>,
}

impl Default for Encoder {
    fn default() -> Self {
        Self {
            format: PixelFormat::default(),
            encoding: Encoding::Raw,
            quality: None,
            level: None,
            zlib: Stream::new(),
            zrle: Stream::new(),
            tight: [const { Stream::new() }; 4],
            palette: Palette::default(),
            pixels: Vec::new(),
            plain: Vec::new(),
        }
    }
}

/// Level of compression where the viewer has no wish.
const DEFAULT_LEVEL: u32 = 5;

impl Encoder {
    fn level(&self) -> u32 {
        self.level.map_or(DEFAULT_LEVEL, u32::from)
    }

    /// Appends a rectangle of the picture, which lies inside it, as one or more rectangles of the protocol. Returns
    /// how many.
    pub fn encode(&mut self, frame: &Frame, rect: Rect, out: &mut Vec<u8>) -> u32 {
        match self.encoding {
            Encoding::Tight => return self.tight(frame, rect, out),
            encoding => header(rect, encoding.number(), out),
        }
        match self.encoding {
            Encoding::Raw => self.raw(frame, rect, out),
            Encoding::Hextile => self.hextile(frame, rect, out),
            Encoding::Zlib => {
                let mut plain = std::mem::take(&mut self.plain);
                plain.clear();
                self.raw(frame, rect, &mut plain);
                let level = self.level();
                length_then(out, |out| self.zlib.deflate(level, &plain, out));
                self.plain = plain;
            }
            Encoding::Zrle => self.zrle(frame, rect, out),
            Encoding::Tight => {}
        }
        1
    }

    fn raw(&mut self, frame: &Frame, rect: Rect, out: &mut Vec<u8>) {
        out.reserve(rect.area() as usize * self.format.bytes());
        for y in rect.y..rect.y + rect.h {
            self.pixels.clear();
            self.format.convert_row(frame.span(rect.x, y, rect.w), &mut self.pixels);
            if self.format == PixelFormat::default() {
                self.pixels.iter().for_each(|p| out.extend_from_slice(&p.to_le_bytes()));
            } else {
                self.pixels.iter().for_each(|p| self.format.put(*p, out));
            }
        }
    }

    /// Converted pixels of a rectangle, row by row.
    fn gather(&mut self, frame: &Frame, rect: Rect) -> Vec<u32> {
        let mut pixels = std::mem::take(&mut self.pixels);
        pixels.clear();
        for y in rect.y..rect.y + rect.h {
            self.format.convert_row(frame.span(rect.x, y, rect.w), &mut pixels);
        }
        pixels
    }
}

/// Appends four bytes of length, then what `f` appends.
fn length_then(out: &mut Vec<u8>, f: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend([0; 4]);
    f(out);
    let length = (out.len() - at - 4) as u32; // pictures are at most 256 MiB
    out[at..at + 4].copy_from_slice(&length.to_be_bytes());
}

#[cfg(test)]
pub(super) mod tests;
