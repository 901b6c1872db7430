//! Ports: their registers (AHCI 1.3.1, 3.3) and the commands in their slots.

use super::fis;
use super::hba::{Hba, HbaState};
use crate::storage::ata::{Action, AtaDrive, PACKET, Protocol, Reply, Taskfile, error, status};
use crate::storage::{Buffer, Sg};
use memory::GuestMemory;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Register offsets.
mod reg {
    pub(super) const CLB: u32 = 0x00;
    pub(super) const CLBU: u32 = 0x04;
    pub(super) const FB: u32 = 0x08;
    pub(super) const FBU: u32 = 0x0c;
    pub(super) const IS: u32 = 0x10;
    pub(super) const IE: u32 = 0x14;
    pub(super) const CMD: u32 = 0x18;
    pub(super) const TFD: u32 = 0x20;
    pub(super) const SIG: u32 = 0x24;
    pub(super) const SSTS: u32 = 0x28;
    pub(super) const SCTL: u32 = 0x2c;
    pub(super) const SERR: u32 = 0x30;
    pub(super) const SACT: u32 = 0x34;
    pub(super) const CI: u32 = 0x38;
}

/// Command and status.
mod cmd {
    pub(super) const ST: u32 = 1 << 0;
    pub(super) const SUD: u32 = 1 << 1;
    pub(super) const POD: u32 = 1 << 2;
    pub(super) const CLO: u32 = 1 << 3;
    pub(super) const FRE: u32 = 1 << 4;
    pub(super) const FR: u32 = 1 << 14;
    pub(super) const CR: u32 = 1 << 15;
    pub(super) const ATAPI: u32 = 1 << 24;
    /// What the driver may write and read back.
    pub(super) const KEPT: u32 = ST | FRE | ATAPI | 1 << 25 | 1 << 26 | 1 << 27;
}

/// Interrupts.
mod is {
    pub(super) const D2H: u32 = 1 << 0;
    pub(super) const PIO_SETUP: u32 = 1 << 1;
    pub(super) const SET_BITS: u32 = 1 << 3;
    pub(super) const CONNECT: u32 = 1 << 6;
    pub(super) const READY: u32 = 1 << 22;
    pub(super) const OVERFLOW: u32 = 1 << 24;
    pub(super) const HOST_DATA: u32 = 1 << 28;
    pub(super) const TASK_FILE: u32 = 1 << 30;
    pub(super) const ALL: u32 = 0xfdc0_00ff;
}

/// SERR: the drive was exchanged.
const EXCHANGED: u32 = 1 << 26;
/// A drive is there and speaks 3 Gb/s.
const CONNECTED: u32 = 0x123;
/// Largest transfer of a command: what a 16-bit count of sectors can name.
const MAX_DATA: u64 = 65536 * 512;

/// A port.
#[derive(Clone, Debug, Default)]
pub(super) struct Port {
    s: PortSaved,
    /// Slots whose commands run.
    busy: u32,
    /// Commands that run, also those that have been forgotten.
    running: u32,
    /// A command that is not queued runs: nothing else may.
    exclusive: bool,
    /// Commands of earlier numbers are forgotten.
    generation: u64,
}

/// Registers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PortSaved {
    clb: u64,
    fb: u64,
    is: u32,
    ie: u32,
    cmd: u32,
    tfd: u32,
    sig: u32,
    ssts: u32,
    sctl: u32,
    serr: u32,
    sact: u32,
    ci: u32,
    /// Slot of the latest command.
    slot: u32,
    /// A command failed; nothing is taken until the driver stops and starts the port.
    failed: bool,
    /// The first frame after a reset has not been written yet.
    signature_due: bool,
    /// SRST in the latest control frame.
    in_soft_reset: bool,
}

/// How much a reset resets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reset {
    /// COMRESET: the drive.
    Link,
    /// The adapter: all but the addresses of the driver's memory.
    Adapter,
    /// Everything.
    Power,
}

/// A command taken from a slot.
struct Command {
    slot: u32,
    generation: u64,
    task: Taskfile,
    action: Action,
    data: Sg,
    /// The list was shorter than the data.
    short: bool,
    write: bool,
    header: u64,
    packet: [u8; PACKET],
}

impl Port {
    /// Whether an interrupt is wanted and there.
    pub(super) fn interrupts(&self) -> bool {
        self.s.is & self.s.ie != 0
    }

    pub(super) fn is_busy(&self) -> bool {
        self.running > 0
    }

    /// What runs is to have no effect.
    pub(super) fn forget(&mut self) {
        self.generation += 1;
        self.busy = 0;
        self.exclusive = false;
    }

    /// Not touched by any driver.
    pub(super) fn is_fresh(&self) -> bool {
        self.s.clb == 0 && self.s.cmd & (cmd::ST | cmd::FRE) == 0 && self.s.sctl == 0
    }

    pub(super) fn save(&self) -> PortSaved {
        let mut s = self.s.clone();
        // Commands that wait for the user start over: queued ones by their bit in SACT.
        s.ci |= self.busy;
        s
    }

    pub(super) fn load(mut s: PortSaved) -> Self {
        s.clb &= !0x3ff;
        s.fb &= !0xff;
        s.slot &= 31;
        s.is &= is::ALL;
        s.ie &= is::ALL;
        Self { s, ..Self::default() }
    }

    pub(super) fn read(&self, offset: u32) -> u32 {
        let s = &self.s;
        match offset {
            reg::CLB => s.clb as u32,
            reg::CLBU => (s.clb >> 32) as u32,
            reg::FB => s.fb as u32,
            reg::FBU => (s.fb >> 32) as u32,
            reg::IS => s.is,
            reg::IE => s.ie,
            reg::CMD => {
                let running = s.cmd & cmd::ST != 0 || self.running > 0;
                let receiving = s.cmd & cmd::FRE != 0;
                s.cmd
                    | s.slot << 8
                    | if running { cmd::CR } else { 0 }
                    | if receiving { cmd::FR } else { 0 }
                    | cmd::SUD
                    | cmd::POD
            }
            reg::TFD => s.tfd,
            reg::SIG => s.sig,
            reg::SSTS => s.ssts,
            reg::SCTL => s.sctl,
            reg::SERR => s.serr,
            reg::SACT => s.sact,
            reg::CI => s.ci,
            _ => 0,
        }
    }

    fn set_status(&mut self, reply: &Reply) {
        self.s.tfd = u32::from(reply.error) << 8 | u32::from(reply.status);
    }

    /// Writes a frame, if frames are received.
    fn receive(&mut self, memory: &GuestMemory, at: u64, frame: &[u8]) {
        if self.s.cmd & cmd::FRE != 0 && memory.write(self.s.fb.wrapping_add(at), frame).is_err() {
            self.s.is |= is::HOST_DATA;
        }
    }

    /// The first frame after a reset.
    fn send_signature(&mut self, memory: &GuestMemory, drive: &AtaDrive) {
        if self.s.cmd & cmd::FRE == 0 {
            self.s.signature_due = true;
            return;
        }
        self.s.signature_due = false;
        let (count, lba, status) = drive.signature();
        let reply = Reply { status, error: 1, count: Some(count), lba: Some(lba) };
        self.receive(memory, fis::D2H_AT, &fis::d2h(&Taskfile::default(), &reply, false));
    }
}

impl Hba {
    pub(super) fn write_port(self: &Arc<Self>, state: &mut HbaState, port: usize, offset: u32, value: u32) {
        let s = &mut state.ports[port].s;
        let low = |old: u64, mask: u32| old & !0xffff_ffff | u64::from(value & mask);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            reg::CLB => s.clb = low(s.clb, !0x3ff),
            reg::CLBU => s.clb = high(s.clb),
            reg::FB => s.fb = low(s.fb, !0xff),
            reg::FBU => s.fb = high(s.fb),
            reg::IS => s.is &= !value,
            reg::IE => s.ie = value & is::ALL,
            reg::CMD => self.write_command(state, port, value),
            reg::SCTL => {
                let before = std::mem::replace(&mut s.sctl, value & 0xfff);
                if before & 0xf == 1 && value & 0xf == 0 {
                    self.reset_port(state, port, Reset::Link);
                    let p = &mut state.ports[port].s;
                    if p.ssts != 0 {
                        p.serr |= EXCHANGED;
                        p.is |= is::CONNECT;
                    }
                } else if value & 0xf == 1 || value & 0xf == 4 {
                    state.ports[port].forget();
                    let p = &mut state.ports[port].s;
                    (p.ssts, p.tfd, p.ci, p.sact) = (if value & 0xf == 4 { 4 } else { 0 }, 0x7f, 0, 0);
                }
            }
            reg::SERR => {
                s.serr &= !value;
                if s.serr & EXCHANGED == 0 {
                    s.is &= !(is::CONNECT | is::READY);
                }
            }
            reg::SACT if s.cmd & cmd::ST != 0 => s.sact |= value,
            reg::CI if s.cmd & cmd::ST != 0 => {
                s.ci |= value;
                self.issue(state, port);
            }
            _ => {}
        }
    }

    fn write_command(self: &Arc<Self>, state: &mut HbaState, port: usize, value: u32) {
        let drive = self.bus(port).drive(0);
        let p = &mut state.ports[port];
        let before = p.s.cmd;
        p.s.cmd = value & cmd::KEPT;
        if value & cmd::CLO != 0 {
            p.s.tfd &= !u32::from(status::BSY | status::DRQ);
        }
        if p.s.cmd & cmd::FRE != 0
            && p.s.signature_due
            && let Some(drive) = &drive
        {
            p.send_signature(&self.memory, drive);
        }
        match (before & cmd::ST != 0, value & cmd::ST != 0) {
            (true, false) => {
                p.forget();
                p.s.failed = false;
                (p.s.ci, p.s.sact, p.s.slot) = (0, 0, 0);
            }
            (false, true) => {
                p.s.failed = false;
                self.issue(state, port);
            }
            _ => {}
        }
    }

    /// Resets a port and the drive on it.
    pub(super) fn reset_port(&self, state: &mut HbaState, port: usize, reset: Reset) {
        let drive = self.bus(port).drive(0);
        let p = &mut state.ports[port];
        p.forget();
        let old = std::mem::take(&mut p.s);
        p.s.tfd = 0x7f;
        p.s.sig = 0xffff_ffff;
        if reset != Reset::Power {
            (p.s.clb, p.s.fb) = (old.clb, old.fb);
        }
        if reset == Reset::Link {
            (p.s.is, p.s.ie, p.s.cmd, p.s.serr) = (old.is, old.ie, old.cmd, old.serr);
            p.s.sctl = old.sctl;
        }
        if let Some(drive) = drive {
            drive.soft_reset();
            let (count, lba, status) = drive.signature();
            p.s.ssts = CONNECTED;
            p.s.sig = (lba as u32) << 8 | u32::from(count);
            p.s.tfd = 0x100 | u32::from(status);
            p.send_signature(&self.memory, &drive);
        }
    }

    /// Takes what is in the slots.
    pub(super) fn issue(self: &Arc<Self>, state: &mut HbaState, port: usize) {
        if !state.running || !state.master {
            return;
        }
        let Some(drive) = self.bus(port).drive(0) else { return };
        // Round the slots, from the one after the latest.
        let first = state.ports[port].s.slot + 1;
        for slot in (0..32).map(|i| (first + i) % 32) {
            let p = &state.ports[port];
            if p.s.cmd & cmd::ST == 0 || p.s.failed || p.exclusive {
                return;
            }
            if p.s.ci & !p.busy & 1 << slot != 0 {
                self.take(state, port, slot, &drive);
            }
        }
    }

    /// Takes the command of a slot, and has it done; unless it has to wait for others.
    fn take(self: &Arc<Self>, state: &mut HbaState, port: usize, slot: u32, drive: &Arc<AtaDrive>) {
        let p = &mut state.ports[port];
        let header_at = p.s.clb.wrapping_add(u64::from(slot) * 32);
        let mut header = [0; 16];
        let mut table = [0; 0x50];
        let read = self.memory.read(header_at, &mut header).and_then(|()| {
            let at = u64::from_le_bytes([
                header[8] & 0x80,
                header[9],
                header[10],
                header[11],
                header[12],
                header[13],
                header[14],
                header[15],
            ]);
            self.memory.read(at, &mut table).map(|()| at)
        });
        let Ok(table_at) = read else {
            p.s.is |= is::HOST_DATA;
            p.s.failed = true;
            return;
        };
        let flags = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let mut frame = [0; 64];
        frame.copy_from_slice(&table[..64]);
        if frame[0] != fis::H2D || frame[1] & 0x0f != 0 {
            // Nothing that this drive understands; without port multipliers there is no other.
            p.s.ci &= !(1 << slot);
            return;
        }
        if frame[1] & 0x80 == 0 {
            self.control(state, port, slot, drive, frame[15]);
            return;
        }
        let task = fis::taskfile(&frame);
        let queued = matches!(task.command, 0x60 | 0x61) && !drive.is_packet();
        if !queued && p.busy != 0 {
            return; // after what runs
        }
        p.s.slot = slot;
        let mut action = drive.begin(&task);
        // The tag must be the slot: it is what SACT knows the command by (5.5.1).
        if let Some(Protocol::Queued(tag)) = action.protocol()
            && u32::from(tag) != slot
        {
            action = Action::Done(Reply::failed(error::ABRT));
        }
        let mut packet = [0; PACKET];
        packet.copy_from_slice(&table[0x40..0x40 + PACKET]);
        let wanted = if matches!(action, Action::Packet(..)) { MAX_DATA } else { action.len() };
        let mut data = Sg::new();
        if self.descriptors(table_at + 0x80, flags >> 16, wanted, &mut data).is_err() {
            let p = &mut state.ports[port];
            p.s.is |= is::HOST_DATA;
            p.s.failed = true;
            return;
        }
        let p = &mut state.ports[port];
        let command = Command {
            slot,
            generation: p.generation,
            task,
            short: data.len() < wanted && !matches!(action, Action::Packet(..)),
            write: flags & 1 << 6 != 0,
            action,
            data,
            header: header_at,
            packet,
        };
        if queued {
            // The drive releases the slot as soon as it has the command.
            p.s.ci &= !(1 << slot);
            p.s.tfd = u32::from(status::DRDY | status::DSC);
        } else {
            p.s.tfd |= u32::from(status::BSY);
            p.exclusive = true;
        }
        p.busy |= 1 << slot;
        p.running += 1;
        if let Action::Done(reply) = command.action {
            self.complete(state, port, &command, reply, 0);
            return;
        }
        let (hba, drive) = (self.clone(), drive.clone());
        self.workers.submit(Box::new(move || hba.carry_out(port, &drive, &command)));
    }

    /// Reads the data's memory out of the command table, as much of it as is `wanted`.
    fn descriptors(&self, mut at: u64, entries: u32, wanted: u64, data: &mut Sg) -> memory::Result<()> {
        for _ in 0..entries {
            if data.len() >= wanted {
                break;
            }
            let mut entry = [0; 16];
            self.memory.read(at, &mut entry)?;
            at += 16;
            let word = |i: usize| u32::from_le_bytes([entry[i], entry[i + 1], entry[i + 2], entry[i + 3]]);
            let address = u64::from(word(4)) << 32 | u64::from(word(0) & !1);
            let len = u64::from(word(12) & 0x3f_ffff) + 1;
            data.push(&self.memory, address, len.min(wanted - data.len()))?;
        }
        Ok(())
    }

    /// A frame that changes the control register: software reset (Serial ATA 3.2, 11.4).
    fn control(
        self: &Arc<Self>,
        state: &mut HbaState,
        port: usize,
        slot: u32,
        drive: &AtaDrive,
        control: u8,
    ) {
        let p = &mut state.ports[port];
        p.s.ci &= !(1 << slot);
        let asserted = control & 4 != 0;
        let before = std::mem::replace(&mut p.s.in_soft_reset, asserted);
        if asserted {
            p.s.tfd = u32::from(status::BSY);
        } else if before {
            drive.soft_reset();
            let (count, lba, status) = drive.signature();
            p.s.sig = (lba as u32) << 8 | u32::from(count);
            p.s.tfd = 0x100 | u32::from(status);
            p.send_signature(&self.memory, drive);
        }
    }

    /// Does a command; on a worker.
    fn carry_out(self: &Arc<Self>, port: usize, drive: &AtaDrive, command: &Command) {
        let empty = Sg::new();
        let (reply, done) = match &command.action {
            Action::Packet(..) => {
                // What the driver means to be read must not be written, nor the other way round.
                let fits = drive.packet_takes_data(&command.packet) == command.write;
                let data = if fits { &command.data } else { &empty };
                drive.packet(&command.packet, &mut Buffer::Guest(&self.memory, data))
            }
            _ if command.short => (Reply::failed(error::ABRT), 0),
            action => {
                let takes = matches!(action, Action::Write(..) | Action::Trim(_));
                if !action.is_empty() && takes != command.write {
                    (Reply::failed(error::ABRT), 0)
                } else {
                    let reply = drive.perform(action, &mut Buffer::Guest(&self.memory, &command.data), 0);
                    (reply, if reply.is_error() { 0 } else { action.len() })
                }
            }
        };
        let mut state = self.lock();
        self.complete(&mut state, port, command, reply, done);
        if state.ports[port].generation == command.generation {
            self.issue(&mut state, port);
        }
        self.finish_reset(&mut state);
        self.update(&mut state);
    }

    /// Tells the driver how a command ended.
    fn complete(
        self: &Arc<Self>,
        state: &mut HbaState,
        port: usize,
        command: &Command,
        reply: Reply,
        done: u64,
    ) {
        let p = &mut state.ports[port];
        p.running -= 1;
        if p.generation != command.generation {
            return;
        }
        let bit = 1 << command.slot;
        p.busy &= !bit;
        p.exclusive = false;
        p.set_status(&reply);
        if command.short {
            p.s.is |= is::OVERFLOW;
        }
        if let Some(Protocol::Queued(_)) = command.action.protocol() {
            let finished = if reply.is_error() { 0 } else { bit };
            p.receive(&self.memory, fis::SET_DEVICE_BITS_AT, &fis::set_device_bits(&reply, finished));
            p.s.sact &= !finished;
            p.s.is |= is::SET_BITS;
        } else {
            // Bytes moved (4.2.2), then the frames.
            if self.memory.write(command.header + 4, &(done as u32).to_le_bytes()).is_err() {
                p.s.is |= is::HOST_DATA;
            }
            let pio = matches!(command.action.protocol(), Some(Protocol::Pio(_)));
            if pio && !reply.is_error() && (done > 0 || !command.action.is_empty()) {
                let len = done.min(u16::MAX.into()) as u16;
                let frame = fis::pio_setup(&command.task, &reply, !command.write, len);
                p.receive(&self.memory, fis::PIO_SETUP_AT, &frame);
                p.s.is |= is::PIO_SETUP;
            }
            let input =
                pio && !command.write && matches!(command.action, Action::Give(..) | Action::Read(..));
            if !input || reply.is_error() {
                p.receive(&self.memory, fis::D2H_AT, &fis::d2h(&command.task, &reply, true));
                p.s.is |= is::D2H;
            }
            if !reply.is_error() {
                p.s.ci &= !bit;
            }
        }
        if reply.is_error() {
            p.s.is |= is::TASK_FILE;
            p.s.failed = true;
        }
    }
}
