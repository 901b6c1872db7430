//! The colours of a rectangle, as long as they are few.

/// Most colours that are counted.
pub(super) const MOST: usize = 256;
const SLOTS: usize = 1024;

/// A set of colours in order of their first appearance.
pub(super) struct Palette {
    colours: Vec<u32>,
    slots: Box<[(u32, u32, u16); SLOTS]>,
    /// Slots of other stamps are empty.
    stamp: u32,
}

impl Default for Palette {
    fn default() -> Self {
        Self { colours: Vec::with_capacity(MOST), slots: Box::new([(0, 0, 0); SLOTS]), stamp: 0 }
    }
}

impl Palette {
    fn slot(colour: u32) -> usize {
        (colour.wrapping_mul(0x9e37_79b1) >> 22) as usize
    }

    fn clear(&mut self) {
        self.colours.clear();
        self.stamp = self.stamp.wrapping_add(1);
        if self.stamp == 0 {
            self.slots.fill((0, 0, 0));
            self.stamp = 1;
        }
    }

    /// Position of a colour, which is added if it is new; `None` if there are too many.
    fn add(&mut self, colour: u32, most: usize) -> Option<u16> {
        let mut at = Self::slot(colour);
        loop {
            let (stamp, key, index) = self.slots[at];
            if stamp != self.stamp {
                if self.colours.len() >= most {
                    return None;
                }
                let index = self.colours.len() as u16; // at most 256
                self.slots[at] = (self.stamp, colour, index);
                self.colours.push(colour);
                return Some(index);
            }
            if key == colour {
                return Some(index);
            }
            at = (at + 1) % SLOTS;
        }
    }

    /// Counts the colours of pixels; `None` if there are more than `most` (at most 256).
    pub(super) fn count(&mut self, pixels: &[u32], most: usize) -> Option<usize> {
        self.clear();
        let mut last = None;
        for pixel in pixels {
            if last != Some(*pixel) {
                self.add(*pixel, most.min(MOST))?;
                last = Some(*pixel);
            }
        }
        Some(self.colours.len())
    }

    /// The colours that were counted.
    pub(super) fn colours(&self) -> &[u32] {
        &self.colours
    }

    /// Position of a colour that was counted.
    pub(super) fn index(&self, colour: u32) -> u8 {
        let mut at = Self::slot(colour);
        loop {
            let (stamp, key, index) = self.slots[at];
            if stamp != self.stamp {
                return 0;
            }
            if key == colour {
                return index as u8; // below 256
            }
            at = (at + 1) % SLOTS;
        }
    }
}
