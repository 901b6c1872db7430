//! The worker thread: takes requests from the queues, has them done, gives them back in batches.
//!
//! Two ways of waiting, two of working:
//! - With io_uring the thread sleeps in it, so that one system call submits requests and waits for notifications and
//!   completions alike. Without it (old or restricted kernels) it polls the eventfd.
//! - Reads and writes of flat images go to io_uring, unless the file lives in memory (tmpfs): such reads never wait,
//!   but the kernel would hand them to one of its threads. Those, all other operations, and images of other formats are
//!   done in place.

use super::Disk;
use super::poll::Poll;
use super::request::{Direct, IOERR, OK, Operation, Request, STOP, report_errno};
use super::uring::{DEPTH, Event, Uring};
use crate::storage::pieces::{MOST, in_memory};
use base::EventFd;
use bus::virtio::{Interrupt, Queue, QueueError, SharedQueue};
use memory::GuestMemory;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How the worker waits and works; `Auto` unless a test wants to see the others work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Engine {
    /// By kernel and file.
    #[default]
    Auto,
    /// io_uring also where the file lives in memory.
    #[cfg(test)]
    Uring,
    /// No io_uring.
    #[cfg(test)]
    Poll,
}

/// What a worker gets.
pub(super) struct Setup {
    pub(super) disk: Arc<Disk>,
    pub(super) queues: Vec<(u16, SharedQueue)>,
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Interrupt,
    pub(super) kick: Arc<EventFd>,
    pub(super) engine: Engine,
    /// How long to poll at most before sleeping.
    pub(super) poll: Duration,
    /// Name of the thread.
    pub(super) name: String,
    /// Requests to try again.
    pub(super) stopped: Vec<Request>,
}

/// A running worker.
pub(super) struct Worker {
    thread: JoinHandle<Vec<Request>>,
    stop: Arc<AtomicBool>,
}

/// The deepest stack is a system call's; formatting a log line takes most of it.
const STACK: usize = 128 << 10;
/// Requests done in place before the driver hears of them.
const BATCH: u32 = 16;

impl Worker {
    pub(super) fn start(setup: Setup) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let thread_stop = stop.clone();
        let thread = std::thread::Builder::new()
            .name(setup.name.clone())
            .stack_size(STACK)
            .spawn(move || run(setup, &thread_stop))?;
        Ok(Self { thread, stop })
    }

    /// Ends the thread; returns when all that was begun is finished, with the requests that are to be tried again.
    pub(super) fn stop(self, kick: &EventFd) -> Vec<Request> {
        self.stop.store(true, Ordering::SeqCst);
        kick.signal();
        self.thread.join().unwrap_or_else(|_| {
            tracing::error!("virtio-blk: the worker panicked; requests may be lost");
            Vec::new()
        })
    }
}

fn run(mut setup: Setup, stop: &AtomicBool) -> Vec<Request> {
    let again = std::mem::take(&mut setup.stopped);
    let disk = setup.disk.clone();
    let direct = disk.image.direct().map(|(fd, base, alignment)| Direct { fd, base, alignment });
    let file = direct.as_ref().map(|d| d.fd).filter(|fd| setup.engine.asynchronous(*fd));
    let uring = match setup.engine {
        #[cfg(test)]
        Engine::Poll => None,
        _ => Uring::new(&setup.kick, file)
            .inspect_err(|e| tracing::debug!("virtio-blk: no io_uring ({e}); using poll and preadv"))
            .ok(),
    };
    let mut lanes = Lanes {
        disk: &disk,
        direct: direct.as_ref(),
        setup: &setup,
        asynchronous: file.is_some() && uring.is_some(),
        slots: Vec::new(),
        free: Vec::new(),
        bounce: Vec::new(),
        stopped: Vec::new(),
        poll: Poll::new(setup.poll),
        stop,
    };
    lanes.try_again(again);
    let result = match uring {
        Some(uring) => lanes.with_uring(uring),
        None => lanes.with_poll(),
    };
    if let Err(e) = result {
        setup.interrupt.fail(&format!("the worker cannot go on: {e}"));
    }
    lanes.stopped
}

impl Engine {
    /// Whether reads and writes of this file are worth submitting.
    fn asynchronous(self, fd: BorrowedFd<'_>) -> bool {
        match self {
            #[cfg(test)]
            Engine::Uring => true,
            _ => !in_memory(fd),
        }
    }
}

fn lock(queue: &SharedQueue) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(|e| e.into_inner())
}

/// The worker's queues and requests.
struct Lanes<'a> {
    disk: &'a Disk,
    direct: Option<&'a Direct<'a>>,
    setup: &'a Setup,
    asynchronous: bool,
    /// Requests, reused; grown as they are needed.
    slots: Vec<Request>,
    free: Vec<usize>,
    bounce: Vec<u8>,
    /// Requests that an error stopped.
    stopped: Vec<Request>,
    poll: Poll,
    stop: &'a AtomicBool,
}

impl Lanes<'_> {
    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn free_slot(&mut self) -> Option<usize> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        if self.slots.len() >= DEPTH as usize {
            return None;
        }
        self.slots.push(Request::new());
        Some(self.slots.len() - 1)
    }

    /// Ends the use of a queue whose driver misbehaved.
    fn fail(&self, lane: usize, queue: &mut Queue, error: &QueueError) {
        queue.mark_broken();
        if !matches!(error, QueueError::Broken) {
            self.setup.interrupt.fail(&format!("queue {}: {error}", self.setup.queues[lane].0));
        }
    }

    /// Shows the driver what is finished.
    fn publish(&self, lane: usize, queue: &mut Queue) {
        match queue.publish() {
            Ok(true) => self.setup.interrupt.queue(self.setup.queues[lane].0),
            Ok(false) => {}
            Err(e) => self.fail(lane, queue, &e),
        }
    }

    /// Takes what a queue holds: submits or does it.
    fn gather(&mut self, lane: usize, mut uring: Option<&mut Uring>) -> io::Result<()> {
        let shared = self.setup.queues[lane].1.clone();
        let mut queue = lock(&shared);
        if queue.is_broken() {
            return Ok(());
        }
        let mut unpublished = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let Some(slot) = self.free_slot() else { break };
            let taken = self.take(lane, slot, &mut queue);
            if !matches!(taken, Ok(true)) {
                self.free.push(slot);
            }
            match taken {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) => {
                    self.fail(lane, &mut queue, &e);
                    break;
                }
            }
            if let Some(uring) = uring.as_deref_mut()
                && self.submit(slot, uring)?
            {
                continue;
            }
            let status = self.perform(slot);
            match self.give_back(slot, &mut queue, status) {
                Ok(given) => unpublished += u32::from(given),
                Err(e) => {
                    self.fail(lane, &mut queue, &e);
                    break;
                }
            }
            if unpublished == BATCH {
                unpublished = 0;
                self.publish(lane, &mut queue);
            }
        }
        if unpublished > 0 {
            self.publish(lane, &mut queue);
        }
        Ok(())
    }

    fn take(&mut self, lane: usize, slot: usize, queue: &mut Queue) -> Result<bool, QueueError> {
        let request = &mut self.slots[slot];
        if !queue.pop(&mut request.chain)? {
            return Ok(false);
        }
        request.queue = lane;
        request.parse(&self.setup.memory, self.disk)?;
        Ok(true)
    }

    /// Submits a read or write that io_uring can do. `false`: do it here.
    fn submit(&mut self, slot: usize, uring: &mut Uring) -> io::Result<bool> {
        let request = &mut self.slots[slot];
        let (Some(direct), true) = (self.direct, self.asynchronous) else { return Ok(false) };
        if !matches!(request.operation, Operation::Read | Operation::Write) || request.len == 0 {
            return Ok(false);
        }
        if request.find_pieces(&self.setup.memory).is_err() {
            return Ok(false); // fails again, and is reported, in place
        }
        let offset = direct.base + request.offset;
        let alignment = direct.alignment.max(1) as usize;
        let simple = request.pieces.as_slice().len() <= MOST && request.len <= i32::MAX as u64;
        if !simple || !request.pieces.aligned(alignment) || !offset.is_multiple_of(alignment as u64) {
            return Ok(false);
        }
        let durable = !self.disk.writeback.load(Ordering::Relaxed);
        let write = (request.operation == Operation::Write).then_some(durable);
        uring.transfer(slot, &request.pieces, offset, write)?;
        Ok(true)
    }

    /// Completes a request, or puts it aside if the machine is to stop. Returns whether the ring has it again.
    fn give_back(
        &mut self,
        slot: usize,
        queue: &mut Queue,
        status: Result<u8, QueueError>,
    ) -> Result<bool, QueueError> {
        self.free.push(slot);
        let status = status?;
        if status == STOP {
            self.stopped.push(std::mem::replace(&mut self.slots[slot], Request::new()));
            // Once for each request: the machine may have been resumed meanwhile.
            self.disk.drive.stop_machine();
            return Ok(false);
        }
        let request = &self.slots[slot];
        let written = request.finish(&self.setup.memory, status)?;
        queue.push(&request.chain, written)?;
        Ok(true)
    }

    /// Does requests over that an error had stopped.
    fn try_again(&mut self, requests: Vec<Request>) {
        for request in requests {
            let lane = request.queue;
            let shared = self.setup.queues[lane].1.clone();
            let mut queue = lock(&shared);
            let Some(slot) = self.free_slot() else {
                self.stopped.push(request);
                continue;
            };
            self.slots[slot] = request;
            let status = self.perform(slot);
            match self.give_back(slot, &mut queue, status) {
                Ok(true) => self.publish(lane, &mut queue),
                Ok(false) => {}
                Err(e) => self.fail(lane, &mut queue, &e),
            }
        }
    }

    /// Does a request in place; returns its status.
    fn perform(&mut self, slot: usize) -> Result<u8, QueueError> {
        let request = &mut self.slots[slot];
        let memory = &self.setup.memory;
        let mut direct = self.direct;
        if let Some(d) = direct
            && d.alignment > 1
            && matches!(request.operation, Operation::Read | Operation::Write)
        {
            // What the descriptor cannot take as it is goes through the image, which aligns it.
            request.find_pieces(memory)?;
            let alignment = d.alignment as usize;
            let fits = request.pieces.aligned(alignment)
                && (d.base + request.offset).is_multiple_of(alignment as u64);
            direct = direct.filter(|_| fits);
        }
        request.perform(memory, self.disk, direct, &mut self.bounce)
    }

    /// A submitted request is done: completes it, and gives it back without telling the driver yet.
    fn complete(&mut self, slot: usize, result: i32) -> usize {
        let request = &mut self.slots[slot];
        let lane = request.queue;
        let memory = &self.setup.memory;
        let status = match (result, self.direct) {
            (n, _) if n >= 0 && u64::from(n.unsigned_abs()) == request.len => {
                if request.operation == Operation::Read {
                    request.finish_read(memory, request.len).map(|()| OK)
                } else {
                    Ok(OK)
                }
            }
            // Short, or not possible without waiting: the rest is done here.
            (n, Some(direct)) if n >= 0 => {
                request.move_direct(memory, self.disk, direct, n.unsigned_abs().into())
            }
            (n, Some(direct)) if matches!(-n, libc::EAGAIN | libc::EINTR) => {
                request.move_direct(memory, self.disk, direct, 0)
            }
            (n, _) => {
                let what = if request.operation == Operation::Read { "read" } else { "write" };
                Ok(if n < 0 { report_errno(self.disk, what, -n) } else { IOERR })
            }
        };
        let shared = self.setup.queues[lane].1.clone();
        let mut queue = lock(&shared);
        if let Err(e) = self.give_back(slot, &mut queue, status) {
            self.fail(lane, &mut queue, &e);
        }
        lane
    }

    /// Watches the queues for a while. `true` if one of them has something.
    fn watch(&self) -> bool {
        self.poll.run(|| {
            let any = |queue: &SharedQueue| lock(queue).has_available();
            self.stop.load(Ordering::Relaxed) || self.setup.queues.iter().any(|(_, queue)| any(queue))
        })
    }

    /// Asks the drivers to notify. `true` if one of them has something already.
    fn listen(&self) -> bool {
        let mut more = false;
        for (lane, (_, shared)) in self.setup.queues.iter().enumerate() {
            let mut queue = lock(shared);
            if queue.is_broken() {
                continue;
            }
            match queue.enable_notifications() {
                Ok(there) => more |= there,
                Err(e) => self.fail(lane, &mut queue, &e),
            }
        }
        more
    }

    /// Asks the drivers not to notify while we look anyway.
    fn hush(&self) {
        for (lane, (_, shared)) in self.setup.queues.iter().enumerate() {
            let mut queue = lock(shared);
            if !queue.is_broken()
                && let Err(e) = queue.disable_notifications()
            {
                self.fail(lane, &mut queue, &e);
            }
        }
    }

    fn with_uring(&mut self, mut uring: Uring) -> io::Result<()> {
        let mut events = Vec::new();
        let (mut kicked, mut listening) = (true, false);
        let mut touched = vec![false; self.setup.queues.len()];
        loop {
            if kicked {
                listening = false;
                self.hush();
                for lane in 0..self.setup.queues.len() {
                    self.gather(lane, Some(&mut uring))?;
                }
            }
            let stopping = self.stop.load(Ordering::SeqCst);
            if stopping && self.in_flight() == 0 {
                return Ok(());
            }
            let full = self.in_flight() == DEPTH as usize;
            kicked = false;
            if !stopping && !full && !listening {
                kicked = self.in_flight() == 0 && self.watch() || self.listen();
                if kicked {
                    continue;
                }
                listening = true;
            }
            let idle = (self.in_flight() == 0).then(Instant::now);
            uring.submit_and_wait()?;
            uring.events(&mut events)?;
            for event in events.drain(..) {
                match event {
                    Event::Kick => {
                        kicked = true;
                        if let Some(since) = idle {
                            self.poll.slept(since.elapsed());
                        }
                    }
                    Event::Done { slot, result } => {
                        let lane = self.complete(slot, result);
                        touched[lane] = true;
                    }
                }
            }
            for (lane, touched) in touched.iter_mut().enumerate() {
                if std::mem::take(touched) {
                    self.publish(lane, &mut lock(&self.setup.queues[lane].1));
                }
            }
            // Room again: look at what was left in the rings.
            kicked |= full;
        }
    }

    fn with_poll(&mut self) -> io::Result<()> {
        while !self.stop.load(Ordering::SeqCst) {
            self.hush();
            for lane in 0..self.setup.queues.len() {
                self.gather(lane, None)?;
            }
            if !self.watch() && !self.listen() {
                let since = Instant::now();
                self.setup.kick.wait()?;
                self.poll.slept(since.elapsed());
            }
        }
        Ok(())
    }
}
