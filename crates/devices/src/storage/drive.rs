//! A disk or CD-ROM drive as a user sees it: an image in it (or none), a cache mode, a policy for errors.

use super::{Buffer, Verdict, Workers, pieces};
use crate::model::CreateError;
use base::RateLimit;
use block::Image;
use bus::{System, SystemRequest};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, Weak};
use std::time::Duration;

/// What becomes of an error of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The guest is told.
    Report,
    /// The guest is told that all is well.
    Ignore,
    /// The machine stops, and the command is tried again when it continues.
    Stop,
    /// Stop where the host has no space left, report anything else.
    #[default]
    Enospc,
}

/// Properties of every disk and CD-ROM drive.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DriveSpec {
    /// Disk image; a CD-ROM drive without one is empty.
    pub drive: String,
    /// Serial number that the guest sees.
    pub serial: Option<String>,
    /// World wide name (64 bits) that the guest sees.
    pub wwn: Option<u64>,
    /// Sector size that the guest sees, in bytes.
    #[schemars(extend("format" = "size"))]
    pub logical_block_size: Option<u32>,
    /// Size in bytes of what the disk writes at once.
    #[schemars(extend("format" = "size"))]
    pub physical_block_size: Option<u32>,
    /// Smallest efficient request in bytes; 0 does not say.
    #[schemars(extend("format" = "size"))]
    pub min_io_size: u32,
    /// Best request size in bytes; 0 does not say.
    #[schemars(extend("format" = "size"))]
    pub opt_io_size: u32,
    /// Granularity of discards in bytes; the logical block size if not given.
    #[schemars(extend("format" = "size"))]
    pub discard_granularity: Option<u32>,
    /// Let the guest discard.
    pub discard: bool,
    /// Refuse writes.
    #[serde(rename = "read-only")]
    pub read_only: bool,
    /// Present a write-back cache; without it every write is durable when it completes.
    #[serde(rename = "write-cache")]
    pub write_cache: bool,
    /// What to do when the host cannot read.
    pub rerror: OnError,
    /// What to do when the host cannot write.
    pub werror: OnError,
}

impl Default for DriveSpec {
    fn default() -> Self {
        Self {
            drive: String::new(),
            serial: None,
            wwn: None,
            logical_block_size: None,
            physical_block_size: None,
            min_io_size: 0,
            opt_io_size: 0,
            discard_granularity: None,
            discard: true,
            read_only: false,
            write_cache: true,
            rerror: OnError::Report,
            werror: OnError::Enospc,
        }
    }
}

impl DriveSpec {
    /// Checks what a type cannot express. `model` is for the message, `serial` the longest serial number.
    ///
    /// # Errors
    /// Says which property is wrong, and what it may be.
    pub fn check(&self, model: &str, serial: usize) -> Result<(), CreateError> {
        let bad = |text: String| Err(CreateError::Other(format!("{model}: {text}")));
        let block = self.block_size();
        let physical = self.physical_block_size.unwrap_or(block);
        for (name, size) in [("logical_block_size", block), ("physical_block_size", physical)] {
            if !size.is_power_of_two() || !(512..=2 << 20).contains(&size) {
                return bad(format!("{name}={size} must be a power of two from 512 to 2M"));
            }
        }
        if physical < block {
            return bad("physical_block_size= must not be below logical_block_size=".into());
        }
        for (name, size) in [
            ("min_io_size", self.min_io_size),
            ("opt_io_size", self.opt_io_size),
            ("discard_granularity", self.discard_granularity.unwrap_or(block)),
        ] {
            if !size.is_multiple_of(block) {
                return bad(format!("{name}={size} must be a multiple of the logical block size, {block}"));
            }
        }
        if let Some(text) = self.serial.as_ref().filter(|s| s.len() > serial) {
            return bad(format!("serial={text} is longer than {serial} characters"));
        }
        if self.serial.as_ref().is_some_and(|s| !s.bytes().all(|b| (0x20..0x7f).contains(&b))) {
            return bad("serial= may hold printable ASCII only".into());
        }
        if self.rerror == OnError::Enospc {
            return bad(
                "rerror=enospc makes no sense: reading needs no space; use report, ignore or stop".into()
            );
        }
        Ok(())
    }

    /// Logical block size in bytes.
    pub fn block_size(&self) -> u32 {
        self.logical_block_size.unwrap_or(512)
    }
}

/// What happens to a drive while the machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriveEvent {
    /// The disk has another size.
    Resized,
    /// There is another medium in the drive, or none any more.
    MediumChanged,
    /// The user would like to take the medium out; the guest may open the tray.
    EjectRequested,
}

/// Why a transfer failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The drive is empty, or its tray open.
    NoMedium,
    /// Beyond the end of the disk.
    OutOfRange,
    /// A write to a medium that takes none.
    ReadOnly,
    /// No space on the host.
    NoSpace,
    /// The host's error.
    Io,
    /// The data's memory is not there.
    Memory,
    /// The command was given up.
    Aborted,
}

impl From<memory::Error> for Fault {
    fn from(_: memory::Error) -> Self {
        Fault::Memory
    }
}

/// A medium that cannot be taken out or put in.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TrayError {
    /// Not a drive with a tray.
    #[error("drive '{0}' is not removable")]
    Fixed(String),
    /// The guest has locked the tray.
    #[error("the guest has locked the tray of '{0}'; it has been asked to open it, or use force")]
    Locked(String),
    /// There is something in.
    #[error("there is a medium in '{0}'; eject it first")]
    Occupied(String),
    /// The new image does not open as it should.
    #[error("'{0}': {1}")]
    Image(String, String),
}

#[derive(Clone, Copy, Debug, Default)]
struct Tray {
    open: bool,
    locked: bool,
}

type Listener = Box<dyn Fn(DriveEvent) + Send + Sync>;

/// A drive; shared between its device and whoever changes media.
pub struct Drive {
    name: String,
    spec: DriveSpec,
    removable: bool,
    block_size: u32,
    medium: RwLock<Option<Arc<Image>>>,
    tray: Mutex<Tray>,
    writeback: AtomicBool,
    listeners: Mutex<Vec<Listener>>,
    workers: Mutex<Weak<Workers>>,
    system: System,
    log: RateLimit,
}

impl std::fmt::Debug for Drive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Drive({})", self.name)
    }
}

/// Bytes copied at a time where the image takes no guest memory.
const BOUNCE: u64 = 256 << 10;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Drive {
    /// A disk that is always there.
    pub fn disk(name: &str, spec: &DriveSpec, image: Arc<Image>, system: System) -> Self {
        Self::new(name, spec, Some(image), system, false, spec.block_size())
    }

    /// A CD-ROM drive, perhaps empty.
    pub fn cdrom(name: &str, spec: &DriveSpec, image: Option<Arc<Image>>, system: System) -> Self {
        Self::new(name, spec, image, system, true, 2048)
    }

    fn new(
        name: &str,
        spec: &DriveSpec,
        image: Option<Arc<Image>>,
        system: System,
        removable: bool,
        block_size: u32,
    ) -> Self {
        Self {
            name: name.into(),
            removable,
            block_size,
            medium: RwLock::new(image),
            tray: Mutex::default(),
            writeback: AtomicBool::new(spec.write_cache),
            listeners: Mutex::default(),
            workers: Mutex::default(),
            system,
            log: RateLimit::new(5, Duration::from_secs(10)),
            spec: spec.clone(),
        }
    }

    /// Its name, for messages and the monitor.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The properties it was made with.
    pub fn spec(&self) -> &DriveSpec {
        &self.spec
    }

    /// Whether media can be changed (a CD-ROM drive).
    pub fn is_removable(&self) -> bool {
        self.removable
    }

    /// Logical block size in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Physical block size in bytes.
    pub fn physical_block_size(&self) -> u32 {
        self.spec.physical_block_size.unwrap_or(self.block_size).max(self.block_size)
    }

    /// What is in the drive, if its tray is closed.
    pub fn medium(&self) -> Option<Arc<Image>> {
        if self.removable && lock(&self.tray).open {
            return None;
        }
        self.medium.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Number of logical blocks; 0 without a medium.
    pub fn blocks(&self) -> u64 {
        self.medium().map_or(0, |m| m.size() / u64::from(self.block_size))
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.removable || self.spec.read_only || self.medium().is_none_or(|m| m.is_read_only())
    }

    /// Whether the cache is write-back.
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// Switches the cache mode.
    pub fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::Relaxed);
    }

    /// Whether the guest may discard.
    pub fn discards(&self) -> bool {
        self.spec.discard && !self.is_read_only()
    }

    /// Granularity of discards in bytes.
    pub fn discard_granularity(&self) -> u32 {
        self.spec.discard_granularity.unwrap_or(self.block_size).max(self.block_size)
    }

    /// Whether reading never waits for a disk: the image is a flat file that lives in memory.
    pub fn is_in_memory(&self) -> bool {
        self.medium().is_some_and(|image| image.direct().is_some_and(|(fd, ..)| pieces::in_memory(fd)))
    }

    /// Connects the threads that wait where an error stops the machine.
    pub fn set_workers(&self, workers: &Arc<Workers>) {
        *lock(&self.workers) = Arc::downgrade(workers);
    }

    /// Calls `listener` about each event from now on. It must not call the drive's tray methods.
    pub fn listen(&self, listener: impl Fn(DriveEvent) + Send + Sync + 'static) {
        lock(&self.listeners).push(Box::new(listener));
    }

    fn tray_moved(&self, open: bool) {
        let data = serde_json::json!({ "device": self.name, "id": self.name, "tray-open": open });
        self.system.request(SystemRequest::Notice("DEVICE_TRAY_MOVED", data));
    }

    fn tell(&self, event: DriveEvent) {
        for listener in lock(&self.listeners).iter() {
            listener(event);
        }
    }

    // --- the user's side --------------------------------------------------------------------------------------------

    /// To be called after the image has been resized.
    pub fn resized(&self) {
        self.tell(DriveEvent::Resized);
    }

    /// Opens the tray and takes the medium out. Where the guest has locked the tray it is asked to open it, and the call
    /// fails, unless `force`.
    ///
    /// # Errors
    /// [`TrayError`].
    pub fn eject(&self, force: bool) -> Result<Option<Arc<Image>>, TrayError> {
        if !self.removable {
            return Err(TrayError::Fixed(self.name.clone()));
        }
        {
            let mut tray = lock(&self.tray);
            if tray.locked && !tray.open && !force {
                drop(tray);
                self.tell(DriveEvent::EjectRequested);
                return Err(TrayError::Locked(self.name.clone()));
            }
            *tray = Tray { open: true, locked: false };
        }
        self.tray_moved(true);
        let old = self.medium.write().unwrap_or_else(|e| e.into_inner()).take();
        self.tell(DriveEvent::MediumChanged);
        Ok(old)
    }

    /// Puts a medium in and closes the tray.
    ///
    /// # Errors
    /// [`TrayError`].
    pub fn insert(&self, image: Arc<Image>) -> Result<(), TrayError> {
        if !self.removable {
            return Err(TrayError::Fixed(self.name.clone()));
        }
        {
            let mut medium = self.medium.write().unwrap_or_else(|e| e.into_inner());
            if medium.is_some() {
                return Err(TrayError::Occupied(self.name.clone()));
            }
            *medium = Some(image);
            lock(&self.tray).open = false;
        }
        self.tray_moved(false);
        self.tell(DriveEvent::MediumChanged);
        Ok(())
    }

    /// Changes the medium: [`Self::eject`], then [`Self::insert`].
    ///
    /// # Errors
    /// [`TrayError`].
    pub fn change(&self, image: Arc<Image>, force: bool) -> Result<(), TrayError> {
        self.eject(force)?;
        self.insert(image)
    }

    // --- the guest's side -------------------------------------------------------------------------------------------

    /// Locks or unlocks the tray.
    pub fn lock_tray(&self, locked: bool) {
        lock(&self.tray).locked = locked;
    }

    /// Whether the guest has locked the tray.
    pub fn tray_locked(&self) -> bool {
        lock(&self.tray).locked
    }

    /// Whether the tray is open.
    pub fn tray_open(&self) -> bool {
        lock(&self.tray).open
    }

    /// The guest opens or closes the tray; `false` if it has locked it. What is in stays in: a user who wants it out
    /// calls [`Self::eject`].
    pub fn move_tray(&self, open: bool) -> bool {
        let mut tray = lock(&self.tray);
        if open && tray.locked {
            return false;
        }
        let moved = std::mem::replace(&mut tray.open, open) != open;
        drop(tray);
        if moved {
            self.tray_moved(open);
        }
        true
    }

    /// Back to power-on: tray closed and unlocked, the cache mode as configured. A medium that was ejected stays out.
    pub fn reset(&self) {
        *lock(&self.tray) = Tray::default();
        self.set_writeback(self.spec.write_cache);
    }

    /// Guest-visible state.
    pub fn save(&self) -> DriveSaved {
        let tray = *lock(&self.tray);
        DriveSaved { writeback: self.writeback(), tray_open: tray.open, tray_locked: tray.locked }
    }

    /// Restores [`Self::save`].
    pub fn load(&self, saved: &DriveSaved) {
        self.set_writeback(saved.writeback);
        *lock(&self.tray) =
            Tray { open: saved.tray_open && self.removable, locked: saved.tray_locked && self.removable };
    }

    fn image_for(&self, offset: u64, len: u64) -> Result<Arc<Image>, Fault> {
        let image = self.medium().ok_or(Fault::NoMedium)?;
        match offset.checked_add(len) {
            Some(end) if end <= image.size() => Ok(image),
            _ => Err(Fault::OutOfRange),
        }
    }

    /// Reads `len` bytes at byte `offset` of the disk into `buffer` from its byte `at`.
    ///
    /// # Errors
    /// [`Fault`]; part of the buffer may have been filled.
    pub fn read(&self, offset: u64, buffer: &mut Buffer<'_>, at: u64, len: u64) -> Result<(), Fault> {
        self.with_policy("read", false, || {
            let image = self.image_for(offset, len).map_err(Failure::Fault)?;
            read_image(&image, offset, buffer, at, len)
        })
    }

    /// Writes `len` bytes from byte `at` of `buffer` to byte `offset` of the disk; `durable` (or a write-through cache):
    /// they are on the disk when this returns.
    ///
    /// # Errors
    /// [`Fault`]; part may have been written.
    pub fn write(
        &self,
        offset: u64,
        buffer: &Buffer<'_>,
        at: u64,
        len: u64,
        durable: bool,
    ) -> Result<(), Fault> {
        self.with_policy("write", true, || {
            let image = self.writable(offset, len)?;
            write_image(&image, offset, buffer, at, len, durable || !self.writeback())
        })
    }

    fn writable(&self, offset: u64, len: u64) -> Result<Arc<Image>, Failure> {
        let image = self.image_for(offset, len).map_err(Failure::Fault)?;
        if self.removable || self.spec.read_only || image.is_read_only() {
            return Err(Failure::Fault(Fault::ReadOnly));
        }
        Ok(image)
    }

    /// Makes a range read as zeros; `unmap`: its space may be given back.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), Fault> {
        self.with_policy("write zeroes", true, || {
            let image = self.writable(offset, len)?;
            image.write_zeroes(offset, len, unmap && self.spec.discard).map_err(Failure::Host)?;
            if self.writeback() { Ok(()) } else { image.flush().map_err(Failure::Host) }
        })
    }

    /// Gives a range back; its contents are undefined then. Nothing happens where discarding is off.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), Fault> {
        self.with_policy("discard", true, || {
            let image = self.writable(offset, len)?;
            if !self.spec.discard || len == 0 {
                return Ok(());
            }
            image.discard(offset, len).map_err(Failure::Host)
        })
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn flush(&self) -> Result<(), Fault> {
        self.with_policy("flush", true, || match self.medium() {
            Some(image) => image.flush().map_err(Failure::Host),
            None => Ok(()),
        })
    }

    /// Does `attempt` until the policy is content.
    fn with_policy(
        &self,
        what: &str,
        write: bool,
        mut attempt: impl FnMut() -> Result<(), Failure>,
    ) -> Result<(), Fault> {
        loop {
            let error = match attempt() {
                Ok(()) => return Ok(()),
                Err(Failure::Fault(fault)) => return Err(fault),
                Err(Failure::Host(e)) => e,
            };
            match self.judge(what, write, &error) {
                Judgement::Report(fault) => return Err(fault),
                Judgement::Ignore => return Ok(()),
                Judgement::Stop => {
                    let workers = lock(&self.workers).upgrade();
                    self.stop_machine();
                    match workers.map(|w| w.stall()) {
                        Some(Verdict::Retry) => {}
                        Some(Verdict::Abandon) => return Err(Fault::Aborted),
                        None => return Err(Fault::Io),
                    }
                }
            }
        }
    }

    /// Asks for the machine to stop, because of an error of the host.
    pub fn stop_machine(&self) {
        self.system.request(SystemRequest::IoError(self.name.clone()));
    }

    /// What the policy says about an error of the host; it is logged.
    pub fn judge(&self, what: &str, write: bool, error: &block::Error) -> Judgement {
        if let Some(suppressed) = self.log.allow() {
            tracing::warn!(suppressed, "{}: {what}: {error}", self.name);
        }
        let space = error.errno() == libc::ENOSPC;
        let fault = if space { Fault::NoSpace } else { Fault::Io };
        let (judgement, action) = match if write { self.spec.werror } else { self.spec.rerror } {
            OnError::Report => (Judgement::Report(fault), "report"),
            OnError::Enospc if !space => (Judgement::Report(fault), "report"),
            OnError::Ignore => (Judgement::Ignore, "ignore"),
            OnError::Stop | OnError::Enospc => (Judgement::Stop, "stop"),
        };
        let data = serde_json::json!({
            "device": self.name,
            "operation": if write { "write" } else { "read" },
            "action": action,
            "nospace": space,
            "reason": error.to_string(),
        });
        self.system.request(SystemRequest::Notice("BLOCK_IO_ERROR", data));
        judgement
    }
}

/// What [`Drive::judge`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Tell the guest.
    Report(Fault),
    /// Pretend that nothing happened.
    Ignore,
    /// Stop the machine and try again later.
    Stop,
}

/// Guest-visible state of a drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveSaved {
    writeback: bool,
    tray_open: bool,
    tray_locked: bool,
}

enum Failure {
    Fault(Fault),
    Host(block::Error),
}

impl From<memory::Error> for Failure {
    fn from(_: memory::Error) -> Self {
        Failure::Fault(Fault::Memory)
    }
}

fn host(what: &str, e: io::Error) -> Failure {
    Failure::Host(block::Error::io(what, e))
}

/// Whether a transfer may go to the image's descriptor as it is.
fn fits(alignment: u32, at: u64, len: u64) -> bool {
    (at | len).is_multiple_of(u64::from(alignment.max(1)))
}

fn read_image(image: &Image, offset: u64, buffer: &mut Buffer<'_>, at: u64, len: u64) -> Result<(), Failure> {
    if buffer.len() < at.saturating_add(len) {
        return Err(Failure::Fault(Fault::Memory));
    }
    if let Buffer::Host(bytes) = buffer {
        return image.read_at(&mut bytes[at as usize..][..len as usize], offset).map_err(Failure::Host);
    }
    if let Some((fd, base, alignment)) = image.direct()
        && fits(alignment, base + offset, len)
        && let Some(mut pieces) = buffer.pieces(at, len)?
        && pieces.aligned(alignment as usize)
    {
        let result = pieces.read_all(fd, base + offset, 0);
        // Also on errors: how much came before is not known.
        buffer.wrote(at, len)?;
        let mut n = result.map_err(|e| host("read", e))?;
        while n < len {
            // The file ends there; what follows on the disk is zeros.
            let piece = (len - n).min(512);
            buffer.write(at + n, &[0; 512][..piece as usize])?;
            n += piece;
        }
        return Ok(());
    }
    let mut bounce = vec![0; len.min(BOUNCE) as usize];
    let mut done = 0;
    while done < len {
        let piece = &mut bounce[..(len - done).min(BOUNCE) as usize];
        image.read_at(piece, offset + done).map_err(Failure::Host)?;
        buffer.write(at + done, piece)?;
        done += piece.len() as u64;
    }
    Ok(())
}

fn write_image(
    image: &Image,
    offset: u64,
    buffer: &Buffer<'_>,
    at: u64,
    len: u64,
    durable: bool,
) -> Result<(), Failure> {
    if buffer.len() < at.saturating_add(len) {
        return Err(Failure::Fault(Fault::Memory));
    }
    if let Buffer::Host(bytes) = buffer {
        image.write_at(&bytes[at as usize..][..len as usize], offset).map_err(Failure::Host)?;
    } else if let Some((fd, base, alignment)) = image.direct()
        && fits(alignment, base + offset, len)
        && let Some(mut pieces) = buffer.pieces(at, len)?
        && pieces.aligned(alignment as usize)
    {
        return match pieces.write_all(fd, base + offset, 0, durable) {
            Ok(n) if n == len => Ok(()),
            Ok(_) => Err(host("write", io::ErrorKind::WriteZero.into())),
            Err(e) => Err(host("write", e)),
        };
    } else {
        let mut bounce = vec![0; len.min(BOUNCE) as usize];
        let mut done = 0;
        while done < len {
            let piece = &mut bounce[..(len - done).min(BOUNCE) as usize];
            buffer.read(at + done, piece)?;
            image.write_at(piece, offset + done).map_err(Failure::Host)?;
            done += piece.len() as u64;
        }
    }
    if durable { image.flush().map_err(Failure::Host) } else { Ok(()) }
}
