//! Commands and their completions (NVMe 1.4, 4.2 and 4.6), and the memory they name (4.3).

use crate::storage::Sg;
use memory::GuestMemory;

/// Bytes of a submission queue entry and of a completion queue entry.
pub(super) const SQE: u64 = 64;
pub(super) const CQE: u64 = 16;

/// A status: its type in bits 10:8, its code below (4.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status(pub(super) u16);

impl Status {
    pub(super) const OK: Self = Self(0);
    pub(super) const INVALID_OPCODE: Self = Self(0x01);
    pub(super) const INVALID_FIELD: Self = Self(0x02);
    pub(super) const DATA_TRANSFER: Self = Self(0x04);
    pub(super) const ABORTED: Self = Self(0x07);
    pub(super) const INVALID_NAMESPACE: Self = Self(0x0b);
    pub(super) const PRP_OFFSET: Self = Self(0x13);
    pub(super) const WRITE_PROTECTED: Self = Self(0x20);
    pub(super) const LBA_RANGE: Self = Self(0x80);
    pub(super) const CAPACITY: Self = Self(0x81);
    pub(super) const INVALID_CQ: Self = Self(0x100);
    pub(super) const INVALID_QID: Self = Self(0x101);
    pub(super) const INVALID_SIZE: Self = Self(0x102);
    pub(super) const TOO_MANY_EVENTS: Self = Self(0x105);
    pub(super) const INVALID_VECTOR: Self = Self(0x108);
    pub(super) const INVALID_LOG: Self = Self(0x109);
    pub(super) const INVALID_DELETION: Self = Self(0x10c);
    pub(super) const NOT_SAVEABLE: Self = Self(0x10d);
    pub(super) const NOT_CHANGEABLE: Self = Self(0x10e);
    pub(super) const WRITE_FAULT: Self = Self(0x280);
    pub(super) const READ_ERROR: Self = Self(0x281);
    pub(super) const COMPARE: Self = Self(0x285);

    /// With "do not retry": trying again would end the same way.
    pub(super) fn field(self) -> u16 {
        let transient = [Self::OK, Self::DATA_TRANSFER, Self::ABORTED].contains(&self);
        self.0 | if transient { 0 } else { 1 << 14 }
    }
}

/// A submission queue entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Command(pub(super) [u32; 16]);

impl Command {
    pub(super) fn parse(bytes: &[u8; SQE as usize]) -> Self {
        let mut words = [0; 16];
        for (word, b) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*b);
        }
        Self(words)
    }

    pub(super) fn opcode(&self) -> u8 {
        self.0[0] as u8
    }

    pub(super) fn id(&self) -> u16 {
        (self.0[0] >> 16) as u16
    }

    pub(super) fn nsid(&self) -> u32 {
        self.0[1]
    }

    /// A command word.
    pub(super) fn dw(&self, n: usize) -> u32 {
        self.0[n]
    }

    /// Two of them.
    pub(super) fn qw(&self, n: usize) -> u64 {
        u64::from(self.0[n]) | u64::from(self.0[n + 1]) << 32
    }

    /// Not fused, and data by physical region pages: all that is offered.
    pub(super) fn is_plain(&self) -> bool {
        self.0[0] >> 8 & 0xc3 == 0
    }

    /// The memory of `len` bytes of data (4.3). At most as long as the largest transfer, so the lists are short.
    pub(super) fn data(&self, memory: &GuestMemory, page: u64, len: u64) -> Result<Sg, Status> {
        let mut sg = Sg::new();
        let push = |sg: &mut Sg, at: u64, n: u64| sg.push(memory, at, n).map_err(|_| Status::DATA_TRANSFER);
        let (first, second) = (self.qw(6), self.qw(8));
        if first & 3 != 0 {
            return Err(Status::PRP_OFFSET);
        }
        let part = (page - first % page).min(len);
        push(&mut sg, first, part)?;
        let mut left = len - part;
        if left == 0 {
            return Ok(sg);
        }
        if left <= page {
            if !second.is_multiple_of(page) {
                return Err(Status::PRP_OFFSET);
            }
            push(&mut sg, second, left)?;
            return Ok(sg);
        }
        // A list of pages; the last entry of a page of the list leads to the next.
        let mut at = second;
        if at & 7 != 0 {
            return Err(Status::PRP_OFFSET);
        }
        while left > 0 {
            let entry: u64 = memory.read_obj(at).map_err(|_| Status::DATA_TRANSFER)?;
            let last = (at + 8).is_multiple_of(page);
            if last && left > page {
                if !entry.is_multiple_of(page) {
                    return Err(Status::PRP_OFFSET);
                }
                // It starts at the beginning of a page, so each page of the list gives some data: this ends.
                at = entry;
                continue;
            }
            if !entry.is_multiple_of(page) {
                return Err(Status::PRP_OFFSET);
            }
            let n = left.min(page);
            push(&mut sg, entry, n)?;
            left -= n;
            at += 8;
        }
        Ok(sg)
    }
}
