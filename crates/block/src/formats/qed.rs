//! QED, the QEMU enhanced disk: a header, a first-level table, second-level tables, clusters; no reference counts.
//!
//! Clusters are only ever added at the end of the file, and tables refer to what is durable: the image never needs the check
//! that the format's dirty mark asks for, so the mark is not set. Where another program left it, the image is checked first.

use super::{
    Backing, CheckReport, Creation, Driver, Extent, Format, Info, Opening, Preallocation, ProbeInput, Repair,
    WriteExtent,
    support::{self, Places, Shape, Slot, TwoLevel, le32, le64, put},
};
use crate::{
    Error, Result,
    options::{OptionKind, OptionSpec},
    storage::{Storage, StorageExt, Zeroing},
};
use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};

/// The format.
pub static DRIVER: Driver = Driver {
    name: "qed",
    probe,
    open,
    create: Some(create),
    measure: None,
    options: &[
        OptionSpec {
            name: "cluster_size",
            kind: OptionKind::Size,
            help: "Cluster size (in bytes)",
            default: Some("65536"),
        },
        OptionSpec {
            name: "table_size",
            kind: OptionKind::Size,
            help: "L1/L2 table size (in clusters)",
            default: None,
        },
    ],
    backing: true,
};

const MAGIC: &[u8; 4] = b"QED\0";
/// Bytes of a header.
const HEADER: usize = 64;
/// Longest backing file name.
const MAX_NAME: u32 = 1023;
/// Second-level entry of a cluster that reads as zeros.
const ZERO: u64 = 1;

/// Bits of the features field.
mod feature {
    pub(super) const BACKING_FILE: u64 = 1;
    pub(super) const NEED_CHECK: u64 = 2;
    pub(super) const BACKING_RAW: u64 = 4;
    pub(super) const KNOWN: u64 = 7;
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Header {
    cluster: u64,
    /// Clusters of a table.
    table: u64,
    /// Clusters of the header.
    header: u64,
    features: u64,
    compat: u64,
    autoclear: u64,
    l1: u64,
    size: u64,
    name: (u32, u32),
}

impl Header {
    fn parse(b: &[u8; HEADER]) -> Result<Self> {
        let bad = |what: String| Error::invalid(format!("Invalid QED image: {what}"));
        if &b[..4] != MAGIC {
            return Err(bad("wrong signature".into()));
        }
        let header = Header {
            cluster: le32(b, 4).into(),
            table: le32(b, 8).into(),
            header: le32(b, 12).into(),
            features: le64(b, 16),
            compat: le64(b, 24),
            autoclear: le64(b, 32),
            l1: le64(b, 40),
            size: le64(b, 48),
            name: (le32(b, 56), le32(b, 60)),
        };
        if header.features & !feature::KNOWN != 0 {
            return Err(Error::unsupported(format!(
                "Unsupported QED features: {:#x}",
                header.features & !feature::KNOWN
            )));
        }
        if !valid_cluster(header.cluster) {
            return Err(bad(format!("cluster size {}", header.cluster)));
        }
        if !valid_table(header.table) {
            return Err(bad(format!("table size {}", header.table)));
        }
        if header.header == 0 || header.header * header.cluster > 1 << 31 {
            return Err(bad(format!("header of {} clusters", header.header)));
        }
        if !header.size.is_multiple_of(512) || header.size > max_size(header.cluster, header.table) {
            return Err(bad(format!("disk size {}", header.size)));
        }
        if !header.l1.is_multiple_of(header.cluster)
            || header.l1 < header.header * header.cluster
            || header.l1 > i64::MAX as u64 / 2
        {
            return Err(bad(format!("first-level table at {:#x}", header.l1)));
        }
        if header.features & feature::BACKING_FILE != 0 {
            let (at, len) = header.name;
            let inside = u64::from(at) + u64::from(len) <= header.header * header.cluster;
            if len == 0 || len > MAX_NAME || (at as usize) < HEADER || !inside {
                return Err(bad("the backing file's name lies outside of the header".into()));
            }
        }
        Ok(header)
    }

    fn encode(&self) -> [u8; HEADER] {
        let mut b = [0; HEADER];
        put(&mut b, 0, MAGIC);
        put(&mut b, 4, &(self.cluster as u32).to_le_bytes());
        put(&mut b, 8, &(self.table as u32).to_le_bytes());
        put(&mut b, 12, &(self.header as u32).to_le_bytes());
        for (at, value) in
            [(16, self.features), (24, self.compat), (32, self.autoclear), (40, self.l1), (48, self.size)]
        {
            put(&mut b, at, &value.to_le_bytes());
        }
        put(&mut b, 56, &self.name.0.to_le_bytes());
        put(&mut b, 60, &self.name.1.to_le_bytes());
        b
    }

    /// Entries of any table.
    fn entries(&self) -> u64 {
        self.table * self.cluster / 8
    }
}

fn valid_cluster(size: u64) -> bool {
    size.is_power_of_two() && (4096..=64 << 20).contains(&size)
}

fn valid_table(clusters: u64) -> bool {
    clusters.is_power_of_two() && (1..=16).contains(&clusters)
}

/// Largest disk that the tables can describe.
fn max_size(cluster: u64, table: u64) -> u64 {
    let entries = u128::from(table * cluster / 8);
    u64::try_from(entries * entries * u128::from(cluster)).unwrap_or(u64::MAX).min(i64::MAX as u64 & !511)
}

struct Qed {
    storages: [Arc<dyn Storage>; 1],
    header: Mutex<Header>,
    backing: Mutex<Option<Backing>>,
    cluster: u64,
    size: AtomicU64,
    tables: TwoLevel,
}

fn probe(input: &ProbeInput<'_>) -> u32 {
    if input.head.starts_with(MAGIC) { 100 } else { 0 }
}

fn open(opening: Opening<'_>) -> Result<Box<dyn Format>> {
    let storage = opening.storage;
    let mut bytes = [0; HEADER];
    storage.read_at(&mut bytes, 0)?;
    let mut header = Header::parse(&bytes)?;
    let file_size = storage.size()?;
    if header.l1 + header.entries() * 8 > file_size.next_multiple_of(header.cluster) {
        return Err(Error::invalid(
            "Invalid QED image: the first-level table reaches past the end of the file",
        ));
    }
    let backing = if header.features & feature::BACKING_FILE != 0 {
        let name = storage.read_vec(header.name.0.into(), header.name.1 as usize)?;
        let name = String::from_utf8(name)
            .map_err(|_| Error::invalid("the QED backing file's name is not UTF-8"))?;
        let format = (header.features & feature::BACKING_RAW != 0).then(|| "raw".to_owned());
        Some(Backing { name, format })
    } else {
        None
    };
    if !opening.read_only && header.autoclear != 0 {
        // None is known here: bits of features that a write would break are cleared before the first one.
        header.autoclear = 0;
        storage.write_at(&header.encode(), 0)?;
        storage.flush()?;
    }
    let next = file_size
        .checked_next_multiple_of(header.cluster)
        .ok_or_else(|| Error::invalid("The file is too large"))?;
    let shape = Shape {
        root: (header.l1, header.entries()),
        leaf_entries: header.entries(),
        big_endian: false,
        align: header.cluster,
        limit: i64::MAX as u64,
    };
    let qed = Qed {
        tables: TwoLevel::new(Arc::clone(&storage), shape, next)?,
        storages: [storage],
        cluster: header.cluster,
        size: AtomicU64::new(header.size),
        header: Mutex::new(header),
        backing: Mutex::new(backing),
    };
    if header.features & feature::NEED_CHECK != 0 && !opening.read_only && !opening.for_check {
        let report = qed.check(Repair::All)?;
        if report.corruptions > 0 {
            return Err(Error::Corrupt(format!(
                "'{}' was not closed cleanly and has damage that cannot be repaired",
                qed.storages[0].name()
            )));
        }
    }
    Ok(Box::new(qed))
}

fn create(creation: Creation<'_>) -> Result<()> {
    let cluster = creation.options.take_size("cluster_size")?.unwrap_or(64 << 10);
    let table = creation.options.take_size("table_size")?.unwrap_or(4);
    if !valid_cluster(cluster) {
        return Err(Error::usage("QED cluster size must be within range [4096, 67108864] and power of 2"));
    }
    if !valid_table(table) {
        return Err(Error::usage("QED table size must be within range [1, 16] and power of 2"));
    }
    let size = creation.size.checked_next_multiple_of(512).filter(|&s| s <= max_size(cluster, table));
    let size = size.ok_or_else(|| {
        Error::usage(format!(
            "QED image size must be a non-zero multiple of cluster size and less than {} bytes",
            max_size(cluster, table)
        ))
    })?;
    let mut header = Header {
        cluster,
        table,
        header: 1,
        features: 0,
        compat: 0,
        autoclear: 0,
        l1: cluster,
        size,
        name: (0, 0),
    };
    let name = header.name_backing(creation.backing.as_ref())?;
    let storage = &creation.storage;
    storage.fill_zeroes(0, cluster + table * cluster)?;
    storage.write_at(&[&header.encode()[..], name.as_bytes()].concat(), 0)?;
    storage.flush()
}

impl Header {
    /// Refers to a backing file; the result is the name to store behind the header.
    fn name_backing<'a>(&mut self, backing: Option<&'a Backing>) -> Result<&'a str> {
        self.features &= !(feature::BACKING_FILE | feature::BACKING_RAW);
        self.name = (0, 0);
        let Some(backing) = backing else { return Ok("") };
        let len = u32::try_from(backing.name.len()).ok().filter(|l| (1..=MAX_NAME).contains(l));
        let len = len.ok_or_else(|| {
            Error::usage(format!("Backing file name is too long (at most {MAX_NAME} bytes)"))
        })?;
        self.features |= feature::BACKING_FILE;
        if backing.format.as_deref() == Some("raw") {
            self.features |= feature::BACKING_RAW;
        }
        self.name = (HEADER as u32, len);
        Ok(&backing.name)
    }
}

impl Qed {
    fn lookup(&self, first: u64, out: &mut [Slot]) -> Result<usize> {
        let mut entries = [0; 512];
        let wanted = out.len().min(512);
        let n = self.tables.entries(first, &mut entries[..wanted])?;
        for (i, (slot, &entry)) in out.iter_mut().zip(&entries[..n]).enumerate() {
            *slot = match entry {
                0 => Slot::Free,
                ZERO => Slot::Zero,
                place if self.tables.is_sound(place, self.cluster) => Slot::Data(place),
                place => {
                    return Err(Error::Corrupt(format!(
                        "'{}': cluster {} of the QED image is said to be at {place:#x}, where none can be",
                        self.storages[0].name(),
                        first + i as u64
                    )));
                }
            };
        }
        Ok(n)
    }

    fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn backing(&self) -> Option<Backing> {
        self.backing.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

impl Format for Qed {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn info(&self) -> Result<Info> {
        Ok(Info {
            cluster_size: Some(self.cluster),
            backing: self.backing(),
            dirty: self.header().features & feature::NEED_CHECK != 0,
            ..Info::default()
        })
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn unit(&self) -> u64 {
        self.cluster
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        support::map_units((0, self.cluster), (offset, len), out, |first, slots| self.lookup(first, slots))
    }

    fn prepare_write(&self, offset: u64, len: u64, out: &mut Vec<WriteExtent>) -> Result<()> {
        support::prepare_units(
            (0, self.cluster),
            (offset, len),
            out,
            |first, slots| self.lookup(first, slots),
            |_| self.tables.allocate(self.cluster),
        )
    }

    fn commit_write(&self, extents: &[WriteExtent]) -> Result<()> {
        support::commit_units(self.cluster, extents, |unit, host| self.tables.set(unit, host))
    }

    fn abort_write(&self, _extents: &[WriteExtent]) {}

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<Zeroing> {
        let backed = self.backing().is_some();
        support::zero_units(
            (&self.storages[0], self.cluster),
            (offset, len),
            unmap,
            |first, slots| self.lookup(first, slots),
            |unit, slot| {
                if slot == Slot::Free && backed {
                    self.tables.set(unit, ZERO)?;
                }
                Ok(Zeroing::Done)
            },
        )
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        support::discard_units((&self.storages[0], self.cluster), (offset, len), |first, slots| {
            self.lookup(first, slots)
        })
    }

    fn flush(&self) -> Result<()> {
        self.tables.flush()
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        if preallocation != Preallocation::Off {
            return Err(Error::unsupported(format!(
                "Unsupported preallocation mode '{}'",
                preallocation.name()
            )));
        }
        let mut header = self.header();
        if size < header.size {
            return Err(Error::unsupported("Shrinking images is currently not supported"));
        }
        if !size.is_multiple_of(512) || size > max_size(header.cluster, header.table) {
            return Err(Error::usage("Invalid image size specified"));
        }
        let next = Header { size, ..*header };
        self.storages[0].write_at(&next.encode(), 0)?;
        self.storages[0].flush()?;
        *header = next;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn set_backing(&self, backing: Option<&Backing>) -> Result<()> {
        let mut header = self.header();
        let mut next = *header;
        let name = next.name_backing(backing)?;
        if (HEADER + name.len()) as u64 > header.header * header.cluster {
            return Err(Error::usage("The backing file's name does not fit in the header"));
        }
        self.tables.flush()?;
        self.storages[0].write_at(&[&next.encode()[..], name.as_bytes()].concat(), 0)?;
        self.storages[0].flush()?;
        *header = next;
        *self.backing.lock().unwrap_or_else(|e| e.into_inner()) = backing.cloned();
        Ok(())
    }

    fn check(&self, repair: Repair) -> Result<CheckReport> {
        self.tables.flush()?;
        let mut header = *self.header();
        let clusters = self.storages[0].size()?.div_ceil(self.cluster);
        let mut used = Places::new(clusters)?;
        let mut report =
            CheckReport { total_clusters: header.size.div_ceil(self.cluster), ..CheckReport::default() };
        for place in
            (0..header.header).chain(header.l1 / self.cluster..header.l1 / self.cluster + header.table)
        {
            used.claim(place);
        }
        let entries = header.entries();
        let in_file = |offset: u64, count: u64| {
            offset.is_multiple_of(self.cluster)
                && offset / self.cluster + count <= clusters
                && offset > header.l1
        };
        let mut last = None;
        for index in 0..report.total_clusters.div_ceil(entries) {
            let leaf = self.tables.root_entry(index)?;
            if leaf == 0 {
                continue;
            }
            let mut sound = in_file(leaf, header.table);
            if sound {
                for i in 0..header.table {
                    sound &= used.claim(leaf / self.cluster + i);
                }
            }
            if !sound {
                report.corruptions += 1;
                report.say(format!(
                    "ERROR: second-level table {index} at {leaf:#x} is outside of the file or used twice"
                ));
                if repair == Repair::All {
                    self.tables.clear_root(index)?;
                    report.corruptions_fixed += 1;
                }
                continue;
            }
            let (start, end) = (index * entries, ((index + 1) * entries).min(report.total_clusters));
            let (mut unit, mut buffer) = (start, [0; 512]);
            while unit < end {
                let wanted = (end - unit).min(512) as usize;
                let n = self.tables.entries(unit, &mut buffer[..wanted])?;
                for (i, &place) in buffer[..n].iter().enumerate().filter(|(_, p)| **p > ZERO) {
                    let sound = in_file(place, 1) && used.claim(place / self.cluster);
                    if !sound {
                        report.corruptions += 1;
                        report.say(format!(
                            "ERROR: cluster {} at {place:#x} is outside of the file or used twice",
                            unit + i as u64
                        ));
                        if repair == Repair::All {
                            self.tables.set(unit + i as u64, 0)?;
                            report.corruptions_fixed += 1;
                        }
                        continue;
                    }
                    report.allocated_clusters += 1;
                    report.fragmented_clusters +=
                        u64::from(last.is_some_and(|l: u64| l + self.cluster != place));
                    last = Some(place);
                }
                unit += n as u64;
            }
        }
        report.corruptions -= report.corruptions_fixed;
        report.leaks = clusters - used.claimed().min(clusters);
        if report.leaks > 0 {
            report.say(format!("Leaked clusters: {}", report.leaks));
        }
        report.image_end_offset = Some(clusters * self.cluster);
        if repair != Repair::None && report.corruptions == 0 {
            self.tables.flush()?;
            if header.features & feature::NEED_CHECK != 0 {
                header.features &= !feature::NEED_CHECK;
                self.storages[0].write_at(&header.encode(), 0)?;
                self.storages[0].flush()?;
                self.header().features = header.features;
            }
        }
        Ok(report)
    }

    fn created_zeroed(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn valid() -> Header {
        Header {
            cluster: 65536,
            table: 4,
            header: 1,
            features: feature::BACKING_FILE,
            compat: 0,
            autoclear: 0,
            l1: 65536,
            size: 1 << 30,
            name: (64, 10),
        }
    }

    #[test]
    fn headers_round_trip_and_hostile_ones_are_refused() {
        assert_eq!(Header::parse(&valid().encode()).unwrap(), valid());
        for bad in [
            Header { cluster: 0, ..valid() },
            Header { cluster: 65537, ..valid() },
            Header { table: 3, ..valid() },
            Header { table: 32, ..valid() },
            Header { header: 0, ..valid() },
            Header { header: u32::MAX.into(), ..valid() },
            Header { features: 8, ..valid() },
            Header { l1: 0, ..valid() },
            Header { l1: !65535, ..valid() },
            Header { size: 511, ..valid() },
            Header { size: 1 << 63, ..valid() },
            Header { name: (u32::MAX, u32::MAX), ..valid() },
            Header { name: (65530, 10), ..valid() },
        ] {
            assert!(Header::parse(&bad.encode()).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_header_parses_or_fails(changes in proptest::collection::vec((0..HEADER, any::<u8>()), 0..20)) {
            let mut b = valid().encode();
            for (at, byte) in changes {
                b[at] = byte;
            }
            let _ = Header::parse(&b).map(|h| h.entries());
        }
    }
}
