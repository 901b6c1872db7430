//! Registers, doorbells, and the way of a command through the controller.

use super::command::{Command, Status};
use super::identify::{Counters, Names};
use super::queues::{Completion, Completions, MOST_ENTRIES, Submission};
use super::{NvmeBus, THREADS, VERSION};
use crate::storage::Workers;
use bus::pci::{Intx, MsixVectors};
use memory::GuestMemory;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

/// Registers (3.1).
mod reg {
    pub(super) const CAP: u64 = 0x00;
    pub(super) const VS: u64 = 0x08;
    pub(super) const INTMS: u64 = 0x0c;
    pub(super) const INTMC: u64 = 0x10;
    pub(super) const CC: u64 = 0x14;
    pub(super) const CSTS: u64 = 0x1c;
    pub(super) const AQA: u64 = 0x24;
    pub(super) const ASQ: u64 = 0x28;
    pub(super) const ACQ: u64 = 0x30;
    pub(super) const DOORBELLS: u64 = 0x1000;
}

/// Contiguous queues; 7.5 s to be ready; the NVM command set; pages of 4 to 64 KiB.
const CAPABILITIES: u64 = (MOST_ENTRIES as u64 - 1) | 1 << 16 | 15 << 24 | 1 << 37 | 4 << 52;

const READY: u32 = 1 << 0;
const FATAL: u32 = 1 << 1;
const SHUTDOWN_DONE: u32 = 2 << 2;
const SHUTDOWN_RUNS: u32 = 1 << 2;
const SHUTDOWN_MASK: u32 = 3 << 2;

/// Commands under way on a queue at once, beyond which it is not read further.
const DEPTH: usize = 1024;

/// The controller.
pub(super) struct Controller {
    pub(super) names: Names,
    pub(super) pairs: u16,
    pub(super) bus: Arc<NvmeBus>,
    pub(super) memory: GuestMemory,
    pub(super) workers: Arc<Workers>,
    intx: Arc<Intx>,
    pub(super) vectors: MsixVectors,
    state: Mutex<ControllerState>,
}

/// What threads share.
#[derive(Default)]
pub(super) struct ControllerState {
    pub(super) s: ControllerSaved,
    running: bool,
    /// Commands of earlier numbers are forgotten.
    generation: u64,
    /// Jobs that workers have, also forgotten ones.
    jobs: usize,
}

/// Guest-visible state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ControllerSaved {
    master: bool,
    masked: u32,
    cc: u32,
    csts: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    pub(super) sqs: BTreeMap<u16, Submission>,
    pub(super) cqs: BTreeMap<u16, Completions>,
    /// Commands under way: queue and words.
    inflight: Vec<(u16, [u32; 16])>,
    /// Asynchronous event requests that wait for an event.
    pub(super) event_requests: Vec<u16>,
    /// Namespaces that have changed since the log was read.
    pub(super) changed: BTreeSet<u32>,
    /// The driver has been told, and has not read the log.
    pub(super) told: bool,
    pub(super) features: BTreeMap<u8, u32>,
    pub(super) counters: Counters,
}

/// How a command ends.
pub(super) enum End {
    /// With a status and a result.
    Done(Status, u32),
    /// Later: an asynchronous event request.
    Held,
}

impl ControllerState {
    fn alive(&self) -> bool {
        self.s.csts & (READY | FATAL) == READY && self.s.master && self.running
    }

    /// Bytes of a memory page.
    pub(super) fn page(&self) -> u64 {
        4096 << (self.s.cc >> 7 & 0xf).min(4)
    }
}

impl Controller {
    pub(super) fn new(
        names: Names,
        pairs: u16,
        bus: Arc<NvmeBus>,
        memory: GuestMemory,
        intx: Arc<Intx>,
        vectors: MsixVectors,
    ) -> Arc<Self> {
        let workers = Arc::new(Workers::new("nvme", THREADS));
        let controller =
            Arc::new(Self { names, pairs, bus, memory, workers, intx, vectors, state: Mutex::default() });
        let heard = Arc::downgrade(&controller);
        controller.bus.listen(move |nsid| {
            if let Some(controller) = heard.upgrade() {
                let mut state = controller.lock();
                state.s.changed.insert(nsid);
                controller.tell_events(&mut state);
            }
        });
        controller
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, ControllerState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    // --- registers --------------------------------------------------------------------------------------------------

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let s = &state.s;
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset + i as u64;
            let word: u32 = match at & !3 {
                reg::CAP => CAPABILITIES as u32,
                0x04 => (CAPABILITIES >> 32) as u32,
                reg::VS => VERSION,
                reg::INTMS | reg::INTMC => s.masked,
                reg::CC => s.cc,
                reg::CSTS => s.csts,
                reg::AQA => s.aqa,
                reg::ASQ => s.asq as u32,
                0x2c => (s.asq >> 32) as u32,
                reg::ACQ => s.acq as u32,
                0x34 => (s.acq >> 32) as u32,
                _ => 0,
            };
            *byte = word.to_le_bytes()[(at & 3) as usize];
        }
    }

    pub(super) fn write(self: &Arc<Self>, offset: u64, value: u32) {
        if offset >= reg::DOORBELLS {
            self.doorbell((offset - reg::DOORBELLS) / 4, value);
            return;
        }
        let mut state = self.lock();
        let s = &mut state.s;
        let low = |old: u64| old & !0xffff_ffff | u64::from(value & !0xfff);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            reg::INTMS => s.masked |= value,
            reg::INTMC => s.masked &= !value,
            reg::CC => self.configure(&mut state, value),
            reg::AQA => s.aqa = value & 0x0fff_0fff,
            reg::ASQ => s.asq = low(s.asq),
            0x2c => s.asq = high(s.asq),
            reg::ACQ => s.acq = low(s.acq),
            0x34 => s.acq = high(s.acq),
            _ => {}
        }
        self.update_line(&state);
    }

    /// The configuration register: enabling, disabling, shutting down.
    fn configure(self: &Arc<Self>, state: &mut ControllerState, value: u32) {
        let before = std::mem::replace(&mut state.s.cc, value & 0x00ff_fff1);
        match (before & 1 != 0, value & 1 != 0) {
            (false, true) => self.enable(state),
            (true, false) => {
                self.forget(state);
                if state.jobs == 0 {
                    state.s.csts = 0;
                }
            }
            _ => {}
        }
        if value >> 14 & 3 != 0 && before >> 14 & 3 == 0 && state.s.csts & SHUTDOWN_MASK == 0 {
            state.s.csts |= SHUTDOWN_RUNS;
            self.shut_down(state);
        } else if value >> 14 & 3 == 0 {
            state.s.csts &= !SHUTDOWN_MASK;
        }
    }

    fn enable(&self, state: &mut ControllerState) {
        let s = &mut state.s;
        let (sq, cq) = ((s.aqa & 0xfff) + 1, (s.aqa >> 16 & 0xfff) + 1);
        let (command_set, page) = (s.cc >> 4 & 7, s.cc >> 7 & 0xf);
        let good = (2..=MOST_ENTRIES).contains(&sq)
            && (2..=MOST_ENTRIES).contains(&cq)
            && matches!(command_set, 0 | 7)
            && page <= 4
            && s.asq != 0
            && s.acq != 0;
        // Still busy with what came before the controller was disabled: it was not ready to be enabled.
        if !good || state.jobs > 0 {
            s.csts = FATAL;
            return;
        }
        s.sqs.insert(0, Submission { base: s.asq, size: sq, ..Submission::default() });
        let completions = Completions { base: s.acq, size: cq, interrupts: true, ..Completions::default() };
        s.cqs.insert(0, completions);
        s.csts = READY;
    }

    /// Writes all caches out, then says so.
    fn shut_down(self: &Arc<Self>, state: &mut ControllerState) {
        let controller = self.clone();
        let generation = state.generation;
        state.jobs += 1;
        self.workers.submit(Box::new(move || {
            for space in controller.bus.all() {
                // The policy has said what there is to say.
                let _ = space.drive.flush();
            }
            let mut state = controller.lock();
            if state.generation == generation && state.s.csts & SHUTDOWN_MASK == SHUTDOWN_RUNS {
                state.s.csts = state.s.csts & !SHUTDOWN_MASK | SHUTDOWN_DONE;
            }
            controller.job_done(&mut state);
        }));
    }

    /// What runs is to have no effect; the queues go.
    fn forget(&self, state: &mut ControllerState) {
        state.generation += 1;
        let s = &mut state.s;
        s.sqs.clear();
        s.cqs.clear();
        s.inflight.clear();
        s.event_requests.clear();
        s.changed.clear();
        s.features.clear();
        s.told = false;
        self.intx.set(false);
    }

    fn job_done(&self, state: &mut ControllerState) {
        state.jobs -= 1;
        if state.jobs == 0 && state.s.cc & 1 == 0 {
            state.s.csts &= SHUTDOWN_MASK; // disabled, and idle at last
        }
    }

    fn fatal(&self, state: &mut ControllerState, what: &str) {
        tracing::warn!("nvme: {what}; the controller stops until the guest resets it");
        state.s.csts |= FATAL;
    }

    // --- doorbells and interrupts -----------------------------------------------------------------------------------

    fn doorbell(self: &Arc<Self>, index: u64, value: u32) {
        let mut state = self.lock();
        if !state.alive() || index / 2 > u64::from(self.pairs) {
            return;
        }
        let queue = (index / 2) as u16; // at most 128
        let value = value & 0xffff;
        if index & 1 == 0 {
            let Some(sq) = state.s.sqs.get_mut(&queue).filter(|sq| value < sq.size) else { return };
            sq.tail = value;
            self.serve_soon(&mut state, queue);
            return;
        }
        let Some(cq) = state.s.cqs.get_mut(&queue).filter(|cq| value < cq.size) else { return };
        cq.head = value;
        let had_waiting = !cq.waiting.is_empty();
        if had_waiting {
            self.flush_completions(&mut state, queue);
            let stuck: Vec<u16> =
                state.s.sqs.iter().filter(|(_, sq)| sq.cq == queue).map(|(n, _)| *n).collect();
            for sq in stuck {
                self.serve_soon(&mut state, sq);
            }
        }
        self.update_line(&state);
    }

    /// The interrupt line, where there is no MSI-X.
    fn update_line(&self, state: &ControllerState) {
        if self.vectors.enabled() {
            self.intx.set(false);
            return;
        }
        let wants = |cq: &Completions| {
            cq.interrupts && cq.pending() && (cq.vector > 31 || state.s.masked >> cq.vector & 1 == 0)
        };
        self.intx.set(state.s.cqs.values().any(wants));
    }

    fn flush_completions(&self, state: &mut ControllerState, queue: u16) {
        let Some(cq) = state.s.cqs.get_mut(&queue) else { return };
        match cq.flush(&self.memory) {
            Ok(true) if cq.interrupts && self.vectors.enabled() => self.vectors.notify(cq.vector),
            Ok(_) => {}
            Err(e) => return self.fatal(state, &format!("completion queue {queue}: {e}")),
        }
        self.update_line(state);
    }

    /// Gives the driver a completion.
    pub(super) fn complete(
        &self,
        state: &mut ControllerState,
        sq: u16,
        id: u16,
        status: Status,
        result: u32,
    ) {
        let Some((head, queue)) = state.s.sqs.get(&sq).map(|q| (q.head, q.cq)) else { return };
        if let Some(cq) = state.s.cqs.get_mut(&queue) {
            cq.waiting.push_back(Completion::new(sq, head, id, result, status));
        }
        self.flush_completions(state, queue);
    }

    // --- commands ---------------------------------------------------------------------------------------------------

    /// Has a worker look at a submission queue.
    fn serve_soon(self: &Arc<Self>, state: &mut ControllerState, queue: u16) {
        if !state.alive() {
            return;
        }
        let generation = state.generation;
        let Some(sq) = state.s.sqs.get_mut(&queue) else { return };
        if sq.serving || sq.head == sq.tail {
            return;
        }
        sq.serving = true;
        state.jobs += 1;
        let controller = self.clone();
        self.workers.submit(Box::new(move || controller.serve(queue, generation)));
    }

    /// Takes commands off a queue, on a worker. The last one there is done here, others by more workers; meanwhile
    /// somebody else may look at the queue.
    fn serve(self: &Arc<Self>, queue: u16, generation: u64) {
        loop {
            let mut state = self.lock();
            if state.generation != generation {
                return self.job_done(&mut state);
            }
            let taken = self.take(&mut state, queue);
            let more = state.s.sqs.get(&queue).is_some_and(|sq| sq.head != sq.tail);
            let Some(command) = taken else {
                if let Some(sq) = state.s.sqs.get_mut(&queue) {
                    sq.serving = false;
                }
                return self.job_done(&mut state);
            };
            if more && queue != 0 {
                state.jobs += 1;
                drop(state);
                let controller = self.clone();
                self.workers.submit(Box::new(move || {
                    controller.carry_out(queue, &command, generation);
                    controller.job_done(&mut controller.lock());
                }));
                continue;
            }
            if let Some(sq) = state.s.sqs.get_mut(&queue) {
                sq.serving = false;
            }
            drop(state);
            self.carry_out(queue, &command, generation);
            return self.job_done(&mut self.lock());
        }
    }

    fn take(&self, state: &mut ControllerState, queue: u16) -> Option<Command> {
        if !state.alive() {
            return None;
        }
        let under_way = state.s.inflight.iter().filter(|(q, _)| *q == queue).count();
        let sq = state.s.sqs.get(&queue)?;
        let room = state.s.cqs.get(&sq.cq).is_some_and(|cq| cq.waiting.is_empty());
        if under_way >= DEPTH || !room {
            return None;
        }
        match state.s.sqs.get_mut(&queue)?.fetch(&self.memory)? {
            Ok(command) => {
                state.s.inflight.push((queue, command.0));
                Some(command)
            }
            Err(e) => {
                self.fatal(state, &format!("submission queue {queue}: {e}"));
                None
            }
        }
    }

    /// Carries a command out and completes it.
    fn carry_out(self: &Arc<Self>, queue: u16, command: &Command, generation: u64) {
        let end = if queue == 0 { self.admin(command, generation) } else { self.io(command, generation) };
        let mut state = self.lock();
        if state.generation != generation {
            return;
        }
        if let Some(i) = state.s.inflight.iter().position(|(q, words)| *q == queue && *words == command.0) {
            state.s.inflight.swap_remove(i);
        }
        if let End::Done(status, result) = end {
            self.complete(&mut state, queue, command.id(), status, result);
        }
        // A queue that was left alone because too much was under way.
        self.serve_soon(&mut state, queue);
    }

    /// The state, unless the controller was reset meanwhile.
    pub(super) fn lock_current(&self, generation: u64) -> Option<MutexGuard<'_, ControllerState>> {
        Some(self.lock()).filter(|s| s.generation == generation)
    }

    // --- lifecycle --------------------------------------------------------------------------------------------------

    pub(super) fn set_master(self: &Arc<Self>, on: bool) {
        let mut state = self.lock();
        state.s.master = on;
        self.serve_all(&mut state);
    }

    fn serve_all(self: &Arc<Self>, state: &mut ControllerState) {
        let queues: Vec<u16> = state.s.sqs.keys().copied().collect();
        for queue in queues {
            self.serve_soon(state, queue);
        }
    }

    pub(super) fn start(self: &Arc<Self>) {
        for space in self.bus.all() {
            space.drive.set_workers(&self.workers);
        }
        {
            let mut state = self.lock();
            state.running = true;
            let generation = state.generation;
            // Commands that were under way when the state was saved start over.
            if state.jobs == 0 {
                for (queue, words) in state.s.inflight.clone() {
                    let controller = self.clone();
                    state.jobs += 1;
                    self.workers.submit(Box::new(move || {
                        controller.carry_out(queue, &Command(words), generation);
                        controller.job_done(&mut controller.lock());
                    }));
                }
                if state.s.csts & SHUTDOWN_MASK == SHUTDOWN_RUNS {
                    self.shut_down(&mut state);
                }
            }
            self.serve_all(&mut state);
        }
        self.workers.resume();
    }

    pub(super) fn pause(&self) {
        self.lock().running = false;
        self.workers.drain();
    }

    pub(super) fn power_on(&self) {
        self.forget(&mut self.lock());
        self.workers.abandon();
        for space in self.bus.all() {
            space.drive.reset();
        }
        let mut state = self.lock();
        state.s = ControllerSaved::default();
        self.update_line(&state);
    }

    pub(super) fn save(&self) -> ControllerSaved {
        self.lock().s.clone()
    }

    /// Whether a saved state can be of this controller.
    pub(super) fn fits(&self, saved: &ControllerSaved) -> bool {
        saved.sqs.iter().all(|(n, q)| *n <= self.pairs && q.is_valid() && saved.cqs.contains_key(&q.cq))
            && saved.cqs.iter().all(|(n, q)| *n <= self.pairs && q.is_valid())
            && saved.event_requests.len() <= super::admin::MOST_EVENT_REQUESTS
            && saved.inflight.len() <= DEPTH * usize::from(self.pairs + 1)
    }

    pub(super) fn load(&self, saved: ControllerSaved) {
        self.forget(&mut self.lock());
        self.workers.abandon();
        let mut state = self.lock();
        state.s = saved;
        self.update_line(&state);
    }
}
