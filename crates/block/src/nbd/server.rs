//! Serving images.
//!
//! Each connection has a few threads that take turns: one reads the next request and lets the next thread read on while it
//! carries its request out and answers. So requests of one client run side by side without being handed between threads.

use super::{proto::*, socket::Socket, tls::TlsServer};
use crate::{Error, Image, MapEntry, Result};
use std::{
    io::{BufReader, Write},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// Threads of a connection.
const THREADS: usize = 4;
/// Most extents of a block status reply.
const MAX_EXTENTS: usize = 8192;

/// An image that clients can open.
#[derive(Debug)]
pub struct Export {
    /// The image.
    pub image: Arc<Image>,
    /// Its name for clients.
    pub name: String,
    /// Text shown in lists.
    pub description: String,
    /// Refuse writes.
    pub read_only: bool,
    /// Several clients may write, and each flush covers all of them.
    pub multi_conn: bool,
    /// Offer `qemu:allocation-depth`.
    pub allocation_depth: bool,
    /// Dirty bitmaps offered as `qemu:dirty-bitmap:NAME`: name, bytes per bit, bits.
    pub bitmaps: Vec<(String, u64, Vec<u8>)>,
}

/// Serves exports to any number of connections.
#[derive(Debug)]
pub struct Server {
    exports: Vec<Export>,
    tls: Option<TlsServer>,
    /// How long a client may take to agree on an export.
    limit: Option<Duration>,
}

/// A metadata context chosen by a client.
#[derive(Clone, PartialEq, Eq, Debug)]
enum MetaContext {
    Allocation,
    Depth,
    Bitmap(usize),
}

/// What was agreed with a client.
#[derive(Default)]
struct Session {
    structured: bool,
    /// Headers with 64-bit lengths.
    extended: bool,
    no_zeroes: bool,
    contexts: Vec<MetaContext>,
    /// The export the contexts are for.
    contexts_of: String,
}

struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    len: u64,
    payload: Vec<u8>,
}

/// How negotiation ends.
enum Agreed<'a> {
    /// Requests follow.
    Export(&'a Export),
    /// The client leaves.
    Nothing,
    /// A TLS handshake follows, and then more options.
    Tls,
}

impl Server {
    /// A server of these exports. The first is also found under the empty name, if there is only one.
    pub fn new(exports: Vec<Export>) -> Self {
        Server { exports, tls: None, limit: None }
    }

    /// Talks to clients over TLS only.
    pub fn with_tls(mut self, tls: TlsServer) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Turns away clients that take longer than this to agree on an export.
    pub fn handshake_limit(&mut self, limit: Option<Duration>) {
        self.limit = limit;
    }

    /// Talks to a client until it leaves. Errors of the connection are returned; those of requests go to the client.
    pub fn serve(&self, mut socket: Socket) -> Result<()> {
        socket.set_nodelay();
        let failed = |e| Error::io("NBD connection", e);
        let alarm = self.limit.map(|limit| Alarm::set(&socket, limit)).transpose().map_err(failed)?;
        let mut hello = INIT_MAGIC.to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        socket.write_all(&hello).map_err(failed)?;
        let mut secure = false;
        let flags = take_u32(&mut socket)?;
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(Error::invalid(format!("NBD client sets unknown flags {flags:#x}")));
        }
        loop {
            let mut session = Session { no_zeroes: flags & u32::from(NO_ZEROES) != 0, ..Session::default() };
            let mut reader = BufReader::with_capacity(1 << 16, socket.try_clone().map_err(failed)?);
            match (self.negotiate(&mut reader, &mut socket, &mut session, secure)?, &self.tls) {
                (Agreed::Export(export), _) => {
                    drop(alarm);
                    return self.transmit(export, &session, reader, socket);
                }
                (Agreed::Tls, Some(tls)) => {
                    // Options sent in the clear on top of the request for TLS could be anybody's.
                    if !reader.buffer().is_empty() {
                        return Err(Error::invalid("NBD client sends options before its TLS handshake"));
                    }
                    socket = tls.accept(socket)?;
                    secure = true;
                }
                _ => return Ok(()),
            }
        }
    }

    /// Size in bytes and transmission flags of the first export.
    pub fn first_export(&self) -> Option<(u64, u16)> {
        self.exports.first().map(|e| (e.image.size(), e.flags(false)))
    }

    /// Carries out requests for the first export with a client that has agreed on everything by other means: the kernel's.
    pub fn serve_agreed(&self, socket: Socket) -> Result<()> {
        let export = self.exports.first().ok_or_else(|| Error::usage("there is nothing to export"))?;
        let copy = socket.try_clone().map_err(|e| Error::io("NBD connection", e))?;
        self.transmit(export, &Session::default(), BufReader::with_capacity(1 << 16, copy), socket)
    }

    fn find(&self, name: &str) -> Option<&Export> {
        self.exports.iter().find(|e| e.name == name).or_else(|| {
            // Clients that name nothing get the only export there is.
            self.exports.first().filter(|_| name.is_empty() && self.exports.len() == 1)
        })
    }

    fn negotiate(
        &self,
        reader: &mut BufReader<Socket>,
        writer: &mut Socket,
        session: &mut Session,
        secure: bool,
    ) -> Result<Agreed<'_>> {
        let failed = |e| Error::io("NBD connection", e);
        let demand_tls = self.tls.is_some() && !secure;
        loop {
            if take_u64(reader)? != OPTION_MAGIC {
                return Err(Error::invalid("NBD client sends no option"));
            }
            let (option, len) = (take_u32(reader)?, take_u32(reader)?);
            let data = take_vec(reader, len, 1 << 20)?;
            let mut reply = |kind: u32, data: &[u8]| -> Result<()> {
                let mut out = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
                out.extend(option.to_be_bytes());
                out.extend(kind.to_be_bytes());
                out.extend((data.len() as u32).to_be_bytes());
                out.extend(data);
                writer.write_all(&out).map_err(failed)
            };
            match option {
                OPT_STARTTLS if demand_tls && data.is_empty() => {
                    reply(REP_ACK, &[])?;
                    return Ok(Agreed::Tls);
                }
                OPT_STARTTLS if self.tls.is_some() => reply(REP_ERR_INVALID, b"TLS is already in use")?,
                // This option has no reply that could say so.
                OPT_EXPORT_NAME if demand_tls => return Ok(Agreed::Nothing),
                _ if demand_tls && option != OPT_ABORT => {
                    reply(REP_ERR_TLS_REQD, b"this server speaks only over TLS")?;
                }
                OPT_EXPORT_NAME => {
                    let Some(export) = self.find(&String::from_utf8_lossy(&data)) else {
                        return Ok(Agreed::Nothing);
                    };
                    let mut out = export.image.size().to_be_bytes().to_vec();
                    out.extend(export.flags(session.structured).to_be_bytes());
                    if !session.no_zeroes {
                        out.extend([0; 124]);
                    }
                    writer.write_all(&out).map_err(failed)?;
                    return Ok(Agreed::Export(export));
                }
                OPT_ABORT => {
                    reply(REP_ACK, &[])?;
                    return Ok(Agreed::Nothing);
                }
                OPT_LIST if data.is_empty() => {
                    for e in &self.exports {
                        let mut out = (e.name.len() as u32).to_be_bytes().to_vec();
                        out.extend(e.name.as_bytes());
                        out.extend(e.description.as_bytes());
                        reply(REP_SERVER, &out)?;
                    }
                    reply(REP_ACK, &[])?;
                }
                OPT_EXTENDED_HEADERS if data.is_empty() && !session.extended => {
                    session.extended = true;
                    session.structured = true;
                    reply(REP_ACK, &[])?;
                }
                OPT_STRUCTURED_REPLY if session.extended => {
                    reply(REP_ERR_EXT_HEADER_REQD, b"extended headers already negotiated")?;
                }
                OPT_STRUCTURED_REPLY if data.is_empty() => {
                    session.structured = true;
                    reply(REP_ACK, &[])?;
                }
                OPT_INFO | OPT_GO => {
                    let Some(name) = info_name(&data) else {
                        reply(REP_ERR_INVALID, b"malformed option")?;
                        continue;
                    };
                    let Some(export) = self.find(&name) else {
                        reply(REP_ERR_UNKNOWN, format!("export '{name}' not present").as_bytes())?;
                        continue;
                    };
                    for info in export.infos(session.structured) {
                        reply(REP_INFO, &info)?;
                    }
                    reply(REP_ACK, &[])?;
                    if option == OPT_GO {
                        if session.contexts_of != name {
                            session.contexts.clear();
                        }
                        return Ok(Agreed::Export(export));
                    }
                }
                OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => {
                    let set = option == OPT_SET_META_CONTEXT;
                    let Some((name, queries)) = context_queries(&data).filter(|_| session.structured) else {
                        reply(REP_ERR_INVALID, b"malformed option, or structured replies not agreed on")?;
                        continue;
                    };
                    let Some(export) = self.find(&name) else {
                        reply(REP_ERR_UNKNOWN, format!("export '{name}' not present").as_bytes())?;
                        continue;
                    };
                    let found = export.match_contexts(&queries, set);
                    for (id, text) in &found.iter().map(|c| (c, export.context_name(c))).collect::<Vec<_>>() {
                        let at = found.iter().position(|c| c == *id).unwrap_or(0) as u32;
                        let mut out = if set { at + 1 } else { 0 }.to_be_bytes().to_vec();
                        out.extend(text.as_bytes());
                        reply(REP_META_CONTEXT, &out)?;
                    }
                    reply(REP_ACK, &[])?;
                    if set {
                        session.contexts = found;
                        session.contexts_of = name;
                    }
                }
                OPT_STARTTLS => reply(REP_ERR_UNSUP, b"TLS is not configured")?,
                _ => reply(REP_ERR_UNSUP, b"unsupported option")?,
            }
        }
    }

    fn transmit(
        &self,
        export: &Export,
        session: &Session,
        reader: BufReader<Socket>,
        writer: Socket,
    ) -> Result<()> {
        let reader = Mutex::new(reader);
        let closer = writer.try_clone().map_err(|e| Error::io("NBD connection", e))?;
        let writer = Mutex::new(writer);
        let (over, error) = (AtomicBool::new(false), Mutex::new(None));
        let work = || {
            let mut buf = Vec::new();
            loop {
                let request = {
                    let mut reader = reader.lock().unwrap_or_else(|e| e.into_inner());
                    if over.load(Ordering::Acquire) {
                        return;
                    }
                    match read_request(&mut reader, session.extended) {
                        Ok(Some(request)) => request,
                        Ok(None) => {
                            over.store(true, Ordering::Release);
                            return;
                        }
                        Err(e) => {
                            // A client that just goes away ends the session like one that says goodbye.
                            over.store(true, Ordering::Release);
                            error.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(e);
                            return;
                        }
                    }
                };
                if let Err(e) = export.answer(session, &request, &writer, &mut buf) {
                    over.store(true, Ordering::Release);
                    closer.shutdown();
                    error.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(e);
                    return;
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..THREADS {
                scope.spawn(work);
            }
            work();
        });
        if !export.read_only {
            export.image.flush()?;
        }
        match error.into_inner().unwrap_or_else(|e| e.into_inner()) {
            Some(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::UnexpectedEof => Ok(()),
            Some(e) => Err(e),
            None => Ok(()),
        }
    }
}

/// Ends a connection after a while, unless dropped before.
struct Alarm(Arc<(Mutex<bool>, Condvar)>);

impl Alarm {
    fn set(socket: &Socket, after: Duration) -> std::io::Result<Self> {
        let state = Arc::new((Mutex::new(false), Condvar::new()));
        let (watched, socket) = (Arc::clone(&state), socket.try_clone()?);
        std::thread::spawn(move || {
            let off = watched.0.lock().unwrap_or_else(|e| e.into_inner());
            let waited = watched.1.wait_timeout_while(off, after, |off| !*off);
            if !*waited.unwrap_or_else(|e| e.into_inner()).0 {
                socket.shutdown();
            }
        });
        Ok(Alarm(state))
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap_or_else(|e| e.into_inner()) = true;
        self.0.1.notify_all();
    }
}

/// The export name of an `INFO` or `GO` option.
fn info_name(data: &[u8]) -> Option<String> {
    let len = u32::from_be_bytes(data.get(..4)?.try_into().ok()?) as usize;
    Some(String::from_utf8_lossy(data.get(4..4usize.checked_add(len)?)?).into_owned())
}

/// Export name and queries of a metadata context option.
fn context_queries(data: &[u8]) -> Option<(String, Vec<String>)> {
    let name = info_name(data)?;
    let word =
        |at: usize| Some(u32::from_be_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?) as usize);
    let mut at = 4 + word(0)?;
    let count = word(at)?;
    at += 4;
    let mut queries = Vec::new();
    for _ in 0..count.min(data.len()) {
        let len = word(at)?;
        at += 4;
        queries.push(String::from_utf8_lossy(data.get(at..at.checked_add(len)?)?).into_owned());
        at += len;
    }
    Some((name, queries))
}

/// The next request; `None` when the client says goodbye.
fn read_request(reader: &mut BufReader<Socket>, extended: bool) -> Result<Option<Request>> {
    if take_u32(reader)? != if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC } {
        return Err(Error::invalid("NBD client sends no request"));
    }
    let (mut flags, command) = (take_u16(reader)?, take_u16(reader)?);
    let (cookie, offset) = (take_u64(reader)?, take_u64(reader)?);
    let len = if extended { take_u64(reader)? } else { u64::from(take_u32(reader)?) };
    if command == CMD_DISC {
        return Ok(None);
    }
    // With extended headers a flag says whether the length is that of a payload; not every client sets it on writes.
    let carries = command == CMD_WRITE || extended && flags & FLAG_PAYLOAD_LEN != 0;
    let mut payload = Vec::new();
    if carries {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        payload = take_vec(reader, len, MAX_PAYLOAD)?;
    }
    if command == CMD_WRITE {
        flags &= !FLAG_PAYLOAD_LEN;
    }
    Ok(Some(Request { flags, command, cookie, offset, len, payload }))
}

/// The header of a chunk of a reply.
fn push_chunk(head: &mut Vec<u8>, session: &Session, r: &Request, flags: u16, kind: u16, len: usize) {
    head.extend(if session.extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC }.to_be_bytes());
    head.extend(flags.to_be_bytes());
    head.extend(kind.to_be_bytes());
    head.extend(r.cookie.to_be_bytes());
    if session.extended {
        head.extend(r.offset.to_be_bytes());
        head.extend((len as u64).to_be_bytes());
    } else {
        head.extend((len as u32).to_be_bytes());
    }
}

impl Export {
    fn flags(&self, structured: bool) -> u16 {
        let mut flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_CACHE;
        if self.read_only {
            flags |= READ_ONLY;
        } else {
            flags |= SEND_TRIM | SEND_WRITE_ZEROES;
        }
        if self.multi_conn || self.read_only {
            flags |= CAN_MULTI_CONN;
        }
        if structured {
            flags |= SEND_DF;
        }
        flags
    }

    fn infos(&self, structured: bool) -> Vec<Vec<u8>> {
        let mut export = INFO_EXPORT.to_be_bytes().to_vec();
        export.extend(self.image.size().to_be_bytes());
        export.extend(self.flags(structured).to_be_bytes());
        let mut name = INFO_NAME.to_be_bytes().to_vec();
        name.extend(self.name.as_bytes());
        let mut sizes = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [1, 4096, MAX_PAYLOAD] {
            sizes.extend(size.to_be_bytes());
        }
        let mut out = vec![name, sizes, export];
        if !self.description.is_empty() {
            let mut text = INFO_DESCRIPTION.to_be_bytes().to_vec();
            text.extend(self.description.as_bytes());
            out.push(text);
        }
        out
    }

    fn context_name(&self, context: &MetaContext) -> String {
        match context {
            MetaContext::Allocation => "base:allocation".into(),
            MetaContext::Depth => "qemu:allocation-depth".into(),
            MetaContext::Bitmap(i) => {
                format!("qemu:dirty-bitmap:{}", self.bitmaps.get(*i).map_or("", |b| b.0.as_str()))
            }
        }
    }

    /// The contexts that queries ask for; a query that ends in a colon asks for all of a kind when listing.
    fn match_contexts(&self, queries: &[String], set: bool) -> Vec<MetaContext> {
        let mut all = vec![MetaContext::Allocation];
        if self.allocation_depth {
            all.push(MetaContext::Depth);
        }
        all.extend((0..self.bitmaps.len()).map(MetaContext::Bitmap));
        all.retain(|c| {
            let name = self.context_name(c);
            (queries.is_empty() && !set)
                || queries.iter().any(|q| *q == name || (!set && q.ends_with(':') && name.starts_with(q)))
        });
        all
    }

    fn answer(
        &self,
        session: &Session,
        r: &Request,
        writer: &Mutex<Socket>,
        buf: &mut Vec<u8>,
    ) -> Result<()> {
        let outcome = self.carry_out(session, r, buf);
        let failed = |e| Error::io("NBD connection", e);
        let mut head = Vec::with_capacity(64);
        let payload: &[u8] = match &outcome {
            Ok(Answer::Data) => buf,
            _ => &[],
        };
        let head = &mut head;
        let chunked = session.extended
            || session.structured && (r.command == CMD_READ || r.command == CMD_BLOCK_STATUS);
        if !chunked {
            head.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
            head.extend(outcome.as_ref().err().map_or(0, error_number).to_be_bytes());
            head.extend(r.cookie.to_be_bytes());
        } else {
            match &outcome {
                Ok(Answer::Data) => {
                    push_chunk(head, session, r, CHUNK_DONE, CHUNK_DATA, payload.len() + 8);
                    head.extend(r.offset.to_be_bytes());
                }
                Ok(Answer::Hole) => {
                    push_chunk(head, session, r, CHUNK_DONE, CHUNK_HOLE, 12);
                    head.extend(r.offset.to_be_bytes());
                    head.extend((r.len as u32).to_be_bytes());
                }
                Ok(Answer::Status(contexts)) => {
                    let last = contexts.len().saturating_sub(1);
                    for (i, (id, extents)) in contexts.iter().enumerate() {
                        let flags = if i == last { CHUNK_DONE } else { 0 };
                        if session.extended {
                            let len = 8 + extents.len() * 16;
                            push_chunk(head, session, r, flags, CHUNK_BLOCK_STATUS_EXT, len);
                            head.extend(id.to_be_bytes());
                            head.extend((extents.len() as u32).to_be_bytes());
                            for (len, state) in extents {
                                head.extend(len.to_be_bytes());
                                head.extend(u64::from(*state).to_be_bytes());
                            }
                        } else {
                            push_chunk(head, session, r, flags, CHUNK_BLOCK_STATUS, 4 + extents.len() * 8);
                            head.extend(id.to_be_bytes());
                            for (len, state) in extents {
                                head.extend((*len as u32).to_be_bytes());
                                head.extend(state.to_be_bytes());
                            }
                        }
                    }
                }
                Ok(Answer::Done) => push_chunk(head, session, r, CHUNK_DONE, CHUNK_NONE, 0),
                Err(e) => {
                    let mut text = e.to_string();
                    text.truncate(text.floor_char_boundary(1000));
                    push_chunk(head, session, r, CHUNK_DONE, CHUNK_ERROR, 6 + text.len());
                    head.extend(error_number(e).to_be_bytes());
                    head.extend((text.len() as u16).to_be_bytes());
                    head.extend(text.as_bytes());
                }
            }
        }
        writer.lock().unwrap_or_else(|e| e.into_inner()).write_all_vectored(head, payload).map_err(failed)
    }

    fn carry_out(&self, session: &Session, r: &Request, buf: &mut Vec<u8>) -> Result<Answer> {
        let writes = matches!(r.command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
        if writes && self.read_only {
            return Err(Error::ReadOnly(self.name.clone()));
        }
        if r.flags & FLAG_PAYLOAD_LEN != 0 {
            return Err(Error::usage("only writes take a payload"));
        }
        let (offset, len, size) = (r.offset, r.len, self.image.size());
        if r.command != CMD_FLUSH && offset.checked_add(len).is_none_or(|end| end > size) {
            let number = if writes { libc::ENOSPC } else { libc::EINVAL };
            return Err(Error::io("request past the end", std::io::Error::from_raw_os_error(number)));
        }
        let image = &self.image;
        match r.command {
            CMD_READ => {
                if len > u64::from(MAX_PAYLOAD) {
                    return Err(Error::usage("request too large"));
                }
                if session.structured && len >= 65536 && self.reads_as_zeros(offset, len)? {
                    return Ok(Answer::Hole);
                }
                buf.resize(r.len as usize, 0);
                image.read_at(buf, offset)?;
                return Ok(Answer::Data);
            }
            CMD_WRITE => image.write_at(&r.payload, offset)?,
            CMD_FLUSH => image.flush()?,
            CMD_TRIM => image.discard(offset, len)?,
            CMD_CACHE => {}
            CMD_WRITE_ZEROES => image.write_zeroes(offset, len, r.flags & FLAG_NO_HOLE == 0)?,
            CMD_BLOCK_STATUS if session.structured && !session.contexts.is_empty() && len > 0 => {
                return self.status(session, r).map(Answer::Status);
            }
            other => return Err(Error::usage(format!("NBD command {other} is not available"))),
        }
        if writes && r.flags & FLAG_FUA != 0 {
            image.flush()?;
        }
        Ok(Answer::Done)
    }

    /// Whether one look at the map tells that a range is zeros.
    fn reads_as_zeros(&self, offset: u64, len: u64) -> Result<bool> {
        let mut entries = Vec::new();
        self.image.map(offset, len, &mut entries)?;
        let end = entries.last().map_or(offset, |e| e.start + e.length);
        Ok(end == offset + len && entries.iter().all(|e| e.zero))
    }

    fn status(&self, session: &Session, r: &Request) -> Result<Vec<ContextStatus>> {
        // Without extended headers lengths have 32 bits, as the request's had.
        let end = r.offset + r.len;
        let one = r.flags & FLAG_REQ_ONE != 0;
        let mut out = Vec::new();
        for (i, context) in session.contexts.iter().enumerate() {
            let mut extents: Vec<(u64, u32)> = Vec::new();
            let mut push = |len: u64, state: u32| -> bool {
                let count = extents.len();
                match extents.last_mut() {
                    Some(last) if last.1 == state => last.0 += len,
                    Some(_) if one || count >= MAX_EXTENTS => return false,
                    _ => extents.push((len, state)),
                }
                true
            };
            match context {
                MetaContext::Bitmap(index) => {
                    if let Some((_, granularity, bits)) = self.bitmaps.get(*index) {
                        let mut at = r.offset;
                        while at < end {
                            let bit = at / granularity;
                            let next = ((bit + 1) * granularity).min(end);
                            let set = bits.get((bit / 8) as usize).is_some_and(|b| b >> (bit % 8) & 1 != 0);
                            if !push(next - at, u32::from(set)) {
                                break;
                            }
                            at = next;
                        }
                    }
                }
                MetaContext::Allocation | MetaContext::Depth => {
                    let state = |e: &MapEntry| match context {
                        MetaContext::Depth => {
                            if e.present {
                                e.depth + 1
                            } else {
                                0
                            }
                        }
                        _ => {
                            let hole = !e.data && (!e.present || e.offset.is_none());
                            (u32::from(hole) * STATE_HOLE) | (u32::from(e.zero) * STATE_ZERO)
                        }
                    };
                    let (mut at, mut entries) = (r.offset, Vec::new());
                    'all: while at < end {
                        entries.clear();
                        self.image.map(at, end - at, &mut entries)?;
                        for e in &entries {
                            if !push(e.length, state(e)) {
                                break 'all;
                            }
                            at = e.start + e.length;
                        }
                        if entries.is_empty() {
                            break;
                        }
                    }
                }
            }
            out.push((i as u32 + 1, extents));
        }
        Ok(out)
    }
}

/// A context's number, and lengths with their states.
type ContextStatus = (u32, Vec<(u64, u32)>);

/// What a request leads to.
enum Answer {
    Done,
    Data,
    Hole,
    Status(Vec<ContextStatus>),
}
