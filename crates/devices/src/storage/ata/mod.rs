//! ATA drives (ACS-3): disks, and CD-ROM drives that take SCSI commands in packets (ATAPI). Host adapters (AHCI, PIIX
//! IDE) give a drive the contents of its registers; it says what is to be done, and does it.

mod bus;
mod identify;
mod models;
#[cfg(test)]
pub(crate) mod tests;

pub use bus::IdeBus;
pub use models::{CD, HD};

use super::scsi::{self, Lun, LunSaved};
use super::{Buffer, Drive, DriveSaved, Fault};
use ::bus::StateError;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard};

/// Unit of addresses on ATA disks.
pub const SECTOR: u64 = 512;
/// Bytes of a command packet.
pub const PACKET: usize = 12;
/// Most sectors that READ and WRITE MULTIPLE move at once.
pub const MAX_MULTIPLE: u8 = 16;

/// Status register bits.
pub mod status {
    /// Busy.
    pub const BSY: u8 = 0x80;
    /// Ready.
    pub const DRDY: u8 = 0x40;
    /// Device fault.
    pub const DF: u8 = 0x20;
    /// Seek complete; means nothing any more, but guests look for it.
    pub const DSC: u8 = 0x10;
    /// Data request.
    pub const DRQ: u8 = 0x08;
    /// Error.
    pub const ERR: u8 = 0x01;
}

/// Error register bits.
pub mod error {
    /// Aborted.
    pub const ABRT: u8 = 0x04;
    /// Address not found.
    pub const IDNF: u8 = 0x10;
    /// Data cannot be read.
    pub const UNC: u8 = 0x40;
}

/// Command codes.
pub mod command {
    #![allow(missing_docs)] // the standard's own names
    pub const NOP: u8 = 0x00;
    pub const DATA_SET_MANAGEMENT: u8 = 0x06;
    pub const DEVICE_RESET: u8 = 0x08;
    pub const READ: u8 = 0x20;
    pub const READ_NORETRY: u8 = 0x21;
    pub const READ_EXT: u8 = 0x24;
    pub const READ_DMA_EXT: u8 = 0x25;
    pub const READ_NATIVE_MAX_EXT: u8 = 0x27;
    pub const READ_MULTIPLE_EXT: u8 = 0x29;
    pub const READ_LOG_EXT: u8 = 0x2f;
    pub const WRITE: u8 = 0x30;
    pub const WRITE_NORETRY: u8 = 0x31;
    pub const WRITE_EXT: u8 = 0x34;
    pub const WRITE_DMA_EXT: u8 = 0x35;
    pub const WRITE_MULTIPLE_EXT: u8 = 0x39;
    pub const WRITE_DMA_FUA_EXT: u8 = 0x3d;
    pub const VERIFY: u8 = 0x40;
    pub const VERIFY_NORETRY: u8 = 0x41;
    pub const VERIFY_EXT: u8 = 0x42;
    pub const READ_LOG_DMA_EXT: u8 = 0x47;
    pub const READ_FPDMA: u8 = 0x60;
    pub const WRITE_FPDMA: u8 = 0x61;
    pub const SEEK: u8 = 0x70;
    pub const DIAGNOSE: u8 = 0x90;
    pub const INITIALIZE_PARAMETERS: u8 = 0x91;
    pub const PACKET: u8 = 0xa0;
    pub const IDENTIFY_PACKET: u8 = 0xa1;
    pub const SMART: u8 = 0xb0;
    pub const READ_MULTIPLE: u8 = 0xc4;
    pub const WRITE_MULTIPLE: u8 = 0xc5;
    pub const SET_MULTIPLE: u8 = 0xc6;
    pub const READ_DMA: u8 = 0xc8;
    pub const READ_DMA_NORETRY: u8 = 0xc9;
    pub const WRITE_DMA: u8 = 0xca;
    pub const WRITE_DMA_NORETRY: u8 = 0xcb;
    pub const WRITE_MULTIPLE_FUA_EXT: u8 = 0xce;
    pub const STANDBY_IMMEDIATE: u8 = 0xe0;
    pub const IDLE_IMMEDIATE: u8 = 0xe1;
    pub const STANDBY: u8 = 0xe2;
    pub const IDLE: u8 = 0xe3;
    pub const CHECK_POWER: u8 = 0xe5;
    pub const SLEEP: u8 = 0xe6;
    pub const FLUSH: u8 = 0xe7;
    pub const FLUSH_EXT: u8 = 0xea;
    pub const IDENTIFY: u8 = 0xec;
    pub const SET_FEATURES: u8 = 0xef;
    pub const READ_NATIVE_MAX: u8 = 0xf8;
}

/// The registers of a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Taskfile {
    /// Command code.
    pub command: u8,
    /// Features, with the previous contents above.
    pub features: u16,
    /// Count, with the previous contents above.
    pub count: u16,
    /// LBA low, mid, high, and their previous contents above.
    pub lba: u64,
    /// Device register.
    pub device: u8,
}

/// What the registers say afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// Status.
    pub status: u8,
    /// Error.
    pub error: u8,
    /// Count, if the command gives it.
    pub count: Option<u16>,
    /// LBA, if the command gives it.
    pub lba: Option<u64>,
}

impl Reply {
    /// Done.
    pub const OK: Self = Self { status: status::DRDY | status::DSC, error: 0, count: None, lba: None };

    /// Failed, with these error bits.
    pub const fn failed(error: u8) -> Self {
        Self { status: status::DRDY | status::DSC | status::ERR, error, count: None, lba: None }
    }

    /// Whether it is an error.
    pub fn is_error(&self) -> bool {
        self.status & status::ERR != 0
    }
}

/// How data moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// Through the data register, so many sectors at a time.
    Pio(u8),
    /// By the host adapter.
    Dma,
    /// The same, many commands at once (NCQ); the tag.
    Queued(u8),
}

/// What a command is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Nothing more.
    Done(Reply),
    /// Give these bytes.
    Give(Protocol, Vec<u8>),
    /// Read sectors.
    Read(Protocol, Extent),
    /// Write sectors; `true`: durably.
    Write(Protocol, Extent, bool),
    /// Take so many bytes of ranges and discard these.
    Trim(u64),
    /// Write everything out.
    Flush,
    /// Take a command packet. DMA or not, and the byte count limit of PIO.
    Packet(Protocol, u16),
}

/// A range of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First sector.
    pub lba: u64,
    /// Number of sectors; not 0.
    pub sectors: u32,
}

impl Action {
    /// How its data moves, if it has any.
    pub fn protocol(&self) -> Option<Protocol> {
        match self {
            Action::Give(p, _) | Action::Read(p, _) | Action::Write(p, ..) | Action::Packet(p, _) => Some(*p),
            Action::Trim(_) => Some(Protocol::Dma),
            Action::Done(_) | Action::Flush => None,
        }
    }

    /// Bytes of data, if the command says so.
    pub fn len(&self) -> u64 {
        match self {
            Action::Give(_, data) => data.len() as u64,
            Action::Read(_, e) | Action::Write(_, e, _) => u64::from(e.sectors) * SECTOR,
            Action::Trim(len) => *len,
            _ => 0,
        }
    }

    /// Whether there is no data (or none that the registers tell of).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DriveState {
    heads: u8,
    sectors: u8,
    multiple: u8,
    /// Mode bits of words 63 and 88, as selected.
    mwdma: u8,
    udma: u8,
    smart: bool,
    /// Tag, error and address of the queued command that failed last (log page 10h).
    queued_error: Option<(u8, u8, u64)>,
}

/// What tells the drive's kind and names.
#[derive(Clone, Debug)]
pub struct AtaIdentity {
    /// Model, up to 40 characters.
    pub model: String,
    /// Serial number, up to 20 characters.
    pub serial: String,
    /// Firmware revision, up to 8 characters.
    pub firmware: String,
    /// World wide name.
    pub wwn: Option<u64>,
}

/// An ATA or ATAPI drive.
#[derive(Debug)]
pub struct AtaDrive {
    drive: Arc<Drive>,
    /// Of CD-ROM drives: what takes the packets.
    lun: Option<Lun>,
    identity: AtaIdentity,
    state: Mutex<DriveState>,
}

/// Guest-visible state of a drive.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AtaSaved {
    state: DriveState,
    drive: DriveSaved,
    lun: Option<LunSaved>,
}

fn initial_state() -> DriveState {
    DriveState {
        heads: 16,
        sectors: 63,
        multiple: MAX_MULTIPLE,
        mwdma: 0,
        udma: 5,
        smart: true,
        queued_error: None,
    }
}

impl AtaDrive {
    /// A disk.
    pub fn disk(drive: Arc<Drive>, identity: AtaIdentity) -> Self {
        Self { drive, lun: None, identity, state: Mutex::new(initial_state()) }
    }

    /// A CD-ROM drive.
    pub fn cdrom(lun: Lun, identity: AtaIdentity) -> Self {
        Self { drive: lun.drive().clone(), lun: Some(lun), identity, state: Mutex::new(initial_state()) }
    }

    /// What the image is in.
    pub fn drive(&self) -> &Arc<Drive> {
        &self.drive
    }

    /// Whether it takes packets.
    pub fn is_packet(&self) -> bool {
        self.lun.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, DriveState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What the registers hold after a reset (ACS-3, 9.1): count, LBA, and status.
    pub fn signature(&self) -> (u16, u64, u8) {
        if self.is_packet() { (1, 0xeb_1401, 0) } else { (1, 1, status::DRDY | status::DSC) }
    }

    /// Power on.
    pub fn reset(&self) {
        *self.lock() = initial_state();
        match &self.lun {
            Some(lun) => lun.reset(),
            None => self.drive.reset(),
        }
    }

    /// A reset by the host adapter: most settings stay.
    pub fn soft_reset(&self) {
        self.lock().queued_error = None;
        if let Some(lun) = &self.lun {
            lun.attend(scsi::Sense::RESET);
        }
    }

    /// Guest-visible state.
    pub fn save(&self) -> AtaSaved {
        let state = self.lock().clone();
        AtaSaved { state, drive: self.drive.save(), lun: self.lun.as_ref().map(Lun::save) }
    }

    /// Restores [`Self::save`].
    ///
    /// # Errors
    /// A state of the other kind of drive.
    pub fn load(&self, saved: AtaSaved) -> Result<(), StateError> {
        let AtaSaved { mut state, drive, lun } = saved;
        if lun.is_some() != self.lun.is_some() {
            let reason = "a disk is not a CD-ROM drive".into();
            return Err(StateError::Invalid { kind: "ata".into(), reason });
        }
        state.heads = state.heads.clamp(1, 16);
        state.sectors = state.sectors.max(1);
        state.multiple = state.multiple.min(MAX_MULTIPLE);
        *self.lock() = state;
        match (&self.lun, lun) {
            (Some(unit), Some(lun)) => unit.load(lun),
            _ => self.drive.load(&drive),
        }
        Ok(())
    }

    /// What a command is to do. Quick: nothing goes to the image.
    pub fn begin(&self, t: &Taskfile) -> Action {
        use command::*;
        if self.is_packet() {
            return self.begin_packet(t);
        }
        let multiple = self.lock().multiple;
        let by_block = |action: fn(Protocol, Extent) -> Action, ext: bool| {
            if multiple == 0 {
                return Action::Done(Reply::failed(error::ABRT));
            }
            self.on_extent(t, ext, |e| action(Protocol::Pio(multiple), e))
        };
        let write = |p, e| Action::Write(p, e, false);
        match t.command {
            READ | READ_NORETRY => self.on_extent(t, false, |e| Action::Read(Protocol::Pio(1), e)),
            READ_EXT => self.on_extent(t, true, |e| Action::Read(Protocol::Pio(1), e)),
            READ_MULTIPLE => by_block(Action::Read, false),
            READ_MULTIPLE_EXT => by_block(Action::Read, true),
            READ_DMA | READ_DMA_NORETRY => self.on_extent(t, false, |e| Action::Read(Protocol::Dma, e)),
            READ_DMA_EXT => self.on_extent(t, true, |e| Action::Read(Protocol::Dma, e)),
            WRITE | WRITE_NORETRY => self.on_extent(t, false, |e| write(Protocol::Pio(1), e)),
            WRITE_EXT => self.on_extent(t, true, |e| write(Protocol::Pio(1), e)),
            WRITE_MULTIPLE => by_block(|p, e| Action::Write(p, e, false), false),
            WRITE_MULTIPLE_EXT => by_block(|p, e| Action::Write(p, e, false), true),
            WRITE_MULTIPLE_FUA_EXT => by_block(|p, e| Action::Write(p, e, true), true),
            WRITE_DMA | WRITE_DMA_NORETRY => self.on_extent(t, false, |e| write(Protocol::Dma, e)),
            WRITE_DMA_EXT => self.on_extent(t, true, |e| write(Protocol::Dma, e)),
            WRITE_DMA_FUA_EXT => self.on_extent(t, true, |e| Action::Write(Protocol::Dma, e, true)),
            READ_FPDMA | WRITE_FPDMA => self.begin_queued(t),
            VERIFY | VERIFY_NORETRY => self.on_extent(t, false, |_| Action::Done(Reply::OK)),
            VERIFY_EXT => self.on_extent(t, true, |_| Action::Done(Reply::OK)),
            DATA_SET_MANAGEMENT if t.features & 0xff == 1 && self.drive.discards() => {
                let blocks = if t.count == 0 { 1 << 16 } else { u64::from(t.count) };
                Action::Trim(blocks * SECTOR)
            }
            FLUSH | FLUSH_EXT => Action::Flush,
            IDENTIFY => Action::Give(Protocol::Pio(1), self.identify_disk()),
            READ_LOG_EXT => self.read_log(t, Protocol::Pio(1)),
            READ_LOG_DMA_EXT => self.read_log(t, Protocol::Dma),
            READ_NATIVE_MAX | READ_NATIVE_MAX_EXT => {
                let last = self.drive.blocks().saturating_sub(1);
                let most = if t.command == READ_NATIVE_MAX { 0xfff_ffff } else { (1 << 48) - 1 };
                Action::Done(Reply { lba: Some(last.min(most)), ..Reply::OK })
            }
            INITIALIZE_PARAMETERS => {
                let (heads, sectors) = ((t.device & 0xf) + 1, t.count as u8);
                if sectors == 0 {
                    return Action::Done(Reply::failed(error::ABRT));
                }
                let mut state = self.lock();
                (state.heads, state.sectors) = (heads, sectors);
                Action::Done(Reply::OK)
            }
            SET_MULTIPLE => {
                let n = t.count as u8;
                if n > MAX_MULTIPLE || n != 0 && !n.is_power_of_two() {
                    return Action::Done(Reply::failed(error::ABRT));
                }
                self.lock().multiple = n;
                Action::Done(Reply::OK)
            }
            SMART => self.smart(t),
            0x10..=0x1f | SEEK => Action::Done(Reply::OK), // and RECALIBRATE
            _ => self.common(t),
        }
    }

    fn begin_packet(&self, t: &Taskfile) -> Action {
        use command::*;
        let (count, lba, _) = self.signature();
        match t.command {
            PACKET => {
                let by_dma = t.features & 1 != 0;
                let limit = (t.lba >> 8 & 0xffff) as u16;
                Action::Packet(if by_dma { Protocol::Dma } else { Protocol::Pio(1) }, limit)
            }
            IDENTIFY_PACKET => Action::Give(Protocol::Pio(1), self.identify_packet()),
            // These tell a driver that packets are wanted (ACS-3, 7.12).
            IDENTIFY | READ => {
                Action::Done(Reply { count: Some(count), lba: Some(lba), ..Reply::failed(error::ABRT) })
            }
            DEVICE_RESET => {
                self.soft_reset();
                Action::Done(Reply { status: 0, error: 1, count: Some(count), lba: Some(lba) })
            }
            FLUSH | FLUSH_EXT => Action::Done(Reply::OK),
            _ => self.common(t),
        }
    }

    /// Commands of both kinds of drive.
    fn common(&self, t: &Taskfile) -> Action {
        use command::*;
        Action::Done(match t.command {
            SET_FEATURES => return self.set_features(t),
            STANDBY_IMMEDIATE | IDLE_IMMEDIATE | STANDBY | IDLE | SLEEP => Reply::OK,
            // The codes of ATA-1 that some systems still send.
            0x94..=0x97 | 0x99 => Reply::OK,
            CHECK_POWER | 0x98 => Reply { count: Some(0xff), ..Reply::OK },
            DIAGNOSE => {
                let (count, lba, status) = self.signature();
                Reply { status, error: 1, count: Some(count), lba: Some(lba) }
            }
            _ => Reply::failed(error::ABRT),
        })
    }

    /// The sectors that the registers name, by cylinder, head and sector, 28-bit or 48-bit address.
    fn on_extent(&self, t: &Taskfile, ext: bool, make: impl FnOnce(Extent) -> Action) -> Action {
        let refused = Action::Done(Reply { lba: Some(t.lba), ..Reply::failed(error::IDNF) });
        let (lba, sectors) = if ext {
            let count = if t.count == 0 { 1 << 16 } else { u32::from(t.count) };
            (t.lba & 0xffff_ffff_ffff, count)
        } else {
            let count = if t.count & 0xff == 0 { 256 } else { u32::from(t.count & 0xff) };
            if t.device & 0x40 != 0 {
                (t.lba & 0xff_ffff | u64::from(t.device & 0xf) << 24, count)
            } else {
                let (heads, per_track) = {
                    let s = self.lock();
                    (u64::from(s.heads), u64::from(s.sectors))
                };
                let (sector, cylinder) = (t.lba & 0xff, t.lba >> 8 & 0xffff);
                if sector == 0 {
                    return refused;
                }
                ((cylinder * heads + u64::from(t.device & 0xf)) * per_track + sector - 1, count)
            }
        };
        // Below 2^48 + 2^16.
        if lba + u64::from(sectors) > self.drive.blocks() {
            return refused;
        }
        make(Extent { lba, sectors })
    }

    fn begin_queued(&self, t: &Taskfile) -> Action {
        let tag = (t.count >> 3 & 0x1f) as u8;
        // The count is in the features; otherwise the registers are those of a 48-bit command.
        let as_ext = Taskfile { count: t.features, ..*t };
        let durable = t.device & 0x80 != 0;
        let write = t.command == command::WRITE_FPDMA;
        let action = self.on_extent(&as_ext, true, |e| {
            if write {
                Action::Write(Protocol::Queued(tag), e, durable)
            } else {
                Action::Read(Protocol::Queued(tag), e)
            }
        });
        if let Action::Done(reply) = &action {
            self.note_queued_error(tag, reply.error, t.lba);
        }
        action
    }

    fn note_queued_error(&self, tag: u8, error: u8, lba: u64) {
        self.lock().queued_error = Some((tag, error, lba));
    }

    fn set_features(&self, t: &Taskfile) -> Action {
        let ok = Action::Done(Reply::OK);
        match t.features & 0xff {
            0x02 if !self.is_packet() => {
                self.drive.set_writeback(true);
                ok
            }
            0x82 if !self.is_packet() => {
                self.drive.set_writeback(false);
                Action::Flush
            }
            0x03 => {
                let (kind, mode) = ((t.count as u8) >> 3, t.count as u8 & 7);
                let mut state = self.lock();
                match kind {
                    0 | 1 => (state.mwdma, state.udma) = (0, 0), // PIO
                    4 if mode <= 2 => (state.mwdma, state.udma) = (1 << mode, 0),
                    8 if mode <= 5 => (state.mwdma, state.udma) = (0, 1 << mode),
                    _ => return Action::Done(Reply::failed(error::ABRT)),
                }
                ok
            }
            // Look-ahead, reverting to defaults, power management: nothing here depends on them.
            0x05 | 0x42 | 0x55 | 0x66 | 0x85 | 0xaa | 0xc2 | 0xcc => ok,
            _ => Action::Done(Reply::failed(error::ABRT)),
        }
    }

    /// SMART (ACS-3, 7.48): a healthy drive with empty logs.
    fn smart(&self, t: &Taskfile) -> Action {
        if t.lba >> 8 & 0xffff != 0xc24f {
            return Action::Done(Reply::failed(error::ABRT));
        }
        let enabled = self.lock().smart;
        let ok = Action::Done(Reply::OK);
        match t.features & 0xff {
            0xd8 => {
                self.lock().smart = true;
                ok
            }
            _ if !enabled => Action::Done(Reply::failed(error::ABRT)),
            0xd9 => {
                self.lock().smart = false;
                ok
            }
            0xd0 => Action::Give(Protocol::Pio(1), identify::smart_data()),
            0xd1 => Action::Give(Protocol::Pio(1), identify::smart_thresholds()),
            0xd2 | 0xd3 => ok, // autosave
            0xd4 => match t.lba as u8 {
                0 | 1 | 2 | 0x7f => ok, // self-tests pass at once
                _ => Action::Done(Reply::failed(error::ABRT)),
            },
            0xd5 => identify::smart_log(t.lba as u8)
                .map_or(Action::Done(Reply::failed(error::ABRT)), |log| Action::Give(Protocol::Pio(1), log)),
            0xda => Action::Done(Reply { lba: Some(0xc2_4f00 | t.lba & 0xff), ..Reply::OK }),
            _ => Action::Done(Reply::failed(error::ABRT)),
        }
    }

    /// READ LOG (ACS-3, 7.24): the directory, and the error of a queued command.
    fn read_log(&self, t: &Taskfile, protocol: Protocol) -> Action {
        let (log, page) = (t.lba as u8, t.lba >> 8 & 0xff | t.lba >> 24 & 0xff00);
        if t.count != 1 || page != 0 {
            return Action::Done(Reply::failed(error::ABRT));
        }
        let mut data = vec![0; 512];
        match log {
            0x00 => {
                data[0] = 1;
                data[0x20] = 1; // page 10h
            }
            0x10 => {
                match self.lock().queued_error.take() {
                    Some((tag, error, lba)) => {
                        data[0] = tag;
                        data[2] = status::DRDY | status::DSC | status::ERR;
                        data[3] = error;
                        let b = lba.to_le_bytes();
                        data[4..7].copy_from_slice(&b[..3]);
                        data[7] = 0x40;
                        data[8..11].copy_from_slice(&b[3..6]);
                    }
                    None => data[0] = 0x80, // not a queued command
                }
                let sum = data.iter().fold(0u8, |a, b| a.wrapping_add(*b));
                data[511] = sum.wrapping_neg();
            }
            _ => return Action::Done(Reply::failed(error::ABRT)),
        }
        Action::Give(protocol, data)
    }

    /// Does what goes to the image. `at` is where in `buffer` the data is. May wait.
    pub fn perform(&self, action: &Action, buffer: &mut Buffer<'_>, at: u64) -> Reply {
        let (result, lba) = match action {
            Action::Done(reply) => return *reply,
            Action::Give(_, data) => {
                return if buffer.write(at, data).is_ok() { Reply::OK } else { Reply::failed(error::ABRT) };
            }
            Action::Packet(..) => return Reply::failed(error::ABRT), // adapters call `packet`
            Action::Read(_, e) => {
                (self.drive.read(e.lba * SECTOR, buffer, at, u64::from(e.sectors) * SECTOR), e.lba)
            }
            Action::Write(_, e, durable) => {
                let len = u64::from(e.sectors) * SECTOR;
                (self.drive.write(e.lba * SECTOR, buffer, at, len, *durable), e.lba)
            }
            Action::Flush => (self.drive.flush(), 0),
            Action::Trim(len) => (self.trim(*len, buffer, at), 0),
        };
        let error = match result {
            Ok(()) => return Reply::OK,
            Err(Fault::OutOfRange) => error::IDNF,
            Err(Fault::Io) if matches!(action, Action::Read(..)) => error::UNC,
            Err(_) => error::ABRT,
        };
        if let Some(Protocol::Queued(tag)) = action.protocol() {
            self.note_queued_error(tag, error, lba);
        }
        Reply { lba: Some(lba), ..Reply::failed(error) }
    }

    /// Ranges of DATA SET MANAGEMENT: 48 bits of address and 16 of length each.
    fn trim(&self, len: u64, buffer: &mut Buffer<'_>, at: u64) -> Result<(), Fault> {
        let mut done = 0;
        let mut block = [0; SECTOR as usize];
        while done < len.min(buffer.len().saturating_sub(at)) {
            buffer.read(at + done, &mut block)?;
            done += SECTOR;
            for entry in block.as_chunks::<8>().0 {
                let entry = u64::from_le_bytes(*entry);
                let (lba, sectors) = (entry & 0xffff_ffff_ffff, entry >> 48);
                if sectors > 0 {
                    self.drive.discard(lba * SECTOR, sectors * SECTOR)?;
                }
            }
        }
        Ok(())
    }

    /// Carries out a command packet. Returns the registers and the bytes moved.
    pub fn packet(&self, packet: &[u8; PACKET], buffer: &mut Buffer<'_>) -> (Reply, u64) {
        let Some(lun) = &self.lun else { return (Reply::failed(error::ABRT), 0) };
        let outcome = lun.execute(packet, buffer);
        let reply = match outcome.sense {
            // The sense key is in the upper half of the error register.
            Some(sense) => Reply { error: sense.key << 4 | error::ABRT, ..Reply::failed(0) },
            None if outcome.status != scsi::GOOD => Reply::failed(error::ABRT),
            None => Reply::OK,
        };
        (Reply { count: Some(3), ..reply }, outcome.done)
    }

    /// Whether a packet command takes data from the host.
    pub fn packet_takes_data(&self, packet: &[u8; PACKET]) -> bool {
        self.lun.as_ref().is_some_and(|lun| lun.takes_data(packet))
    }
}
