//! Structures in guest memory: TRBs and contexts (xHCI 1.2, 6).

use memory::GuestMemory;

/// A transfer request block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Trb {
    pub(super) parameter: u64,
    pub(super) status: u32,
    pub(super) control: u32,
}

/// Types of TRBs.
pub(super) mod kind {
    pub(crate) const NORMAL: u32 = 1;
    pub(crate) const SETUP: u32 = 2;
    pub(crate) const DATA: u32 = 3;
    pub(crate) const STATUS: u32 = 4;
    pub(crate) const ISOCH: u32 = 5;
    pub(crate) const LINK: u32 = 6;
    pub(crate) const EVENT_DATA: u32 = 7;
    pub(crate) const NO_OP: u32 = 8;
    pub(crate) const ENABLE_SLOT: u32 = 9;
    pub(crate) const DISABLE_SLOT: u32 = 10;
    pub(crate) const ADDRESS_DEVICE: u32 = 11;
    pub(crate) const CONFIGURE_ENDPOINT: u32 = 12;
    pub(crate) const EVALUATE_CONTEXT: u32 = 13;
    pub(crate) const RESET_ENDPOINT: u32 = 14;
    pub(crate) const STOP_ENDPOINT: u32 = 15;
    pub(crate) const SET_DEQUEUE: u32 = 16;
    pub(crate) const RESET_DEVICE: u32 = 17;
    pub(crate) const NO_OP_COMMAND: u32 = 23;
    pub(crate) const TRANSFER_EVENT: u32 = 32;
    pub(crate) const COMMAND_COMPLETION: u32 = 33;
    pub(crate) const PORT_STATUS_CHANGE: u32 = 34;
}

/// Completion codes.
pub(super) mod code {
    pub(crate) const SUCCESS: u32 = 1;
    pub(crate) const TRANSACTION_ERROR: u32 = 4;
    pub(crate) const TRB_ERROR: u32 = 5;
    pub(crate) const STALL: u32 = 6;
    pub(crate) const NO_SLOTS: u32 = 9;
    pub(crate) const SLOT_NOT_ENABLED: u32 = 11;
    pub(crate) const ENDPOINT_NOT_ENABLED: u32 = 12;
    pub(crate) const SHORT_PACKET: u32 = 13;
    pub(crate) const PARAMETER_ERROR: u32 = 17;
    pub(crate) const CONTEXT_STATE: u32 = 19;
    pub(crate) const COMMAND_RING_STOPPED: u32 = 24;
    pub(crate) const STOPPED: u32 = 26;
}

impl Trb {
    pub(super) const CYCLE: u32 = 1;
    /// Link: the cycle bit toggles.
    pub(super) const TOGGLE: u32 = 1 << 1;
    /// An event is wanted if less than asked for comes.
    pub(super) const SHORT: u32 = 1 << 2;
    pub(super) const CHAIN: u32 = 1 << 4;
    /// An event is wanted on completion.
    pub(super) const IOC: u32 = 1 << 5;
    /// The parameter is the data.
    pub(super) const IMMEDIATE: u32 = 1 << 6;

    pub(super) fn load(memory: &GuestMemory, at: u64) -> Option<Self> {
        let mut raw = [0; 16];
        memory.read(at, &mut raw).ok()?;
        let word = |i: usize| u32::from_le_bytes([raw[i], raw[i + 1], raw[i + 2], raw[i + 3]]);
        let parameter = u64::from(word(0)) | u64::from(word(4)) << 32;
        Some(Self { parameter, status: word(8), control: word(12) })
    }

    pub(super) fn store(self, memory: &GuestMemory, at: u64) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&self.parameter.to_le_bytes());
        raw[8..12].copy_from_slice(&self.status.to_le_bytes());
        // The word with the cycle bit goes last.
        let written = memory
            .write(at, &raw[..12])
            .and_then(|()| memory.store_u32(at + 12, self.control, std::sync::atomic::Ordering::Release));
        if let Err(e) = written {
            tracing::debug!("xHCI: event at {at:#x}: {e}");
        }
    }

    pub(super) fn kind(&self) -> u32 {
        self.control >> 10 & 0x3f
    }

    pub(super) fn has(&self, flag: u32) -> bool {
        self.control & flag != 0
    }

    pub(super) fn slot(&self) -> u8 {
        (self.control >> 24) as u8
    }

    /// Bytes of a transfer's piece.
    pub(super) fn length(&self) -> u32 {
        self.status & 0x1_ffff
    }
}

/// A ring that the controller reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Ring {
    pub(super) at: u64,
    pub(super) cycle: bool,
}

/// Most links that are followed without anything between them.
const MOST_LINKS: u32 = 8;

impl Ring {
    pub(super) fn new(pointer: u64) -> Self {
        Self { at: pointer & !0xf, cycle: pointer & 1 != 0 }
    }

    pub(super) fn pointer(&self) -> u64 {
        self.at | u64::from(self.cycle)
    }

    /// The next TRB that is not a link, and where it is; the ring moves past it.
    pub(super) fn next(&mut self, memory: &GuestMemory) -> Option<(u64, Trb)> {
        for _ in 0..MOST_LINKS {
            let trb = Trb::load(memory, self.at)?;
            if trb.has(Trb::CYCLE) != self.cycle {
                return None;
            }
            if trb.kind() == kind::LINK {
                self.at = trb.parameter & !0xf;
                self.cycle ^= trb.has(Trb::TOGGLE);
                continue;
            }
            let at = self.at;
            self.at = self.at.wrapping_add(16);
            return Some((at, trb));
        }
        None
    }
}

/// A context of 32 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Context(pub(super) [u32; 8]);

impl Context {
    pub(super) const LENGTH: u64 = 32;

    pub(super) fn load(memory: &GuestMemory, at: u64) -> Option<Self> {
        let mut raw = [0; 32];
        memory.read(at, &mut raw).ok()?;
        let words = raw.as_chunks::<4>().0;
        Some(Self(std::array::from_fn(|i| u32::from_le_bytes(words[i]))))
    }

    pub(super) fn store(&self, memory: &GuestMemory, at: u64) {
        let raw: Vec<u8> = self.0.iter().flat_map(|w| w.to_le_bytes()).collect();
        if let Err(e) = memory.write(at, &raw) {
            tracing::debug!("xHCI: context at {at:#x}: {e}");
        }
    }

    /// Replaces bits of a word.
    pub(super) fn set(&mut self, word: usize, mask: u32, value: u32) {
        self.0[word] = self.0[word] & !mask | value & mask;
    }
}
