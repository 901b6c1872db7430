//! Files on web servers, read-only: byte ranges (RFC 9110, section 14), kept in a cache of blocks.

use super::{Held, Storage, StorageOptions, ZeroFlags, Zeroing};
use crate::{Error, Result};
use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// Bytes of a block of the cache.
const BLOCK: u64 = 128 << 10;
/// Blocks kept: 32 MiB.
const BLOCKS: usize = 256;
/// Most bytes asked for at once.
const MAX_RANGE: u64 = 4 << 20;
/// How often a request that broke off is made again.
const TRIES: u32 = 3;

/// Where a file is, and how to ask for it.
#[derive(Clone, PartialEq, Eq)]
pub struct HttpAddress {
    /// `http://...` or `https://...`, without user and password.
    pub url: String,
    /// Bytes read ahead, at least.
    pub readahead: u64,
    /// Check the server's certificate.
    pub verify: bool,
    /// How long an answer may take.
    pub timeout: Duration,
    /// Value of the `Cookie` header.
    pub cookie: Option<String>,
    /// Value of the `Authorization` header.
    pub authorization: Option<String>,
}

impl std::fmt::Debug for HttpAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Cookies and passwords stay out of logs.
        f.debug_struct("HttpAddress").field("url", &self.url).finish_non_exhaustive()
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for three in bytes.chunks(3) {
        let value = three.iter().fold(0u32, |v, &b| v << 8 | u32::from(b)) << (8 * (3 - three.len()));
        for i in 0..4 {
            let digit = DIGITS[(value >> (18 - 6 * i)) as usize & 63];
            out.push(if i <= three.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

impl HttpAddress {
    /// Reads a URL; user and password in it are used for basic authentication.
    pub fn parse(url: &str) -> Result<Self> {
        let bad = || Error::usage(format!("Invalid URL '{url}'; use http://host[:port]/path"));
        let (scheme, rest) = url.split_once("://").ok_or_else(bad)?;
        if !matches!(scheme, "http" | "https")
            || rest.is_empty()
            || !url.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(bad());
        }
        let end = rest.find('/').unwrap_or(rest.len());
        let (user, host) = match rest[..end].rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, &rest[..end]),
        };
        if host.is_empty() {
            return Err(bad());
        }
        Ok(HttpAddress {
            url: format!("{scheme}://{host}{}", if end == rest.len() { "/" } else { &rest[end..] }),
            readahead: 256 << 10,
            verify: true,
            timeout: Duration::from_secs(5),
            cookie: None,
            authorization: user.map(|u| format!("Basic {}", base64(u.as_bytes()))),
        })
    }

    /// Takes the options of QEMU's `http` and `https` drivers (`url`, `readahead`, `sslverify`, `timeout`, `cookie`,
    /// `cookie-secret`, `username`, `password-secret`) out of a list.
    pub fn from_options(
        options: &mut BTreeMap<String, String>,
        secrets: &BTreeMap<String, Vec<u8>>,
    ) -> Result<Self> {
        let url = options.remove("url").or_else(|| options.remove("filename"));
        let mut address =
            Self::parse(&url.ok_or_else(|| Error::usage("http block driver requires an URL"))?)?;
        let mut given = crate::Options::from(std::mem::take(options));
        if let Some(bytes) = given.take_size("readahead")? {
            if bytes == 0 || !bytes.is_multiple_of(512) {
                return Err(Error::usage("Parameter 'readahead' must be a multiple of 512"));
            }
            address.readahead = bytes;
        }
        if let Some(verify) = given.take_bool("sslverify")? {
            address.verify = verify;
        }
        if let Some(seconds) = given.take_number("timeout")? {
            if seconds == 0 || seconds > 10_000 {
                return Err(Error::usage("Parameter 'timeout' is between 1 and 10000 seconds"));
            }
            address.timeout = Duration::from_secs(seconds);
        }
        let secret = |id: Option<String>| -> Result<Option<String>> {
            let Some(id) = id else { return Ok(None) };
            let bytes = secrets.get(&id).ok_or_else(|| Error::usage(format!("No secret with id '{id}'")))?;
            let text = str::from_utf8(bytes).ok().filter(|t| t.bytes().all(|b| b.is_ascii() && b >= b' '));
            text.map(|t| Some(t.to_owned()))
                .ok_or_else(|| Error::usage(format!("The secret '{id}' is no text for a header")))
        };
        address.cookie = match (given.take("cookie"), given.take("cookie-secret")) {
            (Some(_), Some(_)) => {
                return Err(Error::usage("http driver cannot handle both cookie and cookie secret"));
            }
            (plain, id) => plain.or(secret(id)?),
        };
        match (given.take("username"), secret(given.take("password-secret"))?) {
            (Some(user), password) => {
                let both = format!("{user}:{}", password.unwrap_or_default());
                address.authorization = Some(format!("Basic {}", base64(both.as_bytes())));
            }
            (None, Some(_)) => return Err(Error::usage("password-secret needs username")),
            (None, None) => {}
        }
        *options = given.into_map();
        Ok(address)
    }
}

/// What tells one version of a file from another.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Version {
    size: u64,
    tag: Option<String>,
    modified: Option<String>,
}

#[derive(Default)]
struct Cache {
    blocks: HashMap<u64, (u64, Arc<Vec<u8>>)>,
    /// Blocks that someone is fetching: first, one past the last.
    fetching: Vec<(u64, u64)>,
    clock: u64,
    /// The block after the last one asked for: reading on from there is reading in order.
    expected: u64,
}

/// A file on a web server.
pub struct HttpStorage {
    address: HttpAddress,
    agent: ureq::Agent,
    version: Version,
    cache: Mutex<Cache>,
    changed: Condvar,
}

impl std::fmt::Debug for HttpStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpStorage").field("address", &self.address).finish_non_exhaustive()
    }
}

fn agent(address: &HttpAddress) -> ureq::Agent {
    let mut tls = TlsConfig::builder().disable_verification(!address.verify);
    if address.url.starts_with("https:") && address.verify {
        let certificates = rustls_native_certs::load_native_certs().certs;
        let certificates: Vec<_> = certificates.iter().map(|c| Certificate::from_der(c).to_owned()).collect();
        tls = tls.root_certs(RootCerts::Specific(Arc::new(certificates)));
    }
    ureq::Agent::config_builder()
        .tls_config(tls.build())
        .http_status_as_error(false)
        .timeout_connect(Some(address.timeout))
        .timeout_recv_response(Some(address.timeout))
        .user_agent(concat!("kvasir/", env!("CARGO_PKG_VERSION")))
        // What is asked for is bytes of the file, not of some encoding of it.
        .accept_encoding("identity")
        .build()
        .new_agent()
}

/// What an answer says: `bytes 0-99/1234`.
fn content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
    let size = size.trim().parse().ok()?;
    if range.trim() == "*" {
        return Some((0, 0, size));
    }
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (first <= last && last < size).then_some((first, last + 1, size))
}

enum Failure {
    /// Worth another try.
    Transient(Error),
    Final(Error),
}

impl HttpStorage {
    /// Asks the server for the file's size.
    pub fn open(address: &HttpAddress, options: &StorageOptions) -> Result<Self> {
        if !options.read_only {
            return Err(Error::io(
                format!("'{}': files on web servers are read-only", address.url),
                std::io::Error::from_raw_os_error(libc::EACCES),
            ));
        }
        let mut storage = HttpStorage {
            agent: agent(address),
            address: address.clone(),
            version: Version::default(),
            cache: Mutex::default(),
            changed: Condvar::new(),
        };
        let (_, version) = storage.fetch(0, 1)?;
        storage.version = version;
        Ok(storage)
    }

    /// Bytes `start .. end`, and which version of the file they are of.
    fn fetch(&self, start: u64, end: u64) -> Result<(Vec<u8>, Version)> {
        let mut attempt = 0;
        loop {
            match self.fetch_once(start, end) {
                Ok(done) => return Ok(done),
                Err(Failure::Transient(_)) if attempt < TRIES => {
                    std::thread::sleep(Duration::from_millis(100 << attempt));
                    attempt += 1;
                }
                Err(Failure::Transient(e) | Failure::Final(e)) => return Err(e),
            }
        }
    }

    fn fetch_once(&self, start: u64, end: u64) -> Result<(Vec<u8>, Version), Failure> {
        let url = &self.address.url;
        let refused = |why: String| Failure::Final(Error::unsupported(format!("'{url}': {why}")));
        let broken = |e: ureq::Error| {
            let source = match e {
                ureq::Error::Io(e) => e,
                e => std::io::Error::other(e.to_string()),
            };
            Failure::Transient(Error::io(format!("Could not read '{url}'"), source))
        };
        let mut range = String::from("bytes=");
        // Writing to a string cannot fail.
        let _ = write!(range, "{start}-{}", end - 1);
        let mut request = self.agent.get(url).header("Range", range);
        if let Some(cookie) = &self.address.cookie {
            request = request.header("Cookie", cookie);
        }
        if let Some(authorization) = &self.address.authorization {
            request = request.header("Authorization", authorization);
        }
        let mut response = request.call().map_err(broken)?;
        let header =
            |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let mut version = Version { size: 0, tag: header("etag"), modified: header("last-modified") };
        let found = header("content-range").as_deref().and_then(content_range);
        match (response.status().as_u16(), found) {
            (206, Some((first, stop, size))) if first == start && stop == end.min(size) => {
                version.size = size
            }
            // The file is empty.
            (416, Some((0, 0, 0))) => return Ok((Vec::new(), version)),
            (206, _) => return Err(refused("the server sends another range than was asked for".into())),
            (200, _) => {
                return Err(refused(
                    "the server does not support ranges of bytes; copy the file first".into(),
                ));
            }
            (status @ 500..600, _) => {
                let source = std::io::Error::other(format!("the server answers with status {status}"));
                return Err(Failure::Transient(Error::io(format!("Could not read '{url}'"), source)));
            }
            (404, _) => {
                return Err(Failure::Final(Error::NotFound(format!("'{url}': no such file on the server"))));
            }
            (status, _) => return Err(refused(format!("the server answers with status {status}"))),
        }
        let want = end.min(version.size) - start;
        let bytes = response.body_mut().with_config().limit(want + 1).read_to_vec().map_err(broken)?;
        if bytes.len() as u64 != want {
            let source = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
            return Err(Failure::Transient(Error::io(format!("Could not read '{url}'"), source)));
        }
        Ok((bytes, version))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A block, from the cache or from the server, with those after it as far as `wanted` and reading in order suggest.
    fn block(&self, index: u64, wanted: u64) -> Result<Arc<Vec<u8>>> {
        let mut cache = self.lock();
        loop {
            cache.clock += 1;
            let clock = cache.clock;
            if let Some((used, block)) = cache.blocks.get_mut(&index) {
                *used = clock;
                return Ok(Arc::clone(block));
            }
            if !cache.fetching.iter().any(|r| (r.0..r.1).contains(&index)) {
                break;
            }
            cache = self.changed.wait(cache).unwrap_or_else(|e| e.into_inner());
        }
        let ahead = if cache.expected == index {
            self.address.readahead.max(1 << 20)
        } else {
            self.address.readahead
        };
        let last = self.version.size.div_ceil(BLOCK);
        let most = index + (ahead.max(wanted) / BLOCK).clamp(1, MAX_RANGE / BLOCK);
        let mut stop = index + 1;
        while stop < most.min(last)
            && !cache.blocks.contains_key(&stop)
            && !cache.fetching.iter().any(|r| (r.0..r.1).contains(&stop))
        {
            stop += 1;
        }
        cache.fetching.push((index, stop));
        cache.expected = stop;
        drop(cache);
        let fetched = self.fetch(index * BLOCK, (stop * BLOCK).min(self.version.size));
        let mut cache = self.lock();
        cache.fetching.retain(|r| *r != (index, stop));
        self.changed.notify_all();
        let (bytes, version) = fetched?;
        if version != self.version {
            return Err(Error::invalid(format!(
                "'{}' changed on the server while it is in use",
                self.address.url
            )));
        }
        let mut first = None;
        for (i, piece) in bytes.chunks(BLOCK as usize).enumerate() {
            let block = Arc::new(piece.to_vec());
            first.get_or_insert_with(|| Arc::clone(&block));
            let clock = cache.clock;
            cache.blocks.insert(index + i as u64, (clock, block));
        }
        while cache.blocks.len() > BLOCKS {
            let Some(oldest) = cache.blocks.iter().min_by_key(|(_, (used, _))| *used).map(|(k, _)| *k) else {
                break;
            };
            cache.blocks.remove(&oldest);
        }
        first.ok_or_else(|| Error::invalid("the server sent nothing"))
    }

    fn refuse(&self) -> Error {
        Error::ReadOnly(self.address.url.clone())
    }
}

impl Storage for HttpStorage {
    fn size(&self) -> Result<u64> {
        Ok(self.version.size)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let inside = self.version.size.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (mut rest, past) = buf.split_at_mut(inside);
        past.fill(0);
        let mut at = offset;
        while !rest.is_empty() {
            let skip = (at % BLOCK) as usize;
            let block = self.block(at / BLOCK, (skip + rest.len()) as u64)?;
            let part = block.get(skip..).filter(|p| !p.is_empty());
            let part = part.ok_or_else(|| Error::invalid("the server sent too little"))?;
            let n = part.len().min(rest.len());
            let (now, later) = rest.split_at_mut(n);
            now.copy_from_slice(&part[..n]);
            rest = later;
            at += n as u64;
        }
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        Err(self.refuse())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn set_size(&self, _size: u64) -> Result<()> {
        Err(self.refuse())
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(self.refuse())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _flags: ZeroFlags) -> Result<Zeroing> {
        Err(self.refuse())
    }

    fn allocate(&self, _offset: u64, _len: u64) -> Result<Zeroing> {
        Err(self.refuse())
    }

    fn held(&self, offset: u64, len: u64) -> Result<(Held, u64)> {
        let size = self.version.size;
        Ok(if offset >= size { (Held::Hole, len) } else { (Held::Data, len.min(size - offset)) })
    }

    fn read_only(&self) -> bool {
        true
    }

    fn set_read_only(&self, read_only: bool) -> Result<()> {
        if read_only { Ok(()) } else { Err(self.refuse()) }
    }

    fn name(&self) -> String {
        self.address.url.clone()
    }

    fn protocol(&self) -> &'static str {
        if self.address.url.starts_with("https:") { "https" } else { "http" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_and_options() {
        let a = HttpAddress::parse("http://me:pw@h:80/x?y=1").unwrap();
        assert_eq!(a.url, "http://h:80/x?y=1");
        assert_eq!(a.authorization.as_deref(), Some("Basic bWU6cHc="));
        assert_eq!(HttpAddress::parse("https://h").unwrap().url, "https://h/");
        for bad in ["http://", "http:///x", "ftp://h/x", "http://h/a b", "h"] {
            assert!(HttpAddress::parse(bad).is_err(), "{bad}");
        }
        let secrets = BTreeMap::from([("s".to_owned(), b"pw".to_vec()), ("b".to_owned(), vec![10])]);
        let parse = |text: &str| {
            let mut map = crate::Options::parse(text).unwrap().into_map();
            let address = HttpAddress::from_options(&mut map, &secrets)?;
            map.keys().next().map_or(Ok(address), |k| Err(Error::usage(k.clone())))
        };
        let a =
            parse("url=http://h/x,username=me,password-secret=s,sslverify=off,timeout=9,cookie=c").unwrap();
        assert_eq!(a.authorization.as_deref(), Some("Basic bWU6cHc="));
        assert_eq!((a.verify, a.timeout.as_secs(), a.cookie.as_deref()), (false, 9, Some("c")));
        for bad in [
            "username=x",
            "url=http://h/x,cookie-secret=b",
            "url=http://h/x,cookie-secret=none",
            "url=http://h/x,timeout=0",
            "url=http://h/x,readahead=5",
            "url=http://h/x,odd=1",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ranges() {
        assert_eq!(content_range("bytes 0-99/1234"), Some((0, 100, 1234)));
        assert_eq!(content_range("bytes */0"), Some((0, 0, 0)));
        for bad in ["bytes 5-4/9", "bytes 0-9/9", "bytes 0-1/*", "items 0-1/2", ""] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }
}
