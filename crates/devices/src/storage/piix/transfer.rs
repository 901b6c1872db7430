//! What moves data: PIO blocks through the data register, packets, bus-master DMA.

use super::channel::{Channel, ChannelState};
use crate::storage::ata::{Action, AtaDrive, Extent, PACKET, Protocol, Reply, SECTOR, error, status};
use crate::storage::{Buffer, Sg, scsi};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Most bytes that wait between drive and data register.
pub(super) const BUFFER: usize = 64 << 10;
/// Sectors in it.
const BUFFER_SECTORS: u32 = (BUFFER as u64 / SECTOR) as u32;
/// Blocks of a CD in it.
const BUFFER_BLOCKS: u64 = BUFFER as u64 / 2048;
/// Most entries of a table of the bus master: it may not cross 64 KiB.
const TABLE: usize = 8192;
/// Most bytes of a DMA command of unknown length (a packet).
const MOST: u64 = 65536 * SECTOR;

/// Where a command stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) enum Phase {
    /// No command, or one that is done.
    #[default]
    Idle,
    /// The guest reads the buffer.
    Giving(Give),
    /// The guest fills the buffer; then this.
    Taking(Work),
    /// The guest writes a packet.
    Packet(Protocol, u16),
    /// The command waits for the bus master.
    Dma(Work),
    /// The drive works.
    Working(Work),
}

impl Phase {
    /// A phase that was saved, with this much in the buffer.
    pub(super) fn checked(self, buffer: usize) -> Self {
        match self {
            Phase::Giving(Give { block: 0, .. }) => Phase::Idle,
            Phase::Packet(..) if buffer != PACKET => Phase::Idle,
            other => other,
        }
    }
}

/// How the guest reads the buffer, and what comes then.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Give {
    /// Bytes for each interrupt.
    block: usize,
    /// The data is a packet's: each block tells its length, and the end is an interrupt of its own.
    packet: bool,
    next: Next,
}

/// What comes after the guest has read the buffer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Next {
    /// The end of the command.
    End(Reply),
    /// More of it.
    More(Work),
}

/// What a worker is to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Work {
    /// A command without data by PIO.
    Plain(Action),
    /// Fill the buffer from these sectors, in blocks of so many.
    ReadSectors(u8, Extent),
    /// Write the buffer to the first of these sectors, in blocks of so many; durably.
    WriteSectors(u8, Extent, bool),
    /// A packet whose data goes through the buffer: byte count limit, what is left of a long read.
    Packet([u8; PACKET], u16, Option<(u64, u64)>),
    /// A packet by DMA.
    PacketDma([u8; PACKET]),
}

/// What it has done.
pub(super) struct Done {
    reply: Reply,
    buffer: Vec<u8>,
    /// Of DMA: the table ended with the data.
    exact: bool,
    dma: bool,
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([b[at], b[at + 1]])
}

impl Channel {
    /// Starts what a command asks for.
    pub(super) fn act(self: &Arc<Self>, state: &mut ChannelState, action: Action) {
        match action {
            Action::Done(reply) => self.end(&mut state.s, &reply),
            Action::Give(Protocol::Pio(_), data) => {
                state.s.buffer = data;
                self.give(state, Give { block: SECTOR as usize, packet: false, next: Next::End(Reply::OK) });
            }
            Action::Read(Protocol::Pio(block), extent) => {
                self.submit(state, Work::ReadSectors(block, extent))
            }
            Action::Write(Protocol::Pio(block), extent, durable) => {
                self.take_sectors(state, block, extent, durable, false);
            }
            Action::Packet(protocol, limit) => {
                let s = &mut state.s;
                s.buffer.clear();
                s.buffer.resize(PACKET, 0);
                (s.at, s.block_end) = (0, PACKET);
                s.phase = Phase::Packet(protocol, limit);
                let r = s.regs();
                r.count = 1; // a command comes
                r.status = status::DRDY | status::DRQ;
            }
            Action::Flush => self.submit(state, Work::Plain(action)),
            // Queued commands are not for this adapter.
            _ if matches!(action.protocol(), Some(Protocol::Queued(_))) => self.abort(&mut state.s),
            _ => self.await_dma(state, Work::Plain(action)),
        }
    }

    fn await_dma(self: &Arc<Self>, state: &mut ChannelState, work: Work) {
        state.s.regs().status = status::DRDY | status::DSC | status::DRQ;
        state.s.phase = Phase::Dma(work);
        self.pump_dma(state);
    }

    /// Starts a command that waits for the bus master, if that is ready.
    pub(super) fn pump_dma(self: &Arc<Self>, state: &mut ChannelState) {
        if let Phase::Dma(work) = &state.s.phase
            && Self::dma_started(&state.s).is_some()
            && state.master
            && state.running
        {
            let work = work.clone();
            self.submit(state, work);
        }
    }

    /// Shows the guest the next block of the buffer.
    fn give(&self, state: &mut ChannelState, give: Give) {
        let s = &mut state.s;
        s.block_end = (s.at + give.block).min(s.buffer.len());
        let n = (s.block_end - s.at) as u16; // below 64 KiB
        let r = s.regs();
        r.status = status::DRDY | status::DSC | status::DRQ;
        if give.packet {
            // Packets tell the length of each block (ATA/ATAPI-6, 9.10).
            r.count = 2; // data to the host
            (r.mid, r.high) = (n & 0xff, n >> 8);
        }
        s.phase = Phase::Giving(give);
        self.raise(s);
    }

    /// Asks the guest for sectors. The first block is asked for without an interrupt (ATA/ATAPI-6, 9.6).
    fn take_sectors(&self, state: &mut ChannelState, block: u8, extent: Extent, durable: bool, again: bool) {
        let s = &mut state.s;
        let len = extent.sectors.min(BUFFER_SECTORS) as usize * SECTOR as usize;
        s.buffer.clear();
        s.buffer.resize(len, 0);
        s.at = 0;
        s.block_end = (usize::from(block) * SECTOR as usize).min(len);
        s.phase = Phase::Taking(Work::WriteSectors(block, extent, durable));
        s.regs().status = status::DRDY | status::DSC | status::DRQ;
        if again {
            self.raise(s);
        }
    }

    /// The guest reads the data register.
    pub(super) fn read_data(self: &Arc<Self>, state: &mut ChannelState, data: &mut [u8]) {
        let s = &mut state.s;
        if !matches!(s.phase, Phase::Giving(_)) {
            data.fill(0);
            return;
        }
        for byte in data.iter_mut() {
            *byte = if s.at < s.block_end { s.buffer[s.at] } else { 0 };
            s.at += usize::from(s.at < s.block_end);
        }
        if s.at < s.block_end {
            return;
        }
        let Phase::Giving(give) = s.phase.clone() else { return };
        if s.at < s.buffer.len() {
            self.give(state, give);
            return;
        }
        match give.next {
            Next::End(reply) if give.packet => self.end(s, &reply),
            Next::End(reply) => {
                // Reading the last block ends the command without another interrupt.
                s.phase = Phase::Idle;
                s.buffer.clear();
                (s.at, s.block_end) = (0, 0);
                s.regs().status = reply.status;
            }
            Next::More(work) => {
                s.buffer.clear();
                (s.at, s.block_end) = (0, 0);
                self.submit(state, work);
            }
        }
    }

    /// The guest writes the data register.
    pub(super) fn write_data(self: &Arc<Self>, state: &mut ChannelState, data: &[u8]) {
        let s = &mut state.s;
        if !matches!(s.phase, Phase::Taking(_) | Phase::Packet(..)) {
            return;
        }
        for byte in data {
            if s.at < s.block_end {
                s.buffer[s.at] = *byte;
                s.at += 1;
            }
        }
        if s.at < s.block_end {
            return;
        }
        match s.phase.clone() {
            Phase::Packet(protocol, limit) => self.start_packet(state, protocol, limit),
            Phase::Taking(work) => {
                if s.at < s.buffer.len() {
                    let block = match &work {
                        Work::WriteSectors(block, ..) => usize::from(*block) * SECTOR as usize,
                        _ => BUFFER,
                    };
                    s.block_end = (s.at + block).min(s.buffer.len());
                    self.raise(s);
                    return;
                }
                self.submit(state, work);
            }
            _ => {}
        }
    }

    fn start_packet(self: &Arc<Self>, state: &mut ChannelState, protocol: Protocol, limit: u16) {
        let s = &mut state.s;
        let mut packet = [0; PACKET];
        packet.copy_from_slice(&s.buffer[..PACKET]);
        s.buffer.clear();
        (s.at, s.block_end) = (0, 0);
        let takes = self.drive(s).is_some_and(|d| d.packet_takes_data(&packet));
        if protocol == Protocol::Dma {
            return self.await_dma(state, Work::PacketDma(packet));
        }
        let work = Work::Packet(packet, limit, scsi::media_read(&packet));
        if !takes {
            return self.submit(state, work);
        }
        // Parameters come in one block; their length is in the packet.
        let len = match packet[0] {
            scsi::opcode::MODE_SELECT_6 => usize::from(packet[4]),
            _ => usize::from(u16_at(&packet, 7)),
        };
        let s = &mut state.s;
        let len = len.min(BUFFER - 2).next_multiple_of(2);
        if len == 0 {
            return self.submit(state, work);
        }
        s.buffer.resize(len, 0);
        s.block_end = len;
        s.phase = Phase::Taking(work);
        let r = s.regs();
        r.count = 0; // data from the host
        (r.mid, r.high) = (len as u16 & 0xff, len as u16 >> 8); // below 64 KiB
        r.status = status::DRDY | status::DRQ;
        self.raise(s);
    }

    /// Does work; on a worker.
    pub(super) fn carry_out(&self, drive: &AtaDrive, work: &Work, mut buffer: Vec<u8>, table: u32) -> Done {
        let plain = |reply, buffer| Done { reply, buffer, exact: true, dma: false };
        match work {
            Work::Plain(action) if action.protocol().is_none() => {
                plain(drive.perform(action, &mut Buffer::Host(&mut []), 0), Vec::new())
            }
            Work::Plain(action) => {
                let takes = matches!(action, Action::Write(..) | Action::Trim(_));
                self.by_dma(table, action.len(), takes, |data| {
                    if data.len() < action.len() {
                        return (Reply::failed(error::ABRT), 0);
                    }
                    (drive.perform(action, data, 0), action.len())
                })
            }
            Work::PacketDma(packet) => {
                let takes = drive.packet_takes_data(packet);
                self.by_dma(table, MOST, takes, |data| drive.packet(packet, data))
            }
            Work::ReadSectors(block, extent) => {
                let now = Extent { sectors: extent.sectors.min(BUFFER_SECTORS), ..*extent };
                buffer.clear();
                buffer.resize(now.sectors as usize * SECTOR as usize, 0);
                let action = Action::Read(Protocol::Pio(*block), now);
                plain(drive.perform(&action, &mut Buffer::Host(&mut buffer), 0), buffer)
            }
            Work::WriteSectors(block, extent, durable) => {
                let now = Extent { sectors: (buffer.len() as u64 / SECTOR) as u32, ..*extent };
                let action = Action::Write(Protocol::Pio(*block), now, *durable);
                plain(drive.perform(&action, &mut Buffer::Host(&mut buffer), 0), Vec::new())
            }
            Work::Packet(packet, _, media) => {
                if drive.packet_takes_data(packet) {
                    return plain(drive.packet(packet, &mut Buffer::Host(&mut buffer)).0, Vec::new());
                }
                buffer.clear();
                buffer.resize(BUFFER - 2, 0);
                let mut now = *packet;
                if let Some((lba, blocks)) = media
                    && *blocks > 0
                {
                    // A piece of it: READ (12), which reads like all the others.
                    buffer.resize(BUFFER, 0);
                    now = [0; PACKET];
                    now[0] = scsi::opcode::READ_12;
                    now[2..6].copy_from_slice(&(*lba as u32).to_be_bytes());
                    now[6..10].copy_from_slice(&((*blocks).min(BUFFER_BLOCKS) as u32).to_be_bytes());
                }
                let (reply, done) = drive.packet(&now, &mut Buffer::Host(&mut buffer));
                buffer.truncate(done as usize);
                plain(reply, buffer)
            }
        }
    }

    /// The bus master: reads its table, and lets `f` fill or take the memory. `takes`: data goes to the drive.
    fn by_dma(
        &self,
        table: u32,
        wanted: u64,
        takes: bool,
        f: impl FnOnce(&mut Buffer<'_>) -> (Reply, u64),
    ) -> Done {
        let mut data = Sg::new();
        let mut total = 0;
        let mut at = u64::from(table);
        let started = Self::dma_started(&self.lock().s);
        for _ in 0..TABLE {
            let mut entry = [0; 8];
            if self.memory.read(at, &mut entry).is_err() {
                break;
            }
            at += 8;
            let base = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]) & !1;
            let len = match u16::from_le_bytes([entry[4], entry[5]]) & !1 {
                0 => 1 << 16,
                n => u64::from(n),
            };
            total += len;
            let part = len.min(wanted.saturating_sub(data.len()));
            if part > 0 && data.push(&self.memory, base.into(), part).is_err() {
                break;
            }
            if entry[7] & 0x80 != 0 {
                break;
            }
        }
        // The engine goes the other way: nothing may be moved.
        if started == Some(takes) {
            data.clear();
        }
        let (reply, moved) = f(&mut Buffer::Guest(&self.memory, &data));
        Done { reply, buffer: Vec::new(), exact: moved >= total, dma: true }
    }

    /// A worker has done the present work: the next step of the command.
    pub(super) fn finished(self: &Arc<Self>, state: &mut ChannelState, work: Work, done: Done) {
        let s = &mut state.s;
        let Done { reply, buffer, exact, dma } = done;
        if dma {
            Self::dma_done(
                s,
                exact,
                reply.is_error() && reply.error & error::ABRT != 0 && reply.count.is_none(),
            );
        }
        s.buffer.clear();
        (s.at, s.block_end) = (0, 0);
        if reply.is_error() {
            self.end(s, &reply);
            return;
        }
        match work {
            Work::ReadSectors(block, extent) => {
                let moved = (buffer.len() as u64 / SECTOR) as u32;
                let left = Extent { lba: extent.lba + u64::from(moved), sectors: extent.sectors - moved };
                s.buffer = buffer;
                let next = if left.sectors > 0 {
                    Next::More(Work::ReadSectors(block, left))
                } else {
                    Next::End(Reply::OK)
                };
                self.give(state, Give { block: usize::from(block) * SECTOR as usize, packet: false, next });
            }
            Work::WriteSectors(block, extent, durable) => {
                let moved = extent.sectors.min(BUFFER_SECTORS);
                let left = Extent { lba: extent.lba + u64::from(moved), sectors: extent.sectors - moved };
                if left.sectors > 0 {
                    self.take_sectors(state, block, left, durable, true);
                } else {
                    self.end(s, &reply);
                }
            }
            Work::Packet(packet, limit, media) => {
                if buffer.is_empty() {
                    self.end(s, &reply);
                    return;
                }
                let moved = buffer.len() as u64 / 2048;
                s.buffer = buffer;
                let next = match media {
                    Some((lba, blocks)) if blocks > moved => {
                        Next::More(Work::Packet(packet, limit, Some((lba + moved, blocks - moved))))
                    }
                    _ => Next::End(reply),
                };
                self.give(state, Give { block: packet_block(limit), packet: true, next });
            }
            Work::Plain(_) | Work::PacketDma(_) => self.end(s, &reply),
        }
    }
}

/// Bytes of a block of a packet's data: the guest's limit, even (ATA/ATAPI-6, 8.23.6).
fn packet_block(limit: u16) -> usize {
    match limit & !1 {
        0 => 0xfffe,
        n => n.into(),
    }
}
