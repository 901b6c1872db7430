//! Status and sense data (SPC-4, 4.5).

use crate::storage::Fault;
use serde::{Deserialize, Serialize};

/// Status: done.
pub const GOOD: u8 = 0x00;
/// Status: see the sense data.
pub const CHECK_CONDITION: u8 = 0x02;
/// Status: given up on the initiator's behalf.
pub const TASK_ABORTED: u8 = 0x40;

/// Why a command failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sense {
    /// Sense key.
    pub key: u8,
    /// Additional sense code.
    pub asc: u8,
    /// Its qualifier.
    pub ascq: u8,
}

/// Length of [`Sense::fixed`].
pub const SENSE_LEN: usize = 18;

impl Sense {
    const fn new(key: u8, asc: u8, ascq: u8) -> Self {
        Self { key, asc, ascq }
    }

    /// Nothing is wrong.
    pub const NONE: Self = Self::new(0, 0, 0);
    /// No medium, and the tray is closed.
    pub const NO_MEDIUM: Self = Self::new(2, 0x3a, 1);
    /// No medium, and the tray is open.
    pub const TRAY_OPEN: Self = Self::new(2, 0x3a, 2);
    /// The unit was stopped.
    pub const STOPPED: Self = Self::new(2, 0x04, 2);
    /// A read failed.
    pub const READ_ERROR: Self = Self::new(3, 0x11, 0);
    /// A write failed.
    pub const WRITE_ERROR: Self = Self::new(3, 0x0c, 0);
    /// No such command.
    pub const INVALID_OPCODE: Self = Self::new(5, 0x20, 0);
    /// Beyond the end of the disk.
    pub const LBA_OUT_OF_RANGE: Self = Self::new(5, 0x21, 0);
    /// A field of the command that makes no sense.
    pub const INVALID_FIELD: Self = Self::new(5, 0x24, 0);
    /// No such logical unit.
    pub const NO_SUCH_LUN: Self = Self::new(5, 0x25, 0);
    /// A field of the parameters that makes no sense.
    pub const INVALID_PARAMETER: Self = Self::new(5, 0x26, 0);
    /// Parameters shorter than they say.
    pub const PARAMETER_LENGTH: Self = Self::new(5, 0x1a, 0);
    /// Saved mode pages do not exist.
    pub const SAVING_NOT_SUPPORTED: Self = Self::new(5, 0x39, 0);
    /// The medium is not of the kind that this command is for.
    pub const INCOMPATIBLE_MEDIUM: Self = Self::new(5, 0x30, 0);
    /// The guest itself has locked the tray.
    pub const REMOVAL_PREVENTED: Self = Self::new(5, 0x53, 2);
    /// There is another medium.
    pub const MEDIUM_CHANGED: Self = Self::new(6, 0x28, 0);
    /// Power on or reset.
    pub const RESET: Self = Self::new(6, 0x29, 0);
    /// The disk has another size.
    pub const CAPACITY_CHANGED: Self = Self::new(6, 0x2a, 9);
    /// The set of logical units is another.
    pub const LUNS_CHANGED: Self = Self::new(6, 0x3f, 0x0e);
    /// The medium takes no writes.
    pub const WRITE_PROTECTED: Self = Self::new(7, 0x27, 0);
    /// The host has no space.
    pub const NO_SPACE: Self = Self::new(7, 0x27, 7);
    /// Contents differ from what they were compared with.
    pub const MISCOMPARE: Self = Self::new(0xe, 0x1d, 0);

    /// Fixed format (SPC-4, 4.5.3).
    pub fn fixed(self) -> [u8; SENSE_LEN] {
        let mut b = [0; SENSE_LEN];
        b[0] = 0x70;
        b[2] = self.key;
        b[7] = 10;
        b[12] = self.asc;
        b[13] = self.ascq;
        b
    }

    /// Descriptor format (SPC-4, 4.5.2), without descriptors.
    pub fn descriptor(self) -> [u8; 8] {
        [0x72, self.key, self.asc, self.ascq, 0, 0, 0, 0]
    }
}

/// Why a command ended other than well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// With sense data.
    Check(Sense),
    /// The data's memory is not there: an affair of the transport.
    Memory,
    /// Given up: the transport was reset.
    Aborted,
}

impl From<Sense> for Failure {
    fn from(sense: Sense) -> Self {
        Failure::Check(sense)
    }
}

impl From<memory::Error> for Failure {
    fn from(_: memory::Error) -> Self {
        Failure::Memory
    }
}

impl Failure {
    /// What a fault of the drive means here.
    pub(super) fn from_fault(fault: Fault, write: bool) -> Self {
        Failure::Check(match fault {
            Fault::NoMedium => Sense::NO_MEDIUM,
            Fault::OutOfRange => Sense::LBA_OUT_OF_RANGE,
            Fault::ReadOnly => Sense::WRITE_PROTECTED,
            Fault::NoSpace => Sense::NO_SPACE,
            Fault::Io if write => Sense::WRITE_ERROR,
            Fault::Io => Sense::READ_ERROR,
            Fault::Memory => return Failure::Memory,
            Fault::Aborted => return Failure::Aborted,
        })
    }
}
