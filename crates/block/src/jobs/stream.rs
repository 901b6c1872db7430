//! Stream: copying what comes from backing files into the image, until it needs them no more.

use super::{Job, Step};
use crate::{
    Image, Result,
    formats::{Backing, Mapping},
};
use std::sync::Arc;

/// A stream in progress. Guest I/O goes on: each piece is copied while nobody else touches it.
pub struct Stream {
    image: Arc<Image>,
    /// How the image names its backing file at the end, and that file opened; `None` for none.
    base: Option<(Backing, Arc<Image>)>,
    /// Data at this depth and deeper stays where it is.
    base_depth: u32,
    at: u64,
}

impl Stream {
    /// Starts. With a base (an image of the chain, `base_depth` below: 1 is the immediate backing file) only what lies between
    /// is copied.
    pub fn new(image: Arc<Image>, base: Option<(Backing, Arc<Image>)>, base_depth: u32) -> Self {
        let base_depth = if base.is_some() { base_depth } else { u32::MAX };
        Stream { image, base, base_depth, at: 0 }
    }
}

impl Job for Stream {
    fn step(&mut self) -> Result<Step> {
        const PIECE: u64 = 1 << 20;
        let size = self.image.size();
        if self.at >= size {
            return Ok(Step::Finished);
        }
        let (mut entries, mut extents) = (Vec::new(), Vec::new());
        self.image.map(self.at, size - self.at, &mut entries)?;
        let Some(e) = entries.first() else { return Ok(Step::Finished) };
        if e.depth == 0 || e.depth >= self.base_depth || !e.present {
            self.at = e.start + e.length;
            return Ok(Step::Worked);
        }
        let len = e.length.min(PIECE);
        // The map may be old by now; what is allocated meanwhile is left alone under the range's lock.
        self.image.map_own(self.at, len, &mut extents)?;
        let end = self.at + len;
        for x in extents.iter().filter(|x| x.mapping == Mapping::Unallocated) {
            self.image.copy_up(x.offset, x.len.min(end.saturating_sub(x.offset)))?;
        }
        self.at = extents.last().map_or(end, |x| x.offset + x.len).min(end);
        Ok(Step::Worked)
    }

    fn progress(&self) -> (u64, u64) {
        (self.at, self.image.size())
    }

    fn complete(mut self: Box<Self>) -> Result<()> {
        while self.step()? == Step::Worked {}
        self.image.flush()?;
        let (backing, below) = match self.base.take() {
            Some((backing, below)) => (Some(backing), Some(below)),
            None => (None, None),
        };
        self.image.quiesced(|format| format.set_backing(backing.as_ref()))?;
        self.image.replace_backing(below);
        Ok(())
    }
}
