//! A storage that remembers every write, to see what a power cut at any point would leave.

use super::{Held, MemoryStorage, Storage, ZeroFlags, Zeroing};
use crate::Result;
use std::sync::Mutex;

/// A change that reached a storage.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// Bytes written at an offset.
    Write(u64, Vec<u8>),
    /// Zeros at an offset, of a length.
    Zero(u64, u64),
    /// A new size.
    Size(u64),
    /// Everything before is durable.
    Flush,
}

impl Change {
    /// Carries the change out on another storage.
    pub fn apply(&self, to: &dyn Storage) -> Result<()> {
        match self {
            Change::Write(offset, bytes) => to.write_at(bytes, *offset),
            Change::Zero(offset, len) => {
                // As far as the storage reaches: zeroing does not grow it beyond what the original did.
                to.write_zeroes(*offset, *len, ZeroFlags::default()).map(drop)
            }
            Change::Size(size) => to.set_size(*size),
            Change::Flush => Ok(()),
        }
    }
}

/// Memory with a record of all changes.
#[derive(Debug, Default)]
pub struct RecordingStorage {
    bytes: MemoryStorage,
    changes: Mutex<Vec<Change>>,
}

impl RecordingStorage {
    /// An empty storage.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many changes there were so far.
    pub fn len(&self) -> usize {
        self.changes.lock().unwrap_or_else(|e| e.into_inner()).len()
    }

    /// Whether nothing was changed yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All changes, in order.
    pub fn changes(&self) -> Vec<Change> {
        self.changes.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn note(&self, change: Change) {
        self.changes.lock().unwrap_or_else(|e| e.into_inner()).push(change);
    }
}

impl Storage for RecordingStorage {
    fn size(&self) -> Result<u64> {
        self.bytes.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.bytes.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.bytes.write_at(buf, offset)?;
        self.note(Change::Write(offset, buf.to_vec()));
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.note(Change::Flush);
        Ok(())
    }

    fn set_size(&self, size: u64) -> Result<()> {
        self.bytes.set_size(size)?;
        self.note(Change::Size(size));
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        // A discard may destroy the bytes: take the worst.
        let len = len.min(self.size()?.saturating_sub(offset));
        self.write_zeroes(offset, len, ZeroFlags { unmap: true }).map(drop)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<Zeroing> {
        let done = self.bytes.write_zeroes(offset, len, flags)?;
        self.note(Change::Zero(offset, len));
        Ok(done)
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<Zeroing> {
        let size = self.size()?.max(offset + len);
        self.set_size(size)?;
        Ok(Zeroing::Done)
    }

    fn held(&self, offset: u64, len: u64) -> Result<(Held, u64)> {
        self.bytes.held(offset, len)
    }

    fn read_only(&self) -> bool {
        self.bytes.read_only()
    }

    fn set_read_only(&self, read_only: bool) -> Result<()> {
        self.bytes.set_read_only(read_only)
    }

    fn name(&self) -> String {
        "recording".into()
    }

    fn protocol(&self) -> &'static str {
        "memory"
    }
}
