//! NBD: whatever a client sends to the server, and whatever a server sends to the client.
#![no_main]

use block::{
    Image, OpenOptions,
    nbd::{Export, NbdAddress, NbdStorage, Server, Socket},
    storage::{MemoryStorage, Storage, StorageOptions},
};
use libfuzzer_sys::fuzz_target;
use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    sync::Arc,
    time::Duration,
};

fuzz_target!(|bytes: &[u8]| {
    let Some((&side, bytes)) = bytes.split_first() else { return };
    if side & 1 == 0 {
        let storage = Arc::new(MemoryStorage::new(vec![0; 1 << 20]));
        let Ok(image) = Image::open_storage(storage, "m", &OpenOptions::writer(Some("raw"))) else { return };
        let server = Server::new(vec![Export {
            image: Arc::new(image),
            name: "e".into(),
            description: String::new(),
            read_only: false,
            multi_conn: true,
            allocation_depth: true,
            bitmaps: vec![("b".into(), 65536, vec![1; 2])],
        }]);
        let Ok((mut client, ours)) = UnixStream::pair() else { return };
        let bytes = bytes.to_vec();
        let feeder = std::thread::spawn(move || {
            // The server may leave early.
            let _ = client.write_all(&bytes);
            let _ = client.shutdown(std::net::Shutdown::Write);
            let _ = client.read_to_end(&mut Vec::new());
        });
        let _ = server.serve(Socket::Unix(ours));
        let _ = feeder.join();
    } else {
        let Ok(dir) = tempfile::tempdir() else { return };
        let path = dir.path().join("s");
        let Ok(listener) = UnixListener::bind(&path) else { return };
        let bytes = bytes.to_vec();
        let feeder = std::thread::spawn(move || {
            let Ok((mut stream, _)) = listener.accept() else { return };
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let address = NbdAddress { socket: Some(path), reconnect_delay: Duration::ZERO, ..Default::default() };
        if let Ok(storage) = NbdStorage::open(&address, &StorageOptions { read_only: true, ..Default::default() }) {
            let _ = storage.read_at(&mut [0; 1024], 0);
            let _ = storage.held(0, 4096);
        }
        let _ = feeder.join();
    }
});
