//! Persistent dirty bitmaps ("Bitmaps extension" of the specification).
//!
//! A writer that records (flag `auto`) marks the bitmap in use on disk before the first change, keeps the bits in memory, and
//! stores them at close. After a crash the mark is still there, and nobody trusts the bits.

use super::{
    Meta, OFFSET, Qcow2,
    header::{self, BitmapsHeader},
    table::words,
};
use crate::{
    Error, Result,
    formats::{BitmapInfo, Bitmaps},
    storage::StorageExt,
};
use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering},
};

const IN_USE: u32 = 1;
const AUTO: u32 = 2;
const EXTRA_COMPATIBLE: u32 = 4;
/// Limits of the specification's users.
const MAX_BITMAPS: u32 = 65535;
const MAX_DIRECTORY: u64 = 64 << 20;
const MAX_TABLE: u64 = 0x0800_0000;
const MAX_BITS_BYTES: u64 = 0x2000_0000;

/// A directory entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub(super) info: BitmapInfo,
    pub(super) table_offset: u64,
    pub(super) table_size: u32,
    flags: u32,
    granularity_bits: u8,
    extra: Vec<u8>,
}

/// Bitmaps that record writes of this session.
#[derive(Debug, Default)]
pub(super) struct Tracker {
    active: AtomicBool,
    state: Mutex<TrackerState>,
}

#[derive(Debug, Default)]
struct TrackerState {
    bitmaps: Vec<(BitmapInfo, Vec<u8>)>,
    marked: bool,
}

/// The list under `bitmaps` in format-specific information.
pub(super) fn describe(entries: &[Entry]) -> serde_json::Value {
    entries
        .iter()
        .map(|e| {
            let mut flags = Vec::new();
            if e.info.in_use {
                flags.push("in-use");
            }
            if e.info.auto {
                flags.push("auto");
            }
            serde_json::json!({ "flags": flags, "name": e.info.name, "granularity": e.info.granularity })
        })
        .collect()
}

fn be(b: &[u8]) -> u64 {
    b.iter().fold(0, |v, &x| v << 8 | u64::from(x))
}

fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for e in entries {
        out.extend(e.table_offset.to_be_bytes());
        out.extend(e.table_size.to_be_bytes());
        out.extend(e.flags.to_be_bytes());
        out.extend([1, e.granularity_bits]);
        out.extend((e.info.name.len() as u16).to_be_bytes());
        out.extend((e.extra.len() as u32).to_be_bytes());
        out.extend(&e.extra);
        out.extend(e.info.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out
}

/// Bytes that `size` bytes of disk take at a granularity.
fn bits_len(size: u64, granularity: u64) -> u64 {
    size.div_ceil(granularity).div_ceil(8)
}

impl Qcow2 {
    /// Reads the directory.
    pub(super) fn bitmap_list(&self, meta: &Meta) -> Result<Vec<Entry>> {
        let Some(b) = meta.header.bitmaps else { return Ok(Vec::new()) };
        if b.count == 0 || b.count > MAX_BITMAPS || b.directory_size > MAX_DIRECTORY {
            return Err(Error::invalid("The bitmap directory is invalid"));
        }
        let bytes = self.main().read_vec(b.directory_offset, b.directory_size as usize)?;
        let mut out = Vec::new();
        let mut rest = &bytes[..];
        for _ in 0..b.count {
            let bad = || Error::invalid("The bitmap directory is damaged");
            let h = rest.get(..24).ok_or_else(bad)?;
            let (name_len, extra_len) = (be(&h[18..20]) as usize, be(&h[20..24]) as usize);
            let len = 24usize.checked_add(extra_len).and_then(|n| n.checked_add(name_len)).ok_or_else(bad)?;
            let body = rest.get(24..len).ok_or_else(bad)?;
            let (flags, granularity_bits) = (be(&h[12..16]) as u32, h[17]);
            if h[16] != 1 || !(9..=31).contains(&granularity_bits) || name_len == 0 || name_len > 1023 {
                return Err(bad());
            }
            let table_size = be(&h[8..12]) as u32;
            if u64::from(table_size) * 8 > MAX_TABLE {
                return Err(bad());
            }
            out.push(Entry {
                info: BitmapInfo {
                    name: String::from_utf8_lossy(&body[extra_len..]).into_owned(),
                    granularity: 1 << granularity_bits,
                    auto: flags & AUTO != 0,
                    in_use: flags & IN_USE != 0 || (extra_len > 0 && flags & EXTRA_COMPATIBLE == 0),
                },
                table_offset: be(&h[0..8]),
                table_size,
                flags,
                granularity_bits,
                extra: body[..extra_len].to_vec(),
            });
            rest = rest.get(len.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(out)
    }

    /// Writes a new directory, switches to it, and frees the old one and `gone` (tables with their data).
    fn write_bitmaps(&self, meta: &mut Meta, entries: &[Entry], gone: &[Entry]) -> Result<()> {
        let bits = self.geo.cluster_bits;
        let old = meta.header.bitmaps;
        let mut released: Vec<u64> = Vec::new();
        for e in gone {
            let table = self.bitmap_table(e)?;
            released.extend(table.iter().map(|w| w & OFFSET).filter(|&o| o != 0).map(|o| o >> bits));
            let clusters = (u64::from(e.table_size) * 8).div_ceil(self.geo.cluster_size);
            released.extend((0..clusters).map(|i| (e.table_offset >> bits) + i));
        }
        let bytes = encode(entries);
        let mut new = None;
        if !entries.is_empty() {
            let first = self.allocate_exact(meta, (bytes.len() as u64).div_ceil(self.geo.cluster_size))?;
            self.main().write_at(&bytes, first << bits)?;
            new = Some(BitmapsHeader {
                count: entries.len() as u32,
                directory_size: bytes.len() as u64,
                directory_offset: first << bits,
            });
        }
        self.write_meta(meta)?;
        self.main().flush()?;
        meta.header.bitmaps = new;
        if new.is_some() {
            meta.header.autoclear |= header::BITMAPS;
        } else {
            meta.header.autoclear &= !header::BITMAPS;
        }
        meta.header.write(&**self.main())?;
        self.main().flush()?;
        let refcounts = self.refcounts(meta)?;
        if let Some(old) = old {
            refcounts.release(old.directory_offset >> bits, old.directory_size.div_ceil(1 << bits));
        }
        released.into_iter().for_each(|c| refcounts.release(c, 1));
        self.write_meta(meta)?;
        Ok(())
    }

    pub(super) fn bitmap_table(&self, e: &Entry) -> Result<Vec<u64>> {
        if e.table_offset & (self.geo.cluster_size - 1) != 0 {
            return Err(Error::invalid(format!("Bitmap '{}' has an unaligned table", e.info.name)));
        }
        Ok(words(&self.main().read_vec(e.table_offset, e.table_size as usize * 8)?).collect())
    }

    fn read_bits(&self, e: &Entry) -> Result<Vec<u8>> {
        if e.info.in_use {
            return Err(Error::invalid(format!(
                "Bitmap '{}' is inconsistent and cannot be used; remove it with qemu-img bitmap --remove",
                e.info.name
            )));
        }
        let len = bits_len(self.disk_size(), e.info.granularity);
        let table = self.bitmap_table(e)?;
        if len > MAX_BITS_BYTES || (table.len() as u64) < len.div_ceil(self.geo.cluster_size) {
            return Err(Error::invalid(format!("Bitmap '{}' has a table of the wrong size", e.info.name)));
        }
        let mut out = vec![0; len as usize];
        for (piece, word) in out.chunks_mut(self.geo.cluster_size as usize).zip(table) {
            match word & OFFSET {
                0 if word & 1 != 0 => piece.fill(0xff),
                0 => {}
                at => self.main().read_at(piece, at)?,
            }
        }
        Ok(out)
    }

    /// Writes bits to new clusters; the result is the table's place and size.
    fn write_bits(&self, meta: &mut Meta, bits: &[u8]) -> Result<(u64, u32)> {
        let shift = self.geo.cluster_bits;
        let mut table: Vec<u64> = Vec::new();
        for piece in bits.chunks(self.geo.cluster_size as usize) {
            if crate::is_zero(piece) {
                table.push(0);
                continue;
            }
            let (first, _, _) = self.allocate(meta, 1)?;
            let mut whole = piece.to_vec();
            whole.resize(self.geo.cluster_size as usize, 0);
            self.main().write_at(&whole, first << shift)?;
            table.push(first << shift);
        }
        if table.is_empty() {
            return Ok((0, 0));
        }
        let mut bytes: Vec<u8> = table.iter().flat_map(|w| w.to_be_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(self.geo.cluster_size as usize), 0);
        let first = self.allocate_exact(meta, bytes.len() as u64 >> shift)?;
        self.main().write_at(&bytes, first << shift)?;
        Ok((first << shift, table.len() as u32))
    }

    fn find_bitmap(&self, list: &[Entry], name: &str) -> Result<usize> {
        list.iter()
            .position(|e| e.info.name == name)
            .ok_or_else(|| Error::NotFound(format!("Dirty bitmap '{name}' not found")))
    }

    fn change_flags(&self, names: &[&str], clear: u32, set: u32) -> Result<()> {
        let mut meta = self.lock();
        let mut list = self.bitmap_list(&meta)?;
        for name in names {
            let at = self.find_bitmap(&list, name)?;
            list[at].flags = list[at].flags & !clear | set;
        }
        // Flags may change in place: the entries' sizes stay.
        if let Some(b) = meta.header.bitmaps {
            self.main().write_at(&encode(&list), b.directory_offset)?;
            self.main().flush()?;
        }
        self.write_meta(&mut meta)?;
        Ok(())
    }

    /// Loads the bitmaps that record.
    pub(super) fn load_tracked(&self) -> Result<()> {
        let list = self.bitmap_list(&self.lock())?;
        let mut state = self.tracker.state.lock().unwrap_or_else(|e| e.into_inner());
        state.bitmaps.clear();
        for e in list.iter().filter(|e| e.info.auto && !e.info.in_use) {
            state.bitmaps.push((e.info.clone(), self.read_bits(e)?));
        }
        state.marked = false;
        self.tracker.active.store(!state.bitmaps.is_empty(), Ordering::Release);
        Ok(())
    }

    /// Records a change of guest data.
    pub(super) fn track(&self, offset: u64, len: u64) -> Result<()> {
        if !self.tracker.active.load(Ordering::Acquire) || len == 0 {
            return Ok(());
        }
        let mut state = self.tracker.state.lock().unwrap_or_else(|e| e.into_inner());
        if !state.marked {
            let names: Vec<String> = state.bitmaps.iter().map(|b| b.0.name.clone()).collect();
            self.change_flags(&names.iter().map(String::as_str).collect::<Vec<_>>(), 0, IN_USE)?;
            state.marked = true;
        }
        for (info, bits) in &mut state.bitmaps {
            for bit in offset / info.granularity..=(offset + len - 1) / info.granularity {
                if let Some(byte) = bits.get_mut((bit / 8) as usize) {
                    *byte |= 1 << (bit % 8);
                }
            }
        }
        Ok(())
    }

    /// Stores what was recorded, and takes the marks of use away.
    pub(super) fn store_tracked(&self) -> Result<()> {
        let mut state = self.tracker.state.lock().unwrap_or_else(|e| e.into_inner());
        if !state.marked {
            return Ok(());
        }
        let bitmaps = std::mem::take(&mut state.bitmaps);
        self.tracker.active.store(false, Ordering::Release);
        drop(state);
        for (info, bits) in &bitmaps {
            self.replace_bits(&info.name, bits)?;
        }
        Ok(())
    }

    fn replace_bits(&self, name: &str, bits: &[u8]) -> Result<()> {
        let mut meta = self.lock();
        let mut list = self.bitmap_list(&meta)?;
        let at = self.find_bitmap(&list, name)?;
        let gone = list[at].clone();
        let (offset, size) = self.write_bits(&mut meta, bits)?;
        list[at].table_offset = offset;
        list[at].table_size = size;
        list[at].flags &= !IN_USE;
        self.write_bitmaps(&mut meta, &list, &[gone])
    }

    /// Makes the tables fit a disk of `size` bytes; new space counts as changed nowhere.
    pub(super) fn resize_bitmaps(&self, size: u64) -> Result<()> {
        let list = self.bitmap_list(&self.lock())?;
        for e in list {
            let tracked = {
                let state = self.tracker.state.lock().unwrap_or_else(|e| e.into_inner());
                state.bitmaps.iter().find(|b| b.0.name == e.info.name).map(|b| b.1.clone())
            };
            let table = self.bitmap_table(&e)?;
            let mut bits = match tracked {
                Some(bits) => bits,
                None => {
                    // The disk's size has changed already: read what the table covers.
                    let mut out =
                        vec![0; (table.len() as u64 * self.geo.cluster_size).min(MAX_BITS_BYTES) as usize];
                    for (piece, word) in out.chunks_mut(self.geo.cluster_size as usize).zip(table) {
                        match word & OFFSET {
                            0 if word & 1 != 0 => piece.fill(0xff),
                            0 => {}
                            at => self.main().read_at(piece, at)?,
                        }
                    }
                    out
                }
            };
            bits.resize(bits_len(size, e.info.granularity) as usize, 0);
            // Bits past the end of a shrunk disk are gone.
            let used = size.div_ceil(e.info.granularity) % 8;
            if used != 0
                && let Some(last) = bits.last_mut()
            {
                *last &= (1u8 << used) - 1;
            }
            self.replace_bits(&e.info.name, &bits)?;
        }
        self.load_tracked()
    }
}

impl Bitmaps for Qcow2 {
    fn list(&self) -> Vec<BitmapInfo> {
        self.bitmap_list(&self.lock()).map(|l| l.into_iter().map(|e| e.info).collect()).unwrap_or_default()
    }

    fn add(&self, name: &str, granularity: Option<u64>, enabled: bool) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly(self.main().name()));
        }
        self.store_tracked()?;
        let granularity = granularity.unwrap_or_else(|| self.geo.cluster_size.clamp(4096, 65536));
        if !granularity.is_power_of_two() || !(512..=1 << 31).contains(&granularity) {
            return Err(Error::usage("Granularity must be a power of two between 512 and 2G"));
        }
        if name.is_empty() || name.len() > 1023 {
            return Err(Error::usage("Bitmap name must have 1 to 1023 bytes"));
        }
        let mut meta = self.lock();
        if meta.header.version < 3 {
            return Err(Error::unsupported(format!(
                "Cannot store dirty bitmaps in qcow2 v2 files: cannot make bitmap '{name}' persistent"
            )));
        }
        let mut list = self.bitmap_list(&meta)?;
        if list.iter().any(|e| e.info.name == name) {
            return Err(Error::usage(format!("Bitmap already exists: {name}")));
        }
        let len = bits_len(self.disk_size(), granularity);
        if len > MAX_BITS_BYTES || list.len() as u32 >= MAX_BITMAPS {
            return Err(Error::usage(format!(
                "Bitmap '{name}' would be too large; use a larger granularity"
            )));
        }
        let (table_offset, table_size) = self.write_bits(&mut meta, &vec![0; len as usize])?;
        list.push(Entry {
            info: BitmapInfo { name: name.into(), granularity, auto: enabled, in_use: false },
            table_offset,
            table_size,
            flags: if enabled { AUTO } else { 0 },
            granularity_bits: granularity.trailing_zeros() as u8,
            extra: Vec::new(),
        });
        self.write_bitmaps(&mut meta, &list, &[])?;
        drop(meta);
        self.load_tracked()
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.store_tracked()?;
        let mut meta = self.lock();
        let mut list = self.bitmap_list(&meta)?;
        let at = self.find_bitmap(&list, name)?;
        let gone = list.remove(at);
        self.write_bitmaps(&mut meta, &list, &[gone])?;
        drop(meta);
        self.load_tracked()
    }

    fn set_enabled(&self, name: &str, enabled: bool) -> Result<()> {
        self.store_tracked()?;
        let list = self.bitmap_list(&self.lock())?;
        if list[self.find_bitmap(&list, name)?].info.in_use {
            return Err(Error::invalid(format!("Bitmap '{name}' is inconsistent and cannot be used")));
        }
        if enabled {
            self.change_flags(&[name], 0, AUTO)?
        } else {
            self.change_flags(&[name], AUTO, 0)?
        }
        self.load_tracked()
    }

    fn load(&self, name: &str) -> Result<Vec<u8>> {
        {
            let state = self.tracker.state.lock().unwrap_or_else(|e| e.into_inner());
            if let Some((_, bits)) = state.bitmaps.iter().find(|b| b.0.name == name) {
                return Ok(bits.clone());
            }
        }
        let list = self.bitmap_list(&self.lock())?;
        self.read_bits(&list[self.find_bitmap(&list, name)?])
    }

    fn store(&self, name: &str, bits: &[u8]) -> Result<()> {
        self.store_tracked()?;
        let info = {
            let list = self.bitmap_list(&self.lock())?;
            list[self.find_bitmap(&list, name)?].info.clone()
        };
        if bits.len() as u64 != bits_len(self.disk_size(), info.granularity) {
            return Err(Error::usage("The bits do not fit the bitmap"));
        }
        self.replace_bits(name, bits)?;
        self.load_tracked()
    }
}
