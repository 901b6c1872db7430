//! A part of another storage, as a storage of its own.

use super::{Held, Permissions, Storage, ZeroFlags, Zeroing};
use crate::{Error, Result};
use std::sync::Arc;

/// `size` bytes of `inner` from `start`. It cannot grow.
#[derive(Debug)]
pub struct Window {
    inner: Arc<dyn Storage>,
    start: u64,
    size: u64,
}

impl Window {
    /// The window; `start + size` must not overflow.
    pub fn new(inner: Arc<dyn Storage>, start: u64, size: u64) -> Result<Self> {
        start.checked_add(size).ok_or_else(|| Error::usage("offset and size exceed 2^64"))?;
        Ok(Window { inner, start, size })
    }

    fn check(&self, offset: u64, len: u64) -> Result<u64> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(self.start + offset),
            _ => Err(Error::OutOfRange { offset, len, size: self.size }),
        }
    }
}

impl Storage for Window {
    fn size(&self) -> Result<u64> {
        Ok(self.size)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let n = self.size.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (inside, past) = buf.split_at_mut(n);
        past.fill(0);
        if inside.is_empty() { Ok(()) } else { self.inner.read_at(inside, self.start + offset) }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.inner.write_at(buf, self.check(offset, buf.len() as u64)?)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn set_size(&self, size: u64) -> Result<()> {
        if size == self.size {
            Ok(())
        } else {
            Err(Error::unsupported("Cannot resize a window into another file"))
        }
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.discard(self.check(offset, len)?, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<Zeroing> {
        self.inner.write_zeroes(self.check(offset, len)?, len, flags)
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<Zeroing> {
        self.inner.allocate(self.check(offset, len)?, len)
    }

    fn held(&self, offset: u64, len: u64) -> Result<(Held, u64)> {
        if offset >= self.size {
            return Ok((Held::Hole, len));
        }
        self.inner.held(self.start + offset, len.min(self.size - offset))
    }

    fn allocated_size(&self) -> Option<u64> {
        self.inner.allocated_size()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn set_read_only(&self, read_only: bool) -> Result<()> {
        self.inner.set_read_only(read_only)
    }

    fn path(&self) -> Option<&std::path::Path> {
        self.inner.path()
    }

    fn name(&self) -> String {
        self.inner.name()
    }

    fn protocol(&self) -> &'static str {
        self.inner.protocol()
    }

    fn set_permissions(&self, permissions: Permissions) -> Result<()> {
        self.inner.set_permissions(permissions)
    }
}
