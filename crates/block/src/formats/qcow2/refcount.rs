//! Reference counts of host clusters, and the allocation of clusters.
//!
//! Counts live in refcount blocks, found through the refcount table. Blocks are kept in memory once read. Counts only ever
//! rise between two flushes: what is freed waits in `freed` until the tables that referred to it are durable without it
//! (see `flush.rs`), so that a power cut can leave leaks, but never a reference to a cluster that is free or was reused.

use super::table::words;
use crate::{
    Error, Result,
    storage::{Storage, StorageExt},
};
use std::sync::Arc;

/// A refcount block in memory, as stored.
#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    dirty: bool,
}

/// The refcount structures and the allocator on them. Under the metadata lock.
#[derive(Debug)]
pub(super) struct Refcounts {
    storage: Arc<dyn Storage>,
    cluster_bits: u32,
    order: u32,
    /// Offsets of blocks, 0 where there is none.
    table: Vec<u64>,
    table_offset: u64,
    /// Blocks in memory, by their index in the table (as far as any was needed).
    blocks: Vec<Option<Box<Block>>>,
    /// How many of them there are, and which are to be written.
    loaded: usize,
    dirty: Vec<u64>,
    /// Table entries to be written.
    table_dirty: Vec<u64>,
    /// The table moved: the header must say so, and then the old place is free.
    pub(super) moved: Option<(u64, u64)>,
    /// Clusters before this one are all in use.
    free_from: u64,
    /// No cluster from here on was ever used: the file ends before it.
    end: u64,
    /// Ranges (first cluster, count) that lose a reference once the tables are durable.
    freed: Vec<(u64, u64)>,
}

/// Reads a count of 2^order bits.
pub(super) fn get_count(bytes: &[u8], order: u32, index: u64) -> u64 {
    let i = index as usize;
    match order {
        0..=2 => {
            let bits = 1usize << order;
            let mask = (1u16 << bits) - 1;
            u64::from(u16::from(bytes[i * bits / 8] >> (i * bits % 8)) & mask)
        }
        3 => u64::from(bytes[i]),
        _ => {
            let n = 1usize << (order - 3);
            bytes[i * n..(i + 1) * n].iter().fold(0, |v, &b| v << 8 | u64::from(b))
        }
    }
}

/// Writes a count of 2^order bits.
pub(super) fn set_count(bytes: &mut [u8], order: u32, index: u64, count: u64) {
    let i = index as usize;
    match order {
        0..=2 => {
            let bits = 1usize << order;
            let mask = ((1u16 << bits) - 1) as u8;
            let shift = i * bits % 8;
            let byte = &mut bytes[i * bits / 8];
            *byte = *byte & !(mask << shift) | (count as u8 & mask) << shift;
        }
        3 => bytes[i] = count as u8,
        _ => {
            let n = 1usize << (order - 3);
            bytes[i * n..(i + 1) * n].copy_from_slice(&count.to_be_bytes()[8 - n..]);
        }
    }
}

/// Largest count of 2^order bits.
pub(super) fn max_count(order: u32) -> u64 {
    if order >= 6 { u64::MAX } else { (1 << (1u32 << order)) - 1 }
}

impl Refcounts {
    /// Reads the refcount table.
    pub(super) fn open(
        storage: Arc<dyn Storage>,
        cluster_bits: u32,
        order: u32,
        table_offset: u64,
        table_clusters: u64,
    ) -> Result<Self> {
        let bytes = storage.read_vec(table_offset, (table_clusters << cluster_bits) as usize)?;
        // Bits 0 to 8 are reserved.
        let table = words(&bytes).map(|w| w & !0x1ff).collect();
        let end = storage.size()?.div_ceil(1 << cluster_bits);
        Ok(Refcounts {
            storage,
            cluster_bits,
            order,
            table,
            table_offset,
            blocks: Vec::new(),
            loaded: 0,
            dirty: Vec::new(),
            table_dirty: Vec::new(),
            moved: None,
            free_from: 0,
            end,
            freed: Vec::new(),
        })
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Counts per block.
    pub(super) fn per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.order)
    }

    /// Largest possible count.
    pub(super) fn max(&self) -> u64 {
        max_count(self.order)
    }

    /// The refcount table, for checks.
    pub(super) fn table(&self) -> &[u64] {
        &self.table
    }

    /// Where the table is.
    pub(super) fn table_offset(&self) -> u64 {
        self.table_offset
    }

    /// Clusters of the table.
    pub(super) fn table_clusters(&self) -> u64 {
        (self.table.len() as u64 * 8) >> self.cluster_bits
    }

    /// First cluster past everything that was ever used.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    fn block(&mut self, index: u64) -> Result<Option<&mut Block>> {
        let Some(&offset) = usize::try_from(index).ok().and_then(|i| self.table.get(i)) else {
            return Ok(None);
        };
        if offset == 0 {
            return Ok(None);
        }
        if offset & (self.cluster_size() - 1) != 0 {
            return Err(Error::Corrupt(format!(
                "Refblock offset {offset:#x} unaligned (reftable index: {index:#x}); run a check with repair"
            )));
        }
        let slot = index as usize;
        if self.blocks.get(slot).is_none_or(Option::is_none) {
            let mut bytes = vec![0; self.cluster_size() as usize];
            self.storage.read_at(&mut bytes, offset)?;
            self.put_block(slot, Block { bytes, dirty: false });
        }
        Ok(self.blocks[slot].as_deref_mut())
    }

    fn put_block(&mut self, slot: usize, block: Block) {
        if self.blocks.len() <= slot {
            self.blocks.resize_with(slot + 1, || None);
        }
        if block.dirty {
            self.dirty.push(slot as u64);
        }
        self.loaded += usize::from(self.blocks[slot].is_none());
        self.blocks[slot] = Some(Box::new(block));
    }

    /// The part of a block in memory that counts `first ..`, for comparing many at once: bytes, and the index of `first`.
    pub(super) fn counts_from(&mut self, first: u64) -> Result<Option<(&[u8], u64)>> {
        let per_block = self.per_block();
        Ok(self.block(first / per_block)?.map(|b| (&b.bytes[..], first % per_block)))
    }

    /// The count of a cluster; 0 where nothing is recorded.
    pub(super) fn get(&mut self, cluster: u64) -> Result<u64> {
        let (order, per_block) = (self.order, self.per_block());
        Ok(self.block(cluster / per_block)?.map_or(0, |b| get_count(&b.bytes, order, cluster % per_block)))
    }

    /// Sets the count of a cluster, adding a block where there is none.
    pub(super) fn set(&mut self, cluster: u64, count: u64) -> Result<()> {
        let (order, per_block) = (self.order, self.per_block());
        let index = cluster / per_block;
        if self.block(index)?.is_none() {
            if count == 0 {
                return Ok(());
            }
            self.add_block(index, None)?;
        }
        match self.block(index)? {
            Some(block) => {
                set_count(&mut block.bytes, order, cluster % per_block, count);
                if !std::mem::replace(&mut block.dirty, true) {
                    self.dirty.push(index);
                }
            }
            None => return Err(Error::Corrupt("a refcount block vanished".into())),
        }
        if count == 0 {
            self.free_from = self.free_from.min(cluster);
        }
        Ok(())
    }

    /// Adds one reference to each cluster of a range.
    pub(super) fn reference(&mut self, first: u64, count: u64) -> Result<()> {
        for cluster in first..first + count {
            let old = self.get(cluster)?;
            if old >= self.max() {
                return Err(Error::unsupported(format!(
                    "The refcount of cluster {cluster} would exceed {}; use an image with wider refcounts (refcount_bits)",
                    self.max()
                )));
            }
            self.set(cluster, old + 1)?;
        }
        Ok(())
    }

    /// Takes one reference from each cluster of a range, as soon as that is safe.
    pub(super) fn release(&mut self, first: u64, count: u64) {
        match self.freed.last_mut() {
            Some((start, n)) if *start + *n == first => *n += count,
            _ => self.freed.push((first, count)),
        }
    }

    /// How many ranges wait to be released.
    pub(super) fn waiting(&self) -> usize {
        self.freed.len()
    }

    /// Takes references away now: the tables are durable. The result are ranges of clusters that are free.
    pub(super) fn settle(&mut self) -> Result<Vec<(u64, u64)>> {
        let mut free: Vec<(u64, u64)> = Vec::new();
        for (first, count) in std::mem::take(&mut self.freed) {
            for cluster in first..first + count {
                if self.drop_reference(cluster)? {
                    match free.last_mut() {
                        Some((start, n)) if *start + *n == cluster => *n += 1,
                        _ => free.push((cluster, 1)),
                    }
                }
            }
        }
        Ok(free)
    }

    /// Takes one reference away at once; the result is whether the cluster is free now.
    pub(super) fn drop_reference(&mut self, cluster: u64) -> Result<bool> {
        match self.get(cluster)? {
            0 => {
                tracing::warn!(cluster, "freeing a cluster that is free; the image needs a check");
                Ok(false)
            }
            n => {
                self.set(cluster, n - 1)?;
                Ok(n == 1)
            }
        }
    }

    /// Allocates up to `want` neighbouring clusters (at least one), each with one reference. The result is the first, how
    /// many, and whether all of them lie where the file never was (and so reads as zeros).
    pub(super) fn allocate(&mut self, want: u64) -> Result<(u64, u64, bool)> {
        loop {
            let first = self.find_free()?;
            if first >= 1 << (56 - self.cluster_bits) {
                return Err(Error::unsupported("The image file would exceed 2^56 bytes"));
            }
            let per_block = self.per_block();
            if self.block(first / per_block)?.is_none() {
                self.add_block(first / per_block, Some(first))?;
                continue;
            }
            // A run ends with its block, or at the first cluster in use.
            let room = want.max(1).min(per_block - first % per_block);
            let mut count = 1;
            while count < room && (first + count >= self.end || self.get(first + count)? == 0) {
                count += 1;
            }
            let fresh = first >= self.end;
            for cluster in first..first + count {
                self.set(cluster, 1)?;
            }
            self.free_from = first + count;
            self.end = self.end.max(first + count);
            return Ok((first, count, fresh));
        }
    }

    /// Allocates exactly `want` neighbouring clusters, at the end of the file if there is no room before.
    pub(super) fn allocate_exact(&mut self, want: u64) -> Result<u64> {
        if want <= 1 {
            return Ok(self.allocate(1)?.0);
        }
        // Blocks for the run are added first, as they take clusters themselves.
        let per_block = self.per_block();
        loop {
            let first = self.end;
            let missing = (first / per_block..=(first + want - 1) / per_block)
                .find(|&i| usize::try_from(i).ok().and_then(|i| self.table.get(i)).is_none_or(|&b| b == 0));
            match missing {
                Some(index) => self.add_block(index, Some(first))?,
                None => {
                    for cluster in first..first + want {
                        self.set(cluster, 1)?;
                    }
                    self.end = first + want;
                    return Ok(first);
                }
            }
        }
    }

    /// Takes a particular cluster if it is free.
    pub(super) fn allocate_at(&mut self, cluster: u64) -> Result<bool> {
        if self.get(cluster)? != 0 || self.block(cluster / self.per_block())?.is_none() {
            return Ok(false);
        }
        self.set(cluster, 1)?;
        self.end = self.end.max(cluster + 1);
        Ok(true)
    }

    /// Gives back at once what was allocated and never mapped.
    pub(super) fn give_back(&mut self, first: u64, count: u64) -> Result<()> {
        for cluster in first..first + count {
            self.drop_reference(cluster)?;
        }
        Ok(())
    }

    /// The first free cluster at or after the hint.
    fn find_free(&mut self) -> Result<u64> {
        let mut cluster = self.free_from;
        let per_block = self.per_block();
        let order = self.order;
        while cluster < self.end {
            let (index, stop) = (cluster / per_block, self.end.min((cluster / per_block + 1) * per_block));
            match self.block(index)? {
                Some(block) => {
                    while cluster < stop && get_count(&block.bytes, order, cluster % per_block) != 0 {
                        cluster += 1;
                    }
                    if cluster < stop {
                        break;
                    }
                }
                None => break,
            }
        }
        self.free_from = cluster;
        Ok(cluster)
    }

    /// Adds the block with number `index`. It lies at `at` (which is free), or at the end of the file.
    fn add_block(&mut self, index: u64, at: Option<u64>) -> Result<()> {
        let slot = usize::try_from(index).map_err(|_| Error::unsupported("The image file is too large"))?;
        if slot >= self.table.len() {
            return self.grow_table(index);
        }
        let per_block = self.per_block();
        let cluster = at.unwrap_or(self.end);
        let home = cluster / per_block;
        if home != index && self.block(home)?.is_none() {
            // The new block's own cluster must be counted, too.
            return self.add_block(home, Some(cluster)).and_then(|()| self.add_block(index, None));
        }
        let bytes = vec![0; self.cluster_size() as usize];
        self.put_block(slot, Block { bytes, dirty: true });
        self.table[slot] = cluster << self.cluster_bits;
        self.table_dirty.push(index);
        self.end = self.end.max(cluster + 1);
        self.set(cluster, 1)
    }

    /// Moves the refcount table to a larger place, with room for block `index`.
    fn grow_table(&mut self, index: u64) -> Result<()> {
        let per_block = self.per_block();
        let entries_per_cluster = self.cluster_size() / 8;
        let start = self.end.max(index.saturating_mul(per_block));
        // The new table and the blocks that count it lie at the file's end, and must be counted by those blocks.
        let (mut table_clusters, mut blocks) = (1u64, 1u64);
        loop {
            let last = start + table_clusters + blocks;
            let need_entries = (last / per_block + 1).max(self.table.len() as u64 * 3 / 2);
            let need_clusters = need_entries.div_ceil(entries_per_cluster);
            let need_blocks = last / per_block - start / per_block + 1;
            if need_clusters <= table_clusters && need_blocks <= blocks {
                break;
            }
            table_clusters = table_clusters.max(need_clusters);
            blocks = blocks.max(need_blocks);
        }
        if table_clusters << self.cluster_bits > super::header::MAX_REFTABLE_BYTES.max(self.cluster_size()) {
            return Err(Error::unsupported(
                "The image file is too large for its cluster size; convert it to one with larger clusters",
            ));
        }
        let old = (self.table_offset >> self.cluster_bits, self.table_clusters());
        self.table.resize((table_clusters * entries_per_cluster) as usize, 0);
        let mut cluster = start;
        for block in start / per_block..=(start + table_clusters + blocks - 1) / per_block {
            if self.table[block as usize] == 0 {
                self.table[block as usize] = cluster << self.cluster_bits;
                let bytes = vec![0; self.cluster_size() as usize];
                self.put_block(block as usize, Block { bytes, dirty: true });
                cluster += 1;
            }
        }
        let table_at = cluster;
        self.end = self.end.max(table_at + table_clusters);
        for cluster in start..table_at + table_clusters {
            self.set(cluster, 1)?;
        }
        self.table_offset = table_at << self.cluster_bits;
        self.table_dirty = (0..self.table.len() as u64).collect();
        // Two moves between flushes: only the first old place is still what the disk refers to; a later one never was.
        match self.moved {
            None => self.moved = Some(old),
            Some(_) => self.give_back(old.0, old.1)?,
        }
        Ok(())
    }

    /// Whether anything waits to be written.
    pub(super) fn is_dirty(&self) -> bool {
        !self.table_dirty.is_empty() || !self.dirty.is_empty()
    }

    /// Whether table entries wait to be written.
    pub(super) fn table_is_dirty(&self) -> bool {
        !self.table_dirty.is_empty()
    }

    /// Writes the changed blocks.
    pub(super) fn write_blocks(&mut self) -> Result<bool> {
        self.dirty.sort_unstable();
        let wrote = !self.dirty.is_empty();
        while let Some(&index) = self.dirty.last() {
            let offset = self.table[index as usize];
            if let Some(block) = self.blocks.get_mut(index as usize).and_then(Option::as_deref_mut) {
                self.storage.write_at(&block.bytes, offset)?;
                block.dirty = false;
            }
            self.dirty.pop();
        }
        // Blocks cost a cluster of memory each; what is clean can be read again.
        const KEEP: usize = 16 << 20;
        if self.loaded > (KEEP >> self.cluster_bits).max(8) {
            self.blocks.clear();
            self.loaded = 0;
        }
        Ok(wrote)
    }

    /// Writes the changed table entries (all of the table, if it moved).
    pub(super) fn write_table(&mut self) -> Result<()> {
        let mut dirty = std::mem::take(&mut self.table_dirty);
        dirty.sort_unstable();
        dirty.dedup();
        let result = (|| {
            for run in dirty.chunk_by(|a, b| a + 1 == *b) {
                let bytes: Vec<u8> = run.iter().flat_map(|&i| self.table[i as usize].to_be_bytes()).collect();
                self.storage.write_at(&bytes, self.table_offset + run[0] * 8)?;
            }
            Ok(())
        })();
        if result.is_err() {
            self.table_dirty = dirty;
        }
        result
    }

    /// Marks clusters beyond `end` as never used, after the file was cut.
    pub(super) fn set_end(&mut self, end: u64) {
        self.end = end;
        self.free_from = self.free_from.min(end);
    }

    /// Starts looking for free clusters from the beginning again.
    pub(super) fn rescan(&mut self) {
        self.free_from = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn counts_of_every_width_are_independent(order in 0u32..=6, ops in proptest::collection::vec((0u64..64, any::<u64>()), 1..80)) {
            let mut bytes = vec![0; 512];
            let mut model = [0u64; 64];
            for (index, value) in ops {
                let value = value & max_count(order);
                set_count(&mut bytes, order, index, value);
                model[index as usize] = value;
                for (i, &m) in model.iter().enumerate() {
                    prop_assert_eq!(get_count(&bytes, order, i as u64), m);
                }
            }
        }
    }

    #[test]
    fn small_clusters_make_the_table_grow() {
        for order in [0, 4, 6] {
            let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(vec![0; 1024]));
            let mut r = Refcounts::open(Arc::clone(&storage), 9, order, 512, 1).unwrap();
            r.set(0, 1).unwrap();
            r.set(1, 1).unwrap();
            let mut seen = std::collections::HashSet::from([0, 1]);
            for i in 0..20_000u64 {
                if i % 1000 == 7 {
                    let at = r.allocate_exact(5).unwrap();
                    assert!((at..at + 5).all(|c| seen.insert(c)), "order {order}: reused {at}");
                } else {
                    let (at, n, _) = r.allocate(1).unwrap();
                    assert_eq!(n, 1);
                    assert!(seen.insert(at), "order {order}: reused {at}");
                }
            }
            // Everything handed out, and the structures themselves, are counted once.
            let table: Vec<u64> = r.table().to_vec();
            for block in table.iter().filter(|&&b| b != 0) {
                assert_eq!(r.get(block >> 9).unwrap(), 1);
                assert!(!seen.contains(&(block >> 9)));
            }
            for c in r.table_offset() >> 9..(r.table_offset() >> 9) + r.table_clusters() {
                assert_eq!(r.get(c).unwrap(), 1);
                assert!(c == 1 || !seen.contains(&c));
            }
        }
    }
}
