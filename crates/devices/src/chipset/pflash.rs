//! Parallel flash with Intel's command set (CFI, JEDEC JESD68.01; Intel StrataFlash datasheet), as UEFI firmware keeps
//! its variables in. While the chip is in its array mode the guest reads it as memory.

use accel::{Slot, SlotId, Vm};
use bus::{Device, RegionId, State, StateError};
use memory::{GuestMemory, PAGE_SIZE, Region};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

const KIND: &str = "pflash";

/// Size of a block, the unit of erasing, in bytes.
const BLOCK: u64 = 4096;
/// Bytes that one buffered write takes at most.
const BUFFER: usize = 2048;
const MANUFACTURER: u8 = 0x89;
const DEVICE: u8 = 0x18;

mod command {
    pub const READ_ARRAY: u8 = 0xff;
    pub const PROGRAM: u8 = 0x10;
    pub const PROGRAM_TOO: u8 = 0x40;
    pub const ERASE: u8 = 0x20;
    pub const CLEAR_STATUS: u8 = 0x50;
    pub const LOCK: u8 = 0x60;
    pub const READ_STATUS: u8 = 0x70;
    pub const READ_ID: u8 = 0x90;
    pub const QUERY: u8 = 0x98;
    pub const CONFIRM: u8 = 0xd0;
    pub const BUFFERED: u8 = 0xe8;
}

const READY: u8 = 1 << 7;
const ERASE_FAILED: u8 = 1 << 5;
const PROGRAM_FAILED: u8 = 1 << 4;

/// What the chip does with the next access.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
enum Mode {
    /// Memory.
    #[default]
    Array,
    /// Reads give the status register.
    Status,
    /// Reads give identifiers.
    Id,
    /// Reads give the query table.
    Query,
    /// The next byte is programmed.
    Program,
    /// The next write confirms an erasure.
    Erase,
    /// The next write says what to lock.
    Lock,
    /// The next write is the number of bytes, less one, to come.
    BufferCount,
    /// Bytes to program; then a confirmation.
    Buffer { left: u32, bytes: Vec<(u64, u8)> },
}

/// The chip.
pub struct Flash {
    vm: Arc<dyn Vm>,
    region: Region,
    memory: GuestMemory,
    slot: Option<SlotId>,
    /// Where changes are kept.
    store: Option<File>,
    readonly: bool,
    dirty: Option<Range<u64>>,
    mode: Mode,
    status: u8,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    mode: Mode,
    status: u8,
    /// The contents in hexadecimal, a string for each block that is not erased.
    blocks: Vec<(u64, String)>,
}

impl Flash {
    /// A chip whose contents are `region`, at the region's own address. What the guest changes is written to `store`
    /// at the same offset; with `readonly` it can change nothing.
    ///
    /// # Errors
    /// The accelerator's refusal.
    pub fn new(vm: Arc<dyn Vm>, region: Region, store: Option<File>, readonly: bool) -> accel::Result<Self> {
        let memory = GuestMemory::from_regions(vec![region.clone()]);
        let mut flash = Self {
            vm,
            region,
            memory,
            slot: None,
            store,
            readonly,
            dirty: None,
            mode: Mode::Array,
            status: READY,
        };
        flash.show(true)?;
        Ok(flash)
    }

    /// Shows the contents as memory, or takes it away so that reads come here.
    fn show(&mut self, on: bool) -> accel::Result<()> {
        match (on, self.slot.take()) {
            (true, None) => {
                let Region { start, .. } = self.region;
                let len = self.region.len() & !(PAGE_SIZE - 1);
                let region = self.region.clone();
                self.slot = Some(self.vm.map(Slot { gpa: start, len, region, offset: 0, readonly: true })?);
            }
            (false, Some(slot)) => self.vm.unmap(slot)?,
            (_, slot) => self.slot = slot,
        }
        Ok(())
    }

    fn enter(&mut self, mode: Mode) {
        let array = mode == Mode::Array;
        self.mode = mode;
        if let Err(e) = self.show(array) {
            tracing::error!("cannot show the guest its flash memory: {e}");
        }
        if array {
            self.keep();
        }
    }

    /// Writes what has changed to the store.
    fn keep(&mut self) {
        let (Some(store), Some(range)) = (&self.store, self.dirty.clone()) else { return };
        let mut bytes = vec![0; (range.end - range.start) as usize]; // inside the chip
        let done = match self.memory.read(self.region.start + range.start, &mut bytes) {
            Ok(()) => store.write_all_at(&bytes, range.start),
            Err(e) => Err(io::Error::other(e)),
        };
        match done {
            Ok(()) => self.dirty = None,
            Err(e) => tracing::error!("cannot keep the firmware's variables: {e}"),
        }
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let end = at + bytes.len() as u64;
        // `at` is inside the chip: the bus saw to it, and blocks are.
        if self.memory.write(self.region.start + at, bytes).is_err() {
            return;
        }
        self.dirty = Some(match self.dirty.take() {
            Some(d) => d.start.min(at)..d.end.max(end),
            None => at..end,
        });
    }

    /// Programming only turns ones into zeros.
    fn program(&mut self, at: u64, byte: u8) {
        if self.readonly || at >= self.region.len() {
            self.status |= PROGRAM_FAILED;
            return;
        }
        let old: u8 = self.memory.read_obj(self.region.start + at).unwrap_or(0);
        self.put(at, &[old & byte]);
    }

    fn erase(&mut self, at: u64) {
        if self.readonly {
            self.status |= ERASE_FAILED;
            return;
        }
        let start = at & !(BLOCK - 1);
        let len = BLOCK.min(self.region.len().saturating_sub(start));
        self.put(start, &vec![0xff; len as usize]);
    }

    fn write_byte(&mut self, at: u64, value: u8) {
        match std::mem::take(&mut self.mode) {
            Mode::Program => {
                self.program(at, value);
                self.status |= READY;
                self.enter(Mode::Status);
            }
            Mode::Erase => {
                if value == command::CONFIRM {
                    self.erase(at);
                } else {
                    self.status |= ERASE_FAILED | PROGRAM_FAILED;
                }
                self.status |= READY;
                self.enter(if value == command::READ_ARRAY { Mode::Array } else { Mode::Status });
            }
            Mode::Lock => {
                // Nothing stays locked; the chip says that it did.
                self.status |= READY;
                self.enter(if value == command::READ_ARRAY { Mode::Array } else { Mode::Status });
            }
            Mode::BufferCount => {
                self.enter(Mode::Buffer { left: u32::from(value) + 1, bytes: Vec::new() });
            }
            Mode::Buffer { left: 0, bytes } => {
                if value == command::CONFIRM {
                    for (at, byte) in bytes {
                        self.program(at, byte);
                    }
                } else {
                    self.status |= PROGRAM_FAILED;
                }
                self.status |= READY;
                self.enter(Mode::Status);
            }
            Mode::Buffer { left, mut bytes } => {
                if bytes.len() < BUFFER {
                    bytes.push((at, value));
                }
                self.enter(Mode::Buffer { left: left - 1, bytes });
            }
            mode @ (Mode::Array | Mode::Status | Mode::Id | Mode::Query) => self.command(mode, value),
        }
    }

    fn command(&mut self, mode: Mode, value: u8) {
        let next = match value {
            command::READ_ARRAY | 0x00 => Mode::Array,
            command::PROGRAM | command::PROGRAM_TOO => Mode::Program,
            command::ERASE => Mode::Erase,
            command::CLEAR_STATUS => {
                self.status = 0;
                Mode::Array
            }
            command::LOCK => Mode::Lock,
            command::READ_STATUS => Mode::Status,
            command::READ_ID => Mode::Id,
            command::QUERY => Mode::Query,
            command::BUFFERED => {
                self.status |= READY;
                Mode::BufferCount
            }
            _ => {
                tracing::debug!("flash: unknown command {value:#x}");
                mode
            }
        };
        self.enter(next);
    }

    fn read_byte(&self, at: u64) -> u8 {
        match &self.mode {
            Mode::Array => self.memory.read_obj(self.region.start + at).unwrap_or(0xff),
            Mode::Id => match at & 0xff {
                0 => MANUFACTURER,
                1 => DEVICE,
                2 => u8::from(self.readonly),
                _ => 0,
            },
            Mode::Query => self.query(at & 0xff),
            _ => self.status,
        }
    }

    /// The query table (JESD68.01).
    fn query(&self, at: u64) -> u8 {
        let blocks = (self.region.len() / BLOCK).saturating_sub(1);
        let byte = |v: u64, n: u64| (v >> (8 * n)) as u8;
        match at {
            0x10..=0x12 => b"QRY"[(at - 0x10) as usize],
            0x13 => 1,    // command set: Intel's
            0x15 => 0x31, // address of its own table
            0x1b => 0x45, // supply voltage, 4.5 to 5.5 V
            0x1c => 0x55,
            0x1f | 0x23 => 7, // typical and longest programming times, as powers of two
            0x20 => 7,
            0x21 | 0x25 => 0xa,
            0x24 => 4,
            0x27 => self.region.len().next_power_of_two().trailing_zeros() as u8,
            0x28 => 2,
            0x2a => BUFFER.trailing_zeros() as u8,
            0x2c => 1, // regions of blocks
            0x2d | 0x2e => byte(blocks, at - 0x2d),
            0x2f | 0x30 => byte(BLOCK >> 8, at - 0x2f),
            0x31..=0x33 => b"PRI"[(at - 0x31) as usize],
            0x34 | 0x35 => b'1' - u8::from(at == 0x35),
            0x3f => 1,
            _ => 0,
        }
    }
}

impl Drop for Flash {
    fn drop(&mut self) {
        self.keep();
    }
}

impl Device for Flash {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, _: RegionId, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = self.read_byte(at);
        }
    }

    /// The chip's bus is a byte wide.
    fn write(&mut self, _: RegionId, offset: u64, data: &[u8]) {
        for (byte, at) in data.iter().zip(offset..) {
            self.write_byte(at, *byte);
        }
    }

    fn pause(&mut self) -> io::Result<()> {
        self.keep();
        Ok(())
    }

    /// The contents stay.
    fn reset(&mut self) {
        self.status = READY;
        self.enter(Mode::Array);
    }

    fn save(&self) -> Result<State, StateError> {
        let mut blocks = Vec::new();
        for start in (0..self.region.len()).step_by(BLOCK as usize) {
            let mut bytes = vec![0; BLOCK.min(self.region.len() - start) as usize];
            let read = self.memory.read(self.region.start + start, &mut bytes);
            if read.is_ok() && bytes.iter().any(|b| *b != 0xff) {
                blocks.push((start, bytes.iter().map(|b| format!("{b:02x}")).collect()));
            }
        }
        // A chip that cannot change has the contents that its file has.
        let blocks = if self.readonly { Vec::new() } else { blocks };
        State::new(KIND, 1, &Saved { mode: self.mode.clone(), status: self.status, blocks })
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(KIND, 1)?;
        let invalid = |reason: &str| StateError::Invalid { kind: KIND.into(), reason: reason.into() };
        let len = self.region.len();
        let mut contents = Vec::new();
        for (start, text) in &saved.blocks {
            let bytes: Option<Vec<u8>> = (0..text.len())
                .step_by(2)
                .map(|i| text.get(i..i + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok()))
                .collect();
            let bytes = bytes.filter(|b| start.checked_add(b.len() as u64).is_some_and(|end| end <= len));
            contents.push((*start, bytes.ok_or_else(|| invalid("contents that do not fit"))?));
        }
        if let Mode::Buffer { left, bytes } = &saved.mode
            && (*left > 256 || bytes.len() > BUFFER)
        {
            return Err(invalid("more bytes to program than its buffer holds"));
        }
        if !self.readonly {
            for start in (0..len).step_by(BLOCK as usize) {
                self.erase(start);
            }
            for (start, bytes) in contents {
                self.put(start, &bytes);
            }
        }
        self.status = saved.status;
        self.enter(saved.mode);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Slots;
    use super::*;
    use memory::Backing;

    const AT: RegionId = RegionId(0);
    const BASE: u64 = 0xffc0_0000;

    fn flash(store: Option<File>, readonly: bool) -> (Arc<Slots>, Flash) {
        let region = Region::new(BASE, 4 * BLOCK, &Backing::Anonymous, false).unwrap();
        GuestMemory::from_regions(vec![region.clone()]).fill(BASE, 4 * BLOCK, 0xff).unwrap();
        let vm = Arc::new(Slots::default());
        (vm.clone(), Flash::new(vm, region, store, readonly).unwrap())
    }

    fn get(f: &mut Flash, at: u64) -> u8 {
        let mut b = [0];
        f.read(AT, at, &mut b);
        b[0]
    }

    #[test]
    fn program_erase_and_keep() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * BLOCK).unwrap();
        let (vm, mut f) = flash(Some(file.try_clone().unwrap()), false);
        assert_eq!(vm.at(BASE), Some((0xff, false)), "readable memory");
        // How firmware tells flash from ROM and RAM.
        f.write(AT, 5, &[command::CLEAR_STATUS]);
        f.write(AT, 5, &[command::READ_STATUS]);
        assert_eq!((get(&mut f, 5), vm.at(BASE)), (0, None));
        f.write(AT, 5, &[command::READ_ARRAY]);
        assert_eq!((get(&mut f, 5), vm.at(BASE)), (0xff, Some((0xff, false))));
        for (i, byte) in [0x5a, 0x0f].into_iter().enumerate() {
            f.write(AT, BLOCK + i as u64, &[command::PROGRAM]);
            f.write(AT, BLOCK + i as u64, &[byte]);
            assert_eq!(get(&mut f, 0), READY);
        }
        f.write(AT, BLOCK, &[command::PROGRAM]);
        f.write(AT, BLOCK, &[0xf0]);
        f.write(AT, BLOCK, &[command::READ_ARRAY]);
        assert_eq!([get(&mut f, BLOCK), get(&mut f, BLOCK + 1)], [0x50, 0x0f]);
        let mut kept = [0; 2];
        file.read_exact_at(&mut kept, BLOCK).unwrap();
        assert_eq!(kept, [0x50, 0x0f]);
        let state = f.save().unwrap();
        f.write(AT, BLOCK + 9, &[command::ERASE]);
        f.write(AT, BLOCK + 9, &[command::CONFIRM]);
        f.write(AT, 0, &[command::READ_ARRAY]);
        assert_eq!(get(&mut f, BLOCK), 0xff);
        let (_, mut other) = flash(None, false);
        other.load(state.clone()).unwrap();
        assert_eq!(get(&mut other, BLOCK), 0x50);
        assert_eq!(other.save().unwrap(), state);
        other.reset();
        assert_eq!(get(&mut other, BLOCK), 0x50, "contents stay");
    }

    #[test]
    fn buffered_writes() {
        let (_, mut f) = flash(None, false);
        f.write(AT, 0, &[command::BUFFERED]);
        assert_eq!(get(&mut f, 0), READY);
        f.write(AT, 0, &[2]);
        for i in 0..3 {
            f.write(AT, 0x10 + i, &[i as u8]);
        }
        f.write(AT, 0, &[command::CONFIRM]);
        f.write(AT, 0, &[command::READ_ARRAY]);
        assert_eq!([0x0f, 0x10, 0x11, 0x12, 0x13].map(|at| get(&mut f, at)), [0xff, 0, 1, 2, 0xff]);
    }

    #[test]
    fn read_only_chips_say_so() {
        let (_, mut f) = flash(None, true);
        f.write(AT, 0, &[command::PROGRAM]);
        f.write(AT, 0, &[0]);
        assert_eq!(get(&mut f, 0), READY | PROGRAM_FAILED);
        f.write(AT, 0, &[command::ERASE]);
        f.write(AT, 0, &[command::CONFIRM]);
        assert_eq!(get(&mut f, 0), READY | PROGRAM_FAILED | ERASE_FAILED);
        f.write(AT, 0, &[command::QUERY]);
        assert_eq!([0x10, 0x11, 0x12].map(|at| get(&mut f, at)), *b"QRY");
        f.write(AT, 0, &[command::READ_ID]);
        assert_eq!([get(&mut f, 0), get(&mut f, 1)], [MANUFACTURER, DEVICE]);
    }
}
