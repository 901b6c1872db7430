//! A Debian guest on the user-mode network: DHCP, IPv4 and IPv6 downloads, a forwarded port, a dump.
#![allow(clippy::unwrap_used)] // a test that cannot set itself up may panic

mod common;

use common::{Run, guest, kvasir};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

const LENGTH: usize = 3_000_000;
/// MD5 of what [`body`] returns.
const MD5: &str = "6ae0b77792212fbaa865005a9dd2b6d3";

/// Bytes that no shift of them equals.
fn body() -> Vec<u8> {
    (0..LENGTH as u32 / 4).flat_map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()).collect()
}

/// Serves [`body`] to everyone; returns the port.
fn serve(address: &str) -> u16 {
    let listener = TcpListener::bind(address).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {LENGTH}\r\n\r\n");
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body()));
        }
    });
    port
}

#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn a_guest_gets_an_address_downloads_and_is_reached() {
    let (v4, v6) = (serve("127.0.0.1:0"), serve("[::1]:0"));
    let forward = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let dump = tempfile::NamedTempFile::new().unwrap();
    let network = format!(
        "user,host-loopback=on,hostfwd=tcp:127.0.0.1:{forward}-:7,dump={},dump-maxlen=128",
        dump.path().display()
    );
    let append = format!(
        "console=ttyS0 quiet panic=-1 kvasir.test=net kvasir.get=http://10.0.2.2:{v4}/ \
         kvasir.get6=http://[fec0::2]:{v6}/"
    );
    let (kernel, initrd) = (guest("vmlinux"), guest("initramfs.cpio"));
    let args = [
        "run", "--accel", "soft", "--kernel", &kernel, "--initrd", &initrd, "--append", &append, "--net",
        &network,
    ];
    let mut run = Run::start(kvasir(&args), Duration::from_secs(300));
    run.wait_for("NET-SERVING");
    // The guest says so just before it listens: until then connections are reset.
    let mut echo = [0; 15];
    let client = (0..100).find_map(|_| {
        let mut client = TcpStream::connect(("127.0.0.1", forward)).unwrap();
        let echoed = client.write_all(b"over the bridge").and_then(|()| client.read_exact(&mut echo));
        if echoed.is_err() {
            std::thread::sleep(Duration::from_millis(100));
        }
        echoed.is_ok().then_some(client)
    });
    let client = client.expect("the guest answers");
    assert_eq!(&echo, b"over the bridge");
    client.shutdown(Shutdown::Both).unwrap();
    let end = run.finish();
    assert_eq!(end.status, Some(0), "{}\n{}", end.stdout, end.stderr);
    let facts = [
        "NET-DHCP 10.0.2.15/24 router 10.0.2.2 dns 10.0.2.3".to_owned(),
        format!("NET-GOT 4 {LENGTH} {MD5}"),
        format!("NET-GOT 6 {LENGTH} {MD5}"),
        "NET-RESULT ok".to_owned(),
    ];
    for fact in facts {
        assert!(end.stdout.contains(&fact), "{fact}: {}\n{}", end.stdout, end.stderr);
    }
    let dump = std::fs::read(dump.path()).unwrap();
    assert_eq!(dump[..4], 0xa1b2_3c4du32.to_ne_bytes());
    assert!(dump.len() > 10_000, "both downloads are in the dump");
}

#[test]
fn bad_networks_are_explained() {
    for (net, hint) in [
        ("usr", "did you mean 'user'?"),
        ("user,hostfwd=tcp:22", "tcp::2222-:22"),
        ("user,net=10.0.2.0/31", "4 to 27 bits"),
        ("user,restirct=on", "did you mean 'restrict'?"),
        ("socket", "exactly one of"),
    ] {
        let end = common::run(&["run", "--kernel", "/dev/null", "--net", net]);
        assert_eq!(end.status, Some(2), "{net}: {}", end.stderr);
        assert!(end.stderr.contains(hint), "{net}: {}", end.stderr);
    }
}
