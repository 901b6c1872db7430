//! The worker of a queue pair.

use super::rx::{Batch, LARGEST, Rx};
use super::{Shared, feature};
use base::EventFd;
use bus::virtio::{Chain, Interrupt, Queue, QueueError, SharedQueue};
use memory::GuestMemory;
use net::{Counters, Frame, Offloads, Port, Room, Sent, VnetHeader};
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

/// What a worker gets.
pub(super) struct Setup {
    pub(super) index: u16,
    pub(super) rx: SharedQueue,
    pub(super) tx: SharedQueue,
    pub(super) kick: Arc<EventFd>,
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Interrupt,
    pub(super) shared: Arc<Shared>,
    pub(super) features: u64,
}

/// Where a worker puts its port when it ends.
type Slot = Arc<Mutex<Option<Box<dyn Port>>>>;

/// A running worker.
pub(super) struct Worker {
    thread: JoinHandle<()>,
    stop: Arc<AtomicBool>,
    port: Slot,
}

/// Backends keep buffers of 64 KiB elsewhere; the deepest stack is that of a log line.
const STACK: usize = 192 << 10;
/// Frames of the guest's taken before it gets what came for it.
const BATCH: usize = 64;
/// Longest frame that is looked at; a longer one is dropped.
const LONGEST: usize = LARGEST + 1024;

impl Worker {
    /// Starts a worker with the port, which is put back if that fails.
    pub(super) fn start(setup: Setup, port: &mut Option<Box<dyn Port>>) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let slot: Slot = Arc::new(Mutex::new(port.take()));
        let (thread_stop, thread_slot) = (stop.clone(), slot.clone());
        let name = format!("virtio-net{}", setup.index);
        let thread = std::thread::Builder::new().name(name).stack_size(STACK).spawn(move || {
            let mut port = thread_slot.lock().unwrap_or_else(|e| e.into_inner());
            if let Some(port) = &mut *port
                && let Err(e) = run(&setup, port.as_mut(), &thread_stop)
            {
                setup.interrupt.fail(&format!("the network backend cannot go on: {e}"));
            }
        });
        match thread {
            Ok(thread) => Ok(Self { thread, stop, port: slot }),
            Err(e) => {
                *port = slot.lock().unwrap_or_else(|e| e.into_inner()).take();
                Err(e)
            }
        }
    }

    /// Ends the thread; returns the port when nothing moves any more.
    pub(super) fn stop(self, kick: &EventFd) -> Option<Box<dyn Port>> {
        self.stop.store(true, Ordering::SeqCst);
        kick.signal();
        if self.thread.join().is_err() {
            tracing::error!("virtio-net: the worker panicked; the link is dead");
        }
        self.port.lock().unwrap_or_else(|e| e.into_inner()).take()
    }
}

/// A worker at work.
struct Lane<'a, 'm> {
    setup: &'a Setup,
    port: &'a mut dyn Port,
    rx: Rx<'m>,
    chain: Chain,
    frame: Frame<'m>,
    /// The port did not take the last frame.
    busy: bool,
    control: super::Control,
    generation: u32,
    offloads: Option<Offloads>,
    enabled: Option<bool>,
    /// A queue is broken: nothing is done until the driver resets the device.
    broken: bool,
}

fn run(setup: &Setup, port: &mut dyn Port, stop: &AtomicBool) -> io::Result<()> {
    let memory = setup.memory.clone();
    let mut nowhere = vec![0; LARGEST];
    let mergeable = setup.features & feature::MRG_RXBUF != 0;
    let generation = setup.shared.generation.load(Ordering::SeqCst);
    let control = setup.shared.control().clone();
    let mut lane = Lane {
        setup,
        port,
        rx: Rx::new(&memory, Room::of(&mut nowhere), mergeable, setup.features),
        chain: Chain::new(),
        frame: Frame::new(),
        busy: false,
        control,
        generation,
        offloads: None,
        enabled: None,
        broken: false,
    };
    lane.apply()?;
    lane.hush(&setup.rx);
    while !stop.load(Ordering::SeqCst) {
        lane.refresh()?;
        lane.hush(&setup.tx);
        let mut more = lane.transmit();
        more |= lane.receive()?;
        if !more && !lane.listen() {
            lane.wait()?;
        }
    }
    Ok(())
}

impl Lane<'_, '_> {
    /// Looks whether the driver has changed what it wants.
    fn refresh(&mut self) -> io::Result<()> {
        let generation = self.setup.shared.generation.load(Ordering::SeqCst);
        if generation == self.generation {
            return Ok(());
        }
        self.generation = generation;
        self.control = self.setup.shared.control().clone();
        self.apply()
    }

    fn apply(&mut self) -> io::Result<()> {
        let offloads = self.control.guest_offloads();
        if self.offloads != Some(offloads) {
            self.port.set_offloads(offloads)?;
            self.offloads = Some(offloads);
        }
        let pairs = self.setup.shared.pairs.load(Ordering::SeqCst);
        if self.enabled != Some(self.setup.index < pairs) {
            self.enabled = Some(self.setup.index < pairs);
            self.port.set_enabled(self.setup.index < pairs);
        }
        let large = offloads.intersects(Offloads::TSO4 | Offloads::TSO6 | Offloads::UFO | Offloads::USO4);
        self.rx.set_largest(large);
        Ok(())
    }

    /// Whether frames may pass.
    fn is_open(&self) -> bool {
        let shared = &self.setup.shared;
        shared.link.is_up() && self.setup.index < shared.pairs.load(Ordering::Relaxed)
    }

    fn fail(&mut self, queue: &mut Queue, name: &str, error: &QueueError) {
        queue.mark_broken();
        self.broken = true;
        if !matches!(error, QueueError::Broken) {
            self.setup.interrupt.fail(&format!("{name} queue {}: {error}", self.setup.index));
        }
    }

    /// Takes frames of the guest's; returns whether there are more.
    fn transmit(&mut self) -> bool {
        let setup = self.setup;
        let mut queue = setup.tx.lock().unwrap_or_else(|e| e.into_inner());
        if queue.is_broken() || self.broken {
            return false;
        }
        let result = self.transmit_batch(&mut queue);
        match result.and_then(|more| queue.publish().map(|wanted| (more, wanted))) {
            Ok((more, wanted)) => {
                if wanted {
                    setup.interrupt.queue(2 * setup.index + 1);
                }
                more
            }
            Err(e) => {
                self.fail(&mut queue, "transmit", &e);
                false
            }
        }
    }

    fn transmit_batch(&mut self, queue: &mut Queue) -> Result<bool, QueueError> {
        let counters = &self.setup.shared.counters;
        let open = self.setup.shared.link.is_up();
        let (mut packets, mut bytes, mut dropped) = (0, 0, 0);
        let mut more = true;
        for _ in 0..BATCH {
            if !queue.pop(&mut self.chain)? {
                more = false;
                break;
            }
            let len = self.chain.readable_len() as usize; // below 4 GiB
            if !open || !(VnetHeader::LEN + 14..=LONGEST).contains(&len) {
                dropped += 1;
                queue.push(&self.chain, 0)?;
                continue;
            }
            self.frame.clear();
            for segment in self.chain.readable() {
                let (mut at, mut left) = (segment.addr, u64::from(segment.len));
                while left > 0 {
                    let slice = self.rx.memory.chunk(at, left)?;
                    self.frame.push(slice);
                    at += slice.len();
                    left -= slice.len();
                }
            }
            self.busy = self.port.send(&self.frame) == Sent::Busy;
            if self.busy {
                queue.unpop(&self.chain);
                more = false;
                break;
            }
            packets += 1;
            bytes += (len - VnetHeader::LEN) as u64;
            queue.push(&self.chain, 0)?;
        }
        self.frame.clear();
        Counters::add(&counters.tx_packets, packets);
        Counters::add(&counters.tx_bytes, bytes);
        Counters::add(&counters.tx_dropped, dropped);
        Ok(more)
    }

    /// Gives the guest what came for it; returns whether there is more.
    fn receive(&mut self) -> io::Result<bool> {
        if self.broken {
            return Ok(false);
        }
        let setup = self.setup;
        let closed = !self.is_open();
        self.rx.full = false;
        let mut batch = Batch {
            rx: &mut self.rx,
            queue: setup.rx.lock().unwrap_or_else(|e| e.into_inner()),
            control: &self.control,
            shared: &setup.shared,
            closed,
            error: None,
            packets: 0,
            bytes: 0,
        };
        let result = self.port.receive(&mut batch);
        let finished = batch.finish();
        drop(batch);
        match finished {
            Ok(true) => setup.interrupt.queue(2 * setup.index),
            Ok(false) => {}
            Err(e) => {
                let mut queue = setup.rx.lock().unwrap_or_else(|e| e.into_inner());
                self.fail(&mut queue, "receive", &e);
            }
        }
        Ok(result? && !self.rx.full)
    }

    /// Asks the driver not to notify while we look anyway.
    fn hush(&mut self, queue: &SharedQueue) {
        let mut queue = queue.lock().unwrap_or_else(|e| e.into_inner());
        if !queue.is_broken()
            && let Err(e) = queue.disable_notifications()
        {
            self.fail(&mut queue, "a", &e);
        }
    }

    /// Asks the driver to notify of what we wait for. `true` if it is there already.
    fn listen(&mut self) -> bool {
        let setup = self.setup;
        let mut there = false;
        for (queue, wanted) in [(&setup.tx, !self.busy), (&setup.rx, self.rx.full)] {
            let mut queue = queue.lock().unwrap_or_else(|e| e.into_inner());
            if !wanted || queue.is_broken() || self.broken {
                continue;
            }
            match queue.enable_notifications() {
                Ok(more) => there |= more,
                Err(e) => self.fail(&mut queue, "a", &e),
            }
        }
        there
    }

    /// Sleeps until something happens.
    fn wait(&mut self) -> io::Result<()> {
        let mut fds = vec![PollFd::new(&*self.setup.kick, PollFlags::IN)];
        // While the guest has no room for more, nothing from outside matters.
        let fd = self.port.fd().filter(|_| !self.rx.full && !self.broken);
        if let Some(fd) = &fd {
            // A port that waits for time, not for the descriptor, says until when.
            let for_room = self.busy && self.port.deadline().is_none();
            let wanted = if for_room { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            fds.push(PollFd::from_borrowed_fd(fd.as_fd(), wanted));
        }
        let deadline = self.port.deadline().filter(|_| !self.broken);
        let timeout = deadline.map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            rustix::time::Timespec {
                tv_sec: left.as_secs().min(3600) as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        if fds[0].revents().contains(PollFlags::IN) {
            self.setup.kick.clear();
        }
        Ok(())
    }
}
