//! The order in which metadata reaches the disk.
//!
//! 1. Refcount blocks (counts only rose since the last time), then a flush: guest data is durable with them.
//! 2. Refcount table entries for new blocks, then a flush; the header if the table moved.
//! 3. L2 tables, then a flush if L1 entries refer to new ones; L1 entries; a flush.
//! 4. Now nothing on disk refers to what was freed: its counts go down, in memory, to be written the next time.
//!
//! A power cut between any two writes leaves counts that are too high at worst: leaks.

use super::{Meta, Qcow2, header};
use crate::Result;

impl Qcow2 {
    fn flush_storages(&self) -> Result<()> {
        self.storages.iter().try_for_each(|s| s.flush())
    }

    fn lazy(&self, meta: &Meta) -> bool {
        meta.dirty_marked && meta.header.compatible & header::LAZY_REFCOUNTS != 0
    }

    /// Makes everything durable.
    pub(super) fn flush_all(&self) -> Result<()> {
        let mut meta = self.lock();
        if !self.write_meta(&mut meta)? {
            drop(meta);
            return self.flush_storages();
        }
        Ok(())
    }

    /// Writes all changed metadata, in order; the result says whether there was any (and then all is durable).
    pub(super) fn write_meta(&self, meta: &mut Meta) -> Result<bool> {
        let lazy = self.lazy(meta);
        let mut wrote = false;
        if !lazy && meta.refcounts.as_ref().is_some_and(|r| r.is_dirty()) {
            self.write_refcounts(meta)?;
            wrote = true;
        }
        let freed = meta.refcounts.as_ref().is_some_and(|r| r.waiting() > 0);
        if self.tables.dirty_count() > 0 || !meta.l1_dirty.is_empty() || freed {
            if !wrote {
                // Copied data must be durable before the table that makes it replace the original.
                self.flush_storages()?;
            }
            self.tables.write_dirty(&**self.main())?;
            if !meta.l1_dirty.is_empty() {
                self.main().flush()?;
                self.write_l1_entries(meta)?;
            }
            wrote = true;
        }
        if wrote {
            self.flush_storages()?;
            self.settle(meta)?;
        }
        Ok(wrote)
    }

    /// Writes refcount blocks and table; durable on return, with the guest data before it.
    pub(super) fn write_refcounts(&self, meta: &mut Meta) -> Result<()> {
        let Some(refcounts) = &mut meta.refcounts else { return Ok(()) };
        refcounts.write_blocks()?;
        self.flush_storages()?;
        if !refcounts.table_is_dirty() {
            return Ok(());
        }
        refcounts.write_table()?;
        self.main().flush()?;
        if let Some((first, count)) = refcounts.moved.take() {
            meta.header.reftable_offset = refcounts.table_offset();
            meta.header.reftable_clusters = refcounts.table_clusters() as u32;
            meta.header.write(&**self.main())?;
            self.main().flush()?;
            refcounts.release(first, count);
        }
        Ok(())
    }

    fn write_l1_entries(&self, meta: &mut Meta) -> Result<()> {
        let l1 = self.l1.read().unwrap_or_else(|e| e.into_inner());
        let sectors: std::collections::BTreeSet<usize> = meta.l1_dirty.iter().map(|i| i / 64).collect();
        for sector in sectors {
            let range = sector * 64..(sector * 64 + 64).min(l1.len());
            let bytes: Vec<u8> = l1[range].iter().flat_map(|w| w.to_be_bytes()).collect();
            self.main().write_at(&bytes, meta.header.l1_offset + sector as u64 * 512)?;
        }
        meta.l1_dirty.clear();
        Ok(())
    }

    /// Lowers the counts of what was freed, and lets the host have the space. Tables must be durable.
    fn settle(&self, meta: &mut Meta) -> Result<()> {
        let Some(refcounts) = &mut meta.refcounts else { return Ok(()) };
        let free = refcounts.settle()?;
        let bits = self.geo.cluster_bits;
        for (first, count) in free {
            let tail = meta.compressed_tail >> bits;
            if meta.compressed_tail != 0 && (first..first + count).contains(&tail) {
                meta.compressed_tail = 0;
            }
            self.main().discard(first << bits, count << bits)?;
        }
        Ok(())
    }

    /// Sets or clears the dirty bit on disk (version 3).
    pub(super) fn mark_dirty(&self, meta: &mut Meta, dirty: bool) -> Result<()> {
        if self.geo.version < 3 || meta.dirty_marked == dirty {
            return Ok(());
        }
        if dirty {
            meta.header.incompatible |= header::DIRTY;
        } else {
            self.flush_storages()?;
            meta.header.incompatible &= !header::DIRTY;
        }
        meta.header.write(&**self.main())?;
        self.main().flush()?;
        meta.dirty_marked = dirty;
        Ok(())
    }

    /// Writes everything, settles what was freed, and removes marks of use.
    pub(super) fn finish(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.store_tracked()?;
        let mut meta = self.lock();
        self.write_meta(&mut meta)?;
        if meta.refcounts.as_ref().is_some_and(|r| r.is_dirty()) {
            self.write_refcounts(&mut meta)?;
            // A moved table released its old place just now.
            self.settle(&mut meta)?;
            if meta.refcounts.as_ref().is_some_and(|r| r.is_dirty()) {
                self.write_refcounts(&mut meta)?;
            }
        }
        if let Some(refcounts) = &meta.refcounts {
            // Compressed data may end inside the last cluster; other programs expect whole ones.
            let end = refcounts.end() << self.geo.cluster_bits;
            let size = self.main().size()?;
            if meta.compressed_tail != 0 && size < end {
                self.main().set_size(end)?;
            }
        }
        if meta.dirty_marked && meta.header.incompatible & header::CORRUPT == 0 {
            self.mark_dirty(&mut meta, false)?;
        }
        self.flush_storages()
    }
}
