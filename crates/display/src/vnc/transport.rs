//! What a viewer's bytes travel over.

use super::websocket::WebSocket;
use rustls::ServerConnection;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Longest time that a viewer may leave what is sent to it unread.
const SEND_TIMEOUT: Duration = Duration::from_secs(20);

/// A connected socket.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    pub(super) fn prepare(&self) -> io::Result<()> {
        match self {
            Self::Tcp(s) => {
                s.set_nonblocking(false)?;
                s.set_nodelay(true)?;
                s.set_write_timeout(Some(SEND_TIMEOUT))
            }
            Self::Unix(s) => {
                s.set_nonblocking(false)?;
                s.set_write_timeout(Some(SEND_TIMEOUT))
            }
        }
    }

    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.set_read_timeout(timeout),
            Self::Unix(s) => s.set_read_timeout(timeout),
        }
    }

    fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => (&*s).read(buf),
            Self::Unix(s) => (&*s).read(buf),
        }
    }

    fn send(&self, buf: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(s) => (&*s).write_all(buf),
            Self::Unix(s) => (&*s).write_all(buf),
        }
    }

    /// Ends the connection from any thread.
    pub(super) fn close(&self) {
        // It may be closed already.
        let _ = match self {
            Self::Tcp(s) => s.shutdown(Shutdown::Both),
            Self::Unix(s) => s.shutdown(Shutdown::Both),
        };
    }

    /// The other end, for logs.
    pub(super) fn peer(&self) -> String {
        match self {
            Self::Tcp(s) => s.peer_addr().map_or_else(|_| "?".into(), |a| a.to_string()),
            Self::Unix(_) => "unix".into(),
        }
    }
}

struct Tls {
    connection: Mutex<ServerConnection>,
    /// Held while something is encrypted and sent, so that records leave in order.
    sending: Mutex<()>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

/// A byte stream to a viewer; one thread receives while another sends.
pub(super) struct Link {
    socket: Arc<Socket>,
    tls: Option<Tls>,
    websocket: Option<WebSocket>,
    /// Everything until the viewer is let in must have happened by then.
    deadline: Mutex<Option<Instant>>,
}

impl Link {
    pub(super) fn new(socket: Arc<Socket>, deadline: Instant) -> Self {
        Self { socket, tls: None, websocket: None, deadline: Mutex::new(Some(deadline)) }
    }

    /// The viewer has been let in.
    pub(super) fn no_deadline(&self) -> io::Result<()> {
        *lock(&self.deadline) = None;
        self.socket.set_read_timeout(None)
    }

    pub(super) fn has_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// From here on TLS is spoken.
    pub(super) fn start_tls(&mut self, connection: ServerConnection) -> io::Result<()> {
        if self.websocket.is_some() {
            return Err(io::Error::other("TLS inside a WebSocket"));
        }
        self.tls = Some(Tls { connection: Mutex::new(connection), sending: Mutex::default() });
        let Some(tls) = &self.tls else { return Ok(()) };
        while lock(&tls.connection).is_handshaking() {
            self.flush_tls(tls)?;
            if lock(&tls.connection).wants_read() && lock(&tls.connection).is_handshaking() {
                self.receive_tls(tls)?;
            }
        }
        self.flush_tls(tls)
    }

    /// From here on everything is in WebSocket messages.
    pub(super) fn start_websocket(&mut self) {
        self.websocket = Some(WebSocket::default());
    }

    fn recv_socket(&self, buf: &mut [u8]) -> io::Result<usize> {
        if let Some(deadline) = *lock(&self.deadline) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.socket.set_read_timeout(Some(left))?;
        }
        self.socket.recv(buf)
    }

    fn receive_tls(&self, tls: &Tls) -> io::Result<()> {
        let mut raw = [0; 16 << 10];
        let n = self.recv_socket(&mut raw)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut rest = &raw[..n];
        while !rest.is_empty() {
            let mut connection = lock(&tls.connection);
            connection.read_tls(&mut rest)?;
            if let Err(e) = connection.process_new_packets() {
                drop(connection);
                let _ = self.flush_tls(tls); // the alert, if it can still be sent
                return Err(io::Error::new(io::ErrorKind::InvalidData, e));
            }
            if !rest.is_empty() && !connection.wants_read() {
                // The plain text must be read before more fits; it is bounded by what was just received.
                drop(connection);
                return Err(io::Error::new(io::ErrorKind::InvalidData, "more TLS data than asked for"));
            }
        }
        Ok(())
    }

    fn flush_tls(&self, tls: &Tls) -> io::Result<()> {
        let _sending = lock(&tls.sending);
        self.flush_tls_locked(tls)
    }

    fn flush_tls_locked(&self, tls: &Tls) -> io::Result<()> {
        let mut out = Vec::new();
        {
            let mut connection = lock(&tls.connection);
            while connection.wants_write() {
                connection.write_tls(&mut out)?;
            }
        }
        if out.is_empty() { Ok(()) } else { self.socket.send(&out) }
    }

    /// Bytes below a WebSocket.
    pub(super) fn recv_plain(&self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &self.tls else { return self.recv_socket(buf) };
        loop {
            let read = lock(&tls.connection).reader().read(buf);
            match read {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.receive_tls(tls)?;
                    if lock(&tls.connection).wants_write() {
                        self.flush_tls(tls)?;
                    }
                }
                other => return other,
            }
        }
    }

    /// Bytes below a WebSocket.
    pub(super) fn send_plain(&self, data: &[u8]) -> io::Result<()> {
        let Some(tls) = &self.tls else { return self.socket.send(data) };
        let _sending = lock(&tls.sending);
        for chunk in data.chunks(64 << 10) {
            let mut rest = chunk;
            while !rest.is_empty() {
                let n = lock(&tls.connection).writer().write(rest)?;
                rest = &rest[n..];
                self.flush_tls_locked(tls)?;
            }
        }
        Ok(())
    }

    /// Receives at least a byte; 0 at the end.
    pub(super) fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        match &self.websocket {
            Some(ws) => ws.recv(self, buf),
            None => self.recv_plain(buf),
        }
    }

    /// Sends everything.
    pub(super) fn send(&self, data: &[u8]) -> io::Result<()> {
        match &self.websocket {
            Some(_) => {
                let mut framed = Vec::with_capacity(data.len() + 10);
                WebSocket::frame(data, &mut framed);
                self.send_plain(&framed)
            }
            None => self.send_plain(data),
        }
    }

    pub(super) fn socket(&self) -> &Arc<Socket> {
        &self.socket
    }
}

/// Something that bytes come from.
pub trait Source {
    /// At least a byte; 0 at the end.
    ///
    /// # Errors
    /// The connection's.
    fn recv(&mut self, buf: &mut [u8]) -> io::Result<usize>;
}

impl Source for Arc<Link> {
    fn recv(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Link::recv(self, buf)
    }
}

impl Source for &[u8] {
    fn recv(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.read(buf)
    }
}

impl Source for &mut Link {
    fn recv(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Link::recv(self, buf)
    }
}

/// Buffered reading of numbers and fields.
pub struct Rx<S> {
    source: S,
    buf: Vec<u8>,
    at: usize,
    ahead: bool,
}

impl<S: Source> Rx<S> {
    /// Reads from `source`.
    pub fn new(source: S) -> Self {
        Self { source, buf: Vec::new(), at: 0, ahead: true }
    }

    /// Reads from `source`, never more than is asked for: what follows may be spoken differently.
    pub fn cautious(source: S) -> Self {
        Self { ahead: false, ..Self::new(source) }
    }

    /// What it reads from.
    pub fn source(&mut self) -> &mut S {
        &mut self.source
    }

    /// Fills `out`.
    ///
    /// # Errors
    /// The connection's, or its end.
    pub fn exact(&mut self, out: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < out.len() {
            if !self.ahead {
                match self.source.recv(&mut out[done..])? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    n => done += n,
                }
                continue;
            }
            if self.at == self.buf.len() {
                self.buf.resize(4096, 0);
                self.at = 0;
                let n = match self.source.recv(&mut self.buf) {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
                    Ok(0) => {
                        self.buf.clear();
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    Ok(n) => n,
                    Err(e) => {
                        self.buf.clear();
                        return Err(e);
                    }
                };
                self.buf.truncate(n);
                continue;
            }
            let n = (out.len() - done).min(self.buf.len() - self.at);
            out[done..done + n].copy_from_slice(&self.buf[self.at..self.at + n]);
            done += n;
            self.at += n;
        }
        Ok(())
    }

    /// `N` bytes.
    ///
    /// # Errors
    /// As [`Self::exact`].
    pub fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut out = [0; N];
        self.exact(&mut out)?;
        Ok(out)
    }

    /// A byte.
    ///
    /// # Errors
    /// As [`Self::exact`].
    pub fn u8(&mut self) -> io::Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    /// A big-endian number.
    ///
    /// # Errors
    /// As [`Self::exact`].
    pub fn u16(&mut self) -> io::Result<u16> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    /// A big-endian number.
    ///
    /// # Errors
    /// As [`Self::exact`].
    pub fn u32(&mut self) -> io::Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// `len` bytes, which the caller has checked to be few.
    ///
    /// # Errors
    /// As [`Self::exact`].
    pub fn bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut out = vec![0; len];
        self.exact(&mut out)?;
        Ok(out)
    }

    /// Reads over `len` bytes.
    ///
    /// # Errors
    /// As [`Self::exact`].
    pub fn skip(&mut self, mut len: u64) -> io::Result<()> {
        let mut scratch = [0; 4096];
        while len > 0 {
            let n = len.min(scratch.len() as u64) as usize;
            self.exact(&mut scratch[..n])?;
            len -= n as u64;
        }
        Ok(())
    }
}
