//! Changing the size of a disk, preallocating, emptying, and the backing file's record.

use super::{Backing, Meta, OFFSET, Preallocation, Qcow2, header::MAX_L1_BYTES};
use crate::{
    Error, Result,
    storage::{StorageExt, Zeroing},
};
use std::sync::atomic::Ordering;

impl Qcow2 {
    pub(super) fn set_disk_size(&self, size: u64, mode: Preallocation) -> Result<()> {
        if !size.is_multiple_of(512) {
            return Err(Error::usage("The new size must be a multiple of 512"));
        }
        let old = self.disk_size();
        {
            let mut meta = self.lock();
            if self.bitmap_list(&meta)?.iter().any(|b| b.info.in_use) {
                return Err(Error::unsupported("Cannot resize an image with bitmaps in use"));
            }
            if meta.header.version < 3 && meta.header.snapshot_count > 0 && size != old {
                return Err(Error::unsupported("Can't resize a version 2 image which has snapshots"));
            }
            if size < old {
                if mode != Preallocation::Off {
                    return Err(Error::usage("Preallocation can't be used for shrinking an image"));
                }
                self.drop_beyond(&mut meta, size)?;
            } else if size > old {
                self.grow_l1(&mut meta, size)?;
            }
            meta.header.size = size;
            self.write_meta(&mut meta)?;
            meta.header.write(&**self.main())?;
            self.main().flush()?;
            self.size.store(size, Ordering::Relaxed);
        }
        self.resize_bitmaps(size)?;
        if self.geo.data_file {
            self.storages[1].set_size(size)?;
        }
        if size > old && mode != Preallocation::Off {
            self.preallocate_range(
                old - old % self.geo.cluster_size,
                size - (old - old % self.geo.cluster_size),
                mode,
            )?;
        }
        Ok(())
    }

    /// Makes the L1 table long enough for a disk of `size` bytes.
    fn grow_l1(&self, meta: &mut Meta, size: u64) -> Result<()> {
        let need = size.div_ceil(self.geo.cluster_size * self.geo.l2_entries);
        if need <= u64::from(meta.header.l1_size) {
            return Ok(());
        }
        if need * 8 > MAX_L1_BYTES {
            return Err(Error::usage(format!(
                "The image is too large for clusters of {} bytes; convert it to one with larger clusters",
                self.geo.cluster_size
            )));
        }
        let bits = self.geo.cluster_bits;
        let first = self.allocate_exact(meta, (need * 8).div_ceil(self.geo.cluster_size))?;
        self.write_meta(meta)?;
        let mut l1 = self.l1.read().unwrap_or_else(|e| e.into_inner()).clone();
        l1.resize(need as usize, 0);
        let mut bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(self.geo.cluster_size as usize), 0);
        self.main().write_at(&bytes, first << bits)?;
        self.main().flush()?;
        let old = (meta.header.l1_offset, u64::from(meta.header.l1_size) * 8);
        meta.header.l1_offset = first << bits;
        meta.header.l1_size = need as u32;
        meta.header.write(&**self.main())?;
        self.main().flush()?;
        *self.l1.write().unwrap_or_else(|e| e.into_inner()) = l1;
        if old.1 > 0 {
            self.refcounts(meta)?.release(old.0 >> bits, old.1.div_ceil(self.geo.cluster_size));
        }
        Ok(())
    }

    /// Frees all clusters and tables that lie wholly behind `size`.
    fn drop_beyond(&self, meta: &mut Meta, size: u64) -> Result<()> {
        let geo = self.geo;
        let span = geo.cluster_size * geo.l2_entries;
        let step = (geo.l2_entry_size / 8) as usize;
        let mut at = size.next_multiple_of(geo.cluster_size);
        let len = self.l1.read().unwrap_or_else(|e| e.into_inner()).len() as u64;
        while geo.l1_index(at) < len {
            let table = self.l1_entry(at) & OFFSET;
            let next = (at - at % span) + span;
            if table == 0 {
                at = next;
                continue;
            }
            if at.is_multiple_of(span) {
                // The whole table goes.
                for entry in self.read_l2(table)?.into_iter().step_by(step) {
                    self.release_entry(meta, entry)?;
                }
                self.refcounts(meta)?.release(table >> geo.cluster_bits, 1);
                let index = geo.l1_index(at) as usize;
                self.l1.write().unwrap_or_else(|e| e.into_inner())[index] = 0;
                meta.l1_dirty.insert(index);
                at = next;
                continue;
            }
            let table = self.table_for_write(meta, at)?;
            while at < next {
                let (slice, word) = self.slice_for(table, at)?;
                let entry = slice.get(word);
                if entry != 0 || step == 2 && slice.get(word + 1) != 0 {
                    self.release_entry(meta, entry)?;
                    self.tables.set(&slice, word, 0);
                    if step == 2 {
                        self.tables.set(&slice, word + 1, 0);
                    }
                }
                at += geo.cluster_size;
            }
        }
        Ok(())
    }

    pub(super) fn preallocate_range(&self, offset: u64, len: u64, mode: Preallocation) -> Result<()> {
        if mode == Preallocation::Off {
            return Ok(());
        }
        const STEP: u64 = 1 << 30;
        let end = offset + len;
        let (mut at, mut pieces) = (offset, Vec::new());
        while at < end {
            let n = (end - at).min(STEP);
            pieces.clear();
            self.prepare(at, n, &mut pieces)?;
            for piece in pieces.iter().filter(|p| p.new) {
                let storage = &self.storages[usize::from(piece.file)];
                let (start, len) = (piece.host - piece.head, piece.head + piece.len + piece.tail);
                match mode {
                    Preallocation::Full => crate::formats::raw::allocate(&**storage, start, len, mode)?,
                    Preallocation::Falloc => {
                        if storage.allocate(start, len)? == Zeroing::Unsupported {
                            return Err(Error::unsupported(
                                "The file system cannot preallocate with falloc; use full",
                            ));
                        }
                        if !piece.fresh && !self.geo.data_file {
                            storage.fill_zeroes(start, len)?;
                        }
                    }
                    Preallocation::Metadata | Preallocation::Off => {
                        if !piece.fresh && !self.geo.data_file {
                            storage.fill_zeroes(start, len)?;
                        } else if storage.size()? < start + len {
                            storage.set_size(start + len)?;
                        }
                    }
                }
            }
            if let Err(e) = self.commit(&pieces) {
                self.abort(&pieces);
                return Err(e);
            }
            if self.encryption.is_some() && self.zero(at, n, false)? == Zeroing::Unsupported {
                return Err(Error::unsupported(
                    "Encrypted images of version 2 cannot be preallocated: what is stored there would read as noise",
                ));
            }
            at += n;
        }
        self.flush_all()
    }

    /// Unmaps the whole disk.
    pub(super) fn empty(&self) -> Result<()> {
        let mut meta = self.lock();
        self.write_meta(&mut meta)?;
        let old = self.l1.read().unwrap_or_else(|e| e.into_inner()).clone();
        let step = (self.geo.l2_entry_size / 8) as usize;
        for table in old.iter().map(|e| e & OFFSET).filter(|&t| t != 0) {
            for entry in self.read_l2(table)?.into_iter().step_by(step) {
                self.release_entry(&mut meta, entry)?;
            }
            self.refcounts(&mut meta)?.release(table >> self.geo.cluster_bits, 1);
        }
        self.l1.write().unwrap_or_else(|e| e.into_inner()).fill(0);
        meta.l1_dirty = (0..old.len()).collect();
        self.write_meta(&mut meta)?;
        self.tables.clear();
        if let Some(r) = &mut meta.refcounts {
            r.rescan();
        }
        self.write_refcounts(&mut meta)
    }

    pub(super) fn change_backing(&self, backing: Option<&Backing>) -> Result<()> {
        let mut meta = self.lock();
        if meta.header.version >= 3
            && meta.header.autoclear & super::header::RAW_DATA_FILE != 0
            && backing.is_some()
        {
            return Err(Error::usage(
                "Cannot set a backing file: the external data file is to be readable as raw",
            ));
        }
        let old = std::mem::replace(&mut meta.header.backing, backing.cloned());
        if let Err(e) = meta.header.encode() {
            meta.header.backing = old;
            return Err(e);
        }
        self.has_backing.store(backing.is_some(), Ordering::Relaxed);
        self.write_meta(&mut meta)?;
        meta.header.write(&**self.main())?;
        self.main().flush()
    }
}
