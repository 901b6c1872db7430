//! `socket`: a Unix or TCP socket, listening or connecting, plain or telnet; descriptors come along on Unix sockets.

use crate::pump::Pump;
use crate::{Error, Kind, Result, host, stream};
use base::props::Properties;
use bus::{CharEvent, CharFrontend, Chardev};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::socket_domain;
use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use schemars::JsonSchema;
use serde::Deserialize;
use std::io::IoSliceMut;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

mod telnet;

#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Spec {
    /// Path of a Unix socket.
    path: Option<PathBuf>,
    /// Host of a TCP socket.
    host: Option<String>,
    /// Port of a TCP socket.
    port: Option<String>,
    /// Try the ports up to this one.
    to: Option<u16>,
    /// Number of a descriptor that was inherited: a connected socket, or with server=on a listening one.
    fd: Option<String>,
    /// Listen instead of connecting.
    server: bool,
    /// Wait for a client before the machine starts (servers; on by default).
    wait: Option<bool>,
    /// Speak telnet.
    telnet: bool,
    /// Seconds between attempts to connect again, 0 for none (clients).
    reconnect: u32,
    /// Disable Nagle's algorithm.
    nodelay: bool,
    /// Use IPv4.
    ipv4: Option<bool>,
    /// Use IPv6.
    ipv6: Option<bool>,
}

pub(crate) const KIND: Kind = Kind {
    name: "socket",
    about: "A Unix or TCP socket",
    properties: Properties::of::<Spec>,
    open: |bag| {
        let spec: Spec = bag.spec()?;
        Ok(open(spec)?)
    },
};

/// Sockets that this process made in the file system.
static SOCKETS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes the sockets that were made, at the program's end: their threads wait for clients until then.
pub fn remove_sockets() {
    for path in SOCKETS.lock().unwrap_or_else(|e| e.into_inner()).drain(..) {
        // It may have been removed already.
        let _ = std::fs::remove_file(path);
    }
}

/// Descriptors kept for whoever asks for them; more are closed.
const MOST_FDS: usize = 16;

struct Socket {
    spec: Spec,
    /// What it is, without the connection's state.
    name: String,
    peer: Mutex<Option<Arc<OwnedFd>>>,
    fds: Mutex<Vec<OwnedFd>>,
    pump: Pump,
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn accept(&self) -> std::io::Result<OwnedFd> {
        Ok(match self {
            Listener::Unix(l) => l.accept()?.0.into(),
            Listener::Tcp(l) => l.accept()?.0.into(),
        })
    }
}

fn open(spec: Spec) -> Result<Arc<Socket>> {
    check(&spec)?;
    if spec.server { serve(spec) } else { connect(spec) }
}

fn check(spec: &Spec) -> Result<()> {
    let bad = |text: &str| Err(Error::Config(format!("chardev: socket: {text}")));
    let ways = [spec.path.is_some(), spec.port.is_some(), spec.fd.is_some()];
    match ways.iter().filter(|w| **w).count() {
        0 => return bad("one of path=, port= (with host=) or fd= is needed"),
        1 => {}
        _ => return bad("path=, port= and fd= exclude each other"),
    }
    if spec.server && spec.reconnect != 0 {
        return bad("'reconnect' option is incompatible with socket in server listen mode");
    }
    if !spec.server && spec.wait == Some(true) {
        return bad("'wait' option is incompatible with socket in client connect mode");
    }
    if spec.to.is_some() && !spec.server {
        return bad("to= is for servers");
    }
    Ok(())
}

fn inherited(text: &str) -> Result<OwnedFd> {
    let bad = || Error::Config(format!("chardev: socket: fd={text} is no open descriptor"));
    let fd: RawFd = text.parse().map_err(|_| bad())?;
    adopt(fd).ok_or_else(bad)
}

/// Takes over a descriptor by number.
#[allow(unsafe_code)] // descriptors that a parent hands down have only a number
fn adopt(fd: RawFd) -> Option<OwnedFd> {
    if fd < 3 {
        return None;
    }
    // SAFETY: borrowed only for the call that finds out whether it is open.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    // A duplicate is ours alone, whoever else was told the number.
    let ours = rustix::io::fcntl_dupfd_cloexec(borrowed, 3).ok()?;
    // SAFETY: it is open, the user handed it to us, and nothing here uses it by its number.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Some(ours)
}

fn addresses(spec: &Spec) -> Result<Vec<std::net::SocketAddr>> {
    let name = spec.host.clone().unwrap_or_default();
    let port = spec.port.clone().unwrap_or_default();
    let port: u16 =
        port.parse().map_err(|_| Error::Config(format!("chardev: socket: port={port} is no port number")))?;
    let listen_all = if spec.ipv4 == Some(true) { "0.0.0.0" } else { "::" };
    let name = match (name.as_str(), spec.server) {
        ("", true) => listen_all.to_owned(),
        ("", false) => "127.0.0.1".into(),
        (name, _) => name.trim_start_matches('[').trim_end_matches(']').to_owned(),
    };
    let found = (name.as_str(), port).to_socket_addrs();
    let found = found.map_err(host(format!("cannot look up host '{name}'")))?;
    let wanted = |a: &std::net::SocketAddr| {
        let only4 = spec.ipv4 == Some(true) && spec.ipv6 != Some(true) || spec.ipv6 == Some(false);
        let only6 = spec.ipv6 == Some(true) && spec.ipv4 != Some(true) || spec.ipv4 == Some(false);
        !(only4 && a.is_ipv6() || only6 && a.is_ipv4())
    };
    let mut all: Vec<_> = found.filter(wanted).collect();
    if all.is_empty() {
        return Err(Error::Config(format!(
            "chardev: socket: host '{name}' has no address of the wanted kind"
        )));
    }
    if spec.server && name == "::" {
        // A host without IPv6.
        all.push(([0, 0, 0, 0], port).into());
    }
    Ok(all)
}

fn listen(spec: &Spec) -> Result<(Listener, String, Option<PathBuf>)> {
    if let Some(fd) = &spec.fd {
        let fd = inherited(fd)?;
        let domain = socket_domain(&fd).map_err(|e| host("chardev: socket")(e.into()))?;
        return Ok(if domain == AddressFamily::UNIX {
            let listener = UnixListener::from(fd);
            let path = listener.local_addr().ok().and_then(|a| a.as_pathname().map(PathBuf::from));
            let name = path.map(|p| p.display().to_string()).unwrap_or_default();
            (Listener::Unix(listener), format!("unix:{name}"), None)
        } else {
            let listener = TcpListener::from(fd);
            let name = listener.local_addr().map(|a| a.to_string()).unwrap_or_default();
            (Listener::Tcp(listener), format!("tcp:{name}"), None)
        });
    }
    if let Some(path) = &spec.path {
        // A socket left by a dead process; a live one loses it, as with QEMU.
        if std::fs::symlink_metadata(path).is_ok_and(|m| {
            use std::os::unix::fs::FileTypeExt;
            m.file_type().is_socket()
        }) {
            // The bind below says what is wrong.
            let _ = std::fs::remove_file(path);
        }
        let listener =
            UnixListener::bind(path).map_err(host(format!("Failed to bind socket to {}", path.display())))?;
        return Ok((Listener::Unix(listener), format!("unix:{}", path.display()), Some(path.clone())));
    }
    let mut last = None;
    for address in addresses(spec)? {
        for port in address.port()..=spec.to.unwrap_or(address.port()) {
            match TcpListener::bind((address.ip(), port)) {
                Ok(listener) => {
                    let name = listener.local_addr().map_or_else(|_| address.to_string(), |a| a.to_string());
                    return Ok((Listener::Tcp(listener), format!("tcp:{name}"), None));
                }
                Err(e) => last = Some((address, e)),
            }
        }
    }
    match last {
        Some((address, e)) => Err(host(format!("Failed to bind socket to {address}"))(e)),
        None => Err(Error::Config("chardev: socket: no address to listen at".into())),
    }
}

fn serve(spec: Spec) -> Result<Arc<Socket>> {
    let (listener, name, path) = listen(&spec)?;
    if let Some(path) = path {
        // Absolute, since the program may go elsewhere before its end.
        let path = std::path::absolute(&path).unwrap_or(path);
        SOCKETS.lock().unwrap_or_else(|e| e.into_inner()).push(path);
    }
    let wait = spec.wait.unwrap_or(true);
    let socket =
        Arc::new(Socket { spec, name, peer: Mutex::default(), fds: Mutex::default(), pump: Pump::default() });
    let first = if wait {
        eprintln!("kvasir: info: waiting for connection on: {}", socket.filename());
        Some(listener.accept().map_err(host("cannot accept a connection"))?)
    } else {
        None
    };
    if let Some(peer) = &first {
        // So that output before the thread runs is not lost.
        socket.set_peer(peer);
    }
    let mine = socket.clone();
    stream::thread("socket", move || {
        let mut next = first;
        loop {
            let peer = match next.take().map_or_else(|| listener.accept(), Ok) {
                Ok(peer) => peer,
                Err(e) => {
                    tracing::warn!("{}: cannot accept a connection: {e}", mine.name);
                    std::thread::sleep(Duration::from_secs(1));
                    continue;
                }
            };
            mine.session(peer);
        }
    })?;
    Ok(socket)
}

fn connect_once(spec: &Spec) -> Result<(OwnedFd, String)> {
    if let Some(fd) = &spec.fd {
        return Ok((inherited(fd)?, format!("fd:{fd}")));
    }
    if let Some(path) = &spec.path {
        let stream =
            UnixStream::connect(path).map_err(host(format!("Failed to connect to '{}'", path.display())))?;
        return Ok((stream.into(), format!("unix:{}", path.display())));
    }
    let mut last = None;
    for address in addresses(spec)? {
        match TcpStream::connect(address) {
            Ok(stream) => {
                if spec.nodelay {
                    stream.set_nodelay(true).map_err(host("cannot set TCP_NODELAY"))?;
                }
                return Ok((stream.into(), format!("tcp:{address}")));
            }
            Err(e) => last = Some((address, e)),
        }
    }
    match last {
        Some((address, e)) => Err(host(format!("Failed to connect to '{address}'"))(e)),
        None => Err(Error::Config("chardev: socket: no address to connect to".into())),
    }
}

fn connect(spec: Spec) -> Result<Arc<Socket>> {
    let reconnect = Duration::from_secs(spec.reconnect.into());
    let (first, name) = match connect_once(&spec) {
        Ok((peer, name)) => (Some(peer), name),
        Err(Error::Host { what, source }) if spec.reconnect != 0 => {
            tracing::warn!("{what}: {source}; trying again");
            let name = match (&spec.path, &spec.host, &spec.port) {
                (Some(path), ..) => format!("unix:{}", path.display()),
                (_, h, p) => {
                    format!("tcp:{}:{}", h.as_deref().unwrap_or_default(), p.as_deref().unwrap_or_default())
                }
            };
            (None, name)
        }
        Err(e) => return Err(e),
    };
    let socket =
        Arc::new(Socket { spec, name, peer: Mutex::default(), fds: Mutex::default(), pump: Pump::default() });
    if let Some(peer) = &first {
        socket.set_peer(peer);
    }
    let mine = socket.clone();
    stream::thread("socket", move || {
        let mut next = first;
        loop {
            if let Some(peer) = next.take() {
                mine.session(peer);
            }
            if reconnect.is_zero() || mine.spec.fd.is_some() {
                return;
            }
            std::thread::sleep(reconnect);
            next = connect_once(&mine.spec).ok().map(|(peer, _)| peer);
        }
    })?;
    Ok(socket)
}

impl Socket {
    fn peer(&self) -> MutexGuard<'_, Option<Arc<OwnedFd>>> {
        self.peer.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn set_peer(&self, peer: &OwnedFd) {
        match (stream::nonblocking(peer), peer.try_clone()) {
            (Ok(()), Ok(copy)) => *self.peer() = Some(Arc::new(copy)),
            (Err(e), _) | (_, Err(e)) => tracing::warn!("{}: {e}", self.name),
        }
    }

    /// Serves one connection to its end.
    fn session(&self, peer: OwnedFd) {
        self.set_peer(&peer);
        let mut telnet = self.spec.telnet.then(telnet::Filter::default);
        if telnet.is_some() {
            stream::write(peer.as_fd(), telnet::GREETING, true);
        }
        self.pump.event(CharEvent::Opened);
        let mut buffer = vec![0; 16 << 10];
        let mut cleaned = Vec::new();
        loop {
            match self.receive(&peer, &mut buffer) {
                Ok(0) => break,
                Ok(n) => match &mut telnet {
                    None => self.pump.deliver(&buffer[..n]),
                    Some(filter) => {
                        cleaned.clear();
                        let breaks = filter.feed(&buffer[..n], &mut cleaned);
                        if breaks {
                            self.pump.event(CharEvent::Break);
                        }
                        self.pump.deliver(&cleaned);
                    }
                },
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    // An error shows in the next read.
                    let _ = poll(&mut [PollFd::new(&peer, PollFlags::IN)], None);
                }
                Err(e) => {
                    tracing::debug!("{}: {e}", self.name);
                    break;
                }
            }
        }
        *self.peer() = None;
        self.fds.lock().unwrap_or_else(|e| e.into_inner()).clear();
        self.pump.event(CharEvent::Closed);
    }

    fn receive(&self, peer: &OwnedFd, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(peer, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                let mut kept = self.fds.lock().unwrap_or_else(|e| e.into_inner());
                kept.extend(fds);
                kept.truncate(MOST_FDS);
            }
        }
        Ok(got.bytes)
    }

    fn send(&self, data: &[u8], wait: bool) {
        let Some(peer) = self.peer().clone() else { return };
        let mut escaped = Vec::new();
        let data = if self.spec.telnet && data.contains(&telnet::IAC) {
            for &b in data {
                escaped.push(b);
                if b == telnet::IAC {
                    escaped.push(b);
                }
            }
            &escaped
        } else {
            data
        };
        // A connection that broke ends in the reading thread.
        stream::write(peer.as_fd(), data, wait);
    }
}

impl Chardev for Socket {
    fn write(&self, data: &[u8]) {
        self.send(data, false);
    }

    fn write_all(&self, data: &[u8]) {
        self.send(data, true);
    }

    fn attach(&self, frontend: Arc<dyn CharFrontend>) {
        self.pump.attach(frontend);
    }

    fn resume_input(&self) {
        self.pump.resume();
    }

    fn filename(&self) -> String {
        let name = match (self.spec.telnet, self.name.strip_prefix("tcp:")) {
            (true, Some(rest)) => format!("telnet:{rest}"),
            _ => self.name.clone(),
        };
        let server = if self.spec.server { ",server=on" } else { "" };
        let gone = if self.peer().is_none() { "disconnected:" } else { "" };
        format!("{gone}{name}{server}")
    }

    fn take_fds(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut *self.fds.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[derive(Default)]
    struct End {
        data: Mutex<Vec<u8>>,
        open: Mutex<Vec<bool>>,
    }

    impl CharFrontend for End {
        fn receive(&self, data: &[u8]) -> usize {
            self.data.lock().unwrap().extend_from_slice(data);
            data.len()
        }
        fn event(&self, event: CharEvent) {
            self.open.lock().unwrap().push(event == CharEvent::Opened);
        }
    }

    fn wait(what: impl Fn() -> bool) {
        for _ in 0..2000 {
            if what() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("it did not happen");
    }

    #[test]
    fn clients_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket =
            open(Spec { path: Some(path.clone()), server: true, wait: Some(false), ..Spec::default() })
                .unwrap();
        let end = Arc::new(End::default());
        socket.attach(end.clone());
        socket.write(b"nobody hears this");
        assert!(socket.filename().starts_with("disconnected:unix:"));
        for round in 1..=2 {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"hello").unwrap();
            wait(|| end.data.lock().unwrap().len() == 5 * round);
            socket.write_all(b"world");
            let mut got = [0; 5];
            client.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"world");
            drop(client);
            wait(|| end.open.lock().unwrap().len() == 2 * round);
        }
        assert_eq!(*end.open.lock().unwrap(), [true, false, true, false]);
    }

    #[test]
    fn contradictions_are_named() {
        for (spec, word) in [
            (Spec::default(), "path="),
            (Spec { path: Some("a".into()), fd: Some("3".into()), ..Spec::default() }, "exclude"),
            (Spec { path: Some("a".into()), wait: Some(true), ..Spec::default() }, "wait"),
            (Spec { port: Some("x".into()), ..Spec::default() }, "port=x"),
            (Spec { fd: Some("99999".into()), ..Spec::default() }, "fd=99999"),
        ] {
            let e = open(spec).err().unwrap().to_string();
            assert!(e.contains(word), "{e}");
        }
    }

    #[test]
    fn readers_that_never_read_do_not_hold_the_guest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket =
            open(Spec { path: Some(path.clone()), server: true, wait: Some(false), ..Spec::default() })
                .unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        wait(|| socket.peer().is_some());
        for _ in 0..20 {
            socket.write(&[0; 64 << 10]);
        }
    }
}
