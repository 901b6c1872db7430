//! Attaching an image to a device of the kernel's NBD client (`/dev/nbdN`).

#![allow(unsafe_code)] // the device's ioctls have no safe wrapper

use crate::signals;
use block::{
    Error, Result,
    nbd::{Server, Socket},
};
use std::{
    fs::File,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::FileTypeExt, net::UnixStream},
    },
    sync::Arc,
};

const SET_SOCK: u64 = 0xab00;
const SET_BLKSIZE: u64 = 0xab01;
const DO_IT: u64 = 0xab03;
const CLEAR_SOCK: u64 = 0xab04;
const CLEAR_QUE: u64 = 0xab05;
const SET_SIZE_BLOCKS: u64 = 0xab07;
const DISCONNECT: u64 = 0xab08;
const SET_FLAGS: u64 = 0xab0a;
/// Sectors as the kernel counts them.
const SECTOR: u64 = 512;

fn ioctl(device: &File, name: &str, request: u64, argument: u64) -> Result<()> {
    // SAFETY: these requests take a number or a descriptor's number by value, and no pointer.
    if unsafe { libc::ioctl(device.as_raw_fd(), request as libc::Ioctl, argument) } < 0 {
        return Err(Error::io(name, std::io::Error::last_os_error()));
    }
    Ok(())
}

fn open(path: &str) -> Result<File> {
    let failed =
        |e| Error::io(format!("Failed to open {path} (is the nbd module loaded, and are you root?)"), e);
    let device = File::options().read(true).write(true).open(path).map_err(failed)?;
    if !device.metadata().map_err(failed)?.file_type().is_block_device() {
        return Err(Error::usage(format!("{path} is not a block device; name one like /dev/nbd0")));
    }
    Ok(device)
}

/// Detaches whatever is attached to a device.
pub(super) fn disconnect(path: &str) -> Result<()> {
    let device = open(path)?;
    ioctl(&device, "Failed to clear the queue of the device", CLEAR_QUE, 0)?;
    ioctl(&device, "Failed to disconnect the device", DISCONNECT, 0)?;
    ioctl(&device, "Failed to clear the device", CLEAR_SOCK, 0)?;
    println!("{path} disconnected");
    Ok(())
}

/// Serves the first export of a server as a device, until it is detached or a signal asks for the end. `ready` is called once
/// the device is there.
pub(super) fn serve(path: &str, server: &Arc<Server>, ready: impl FnOnce() -> Result<()>) -> Result<()> {
    let device = Arc::new(open(path)?);
    let (kernel, ours) = UnixStream::pair().map_err(|e| Error::io("Could not make a pair of sockets", e))?;
    let (size, flags) = server.first_export().ok_or_else(|| Error::usage("there is nothing to export"))?;
    let kernel = OwnedFd::from(kernel);
    ioctl(&device, "Failed to set NBD socket", SET_SOCK, kernel.as_raw_fd() as u64).map_err(|e| {
        match e.errno() {
            libc::EBUSY => Error::usage(format!("{path} is in use; choose another device")),
            _ => e,
        }
    })?;
    let set_up = || {
        ioctl(&device, "Failed setting NBD block size", SET_BLKSIZE, SECTOR)?;
        ioctl(&device, "Failed setting size (in blocks)", SET_SIZE_BLOCKS, size / SECTOR)?;
        ioctl(&device, "Failed setting flags", SET_FLAGS, u64::from(flags))
    };
    if let Err(e) = set_up() {
        // Whatever the reason, the device must not stay taken.
        let _ = ioctl(&device, "clear", CLEAR_SOCK, 0);
        return Err(e);
    }
    let worker = Arc::clone(server);
    let serving = std::thread::spawn(move || worker.serve_agreed(Socket::Unix(ours)));
    let ending = Arc::clone(&device);
    std::thread::spawn(move || {
        signals::wait();
        // It may be detached already.
        let _ = ioctl(&ending, "disconnect", DISCONNECT, 0);
    });
    ready()?;
    // Returns when the device is detached.
    let result = ioctl(&device, "NBD_DO_IT", DO_IT, 0);
    let _ = ioctl(&device, "clear", CLEAR_QUE, 0);
    let _ = ioctl(&device, "clear", CLEAR_SOCK, 0);
    drop(kernel);
    serving.join().map_err(|_| Error::usage("the server failed"))??;
    match result {
        // The kernel's word for having been detached.
        Err(e) if e.errno() == libc::EPIPE => Ok(()),
        other => other,
    }
}
