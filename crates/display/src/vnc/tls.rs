//! Certificates for VeNCrypt.

use super::VncError;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A directory of certificates as QEMU's `tls-creds-x509` has them: `server-cert.pem`, `server-key.pem`, and
/// `ca-cert.pem` if viewers must have certificates too.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The directory.
    pub directory: PathBuf,
    /// Viewers must have a certificate of the authority.
    pub verify_peer: bool,
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, VncError> {
    let wrong =
        |e: &dyn std::fmt::Display| VncError::Config(format!("certificate '{}': {e}", path.display()));
    let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(|e| wrong(&e))?.collect();
    let all = all.map_err(|e| wrong(&e))?;
    if all.is_empty() {
        return Err(wrong(&"there is none in it"));
    }
    Ok(all)
}

impl TlsFiles {
    /// Reads the files.
    ///
    /// # Errors
    /// A file that is missing or wrong; the text names it.
    pub fn load(&self) -> Result<Arc<ServerConfig>, VncError> {
        let file = |name: &str| self.directory.join(name);
        let chain = certificates(&file("server-cert.pem"))?;
        let key_file = file("server-key.pem");
        let key = PrivateKeyDer::from_pem_file(&key_file)
            .map_err(|e| VncError::Config(format!("private key '{}': {e}", key_file.display())))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let wrong = |e: &dyn std::fmt::Display| {
            VncError::Config(format!("certificates in '{}': {e}", self.directory.display()))
        };
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| wrong(&e))?;
        let builder = if self.verify_peer {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(&file("ca-cert.pem"))? {
                roots.add(certificate).map_err(|e| wrong(&e))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|e| wrong(&e))?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        Ok(Arc::new(builder.with_single_cert(chain, key).map_err(|e| wrong(&e))?))
    }
}
