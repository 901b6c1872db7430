//! An open image: a format, its storages, its backing image, and the moving of bytes between them.

mod create;
mod io;
mod open;
mod watch;

use crate::{
    Error, Result,
    formats::{Driver, Format, Info},
    range_lock::RangeLock,
    storage::{Permissions, Storage},
};
use std::{
    collections::VecDeque,
    os::fd::BorrowedFd,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

pub use create::{Create, create_image};
pub use open::OpenOptions;

/// What to do with writes of zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DetectZeroes {
    /// Write them.
    #[default]
    Off,
    /// Turn them into efficient zero writes.
    On,
    /// And free the space if discards are on.
    Unmap,
}

/// Reads `off`, `on`, `unmap`.
pub fn parse_detect_zeroes(text: &str) -> Result<DetectZeroes> {
    match text {
        "off" => Ok(DetectZeroes::Off),
        "on" => Ok(DetectZeroes::On),
        "unmap" => Ok(DetectZeroes::Unmap),
        _ => Err(Error::usage(format!("Invalid parameter '{text}'; detect-zeroes is off, on or unmap"))),
    }
}

/// A range of a disk as seen through its whole backing chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapEntry {
    /// First byte as the guest counts.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// 0 for the image itself, 1 for its backing image, and so on.
    pub depth: u32,
    /// Some image of the chain says something about the range (it is allocated).
    pub present: bool,
    /// Reads as zeros.
    pub zero: bool,
    /// Bytes are stored.
    pub data: bool,
    /// They are stored compressed.
    pub compressed: bool,
    /// Offset in `storage` where they are stored as they are.
    pub offset: Option<u64>,
    /// Which storage of the image at `depth`.
    pub file: u16,
}

/// An open image. All methods may be called from many threads; overlapping concurrent writes leave either's bytes.
pub struct Image {
    format: Box<dyn Format>,
    driver: &'static Driver,
    name: String,
    read_only: bool,
    writethrough: bool,
    backing: RwLock<Option<Arc<Image>>>,
    locks: RangeLock,
    /// Set when the format was guessed to be raw: the guest must not be able to make it look like another format.
    guard_first_sector: bool,
    detect_zeroes: DetectZeroes,
    discard: bool,
    decoded: Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>,
    decoded_any: AtomicBool,
    warnings: Vec<String>,
    identity: Option<(u64, u64)>,
    closed: AtomicBool,
    watch: watch::Watch,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image")
            .field("name", &self.name)
            .field("format", &self.driver.name)
            .finish_non_exhaustive()
    }
}

impl Image {
    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.format.size()
    }

    /// The format's entry in the table.
    pub fn driver(&self) -> &'static Driver {
        self.driver
    }

    /// The name it was opened by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Facts the format gives.
    pub fn info(&self) -> Result<Info> {
        self.format.info()
    }

    /// The format, for what is not I/O: check, snapshots, bitmaps. I/O must be idle, as the trait says.
    pub fn format(&self) -> &dyn Format {
        &*self.format
    }

    /// The main file.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.format.storages()[0]
    }

    /// What a user should be told about how the image was opened.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The backing image.
    pub fn backing(&self) -> Option<Arc<Image>> {
        self.backing.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Puts another backing image below this one (the image's own record of it does not change).
    pub fn replace_backing(&self, backing: Option<Arc<Image>>) {
        let _all = self.locks.exclusive(0, u64::MAX);
        *self.backing.write().unwrap_or_else(|e| e.into_inner()) = backing;
    }

    /// If guest offset `x` is at `base + x` of a descriptor, always, and nothing has to be seen or refused on the way: the
    /// descriptor, `base`, and the alignment its I/O needs. The caller may then read and write data there itself; flush,
    /// discard, zeroing and resizing still come through the image.
    pub fn direct(&self) -> Option<(BorrowedFd<'_>, u64, u32)> {
        if self.guard_first_sector
            || self.detect_zeroes != DetectZeroes::Off
            || self.writethrough
            || self.watch.is_active()
            || self.format.cipher().is_some()
        {
            return None;
        }
        let base = self.format.flat()?;
        let storage = self.storage();
        Some((storage.raw_fd()?, base, storage.alignment()))
    }

    /// Stops all I/O while `f` runs: for snapshots, resizing, amending.
    pub fn quiesced<T>(&self, f: impl FnOnce(&dyn Format) -> Result<T>) -> Result<T> {
        let _all = self.locks.exclusive(0, u64::MAX);
        self.forget_decoded();
        f(&*self.format)
    }

    /// Makes everything written durable.
    pub fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.format.flush()
    }

    /// Writes everything out and removes marks of use. Dropping an image does the same, but cannot report failure.
    pub fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let _all = self.locks.exclusive(0, u64::MAX);
        let result = if self.read_only { Ok(()) } else { self.format.close() };
        for storage in self.format.storages() {
            storage.set_permissions(Permissions::NONE)?;
        }
        result
    }

    /// Forgets decoded units: after anything that may reuse the space they came from.
    fn forget_decoded(&self) {
        if self.decoded_any.swap(false, Ordering::AcqRel) {
            self.decoded.lock().unwrap_or_else(|e| e.into_inner()).clear();
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Err(e) = self.close() {
            tracing::error!(image = %self.name, error = %e, "closing the image failed");
        }
    }
}
