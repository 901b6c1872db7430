//! cloop, the compressed loop images of live CDs, read-only: a table of offsets of zlib streams.

use super::{
    Driver, Extent, Format, Info, Mapping, Opening, Preallocation, ProbeInput, WriteExtent, push_extent,
    support::{self, MetaCache, be32, be64},
};
use crate::{Error, Result, storage::Storage};
use flate2::{Decompress, FlushDecompress};
use std::sync::Arc;

/// The format.
pub static DRIVER: Driver =
    Driver { name: "cloop", probe, open, create: None, measure: None, options: &[], backing: false };

/// How the script in front of every image begins.
const MAGIC: &[u8] =
    b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";
/// Where block size and block count are; the table follows.
const FIELDS: u64 = 128;
const TABLE: u64 = 136;
const CACHE: usize = 1 << 20;
/// Largest block.
const MAX_BLOCK: u32 = 64 << 20;

struct Cloop {
    storages: [Arc<dyn Storage>; 1],
    block: u32,
    blocks: u32,
    cache: MetaCache,
}

fn probe(input: &ProbeInput<'_>) -> u32 {
    let n = input.head.len().min(MAGIC.len());
    if n >= 64 && input.head[..n] == MAGIC[..n] { 2 } else { 0 }
}

fn open(opening: Opening<'_>) -> Result<Box<dyn Format>> {
    if !opening.read_only {
        return Err(Error::ReadOnly("The cloop format".into()));
    }
    let mut fields = [0; 8];
    opening.storage.read_at(&mut fields, FIELDS)?;
    let (block, blocks) = (be32(&fields, 0), be32(&fields, 4));
    if block == 0 || block % 512 != 0 || block > MAX_BLOCK {
        return Err(Error::invalid(format!(
            "Invalid cloop image: block size {block} must be a multiple of 512, at most 64 MB"
        )));
    }
    if TABLE + (u64::from(blocks) + 1) * 8 > opening.storage.size()? {
        return Err(Error::invalid(
            "Invalid cloop image: the table of offsets reaches past the end of the file",
        ));
    }
    Ok(Box::new(Cloop {
        cache: MetaCache::new(Arc::clone(&opening.storage), CACHE),
        storages: [opening.storage],
        block,
        blocks,
    }))
}

impl Format for Cloop {
    fn size(&self) -> u64 {
        u64::from(self.block) * u64::from(self.blocks)
    }

    fn info(&self) -> Result<Info> {
        Ok(Info::default())
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn unit(&self) -> u64 {
        1
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        let index = offset / u64::from(self.block);
        let mut entries = [0; 16];
        self.cache.read(TABLE + index * 8, &mut entries)?;
        let (host, end) = (be64(&entries, 0), be64(&entries, 8));
        // zlib never makes a block much longer; anything else is damage.
        let stored =
            end.checked_sub(host).filter(|&s| s > 0 && s <= 2 * u64::from(self.block) + 512).ok_or_else(
                || Error::Corrupt(format!("'{}': block {index} has a wrong offset", self.storages[0].name())),
            )?;
        let unit_start = index * u64::from(self.block);
        let len = len.min(unit_start + u64::from(self.block) - offset);
        let mapping = Mapping::Compressed {
            file: 0,
            host,
            stored: stored as u32,
            unit_start,
            unit: self.block,
            method: 0,
        };
        push_extent(out, Extent { offset, len, mapping });
        Ok(())
    }

    fn decode(&self, extent: &Extent, stored: &[u8], out: &mut [u8]) -> Result<()> {
        let mut inflate = Decompress::new(true);
        match inflate.decompress(stored, out, FlushDecompress::Finish) {
            Ok(_) if inflate.total_out() == out.len() as u64 => Ok(()),
            Ok(_) => Err(Error::Corrupt(format!("the compressed block at {:#x} ends early", extent.offset))),
            Err(e) => {
                Err(Error::Corrupt(format!("the compressed block at {:#x} is damaged: {e}", extent.offset)))
            }
        }
    }

    fn prepare_write(&self, _offset: u64, _len: u64, _out: &mut Vec<WriteExtent>) -> Result<()> {
        Err(Error::ReadOnly("The cloop format".into()))
    }

    fn commit_write(&self, _extents: &[WriteExtent]) -> Result<()> {
        Err(Error::ReadOnly("The cloop format".into()))
    }

    fn abort_write(&self, _extents: &[WriteExtent]) {}

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Error::ReadOnly("The cloop format".into()))
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
    use std::io::Write;

    fn sample() -> (Vec<u8>, Vec<u8>) {
        let disk: Vec<u8> = (0..5 * 2048u32).map(|i| (i / 9 % 251) as u8).collect();
        let mut file = MAGIC.to_vec();
        file.resize(TABLE as usize + 6 * 8, 0);
        put(&mut file, 128, &2048u32.to_be_bytes());
        put(&mut file, 132, &5u32.to_be_bytes());
        for (i, block) in disk.chunks(2048).enumerate() {
            let at = file.len() as u64;
            put(&mut file, TABLE as usize + i * 8, &at.to_be_bytes());
            let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
            encoder.write_all(block).unwrap();
            file.extend(encoder.finish().unwrap());
        }
        let end = file.len() as u64;
        put(&mut file, TABLE as usize + 5 * 8, &end.to_be_bytes());
        (file, disk)
    }

    #[test]
    fn blocks_are_decompressed() {
        let (file, disk) = sample();
        if let Some(theirs) = support::read_by_qemu("cloop", &file) {
            assert!(theirs == disk);
        }
        let image =
            Image::open_storage(Arc::new(MemoryStorage::new(file)), "x", &OpenOptions::reader(None)).unwrap();
        assert_eq!((image.driver().name, image.size()), ("cloop", disk.len() as u64));
        let mut buf = vec![0; disk.len() - 1500];
        image.read_at(&mut buf, 1000).unwrap();
        assert!(buf == disk[1000..disk.len() - 500]);
    }

    proptest! {
        #[test]
        fn any_image_reads_or_fails(changes in proptest::collection::vec((128..200usize, any::<u8>()), 0..6)) {
            let (mut file, _) = sample();
            for (at, byte) in changes {
                file[at] = byte;
            }
            let storage = Arc::new(MemoryStorage::new(file));
            if let Ok(image) = Image::open_storage(storage, "x", &OpenOptions::reader(Some("cloop"))) {
                let mut buf = vec![0; image.size().min(9000) as usize];
                let _ = image.read_at(&mut buf, 0);
            }
        }
    }
}
