//! Bochs' growing disk image, read-only: a catalog of extents, each with a bitmap of its sectors in front.

use super::{
    Driver, Extent, Format, Info, Mapping, Opening, Preallocation, ProbeInput, WriteExtent, push_extent,
    support::{self, MetaCache, le32, le64},
};
use crate::{Error, Result, storage::Storage};
use std::sync::Arc;

/// The format.
pub static DRIVER: Driver =
    Driver { name: "bochs", probe, open, create: None, measure: None, options: &[], backing: false };

const MAGIC: &[u8] = b"Bochs Virtual HD Image\0";
/// Bytes of a header.
const HEADER: usize = 512;
/// Catalog entry of an extent that is not there.
const UNUSED: u32 = u32::MAX;
const CACHE: usize = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Header {
    size: u64,
    /// Where the catalog is, and its entries.
    catalog: (u64, u32),
    /// Bytes of an extent's bitmap, whole sectors.
    bitmap: u64,
    /// Bytes of an extent.
    extent: u64,
}

impl Header {
    fn parse(b: &[u8; HEADER]) -> Result<Self> {
        let bad = |what: String| Error::invalid(format!("Invalid Bochs image: {what}"));
        let named = |at: usize, name: &[u8]| b[at..].starts_with(name) && b[at + name.len()] == 0;
        if !b.starts_with(MAGIC) || !named(32, b"Redolog") || !named(48, b"Growing") {
            return Err(bad("it is no growing disk".into()));
        }
        let (version, header) = (le32(b, 64), le32(b, 68));
        let size = match version {
            0x0002_0000 => le64(b, 88),
            0x0001_0000 => le64(b, 84),
            _ => return Err(Error::unsupported(format!("Unsupported Bochs image version {version:#x}"))),
        };
        let (entries, bitmap, extent) = (le32(b, 72), le32(b, 76), le32(b, 80));
        if header < 96 {
            return Err(bad(format!("header of {header} bytes")));
        }
        if !extent.is_power_of_two() || !(512..=256 << 20).contains(&extent) {
            return Err(bad(format!("extent size {extent}")));
        }
        if u64::from(bitmap) * 8 < u64::from(extent / 512) || bitmap > 1 << 20 {
            return Err(bad(format!("bitmaps of {bitmap} bytes")));
        }
        let size = size - size % 512;
        if entries > 1 << 24 || size > u64::from(entries) * u64::from(extent) {
            return Err(bad(format!("{entries} extents for a disk of {size} bytes")));
        }
        Ok(Header {
            size,
            catalog: (header.into(), entries),
            bitmap: u64::from(bitmap).next_multiple_of(512),
            extent: extent.into(),
        })
    }
}

struct Bochs {
    storages: [Arc<dyn Storage>; 1],
    header: Header,
    cache: MetaCache,
}

fn probe(input: &ProbeInput<'_>) -> u32 {
    if input.head.starts_with(MAGIC) && super::has_magic(input.head, 32, b"Redolog\0") { 100 } else { 0 }
}

fn open(opening: Opening<'_>) -> Result<Box<dyn Format>> {
    if !opening.read_only {
        return Err(Error::ReadOnly("The bochs format".into()));
    }
    let mut bytes = [0; HEADER];
    opening.storage.read_at(&mut bytes, 0)?;
    let header = Header::parse(&bytes)?;
    if header.catalog.0 + u64::from(header.catalog.1) * 4 > opening.storage.size()? {
        return Err(Error::invalid("Invalid Bochs image: the catalog reaches past the end of the file"));
    }
    Ok(Box::new(Bochs {
        cache: MetaCache::new(Arc::clone(&opening.storage), CACHE),
        storages: [opening.storage],
        header,
    }))
}

impl Format for Bochs {
    fn size(&self) -> u64 {
        self.header.size
    }

    fn info(&self) -> Result<Info> {
        Ok(Info::default())
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn unit(&self) -> u64 {
        self.header.extent
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        let Header { catalog, bitmap, extent, .. } = self.header;
        let (index, within) = (offset / extent, offset % extent);
        let len = len.min(extent - within);
        let entry = self.cache.le32(catalog.0 + index * 4)?;
        if entry == UNUSED {
            push_extent(out, Extent { offset, len, mapping: Mapping::Unallocated });
            return Ok(());
        }
        let base = catalog.0 + u64::from(catalog.1) * 4 + u64::from(entry) * (bitmap + extent);
        let mut at = offset;
        while at < offset + len {
            let sector = (at % extent) / 512;
            let mut byte = [0];
            self.cache.read(base + sector / 8, &mut byte)?;
            let stop = (at - at % 512 + 512).min(offset + len);
            let mapping = if byte[0] >> (sector % 8) & 1 != 0 {
                Mapping::Data { file: 0, host: base + bitmap + at % extent, in_place: false }
            } else {
                Mapping::Unallocated
            };
            push_extent(out, Extent { offset: at, len: stop - at, mapping });
            at = stop;
        }
        Ok(())
    }

    fn prepare_write(&self, _offset: u64, _len: u64, _out: &mut Vec<WriteExtent>) -> Result<()> {
        Err(Error::ReadOnly("The bochs format".into()))
    }

    fn commit_write(&self, _extents: &[WriteExtent]) -> Result<()> {
        Err(Error::ReadOnly("The bochs format".into()))
    }

    fn abort_write(&self, _extents: &[WriteExtent]) {}

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Error::ReadOnly("The bochs format".into()))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn resize(&self, _size: u64, _preallocation: Preallocation) -> Result<()> {
        Err(support::no_resize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Image, OpenOptions, formats::support::put, storage::MemoryStorage};
    use proptest::prelude::*;

    fn sample() -> Vec<u8> {
        let mut b = vec![0; HEADER + 8 * 4 + 2 * (512 + 4096)];
        put(&mut b, 0, MAGIC);
        put(&mut b, 32, b"Redolog");
        put(&mut b, 48, b"Growing");
        for (at, value) in [(64, 0x0002_0000u32), (68, 512), (72, 8), (76, 1), (80, 4096), (88, 32768)] {
            put(&mut b, at, &value.to_le_bytes());
        }
        b[HEADER..HEADER + 32].fill(0xff);
        put(&mut b, HEADER + 4, &1u32.to_le_bytes());
        let at = HEADER + 32 + 512 + 4096;
        b[at] = 0b101;
        b[at + 512..at + 1024].fill(7);
        b[at + 1024..at + 1536].fill(8);
        b[at + 1536..at + 2048].fill(9);
        b
    }

    #[test]
    fn only_sectors_that_were_written_are_read() {
        let options = OpenOptions::reader(None);
        let image = Image::open_storage(Arc::new(MemoryStorage::new(sample())), "x", &options).unwrap();
        assert_eq!((image.driver().name, image.size()), ("bochs", 32768));
        let mut buf = vec![1; 32768];
        image.read_at(&mut buf, 0).unwrap();
        let mut expected = vec![0; 32768];
        expected[4096..4608].fill(7);
        expected[5120..5632].fill(9);
        assert!(buf == expected);
        if let Some(theirs) = support::read_by_qemu("bochs", &sample()) {
            assert!(theirs == expected);
        }
        let writer = OpenOptions::writer(Some("bochs"));
        assert!(Image::open_storage(Arc::new(MemoryStorage::new(sample())), "x", &writer).is_err());
    }

    proptest! {
        #[test]
        fn any_image_reads_or_fails(changes in proptest::collection::vec((64..HEADER + 40, any::<u8>()), 0..10)) {
            let mut b = sample();
            for (at, byte) in changes {
                b[at] = byte;
            }
            let storage = Arc::new(MemoryStorage::new(b));
            if let Ok(image) = Image::open_storage(storage, "x", &OpenOptions::reader(Some("bochs"))) {
                let mut buf = vec![0; image.size().min(40_000) as usize];
                let _ = image.read_at(&mut buf, 0);
            }
        }
    }
}
