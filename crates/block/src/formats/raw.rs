//! Raw: the guest's bytes as they are, optionally a window (`offset`, `size`) into a larger file.

use super::{
    Creation, Driver, Extent, Format, Info, Mapping, Measured, Measurement, Opening, Preallocation,
    ProbeInput, WriteExtent,
};
use crate::{
    Error, Result,
    options::{OptionKind, OptionSpec},
    storage::{Held, Storage, StorageExt, Window, ZEROS, ZeroFlags, Zeroing},
};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// The format.
pub static DRIVER: Driver = Driver {
    name: "raw",
    probe,
    open,
    create: Some(create),
    measure: Some(measure),
    options: &[
        OptionSpec {
            name: "preallocation",
            kind: OptionKind::Text,
            help: "Preallocation mode (allowed values: off, falloc, full)",
            default: None,
        },
        OptionSpec {
            name: "nocow",
            kind: OptionKind::Bool,
            help: "Turn off copy-on-write (valid only on btrfs)",
            default: None,
        },
        OptionSpec {
            name: "extent_size_hint",
            kind: OptionKind::Size,
            help: "Extent size hint for the image file, 0 to disable",
            default: None,
        },
    ],
    backing: false,
};

/// A raw image.
struct Raw {
    storages: [Arc<dyn Storage>; 1],
    size: AtomicU64,
    base: Option<u64>,
}

fn probe(_input: &ProbeInput<'_>) -> u32 {
    1 // anything may be raw, and anything else is likelier
}

fn open(opening: Opening<'_>) -> Result<Box<dyn Format>> {
    let held = opening.storage.size()?;
    let offset = opening.options.take_size("offset")?.unwrap_or(0);
    let size = opening.options.take_size("size")?;
    let storage = if offset == 0 && size.is_none() {
        opening.storage
    } else {
        let room = held.checked_sub(offset).ok_or_else(|| {
            Error::usage(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({held})"
            ))
        })?;
        let size = size.unwrap_or(room);
        if size > room {
            return Err(Error::usage(format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the actual size of the \
                 containing file ({held})"
            )));
        }
        Arc::new(Window::new(opening.storage, offset, size)?)
    };
    // The size of a disk is a number of sectors; a file's last partial sector reads as if padded with zeros.
    let size = storage
        .size()?
        .checked_next_multiple_of(512)
        .ok_or_else(|| Error::invalid("The file is too large"))?;
    Ok(Box::new(Raw { storages: [storage], size: AtomicU64::new(size), base: Some(0) }))
}

fn preallocation(options: &mut crate::Options) -> Result<Preallocation> {
    match options.take("preallocation") {
        None => Ok(Preallocation::Off),
        Some(mode) => match Preallocation::parse(&mode)? {
            Preallocation::Metadata => Err(Error::usage("Unsupported preallocation mode: metadata")),
            mode => Ok(mode),
        },
    }
}

fn create(creation: Creation<'_>) -> Result<()> {
    let mode = preallocation(creation.options)?;
    // Both are hints to particular file systems; without those there is nothing to do.
    creation.options.take_bool("nocow")?;
    creation.options.take_size("extent_size_hint")?;
    creation.storage.set_size(creation.size)?;
    allocate(&*creation.storage, 0, creation.size, mode)
}

/// Gives `offset .. offset + len` space as `mode` says; the range reads as zeros already.
pub(super) fn allocate(storage: &dyn Storage, offset: u64, len: u64, mode: Preallocation) -> Result<()> {
    match mode {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => match storage.allocate(offset, len)? {
            Zeroing::Done => Ok(()),
            Zeroing::Unsupported => {
                Err(Error::unsupported("The file system cannot preallocate with falloc; use full"))
            }
        },
        Preallocation::Full => {
            let mut at = offset;
            while at < offset + len {
                let n = (offset + len - at).min(ZEROS.len() as u64);
                storage.write_at(&ZEROS[..n as usize], at)?;
                at += n;
            }
            storage.flush()
        }
    }
}

fn measure(measurement: Measurement<'_>) -> Result<Measured> {
    preallocation(measurement.options)?;
    Ok(Measured { required: measurement.size, fully_allocated: measurement.size, bitmaps: None })
}

impl Format for Raw {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
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

    fn flat(&self) -> Option<u64> {
        self.base
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        let (held, len) = self.storages[0].held(offset, len)?;
        let mapping = match held {
            Held::Data => Mapping::Data { file: 0, host: offset, in_place: true },
            Held::Hole => Mapping::Zero { host: Some((0, offset)) },
        };
        super::push_extent(out, Extent { offset, len, mapping });
        Ok(())
    }

    fn prepare_write(&self, offset: u64, len: u64, out: &mut Vec<WriteExtent>) -> Result<()> {
        out.push(WriteExtent {
            offset,
            len,
            file: 0,
            host: offset,
            new: false,
            head: 0,
            tail: 0,
            fresh: false,
            cookie: 0,
        });
        Ok(())
    }

    fn commit_write(&self, _extents: &[WriteExtent]) -> Result<()> {
        Ok(())
    }

    fn abort_write(&self, _extents: &[WriteExtent]) {}

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<Zeroing> {
        self.storages[0].write_zeroes(offset, len, ZeroFlags { unmap })
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.storages[0].discard(offset, len)
    }

    fn flush(&self) -> Result<()> {
        self.storages[0].flush()
    }

    fn resize(&self, size: u64, mode: Preallocation) -> Result<()> {
        let size = size.checked_next_multiple_of(512).ok_or_else(|| Error::usage("Image size too large"))?;
        if mode == Preallocation::Metadata {
            return Err(Error::usage("Unsupported preallocation mode: metadata"));
        }
        let old = self.storages[0].size()?;
        self.storages[0].set_size(size)?;
        if size > old {
            allocate(&*self.storages[0], old, size - old, mode)?;
        } else if mode != Preallocation::Off {
            return Err(Error::usage("Preallocation cannot be used for shrinking files"));
        }
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }

    fn preallocate(&self, mode: Preallocation) -> Result<()> {
        allocate(&*self.storages[0], 0, self.size(), mode)
    }

    fn make_empty(&self) -> Result<()> {
        self.storages[0].fill_zeroes(0, self.size())
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }

    fn created_zeroed(&self) -> bool {
        self.storages[0].grows_with_zeros()
    }
}
