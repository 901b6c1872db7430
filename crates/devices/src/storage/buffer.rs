//! Where the data of a command is: guest memory, or a buffer of the controller's own.

use super::pieces::Pieces;
use memory::{GuestMemory, GuestSlice};

/// A scatter/gather list: pieces of guest RAM, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Sg {
    segments: Vec<(u64, u64)>,
    len: u64,
}

impl Sg {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Total length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets the pieces, keeps the room for them.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.len = 0;
    }

    /// Appends a piece.
    ///
    /// # Errors
    /// It is not RAM, all of it.
    pub fn push(&mut self, memory: &GuestMemory, addr: u64, len: u64) -> memory::Result<()> {
        let (mut at, mut left) = (addr, len);
        while left > 0 {
            let n = memory.chunk(at, left)?.len();
            left -= n;
            at = at.checked_add(n).ok_or(memory::Error::OutOfRange { addr, len })?;
        }
        if len == 0 {
            return Ok(());
        }
        match self.segments.last_mut() {
            Some((start, n)) if start.checked_add(*n) == Some(addr) => *n += len,
            _ => self.segments.push((addr, len)),
        }
        self.len = self.len.saturating_add(len);
        Ok(())
    }

    /// Hands out the bytes `at..at + len`, as far as there are any, as contiguous host memory.
    ///
    /// # Errors
    /// Memory that has gone since it was added.
    pub fn slices<'a>(
        &self,
        memory: &'a GuestMemory,
        mut at: u64,
        mut len: u64,
        mut each: impl FnMut(GuestSlice<'a>),
    ) -> memory::Result<()> {
        for (addr, n) in &self.segments {
            if len == 0 {
                break;
            }
            if at >= *n {
                at -= n;
                continue;
            }
            let mut start = addr + at;
            let mut part = (n - at).min(len);
            len -= part;
            at = 0;
            while part > 0 {
                let slice = memory.chunk(start, part)?;
                start += slice.len();
                part -= slice.len();
                each(slice);
            }
        }
        Ok(())
    }

    /// The pieces of `at..at + len` by guest address.
    fn ranges(&self, mut at: u64, mut len: u64) -> impl Iterator<Item = (u64, u64)> {
        self.segments.iter().filter_map(move |(addr, n)| {
            if at >= *n {
                at -= n;
                return None;
            }
            let part = (n - at).min(len);
            let start = addr + at;
            at = 0;
            len -= part;
            (part > 0).then_some((start, part))
        })
    }
}

/// The data of a command: what the device fills, or what it takes.
pub enum Buffer<'a> {
    /// Guest memory.
    Guest(&'a GuestMemory, &'a Sg),
    /// The controller's own.
    Host(&'a mut [u8]),
}

impl Buffer<'_> {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Buffer::Guest(_, sg) => sg.len(),
            Buffer::Host(bytes) => bytes.len() as u64,
        }
    }

    /// Whether there is no room at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies `bytes` to offset `at`, as far as there is room; returns how many bytes there was room for.
    ///
    /// # Errors
    /// Memory that has gone.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> memory::Result<u64> {
        let n = self.len().saturating_sub(at).min(bytes.len() as u64);
        match self {
            Buffer::Host(to) => to[at as usize..][..n as usize].copy_from_slice(&bytes[..n as usize]),
            Buffer::Guest(memory, sg) => {
                let mut done = 0;
                for (addr, len) in sg.ranges(at, n) {
                    memory.write(addr, &bytes[done..][..len as usize])?;
                    done += len as usize;
                }
            }
        }
        Ok(n)
    }

    /// Fills `bytes` from offset `at`, as far as there is data; returns how many bytes there were.
    ///
    /// # Errors
    /// Memory that has gone.
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> memory::Result<u64> {
        let n = self.len().saturating_sub(at).min(bytes.len() as u64);
        match self {
            Buffer::Host(from) => bytes[..n as usize].copy_from_slice(&from[at as usize..][..n as usize]),
            Buffer::Guest(memory, sg) => {
                let mut done = 0;
                for (addr, len) in sg.ranges(at, n) {
                    memory.read(addr, &mut bytes[done..][..len as usize])?;
                    done += len as usize;
                }
            }
        }
        Ok(n)
    }

    /// All of it, at most `limit` bytes.
    ///
    /// # Errors
    /// Memory that has gone.
    pub fn to_vec(&self, limit: u64) -> memory::Result<Vec<u8>> {
        let mut bytes = vec![0; self.len().min(limit) as usize];
        self.read(0, &mut bytes)?;
        Ok(bytes)
    }

    /// The bytes `at..at + len` as system calls take them; `None` for the controller's own memory.
    ///
    /// # Errors
    /// Memory that has gone.
    pub(super) fn pieces(&self, at: u64, len: u64) -> memory::Result<Option<Pieces>> {
        let Buffer::Guest(memory, sg) = self else { return Ok(None) };
        let mut pieces = Pieces::default();
        sg.slices(memory, at, len, |s| pieces.push(s))?;
        Ok(Some(pieces))
    }

    /// Notes that the host has filled `at..at + len` through [`Self::pieces`].
    ///
    /// # Errors
    /// Memory that has gone.
    pub(super) fn wrote(&self, at: u64, len: u64) -> memory::Result<()> {
        let Buffer::Guest(memory, sg) = self else { return Ok(()) };
        sg.slices(memory, at, len, |s| s.wrote())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bus::virtio::testing::ram;

    #[test]
    fn lists_are_read_and_written_at_any_offset() {
        let memory = ram();
        let mut sg = Sg::new();
        sg.push(&memory, 0x1000, 10).unwrap();
        sg.push(&memory, 0x100a, 6).unwrap();
        sg.push(&memory, 0x3000, 16).unwrap();
        assert_eq!((sg.segments.len(), sg.len()), (2, 32));
        for bad in [(u64::MAX - 3, 8), (0x20_0000 - 4, 8), (1 << 40, 1)] {
            assert!(sg.push(&memory, bad.0, bad.1).is_err());
        }
        let mut buffer = Buffer::Guest(&memory, &sg);
        assert_eq!(buffer.write(8, &[7; 100]).unwrap(), 24);
        assert_eq!(buffer.write(40, &[7; 100]).unwrap(), 0);
        let mut back = [0; 20];
        assert_eq!(buffer.read(4, &mut back).unwrap(), 20);
        assert_eq!(back[..4], [0; 4]);
        assert_eq!(back[4..], [7; 16]);
        assert_eq!(memory.read_obj::<u8>(0x300f).unwrap(), 7);
        assert_eq!(memory.read_obj::<u8>(0x3010).unwrap(), 0);
    }
}
