//! `qemu-io`: single reads, writes and other requests, for tests.

mod aio;

use crate::{args::Source, objects, overlay};
use aio::Aio;
use block::{
    CacheMode, Error, Image, MapEntry, OpenOptions, Options, Result, formats::Preallocation, queue::Engine,
};
use std::{
    collections::VecDeque,
    ffi::OsString,
    io::{BufRead, IsTerminal, Write},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

/// Largest request, as in QEMU.
const MAX_REQUEST: u64 = 2_147_483_136;

/// What the command line and `open` say about opening.
#[derive(Clone, Default)]
struct Choice {
    options: OpenOptions,
    source: Source,
    snapshot: bool,
}

struct Session {
    image: Option<Arc<Image>>,
    /// Requests in flight on it.
    aio: Option<Aio>,
    engine: Engine,
    source: Source,
    /// A verification failed, which is told already.
    failed: bool,
}

/// Words of a command line; quotes keep blanks together.
fn words(line: &str) -> Vec<String> {
    let mut out = Vec::new();
    let (mut word, mut quoted, mut any) = (String::new(), None, false);
    for c in line.chars() {
        match (quoted, c) {
            (Some(q), c) if c == q => quoted = None,
            (None, '"' | '\'') => {
                quoted = Some(c);
                any = true;
            }
            (None, c) if c.is_whitespace() => {
                if any || !word.is_empty() {
                    out.push(std::mem::take(&mut word));
                    any = false;
                }
            }
            (_, c) => word.push(c),
        }
    }
    if any || !word.is_empty() {
        out.push(word);
    }
    out
}

/// A command's flags, taken apart as getopt does.
struct Flags {
    set: Vec<(char, Option<String>)>,
    rest: Vec<String>,
}

impl Flags {
    /// `spec` lists flags; those followed by a colon take a value.
    fn parse(args: &[String], spec: &str) -> Result<Self> {
        let takes = |c: char| spec.find(c).map(|i| spec[i + c.len_utf8()..].starts_with(':'));
        let mut queue: VecDeque<&String> = args.iter().collect();
        let (mut set, mut rest) = (Vec::new(), Vec::new());
        while let Some(arg) = queue.pop_front() {
            let Some(flags) = arg.strip_prefix('-').filter(|f| !f.is_empty()) else {
                rest.push(arg.clone());
                continue;
            };
            for (i, c) in flags.char_indices() {
                match takes(c) {
                    Some(false) => set.push((c, None)),
                    Some(true) => {
                        let tail = &flags[i + c.len_utf8()..];
                        let value =
                            if tail.is_empty() { queue.pop_front().cloned() } else { Some(tail.to_owned()) };
                        let value = value
                            .ok_or_else(|| Error::usage(format!("option requires an argument -- '{c}'")))?;
                        set.push((c, Some(value)));
                        break;
                    }
                    None => return Err(Error::usage(format!("invalid option -- '{c}'"))),
                }
            }
        }
        Ok(Flags { set, rest })
    }

    fn has(&self, flag: char) -> bool {
        self.set.iter().any(|f| f.0 == flag)
    }

    fn value(&self, flag: char) -> Option<&str> {
        self.set.iter().rev().find(|f| f.0 == flag).and_then(|f| f.1.as_deref())
    }

    fn size(&self, flag: char) -> Result<Option<u64>> {
        self.value(flag).map(size).transpose()
    }

    fn pattern(&self, flag: char) -> Result<Option<u8>> {
        let Some(text) = self.value(flag) else { return Ok(None) };
        let parsed = match text.strip_prefix("0x") {
            Some(hex) => u8::from_str_radix(hex, 16),
            None => text.parse(),
        };
        parsed.map(Some).map_err(|_| Error::usage(format!("{text} is not a valid pattern byte")))
    }
}

fn size(text: &str) -> Result<u64> {
    block::parse_size(text).filter(|&s| i64::try_from(s).is_ok()).ok_or_else(|| {
        Error::usage(format!(
            "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"
        ))
    })
}

/// Sizes as this tool prints them: whole units plainly, others with three decimals.
fn human(bytes: u64) -> String {
    const UNITS: [(&str, u32); 6] =
        [("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match UNITS.iter().find(|(_, shift)| bytes >= 1 << shift) {
        Some((unit, shift)) if bytes.is_multiple_of(1 << shift) => format!("{} {unit}", bytes >> shift),
        Some((unit, shift)) => format!("{:.3} {unit}", bytes as f64 / (1u64 << shift) as f64),
        None => format!("{bytes} bytes"),
    }
}

/// Hexadecimal dump with text beside it.
fn dump(bytes: &[u8], offset: u64) {
    for (i, row) in bytes.chunks(16).enumerate() {
        let hex: String = row.iter().map(|b| format!("{b:02x} ")).collect();
        let plain: String = row
            .iter()
            .map(|&b| if b.is_ascii_graphic() || b == b' ' { char::from(b) } else { '.' })
            .collect();
        println!("{:08x}:  {hex} {plain}", offset + i as u64 * 16);
    }
}

/// A request's failure, in the words of its error number.
fn failed(what: &str, e: Error) -> Error {
    // Past the end is an error of the device here, as for a guest.
    let number = if matches!(e, Error::OutOfRange { .. }) { libc::EIO } else { e.errno() };
    Error::io(format!("{what} failed"), std::io::Error::from_raw_os_error(number))
}

/// `4 KiB, 1 ops; 00.00 sec (...)`.
fn report(verb: &str, offset: u64, count: u64, total: u64, ops: u64, took: Duration, flags: &Flags) {
    if flags.has('q') {
        return;
    }
    let seconds = took.as_secs_f64().max(1e-9);
    if flags.has('C') {
        println!("{total},{ops},{seconds:.6},{:.4},{:.4}", total as f64 / seconds, ops as f64 / seconds);
        return;
    }
    println!("{verb} {total}/{count} bytes at offset {offset}");
    println!(
        "{}, {ops} ops; {:02}.{:02} sec ({}/sec and {:.4} ops/sec)",
        human(total),
        took.as_secs() % 60,
        took.subsec_millis() / 10,
        human((total as f64 / seconds) as u64),
        ops as f64 / seconds
    );
}

impl Session {
    fn shared_image(&self) -> Result<Arc<Image>> {
        self.image.clone().ok_or_else(|| Error::usage("no file open, try 'help open'"))
    }

    fn image(&self) -> Result<&Image> {
        self.image.as_deref().ok_or_else(|| Error::usage("no file open, try 'help open'"))
    }

    fn range(&self, flags: &Flags) -> Result<(u64, u64)> {
        let [offset, len, ..] = &flags.rest[..] else {
            return Err(Error::usage("offset and length are needed"));
        };
        let (offset, len) = (size(offset)?, size(len)?);
        if len > MAX_REQUEST {
            return Err(Error::usage(format!("length cannot exceed {MAX_REQUEST}, given {len}")));
        }
        Ok((offset, len))
    }

    fn read(&mut self, args: &[String]) -> Result<()> {
        let f = Flags::parse(args, "abCl:mpP:qs:uv")?;
        let (offset, len) = self.range(&f)?;
        let started = Instant::now();
        let mut buf = vec![0xab; len as usize];
        self.image()?.read_at(&mut buf, offset).map_err(|e| failed("read", e))?;
        let took = started.elapsed();
        let mut verified = true;
        if let Some(pattern) = f.pattern('P')? {
            let start = f.size('s')?.unwrap_or(0) as usize;
            let n = f.size('l')?.map_or(buf.len().saturating_sub(start), |l| l as usize);
            let part = start.checked_add(n).and_then(|end| buf.get(start..end));
            let part =
                part.ok_or_else(|| Error::usage("pattern verification range exceeds end of read data"))?;
            if part.iter().any(|&b| b != pattern) {
                println!("Pattern verification failed at offset {}, {n} bytes", offset + start as u64);
                verified = false;
            }
        }
        if f.has('v') {
            dump(&buf, offset);
        }
        report("read", offset, len, len, 1, took, &f);
        self.failed |= !verified;
        Ok(())
    }

    fn write(&mut self, args: &[String]) -> Result<()> {
        let f = Flags::parse(args, "abcCdfmnpP:qrs:uz")?;
        let (offset, len) = self.range(&f)?;
        let image = self.image()?;
        let started = Instant::now();
        if f.has('z') {
            image.write_zeroes(offset, len, f.has('u')).map_err(|e| failed("write", e))?;
        } else {
            let data = match f.value('s') {
                Some(name) => {
                    let bytes = std::fs::read(name).map_err(|e| Error::io(name.to_owned(), e))?;
                    if bytes.is_empty() {
                        return Err(Error::usage(format!("{name}: file is empty")));
                    }
                    bytes.iter().copied().cycle().take(len as usize).collect()
                }
                None => vec![f.pattern('P')?.unwrap_or(0xcd); len as usize],
            };
            if f.has('c') {
                self.write_compressed(&data, offset)?;
            } else {
                image.write_at(&data, offset).map_err(|e| failed("write", e))?;
            }
        }
        if f.has('f') {
            image.flush()?;
        }
        report("wrote", offset, len, len, 1, started.elapsed(), &f);
        Ok(())
    }

    fn write_compressed(&self, data: &[u8], offset: u64) -> Result<()> {
        let image = self.image()?;
        let unit = image.format().unit();
        let end = offset + data.len() as u64;
        if !offset.is_multiple_of(unit) || (!end.is_multiple_of(unit) && end != image.size()) {
            return Err(Error::usage("compressed writes must be whole clusters"));
        }
        for (i, piece) in data.chunks(unit as usize).enumerate() {
            let at = offset + i as u64 * unit;
            match image.compress(piece)? {
                Some(packed) => image.write_compressed(at, &packed)?,
                None => image.write_at(piece, at)?,
            }
        }
        Ok(())
    }

    /// `readv` and `writev`: several lengths, one request after the other in the file.
    fn vectored(&mut self, args: &[String], write: bool) -> Result<()> {
        let f = Flags::parse(args, "CP:qvfi")?;
        let [offset, lens @ ..] = &f.rest[..] else {
            return Err(Error::usage("offset and lengths are needed"));
        };
        let offset = size(offset)?;
        let len = lens.iter().try_fold(0u64, |sum, l| Ok::<_, Error>(sum.saturating_add(size(l)?)))?;
        if len > MAX_REQUEST {
            return Err(Error::usage(format!("length cannot exceed {MAX_REQUEST}, given {len}")));
        }
        let started = Instant::now();
        let pattern = f.pattern('P')?;
        let mut buf = vec![pattern.unwrap_or(0xcd); len as usize];
        if write {
            self.image()?.write_at(&buf, offset).map_err(|e| failed("writev", e))?;
        } else {
            self.image()?.read_at(&mut buf, offset).map_err(|e| failed("readv", e))?;
            if pattern.is_some_and(|p| buf.iter().any(|&b| b != p)) {
                return Err(Error::invalid(format!(
                    "Pattern verification failed at offset {offset}, {len} bytes"
                )));
            }
            if f.has('v') {
                dump(&buf, offset);
            }
        }
        report(if write { "wrote" } else { "read" }, offset, len, len, 1, started.elapsed(), &f);
        Ok(())
    }

    fn discard(&mut self, args: &[String]) -> Result<()> {
        let f = Flags::parse(args, "Cq")?;
        let (offset, len) = self.range(&f)?;
        let started = Instant::now();
        self.image()?.discard(offset, len).map_err(|e| failed("discard", e))?;
        report("discard", offset, len, len, 1, started.elapsed(), &f);
        Ok(())
    }

    fn entries(&self, start: u64, end: u64) -> Result<Vec<MapEntry>> {
        let (mut at, mut out) = (start, Vec::new());
        while at < end {
            let before = out.len();
            self.image()?.map(at, end - at, &mut out)?;
            at = out[before..].last().map_or(end, |e| e.start + e.length);
        }
        Ok(out)
    }

    fn alloc(&mut self, args: &[String]) -> Result<()> {
        let f = Flags::parse(args, "")?;
        let offset = size(f.rest.first().ok_or_else(|| Error::usage("an offset is needed"))?)?;
        let len = f.rest.get(1).map_or(Ok(512), |l| size(l))?;
        let end = offset.saturating_add(len).min(self.image()?.size());
        let own = |e: &&MapEntry| e.depth == 0 && e.present;
        let sum: u64 = self.entries(offset, end)?.iter().filter(own).map(|e| e.length).sum();
        println!("{sum}/{len} bytes allocated at offset {}", human(offset));
        Ok(())
    }

    fn map(&mut self) -> Result<()> {
        let size = self.image()?.size();
        let mut at = 0;
        let entries = self.entries(0, size)?;
        let mut list = entries.iter().peekable();
        while let Some(e) = list.next() {
            let allocated = e.depth == 0 && e.present;
            let mut len = e.length;
            while let Some(next) = list.next_if(|n| (n.depth == 0 && n.present) == allocated) {
                len += next.length;
            }
            println!(
                "{} ({len:#x}) bytes {} at offset {} ({at:#x})",
                human(len),
                if allocated { "    allocated" } else { "not allocated" },
                human(at)
            );
            at += len;
        }
        Ok(())
    }

    /// Waits for requests in flight, and closes the image.
    fn close(&mut self) -> Result<()> {
        self.settle_aio(true)?;
        self.aio = None;
        self.image.take().map_or(Ok(()), |image| image.close())
    }

    fn open(&mut self, args: &[String]) -> Result<()> {
        let f = Flags::parse(args, "rsnCukUo:d:t:i:")?;
        if self.image.is_some() {
            return Err(Error::usage("file open already, try 'help close'"));
        }
        let mut choice = Choice {
            options: OpenOptions { read_only: f.has('r'), ..Default::default() },
            source: Source { image_opts: false, ..self.source.clone() },
            snapshot: f.has('s'),
        };
        choice.options.force_share = f.has('U');
        choice.options.cache = cache(&f)?;
        choice.options.discard = matches!(f.value('d'), Some("on" | "unmap"));
        if let Some(list) = f.value('o') {
            choice.options.options = Options::parse(list)?;
        }
        let name = f.rest.first().cloned().unwrap_or_default();
        self.engine = engine(&f)?;
        self.image = Some(Arc::new(open(&name, choice)?));
        Ok(())
    }

    /// Runs a command; the result says whether to go on.
    fn run(&mut self, line: &str) -> Result<bool> {
        let list = words(line);
        let Some((command, args)) = list.split_first() else { return Ok(true) };
        self.settle_aio(false)?;
        match command.as_str() {
            "q" | "quit" => return Ok(false),
            "r" | "read" => self.read(args)?,
            "aio_read" => self.start_aio(args, false)?,
            "w" | "write" => self.write(args)?,
            "aio_write" => self.start_aio(args, true)?,
            "rv" | "readv" => self.vectored(args, false)?,
            "wv" | "writev" => self.vectored(args, true)?,
            "aio_flush" => self.settle_aio(true)?,
            "f" | "flush" => self.image()?.flush()?,
            "d" | "discard" => self.discard(args)?,
            "a" | "alloc" => self.alloc(args)?,
            "map" => self.map()?,
            "l" | "length" => println!("{}", human(self.image()?.size())),
            "t" | "truncate" => {
                let f = Flags::parse(args, "m:")?;
                let to = size(f.rest.first().ok_or_else(|| Error::usage("an offset is needed"))?)?;
                let mode = Preallocation::parse(f.value('m').unwrap_or("off"))?;
                self.image()?.resize(to, mode)?;
            }
            "o" | "open" => self.open(args)?,
            "c" | "close" => match self.image.is_some() {
                true => self.close()?,
                false => return Err(Error::usage("no file open, try 'help open'")),
            },
            "i" | "info" => {
                let image = self.image()?;
                println!("format name: {}", image.driver().name);
                if let Some(cluster) = image.info()?.cluster_size {
                    println!("cluster size: {}", human(cluster));
                }
            }
            "sleep" => {
                let ms = args
                    .first()
                    .and_then(|a| a.parse().ok())
                    .ok_or_else(|| Error::usage("milliseconds are needed"))?;
                std::thread::sleep(Duration::from_millis(ms));
            }
            "help" | "?" => println!(
                "aio_flush aio_read aio_write alloc close discard flush info length map open quit read readv sleep \
                 truncate write writev"
            ),
            other => return Err(Error::usage(format!("command \"{other}\" not found"))),
        }
        Ok(true)
    }
}

fn cache(f: &Flags) -> Result<CacheMode> {
    if f.has('n') { CacheMode::parse("none") } else { CacheMode::parse(f.value('t').unwrap_or("writeback")) }
}

fn engine(f: &Flags) -> Result<Engine> {
    f.value('i').map_or(Ok(Engine::Threads), Engine::parse)
}

fn open(name: &str, choice: Choice) -> Result<Image> {
    let failed = |e: Error| e.context(format!("can't open device {name}"));
    let format = choice.options.format.clone();
    if choice.snapshot {
        return overlay::open(&choice.source, name, format.as_deref(), choice.options).map_err(failed);
    }
    if name.is_empty() && !choice.options.options.is_empty() {
        let objects = objects::parse(&choice.source.object)?;
        let options =
            OpenOptions { secrets: objects.secrets, credentials: objects.credentials, ..choice.options };
        return Image::open("", &options).map_err(failed);
    }
    choice.source.open(name, format.as_deref(), choice.options).map_err(failed)
}

/// Runs `qemu-io`.
pub(crate) fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    match session(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("qemu-io: {e}");
            ExitCode::FAILURE
        }
    }
}

fn session(args: impl Iterator<Item = OsString>) -> Result<bool> {
    let mut given: Vec<String> = args.skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    let (mut image_opts, mut object) = (false, Vec::new());
    let long = [
        ("--read-only", "-r"),
        ("--snapshot", "-s"),
        ("--nocache", "-n"),
        ("--force-share", "-U"),
        ("--misalign", "-m"),
    ];
    let mut list = std::mem::take(&mut given).into_iter();
    while let Some(word) = list.next() {
        match word.as_str() {
            "--image-opts" => image_opts = true,
            "--object" => {
                let text = list.next();
                object.push(text.ok_or_else(|| Error::usage("option '--object' requires an argument"))?);
            }
            w if w.starts_with("--object=") => object.push(w["--object=".len()..].to_owned()),
            _ => given.push(word),
        }
    }
    for arg in &mut given {
        if let Some((_, short)) = long.iter().find(|(l, _)| l == arg) {
            *arg = (*short).to_owned();
        } else if let Some(rest) = arg.strip_prefix("--") {
            let (name, value) = rest.split_once('=').unwrap_or((rest, ""));
            let flag = match name {
                "cmd" => 'c',
                "format" => 'f',
                "cache" => 't',
                "discard" => 'd',
                "aio" => 'i',
                "version" => 'V',
                "help" => 'h',
                _ => return Err(Error::usage(format!("unrecognized option '--{name}'"))),
            };
            *arg = format!("-{flag}{value}");
        }
    }
    let f = Flags::parse(&given, "c:d:f:rsnmCki:t:T:UVh")?;
    if f.has('V') {
        println!("qemu-io version {}", env!("CARGO_PKG_VERSION"));
        return Ok(true);
    }
    if f.has('h') {
        println!(
            "Usage: qemu-io [--object OBJECTDEF] [-c CMD]... [-f FMT] [-r] [-s] [-n] [-t CACHE] [-d on|off] [-i AIO] [-U]\n               [--image-opts] [FILE]"
        );
        return Ok(true);
    }
    let source = Source { image_opts, object, force_share: false };
    let mut session =
        Session { image: None, aio: None, engine: engine(&f)?, source: source.clone(), failed: false };
    if let Some(name) = f.rest.first() {
        let options = OpenOptions {
            read_only: f.has('r'),
            force_share: f.has('U'),
            cache: cache(&f)?,
            discard: matches!(f.value('d'), Some("on" | "unmap")),
            format: f.value('f').map(str::to_owned),
            ..Default::default()
        };
        session.image = Some(Arc::new(open(name, Choice { options, source, snapshot: f.has('s') })?));
    }
    let commands: Vec<&str> = f.set.iter().filter(|x| x.0 == 'c').filter_map(|x| x.1.as_deref()).collect();
    let mut good = true;
    let mut run = |session: &mut Session, line: &str| -> bool {
        match session.run(line) {
            Ok(more) => more,
            Err(e) => {
                // Failures are part of what a test script looks at, in order with the rest.
                println!("{e}");
                good = false;
                true
            }
        }
    };
    if commands.is_empty() {
        let stdin = std::io::stdin();
        let prompt = stdin.is_terminal();
        loop {
            if prompt {
                print!("qemu-io> ");
                // A prompt that cannot be shown is no reason to stop.
                let _ = std::io::stdout().flush();
            }
            let mut line = String::new();
            match stdin.lock().read_line(&mut line) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
            if !run(&mut session, &line) {
                break;
            }
        }
    }
    for command in commands {
        if !run(&mut session, command) {
            break;
        }
    }
    session.close()?;
    Ok(good && !session.failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(human(16), "16 bytes");
        assert_eq!(human(65536), "64 KiB");
        assert_eq!(human(0x3fd_0000), "63.812 MiB");
    }

    #[test]
    fn command_lines_split_like_getopt() {
        assert_eq!(words("write -P 1 'a b' \"\""), ["write", "-P", "1", "a b", ""]);
        let args: Vec<String> = words("-qP0x12 -s 4k 0 512");
        let f = Flags::parse(&args, "qP:s:").unwrap();
        assert!(f.has('q'));
        assert_eq!(f.pattern('P').unwrap(), Some(0x12));
        assert_eq!(f.size('s').unwrap(), Some(4096));
        assert_eq!(f.rest, ["0", "512"]);
        assert!(Flags::parse(&args, "q").is_err());
    }
}
