//! System calls on scatter lists, and socket options that have no safe wrapper.
#![allow(unsafe_code)] // sendmsg, recvmsg, readv, writev and setsockopt on guest memory, wrapped here

use crate::{Frame, Room};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Most pieces that one call takes (UIO_MAXIOV).
const MOST: usize = 1024;

fn result(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Calls again when a signal came first.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match result(call()) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn message(list: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeros is a valid value of this plain structure.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.as_ptr().cast_mut();
    message.msg_iovlen = list.len().min(MOST) as _;
    message
}

/// Reusable list of pieces for a call.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Vec<libc::iovec>);

// SAFETY: the list is refilled before each call, so the pointers that lie in it between calls are never used.
unsafe impl Send for Scratch {}

impl Scratch {
    /// Sends `len` bytes of a frame from `offset` on through a socket. `segment`: as datagrams of that size.
    pub(crate) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        frame: &Frame<'_>,
        offset: usize,
        len: usize,
        segment: Option<u16>,
    ) -> io::Result<usize> {
        self.0.clear();
        frame.pieces(offset, len, &mut self.0);
        let mut message = message(&self.0);
        let mut control = [0u64; 4];
        if let Some(size) = segment {
            message.msg_control = control.as_mut_ptr().cast();
            // SAFETY: these compute lengths only.
            message.msg_controllen = unsafe { libc::CMSG_SPACE(2) } as _;
            // SAFETY: the buffer is aligned and has room for one header and two bytes.
            unsafe {
                let header = libc::CMSG_FIRSTHDR(&message);
                (*header).cmsg_level = libc::SOL_UDP;
                (*header).cmsg_type = libc::UDP_SEGMENT;
                (*header).cmsg_len = libc::CMSG_LEN(2) as _;
                libc::CMSG_DATA(header).cast::<u16>().write_unaligned(size);
            }
        }
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the message and what it points to are valid for the call.
        retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) })
    }
}

impl Scratch {
    /// Writes a frame from `offset` on to a device or socket that takes it as one message.
    pub(crate) fn write(
        &mut self,
        fd: BorrowedFd<'_>,
        frame: &Frame<'_>,
        offset: usize,
    ) -> io::Result<usize> {
        self.0.clear();
        frame.pieces(offset, frame.len(), &mut self.0);
        let list = &self.0;
        // SAFETY: the pieces are valid memory (see `Frame`), and the kernel checks its arguments.
        retry(|| unsafe { libc::writev(fd.as_raw_fd(), list.as_ptr(), list.len().min(MOST) as i32) })
    }

    /// Reads one message into the room from `offset` on.
    pub(crate) fn read(&mut self, fd: BorrowedFd<'_>, room: &Room<'_>, offset: usize) -> io::Result<usize> {
        self.0.clear();
        room.pieces(offset, room.len(), &mut self.0);
        let list = &self.0;
        // SAFETY: as above.
        retry(|| unsafe { libc::readv(fd.as_raw_fd(), list.as_ptr(), list.len().min(MOST) as i32) })
    }
}

/// Receives into two pieces.
pub(crate) fn receive(socket: BorrowedFd<'_>, a: &mut [u8], b: &mut [u8]) -> io::Result<usize> {
    let list = [
        libc::iovec { iov_base: a.as_mut_ptr().cast(), iov_len: a.len() },
        libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: b.len() },
    ];
    let mut message = message(&list);
    // SAFETY: the message and what it points to are valid for the call.
    retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) })
}

/// Writes a whole frame to a device or socket that takes it as one message.
pub(crate) fn write_frame(fd: BorrowedFd<'_>, frame: &Frame<'_>) -> io::Result<usize> {
    let list = frame.all();
    // SAFETY: the pieces are valid memory (see `Frame`), and the kernel checks its arguments.
    retry(|| unsafe { libc::writev(fd.as_raw_fd(), list.as_ptr(), list.len().min(MOST) as i32) })
}

/// Reads one message into the room.
pub(crate) fn read_frame(fd: BorrowedFd<'_>, room: &Room<'_>) -> io::Result<usize> {
    let list = room.all();
    // SAFETY: as above.
    retry(|| unsafe { libc::readv(fd.as_raw_fd(), list.as_ptr(), list.len().min(MOST) as i32) })
}

/// The pending error of a socket.
pub(crate) fn socket_error(socket: BorrowedFd<'_>) -> io::Result<()> {
    match rustix::net::sockopt::socket_error(socket)? {
        Ok(()) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Makes closing the socket reset its connection.
pub(crate) fn reset_on_close(socket: BorrowedFd<'_>) {
    // A socket that cannot be told so is closed in the ordinary way.
    let _ = rustix::net::sockopt::set_socket_linger(socket, Some(std::time::Duration::ZERO));
}

/// A non-blocking socket of the address's family.
pub(crate) fn socket(
    ip: IpAddr,
    kind: SocketType,
    protocol: Option<rustix::net::Protocol>,
) -> io::Result<OwnedFd> {
    let family = if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    Ok(rustix::net::socket_with(family, kind, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, protocol)?)
}

/// Starts to connect; `true` if that is done already.
pub(crate) fn connect(socket: impl AsFd, to: SocketAddr) -> io::Result<bool> {
    match rustix::net::connect(socket, &to) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::INPROGRESS) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// A socket bound to an address, for servers; `kind` stream sockets listen.
pub(crate) fn bind(to: SocketAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let fd = socket(to.ip(), kind, None)?;
    if kind == SocketType::STREAM {
        rustix::net::sockopt::set_socket_reuseaddr(&fd, true)?;
    }
    if to.is_ipv6() {
        rustix::net::sockopt::set_ipv6_v6only(&fd, true)?;
    }
    rustix::net::bind(&fd, &to)?;
    if kind == SocketType::STREAM {
        rustix::net::listen(&fd, 128)?;
    }
    Ok(fd)
}
