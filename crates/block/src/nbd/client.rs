//! Using another server's export as a storage.
//!
//! Any number of threads send requests over one connection. There is no thread of its own to read answers: a thread that
//! waits reads whatever comes, hands it to whom it belongs, and goes on until its own answer is there.

use super::{address::NbdAddress, proto::*, socket::Socket};
use crate::{
    Error, Result,
    storage::{Held, Storage, StorageOptions, ZeroFlags, Zeroing},
};
use std::{
    collections::HashMap,
    io::{BufReader, Read, Write},
    sync::{Arc, Condvar, Mutex, RwLock},
    time::{Duration, Instant},
};

/// An answer as it comes in.
#[derive(Debug, Default)]
struct Reply {
    error: u32,
    message: String,
    /// Parts of the data read: offset in the request, bytes.
    data: Vec<(u64, Vec<u8>)>,
    status: Vec<(u64, u64)>,
    done: bool,
}

#[derive(Debug)]
struct Pending {
    reply: Reply,
    offset: u64,
    len: u64,
    reads: bool,
}

#[derive(Debug, Default)]
struct Board {
    pending: HashMap<u64, Pending>,
    next: u64,
    reading: bool,
    dead: Option<String>,
}

/// How long a server may take for an answer while an export is agreed on.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(30);

/// A live connection.
#[derive(Debug)]
struct Connection {
    writer: Mutex<Socket>,
    reader: Mutex<BufReader<Socket>>,
    board: Mutex<Board>,
    changed: Condvar,
    structured: bool,
    extended: bool,
    allocation: bool,
    size: u64,
    flags: u16,
    max: u32,
}

/// An export of an NBD server.
#[derive(Debug)]
pub struct NbdStorage {
    address: NbdAddress,
    connection: RwLock<Arc<Connection>>,
    read_only: bool,
    no_flush: bool,
    writethrough: bool,
}

/// An option's next reply: kind and data.
pub(super) fn option_reply(reader: &mut impl Read, option: u32) -> Result<(u32, Vec<u8>)> {
    if take_u64(reader)? != OPTION_REPLY_MAGIC || take_u32(reader)? != option {
        return Err(Error::invalid("NBD server answers another option"));
    }
    let (kind, len) = (take_u32(reader)?, take_u32(reader)?);
    Ok((kind, take_vec(reader, len, 1 << 20)?))
}

/// The server's greeting, and the answer to it.
pub(super) fn greet(socket: &mut Socket, address: &NbdAddress) -> Result<()> {
    if take_u64(socket)? != INIT_MAGIC {
        return Err(Error::invalid(format!("'{address}' is not an NBD server")));
    }
    if take_u64(socket)? != OPTION_MAGIC {
        return Err(Error::unsupported(format!(
            "'{address}' speaks the oldstyle NBD protocol, which is obsolete"
        )));
    }
    let flags = take_u16(socket)?;
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(Error::unsupported(format!("'{address}' speaks an obsolete NBD protocol")));
    }
    let answer = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes();
    socket.write_all(&answer).map_err(|e| Error::io("NBD connection", e))
}

/// Asks for TLS; what follows on the socket is its handshake.
pub(super) fn start_tls(socket: &mut Socket, address: &NbdAddress) -> Result<()> {
    let mut out = OPTION_MAGIC.to_be_bytes().to_vec();
    out.extend(OPT_STARTTLS.to_be_bytes());
    out.extend([0; 4]);
    socket.write_all(&out).map_err(|e| Error::io("NBD connection", e))?;
    match option_reply(socket, OPT_STARTTLS)? {
        (REP_ACK, _) => Ok(()),
        _ => Err(Error::unsupported(format!(
            "'{address}' offers no TLS; start the server with TLS credentials, or connect without"
        ))),
    }
}

impl Connection {
    fn open(address: &NbdAddress) -> Result<Self> {
        let failed = |e: std::io::Error| Error::io(format!("Failed to connect to '{address}'"), e);
        let mut socket = address.connect().map_err(failed)?;
        socket.set_nodelay();
        socket.set_read_timeout(Some(HANDSHAKE));
        greet(&mut socket, address)?;
        if let Some(tls) = &address.tls {
            start_tls(&mut socket, address)?;
            socket = tls.connect(socket, &address.host)?;
        }
        let mut reader = BufReader::with_capacity(1 << 16, socket.try_clone().map_err(failed)?);
        let mut connection = Connection {
            writer: Mutex::new(socket),
            reader: Mutex::new(BufReader::new(reader.get_ref().try_clone().map_err(failed)?)),
            board: Mutex::default(),
            changed: Condvar::new(),
            structured: false,
            extended: false,
            allocation: false,
            size: 0,
            flags: 0,
            max: MAX_PAYLOAD,
        };
        connection.negotiate(&mut reader, address)?;
        reader.get_ref().set_read_timeout(None);
        connection.reader = Mutex::new(reader);
        Ok(connection)
    }

    fn send(&self, bytes: &[u8], payload: &[u8]) -> Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(|e| e.into_inner());
        writer.write_all_vectored(bytes, payload).map_err(|e| Error::io("NBD connection", e))
    }

    fn option(&self, option: u32, data: &[u8]) -> Result<()> {
        let mut out = OPTION_MAGIC.to_be_bytes().to_vec();
        out.extend(option.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        self.send(&out, data)
    }

    fn negotiate(&mut self, reader: &mut BufReader<Socket>, address: &NbdAddress) -> Result<()> {
        self.option(OPT_EXTENDED_HEADERS, &[])?;
        self.extended = option_reply(reader, OPT_EXTENDED_HEADERS)?.0 == REP_ACK;
        if self.extended {
            self.structured = true;
        } else {
            self.option(OPT_STRUCTURED_REPLY, &[])?;
            self.structured = option_reply(reader, OPT_STRUCTURED_REPLY)?.0 == REP_ACK;
        }
        let mut name = (address.export.len() as u32).to_be_bytes().to_vec();
        name.extend(address.export.as_bytes());
        if address.export.len() as u32 > MAX_STRING {
            return Err(Error::usage("The export's name is too long"));
        }
        if self.structured {
            let mut query = name.clone();
            query.extend(1u32.to_be_bytes());
            query.extend(15u32.to_be_bytes());
            query.extend(b"base:allocation");
            self.option(OPT_SET_META_CONTEXT, &query)?;
            while option_reply(reader, OPT_SET_META_CONTEXT)?.0 == REP_META_CONTEXT {
                self.allocation = true;
            }
        }
        let mut go = name;
        go.extend(1u16.to_be_bytes());
        go.extend(INFO_BLOCK_SIZE.to_be_bytes());
        self.option(OPT_GO, &go)?;
        loop {
            let (kind, data) = option_reply(reader, OPT_GO)?;
            match kind {
                REP_ACK => break,
                REP_INFO => self.note_info(&data)?,
                REP_ERR_TLS_REQD => {
                    return Err(Error::unsupported(format!(
                        "'{address}' demands TLS; give tls-creds, or use an nbds:// name"
                    )));
                }
                REP_ERR_UNKNOWN => {
                    return Err(Error::NotFound(format!("export '{}' not present", address.export)));
                }
                _ => {
                    let text = String::from_utf8_lossy(&data).into_owned();
                    return Err(Error::unsupported(format!(
                        "NBD server refuses export '{}': {text}",
                        address.export
                    )));
                }
            }
        }
        if self.flags & HAS_FLAGS == 0 {
            return Err(Error::invalid("NBD server does not describe the export"));
        }
        Ok(())
    }

    fn note_info(&mut self, data: &[u8]) -> Result<()> {
        let mut at = data;
        match take_u16(&mut at)? {
            INFO_EXPORT => {
                self.size = take_u64(&mut at)?;
                self.flags = take_u16(&mut at)?;
                if self.size > i64::MAX as u64 {
                    return Err(Error::invalid("NBD export is too large"));
                }
            }
            INFO_BLOCK_SIZE => {
                let (minimum, _, maximum) = (take_u32(&mut at)?, take_u32(&mut at)?, take_u32(&mut at)?);
                if !minimum.is_power_of_two() || minimum > 65536 || maximum < minimum {
                    return Err(Error::invalid("NBD server gives invalid block sizes"));
                }
                self.max = maximum.min(MAX_PAYLOAD) / minimum * minimum;
            }
            _ => {}
        }
        Ok(())
    }

    fn request(&self, command: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> Result<Reply> {
        let cookie = {
            let mut board = self.board.lock().unwrap_or_else(|e| e.into_inner());
            if let Some(why) = &board.dead {
                return Err(lost(why));
            }
            let cookie = board.next;
            board.next += 1;
            let reads = command == CMD_READ;
            board.pending.insert(cookie, Pending { reply: Reply::default(), offset, len, reads });
            cookie
        };
        let magic = if self.extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let mut head = magic.to_be_bytes().to_vec();
        let payload_flag = if self.extended && command == CMD_WRITE { FLAG_PAYLOAD_LEN } else { 0 };
        head.extend((flags | payload_flag).to_be_bytes());
        head.extend(command.to_be_bytes());
        head.extend(cookie.to_be_bytes());
        head.extend(offset.to_be_bytes());
        if self.extended {
            head.extend(len.to_be_bytes());
        } else {
            head.extend((len as u32).to_be_bytes());
        }
        if let Err(e) = self.send(&head, payload) {
            self.die(&e.to_string());
            return Err(lost(&e.to_string()));
        }
        self.wait(cookie)
    }

    fn wait(&self, cookie: u64) -> Result<Reply> {
        let mut board = self.board.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            if board.pending.get(&cookie).is_some_and(|p| p.reply.done) {
                let done = board.pending.remove(&cookie);
                drop(board);
                self.changed.notify_all();
                let reply = done.map(|p| p.reply).unwrap_or_default();
                if reply.error != 0 {
                    let source = std::io::Error::from_raw_os_error(reply.error as i32);
                    let what = if reply.message.is_empty() { "NBD server".into() } else { reply.message };
                    return Err(Error::io(what, source));
                }
                return Ok(reply);
            }
            if let Some(why) = &board.dead {
                return Err(lost(why));
            }
            if board.reading {
                board = self.changed.wait(board).unwrap_or_else(|e| e.into_inner());
                continue;
            }
            board.reading = true;
            drop(board);
            let result = self.read_reply();
            board = self.board.lock().unwrap_or_else(|e| e.into_inner());
            board.reading = false;
            if let Err(e) = result {
                board.dead.get_or_insert(e.to_string());
            }
            self.changed.notify_all();
        }
    }

    fn die(&self, why: &str) {
        let mut board = self.board.lock().unwrap_or_else(|e| e.into_inner());
        board.dead.get_or_insert(why.to_owned());
        board.pending.clear();
        drop(board);
        self.writer.lock().unwrap_or_else(|e| e.into_inner()).shutdown();
        self.changed.notify_all();
    }

    /// Reads one reply or chunk of a reply and notes it down.
    fn read_reply(&self) -> Result<()> {
        let mut reader = self.reader.lock().unwrap_or_else(|e| e.into_inner());
        let reader = &mut *reader;
        let unknown = || Error::invalid("NBD server answers a request that was not made");
        let edit = |cookie: u64, f: &mut dyn FnMut(&mut Pending)| -> Result<()> {
            let mut board = self.board.lock().unwrap_or_else(|e| e.into_inner());
            board.pending.get_mut(&cookie).map(f).ok_or_else(unknown)
        };
        let range = |cookie: u64| -> Result<(u64, u64, bool)> {
            let board = self.board.lock().unwrap_or_else(|e| e.into_inner());
            board.pending.get(&cookie).map(|p| (p.offset, p.len, p.reads)).ok_or_else(unknown)
        };
        match take_u32(reader)? {
            SIMPLE_REPLY_MAGIC if !self.extended => {
                let (error, cookie) = (take_u32(reader)?, take_u64(reader)?);
                let (_, len, reads) = range(cookie)?;
                if reads && self.structured {
                    return Err(Error::invalid("NBD server answers a read without structure"));
                }
                let mut data =
                    if reads && error == 0 { take_vec(reader, len as u32, MAX_PAYLOAD)? } else { Vec::new() };
                edit(cookie, &mut |p| {
                    p.reply.error = error;
                    p.reply.data.push((0, std::mem::take(&mut data)));
                    p.reply.done = true;
                })
            }
            magic
                if self.structured
                    && magic == if self.extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC } =>
            {
                let (flags, kind, cookie) = (take_u16(reader)?, take_u16(reader)?, take_u64(reader)?);
                let len = if self.extended {
                    take_u64(reader)?; // the request's offset again
                    u32::try_from(take_u64(reader)?)
                        .map_err(|_| Error::invalid("NBD server sends too large a chunk"))?
                } else {
                    take_u32(reader)?
                };
                let (start, want, reads) = range(cookie)?;
                let body = take_vec(reader, len, MAX_PAYLOAD + 64)?;
                let mut at = &body[..];
                let inside = |offset: u64, n: u64| {
                    offset
                        .checked_sub(start)
                        .filter(|&o| reads && o.saturating_add(n) <= want)
                        .ok_or_else(|| Error::invalid("NBD server sends data that was not asked for"))
                };
                let (mut part, mut status, mut error) = (None, Vec::new(), (0, String::new()));
                match kind {
                    CHUNK_NONE => {}
                    CHUNK_DATA => {
                        let offset = take_u64(&mut at)?;
                        part = Some((inside(offset, at.len() as u64)?, at.to_vec()));
                    }
                    CHUNK_HOLE => {
                        let (offset, n) = (take_u64(&mut at)?, take_u32(&mut at)?);
                        part = Some((inside(offset, u64::from(n))?, vec![0; n as usize]));
                    }
                    CHUNK_BLOCK_STATUS => {
                        take_u32(&mut at)?;
                        while at.len() >= 8 {
                            status.push((take_u32(&mut at)?.into(), take_u32(&mut at)?.into()));
                        }
                    }
                    CHUNK_BLOCK_STATUS_EXT => {
                        take_u64(&mut at)?; // context, and how many follow
                        while at.len() >= 16 {
                            status.push((take_u64(&mut at)?, take_u64(&mut at)?));
                        }
                    }
                    kind if kind & 1 << 15 != 0 => {
                        let (number, n) = (take_u32(&mut at)?, take_u16(&mut at)?);
                        let text = at.get(..usize::from(n)).unwrap_or_default();
                        error = (number.max(1), String::from_utf8_lossy(text).into_owned());
                    }
                    other => {
                        return Err(Error::invalid(format!("NBD server sends an unknown chunk {other}")));
                    }
                }
                edit(cookie, &mut |p| {
                    p.reply.data.extend(part.take());
                    p.reply.status.append(&mut status);
                    if error.0 != 0 {
                        (p.reply.error, p.reply.message) = std::mem::take(&mut error);
                    }
                    p.reply.done |= flags & CHUNK_DONE != 0;
                })
            }
            _ => Err(Error::invalid("NBD server sends no reply")),
        }
    }
}

/// The connection is gone: a request may succeed on a new one.
fn lost(why: &str) -> Error {
    Error::io(format!("NBD connection lost ({why})"), std::io::Error::from_raw_os_error(libc::ECONNRESET))
}

impl Drop for Connection {
    fn drop(&mut self) {
        let magic = if self.extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let mut head = magic.to_be_bytes().to_vec();
        head.extend(0u16.to_be_bytes());
        head.extend(CMD_DISC.to_be_bytes());
        head.resize(if self.extended { 32 } else { 28 }, 0);
        // A courtesy; the server sees the end of the connection anyway.
        if let Ok(writer) = self.writer.get_mut() {
            let _ = writer.write_all(&head);
        }
    }
}

impl NbdStorage {
    /// Connects to an export; where the server is not there yet, tries for as long as the address says.
    pub fn open(address: &NbdAddress, options: &StorageOptions) -> Result<Self> {
        let give_up = Instant::now() + address.open_timeout;
        let connection = loop {
            match Connection::open(address) {
                Err(Error::Io { .. }) if Instant::now() < give_up => {
                    std::thread::sleep(Duration::from_millis(100));
                }
                other => break other?,
            }
        };
        if connection.flags & READ_ONLY != 0 && !options.read_only {
            return Err(Error::io(
                format!("'{address}': request for write access denied"),
                std::io::Error::from_raw_os_error(libc::EACCES),
            ));
        }
        Ok(NbdStorage {
            address: address.clone(),
            connection: RwLock::new(Arc::new(connection)),
            read_only: options.read_only,
            no_flush: options.cache.no_flush,
            writethrough: options.cache.writethrough,
        })
    }

    fn connection(&self) -> Arc<Connection> {
        Arc::clone(&self.connection.read().unwrap_or_else(|e| e.into_inner()))
    }

    /// Makes a request; when the connection is lost, connects anew and makes it again (every request may be repeated), for as
    /// long as the address says.
    fn request(&self, command: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> Result<Reply> {
        let mut give_up = None;
        let mut pause = Duration::from_millis(20);
        loop {
            let connection = self.connection();
            let error = match connection.request(command, flags, offset, len, payload) {
                Err(e) if e.errno() == libc::ECONNRESET => e,
                other => return other,
            };
            let end = *give_up.get_or_insert_with(|| Instant::now() + self.address.reconnect_delay);
            if Instant::now() >= end {
                return Err(error);
            }
            let mut slot = self.connection.write().unwrap_or_else(|e| e.into_inner());
            // Another thread may have connected already.
            if !Arc::ptr_eq(&slot, &connection) {
                continue;
            }
            match Connection::open(&self.address) {
                Ok(new) if new.size == connection.size => *slot = Arc::new(new),
                Ok(_) => {
                    return Err(Error::invalid(format!("NBD export '{}' changed its size", self.address)));
                }
                Err(_) => {
                    drop(slot);
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
            }
        }
    }

    /// Calls `f` for pieces of a range that one request may carry.
    fn each(&self, offset: u64, len: u64, f: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
        self.in_steps(offset, len, u64::from(self.connection().max.max(512)), f)
    }

    /// The same for requests without payload, which extended headers let be as long as the disk.
    fn each_bare(&self, offset: u64, len: u64, f: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
        let connection = self.connection();
        let step = if connection.extended { 1 << 40 } else { u64::from(connection.max.max(512)) };
        self.in_steps(offset, len, step, f)
    }

    fn in_steps(
        &self,
        offset: u64,
        len: u64,
        step: u64,
        mut f: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let mut at = offset;
        while at < offset + len {
            let n = (offset + len - at).min(step);
            f(at, n)?;
            at += n;
        }
        Ok(())
    }

    fn write_flags(&self) -> u16 {
        if self.writethrough && self.connection().flags & SEND_FUA != 0 { FLAG_FUA } else { 0 }
    }

    fn writable(&self) -> Result<()> {
        if self.read_only { Err(Error::ReadOnly(self.name())) } else { Ok(()) }
    }
}

impl Storage for NbdStorage {
    fn size(&self) -> Result<u64> {
        Ok(self.connection().size)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let inside = self.size()?.saturating_sub(offset).min(buf.len() as u64) as usize;
        buf[inside..].fill(0);
        let buf = &mut buf[..inside];
        self.each(offset, inside as u64, |at, n| {
            let piece = &mut buf[(at - offset) as usize..][..n as usize];
            let reply = self.request(CMD_READ, 0, at, n, &[])?;
            let mut got = 0;
            for (start, data) in &reply.data {
                piece[*start as usize..*start as usize + data.len()].copy_from_slice(data);
                got += data.len();
            }
            if got == n as usize { Ok(()) } else { Err(Error::invalid("NBD server sends too little data")) }
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.writable()?;
        let flags = self.write_flags();
        self.each(offset, buf.len() as u64, |at, n| {
            let piece = &buf[(at - offset) as usize..][..n as usize];
            self.request(CMD_WRITE, flags, at, n, piece).map(drop)
        })
    }

    fn flush(&self) -> Result<()> {
        if self.no_flush || self.read_only || self.connection().flags & SEND_FLUSH == 0 {
            return Ok(());
        }
        self.request(CMD_FLUSH, 0, 0, 0, &[]).map(drop)
    }

    fn set_size(&self, size: u64) -> Result<()> {
        if size <= self.size()? {
            return Ok(());
        }
        Err(Error::unsupported(format!("NBD export '{}' cannot grow", self.address)))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.writable()?;
        if self.connection().flags & SEND_TRIM == 0 {
            return Ok(());
        }
        self.each_bare(offset, len, |at, n| self.request(CMD_TRIM, 0, at, n, &[]).map(drop))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<Zeroing> {
        self.writable()?;
        if self.connection().flags & SEND_WRITE_ZEROES == 0 {
            return Ok(Zeroing::Unsupported);
        }
        let flags = self.write_flags() | if flags.unmap { 0 } else { FLAG_NO_HOLE };
        self.each_bare(offset, len, |at, n| self.request(CMD_WRITE_ZEROES, flags, at, n, &[]).map(drop))?;
        Ok(Zeroing::Done)
    }

    fn allocate(&self, _offset: u64, _len: u64) -> Result<Zeroing> {
        Ok(Zeroing::Unsupported)
    }

    fn held(&self, offset: u64, len: u64) -> Result<(Held, u64)> {
        let size = self.size()?;
        if offset >= size {
            return Ok((Held::Hole, len));
        }
        let len = len.min(size - offset);
        if !self.connection().allocation {
            return Ok((Held::Data, len));
        }
        let n = if self.connection().extended { len } else { len.min(1 << 30) };
        let reply = self.request(CMD_BLOCK_STATUS, 0, offset, n, &[])?;
        let kind = |state: u64| if state & u64::from(STATE_ZERO) != 0 { Held::Hole } else { Held::Data };
        let Some(&(first, state)) = reply.status.first() else { return Ok((Held::Data, len)) };
        let mut sum = first;
        for &(more, next) in &reply.status[1..] {
            if kind(next) != kind(state) {
                break;
            }
            sum = sum.saturating_add(more);
        }
        Ok((kind(state), sum.clamp(1, len)))
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn set_read_only(&self, read_only: bool) -> Result<()> {
        if read_only == self.read_only { Ok(()) } else { Err(Error::ReadOnly(self.name())) }
    }

    fn name(&self) -> String {
        self.address.to_string()
    }

    fn protocol(&self) -> &'static str {
        "nbd"
    }

    fn grows_with_zeros(&self) -> bool {
        false
    }
}
