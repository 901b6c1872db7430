//! Reading, writing, zeroing, discarding and mapping.

use super::{DetectZeroes, Image, MapEntry};
use crate::{
    Error, Result,
    formats::{self, Extent, Mapping, Preallocation, ProbeInput, WriteExtent},
    range_lock::RangeGuard,
    storage::{Held, Storage, ZEROS, Zeroing},
};
use std::{
    cell::RefCell,
    sync::{Arc, atomic::Ordering},
};

/// Decoded units kept, for small reads of compressed data.
const DECODED_UNITS: usize = 8;
/// Largest unit that is decoded or copied: what any format defines is below.
const MAX_UNIT: u64 = 256 << 20;
/// Most bytes of one piece of work, so that no buffer grows with the request.
const MAX_PIECE: u64 = 4 << 20;

/// What a file of the image holds in a range, remembered for the time of one look at the map.
struct HostRun {
    file: u16,
    start: u64,
    end: u64,
    held: Held,
}

thread_local! {
    static EXTENTS: RefCell<Vec<Vec<Extent>>> = const { RefCell::new(Vec::new()) };
}

/// Runs `f` with a scratch vector that keeps its memory between calls, also when calls nest (backing chains).
fn with_extents<T>(f: impl FnOnce(&mut Vec<Extent>) -> T) -> T {
    let mut scratch = EXTENTS.with(|s| s.borrow_mut().pop()).unwrap_or_default();
    scratch.clear();
    let result = f(&mut scratch);
    EXTENTS.with(|s| s.borrow_mut().push(scratch));
    result
}

impl Image {
    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::OutOfRange { offset, len, size }),
        }
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only { Err(Error::ReadOnly(self.name.clone())) } else { Ok(()) }
    }

    /// The range rounded out to units: what a lock must cover.
    fn lock_range(&self, offset: u64, len: u64) -> (u64, u64) {
        let unit = self.format.unit().max(1);
        (offset - offset % unit, (offset + len).checked_next_multiple_of(unit).unwrap_or(u64::MAX))
    }

    fn shared(&self, offset: u64, len: u64) -> RangeGuard<'_> {
        let (start, end) = self.lock_range(offset, len);
        self.locks.shared(start, end)
    }

    fn exclusive(&self, offset: u64, len: u64) -> RangeGuard<'_> {
        let (start, end) = self.lock_range(offset, len);
        self.locks.exclusive(start, end)
    }

    /// Fills `buf` from `offset`.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        self.throttle(false, buf.len() as u64);
        if let (Some(base), None) = (self.format.flat(), self.format.cipher()) {
            return self.storage().read_at(buf, base + offset);
        }
        let _guard = self.shared(offset, buf.len() as u64);
        self.read_locked(buf, offset)
    }

    /// Reads what an overlying image sees: zeros past the end.
    fn read_as_backing(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let n = self.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        buf[n..].fill(0);
        if n == 0 {
            return Ok(());
        }
        self.read_at(&mut buf[..n], offset)
    }

    /// Reads while the caller holds the range.
    fn read_locked(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            done += with_extents(|extents| {
                let at = offset + done as u64;
                self.format.map(at, (buf.len() - done) as u64, extents)?;
                let mut got = 0;
                for extent in extents.iter() {
                    let piece = &mut buf[done + got..done + got + extent.len as usize];
                    self.read_extent(extent, piece)?;
                    got += piece.len();
                }
                if got == 0 {
                    return Err(Error::invalid("the format mapped nothing"));
                }
                Ok(got)
            })?;
        }
        Ok(())
    }

    fn storage_of(&self, file: u16) -> Result<&Arc<dyn Storage>> {
        self.format
            .storages()
            .get(usize::from(file))
            .ok_or_else(|| Error::invalid("the image names no such file"))
    }

    fn read_extent(&self, extent: &Extent, buf: &mut [u8]) -> Result<()> {
        match extent.mapping {
            Mapping::Zero { .. } => {
                buf.fill(0);
                Ok(())
            }
            Mapping::Unallocated => match &*self.backing.read().unwrap_or_else(|e| e.into_inner()) {
                Some(backing) => backing.read_as_backing(buf, extent.offset),
                None => {
                    buf.fill(0);
                    Ok(())
                }
            },
            Mapping::Data { file, host, .. } => {
                let storage = self.storage_of(file)?;
                let Some(cipher) = self.format.cipher() else { return storage.read_at(buf, host) };
                let sector = cipher.sector();
                let (head, end) = (extent.offset % sector, extent.offset + extent.len);
                let tail = end.next_multiple_of(sector) - end;
                if head == 0 && tail == 0 {
                    storage.read_at(buf, host)?;
                    return cipher.decrypt(extent.offset, host, buf);
                }
                let mut whole = vec![0; buf.len() + (head + tail) as usize];
                storage.read_at(&mut whole, host - head)?;
                cipher.decrypt(extent.offset - head, host - head, &mut whole)?;
                buf.copy_from_slice(&whole[head as usize..][..buf.len()]);
                Ok(())
            }
            Mapping::Compressed { unit_start, .. } => {
                let unit = self.decoded(extent)?;
                let at = (extent.offset - unit_start) as usize;
                let part = unit
                    .get(at..at + buf.len())
                    .ok_or_else(|| Error::invalid("a compressed unit is too short"))?;
                buf.copy_from_slice(part);
                Ok(())
            }
        }
    }

    /// The decoded unit of a compressed extent, from the cache or anew.
    fn decoded(&self, extent: &Extent) -> Result<Arc<Vec<u8>>> {
        let Mapping::Compressed { file, host, stored, unit_start, unit, .. } = extent.mapping else {
            return Err(Error::invalid("not a compressed extent"));
        };
        if let Some((_, hit)) =
            self.decoded.lock().unwrap_or_else(|e| e.into_inner()).iter().find(|(key, _)| *key == unit_start)
        {
            return Ok(Arc::clone(hit));
        }
        if u64::from(unit) > MAX_UNIT || u64::from(stored) > MAX_UNIT {
            return Err(Error::invalid("a compressed unit is too large"));
        }
        let mut input = vec![0; stored as usize];
        self.storage_of(file)?.read_at(&mut input, host)?;
        let mut output = vec![0; unit as usize];
        self.format.decode(extent, &input, &mut output)?;
        let output = Arc::new(output);
        if extent.len < u64::from(unit) {
            let mut cache = self.decoded.lock().unwrap_or_else(|e| e.into_inner());
            // Units are small except in formats meant for sequential reading; keep memory bounded for those.
            let keep = if unit > 4 << 20 { 1 } else { DECODED_UNITS };
            cache.truncate(keep - 1);
            cache.push_front((unit_start, Arc::clone(&output)));
            self.decoded_any.store(true, Ordering::Release);
        }
        Ok(output)
    }

    /// Writes `buf` at `offset`.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write_in_turn(buf, offset, &mut || {})
    }

    /// Writes `buf` at `offset`, and calls `placed` once its place is decided, before the data moves. Writers that take
    /// turns until then lay out an image in order, and still move their data at the same time.
    pub fn write_in_turn(&self, buf: &[u8], offset: u64, placed: &mut dyn FnMut()) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        if self.guard_first_sector && offset < 512 {
            self.refuse_disguise(buf, offset)?;
        }
        if self.detect_zeroes != DetectZeroes::Off && crate::is_zero(buf) {
            let unmap = self.detect_zeroes == DetectZeroes::Unmap && self.discard;
            return self.write_zeroes(offset, buf.len() as u64, unmap);
        }
        self.throttle(true, buf.len() as u64);
        let _change = self.begin_change(offset, buf.len() as u64)?;
        match (self.format.flat(), self.format.cipher()) {
            (Some(base), None) => {
                placed();
                self.storage().write_at(buf, base + offset)?;
            }
            _ => {
                let last = (buf.len() as u64 - 1) / MAX_PIECE;
                for (i, piece) in buf.chunks(MAX_PIECE as usize).enumerate() {
                    let mut hook = || {
                        if i as u64 == last {
                            placed();
                        }
                    };
                    self.write_piece(piece, offset + i as u64 * MAX_PIECE, &mut hook)?;
                }
            }
        }
        if self.writethrough { self.format.flush() } else { Ok(()) }
    }

    /// The guest must not turn an image that was guessed to be raw into one that will be guessed otherwise.
    fn refuse_disguise(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut head = vec![0; 2048.min(self.size() as usize)];
        self.storage().read_at(&mut head, 0)?;
        let n = buf.len().min(head.len() - offset as usize);
        head[offset as usize..offset as usize + n].copy_from_slice(&buf[..n]);
        let would_be = formats::probe(&ProbeInput { head: &head, name: &self.name });
        if would_be.name == "raw" {
            return Ok(());
        }
        Err(Error::io(
            format!(
                "Writing a {} header to '{}', whose format was only guessed to be raw; specify format raw to allow it",
                would_be.name, self.name
            ),
            std::io::Error::from_raw_os_error(libc::EPERM),
        ))
    }

    fn write_piece(&self, buf: &[u8], offset: u64, placed: &mut dyn FnMut()) -> Result<()> {
        if self.format.compressed_only() {
            placed();
            return self.write_packed(buf, offset);
        }
        {
            let _guard = self.shared(offset, buf.len() as u64);
            let in_place = with_extents(|extents| {
                let mut covered = 0;
                while covered < buf.len() as u64 {
                    let before = extents.len();
                    self.format.map(offset + covered, buf.len() as u64 - covered, extents)?;
                    if extents[before.saturating_sub(1)..]
                        .iter()
                        .any(|e| !matches!(e.mapping, Mapping::Data { in_place: true, .. }))
                    {
                        return Ok(false);
                    }
                    covered = extents.last().map_or(0, |e| e.offset + e.len - offset);
                }
                placed();
                self.format.note_write(offset, buf.len() as u64)?;
                for e in extents.iter() {
                    if let Mapping::Data { file, host, .. } = e.mapping {
                        let at = (e.offset - offset) as usize;
                        self.store(file, host, e.offset, &buf[at..at + e.len as usize])?;
                    }
                }
                Ok(true)
            })?;
            if in_place {
                return Ok(());
            }
        }
        let _guard = self.exclusive(offset, buf.len() as u64);
        self.forget_decoded();
        self.write_exclusive(buf, offset, placed)
    }

    /// Writes to a format that stores nothing but compressed units: each unit is read, changed, compressed and stored anew.
    fn write_packed(&self, buf: &[u8], offset: u64) -> Result<()> {
        let unit = self.format.unit();
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let start = at - at % unit;
            let stop = end.min(start + unit);
            let whole = (start + unit).min(self.size()) - start;
            let _guard = self.exclusive(start, whole);
            self.forget_decoded();
            let part = &buf[(at - offset) as usize..(stop - offset) as usize];
            let mut bytes = vec![0; unit as usize];
            if part.len() as u64 != whole {
                self.read_locked(&mut bytes[..whole as usize], start)?;
            }
            bytes[(at - start) as usize..(stop - start) as usize].copy_from_slice(part);
            let packed = self
                .format
                .compress(&bytes)?
                .ok_or_else(|| Error::invalid("the format did not compress a unit"))?;
            self.format.write_compressed(start, &packed)?;
            at = stop;
        }
        Ok(())
    }

    /// Writes with allocation, while the caller holds the range exclusively.
    fn write_exclusive(&self, buf: &[u8], offset: u64, placed: &mut dyn FnMut()) -> Result<()> {
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < buf.len() as u64 {
            pieces.clear();
            self.format.prepare_write(offset + done, buf.len() as u64 - done, &mut pieces)?;
            if pieces.is_empty() {
                return Err(Error::invalid("the format prepared nothing"));
            }
            if pieces.iter().map(|p| p.len).sum::<u64>() == buf.len() as u64 - done {
                placed();
            }
            for piece in &pieces {
                let at = (piece.offset - offset) as usize;
                if let Err(e) = self.store_piece(piece, &buf[at..at + piece.len as usize]) {
                    self.format.abort_write(&pieces);
                    return Err(e);
                }
                done += piece.len;
            }
            self.format.commit_write(&pieces)?;
        }
        Ok(())
    }

    /// Writes one prepared piece with what has to be copied around it.
    fn store_piece(&self, piece: &WriteExtent, data: &[u8]) -> Result<()> {
        if piece.head == 0 && piece.tail == 0 {
            return self.store(piece.file, piece.host, piece.offset, data);
        }
        if piece.head > MAX_UNIT || piece.tail > MAX_UNIT {
            return Err(Error::invalid("a unit is too large to copy"));
        }
        let mut head = vec![0; piece.head as usize];
        let mut tail = vec![0; piece.tail as usize];
        // A disk may end inside its last unit; what lies behind is zeros.
        let inside = self.size().saturating_sub(piece.offset + piece.len).min(piece.tail) as usize;
        let (before, after) = (piece.offset - piece.head, piece.offset + piece.len);
        if piece.fresh && self.format.cipher().is_none() {
            if head.is_empty() || self.maps_to_zeros(before, piece.head)? {
                head.clear();
            }
            if inside == 0 || self.maps_to_zeros(after, inside as u64)? {
                tail.clear();
            }
        }
        let inside = inside.min(tail.len());
        if !head.is_empty() {
            self.read_locked(&mut head, before)?;
        }
        if inside > 0 {
            self.read_locked(&mut tail[..inside], after)?;
        }
        let start = piece.host - head.len() as u64;
        if self.format.cipher().is_some() {
            let whole = [&head[..], data, &tail[..]].concat();
            return self.store(piece.file, start, piece.offset - piece.head, &whole);
        }
        self.storage_of(piece.file)?.write_vectored_at(&[&head, data, &tail], start)
    }

    /// Whether the mapping alone tells that the range reads as zeros.
    fn maps_to_zeros(&self, offset: u64, len: u64) -> Result<bool> {
        let backed = self.backing.read().unwrap_or_else(|e| e.into_inner()).is_some();
        with_extents(|extents| {
            self.format.map(offset, len, extents)?;
            let covered = extents.last().is_some_and(|e| e.offset + e.len == offset + len);
            Ok(covered
                && extents.iter().all(|e| match e.mapping {
                    Mapping::Zero { .. } => true,
                    Mapping::Unallocated => !backed,
                    _ => false,
                }))
        })
    }

    /// Writes bytes to where they belong, encrypting them if need be.
    fn store(&self, file: u16, host: u64, guest: u64, data: &[u8]) -> Result<()> {
        let storage = self.storage_of(file)?;
        let Some(cipher) = self.format.cipher() else { return storage.write_at(data, host) };
        let sector = cipher.sector();
        let (head, end) = (guest % sector, guest + data.len() as u64);
        let tail = end.next_multiple_of(sector) - end;
        let mut whole = vec![0; data.len() + (head + tail) as usize];
        if head != 0 || tail != 0 {
            // Two writers of one sector would lose each other's half.
            static PARTIAL: std::sync::Mutex<()> = std::sync::Mutex::new(());
            let _guard = PARTIAL.lock().unwrap_or_else(|e| e.into_inner());
            storage.read_at(&mut whole, host - head)?;
            cipher.decrypt(guest - head, host - head, &mut whole)?;
            whole[head as usize..][..data.len()].copy_from_slice(data);
            cipher.encrypt(guest - head, host - head, &mut whole)?;
            return storage.write_at(&whole, host - head);
        }
        whole.copy_from_slice(data);
        cipher.encrypt(guest, host, &mut whole)?;
        storage.write_at(&whole, host)
    }

    /// Makes a range read as zeros, with as little I/O as the format allows. `unmap`: its space may be freed.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, len)?;
        if self.guard_first_sector && offset < 512 && len > 0 {
            self.refuse_disguise(&ZEROS[..len.min(512) as usize], offset)?;
        }
        self.throttle(true, 512.min(len));
        let _change = self.begin_change(offset, len)?;
        let end = offset + len;
        let unit = self.format.zero_unit().max(1);
        let start = offset.checked_next_multiple_of(unit).unwrap_or(end).min(end);
        // The last unit of a disk may be short; reaching the end covers it.
        let stop = if end == self.size() { end } else { (end - end % unit).max(start) };
        self.write_zero_bytes(offset, start - offset)?;
        // Whole units go to the format in bounded steps, so that other I/O gets its turn.
        const STEP: u64 = 1 << 30;
        let mut at = start;
        while at < stop {
            let n = (stop - at).min(STEP);
            let done = {
                let _guard = self.exclusive(at, n);
                self.forget_decoded();
                self.format.write_zeroes(at, n, unmap)?
            };
            if done == Zeroing::Unsupported {
                self.write_zero_bytes(at, n)?;
            }
            at += n;
        }
        self.write_zero_bytes(stop, end - stop)?;
        if self.writethrough { self.format.flush() } else { Ok(()) }
    }

    /// Writes zeros as data, but not where zeros are read anyway.
    fn write_zero_bytes(&self, offset: u64, len: u64) -> Result<()> {
        let mut at = offset;
        while at < offset + len {
            let n = (offset + len - at).min(ZEROS.len() as u64);
            let mut old = [0; 512];
            // A small edge that reads as zeros already need not be allocated.
            if n <= 512 && self.format.flat().is_none() {
                self.read_at(&mut old[..n as usize], at)?;
                if crate::is_zero(&old[..n as usize]) {
                    at += n;
                    continue;
                }
            }
            match (self.format.flat(), self.format.cipher()) {
                (Some(base), None) => self.storage().write_at(&ZEROS[..n as usize], base + at)?,
                _ => self.write_piece(&ZEROS[..n as usize], at, &mut || {})?,
            }
            at += n;
        }
        Ok(())
    }

    /// Tells that a range is no longer needed. It then reads as zeros or as before.
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, len)?;
        if len == 0 || (self.guard_first_sector && offset < 512) {
            return Ok(());
        }
        let _change = self.begin_change(offset, len)?;
        let _guard = self.exclusive(offset, len);
        self.forget_decoded();
        self.format.discard(offset, len)
    }

    /// Copies what backing files hold of a range into this image, unless it is allocated here already. What a reader sees
    /// does not change.
    pub fn copy_up(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, len)?;
        let Some(backing) = self.backing() else { return Ok(()) };
        let (mut at, mut extents, mut buf) = (offset, Vec::new(), Vec::new());
        while at < offset + len {
            let n = (offset + len - at).min(MAX_PIECE);
            let _guard = self.exclusive(at, n);
            extents.clear();
            self.format.map(at, n, &mut extents)?;
            for e in &extents {
                if e.mapping == Mapping::Unallocated {
                    buf.resize(e.len as usize, 0);
                    backing.read_as_backing(&mut buf, e.offset)?;
                    self.write_exclusive(&buf, e.offset, &mut || {})?;
                }
                at = e.offset + e.len;
            }
        }
        Ok(())
    }

    /// Compresses one unit: see [`crate::formats::Format::compress`]. `None`: store it plainly.
    pub fn compress(&self, unit: &[u8]) -> Result<Option<Vec<u8>>> {
        self.format.compress(unit)
    }

    /// Stores one compressed unit.
    pub fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.check_writable()?;
        let unit = self.format.unit();
        self.check_range(offset, 1)?;
        let _change = self.begin_change(offset, unit.min(self.size() - offset))?;
        let _guard = self.exclusive(offset, unit.min(self.size() - offset));
        self.forget_decoded();
        self.format.write_compressed(offset, data)
    }

    /// Changes the size of the disk.
    pub fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.check_writable()?;
        let backing_covers = self.backing().is_some_and(|b| b.size() > self.size()) && size > self.size();
        let old = self.size();
        self.quiesced(|format| format.resize(size, preallocation))?;
        if backing_covers {
            // What the backing file holds behind the old end must not show through.
            self.write_zeroes(old, size - old, false)?;
        }
        Ok(())
    }

    /// What this image alone says about `offset`, and for how long (at most `len`).
    pub fn map_own(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        self.check_range(offset, len)?;
        let _guard = self.shared(offset, len);
        self.format.map(offset, len, out)
    }

    /// What holds `offset ..`, through the whole chain, for at least one and at most `len` bytes. Neighbouring entries may be
    /// alike.
    pub fn map(&self, offset: u64, len: u64, out: &mut Vec<MapEntry>) -> Result<()> {
        self.map_depth(offset, len, 0, out)
    }

    fn map_depth(&self, offset: u64, len: u64, depth: u32, out: &mut Vec<MapEntry>) -> Result<()> {
        self.check_range(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        with_extents(|extents| {
            {
                let _guard = self.shared(offset, len);
                self.format.map(offset, len, extents)?;
            }
            let mut known = HostRun { file: 0, start: 0, end: 0, held: Held::Data };
            for e in extents.iter() {
                self.map_extent(e, depth, &mut known, out)?;
            }
            Ok(())
        })
    }

    /// Whether a file takes clearly less space than its length: only then looking for holes is worth the system calls.
    fn storage_is_sparse(&self, file: u16) -> bool {
        let Some(storage) = self.format.storages().get(usize::from(file)) else { return false };
        match (storage.allocated_size(), storage.size()) {
            (Some(allocated), Ok(size)) => allocated.saturating_add(1 << 20) < size,
            _ => false,
        }
    }

    /// Splits an entry where the file it lies in has holes.
    fn split_holes(
        &self,
        entry: MapEntry,
        host: u64,
        known: &mut HostRun,
        out: &mut Vec<MapEntry>,
    ) -> Result<()> {
        let storage = self.storage_of(entry.file)?;
        let mut done = 0;
        while done < entry.length {
            let at = host + done;
            if known.file != entry.file || at < known.start || at >= known.end {
                // As far as it goes: the next extents often lie in the same hole.
                let (held, n) = storage.held(at, u64::MAX - at)?;
                *known = HostRun { file: entry.file, start: at, end: at.saturating_add(n.max(1)), held };
            }
            let (held, n) = (known.held, known.end - at);
            let n = n.clamp(1, entry.length - done);
            out.push(MapEntry {
                start: entry.start + done,
                length: n,
                zero: held == Held::Hole,
                offset: Some(host + done),
                ..entry
            });
            done += n;
        }
        Ok(())
    }

    fn map_extent(&self, e: &Extent, depth: u32, known: &mut HostRun, out: &mut Vec<MapEntry>) -> Result<()> {
        let mut entry = MapEntry {
            start: e.offset,
            length: e.len,
            depth,
            present: true,
            zero: false,
            data: false,
            compressed: false,
            offset: None,
            file: 0,
        };
        match e.mapping {
            Mapping::Data { file, host, .. } => {
                entry.data = true;
                entry.file = file;
                if self.format.cipher().is_none() {
                    entry.offset = Some(host);
                    // Space may be allocated that the host's file system does not hold: then it reads as zeros.
                    let inside = known.file == file && (known.start..known.end).contains(&host);
                    if self.format.flat().is_none() && (inside || self.storage_is_sparse(file)) {
                        return self.split_holes(entry, host, known, out);
                    }
                }
            }
            Mapping::Compressed { file, .. } => {
                entry.data = true;
                entry.compressed = true;
                entry.file = file;
            }
            Mapping::Zero { host } => {
                entry.zero = true;
                if let Some((file, host)) = host {
                    entry.file = file;
                    entry.offset = Some(host);
                }
            }
            Mapping::Unallocated => {
                let Some(backing) = self.backing() else {
                    entry.present = false;
                    entry.zero = true;
                    out.push(entry);
                    return Ok(());
                };
                let inside = backing.size().saturating_sub(e.offset).min(e.len);
                let mut at = e.offset;
                while at < e.offset + inside {
                    let before = out.len();
                    backing.map_depth(at, e.offset + inside - at, depth + 1, out)?;
                    at = out[before..].last().map_or(e.offset + inside, |x| x.start + x.length);
                }
                if inside < e.len {
                    entry.start = e.offset + inside;
                    entry.length = e.len - inside;
                    entry.depth = depth;
                    entry.present = false;
                    entry.zero = true;
                    out.push(entry);
                }
                return Ok(());
            }
        }
        out.push(entry);
        Ok(())
    }
}
