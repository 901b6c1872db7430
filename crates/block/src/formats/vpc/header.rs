//! The footer and the dynamic header of a VHD ("Virtual Hard Disk Image Format Specification" 1.0).

use crate::{
    Error, Result,
    formats::support::{be16, be32, be64, put},
};

/// Bytes of a footer.
pub(super) const FOOTER: usize = 512;
/// Bytes of a dynamic disk header.
pub(super) const DYNAMIC: usize = 1024;
/// Sectors of the largest disk whose size is expressed as cylinders, heads and sectors.
pub(super) const MAX_CHS_SECTORS: u64 = 65535 * 16 * 255;
/// Sectors of the largest disk: 2040 GiB.
pub(super) const MAX_SECTORS: u64 = 0xff00_0000;
/// Seconds from 1970 to 2000, where VHD's time begins.
const EPOCH: u64 = 946_684_800;

/// Which kind of disk a footer describes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Fixed,
    Dynamic,
}

/// How the size of a disk is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SizeFrom {
    /// By the program that made it.
    Creator,
    /// The product of cylinders, heads and sectors.
    Chs,
    /// The size field.
    Field,
}

/// Cylinders, heads, sectors per track.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Geometry {
    pub(super) cylinders: u16,
    pub(super) heads: u8,
    pub(super) sectors: u8,
}

impl Geometry {
    /// The largest there is; it says "use the size field".
    pub(super) const MAX: Geometry = Geometry { cylinders: 65535, heads: 16, sectors: 255 };

    /// Sectors it spans.
    pub(super) fn total(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors)
    }

    /// The specification's geometry for a number of sectors; it may span a little less.
    fn nearest(sectors: u64) -> Geometry {
        let total = sectors.min(MAX_CHS_SECTORS);
        let (per_track, heads, tracks);
        if total >= 65535 * 16 * 63 {
            (per_track, heads, tracks) = (255, 16, total / 255);
        } else {
            let (mut p, mut t) = (17, total / 17);
            let mut h = t.div_ceil(1024).max(4);
            if t >= h * 1024 || h > 16 {
                (p, h, t) = (31, 16, total / 31);
            }
            if t >= h * 1024 {
                (p, h, t) = (63, 16, total / 63);
            }
            (per_track, heads, tracks) = (p, h, t);
        }
        Geometry { cylinders: (tracks / heads) as u16, heads: heads as u8, sectors: per_track as u8 }
    }

    /// The smallest of the specification's geometries that spans at least so many sectors (or the largest).
    pub(super) fn covering(sectors: u64) -> Geometry {
        let sectors = sectors.min(MAX_CHS_SECTORS);
        let mut geometry = Geometry::nearest(sectors);
        let mut more = 0;
        while geometry.total() < sectors {
            more += 1;
            geometry = Geometry::nearest(sectors + more);
        }
        geometry
    }
}

/// A footer, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Footer {
    pub(super) kind: Kind,
    /// Bytes of the disk by the size field.
    pub(super) current_size: u64,
    pub(super) geometry: Geometry,
    pub(super) creator: [u8; 4],
    /// Where the dynamic header is.
    pub(super) header: u64,
    /// The sum stored matches.
    pub(super) intact: bool,
}

/// The one's complement of the sum of all bytes but the sum's own.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    !bytes
        .iter()
        .enumerate()
        .filter(|(i, _)| !(at..at + 4).contains(i))
        .fold(0u32, |sum, (_, &b)| sum.wrapping_add(b.into()))
}

impl Footer {
    /// Whether bytes begin like a footer.
    pub(super) fn is_footer(bytes: &[u8]) -> bool {
        bytes.starts_with(b"conectix")
    }

    pub(super) fn parse(b: &[u8; FOOTER]) -> Result<Self> {
        let kind = match be32(b, 60) {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            4 => {
                return Err(Error::unsupported(
                    "Differencing VHD images are not supported; merge the image with its parent first",
                ));
            }
            other => return Err(Error::invalid(format!("Invalid VHD image: disk type {other}"))),
        };
        if be32(b, 12) >> 16 != 1 {
            return Err(Error::unsupported(format!("Unsupported VHD version {:#x}", be32(b, 12))));
        }
        let mut creator = [0; 4];
        creator.copy_from_slice(&b[28..32]);
        Ok(Footer {
            kind,
            current_size: be64(b, 48),
            geometry: Geometry { cylinders: be16(b, 56), heads: b[58], sectors: b[59] },
            creator,
            header: be64(b, 16),
            intact: be32(b, 64) == checksum(b, 64),
        })
    }

    /// Size of the disk in sectors. Virtual PC and old QEMU mean the geometry, whatever the size field says.
    pub(super) fn sectors(&self, from: SizeFrom) -> u64 {
        let chs = match from {
            SizeFrom::Creator => matches!(&self.creator, b"vpc " | b"vs  " | b"qemu"),
            SizeFrom::Chs => true,
            SizeFrom::Field => false,
        };
        match self.geometry.total() {
            total if chs && total != MAX_CHS_SECTORS => total,
            _ => self.current_size / 512,
        }
    }

    /// A new footer. `by_field`: the size field is what counts.
    pub(super) fn encode(
        kind: Kind,
        sectors: u64,
        geometry: Geometry,
        by_field: bool,
        id: [u8; 16],
    ) -> [u8; FOOTER] {
        let mut b = [0; FOOTER];
        put(&mut b, 0, b"conectix");
        put(&mut b, 8, &2u32.to_be_bytes());
        put(&mut b, 12, &0x0001_0000u32.to_be_bytes());
        let header = if kind == Kind::Dynamic { FOOTER as u64 } else { u64::MAX };
        put(&mut b, 16, &header.to_be_bytes());
        let now =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(EPOCH, |d| d.as_secs());
        put(&mut b, 24, &(now.saturating_sub(EPOCH) as u32).to_be_bytes());
        // Other programs tell by this name how to find the size, so these are the names they know.
        put(&mut b, 28, if by_field { b"qem2" } else { b"qemu" });
        put(&mut b, 32, &[0, 5, 0, 3]);
        put(&mut b, 36, b"Wi2k");
        put(&mut b, 40, &(sectors * 512).to_be_bytes());
        put(&mut b, 48, &(sectors * 512).to_be_bytes());
        put(&mut b, 56, &geometry.cylinders.to_be_bytes());
        put(&mut b, 58, &[geometry.heads, geometry.sectors]);
        put(&mut b, 60, &(if kind == Kind::Fixed { 2u32 } else { 3 }).to_be_bytes());
        put(&mut b, 68, &id);
        let sum = checksum(&b, 64);
        put(&mut b, 64, &sum.to_be_bytes());
        b
    }
}

/// The header of a dynamic disk, checked against the disk's size and the file's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DynamicHeader {
    /// Where the block allocation table is.
    pub(super) table: u64,
    /// Its entries.
    pub(super) entries: u32,
    /// Bytes of data of a block.
    pub(super) block: u64,
}

impl DynamicHeader {
    pub(super) fn parse(b: &[u8; DYNAMIC], sectors: u64, file_size: u64) -> Result<Self> {
        let bad = |what: String| Error::invalid(format!("Invalid VHD image: {what}"));
        if &b[..8] != b"cxsparse" {
            return Err(bad("the dynamic disk header has no signature".into()));
        }
        let (table, entries, block) = (be64(b, 16), be32(b, 28), be32(b, 32));
        if !block.is_power_of_two() || !(512..=256 << 20).contains(&block) {
            return Err(bad(format!("block size {block}")));
        }
        let block = u64::from(block);
        if u64::from(entries) * block < sectors * 512 {
            return Err(bad(format!("{entries} blocks of {block} bytes are too few for the disk")));
        }
        if u64::from(entries) > MAX_SECTORS * 512 / block {
            return Err(bad(format!("too many blocks ({entries})")));
        }
        let end = table.checked_add(u64::from(entries) * 4);
        if table < 512 || end.is_none_or(|end| end > file_size.next_multiple_of(512)) {
            return Err(bad("the block allocation table lies outside of the file".into()));
        }
        Ok(DynamicHeader { table, entries, block })
    }

    pub(super) fn encode(&self) -> [u8; DYNAMIC] {
        let mut b = [0; DYNAMIC];
        put(&mut b, 0, b"cxsparse");
        put(&mut b, 8, &u64::MAX.to_be_bytes());
        put(&mut b, 16, &self.table.to_be_bytes());
        put(&mut b, 24, &0x0001_0000u32.to_be_bytes());
        put(&mut b, 28, &self.entries.to_be_bytes());
        put(&mut b, 32, &(self.block as u32).to_be_bytes());
        let sum = checksum(&b, 36);
        put(&mut b, 36, &sum.to_be_bytes());
        b
    }

    /// Bytes of the sector bitmap in front of each block.
    pub(super) fn bitmap(&self) -> u64 {
        (self.block / 512 / 8).next_multiple_of(512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn geometry_covers_and_footers_round_trip() {
        for sectors in [
            1,
            68,
            2048,
            131_072,
            1 << 20,
            1 << 22,
            65535 * 16 * 63,
            65535 * 16 * 63 + 1,
            1 << 27,
            1 << 28,
            1 << 40,
        ] {
            let g = Geometry::covering(sectors);
            assert!(g.total() >= sectors.min(MAX_CHS_SECTORS), "{sectors}: {g:?}");
            let f = Footer::parse(&Footer::encode(Kind::Dynamic, sectors, g, true, [1; 16])).unwrap();
            assert!(f.intact);
            assert_eq!((f.sectors(SizeFrom::Creator), f.geometry), (sectors, g));
        }
        let g = Geometry::covering(2049);
        let f = Footer::parse(&Footer::encode(Kind::Fixed, g.total(), g, false, [1; 16])).unwrap();
        assert_eq!(f.sectors(SizeFrom::Creator), g.total());
    }

    #[test]
    fn hostile_dynamic_headers_are_refused() {
        let good = DynamicHeader { table: 1536, entries: 4, block: 2 << 20 };
        let parse = |b: &[u8; DYNAMIC]| DynamicHeader::parse(b, 16384, 4096);
        assert_eq!(parse(&good.encode()).unwrap(), good);
        for (at, value) in [
            (16, u32::MAX),
            (20, 4096),
            (20, 0),
            (28, 3),
            (28, u32::MAX),
            (32, 0),
            (32, 3 << 20),
            (32, 1 << 31),
        ] {
            let mut b = good.encode();
            put(&mut b, at, &value.to_be_bytes());
            assert!(parse(&b).is_err(), "{at} = {value:#x}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_fail(changes in proptest::collection::vec((0..FOOTER, any::<u8>()), 0..30), size in any::<u64>()) {
            let mut f = Footer::encode(Kind::Dynamic, 1 << 20, Geometry::covering(1 << 20), false, [0; 16]);
            let mut d = DynamicHeader { table: 1536, entries: 4, block: 2 << 20 }.encode();
            for (at, byte) in changes {
                f[at] = byte;
                d[at] = byte;
            }
            if let Ok(f) = Footer::parse(&f) {
                let _ = f.sectors(SizeFrom::Creator);
            }
            let _ = DynamicHeader::parse(&d, size % (1 << 55), size.min(1 << 60));
        }
    }
}
