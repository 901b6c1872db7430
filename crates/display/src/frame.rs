//! Pictures.

use crate::Rect;

/// Longest side of a picture, in pixels; larger modes show nothing.
pub const MAX_SIDE: u32 = 16384;
/// Most pixels of a picture (256 MiB of them).
const MAX_PIXELS: u64 = 64 << 20;

/// A picture of pixels 0x00RRGGBB, row by row without gaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    width: u32,
    height: u32,
    pixels: Vec<u32>,
}

impl Frame {
    /// A black picture, or `None` if it would be too large or have no pixels.
    pub fn new(width: u32, height: u32) -> Option<Self> {
        let pixels = u64::from(width) * u64::from(height);
        let possible =
            (1..=MAX_SIDE).contains(&width) && (1..=MAX_SIDE).contains(&height) && pixels <= MAX_PIXELS;
        possible.then(|| Self { width, height, pixels: vec![0; pixels as usize] })
    }

    /// Width in pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// All pixels.
    pub fn pixels(&self) -> &[u32] {
        &self.pixels
    }

    /// All of it.
    pub fn bounds(&self) -> Rect {
        Rect::new(0, 0, self.width, self.height)
    }

    /// A row; empty past the end.
    pub fn row(&self, y: u32) -> &[u32] {
        let (w, y) = (self.width as usize, y as usize);
        self.pixels.get(y * w..(y + 1) * w).unwrap_or(&[])
    }

    /// A row, to change; empty past the end.
    pub fn row_mut(&mut self, y: u32) -> &mut [u32] {
        let (w, y) = (self.width as usize, y as usize);
        self.pixels.get_mut(y * w..(y + 1) * w).unwrap_or(&mut [])
    }

    /// Part of a row: `w` pixels from `x` on, as far as they exist.
    pub fn span(&self, x: u32, y: u32, w: u32) -> &[u32] {
        let row = self.row(y);
        let start = (x as usize).min(row.len());
        &row[start..(start + w as usize).min(row.len())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_sizes() {
        assert!(Frame::new(0, 10).is_none());
        assert!(Frame::new(MAX_SIDE + 1, 1).is_none());
        assert!(Frame::new(MAX_SIDE, MAX_SIDE).is_none());
        let f = Frame::new(10, 5).unwrap();
        assert_eq!(
            (f.row(4).len(), f.row(5).len(), f.span(8, 0, 9).len(), f.span(99, 0, 9).len()),
            (10, 0, 2, 0)
        );
    }
}
