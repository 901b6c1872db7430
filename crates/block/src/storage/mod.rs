//! Bytes on the host: the trait below every format, and its implementations.
//!
//! A [`Storage`] is a flat, growable run of bytes: a host file, a block device, an NBD export, plain memory. Formats keep
//! their metadata in storages and say where in them the guest's data lies; engines move the data.

mod file;
mod http;
mod location;
mod lock;
mod memory;
mod null;
mod window;

use crate::{Error, Result};
use std::{fmt::Debug, os::fd::BorrowedFd, path::Path, sync::Arc};

pub(crate) use file::is_zero;
pub use file::{DirectAlignment, FileStorage};
pub use http::{HttpAddress, HttpStorage};
pub use location::{Location, absolute_name, join_name, parse_json_name};
pub use lock::Permissions;
pub use memory::MemoryStorage;
pub use null::NullStorage;
pub use window::Window;

/// What the host holds at a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Held {
    /// Bytes are stored.
    Data,
    /// A hole: reads as zeros and takes no space.
    Hole,
}

/// What a failed `write_zeroes` attempt means for the caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Zeroing {
    /// The range now reads as zeros.
    Done,
    /// The storage has no quick way; write zeros instead.
    Unsupported,
}

/// How `write_zeroes` may get there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ZeroFlags {
    /// Space may be given back to the host.
    pub unmap: bool,
}

/// A flat run of bytes. All methods take `&self` and may be called from many threads at once; overlapping concurrent
/// writes leave either's bytes, as on a disk.
pub trait Storage: Send + Sync + Debug {
    /// Size in bytes now.
    fn size(&self) -> Result<u64>;

    /// Fills `buf` from `offset`; what lies past the end reads as zeros.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes all of `buf` at `offset`, growing the storage where it can grow.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// Writes several buffers one after the other from `offset`.
    fn write_vectored_at(&self, bufs: &[&[u8]], mut offset: u64) -> Result<()> {
        for buf in bufs {
            self.write_at(buf, offset)?;
            offset += buf.len() as u64;
        }
        Ok(())
    }

    /// Makes every write that has returned durable, as the cache mode demands.
    fn flush(&self) -> Result<()>;

    /// Sets the size: new space reads as zeros.
    fn set_size(&self, size: u64) -> Result<()>;

    /// Gives the range's space back if that is cheap. A hint: contents are undefined afterwards (old bytes or zeros).
    fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// Makes the range read as zeros without transferring zeros, if there is a way.
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<Zeroing>;

    /// Reserves space so that later writes to the range do not fail for lack of it. `Unsupported` where the host
    /// cannot.
    fn allocate(&self, offset: u64, len: u64) -> Result<Zeroing>;

    /// What is held from `offset` on, and for how many bytes (at most `len`, at least 1, unless `offset` is past the
    /// end: then `(Hole, len)`).
    fn held(&self, offset: u64, len: u64) -> Result<(Held, u64)>;

    /// Space taken on the host in bytes, where it is known.
    fn allocated_size(&self) -> Option<u64> {
        None
    }

    /// The descriptor to do I/O on directly (io_uring, `copy_file_range`), if storage offsets are its offsets.
    fn raw_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Offsets, lengths and memory must be multiples of this for I/O on [`Storage::raw_fd`]; 1 if there is no such rule.
    fn alignment(&self) -> u32 {
        1
    }

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Lets writes through, or refuses them from now on.
    fn set_read_only(&self, read_only: bool) -> Result<()>;

    /// The file on the host, if it is one.
    fn path(&self) -> Option<&Path> {
        None
    }

    /// The name as a user writes it (a path or a URL).
    fn name(&self) -> String;

    /// `file`, `host_device`, `nbd`, ...
    fn protocol(&self) -> &'static str;

    /// Whether new space after growing is known to read as zeros.
    fn grows_with_zeros(&self) -> bool {
        true
    }

    /// Claims what the image needs from other users; see [`Permissions`].
    fn set_permissions(&self, _permissions: Permissions) -> Result<()> {
        Ok(())
    }
}

/// Helpers for metadata, on any storage.
pub trait StorageExt {
    /// `len` bytes from `offset` in a new vector. The caller bounds `len`.
    fn read_vec(&self, offset: u64, len: usize) -> Result<Vec<u8>>;
    /// Writes zeros, by the quick way or the slow one.
    fn fill_zeroes(&self, offset: u64, len: u64) -> Result<()>;
}

impl<S: Storage + ?Sized> StorageExt for S {
    fn read_vec(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn fill_zeroes(&self, mut offset: u64, mut len: u64) -> Result<()> {
        if self.write_zeroes(offset, len, ZeroFlags::default())? == Zeroing::Done {
            return Ok(());
        }
        while len > 0 {
            let piece = len.min(ZEROS.len() as u64);
            self.write_at(&ZEROS[..piece as usize], offset)?;
            offset += piece;
            len -= piece;
        }
        Ok(())
    }
}

/// Zeros to write from.
pub(crate) static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// How the host's page cache is used; QEMU's cache modes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CacheMode {
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Every write is durable before it returns.
    pub writethrough: bool,
    /// Flushes do nothing.
    pub no_flush: bool,
}

impl CacheMode {
    /// `none`, `writeback`, `writethrough`, `directsync`, `unsafe`.
    pub fn parse(name: &str) -> Result<Self> {
        let (direct, writethrough, no_flush) = match name {
            "none" | "off" => (true, false, false),
            "writeback" => (false, false, false),
            "writethrough" => (false, true, false),
            "directsync" => (true, true, false),
            "unsafe" => (false, false, true),
            _ => return Err(Error::usage(format!("Invalid cache option: {name}"))),
        };
        Ok(CacheMode { direct, writethrough, no_flush })
    }
}

/// How to open a storage.
#[derive(Clone, Debug, Default)]
pub struct StorageOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// Cache mode.
    pub cache: CacheMode,
    /// Take no locks (`locking=off`).
    pub no_locks: bool,
    /// Pass discards to the host.
    pub discard: bool,
}

/// Opens what a location names.
pub fn open(location: &Location, options: &StorageOptions) -> Result<Arc<dyn Storage>> {
    match location {
        Location::File(path) => Ok(Arc::new(FileStorage::open(path, options)?)),
        Location::Null { size, zeroes } => Ok(Arc::new(NullStorage::new(*size, *zeroes))),
        Location::Nbd(address) => Ok(Arc::new(crate::nbd::NbdStorage::open(address, options)?)),
        Location::Http(address) => Ok(Arc::new(HttpStorage::open(address, options)?)),
        Location::Unsupported { scheme, advice } => {
            Err(Error::unsupported(format!("Protocol '{scheme}' is not built in: {advice}")))
        }
    }
}

/// Creates what a location names, of `size` bytes, replacing what was there.
pub fn create(location: &Location, size: u64) -> Result<Arc<dyn Storage>> {
    match location {
        Location::File(path) => Ok(Arc::new(FileStorage::create(path, size)?)),
        Location::Null { .. } => Err(Error::unsupported("Driver 'null-co' does not support image creation")),
        Location::Nbd(address) => {
            let storage = crate::nbd::NbdStorage::open(address, &StorageOptions::default())?;
            if storage.size()? < size {
                return Err(Error::usage(format!("NBD export '{address}' is smaller than {size} bytes")));
            }
            Ok(Arc::new(storage))
        }
        Location::Http(address) => {
            Err(Error::unsupported(format!("'{}': files on web servers are read-only", address.url)))
        }
        Location::Unsupported { scheme, advice } => {
            Err(Error::unsupported(format!("Protocol '{scheme}' is not built in: {advice}")))
        }
    }
}
