//! Finds rows of pixels that moved up or down, which a viewer can copy itself.

use crate::{Frame, Rect};
use std::collections::HashMap;

/// Fewer rows are not worth it.
const LEAST: u32 = 16;

/// Fingerprints of the rows that a viewer has.
#[derive(Default)]
pub(super) struct Scroll {
    size: (u32, u32),
    /// 0 where the viewer's row is not known.
    rows: Vec<u64>,
}

/// Rows that the viewer has elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    /// First row of where they go.
    pub(super) to: u32,
    /// First row of where they are.
    pub(super) from: u32,
    /// How many.
    pub(super) rows: u32,
}

fn fingerprint(row: &[u32]) -> u64 {
    const K: u64 = 0x9e37_79b9_7f4a_7c15;
    let (pairs, rest) = row.as_chunks::<8>();
    // Four lanes, so that multiplications overlap.
    let mut lanes = [1u64, 2, 3, 4];
    for chunk in pairs {
        for (lane, pair) in lanes.iter_mut().zip(chunk.as_chunks::<2>().0) {
            let value = u64::from(pair[0]) << 32 | u64::from(pair[1]);
            *lane = (*lane ^ value).wrapping_mul(K).rotate_left(29);
        }
    }
    let tail = rest.iter().fold(5u64, |h, p| (h ^ u64::from(*p)).wrapping_mul(K).rotate_left(29));
    let all = lanes.iter().fold(tail, |h, lane| (h ^ lane).wrapping_mul(K).rotate_left(31));
    (all ^ all >> 32).max(1)
}

impl Scroll {
    /// The viewer knows nothing any more.
    pub(super) fn forget(&mut self) {
        self.rows.clear();
    }

    /// The viewer gets these rectangles, and perhaps not all that changed in their rows.
    pub(super) fn forget_rows(&mut self, rects: &[Rect]) {
        for r in rects {
            for y in r.y..r.y + r.h {
                if let Some(row) = self.rows.get_mut(y as usize) {
                    *row = 0;
                }
            }
        }
    }

    /// Called with everything that changed, before it is sent. Returns rows that moved; what they cover is taken out
    /// of `rects`.
    pub(super) fn find(&mut self, frame: &Frame, rects: &mut Vec<Rect>) -> Option<Move> {
        let size = (frame.width(), frame.height());
        if self.size != size || self.rows.len() != size.1 as usize {
            self.size = size;
            self.rows = vec![0; size.1 as usize];
        }
        let mut dirty = vec![false; size.1 as usize];
        for r in rects.iter() {
            dirty[r.y as usize..(r.y + r.h) as usize].fill(true);
        }
        let old = self.rows.clone();
        for (y, row) in self.rows.iter_mut().enumerate().filter(|(y, _)| dirty[*y]) {
            *row = fingerprint(frame.row(y as u32));
        }
        let found = Self::best(&old, &self.rows, &dirty)?;
        let (top, bottom) = (found.to, found.to + found.rows);
        let parts = rects.iter().flat_map(|r| {
            let above = Rect { h: r.h.min(top.saturating_sub(r.y)), ..*r };
            let start = r.y.max(bottom);
            let below = Rect { y: start, h: (r.y + r.h).saturating_sub(start), ..*r };
            [above, below]
        });
        *rects = parts.filter(|r| !r.is_empty()).collect();
        Some(found)
    }

    fn best(old: &[u64], new: &[u64], dirty: &[bool]) -> Option<Move> {
        let changed = |y: usize| dirty[y] && old[y] != new[y];
        if (0..new.len()).filter(|y| changed(*y)).count() < LEAST as usize {
            return None;
        }
        // Where each row was, known by itself and the two below it; what was in several places says nothing of the
        // distance.
        let mut places: HashMap<[u64; 3], Option<usize>> = HashMap::with_capacity(old.len());
        let threes = |rows: &[u64]| rows.windows(3).map(|w| [w[0], w[1], w[2]]).collect::<Vec<_>>();
        for (y, rows) in threes(old).into_iter().enumerate().filter(|(_, rows)| !rows.contains(&0)) {
            places.entry(rows).and_modify(|p| *p = None).or_insert(Some(y));
        }
        let mut votes: HashMap<isize, u32> = HashMap::new();
        for (y, rows) in threes(new).into_iter().enumerate().filter(|(y, _)| changed(*y)) {
            if let Some(Some(from)) = places.get(&rows) {
                *votes.entry(*from as isize - y as isize).or_default() += 1;
            }
        }
        let (distance, count) = votes.into_iter().max_by_key(|(_, n)| *n)?;
        if count < LEAST / 2 || distance == 0 {
            return None;
        }
        // The longest run of rows that all moved so.
        let mut best = (0, 0);
        let mut start = None;
        for y in 0..=new.len() {
            let from = y as isize + distance;
            let same = y < new.len()
                && usize::try_from(from)
                    .is_ok_and(|f| old.get(f).is_some_and(|row| *row != 0 && *row == new[y]));
            match (same, start) {
                (true, None) => start = Some(y),
                (false, Some(first)) => {
                    if y - first > best.1 {
                        best = (first, y - first);
                    }
                    start = None;
                }
                _ => {}
            }
        }
        let (to, rows) = (best.0 as u32, best.1 as u32);
        (rows >= LEAST).then(|| Move { to, from: (best.0 as isize + distance) as u32, rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(first: u32) -> Frame {
        let mut f = Frame::new(100, 200).unwrap();
        for y in 0..200 {
            let line = (y + first) / 3;
            f.row_mut(y).iter_mut().enumerate().for_each(|(x, p)| *p = line * 77 + x as u32 * (line % 5));
        }
        f
    }

    #[test]
    fn scrolling_is_found_and_leaves_the_rest() {
        let mut scroll = Scroll::default();
        let (a, b) = (frame(0), frame(30));
        let all = vec![a.bounds()];
        assert_eq!(scroll.find(&a, &mut all.clone()), None);
        let mut rects = all.clone();
        let found = scroll.find(&b, &mut rects).unwrap();
        assert_eq!(found, Move { to: 0, from: 30, rows: 170 });
        assert_eq!(rects, [Rect::new(0, 170, 100, 30)]);
        // The other way.
        let mut rects = all.clone();
        let found = scroll.find(&a, &mut rects).unwrap();
        assert_eq!((found.to, found.from, found.rows), (30, 0, 170));
        assert_eq!(rects, [Rect::new(0, 0, 100, 30)]);
        // What the viewer has only in part is not copied from.
        scroll.forget_rows(&[Rect::new(0, 0, 1, 200)]);
        assert_eq!(scroll.find(&b, &mut all.clone()), None);
        scroll.forget();
        assert_eq!(scroll.find(&a, &mut all.clone()), None);
    }
}
