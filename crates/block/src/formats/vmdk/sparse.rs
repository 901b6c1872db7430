//! A sparse extent: grains found through a grain directory and grain tables, often kept twice ("Virtual Disk Format" 5.0,
//! chapters 4 and 5), and the older COWD layout of ESX.

use crate::{
    Error, Result,
    formats::support::{MetaCache, Slot, Tail, flush_ordered, le16, le32, le64, put},
    storage::Storage,
};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

/// Bytes of a header.
pub(super) const HEADER: usize = 512;
/// The magic of a sparse extent.
pub(super) const MAGIC: &[u8; 4] = b"KDMV";
/// The magic of ESX's own sparse extents.
pub(super) const COW_MAGIC: &[u8; 4] = b"COWD";
/// Entries of a grain table in every image there is.
pub(super) const TABLE_ENTRIES: u32 = 512;
/// Table entry of a grain that reads as zeros.
const ZEROED: u32 = 1;
/// In the place of the directory's offset: it is in the footer.
const AT_END: u64 = u64::MAX;
/// Bytes of the marker in front of a compressed grain.
pub(super) const GRAIN_MARKER: usize = 12;
/// Bytes of tables kept in memory at most, for each extent.
const CACHE: usize = 2 << 20;

/// Bits of the header's flags.
pub(super) mod flag {
    /// The line-end bytes in the header are valid.
    pub(in super::super) const NEWLINES: u32 = 1;
    /// There is a redundant grain directory.
    pub(in super::super) const REDUNDANT: u32 = 2;
    /// Entries of 1 mean zeros.
    pub(in super::super) const ZEROED_GRAIN: u32 = 4;
    /// Grains are compressed.
    pub(in super::super) const COMPRESSED: u32 = 1 << 16;
    /// Markers identify grains and tables.
    pub(in super::super) const MARKERS: u32 = 1 << 17;
}

/// A sparse extent's header, checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) flags: u32,
    /// Sectors of the disk.
    pub(super) capacity: u64,
    /// Sectors of a grain.
    pub(super) grain: u64,
    /// Where the embedded descriptor is, and how long it is, in sectors; 0 for none.
    pub(super) descriptor: (u64, u64),
    pub(super) table_entries: u32,
    pub(super) redundant: u64,
    pub(super) directory: u64,
    /// Sectors of metadata in front of the grains.
    pub(super) overhead: u64,
    pub(super) compression: u16,
}

impl Header {
    /// Reads the header of an extent, from its end if that is where the directory is known. The flag tells that it was.
    pub(super) fn read(storage: &dyn Storage) -> Result<(Self, bool)> {
        let mut bytes = [0; HEADER];
        storage.read_at(&mut bytes, 0)?;
        let header = Self::parse(&bytes)?;
        if header.directory != AT_END {
            return Ok((header, false));
        }
        // Footer marker, footer, end-of-stream marker: the last three sectors.
        let size = storage.size()?;
        let at = size
            .checked_sub(1536)
            .ok_or_else(|| Error::invalid("Invalid VMDK footer: the file is too short"))?;
        let mut tail = [0; 1536];
        storage.read_at(&mut tail, at)?;
        let (size_0, type_0) = (le32(&tail, 8), le32(&tail, 12));
        let (size_1, type_1) = (le32(&tail, 1032), le32(&tail, 1036));
        if (size_0, type_0, size_1, type_1) != (0, 3, 0, 0) {
            return Err(Error::invalid("Invalid VMDK footer: its markers are missing"));
        }
        let mut footer = [0; HEADER];
        footer.copy_from_slice(&tail[512..1024]);
        let footer = Self::parse(&footer)?;
        if footer.directory == AT_END {
            return Err(Error::invalid("Invalid VMDK footer: it names no grain directory"));
        }
        Ok((footer, true))
    }

    fn parse(b: &[u8; HEADER]) -> Result<Self> {
        let bad = |what: String| Error::invalid(format!("Invalid VMDK extent: {what}"));
        if &b[..4] == COW_MAGIC {
            return Self::parse_cow(b);
        }
        if &b[..4] != MAGIC {
            return Err(bad("it has no VMDK signature".into()));
        }
        let header = Header {
            version: le32(b, 4),
            flags: le32(b, 8),
            capacity: le64(b, 12),
            grain: le64(b, 20),
            descriptor: (le64(b, 28), le64(b, 36)),
            table_entries: le32(b, 44),
            redundant: le64(b, 48),
            directory: le64(b, 56),
            overhead: le64(b, 64),
            compression: le16(b, 77),
        };
        if !(1..=3).contains(&header.version) {
            return Err(Error::unsupported(format!("Unsupported VMDK version {}", header.version)));
        }
        if header.flags & flag::COMPRESSED != 0 && header.compression != 1 {
            return Err(Error::unsupported(format!(
                "Unsupported VMDK compression algorithm {}",
                header.compression
            )));
        }
        if header.flags & flag::NEWLINES != 0 && b[73..77] != *b"\n \r\n" {
            return Err(bad("line ends were changed on its way here; copy the file in binary mode".into()));
        }
        header.check()
    }

    fn parse_cow(b: &[u8; HEADER]) -> Result<Self> {
        Header {
            version: 1,
            capacity: le32(b, 12).into(),
            grain: le32(b, 16).into(),
            table_entries: 4096,
            directory: le32(b, 20).into(),
            // The directory's size stands where other headers have none; it follows from the capacity as well.
            ..Header::default()
        }
        .check()
    }

    fn check(self) -> Result<Self> {
        let bad = |what: String| Error::invalid(format!("Invalid VMDK extent: {what}"));
        if !self.grain.is_power_of_two() || !(1..=0x20000).contains(&self.grain) {
            return Err(bad(format!("grain size of {} sectors", self.grain)));
        }
        if self.table_entries == 0 || self.table_entries > 4096 || !self.table_entries.is_power_of_two() {
            return Err(bad(format!("L2 table size {}", self.table_entries)));
        }
        if self.capacity == 0 || self.capacity > 1 << 48 {
            return Err(bad(format!("capacity of {} sectors", self.capacity)));
        }
        if self.descriptor.1 > (super::descriptor::MAX_DESCRIPTOR / 512) as u64 || self.descriptor.0 > 1 << 48
        {
            return Err(bad("the descriptor is too large".into()));
        }
        Ok(self)
    }

    /// Entries of the grain directory.
    fn directory_entries(&self) -> u64 {
        self.capacity.div_ceil(self.grain * u64::from(self.table_entries))
    }

    /// The bytes of a new header.
    pub(super) fn encode(&self) -> [u8; HEADER] {
        let mut b = [0; HEADER];
        put(&mut b, 0, MAGIC);
        put(&mut b, 4, &self.version.to_le_bytes());
        put(&mut b, 8, &self.flags.to_le_bytes());
        put(&mut b, 12, &self.capacity.to_le_bytes());
        put(&mut b, 20, &self.grain.to_le_bytes());
        put(&mut b, 28, &self.descriptor.0.to_le_bytes());
        put(&mut b, 36, &self.descriptor.1.to_le_bytes());
        put(&mut b, 44, &self.table_entries.to_le_bytes());
        put(&mut b, 48, &self.redundant.to_le_bytes());
        put(&mut b, 56, &self.directory.to_le_bytes());
        put(&mut b, 64, &self.overhead.to_le_bytes());
        put(&mut b, 73, b"\n \r\n");
        put(&mut b, 77, &self.compression.to_le_bytes());
        b
    }
}

/// An open sparse extent. Offsets and grain numbers count from the extent's beginning.
pub(super) struct Sparse {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) header: Header,
    /// Bytes of a grain.
    pub(super) grain: u64,
    tables: MetaCache,
    directory: MetaCache,
    tail: Tail,
    /// The directory was found through the footer; before anything is appended the header has to name it.
    footer: AtomicBool,
    serial: Mutex<()>,
}

impl Sparse {
    pub(super) fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let (header, from_footer) = Header::read(&*storage)?;
        let size = storage.size()?;
        let grain = header.grain * 512;
        for directory in
            [Some(header.directory), header.has_redundant().then_some(header.redundant)].into_iter().flatten()
        {
            let end =
                directory.checked_mul(512).and_then(|at| at.checked_add(header.directory_entries() * 4));
            if directory == 0 || end.is_none_or(|end| end > size.next_multiple_of(512)) {
                return Err(Error::invalid(
                    "Invalid VMDK extent: the grain directory lies outside of the file",
                ));
            }
        }
        let next =
            size.checked_next_multiple_of(grain).ok_or_else(|| Error::invalid("The file is too large"))?;
        Ok(Sparse {
            tables: MetaCache::new(Arc::clone(&storage), CACHE),
            directory: MetaCache::new(Arc::clone(&storage), CACHE / 4),
            tail: Tail::new(Arc::clone(&storage), next, u64::from(u32::MAX) * 512)?,
            storage,
            header,
            grain,
            footer: AtomicBool::new(from_footer),
            serial: Mutex::new(()),
        })
    }

    /// Bytes of the disk in this extent, as its header says.
    pub(super) fn size(&self) -> u64 {
        self.header.capacity * 512
    }

    pub(super) fn compressed(&self) -> bool {
        self.header.flags & flag::COMPRESSED != 0
    }

    pub(super) fn markers(&self) -> bool {
        self.header.flags & flag::MARKERS != 0
    }

    pub(super) fn zeroed_grains(&self) -> bool {
        self.header.flags & flag::ZEROED_GRAIN != 0
    }

    fn entries(&self) -> u64 {
        u64::from(self.header.table_entries)
    }

    /// Where the grain table `index` is by the directory at sector `directory`; `None` if it is not there.
    fn table(&self, directory: u64, index: u64) -> Result<Option<u64>> {
        let sector = self.directory.le32(directory * 512 + index * 4)?;
        Ok((sector != 0).then(|| u64::from(sector) * 512))
    }

    /// Fills slots from grain `first` on and says how many.
    pub(super) fn lookup(&self, first: u64, out: &mut [Slot]) -> Result<usize> {
        let (index, within) = (first / self.entries(), first % self.entries());
        let n = out.len().min(512).min((self.entries() - within) as usize);
        let Some(table) = self.table(self.header.directory, index)? else {
            out[..n].fill(Slot::Free);
            return Ok(n);
        };
        // One entry more, which bounds how long a compressed grain can be.
        let read = (n + 1).min((self.entries() - within) as usize);
        let mut bytes = [0; 513 * 4];
        self.tables.read(table + within * 4, &mut bytes[..read * 4])?;
        for (i, slot) in out[..n].iter_mut().enumerate() {
            *slot = match le32(&bytes, i * 4) {
                0 => Slot::Free,
                ZEROED if self.zeroed_grains() => Slot::Zero,
                sector if self.compressed() => {
                    let next = if i + 1 < read { le32(&bytes, (i + 1) * 4) } else { 0 };
                    let most = 2 * self.grain + 512;
                    let stored = match next.checked_sub(sector) {
                        Some(gap) if gap > 0 => most.min(u64::from(gap) * 512),
                        _ => most,
                    };
                    Slot::Packed { host: u64::from(sector) * 512, stored: stored as u32 }
                }
                sector if u64::from(sector) < self.header.overhead.min(1 << 31) => {
                    return Err(Error::Corrupt(format!(
                        "'{}': grain {} of the VMDK extent lies at sector {sector}, among the metadata",
                        self.storage.name(),
                        first + i as u64
                    )));
                }
                sector => Slot::Data(u64::from(sector) * 512),
            };
        }
        Ok(n)
    }

    /// Space for a new grain, and whether it is known to be zeros.
    pub(super) fn allocate(&self) -> Result<(u64, bool)> {
        self.leave_footer()?;
        let host = self.tail.take(self.grain)?;
        Ok((host, self.tail.is_fresh(host)))
    }

    /// Space for a compressed grain of `len` bytes, a multiple of the sector size.
    pub(super) fn allocate_packed(&self, len: u64) -> Result<u64> {
        self.leave_footer()?;
        self.tail.take(len)
    }

    /// Makes the header name the grain directory, if only the footer did: the footer is about to be no longer the end.
    fn leave_footer(&self) -> Result<()> {
        if !self.footer.load(Ordering::Acquire) {
            return Ok(());
        }
        let _serial = self.serial.lock().unwrap_or_else(|e| e.into_inner());
        if self.footer.load(Ordering::Acquire) {
            self.storage.write_at(&self.header.directory.to_le_bytes(), 56)?;
            self.storage.flush()?;
            self.footer.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// Points the tables at the grain's new place.
    pub(super) fn assign(&self, grain: u64, host: u64) -> Result<()> {
        let sector =
            u32::try_from(host / 512).map_err(|_| Error::invalid("a VMDK extent cannot reach past 2 TiB"))?;
        self.set(grain, sector)
    }

    /// Makes the grain read as zeros; only where the format says how.
    pub(super) fn zero(&self, grain: u64) -> Result<()> {
        self.set(grain, ZEROED)
    }

    fn set(&self, grain: u64, entry: u32) -> Result<()> {
        let (index, within) = (grain / self.entries(), grain % self.entries());
        let redundant = self.header.has_redundant().then_some(self.header.redundant);
        for directory in [Some(self.header.directory), redundant].into_iter().flatten() {
            let table = match self.table(directory, index)? {
                Some(table) => table,
                None => self.new_table(directory, index)?,
            };
            self.tables.write(table + within * 4, &entry.to_le_bytes())?;
        }
        if self.tables.is_full() || self.directory.is_full() { self.flush() } else { Ok(()) }
    }

    /// An empty grain table, entered in the directory.
    fn new_table(&self, directory: u64, index: u64) -> Result<u64> {
        // Two grains of one table are written by different threads; only one makes it.
        static MAKING: Mutex<()> = Mutex::new(());
        let _making = MAKING.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(table) = self.table(directory, index)? {
            return Ok(table);
        }
        let len = (self.entries() * 4).next_multiple_of(512);
        let at = self.tail.take(len.next_multiple_of(self.grain))?;
        let sector =
            u32::try_from(at / 512).map_err(|_| Error::invalid("a VMDK extent cannot reach past 2 TiB"))?;
        self.tables.write(at, &vec![0; len as usize])?;
        self.directory.write(directory * 512 + index * 4, &sector.to_le_bytes())?;
        Ok(at)
    }

    pub(super) fn flush(&self) -> Result<()> {
        flush_ordered(&self.serial, &*self.storage, &[&self.tables, &self.directory], || self.tail.pad())
    }

    /// Calls `f` with every grain that is stored: its number and where.
    pub(super) fn each(&self, mut f: impl FnMut(u64, u64)) -> Result<()> {
        let grains = self.header.capacity.div_ceil(self.header.grain);
        let mut slots = [Slot::Free; 512];
        let mut first = 0;
        while first < grains {
            let n = (grains - first).min(512) as usize;
            let n = self.lookup(first, &mut slots[..n])?;
            for (i, slot) in slots[..n].iter().enumerate() {
                if let Slot::Data(host) | Slot::Packed { host, .. } = *slot {
                    f(first + i as u64, host);
                }
            }
            first += n as u64;
        }
        Ok(())
    }
}

impl Header {
    fn has_redundant(&self) -> bool {
        self.flags & flag::REDUNDANT != 0 && self.redundant != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn valid() -> Header {
        Header {
            version: 1,
            flags: flag::NEWLINES | flag::REDUNDANT,
            capacity: 1 << 20,
            grain: 128,
            descriptor: (1, 20),
            table_entries: 512,
            redundant: 21,
            directory: 60,
            overhead: 128,
            compression: 0,
        }
    }

    #[test]
    fn headers_round_trip_and_hostile_ones_are_refused() {
        assert_eq!(Header::parse(&valid().encode()).unwrap(), valid());
        for (at, value) in [
            (0, 0u64),
            (4, 9),
            (12, 0),
            (12, u64::MAX),
            (20, 0),
            (20, 3),
            (20, 1 << 40),
            (36, 1 << 40),
            (44, 0),
            (44, 513),
            (73, 0),
        ] {
            let mut b = valid().encode();
            let width = if at == 4 || at == 44 || at == 0 { 4 } else { 8 };
            put(&mut b, at, &value.to_le_bytes()[..width]);
            assert!(Header::parse(&b).is_err(), "{at} = {value:#x}");
        }
    }

    proptest! {
        #[test]
        fn any_header_opens_or_fails(changes in proptest::collection::vec((0..80usize, any::<u8>()), 0..20), size in 0..70_000usize) {
            let mut file = valid().encode().to_vec();
            file.resize(512 + size, 0);
            for (at, byte) in changes {
                file[at] = byte;
            }
            if let Ok(s) = Sparse::open(Arc::new(crate::storage::MemoryStorage::new(file))) {
                let mut slots = [Slot::Free; 10];
                let _ = s.lookup(0, &mut slots);
            }
        }
    }
}
