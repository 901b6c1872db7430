//! Virtqueues (virtio 1.2, 2.6 to 2.8): one interface, two ring layouts.
//!
//! Our own rather than a crate's because both layouts sit behind one batch interface, chains are reused instead of
//! allocated, and every hostile layout has to end in one well-defined state: the queue is broken until reset.

mod packed;
mod split;

use super::{Chain, feature};
use memory::GuestMemory;
use packed::Packed;
use serde::{Deserialize, Serialize};
use split::Split;

/// Descriptors that a chain may have where the queue itself is shorter (indirect tables).
const LONGEST_CHAIN: u32 = 1024;

/// What the driver did wrong.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A buffer or ring that is not in guest RAM.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// A ring part that is not aligned, or a size that is not possible.
    #[error("queue size {size} or ring addresses are not valid")]
    Layout {
        /// Size the driver chose.
        size: u16,
    },
    /// A chain that is a loop, or has more descriptors than it may.
    #[error("descriptor chain is a loop or has too many descriptors")]
    Loop,
    /// A chain of 4 GiB or more.
    #[error("descriptor chain is longer than 4 GiB")]
    TooLong,
    /// An index outside the descriptor table.
    #[error("descriptor index {0} is outside the table")]
    Index(u16),
    /// An indirect table that is empty, ragged, nested, chained on, or not negotiated.
    #[error("indirect descriptor is not valid")]
    Indirect,
    /// A buffer for the device to read after one for it to write.
    #[error("readable descriptor after a writable one")]
    Order,
    /// More buffers available than the ring has room for.
    #[error("more buffers are available or in flight than the ring holds")]
    Overflow,
    /// A request shorter than its header.
    #[error("request is too short")]
    TooShort,
    /// An earlier error; nothing is taken from the queue until it is reset.
    #[error("queue is broken")]
    Broken,
}

/// What the driver has set up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueConfig {
    /// Number of entries.
    pub size: u16,
    /// The driver has enabled the queue.
    pub ready: bool,
    /// Descriptor table, or the packed ring.
    pub descriptors: u64,
    /// Available ring, or the driver's event suppression.
    pub driver: u64,
    /// Used ring, or the device's event suppression.
    pub device: u64,
}

/// How far the device has got. For packed rings bit 15 is the wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueuePosition {
    /// Next entry to take.
    pub next_available: u16,
    /// Next entry to give back.
    pub next_used: u16,
}

/// A virtqueue, from the device's side.
#[derive(Debug)]
pub struct Queue {
    ring: Ring,
    mem: GuestMemory,
    broken: bool,
}

#[derive(Debug)]
enum Ring {
    Split(Split),
    Packed(Packed),
}

impl Queue {
    /// A queue over the rings that the driver has set up; `position` continues a saved one.
    ///
    /// # Errors
    /// Rings that are misaligned or not in RAM, or a size that is not possible.
    pub fn new(
        mem: &GuestMemory,
        config: &QueueConfig,
        features: u64,
        position: Option<QueuePosition>,
    ) -> Result<Self, QueueError> {
        let ring = if features & feature::RING_PACKED != 0 {
            Ring::Packed(Packed::new(mem, config, features, position)?)
        } else {
            Ring::Split(Split::new(mem, config, features, position)?)
        };
        Ok(Self { ring, mem: mem.clone(), broken: false })
    }

    /// Number of entries; no more chains than that are ever out.
    pub fn size(&self) -> u16 {
        match &self.ring {
            Ring::Split(r) => r.size,
            Ring::Packed(r) => r.size,
        }
    }

    /// Guest memory, which chains of this queue lie in.
    pub fn memory(&self) -> &GuestMemory {
        &self.mem
    }

    /// Whether an earlier error stopped the queue.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Stops the queue until reset, for a request whose form is wrong; the device calls [`super::Interrupt::fail`].
    pub fn mark_broken(&mut self) {
        self.broken = true;
    }

    fn guard<T>(
        &mut self,
        f: impl FnOnce(&mut Ring, &GuestMemory) -> Result<T, QueueError>,
    ) -> Result<T, QueueError> {
        if self.broken {
            return Err(QueueError::Broken);
        }
        f(&mut self.ring, &self.mem).inspect_err(|_| self.broken = true)
    }

    /// Takes the next available chain into `chain`; `false` if there is none.
    ///
    /// # Errors
    /// A ring or chain that no driver may make. The queue is then broken, and every later call fails; the device
    /// calls [`super::Interrupt::fail`].
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        chain.clear();
        self.guard(|ring, mem| match ring {
            Ring::Split(r) => r.pop(mem, chain),
            Ring::Packed(r) => r.pop(mem, chain),
        })
    }

    /// Whether there is something to take: for devices that watch a queue for a while instead of being notified.
    pub fn has_available(&mut self) -> bool {
        let there = match &mut self.ring {
            Ring::Split(r) => r.look(&self.mem),
            Ring::Packed(r) => r.look(&self.mem),
        };
        // What is wrong with the ring, `pop` says.
        !self.broken && there.unwrap_or(true)
    }

    /// [`Self::pop`]; if there is none, asks the driver to notify about the next.
    ///
    /// # Errors
    /// As for [`Self::pop`].
    pub fn pop_or_listen(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        Ok(self.pop(chain)? || self.enable_notifications()? && self.pop(chain)?)
    }

    /// Puts the chain last popped back as if it had not been taken.
    pub fn unpop(&mut self, chain: &Chain) {
        match &mut self.ring {
            Ring::Split(r) => r.unpop(),
            Ring::Packed(r) => r.unpop(chain),
        }
    }

    /// Gives a chain back, `written` bytes of it filled. The driver sees it with the next [`Self::publish`].
    ///
    /// # Errors
    /// As for [`Self::pop`].
    pub fn push(&mut self, chain: &Chain, written: u32) -> Result<(), QueueError> {
        self.guard(|ring, mem| match ring {
            Ring::Split(r) => r.push(mem, chain, written),
            Ring::Packed(r) => r.push(mem, chain, written),
        })
    }

    /// Shows the driver what was pushed. Returns whether it wants an interrupt for that.
    ///
    /// # Errors
    /// As for [`Self::pop`].
    pub fn publish(&mut self) -> Result<bool, QueueError> {
        self.guard(|ring, mem| match ring {
            Ring::Split(r) => r.publish(mem),
            Ring::Packed(r) => r.publish(mem),
        })
    }

    /// Asks the driver not to notify, while the device is looking anyway. A hint.
    ///
    /// # Errors
    /// As for [`Self::pop`].
    pub fn disable_notifications(&mut self) -> Result<(), QueueError> {
        self.guard(|ring, mem| match ring {
            Ring::Split(r) => r.disable_notifications(mem),
            Ring::Packed(r) => r.disable_notifications(mem),
        })
    }

    /// Asks the driver to notify about the next buffer. Returns whether one came in the meantime, without a
    /// notification: then the device looks again before it sleeps.
    ///
    /// # Errors
    /// As for [`Self::pop`].
    pub fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        self.guard(|ring, mem| match ring {
            Ring::Split(r) => r.enable_notifications(mem),
            Ring::Packed(r) => r.enable_notifications(mem),
        })
    }

    /// Chains popped and not pushed.
    pub fn in_flight(&self) -> u16 {
        match &self.ring {
            Ring::Split(r) => r.in_flight,
            Ring::Packed(r) => r.in_flight,
        }
    }

    /// How far the device has got, for saving. Chains in flight count as taken.
    pub fn position(&self) -> QueuePosition {
        match &self.ring {
            Ring::Split(r) => r.position(),
            Ring::Packed(r) => r.position(),
        }
    }
}

/// A descriptor as it lies in memory (virtio 1.2, 2.7.5 and 2.8.13; the last two fields differ).
#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    /// Split: flags. Packed: buffer ID.
    a: u16,
    /// Split: next. Packed: flags.
    b: u16,
}

/// Descriptor flags.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

impl Descriptor {
    const LEN: u64 = 16;

    #[inline]
    fn read(mem: &GuestMemory, addr: u64) -> Result<Self, QueueError> {
        let mut b = [0; 16];
        mem.read(addr, &mut b)?;
        let word = |i: usize| u16::from_le_bytes([b[i], b[i + 1]]);
        let long = |i: usize| u32::from(word(i)) | u32::from(word(i + 2)) << 16;
        Ok(Self {
            addr: u64::from(long(0)) | u64::from(long(4)) << 32,
            len: long(8),
            a: word(12),
            b: word(14),
        })
    }

    /// Number of entries of the indirect table that this descriptor points to.
    fn table_entries(&self) -> Result<u32, QueueError> {
        if self.len == 0 || !u64::from(self.len).is_multiple_of(Self::LEN) {
            return Err(QueueError::Indirect);
        }
        Ok(self.len / Self::LEN as u32)
    }
}

/// Whether the step from `old` to `new` passes `event` (virtio 1.2, 2.7.10.1).
fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
