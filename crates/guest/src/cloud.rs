//! Disk images made by others: fetched over HTTP(S) (resumed where a fetch broke off, checked against a checksum), or
//! named by a path.

use crate::{Error, Progress, Result};
use sha2::{Digest, Sha256, Sha512};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest list of checksums that is read.
const SUMS_MAX: u64 = 4 << 20;
/// A server that says nothing for this long is gone.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A checksum: `sha256:HEX` or `sha512:HEX`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksum {
    bits: usize,
    hex: String,
}

impl Checksum {
    /// Reads `[sha256:|sha512:]HEX`; without a prefix the length tells.
    ///
    /// # Errors
    /// The text is no such checksum.
    pub fn parse(text: &str) -> Result<Self> {
        let (name, hex) = text.split_once(':').unwrap_or(("", text));
        let hex = hex.to_ascii_lowercase();
        let bits = hex.len() * 4;
        let named = matches!((name, bits), ("" | "sha256", 256) | ("" | "sha512", 512));
        if named && hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(Self { bits, hex });
        }
        Err(Error::Usage(format!(
            "checksum '{text}': use sha256: and 64, or sha512: and 128 hexadecimal digits"
        )))
    }

    /// Finds the line about `file` in a list as `sha256sum` writes it.
    fn in_list(list: &str, file: &str) -> Option<Self> {
        list.lines().find_map(|line| {
            let (hex, name) = line.split_once(char::is_whitespace)?;
            let name = name.trim_start().trim_start_matches('*');
            if name.trim_start_matches("./") == file { Self::parse(hex).ok() } else { None }
        })
    }

    fn of(&self, path: &Path) -> Result<String> {
        let mut file = File::open(path).map_err(Error::io(path))?;
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let mut buffer = vec![0; 1 << 20];
        let (mut short, mut long) = (Sha256::new(), Sha512::new());
        loop {
            let n = file.read(&mut buffer).map_err(Error::io(path))?;
            match (n, self.bits) {
                (0, 256) => return Ok(hex(&short.finalize())),
                (0, _) => return Ok(hex(&long.finalize())),
                (n, 256) => short.update(&buffer[..n]),
                (n, _) => long.update(&buffer[..n]),
            }
        }
    }

    /// Compares a file with the checksum.
    ///
    /// # Errors
    /// They differ, or the file cannot be read.
    pub fn check(&self, path: &Path) -> Result<()> {
        let found = self.of(path)?;
        if found == self.hex {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "{}: the checksum is {found}, not {} as it should be",
            path.display(),
            self.hex
        )))
    }
}

/// Whether `text` is the address of something to fetch.
pub fn is_url(text: &str) -> bool {
    ["http://", "https://"].iter().any(|scheme| text.starts_with(scheme))
}

/// Fetches `url` into the directory `cache`, unless it is there. Without a `checksum` the lists `SHA256SUMS` and
/// `SHA512SUMS` beside it are looked for; the second value says whether there was anything to check against.
///
/// # Errors
/// The server's or the host's refusal, or a wrong checksum (what was fetched is removed then).
pub fn fetch(
    url: &str,
    checksum: Option<&Checksum>,
    cache: &Path,
    progress: &mut dyn Progress,
) -> Result<(PathBuf, bool)> {
    fs::create_dir_all(cache).map_err(Error::io(cache))?;
    let (base, file) = split(url)?;
    let tag: String = Sha256::digest(url.as_bytes())[..4].iter().map(|b| format!("{b:02x}")).collect();
    let path = cache.join(format!("{tag}-{file}"));
    let lock_path = cache.join(format!("{tag}-{file}.lock"));
    let lock = File::create(&lock_path).map_err(Error::io(&lock_path))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|e| Error::io(&lock_path)(e.into()))?;

    let agent = agent();
    let found = match checksum {
        Some(given) => Some(given.clone()),
        None => ["SHA256SUMS", "SHA512SUMS"].iter().find_map(|list| {
            let text = text(&agent, &format!("{base}{list}")).ok()?;
            Checksum::in_list(&text, file)
        }),
    };
    if path.exists() && found.as_ref().is_none_or(|sum| sum.check(&path).is_ok()) {
        return Ok((path, found.is_some()));
    }
    let part = cache.join(format!("{tag}-{file}.part"));
    progress.step(&format!("fetching {file}"));
    download(&agent, url, &part, progress)?;
    if let Some(sum) = &found {
        progress.step("checking");
        if let Err(e) = sum.check(&part) {
            let _ = fs::remove_file(&part); // the message about the checksum says more
            return Err(e);
        }
    }
    fs::rename(&part, &path).map_err(Error::io(&path))?;
    Ok((path, found.is_some()))
}

/// The part of a URL up to its last slash, and the file name after it.
fn split(url: &str) -> Result<(&str, &str)> {
    let plain = url.split(['?', '#']).next().unwrap_or(url);
    let at = plain.rfind('/').map_or(0, |i| i + 1);
    let (base, file) = plain.split_at(at);
    let good = !file.is_empty()
        && !file.starts_with('.')
        && file.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+~%".contains(&b))
        && base.len() > "https://".len();
    if good { Ok((base, file)) } else { Err(Error::Usage(format!("{url} does not end in a file name"))) }
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .timeout_connect(Some(TIMEOUT))
        .timeout_recv_response(Some(TIMEOUT))
        .http_status_as_error(false)
        .build();
    config.into()
}

fn failed(url: &str, reason: impl ToString) -> Error {
    Error::Usage(format!("cannot fetch {url}: {}", reason.to_string()))
}

fn text(agent: &ureq::Agent, url: &str) -> Result<String> {
    let mut response = agent.get(url).call().map_err(|e| failed(url, e))?;
    if !response.status().is_success() {
        return Err(failed(url, response.status()));
    }
    response.body_mut().with_config().limit(SUMS_MAX).read_to_string().map_err(|e| failed(url, e))
}

/// Fetches into `part`, from where an earlier attempt stopped if the file has not changed since.
fn download(agent: &ureq::Agent, url: &str, part: &Path, progress: &mut dyn Progress) -> Result<()> {
    // What the server said of the version that `part` begins with.
    let stamp_path = part.with_extension("part-version");
    let stamp = fs::read_to_string(&stamp_path).unwrap_or_default();
    let mut file = OpenOptions::new()
        .create(true)
        .append(false)
        .write(true)
        .truncate(false)
        .open(part)
        .map_err(Error::io(part))?;
    let mut have = if stamp.is_empty() { 0 } else { file.metadata().map_err(Error::io(part))?.len() };

    let mut request = agent.get(url);
    if have > 0 {
        request = request.header("Range", format!("bytes={have}-")).header("If-Range", stamp.trim());
    }
    let mut response = request.call().map_err(|e| failed(url, e))?;
    let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    match response.status().as_u16() {
        // RFC 9110, 15.3.7 and 14.4.
        206 if header("Content-Range").is_some_and(|r| r.starts_with(&format!("bytes {have}-"))) => {}
        200 => have = 0,
        416 if have > 0 => {
            // Nothing is missing, or the file has shrunk: a fresh start settles it.
            let _ = fs::remove_file(&stamp_path); // absent is as good
            file.set_len(0).map_err(Error::io(part))?;
            return download(agent, url, part, progress);
        }
        _ => return Err(failed(url, response.status())),
    }
    let length = header("Content-Length").and_then(|l| l.parse::<u64>().ok());
    let version = header("ETag").filter(|tag| tag.starts_with('"')).or_else(|| header("Last-Modified"));
    fs::write(&stamp_path, version.unwrap_or_default()).map_err(Error::io(&stamp_path))?;
    file.set_len(have).map_err(Error::io(part))?;
    file.seek(SeekFrom::Start(have)).map_err(Error::io(part))?;

    let total = length.map(|l| l + have);
    let mut body = response.body_mut().as_reader();
    let mut buffer = vec![0; 256 << 10];
    let mut done = have;
    loop {
        let n = body.read(&mut buffer).map_err(|e| {
            failed(url, format!("{e}, after {done} bytes; the next attempt goes on from there"))
        })?;
        if n == 0 {
            break;
        }
        file.write_all(&buffer[..n]).map_err(Error::io(part))?;
        done += n as u64;
        progress.bytes(done, total);
    }
    if total.is_some_and(|t| t != done) {
        return Err(failed(url, format!("it ended after {done} bytes; the next attempt goes on from there")));
    }
    file.sync_all().map_err(Error::io(part))?;
    let _ = fs::remove_file(&stamp_path); // complete: no later attempt will look
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Quiet;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::sync::{Arc, Mutex};

    /// A server of one file and its list of checksums. The first answer about the file breaks off half-way.
    fn serve(data: Vec<u8>, sums: String) -> (String, Arc<Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/images/disk.img", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let seen = log.clone();
        std::thread::spawn(move || {
            let mut first = true;
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(|l| l.ok());
                let request = lines.next().unwrap_or_default();
                let headers: Vec<_> = lines.take_while(|l| !l.is_empty()).collect();
                let range = headers
                    .iter()
                    .find_map(|h| h.to_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
                seen.lock().unwrap().push(format!("{request} {}", range.clone().unwrap_or_default()));
                let (status, extra, body) = if request.contains("SHA256SUMS") {
                    ("200 OK", String::new(), sums.clone().into_bytes())
                } else if !request.contains("disk.img") {
                    ("404 Not Found", String::new(), Vec::new())
                } else if let Some(from) = range.and_then(|r| r.trim_end_matches('-').parse::<usize>().ok()) {
                    let range = format!("Content-Range: bytes {from}-{}/{}\r\n", data.len() - 1, data.len());
                    ("206 Partial Content", range, data[from..].to_vec())
                } else {
                    ("200 OK", String::new(), data.clone())
                };
                let whole = body.len();
                let cut = if first && request.contains("disk.img") { whole / 2 } else { whole };
                first &= !request.contains("disk.img");
                let head = format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {whole}\r\nETag: \"v1\"\r\n{extra}Connection: close\r\n\r\n"
                );
                let _ = stream.write_all(head.as_bytes());
                let _ = stream.write_all(&body[..cut]);
            }
        });
        (url, log)
    }

    #[test]
    fn a_fetch_goes_on_where_it_broke_off_and_is_checked() {
        let data: Vec<u8> = (0..300_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
        let hex: String = Sha256::digest(&data).iter().map(|b| format!("{b:02x}")).collect();
        let (url, log) = serve(data.clone(), format!("{hex}  other.img\n{hex} *disk.img\n"));
        let cache = tempfile::tempdir().unwrap();
        let error = fetch(&url, None, cache.path(), &mut Quiet).unwrap_err().to_string();
        assert!(error.contains("goes on from there"), "{error}");
        let (path, checked) = fetch(&url, None, cache.path(), &mut Quiet).unwrap();
        assert!(checked);
        assert_eq!(fs::read(&path).unwrap(), data);
        assert!(log.lock().unwrap().iter().any(|l| l.ends_with(" 150000-")), "{:?}", log.lock().unwrap());
        // It is there now.
        let before = log.lock().unwrap().iter().filter(|l| l.contains("disk.img")).count();
        assert_eq!(fetch(&url, None, cache.path(), &mut Quiet).unwrap().0, path);
        assert_eq!(log.lock().unwrap().iter().filter(|l| l.contains("disk.img")).count(), before);
    }

    #[test]
    fn a_wrong_checksum_leaves_nothing_behind() {
        let (url, _) = serve(vec![1; 1000], String::new());
        let cache = tempfile::tempdir().unwrap();
        let wrong = Checksum::parse(&"0".repeat(64)).unwrap();
        let _ = fetch(&url, Some(&wrong), cache.path(), &mut Quiet); // breaks off half-way
        let error = fetch(&url, Some(&wrong), cache.path(), &mut Quiet).unwrap_err().to_string();
        assert!(error.contains("checksum"), "{error}");
        let left: Vec<_> = fs::read_dir(cache.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.iter().all(|n| n.to_string_lossy().ends_with(".lock")), "{left:?}");
        let error =
            fetch(&url.replace("disk", "none"), None, cache.path(), &mut Quiet).unwrap_err().to_string();
        assert!(error.contains("404"), "{error}");
    }

    #[test]
    fn checksums_and_addresses() {
        for bad in ["", "sha256:12", "md5:d41d8cd98f00b204e9800998ecf8427e", &"g".repeat(64)] {
            assert!(Checksum::parse(bad).is_err(), "{bad}");
        }
        assert!(Checksum::parse(&format!("sha512:{}", "A".repeat(128))).is_ok());
        assert!(Checksum::parse(&format!("sha512:{}", "a".repeat(64))).is_err());
        assert!(is_url("https://x/y") && !is_url("/x/y") && !is_url("file:///x"));
        assert_eq!(split("https://h/a/b.img?x=/y").unwrap(), ("https://h/a/", "b.img"));
        for bad in ["https://h/", "https://b.img", "https://h/a/..", "https://h/a b"] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }
}
