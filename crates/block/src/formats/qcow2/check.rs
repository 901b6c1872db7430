//! Checking and repairing.
//!
//! Every reference in the image is counted and the sums are compared with the refcounts. Counts take a byte per host cluster
//! (rare larger ones are kept aside), and every L2 table is read once.

use super::{
    COMPRESSED, COPIED, Meta, OFFSET, Qcow2, ZERO, header,
    refcount::{Refcounts, get_count, max_count, set_count},
    snapshot::encode_table,
};
use crate::{
    Error, Result,
    formats::{CheckReport, Repair},
};
use std::{collections::HashMap, sync::Arc};

/// References found, by host cluster.
struct Counts {
    small: Vec<u8>,
    large: HashMap<u64, u64>,
}

impl Counts {
    fn new(clusters: u64) -> Self {
        Counts { small: vec![0; clusters as usize], large: HashMap::new() }
    }

    fn add(&mut self, cluster: u64) {
        let slot = &mut self.small[cluster as usize];
        if *slot < u8::MAX {
            *slot += 1;
        } else {
            *self.large.entry(cluster).or_insert(u64::from(u8::MAX)) += 1;
        }
    }

    fn get(&self, cluster: u64) -> u64 {
        match self.small.get(cluster as usize) {
            Some(&u8::MAX) => self.large.get(&cluster).copied().unwrap_or(u64::from(u8::MAX)),
            Some(&n) => u64::from(n),
            None => 0,
        }
    }

    fn len(&self) -> u64 {
        self.small.len() as u64
    }
}

/// A check in progress.
struct Checker<'a> {
    image: &'a Qcow2,
    counts: Counts,
    report: CheckReport,
    bits: u32,
    /// Counts of clusters that the refcount structures themselves take are wrong: make new ones.
    rebuild: bool,
    next_contiguous: u64,
    table: Vec<u8>,
}

impl Checker<'_> {
    fn bad(&mut self, message: String) {
        self.report.corruptions += 1;
        self.report.say(format!("ERROR {message}"));
    }

    /// Counts a range of bytes; what lies past the file is damage.
    fn count(&mut self, offset: u64, len: u64, what: &str) {
        if len == 0 {
            return;
        }
        let Some(end) = offset.checked_add(len - 1) else {
            return self.bad(format!("{what} at {offset:#x} is beyond the end of the file"));
        };
        let (first, last) = (offset >> self.bits, end >> self.bits);
        if last >= self.counts.len() {
            return self.bad(format!(
                "counting reference for region exceeding the end of the file by one cluster or more: offset {offset:#x} size \
                 {len:#x}"
            ));
        }
        (first..=last).for_each(|c| self.counts.add(c));
    }

    fn unaligned(&self, offset: u64) -> bool {
        offset & ((1 << self.bits) - 1) != 0
    }

    /// Counts an L1 table's tree. For the active one, copied flags and statistics are looked at too.
    fn count_l1(&mut self, meta: &mut Meta, l1: &[u64], active: bool, fix_flags: bool) -> Result<()> {
        let cluster = 1u64 << self.bits;
        for (index, &entry) in l1.iter().enumerate() {
            let table = entry & OFFSET;
            if table == 0 {
                continue;
            }
            if self.unaligned(table) {
                self.bad(format!("L2 offset={table:#x}: Table is not cluster aligned; L1 entry corrupted"));
                continue;
            }
            self.count(table, cluster, "L2 table");
            if table >> self.bits >= self.counts.len() {
                continue;
            }
            if active && !fix_flags {
                let refcount = self.image.refcounts(meta)?.get(table >> self.bits)?;
                if (refcount == 1) != (entry & COPIED != 0) {
                    self.bad(format!(
                        "OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}"
                    ));
                }
            }
            self.count_l2(meta, table, active, fix_flags)?;
        }
        Ok(())
    }

    fn count_l2(&mut self, meta: &mut Meta, table: u64, active: bool, fix_flags: bool) -> Result<()> {
        let geo = self.image.geo;
        let step = geo.l2_entry_size as usize;
        self.next_contiguous = 0;
        let mut bytes = std::mem::take(&mut self.table);
        bytes.resize(1 << self.bits, 0);
        self.image.main().read_at(&mut bytes, table)?;
        for at in (0..bytes.len()).step_by(step) {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            let entry = u64::from_be_bytes(word);
            let bitmap = if step == 16 {
                word.copy_from_slice(&bytes[at + 8..at + 16]);
                u64::from_be_bytes(word)
            } else {
                0
            };
            if entry != 0 || bitmap != 0 {
                self.count_entry(meta, entry, bitmap, active, fix_flags)?;
            }
        }
        self.table = bytes;
        Ok(())
    }

    fn count_entry(
        &mut self,
        meta: &mut Meta,
        entry: u64,
        bitmap: u64,
        active: bool,
        fix_flags: bool,
    ) -> Result<()> {
        let geo = self.image.geo;
        if entry & COMPRESSED != 0 {
            if entry & COPIED != 0 {
                self.bad(format!(
                    "cluster {}: copied flag must never be set for compressed clusters",
                    (entry & OFFSET) >> self.bits
                ));
            }
            if geo.data_file {
                self.bad("compressed cluster found in image with external data file".to_owned());
                return Ok(());
            }
            let (host, stored) = geo.compressed(entry);
            self.count(host, stored, "compressed cluster");
            if active {
                self.report.allocated_clusters += 1;
                self.report.compressed_clusters += 1;
                // Compressed clusters follow no pattern that would make reading them faster.
                self.report.fragmented_clusters += 1;
            }
            return Ok(());
        }
        let host = entry & OFFSET;
        if geo.subclusters > 1 && (bitmap as u32) & (bitmap >> 32) as u32 != 0 {
            self.bad(format!(
                "cluster {:#x}: subclusters are both allocated and zero (bitmap {bitmap:#x})",
                host
            ));
        }
        if host == 0 && !(geo.data_file && entry & COPIED != 0) {
            if geo.subclusters > 1 && bitmap as u32 != 0 {
                self.bad(format!(
                    "cluster has no host cluster but allocated subclusters (bitmap {bitmap:#x})"
                ));
            }
            return Ok(());
        }
        let zero =
            if geo.subclusters > 1 { bitmap as u32 == 0 } else { geo.version >= 3 && entry & ZERO != 0 };
        if active && !zero {
            self.report.allocated_clusters += 1;
            if self.next_contiguous != 0 && host != self.next_contiguous {
                self.report.fragmented_clusters += 1;
            }
            self.next_contiguous = host + geo.cluster_size;
        }
        if geo.data_file {
            return Ok(());
        }
        if self.unaligned(host) {
            self.bad(format!("offset={host:x}: Cluster is not properly aligned; L2 entry corrupted."));
            return Ok(());
        }
        self.count(host, geo.cluster_size, "data cluster");
        if active && !fix_flags && host >> self.bits < self.counts.len() {
            let refcount = self.image.refcounts(meta)?.get(host >> self.bits)?;
            if (refcount == 1) != (entry & COPIED != 0) {
                self.bad(format!("OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}"));
            }
        }
        Ok(())
    }

    /// Counts everything but guest data.
    fn count_metadata(&mut self, meta: &mut Meta) -> Result<()> {
        let h = &meta.header;
        let cluster = 1u64 << self.bits;
        let (l1, snapshots) = (
            (h.l1_offset, u64::from(h.l1_size) * 8),
            (h.snapshots_offset, encode_table(&meta.snapshots).len() as u64),
        );
        let (crypto, bitmaps) = (h.crypto, h.bitmaps);
        self.count(0, cluster, "header");
        self.count(l1.0, l1.1, "active L1 table");
        self.count(snapshots.0, snapshots.1, "snapshot table");
        if let Some((offset, len)) = crypto {
            self.count(offset, len, "encryption header");
        }
        if let Some(b) = bitmaps {
            self.count(b.directory_offset, b.directory_size, "bitmap directory");
            match self.image.bitmap_list(meta) {
                Ok(list) => {
                    for e in list {
                        self.count(e.table_offset, u64::from(e.table_size) * 8, "bitmap table");
                        if e.table_offset >> self.bits >= self.counts.len() {
                            continue;
                        }
                        for word in self.image.bitmap_table(&e)? {
                            if word & OFFSET != 0 {
                                self.count(word & OFFSET, cluster, "bitmap data");
                            }
                        }
                    }
                }
                Err(e) => self.bad(e.to_string()),
            }
        }
        Ok(())
    }

    /// Counts the refcount structures, and sees whether they can be trusted at all.
    fn count_refcounts(&mut self, meta: &mut Meta) -> Result<()> {
        let cluster = 1u64 << self.bits;
        let (offset, len) = {
            let r = self.image.refcounts(meta)?;
            (r.table_offset(), r.table_clusters() << self.bits)
        };
        self.count(offset, len, "refcount table");
        let table = self.image.refcounts(meta)?.table().to_vec();
        for (i, &block) in table.iter().enumerate() {
            if block == 0 {
                continue;
            }
            if self.unaligned(block) {
                self.bad(format!(
                    "refcount block {i} is not cluster aligned; refcount table entry corrupted"
                ));
                self.rebuild = true;
            } else if block >> self.bits >= self.counts.len() {
                self.bad(format!("refcount block {i} is outside image"));
                self.rebuild = true;
            } else {
                self.count(block, cluster, "refcount block");
                if self.counts.get(block >> self.bits) != 1 {
                    self.bad(format!("refcount block {i} refcount={}", self.counts.get(block >> self.bits)));
                    self.rebuild = true;
                }
            }
        }
        Ok(())
    }

    /// Compares the sums with the refcounts, repairing as asked.
    fn compare(&mut self, meta: &mut Meta, repair: Repair) -> Result<()> {
        let max = max_count(meta.header.refcount_order);
        let mut end = 0;
        let order = meta.header.refcount_order;
        let mut cluster = 0;
        while cluster < self.counts.len() {
            // Where a run agrees, as nearly everywhere, one look at the block serves all of it.
            if let Ok(Some((bytes, index))) = self.image.refcounts(meta)?.counts_from(cluster) {
                let run = ((bytes.len() as u64 * 8) >> order) - index;
                let run = run.min(self.counts.len() - cluster);
                let same = (0..run)
                    .take_while(|i| {
                        let small = self.counts.small[(cluster + i) as usize];
                        small != u8::MAX && u64::from(small) == get_count(bytes, order, index + i)
                    })
                    .count() as u64;
                if let Some(last) =
                    (cluster..cluster + same).rev().find(|&c| self.counts.small[c as usize] > 0)
                {
                    end = last + 1;
                }
                cluster += same;
                if same == run {
                    continue;
                }
            }
            let next = cluster + 1;
            let cluster = std::mem::replace(&mut cluster, next);
            let wanted = self.counts.get(cluster);
            let refcount = match self.image.refcounts(meta)?.get(cluster) {
                Ok(n) => n,
                Err(e) => {
                    self.report.check_errors += 1;
                    self.report.say(format!("Can't get refcount for cluster {cluster}: {e}"));
                    continue;
                }
            };
            if refcount > 0 || wanted > 0 {
                end = cluster + 1;
            }
            if refcount == wanted {
                continue;
            }
            let leak = refcount > wanted;
            let fix = (leak && repair != Repair::None) || repair == Repair::All;
            let label = match (fix, leak) {
                (true, _) => "Repairing",
                (false, true) => "Leaked",
                (false, false) => "ERROR",
            };
            self.report.say(format!("{label} cluster {cluster} refcount={refcount} reference={wanted}"));
            if fix && wanted <= max {
                self.image.refcounts(meta)?.set(cluster, wanted)?;
                if leak { self.report.leaks_fixed += 1 } else { self.report.corruptions_fixed += 1 }
            } else if leak {
                self.report.leaks += 1;
            } else {
                self.report.corruptions += 1;
            }
        }
        self.report.image_end_offset = Some(end << self.bits);
        Ok(())
    }
}

impl Qcow2 {
    fn checker(&self) -> Result<Checker<'_>> {
        let clusters = self.main().size()?.div_ceil(self.geo.cluster_size);
        // A byte per cluster: a sparse file of absurd size must not take all memory.
        if clusters > 1 << 34 {
            return Err(Error::unsupported("The image file is too large to be checked"));
        }
        Ok(Checker {
            image: self,
            counts: Counts::new(clusters),
            report: CheckReport::default(),
            bits: self.geo.cluster_bits,
            rebuild: false,
            next_contiguous: 0,
            table: Vec::new(),
        })
    }

    /// Counts all references there are, but for those of the refcount structures.
    fn count_all(&self, checker: &mut Checker<'_>, meta: &mut Meta, fix_flags: bool) -> Result<()> {
        checker.count_metadata(meta)?;
        let active = self.l1.read().unwrap_or_else(|e| e.into_inner()).clone();
        checker.count_l1(meta, &active, true, fix_flags)?;
        for s in meta.snapshots.clone() {
            checker.count(s.l1_offset, u64::from(s.l1_size) * 8, "snapshot L1 table");
            if s.l1_offset >> self.geo.cluster_bits < checker.counts.len() {
                let l1 = self.read_l1(s.l1_offset, s.l1_size)?;
                checker.count_l1(meta, &l1, false, true)?;
            }
        }
        Ok(())
    }

    pub(super) fn check_image(&self, repair: Repair) -> Result<CheckReport> {
        let mut meta = self.lock();
        if repair != Repair::None && self.read_only {
            return Err(Error::ReadOnly(self.main().name()));
        }
        if !self.read_only {
            self.write_meta(&mut meta)?;
        }
        // Read anew: what is on disk counts.
        meta.refcounts = None;
        self.tables.clear();
        let mut checker = self.checker()?;
        let fixing = repair == Repair::All;
        self.count_all(&mut checker, &mut meta, fixing)?;
        checker.count_refcounts(&mut meta)?;
        checker.report.total_clusters = self.disk_size().div_ceil(self.geo.cluster_size);
        if checker.rebuild && fixing {
            checker.report.say("Rebuilding refcount structure");
            // The old structures are not counted any more: their clusters become free.
            let mut fresh = self.checker()?;
            self.count_all(&mut fresh, &mut meta, true)?;
            let order = meta.header.refcount_order;
            self.rebuild_refcounts(&mut meta, &fresh.counts, order)?;
            let fixed = checker.report.corruptions - fresh.report.corruptions.min(checker.report.corruptions);
            fresh.report.messages.splice(0..0, std::mem::take(&mut checker.report.messages));
            fresh.report.corruptions_fixed += fixed;
            fresh.report.total_clusters = checker.report.total_clusters;
            fresh.report.image_end_offset = Some(self.refcounts(&mut meta)?.end() << self.geo.cluster_bits);
            checker.report = fresh.report;
        } else {
            checker.compare(&mut meta, repair)?;
        }
        let mut report = checker.report;
        if repair != Repair::None {
            self.write_refcounts(&mut meta)?;
            if fixing {
                report.corruptions_fixed += self.refresh_copied(&mut meta)?;
                self.write_meta(&mut meta)?;
            }
            if report.corruptions == 0 && report.check_errors == 0 && (report.leaks == 0 || fixing) {
                let marks = header::DIRTY | header::CORRUPT;
                if meta.header.incompatible & marks != 0 && fixing {
                    self.main().flush()?;
                    meta.header.incompatible &= !marks;
                    meta.header.write(&**self.main())?;
                    meta.dirty_marked = false;
                }
            }
            self.main().flush()?;
        }
        Ok(report)
    }

    /// Counts everything and writes refcounts of another width.
    pub(super) fn change_refcount_width(&self, meta: &mut Meta, order: u32) -> Result<()> {
        self.write_meta(meta)?;
        self.write_refcounts(meta)?;
        let mut checker = self.checker()?;
        self.count_all(&mut checker, meta, true)?;
        if checker.report.corruptions > 0 {
            return Err(Error::Corrupt("The image is damaged; repair it with check -r all first".into()));
        }
        let highest = (0..checker.counts.len()).map(|c| checker.counts.get(c)).max().unwrap_or(0);
        if highest > max_count(order) {
            return Err(Error::usage(format!(
                "Cannot decrease refcount entry width to {} bits: a cluster has {highest} references",
                1u32 << order
            )));
        }
        self.rebuild_refcounts(meta, &checker.counts, order)
    }

    /// Writes new refcount structures for `counts` behind the end of the file, and switches to them.
    fn rebuild_refcounts(&self, meta: &mut Meta, counts: &Counts, order: u32) -> Result<()> {
        let bits = self.geo.cluster_bits;
        let per_block = 1u64 << (bits + 3 - order);
        let per_table = self.geo.cluster_size / 8;
        let start = counts.len();
        // Blocks only where something is counted; those for the new structures themselves always.
        let mut used: std::collections::BTreeSet<u64> =
            (0..start).filter(|&c| counts.get(c) > 0).map(|c| c / per_block).collect();
        let (mut table_clusters, mut total) = (0, u64::MAX);
        while total != table_clusters + used.len() as u64 {
            total = table_clusters + used.len() as u64;
            used.extend(start / per_block..=(start + total) / per_block);
            let entries = used.last().map_or(1, |l| l + 1);
            table_clusters = entries.div_ceil(per_table);
        }
        if table_clusters << bits > header::MAX_REFTABLE_BYTES.max(self.geo.cluster_size) {
            return Err(Error::unsupported("The refcount table would be too large"));
        }
        let mut table = vec![0u64; (table_clusters * per_table) as usize];
        let first_block = start + table_clusters;
        let end = first_block + used.len() as u64;
        let mut block = vec![0u8; self.geo.cluster_size as usize];
        for (i, &index) in used.iter().enumerate() {
            block.fill(0);
            for c in index * per_block..(index + 1) * per_block {
                let n = if (start..end).contains(&c) { 1 } else { counts.get(c) };
                if n > 0 {
                    set_count(&mut block, order, c - index * per_block, n.min(max_count(order)));
                }
            }
            let at = (first_block + i as u64) << bits;
            self.main().write_at(&block, at)?;
            table[index as usize] = at;
        }
        let bytes: Vec<u8> = table.iter().flat_map(|w| w.to_be_bytes()).collect();
        self.main().write_at(&bytes, start << bits)?;
        self.main().flush()?;
        meta.header.reftable_offset = start << bits;
        meta.header.reftable_clusters = table_clusters as u32;
        meta.header.refcount_order = order;
        meta.header.write(&**self.main())?;
        self.main().flush()?;
        let mut refcounts = Refcounts::open(
            Arc::clone(self.main()),
            bits,
            order,
            meta.header.reftable_offset,
            table_clusters,
        )?;
        refcounts.set_end(end);
        meta.refcounts = Some(refcounts);
        Ok(())
    }
}
