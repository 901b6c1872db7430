//! A storage that keeps nothing: for measuring everything else.

use super::{Held, Storage, ZeroFlags, Zeroing};
use crate::Result;

/// Reads give zeros (or leave the buffer as it was), writes vanish.
#[derive(Debug)]
pub struct NullStorage {
    size: u64,
    zeroes: bool,
}

impl NullStorage {
    /// A null device of `size` bytes; without `zeroes`, reads do not even clear the buffer.
    pub fn new(size: u64, zeroes: bool) -> Self {
        NullStorage { size, zeroes }
    }
}

impl Storage for NullStorage {
    fn size(&self) -> Result<u64> {
        Ok(self.size)
    }

    fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
        if self.zeroes {
            buf.fill(0);
        }
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn set_size(&self, _size: u64) -> Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _flags: ZeroFlags) -> Result<Zeroing> {
        Ok(Zeroing::Done)
    }

    fn allocate(&self, _offset: u64, _len: u64) -> Result<Zeroing> {
        Ok(Zeroing::Done)
    }

    fn held(&self, _offset: u64, len: u64) -> Result<(Held, u64)> {
        Ok((if self.zeroes { Held::Hole } else { Held::Data }, len))
    }

    fn read_only(&self) -> bool {
        false
    }

    fn set_read_only(&self, _read_only: bool) -> Result<()> {
        Ok(())
    }

    fn name(&self) -> String {
        "null-co://".into()
    }

    fn protocol(&self) -> &'static str {
        "null-co"
    }
}
