//! Tight (the community's RFB protocol, 7.7.7).

use super::{Encoder, Encoding, header};
use crate::{Frame, Rect};
use jpeg_encoder::{ColorType, SamplingFactor};

/// Rows that are looked at together, and the width of the cells that they are cut into.
const CELL: u32 = 64;
/// Widest rectangle that the encoding allows.
const MOST_WIDTH: u32 = 2048;
/// Data shorter than this is not deflated.
const LEAST_DEFLATED: usize = 12;
/// Cells of more colours than this are pictures rather than drawings.
const PICTURE: usize = 96;

const FILL: u8 = 0x80;
const JPEG: u8 = 0x90;
const EXPLICIT_FILTER: u8 = 0x40;
const FILTER_PALETTE: u8 = 1;

/// Streams by what they carry: pixels, bits, indices.
const FULL: usize = 0;
const MONO: usize = 1;
const INDEXED: usize = 2;

/// JPEG quality in percent for the levels that viewers ask for.
const QUALITIES: [u8; 10] = [5, 10, 15, 25, 37, 50, 60, 70, 75, 80];

/// What a cell is like.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Solid(u32),
    Drawing,
    Picture,
}

/// Appends a length in one to three bytes of seven bits.
fn compact_length(length: usize, out: &mut Vec<u8>) {
    match length {
        0..0x80 => out.push(length as u8),
        0x80..0x4000 => out.extend([(length & 0x7f) as u8 | 0x80, (length >> 7) as u8]),
        _ => out.extend([
            (length & 0x7f) as u8 | 0x80,
            (length >> 7 & 0x7f) as u8 | 0x80,
            (length >> 14) as u8,
        ]),
    }
}

impl Encoder {
    pub(super) fn tight(&mut self, frame: &Frame, rect: Rect, out: &mut Vec<u8>) -> u32 {
        let mut number = 0;
        for y in (rect.y..rect.y + rect.h).step_by(CELL as usize) {
            let h = CELL.min(rect.y + rect.h - y);
            // Neighbours of a class go together.
            let mut open: Option<(Rect, Class)> = None;
            for x in (rect.x..rect.x + rect.w).step_by(CELL as usize) {
                let cell = Rect::new(x, y, CELL.min(rect.x + rect.w - x), h);
                let class = self.classify(frame, cell);
                match &mut open {
                    Some((whole, c)) if *c == class && whole.w + cell.w <= MOST_WIDTH => whole.w += cell.w,
                    _ => {
                        if let Some((whole, class)) = open.replace((cell, class)) {
                            self.tight_rect(frame, whole, class, out);
                            number += 1;
                        }
                    }
                }
            }
            if let Some((whole, class)) = open {
                self.tight_rect(frame, whole, class, out);
                number += 1;
            }
        }
        number
    }

    fn classify(&mut self, frame: &Frame, cell: Rect) -> Class {
        let first = frame.span(cell.x, cell.y, 1).first().copied().unwrap_or(0);
        let solid =
            (cell.y..cell.y + cell.h).all(|y| frame.span(cell.x, y, cell.w).iter().all(|p| *p == first));
        if solid {
            return Class::Solid(first);
        }
        // Without JPEG there is nothing to choose.
        if self.quality.is_none() || self.format.bits < 16 || cell.area() < 256 {
            return Class::Drawing;
        }
        let pixels = self.gather(frame, cell);
        let few = self.palette.count(&pixels, PICTURE).is_some();
        self.pixels = pixels;
        if few { Class::Drawing } else { Class::Picture }
    }

    fn tight_rect(&mut self, frame: &Frame, rect: Rect, class: Class, out: &mut Vec<u8>) {
        header(rect, Encoding::Tight.number(), out);
        match (class, self.quality) {
            (Class::Solid(colour), _) => {
                out.push(FILL);
                self.format.put_tight(self.format.convert(colour), out);
            }
            (Class::Picture, Some(quality)) if self.jpeg(frame, rect, quality, out) => {}
            _ => self.lossless(frame, rect, out),
        }
    }

    fn lossless(&mut self, frame: &Frame, rect: Rect, out: &mut Vec<u8>) {
        let pixels = self.gather(frame, rect);
        let mut plain = std::mem::take(&mut self.plain);
        plain.clear();
        // A palette pays if it is short beside the pixels.
        let most = (pixels.len() / 4).clamp(2, 256);
        let stream = match self.palette.count(&pixels, most) {
            Some(1) => {
                // Two cells of one colour each, or a colour that others become in the viewer's format.
                out.push(FILL);
                self.format.put_tight(pixels[0], out);
                (self.pixels, self.plain) = (pixels, plain);
                return;
            }
            Some(2) => {
                self.start_palette(MONO, out);
                for row in pixels.chunks(rect.w as usize) {
                    for group in row.chunks(8) {
                        let bits = group.iter().fold(0u8, |all, p| all << 1 | self.palette.index(*p));
                        plain.push(bits << (8 - group.len()));
                    }
                }
                MONO
            }
            Some(_) => {
                self.start_palette(INDEXED, out);
                plain.extend(pixels.iter().map(|p| self.palette.index(*p)));
                INDEXED
            }
            None => {
                out.push((FULL as u8) << 4);
                pixels.iter().for_each(|p| self.format.put_tight(*p, &mut plain));
                FULL
            }
        };
        if plain.len() < LEAST_DEFLATED {
            out.extend_from_slice(&plain);
        } else {
            let level = self.level();
            let mut packed = Vec::with_capacity(plain.len() / 4 + 64);
            self.tight[stream].deflate(level, &plain, &mut packed);
            compact_length(packed.len(), out);
            out.extend_from_slice(&packed);
        }
        (self.pixels, self.plain) = (pixels, plain);
    }

    fn start_palette(&self, stream: usize, out: &mut Vec<u8>) {
        let colours = self.palette.colours();
        out.extend([(stream as u8) << 4 | EXPLICIT_FILTER, FILTER_PALETTE, (colours.len() - 1) as u8]); // 2 to 256
        colours.iter().for_each(|c| self.format.put_tight(*c, out));
    }

    fn jpeg(&mut self, frame: &Frame, rect: Rect, quality: u8, out: &mut Vec<u8>) -> bool {
        let percent = QUALITIES[usize::from(quality.min(9))];
        let mut rgb = std::mem::take(&mut self.plain);
        rgb.clear();
        for y in rect.y..rect.y + rect.h {
            rgb.extend(
                frame
                    .span(rect.x, y, rect.w)
                    .iter()
                    .flat_map(|p| [(p >> 16) as u8, (p >> 8) as u8, *p as u8]),
            );
        }
        let mut packed = Vec::with_capacity(rgb.len() / 8);
        let mut encoder = jpeg_encoder::Encoder::new(&mut packed, percent);
        encoder.set_sampling_factor(if quality >= 9 { SamplingFactor::F_1_1 } else { SamplingFactor::F_2_2 });
        // Sides are at most 2048 by 64.
        let done = encoder.encode(&rgb, rect.w as u16, rect.h as u16, ColorType::Rgb).is_ok();
        if done {
            out.push(JPEG);
            compact_length(packed.len(), out);
            out.extend_from_slice(&packed);
        }
        self.plain = rgb;
        done
    }
}
