//! NBD: our client on our server, on QEMU's server, and QEMU's client on ours.
#![allow(clippy::unwrap_used)] // a test that cannot be set up fails

mod common;

use block::{
    Create, Image, OpenOptions, create_image,
    nbd::{Export, Server, Socket},
};
use common::{Random, qemu, qemu_img};
use std::{
    os::unix::net::UnixListener,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

const SIZE: u64 = 8 << 20;

fn image(dir: &Path, name: &str) -> String {
    let name = dir.join(name).to_str().unwrap().to_owned();
    create_image(&Create {
        format: "qcow2".into(),
        name: name.clone(),
        size: Some(SIZE),
        ..Default::default()
    })
    .unwrap();
    name
}

/// Serves an image for as long as the test's process lives.
fn serve(name: &str, socket: &Path, read_only: bool) -> Arc<Image> {
    let options = OpenOptions { read_only, discard: true, ..OpenOptions::writer(Some("qcow2")) };
    let image = Arc::new(Image::open(name, &options).unwrap());
    let bits = vec![0b1010_1010; (SIZE / 65536 / 8) as usize];
    let server = Arc::new(Server::new(vec![Export {
        image: Arc::clone(&image),
        name: "disk".into(),
        description: "a disk".into(),
        read_only,
        multi_conn: true,
        allocation_depth: true,
        bitmaps: vec![("b0".into(), 65536, bits)],
    }]));
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (server, stream) = (Arc::clone(&server), stream.unwrap());
            std::thread::spawn(move || server.serve(Socket::Unix(stream)));
        }
    });
    image
}

/// Random work through a connection, against memory.
fn exercise(remote: &Image) -> Vec<u8> {
    let mut model = vec![0u8; SIZE as usize];
    let mut random = Random(5);
    for step in 0..300 {
        let at = random.below(SIZE - 100_000);
        let len = 1 + random.below(100_000);
        let range = at as usize..(at + len) as usize;
        match random.below(4) {
            0 | 1 => {
                let bytes = random.bytes(len as usize);
                remote.write_at(&bytes, at).unwrap();
                model[range].copy_from_slice(&bytes);
            }
            2 => {
                remote.write_zeroes(at, len, step % 2 == 0).unwrap();
                model[range].fill(0);
            }
            _ => {
                let mut bytes = vec![1; len as usize];
                remote.read_at(&mut bytes, at).unwrap();
                assert!(bytes == model[range], "step {step}");
            }
        }
    }
    remote.flush().unwrap();
    model
}

#[test]
fn own_client_and_server() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let local = serve(&image(dir.path(), "d"), &socket, false);
    let url = format!("nbd+unix:///disk?socket={}", socket.display());
    let remote = Image::open(&url, &OpenOptions::writer(Some("raw"))).unwrap();
    assert_eq!(remote.size(), SIZE);
    let model = exercise(&remote);
    let mut bytes = vec![1; SIZE as usize];
    local.read_at(&mut bytes, 0).unwrap();
    assert!(bytes == model);
    let mut entries = Vec::new();
    remote.map(0, SIZE, &mut entries).unwrap();
    assert!(!entries.is_empty());
    assert!(remote.read_at(&mut [0; 10], SIZE - 5).is_err());
    // Many requests at once over one connection.
    std::thread::scope(|scope| {
        for t in 0..4u64 {
            let (remote, model) = (&remote, &model);
            scope.spawn(move || {
                let mut random = Random(t + 1);
                for _ in 0..300 {
                    let at = random.below(SIZE - 9000);
                    let mut bytes = vec![1; 1 + random.below(9000) as usize];
                    remote.read_at(&mut bytes, at).unwrap();
                    assert!(bytes[..] == model[at as usize..at as usize + bytes.len()]);
                }
            });
        }
    });
    assert!(Image::open(&url.replace("disk", "other"), &OpenOptions::reader(Some("raw"))).is_err());
}

#[test]
fn read_only_exports_refuse_writers() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    serve(&image(dir.path(), "d"), &socket, true);
    let url = format!("nbd:unix:{}", socket.display());
    assert!(Image::open(&url, &OpenOptions::writer(Some("raw"))).is_err());
    Image::open(&url, &OpenOptions::reader(Some("raw"))).unwrap();
}

#[test]
fn qemu_is_our_client() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let name = image(dir.path(), "d");
    let local = serve(&name, &socket, false);
    let url = format!("nbd+unix:///disk?socket={}", socket.display());
    let source = dir.path().join("source");
    let mut bytes = vec![0; SIZE as usize];
    let mut random = Random(3);
    for _ in 0..20 {
        let at = random.below(SIZE - 50_000) as usize;
        let piece = random.bytes(50_000);
        bytes[at..at + piece.len()].copy_from_slice(&piece);
    }
    std::fs::write(&source, &bytes).unwrap();
    if qemu_img(&["convert", "-n", "-f", "raw", "-O", "raw", source.to_str().unwrap(), &url]).is_none() {
        return;
    }
    let mut back = vec![1; SIZE as usize];
    local.read_at(&mut back, 0).unwrap();
    assert!(back == bytes);
    qemu_img(&["compare", "-f", "raw", "-F", "raw", source.to_str().unwrap(), &url]);
    let map = qemu_img(&["map", "--output=json", "-f", "raw", &url]).unwrap();
    assert!(map.contains("\"zero\": true") && map.contains("\"zero\": false"), "{map}");
    let dirty = format!(
        "driver=nbd,server.type=unix,server.path={},export=disk,x-dirty-bitmap=qemu:dirty-bitmap:b0",
        socket.display()
    );
    let map = qemu_img(&["map", "--output=json", "--image-opts", &dirty]).unwrap();
    assert!(map.matches("\"start\"").count() >= 64, "{map}");
}

#[test]
fn qemu_is_our_server() {
    let Some(mut command) = qemu("qemu-nbd") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (name, socket) = (image(dir.path(), "d"), dir.path().join("s"));
    let mut child = command
        .args(["-f", "qcow2", "-x", "exp", "--discard=unmap", "-k", socket.to_str().unwrap(), &name])
        .spawn()
        .unwrap();
    let started = Instant::now();
    while !socket.exists() && started.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let url = format!("nbd+unix:///exp?socket={}", socket.display());
    let remote = Image::open(&url, &OpenOptions::writer(Some("raw"))).unwrap();
    let model = exercise(&remote);
    drop(remote);
    // qemu-nbd leaves with its last client.
    child.wait().unwrap();
    let mut bytes = vec![1; SIZE as usize];
    Image::open(&name, &OpenOptions::reader(Some("qcow2"))).unwrap().read_at(&mut bytes, 0).unwrap();
    assert!(bytes == model);
}

/// Damages bytes here and there.
fn damage(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for _ in 0..random.below(4) {
        let at = random.below(out.len() as u64) as usize;
        match random.below(3) {
            0 => out[at] ^= 1 << random.below(8),
            1 => out[at] = random.next() as u8,
            _ => out.truncate(at.max(1)),
        }
    }
    out
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut out = b"IHAVEOPT".to_vec();
    out.extend(number.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

#[test]
fn clients_that_send_anything_are_survived() {
    use std::io::{Read, Write};
    let storage = Arc::new(block::storage::MemoryStorage::new(vec![7; 1 << 20]));
    let image = Arc::new(Image::open_storage(storage, "m", &OpenOptions::writer(Some("raw"))).unwrap());
    let server = Server::new(vec![Export {
        image,
        name: "e".into(),
        description: String::new(),
        read_only: false,
        multi_conn: true,
        allocation_depth: true,
        bitmaps: vec![("b".into(), 65536, vec![1; 2])],
    }]);
    let go = [&[0, 0, 0, 1, b'e'][..], &[0, 0]].concat();
    let contexts = [&[0, 0, 0, 1, b'e'][..], &[0, 0, 0, 1, 0, 0, 0, 15], b"base:allocation"].concat();
    for extended in [false, true] {
        let mut good = 3u32.to_be_bytes().to_vec();
        good.extend(option(if extended { 11 } else { 8 }, &[]));
        good.extend(option(3, &[]));
        good.extend(option(10, &contexts));
        good.extend(option(6, &go));
        good.extend(option(7, &go));
        for (cookie, (command, len)) in
            [(0u16, 4096u64), (1, 8), (3, 0), (4, 512), (6, 4096), (7, 65536)].iter().enumerate()
        {
            good.extend(if extended { 0x21e4_1c71u32 } else { 0x2560_9513 }.to_be_bytes());
            good.extend((if extended && *command == 1 { 32u16 } else { 0 }).to_be_bytes());
            good.extend(command.to_be_bytes());
            good.extend((cookie as u64).to_be_bytes());
            good.extend(512u64.to_be_bytes());
            if extended {
                good.extend(len.to_be_bytes());
            } else {
                good.extend((*len as u32).to_be_bytes());
            }
            if *command == 1 {
                good.extend([9; 8]);
            }
        }
        let mut random = Random(3);
        for round in 0..200 {
            let bytes = if round == 0 { good.clone() } else { damage(&good, &mut random) };
            let (mut client, ours) = std::os::unix::net::UnixStream::pair().unwrap();
            let feeder = std::thread::spawn(move || {
                // The server may have left already.
                let _ = client.write_all(&bytes);
                let _ = client.shutdown(std::net::Shutdown::Write);
                let mut said = Vec::new();
                let _ = client.read_to_end(&mut said);
                said
            });
            let result = server.serve(Socket::Unix(ours));
            let said = feeder.join().unwrap();
            if round == 0 {
                result.unwrap();
                assert!(said.len() > 4096, "{} bytes", said.len());
            }
        }
    }
}

#[test]
fn servers_that_send_anything_are_survived() {
    use block::{
        nbd::{NbdAddress, NbdStorage},
        storage::{Storage, StorageOptions},
    };
    use std::io::{Read, Write};
    let reply = |option: u32, kind: u32, data: &[u8]| {
        let mut out = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
        out.extend(option.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        out
    };
    // A server with structured replies: greeting, negotiation, then data for the first read.
    let mut good = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    good.extend(reply(11, (1 << 31) + 1, b"no"));
    good.extend(reply(8, 1, &[]));
    good.extend(reply(10, 4, &[&1u32.to_be_bytes()[..], b"base:allocation"].concat()));
    good.extend(reply(10, 1, &[]));
    good.extend(reply(
        7,
        3,
        &[&0u16.to_be_bytes()[..], &(1u64 << 20).to_be_bytes(), &0x5u16.to_be_bytes()].concat(),
    ));
    good.extend(reply(7, 1, &[]));
    good.extend(0x668e_33efu32.to_be_bytes());
    good.extend([0, 1, 0, 1]);
    good.extend(0u64.to_be_bytes());
    good.extend((8u32 + 512).to_be_bytes());
    good.extend(0u64.to_be_bytes());
    good.extend([0x5a; 512]);
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(9);
    for round in 0..300 {
        let bytes = if round == 0 { good.clone() } else { damage(&good, &mut random) };
        let path = dir.path().join(format!("s{round}"));
        let listener = UnixListener::bind(&path).unwrap();
        let feeder = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let address =
            NbdAddress { socket: Some(path), reconnect_delay: Duration::ZERO, ..Default::default() };
        let options = StorageOptions { read_only: true, ..Default::default() };
        let mut buf = [0; 512];
        let read = NbdStorage::open(&address, &options).and_then(|s| s.read_at(&mut buf, 0));
        if round == 0 {
            read.unwrap();
            assert_eq!(buf, [0x5a; 512]);
        }
        feeder.join().unwrap();
    }
}

#[test]
fn a_server_that_comes_back_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let name = image(dir.path(), "d");
    let path = dir.path().join("s");
    let open = || {
        let options = OpenOptions { read_only: true, no_locks: true, ..OpenOptions::reader(Some("qcow2")) };
        Arc::new(Image::open(&name, &options).unwrap())
    };
    let server = |image| {
        Server::new(vec![Export {
            image,
            name: "disk".into(),
            description: String::new(),
            read_only: true,
            multi_conn: true,
            allocation_depth: false,
            bitmaps: Vec::new(),
        }])
    };
    // The first server ends its connection after a moment, and is gone for a while.
    let listener = UnixListener::bind(&path).unwrap();
    let first = std::thread::spawn({
        let server = server(open());
        move || {
            let stream = listener.accept().unwrap().0;
            let end = stream.try_clone().unwrap();
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(300));
                end.shutdown(std::net::Shutdown::Both).unwrap();
            });
            // However it ends.
            let _ = server.serve(Socket::Unix(stream));
        }
    });
    let options = OpenOptions {
        options: block::Options::parse(&format!(
            "driver=nbd,path={},export=disk,reconnect-delay=20",
            path.display()
        ))
        .unwrap(),
        ..OpenOptions::reader(None)
    };
    let remote = Image::open("", &options).unwrap();
    let mut buf = [1; 4096];
    remote.read_at(&mut buf, 0).unwrap();
    first.join().unwrap();
    std::fs::remove_file(&path).unwrap();
    let (again, second) = (path.clone(), server(open()));
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        let listener = UnixListener::bind(again).unwrap();
        drop(second.serve(Socket::Unix(listener.accept().unwrap().0)));
    });
    buf.fill(1);
    remote.read_at(&mut buf, 8192).unwrap();
    assert_eq!(buf, [0; 4096]);
}
