//! Scatter lists: frames on their way, in guest memory or in our own.
#![allow(unsafe_code)] // raw copies to and from memory that a guest shares, and its addresses for system calls

use memory::GuestSlice;
use std::marker::PhantomData;

/// Pieces of memory that stay valid for `'m`. The bytes may change under us: guests write their memory when they like.
#[derive(Debug)]
struct Pieces<'m> {
    list: Vec<libc::iovec>,
    len: usize,
    memory: PhantomData<&'m ()>,
}

// SAFETY: the pointers are to memory that outlives `'m`, and access is by raw copies only, which may race as DMA does.
unsafe impl Send for Pieces<'_> {}

impl Pieces<'_> {
    const fn new() -> Self {
        Self { list: Vec::new(), len: 0, memory: PhantomData }
    }

    fn clear(&mut self) {
        self.list.clear();
        self.len = 0;
    }

    fn push(&mut self, base: *mut u8, len: usize) {
        if len > 0 {
            self.list.push(libc::iovec { iov_base: base.cast(), iov_len: len });
            self.len += len;
        }
    }

    /// Calls `each` with the pieces of `offset..offset + len`, as far as there are any; returns how many bytes.
    fn walk(&self, mut offset: usize, len: usize, mut each: impl FnMut(*mut u8, usize, usize)) -> usize {
        let mut done = 0;
        for piece in &self.list {
            if done == len {
                break;
            }
            if offset >= piece.iov_len {
                offset -= piece.iov_len;
                continue;
            }
            let n = (piece.iov_len - offset).min(len - done);
            // SAFETY: offset is inside the piece.
            each(unsafe { piece.iov_base.cast::<u8>().add(offset) }, n, done);
            done += n;
            offset = 0;
        }
        done
    }
}

/// A frame to be read: a [`crate::VnetHeader`] and an Ethernet frame. Reusable.
#[derive(Debug)]
pub struct Frame<'m>(Pieces<'m>);

/// Room for a frame to be written, header and Ethernet frame. Reusable. Shared rather than exclusive: what is written
/// is memory that others write too.
#[derive(Debug)]
pub struct Room<'m>(Pieces<'m>);

impl<'m> Frame<'m> {
    /// An empty frame.
    pub const fn new() -> Self {
        Self(Pieces::new())
    }

    /// A frame in our own memory.
    pub fn of(bytes: &'m [u8]) -> Self {
        let mut frame = Self::new();
        frame.push_bytes(bytes);
        frame
    }

    /// Forgets all pieces.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Appends a piece of guest memory.
    pub fn push(&mut self, slice: GuestSlice<'m>) {
        self.0.push(slice.as_ptr(), slice.len() as usize);
    }

    /// Appends a piece of our own memory.
    pub fn push_bytes(&mut self, bytes: &'m [u8]) {
        self.0.push(bytes.as_ptr().cast_mut(), bytes.len());
    }

    /// Length in bytes.
    #[expect(clippy::len_without_is_empty)] // a frame without its header does not come this far
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Copies from `offset` on into `to`; returns how many bytes there were.
    pub fn copy_to(&self, offset: usize, to: &mut [u8]) -> usize {
        let base = to.as_mut_ptr();
        // SAFETY: `walk` stays inside the pieces and below `to.len()`; the memory is not `to`, which is borrowed.
        self.0.walk(offset, to.len(), |p, n, at| unsafe { p.copy_to_nonoverlapping(base.add(at), n) })
    }

    /// The whole frame, copied.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.copy_to(0, &mut bytes);
        bytes
    }

    /// Appends `len` bytes from `offset` on to the end of `to`.
    pub fn append_to(&self, offset: usize, len: usize, to: &mut Vec<u8>) {
        let len = len.min(self.len().saturating_sub(offset));
        let start = to.len();
        to.resize(start + len, 0);
        self.copy_to(offset, &mut to[start..]);
    }

    /// Appends the pieces of `len` bytes from `offset` on to `list`, for system calls that read them.
    pub(crate) fn pieces(&self, offset: usize, len: usize, list: &mut Vec<libc::iovec>) {
        self.0.walk(offset, len, |p, n, _| list.push(libc::iovec { iov_base: p.cast(), iov_len: n }));
    }

    /// All pieces, for system calls that read them.
    pub(crate) fn all(&self) -> &[libc::iovec] {
        &self.0.list
    }
}

impl Default for Frame<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'m> Room<'m> {
    /// No room yet.
    pub const fn new() -> Self {
        Self(Pieces::new())
    }

    /// Room in our own memory.
    pub fn of(bytes: &'m mut [u8]) -> Self {
        let mut room = Self::new();
        room.0.push(bytes.as_mut_ptr(), bytes.len());
        room
    }

    /// Forgets all pieces.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Appends a piece of guest memory. Whoever gave it calls [`GuestSlice::wrote`] for what was used of it.
    pub fn push(&mut self, slice: GuestSlice<'m>) {
        self.0.push(slice.as_ptr(), slice.len() as usize);
    }

    /// Length in bytes.
    #[expect(clippy::len_without_is_empty)] // as for frames
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Copies `from` in at `offset`; returns for how many bytes there was room.
    pub fn write(&self, offset: usize, from: &[u8]) -> usize {
        let base = from.as_ptr();
        // SAFETY: as in `Frame::copy_to`, the other way.
        self.0.walk(offset, from.len(), |p, n, at| unsafe { base.add(at).copy_to_nonoverlapping(p, n) })
    }

    /// Copies a frame in from the start; returns for how many bytes there was room.
    pub fn write_frame(&self, frame: &Frame<'_>) -> usize {
        let mut at = 0;
        for piece in &frame.0.list {
            // SAFETY: `walk` stays inside our pieces and below the other's length; two guest buffers that overlap are
            // the guest's own doing, and `copy_to` allows it.
            let n = self.0.walk(at, piece.iov_len, |p, n, done| unsafe {
                piece.iov_base.cast::<u8>().add(done).copy_to(p, n);
            });
            at += n;
            if n < piece.iov_len {
                break;
            }
        }
        at
    }

    /// What was written to the first bytes of the room, as far as `to` is long.
    pub fn copy_to(&self, offset: usize, to: &mut [u8]) -> usize {
        let base = to.as_mut_ptr();
        // SAFETY: as in `Frame::copy_to`.
        self.0.walk(offset, to.len(), |p, n, at| unsafe { p.copy_to_nonoverlapping(base.add(at), n) })
    }

    /// Appends the pieces of `len` bytes from `offset` on to `list`, for system calls that write them.
    pub(crate) fn pieces(&self, offset: usize, len: usize, list: &mut Vec<libc::iovec>) {
        self.0.walk(offset, len, |p, n, _| list.push(libc::iovec { iov_base: p.cast(), iov_len: n }));
    }

    /// All pieces, for system calls that write them.
    pub(crate) fn all(&self) -> &[libc::iovec] {
        &self.0.list
    }
}

impl Default for Room<'_> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_cross_pieces() {
        let (a, b) = (*b"hello ", *b"world");
        let mut frame = Frame::new();
        frame.push_bytes(&a);
        frame.push_bytes(&[]);
        frame.push_bytes(&b);
        let mut out = [0; 8];
        assert_eq!((frame.len(), frame.copy_to(4, &mut out), &out[..7]), (11, 7, &b"o world"[..]));
        assert_eq!(frame.copy_to(11, &mut out), 0);
        let mut list = Vec::new();
        frame.pieces(3, 5, &mut list);
        assert_eq!(list.iter().map(|v| v.iov_len).collect::<Vec<_>>(), [3, 2]);

        let (mut c, mut d) = ([0; 4], [0; 4]);
        let mut room = Room::of(&mut c);
        room.0.push(d.as_mut_ptr(), 4);
        assert_eq!(
            (room.write(2, b"abc"), room.write(6, b"xyz"), room.write_frame(&Frame::of(b"12"))),
            (3, 2, 2)
        );
        assert_eq!((&c, &d), (b"12ab", b"c\0xy"));
    }
}
