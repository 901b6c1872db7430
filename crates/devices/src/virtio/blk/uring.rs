//! io_uring as the worker uses it: waiting for notifications, reading and writing.
#![allow(unsafe_code)] // entries carry pointers to guest memory

use crate::storage::pieces::{MOST, Pieces};
use base::EventFd;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Requests that can be under way at once.
pub(super) const DEPTH: u32 = 128;

/// What a completion is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The queues' eventfd was signalled.
    Kick,
    /// A request finished with this many bytes, or a negative errno.
    Done {
        /// Its slot.
        slot: usize,
        /// Result.
        result: i32,
    },
}

const KICK: u64 = u64::MAX;

/// A ring of the worker's own.
pub(super) struct Uring {
    ring: IoUring,
    kick: i32,
}

impl Uring {
    /// A ring that watches `kick` and, if given, does I/O on `file`.
    ///
    /// # Errors
    /// A kernel without io_uring, or where it is not permitted.
    pub(super) fn new(kick: &EventFd, file: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        // One thread submits and reaps, and completions are run when it looks: no interruptions, no locks. Kernels
        // before 6.1 do not know these flags.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(DEPTH)
            .or_else(|_| IoUring::builder().build(DEPTH))?;
        if let Some(file) = file {
            ring.submitter().register_files(&[file.as_raw_fd()])?;
        }
        let mut uring = Self { ring, kick: kick.as_raw_fd() };
        uring.watch()?;
        Ok(uring)
    }

    /// Posts an event for each signal from now on. The counter itself is never read: the poll sees each addition.
    fn watch(&mut self) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fd(self.kick), libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(KICK);
        self.push(entry)
    }

    fn push(&mut self, entry: squeue::Entry) -> io::Result<()> {
        // SAFETY: reads and writes go to guest memory, which the worker's GuestMemory keeps mapped until it has
        // reaped all completions; their iovecs are on the heap of the request's `Pieces`, untouched until then.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.ring.submit()?;
        }
        Ok(())
    }

    /// Queues a read or write for submission. The request must stay as it is until its event.
    pub(super) fn transfer(
        &mut self,
        slot: usize,
        pieces: &Pieces,
        offset: u64,
        write: Option<bool>,
    ) -> io::Result<()> {
        let file = types::Fixed(0);
        let iov = pieces.as_slice();
        let flags = if write == Some(true) { libc::RWF_DSYNC } else { 0 };
        let entry = match (iov, write) {
            ([one], None) => {
                opcode::Read::new(file, one.iov_base.cast(), one.iov_len.min(i32::MAX as usize) as u32)
                    .offset(offset)
                    .build()
            }
            ([one], Some(_)) => {
                opcode::Write::new(file, one.iov_base.cast(), one.iov_len.min(i32::MAX as usize) as u32)
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
            (_, None) => {
                opcode::Readv::new(file, iov.as_ptr(), iov.len().min(MOST) as u32).offset(offset).build()
            }
            (_, Some(_)) => opcode::Writev::new(file, iov.as_ptr(), iov.len().min(MOST) as u32)
                .offset(offset)
                .rw_flags(flags)
                .build(),
        };
        self.push(entry.user_data(slot as u64))
    }

    /// Submits what is queued, and sleeps until there is at least one event.
    pub(super) fn submit_and_wait(&mut self) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            // Interrupted, or (EBUSY, EAGAIN) told to reap first.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Takes the events that are there.
    pub(super) fn events(&mut self, into: &mut Vec<Event>) -> io::Result<()> {
        let mut rewatch = false;
        for completion in self.ring.completion() {
            if completion.user_data() == KICK {
                if completion.result() < 0 {
                    return Err(io::Error::from_raw_os_error(-completion.result()));
                }
                rewatch |= !cqueue::more(completion.flags());
                into.push(Event::Kick);
            } else {
                into.push(Event::Done { slot: completion.user_data() as usize, result: completion.result() });
            }
        }
        if rewatch {
            self.watch()?;
        }
        Ok(())
    }
}
