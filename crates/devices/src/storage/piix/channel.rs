//! A channel: the command block, the control register and the bus-master registers.

use super::transfer::{Phase, Work};
use crate::storage::Workers;
use crate::storage::ata::{AtaDrive, IdeBus, Reply, Taskfile, command, error, status};
use bus::IrqLine;
use memory::GuestMemory;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard};

/// Command block registers.
mod reg {
    pub(super) const DATA: u8 = 0;
    pub(super) const ERROR: u8 = 1;
    pub(super) const COUNT: u8 = 2;
    pub(super) const DEVICE: u8 = 6;
    pub(super) const STATUS: u8 = 7;
}

/// Control register.
const NO_INTERRUPT: u8 = 1 << 1;
const SOFT_RESET: u8 = 1 << 2;
const HIGH_ORDER: u8 = 1 << 7;

/// Bus-master registers and their bits.
mod master {
    pub(super) const START: u8 = 1 << 0;
    pub(super) const TO_MEMORY: u8 = 1 << 3;
    pub(super) const ACTIVE: u8 = 1 << 0;
    pub(super) const ERROR: u8 = 1 << 1;
    pub(super) const INTERRUPT: u8 = 1 << 2;
}

/// Registers of a drive, with the previous contents above the latest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Registers {
    pub(super) features: u16,
    pub(super) count: u16,
    pub(super) low: u16,
    pub(super) mid: u16,
    pub(super) high: u16,
    pub(super) status: u8,
    pub(super) error: u8,
}

/// State of a channel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ChannelSaved {
    pub(super) drives: [Registers; 2],
    pub(super) device: u8,
    control: u8,
    interrupt: bool,
    pub(super) bm_command: u8,
    pub(super) bm_status: u8,
    pub(super) bm_table: u32,
    pub(super) phase: Phase,
    /// Data between the drive and the data register.
    pub(super) buffer: Vec<u8>,
    pub(super) at: usize,
    /// Where the present block of data ends.
    pub(super) block_end: usize,
}

/// What threads share.
pub(super) struct ChannelState {
    pub(super) s: ChannelSaved,
    pub(super) running: bool,
    pub(super) master: bool,
    /// Work of earlier numbers is forgotten.
    pub(super) generation: u64,
    /// The present phase's work is with a worker.
    pub(super) submitted: bool,
}

/// A channel.
pub(super) struct Channel {
    pub(super) memory: GuestMemory,
    pub(super) workers: Arc<Workers>,
    line: IrqLine,
    bus: Arc<IdeBus>,
    state: Mutex<ChannelState>,
}

impl ChannelSaved {
    pub(super) fn selected(&self) -> usize {
        usize::from(self.device >> 4 & 1)
    }

    pub(super) fn regs(&mut self) -> &mut Registers {
        let n = self.selected();
        &mut self.drives[n]
    }

    fn busy(&self) -> bool {
        self.drives[self.selected()].status & (status::BSY | status::DRQ) != 0
    }
}

impl Channel {
    pub(super) fn new(number: usize, memory: GuestMemory, line: IrqLine, workers: Arc<Workers>) -> Self {
        let state = ChannelState {
            s: ChannelSaved::default(),
            running: false,
            master: false,
            generation: 0,
            submitted: false,
        };
        Self { memory, workers, line, bus: IdeBus::new(number, 2), state: Mutex::new(state) }
    }

    pub(super) fn bus(&self) -> &Arc<IdeBus> {
        &self.bus
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, ChannelState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn drive(&self, s: &ChannelSaved) -> Option<Arc<AtaDrive>> {
        self.bus.drive(s.selected())
    }

    /// Brings the line in line with the registers.
    fn drive_line(&self, s: &ChannelSaved) {
        self.line.set(s.interrupt && s.control & NO_INTERRUPT == 0);
    }

    pub(super) fn raise(&self, s: &mut ChannelSaved) {
        s.interrupt = true;
        s.bm_status |= master::INTERRUPT;
        self.drive_line(s);
    }

    fn lower(&self, s: &mut ChannelSaved) {
        s.interrupt = false;
        self.drive_line(s);
    }

    // --- registers --------------------------------------------------------------------------------------------------

    fn status(&self, s: &ChannelSaved) -> u8 {
        if self.drive(s).is_some() { s.drives[s.selected()].status } else { 0 }
    }

    pub(super) fn alternate_status(&self) -> u8 {
        self.status(&self.lock().s)
    }

    pub(super) fn read(self: &Arc<Self>, register: u8, data: &mut [u8]) {
        let mut state = self.lock();
        if register == reg::DATA {
            self.read_data(&mut state, data);
            return;
        }
        let s = &mut state.s;
        let shift = if s.control & HIGH_ORDER != 0 { 8 } else { 0 };
        // With one drive, that one answers for the other, too.
        let present = self.bus.drive(0).is_some() || self.bus.drive(1).is_some();
        for (i, byte) in data.iter_mut().enumerate() {
            let register = register + i as u8; // within eight ports
            let device = s.device;
            let r = *s.regs();
            *byte = match register {
                _ if !present => 0,
                reg::ERROR if shift == 0 => r.error,
                reg::ERROR => 0,
                reg::COUNT => (r.count >> shift) as u8,
                3 => (r.low >> shift) as u8,
                4 => (r.mid >> shift) as u8,
                5 => (r.high >> shift) as u8,
                reg::DEVICE => device | 0xa0,
                _ => {
                    let value = self.status(s);
                    self.lower(s);
                    value
                }
            };
        }
    }

    pub(super) fn write(self: &Arc<Self>, register: u8, data: &[u8]) {
        let mut state = self.lock();
        if register == reg::DATA {
            self.write_data(&mut state, data);
            return;
        }
        for (i, value) in data.iter().enumerate() {
            self.write_register(&mut state, register + i as u8, *value); // within eight ports
        }
    }

    fn write_register(self: &Arc<Self>, state: &mut ChannelState, register: u8, value: u8) {
        let s = &mut state.s;
        if register == reg::STATUS {
            self.command(state, value);
            return;
        }
        if s.busy() {
            return;
        }
        s.control &= !HIGH_ORDER;
        let push = |r: &mut u16| *r = *r << 8 | u16::from(value);
        // Both drives hear what is written.
        for r in &mut s.drives {
            match register {
                reg::ERROR => push(&mut r.features),
                reg::COUNT => push(&mut r.count),
                3 => push(&mut r.low),
                4 => push(&mut r.mid),
                5 => push(&mut r.high),
                _ => {}
            }
        }
        if register == reg::DEVICE {
            s.device = value;
        }
    }

    pub(super) fn write_control(self: &Arc<Self>, value: u8) {
        let mut state = self.lock();
        let before = std::mem::replace(&mut state.s.control, value);
        match (before & SOFT_RESET != 0, value & SOFT_RESET != 0) {
            (false, true) => {
                Self::forget_work(&mut state);
                state.s.drives.iter_mut().for_each(|r| r.status = status::BSY);
            }
            (true, false) => {
                self.bus.drives().iter().for_each(|d| d.soft_reset());
                self.signatures(&mut state.s);
                state.s.device = 0;
            }
            _ => {}
        }
        self.drive_line(&state.s);
    }

    /// What the registers hold after a reset or a diagnosis.
    fn signatures(&self, s: &mut ChannelSaved) {
        for (i, r) in s.drives.iter_mut().enumerate() {
            *r = Registers { error: 1, ..Registers::default() };
            if let Some(drive) = self.bus.drive(i) {
                let (count, lba, status) = drive.signature();
                r.count = count;
                r.low = (lba & 0xff) as u16;
                r.mid = (lba >> 8 & 0xff) as u16;
                r.high = (lba >> 16 & 0xff) as u16;
                r.status = status;
            }
        }
    }

    fn forget_work(state: &mut ChannelState) {
        state.generation += 1;
        state.submitted = false;
        let s = &mut state.s;
        s.phase = Phase::Idle;
        s.buffer.clear();
        (s.at, s.block_end) = (0, 0);
        s.bm_status &= !master::ACTIVE;
    }

    /// The command register.
    fn command(self: &Arc<Self>, state: &mut ChannelState, code: u8) {
        let s = &mut state.s;
        let Some(drive) = self.drive(s) else { return };
        if s.busy() && code != command::DEVICE_RESET || s.control & SOFT_RESET != 0 {
            return;
        }
        if code == command::DEVICE_RESET && !drive.is_packet() {
            return;
        }
        self.lower(&mut state.s);
        if matches!(state.s.phase, Phase::Working(_)) || state.submitted {
            Self::forget_work(state);
        }
        let s = &mut state.s;
        s.phase = Phase::Idle;
        if code == command::DIAGNOSE {
            self.signatures(s);
            s.device = 0;
            self.raise(s);
            return;
        }
        let device = s.device;
        let r = s.regs();
        r.error = 0;
        r.status = status::DRDY | status::DSC;
        let word = |v: u16, shift: u32| u64::from(v & 0xff) << shift | u64::from(v >> 8) << (shift + 24);
        let task = Taskfile {
            command: code,
            features: r.features,
            count: r.count,
            lba: word(r.low, 0) | word(r.mid, 8) | word(r.high, 16),
            device,
        };
        let action = drive.begin(&task);
        self.act(state, action);
    }

    /// The end of a command: registers and interrupt.
    pub(super) fn end(&self, s: &mut ChannelSaved, reply: &Reply) {
        s.phase = Phase::Idle;
        s.buffer.clear();
        (s.at, s.block_end) = (0, 0);
        let r = s.regs();
        (r.status, r.error) = (reply.status, reply.error);
        if let Some(count) = reply.count {
            r.count = count;
        }
        if let Some(lba) = reply.lba {
            let b = lba.to_le_bytes().map(u16::from);
            r.low = b[0] | b[3] << 8;
            r.mid = b[1] | b[4] << 8;
            r.high = b[2] | b[5] << 8;
        }
        self.raise(s);
    }

    /// A command that the adapter cannot carry out.
    pub(super) fn abort(&self, s: &mut ChannelSaved) {
        self.end(s, &Reply::failed(error::ABRT));
    }

    // --- bus master -------------------------------------------------------------------------------------------------

    pub(super) fn read_master(&self, register: usize) -> u8 {
        let s = &self.lock().s;
        match register {
            0 => s.bm_command,
            2 => s.bm_status,
            4..=7 => s.bm_table.to_le_bytes()[register - 4],
            _ => 0,
        }
    }

    pub(super) fn write_master(self: &Arc<Self>, register: usize, value: u8) {
        let mut state = self.lock();
        let s = &mut state.s;
        match register {
            0 => {
                let before = s.bm_command;
                s.bm_command = value & (master::START | master::TO_MEMORY);
                if before & master::START == 0 && value & master::START != 0 {
                    s.bm_status |= master::ACTIVE;
                    self.pump_dma(&mut state);
                } else if value & master::START == 0 {
                    s.bm_status &= !master::ACTIVE;
                }
            }
            2 => {
                let clear = value & (master::ERROR | master::INTERRUPT);
                s.bm_status = s.bm_status & !clear & !0x60 | value & 0x60;
            }
            4..=7 => {
                let mut table = s.bm_table.to_le_bytes();
                table[register - 4] = value;
                s.bm_table = u32::from_le_bytes(table) & !3;
            }
            _ => {}
        }
    }

    /// Whether the engine has been started, and which way it goes.
    pub(super) fn dma_started(s: &ChannelSaved) -> Option<bool> {
        (s.bm_command & master::START != 0).then_some(s.bm_command & master::TO_MEMORY != 0)
    }

    /// The engine has moved a command's data; `exact`: the table ended with it.
    pub(super) fn dma_done(s: &mut ChannelSaved, exact: bool, failed: bool) {
        if exact || failed {
            s.bm_status &= !master::ACTIVE;
        }
        if failed {
            s.bm_status |= master::ERROR;
        }
    }

    pub(super) fn set_master(self: &Arc<Self>, on: bool) {
        let mut state = self.lock();
        state.master = on;
        self.pump_dma(&mut state);
    }

    // --- lifecycle --------------------------------------------------------------------------------------------------

    pub(super) fn start(self: &Arc<Self>) {
        for drive in self.bus.drives() {
            drive.drive().set_workers(&self.workers);
        }
        let mut state = self.lock();
        state.running = true;
        if state.s == ChannelSaved::default() {
            // Drives were plugged in since power-on.
            self.signatures(&mut state.s);
        }
        if let Phase::Working(work) = state.s.phase.clone()
            && !state.submitted
        {
            self.submit(&mut state, work);
        }
        self.pump_dma(&mut state);
    }

    pub(super) fn pause(&self) {
        self.lock().running = false;
    }

    /// What runs is to have no effect.
    pub(super) fn forget(&self) {
        Self::forget_work(&mut self.lock());
    }

    pub(super) fn power_on(&self) {
        self.bus.drives().iter().for_each(|d| d.reset());
        let mut state = self.lock();
        state.s = ChannelSaved::default();
        state.master = false;
        self.signatures(&mut state.s);
        self.drive_line(&state.s);
    }

    pub(super) fn save(&self) -> ChannelSaved {
        self.lock().s.clone()
    }

    pub(super) fn load(&self, mut saved: ChannelSaved) {
        saved.buffer.truncate(super::transfer::BUFFER);
        saved.block_end = saved.block_end.min(saved.buffer.len());
        saved.at = saved.at.min(saved.block_end);
        saved.bm_table &= !3;
        saved.phase = saved.phase.checked(saved.buffer.len());
        let mut state = self.lock();
        state.s = saved;
        state.master = true;
        self.drive_line(&state.s);
    }

    /// Hands work to a worker.
    pub(super) fn submit(self: &Arc<Self>, state: &mut ChannelState, work: Work) {
        let s = &mut state.s;
        s.regs().status = status::BSY;
        s.phase = Phase::Working(work.clone());
        let Some(drive) = self.drive(s) else { return };
        if !state.running {
            return; // when the machine goes on
        }
        state.submitted = true;
        let (generation, master) = (state.generation, state.s.bm_table);
        let buffer = std::mem::take(&mut state.s.buffer);
        let channel = self.clone();
        self.workers.submit(Box::new(move || {
            // The channel keeps a copy, for saving while an error waits for the user.
            channel.lock_if(generation, |s| s.s.buffer.clone_from(&buffer));
            let done = channel.carry_out(&drive, &work, buffer, master);
            let mut state = channel.lock();
            if state.generation == generation {
                state.submitted = false;
                channel.finished(&mut state, work, done);
            }
        }));
    }

    fn lock_if(&self, generation: u64, f: impl FnOnce(&mut ChannelState)) {
        let mut state = self.lock();
        if state.generation == generation {
            f(&mut state);
        }
    }
}
