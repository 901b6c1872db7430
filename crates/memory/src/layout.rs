//! Where RAM lies in guest physical address space.

use crate::{Error, PAGE_SIZE, format_size};

/// End of the 32-bit MMIO hole: RAM above it continues here.
pub const MMIO_HOLE_END: u64 = 1 << 32;

/// A range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// RAM of a PC: from zero up to the hole below 4 GiB, and the rest from 4 GiB up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// RAM ranges, ascending.
    pub ranges: Vec<Range>,
}

impl Layout {
    /// Lays out `size` bytes of RAM around a hole that starts at `hole_start` (page-aligned, below 4 GiB).
    ///
    /// # Errors
    /// [`Error::BadSize`] for less than 1 MiB, more than 64 TiB, or a size that is no multiple of a page.
    pub fn pc(size: u64, hole_start: u64) -> Result<Self, Error> {
        if size < 1 << 20 {
            return Err(Error::BadSize(format!(
                "memory size {} is too small: a PC needs at least 1 MiB",
                format_size(size)
            )));
        }
        if size > 1 << 46 {
            return Err(Error::BadSize(format!(
                "memory size {} is larger than the 64 TiB maximum",
                format_size(size)
            )));
        }
        if !size.is_multiple_of(PAGE_SIZE) {
            return Err(Error::BadSize(format!(
                "memory size {size} bytes is not a multiple of the page size, {PAGE_SIZE} bytes"
            )));
        }
        let low = size.min(hole_start);
        let mut ranges = vec![Range { start: 0, len: low }];
        if size > low {
            ranges.push(Range { start: MMIO_HOLE_END, len: size - low });
        }
        Ok(Self { ranges })
    }

    /// Total bytes of RAM.
    pub fn total(&self) -> u64 {
        self.ranges.iter().map(|r| r.len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memory_is_one_range() {
        let l = Layout::pc(512 << 20, 0xc000_0000).unwrap();
        assert_eq!(l.ranges, [Range { start: 0, len: 512 << 20 }]);
    }

    #[test]
    fn large_memory_goes_around_the_hole() {
        let l = Layout::pc(4 << 30, 0x8000_0000).unwrap();
        assert_eq!(l.ranges, [Range { start: 0, len: 2 << 30 }, Range { start: 4 << 30, len: 2 << 30 }]);
        assert_eq!(l.total(), 4 << 30);
    }

    #[test]
    fn impossible_sizes() {
        assert!(Layout::pc(4096, 0x8000_0000).is_err());
        assert!(Layout::pc((1 << 20) + 1, 0x8000_0000).is_err());
        assert!(Layout::pc(1 << 50, 0x8000_0000).is_err());
    }
}
