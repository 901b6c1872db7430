//! Guest physical memory as devices see it.
#![allow(unsafe_code)] // raw copies to and from guest memory, wrapped here for everyone

use crate::{Backing, Error, Layout, Mapping, PageTracker, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A range of guest physical addresses backed by host memory.
#[derive(Clone, Debug)]
pub struct Region {
    /// First guest physical address.
    pub start: u64,
    /// The host memory; its length is the region's.
    pub mapping: Arc<Mapping>,
    /// Page tracker of the region.
    pub tracker: Arc<PageTracker>,
}

impl Region {
    /// A region at `start` of fresh memory.
    ///
    /// # Errors
    /// The host cannot provide the memory.
    pub fn new(start: u64, len: u64, backing: &Backing, prealloc: bool) -> Result<Self> {
        Ok(Self {
            start,
            mapping: Arc::new(Mapping::new(backing, len, prealloc)?),
            tracker: Arc::new(PageTracker::new(len)),
        })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.mapping.len()
    }

    /// Whether the region is empty; it never is.
    pub fn is_empty(&self) -> bool {
        self.mapping.is_empty()
    }
}

/// All RAM of a guest. Cheap to clone; clones share the memory.
///
/// Copies are plain memory copies that race with the guest as real DMA does: the bytes read are *some* bytes the
/// guest wrote. Callers copy first and check the copy.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    regions: Arc<[Region]>,
}

/// A contiguous piece of guest memory, valid for as long as the memory it came from.
#[derive(Clone, Copy, Debug)]
pub struct GuestSlice<'a> {
    ptr: *mut u8,
    len: u64,
    tracker: &'a PageTracker,
    offset: u64,
}

/// Whether all bytes are zero, 64 at a time.
fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    let zero =
        |block: &[u8; 64]| block.as_chunks::<8>().0.iter().fold(0, |a, b| a | u64::from_ne_bytes(*b)) == 0;
    blocks.iter().all(zero) && rest.iter().all(|b| *b == 0)
}

/// A copy by vector registers. `memcpy` prefers REP MOVSB for this much, which is slow where KVM itself is emulated.
///
/// # Safety
/// `to` is valid for writes of as many bytes as there are.
unsafe fn copy_wide(from: &[u8], to: *mut u8) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_storeu_si128};
    let (blocks, rest) = from.as_chunks::<64>();
    // SAFETY: the caller's promise covers all blocks and the rest after them; SSE2 is part of x86-64.
    unsafe {
        for (i, block) in blocks.iter().enumerate() {
            let (from, to) = (block.as_ptr().cast::<__m128i>(), to.add(i * 64).cast::<__m128i>());
            let parts = [0, 1, 2, 3].map(|n| _mm_loadu_si128(from.add(n)));
            for (n, part) in parts.into_iter().enumerate() {
                _mm_storeu_si128(to.add(n), part);
            }
        }
        std::ptr::copy_nonoverlapping(rest.as_ptr(), to.add(blocks.len() * 64), rest.len());
    }
}

impl GuestSlice<'_> {
    /// Host address of the first byte, for system calls (iovecs, io_uring).
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the slice is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies `data` (as long as the slice) where it differs from zero, page by page. For large images into fresh RAM:
    /// pages that stay zero are never touched, so the host need not provide them.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_sparse(&self, data: &[u8]) {
        assert_eq!(data.len() as u64, self.len, "source and destination have one length");
        const PAGE: usize = crate::PAGE_SIZE as usize;
        for (i, page) in data.chunks(PAGE).enumerate() {
            if !is_zero(page) {
                // SAFETY: page i of the slice lies inside it, and guest memory never aliases `data`.
                unsafe { copy_wide(page, self.ptr.add(i * PAGE)) };
            }
        }
        self.wrote();
    }

    /// Must be called after writing through [`Self::as_ptr`], for instance when a read system call has finished.
    pub fn wrote(&self) {
        self.tracker.wrote(self.offset, self.len);
    }
}

impl GuestMemory {
    /// Allocates RAM for a layout, one region a range.
    ///
    /// # Errors
    /// The host cannot provide the memory.
    pub fn new(layout: &Layout, backing: &Backing, prealloc: bool) -> Result<Self> {
        let regions = layout
            .ranges
            .iter()
            .map(|r| Region::new(r.start, r.len, backing, prealloc))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self::from_regions(regions))
    }

    /// Memory made of the given regions, which must not overlap.
    pub fn from_regions(mut regions: Vec<Region>) -> Self {
        regions.sort_by_key(|r| r.start);
        Self { regions: regions.into() }
    }

    /// The regions, by ascending address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Total RAM in bytes.
    pub fn total(&self) -> u64 {
        self.regions.iter().map(Region::len).sum()
    }

    #[inline]
    fn find(&self, addr: u64) -> Option<(&Region, u64)> {
        self.regions.iter().find_map(|r| {
            let offset = addr.wrapping_sub(r.start);
            (offset < r.len()).then_some((r, offset))
        })
    }

    /// The longest contiguous piece at `addr` of at most `len` bytes.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if `addr` is not RAM.
    #[inline]
    pub fn chunk(&self, addr: u64, len: u64) -> Result<GuestSlice<'_>> {
        let (region, offset) = self.find(addr).ok_or(Error::OutOfRange { addr, len })?;
        Ok(GuestSlice {
            // SAFETY: offset is below the mapping's length.
            ptr: unsafe { region.mapping.as_ptr().add(offset as usize) },
            len: len.min(region.len() - offset),
            tracker: &region.tracker,
            offset,
        })
    }

    /// A contiguous piece of exactly `len` bytes.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless the whole range is in one region.
    #[inline]
    pub fn slice(&self, addr: u64, len: u64) -> Result<GuestSlice<'_>> {
        let s = self.chunk(addr, len)?;
        if s.len == len { Ok(s) } else { Err(Error::OutOfRange { addr, len }) }
    }

    /// Gives the whole 4 KiB pages of a range back to the host; the guest reads them as zero afterwards. Where the host
    /// cannot take them (pages of a larger size), they keep what is in them.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless the whole range is in one region.
    pub fn give_back(&self, addr: u64, len: u64) -> Result<bool> {
        let (region, offset) = self.find(addr).ok_or(Error::OutOfRange { addr, len })?;
        let end = offset.checked_add(len).filter(|end| *end <= region.len());
        let end = end.ok_or(Error::OutOfRange { addr, len })? & !0xfff;
        let start = offset.next_multiple_of(0x1000);
        if start >= end {
            return Ok(false);
        }
        let taken = region.mapping.discard(start, end - start).is_ok();
        if taken {
            region.tracker.wrote(start, end - start);
        }
        Ok(taken)
    }

    /// Copies from guest memory; the range may cross regions that touch.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; `buf` may then be partly filled.
    pub fn read(&self, mut addr: u64, mut buf: &mut [u8]) -> Result<()> {
        while !buf.is_empty() {
            let s = self.chunk(addr, buf.len() as u64)?;
            let n = s.len as usize;
            // SAFETY: source and destination are valid for n bytes, and guest memory never aliases `buf`.
            unsafe { std::ptr::copy_nonoverlapping(s.ptr, buf.as_mut_ptr(), n) };
            buf = &mut buf[n..];
            addr = addr.wrapping_add(n as u64);
        }
        Ok(())
    }

    /// Copies to guest memory; the range may cross regions that touch.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; the bytes before the bad address have then been written.
    pub fn write(&self, mut addr: u64, mut buf: &[u8]) -> Result<()> {
        while !buf.is_empty() {
            let s = self.chunk(addr, buf.len() as u64)?;
            let n = s.len as usize;
            // SAFETY: as in `read`, the other way.
            unsafe { std::ptr::copy_nonoverlapping(buf.as_ptr(), s.ptr, n) };
            s.wrote();
            buf = &buf[n..];
            addr = addr.wrapping_add(n as u64);
        }
        Ok(())
    }

    /// Fills a range with one byte.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], as for [`Self::write`].
    pub fn fill(&self, mut addr: u64, mut len: u64, byte: u8) -> Result<()> {
        while len != 0 {
            let s = self.chunk(addr, len)?;
            // SAFETY: the slice is valid for its length.
            unsafe { std::ptr::write_bytes(s.ptr, byte, s.len as usize) };
            s.wrote();
            addr = addr.wrapping_add(s.len);
            len -= s.len;
        }
        Ok(())
    }

    /// Reads a plain value.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn read_obj<T: FromBytes + IntoBytes>(&self, addr: u64) -> Result<T> {
        let mut value = T::new_zeroed();
        self.read(addr, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Writes a plain value.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn write_obj<T: IntoBytes + Immutable>(&self, addr: u64, value: &T) -> Result<()> {
        self.write(addr, value.as_bytes())
    }

    /// Atomic 16-bit load (`addr` must be even).
    ///
    /// # Errors
    /// [`Error::OutOfRange`], also for a misaligned address.
    #[inline]
    pub fn load_u16(&self, addr: u64, order: Ordering) -> Result<u16> {
        let s = self.aligned(addr, 2)?;
        // SAFETY: aligned, in range, and accessed atomically by every other thread.
        Ok(u16::from_le(unsafe { AtomicU16::from_ptr(s.ptr.cast()) }.load(order)))
    }

    /// Atomic 16-bit store (`addr` must be even).
    ///
    /// # Errors
    /// [`Error::OutOfRange`], also for a misaligned address.
    #[inline]
    pub fn store_u16(&self, addr: u64, value: u16, order: Ordering) -> Result<()> {
        let s = self.aligned(addr, 2)?;
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU16::from_ptr(s.ptr.cast()) }.store(value.to_le(), order);
        s.wrote();
        Ok(())
    }

    /// Atomic 32-bit load (`addr` must be a multiple of 4).
    ///
    /// # Errors
    /// [`Error::OutOfRange`], also for a misaligned address.
    #[inline]
    pub fn load_u32(&self, addr: u64, order: Ordering) -> Result<u32> {
        let s = self.aligned(addr, 4)?;
        // SAFETY: as in `load_u16`.
        Ok(u32::from_le(unsafe { AtomicU32::from_ptr(s.ptr.cast()) }.load(order)))
    }

    /// Atomic 32-bit store (`addr` must be a multiple of 4).
    ///
    /// # Errors
    /// [`Error::OutOfRange`], also for a misaligned address.
    #[inline]
    pub fn store_u32(&self, addr: u64, value: u32, order: Ordering) -> Result<()> {
        let s = self.aligned(addr, 4)?;
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU32::from_ptr(s.ptr.cast()) }.store(value.to_le(), order);
        s.wrote();
        Ok(())
    }

    /// Atomic 64-bit load (`addr` must be a multiple of 8).
    ///
    /// # Errors
    /// [`Error::OutOfRange`], also for a misaligned address.
    #[inline]
    pub fn load_u64(&self, addr: u64, order: Ordering) -> Result<u64> {
        let s = self.aligned(addr, 8)?;
        // SAFETY: as in `load_u16`.
        Ok(u64::from_le(unsafe { AtomicU64::from_ptr(s.ptr.cast()) }.load(order)))
    }

    #[inline]
    fn aligned(&self, addr: u64, len: u64) -> Result<GuestSlice<'_>> {
        if addr & (len - 1) != 0 {
            return Err(Error::OutOfRange { addr, len });
        }
        self.slice(addr, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> GuestMemory {
        GuestMemory::new(&Layout::pc(4 << 20, 2 << 20).unwrap(), &Backing::Anonymous, false).unwrap()
    }

    #[test]
    fn copies_and_bounds() {
        let m = ram();
        m.write(0x1000, b"kvasir").unwrap();
        let mut b = [0; 6];
        m.read(0x1000, &mut b).unwrap();
        assert_eq!(&b, b"kvasir");
        assert!(m.write((2 << 20) - 1, b"ab").is_err());
        assert!(m.read(u64::MAX, &mut b).is_err());
        assert!(m.slice((4 << 30) + (2 << 20) - 8, 9).is_err());
        m.store_u16(0x2000, 0x1234, Ordering::Release).unwrap();
        assert_eq!(m.load_u16(0x2000, Ordering::Acquire).unwrap(), 0x1234);
        assert!(m.load_u32(0x2002, Ordering::Acquire).is_err());
    }

    #[test]
    fn sparse_copies_leave_zero_pages_untouched() {
        let m = ram();
        let mut data = vec![0; 5 * 4096 + 100];
        data[4096] = 1;
        data[3 * 4096 - 1] = 2;
        data[5 * 4096 + 99] = 3;
        m.fill(0x10_0000, 4096, 9).unwrap();
        m.slice(0x10_0000, data.len() as u64).unwrap().copy_sparse(&data);
        let mut back = vec![0; data.len()];
        m.read(0x10_0000, &mut back).unwrap();
        assert!(back[..4096].iter().all(|b| *b == 9), "a page of zeros is skipped");
        assert_eq!(back[4096..], data[4096..]);
    }

    #[test]
    fn ram_is_aligned_for_huge_pages() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let m = GuestMemory::new(&Layout::pc(3 << 20, 1 << 30).unwrap(), &backing, false).unwrap();
            assert_eq!(m.regions()[0].mapping.as_ptr() as usize % (2 << 20), 0);
        }
    }

    #[test]
    fn shared_backing_has_a_file() {
        let m = GuestMemory::new(&Layout::pc(1 << 20, 1 << 30).unwrap(), &Backing::Memfd, false).unwrap();
        let file = m.regions()[0].mapping.file().unwrap();
        m.write(10, b"x").unwrap();
        let mut b = [0];
        std::os::unix::fs::FileExt::read_at(file, &mut b, 10).unwrap();
        assert_eq!(&b, b"x");
    }

    #[test]
    fn whole_pages_are_given_back() {
        let memory =
            GuestMemory::new(&Layout::pc(2 << 20, 1 << 30).unwrap(), &Backing::Anonymous, false).unwrap();
        memory.fill(0, 0x4000, 7).unwrap();
        assert!(memory.give_back(0x800, 0x2000).unwrap());
        let byte = |at| memory.read_obj::<u8>(at).unwrap();
        assert_eq!([0xfff, 0x1000, 0x1fff, 0x2000].map(byte), [7, 0, 0, 7]);
        assert!(!memory.give_back(0x2001, 0x1ffe).unwrap(), "no whole page");
        assert!(memory.give_back(2 << 20, 0x1000).is_err());
        assert!(memory.give_back(0x1000, u64::MAX).is_err());
    }

    #[test]
    fn discarded_pages_read_zero() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let m = GuestMemory::new(&Layout::pc(1 << 20, 1 << 30).unwrap(), &backing, false).unwrap();
            m.write(0x3000, b"x").unwrap();
            m.regions()[0].mapping.discard(0x3000, 0x1000).unwrap();
            assert_eq!(m.read_obj::<u8>(0x3000).unwrap(), 0);
            assert!(m.regions()[0].mapping.discard(1 << 20, 1).is_err());
        }
    }

    #[test]
    fn the_host_says_no() {
        let e = GuestMemory::new(
            &Layout::pc(64 << 40, 2 << 30).unwrap(),
            &Backing::HugeTlb { page_size: Some(1 << 30) },
            false,
        )
        .unwrap_err()
        .to_string();
        assert!(e.contains("hugetlb") && e.contains("nr_hugepages"), "{e}");
    }
}
