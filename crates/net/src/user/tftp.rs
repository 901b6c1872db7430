//! A read-only TFTP server (RFC 1350, 2347, 2348, 2349) for guests that boot from the network.

use super::lan::Lan;
use crate::MacAddr;
use crate::wire::be16;
use std::fs::File;
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

/// The server's port. Answers come from it too, as QEMU's do; clients do not mind.
pub(super) const PORT: u16 = 69;
/// Transfers at once.
const MOST: usize = 16;
const FIRST_TIMEOUT: Duration = Duration::from_secs(1);
const TRIES: u32 = 5;

type Peer = (IpAddr, u16);

struct Transfer {
    client: Peer,
    server: Peer,
    mac: MacAddr,
    file: File,
    size: u64,
    block_size: usize,
    /// Block that is out; 0 is the answer to options.
    block: u64,
    options: Vec<u8>,
    tries: u32,
    due: Instant,
}

/// The server.
pub(super) struct Tftp {
    directory: Option<PathBuf>,
    transfers: Vec<Transfer>,
}

/// Error codes.
const NOT_FOUND: u16 = 1;
const ACCESS: u16 = 2;
const FULL: u16 = 3;
const ILLEGAL: u16 = 4;

fn error(code: u16, text: &str) -> Vec<u8> {
    let mut b = vec![0, 5];
    b.extend_from_slice(&code.to_be_bytes());
    b.extend_from_slice(text.as_bytes());
    b.push(0);
    b
}

impl Tftp {
    pub(super) fn new(directory: Option<PathBuf>) -> Self {
        Self { directory, transfers: Vec::new() }
    }

    /// When something is to be sent again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.transfers.iter().map(|t| t.due).min()
    }

    /// A datagram to the server.
    pub(super) fn input(&mut self, b: &[u8], mac: MacAddr, client: Peer, server: Peer, lan: &mut Lan) {
        if b.len() < 4 {
            return;
        }
        match be16(b, 0) {
            1 => {
                self.transfers.retain(|t| t.client != client);
                match self.start(&b[2..], mac, client, server) {
                    Ok(transfer) => {
                        transfer.send(lan);
                        self.transfers.push(transfer);
                    }
                    Err(message) => lan.udp(mac, server, client, &message),
                }
            }
            2 => lan.udp(mac, server, client, &error(ACCESS, "this server is read-only")),
            4 => {
                let Some(at) = self.transfers.iter().position(|t| t.client == client) else { return };
                let transfer = &mut self.transfers[at];
                if be16(b, 2) != transfer.block as u16 {
                    return; // of an earlier block; answering it would double everything from here on (RFC 1123)
                }
                if transfer.is_last() {
                    self.transfers.remove(at);
                    return;
                }
                transfer.block += 1;
                transfer.tries = 0;
                transfer.due = Instant::now() + FIRST_TIMEOUT;
                transfer.send(lan);
            }
            5 => self.transfers.retain(|t| t.client != client),
            _ => lan.udp(mac, server, client, &error(ILLEGAL, "illegal operation")),
        }
    }

    fn start(&mut self, b: &[u8], mac: MacAddr, client: Peer, server: Peer) -> Result<Transfer, Vec<u8>> {
        let mut words = b.split(|c| *c == 0).map(|w| std::str::from_utf8(w).ok());
        let (Some(Some(name)), Some(Some(mode))) = (words.next(), words.next()) else {
            return Err(error(ILLEGAL, "malformed request"));
        };
        if !mode.eq_ignore_ascii_case("octet") {
            return Err(error(ILLEGAL, "only octet mode is supported"));
        }
        if self.transfers.len() >= MOST {
            return Err(error(FULL, "too many transfers"));
        }
        let Some(directory) = &self.directory else {
            return Err(error(NOT_FOUND, "no files are served"));
        };
        let file = open(directory, name).ok_or_else(|| error(NOT_FOUND, "file not found"))?;
        let size = file.metadata().map_err(|_| error(NOT_FOUND, "file not found"))?.len();
        let mut transfer = Transfer {
            client,
            server,
            mac,
            file,
            size,
            block_size: 512,
            block: 1,
            options: Vec::new(),
            tries: 0,
            due: Instant::now() + FIRST_TIMEOUT,
        };
        while let (Some(Some(key)), Some(Some(value))) = (words.next(), words.next()) {
            transfer.option(&key.to_ascii_lowercase(), value);
        }
        if !transfer.options.is_empty() {
            transfer.block = 0;
        }
        Ok(transfer)
    }

    /// Sends again what was not answered.
    pub(super) fn tick(&mut self, now: Instant, lan: &mut Lan) {
        self.transfers.retain_mut(|t| {
            if t.due > now {
                return true;
            }
            t.tries += 1;
            t.due = now + FIRST_TIMEOUT * (1 << t.tries.min(4));
            if t.tries <= TRIES {
                t.send(lan);
            }
            t.tries <= TRIES
        });
    }

    /// Transfers end by their own timers.
    pub(super) fn expire(&mut self, _: Instant) {}
}

impl Transfer {
    fn option(&mut self, key: &str, value: &str) {
        let answer = match key {
            "tsize" => self.size.to_string(),
            "blksize" => match value.parse::<usize>() {
                // As large as an Ethernet frame takes.
                Ok(n @ 8..) => {
                    self.block_size = n.min(1428);
                    self.block_size.to_string()
                }
                _ => return,
            },
            "timeout" => match value.parse::<u8>() {
                Ok(1..) => value.to_owned(),
                _ => return,
            },
            _ => return,
        };
        for word in [key, &answer] {
            self.options.extend_from_slice(word.as_bytes());
            self.options.push(0);
        }
    }

    fn is_last(&self) -> bool {
        self.block > 0 && self.block * self.block_size as u64 > self.size
    }

    fn send(&self, lan: &mut Lan) {
        let mut b = vec![0, if self.block == 0 { 6 } else { 3 }];
        if self.block == 0 {
            b.extend_from_slice(&self.options);
        } else {
            b.extend_from_slice(&(self.block as u16).to_be_bytes()); // wraps, as clients expect of large files
            let start = (self.block - 1) * self.block_size as u64;
            let len = self.size.saturating_sub(start).min(self.block_size as u64) as usize;
            let at = b.len();
            b.resize(at + len, 0);
            if self.file.read_exact_at(&mut b[at..], start).is_err() {
                b = error(NOT_FOUND, "the file cannot be read");
            }
        }
        lan.udp(self.mac, self.server, self.client, &b);
    }
}

/// Opens a file below the directory: never what a name with `..` or a link leads out to.
fn open(directory: &Path, name: &str) -> Option<File> {
    let relative = Path::new(name.trim_start_matches('/'));
    if !relative.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir)) {
        return None;
    }
    use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let top =
        openat(CWD, directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let file = File::from(openat2(&top, relative, flags, Mode::empty(), ResolveFlags::BENEATH).ok()?);
    file.metadata().ok()?.is_file().then_some(file)
}
