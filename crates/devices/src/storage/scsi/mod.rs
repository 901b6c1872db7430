//! SCSI logical units: disks (SBC-3) and CD-ROM drives (MMC-6), for every transport that carries command blocks.

mod block;
mod bus;
mod inquiry;
mod mmc;
mod mode;
mod models;
mod sense;
#[cfg(test)]
mod tests;

pub use bus::{LunAddress, ScsiBus, ScsiBusEvent, ScsiBusSaved};
pub use mmc::media_read;
pub use models::{CD, HD};
pub(in crate::storage) use models::{boot_class, open_drive};
pub use sense::{CHECK_CONDITION, Failure, GOOD, SENSE_LEN, Sense, TASK_ABORTED};

use super::{Buffer, Drive, DriveEvent, DriveSaved};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard};

/// Longest command block.
pub const CDB_LEN: usize = 32;

/// What kind of unit it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LunKind {
    /// A direct-access disk.
    Disk,
    /// A CD/DVD drive.
    Cdrom,
}

/// What a unit says it is.
#[derive(Clone, Debug)]
pub struct LunIdentity {
    /// Vendor, up to 8 characters.
    pub vendor: String,
    /// Product, up to 16 characters.
    pub product: String,
    /// Revision, up to 4 characters.
    pub version: String,
    /// Serial number; without one there is no such page.
    pub serial: Option<String>,
    /// Name that tells it from others on the machine.
    pub device_id: String,
    /// World wide name.
    pub wwn: Option<u64>,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Status byte.
    pub status: u8,
    /// Sense data of a [`CHECK_CONDITION`].
    pub sense: Option<Sense>,
    /// Bytes moved.
    pub done: u64,
    /// Bytes that the command would have moved, had there been room.
    pub wanted: u64,
    /// The data's memory was not there.
    pub bad_memory: bool,
}

impl Outcome {
    /// A refusal.
    pub fn check(sense: Sense) -> Self {
        Self { status: CHECK_CONDITION, sense: Some(sense), done: 0, wanted: 0, bad_memory: false }
    }
}

/// Bytes moved and bytes wanted.
type Moved = Result<(u64, u64), Failure>;
const NOTHING: Moved = Ok((0, 0));

/// A logical unit.
#[derive(Debug)]
pub struct Lun {
    kind: LunKind,
    drive: Arc<Drive>,
    identity: LunIdentity,
    state: Arc<Mutex<LunState>>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LunState {
    /// Unit attention conditions that wait to be told.
    attention: Vec<Sense>,
    /// What REQUEST SENSE tells.
    sense: Option<Sense>,
    stopped: bool,
    /// The latest media event (MMC-6, 6.6.3.5).
    media_event: u8,
}

/// Guest-visible state of a unit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LunSaved {
    state: LunState,
    drive: DriveSaved,
}

/// Unit attention conditions kept; the rest is dropped, as SPC-4 (5.14) allows.
const ATTENTIONS: usize = 4;

impl LunState {
    fn attend(&mut self, sense: Sense) {
        if !self.attention.contains(&sense) && self.attention.len() < ATTENTIONS {
            self.attention.push(sense);
        }
    }
}

fn lock(state: &Mutex<LunState>) -> MutexGuard<'_, LunState> {
    state.lock().unwrap_or_else(|e| e.into_inner())
}

impl Lun {
    /// A unit on a drive.
    pub fn new(kind: LunKind, drive: Arc<Drive>, identity: LunIdentity) -> Self {
        let state = Arc::new(Mutex::new(LunState::default()));
        let (heard, watched) = (Arc::downgrade(&state), Arc::downgrade(&drive));
        drive.listen(move |event| {
            let (Some(state), Some(drive)) = (heard.upgrade(), watched.upgrade()) else { return };
            let mut state = lock(&state);
            match event {
                DriveEvent::Resized => state.attend(Sense::CAPACITY_CHANGED),
                DriveEvent::EjectRequested => state.media_event = mmc::EVENT_EJECT_REQUEST,
                DriveEvent::MediumChanged if drive.medium().is_some() => {
                    state.attend(Sense::MEDIUM_CHANGED);
                    state.media_event = mmc::EVENT_NEW_MEDIA;
                }
                DriveEvent::MediumChanged => state.media_event = mmc::EVENT_MEDIA_REMOVAL,
            }
        });
        let lun = Self { kind, drive, identity, state };
        lun.reset();
        lun
    }

    /// The drive.
    pub fn drive(&self) -> &Arc<Drive> {
        &self.drive
    }

    /// What kind of unit it is.
    pub fn kind(&self) -> LunKind {
        self.kind
    }

    /// Power on, or a reset of the unit.
    pub fn reset(&self) {
        self.drive.reset();
        let mut state = lock(&self.state);
        *state = LunState::default();
        state.attend(Sense::RESET);
    }

    /// A unit attention condition, told with the next command.
    pub fn attend(&self, sense: Sense) {
        lock(&self.state).attend(sense);
    }

    /// Guest-visible state.
    pub fn save(&self) -> LunSaved {
        LunSaved { state: lock(&self.state).clone(), drive: self.drive.save() }
    }

    /// Restores [`Self::save`].
    pub fn load(&self, saved: LunSaved) {
        let mut state = saved.state;
        state.attention.truncate(ATTENTIONS);
        *lock(&self.state) = state;
        self.drive.load(&saved.drive);
    }

    /// Whether the command may take long: it goes to the image.
    pub fn is_slow(cdb: &[u8]) -> bool {
        use opcode::*;
        matches!(
            cdb.first().copied().unwrap_or_default(),
            READ_6
                | WRITE_6
                | READ_10
                | WRITE_10
                | WRITE_VERIFY_10
                | VERIFY_10
                | SYNCHRONIZE_CACHE_10
                | WRITE_SAME_10
                | UNMAP
                | READ_16
                | WRITE_16
                | WRITE_VERIFY_16
                | VERIFY_16
                | SYNCHRONIZE_CACHE_16
                | WRITE_SAME_16
                | READ_12
                | WRITE_12
                | WRITE_VERIFY_12
                | VERIFY_12
                | READ_CD
                | START_STOP_UNIT
        )
    }

    /// Whether the command takes data, rather than give some.
    pub fn takes_data(&self, cdb: &[u8]) -> bool {
        use opcode::*;
        match cdb.first().copied().unwrap_or_default() {
            MODE_SELECT_6 | MODE_SELECT_10 => true,
            WRITE_6 | WRITE_10 | WRITE_12 | WRITE_16 | WRITE_VERIFY_10 | WRITE_VERIFY_12
            | WRITE_VERIFY_16 | VERIFY_10 | VERIFY_12 | VERIFY_16 | WRITE_SAME_10 | WRITE_SAME_16 | UNMAP => {
                self.kind == LunKind::Disk
            }
            _ => false,
        }
    }

    /// Carries a command out. `buffer` is what it fills or takes.
    pub fn execute(&self, cdb: &[u8], buffer: &mut Buffer<'_>) -> Outcome {
        let mut block = [0; CDB_LEN];
        let n = cdb.len().min(CDB_LEN);
        block[..n].copy_from_slice(&cdb[..n]);
        if let Some(sense) = self.pending_attention(block[0]) {
            return self.finish(Err(sense.into()));
        }
        let result = self.dispatch(&block, buffer);
        self.finish(result)
    }

    fn finish(&self, result: Moved) -> Outcome {
        let (status, sense, (done, wanted), bad_memory) = match result {
            Ok(moved) => (GOOD, None, moved, false),
            Err(Failure::Check(sense)) => (CHECK_CONDITION, Some(self.refine(sense)), (0, 0), false),
            Err(Failure::Memory) => (CHECK_CONDITION, Some(Sense::INVALID_FIELD), (0, 0), true),
            Err(Failure::Aborted) => (TASK_ABORTED, None, (0, 0), false),
        };
        if sense.is_some() {
            lock(&self.state).sense = sense;
        }
        Outcome { status, sense, done, wanted, bad_memory }
    }

    /// "No medium" says whether the tray is open.
    fn refine(&self, sense: Sense) -> Sense {
        if sense == Sense::NO_MEDIUM && self.drive.tray_open() { Sense::TRAY_OPEN } else { sense }
    }

    /// The condition that is told instead of carrying the command out (SPC-4, 5.14).
    fn pending_attention(&self, operation: u8) -> Option<Sense> {
        use opcode::*;
        let exempt = [INQUIRY, REPORT_LUNS, REQUEST_SENSE, GET_CONFIGURATION, GET_EVENT_STATUS];
        if exempt.contains(&operation) {
            return None;
        }
        let mut state = lock(&self.state);
        if state.attention.is_empty() { None } else { Some(state.attention.remove(0)) }
    }

    fn dispatch(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        use opcode::*;
        match cdb[0] {
            TEST_UNIT_READY => self.ready().map(|()| (0, 0)),
            REQUEST_SENSE => self.request_sense(cdb, buffer),
            INQUIRY => self.inquiry(cdb, buffer),
            REPORT_LUNS => self.report_luns(cdb, buffer),
            MODE_SENSE_6 | MODE_SENSE_10 => self.mode_sense(cdb, buffer),
            MODE_SELECT_6 | MODE_SELECT_10 => self.mode_select(cdb, buffer),
            START_STOP_UNIT => self.start_stop(cdb),
            PREVENT_ALLOW => self.prevent_allow(cdb),
            // The default self test, which passes.
            SEND_DIAGNOSTIC if cdb[1] & 0x04 != 0 => NOTHING,
            _ => match self.kind {
                LunKind::Disk => self.disk_command(cdb, buffer),
                LunKind::Cdrom => self.cdrom_command(cdb, buffer),
            },
        }
    }

    fn ready(&self) -> Result<(), Failure> {
        if self.drive.medium().is_none() {
            return Err(Sense::NO_MEDIUM.into());
        }
        if lock(&self.state).stopped { Err(Sense::STOPPED.into()) } else { Ok(()) }
    }

    fn request_sense(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        let sense = {
            let mut state = lock(&self.state);
            let latched = state.sense.take();
            let attention = if latched.is_none() && !state.attention.is_empty() {
                Some(state.attention.remove(0))
            } else {
                None
            };
            latched.or(attention).unwrap_or(Sense::NONE)
        };
        if cdb[1] & 1 != 0 {
            reply(buffer, &sense.descriptor(), cdb[4].into())
        } else {
            reply(buffer, &sense.fixed(), cdb[4].into())
        }
    }

    /// What this one unit knows of; a bus answers for all its units itself.
    fn report_luns(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        let mut data = [0; 16];
        data[3] = 8;
        reply(buffer, &data, be32(cdb, 6).into())
    }

    fn start_stop(&self, cdb: &[u8; CDB_LEN]) -> Moved {
        let (start, load_eject, power) = (cdb[4] & 1 != 0, cdb[4] & 2 != 0, cdb[4] >> 4);
        if power != 0 {
            return NOTHING;
        }
        if load_eject && self.kind == LunKind::Cdrom {
            if start == self.drive.tray_open() && !self.drive.move_tray(!start) {
                return Err(Sense::REMOVAL_PREVENTED.into());
            }
            if start == self.drive.tray_open() {
                return NOTHING;
            }
            let mut state = lock(&self.state);
            if start && self.drive.medium().is_some() {
                state.attend(Sense::MEDIUM_CHANGED);
                state.media_event = mmc::EVENT_NEW_MEDIA;
            } else if !start {
                state.media_event = mmc::EVENT_MEDIA_REMOVAL;
            }
            return NOTHING;
        }
        lock(&self.state).stopped = !start;
        NOTHING
    }

    fn prevent_allow(&self, cdb: &[u8; CDB_LEN]) -> Moved {
        if self.drive.is_removable() {
            self.drive.lock_tray(cdb[4] & 1 != 0);
        }
        NOTHING
    }
}

/// Sends parameter data: as much as there is room for and the command allows.
fn reply(buffer: &mut Buffer<'_>, data: &[u8], allocation: u64) -> Moved {
    let n = (data.len() as u64).min(allocation);
    let done = buffer.write(0, &data[..n as usize])?;
    Ok((done, n))
}

fn be16(b: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([b[at], b[at + 1]])
}

fn be32(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn be64(b: &[u8], at: usize) -> u64 {
    u64::from(be32(b, at)) << 32 | u64::from(be32(b, at + 4))
}

/// Operation codes (SPC-4, SBC-3, MMC-6).
pub mod opcode {
    #![allow(missing_docs)] // the standards' own names
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const READ_6: u8 = 0x08;
    pub const WRITE_6: u8 = 0x0a;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SELECT_6: u8 = 0x15;
    pub const MODE_SENSE_6: u8 = 0x1a;
    pub const START_STOP_UNIT: u8 = 0x1b;
    pub const SEND_DIAGNOSTIC: u8 = 0x1d;
    pub const PREVENT_ALLOW: u8 = 0x1e;
    pub const READ_CAPACITY_10: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const WRITE_10: u8 = 0x2a;
    pub const SEEK_10: u8 = 0x2b;
    pub const WRITE_VERIFY_10: u8 = 0x2e;
    pub const VERIFY_10: u8 = 0x2f;
    pub const SYNCHRONIZE_CACHE_10: u8 = 0x35;
    pub const WRITE_SAME_10: u8 = 0x41;
    pub const UNMAP: u8 = 0x42;
    pub const READ_SUBCHANNEL: u8 = 0x42;
    pub const READ_TOC: u8 = 0x43;
    pub const GET_CONFIGURATION: u8 = 0x46;
    pub const GET_EVENT_STATUS: u8 = 0x4a;
    pub const READ_DISC_INFORMATION: u8 = 0x51;
    pub const READ_TRACK_INFORMATION: u8 = 0x52;
    pub const MODE_SELECT_10: u8 = 0x55;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const PERSISTENT_RESERVE_IN: u8 = 0x5e;
    pub const PERSISTENT_RESERVE_OUT: u8 = 0x5f;
    pub const READ_16: u8 = 0x88;
    pub const WRITE_16: u8 = 0x8a;
    pub const WRITE_VERIFY_16: u8 = 0x8e;
    pub const VERIFY_16: u8 = 0x8f;
    pub const SYNCHRONIZE_CACHE_16: u8 = 0x91;
    pub const WRITE_SAME_16: u8 = 0x93;
    pub const SERVICE_ACTION_IN_16: u8 = 0x9e;
    pub const REPORT_LUNS: u8 = 0xa0;
    pub const READ_12: u8 = 0xa8;
    pub const WRITE_12: u8 = 0xaa;
    pub const READ_DVD_STRUCTURE: u8 = 0xad;
    pub const WRITE_VERIFY_12: u8 = 0xae;
    pub const VERIFY_12: u8 = 0xaf;
    pub const SET_CD_SPEED: u8 = 0xbb;
    pub const MECHANISM_STATUS: u8 = 0xbd;
    pub const READ_CD: u8 = 0xbe;
}
