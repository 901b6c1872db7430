//! Requests: their form (virtio 1.2, 5.2.6), and carrying them out in place.

use super::{Disk, MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};
use crate::storage::Judgement;
use crate::storage::pieces::Pieces;
use bus::virtio::{Chain, QueueError, Writer};
use memory::GuestMemory;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

/// Status byte: done.
pub(super) const OK: u8 = 0;
/// Status byte: failed.
pub(super) const IOERR: u8 = 1;
/// Status byte: not something this device does.
pub(super) const UNSUPPORTED: u8 = 2;

/// Not a status: the policy wants the machine stopped, and the request tried again later.
pub(super) const STOP: u8 = 0xff;

/// Request types.
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Discard and zeroing: the space may be given back.
const UNMAP: u32 = 1;

/// Bytes copied at a time where the image takes no guest memory.
const BOUNCE: usize = 128 << 10;

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    /// Refused before anything is done, with this status.
    Refuse(u8),
}

/// A request taken from a queue.
#[derive(Debug)]
pub(super) struct Request {
    /// Index of its queue among the worker's.
    pub(super) queue: usize,
    pub(super) chain: Chain,
    pub(super) operation: Operation,
    /// Byte offset on the disk.
    pub(super) offset: u64,
    /// Bytes of data, without header and status.
    pub(super) len: u64,
    /// The data's memory, for reads and writes that go to a descriptor.
    pub(super) pieces: Pieces,
    status_at: u64,
}

/// Bytes of the header.
const HEADER: u64 = 16;

impl Request {
    pub(super) fn new() -> Self {
        Self {
            queue: 0,
            chain: Chain::new(),
            operation: Operation::Refuse(IOERR),
            offset: 0,
            len: 0,
            pieces: Pieces::default(),
            status_at: 0,
        }
    }

    /// Reads the header of the chain just taken and checks what it asks against the disk.
    ///
    /// # Errors
    /// No room for a header or a status, so that not even a refusal can be told.
    pub(super) fn parse(&mut self, memory: &GuestMemory, disk: &Disk) -> Result<(), QueueError> {
        self.status_at = status_address(&self.chain).ok_or(QueueError::TooShort)?;
        let header: [u8; HEADER as usize] = self.chain.reader(memory).read_array()?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let (sent, room) = (self.chain.readable_len() - HEADER, self.chain.writable_len() - 1);
        self.operation = match u32::from_le_bytes([a, b, c, d]) {
            T_IN => Operation::Read,
            T_OUT => Operation::Write,
            T_FLUSH => Operation::Flush,
            T_GET_ID => Operation::GetId,
            T_DISCARD => Operation::Discard,
            T_WRITE_ZEROES => Operation::WriteZeroes,
            _ => Operation::Refuse(UNSUPPORTED),
        };
        self.len = if matches!(self.operation, Operation::Read | Operation::GetId) { room } else { sent };
        self.offset = 0;
        match self.operation {
            Operation::Read | Operation::Write => {
                let end = sector.checked_add(self.len / SECTOR);
                let fits = self.len.is_multiple_of(disk.block_size.into())
                    && end.is_some_and(|e| e <= disk.sectors());
                if fits {
                    self.offset = sector * SECTOR;
                } else {
                    self.operation = Operation::Refuse(IOERR);
                }
            }
            Operation::Discard | Operation::WriteZeroes => {
                let ranges = self.len / 16;
                if !self.len.is_multiple_of(16) || !(1..=u64::from(MAX_RANGES)).contains(&ranges) {
                    self.operation = Operation::Refuse(IOERR);
                }
            }
            _ => {}
        }
        let writes = matches!(self.operation, Operation::Write | Operation::Discard | Operation::WriteZeroes);
        if writes && disk.read_only {
            self.operation = Operation::Refuse(IOERR);
        }
        Ok(())
    }

    /// Finds the host memory of a read's or write's data.
    pub(super) fn find_pieces(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        self.pieces.clear();
        let pieces = &mut self.pieces;
        if self.operation == Operation::Read {
            self.chain.writer(memory).slices(self.len, |s| pieces.push(s))?;
        } else {
            let mut reader = self.chain.reader(memory);
            reader.skip(HEADER)?;
            reader.slices(self.len, |s| pieces.push(s))?;
        }
        Ok(())
    }

    /// Carries the request out, now and here. Returns the status.
    pub(super) fn perform(
        &mut self,
        memory: &GuestMemory,
        disk: &Disk,
        direct: Option<&Direct<'_>>,
        bounce: &mut Vec<u8>,
    ) -> Result<u8, QueueError> {
        let done = match self.operation {
            Operation::Refuse(status) => return Ok(status),
            Operation::Read | Operation::Write => match direct {
                Some(direct) => return self.move_direct(memory, disk, direct, 0),
                None => self.move_copied(memory, disk, bounce)?,
            },
            Operation::Flush => report(disk, "flush", disk.image.flush()),
            Operation::GetId => {
                let mut id = disk.serial.as_slice();
                id = &id[..(id.len() as u64).min(self.len) as usize];
                self.chain.writer(memory).write(id)?;
                OK
            }
            Operation::Discard | Operation::WriteZeroes => self.change_ranges(memory, disk)?,
        };
        Ok(done)
    }

    /// Moves data between the descriptor and guest memory; `done` bytes have been moved already.
    pub(super) fn move_direct(
        &mut self,
        memory: &GuestMemory,
        disk: &Disk,
        direct: &Direct<'_>,
        done: u64,
    ) -> Result<u8, QueueError> {
        self.find_pieces(memory)?;
        let at = direct.base + self.offset;
        if self.operation == Operation::Write {
            let durable = !disk.writeback.load(Ordering::Relaxed);
            let written = self.pieces.write_all(direct.fd, at, done, durable);
            return Ok(match written {
                Ok(n) if n == self.len => OK,
                Ok(_) => {
                    report(disk, "write", Err(block::Error::io("short write", std::io::ErrorKind::WriteZero)))
                }
                Err(e) => report(disk, "write", Err(block::Error::io("write", e))),
            });
        }
        match self.pieces.read_all(direct.fd, at, done) {
            Ok(n) => self.finish_read(memory, n).map(|()| OK),
            Err(e) => {
                // How much came before the error is not known.
                mark_written(&mut self.chain.writer(memory), self.len)?;
                Ok(report(disk, "read", Err(block::Error::io("read", e))))
            }
        }
    }

    /// A read has brought `n` bytes from a file that ends there; what follows on the disk is zeros.
    pub(super) fn finish_read(&self, memory: &GuestMemory, n: u64) -> Result<(), QueueError> {
        let mut writer = self.chain.writer(memory);
        mark_written(&mut writer, n)?;
        let mut left = self.len.saturating_sub(n);
        while left > 0 {
            let piece = left.min(512);
            writer.write(&[0; 512][..piece as usize])?;
            left -= piece;
        }
        Ok(())
    }

    /// Moves data through a buffer, for images that do more than read and write a file.
    fn move_copied(&self, memory: &GuestMemory, disk: &Disk, bounce: &mut Vec<u8>) -> Result<u8, QueueError> {
        let mut reader = self.chain.reader(memory);
        let mut writer = self.chain.writer(memory);
        let reading = self.operation == Operation::Read;
        if !reading {
            reader.skip(HEADER)?;
        }
        let mut done = 0;
        while done < self.len {
            let n = (self.len - done).min(BOUNCE as u64) as usize;
            bounce.resize(n.max(bounce.len()), 0);
            let piece = &mut bounce[..n];
            let at = self.offset + done;
            let result = if reading {
                disk.image.read_at(piece, at)
            } else {
                reader.read(piece)?;
                disk.image.write_at(piece, at)
            };
            if result.is_err() {
                return Ok(report(disk, if reading { "read" } else { "write" }, result));
            }
            if reading {
                writer.write(piece)?;
            }
            done += n as u64;
        }
        if !reading && !disk.writeback.load(Ordering::Relaxed) {
            return Ok(report(disk, "flush", disk.image.flush()));
        }
        Ok(OK)
    }

    fn change_ranges(&self, memory: &GuestMemory, disk: &Disk) -> Result<u8, QueueError> {
        let discard = self.operation == Operation::Discard;
        let mut reader = self.chain.reader(memory);
        reader.skip(HEADER)?;
        for _ in 0..self.len / 16 {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = reader.read_array()?;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let count = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            // Discards take no flag, zeroing the one (virtio 1.2, 5.2.6.2).
            if flags & !UNMAP != 0 || discard && flags != 0 {
                return Ok(UNSUPPORTED);
            }
            let fits = sector.checked_add(count.into()).is_some_and(|end| end <= disk.sectors());
            if !fits || count > MAX_RANGE_SECTORS {
                return Ok(IOERR);
            }
            let (offset, len) = (sector * SECTOR, u64::from(count) * SECTOR);
            let status = if discard {
                report(disk, "discard", disk.image.discard(offset, len))
            } else {
                report(disk, "write zeroes", disk.image.write_zeroes(offset, len, flags & UNMAP != 0))
            };
            if status != OK {
                return Ok(status);
            }
        }
        if !discard && !disk.writeback.load(Ordering::Relaxed) {
            return Ok(report(disk, "flush", disk.image.flush()));
        }
        Ok(OK)
    }

    /// Writes the status; returns what the ring is told has been written.
    pub(super) fn finish(&self, memory: &GuestMemory, status: u8) -> Result<u32, QueueError> {
        memory.write(self.status_at, &[status])?;
        let data = match self.operation {
            // All up to the status byte counts as written, and is: reads fill their buffers or fail.
            Operation::Read | Operation::GetId if status == OK => self.len,
            _ => 0,
        };
        Ok(data as u32 + 1) // a chain is below 4 GiB
    }
}

/// A descriptor to do I/O on without asking the image.
pub(super) struct Direct<'a> {
    pub(super) fd: BorrowedFd<'a>,
    /// Where the disk starts in the file.
    pub(super) base: u64,
    /// What offsets, lengths and addresses must be multiples of.
    pub(super) alignment: u32,
}

/// The status for the result of an operation, as the drive's policy wants it.
fn report(disk: &Disk, what: &str, result: block::Result<()>) -> u8 {
    let Err(e) = result else { return OK };
    match disk.drive.judge(what, what != "read", &e) {
        Judgement::Report(_) => IOERR,
        Judgement::Ignore => OK,
        Judgement::Stop => STOP,
    }
}

/// The status for an error that the host reports by number.
pub(super) fn report_errno(disk: &Disk, what: &str, errno: i32) -> u8 {
    let error = std::io::Error::from_raw_os_error(errno);
    report(disk, what, Err(block::Error::io(what, error)))
}

/// Marks the first `len` bytes of a writer's buffers as written by the host.
fn mark_written(writer: &mut Writer<'_>, len: u64) -> Result<(), QueueError> {
    writer.slices(len, |slice| slice.wrote()).map(drop)
}

/// Address of the last byte that the device may write: a request's status.
fn status_address(chain: &Chain) -> Option<u64> {
    let last = chain.writable().last()?;
    Some(last.addr + u64::from(last.len) - 1) // segments are in RAM and not empty
}
