//! ZRLE (RFC 6143, 7.7.6).

use super::{Encoder, length_then};
use crate::{Frame, Rect};

const TILE: u32 = 64;
const RLE: u8 = 128;
/// Most colours of a palette with runs.
const MOST: usize = 127;

/// Bytes that a run's length takes.
fn length_bytes(run: usize) -> usize {
    (run - 1) / 255 + 1
}

fn put_length(run: usize, out: &mut Vec<u8>) {
    let mut left = run - 1;
    while left >= 255 {
        out.push(255);
        left -= 255;
    }
    out.push(left as u8); // below 255
}

fn runs(pixels: &[u32]) -> impl Iterator<Item = (u32, usize)> {
    pixels.chunk_by(|a, b| a == b).map(|run| (run[0], run.len()))
}

impl Encoder {
    pub(super) fn zrle(&mut self, frame: &Frame, rect: Rect, out: &mut Vec<u8>) {
        let mut plain = std::mem::take(&mut self.plain);
        plain.clear();
        for y in (rect.y..rect.y + rect.h).step_by(TILE as usize) {
            for x in (rect.x..rect.x + rect.w).step_by(TILE as usize) {
                let tile = Rect::new(x, y, TILE.min(rect.x + rect.w - x), TILE.min(rect.y + rect.h - y));
                let pixels = self.gather(frame, tile);
                self.zrle_tile(&pixels, tile.w as usize, &mut plain);
                self.pixels = pixels;
            }
        }
        let level = self.level();
        length_then(out, |out| self.zrle.deflate(level, &plain, out));
        self.plain = plain;
    }

    fn zrle_tile(&mut self, pixels: &[u32], width: usize, out: &mut Vec<u8>) {
        let compact = self.format.compact();
        let size = if compact.is_some() { 3 } else { self.format.bytes() };
        let colours = self.palette.count(pixels, MOST);
        if colours == Some(1) {
            out.push(1);
            self.format.put_compact(compact, pixels[0], out);
            return;
        }
        let (mut plain_runs, mut palette_runs) = (0, 0);
        for (_, run) in runs(pixels) {
            plain_runs += size + length_bytes(run);
            palette_runs += if run == 1 { 1 } else { 1 + length_bytes(run) };
        }
        let raw = pixels.len() * size;
        let bits = match colours {
            Some(2) => 1,
            Some(3..=4) => 2,
            Some(5..=16) => 4,
            _ => 0,
        };
        let height = pixels.len() / width;
        let (packed, palette_runs) = match colours {
            Some(n) => {
                let packed =
                    if bits == 0 { usize::MAX } else { n * size + (width * bits).div_ceil(8) * height };
                (packed, n * size + palette_runs)
            }
            None => (usize::MAX, usize::MAX),
        };
        let least = raw.min(plain_runs).min(packed).min(palette_runs);
        if least == packed {
            out.push(self.palette.colours().len() as u8);
            self.palette.colours().iter().for_each(|c| self.format.put_compact(compact, *c, out));
            for row in pixels.chunks(width) {
                for group in row.chunks(8 / bits) {
                    let packed = group.iter().fold(0u8, |all, p| all << bits | self.palette.index(*p));
                    out.push(packed << (8 - bits * group.len()));
                }
            }
        } else if least == palette_runs {
            out.push(RLE | self.palette.colours().len() as u8); // at most 127
            self.palette.colours().iter().for_each(|c| self.format.put_compact(compact, *c, out));
            for (colour, run) in runs(pixels) {
                let index = self.palette.index(colour);
                if run == 1 {
                    out.push(index);
                } else {
                    out.push(index | RLE);
                    put_length(run, out);
                }
            }
        } else if least == plain_runs {
            out.push(RLE);
            for (colour, run) in runs(pixels) {
                self.format.put_compact(compact, colour, out);
                put_length(run, out);
            }
        } else {
            out.push(0);
            match compact {
                Some(0) => pixels.iter().for_each(|p| out.extend_from_slice(&p.to_le_bytes()[..3])),
                compact => pixels.iter().for_each(|p| self.format.put_compact(compact, *p, out)),
            }
        }
    }
}
