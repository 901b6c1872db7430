//! Pictures of the guest.

use ::display::{MAX_SIDE, Rect};
use memory::GuestMemory;
use serde::{Deserialize, Serialize};

/// Most pieces of memory behind a picture.
pub(super) const MOST_PIECES: u32 = 16384;

/// Order of the colours in memory (virtio 1.2, 5.7.6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Format {
    /// Bits to the right of red, green, blue, alpha.
    shifts: [u8; 4],
}

impl Format {
    pub(super) fn from_number(number: u32) -> Option<Self> {
        let shifts = match number {
            1 | 2 => [16, 8, 0, 24],
            3 | 4 => [8, 16, 24, 0],
            67 | 134 => [0, 8, 16, 24],
            68 | 121 => [24, 16, 8, 0],
            _ => return None,
        };
        Some(Self { shifts })
    }

    /// As 0xAARRGGBB.
    fn convert(self, pixel: u32) -> u32 {
        let part = |i: usize| pixel >> (self.shifts[i] & 31) & 0xff;
        part(3) << 24 | part(0) << 16 | part(1) << 8 | part(2)
    }

    fn is_native(self) -> bool {
        self.shifts == [16, 8, 0, 24]
    }
}

/// A picture: what the guest has transferred, and the memory it transfers from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Resource {
    pub(super) format: Format,
    pub(super) width: u32,
    pub(super) height: u32,
    /// Pixels 0xAARRGGBB.
    pub(super) pixels: Vec<u32>,
    /// Address and length of the pieces of guest memory, one after the other.
    pub(super) backing: Vec<(u64, u32)>,
}

impl Resource {
    /// A black picture; `None` for impossible sizes.
    pub(super) fn new(format: Format, width: u32, height: u32) -> Option<Self> {
        let sides = 1..=MAX_SIDE;
        if !sides.contains(&width) || !sides.contains(&height) {
            return None;
        }
        let pixels = vec![0; Self::bytes(width, height) as usize / 4];
        Some(Self { format, width, height, pixels, backing: Vec::new() })
    }

    /// Bytes of the host that a picture takes.
    pub(super) fn bytes(width: u32, height: u32) -> u64 {
        u64::from(width) * u64::from(height) * 4
    }

    pub(super) fn contains(&self, r: Rect) -> bool {
        let inside =
            |start: u32, length: u32, all: u32| start.checked_add(length).is_some_and(|end| end <= all);
        !r.is_empty() && inside(r.x, r.w, self.width) && inside(r.y, r.h, self.height)
    }

    /// Transfers a rectangle, which lies inside, from the backing; its first pixel is `offset` bytes into it.
    pub(super) fn transfer(&mut self, memory: &GuestMemory, rect: Rect, offset: u64) -> bool {
        let stride = u64::from(self.width) * 4;
        let mut row = vec![0; rect.w as usize * 4];
        for y in 0..rect.h {
            let Some(at) = u64::from(y).checked_mul(stride).and_then(|n| n.checked_add(offset)) else {
                return false;
            };
            if !self.read_backing(memory, at, &mut row) {
                return false;
            }
            let start = (rect.y + y) as usize * self.width as usize + rect.x as usize;
            let target = &mut self.pixels[start..start + rect.w as usize];
            let format = self.format;
            let words = row.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b));
            if format.is_native() {
                target.iter_mut().zip(words).for_each(|(t, w)| *t = w);
            } else {
                target.iter_mut().zip(words).for_each(|(t, w)| *t = format.convert(w));
            }
        }
        true
    }

    fn read_backing(&self, memory: &GuestMemory, mut at: u64, mut out: &mut [u8]) -> bool {
        for (address, length) in &self.backing {
            let length = u64::from(*length);
            if at >= length {
                at -= length;
                continue;
            }
            let n = (length - at).min(out.len() as u64) as usize;
            let (now, rest) = out.split_at_mut(n);
            if memory.read(address.wrapping_add(at), now).is_err() {
                return false;
            }
            out = rest;
            at = 0;
            if out.is_empty() {
                return true;
            }
        }
        out.is_empty()
    }
}
