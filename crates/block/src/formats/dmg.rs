//! DMG, Apple's disk image (UDIF), read-only: a trailer names a property list (or a resource fork) with tables of chunks, which
//! are zeros, plain, or compressed with zlib, bzip2 or ADC.

use super::{
    Driver, Extent, Format, Info, Mapping, Opening, Preallocation, ProbeInput, WriteExtent,
    crypto::base64_decode,
    has_extension, push_extent,
    support::{self, be16, be32, be64},
};
use crate::{
    Error, Result,
    storage::{Storage, StorageExt},
};
use flate2::{Decompress, FlushDecompress};
use std::sync::Arc;

/// The format.
pub static DRIVER: Driver =
    Driver { name: "dmg", probe, open, create: None, measure: None, options: &[], backing: false };

/// Bytes of the trailer.
const TRAILER: usize = 512;
/// How far from the end the trailer is looked for.
const SEARCH: u64 = 64 << 10;
/// Longest property list or resource fork.
const MAX_LIST: u64 = 64 << 20;
/// Largest chunk, in sectors: what other programs allow.
const MAX_CHUNK: u64 = (64 << 20) / 512;
/// Most chunks of an image; they are kept in memory.
const MAX_CHUNKS: usize = 1 << 22;
/// Bytes of a chunk table's header, and of an entry.
const TABLE_HEADER: usize = 204;
const ENTRY: usize = 40;

/// How a chunk is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Method {
    Zero,
    Plain,
    Adc,
    Zlib,
    Bzip2,
    /// Known, but there is no decoder: its number.
    Unsupported(u32),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Chunk {
    /// First byte and bytes, as the guest counts.
    start: u64,
    len: u64,
    /// Where and how many bytes are stored.
    host: u64,
    stored: u64,
    method: Method,
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::invalid(format!("Invalid DMG image: {what}"))
}

/// Reads one table of chunks.
fn read_table(b: &[u8], data_fork: u64, chunks: &mut Vec<Chunk>) -> Result<()> {
    if b.len() < TABLE_HEADER || &b[..4] != b"mish" {
        return Ok(()); // other resources have other contents
    }
    let (first, data) = (be64(b, 8), be64(b, 24));
    let count = be32(b, 200) as usize;
    let entries = b[TABLE_HEADER..].chunks_exact(ENTRY);
    if count > entries.len() {
        return Err(bad("a chunk table is shorter than it says"));
    }
    for e in entries.take(count) {
        let method = match be32(e, 0) {
            0 | 2 => Method::Zero,
            1 => Method::Plain,
            0x8000_0004 => Method::Adc,
            0x8000_0005 => Method::Zlib,
            0x8000_0006 => Method::Bzip2,
            kind @ (0x8000_0007 | 0x8000_0008) => Method::Unsupported(kind),
            _ => continue, // comments and the terminator
        };
        let (sector, sectors, offset, stored) = (be64(e, 8), be64(e, 16), be64(e, 24), be64(e, 32));
        if sectors == 0 {
            continue;
        }
        if method != Method::Zero && sectors > MAX_CHUNK {
            return Err(bad(format!("sector count {sectors} of a chunk is larger than {MAX_CHUNK}")));
        }
        let start = first.checked_add(sector).and_then(|s| s.checked_mul(512));
        let len = sectors.checked_mul(512);
        let end = start.zip(len).and_then(|(s, l)| s.checked_add(l)).filter(|&e| e <= i64::MAX as u64);
        let host =
            data_fork.checked_add(data).and_then(|h| h.checked_add(offset)).filter(|&h| h <= i64::MAX as u64);
        let (Some(start), Some(len), Some(_), Some(host)) = (start, len, end, host) else {
            return Err(bad("a chunk lies beyond 8 EiB"));
        };
        if method != Method::Zero
            && (stored > MAX_CHUNK * 512 + (1 << 20) || (method == Method::Plain && stored < len))
        {
            return Err(bad(format!("length {stored} of a chunk makes no sense")));
        }
        if chunks.len() >= MAX_CHUNKS {
            return Err(bad("too many chunks"));
        }
        chunks.push(Chunk { start, len, host, stored, method });
    }
    Ok(())
}

/// Finds the base64 data of the `blkx` array of a property list.
fn read_property_list(text: &str, data_fork: u64, chunks: &mut Vec<Chunk>) -> Result<()> {
    let mut rest = match text.find("<key>blkx</key>") {
        Some(at) => &text[at..],
        None => return Err(bad("the property list names no chunk tables")),
    };
    if let Some(end) = rest.find("</array>") {
        rest = &rest[..end];
    }
    while let Some(begin) = rest.find("<data>") {
        let data = &rest[begin + 6..];
        let end = data.find("</data>").ok_or_else(|| bad("the property list ends early"))?;
        let table = base64_decode(&data[..end]).ok_or_else(|| bad("a chunk table is not base64"))?;
        read_table(&table, data_fork, chunks)?;
        rest = &data[end..];
    }
    Ok(())
}

/// Reads the tables among the resources of an old image's fork.
fn read_resource_fork(b: &[u8], data_fork: u64, chunks: &mut Vec<Chunk>) -> Result<()> {
    let short = || bad("the resource fork is too short");
    if b.len() < 16 {
        return Err(short());
    }
    let (data, map) = (be32(b, 0) as usize, be32(b, 4) as usize);
    let end = map.min(b.len());
    let mut at = data;
    while at.checked_add(4).is_some_and(|e| e <= end) {
        let len = be32(b, at) as usize;
        let table = b.get(at + 4..).and_then(|r| r.get(..len)).ok_or_else(short)?;
        read_table(table, data_fork, chunks)?;
        at += 4 + len;
    }
    Ok(())
}

struct Dmg {
    storages: [Arc<dyn Storage>; 1],
    size: u64,
    /// Ascending and apart.
    chunks: Vec<Chunk>,
}

fn probe(input: &ProbeInput<'_>) -> u32 {
    // The signature is at the other end of the file.
    if has_extension(input.name, "dmg") { 2 } else { 0 }
}

fn open(opening: Opening<'_>) -> Result<Box<dyn Format>> {
    if !opening.read_only {
        return Err(Error::ReadOnly("The dmg format".into()));
    }
    let storage = opening.storage;
    let size = storage.size()?;
    let from = size.saturating_sub(SEARCH);
    let tail = storage.read_vec(from, (size - from) as usize)?;
    let at = (0..tail.len().saturating_sub(TRAILER - 1))
        .rev()
        .find(|&at| &tail[at..at + 4] == b"koly")
        .ok_or_else(|| bad("its trailer is missing"))?;
    let trailer = &tail[at..at + TRAILER];
    let data_fork = be64(trailer, 24);
    let (fork, fork_len) = (be64(trailer, 40), be64(trailer, 48));
    let (list, list_len) = (be64(trailer, 216), be64(trailer, 224));
    if be16(trailer, 6) != 4 {
        return Err(Error::unsupported(format!("Unsupported DMG version {}", be16(trailer, 6))));
    }
    let part = |offset: u64, len: u64| {
        if len > MAX_LIST || offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(bad("the trailer points outside of the file"));
        }
        storage.read_vec(offset, len as usize)
    };
    let mut chunks = Vec::new();
    if fork_len > 0 {
        read_resource_fork(&part(fork, fork_len)?, data_fork, &mut chunks)?;
    } else if list_len > 0 {
        let bytes = part(list, list_len)?;
        read_property_list(&String::from_utf8_lossy(&bytes), data_fork, &mut chunks)?;
    } else {
        return Err(bad("it has neither a property list nor a resource fork"));
    }
    chunks.sort_unstable_by_key(|c| c.start);
    if chunks.windows(2).any(|w| w[0].start + w[0].len > w[1].start) {
        return Err(bad("chunks overlap"));
    }
    let end = chunks.last().map_or(0, |c| c.start + c.len);
    let sectors = be64(trailer, 492);
    // The trailer's count may exceed what the chunks cover; the rest is zeros.
    let disk = sectors.checked_mul(512).filter(|&s| s >= end && s <= i64::MAX as u64).unwrap_or(end);
    Ok(Box::new(Dmg { storages: [storage], size: disk, chunks }))
}

/// Decodes Apple's ADC: runs of plain bytes and copies from what was decoded before. The result says whether `out` was filled.
fn decode_adc(input: &[u8], out: &mut [u8]) -> bool {
    let (mut from, mut to) = (0, 0);
    while to < out.len() {
        let Some(&code) = input.get(from) else { return false };
        let (len, back) = if code & 0x80 != 0 {
            let len = usize::from(code & 0x7f) + 1;
            let Some(run) = input.get(from + 1..from + 1 + len) else { return false };
            let n = len.min(out.len() - to);
            out[to..to + n].copy_from_slice(&run[..n]);
            from += 1 + len;
            to += n;
            continue;
        } else if code & 0x40 != 0 {
            let Some(&[high, low]) = input.get(from + 1..from + 3) else { return false };
            from += 3;
            (usize::from(code & 0x3f) + 4, usize::from(high) << 8 | usize::from(low))
        } else {
            let Some(&low) = input.get(from + 1) else { return false };
            from += 2;
            (usize::from(code >> 2) + 3, usize::from(code & 3) << 8 | usize::from(low))
        };
        // Copies may overlap what they make.
        for _ in 0..len.min(out.len() - to) {
            let Some(source) = to.checked_sub(back + 1) else { return false };
            out[to] = out[source];
            to += 1;
        }
    }
    true
}

impl Format for Dmg {
    fn size(&self) -> u64 {
        self.size
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
        let index = self.chunks.partition_point(|c| c.start + c.len <= offset);
        let Some(chunk) = self.chunks.get(index).filter(|c| c.start <= offset) else {
            let gap = self.chunks.get(index).map_or(len, |c| len.min(c.start - offset));
            push_extent(out, Extent { offset, len: gap, mapping: Mapping::Zero { host: None } });
            return Ok(());
        };
        let len = len.min(chunk.start + chunk.len - offset);
        let mapping = match chunk.method {
            Method::Zero => Mapping::Zero { host: None },
            Method::Plain => {
                Mapping::Data { file: 0, host: chunk.host + (offset - chunk.start), in_place: false }
            }
            Method::Unsupported(kind) => {
                let name = if kind == 0x8000_0007 { "LZFSE" } else { "LZMA" };
                return Err(Error::unsupported(format!(
                    "'{}' has chunks compressed with {name}, which cannot be decoded here; convert it with hdiutil to UDZO first",
                    self.storages[0].name()
                )));
            }
            _ => Mapping::Compressed {
                file: 0,
                host: chunk.host,
                stored: chunk.stored as u32,
                unit_start: chunk.start,
                unit: chunk.len as u32,
                method: index as u32,
            },
        };
        push_extent(out, Extent { offset, len, mapping });
        Ok(())
    }

    fn decode(&self, extent: &Extent, stored: &[u8], out: &mut [u8]) -> Result<()> {
        let damaged =
            |what: &str| Error::Corrupt(format!("the compressed chunk at {:#x} {what}", extent.offset));
        let Mapping::Compressed { method: index, .. } = extent.mapping else {
            return Err(damaged("is none"));
        };
        let method = self.chunks.get(index as usize).map(|c| c.method);
        let filled = match method {
            Some(Method::Zlib) => {
                let mut inflate = Decompress::new(true);
                inflate
                    .decompress(stored, out, FlushDecompress::Finish)
                    .map_err(|e| damaged(&format!("cannot be decoded: {e}")))?;
                inflate.total_out() == out.len() as u64
            }
            Some(Method::Bzip2) => {
                let mut reader = bzip2::read::BzDecoder::new(stored);
                std::io::Read::read_exact(&mut reader, out).is_ok()
            }
            Some(Method::Adc) => decode_adc(stored, out),
            _ => false,
        };
        if filled { Ok(()) } else { Err(damaged("ends early or is damaged")) }
    }

    fn prepare_write(&self, _offset: u64, _len: u64, _out: &mut Vec<WriteExtent>) -> Result<()> {
        Err(Error::ReadOnly("The dmg format".into()))
    }

    fn commit_write(&self, _extents: &[WriteExtent]) -> Result<()> {
        Err(Error::ReadOnly("The dmg format".into()))
    }

    fn abort_write(&self, _extents: &[WriteExtent]) {}

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Error::ReadOnly("The dmg format".into()))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn resize(&self, _size: u64, _preallocation: Preallocation) -> Result<()> {
        Err(support::no_resize())
    }
}

#[cfg(test)]
mod tests;
