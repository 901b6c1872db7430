//! Internal snapshots: copies of the L1 table, with one more reference on everything they reach.
//!
//! Counts, copied flags and the snapshot table cannot change in one write. In version 3 the dirty bit is set meanwhile, so
//! that after a power cut the counts are made anew; in version 2 the order leaves leaks at worst, and flags to repair.

use super::{
    COMPRESSED, COPIED, Meta, OFFSET, Qcow2,
    header::{Header, MAX_L1_BYTES, MAX_SNAPSHOTS},
    table::words,
};
use crate::{
    Error, Result,
    formats::{SnapshotInfo, Snapshots},
    storage::{Storage, StorageExt},
};
use std::sync::atomic::Ordering;

/// Largest snapshot table that is read.
const MAX_TABLE: u64 = 64 << 20;

/// A snapshot as stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Snapshot {
    pub(super) info: SnapshotInfo,
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
    /// Extra data past the fields known here.
    extra: Vec<u8>,
}

fn be(b: &[u8]) -> u64 {
    b.iter().fold(0, |v, &x| v << 8 | u64::from(x))
}

/// Reads the snapshot table.
pub(super) fn read_table(storage: &dyn Storage, header: &Header) -> Result<Vec<Snapshot>> {
    let mut out = Vec::new();
    let mut at = header.snapshots_offset;
    let limit = at.saturating_add(MAX_TABLE);
    for _ in 0..header.snapshot_count {
        let h = storage.read_vec(at, 40)?;
        let (id_len, name_len, extra_len) = (be(&h[12..14]), be(&h[14..16]), be(&h[36..40]));
        if extra_len > 1024 {
            return Err(Error::invalid("Too much extra metadata in snapshot table entry"));
        }
        let rest = storage.read_vec(at + 40, (extra_len + id_len + name_len) as usize)?;
        let (extra, names) = rest.split_at(extra_len as usize);
        let (id, name) = names.split_at(id_len as usize);
        let field = |range: std::ops::Range<usize>| extra.get(range).map(be);
        let snapshot = Snapshot {
            info: SnapshotInfo {
                id: String::from_utf8_lossy(id).into_owned(),
                name: String::from_utf8_lossy(name).into_owned(),
                vm_state_size: field(0..8).unwrap_or_else(|| be(&h[32..36])),
                date_sec: be(&h[16..20]) as u32,
                date_nsec: be(&h[20..24]) as u32,
                vm_clock_nsec: be(&h[24..32]),
                icount: field(16..24).filter(|&i| i != u64::MAX),
                disk_size: field(8..16).unwrap_or(header.size),
            },
            l1_offset: be(&h[0..8]),
            l1_size: be(&h[8..12]) as u32,
            extra: extra.get(24..).unwrap_or_default().to_vec(),
        };
        if u64::from(snapshot.l1_size) * 8 > MAX_L1_BYTES
            || snapshot.l1_offset & (header.cluster_size() - 1) != 0
            || snapshot.l1_offset >= 1 << 56
        {
            return Err(Error::invalid(format!("Snapshot {} has an invalid L1 table", snapshot.info.id)));
        }
        out.push(snapshot);
        at = (at + 40 + extra_len + id_len + name_len).next_multiple_of(8);
        if at > limit {
            return Err(Error::invalid("Snapshot table is too large"));
        }
    }
    Ok(out)
}

/// The snapshot table's bytes.
pub(super) fn encode_table(snapshots: &[Snapshot]) -> Vec<u8> {
    let mut out = Vec::new();
    for s in snapshots {
        let i = &s.info;
        out.extend(s.l1_offset.to_be_bytes());
        out.extend(s.l1_size.to_be_bytes());
        out.extend((i.id.len() as u16).to_be_bytes());
        out.extend((i.name.len() as u16).to_be_bytes());
        out.extend(i.date_sec.to_be_bytes());
        out.extend(i.date_nsec.to_be_bytes());
        out.extend(i.vm_clock_nsec.to_be_bytes());
        out.extend(u32::try_from(i.vm_state_size).unwrap_or(0).to_be_bytes());
        out.extend((24 + s.extra.len() as u32).to_be_bytes());
        out.extend(i.vm_state_size.to_be_bytes());
        out.extend(i.disk_size.to_be_bytes());
        out.extend(i.icount.unwrap_or(u64::MAX).to_be_bytes());
        out.extend(&s.extra);
        out.extend(i.id.as_bytes());
        out.extend(i.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out
}

impl Qcow2 {
    /// Index of the snapshot with this id, or else this name.
    fn find_snapshot(&self, meta: &Meta, which: &str) -> Result<usize> {
        let list = &meta.snapshots;
        list.iter()
            .position(|s| s.info.id == which)
            .or_else(|| list.iter().position(|s| s.info.name == which))
            .ok_or_else(|| Error::NotFound(format!("Can't find snapshot '{which}'")))
    }

    pub(super) fn read_l1(&self, offset: u64, size: u32) -> Result<Vec<u64>> {
        Ok(words(&self.main().read_vec(offset, size as usize * 8)?).collect())
    }

    /// Adds a reference to every table and cluster an L1 table reaches, or (`add` false) takes one away later.
    fn count_tree(&self, meta: &mut Meta, l1: &[u64], add: bool) -> Result<()> {
        let bits = self.geo.cluster_bits;
        let step = (self.geo.l2_entry_size / 8) as usize;
        for table in l1.iter().map(|e| e & OFFSET).filter(|&t| t != 0) {
            if table & (self.geo.cluster_size - 1) != 0 {
                return Err(Error::Corrupt(format!(
                    "L2 table offset {table:#x} unaligned; run a check with repair"
                )));
            }
            for entry in self.read_l2(table)?.into_iter().step_by(step) {
                if !add {
                    self.release_entry(meta, entry)?;
                } else if entry & COMPRESSED != 0 {
                    let (host, stored) = self.geo.compressed(entry);
                    let (first, last) = (host >> bits, (host + stored - 1) >> bits);
                    self.refcounts(meta)?.reference(first, last - first + 1)?;
                } else if entry & OFFSET != 0 {
                    self.refcounts(meta)?.reference((entry & OFFSET) >> bits, 1)?;
                }
            }
            match add {
                true => self.refcounts(meta)?.reference(table >> bits, 1)?,
                false => self.refcounts(meta)?.release(table >> bits, 1),
            }
        }
        Ok(())
    }

    /// Makes the copied flags of the active tables say what the counts say.
    pub(super) fn refresh_copied(&self, meta: &mut Meta) -> Result<u64> {
        let bits = self.geo.cluster_bits;
        let mut changed = 0;
        let step = (self.geo.l2_entry_size / 8) as usize;
        let mut l1 = self.l1.write().unwrap_or_else(|e| e.into_inner());
        for (index, entry) in l1.iter_mut().enumerate() {
            let table = *entry & OFFSET;
            if table == 0 || table & (self.geo.cluster_size - 1) != 0 {
                continue;
            }
            let own = self.refcounts(meta)?.get(table >> bits)? == 1;
            if own != (*entry & COPIED != 0) {
                *entry = table | if own { COPIED } else { 0 };
                meta.l1_dirty.insert(index);
                changed += 1;
            }
            for at in (table..table + self.geo.cluster_size).step_by(self.tables.slice_bytes() as usize) {
                let slice = self.tables.get(&**self.main(), at)?;
                for word in (0..(self.tables.slice_bytes() / 8) as usize).step_by(step) {
                    let entry = slice.get(word);
                    if entry & COMPRESSED != 0 || entry & OFFSET == 0 || self.geo.data_file {
                        continue;
                    }
                    let own = self.refcounts(meta)?.get((entry & OFFSET) >> bits)? == 1;
                    if own != (entry & COPIED != 0) {
                        self.tables.set(&slice, word, entry & !COPIED | if own { COPIED } else { 0 });
                        changed += 1;
                    }
                }
                if self.tables.is_crowded() {
                    self.refcounts(meta)?.write_blocks()?;
                    self.main().flush()?;
                    self.tables.write_dirty(&**self.main())?;
                }
            }
        }
        Ok(changed)
    }

    /// Writes a new snapshot table and switches to it.
    fn write_snapshots(&self, meta: &mut Meta, snapshots: Vec<Snapshot>) -> Result<()> {
        let bits = self.geo.cluster_bits;
        let mut bytes = encode_table(&snapshots);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        let old = (meta.header.snapshots_offset, encode_table(&meta.snapshots).len() as u64);
        let mut offset = 0;
        if !bytes.is_empty() {
            let first = self.allocate_exact(meta, (bytes.len() as u64).div_ceil(self.geo.cluster_size))?;
            offset = first << bits;
            self.main().write_at(&bytes, offset)?;
        }
        self.write_meta(meta)?;
        self.main().flush()?;
        meta.header.snapshots_offset = offset;
        meta.header.snapshot_count = snapshots.len() as u32;
        meta.header.write(&**self.main())?;
        self.main().flush()?;
        if old.1 > 0 {
            self.refcounts(meta)?.release(old.0 >> bits, old.1.div_ceil(self.geo.cluster_size));
        }
        meta.snapshots = snapshots;
        Ok(())
    }

    /// Runs a change of counts and tables with the dirty bit set.
    fn guarded<T>(&self, f: impl FnOnce(&mut Meta) -> Result<T>) -> Result<T> {
        if self.read_only {
            return Err(Error::ReadOnly(self.main().name()));
        }
        if self.geo.data_file {
            return Err(Error::unsupported("Snapshots are not supported with an external data file"));
        }
        let mut meta = self.lock();
        self.write_meta(&mut meta)?;
        let was = meta.dirty_marked;
        self.mark_dirty(&mut meta, true)?;
        let result = f(&mut meta)?;
        for _ in 0..2 {
            // The second round writes what the first one's freeing changed.
            self.write_refcounts(&mut meta)?;
            self.write_meta(&mut meta)?;
        }
        if !was {
            self.write_refcounts(&mut meta)?;
            self.mark_dirty(&mut meta, false)?;
        }
        Ok(result)
    }
}

impl Snapshots for Qcow2 {
    fn list(&self) -> Vec<SnapshotInfo> {
        self.lock().snapshots.iter().map(|s| s.info.clone()).collect()
    }

    fn create(&self, mut info: SnapshotInfo) -> Result<()> {
        self.guarded(|meta| {
            if meta.snapshots.len() as u32 >= MAX_SNAPSHOTS {
                return Err(Error::unsupported("The image has as many snapshots as it can have"));
            }
            if info.name.len() > 65535 || info.id.len() > 65535 {
                return Err(Error::usage("The snapshot's name is too long"));
            }
            if info.id.is_empty() {
                let highest =
                    meta.snapshots.iter().filter_map(|s| s.info.id.parse::<u64>().ok()).max().unwrap_or(0);
                info.id = (highest + 1).to_string();
            } else if meta.snapshots.iter().any(|s| s.info.id == info.id) {
                return Err(Error::usage(format!("There is a snapshot with id '{}' already", info.id)));
            }
            info.disk_size = self.disk_size();
            let active = self.l1.read().unwrap_or_else(|e| e.into_inner()).clone();
            self.count_tree(meta, &active, true)?;
            self.refresh_copied(meta)?;
            let mut copy: Vec<u8> = active.iter().flat_map(|e| (e & OFFSET).to_be_bytes()).collect();
            copy.resize(copy.len().next_multiple_of(512), 0);
            let mut l1_offset = 0;
            if !copy.is_empty() {
                let first = self.allocate_exact(meta, (copy.len() as u64).div_ceil(self.geo.cluster_size))?;
                l1_offset = first << self.geo.cluster_bits;
                self.main().write_at(&copy, l1_offset)?;
            }
            let mut snapshots = meta.snapshots.clone();
            snapshots.push(Snapshot { info, l1_offset, l1_size: active.len() as u32, extra: Vec::new() });
            self.write_snapshots(meta, snapshots)
        })
    }

    fn apply(&self, which: &str) -> Result<()> {
        let (size, grow) = {
            let meta = self.lock();
            let snapshot = &meta.snapshots[self.find_snapshot(&meta, which)?];
            (snapshot.info.disk_size, snapshot.l1_size > meta.header.l1_size)
        };
        if grow || size > self.disk_size() {
            self.set_disk_size(size.max(self.disk_size()), Default::default())?;
        }
        self.guarded(|meta| {
            let snapshot = meta.snapshots[self.find_snapshot(meta, which)?].clone();
            let new = self.read_l1(snapshot.l1_offset, snapshot.l1_size)?;
            let old = self.l1.read().unwrap_or_else(|e| e.into_inner()).clone();
            if new.len() > old.len() && new[old.len()..].iter().any(|&e| e != 0) {
                return Err(Error::invalid("The snapshot's L1 table is larger than the disk"));
            }
            self.count_tree(meta, &new, true)?;
            self.write_refcounts(meta)?;
            self.count_tree(meta, &old, false)?;
            {
                let mut l1 = self.l1.write().unwrap_or_else(|e| e.into_inner());
                for (i, slot) in l1.iter_mut().enumerate() {
                    *slot = new.get(i).copied().unwrap_or(0) & OFFSET;
                }
                meta.l1_dirty = (0..l1.len()).collect();
            }
            if size != self.disk_size() {
                meta.header.size = size;
                self.size.store(size, Ordering::Relaxed);
            }
            self.write_meta(meta)?;
            meta.header.write(&**self.main())?;
            self.tables.clear();
            self.refresh_copied(meta)?;
            Ok(())
        })
    }

    fn delete(&self, which: &str) -> Result<()> {
        self.guarded(|meta| {
            let index = self.find_snapshot(meta, which)?;
            let mut snapshots = meta.snapshots.clone();
            let gone = snapshots.remove(index);
            let l1 = self.read_l1(gone.l1_offset, gone.l1_size)?;
            self.write_snapshots(meta, snapshots)?;
            self.count_tree(meta, &l1, false)?;
            let clusters = (u64::from(gone.l1_size) * 8).div_ceil(self.geo.cluster_size);
            if clusters > 0 {
                self.refcounts(meta)?.release(gone.l1_offset >> self.geo.cluster_bits, clusters);
            }
            self.write_meta(meta)?;
            self.tables.clear();
            self.refresh_copied(meta)?;
            Ok(())
        })
    }

    fn view(&self, which: &str) -> Result<()> {
        if !self.read_only {
            return Err(Error::usage("A snapshot can be viewed only through an image opened read-only"));
        }
        let meta = self.lock();
        let snapshot = &meta.snapshots[self.find_snapshot(&meta, which)?];
        let l1 = self.read_l1(snapshot.l1_offset, snapshot.l1_size)?;
        if (l1.len() as u64) < snapshot.info.disk_size.div_ceil(self.geo.cluster_size * self.geo.l2_entries) {
            return Err(Error::invalid("The snapshot's L1 table is too small"));
        }
        *self.l1.write().unwrap_or_else(|e| e.into_inner()) = l1;
        self.size.store(snapshot.info.disk_size, Ordering::Relaxed);
        Ok(())
    }
}
