//! Mode pages (SPC-4, 7.5; SBC-3, 6.5; MMC-6, 7).

use super::{CDB_LEN, Lun, LunKind, Moved, NOTHING, Sense, be16, be32, opcode, reply};
use crate::storage::Buffer;

const RECOVERY: u8 = 0x01;
const GEOMETRY: u8 = 0x04;
const CACHING: u8 = 0x08;
const CAPABILITIES: u8 = 0x2a;
const ALL: u8 = 0x3f;
/// Write cache enable, in the first byte of the caching page's body.
const WCE: u8 = 0x04;

impl Lun {
    /// Body of a mode page. `changeable`: the mask of what MODE SELECT may change instead.
    fn mode_page(&self, page: u8, changeable: bool) -> Option<Vec<u8>> {
        let disk = self.kind == LunKind::Disk;
        let mut body = match page {
            RECOVERY => {
                let mut b = vec![0; if disk { 10 } else { 6 }];
                b[0] = 0x80; // automatic write reallocation
                if !disk {
                    b[1] = 0x20; // retries
                }
                b
            }
            GEOMETRY if disk => {
                let mut b = vec![0; 22];
                let cylinders = (self.drive.blocks() / (16 * 63)).min(0xff_ffff) as u32;
                b[..3].copy_from_slice(&cylinders.to_be_bytes()[1..]);
                b[3] = 16;
                b[18..20].copy_from_slice(&5400u16.to_be_bytes());
                b
            }
            CACHING => {
                let mut b = vec![0; 18];
                b[0] = if self.drive.writeback() || changeable { WCE } else { 0 };
                if changeable {
                    return disk.then_some(b);
                }
                b
            }
            CAPABILITIES if !disk => {
                let mut b = vec![0; 20];
                b[0] = 0x3b; // reads CD-R, CD-RW, method 2, DVD-ROM, DVD-R
                b[2] = 0x71; // multi-session, mode 2 forms, audio play bit
                b[3] = 0x03; // CD-DA commands, accurate
                b[4] = 0x29 | u8::from(self.drive.tray_locked()) << 1; // tray, eject, lock
                b[6..8].copy_from_slice(&(50u16 * 176).to_be_bytes());
                b[8..10].copy_from_slice(&2u16.to_be_bytes());
                b[10..12].copy_from_slice(&2048u16.to_be_bytes());
                b[12..14].copy_from_slice(&(16u16 * 176).to_be_bytes());
                b
            }
            _ => return None,
        };
        if changeable {
            body.fill(0);
        }
        Some(body)
    }

    pub(super) fn mode_sense(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        let ten = cdb[0] == opcode::MODE_SENSE_10;
        let allocation = if ten { be16(cdb, 7) } else { cdb[4].into() };
        let (control, page, subpage) = (cdb[2] >> 6, cdb[2] & 0x3f, cdb[3]);
        if control == 3 {
            return Err(Sense::SAVING_NOT_SUPPORTED.into());
        }
        if subpage != 0 && !(page == ALL && subpage == 0xff) {
            return Err(Sense::INVALID_FIELD.into());
        }
        let disk = self.kind == LunKind::Disk;
        let specific = if disk {
            // Write protected; disable page out and force unit access are understood.
            0x10 | u8::from(self.drive.is_read_only()) << 7
        } else {
            0
        };
        let mut descriptor = Vec::new();
        if disk && cdb[1] & 0x08 == 0 && self.drive.medium().is_some() {
            let blocks = self.drive.blocks();
            if ten && cdb[1] & 0x10 != 0 {
                descriptor.extend(blocks.to_be_bytes());
                descriptor.extend([0; 4]);
                descriptor.extend(self.drive.block_size().to_be_bytes());
            } else {
                let blocks = if blocks > 0xff_ffff { 0 } else { blocks as u32 };
                descriptor.extend(blocks.to_be_bytes());
                descriptor.extend(self.drive.block_size().to_be_bytes());
            }
        }
        let mut pages = Vec::new();
        let wanted: &[u8] = if page == ALL { &[RECOVERY, GEOMETRY, CACHING, CAPABILITIES] } else { &[page] };
        for page in wanted {
            if let Some(body) = self.mode_page(*page, control == 1) {
                pages.extend([*page, body.len() as u8]); // pages are short
                pages.extend(body);
            }
        }
        if pages.is_empty() {
            return Err(Sense::INVALID_FIELD.into());
        }
        let mut data = Vec::new();
        if ten {
            let long = u8::from(descriptor.len() == 16);
            data.extend(((6 + descriptor.len() + pages.len()) as u16).to_be_bytes());
            data.extend([0, specific, long, 0]);
            data.extend((descriptor.len() as u16).to_be_bytes());
        } else {
            data.extend([(3 + descriptor.len() + pages.len()) as u8, 0, specific, descriptor.len() as u8]);
        }
        data.extend(descriptor);
        data.extend(pages);
        reply(buffer, &data, allocation.into())
    }

    pub(super) fn mode_select(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        let ten = cdb[0] == opcode::MODE_SELECT_10;
        let len = if ten { be16(cdb, 7) } else { cdb[4].into() };
        if len == 0 {
            return NOTHING;
        }
        // Page format, and nothing is saved.
        if cdb[1] & 0x11 != 0x10 {
            return Err(Sense::INVALID_FIELD.into());
        }
        let data = buffer.to_vec(len.into())?;
        let (header, descriptor) = match (ten, data.len()) {
            (true, 8..) => (8, be16(&data, 6).into()),
            (false, 4..) => (4, usize::from(data[3])),
            _ => return Err(Sense::PARAMETER_LENGTH.into()),
        };
        if descriptor != 0 {
            let block = data.get(header..header + descriptor).ok_or(Sense::PARAMETER_LENGTH)?;
            if descriptor != 8 || be32(block, 4) & 0xff_ffff != self.drive.block_size() {
                return Err(Sense::INVALID_PARAMETER.into());
            }
        }
        let mut rest = data.get(header + descriptor..).ok_or(Sense::PARAMETER_LENGTH)?;
        let mut cache = None;
        while let [page, n, tail @ ..] = rest {
            let body = tail.get(..usize::from(*n)).ok_or(Sense::PARAMETER_LENGTH)?;
            rest = &tail[body.len()..];
            let page = page & 0x3f;
            let (Some(now), Some(mask)) = (self.mode_page(page, false), self.mode_page(page, true)) else {
                return Err(Sense::INVALID_PARAMETER.into());
            };
            let same = body.len() == now.len()
                && body.iter().zip(&now).zip(&mask).all(|((new, old), mask)| (new ^ old) & !mask == 0);
            if !same {
                return Err(Sense::INVALID_PARAMETER.into());
            }
            if page == CACHING {
                cache = Some(body[0] & WCE != 0);
            }
        }
        if !rest.is_empty() {
            return Err(Sense::PARAMETER_LENGTH.into());
        }
        if let Some(on) = cache {
            if !on && self.drive.writeback() {
                self.drive.flush().map_err(|f| super::Failure::from_fault(f, true))?;
            }
            self.drive.set_writeback(on);
        }
        Ok((data.len() as u64, data.len() as u64))
    }
}
