//! Commands of CD-ROM and DVD drives (MMC-6, 6). Media have one data track.

use super::block::range;
use super::{CDB_LEN, Failure, Lun, Moved, NOTHING, Sense, be16, be32, lock, opcode, reply};
use crate::storage::Buffer;

/// Media events (MMC-6, 6.6.3.5.1).
pub(super) const EVENT_EJECT_REQUEST: u8 = 1;
pub(super) const EVENT_NEW_MEDIA: u8 = 2;
pub(super) const EVENT_MEDIA_REMOVAL: u8 = 3;

/// Most sectors of a CD: 80 minutes. Larger media are DVDs.
const CD_SECTORS: u64 = 80 * 60 * 75;

/// Profiles (MMC-6, 5.3.1).
const PROFILE_CD_ROM: u16 = 0x08;
const PROFILE_DVD_ROM: u16 = 0x10;

/// Address and number of blocks, if the command reads blocks of a CD: for transports that move data piece by piece.
pub fn media_read(cdb: &[u8]) -> Option<(u64, u64)> {
    let mut block = [0; CDB_LEN];
    let n = cdb.len().min(CDB_LEN);
    block[..n].copy_from_slice(&cdb[..n]);
    match block[0] {
        opcode::READ_6 | opcode::READ_10 | opcode::READ_12 | opcode::READ_16 => Some(range(&block)),
        opcode::READ_CD if block[9] & 0xf8 == 0x10 => {
            Some((be32(&block, 2).into(), (be32(&block, 5) & 0xff_ffff).into()))
        }
        _ => None,
    }
}

/// An address as minutes, seconds and frames, or as it is.
fn position(lba: u64, msf: bool) -> [u8; 4] {
    let lba = lba.min(u32::MAX.into()) as u32;
    if !msf {
        return lba.to_be_bytes();
    }
    let frames = lba.saturating_add(150);
    [0, (frames / 75 / 60).min(255) as u8, (frames / 75 % 60) as u8, (frames % 75) as u8]
}

impl Lun {
    pub(super) fn cdrom_command(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        use opcode::*;
        match cdb[0] {
            READ_6 | READ_10 | READ_12 | READ_16 => self.read_blocks(cdb, buffer),
            READ_CD => self.read_cd(cdb, buffer),
            READ_CAPACITY_10 => self.read_capacity_10(buffer),
            SEEK_10 => self.checked_range(be32(cdb, 2).into(), 0).map(|_| (0, 0)),
            SYNCHRONIZE_CACHE_10 | SET_CD_SPEED => NOTHING,
            VERIFY_10 => {
                let (lba, blocks) = range(cdb);
                self.checked_range(lba, blocks).map(|_| (0, 0))
            }
            READ_TOC => self.read_toc(cdb, buffer),
            READ_SUBCHANNEL => self.read_subchannel(cdb, buffer),
            GET_CONFIGURATION => self.get_configuration(cdb, buffer),
            GET_EVENT_STATUS => self.event_status(cdb, buffer),
            READ_DISC_INFORMATION => self.disc_information(cdb, buffer),
            READ_TRACK_INFORMATION => self.track_information(cdb, buffer),
            READ_DVD_STRUCTURE => self.dvd_structure(cdb, buffer),
            MECHANISM_STATUS => reply(buffer, &[0, 0, 0, 0, 0, 1, 0, 0], be16(cdb, 8).into()),
            _ => Err(Sense::INVALID_OPCODE.into()),
        }
    }

    fn is_dvd(&self) -> bool {
        self.drive.blocks() > CD_SECTORS
    }

    fn read_cd(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        let blocks = be32(cdb, 5) & 0xff_ffff;
        let (offset, len) = self.checked_range(be32(cdb, 2).into(), blocks.into())?;
        // Sector types: any, mode 1. Fields: nothing, or user data; raw sectors are not on the medium.
        if ![0, 2].contains(&(cdb[1] >> 2 & 7)) || cdb[10] & 7 != 0 {
            return Err(Sense::INVALID_FIELD.into());
        }
        match cdb[9] & 0xf8 {
            0 => NOTHING,
            0x10 => {
                let n = len.min(buffer.len());
                self.drive.read(offset, buffer, 0, n).map_err(|f| Failure::from_fault(f, false))?;
                Ok((n, len))
            }
            _ => Err(Sense::INVALID_FIELD.into()),
        }
    }

    fn read_toc(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        self.ready()?;
        let msf = cdb[1] & 2 != 0;
        // Older drivers put the format into the control byte.
        let format = if cdb[2] & 0xf != 0 { cdb[2] & 0xf } else { cdb[9] >> 6 };
        let end = self.drive.blocks();
        let mut data = vec![0, 0, 1, 1];
        match format {
            0 => {
                let start = cdb[6];
                if start > 1 && start != 0xaa {
                    return Err(Sense::INVALID_FIELD.into());
                }
                if start <= 1 {
                    data.extend([0, 0x14, 1, 0]);
                    data.extend(position(0, msf));
                }
                data.extend([0, 0x14, 0xaa, 0]);
                data.extend(position(end, msf));
            }
            1 => {
                data.extend([0, 0x14, 1, 0]);
                data.extend(position(0, msf));
            }
            2 => {
                let mut entry = |point: u8, at: [u8; 4]| {
                    data.extend([1, 0x14, 0, point, 0, 0, 0, at[0], at[1], at[2], at[3]])
                };
                entry(0xa0, [0, 1, 0, 0]);
                entry(0xa1, [0, 1, 0, 0]);
                entry(0xa2, position(end, true));
                entry(1, position(0, true));
            }
            _ => return Err(Sense::INVALID_FIELD.into()),
        }
        let len = data.len() as u16 - 2; // a few dozen bytes
        data[..2].copy_from_slice(&len.to_be_bytes());
        reply(buffer, &data, be16(cdb, 7).into())
    }

    fn read_subchannel(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        self.ready()?;
        let mut data = vec![0, 0x15, 0, 0]; // no audio status
        if cdb[2] & 0x40 != 0 {
            let body = match cdb[3] {
                1 => vec![1, 0x14, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
                2 | 3 => {
                    let mut body = vec![0; 20];
                    body[0] = cdb[3];
                    body
                }
                _ => return Err(Sense::INVALID_FIELD.into()),
            };
            data[3] = body.len() as u8; // at most 20
            data.extend(body);
        }
        reply(buffer, &data, be16(cdb, 7).into())
    }

    fn get_configuration(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        let (kind, first) = (cdb[1] & 3, be16(cdb, 2));
        if kind == 3 {
            return Err(Sense::INVALID_FIELD.into());
        }
        let medium = self.drive.medium().is_some();
        let dvd = self.is_dvd();
        let current = match (medium, dvd) {
            (false, _) => 0,
            (_, false) => PROFILE_CD_ROM,
            (_, true) => PROFILE_DVD_ROM,
        };
        // Feature, version, persistent, current, body (MMC-6, 5.3).
        let is = |profile: u16| u8::from(current == profile);
        let [p1, p0] = PROFILE_DVD_ROM.to_be_bytes();
        let [q1, q0] = PROFILE_CD_ROM.to_be_bytes();
        let profiles = vec![p1, p0, is(PROFILE_DVD_ROM), 0, q1, q0, is(PROFILE_CD_ROM), 0];
        let features: [(u16, u8, bool, bool, Vec<u8>); 7] = [
            (0x0000, 0, true, true, profiles),
            (0x0001, 2, true, true, vec![0, 0, 0, 2, 1, 0, 0, 0]), // ATAPI; device busy event
            (0x0002, 1, true, true, vec![2, 0, 0, 0]),             // operational change requests
            (0x0003, 1, true, true, vec![0x29, 0, 0, 0]),          // tray, eject, lock
            (0x0010, 0, false, medium, vec![0, 0, 8, 0, 0, 1, 0, 0]), // 2048-byte blocks
            (0x001e, 2, false, medium && !dvd, vec![0, 0, 0, 0]),
            (0x001f, 0, false, medium && dvd, Vec::new()),
        ];
        let mut data = vec![0; 6];
        data.extend(current.to_be_bytes());
        for (code, version, persistent, on, body) in features {
            let wanted = match kind {
                0 => code >= first,
                1 => code >= first && on,
                _ => code == first,
            };
            if wanted {
                data.extend(code.to_be_bytes());
                data.extend([version << 2 | u8::from(persistent) << 1 | u8::from(on), body.len() as u8]);
                data.extend(body);
            }
        }
        let len = data.len() as u32 - 4;
        data[..4].copy_from_slice(&len.to_be_bytes());
        reply(buffer, &data, be16(cdb, 7).into())
    }

    fn event_status(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        // Polled operation only.
        if cdb[1] & 1 == 0 {
            return Err(Sense::INVALID_FIELD.into());
        }
        const MEDIA: u8 = 4;
        let mut data = vec![0, 0, 0, 1 << MEDIA];
        if cdb[4] & 1 << MEDIA != 0 {
            let event = std::mem::take(&mut lock(&self.state).media_event);
            let open = self.drive.tray_open();
            let present = self.drive.medium().is_some();
            data[2] = MEDIA;
            data.extend([event, u8::from(present) << 1 | u8::from(open), 0, 0]);
        } else {
            data[2] = 0x80; // none of the classes that were asked for
        }
        let len = data.len() as u16 - 2;
        data[..2].copy_from_slice(&len.to_be_bytes());
        reply(buffer, &data, be16(cdb, 7).into())
    }

    fn disc_information(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        self.ready()?;
        if cdb[1] & 7 != 0 {
            return Err(Sense::INVALID_FIELD.into());
        }
        let mut data = [0; 34];
        data[1] = 32;
        data[2] = 0x0e; // complete: session and disc
        data[3..7].fill(1); // first track, sessions, first and last track of the last session
        data[7] = 0x20; // unrestricted use
        reply(buffer, &data, be16(cdb, 7).into())
    }

    fn track_information(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        self.ready()?;
        let (kind, address) = (cdb[1] & 3, be32(cdb, 2));
        let known = match kind {
            0 => u64::from(address) < self.drive.blocks(),
            _ => address == 1,
        };
        if !known {
            return Err(Sense::INVALID_FIELD.into());
        }
        let mut data = [0; 36];
        data[1] = 34;
        data[2] = 1;
        data[3] = 1;
        data[5] = 4; // data
        data[6] = 1; // mode 1
        let blocks = self.drive.blocks().min(u32::MAX.into()) as u32;
        data[24..28].copy_from_slice(&blocks.to_be_bytes());
        reply(buffer, &data, be16(cdb, 7).into())
    }

    /// READ DVD STRUCTURE (MMC-6, 6.22): layer 0 of a DVD-ROM without protection.
    fn dvd_structure(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        self.ready()?;
        if !self.is_dvd() {
            return Err(Sense::INCOMPATIBLE_MEDIUM.into());
        }
        let mut body = match cdb[7] {
            0x00 if cdb[6] == 0 => {
                let mut b = vec![0; 2048];
                b[0] = 1; // DVD-ROM, part version 1
                b[1] = 0x0f; // 120 mm, no maximum rate
                b[2] = 1; // one layer, read only
                b[5..8].copy_from_slice(&[3, 0, 0]); // data starts at 0x30000
                let last = (0x2_ffff + self.drive.blocks()).min(0xff_ffff) as u32;
                b[9..12].copy_from_slice(&last.to_be_bytes()[1..]);
                b[13..16].copy_from_slice(&last.to_be_bytes()[1..]);
                b
            }
            0x01 => vec![0; 4],    // no copyright protection, all regions
            0x04 => vec![0; 2048], // no manufacturing information
            0xff => vec![0x00, 0x40, 8, 4, 0x01, 0x40, 0, 8, 0x04, 0x40, 8, 4],
            _ => return Err(Sense::INVALID_FIELD.into()),
        };
        let mut data = ((body.len() + 2) as u16).to_be_bytes().to_vec();
        data.extend([0, 0]);
        data.append(&mut body);
        reply(buffer, &data, be16(cdb, 8).into())
    }
}
