//! I/O commands of the NVM command set (NVMe 1.4, 6).

use super::MDTS;
use super::command::{Command, Status};
use super::controller::{Controller, End};
use super::namespace::Namespace;
use crate::storage::{Buffer, Fault};

mod opcode {
    pub(super) const FLUSH: u8 = 0x00;
    pub(super) const WRITE: u8 = 0x01;
    pub(super) const READ: u8 = 0x02;
    pub(super) const COMPARE: u8 = 0x05;
    pub(super) const WRITE_ZEROES: u8 = 0x08;
    pub(super) const DATASET_MANAGEMENT: u8 = 0x09;
    pub(super) const VERIFY: u8 = 0x0c;
}

/// Force unit access, deallocate.
const FUA: u32 = 1 << 30;
const DEALLOCATE: u32 = 1 << 25;

fn failure(fault: Fault, write: bool) -> Status {
    match fault {
        Fault::OutOfRange | Fault::NoMedium => Status::LBA_RANGE,
        Fault::ReadOnly => Status::WRITE_PROTECTED,
        Fault::NoSpace => Status::CAPACITY,
        Fault::Io if write => Status::WRITE_FAULT,
        Fault::Io => Status::READ_ERROR,
        Fault::Memory => Status::DATA_TRANSFER,
        Fault::Aborted => Status::ABORTED,
    }
}

impl Controller {
    /// Carries an I/O command out.
    pub(super) fn io(&self, c: &Command, generation: u64) -> End {
        End::Done(self.io_status(c, generation).err().unwrap_or(Status::OK), 0)
    }

    fn io_status(&self, c: &Command, generation: u64) -> Result<(), Status> {
        if !c.is_plain() {
            return Err(Status::INVALID_FIELD);
        }
        let page = self.lock_current(generation).ok_or(Status::ABORTED)?.page();
        if c.opcode() == opcode::FLUSH && c.nsid() == u32::MAX {
            return self.bus.all().iter().try_for_each(|s| s.drive.flush().map_err(|f| failure(f, true)));
        }
        let space = self.bus.get(c.nsid()).ok_or(Status::INVALID_NAMESPACE)?;
        match c.opcode() {
            opcode::FLUSH => space.drive.flush().map_err(|f| failure(f, true)),
            opcode::READ | opcode::WRITE | opcode::COMPARE => self.transfer(c, &space, page, generation),
            opcode::WRITE_ZEROES => {
                let (offset, len) = Self::range(c, &space)?;
                let unmap = c.dw(12) & DEALLOCATE != 0;
                space.drive.write_zeroes(offset, len, unmap).map_err(|f| failure(f, true))
            }
            opcode::VERIFY => Self::verify(c, &space),
            opcode::DATASET_MANAGEMENT => self.manage(c, &space, page),
            _ => Err(Status::INVALID_OPCODE),
        }
    }

    /// Byte offset and length of the blocks that a command names.
    fn range(c: &Command, space: &Namespace) -> Result<(u64, u64), Status> {
        let (first, blocks) = (c.qw(10), u64::from(c.dw(12) & 0xffff) + 1);
        let end = first.checked_add(blocks).ok_or(Status::LBA_RANGE)?;
        if end > space.drive.blocks() {
            return Err(Status::LBA_RANGE);
        }
        // No protection information was offered.
        if c.dw(12) >> 26 & 0xf != 0 {
            return Err(Status::INVALID_FIELD);
        }
        let size = u64::from(space.drive.block_size());
        Ok((first * size, blocks * size))
    }

    fn transfer(&self, c: &Command, space: &Namespace, page: u64, generation: u64) -> Result<(), Status> {
        let (offset, len) = Self::range(c, space)?;
        if len > 4096 << MDTS {
            return Err(Status::INVALID_FIELD);
        }
        let sg = c.data(&self.memory, page, len)?;
        let mut buffer = Buffer::Guest(&self.memory, &sg);
        let write = c.opcode() == opcode::WRITE;
        let result = match c.opcode() {
            opcode::WRITE => {
                space.drive.write(offset, &buffer, 0, len, c.dw(12) & FUA != 0).map_err(|f| failure(f, true))
            }
            opcode::READ => space.drive.read(offset, &mut buffer, 0, len).map_err(|f| failure(f, false)),
            _ => Self::compare(space, offset, len, &buffer),
        };
        if let Some(mut state) = self.lock_current(generation) {
            let n = &mut state.s.counters;
            match result {
                Ok(()) if write => {
                    (n.writes, n.written_bytes) =
                        (n.writes.wrapping_add(1), n.written_bytes.wrapping_add(len))
                }
                Ok(()) => (n.reads, n.read_bytes) = (n.reads.wrapping_add(1), n.read_bytes.wrapping_add(len)),
                Err(Status::READ_ERROR | Status::WRITE_FAULT) => {
                    n.media_errors = n.media_errors.wrapping_add(1)
                }
                Err(_) => {}
            }
        }
        result
    }

    fn compare(space: &Namespace, offset: u64, len: u64, theirs: &Buffer<'_>) -> Result<(), Status> {
        let theirs = theirs.to_vec(len).map_err(|_| Status::DATA_TRANSFER)?;
        let mut ours = vec![0; theirs.len()];
        space.drive.read(offset, &mut Buffer::Host(&mut ours), 0, len).map_err(|f| failure(f, false))?;
        if ours == theirs { Ok(()) } else { Err(Status::COMPARE) }
    }

    fn verify(c: &Command, space: &Namespace) -> Result<(), Status> {
        let (mut offset, mut left) = Self::range(c, space)?;
        let mut piece = vec![0; left.min(256 << 10) as usize];
        while left > 0 {
            let n = left.min(piece.len() as u64);
            space.drive.read(offset, &mut Buffer::Host(&mut piece), 0, n).map_err(|f| failure(f, false))?;
            (offset, left) = (offset + n, left - n);
        }
        Ok(())
    }

    /// Dataset Management: ranges to deallocate.
    fn manage(&self, c: &Command, space: &Namespace, page: u64) -> Result<(), Status> {
        // Other attributes are hints about use.
        if c.dw(11) & 4 == 0 {
            return Ok(());
        }
        if space.drive.is_read_only() {
            return Err(Status::WRITE_PROTECTED);
        }
        let count = u64::from(c.dw(10) & 0xff) + 1;
        let sg = c.data(&self.memory, page, count * 16)?;
        let list = Buffer::Guest(&self.memory, &sg).to_vec(count * 16).map_err(|_| Status::DATA_TRANSFER)?;
        let size = u64::from(space.drive.block_size());
        for entry in list.as_chunks::<16>().0 {
            let blocks = u64::from(u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]));
            let first = u64::from_le_bytes([
                entry[8], entry[9], entry[10], entry[11], entry[12], entry[13], entry[14], entry[15],
            ]);
            let end = first.checked_add(blocks).ok_or(Status::LBA_RANGE)?;
            if end > space.drive.blocks() {
                return Err(Status::LBA_RANGE);
            }
            space.drive.discard(first * size, blocks * size).map_err(|f| failure(f, true))?;
        }
        Ok(())
    }
}
