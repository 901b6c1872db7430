//! The log of a VHDX file: pages of metadata are written here first, so that a torn page can be written again ([MS-VHDX] 2.3).
//!
//! Every entry this program writes is applied and durable before the next one begins, so each is a sequence of its own:
//! whichever valid entry is newest, replaying it alone is right, and replaying it twice does no harm.

use super::header::{Guid, own_crc};
use crate::{
    Error, Result,
    formats::support::{le32, le64, put},
    storage::{Storage, StorageExt},
};
use std::collections::HashMap;

/// Bytes of a page, of a descriptor block and of a data block.
pub(super) const PAGE: usize = 4096;
/// Bytes of an entry's header.
const HEADER: usize = 64;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 32;
/// Most pages of one entry this program writes; they fit in the smallest log several times.
pub(super) const MAX_PAGES: usize = 48;
/// Largest log that is replayed, and largest entry: their checksums need them in memory.
const MAX_LOG: u32 = 256 << 20;
const MAX_ENTRY: u32 = 64 << 20;

/// An entry's header.
#[derive(Clone, Copy, Debug)]
struct Entry {
    length: u32,
    tail: u32,
    sequence: u64,
    descriptors: u32,
    flushed_size: u64,
    last_size: u64,
}

/// The log of an open file.
#[derive(Debug)]
pub(super) struct Log {
    offset: u64,
    length: u32,
    guid: Guid,
    sequence: u64,
    next: u32,
}

impl Log {
    /// An empty log with a new identity, which the header has to carry before the first entry.
    pub(super) fn new(offset: u64, length: u32, guid: Guid) -> Self {
        Log { offset, length, guid, sequence: 1, next: 0 }
    }

    /// Writes one entry with these pages (offset in the file, [`PAGE`] bytes each). The caller flushes, applies, flushes.
    pub(super) fn append(&mut self, storage: &dyn Storage, pages: &[(u64, &[u8])]) -> Result<()> {
        debug_assert!(!pages.is_empty() && pages.len() <= MAX_PAGES);
        let length = PAGE * (1 + pages.len());
        let mut bytes = vec![0; length];
        let size = storage.size()?;
        put(&mut bytes, 0, b"loge");
        put(&mut bytes, 8, &(length as u32).to_le_bytes());
        put(&mut bytes, 12, &self.next.to_le_bytes());
        put(&mut bytes, 16, &self.sequence.to_le_bytes());
        put(&mut bytes, 24, &(pages.len() as u32).to_le_bytes());
        put(&mut bytes, 32, &self.guid);
        put(&mut bytes, 48, &size.to_le_bytes());
        put(&mut bytes, 56, &size.to_le_bytes());
        for (i, (offset, page)) in pages.iter().enumerate() {
            let at = HEADER + i * DESCRIPTOR;
            put(&mut bytes, at, b"desc");
            put(&mut bytes, at + 4, &page[PAGE - 4..]);
            put(&mut bytes, at + 8, &page[..8]);
            put(&mut bytes, at + 16, &offset.to_le_bytes());
            put(&mut bytes, at + 24, &self.sequence.to_le_bytes());
            let at = PAGE * (1 + i);
            put(&mut bytes, at, b"data");
            put(&mut bytes, at + 4, &((self.sequence >> 32) as u32).to_le_bytes());
            put(&mut bytes, at + 8, &page[8..PAGE - 4]);
            put(&mut bytes, at + PAGE - 4, &(self.sequence as u32).to_le_bytes());
        }
        let crc = own_crc(&bytes);
        put(&mut bytes, 4, &crc.to_le_bytes());
        let room = ((self.length - self.next) as usize).min(length);
        storage.write_at(&bytes[..room], self.offset + u64::from(self.next))?;
        if room < length {
            storage.write_at(&bytes[room..], self.offset)?;
        }
        self.next = (self.next + length as u32) % self.length;
        self.sequence += 1;
        Ok(())
    }
}

/// `len` bytes of the log from `at`, wrapping around.
fn read_around(storage: &dyn Storage, offset: u64, length: u32, at: u32, len: u32) -> Result<Vec<u8>> {
    let room = (length - at).min(len);
    let mut bytes = storage.read_vec(offset + u64::from(at), room as usize)?;
    bytes.extend(storage.read_vec(offset, (len - room) as usize)?);
    Ok(bytes)
}

fn parse(b: &[u8], guid: &Guid, log_length: u32) -> Option<Entry> {
    let entry = Entry {
        length: le32(b, 8),
        tail: le32(b, 12),
        sequence: le64(b, 16),
        descriptors: le32(b, 24),
        flushed_size: le64(b, 48),
        last_size: le64(b, 56),
    };
    let page = PAGE as u32;
    let sane = &b[..4] == b"loge"
        && b[32..48] == *guid
        && entry.length.is_multiple_of(page)
        && (page..=log_length.min(MAX_ENTRY)).contains(&entry.length)
        && entry.tail.is_multiple_of(page)
        && entry.tail < log_length
        && entry.sequence != 0
        && u64::from(entry.descriptors) * DESCRIPTOR as u64 + HEADER as u64 <= u64::from(entry.length);
    sane.then_some(entry)
}

/// Writes what a log holds to where it belongs. Nothing is changed if the log holds no valid entry.
pub(super) fn replay(storage: &dyn Storage, offset: u64, length: u32, guid: &Guid) -> Result<()> {
    if length > MAX_LOG {
        return Err(Error::unsupported(format!(
            "The log of the VHDX image has {length} bytes; {MAX_LOG} are supported"
        )));
    }
    let mut entries: HashMap<u32, Entry> = HashMap::new();
    // Overlapping entries of a hostile file must not make this quadratic.
    let mut budget = 4 * u64::from(length);
    for at in (0..length).step_by(PAGE) {
        let mut head = [0; HEADER];
        storage.read_at(&mut head, offset + u64::from(at))?;
        let Some(entry) = parse(&head, guid, length) else { continue };
        budget = budget
            .checked_sub(entry.length.into())
            .ok_or_else(|| Error::invalid("Invalid VHDX log: its entries overlap"))?;
        let bytes = read_around(storage, offset, length, at, entry.length)?;
        if own_crc(&bytes) == le32(&bytes, 4) {
            entries.insert(at, entry);
        }
    }
    let mut heads: Vec<(u64, u32)> = entries.iter().map(|(&at, e)| (e.sequence, at)).collect();
    heads.sort_unstable_by(|a, b| b.cmp(a));
    for (_, head) in heads.into_iter().take(4096) {
        if let Some(chain) = chain_to(&entries, head, length) {
            for at in chain {
                apply(storage, offset, length, at, entries[&at])?;
            }
            return storage.flush();
        }
    }
    Ok(())
}

/// The entries from the tail that `head` names up to `head`, if they follow each other without a gap.
fn chain_to(entries: &HashMap<u32, Entry>, head: u32, length: u32) -> Option<Vec<u32>> {
    let mut chain = vec![entries.get(&head)?.tail];
    while let Some(&at) = chain.last()
        && at != head
    {
        let entry = entries.get(&at)?;
        let next = ((u64::from(at) + u64::from(entry.length)) % u64::from(length)) as u32;
        if entries.get(&next)?.sequence != entry.sequence.wrapping_add(1) || chain.len() > entries.len() {
            return None;
        }
        chain.push(next);
    }
    Some(chain)
}

fn apply(storage: &dyn Storage, offset: u64, length: u32, at: u32, entry: Entry) -> Result<()> {
    let bad = |what: &str| Error::invalid(format!("Invalid VHDX log: {what}"));
    let size = storage.size()?;
    if size < entry.flushed_size {
        return Err(bad("the file is shorter than it was when the log was written"));
    }
    if entry.last_size > i64::MAX as u64 {
        return Err(bad("a file size makes no sense"));
    }
    let bytes = read_around(storage, offset, length, at, entry.length)?;
    let mut data = (HEADER + entry.descriptors as usize * DESCRIPTOR).next_multiple_of(PAGE);
    for i in 0..entry.descriptors as usize {
        let d = &bytes[HEADER + i * DESCRIPTOR..][..DESCRIPTOR];
        let target = le64(d, 16);
        if le64(d, 24) != entry.sequence || !target.is_multiple_of(PAGE as u64) {
            return Err(bad("a descriptor does not belong to its entry"));
        }
        match &d[..4] {
            b"zero" => {
                let len = le64(d, 8);
                if !len.is_multiple_of(PAGE as u64)
                    || target.checked_add(len).is_none_or(|end| end > entry.last_size)
                {
                    return Err(bad("it zeroes space outside of the file"));
                }
                storage.fill_zeroes(target, len)?;
            }
            b"desc" => {
                let block =
                    bytes.get(data..data + PAGE).ok_or_else(|| bad("an entry is too short for its data"))?;
                data += PAGE;
                if &block[..4] != b"data"
                    || u64::from(le32(block, 4)) << 32 | u64::from(le32(block, PAGE - 4)) != entry.sequence
                {
                    return Err(bad("a data block does not belong to its entry"));
                }
                if target.checked_add(PAGE as u64).is_none_or(|end| end > entry.last_size) {
                    return Err(bad("it writes outside of the file"));
                }
                let mut page = [0; PAGE];
                page[..8].copy_from_slice(&d[8..16]);
                page[8..PAGE - 4].copy_from_slice(&block[8..PAGE - 4]);
                page[PAGE - 4..].copy_from_slice(&d[4..8]);
                storage.write_at(&page, target)?;
            }
            _ => return Err(bad("an unknown descriptor")),
        }
    }
    if storage.size()? < entry.last_size { storage.set_size(entry.last_size) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;
    use proptest::prelude::*;

    const LOG: u32 = 1 << 20;

    fn page(i: u64) -> Vec<u8> {
        (0..PAGE).map(|b| (b as u64 * 7 + i) as u8).collect()
    }

    #[test]
    fn the_newest_entry_is_replayed_also_around_the_end() {
        let guid = [5; 16];
        let memory = MemoryStorage::new(vec![0; 4 << 20]);
        let mut log = Log::new(1 << 20, LOG, guid);
        for i in 0..50u64 {
            let pages: Vec<Vec<u8>> = (0..7).map(|p| page(i * 10 + p)).collect();
            let refs: Vec<(u64, &[u8])> = pages
                .iter()
                .enumerate()
                .map(|(p, bytes)| ((2 << 20) + p as u64 * PAGE as u64, &bytes[..]))
                .collect();
            log.append(&memory, &refs).unwrap();
        }
        let clean = MemoryStorage::new(memory.snapshot());
        replay(&clean, 1 << 20, LOG, &[6; 16]).unwrap();
        assert_eq!(clean.snapshot(), memory.snapshot(), "entries of another log are ignored");
        replay(&clean, 1 << 20, LOG, &guid).unwrap();
        assert_eq!(clean.read_vec(2 << 20, PAGE).unwrap(), page(490));
        // The newest entry torn: the one before it counts.
        let torn = (log.next + LOG - PAGE as u32) % LOG;
        memory.write_at(&[1, 2, 3], (1 << 20) + u64::from(torn) + 50).unwrap();
        replay(&memory, 1 << 20, LOG, &guid).unwrap();
        assert_eq!(memory.read_vec(2 << 20, PAGE).unwrap(), page(480));
    }

    proptest! {
        #[test]
        fn any_entry_is_replayed_or_refused(changes in proptest::collection::vec((0..HEADER + DESCRIPTOR * 2, any::<u8>()), 1..10)) {
            let memory = MemoryStorage::new(vec![0; 3 << 20]);
            let mut log = Log::new(1 << 20, LOG, [5; 16]);
            log.append(&memory, &[(2 << 20, &page(1)), ((2 << 20) + 4096, &page(2))]).unwrap();
            let mut bytes = memory.read_vec(1 << 20, 3 * PAGE).unwrap();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            let crc = own_crc(&bytes);
            put(&mut bytes, 4, &crc.to_le_bytes());
            memory.write_at(&bytes, 1 << 20).unwrap();
            let _ = replay(&memory, 1 << 20, LOG, &[5; 16]);
        }
    }
}
