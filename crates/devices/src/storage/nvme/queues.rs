//! Submission and completion queues (NVMe 1.4, 4.1).

use super::command::{CQE, Command, SQE, Status};
use memory::GuestMemory;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Most entries of a queue, as the capabilities say.
pub(super) const MOST_ENTRIES: u32 = 2048;

/// A submission queue.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Submission {
    pub(super) base: u64,
    pub(super) size: u32,
    pub(super) head: u32,
    pub(super) tail: u32,
    /// Completion queue.
    pub(super) cq: u16,
    /// A worker fetches from it.
    #[serde(skip)]
    pub(super) serving: bool,
}

impl Submission {
    /// Fetches the next command; `None` if there is none.
    pub(super) fn fetch(&mut self, memory: &GuestMemory) -> Option<memory::Result<Command>> {
        if self.head == self.tail {
            return None;
        }
        let mut bytes = [0; SQE as usize];
        let at = self.base.wrapping_add(u64::from(self.head) * SQE);
        self.head = (self.head + 1) % self.size;
        Some(memory.read(at, &mut bytes).map(|()| Command::parse(&bytes)))
    }

    pub(super) fn is_valid(&self) -> bool {
        (2..=MOST_ENTRIES).contains(&self.size) && self.head < self.size && self.tail < self.size
    }
}

/// A completion as it waits for room.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Completion {
    pub(super) result: u32,
    pub(super) sq: u16,
    pub(super) head: u16,
    pub(super) id: u16,
    pub(super) status: u16,
}

/// A completion queue.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Completions {
    pub(super) base: u64,
    pub(super) size: u32,
    pub(super) head: u32,
    pub(super) tail: u32,
    pub(super) phase: bool,
    pub(super) vector: u16,
    pub(super) interrupts: bool,
    /// Entries for which there was no room: bounded, since nothing is fetched meanwhile.
    pub(super) waiting: VecDeque<Completion>,
}

impl Completions {
    fn full(&self) -> bool {
        (self.tail + 1) % self.size == self.head
    }

    /// Writes what waits, as far as there is room. Returns whether anything was written.
    pub(super) fn flush(&mut self, memory: &GuestMemory) -> memory::Result<bool> {
        let mut any = false;
        while !self.full()
            && let Some(c) = self.waiting.pop_front()
        {
            let mut entry = [0; CQE as usize];
            entry[..4].copy_from_slice(&c.result.to_le_bytes());
            entry[8..10].copy_from_slice(&c.head.to_le_bytes());
            entry[10..12].copy_from_slice(&c.sq.to_le_bytes());
            entry[12..14].copy_from_slice(&c.id.to_le_bytes());
            let at = self.base.wrapping_add(u64::from(self.tail) * CQE);
            // The phase bit last: it is what the driver looks at.
            memory.write(at, &entry[..14])?;
            std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
            let status = c.status << 1 | u16::from(!self.phase);
            memory.write(at + 14, &status.to_le_bytes())?;
            self.tail = (self.tail + 1) % self.size;
            if self.tail == 0 {
                self.phase = !self.phase;
            }
            any = true;
        }
        Ok(any)
    }

    /// Something is there that the driver has not taken.
    pub(super) fn pending(&self) -> bool {
        self.head != self.tail
    }

    pub(super) fn is_valid(&self) -> bool {
        (2..=MOST_ENTRIES).contains(&self.size)
            && self.head < self.size
            && self.tail < self.size
            && self.waiting.len() <= 2 * MOST_ENTRIES as usize
    }
}

impl Completion {
    pub(super) fn new(sq: u16, head: u32, id: u16, result: u32, status: Status) -> Self {
        Self { result, sq, head: head as u16, id, status: status.field() } // queues are short
    }
}
