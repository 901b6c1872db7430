//! Pointer shapes.

/// A pointer shape that the guest leaves to the viewer to draw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Width in pixels, at most 256.
    pub width: u32,
    /// Height in pixels, at most 256.
    pub height: u32,
    /// Which pixel points.
    pub hot: (u32, u32),
    /// Pixels 0xAARRGGBB, colours not multiplied with alpha.
    pub pixels: Vec<u32>,
}

impl Cursor {
    /// A shape; `None` if the number of pixels does not fit the size or the size is beyond 256.
    pub fn new(width: u32, height: u32, hot: (u32, u32), pixels: Vec<u32>) -> Option<Self> {
        let fits = width <= 256 && height <= 256 && pixels.len() == (width * height) as usize;
        fits.then_some(Self { width, height, hot, pixels })
    }

    /// A shape without pixels: nothing is seen.
    pub fn hidden() -> Self {
        Self { width: 0, height: 0, hot: (0, 0), pixels: Vec::new() }
    }
}
