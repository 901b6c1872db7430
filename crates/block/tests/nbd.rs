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
