//! The queues: requests in, responses out.

use super::events::Events;
use super::{CONTROL, EVENT};
use crate::storage::scsi::{LunAddress, Outcome, SENSE_LEN, ScsiBus, TASK_ABORTED};
use crate::storage::{Buffer, OnError, Sg, Workers};
use base::EventFd;
use bus::virtio::{Activation, Chain, Interrupt, Queue, QueueError, Segment, SharedQueue};
use memory::GuestMemory;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// Sizes that the driver may choose (virtio 1.2, 5.6.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sizes {
    pub(super) sense: u32,
    pub(super) cdb: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { sense: 96, cdb: 32 }
    }
}

impl Sizes {
    /// A write to configuration space.
    pub(super) fn set(&mut self, offset: u64, value: u32) {
        match offset {
            20 if value <= 252 => self.sense = value,
            24 if (1..=255).contains(&value) => self.cdb = value,
            _ => {}
        }
    }

    /// What can have been saved.
    pub(super) fn checked(self) -> Self {
        Self { sense: self.sense.min(252), cdb: self.cdb.clamp(1, 255) }
    }

    fn header(self) -> u64 {
        19 + u64::from(self.cdb)
    }

    fn response(self) -> u64 {
        12 + u64::from(self.sense)
    }
}

/// Responses (virtio 1.2, 5.6.6.1).
mod response {
    pub(super) const OK: u8 = 0;
    pub(super) const OVERRUN: u8 = 1;
    pub(super) const ABORTED: u8 = 2;
    pub(super) const BAD_TARGET: u8 = 3;
    pub(super) const TRANSPORT_FAILURE: u8 = 6;
    pub(super) const FAILURE: u8 = 9;
    pub(super) const REJECTED: u8 = 11;
    pub(super) const INCORRECT_LUN: u8 = 12;
}

/// What queue processing needs; shared by the thread, the workers and the device.
pub(super) struct Lanes {
    queues: Vec<Option<SharedQueue>>,
    memory: GuestMemory,
    interrupt: Interrupt,
    sizes: Sizes,
    bus: Arc<ScsiBus>,
    workers: Arc<Workers>,
    events: Arc<Events>,
    kick: Arc<EventFd>,
    stop: AtomicBool,
    spare: Mutex<Vec<Request>>,
}

/// A request taken from a queue.
struct Request {
    chain: Chain,
    address: Option<LunAddress>,
    cdb: Vec<u8>,
    data_out: Sg,
    data_in: Sg,
}

/// Requests kept for reuse.
const SPARE: usize = 64;
/// Requests taken from one queue before the others get their turn.
const BATCH: usize = 64;

fn lock(queue: &SharedQueue) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(|e| e.into_inner())
}

/// The unit that a LUN field names (virtio 1.2, 5.6.6.1).
fn address(field: &[u8]) -> Option<LunAddress> {
    let lun = u16::from_be_bytes([field[2], field[3]]);
    // Single level, peripheral or flat space addressing.
    (field[0] == 1 && lun & 0x8000 == 0 && field[4..8] == [0; 4])
        .then_some(LunAddress { target: field[1].into(), lun: lun & 0x3fff })
}

/// The memory of `segments` after the first `skip` bytes.
fn list(memory: &GuestMemory, segments: &[Segment], mut skip: u64, sg: &mut Sg) -> Result<(), QueueError> {
    sg.clear();
    for s in segments {
        let len = u64::from(s.len);
        if skip >= len {
            skip -= len;
            continue;
        }
        sg.push(memory, s.addr + skip, len - skip)?;
        skip = 0;
    }
    Ok(())
}

impl Lanes {
    pub(super) fn new(
        activation: Activation,
        sizes: Sizes,
        bus: Arc<ScsiBus>,
        workers: Arc<Workers>,
        events: Arc<Events>,
        kick: Arc<EventFd>,
    ) -> Self {
        Self {
            queues: activation.queues,
            memory: activation.memory,
            interrupt: activation.interrupt,
            sizes,
            bus,
            workers,
            events,
            kick,
            stop: AtomicBool::new(false),
            spare: Mutex::default(),
        }
    }

    pub(super) fn go(&self) {
        self.stop.store(false, Ordering::SeqCst);
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    pub(super) fn wake(&self) {
        self.kick.signal();
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Ends the use of a queue whose driver misbehaved.
    fn fail(&self, index: u16, queue: &mut Queue, error: &QueueError) {
        queue.mark_broken();
        if !matches!(error, QueueError::Broken) {
            self.interrupt.fail(&format!("queue {index}: {error}"));
        }
    }

    fn publish(&self, index: u16, queue: &mut Queue) {
        match queue.publish() {
            Ok(true) => self.interrupt.queue(index),
            Ok(false) => {}
            Err(e) => self.fail(index, queue, &e),
        }
    }

    /// The thread: serves the queues until told to stop.
    pub(super) fn serve(self: &Arc<Self>) {
        while !self.stopping() {
            for index in 0..self.queues.len() as u16 {
                self.serve_queue(index);
            }
            let mut more = false;
            for (index, queue) in self.queues.iter().enumerate() {
                let Some(mut queue) = queue.as_ref().map(lock).filter(|q| !q.is_broken()) else { continue };
                match queue.enable_notifications() {
                    // Event buffers lie there until there is an event.
                    Ok(there) => more |= there && (index != usize::from(EVENT) || self.events.any()),
                    Err(e) => self.fail(index as u16, &mut queue, &e),
                }
            }
            if !more && !self.stopping() && self.kick.wait().is_err() {
                self.interrupt.fail("the host does not let us wait");
                return;
            }
        }
    }

    fn serve_queue(self: &Arc<Self>, index: u16) {
        let Some(shared) = self.queues.get(usize::from(index)).and_then(Option::as_ref) else { return };
        let result = match index {
            EVENT => self.serve_events(shared),
            CONTROL => self.serve_control(shared),
            _ => self.serve_requests(index, shared),
        };
        if let Err(e) = result {
            self.fail(index, &mut lock(shared), &e);
        }
    }

    fn serve_events(&self, shared: &SharedQueue) -> Result<(), QueueError> {
        let mut chain = Chain::new();
        while !self.stopping() && self.events.any() {
            let mut queue = lock(shared);
            if queue.is_broken() || !queue.pop(&mut chain)? {
                break;
            }
            if let Some(event) = self.events.take() {
                let written = chain.writer(&self.memory).write(&event)?;
                queue.push(&chain, written as u32)?; // 16 at most
                self.publish(EVENT, &mut queue);
            } else {
                queue.unpop(&chain);
            }
        }
        Ok(())
    }

    fn serve_control(&self, shared: &SharedQueue) -> Result<(), QueueError> {
        let mut chain = Chain::new();
        while !self.stopping() {
            {
                let mut queue = lock(shared);
                if queue.is_broken() || !queue.pop(&mut chain)? {
                    break;
                }
            }
            let written = self.control(&chain)?;
            let mut queue = lock(shared);
            queue.push(&chain, written)?;
            self.publish(CONTROL, &mut queue);
        }
        Ok(())
    }

    /// A task management function or a query for asynchronous events (virtio 1.2, 5.6.6.2).
    fn control(&self, chain: &Chain) -> Result<u32, QueueError> {
        let mut reader = chain.reader(&self.memory);
        let kind = u32::from_le_bytes(reader.read_array()?);
        let mut writer = chain.writer(&self.memory);
        match kind {
            0 => {
                let subtype = u32::from_le_bytes(reader.read_array()?);
                let field: [u8; 8] = reader.read_array()?;
                let answer = self.manage(subtype, address(&field));
                writer.write(&[answer])?;
            }
            1 | 2 => writer.write(&[0, 0, 0, 0, response::OK]).map(drop)?, // none are supported
            _ => writer.write(&[response::REJECTED]).map(drop)?,
        }
        Ok(writer.written())
    }

    fn manage(&self, function: u32, address: Option<LunAddress>) -> u8 {
        let Some(address) = address else { return response::BAD_TARGET };
        if !self.bus.has_target(address.target) {
            return response::BAD_TARGET;
        }
        let unit = self.bus.unit(address);
        match function {
            // Tasks are not aborted half-way: they are let finish, which the driver sees before this answer.
            0 | 1 | 3 | 6 | 7 if unit.is_none() => response::INCORRECT_LUN,
            0 | 1 | 3 => {
                self.workers.drain();
                response::OK
            }
            // What is under way is not known to be the one asked for: none is.
            6 | 7 => {
                self.workers.drain();
                response::OK
            }
            4 | 5 => {
                self.workers.drain();
                for (at, unit) in self.bus.units() {
                    if at == address || function == 4 && at.target == address.target {
                        unit.reset();
                    }
                }
                if function == 5 && unit.is_none() { response::INCORRECT_LUN } else { response::OK }
            }
            _ => response::REJECTED,
        }
    }

    fn serve_requests(self: &Arc<Self>, index: u16, shared: &SharedQueue) -> Result<(), QueueError> {
        let mut queue = lock(shared);
        if queue.is_broken() {
            return Ok(());
        }
        queue.disable_notifications()?;
        for _ in 0..BATCH {
            if self.stopping() {
                break;
            }
            let mut request = self.spare_request();
            if !queue.pop(&mut request.chain)? {
                self.keep(request);
                break;
            }
            self.parse(&mut request)?;
            if self.may_take_long(&request.cdb, request.address) {
                let lanes = self.clone();
                self.workers.submit(Box::new(move || lanes.carry_out_later(index, request)));
                continue;
            }
            let written = self.carry_out(&request)?;
            queue.push(&request.chain, written)?;
            self.publish(index, &mut queue);
            self.keep(request);
        }
        Ok(())
    }

    fn spare_request(&self) -> Request {
        self.spare.lock().unwrap_or_else(|e| e.into_inner()).pop().unwrap_or_else(|| Request {
            chain: Chain::new(),
            address: None,
            cdb: Vec::new(),
            data_out: Sg::new(),
            data_in: Sg::new(),
        })
    }

    fn keep(&self, request: Request) {
        let mut spare = self.spare.lock().unwrap_or_else(|e| e.into_inner());
        if spare.len() < SPARE {
            spare.push(request);
        }
    }

    /// Reads the header.
    fn parse(&self, request: &mut Request) -> Result<(), QueueError> {
        let (header, room) = (self.sizes.header(), self.sizes.response());
        let chain = &request.chain;
        if chain.readable_len() < header || chain.writable_len() < room {
            return Err(QueueError::TooShort);
        }
        let mut reader = chain.reader(&self.memory);
        let fixed: [u8; 19] = reader.read_array()?;
        request.address = address(&fixed[..8]);
        request.cdb.resize(self.sizes.cdb as usize, 0);
        reader.read(&mut request.cdb)?;
        list(&self.memory, chain.readable(), header, &mut request.data_out)?;
        list(&self.memory, chain.writable(), room, &mut request.data_in)
    }

    /// Whether another thread should do it: it goes to a disk, or may wait for the user.
    fn may_take_long(&self, cdb: &[u8], address: Option<LunAddress>) -> bool {
        use crate::storage::scsi::opcode::{READ_10, READ_16};
        if !crate::storage::scsi::Lun::is_slow(cdb) {
            return false;
        }
        let Some(unit) = address.and_then(|a| self.bus.unit(a)) else { return false };
        let short_read = match cdb[0] {
            READ_10 if cdb.len() >= 9 => cdb[7] == 0 && cdb[8] <= 64,
            READ_16 if cdb.len() >= 14 => cdb[10..13] == [0; 3] && cdb[13] <= 64,
            _ => false,
        };
        !(short_read && unit.drive().spec().rerror != OnError::Stop && unit.drive().is_in_memory())
    }

    fn carry_out_later(&self, index: u16, request: Request) {
        let written = self.carry_out(&request);
        let Some(shared) = self.queues.get(usize::from(index)).and_then(Option::as_ref) else { return };
        let mut queue = lock(shared);
        match written.and_then(|written| queue.push(&request.chain, written)) {
            Ok(()) => self.publish(index, &mut queue),
            Err(e) => self.fail(index, &mut queue, &e),
        }
        drop(queue);
        self.keep(request);
    }

    /// Does a request and writes its response; returns the number of bytes written to the guest.
    fn carry_out(&self, request: &Request) -> Result<u32, QueueError> {
        let (outgoing, incoming) = (&request.data_out, &request.data_in);
        let empty = Sg::new();
        let unit = request.address.and_then(|a| self.bus.unit(a));
        let takes = unit.as_ref().is_some_and(|u| u.takes_data(&request.cdb));
        let data = if takes { outgoing } else { incoming };
        let expected = outgoing.len() + incoming.len();
        let data = if outgoing.is_empty() || incoming.is_empty() { data } else { &empty };
        let outcome = match request.address {
            // Both directions at once were not negotiated.
            Some(_) if data.is_empty() && !outgoing.is_empty() && !incoming.is_empty() => {
                Err(response::FAILURE)
            }
            Some(address) => self
                .bus
                .execute(address, &request.cdb, &mut Buffer::Guest(&self.memory, data))
                .ok_or(response::BAD_TARGET),
            None => Err(response::BAD_TARGET),
        };
        self.respond(request, outcome, expected, takes)
    }

    fn respond(
        &self,
        request: &Request,
        outcome: Result<Outcome, u8>,
        expected: u64,
        takes: bool,
    ) -> Result<u32, QueueError> {
        let mut head = vec![0; self.sizes.response() as usize];
        let mut data_in = 0;
        match outcome {
            Err(code) => head[11] = code,
            Ok(outcome) => {
                let residual = expected.saturating_sub(outcome.done) as u32; // a chain is below 4 GiB
                head[4..8].copy_from_slice(&residual.to_le_bytes());
                head[10] = outcome.status;
                head[11] = match &outcome {
                    o if o.bad_memory => response::TRANSPORT_FAILURE,
                    o if o.status == TASK_ABORTED => response::ABORTED,
                    o if o.wanted > expected => response::OVERRUN,
                    _ => response::OK,
                };
                if let Some(sense) = outcome.sense {
                    let n = SENSE_LEN.min(self.sizes.sense as usize);
                    head[..4].copy_from_slice(&(n as u32).to_le_bytes());
                    head[12..12 + n].copy_from_slice(&sense.fixed()[..n]);
                }
                data_in = if takes { 0 } else { outcome.done };
            }
        }
        request.chain.writer(&self.memory).write(&head)?;
        Ok((head.len() as u64 + data_in) as u32) // a chain is below 4 GiB
    }
}
