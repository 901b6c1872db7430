//! A root table of 64-bit offsets of leaf tables, whose 64-bit entries describe the units: the shape of QED and qcow.

use super::{MetaCache, Tail, be64, flush_ordered, le64};
use crate::{Error, Result, storage::Storage};
use std::sync::{Arc, Mutex};

/// Bytes of tables kept in memory at most: of leaf tables, and of the root table.
const CACHE: (usize, usize) = (8 << 20, 1 << 20);

/// Where the tables are and how they look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Offset of the root table, and its entries.
    pub(crate) root: (u64, u64),
    /// Entries of a leaf table.
    pub(crate) leaf_entries: u64,
    /// Entries are stored most significant byte first.
    pub(crate) big_endian: bool,
    /// Leaf tables and plain units begin at multiples of this.
    pub(crate) align: u64,
    /// End of the space that entries can address.
    pub(crate) limit: u64,
}

/// The tables of an open image and the space behind them.
pub(crate) struct TwoLevel {
    pub(crate) shape: Shape,
    pub(crate) tail: Tail,
    storage: Arc<dyn Storage>,
    root: MetaCache,
    leaves: MetaCache,
    making: Mutex<()>,
    serial: Mutex<()>,
}

impl TwoLevel {
    /// Tables of `shape`; new space begins at `next`.
    pub(crate) fn new(storage: Arc<dyn Storage>, shape: Shape, next: u64) -> Result<Self> {
        Ok(TwoLevel {
            shape,
            tail: Tail::new(Arc::clone(&storage), next, shape.limit)?,
            root: MetaCache::new(Arc::clone(&storage), CACHE.1),
            leaves: MetaCache::new(Arc::clone(&storage), CACHE.0),
            storage,
            making: Mutex::new(()),
            serial: Mutex::new(()),
        })
    }

    fn decode(&self, bytes: &[u8], at: usize) -> u64 {
        if self.shape.big_endian { be64(bytes, at) } else { le64(bytes, at) }
    }

    fn encode(&self, value: u64) -> [u8; 8] {
        if self.shape.big_endian { value.to_be_bytes() } else { value.to_le_bytes() }
    }

    /// Entry `index` of the root table.
    pub(crate) fn root_entry(&self, index: u64) -> Result<u64> {
        if index >= self.shape.root.1 {
            return Err(Error::invalid("the disk is larger than its tables"));
        }
        let mut bytes = [0; 8];
        self.root.read(self.shape.root.0 + index * 8, &mut bytes)?;
        Ok(self.decode(&bytes, 0))
    }

    /// Whether an offset from a table can be one: aligned, behind the root table, and within what is used of the file.
    pub(crate) fn is_sound(&self, offset: u64, len: u64) -> bool {
        offset.is_multiple_of(self.shape.align)
            && offset >= self.shape.root.0
            && offset.checked_add(len).is_some_and(|end| end <= self.tail.end())
            && (offset >= self.shape.root.0 + self.shape.root.1 * 8)
    }

    fn leaf(&self, index: u64) -> Result<Option<u64>> {
        match self.root_entry(index)? {
            0 => Ok(None),
            offset if self.is_sound(offset, self.shape.leaf_entries * 8) => Ok(Some(offset)),
            offset => Err(Error::Corrupt(format!(
                "'{}': the second-level table {index} is said to be at {offset:#x}, where none can be",
                self.storage.name()
            ))),
        }
    }

    /// Reads the entries of up to `out.len()` units from `first` on; 0 where there is no leaf table. The result is how many.
    pub(crate) fn entries(&self, first: u64, out: &mut [u64]) -> Result<usize> {
        let (index, within) = (first / self.shape.leaf_entries, first % self.shape.leaf_entries);
        let n = out.len().min(512).min((self.shape.leaf_entries - within) as usize);
        let Some(leaf) = self.leaf(index)? else {
            out[..n].fill(0);
            return Ok(n);
        };
        let mut bytes = [0; 4096];
        self.leaves.read(leaf + within * 8, &mut bytes[..n * 8])?;
        for (i, entry) in out[..n].iter_mut().enumerate() {
            *entry = self.decode(&bytes, i * 8);
        }
        Ok(n)
    }

    /// Changes a unit's entry, making its leaf table if there is none.
    pub(crate) fn set(&self, unit: u64, entry: u64) -> Result<()> {
        let (index, within) = (unit / self.shape.leaf_entries, unit % self.shape.leaf_entries);
        let leaf = match self.leaf(index)? {
            Some(leaf) => leaf,
            None => self.new_leaf(index)?,
        };
        self.leaves.write(leaf + within * 8, &self.encode(entry))?;
        if self.leaves.is_full() || self.root.is_full() { self.flush() } else { Ok(()) }
    }

    fn new_leaf(&self, index: u64) -> Result<u64> {
        // Two units of one table are written by different threads; only one makes it.
        let _making = self.making.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(leaf) = self.leaf(index)? {
            return Ok(leaf);
        }
        let len = self.shape.leaf_entries * 8;
        let leaf = self.tail.take_aligned(len, self.shape.align)?;
        if !self.tail.is_fresh(leaf) {
            // A table may be large; in pieces its zeros do not fill the cache.
            for at in (0..len).step_by(1 << 16) {
                self.storage
                    .write_at(&crate::storage::ZEROS[..(len - at).min(1 << 16) as usize], leaf + at)?;
            }
        }
        self.root.write(self.shape.root.0 + index * 8, &self.encode(leaf))?;
        Ok(leaf)
    }

    /// Points root entry `index` nowhere, for repairs.
    pub(crate) fn clear_root(&self, index: u64) -> Result<()> {
        self.root.write(self.shape.root.0 + index * 8, &[0; 8])
    }

    /// Space for one plain unit, and whether it is known to be zeros.
    pub(crate) fn allocate(&self, len: u64) -> Result<(u64, bool)> {
        let host = self.tail.take_aligned(len, self.shape.align)?;
        Ok((host, self.tail.is_fresh(host)))
    }

    /// Data, leaf tables, root table, each behind a barrier.
    pub(crate) fn flush(&self) -> Result<()> {
        flush_ordered(&self.serial, &*self.storage, &[&self.leaves, &self.root], || self.tail.pad())
    }
}
