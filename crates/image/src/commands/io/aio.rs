//! `aio_read`, `aio_write` and `aio_flush`: requests that are in flight while further commands run.

use super::{Flags, MAX_REQUEST, Session, dump, failed, report, size};
use block::{
    Error, Image, Result,
    queue::{Buffer, Completion, Engine, Operation, Queue, Request},
};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// Requests at a time before further ones wait.
const DEPTH: u32 = 64;

/// What is to be said about a request once it is done.
struct Flight {
    flags: Flags,
    write: bool,
    offset: u64,
    len: u64,
    pattern: Option<u8>,
    started: Instant,
}

/// The requests in flight on the open image.
pub(super) struct Aio {
    queue: Queue,
    flights: BTreeMap<u64, Flight>,
    next: u64,
}

impl Aio {
    pub(super) fn new(image: &Arc<Image>, engine: Engine) -> Result<Self> {
        Ok(Aio { queue: Queue::new(Arc::clone(image), DEPTH, engine)?, flights: BTreeMap::new(), next: 0 })
    }

    fn start(&mut self, flight: Flight, operation: Operation, buffer: Buffer) -> Result<()> {
        let id = self.next;
        self.next += 1;
        let (offset, len) = (flight.offset, flight.len);
        self.flights.insert(id, flight);
        self.queue.push(Request { id, operation, offset, len, buffer })?;
        self.queue.submit()
    }

    /// Reports what is done by now, or (`wait`) everything; false if a verification failed.
    pub(super) fn settle(&mut self, wait: bool) -> Result<bool> {
        let mut done = Vec::new();
        if wait {
            self.queue.drain(&mut done)?;
        } else {
            self.queue.reap(&mut done)?;
        }
        // In the order in which they were asked for, so that scripts print the same every time.
        done.sort_by_key(|c| c.id);
        let mut good = true;
        for completion in done {
            good &= self.tell(completion);
        }
        Ok(good)
    }

    fn tell(&mut self, completion: Completion) -> bool {
        let Some(flight) = self.flights.remove(&completion.id) else { return true };
        let Flight { flags, write, offset, len, pattern, started } = flight;
        let took: Duration = started.elapsed();
        if let Err(e) = completion.result {
            println!("{}", failed(if write { "aio_write" } else { "aio_read" }, e));
            return false;
        }
        let mut good = true;
        if !write {
            if pattern.is_some_and(|p| completion.buffer.iter().any(|&b| b != p)) {
                println!("Pattern verification failed at offset {offset}, {len} bytes");
                good = false;
            }
            if flags.has('v') {
                dump(&completion.buffer, offset);
            }
        }
        report(if write { "wrote" } else { "read" }, offset, len, len, 1, took, &flags);
        good
    }
}

impl Session {
    fn aio(&mut self) -> Result<&mut Aio> {
        let image = self.shared_image()?;
        match &mut self.aio {
            Some(aio) => Ok(aio),
            empty => Ok(empty.insert(Aio::new(&image, self.engine)?)),
        }
    }

    /// `aio_read [-Cqv] [-P pattern] off len [len...]` and `aio_write [-Cfqzu] [-P pattern] off len [len...]`.
    pub(super) fn start_aio(&mut self, args: &[String], write: bool) -> Result<()> {
        let flags = Flags::parse(args, if write { "CfiP:qzu" } else { "CiP:qv" })?;
        let [offset, lens @ ..] = &flags.rest[..] else {
            return Err(Error::usage("offset and lengths are needed"));
        };
        if lens.is_empty() {
            return Err(Error::usage("offset and lengths are needed"));
        }
        if flags.has('i') {
            return Err(Error::unsupported("-i (an invalid request, for accounting) is not supported"));
        }
        if flags.has('z') && (lens.len() > 1 || flags.has('P')) {
            return Err(Error::usage("-z supports only a single length parameter, and no -P"));
        }
        if flags.has('u') && !flags.has('z') {
            return Err(Error::usage("-u requires -z to be specified"));
        }
        let offset = size(offset)?;
        let len = lens.iter().try_fold(0u64, |sum, l| Ok::<_, Error>(sum.saturating_add(size(l)?)))?;
        if len > MAX_REQUEST {
            return Err(Error::usage(format!("length cannot exceed {MAX_REQUEST}, given {len}")));
        }
        let pattern = flags.pattern('P')?;
        let (zero, durable, unmap) = (flags.has('z'), flags.has('f'), flags.has('u'));
        let aio = self.aio()?;
        let (operation, buffer) = match (write, zero) {
            (false, _) => {
                let mut buffer = aio.queue.buffer(len as usize);
                buffer.fill(0xab);
                (Operation::Read, buffer)
            }
            (true, false) => {
                let mut buffer = aio.queue.buffer(len as usize);
                buffer.fill(pattern.unwrap_or(0xcd));
                (Operation::Write { durable }, buffer)
            }
            (true, true) => (Operation::WriteZeroes { unmap }, Buffer::empty()),
        };
        aio.start(Flight { flags, write, offset, len, pattern, started: Instant::now() }, operation, buffer)
    }

    /// Reports requests that are done, or waits for all of them.
    pub(super) fn settle_aio(&mut self, wait: bool) -> Result<()> {
        if let Some(aio) = &mut self.aio {
            let good = aio.settle(wait)?;
            self.failed |= !good;
        }
        Ok(())
    }
}
