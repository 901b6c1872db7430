//! A stream of either kind.

use std::{
    io::{IoSlice, Read, Result, Write},
    net::{Shutdown, TcpStream},
    os::unix::net::UnixStream,
};

/// A connected socket. Clones share the connection.
#[derive(Debug)]
pub enum Socket {
    /// On this host.
    Unix(UnixStream),
    /// TCP.
    Tcp(TcpStream),
}

impl Socket {
    /// Another handle on the same connection.
    pub fn try_clone(&self) -> Result<Socket> {
        Ok(match self {
            Socket::Unix(s) => Socket::Unix(s.try_clone()?),
            Socket::Tcp(s) => Socket::Tcp(s.try_clone()?),
        })
    }

    /// Ends the connection for all handles.
    pub fn shutdown(&self) {
        // It may have ended already, which is what is wanted.
        let _ = match self {
            Socket::Unix(s) => s.shutdown(Shutdown::Both),
            Socket::Tcp(s) => s.shutdown(Shutdown::Both),
        };
    }

    /// Gives up reading after a while, for all handles.
    pub fn set_read_timeout(&self, timeout: Option<std::time::Duration>) {
        // It can only fail for a duration of zero.
        let _ = match self {
            Socket::Unix(s) => s.set_read_timeout(timeout),
            Socket::Tcp(s) => s.set_read_timeout(timeout),
        };
    }

    /// Sends small messages at once.
    pub fn set_nodelay(&self) {
        if let Socket::Tcp(s) = self {
            // Without it answers are late, not wrong.
            let _ = s.set_nodelay(true);
        }
    }

    /// Writes all of several buffers.
    pub fn write_all_vectored(&mut self, a: &[u8], b: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < a.len() {
            let parts = [IoSlice::new(&a[done..]), IoSlice::new(b)];
            let n = self.write_vectored(&parts)?;
            if n == 0 {
                return Err(std::io::ErrorKind::WriteZero.into());
            }
            done += n;
        }
        self.write_all(&b[done - a.len()..])
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize> {
        match self {
            Socket::Unix(s) => s.read(buf),
            Socket::Tcp(s) => s.read(buf),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> Result<usize> {
        match self {
            Socket::Unix(s) => s.write(buf),
            Socket::Tcp(s) => s.write(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> Result<usize> {
        match self {
            Socket::Unix(s) => s.write_vectored(bufs),
            Socket::Tcp(s) => s.write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}
