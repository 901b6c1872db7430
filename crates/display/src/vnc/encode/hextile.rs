//! Hextile (RFC 6143, 7.7.4).

use super::Encoder;
use crate::{Frame, Rect};

const RAW: u8 = 1;
const BACKGROUND: u8 = 2;
const FOREGROUND: u8 = 4;
const SUBRECTS: u8 = 8;
const COLOURED: u8 = 16;

impl Encoder {
    pub(super) fn hextile(&mut self, frame: &Frame, rect: Rect, out: &mut Vec<u8>) {
        let (mut background, mut foreground) = (None, None);
        for y in (rect.y..rect.y + rect.h).step_by(16) {
            for x in (rect.x..rect.x + rect.w).step_by(16) {
                let tile = Rect::new(x, y, 16.min(rect.x + rect.w - x), 16.min(rect.y + rect.h - y));
                let pixels = self.gather(frame, tile);
                self.hextile_tile(&pixels, tile, &mut background, &mut foreground, out);
                self.pixels = pixels;
            }
        }
    }

    fn hextile_tile(
        &mut self,
        pixels: &[u32],
        tile: Rect,
        background: &mut Option<u32>,
        foreground: &mut Option<u32>,
        out: &mut Vec<u8>,
    ) {
        let raw = pixels.len() * self.format.bytes();
        let start = out.len();
        let colours = self.palette.count(pixels, 64);
        let common = self.most_common(pixels);
        if let Some(colours) = colours {
            let mut flags = 0;
            out.push(0);
            if *background != Some(common) {
                flags |= BACKGROUND;
                self.format.put(common, out);
            }
            let mono = colours == 2;
            if mono {
                let other = self.palette.colours().iter().find(|c| **c != common).copied().unwrap_or(common);
                if *foreground != Some(other) {
                    flags |= FOREGROUND;
                    self.format.put(other, out);
                }
                flags |= SUBRECTS;
                *foreground = Some(other);
            } else if colours > 2 {
                flags |= SUBRECTS | COLOURED;
            }
            if colours > 1 {
                let at = out.len();
                out.push(0);
                let number = self.subrects(pixels, tile, common, mono, at + raw, out);
                match number {
                    Some(n) => out[at] = n,
                    None => out.resize(start + raw + 2, 0), // longer than raw
                }
            }
            out[start] = flags;
            if out.len() - start <= raw {
                *background = Some(common);
                if !mono && colours > 2 {
                    // Colours of their own leave no foreground (RFC 6143, 7.7.4).
                    *foreground = None;
                }
                return;
            }
            out.truncate(start);
        }
        out.push(RAW);
        pixels.iter().for_each(|p| self.format.put(*p, out));
        (*background, *foreground) = (None, None);
    }

    fn most_common(&self, pixels: &[u32]) -> u32 {
        // Good enough: the colour of the most of eight samples.
        let samples: [u32; 8] = std::array::from_fn(|i| pixels[i * (pixels.len() - 1) / 7]);
        let count = |c: u32| samples.iter().filter(|s| **s == c).count();
        samples.iter().copied().max_by_key(|c| count(*c)).unwrap_or(0)
    }

    /// Appends rectangles of everything that is not background; `None` if that grows past `limit` or there are more
    /// than 255.
    fn subrects(
        &self,
        pixels: &[u32],
        tile: Rect,
        background: u32,
        mono: bool,
        limit: usize,
        out: &mut Vec<u8>,
    ) -> Option<u8> {
        let (w, h) = (tile.w as usize, tile.h as usize);
        let mut done = [false; 256];
        let mut number = 0u8;
        for y in 0..h {
            for x in 0..w {
                let colour = pixels[y * w + x];
                if done[y * w + x] || colour == background {
                    continue;
                }
                let fits = |x: usize, y: usize| pixels[y * w + x] == colour && !done[y * w + x];
                let width = (x..w).take_while(|x| fits(*x, y)).count();
                let height = (y..h).take_while(|y| (x..x + width).all(|x| fits(x, *y))).count();
                for row in y..y + height {
                    done[row * w + x..row * w + x + width].fill(true);
                }
                number = number.checked_add(1)?;
                if !mono {
                    self.format.put(colour, out);
                }
                // All below 16.
                out.push((x << 4 | y) as u8);
                out.push(((width - 1) << 4 | (height - 1)) as u8);
                if out.len() > limit {
                    return None;
                }
            }
        }
        Some(number)
    }
}
