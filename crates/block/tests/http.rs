//! Images on a web server, with and without TLS.
#![allow(clippy::unwrap_used)] // a test that cannot be set up fails

mod common;

use block::{Create, Image, OpenOptions, Options, create_image};
use common::Random;
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

/// A small web server of one file.
struct Site {
    bytes: Mutex<Vec<u8>>,
    tag: AtomicU64,
    requests: AtomicU64,
    /// Answers to break off in the middle.
    breaks: AtomicU64,
    ranges: bool,
}

impl Site {
    fn new(bytes: Vec<u8>, ranges: bool) -> Arc<Self> {
        Arc::new(Site {
            bytes: Mutex::new(bytes),
            tag: 1.into(),
            requests: 0.into(),
            breaks: 0.into(),
            ranges,
        })
    }

    fn answer<S: Read + Write>(&self, stream: S) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream);
        loop {
            let (mut range, mut line, mut first) = (None, String::new(), String::new());
            loop {
                line.clear();
                if reader.read_line(&mut line)? == 0 {
                    return Ok(());
                }
                if first.is_empty() {
                    first = line.clone();
                }
                if let Some(text) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                    let (a, b) = text.trim().split_once('-').unwrap();
                    range = Some((a.parse::<usize>().unwrap(), b.parse::<usize>().unwrap() + 1));
                }
                if line.trim().is_empty() {
                    break;
                }
            }
            self.requests.fetch_add(1, Ordering::SeqCst);
            let bytes = self.bytes.lock().unwrap().clone();
            let tag = self.tag.load(Ordering::SeqCst);
            let out = reader.get_mut();
            let (status, extra, body) = match range.filter(|_| self.ranges) {
                _ if !first.contains("/disk") => ("404 Not Found", String::new(), &[][..]),
                Some((a, _)) if a >= bytes.len() => (
                    "416 Range Not Satisfiable",
                    format!("Content-Range: bytes */{}\r\n", bytes.len()),
                    &[][..],
                ),
                Some((a, b)) => {
                    let b = b.min(bytes.len());
                    let range = format!("Content-Range: bytes {a}-{}/{}\r\n", b - 1, bytes.len());
                    ("206 Partial Content", range, &bytes[a..b])
                }
                None => ("200 OK", String::new(), &bytes[..]),
            };
            write!(
                out,
                "HTTP/1.1 {status}\r\nETag: \"{tag}\"\r\n{extra}Content-Length: {}\r\n\r\n",
                body.len()
            )?;
            if self.breaks.load(Ordering::SeqCst) > 0 && body.len() > 1 {
                self.breaks.fetch_sub(1, Ordering::SeqCst);
                out.write_all(&body[..body.len() / 2])?;
                return out.flush();
            }
            out.write_all(body)?;
            out.flush()?;
        }
    }

    fn serve(self: &Arc<Self>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/disk", listener.local_addr().unwrap());
        let site = Arc::clone(self);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (site, stream) = (Arc::clone(&site), stream.unwrap());
                // A client that leaves ends the thread.
                std::thread::spawn(move || drop(site.answer(stream)));
            }
        });
        url
    }

    fn serve_tls(self: &Arc<Self>) -> String {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let config = Arc::new(config);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("https://localhost:{}/disk", listener.local_addr().unwrap().port());
        let site = Arc::clone(self);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (site, stream, config) = (Arc::clone(&site), stream.unwrap(), Arc::clone(&config));
                let session = rustls::ServerConnection::new(config).unwrap();
                std::thread::spawn(move || drop(site.answer(rustls::StreamOwned::new(session, stream))));
            }
        });
        url
    }
}

fn noise(len: usize) -> Vec<u8> {
    let mut random = Random(77);
    (0..len / 1000 + 1).flat_map(|_| random.bytes(1000)).take(len).collect()
}

fn assert_reads(image: &Image, bytes: &[u8]) {
    let mut random = Random(5);
    for _ in 0..40 {
        let at = random.below(bytes.len() as u64 - 1) as usize;
        let len = (1 + random.below(400_000) as usize).min(bytes.len() - at);
        let mut back = vec![0; len];
        image.read_at(&mut back, at as u64).unwrap();
        assert!(back == bytes[at..at + len], "{at} {len}");
    }
}

#[test]
fn ranges_are_read_and_cached() {
    let bytes = noise(3_000_000);
    let site = Site::new(bytes.clone(), true);
    let url = site.serve();
    assert!(Image::open(&url, &OpenOptions::writer(Some("raw"))).is_err());
    let image = Image::open(&url, &OpenOptions::reader(Some("raw"))).unwrap();
    assert_eq!(image.size(), bytes.len().next_multiple_of(512) as u64);
    let mut back = vec![0; bytes.len()];
    for at in (0..bytes.len()).step_by(10_000) {
        let end = (at + 10_000).min(bytes.len());
        image.read_at(&mut back[at..end], at as u64).unwrap();
    }
    assert!(back == bytes);
    let requests = site.requests.load(Ordering::SeqCst);
    assert!(requests < 12, "{requests} requests for 3 MB in order");
    assert_reads(&image, &bytes);
    assert_eq!(site.requests.load(Ordering::SeqCst), requests, "all of it was in the cache");
    let missing = Image::open(&url.replace("disk", "other"), &OpenOptions::reader(Some("raw")));
    assert!(missing.unwrap_err().to_string().contains("no such file"));
}

#[test]
fn table_formats_and_backing_files_are_read_over_http() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("d").to_str().unwrap().to_owned();
    create_image(&Create {
        format: "qcow2".into(),
        name: name.clone(),
        size: Some(4 << 20),
        ..Default::default()
    })
    .unwrap();
    let bytes = noise(4 << 20);
    let image = Image::open(&name, &OpenOptions::writer(Some("qcow2"))).unwrap();
    image.write_at(&bytes, 0).unwrap();
    image.close().unwrap();
    let site = Site::new(std::fs::read(&name).unwrap(), true);
    let url = site.serve();
    assert_reads(&Image::open(&url, &OpenOptions::reader(None)).unwrap(), &bytes);
    let top = dir.path().join("top").to_str().unwrap().to_owned();
    let backing = block::formats::Backing { name: url.clone(), format: Some("qcow2".into()) };
    create_image(&Create {
        format: "qcow2".into(),
        name: top.clone(),
        backing: Some(backing),
        ..Default::default()
    })
    .unwrap();
    let image = Image::open(&top, &OpenOptions::writer(Some("qcow2"))).unwrap();
    image.write_at(b"here", 100).unwrap();
    let mut back = vec![0; 1000];
    image.read_at(&mut back, 0).unwrap();
    assert!(back[..100] == bytes[..100] && &back[100..104] == b"here" && back[104..] == bytes[104..1000]);
    let json = format!(
        r#"json:{{"driver": "qcow2", "file": {{"driver": "http", "url": "{url}", "readahead": "64k"}}}}"#
    );
    assert_reads(&Image::open(&json, &OpenOptions::reader(None)).unwrap(), &bytes);
}

#[test]
fn what_goes_wrong_on_the_way_is_seen() {
    let bytes = noise(2_000_000);
    let site = Site::new(bytes.clone(), true);
    let url = site.serve();
    let image = Image::open(&url, &OpenOptions::reader(Some("raw"))).unwrap();
    // A connection that breaks is made anew.
    site.breaks.store(2, Ordering::SeqCst);
    let mut back = vec![0; 1000];
    image.read_at(&mut back, 0).unwrap();
    assert!(back == bytes[..1000]);
    // A file that changes is no longer the one that was opened.
    site.tag.store(2, Ordering::SeqCst);
    let error = image.read_at(&mut back, 1_900_000).unwrap_err().to_string();
    assert!(error.contains("changed"), "{error}");
    let whole = Site::new(bytes, false).serve();
    let error = Image::open(&whole, &OpenOptions::reader(Some("raw"))).unwrap_err().to_string();
    assert!(error.contains("ranges"), "{error}");
}

#[test]
fn certificates_are_checked_unless_told_otherwise() {
    let bytes = noise(500_000);
    let url = Site::new(bytes.clone(), true).serve_tls();
    assert!(Image::open(&url, &OpenOptions::reader(Some("raw"))).is_err());
    let options = OpenOptions {
        options: Options::parse(&format!("driver=raw,file.driver=https,file.url={url},file.sslverify=off"))
            .unwrap(),
        ..OpenOptions::reader(None)
    };
    assert_reads(&Image::open("", &options).unwrap(), &bytes);
}
