//! Disks and CD-ROM drives, and the controllers they hang on.
//!
//! ```text
//!   virtio-scsi      AHCI, PIIX IDE       NVMe       (virtio-blk)
//!        |             |         |          |             |
//!     scsi::Lun <--- ATAPI   ata::Drive     |             |
//!        |                       |          |             |
//!        +------------- Drive ---+----------+-------------+      medium, cache mode, errors, events
//!                         |
//!                    block::Image
//! ```
//! A [`Drive`] is what a user plugs a file into. It knows nothing of protocols: it moves bytes between the image and a
//! [`Buffer`], and decides what becomes of the host's errors. Controllers take commands on vCPU threads and have them
//! carried out by [`Workers`].

pub mod ahci;
pub mod ata;
mod buffer;
mod drive;
pub mod nvme;
pub(crate) mod pieces;
pub mod piix;
pub mod scsi;
mod workers;

pub use buffer::{Buffer, Sg};
pub use drive::{Drive, DriveEvent, DriveSaved, DriveSpec, Fault, Judgement, OnError, TrayError};
pub use workers::{Job, Verdict, Workers};
