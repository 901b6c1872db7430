//! qcow version 1: a first-level table, second-level tables, clusters, some of them compressed; optionally AES-encrypted.

use super::{
    Backing, Cipher, Creation, Driver, Extent, Format, Info, Opening, Preallocation, ProbeInput, WriteExtent,
    crypto::{SectorCipher, passphrase_cipher, secret},
    support::{self, Shape, Slot, TwoLevel, be32, be64, put},
};
use crate::{
    Error, Result,
    options::{OptionKind, OptionSpec, Options},
    storage::{Storage, StorageExt, Zeroing},
};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use std::{cell::RefCell, collections::BTreeMap, sync::Arc};

/// The format.
pub static DRIVER: Driver = Driver {
    name: "qcow",
    probe,
    open,
    create: Some(create),
    measure: None,
    options: &[
        OptionSpec {
            name: "encryption",
            kind: OptionKind::Bool,
            help: "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
            default: None,
        },
        OptionSpec {
            name: "encrypt.format",
            kind: OptionKind::Text,
            help: "Encrypt the image, format choices: 'aes'",
            default: None,
        },
        OptionSpec {
            name: "encrypt.key-secret",
            kind: OptionKind::Text,
            help: "ID of the secret that provides the AES encryption key",
            default: None,
        },
    ],
    backing: true,
};

const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Bytes of a header.
const HEADER: usize = 48;
/// Longest backing file name.
const MAX_NAME: u32 = 1023;
/// Second-level entry of a compressed cluster.
const COMPRESSED: u64 = 1 << 63;
/// Logarithm of the deflate window that compressed clusters need at most.
const WINDOW_BITS: u8 = 12;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Header {
    name: (u64, u32),
    size: u64,
    cluster_bits: u8,
    leaf_bits: u8,
    encrypted: bool,
    l1: u64,
}

impl Header {
    fn parse(b: &[u8; HEADER]) -> Result<Self> {
        let bad = |what: String| Error::invalid(format!("Invalid qcow image: {what}"));
        if &b[..4] != MAGIC {
            return Err(bad("wrong signature".into()));
        }
        if be32(b, 4) != 1 {
            return Err(Error::unsupported(format!(
                "qcow version {} is not version 1; use the qcow2 format",
                be32(b, 4)
            )));
        }
        let header = Header {
            name: (be64(b, 8), be32(b, 16)),
            size: be64(b, 24),
            cluster_bits: b[32],
            leaf_bits: b[33],
            encrypted: match be32(b, 36) {
                0 => false,
                1 => true,
                other => {
                    return Err(Error::unsupported(format!("Unsupported qcow encryption method {other}")));
                }
            },
            l1: be64(b, 40),
        };
        if header.size <= 1 || header.size > i64::MAX as u64 - 511 {
            return Err(bad(format!("disk size {} (must be at least 2 bytes)", header.size)));
        }
        if !(9..=16).contains(&header.cluster_bits) {
            return Err(bad("cluster size must be between 512 and 64k".into()));
        }
        if !(6..=13).contains(&header.leaf_bits) {
            return Err(bad("L2 table size must be between 512 and 64k".into()));
        }
        if header.l1 < HEADER as u64 || header.l1 > i64::MAX as u64 / 2 {
            return Err(bad(format!("L1 table at {:#x}", header.l1)));
        }
        if header.name.0 != 0 && (header.name.1 == 0 || header.name.1 > MAX_NAME || header.name.0 > 1 << 40) {
            return Err(bad("backing file name too long".into()));
        }
        Ok(header)
    }

    fn encode(&self) -> [u8; HEADER] {
        let mut b = [0; HEADER];
        put(&mut b, 0, MAGIC);
        put(&mut b, 4, &1u32.to_be_bytes());
        put(&mut b, 8, &self.name.0.to_be_bytes());
        put(&mut b, 16, &self.name.1.to_be_bytes());
        put(&mut b, 24, &self.size.to_be_bytes());
        put(&mut b, 32, &[self.cluster_bits, self.leaf_bits]);
        put(&mut b, 36, &u32::from(self.encrypted).to_be_bytes());
        put(&mut b, 40, &self.l1.to_be_bytes());
        b
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn l1_entries(&self) -> u64 {
        self.size.div_ceil(1 << (self.cluster_bits + self.leaf_bits))
    }
}

struct Qcow {
    storages: [Arc<dyn Storage>; 1],
    header: Header,
    size: u64,
    backing: Option<Backing>,
    tables: TwoLevel,
    cipher: Option<SectorCipher>,
}

fn probe(input: &ProbeInput<'_>) -> u32 {
    let ours = input.head.starts_with(MAGIC) && super::has_magic(input.head, 4, &1u32.to_be_bytes());
    if ours { 100 } else { 0 }
}

/// The cipher made from the secret that the options name.
fn cipher(options: &mut Options, secrets: &BTreeMap<String, Vec<u8>>) -> Result<Option<SectorCipher>> {
    secret(options, "encrypt.key-secret", secrets)?.map(passphrase_cipher).transpose()
}

fn open(opening: Opening<'_>) -> Result<Box<dyn Format>> {
    let storage = opening.storage;
    let mut bytes = [0; HEADER];
    storage.read_at(&mut bytes, 0)?;
    let header = Header::parse(&bytes)?;
    let file_size = storage.size()?;
    if header.l1 + header.l1_entries() * 8 > file_size.next_multiple_of(512) {
        return Err(Error::invalid("Invalid qcow image: the L1 table reaches past the end of the file"));
    }
    if let Some(format) = opening.options.take("encrypt.format")
        && (format != "aes" || !header.encrypted)
    {
        return Err(Error::usage(format!("The qcow image is not encrypted with '{format}'")));
    }
    let cipher = cipher(opening.options, opening.secrets)?;
    if !header.encrypted && cipher.is_some() {
        return Err(Error::usage("The qcow image is not encrypted: it takes no encrypt.key-secret"));
    }
    if header.encrypted && cipher.is_none() && !opening.no_io {
        return Err(Error::usage("Parameter 'encrypt.key-secret' is required for cipher"));
    }
    let backing = if header.name.0 != 0 {
        let name = storage.read_vec(header.name.0, header.name.1 as usize)?;
        let name = String::from_utf8(name)
            .map_err(|_| Error::invalid("the qcow backing file's name is not UTF-8"))?;
        Some(Backing { name, format: None })
    } else {
        None
    };
    let shape = Shape {
        root: (header.l1, header.l1_entries()),
        leaf_entries: 1 << header.leaf_bits,
        big_endian: true,
        align: header.cluster(),
        limit: 1 << (63 - header.cluster_bits),
    };
    Ok(Box::new(Qcow {
        tables: TwoLevel::new(Arc::clone(&storage), shape, file_size)?,
        storages: [storage],
        size: header.size.next_multiple_of(512),
        header,
        backing,
        cipher,
    }))
}

fn create(creation: Creation<'_>) -> Result<()> {
    let old_style = creation.options.take_bool("encryption")?.unwrap_or(false);
    let encrypted = match creation.options.take("encrypt.format").as_deref() {
        None => old_style,
        Some("aes") => true,
        Some(other) => {
            return Err(Error::usage(format!("Invalid encryption format '{other}'; qcow images take aes")));
        }
    };
    let key = cipher(creation.options, creation.secrets)?;
    if encrypted && key.is_none() {
        return Err(Error::usage("Parameter 'encrypt.key-secret' is required for cipher"));
    }
    if !encrypted && key.is_some() {
        return Err(Error::usage("encrypt.key-secret needs encrypt.format=aes"));
    }
    if creation.size == 0 {
        return Err(Error::usage("Image size is too small, cannot be zero length"));
    }
    let size =
        creation.size.checked_next_multiple_of(512).ok_or_else(|| Error::usage("Image size too large"))?;
    // Small clusters on top of a backing file: fewer bytes are copied up.
    let (cluster_bits, leaf_bits) = if creation.backing.is_some() { (9, 12) } else { (12, 9) };
    let name = creation.backing.as_ref().map_or("", |b| b.name.as_str());
    let name_len = u32::try_from(name.len()).ok().filter(|&l| l <= MAX_NAME);
    let name_len = name_len
        .ok_or_else(|| Error::usage(format!("Backing file name is too long (at most {MAX_NAME} bytes)")))?;
    let header = Header {
        name: if name.is_empty() { (0, 0) } else { (HEADER as u64, name_len) },
        size,
        cluster_bits,
        leaf_bits,
        encrypted,
        l1: (HEADER as u64 + u64::from(name_len)).next_multiple_of(8),
    };
    // Entries of the first-level table, and offsets in it, are 64 bits; its length has to be addressable by others too.
    if header.l1_entries() * 8 > i32::MAX as u64 {
        return Err(Error::usage("Image size too large"));
    }
    let storage = &creation.storage;
    storage.fill_zeroes(0, header.l1 + (header.l1_entries() * 8).next_multiple_of(512))?;
    storage.write_at(&[&header.encode()[..], name.as_bytes()].concat(), 0)?;
    storage.flush()
}

impl Qcow {
    fn lookup(&self, first: u64, out: &mut [Slot]) -> Result<usize> {
        let mut entries = [0; 512];
        let wanted = out.len().min(512);
        let n = self.tables.entries(first, &mut entries[..wanted])?;
        let cluster = self.header.cluster();
        let length_shift = 63 - self.header.cluster_bits;
        for (i, (slot, &entry)) in out.iter_mut().zip(&entries[..n]).enumerate() {
            *slot = if entry == 0 {
                Slot::Free
            } else if entry & COMPRESSED != 0 {
                Slot::Packed {
                    host: entry & ((1 << length_shift) - 1),
                    stored: (entry >> length_shift & (cluster - 1)) as u32,
                }
            } else if self.tables.is_sound(entry, cluster) {
                Slot::Data(entry)
            } else {
                return Err(Error::Corrupt(format!(
                    "'{}': cluster {} of the qcow image is said to be at {entry:#x}, where none can be",
                    self.storages[0].name(),
                    first + i as u64
                )));
            };
        }
        Ok(n)
    }
}

impl Format for Qcow {
    fn size(&self) -> u64 {
        self.size
    }

    fn info(&self) -> Result<Info> {
        Ok(Info {
            cluster_size: Some(self.header.cluster()),
            backing: self.backing.clone(),
            encrypted: self.header.encrypted,
            ..Info::default()
        })
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn unit(&self) -> u64 {
        self.header.cluster()
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        support::map_units((0, self.header.cluster()), (offset, len), out, |first, slots| {
            self.lookup(first, slots)
        })
    }

    fn decode(&self, extent: &Extent, stored: &[u8], out: &mut [u8]) -> Result<()> {
        let damaged = |what: &str| {
            Error::Corrupt(format!(
                "'{}': the compressed cluster at {:#x} {what}",
                self.storages[0].name(),
                extent.offset
            ))
        };
        INFLATE.with_borrow_mut(|state| {
            let inflate = state.get_or_insert_with(|| Decompress::new(false));
            inflate.reset(false);
            match inflate.decompress(stored, out, FlushDecompress::Finish) {
                Ok(_) if inflate.total_out() == out.len() as u64 => Ok(()),
                Ok(_) => Err(damaged("ends early")),
                Err(e) => Err(damaged(&format!("cannot be decoded: {e}"))),
            }
        })
    }

    fn prepare_write(&self, offset: u64, len: u64, out: &mut Vec<WriteExtent>) -> Result<()> {
        support::prepare_units(
            (0, self.header.cluster()),
            (offset, len),
            out,
            |first, slots| self.lookup(first, slots),
            |_| self.tables.allocate(self.header.cluster()),
        )
    }

    fn commit_write(&self, extents: &[WriteExtent]) -> Result<()> {
        support::commit_units(self.header.cluster(), extents, |unit, host| self.tables.set(unit, host))
    }

    fn abort_write(&self, _extents: &[WriteExtent]) {}

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<Zeroing> {
        if self.header.encrypted {
            return Ok(Zeroing::Unsupported); // zeros are stored encrypted
        }
        support::zero_units(
            (&self.storages[0], self.header.cluster()),
            (offset, len),
            unmap,
            |first, slots| self.lookup(first, slots),
            |_, slot| match slot {
                Slot::Free if self.backing.is_none() => Ok(Zeroing::Done),
                _ => Ok(Zeroing::Unsupported),
            },
        )
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        // Small clusters and no entry for zeros: nothing worth giving back.
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.tables.flush()
    }

    fn resize(&self, _size: u64, _preallocation: Preallocation) -> Result<()> {
        Err(support::no_resize())
    }

    fn compress(&self, unit: &[u8]) -> Result<Option<Vec<u8>>> {
        if self.header.encrypted {
            return Err(Error::unsupported(
                "Compression and encryption cannot be used together in qcow images",
            ));
        }
        let mut whole;
        let unit = if unit.len() as u64 == self.header.cluster() {
            unit
        } else {
            whole = unit.to_vec();
            whole.resize(self.header.cluster() as usize, 0);
            &whole
        };
        DEFLATE.with_borrow_mut(|state| {
            let deflate = state.get_or_insert_with(|| {
                Compress::new_with_window_bits(Compression::default(), false, WINDOW_BITS)
            });
            deflate.reset();
            // The length's field holds one byte less than a cluster.
            let mut packed = vec![0; unit.len() - 1];
            match deflate.compress(unit, &mut packed, FlushCompress::Finish) {
                Ok(Status::StreamEnd) => {
                    packed.truncate(deflate.total_out() as usize);
                    Ok(Some(packed))
                }
                Ok(_) => Ok(None),
                Err(e) => Err(Error::invalid(format!("deflate failed: {e}"))),
            }
        })
    }

    fn compresses(&self) -> bool {
        !self.header.encrypted
    }

    fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<()> {
        let len = data.len() as u64;
        if self.header.encrypted || len == 0 || len >= self.header.cluster() {
            return Err(Error::usage("the compressed cluster cannot be stored"));
        }
        let host = self.tables.tail.take(len)?;
        self.storages[0].write_at(data, host)?;
        let entry = COMPRESSED | len << (63 - self.header.cluster_bits) | host;
        self.tables.set(offset / self.header.cluster(), entry)
    }

    fn cipher(&self) -> Option<&dyn Cipher> {
        self.cipher.as_ref().map(|c| c as &dyn Cipher)
    }

    fn created_zeroed(&self) -> bool {
        true
    }
}

thread_local! {
    static INFLATE: RefCell<Option<Decompress>> = const { RefCell::new(None) };
    static DEFLATE: RefCell<Option<Compress>> = const { RefCell::new(None) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn valid() -> Header {
        Header { name: (0, 0), size: 1 << 30, cluster_bits: 12, leaf_bits: 9, encrypted: false, l1: 48 }
    }

    #[test]
    fn headers_round_trip_and_hostile_ones_are_refused() {
        assert_eq!(Header::parse(&valid().encode()).unwrap(), valid());
        for bad in [
            Header { size: 0, ..valid() },
            Header { size: u64::MAX, ..valid() },
            Header { cluster_bits: 8, ..valid() },
            Header { cluster_bits: 255, ..valid() },
            Header { leaf_bits: 5, ..valid() },
            Header { leaf_bits: 200, ..valid() },
            Header { l1: 0, ..valid() },
            Header { l1: u64::MAX, ..valid() },
            Header { name: (48, u32::MAX), ..valid() },
            Header { name: (u64::MAX, 5), ..valid() },
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
            let _ = Header::parse(&b).map(|h| h.l1_entries());
        }
    }
}
