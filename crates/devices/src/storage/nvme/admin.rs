//! Admin commands (NVMe 1.4, 5).

use super::command::{Command, Status};
use super::controller::{Controller, ControllerState, End};
use super::queues::{Completions, MOST_ENTRIES, Submission};
use super::{MDTS, identify};
use crate::storage::Buffer;
use std::sync::Arc;

/// Asynchronous event requests held at once (AERL + 1).
pub(super) const MOST_EVENT_REQUESTS: usize = 4;

mod opcode {
    pub(super) const DELETE_SQ: u8 = 0x00;
    pub(super) const CREATE_SQ: u8 = 0x01;
    pub(super) const GET_LOG: u8 = 0x02;
    pub(super) const DELETE_CQ: u8 = 0x04;
    pub(super) const CREATE_CQ: u8 = 0x05;
    pub(super) const IDENTIFY: u8 = 0x06;
    pub(super) const ABORT: u8 = 0x08;
    pub(super) const SET_FEATURES: u8 = 0x09;
    pub(super) const GET_FEATURES: u8 = 0x0a;
    pub(super) const EVENT_REQUEST: u8 = 0x0c;
}

mod feature {
    pub(super) const ARBITRATION: u8 = 0x01;
    pub(super) const POWER: u8 = 0x02;
    pub(super) const TEMPERATURE: u8 = 0x04;
    pub(super) const RECOVERY: u8 = 0x05;
    pub(super) const CACHE: u8 = 0x06;
    pub(super) const QUEUES: u8 = 0x07;
    pub(super) const COALESCING: u8 = 0x08;
    pub(super) const VECTOR: u8 = 0x09;
    pub(super) const ATOMICITY: u8 = 0x0a;
    pub(super) const EVENTS: u8 = 0x0b;
}

/// Changed Namespace List.
const CHANGED_LIST: u8 = 0x04;
/// Event configuration: namespace attribute notices.
const NAMESPACE_NOTICES: u32 = 1 << 8;
/// The event: a notice, namespace attribute changed, and its log.
const NAMESPACE_CHANGED: u32 = 2 | (CHANGED_LIST as u32) << 16;

type Answer = Result<u32, Status>;

impl Controller {
    /// Carries an admin command out.
    pub(super) fn admin(self: &Arc<Self>, c: &Command, generation: u64) -> End {
        if !c.is_plain() {
            return End::Done(Status::INVALID_FIELD, 0);
        }
        let Some(mut state) = self.lock_current(generation) else { return End::Held };
        let answer = match c.opcode() {
            opcode::DELETE_SQ => Self::delete_sq(&mut state, c),
            opcode::CREATE_SQ => self.create_sq(&mut state, c),
            opcode::DELETE_CQ => Self::delete_cq(&mut state, c),
            opcode::CREATE_CQ => self.create_cq(&mut state, c),
            // Commands end soon by themselves: none is aborted.
            opcode::ABORT => Ok(1),
            opcode::GET_LOG => self.get_log(&mut state, c),
            opcode::IDENTIFY => identify::identify(&self.names, &self.bus, c.dw(10) as u8, c.nsid())
                .and_then(|data| self.give(&state, c, &data)),
            opcode::SET_FEATURES => {
                drop(state);
                self.set_feature(c, generation)
            }
            opcode::GET_FEATURES => self.get_feature(&state, c),
            opcode::EVENT_REQUEST => {
                if state.s.event_requests.len() >= MOST_EVENT_REQUESTS {
                    return End::Done(Status::TOO_MANY_EVENTS, 0);
                }
                state.s.event_requests.push(c.id());
                self.tell_events(&mut state);
                return End::Held;
            }
            _ => Err(Status::INVALID_OPCODE),
        };
        match answer {
            Ok(result) => End::Done(Status::OK, result),
            Err(status) => End::Done(status, 0),
        }
    }

    /// Writes a command's data.
    fn give(&self, state: &ControllerState, c: &Command, data: &[u8]) -> Answer {
        let sg = c.data(&self.memory, state.page(), data.len() as u64)?;
        Buffer::Guest(&self.memory, &sg).write(0, data).map_err(|_| Status::DATA_TRANSFER)?;
        Ok(0)
    }

    fn queue_size(c: &Command) -> Result<u32, Status> {
        let size = (c.dw(10) >> 16) + 1;
        if (2..=MOST_ENTRIES).contains(&size) { Ok(size) } else { Err(Status::INVALID_SIZE) }
    }

    fn create_cq(&self, state: &mut ControllerState, c: &Command) -> Answer {
        let (id, vector) = (c.dw(10) as u16, (c.dw(11) >> 16) as u16);
        if id == 0 || id > self.pairs || state.s.cqs.contains_key(&id) {
            return Err(Status::INVALID_QID);
        }
        let size = Self::queue_size(c)?;
        if c.qw(6) == 0 || !c.qw(6).is_multiple_of(state.page()) {
            return Err(Status::PRP_OFFSET);
        }
        if vector >= self.vectors.count() {
            return Err(Status::INVALID_VECTOR);
        }
        // Contiguous memory is all there is (CAP.CQR).
        if c.dw(11) & 1 == 0 {
            return Err(Status::INVALID_FIELD);
        }
        let interrupts = c.dw(11) & 2 != 0;
        let queue = Completions { base: c.qw(6), size, vector, interrupts, ..Completions::default() };
        state.s.cqs.insert(id, queue);
        Ok(0)
    }

    fn create_sq(&self, state: &mut ControllerState, c: &Command) -> Answer {
        let (id, cq) = (c.dw(10) as u16, (c.dw(11) >> 16) as u16);
        if cq == 0 || !state.s.cqs.contains_key(&cq) {
            return Err(Status::INVALID_CQ);
        }
        if id == 0 || id > self.pairs || state.s.sqs.contains_key(&id) {
            return Err(Status::INVALID_QID);
        }
        let size = Self::queue_size(c)?;
        if c.qw(6) == 0 || !c.qw(6).is_multiple_of(state.page()) {
            return Err(Status::PRP_OFFSET);
        }
        if c.dw(11) & 1 == 0 {
            return Err(Status::INVALID_FIELD);
        }
        state.s.sqs.insert(id, Submission { base: c.qw(6), size, cq, ..Submission::default() });
        Ok(0)
    }

    /// Commands of the queue that still run end without a completion, as if aborted (5.6).
    fn delete_sq(state: &mut ControllerState, c: &Command) -> Answer {
        let id = c.dw(10) as u16;
        if id == 0 || state.s.sqs.remove(&id).is_none() { Err(Status::INVALID_QID) } else { Ok(0) }
    }

    fn delete_cq(state: &mut ControllerState, c: &Command) -> Answer {
        let id = c.dw(10) as u16;
        if id == 0 || !state.s.cqs.contains_key(&id) {
            return Err(Status::INVALID_QID);
        }
        if state.s.sqs.values().any(|sq| sq.cq == id) {
            return Err(Status::INVALID_DELETION);
        }
        state.s.cqs.remove(&id);
        Ok(0)
    }

    fn get_log(&self, state: &mut ControllerState, c: &Command) -> Answer {
        let (log, retain) = (c.dw(10) as u8, c.dw(10) & 1 << 15 != 0);
        let words = u64::from(c.dw(10) >> 16) | u64::from(c.dw(11) & 0xffff) << 16;
        let (len, offset) = ((words + 1) * 4, c.qw(12));
        if offset & 3 != 0 || len > 4096 << MDTS {
            return Err(Status::INVALID_FIELD);
        }
        let data = match log {
            0x01 => vec![0; 64 * 4], // no error has been kept
            0x02 => {
                let spaces = self.bus.all();
                let read_only = !spaces.is_empty() && spaces.iter().all(|s| s.drive.is_read_only());
                identify::smart(&state.s.counters, read_only)
            }
            0x03 => identify::firmware(&self.names),
            CHANGED_LIST => {
                let mut list = vec![0; 4096];
                for (to, id) in list.chunks_exact_mut(4).zip(&state.s.changed) {
                    to.copy_from_slice(&id.to_le_bytes());
                }
                list
            }
            0x05 => identify::effects(),
            _ => return Err(Status::INVALID_LOG),
        };
        let mut data =
            data.get(usize::try_from(offset).unwrap_or(usize::MAX)..).ok_or(Status::INVALID_FIELD)?.to_vec();
        data.resize(len as usize, 0); // bounded above
        self.give(state, c, &data)?;
        if log == CHANGED_LIST && !retain {
            state.s.changed.clear();
            state.s.told = false;
        }
        Ok(0)
    }

    /// Completes an event request, if there is an event that the driver wants to hear of.
    pub(super) fn tell_events(&self, state: &mut ControllerState) {
        let wanted = state.s.features.get(&feature::EVENTS).copied().unwrap_or(0) & NAMESPACE_NOTICES != 0;
        if !wanted || state.s.told || state.s.changed.is_empty() {
            return;
        }
        if let Some(id) = state.s.event_requests.pop() {
            state.s.told = true;
            self.complete(state, 0, id, Status::OK, NAMESPACE_CHANGED);
        }
    }

    fn set_feature(&self, c: &Command, generation: u64) -> Answer {
        let (id, value) = (c.dw(10) as u8, c.dw(11));
        if c.dw(10) >> 31 != 0 {
            return Err(Status::NOT_SAVEABLE);
        }
        match id {
            feature::CACHE => {
                for space in self.bus.all() {
                    if value & 1 == 0 && space.drive.writeback() {
                        space.drive.flush().map_err(|_| Status::WRITE_FAULT)?;
                    }
                    space.drive.set_writeback(value & 1 != 0);
                }
                Ok(0)
            }
            feature::QUEUES => {
                let (sqs, cqs) = (value & 0xffff, value >> 16);
                if sqs == 0xffff || cqs == 0xffff {
                    return Err(Status::INVALID_FIELD);
                }
                // Offered in any case: as many as there can be.
                Ok(u32::from(self.pairs - 1) | u32::from(self.pairs - 1) << 16)
            }
            feature::POWER if value & 0x1f != 0 => Err(Status::INVALID_FIELD),
            feature::ATOMICITY
            | feature::ARBITRATION
            | feature::POWER
            | feature::TEMPERATURE
            | feature::RECOVERY
            | feature::EVENTS => {
                let mut state = self.lock_current(generation).ok_or(Status::ABORTED)?;
                let key = Self::feature_key(id, value);
                state.s.features.insert(key, value);
                self.tell_events(&mut state);
                Ok(0)
            }
            // Interrupts are not held back.
            feature::COALESCING | feature::VECTOR => Err(Status::NOT_CHANGEABLE),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// Over and under temperature thresholds are two values.
    fn feature_key(id: u8, value: u32) -> u8 {
        if id == feature::TEMPERATURE && value >> 20 & 3 == 1 { 0x80 | id } else { id }
    }

    fn get_feature(&self, state: &ControllerState, c: &Command) -> Answer {
        let (id, select) = (c.dw(10) as u8, c.dw(10) >> 8 & 7);
        let default = match id {
            feature::ARBITRATION => 6,
            feature::TEMPERATURE if c.dw(11) >> 20 & 3 == 1 => 0,
            feature::TEMPERATURE => 343,
            feature::POWER
            | feature::RECOVERY
            | feature::COALESCING
            | feature::ATOMICITY
            | feature::EVENTS => 0,
            feature::VECTOR => {
                let vector = c.dw(11) & 0xffff;
                if vector >= self.vectors.count().into() {
                    return Err(Status::INVALID_FIELD);
                }
                vector | 1 << 16 // not coalesced
            }
            feature::CACHE => u32::from(self.bus.all().iter().any(|s| s.drive.writeback())),
            feature::QUEUES => u32::from(self.pairs - 1) | u32::from(self.pairs - 1) << 16,
            _ => return Err(Status::INVALID_FIELD),
        };
        match select {
            0 => Ok(state.s.features.get(&Self::feature_key(id, c.dw(11))).copied().unwrap_or(default)),
            1 => Ok(default),
            3 => Ok(if matches!(id, feature::COALESCING | feature::VECTOR) { 0 } else { 4 }), // changeable
            _ => Err(Status::INVALID_FIELD),
        }
    }
}
