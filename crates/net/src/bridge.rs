//! Bridges of the host, for those who may use them: directly, or through a helper that asks an access list.
//!
//! The helper speaks as QEMU's does: it is started with `--br=NAME --fd=N [--use-vnet]` and sends the descriptor of a
//! tap device that is in the bridge through the local socket `N`. So either works with the other's programs.
#![allow(unsafe_code)] // ioctls on interfaces

use crate::tap::Tap;
use crate::{Error, Netdev, Result, tap};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};
use schemars::JsonSchema;
use serde::Deserialize;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Properties of `--netdev bridge`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Spec {
    /// Name of the bridge.
    pub br: String,
    /// Program that makes the tap device; this one if not given.
    pub helper: Option<PathBuf>,
}

impl Default for Spec {
    fn default() -> Self {
        Self { br: "br0".into(), helper: None }
    }
}

/// Access lists, in this order; the first that exists counts.
pub const ACCESS_LISTS: [&str; 2] = ["/etc/kvasir/bridge.conf", "/etc/qemu/bridge.conf"];
/// Depth to which access lists may include others.
const DEPTH: u32 = 8;

const SIOCBRADDIF: libc::c_ulong = 0x89a2;

#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    value: [u8; 24],
}

fn request(name: &str) -> Result<Request> {
    let mut request = Request { name: [0; libc::IFNAMSIZ], value: [0; 24] };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(Error::Config(format!("'{name}' is not the name of an interface")));
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    Ok(request)
}

fn ioctl(socket: &OwnedFd, number: libc::c_ulong, request: &mut Request) -> io::Result<()> {
    // SAFETY: the interface requests used here take a `struct ifreq`, as which this is laid out.
    let n = unsafe { libc::ioctl(socket.as_raw_fd(), number, std::ptr::from_mut(request)) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Puts an interface into a bridge and brings it up.
///
/// # Errors
/// No such bridge, or no permission.
pub fn join(bridge: &str, interface: &str) -> Result<()> {
    let what = || Error::host(format!("cannot put '{interface}' into bridge '{bridge}'"));
    if !Path::new("/sys/class/net").join(bridge).join("bridge").is_dir() {
        return Err(Error::Config(format!("there is no bridge '{bridge}' on this host")));
    }
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(|e| what()(e.into()))?;
    let mut port = request(interface)?;
    ioctl(&socket, libc::SIOCGIFINDEX as _, &mut port).map_err(what())?;
    let mut join = request(bridge)?;
    join.value[..4].copy_from_slice(&port.value[..4]);
    ioctl(&socket, SIOCBRADDIF, &mut join).map_err(what())?;
    let mut flags = request(interface)?;
    ioctl(&socket, libc::SIOCGIFFLAGS as _, &mut flags).map_err(what())?;
    let up = i16::from_ne_bytes([flags.value[0], flags.value[1]]) | libc::IFF_UP as i16;
    flags.value[..2].copy_from_slice(&up.to_ne_bytes());
    ioctl(&socket, libc::SIOCSIFFLAGS as _, &mut flags).map_err(what())
}

/// Whether an access list allows a bridge: lines `allow NAME|all`, `deny NAME|all`, `include FILE`. What no line
/// names is denied; a denial wins.
///
/// # Errors
/// A list that cannot be read, or that has other lines.
pub fn allowed(bridge: &str, list: &Path) -> Result<bool> {
    let mut verdict = (false, false);
    read_list(bridge, list, DEPTH, &mut verdict)?;
    let (allow, deny) = verdict;
    Ok(allow && !deny)
}

fn read_list(bridge: &str, list: &Path, depth: u32, verdict: &mut (bool, bool)) -> Result<()> {
    let name = list.display();
    let text = std::fs::read_to_string(list).map_err(Error::host(format!("access list {name}")))?;
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default().trim();
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        match words[..] {
            [] => {}
            ["allow", who] => verdict.0 |= who == bridge || who == "all",
            ["deny", who] => verdict.1 |= who == bridge || who == "all",
            ["include", file] if depth > 0 => read_list(bridge, Path::new(file), depth - 1, verdict)?,
            ["include", _] => {
                return Err(Error::Config(format!("{name}:{number}: includes are nested too deep")));
            }
            _ => {
                return Err(Error::Config(format!(
                    "{name}:{number}: '{line}' is not 'allow BRIDGE', 'deny BRIDGE' or 'include FILE'"
                )));
            }
        }
    }
    Ok(())
}

/// The helper: makes a tap device in a bridge, if the access list allows that, and sends its descriptor through the
/// socket `fd`.
///
/// # Errors
/// The bridge is not allowed, or the host's refusal.
pub fn helper(bridge: &str, fd: RawFd, header: bool) -> Result<()> {
    let socket = tap::inherited(fd)?;
    let list = ACCESS_LISTS.iter().map(Path::new).find(|p| p.exists()).ok_or_else(|| {
        Error::Config(format!("no access list: put 'allow {bridge}' into {}", ACCESS_LISTS[0]))
    })?;
    if !allowed(bridge, list)? {
        return Err(Error::Config(format!("bridge '{bridge}' is not allowed by {}", list.display())));
    }
    let tap = Tap::create("", Some(header), false)?;
    join(bridge, tap.name())?;
    let tap = tap.into_fd();
    let fds = [tap.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds));
    rustix::net::sendmsg(&socket, &[IoSlice::new(&[0])], &mut control, rustix::net::SendFlags::NOSIGNAL)
        .map_err(|e| Error::host("cannot send the descriptor")(e.into()))?;
    Ok(())
}

/// Opens a netdev in a bridge through the helper.
///
/// # Errors
/// The helper's refusal, which it prints.
pub fn open(id: &str, spec: &Spec) -> Result<Netdev> {
    let failed = || Error::host("netdev bridge: cannot run the helper");
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(|e| failed()(e.into()))?;
    // The helper inherits its end under the number that it has here.
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).map_err(|e| failed()(e.into()))?;
    let mut command = match &spec.helper {
        Some(path) => Command::new(path),
        None => {
            let mut command = Command::new(std::env::current_exe().map_err(failed())?);
            command.args(["net", "bridge-helper"]);
            command
        }
    };
    command.arg("--use-vnet").arg(format!("--fd={}", theirs.as_raw_fd())).arg(format!("--br={}", spec.br));
    let mut child = command.spawn().map_err(failed())?;
    drop(theirs);
    let received = receive(&ours);
    let status = child.wait().map_err(failed())?;
    if !status.success() {
        return Err(Error::Config(format!(
            "netdev bridge: the helper refused '{}' ({status}); it needs root (or CAP_NET_ADMIN) and an access list",
            spec.br
        )));
    }
    let fd = received.map_err(failed())?;
    let fd = rustix::fs::fcntl_getfl(&fd)
        .and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK))
        .map(|()| fd)
        .map_err(|e| failed()(e.into()))?;
    let tap = Tap::from_fd(fd)?;
    let about = format!("{} in bridge {}", tap.name(), spec.br);
    Ok(tap::opened(id, "bridge", about, tap))
}

/// Receives one descriptor.
fn receive(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message
            && let Some(fd) = fds.next()
        {
            return Ok(fd);
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_lists() {
        let dir = tempfile::tempdir().unwrap();
        let (main, more) = (dir.path().join("bridge.conf"), dir.path().join("more"));
        let set = |text: &str| std::fs::write(&main, text).unwrap();
        set("# none\n");
        assert!(!allowed("br0", &main).unwrap());
        set("allow br0\nallow br1 # both\ndeny br1\n");
        assert!(allowed("br0", &main).unwrap() && !allowed("br1", &main).unwrap());
        std::fs::write(&more, "allow all\ndeny br9\n").unwrap();
        set(&format!("include {}\n", more.display()));
        assert!(allowed("br5", &main).unwrap() && !allowed("br9", &main).unwrap());
        std::fs::write(&more, format!("include {}\n", more.display())).unwrap();
        assert!(allowed("br5", &main).is_err());
        set("permit br0\n");
        let e = allowed("br0", &main).unwrap_err().to_string();
        assert!(e.contains(":1:") && e.contains("allow BRIDGE"), "{e}");
    }
}
