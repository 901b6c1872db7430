//! Commands of disks (SBC-3, 5).

use super::inquiry::{MAX_UNMAP_BYTES, MAX_UNMAP_DESCRIPTORS, MAX_WRITE_SAME_BYTES};
use super::{CDB_LEN, Failure, Lun, Moved, NOTHING, Sense, be16, be32, be64, opcode, reply};
use crate::storage::Buffer;

/// Bytes written at a time by WRITE SAME of other than zeros, and compared at a time by VERIFY.
const PIECE: u64 = 256 << 10;

/// Address and number of blocks of a command block, by its length (SBC-3, 4.2).
pub(super) fn range(cdb: &[u8; CDB_LEN]) -> (u64, u64) {
    match cdb[0] >> 5 {
        0 => {
            let blocks = if cdb[4] == 0 { 256 } else { cdb[4].into() };
            ((be32(cdb, 0) & 0x1f_ffff).into(), blocks)
        }
        4 => (be64(cdb, 2), be32(cdb, 10).into()),
        5 => (be32(cdb, 2).into(), be32(cdb, 6).into()),
        _ => (be32(cdb, 2).into(), be16(cdb, 7).into()),
    }
}

impl Lun {
    pub(super) fn disk_command(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        use opcode::*;
        match cdb[0] {
            READ_6 | READ_10 | READ_12 | READ_16 => self.read_blocks(cdb, buffer),
            WRITE_6 | WRITE_10 | WRITE_12 | WRITE_16 | WRITE_VERIFY_10 | WRITE_VERIFY_12
            | WRITE_VERIFY_16 => self.write_blocks(cdb, buffer),
            VERIFY_10 | VERIFY_12 | VERIFY_16 => self.verify(cdb, buffer),
            READ_CAPACITY_10 => self.read_capacity_10(buffer),
            SERVICE_ACTION_IN_16 => match cdb[1] & 0x1f {
                0x10 => self.read_capacity_16(cdb, buffer),
                0x12 => self.block_status(cdb, buffer),
                _ => Err(Sense::INVALID_FIELD.into()),
            },
            SYNCHRONIZE_CACHE_10 | SYNCHRONIZE_CACHE_16 => {
                self.ready()?;
                self.drive.flush().map_err(|f| Failure::from_fault(f, true))?;
                NOTHING
            }
            SEEK_10 => self.checked_range(be32(cdb, 2).into(), 0).map(|_| (0, 0)),
            UNMAP => self.unmap(cdb, buffer),
            WRITE_SAME_10 | WRITE_SAME_16 => self.write_same(cdb, buffer),
            _ => Err(Sense::INVALID_OPCODE.into()),
        }
    }

    /// Byte offset and length of a range of blocks on the medium.
    pub(super) fn checked_range(&self, lba: u64, blocks: u64) -> Result<(u64, u64), Failure> {
        self.ready()?;
        let end = lba.checked_add(blocks).ok_or(Sense::LBA_OUT_OF_RANGE)?;
        if end > self.drive.blocks() {
            return Err(Sense::LBA_OUT_OF_RANGE.into());
        }
        let size = u64::from(self.drive.block_size());
        Ok((lba * size, blocks * size)) // both below the disk's size
    }

    /// No protection information: such bits are an error (SBC-3, 5.10).
    fn unprotected(cdb: &[u8; CDB_LEN]) -> Result<(), Failure> {
        if cdb[0] >> 5 != 0 && cdb[1] & 0xe0 != 0 { Err(Sense::INVALID_FIELD.into()) } else { Ok(()) }
    }

    pub(super) fn read_blocks(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        Self::unprotected(cdb)?;
        let (lba, blocks) = range(cdb);
        let (offset, len) = self.checked_range(lba, blocks)?;
        let n = len.min(buffer.len());
        self.drive.read(offset, buffer, 0, n).map_err(|f| Failure::from_fault(f, false))?;
        Ok((n, len))
    }

    fn write_blocks(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        Self::unprotected(cdb)?;
        let (lba, blocks) = range(cdb);
        let (offset, len) = self.checked_range(lba, blocks)?;
        if self.drive.is_read_only() {
            return Err(Sense::WRITE_PROTECTED.into());
        }
        // Whole blocks only: part of one would leave the rest of it to chance.
        let n = len.min(buffer.len());
        let n = n - n % u64::from(self.drive.block_size());
        let durable = cdb[0] >> 5 != 0 && cdb[1] & 0x08 != 0;
        self.drive.write(offset, buffer, 0, n, durable).map_err(|f| Failure::from_fault(f, true))?;
        Ok((n, len))
    }

    fn verify(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        Self::unprotected(cdb)?;
        let (lba, blocks) = range(cdb);
        let (offset, len) = self.checked_range(lba, blocks)?;
        match cdb[1] >> 1 & 3 {
            0 => NOTHING,
            1 => self.compare(offset, len, buffer),
            _ => Err(Sense::INVALID_FIELD.into()),
        }
    }

    fn compare(&self, offset: u64, len: u64, buffer: &mut Buffer<'_>) -> Moved {
        let n = len.min(buffer.len());
        let mut ours = vec![0; n.min(PIECE) as usize];
        let mut theirs = ours.clone();
        let mut done = 0;
        while done < n {
            let piece = (n - done).min(PIECE);
            let read = self.drive.read(offset + done, &mut Buffer::Host(&mut ours), 0, piece);
            read.map_err(|f| Failure::from_fault(f, false))?;
            buffer.read(done, &mut theirs[..piece as usize])?;
            if ours[..piece as usize] != theirs[..piece as usize] {
                return Err(Sense::MISCOMPARE.into());
            }
            done += piece;
        }
        Ok((n, len))
    }

    pub(super) fn read_capacity_10(&self, buffer: &mut Buffer<'_>) -> Moved {
        self.ready()?;
        let last = self.drive.blocks().saturating_sub(1).min(u32::MAX.into()) as u32;
        let mut data = [0; 8];
        data[..4].copy_from_slice(&last.to_be_bytes());
        data[4..].copy_from_slice(&self.drive.block_size().to_be_bytes());
        reply(buffer, &data, 8)
    }

    fn read_capacity_16(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        self.ready()?;
        let mut data = [0; 32];
        data[..8].copy_from_slice(&self.drive.blocks().saturating_sub(1).to_be_bytes());
        data[8..12].copy_from_slice(&self.drive.block_size().to_be_bytes());
        data[13] = (self.drive.physical_block_size() / self.drive.block_size()).trailing_zeros() as u8;
        data[14] = u8::from(self.drive.discards()) << 7; // logical block provisioning
        reply(buffer, &data, be32(cdb, 10).into())
    }

    /// GET LBA STATUS: one descriptor from the address on (SBC-3, 5.5).
    fn block_status(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        let lba = be64(cdb, 2);
        let (offset, _) = self.checked_range(lba, 1)?;
        let image = self.drive.medium().ok_or(Sense::NO_MEDIUM)?;
        let mut map = Vec::new();
        let left = image.size() - offset;
        image.map(offset, left.min(MAX_UNMAP_BYTES), &mut map).map_err(|_| Sense::READ_ERROR)?;
        let size = u64::from(self.drive.block_size());
        let mapped = map.first().is_none_or(|e| e.data && !e.zero);
        let len: u64 = map.iter().take_while(|e| (e.data && !e.zero) == mapped).map(|e| e.length).sum();
        let blocks = (len / size).clamp(1, u32::MAX.into()) as u32;
        let mut data = [0; 24];
        data[3] = 20;
        data[8..16].copy_from_slice(&lba.to_be_bytes());
        data[16..20].copy_from_slice(&blocks.to_be_bytes());
        data[20] = u8::from(!mapped);
        reply(buffer, &data, be32(cdb, 10).into())
    }

    /// UNMAP (SBC-3, 5.28).
    fn unmap(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        self.ready()?;
        if !self.drive.spec().discard {
            return Err(Sense::INVALID_OPCODE.into());
        }
        let len = u64::from(be16(cdb, 7));
        if cdb[1] & 1 != 0 {
            return Err(Sense::INVALID_FIELD.into()); // anchors
        }
        if len == 0 {
            return NOTHING;
        }
        let data = buffer.to_vec(len)?;
        if data.len() < 8 {
            return Err(Sense::PARAMETER_LENGTH.into());
        }
        let described = usize::from(be16(&data, 2));
        let list = data.get(8..8 + described).ok_or(Sense::PARAMETER_LENGTH)?;
        if list.len() / 16 > MAX_UNMAP_DESCRIPTORS as usize {
            return Err(Sense::INVALID_PARAMETER.into());
        }
        if self.drive.is_read_only() {
            return Err(Sense::WRITE_PROTECTED.into());
        }
        let mut ranges = Vec::new();
        let mut total = 0;
        for descriptor in list.chunks_exact(16) {
            let range = self.checked_range(be64(descriptor, 0), be32(descriptor, 8).into())?;
            total += range.1;
            ranges.push(range);
        }
        if total > MAX_UNMAP_BYTES {
            return Err(Sense::INVALID_PARAMETER.into());
        }
        for (offset, len) in ranges {
            self.drive.discard(offset, len).map_err(|f| Failure::from_fault(f, true))?;
        }
        Ok((data.len() as u64, len))
    }

    /// WRITE SAME (SBC-3, 5.45).
    fn write_same(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        Self::unprotected(cdb)?;
        let (lba, blocks) = range(cdb);
        let (offset, len) = self.checked_range(lba, blocks)?;
        if self.drive.is_read_only() {
            return Err(Sense::WRITE_PROTECTED.into());
        }
        // Anchors, and fields of obsolete modes; zero blocks is not "all" here.
        if cdb[1] & 0x16 != 0 || blocks == 0 || len > MAX_WRITE_SAME_BYTES {
            return Err(Sense::INVALID_FIELD.into());
        }
        let unmap = cdb[1] & 0x08 != 0;
        let no_data = cdb[0] == opcode::WRITE_SAME_16 && cdb[1] & 0x01 != 0;
        let size = u64::from(self.drive.block_size());
        let pattern = if no_data { Vec::new() } else { buffer.to_vec(size)? };
        if !no_data && pattern.len() as u64 != size {
            return Err(Sense::INVALID_FIELD.into());
        }
        let fail = |f| Failure::from_fault(f, true);
        if pattern.iter().all(|b| *b == 0) {
            self.drive.write_zeroes(offset, len, unmap).map_err(fail)?;
            return Ok((pattern.len() as u64, pattern.len() as u64));
        }
        let repeats = (PIECE / size).clamp(1, blocks);
        let mut piece = pattern.repeat(repeats as usize);
        let most = piece.len() as u64;
        let mut done = 0;
        while done < len {
            let n = (len - done).min(most);
            self.drive.write(offset + done, &Buffer::Host(&mut piece), 0, n, false).map_err(fail)?;
            done += n;
        }
        Ok((size, size))
    }
}
