//! A part of a disk image as a file: for the crates that write partition tables and file systems.

use block::Image;
use std::io::{self, Read, Seek, SeekFrom, Write};

/// `len` bytes of an image from `start` on.
#[derive(Debug)]
pub struct View<'a> {
    image: &'a Image,
    start: u64,
    len: u64,
    at: u64,
}

impl<'a> View<'a> {
    /// A view of `len` bytes from `start` on, which must lie inside the image.
    ///
    /// # Errors
    /// They do not.
    pub fn new(image: &'a Image, start: u64, len: u64) -> io::Result<Self> {
        if start.checked_add(len).is_none_or(|end| end > image.size()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the part is outside the disk"));
        }
        Ok(Self { image, start, len, at: 0 })
    }

    fn room(&self, wanted: usize) -> usize {
        usize::try_from(self.len.saturating_sub(self.at)).unwrap_or(usize::MAX).min(wanted)
    }
}

impl Read for View<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.room(buf.len());
        self.image.read_at(&mut buf[..n], self.start + self.at).map_err(io::Error::other)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Write for View<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.room(buf.len());
        self.image.write_at(&buf[..n], self.start + self.at).map_err(io::Error::other)?;
        self.at += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(()) // the owner of the image flushes it once, at the end
    }
}

impl Seek for View<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(n) => Some(n),
            SeekFrom::End(n) => self.len.checked_add_signed(n),
            SeekFrom::Current(n) => self.at.checked_add_signed(n),
        };
        self.at =
            at.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "seek before the beginning"))?;
        Ok(self.at)
    }
}
