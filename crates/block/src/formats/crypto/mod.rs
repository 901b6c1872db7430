//! Encryption of disk sectors: block ciphers, chaining modes, tweaks by sector number, hashes and key derivation, as LUKS and
//! the AES images of qcow name them.

mod hash;
mod sector;

pub(crate) use hash::{Hash, base64_decode, merge_stripes, split_stripes};
pub(crate) use sector::{CipherName, SectorCipher, Tweak};

/// Overwrites key bytes; done before memory that held keys is freed.
pub(crate) fn wipe(bytes: &mut [u8]) {
    bytes.fill(0);
    std::hint::black_box(bytes);
}
