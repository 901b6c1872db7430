//! Tap devices: the host's kernel as the other end of the cable. Made here, or given as open descriptors.
//!
//! Frames go between guest memory and kernel in one system call each, with the header of [`crate::VnetHeader`], so
//! that large segments pass whole.
#![allow(unsafe_code)] // ioctls of the tun driver, and descriptors that the user names by number

use crate::{Counters, Error, Frame, Link, Netdev, Offloads, Port, Receiver, Result, Sent, VnetHeader, sys};
use rustix::fs::{Mode, OFlags};
use schemars::JsonSchema;
use serde::Deserialize;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::process::{Command, Stdio};
use std::sync::Arc;

/// Properties of `--netdev tap`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Spec {
    /// Name of the interface; the kernel chooses one if not given. One that exists is used.
    pub ifname: Option<String>,
    /// Descriptor of an open tap device.
    pub fd: Option<i32>,
    /// Descriptors of an open tap device's queues, separated by ':'.
    pub fds: Option<String>,
    /// Program that configures the interface, called with its name; "no" for none.
    pub script: Option<String>,
    /// Program that undoes this in the end; "no" for none.
    pub downscript: Option<String>,
    /// Bridge that the interface is put into.
    pub br: Option<String>,
    /// Pairs of queues.
    pub queues: Option<u16>,
    /// Pass offloads through (the kernel's header before each frame); as the device can if not given.
    pub vnet_hdr: Option<bool>,
    /// Bytes that the kernel may have under way before sending waits.
    #[schemars(extend("format" = "size"))]
    pub sndbuf: Option<u32>,
    /// Hand the queues to the kernel; not available in this version.
    pub vhost: bool,
}

/// From linux/if_tun.h.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNGETFEATURES: libc::c_ulong = 0x8004_54cf;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETSNDBUF: libc::c_ulong = 0x4004_54d4;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const IFF_TAP: i16 = 2;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
const IFF_MULTI_QUEUE: i16 = 0x0100;
const IFF_ATTACH_QUEUE: i16 = 0x0200;
const IFF_DETACH_QUEUE: i16 = 0x0400;
const TUN_F: [(Offloads, u32); 7] = [
    (Offloads::CSUM, 1),
    (Offloads::TSO4, 2),
    (Offloads::TSO6, 4),
    (Offloads::ECN, 8),
    (Offloads::UFO, 16),
    (Offloads::USO4, 32),
    (Offloads::USO6, 64),
];

/// `struct ifreq` with flags.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: i16,
    rest: [u8; 22],
}

impl Request {
    fn new(name: &str, flags: i16) -> Result<Self> {
        let mut request = Self { name: [0; libc::IFNAMSIZ], flags, rest: [0; 22] };
        let bytes = name.as_bytes();
        if bytes.len() >= libc::IFNAMSIZ || bytes.iter().any(|b| *b <= b' ' || *b == b'/' || *b == b'%') {
            return Err(Error::Config(format!(
                "netdev tap: '{name}' is not the name of an interface: up to {} characters without spaces and '/'",
                libc::IFNAMSIZ - 1
            )));
        }
        request.name[..bytes.len()].copy_from_slice(bytes);
        Ok(request)
    }

    fn name(&self) -> String {
        self.name.iter().take_while(|b| **b != 0).map(|b| *b as char).collect()
    }
}

/// An ioctl with a pointer to a plain value that both sides know.
fn ioctl<T>(fd: BorrowedFd<'_>, request: libc::c_ulong, value: &mut T) -> io::Result<()> {
    // SAFETY: each call here names the type that the request takes, which is valid for the call.
    let n = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(value)) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes over a descriptor that the user names by number.
///
/// # Errors
/// It is not open.
pub(crate) fn inherited(fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: F_GETFD looks only.
    if fd < 3 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(Error::Config(format!(
            "netdev: fd={fd} is not an open descriptor that this program was given"
        )));
    }
    // SAFETY: it is open, and who starts us with it and names it gives it to us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)
        .and_then(|()| rustix::fs::fcntl_setfl(&fd, rustix::fs::fcntl_getfl(&fd)? | OFlags::NONBLOCK))
        .map_err(|e| Error::host("netdev: inherited descriptor")(e.into()))?;
    Ok(fd)
}

/// One queue of a tap device.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: String,
    header: bool,
}

impl Tap {
    /// Makes a tap device, or another queue of one.
    ///
    /// # Errors
    /// No permission, a bad name, or an interface of that name that is something else.
    pub fn create(name: &str, header: Option<bool>, multi_queue: bool) -> Result<Self> {
        let what = || {
            let shown = if name.is_empty() { "a tap device".into() } else { format!("tap device '{name}'") };
            Error::host(format!(
                "netdev tap: cannot make {shown} (it needs CAP_NET_ADMIN; '--net user' needs nothing)"
            ))
        };
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty())
            .map_err(|e| Error::host("netdev tap: /dev/net/tun (is the module 'tun' loaded?)")(e.into()))?;
        let mut features = 0u32;
        ioctl(fd.as_fd(), TUNGETFEATURES, &mut features).map_err(what())?;
        let can = features & IFF_VNET_HDR as u32 != 0;
        if header == Some(true) && !can {
            return Err(Error::Config("netdev tap: this kernel's tap devices have no vnet_hdr".into()));
        }
        let header = header.unwrap_or(can);
        let mut flags = IFF_TAP | IFF_NO_PI;
        flags |= if header { IFF_VNET_HDR } else { 0 };
        flags |= if multi_queue { IFF_MULTI_QUEUE } else { 0 };
        let mut request = Request::new(name, flags)?;
        ioctl(fd.as_fd(), TUNSETIFF, &mut request).map_err(what())?;
        Self { fd, name: request.name(), header }.prepared()
    }

    /// An open tap device (or macvtap).
    ///
    /// # Errors
    /// It is something else.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let mut request = Request::new("", 0)?;
        ioctl(fd.as_fd(), TUNGETIFF, &mut request).map_err(Error::host("netdev tap: not a tap device"))?;
        let header = request.flags & IFF_VNET_HDR != 0;
        if request.flags & IFF_NO_PI == 0 {
            return Err(Error::Config("netdev tap: the device was opened without IFF_NO_PI".into()));
        }
        Self { name: request.name(), fd, header }.prepared()
    }

    fn prepared(self) -> Result<Self> {
        if self.header {
            let mut size = VnetHeader::LEN as i32;
            ioctl(self.fd.as_fd(), TUNSETVNETHDRSZ, &mut size)
                .map_err(Error::host("netdev tap: cannot set the header's size"))?;
        }
        Ok(self)
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes the descriptor out.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// What the kernel can be told to do.
    fn offloads(&self) -> Offloads {
        if !self.header {
            return Offloads::empty();
        }
        let base = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN;
        let all = [base | Offloads::UFO | Offloads::USO4 | Offloads::USO6, base | Offloads::UFO, base];
        let works = |o: &Offloads| self.set(*o).is_ok();
        let found = all.into_iter().find(works).unwrap_or(Offloads::empty());
        // Nothing until the guest says what it takes.
        let _ = self.set(Offloads::empty());
        found
    }

    fn set(&self, offloads: Offloads) -> io::Result<()> {
        let bits = TUN_F.iter().filter(|(o, _)| offloads.contains(*o)).fold(0, |all, (_, bit)| all | bit);
        // SAFETY: this request takes its value as it is.
        let n = unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(bits)) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// What undoes the configuration of an interface.
struct Down {
    script: Option<String>,
    name: String,
}

impl Drop for Down {
    fn drop(&mut self) {
        if let Some(script) = &self.script
            && let Err(e) = run(script, &self.name)
        {
            tracing::warn!("{e}");
        }
    }
}

/// Runs a script with the interface's name.
fn run(script: &str, name: &str) -> Result<()> {
    let what = format!("netdev tap: script '{script}'");
    let status =
        Command::new(script).arg(name).stdin(Stdio::null()).status().map_err(Error::host(what.clone()))?;
    if status.success() { Ok(()) } else { Err(Error::Config(format!("{what} failed: {status}"))) }
}

struct TapPort {
    tap: Tap,
    scratch: sys::Scratch,
    large: bool,
    gone: bool,
    /// Dropped with the last port.
    _down: Arc<Down>,
}

/// Opens the tap device that a netdev describes.
///
/// # Errors
/// Options that contradict each other, or the host's refusal.
pub fn open(id: &str, spec: &Spec) -> Result<Netdev> {
    let bad = |text: &str| Err(Error::Config(format!("netdev tap: {text}")));
    if spec.vhost {
        return bad("vhost=on is not available in this version; leave it out");
    }
    let given = spec.fd.is_some() || spec.fds.is_some();
    if given
        && (spec.ifname.is_some() || spec.script.is_some() || spec.downscript.is_some() || spec.br.is_some())
    {
        return bad(
            "with fd= or fds= the device exists: ifname=, br=, script= and downscript= make no sense",
        );
    }
    if given && (spec.queues.is_some() || spec.vnet_hdr.is_some()) {
        return bad("with fd= or fds= queues= and vnet_hdr= are what they are");
    }
    let taps = match (spec.fd, &spec.fds) {
        (Some(_), Some(_)) => return bad("fd= and fds= exclude each other"),
        (Some(fd), None) => vec![Tap::from_fd(inherited(fd)?)?],
        (None, Some(list)) => {
            let parse = |t: &str| match t.parse() {
                Ok(fd) => Tap::from_fd(inherited(fd)?),
                Err(_) => Err(Error::Config(format!("netdev tap: fds={list}: '{t}' is not a number"))),
            };
            list.split(':').map(parse).collect::<Result<Vec<_>>>()?
        }
        (None, None) => create(spec)?,
    };
    if let Some(size) = spec.sndbuf {
        for tap in &taps {
            let mut size = i32::try_from(size).unwrap_or(i32::MAX);
            ioctl(tap.fd.as_fd(), TUNSETSNDBUF, &mut size).map_err(Error::host("netdev tap: sndbuf="))?;
        }
    }
    let wanted = |script: &Option<String>| script.clone().filter(|s| s != "no" && !s.is_empty());
    let name = taps[0].name.clone();
    if let Some(script) = wanted(&spec.script) {
        run(&script, &name)?;
    }
    let down = Arc::new(Down { script: wanted(&spec.downscript), name: name.clone() });
    if let Some(bridge) = &spec.br {
        crate::bridge::join(bridge, &name)?;
    }
    Ok(netdev(id, "tap", format!("tap device {name}"), taps, down))
}

fn create(spec: &Spec) -> Result<Vec<Tap>> {
    let queues = spec.queues.unwrap_or(1);
    if !(1..=128).contains(&queues) {
        return Err(Error::Config(format!("netdev tap: queues={queues} must be from 1 to 128")));
    }
    let mut name = spec.ifname.clone().unwrap_or_default();
    let mut taps = Vec::new();
    for _ in 0..queues {
        let tap = Tap::create(&name, spec.vnet_hdr, queues > 1)?;
        name = tap.name.clone();
        taps.push(tap);
    }
    Ok(taps)
}

/// A netdev of a device somebody else has opened.
pub(crate) fn opened(id: &str, kind: &'static str, about: String, tap: Tap) -> Netdev {
    let name = tap.name.clone();
    netdev(id, kind, about, vec![tap], Arc::new(Down { script: None, name }))
}

fn netdev(id: &str, kind: &'static str, about: String, taps: Vec<Tap>, down: Arc<Down>) -> Netdev {
    let offloads = taps[0].offloads();
    let port = |tap| -> Box<dyn Port> {
        Box::new(TapPort {
            tap,
            scratch: sys::Scratch::default(),
            large: false,
            gone: false,
            _down: down.clone(),
        })
    };
    Netdev {
        id: id.into(),
        kind,
        about,
        takes: offloads,
        gives: offloads,
        mtu: None,
        link: Arc::new(Link::default()),
        counters: Arc::<Counters>::default(),
        ports: taps.into_iter().map(port).collect(),
    }
}

/// Frames handed over before the guest's own have their turn.
const BATCH: usize = 64;

impl Port for TapPort {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.tap.fd.as_fd()).filter(|_| !self.gone)
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.large = offloads.intersects(Offloads::TSO4 | Offloads::TSO6 | Offloads::UFO | Offloads::USO4);
        if self.tap.header { self.tap.set(offloads) } else { Ok(()) }
    }

    fn set_enabled(&mut self, enabled: bool) {
        let flag = if enabled { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        if let Ok(mut request) = Request::new("", flag) {
            // A device with one queue has none to detach, and one that is attached stays so.
            let _ = ioctl(self.tap.fd.as_fd(), TUNSETQUEUE, &mut request);
        }
    }

    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        let fd = self.tap.fd.as_fd();
        let result = if self.tap.header {
            sys::write_frame(fd, frame)
        } else {
            self.scratch.write(fd, frame, VnetHeader::LEN)
        };
        match result {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Sent::Busy,
            // An interface that is down, or a frame that it does not take: dropped.
            _ => Sent::Done,
        }
    }

    fn receive(&mut self, to: &mut dyn Receiver) -> io::Result<bool> {
        let most = if self.large { to.largest() } else { to.largest().min(VnetHeader::LEN + 18 + 9216) };
        for _ in 0..BATCH {
            if self.gone {
                return Ok(false);
            }
            let Some(room) = to.reserve(most) else { return Ok(false) };
            let fd = self.tap.fd.as_fd();
            let result = if self.tap.header {
                sys::read_frame(fd, room)
            } else {
                room.write(0, &VnetHeader::default().to_bytes());
                self.scratch.read(fd, room, VnetHeader::LEN).map(|n| n + VnetHeader::LEN)
            };
            match result {
                Ok(n) if n > VnetHeader::LEN => to.commit(n),
                Ok(_) => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e)
                    if e.raw_os_error() == Some(libc::EBADFD) || e.raw_os_error() == Some(libc::ENODEV) =>
                {
                    tracing::warn!("tap device {} is gone; the guest's link is dead", self.tap.name);
                    self.gone = true;
                }
                // The interface is down.
                Err(_) => return Ok(false),
            }
        }
        Ok(true)
    }
}
