//! Listening, and who is connected.

use super::address::Address;
use super::handshake::{Protection, authenticate};
use super::page;
use super::session::Session;
use super::transport::{Link, Rx, Socket};
use super::websocket;
use crate::Displays;
use crate::input::Keymap;
use rustls::{ServerConfig, ServerConnection};
use std::collections::BTreeMap;
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time in which a viewer must get through the handshake.
const HANDSHAKE: Duration = Duration::from_secs(20);
/// Most connections that have not got through it; the oldest goes when another comes.
const MOST_PENDING: usize = 128;

/// A server that cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum VncError {
    /// Wrong options.
    #[error("VNC: {0}")]
    Config(String),
    /// The host's refusal.
    #[error("VNC: {what}: {source}")]
    Host {
        /// What was attempted.
        what: String,
        /// The host's reason.
        source: io::Error,
    },
}

/// What happens when a viewer asks to be the only one, or not to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Share {
    /// A viewer that wants to be alone sends the others away.
    #[default]
    AllowExclusive,
    /// While somebody is connected who does not share, others are refused.
    ForceShared,
    /// Everyone is let in, whatever they ask.
    Ignore,
}

/// How a server is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where: `:N`, `HOST:N`, `unix:PATH`.
    pub display: String,
    /// Try display numbers up to this.
    pub to: Option<u16>,
    /// Where WebSockets are served: `on`, PORT, HOST:PORT.
    pub websocket: Option<String>,
    /// Viewers need the password, which [`Server::set_password`] sets.
    pub password: bool,
    /// The password from the start.
    pub initial_password: Option<String>,
    /// Encryption is required.
    pub tls: Option<Arc<ServerConfig>>,
    /// Exclusive viewers.
    pub share: Share,
    /// Layout of the guest's keyboard.
    pub keymap: Keymap,
    /// Allow JPEG to viewers that ask for it.
    pub lossy: bool,
    /// Most viewers at a time.
    pub connections: usize,
    /// Number of the console to show.
    pub head: usize,
    /// The name that viewers show.
    pub name: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            display: ":0".into(),
            to: None,
            websocket: None,
            password: false,
            initial_password: None,
            tls: None,
            share: Share::default(),
            keymap: Keymap::default(),
            lossy: true,
            connections: 32,
            head: 0,
            name: "Kvasir".into(),
        }
    }
}

pub(super) struct Shared {
    pub(super) options: Options,
    pub(super) displays: Weak<Displays>,
    password: Mutex<Option<String>>,
    sessions: Mutex<BTreeMap<u64, Arc<Session>>>,
    pending: Mutex<BTreeMap<u64, Arc<Socket>>>,
    next: AtomicU64,
    stop: AtomicBool,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Tcp(l) => l.accept().map(|(s, _)| Socket::Tcp(s)),
            Self::Unix(l, _) => l.accept().map(|(s, _)| Socket::Unix(s)),
        }
    }

    /// Makes a blocked `accept` return.
    fn close(&self) {
        let how = rustix::net::Shutdown::Both;
        // It is closed for good afterwards.
        let _ = match self {
            Self::Tcp(l) => rustix::net::shutdown(l, how),
            Self::Unix(l, path) => {
                let _ = std::fs::remove_file(path); // gone already, perhaps
                rustix::net::shutdown(l, how)
            }
        };
    }
}

/// A running server. Stops when dropped.
pub struct Server {
    shared: Arc<Shared>,
    listeners: Vec<Arc<Listener>>,
    threads: Vec<JoinHandle<()>>,
    address: String,
    websocket: Option<String>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

fn bind(host: &str, port: u16) -> io::Result<TcpListener> {
    match host {
        // Both families where the host has both.
        "" => TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port))),
        host => TcpListener::bind((host, port)),
    }
}

impl Server {
    /// Begins to serve the screens of `displays`, which it does not keep alive.
    ///
    /// # Errors
    /// Wrong options, or an address that is in use.
    pub fn start(displays: &Arc<Displays>, options: Options) -> Result<Self, VncError> {
        let place = Address::parse(&options.display).map_err(VncError::Config)?;
        if displays.console(options.head).is_none() {
            return Err(VncError::Config(format!(
                "there is no screen {}: give the machine a display device (--vga std)",
                options.head
            )));
        }
        let (listener, address, number) = Self::listen(&place, options.to)?;
        let mut listeners = vec![(listener, false)];
        let websocket = match &options.websocket {
            None => None,
            Some(text) => {
                let (host, port) = place.websocket(text, number).map_err(VncError::Config)?;
                let bound = bind(&host, port).map_err(|source| VncError::Host {
                    what: format!("cannot listen for WebSockets at {host}:{port}"),
                    source,
                })?;
                let at = bound.local_addr().map_or_else(|_| format!("{host}:{port}"), |a| a.to_string());
                listeners.push((Listener::Tcp(bound), true));
                Some(at)
            }
        };
        let open = options.tls.is_none() && !address.starts_with("127.") && !address.starts_with("[::1]");
        if open && matches!(place, Address::Display(..)) {
            if options.password || options.initial_password.is_some() {
                tracing::warn!(
                    "VNC at {address}: screen and keys travel unencrypted, protected by a weak password; use tls-creds="
                );
            } else {
                tracing::warn!(
                    "VNC at {address}: anybody who reaches it controls the guest; use 127.0.0.1:N, or tls-creds= and password="
                );
            }
        }
        let password = Mutex::new(options.initial_password.clone());
        let shared = Arc::new(Shared {
            options,
            displays: Arc::downgrade(displays),
            password,
            sessions: Mutex::default(),
            pending: Mutex::default(),
            next: AtomicU64::new(1),
            stop: AtomicBool::new(false),
        });
        let mut server = Self { shared, listeners: Vec::new(), threads: Vec::new(), address, websocket };
        for (listener, web) in listeners {
            let listener = Arc::new(listener);
            server.listeners.push(listener.clone());
            let shared = server.shared.clone();
            let thread = std::thread::Builder::new()
                .name("vnc".into())
                .stack_size(128 << 10)
                .spawn(move || accept(&shared, &listener, web))
                .map_err(|source| VncError::Host { what: "cannot start a thread".into(), source })?;
            server.threads.push(thread);
        }
        Ok(server)
    }

    fn listen(place: &Address, to: Option<u16>) -> Result<(Listener, String, u16), VncError> {
        match place {
            Address::Unix(path) => {
                let host = |source| VncError::Host {
                    what: format!("cannot listen at '{}'", path.display()),
                    source,
                };
                // A socket that nobody serves any more may be replaced.
                if std::os::unix::net::UnixStream::connect(path)
                    .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
                {
                    std::fs::remove_file(path).map_err(host)?;
                }
                let listener = UnixListener::bind(path).map_err(host)?;
                Ok((Listener::Unix(listener, path.clone()), format!("unix:{}", path.display()), 0))
            }
            Address::Display(host, first) => {
                let last = to.unwrap_or(*first).max(*first);
                let mut number = *first;
                loop {
                    match bind(host, Address::port(number)) {
                        Ok(listener) => {
                            let address =
                                listener.local_addr().map_or_else(|_| host.clone(), |a| a.to_string());
                            return Ok((Listener::Tcp(listener), address, number));
                        }
                        Err(e) if e.kind() == io::ErrorKind::AddrInUse && number < last => number += 1,
                        Err(source) => {
                            let what = format!(
                                "cannot listen at {host}:{} (display {number})",
                                Address::port(number)
                            );
                            return Err(VncError::Host { what, source });
                        }
                    }
                }
            }
        }
    }

    /// Where it listens: `ADDRESS:PORT` or `unix:PATH`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where it serves WebSockets: `ADDRESS:PORT`.
    pub fn websocket(&self) -> Option<&str> {
        self.websocket.as_deref()
    }

    /// Sets or takes away the password. Viewers that are in stay in.
    pub fn set_password(&self, password: Option<String>) {
        *lock(&self.shared.password) = password;
    }

    /// The other ends of the viewers' connections.
    pub fn viewers(&self) -> Vec<String> {
        lock(&self.shared.sessions).values().map(|s| s.peer().to_owned()).collect()
    }

    /// Sends everyone away.
    pub fn disconnect_all(&self) {
        for session in self.shared.all_sessions() {
            session.close();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.listeners.iter().for_each(|l| l.close());
        let pending: Vec<_> = lock(&self.shared.pending).values().cloned().collect();
        pending.iter().for_each(|s| s.close());
        self.disconnect_all();
        for thread in self.threads.drain(..) {
            // Accepting ends by the closed listener; a panic there has been reported.
            let _ = thread.join();
        }
    }
}

fn accept(shared: &Arc<Shared>, listener: &Listener, web: bool) {
    while !shared.stop.load(Ordering::SeqCst) {
        let socket = match listener.accept() {
            Ok(socket) => Arc::new(socket),
            Err(e) => {
                if shared.stop.load(Ordering::SeqCst) {
                    return;
                }
                // No descriptors left, most likely: do not spin.
                tracing::debug!("VNC: accept: {e}");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let id = shared.next.fetch_add(1, Ordering::Relaxed);
        {
            let mut pending = lock(&shared.pending);
            if pending.len() >= MOST_PENDING
                && let Some((_, oldest)) = pending.pop_first()
            {
                oldest.close();
            }
            pending.insert(id, socket.clone());
        }
        let theirs = shared.clone();
        let spawned =
            std::thread::Builder::new().name("vnc-viewer".into()).stack_size(512 << 10).spawn(move || {
                let peer = socket.peer();
                let result = theirs.serve(id, &socket, web, &peer);
                lock(&theirs.pending).remove(&id);
                lock(&theirs.sessions).remove(&id);
                socket.close();
                match result {
                    Err(e) if e.kind() != io::ErrorKind::UnexpectedEof => {
                        tracing::info!("VNC viewer {peer}: {e}")
                    }
                    _ => tracing::debug!("VNC viewer {peer} has left"),
                }
            });
        if let Err(e) = spawned {
            tracing::warn!("VNC: no thread for another viewer: {e}");
            if let Some(socket) = lock(&shared.pending).remove(&id) {
                socket.close();
            }
        }
    }
}

impl Shared {
    fn all_sessions(&self) -> Vec<Arc<Session>> {
        lock(&self.sessions).values().cloned().collect()
    }

    /// All of a connection's life.
    fn serve(self: &Arc<Self>, id: u64, socket: &Arc<Socket>, web: bool, peer: &str) -> io::Result<()> {
        socket.prepare()?;
        let mut link = Link::new(socket.clone(), Instant::now() + HANDSHAKE);
        if web {
            if let Some(tls) = &self.options.tls {
                let connection = ServerConnection::new(tls.clone()).map_err(io::Error::other)?;
                link.start_tls(connection)?;
            }
            let request = websocket::read_request(&link)?;
            let Some(key) = request.key else { return link.send_plain(&page::answer(&request.path)) };
            link.send_plain(websocket::accept(&key, request.binary).as_bytes())?;
            link.start_websocket();
        }
        let password = lock(&self.password).clone();
        authenticate(&mut link, &Protection::new(&self.options, password))?;
        let shared_flag = Rx::cautious(&mut link).u8()? != 0;
        link.no_deadline()?;
        let Some(displays) = self.displays.upgrade() else { return Ok(()) };
        let Some(console) = displays.console(self.options.head) else { return Ok(()) };
        self.make_room(shared_flag)?;
        lock(&self.pending).remove(&id);
        let session = Session::new(id, link, &displays, console, self.options.clone(), peer);
        drop(displays);
        lock(&self.sessions).insert(id, session.clone());
        if self.stop.load(Ordering::SeqCst) {
            return Ok(());
        }
        session.run()
    }

    /// Sends others away if the newcomer wants to be alone, or refuses it.
    fn make_room(&self, share: bool) -> io::Result<()> {
        let sessions = self.all_sessions();
        match self.options.share {
            Share::AllowExclusive if !share => sessions.iter().for_each(|s| s.close()),
            Share::ForceShared if !share => {
                return Err(io::Error::other("wants to be alone, but this server is shared"));
            }
            _ if sessions.len() >= self.options.connections => {
                return Err(io::Error::other(format!("{} viewers are connected already", sessions.len())));
            }
            _ => {}
        }
        Ok(())
    }
}
