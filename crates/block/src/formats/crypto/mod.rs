//! Encryption of disk sectors: block ciphers, chaining modes, tweaks by sector number, hashes and key derivation, as LUKS and
//! the AES images of qcow name them.

use crate::{Error, Options, Result};
use std::collections::BTreeMap;

mod hash;
mod sector;

pub(crate) use hash::{Hash, base64_decode, merge_stripes, split_stripes};
pub(crate) use sector::{CipherName, SectorCipher, Tweak};

/// Bytes of a key, overwritten when they are no longer needed.
pub(crate) struct KeyBytes(Vec<u8>);

impl KeyBytes {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        KeyBytes(bytes)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for KeyBytes {
    fn drop(&mut self) {
        wipe(&mut self.0);
    }
}

/// The secret that the option `key` names.
pub(crate) fn secret<'a>(
    options: &mut Options,
    key: &str,
    secrets: &'a BTreeMap<String, Vec<u8>>,
) -> Result<Option<&'a [u8]>> {
    let Some(id) = options.take(key) else { return Ok(None) };
    secrets.get(&id).map(|s| Some(s.as_slice())).ok_or_else(|| {
        Error::usage(format!("No secret with id '{id}'; define it with --object secret,id={id},..."))
    })
}

/// The cipher of qcow's and qcow2's old encryption: AES-128 in CBC mode, whose key is the passphrase itself, cut or filled up
/// with zeros.
pub(crate) fn passphrase_cipher(passphrase: &[u8]) -> Result<SectorCipher> {
    let mut key = KeyBytes::new(vec![0; 16]);
    let n = passphrase.len().min(16);
    key.bytes_mut()[..n].copy_from_slice(&passphrase[..n]);
    SectorCipher::new(CipherName::Aes, "cbc-plain64", key.bytes(), Tweak::Guest)
}

/// Overwrites key bytes; done before memory that held keys is freed.
pub(crate) fn wipe(bytes: &mut [u8]) {
    bytes.fill(0);
    std::hint::black_box(bytes);
}
