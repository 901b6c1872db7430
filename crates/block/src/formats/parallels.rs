//! Parallels' expandable disk image: a header, one table of 32-bit entries, clusters.
//!
//! The table refers to what is durable only, so an interrupted writer leaves nothing to repair; the header's mark of use, which
//! asks for a repair, is therefore not set. Where another program left it, the image is checked first.

use super::{
    CheckReport, Creation, Driver, Extent, Format, Info, Opening, Preallocation, ProbeInput, Repair,
    WriteExtent,
    support::{self, MetaCache, Places, Slot, Tail, flush_ordered, le32, le64, put},
};
use crate::{
    Error, Result,
    options::{OptionKind, OptionSpec},
    storage::{Storage, StorageExt, Zeroing},
};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

/// The format.
pub static DRIVER: Driver = Driver {
    name: "parallels",
    probe,
    open,
    create: Some(create),
    measure: None,
    options: &[OptionSpec {
        name: "cluster_size",
        kind: OptionKind::Size,
        help: "Parallels image cluster size",
        default: Some("1048576"),
    }],
    backing: false,
};

const MAGIC_SECTORS: &[u8; 16] = b"WithoutFreeSpace";
const MAGIC_CLUSTERS: &[u8; 16] = b"WithouFreSpacExt";
/// Bytes of the header; the table follows.
const HEADER: usize = 64;
/// The mark of use.
const IN_USE: u32 = 0x746f_6e59;
/// Where the mark and the offset of the extension are in the header.
const IN_USE_AT: u64 = 44;
const EXTENSION_AT: u64 = 56;
/// Bytes of table kept in memory at most.
const CACHE: usize = 8 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Header {
    /// Bytes that table entries count in.
    multiplier: u64,
    /// Bytes of a cluster.
    cluster: u64,
    entries: u32,
    size: u64,
    in_use: bool,
    /// First byte behind the table where clusters may begin.
    data: u64,
    extension: u64,
}

impl Header {
    fn parse(b: &[u8; HEADER]) -> Result<Self> {
        let bad = |what: String| Error::invalid(format!("Invalid Parallels image: {what}"));
        let by_cluster = match &b[..16] {
            m if m == MAGIC_SECTORS => false,
            m if m == MAGIC_CLUSTERS => true,
            _ => return Err(bad("wrong signature".into())),
        };
        if le32(b, 16) != 2 {
            return Err(Error::unsupported(format!("Unsupported Parallels image version {}", le32(b, 16))));
        }
        let (tracks, entries, mut sectors) = (le32(b, 28), le32(b, 32), le64(b, 36));
        if tracks == 0 || tracks > (256 << 20) / 512 {
            return Err(bad(format!("cluster size of {tracks} sectors")));
        }
        if !by_cluster {
            // Older images used half of the field.
            sectors &= 0xffff_ffff;
        }
        if sectors > u64::from(entries) * u64::from(tracks) {
            return Err(bad("the table is too small for the disk".into()));
        }
        let cluster = u64::from(tracks) * 512;
        let table_end = HEADER as u64 + u64::from(entries) * 4;
        let data = match u64::from(le32(b, 48)) * 512 {
            0 => table_end.next_multiple_of(512),
            data if data < table_end => return Err(bad("the data begins within the table".into())),
            data => data,
        };
        Ok(Header {
            multiplier: if by_cluster { cluster } else { 512 },
            cluster,
            entries,
            size: sectors * 512,
            in_use: le32(b, IN_USE_AT as usize) == IN_USE,
            data,
            extension: le64(b, EXTENSION_AT as usize),
        })
    }

    /// Bytes of the file that 32-bit entries can address.
    fn limit(&self) -> u64 {
        u64::from(u32::MAX) * self.multiplier
    }
}

struct Parallels {
    storages: [Arc<dyn Storage>; 1],
    header: Header,
    table: MetaCache,
    tail: Mutex<Option<Arc<Tail>>>,
    /// The header carries the mark of use.
    in_use: AtomicBool,
    /// The extension (bitmaps that writes make stale) is gone.
    touched: AtomicBool,
    serial: Mutex<()>,
}

fn probe(input: &ProbeInput<'_>) -> u32 {
    if input.head.starts_with(MAGIC_SECTORS) || input.head.starts_with(MAGIC_CLUSTERS) { 100 } else { 0 }
}

fn open(opening: Opening<'_>) -> Result<Box<dyn Format>> {
    let mut bytes = [0; HEADER];
    opening.storage.read_at(&mut bytes, 0)?;
    let header = Header::parse(&bytes)?;
    let size = opening.storage.size()?;
    if HEADER as u64 + u64::from(header.entries) * 4 > size.next_multiple_of(512) {
        return Err(Error::invalid("Invalid Parallels image: the table reaches past the end of the file"));
    }
    let image = Parallels {
        table: MetaCache::new(Arc::clone(&opening.storage), CACHE),
        storages: [opening.storage],
        header,
        tail: Mutex::new(None),
        in_use: AtomicBool::new(header.in_use),
        touched: AtomicBool::new(header.extension == 0),
        serial: Mutex::new(()),
    };
    if header.in_use && !opening.read_only && !opening.for_check && image.check(Repair::All)?.corruptions > 0
    {
        return Err(Error::Corrupt(format!(
            "'{}' was not closed cleanly and has damage that cannot be repaired",
            image.storages[0].name()
        )));
    }
    Ok(Box::new(image))
}

fn create(creation: Creation<'_>) -> Result<()> {
    let cluster = creation.options.take_size("cluster_size")?.unwrap_or(1 << 20).next_multiple_of(512);
    if !(512..=128 << 20).contains(&cluster) {
        return Err(Error::usage("Cluster size must be between 512 bytes and 128 MiB"));
    }
    let size =
        creation.size.checked_next_multiple_of(512).ok_or_else(|| Error::usage("Image size too large"))?;
    let entries = u32::try_from(size.div_ceil(cluster))
        .ok()
        .filter(|&e| u64::from(e) * cluster <= u64::from(u32::MAX - 4096) * cluster);
    let entries = entries.ok_or_else(|| Error::usage("Image size is too large for this cluster size"))?;
    let data = (HEADER as u64 + u64::from(entries) * 4).next_multiple_of(cluster);
    let data_sectors = u32::try_from(data / 512)
        .map_err(|_| Error::usage("Image size is too large for this cluster size"))?;
    let mut b = [0; HEADER];
    put(&mut b, 0, MAGIC_CLUSTERS);
    let cylinders = u32::try_from(size / 512 / 16 / 32).unwrap_or(u32::MAX);
    for (at, value) in
        [(16, 2), (20, 16), (24, cylinders), (28, (cluster / 512) as u32), (32, entries), (48, data_sectors)]
    {
        put(&mut b, at, &value.to_le_bytes());
    }
    put(&mut b, 36, &(size / 512).to_le_bytes());
    creation.storage.fill_zeroes(0, data)?;
    creation.storage.write_at(&b, 0)?;
    creation.storage.flush()
}

impl Parallels {
    fn lookup(&self, first: u64, out: &mut [Slot]) -> Result<usize> {
        let mut bytes = [0; 2048];
        let n = out.len().min(512);
        self.table.read(HEADER as u64 + first * 4, &mut bytes[..n * 4])?;
        for (i, slot) in out[..n].iter_mut().enumerate() {
            *slot = match u64::from(le32(&bytes, i * 4)) * self.header.multiplier {
                0 => Slot::Free,
                place if place < self.header.data.min(HEADER as u64 + u64::from(self.header.entries) * 4) => {
                    return Err(Error::Corrupt(format!(
                        "'{}': cluster {} of the Parallels image lies at {place:#x}, among the metadata",
                        self.storages[0].name(),
                        first + i as u64
                    )));
                }
                place => Slot::Data(place),
            };
        }
        Ok(n)
    }

    /// Calls `f` with number, entry and place of every cluster that is there.
    fn each(&self, mut f: impl FnMut(u64, u64)) -> Result<()> {
        let mut bytes = vec![0; 1 << 16];
        let entries = u64::from(self.header.entries);
        for first in (0..entries).step_by(1 << 14) {
            let n = (entries - first).min(1 << 14) as usize;
            self.table.read(HEADER as u64 + first * 4, &mut bytes[..n * 4])?;
            for (i, entry) in
                bytes[..n * 4].chunks_exact(4).map(|e| le32(e, 0)).enumerate().filter(|(_, e)| *e != 0)
            {
                f(first + i as u64, u64::from(entry) * self.header.multiplier);
            }
        }
        Ok(())
    }

    /// The allocator; the first use reads the whole table to find where the last cluster ends.
    fn tail(&self) -> Result<Arc<Tail>> {
        let mut tail = self.tail.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(tail) = &*tail {
            return Ok(Arc::clone(tail));
        }
        let mut next = self.header.data;
        self.each(|_, place| next = next.max(place + self.header.cluster))?;
        let made = Arc::new(Tail::new(Arc::clone(&self.storages[0]), next, self.header.limit())?);
        *tail = Some(Arc::clone(&made));
        Ok(made)
    }

    /// Lets go of bitmaps that a write makes stale.
    fn touch(&self) -> Result<()> {
        if !self.touched.load(Ordering::Acquire) {
            self.storages[0].write_at(&[0; 8], EXTENSION_AT)?;
            self.storages[0].flush()?;
            self.touched.store(true, Ordering::Release);
        }
        Ok(())
    }
}

impl Format for Parallels {
    fn size(&self) -> u64 {
        self.header.size
    }

    fn info(&self) -> Result<Info> {
        // QEMU tells no cluster size for this format, and what reads its output expects none.
        Ok(Info { dirty: self.in_use.load(Ordering::Acquire), ..Info::default() })
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn unit(&self) -> u64 {
        self.header.cluster
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        support::map_units((0, self.header.cluster), (offset, len), out, |first, slots| {
            self.lookup(first, slots)
        })
    }

    fn prepare_write(&self, offset: u64, len: u64, out: &mut Vec<WriteExtent>) -> Result<()> {
        self.touch()?;
        support::prepare_units(
            (0, self.header.cluster),
            (offset, len),
            out,
            |first, slots| self.lookup(first, slots),
            |_| {
                let tail = self.tail()?;
                let host = tail.take_aligned(self.header.cluster, self.header.multiplier)?;
                Ok((host, tail.is_fresh(host)))
            },
        )
    }

    fn commit_write(&self, extents: &[WriteExtent]) -> Result<()> {
        support::commit_units(self.header.cluster, extents, |unit, host| {
            let entry = (host / self.header.multiplier) as u32;
            self.table.write(HEADER as u64 + unit * 4, &entry.to_le_bytes())
        })?;
        if self.table.is_full() { self.flush() } else { Ok(()) }
    }

    fn note_write(&self, _offset: u64, _len: u64) -> Result<()> {
        self.touch()
    }

    fn abort_write(&self, _extents: &[WriteExtent]) {}

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<Zeroing> {
        self.touch()?;
        support::zero_units(
            (&self.storages[0], self.header.cluster),
            (offset, len),
            unmap,
            |first, slots| self.lookup(first, slots),
            |_, _| Ok(Zeroing::Done),
        )
    }

    fn zero_unit(&self) -> u64 {
        1
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.touch()?;
        support::discard_units((&self.storages[0], self.header.cluster), (offset, len), |first, slots| {
            self.lookup(first, slots)
        })
    }

    fn flush(&self) -> Result<()> {
        let tail = self.tail.lock().unwrap_or_else(|e| e.into_inner()).clone();
        flush_ordered(&self.serial, &*self.storages[0], &[&self.table], || tail.map_or(Ok(()), |t| t.pad()))
    }

    fn resize(&self, _size: u64, _preallocation: Preallocation) -> Result<()> {
        Err(support::no_resize())
    }

    fn check(&self, repair: Repair) -> Result<CheckReport> {
        let Header { cluster, multiplier, entries, data, .. } = self.header;
        let file_size = self.storages[0].size()?;
        let mut report = CheckReport { total_clusters: entries.into(), ..CheckReport::default() };
        let in_use = self.in_use.load(Ordering::Acquire);
        if in_use {
            report.corruptions += 1;
            report.say("ERROR image was not closed correctly");
        }
        // Clusters of one image lie apart by multiples of what entries count in, or by sectors in old images.
        let mut used = Places::new(file_size / cluster.max(multiplier) + 1)?;
        let (mut last, mut end, mut wrong) = (None, data, Vec::new());
        self.each(|index, place| {
            let inside = place >= data.min(HEADER as u64 + u64::from(entries) * 4)
                && place + cluster <= file_size.max(data).next_multiple_of(512);
            let free = !place.is_multiple_of(cluster) || used.claim(place / cluster);
            if !inside || !free {
                report.corruptions += 1;
                report.say(format!(
                    "ERROR cluster {index} at {place:#x} is outside of the image or used twice"
                ));
                // What keeps memory bounded with a hostile table: repairs come in rounds.
                if wrong.len() < 1 << 16 {
                    wrong.push(index);
                }
                return;
            }
            report.allocated_clusters += 1;
            report.fragmented_clusters += u64::from(last.is_some_and(|l: u64| l + cluster != place));
            last = Some(place);
            end = end.max(place + cluster);
        })?;
        report.image_end_offset = Some(end);
        report.leaks = file_size.saturating_sub(end).div_ceil(cluster);
        if report.leaks > 0 {
            report.say(format!("ERROR space leaked at the end of the image {}", file_size - end));
        }
        if repair == Repair::All {
            for &index in &wrong {
                self.table.write(HEADER as u64 + index * 4, &[0; 4])?;
            }
            self.flush()?;
            report.corruptions_fixed += wrong.len() as u64;
            if in_use && report.corruptions == wrong.len() as u64 + 1 {
                self.storages[0].write_at(&[0; 4], IN_USE_AT)?;
                self.storages[0].flush()?;
                self.in_use.store(false, Ordering::Release);
                report.corruptions_fixed += 1;
            }
            report.corruptions -= report.corruptions_fixed;
        }
        let untouched = self.tail.lock().unwrap_or_else(|e| e.into_inner()).is_none();
        if repair != Repair::None && report.leaks > 0 && report.corruptions == 0 && untouched {
            self.storages[0].set_size(end)?;
            report.leaks_fixed = std::mem::take(&mut report.leaks);
        }
        Ok(report)
    }

    fn created_zeroed(&self) -> bool {
        self.storages[0].grows_with_zeros()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;
    use proptest::prelude::*;

    fn valid() -> [u8; HEADER] {
        let mut b = [0; HEADER];
        put(&mut b, 0, MAGIC_CLUSTERS);
        for (at, value) in [(16, 2u32), (28, 2048), (32, 10), (36, 20480), (48, 2048)] {
            put(&mut b, at, &value.to_le_bytes());
        }
        b
    }

    #[test]
    fn hostile_headers_are_refused() {
        assert_eq!(Header::parse(&valid()).unwrap().size, 10 << 20);
        for (at, value) in [(0, 0u32), (16, 3), (28, 0), (28, u32::MAX), (32, 9), (36, u32::MAX), (40, 1)] {
            let mut b = valid();
            put(&mut b, at, &value.to_le_bytes());
            assert!(Header::parse(&b).is_err(), "{at} = {value:#x}");
        }
        let mut b = valid();
        put(&mut b, 32, &u32::MAX.to_le_bytes());
        assert!(Header::parse(&b).is_err(), "the data would begin within the table");
    }

    #[test]
    fn an_image_left_in_use_is_repaired_on_opening() {
        let mut bytes = valid().to_vec();
        bytes.resize(3 << 20, 0);
        put(&mut bytes, IN_USE_AT as usize, &IN_USE.to_le_bytes());
        put(&mut bytes, 64, &1u32.to_le_bytes());
        put(&mut bytes, 68, &1u32.to_le_bytes());
        put(&mut bytes, 72, &900u32.to_le_bytes());
        let storage = Arc::new(MemoryStorage::new(bytes));
        let image =
            crate::Image::open_storage(storage.clone(), "x", &crate::OpenOptions::writer(Some("parallels")))
                .unwrap();
        assert_eq!(image.format().check(Repair::None).unwrap().allocated_clusters, 1);
        image.close().unwrap();
        assert_eq!(le32(&storage.snapshot(), IN_USE_AT as usize), 0);
        assert_eq!(storage.snapshot()[64..76], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    proptest! {
        #[test]
        fn any_header_parses_or_fails(changes in proptest::collection::vec((0..HEADER, any::<u8>()), 0..20)) {
            let mut b = valid();
            for (at, byte) in changes {
                b[at] = byte;
            }
            let _ = Header::parse(&b).map(|h| h.limit());
        }
    }
}
