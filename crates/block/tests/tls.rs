//! NBD over TLS: our client on our server, and each on QEMU's.
#![allow(clippy::unwrap_used)] // a test that cannot be set up fails

mod common;

use block::{
    Create, Image, OpenOptions, Options, create_image,
    nbd::{Export, Server, Socket, TlsCredentials},
};
use common::{qemu, qemu_img};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use std::{collections::BTreeMap, net::TcpListener, path::Path, sync::Arc};

const SIZE: u64 = 4 << 20;

/// Writes an authority and what it signed, as QEMU names the files. Without `client`, the client has no certificate.
fn make_credentials(dir: &Path, client: bool) {
    std::fs::create_dir_all(dir).unwrap();
    let put = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(rcgen::DnType::CommonName, "authority");
    let key = KeyPair::generate().unwrap();
    put("ca-cert.pem", params.self_signed(&key).unwrap().pem());
    let issuer = Issuer::new(params, key);
    for (name, usage) in
        [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
    {
        if name == "client" && !client {
            continue;
        }
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.extended_key_usages = vec![usage];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        put(&format!("{name}-cert.pem"), params.signed_by(&key, &issuer).unwrap().pem());
        put(&format!("{name}-key.pem"), key.serialize_pem());
    }
}

fn image(dir: &Path) -> Arc<Image> {
    let name = dir.join("d").to_str().unwrap().to_owned();
    let create = Create { format: "raw".into(), name: name.clone(), size: Some(SIZE), ..Default::default() };
    create_image(&create).unwrap();
    Arc::new(Image::open(&name, &OpenOptions::writer(Some("raw"))).unwrap())
}

fn serve(image: &Arc<Image>, credentials: &Path) -> u16 {
    let files = TlsCredentials { directory: Some(credentials.to_owned()), server: true, verify_peer: true };
    let server = Server::new(vec![Export {
        image: Arc::clone(image),
        name: "disk".into(),
        description: String::new(),
        read_only: false,
        multi_conn: true,
        allocation_depth: false,
        bitmaps: Vec::new(),
    }]);
    let server = Arc::new(server.with_tls(files.server().unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (server, stream) = (Arc::clone(&server), stream.unwrap());
            std::thread::spawn(move || server.serve(Socket::Tcp(stream)));
        }
    });
    port
}

fn open(port: u16, credentials: &Path) -> block::Result<Image> {
    let files = TlsCredentials::client(Some(credentials.to_owned()), true);
    let options = OpenOptions {
        credentials: Arc::new(BTreeMap::from([("tls0".to_owned(), files)])),
        options: Options::parse(&format!("driver=nbd,host=localhost,port={port},export=disk,tls-creds=tls0"))
            .unwrap(),
        ..Default::default()
    };
    Image::open("", &options)
}

fn pattern() -> Vec<u8> {
    (0..SIZE as usize).map(|i| (i / 777) as u8).collect()
}

#[test]
fn own_client_and_server_speak_only_to_whom_they_know() {
    let dir = tempfile::tempdir().unwrap();
    let (good, strange, bare) =
        (dir.path().join("good"), dir.path().join("strange"), dir.path().join("bare"));
    make_credentials(&good, true);
    make_credentials(&strange, true);
    make_credentials(&bare, false);
    std::fs::copy(good.join("ca-cert.pem"), bare.join("ca-cert.pem")).unwrap();
    let local = image(dir.path());
    let port = serve(&local, &good);
    let remote = open(port, &good).unwrap();
    let bytes = pattern();
    // Several threads at once, in pieces larger and smaller than TLS records.
    std::thread::scope(|scope| {
        for (t, part) in bytes.chunks(SIZE as usize / 4).enumerate() {
            let remote = &remote;
            scope.spawn(move || {
                let mut at = t as u64 * SIZE / 4;
                for piece in part.chunks(70_001) {
                    remote.write_at(piece, at).unwrap();
                    let mut back = vec![0; piece.len()];
                    remote.read_at(&mut back, at).unwrap();
                    assert!(back == piece);
                    at += piece.len() as u64;
                }
            });
        }
    });
    remote.flush().unwrap();
    let mut back = vec![0; SIZE as usize];
    local.read_at(&mut back, 0).unwrap();
    assert!(back == bytes);
    drop(remote);
    assert!(open(port, &strange).is_err(), "another authority");
    assert!(open(port, &bare).is_err(), "no certificate");
    let plain = format!("nbd://localhost:{port}/disk");
    let error = Image::open(&plain, &OpenOptions::reader(Some("raw"))).unwrap_err().to_string();
    assert!(error.contains("TLS"), "{error}");
    let named =
        format!("nbds://localhost:{port}/disk?tls-certificates={}&tls-hostname=elsewhere", good.display());
    assert!(Image::open(&named, &OpenOptions::reader(Some("raw"))).is_err(), "another name");
}

#[test]
fn qemu_is_our_client() {
    let dir = tempfile::tempdir().unwrap();
    let credentials = dir.path().join("c");
    make_credentials(&credentials, true);
    let local = image(dir.path());
    let bytes = pattern();
    local.write_at(&bytes, 0).unwrap();
    let port = serve(&local, &credentials);
    let (plain, object) = (
        dir.path().join("plain").to_str().unwrap().to_owned(),
        format!("tls-creds-x509,id=tls0,dir={},endpoint=client", credentials.display()),
    );
    let source = format!("driver=nbd,host=localhost,port={port},export=disk,tls-creds=tls0");
    let args = ["convert", "--object", &object, "--image-opts", "-O", "raw", &source, &plain];
    if qemu_img(&args).is_some() {
        assert!(std::fs::read(&plain).unwrap() == bytes);
    }
}

#[test]
fn qemu_is_our_server() {
    let Some(mut command) = qemu("qemu-nbd") else { return };
    let dir = tempfile::tempdir().unwrap();
    let credentials = dir.path().join("c");
    make_credentials(&credentials, true);
    let file = dir.path().join("d");
    std::fs::write(&file, pattern()).unwrap();
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let object = format!("tls-creds-x509,id=tls0,dir={},endpoint=server", credentials.display());
    let mut child = command
        .args(["--object", &object, "--tls-creds", "tls0", "-b", "127.0.0.1", "-f", "raw", "-x", "disk"])
        .args(["-p", &port.to_string(), file.to_str().unwrap()])
        .spawn()
        .unwrap();
    let mut result = open(port, &credentials);
    for _ in 0..100 {
        if result.is_ok() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        result = open(port, &credentials);
    }
    let remote = result.unwrap();
    let mut back = vec![0; SIZE as usize];
    remote.read_at(&mut back, 0).unwrap();
    assert!(back == pattern());
    drop(remote);
    child.wait().unwrap();
}
