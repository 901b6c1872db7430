//! TLS for connections, with credentials in the files of QEMU's `tls-creds-x509` objects.
//!
//! The protocol code reads and writes a plain socket on two sides at once, which one TLS session does not allow. So the session
//! lives in two threads of its own, between the connection and a pair of unix sockets whose other end the protocol code gets.

use super::socket::Socket;
use crate::{Error, Result};
use rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{
        CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject,
    },
    server::WebPkiClientVerifier,
};
use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

/// Where certificates and keys are, as a `tls-creds-x509` object says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsCredentials {
    /// Directory of `ca-cert.pem`, `ca-crl.pem`, `server-cert.pem`, `server-key.pem`, `client-cert.pem` and `client-key.pem`;
    /// without one a client trusts the host's certificate authorities and has no certificate.
    pub directory: Option<PathBuf>,
    /// For the listening side.
    pub server: bool,
    /// Demand a certificate that the authority has signed.
    pub verify_peer: bool,
}

/// What a client needs to encrypt its connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsClient {
    /// Files.
    pub credentials: TlsCredentials,
    /// Name that the server's certificate must bear; the host's by default.
    pub hostname: Option<String>,
}

/// What a server needs, read and checked.
#[derive(Clone, Debug)]
pub struct TlsServer(Arc<ServerConfig>);

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn failed(what: &str) -> impl Fn(rustls::Error) -> Error + '_ {
    move |e| Error::unsupported(format!("{what}: {e}"))
}

/// Certificates in a file; `None` where there is no such file.
fn certificates(path: &Path) -> Result<Option<Vec<CertificateDer<'static>>>> {
    let name = path.display();
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(format!("Cannot load certificate '{name}'"), e)),
    };
    let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match list {
        Ok(list) if !list.is_empty() => Ok(Some(list)),
        Ok(_) => Err(Error::usage(format!("'{name}' holds no certificate"))),
        Err(e) => Err(Error::usage(format!("Unable to import certificate '{name}': {e}"))),
    }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(path)
        .map_err(|e| Error::usage(format!("Unable to import private key '{}': {e}", path.display())))
}

impl TlsCredentials {
    /// Credentials of a client.
    pub fn client(directory: Option<PathBuf>, verify_peer: bool) -> Self {
        TlsCredentials { directory, server: false, verify_peer }
    }

    /// Takes the properties of a `tls-creds-x509` object (`dir`, `endpoint`, `verify-peer`) out of a list.
    pub fn take(options: &mut crate::Options) -> Result<Self> {
        let directory = options.take("dir").map(PathBuf::from);
        if directory.is_none() {
            return Err(Error::usage("Parameter 'dir' of the TLS credentials is missing"));
        }
        let server = match options.take("endpoint").as_deref() {
            Some("server") => true,
            None | Some("client") => false,
            Some(other) => {
                return Err(Error::usage(format!(
                    "Parameter 'endpoint' does not accept value '{other}'; it is client or server"
                )));
            }
        };
        // Certificates are always checked for sanity, and the library chooses among safe ciphers alone.
        options.take_bool("sanity-check")?;
        for unsupported in ["passwordid", "priority"] {
            if options.take(unsupported).is_some() {
                return Err(Error::unsupported(format!(
                    "'{unsupported}' of TLS credentials is not supported; use an unencrypted key, and no priority"
                )));
            }
        }
        Ok(TlsCredentials {
            directory,
            server,
            verify_peer: options.take_bool("verify-peer")?.unwrap_or(true),
        })
    }

    fn authorities(&self) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        match &self.directory {
            Some(directory) => {
                let path = directory.join("ca-cert.pem");
                let list = certificates(&path)?.ok_or_else(|| {
                    Error::io(
                        format!("Cannot access credentials '{}'", path.display()),
                        std::io::Error::from_raw_os_error(libc::ENOENT),
                    )
                })?;
                for certificate in list {
                    roots.add(certificate).map_err(failed("The authority's certificate"))?;
                }
            }
            None => {
                for certificate in rustls_native_certs::load_native_certs().certs {
                    // Hosts carry odd certificates that no peer of ours uses.
                    let _ = roots.add(certificate);
                }
            }
        }
        Ok(roots)
    }

    fn revoked(&self) -> Result<Vec<CertificateRevocationListDer<'static>>> {
        let Some(path) = self.directory.as_ref().map(|d| d.join("ca-crl.pem")).filter(|p| p.exists()) else {
            return Ok(Vec::new());
        };
        CertificateRevocationListDer::pem_file_iter(&path)
            .and_then(Iterator::collect)
            .map_err(|e| Error::usage(format!("Unable to import '{}': {e}", path.display())))
    }

    fn client_config(&self) -> Result<ClientConfig> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(failed("TLS"))?;
        let builder = if self.verify_peer {
            let verifier = rustls::client::WebPkiServerVerifier::builder_with_provider(
                Arc::new(self.authorities()?),
                provider(),
            );
            let verifier = verifier
                .with_crls(self.revoked()?)
                .build()
                .map_err(|e| Error::usage(format!("TLS credentials: {e}")))?;
            builder.with_webpki_verifier(verifier)
        } else {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Trusting(provider())))
        };
        let Some(directory) = &self.directory else { return Ok(builder.with_no_client_auth()) };
        match certificates(&directory.join("client-cert.pem"))? {
            Some(chain) => builder
                .with_client_auth_cert(chain, key(&directory.join("client-key.pem"))?)
                .map_err(failed("The client's certificate")),
            None => Ok(builder.with_no_client_auth()),
        }
    }

    /// Reads what a server needs.
    pub fn server(&self) -> Result<TlsServer> {
        let Some(directory) = self.directory.as_ref().filter(|_| self.server) else {
            return Err(Error::usage("Expecting TLS credentials with a server endpoint"));
        };
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(failed("TLS"))?;
        let builder = if self.verify_peer {
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(self.authorities()?), provider());
            builder.with_client_cert_verifier(
                verifier
                    .with_crls(self.revoked()?)
                    .build()
                    .map_err(|e| Error::usage(format!("TLS credentials: {e}")))?,
            )
        } else {
            builder.with_no_client_auth()
        };
        let path = directory.join("server-cert.pem");
        let chain = certificates(&path)?.ok_or_else(|| {
            Error::io(
                format!("Cannot access credentials '{}'", path.display()),
                std::io::Error::from_raw_os_error(libc::ENOENT),
            )
        })?;
        let config = builder
            .with_single_cert(chain, key(&directory.join("server-key.pem"))?)
            .map_err(failed("The server's certificate"))?;
        Ok(TlsServer(Arc::new(config)))
    }
}

impl TlsClient {
    /// Does the handshake on a connected socket; the result is the plain side. `host` is the name connected to.
    pub(super) fn connect(&self, socket: Socket, host: &str) -> Result<Socket> {
        let host = self.hostname.as_deref().unwrap_or(host);
        if host.is_empty() {
            return Err(Error::usage(
                "A TLS connection over a unix socket needs tls-hostname, the name in the server's certificate",
            ));
        }
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| Error::usage(format!("'{host}' is no host name that a certificate could bear")))?;
        let session = ClientConnection::new(Arc::new(self.credentials.client_config()?), name)
            .map_err(failed("TLS"))?;
        wrap(session.into(), socket)
    }
}

impl TlsServer {
    /// Does the handshake with a client.
    pub(super) fn accept(&self, socket: Socket) -> Result<Socket> {
        let session = ServerConnection::new(Arc::clone(&self.0)).map_err(failed("TLS"))?;
        wrap(session.into(), socket)
    }
}

/// Completes the handshake, and starts the threads that carry bytes between the session and a socket pair.
fn wrap(mut session: Connection, mut socket: Socket) -> Result<Socket> {
    let failed = |e: std::io::Error| Error::io("TLS handshake failed", e);
    while session.is_handshaking() || session.wants_write() {
        session.complete_io(&mut socket).map_err(failed)?;
    }
    socket.set_read_timeout(None);
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    let session = Arc::new(Mutex::new(session));
    let sending = Arc::new(Mutex::new(socket.try_clone().map_err(failed)?));
    let (down_session, down_sending) = (Arc::clone(&session), Arc::clone(&sending));
    let mut plain_out = ours.try_clone().map_err(failed)?;
    std::thread::spawn(move || {
        // However the connection ends, the protocol code sees the end of its stream, and so does the other thread.
        let _ = receive(&down_session, &down_sending, socket, &mut plain_out);
        let _ = plain_out.shutdown(std::net::Shutdown::Both);
    });
    std::thread::spawn(move || {
        let _ = send(&session, &sending, ours);
    });
    Ok(Socket::Unix(theirs))
}

/// Moves what the session wants to send onto the connection, in order.
fn drain(session: &Mutex<Connection>, sending: &Mutex<Socket>) -> std::io::Result<()> {
    // Held over both, so that records leave in the order in which they were made.
    let mut out = sending.lock().unwrap_or_else(|e| e.into_inner());
    let mut bytes = Vec::new();
    {
        let mut session = session.lock().unwrap_or_else(|e| e.into_inner());
        while session.wants_write() {
            session.write_tls(&mut bytes)?;
        }
    }
    out.write_all(&bytes)
}

fn receive(
    session: &Mutex<Connection>,
    sending: &Mutex<Socket>,
    mut socket: Socket,
    plain: &mut UnixStream,
) -> std::io::Result<()> {
    let mut raw = vec![0; 64 << 10];
    let mut clear = Vec::new();
    // What came with the handshake may hold more than that.
    let mut n = 0;
    loop {
        clear.clear();
        let wants_write = {
            let mut session = session.lock().unwrap_or_else(|e| e.into_inner());
            let mut rest = &raw[..n];
            loop {
                if !rest.is_empty() {
                    session.read_tls(&mut rest)?;
                }
                let state = session.process_new_packets().map_err(std::io::Error::other)?;
                let at = clear.len();
                clear.resize(at + state.plaintext_bytes_to_read(), 0);
                if clear.len() > at {
                    session.reader().read_exact(&mut clear[at..])?;
                }
                if rest.is_empty() {
                    break;
                }
            }
            session.wants_write()
        };
        if wants_write {
            drain(session, sending)?;
        }
        plain.write_all(&clear)?;
        n = match socket.read(&mut raw) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(e),
        };
    }
}

fn send(session: &Mutex<Connection>, sending: &Mutex<Socket>, mut plain: UnixStream) -> std::io::Result<()> {
    let mut buf = vec![0; 64 << 10];
    loop {
        let n = match plain.read(&mut buf) {
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => 0,
        };
        {
            let mut session = session.lock().unwrap_or_else(|e| e.into_inner());
            session.set_buffer_limit(None);
            if n == 0 {
                session.send_close_notify();
            } else {
                session.writer().write_all(&buf[..n])?;
            }
        }
        let sent = drain(session, sending);
        if n == 0 || sent.is_err() {
            sending.lock().unwrap_or_else(|e| e.into_inner()).shutdown();
            return sent;
        }
    }
}

/// Takes any certificate: what `verify-peer=off` asks for.
#[derive(Debug)]
struct Trusting(Arc<CryptoProvider>);

impl ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
