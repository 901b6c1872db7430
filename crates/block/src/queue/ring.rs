//! The engine on io_uring: requests of one thread, submitted in batches on a registered file with registered buffers.

#![allow(unsafe_code)] // the kernel reads and writes memory behind the compiler's back

use super::{
    Completion, Operation, Request,
    buffer::{Buffer, Region},
};
use crate::{Error, Result};
use io_uring::{IoUring, opcode, types};
use std::{
    collections::HashMap,
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
};

/// Slots of registered memory, and their size: most of a guest's requests fit.
const SLOTS: u16 = 64;
const SLOT_BYTES: usize = 64 << 10;

/// A request that the kernel works on.
struct Flight {
    request: Request,
    /// Where in the file it goes.
    host: u64,
}

pub(super) struct Ring {
    uring: IoUring,
    region: Option<Arc<Region>>,
    /// What the kernel works on, by number; buffers stay here, at their place, until it is done.
    flights: HashMap<u64, Flight>,
    next: u64,
    registered: bool,
    pending: usize,
}

fn failed(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |e| Error::io(format!("io_uring: {what}"), e)
}

impl Ring {
    /// A ring for up to `depth` requests at a time on a file; `signal` is counted up for every completion.
    pub(super) fn new(depth: u32, file: BorrowedFd<'_>, signal: BorrowedFd<'_>) -> Result<Self> {
        let uring = IoUring::builder()
            .setup_clamp()
            .setup_cqsize(depth.max(2) * 2)
            .build(depth.clamp(1, 4096))
            .map_err(failed("cannot be set up"))?;
        let submitter = uring.submitter();
        submitter.register_eventfd(signal.as_raw_fd()).map_err(failed("no eventfd"))?;
        let registered = submitter.register_files(&[file.as_raw_fd()]).is_ok();
        let region = Region::new(SLOTS, SLOT_BYTES);
        // Memory that may be locked is limited; without registration everything works, a little slower.
        // SAFETY: the region outlives the ring: `Ring` holds it, and its memory does not move.
        let region = unsafe { submitter.register_buffers(&region.slots()) }.is_ok().then_some(region);
        Ok(Ring { uring, region, flights: HashMap::new(), next: 0, registered, pending: 0 })
    }

    pub(super) fn region(&self) -> Option<&Arc<Region>> {
        self.region.as_ref()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Queues a read or write of `file` at `host`; the kernel sees it with the next [`Ring::submit`].
    pub(super) fn push(&mut self, file: BorrowedFd<'_>, host: u64, request: Request) -> Result<()> {
        let number = self.next;
        self.next += 1;
        let flight = self.flights.entry(number).or_insert(Flight { request, host });
        let buffer = &mut flight.request.buffer;
        let (at, len, slot) = (buffer.as_mut_ptr(), buffer.len() as u32, buffer.slot());
        let dsync = match flight.request.operation {
            Operation::Write { durable: true } => libc::RWF_DSYNC,
            _ => 0,
        };
        let write = matches!(flight.request.operation, Operation::Write { .. });
        let region = self.region.is_some();
        macro_rules! entry {
            ($fd:expr) => {
                match (write, slot.filter(|_| region)) {
                    (false, Some(slot)) => opcode::ReadFixed::new($fd, at, len, slot).offset(host).build(),
                    (false, None) => opcode::Read::new($fd, at, len).offset(host).build(),
                    (true, Some(slot)) => {
                        opcode::WriteFixed::new($fd, at, len, slot).offset(host).rw_flags(dsync).build()
                    }
                    (true, None) => opcode::Write::new($fd, at, len).offset(host).rw_flags(dsync).build(),
                }
            };
        }
        let entry =
            if self.registered { entry!(types::Fixed(0)) } else { entry!(types::Fd(file.as_raw_fd())) };
        let entry = entry.user_data(number);
        loop {
            // SAFETY: the entry's buffer is in `flights`, where it stays until the kernel has completed it: buffers are
            // heap memory or slots of the region, neither of which moves with the map's entries. The file stays open: it
            // belongs to the image, which the queue holds.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                self.pending += 1;
                return Ok(());
            }
            self.submit()?;
        }
    }

    /// Hands what is queued to the kernel, in one system call.
    pub(super) fn submit(&mut self) -> Result<()> {
        while self.pending > 0 {
            match self.uring.submit() {
                Ok(n) => self.pending -= n.min(self.pending),
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                    std::thread::yield_now();
                }
                Err(e) => return Err(failed("cannot submit")(e)),
            }
        }
        Ok(())
    }

    /// Takes what is done. `rest` finishes a request that the kernel did only the first bytes of.
    pub(super) fn reap(
        &mut self,
        out: &mut Vec<Completion>,
        mut rest: impl FnMut(&mut Request, u64, usize) -> Result<()>,
    ) {
        let done: Vec<(u64, i32)> = self.uring.completion().map(|c| (c.user_data(), c.result())).collect();
        for (number, result) in done {
            let Some(Flight { mut request, host }) = self.flights.remove(&number) else { continue };
            let len = request.buffer.len();
            let result = match usize::try_from(result) {
                Ok(n) if n == len => Ok(()),
                Ok(n) => rest(&mut request, host, n),
                Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => rest(&mut request, host, 0),
                Err(_) => {
                    let what = if request.operation == Operation::Read { "read" } else { "write" };
                    let source = std::io::Error::from_raw_os_error(-result);
                    Err(Error::io(format!("Could not {what} at {}", request.offset), source))
                }
            };
            out.push(Completion { id: request.id, result, buffer: request.buffer });
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel must be done with the buffers before they go.
        while !self.flights.is_empty() {
            if self.submit().is_err() || self.uring.submit_and_wait(1).is_err() {
                // Nothing can be learnt about what is in flight: leak its memory rather than free it under the kernel.
                for (_, flight) in self.flights.drain() {
                    std::mem::forget(flight.request.buffer);
                }
                std::mem::forget(self.region.take());
                return;
            }
            let done: Vec<u64> = self.uring.completion().map(|c| c.user_data()).collect();
            for number in done {
                self.flights.remove(&number);
            }
        }
    }
}

/// A buffer of the ring's region while it has room, else any.
pub(super) fn buffer(ring: Option<&Ring>, len: usize) -> Buffer {
    Buffer::new(ring.and_then(Ring::region), len)
}
