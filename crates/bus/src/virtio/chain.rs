//! Descriptor chains: what the driver gave for one request, and cursors over it.

use super::QueueError;
use memory::{GuestMemory, GuestSlice};

/// A piece of guest memory in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes; not zero.
    pub len: u32,
}

/// A request's buffers: first those the device reads, then those it writes. All lie in guest RAM.
///
/// Reusable: [`super::Queue::pop`] fills it without allocating once it has grown.
#[derive(Debug, Default)]
pub struct Chain {
    /// What the ring needs to give the buffer back: the head's index, or the packed ring's buffer ID.
    pub(super) id: u16,
    /// Ring slots it took (packed rings).
    pub(super) slots: u16,
    segments: Vec<Segment>,
    readable: usize,
    total: u64,
}

impl Chain {
    /// An empty chain.
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn clear(&mut self) {
        self.segments.clear();
        self.readable = 0;
        self.slots = 0;
        self.total = 0;
    }

    /// Appends a descriptor's buffer, checking that it lies in RAM and in the right order.
    pub(super) fn append(
        &mut self,
        mem: &GuestMemory,
        addr: u64,
        len: u32,
        writable: bool,
    ) -> Result<(), QueueError> {
        let readable_so_far = self.readable == self.segments.len();
        if !writable && !readable_so_far {
            return Err(QueueError::Order);
        }
        self.total += u64::from(len);
        if self.total > u64::from(u32::MAX) {
            return Err(QueueError::TooLong);
        }
        if len == 0 {
            return Ok(());
        }
        let mut at = addr;
        let mut left = u64::from(len);
        while left > 0 {
            let piece = mem.chunk(at, left)?.len();
            left -= piece;
            at = at.checked_add(piece).ok_or(QueueError::TooLong)?;
        }
        self.segments.push(Segment { addr, len });
        self.readable += usize::from(!writable);
        Ok(())
    }

    /// Buffers that the device reads.
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// Buffers that the device writes.
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }

    /// Bytes that the device reads (below 4 GiB).
    pub fn readable_len(&self) -> u64 {
        self.readable().iter().map(|s| u64::from(s.len)).sum()
    }

    /// Bytes that the device writes (below 4 GiB).
    pub fn writable_len(&self) -> u64 {
        self.writable().iter().map(|s| u64::from(s.len)).sum()
    }

    /// A cursor over what the device reads.
    pub fn reader<'a>(&'a self, mem: &'a GuestMemory) -> Reader<'a> {
        Reader(Cursor { mem, segments: self.readable(), offset: 0 })
    }

    /// A cursor over what the device writes.
    pub fn writer<'a>(&'a self, mem: &'a GuestMemory) -> Writer<'a> {
        Writer { cursor: Cursor { mem, segments: self.writable(), offset: 0 }, written: 0 }
    }
}

#[derive(Clone)]
struct Cursor<'a> {
    mem: &'a GuestMemory,
    segments: &'a [Segment],
    offset: u32,
}

impl<'a> Cursor<'a> {
    fn remaining(&self) -> u64 {
        self.segments.iter().map(|s| u64::from(s.len)).sum::<u64>() - u64::from(self.offset)
    }

    /// The next contiguous piece of at most `max` bytes, and moves past it.
    fn next(&mut self, max: u64) -> Result<Option<GuestSlice<'a>>, QueueError> {
        let Some(segment) = self.segments.first() else { return Ok(None) };
        if max == 0 {
            return Ok(None);
        }
        let left = segment.len - self.offset;
        // No overflow: the segment was checked to lie in RAM when it was appended.
        let slice = self.mem.chunk(segment.addr + u64::from(self.offset), max.min(left.into()))?;
        self.offset += slice.len() as u32; // at most `left`
        if self.offset == segment.len {
            self.segments = &self.segments[1..];
            self.offset = 0;
        }
        Ok(Some(slice))
    }

    /// Takes the next `len` bytes off as a cursor of their own; `None` (and nothing taken) if there are fewer.
    fn slices(&mut self, len: u64, mut each: impl FnMut(GuestSlice<'a>)) -> Result<u64, QueueError> {
        let mut left = len;
        while let Some(slice) = self.next(left)? {
            left -= slice.len();
            each(slice);
        }
        Ok(len - left)
    }
}

/// A cursor over the buffers that a device reads.
#[derive(Clone)]
pub struct Reader<'a>(Cursor<'a>);

impl<'a> Reader<'a> {
    /// Bytes left.
    pub fn remaining(&self) -> u64 {
        self.0.remaining()
    }

    /// Copies up to `buf.len()` bytes out; returns how many there were.
    ///
    /// # Errors
    /// Memory that has gone since the chain was taken.
    pub fn read(&mut self, buf: &mut [u8]) -> Result<usize, QueueError> {
        let mut done = 0;
        let mem = self.0.mem;
        while done < buf.len() {
            let Some((addr, len)) = peek(&self.0, (buf.len() - done) as u64) else { break };
            mem.read(addr, &mut buf[done..done + len])?;
            done += len;
            self.0.next(len as u64)?;
        }
        Ok(done)
    }

    /// Copies exactly `N` bytes out.
    ///
    /// # Errors
    /// [`QueueError::TooShort`] if there are fewer.
    pub fn read_array<const N: usize>(&mut self) -> Result<[u8; N], QueueError> {
        let mut buf = [0; N];
        if self.read(&mut buf)? == N { Ok(buf) } else { Err(QueueError::TooShort) }
    }

    /// Hands out the next `len` bytes as contiguous slices; returns how many bytes there were.
    ///
    /// # Errors
    /// Memory that has gone since the chain was taken.
    pub fn slices(&mut self, len: u64, each: impl FnMut(GuestSlice<'a>)) -> Result<u64, QueueError> {
        self.0.slices(len, each)
    }

    /// Skips up to `len` bytes; returns how many there were.
    ///
    /// # Errors
    /// Memory that has gone since the chain was taken.
    pub fn skip(&mut self, len: u64) -> Result<u64, QueueError> {
        self.0.slices(len, |_| ())
    }
}

/// Where the next copy of at most `max` bytes within one segment goes.
fn peek(cursor: &Cursor<'_>, max: u64) -> Option<(u64, usize)> {
    let segment = cursor.segments.first()?;
    let len = u64::from(segment.len - cursor.offset).min(max);
    let addr = segment.addr + u64::from(cursor.offset);
    // Only up to the end of the region that `next` will step over.
    let len = cursor.mem.chunk(addr, len).ok()?.len();
    Some((addr, len as usize))
}

/// A cursor over the buffers that a device writes.
#[derive(Clone)]
pub struct Writer<'a> {
    cursor: Cursor<'a>,
    written: u32,
}

impl<'a> Writer<'a> {
    /// Room left.
    pub fn remaining(&self) -> u64 {
        self.cursor.remaining()
    }

    /// Bytes written (or handed out) so far, for [`super::Queue::push`].
    pub fn written(&self) -> u32 {
        self.written
    }

    /// Copies up to `buf.len()` bytes in; returns for how many there was room.
    ///
    /// # Errors
    /// Memory that has gone since the chain was taken.
    pub fn write(&mut self, buf: &[u8]) -> Result<usize, QueueError> {
        let mut done = 0;
        let mem = self.cursor.mem;
        while done < buf.len() {
            let Some((addr, len)) = peek(&self.cursor, (buf.len() - done) as u64) else { break };
            mem.write(addr, &buf[done..done + len])?;
            done += len;
            self.cursor.next(len as u64)?;
        }
        self.written += done as u32; // a chain is below 4 GiB
        Ok(done)
    }

    /// Hands out the next `len` bytes as contiguous slices, to be written by the host; whoever does so calls
    /// [`GuestSlice::wrote`]. Returns how many bytes there were.
    ///
    /// # Errors
    /// Memory that has gone since the chain was taken.
    pub fn slices(&mut self, len: u64, each: impl FnMut(GuestSlice<'a>)) -> Result<u64, QueueError> {
        let n = self.cursor.slices(len, each)?;
        self.written += n as u32; // a chain is below 4 GiB
        Ok(n)
    }

    /// Takes the last `len` bytes off into a writer of their own (a request's trailing status).
    /// `None` if there are fewer left.
    pub fn split_tail(&mut self, len: u64) -> Option<Writer<'a>> {
        let keep = self.remaining().checked_sub(len)?;
        let mut tail = self.clone();
        tail.cursor.slices(keep, |_| ()).ok()?;
        tail.written = 0;
        Some(tail)
    }
}
