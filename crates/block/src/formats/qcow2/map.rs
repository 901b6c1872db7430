//! Where guest data is.

use super::{COMPRESSED, COPIED, OFFSET, Qcow2, ZERO};
use crate::{
    Error, Result,
    formats::{Extent, Mapping, push_extent},
};

/// Most extents that one call collects.
const MAX_EXTENTS: usize = 1024;

impl Qcow2 {
    pub(super) fn map_range(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        let geo = &self.geo;
        let end = offset + len;
        let (mut at, limit) = (offset, out.len() + MAX_EXTENTS);
        let table_span = geo.cluster_size * geo.l2_entries;
        let slice_span = self.tables.slice_bytes() / geo.l2_entry_size * geo.cluster_size;
        while at < end && out.len() < limit {
            let l1 = self.l1_entry(at);
            let table = l1 & OFFSET;
            if table == 0 {
                let stop = (at - at % table_span).saturating_add(table_span).min(end);
                push_extent(out, Extent { offset: at, len: stop - at, mapping: Mapping::Unallocated });
                at = stop;
                continue;
            }
            let stop = (at - at % slice_span).saturating_add(slice_span).min(end);
            let (slice, mut word) = self.slice_for(table, at)?;
            while at < stop && out.len() < limit {
                let cluster = at - at % geo.cluster_size;
                let next = (cluster + geo.cluster_size).min(stop);
                let entry = slice.get(word);
                if geo.subclusters > 1 && entry & COMPRESSED == 0 {
                    self.map_subclusters(l1 & entry, entry, slice.get(word + 1), at, next, out)?;
                } else {
                    let mapping = self.mapping(l1, entry, cluster, at)?;
                    push_extent(out, Extent { offset: at, len: next - at, mapping });
                }
                at = next;
                word += (geo.l2_entry_size / 8) as usize;
            }
        }
        Ok(())
    }

    fn host_of(&self, entry: u64, cluster: u64) -> Result<u64> {
        let host = entry & OFFSET;
        if host & (self.geo.cluster_size - 1) != 0 {
            return Err(Error::Corrupt(format!(
                "Cluster allocation offset {host:#x} unaligned (guest offset: {cluster:#x}); run a check with repair"
            )));
        }
        if self.geo.data_file && host != cluster {
            return Err(Error::Corrupt(format!(
                "External data file host cluster offset {host:#x} does not match guest cluster offset: {cluster:#x}"
            )));
        }
        Ok(host)
    }

    /// The mapping of a cluster with a plain (64-bit) entry, at guest offset `at` in it.
    fn mapping(&self, l1: u64, entry: u64, cluster: u64, at: u64) -> Result<Mapping> {
        if entry & COMPRESSED != 0 {
            if self.geo.data_file {
                return Err(Error::Corrupt(
                    "compressed cluster entry found in image with external data file".into(),
                ));
            }
            let (host, stored) = self.geo.compressed(entry);
            return Ok(Mapping::Compressed {
                file: 0,
                host,
                stored: stored as u32,
                unit_start: cluster,
                unit: self.geo.cluster_size as u32,
                method: 0,
            });
        }
        // In an external data file, offset 0 is as good as any; there the copied flag tells.
        let placed = entry & OFFSET != 0 || (self.geo.data_file && entry & COPIED != 0);
        if entry & ZERO != 0 && self.geo.version >= 3 {
            let host = if placed {
                Some((self.data_index(), self.host_of(entry, cluster)? + at - cluster))
            } else {
                None
            };
            return Ok(Mapping::Zero { host });
        }
        if !placed {
            return Ok(Mapping::Unallocated);
        }
        let host = self.host_of(entry, cluster)? + at - cluster;
        Ok(Mapping::Data { file: self.data_index(), host, in_place: l1 & entry & COPIED != 0 })
    }

    fn map_subclusters(
        &self,
        both: u64,
        entry: u64,
        bitmap: u64,
        at: u64,
        next: u64,
        out: &mut Vec<Extent>,
    ) -> Result<()> {
        let geo = &self.geo;
        let cluster = at - at % geo.cluster_size;
        let placed = entry & OFFSET != 0 || (geo.data_file && entry & COPIED != 0);
        let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        if allocated & zero != 0 || (allocated != 0 && !placed) {
            return Err(Error::Corrupt(format!(
                "Invalid subcluster bitmap {bitmap:#x} at guest offset {cluster:#x}; run a check with repair"
            )));
        }
        let host = if placed { self.host_of(entry, cluster)? } else { 0 };
        let mut at = at;
        while at < next {
            let index = (at - cluster) / geo.subcluster_size;
            let stop = (cluster + (index + 1) * geo.subcluster_size).min(next);
            let bit = 1u32 << index;
            let mapping = if zero & bit != 0 {
                Mapping::Zero { host: placed.then_some((self.data_index(), host + at - cluster)) }
            } else if allocated & bit != 0 {
                Mapping::Data {
                    file: self.data_index(),
                    host: host + at - cluster,
                    in_place: both & COPIED != 0,
                }
            } else {
                Mapping::Unallocated
            };
            push_extent(out, Extent { offset: at, len: stop - at, mapping });
            at = stop;
        }
        Ok(())
    }
}
