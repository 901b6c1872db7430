//! The walk over the units (blocks, clusters, grains) of a table, the same in every format that has one.

use crate::{
    Error, Result,
    formats::{Extent, Mapping, WriteExtent, push_extent, push_write},
    storage::{Storage, ZeroFlags, Zeroing},
};
use std::sync::Arc;

/// What a table says about one unit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Slot {
    /// Nothing: the backing file's bytes, or zeros.
    #[default]
    Free,
    /// Zeros, whatever the backing file holds.
    Zero,
    /// Stored whole from this offset on.
    Data(u64),
    /// Stored compressed.
    Packed {
        /// Where the stored bytes begin.
        host: u64,
        /// How many there are at most.
        stored: u32,
    },
}

/// Most units looked up at a time; the caller of `map` asks again.
const BATCH: usize = 512;

/// [`crate::formats::Format::map`] by units. `lookup` fills slots from a unit on and says how many (at least one).
pub(crate) fn map_units(
    (file, unit): (u16, u64),
    (offset, len): (u64, u64),
    out: &mut Vec<Extent>,
    lookup: impl Fn(u64, &mut [Slot]) -> Result<usize>,
) -> Result<()> {
    let end = offset + len;
    let first = offset / unit;
    let mut slots = [Slot::Free; BATCH];
    let wanted = (end.div_ceil(unit) - first).min(BATCH as u64) as usize;
    let got = lookup(first, &mut slots[..wanted])?;
    let mut at = offset;
    for (i, slot) in slots[..got.min(wanted)].iter().enumerate() {
        let start = (first + i as u64) * unit;
        let stop = (start + unit).min(end);
        let mapping = match *slot {
            Slot::Free => Mapping::Unallocated,
            Slot::Zero => Mapping::Zero { host: None },
            Slot::Data(host) => Mapping::Data { file, host: host + (at - start), in_place: true },
            Slot::Packed { host, stored } => {
                let unit =
                    u32::try_from(unit).map_err(|_| Error::invalid("compressed units are too large"))?;
                Mapping::Compressed { file, host, stored, unit_start: start, unit, method: 0 }
            }
        };
        push_extent(out, Extent { offset: at, len: stop - at, mapping });
        at = stop;
    }
    Ok(())
}

/// [`crate::formats::Format::prepare_write`] by units: in place where there is space, else whole new units from `allocate`,
/// which also says whether they are known to read as zeros.
pub(crate) fn prepare_units(
    (file, unit): (u16, u64),
    (offset, len): (u64, u64),
    out: &mut Vec<WriteExtent>,
    lookup: impl Fn(u64, &mut [Slot]) -> Result<usize>,
    allocate: impl Fn(u64) -> Result<(u64, bool)>,
) -> Result<()> {
    let end = offset + len;
    let first = offset / unit;
    let mut slots = [Slot::Free; BATCH];
    let wanted = (end.div_ceil(unit) - first).min(BATCH as u64) as usize;
    let got = lookup(first, &mut slots[..wanted])?;
    let mut at = offset;
    for (i, slot) in slots[..got.min(wanted)].iter().enumerate() {
        let start = (first + i as u64) * unit;
        let stop = (start + unit).min(end);
        let (head, tail) = (at - start, start + unit - stop);
        let piece = match *slot {
            Slot::Data(host) => WriteExtent {
                offset: at,
                len: stop - at,
                file,
                host: host + head,
                new: false,
                head: 0,
                tail: 0,
                fresh: false,
                cookie: 0,
            },
            _ => {
                let (host, fresh) = match allocate(start / unit) {
                    Ok(space) => space,
                    // What was prepared so far can be written; the caller comes again and then meets the error.
                    Err(_) if !out.is_empty() => return Ok(()),
                    Err(e) => return Err(e),
                };
                WriteExtent {
                    offset: at,
                    len: stop - at,
                    file,
                    host: host + head,
                    new: true,
                    head,
                    tail,
                    fresh,
                    cookie: 0,
                }
            }
        };
        push_write(out, piece);
        at = stop;
    }
    Ok(())
}

/// [`crate::formats::Format::commit_write`] by units: `assign` maps a unit to its new place.
pub(crate) fn commit_units(
    unit: u64,
    extents: &[WriteExtent],
    mut assign: impl FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    for e in extents.iter().filter(|e| e.new) {
        let (start, host) = (e.offset - e.head, e.host - e.head);
        let units = (e.head + e.len + e.tail).div_ceil(unit);
        for i in 0..units {
            assign(start / unit + i, host + i * unit)?;
        }
    }
    Ok(())
}

/// [`crate::formats::Format::write_zeroes`] by units: what is stored is zeroed in place (`unmap`: and its space given back);
/// for other units `zero` does what the format can, and `Unsupported` from it ends the attempt.
pub(crate) fn zero_units(
    (storage, unit): (&Arc<dyn Storage>, u64),
    (offset, len): (u64, u64),
    unmap: bool,
    lookup: impl Fn(u64, &mut [Slot]) -> Result<usize>,
    mut zero: impl FnMut(u64, Slot) -> Result<Zeroing>,
) -> Result<Zeroing> {
    let end = offset + len;
    let mut at = offset;
    let mut extents = Vec::new();
    while at < end {
        extents.clear();
        map_units((0, unit), (at, end - at), &mut extents, &lookup)?;
        for e in &extents {
            let done = match e.mapping {
                Mapping::Data { host, .. } => storage.write_zeroes(host, e.len, ZeroFlags { unmap })?,
                _ => {
                    let mut done = Zeroing::Done;
                    let mut slot = [Slot::Free];
                    for index in e.offset / unit..(e.offset + e.len).div_ceil(unit) {
                        lookup(index, &mut slot)?;
                        done = zero(index, slot[0])?;
                        if done == Zeroing::Unsupported {
                            break;
                        }
                    }
                    done
                }
            };
            if done == Zeroing::Unsupported {
                return Ok(done);
            }
            at = e.offset + e.len;
        }
    }
    Ok(Zeroing::Done)
}

/// [`crate::formats::Format::discard`] by units: space in the file is given back, the tables stay as they are.
pub(crate) fn discard_units(
    (storage, unit): (&Arc<dyn Storage>, u64),
    (offset, len): (u64, u64),
    lookup: impl Fn(u64, &mut [Slot]) -> Result<usize>,
) -> Result<()> {
    let end = offset + len;
    let mut at = offset;
    let mut extents = Vec::new();
    while at < end {
        extents.clear();
        map_units((0, unit), (at, end - at), &mut extents, &lookup)?;
        for e in &extents {
            if let Mapping::Data { host, .. } = e.mapping {
                storage.discard(host, e.len)?;
            }
            at = e.offset + e.len;
        }
    }
    Ok(())
}
