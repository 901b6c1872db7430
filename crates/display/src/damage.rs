//! Which parts of a picture changed.

use crate::Rect;

/// Width in pixels of a unit of damage; its height is one row.
pub(crate) const UNIT: u32 = 16;

/// A set of pixels that changed, in units of 16 pixels of a row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Damage {
    width: u32,
    height: u32,
    /// Words of a row.
    stride: usize,
    bits: Vec<u64>,
    /// First and last row that may have bits.
    rows: Option<(u32, u32)>,
}

impl Damage {
    /// Nothing, of a picture of this size.
    pub fn new(width: u32, height: u32) -> Self {
        let stride = width.div_ceil(UNIT).div_ceil(64) as usize;
        Self { width, height, stride, bits: vec![0; stride * height as usize], rows: None }
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.rows.is_none()
    }

    fn touch(&mut self, first: u32, last: u32) {
        self.rows = Some(match self.rows {
            Some((a, b)) => (a.min(first), b.max(last)),
            None => (first, last),
        });
    }

    /// Marks the unit that holds pixel `x` of row `y`.
    #[inline]
    pub fn mark(&mut self, x: u32, y: u32) {
        if x < self.width && y < self.height {
            let unit = (x / UNIT) as usize;
            self.bits[y as usize * self.stride + unit / 64] |= 1 << (unit % 64);
            self.touch(y, y);
        }
    }

    /// Adds a rectangle; what is outside of the picture is ignored.
    pub fn add(&mut self, rect: Rect) {
        let r = rect.clip(self.width, self.height);
        if r.is_empty() {
            return;
        }
        let (first, last) = (r.x / UNIT, (r.x + r.w - 1) / UNIT);
        for y in r.y..r.y + r.h {
            let row = &mut self.bits[y as usize * self.stride..][..self.stride];
            for unit in first..=last {
                row[unit as usize / 64] |= 1 << (unit % 64);
            }
        }
        self.touch(r.y, r.y + r.h - 1);
    }

    /// Adds everything.
    pub fn add_all(&mut self) {
        self.add(Rect::new(0, 0, self.width, self.height));
    }

    /// Adds other damage of a picture of the same size (of another size: everything).
    pub fn merge(&mut self, other: &Self) {
        if (self.width, self.height) != (other.width, other.height) {
            *self = Self::new(other.width, other.height);
            self.add_all();
            return;
        }
        let Some((first, last)) = other.rows else { return };
        let range = first as usize * self.stride..(last as usize + 1) * self.stride;
        for (a, b) in self.bits[range.clone()].iter_mut().zip(&other.bits[range]) {
            *a |= b;
        }
        self.touch(first, last);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        if let Some((first, last)) = self.rows.take() {
            self.bits[first as usize * self.stride..(last as usize + 1) * self.stride].fill(0);
        }
    }

    /// Whether [`Self::take`] of an area would give anything.
    pub fn touches(&self, area: Rect) -> bool {
        let area = area.clip(self.width, self.height);
        let Some((first, last)) = self.rows else { return false };
        if area.is_empty() {
            return false;
        }
        let (left, right) = (area.x / UNIT, (area.x + area.w).div_ceil(UNIT));
        (first.max(area.y)..(area.y + area.h).min(last + 1)).any(|y| {
            let row = &self.bits[y as usize * self.stride..][..self.stride];
            row.iter().any(|w| *w != 0) && (left..right).any(|u| self.unit(u, y))
        })
    }

    /// Forgets what is outside of `area`.
    pub fn drop_outside(&mut self, area: Rect) {
        let inside = self.take(area);
        self.clear();
        inside.into_iter().for_each(|r| self.add(r));
    }

    fn unit(&self, unit: u32, y: u32) -> bool {
        self.bits[y as usize * self.stride + unit as usize / 64] & 1 << (unit % 64) != 0
    }

    fn run_is_set(&self, first: u32, end: u32, y: u32) -> bool {
        (first..end).all(|u| self.unit(u, y))
    }

    /// Takes out what is inside `area` (whole units count if they touch it), as rectangles that do not overlap.
    pub fn take(&mut self, area: Rect) -> Vec<Rect> {
        let mut out = Vec::new();
        let area = area.clip(self.width, self.height);
        let Some((first, last)) = self.rows else { return out };
        if area.is_empty() {
            return out;
        }
        let (left, right) = (area.x / UNIT, (area.x + area.w).div_ceil(UNIT));
        let bottom = (area.y + area.h).min(last + 1);
        for y in first.max(area.y)..bottom {
            let mut unit = left;
            while unit < right {
                if !self.unit(unit, y) {
                    // Skip empty words whole.
                    if unit % 64 == 0 && self.bits[y as usize * self.stride + unit as usize / 64] == 0 {
                        unit += 64;
                    } else {
                        unit += 1;
                    }
                    continue;
                }
                let start = unit;
                while unit < right && self.unit(unit, y) {
                    unit += 1;
                }
                let mut end = y;
                while end < bottom && self.run_is_set(start, unit, end) {
                    for u in start..unit {
                        self.bits[end as usize * self.stride + u as usize / 64] &= !(1 << (u % 64));
                    }
                    end += 1;
                }
                let rect = Rect::new(start * UNIT, y, (unit - start) * UNIT, end - y);
                out.push(rect.clip(self.width, self.height));
            }
        }
        if self.bits[first as usize * self.stride..(last as usize + 1) * self.stride].iter().all(|w| *w == 0)
        {
            self.rows = None;
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rectangles() {
        let mut d = Damage::new(100, 50);
        d.add(Rect::new(20, 10, 5, 5));
        d.add(Rect::new(0, 0, 1, 1));
        assert_eq!(d.take(Rect::new(0, 0, 100, 50)), [Rect::new(0, 0, 16, 1), Rect::new(16, 10, 16, 5)]);
        assert!(d.is_empty());
        d.add_all();
        assert_eq!(d.take(Rect::new(0, 0, 100, 20)), [Rect::new(0, 0, 100, 20)]);
        assert_eq!(d.take(Rect::new(0, 0, 100, 50)), [Rect::new(0, 20, 100, 30)]);
        d.add(Rect::new(500, 500, 1, 1));
        assert!(d.is_empty());
    }

    proptest! {
        #[test]
        fn every_marked_pixel_comes_out_once(
            w in 1u32..2200, h in 1u32..40,
            marks in proptest::collection::vec((0u32..2300, 0u32..50, 0u32..300, 0u32..30), 0..20),
        ) {
            let mut d = Damage::new(w, h);
            let mut wanted = vec![false; (w * h) as usize];
            for (x, y, rw, rh) in marks {
                let r = Rect::new(x, y, rw, rh);
                d.add(r);
                let r = r.clip(w, h);
                for y in r.y..r.y + r.h {
                    for x in r.x..r.x + r.w {
                        wanted[(y * w + x) as usize] = true;
                    }
                }
            }
            let mut seen = vec![0u8; (w * h) as usize];
            for r in d.take(Rect::new(0, 0, w, h)) {
                prop_assert!(r.x + r.w <= w && r.y + r.h <= h && !r.is_empty());
                for y in r.y..r.y + r.h {
                    for x in r.x..r.x + r.w {
                        seen[(y * w + x) as usize] += 1;
                    }
                }
            }
            prop_assert!(d.is_empty());
            for (s, w) in seen.iter().zip(&wanted) {
                prop_assert!(*s <= 1 && (*s == 1 || !*w));
            }
        }
    }
}
