//! A storage in plain memory.

use super::{Held, Storage, ZeroFlags, Zeroing};
use crate::{Error, Result};
use std::sync::{
    RwLock,
    atomic::{AtomicBool, Ordering},
};

/// Bytes in memory, for tests, for scratch disks and for taking an image apart without a file.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    bytes: RwLock<Vec<u8>>,
    read_only: AtomicBool,
}

impl MemoryStorage {
    /// Storage holding `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        MemoryStorage { bytes: RwLock::new(bytes), read_only: AtomicBool::new(false) }
    }

    /// A copy of the contents.
    pub fn snapshot(&self) -> Vec<u8> {
        self.bytes.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn grow(&self, bytes: &mut Vec<u8>, end: u64) -> Result<usize> {
        // Bounded so that a corrupt table in an image kept in memory cannot ask for the whole host.
        const LIMIT: u64 = 1 << 36;
        let end = usize::try_from(end).ok().filter(|&e| e as u64 <= LIMIT).ok_or_else(|| {
            Error::io("Growing memory storage", std::io::Error::from_raw_os_error(libc::EFBIG))
        })?;
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        Ok(end)
    }

    fn writable(&self) -> Result<()> {
        if self.read_only() { Err(Error::ReadOnly("memory storage".into())) } else { Ok(()) }
    }
}

impl Storage for MemoryStorage {
    fn size(&self) -> Result<u64> {
        Ok(self.bytes.read().unwrap_or_else(|e| e.into_inner()).len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let bytes = self.bytes.read().unwrap_or_else(|e| e.into_inner());
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let n = buf.len().min(bytes.len() - start);
        buf[..n].copy_from_slice(&bytes[start..start + n]);
        buf[n..].fill(0);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.writable()?;
        let mut bytes = self.bytes.write().unwrap_or_else(|e| e.into_inner());
        let end = self.grow(&mut bytes, offset.saturating_add(buf.len() as u64))?;
        debug_assert!(end <= bytes.len());
        bytes[offset as usize..end].copy_from_slice(buf);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn set_size(&self, size: u64) -> Result<()> {
        self.writable()?;
        let mut bytes = self.bytes.write().unwrap_or_else(|e| e.into_inner());
        self.grow(&mut bytes, size)?;
        bytes.truncate(size as usize);
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, ZeroFlags::default()).map(drop)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _flags: ZeroFlags) -> Result<Zeroing> {
        self.writable()?;
        let mut bytes = self.bytes.write().unwrap_or_else(|e| e.into_inner());
        let end = self.grow(&mut bytes, offset.saturating_add(len))?;
        let start = (offset as usize).min(end);
        bytes[start..(offset + len) as usize].fill(0);
        Ok(Zeroing::Done)
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<Zeroing> {
        let mut bytes = self.bytes.write().unwrap_or_else(|e| e.into_inner());
        self.grow(&mut bytes, offset.saturating_add(len))?;
        Ok(Zeroing::Done)
    }

    fn held(&self, offset: u64, len: u64) -> Result<(Held, u64)> {
        let size = self.size()?;
        Ok(if offset >= size { (Held::Hole, len) } else { (Held::Data, len.min(size - offset)) })
    }

    fn allocated_size(&self) -> Option<u64> {
        self.size().ok()
    }

    fn read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    fn set_read_only(&self, read_only: bool) -> Result<()> {
        self.read_only.store(read_only, Ordering::Relaxed);
        Ok(())
    }

    fn name(&self) -> String {
        "memory".into()
    }

    fn protocol(&self) -> &'static str {
        "memory"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_on_write_and_reads_zeros_past_the_end() {
        let s = MemoryStorage::default();
        s.write_at(b"abc", 5).unwrap();
        assert_eq!(s.size().unwrap(), 8);
        s.write_at(b"x", 6).unwrap();
        let mut buf = [9; 6];
        s.read_at(&mut buf, 4).unwrap();
        assert_eq!(&buf, b"\0axc\0\0");
        s.write_zeroes(5, 1, ZeroFlags::default()).unwrap();
        assert_eq!(s.snapshot(), b"\0\0\0\0\0\0xc");
        assert!(s.write_at(b"x", u64::MAX - 3).is_err());
    }
}
