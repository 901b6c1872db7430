//! Bytes on their way to the guest: kept until it has acknowledged them.

use std::os::fd::BorrowedFd;
use std::{io, mem};

/// What a ring starts with, and the most it grows to.
const FIRST: usize = 32 << 10;
const MOST: usize = 1 << 20;

/// A ring of bytes. Takes no memory while empty.
#[derive(Debug, Default)]
pub(super) struct Ring {
    bytes: Vec<u8>,
    head: usize,
    len: usize,
}

impl Ring {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn capacity(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn free(&self) -> usize {
        self.bytes.len() - self.len
    }

    /// Gives the memory back.
    pub(super) fn release(&mut self) {
        if self.len == 0 {
            *self = Self::default();
        }
    }

    /// Doubles the capacity; `false` if it is at its largest.
    pub(super) fn grow(&mut self) -> bool {
        let capacity = if self.bytes.is_empty() { FIRST } else { self.bytes.len() * 2 };
        if capacity > MOST {
            return false;
        }
        let mut bytes = vec![0; capacity];
        let (a, b) = self.slices(0, self.len);
        bytes[..a.len()].copy_from_slice(a);
        bytes[a.len()..a.len() + b.len()].copy_from_slice(b);
        self.bytes = bytes;
        self.head = 0;
        true
    }

    /// The bytes `at..at + len`, in two pieces.
    pub(super) fn slices(&self, at: usize, len: usize) -> (&[u8], &[u8]) {
        debug_assert!(at + len <= self.len);
        if len == 0 {
            return (&[], &[]);
        }
        let start = (self.head + at) & (self.bytes.len() - 1);
        let first = len.min(self.bytes.len() - start);
        (&self.bytes[start..start + first], &self.bytes[..len - first])
    }

    /// Drops the first `n` bytes.
    pub(super) fn consume(&mut self, n: usize) {
        let n = n.min(self.len);
        self.len -= n;
        self.head = if self.len == 0 { 0 } else { (self.head + n) & (self.bytes.len() - 1) };
    }

    /// Receives from a socket into what is free, `most` bytes at most.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>, most: usize) -> io::Result<usize> {
        let capacity = self.bytes.len();
        let free = self.free().min(most);
        let start = (self.head + self.len) & capacity.wrapping_sub(1);
        let first = free.min(capacity - start);
        let (rest, tail) = self.bytes.split_at_mut(start);
        let n = crate::sys::receive(socket, &mut tail[..first], &mut rest[..free - first])?;
        self.len += n;
        Ok(n)
    }

    /// Memory taken.
    pub(super) fn memory(&self) -> usize {
        self.bytes.len() + mem::size_of::<Self>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn wraps_and_grows() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut ring = Ring::default();
        let mut sent = 0u32;
        let mut expected = 0u32;
        assert!(ring.grow());
        for round in 0..40 {
            let words: Vec<u8> = (sent..sent + 5000).flat_map(u32::to_le_bytes).collect();
            a.write_all(&words).unwrap();
            sent += 5000;
            while ring.free() < 20000 {
                assert!(ring.grow());
            }
            let mut got = 0;
            while got < 20000 {
                got += ring.receive(b.as_fd(), usize::MAX).unwrap();
            }
            let take = if round % 3 == 0 { ring.len() / 8 } else { ring.len() / 4 };
            let (x, y) = ring.slices(0, take * 4);
            let bytes = [x, y].concat();
            for word in bytes.chunks(4) {
                assert_eq!(u32::from_le_bytes(word.try_into().unwrap()), expected);
                expected += 1;
            }
            ring.consume(take * 4);
        }
        assert!(expected > 100_000);
    }
}
