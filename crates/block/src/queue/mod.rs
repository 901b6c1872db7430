//! Requests on an image that do not wait: for device models, and for whoever keeps many requests in flight.
//!
//! # How to use it
//!
//! One [`Queue`] per thread (an iothread, or a virtqueue's thread), any number of queues per image:
//!
//! ```no_run
//! # use block::{Image, OpenOptions, queue::{Engine, Operation, Queue, Request}};
//! # use std::sync::Arc;
//! # fn main() -> block::Result<()> {
//! let image = Arc::new(Image::open("disk.qcow2", &OpenOptions::writer(None))?);
//! let mut queue = Queue::new(image, 128, Engine::Auto)?;
//! // Put `queue.signal()` into the thread's epoll set; then, when the guest rings:
//! let mut buffer = queue.buffer(4096); // copy the guest's bytes into it for a write
//! buffer.fill(7);
//! queue.push(Request { id: 1, operation: Operation::Write { durable: false }, offset: 0, len: 4096, buffer })?;
//! queue.submit()?; // after all requests of one round: one system call
//! // When the descriptor becomes readable (or after `queue.wait()`):
//! let mut done = Vec::new();
//! queue.reap(&mut done)?;
//! for completion in done {
//!     // completion.id, completion.result, completion.buffer (what was read)
//! }
//! # Ok(()) }
//! ```
//!
//! Where the image is flat ([`Image::direct`]) reads and writes go to the kernel by io_uring, on a registered file and from
//! registered buffers. Everything else (table formats, flushes, discards, images that are watched or throttled, kernels
//! without io_uring) is carried out by a few threads of the queue's own; the interface is the same. Requests complete in any
//! order; a flush covers the writes whose completions were reaped before it was pushed.

mod buffer;
mod ring;

pub use buffer::Buffer;

use crate::{Error, Image, Result};
use ring::Ring;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::{
    collections::VecDeque,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Condvar, Mutex},
    thread::JoinHandle,
};

/// Threads that a queue starts at most.
const MAX_THREADS: usize = 8;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Fills the buffer.
    Read,
    /// Writes the buffer; `durable`: it survives a power cut once completed.
    Write {
        /// Force unit access.
        durable: bool,
    },
    /// Makes completed writes durable.
    Flush,
    /// The range is no longer needed.
    Discard,
    /// The range reads as zeros afterwards.
    WriteZeroes {
        /// Its space may be freed.
        unmap: bool,
    },
}

/// A request.
#[derive(Debug)]
pub struct Request {
    /// The caller's number for it.
    pub id: u64,
    /// What to do.
    pub operation: Operation,
    /// Where, in bytes of the disk.
    pub offset: u64,
    /// How many bytes; for reads and writes the buffer's length.
    pub len: u64,
    /// Bytes read or written, see [`Queue::buffer`].
    pub buffer: Buffer,
}

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    /// The caller's number.
    pub id: u64,
    /// How it went.
    pub result: Result<()>,
    /// The request's buffer.
    pub buffer: Buffer,
}

/// What carries requests out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Engine {
    /// io_uring where the kernel has it, else threads.
    #[default]
    Auto,
    /// Threads.
    Threads,
    /// io_uring, or an error where the kernel has none.
    Uring,
}

impl Engine {
    /// By its name in `aio=`: `threads`, `io_uring`, or `native` (which QEMU serves by an older interface of the kernel that
    /// io_uring replaces).
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "threads" => Ok(Engine::Threads),
            "native" | "io_uring" => Ok(Engine::Uring),
            _ => Err(Error::usage(format!("Invalid aio option '{name}'; use threads, native or io_uring"))),
        }
    }
}

#[derive(Default)]
struct Work {
    waiting: VecDeque<Request>,
    done: Vec<Completion>,
    idle: usize,
    over: bool,
}

struct Pool {
    image: Arc<Image>,
    work: Mutex<Work>,
    changed: Condvar,
    signal: OwnedFd,
}

/// Requests in flight on an image.
pub struct Queue {
    pool: Arc<Pool>,
    threads: Vec<JoinHandle<()>>,
    limit: usize,
    ring: Option<Ring>,
    pooled: usize,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

impl Pool {
    fn lock(&self) -> std::sync::MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn notify(&self) {
        // The counter cannot overflow: the reader takes it to zero, and each completion adds one.
        let _ = rustix::io::write(&self.signal, &1u64.to_ne_bytes());
    }

    fn carry_out(&self, request: &mut Request) -> Result<()> {
        let (image, at) = (&self.image, request.offset);
        match request.operation {
            Operation::Read => image.read_at(&mut request.buffer, at),
            Operation::Write { durable } => {
                image.write_at(&request.buffer, at)?;
                if durable { image.flush() } else { Ok(()) }
            }
            Operation::Flush => image.flush(),
            Operation::Discard => image.discard(at, request.len),
            Operation::WriteZeroes { unmap } => image.write_zeroes(at, request.len, unmap),
        }
    }

    fn run(&self) {
        let mut work = self.lock();
        loop {
            if let Some(mut request) = work.waiting.pop_front() {
                drop(work);
                let result = self.carry_out(&mut request);
                work = self.lock();
                work.done.push(Completion { id: request.id, result, buffer: request.buffer });
                self.notify();
            } else if work.over {
                return;
            } else {
                work.idle += 1;
                work = self.changed.wait(work).unwrap_or_else(|e| e.into_inner());
                work.idle -= 1;
            }
        }
    }
}

impl Queue {
    /// A queue for about `depth` requests at a time (more only wait).
    pub fn new(image: Arc<Image>, depth: u32, engine: Engine) -> Result<Self> {
        let signal = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("Could not make an eventfd", e))?;
        let ring = match (engine, image.direct()) {
            (Engine::Threads, _) | (_, None) => None,
            (engine, Some((file, ..))) => match Ring::new(depth, file, signal.as_fd()) {
                Ok(ring) => Some(ring),
                Err(e) if engine == Engine::Uring => return Err(e),
                Err(e) => {
                    tracing::info!(error = %e, "no io_uring: using threads");
                    None
                }
            },
        };
        let pool = Arc::new(Pool { image, work: Mutex::default(), changed: Condvar::new(), signal });
        let limit = (depth as usize).clamp(1, MAX_THREADS);
        Ok(Queue { pool, threads: Vec::new(), limit, ring, pooled: 0 })
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.pool.image
    }

    /// Memory for a request, page-aligned. What it holds is undefined (earlier requests' bytes of this queue, or zeros).
    pub fn buffer(&self, len: usize) -> Buffer {
        ring::buffer(self.ring.as_ref(), len)
    }

    /// Readable when completions wait to be reaped.
    pub fn signal(&self) -> BorrowedFd<'_> {
        self.pool.signal.as_fd()
    }

    /// Requests pushed and not yet reaped.
    pub fn in_flight(&self) -> usize {
        self.pooled + self.ring.as_ref().map_or(0, Ring::in_flight)
    }

    /// Takes a request. It is under way at the latest after [`Queue::submit`].
    pub fn push(&mut self, request: Request) -> Result<()> {
        if matches!(request.operation, Operation::Read | Operation::Write { .. })
            && request.len != request.buffer.len() as u64
        {
            return Err(Error::usage("a request's length is not that of its buffer"));
        }
        let Some(ring) = &mut self.ring else { return self.delegate(request) };
        let write = match request.operation {
            Operation::Read => false,
            Operation::Write { .. } => true,
            _ => return self.delegate(request),
        };
        let (len, image) = (request.len, &self.pool.image);
        let inside = request.offset.checked_add(len).is_some_and(|end| end <= image.size());
        if !inside || len == 0 || len > u64::from(u32::MAX / 2) || (write && image.is_read_only()) {
            // Errors are told in one place.
            return self.delegate(request);
        }
        // From here on, whoever wants to watch or slow the image waits for this request.
        image.enter_direct();
        match image.direct() {
            Some((file, base, align))
                if (request.offset | len).is_multiple_of(u64::from(align))
                    && (base + request.offset).is_multiple_of(u64::from(align)) =>
            {
                let host = base + request.offset;
                ring.push(file, host, request).inspect_err(|_| image.leave_direct())
            }
            _ => {
                image.leave_direct();
                self.delegate(request)
            }
        }
    }

    /// Lets a thread do it.
    fn delegate(&mut self, request: Request) -> Result<()> {
        self.pooled += 1;
        let mut work = self.pool.lock();
        work.waiting.push_back(request);
        let more = work.idle < work.waiting.len() && self.threads.len() < self.limit;
        drop(work);
        self.pool.changed.notify_one();
        if more {
            let pool = Arc::clone(&self.pool);
            let thread = std::thread::Builder::new().name("block".into()).spawn(move || pool.run());
            match thread {
                Ok(thread) => self.threads.push(thread),
                Err(e) if self.threads.is_empty() => return Err(Error::io("Could not start a thread", e)),
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Starts what was pushed.
    pub fn submit(&mut self) -> Result<()> {
        self.ring.as_mut().map_or(Ok(()), Ring::submit)
    }

    /// Appends what is done to `out`, without waiting.
    pub fn reap(&mut self, out: &mut Vec<Completion>) -> Result<()> {
        let mut count = [0; 8];
        // Nothing to read means nothing new, or what an earlier call took already.
        let _ = rustix::io::read(&self.pool.signal, &mut count);
        let before = out.len();
        if let Some(ring) = &mut self.ring {
            let image = &self.pool.image;
            ring.reap(out, |request, host, done| {
                let storage = image.storage();
                match request.operation {
                    Operation::Read => storage.read_at(&mut request.buffer[done..], host + done as u64),
                    Operation::Write { durable } => {
                        storage.write_at(&request.buffer[done..], host + done as u64)?;
                        if durable { image.flush() } else { Ok(()) }
                    }
                    _ => Ok(()),
                }
            });
            for _ in before..out.len() {
                image.leave_direct();
            }
        }
        if self.pooled > 0 {
            let mut work = self.pool.lock();
            self.pooled -= work.done.len();
            out.append(&mut work.done);
        }
        Ok(())
    }

    /// Submits, and waits until something can be reaped (or nothing is in flight).
    pub fn wait(&mut self) -> Result<()> {
        self.submit()?;
        while self.in_flight() > 0 {
            let mut fds = [PollFd::new(&self.pool.signal, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::io("Could not wait for requests", e)),
            }
        }
        Ok(())
    }

    /// Waits for everything in flight, appending it to `out`.
    pub fn drain(&mut self, out: &mut Vec<Completion>) -> Result<()> {
        while self.in_flight() > 0 {
            self.wait()?;
            self.reap(out)?;
        }
        Ok(())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let direct = self.ring.as_ref().map_or(0, Ring::in_flight);
        // Waits for the kernel.
        self.ring = None;
        for _ in 0..direct {
            self.pool.image.leave_direct();
        }
        self.pool.lock().over = true;
        self.pool.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has told so already.
            let _ = thread.join();
        }
    }
}
