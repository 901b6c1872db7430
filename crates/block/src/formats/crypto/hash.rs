//! Hashes by name, key derivation, and the anti-forensic stripes of LUKS ("LUKS On-Disk Format Specification" 1.2.3, 2.4).

use crate::{Error, Result};
use sha2::Digest;

/// A hash function that LUKS headers name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // the names say it
pub(crate) enum Hash {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
}

impl Hash {
    const ALL: [(Hash, &'static str, usize); 6] = [
        (Hash::Sha1, "sha1", 20),
        (Hash::Sha224, "sha224", 28),
        (Hash::Sha256, "sha256", 32),
        (Hash::Sha384, "sha384", 48),
        (Hash::Sha512, "sha512", 64),
        (Hash::Ripemd160, "ripemd160", 20),
    ];

    /// By its name.
    pub(crate) fn parse(name: &str) -> Result<Self> {
        Self::ALL
            .iter()
            .find(|(_, n, _)| *n == name)
            .map(|(h, ..)| *h)
            .ok_or_else(|| Error::unsupported(format!("Unsupported hash algorithm '{name}'")))
    }

    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        Self::ALL.iter().find(|(h, ..)| *h == self).map_or("", |(_, name, _)| name)
    }

    /// Bytes of a digest.
    pub(crate) fn len(self) -> usize {
        Self::ALL.iter().find(|(h, ..)| *h == self).map_or(0, |(.., len)| *len)
    }

    /// The digest of the parts one after the other.
    pub(crate) fn digest(self, parts: &[&[u8]]) -> Vec<u8> {
        fn run<D: Digest>(parts: &[&[u8]]) -> Vec<u8> {
            let mut digest = D::new();
            for part in parts {
                digest.update(part);
            }
            digest.finalize().to_vec()
        }
        match self {
            Hash::Sha1 => run::<sha1::Sha1>(parts),
            Hash::Sha224 => run::<sha2::Sha224>(parts),
            Hash::Sha256 => run::<sha2::Sha256>(parts),
            Hash::Sha384 => run::<sha2::Sha384>(parts),
            Hash::Sha512 => run::<sha2::Sha512>(parts),
            Hash::Ripemd160 => run::<ripemd::Ripemd160>(parts),
        }
    }

    /// PBKDF2 (RFC 8018) with HMAC of this hash.
    pub(crate) fn pbkdf2(self, password: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        match self {
            Hash::Sha1 => pbkdf2::pbkdf2_hmac::<sha1::Sha1>(password, salt, iterations, out),
            Hash::Sha224 => pbkdf2::pbkdf2_hmac::<sha2::Sha224>(password, salt, iterations, out),
            Hash::Sha256 => pbkdf2::pbkdf2_hmac::<sha2::Sha256>(password, salt, iterations, out),
            Hash::Sha384 => pbkdf2::pbkdf2_hmac::<sha2::Sha384>(password, salt, iterations, out),
            Hash::Sha512 => pbkdf2::pbkdf2_hmac::<sha2::Sha512>(password, salt, iterations, out),
            Hash::Ripemd160 => pbkdf2::pbkdf2_hmac::<ripemd::Ripemd160>(password, salt, iterations, out),
        }
    }

    /// Spreads every bit of `block` over all of it.
    fn diffuse(self, block: &mut [u8]) {
        for (i, part) in block.chunks_mut(self.len()).enumerate() {
            let digest = self.digest(&[&(i as u32).to_be_bytes(), part]);
            let n = part.len();
            part.copy_from_slice(&digest[..n]);
        }
    }
}

fn xor(block: &mut [u8], with: &[u8]) {
    for (a, b) in block.iter_mut().zip(with) {
        *a ^= b;
    }
}

/// Joins the stripes of a key; `stripes` holds a whole number of keys of `len` bytes.
pub(crate) fn merge_stripes(hash: Hash, stripes: &[u8], len: usize) -> Vec<u8> {
    let mut key = vec![0; len];
    let count = stripes.len() / len;
    for (i, stripe) in stripes.chunks_exact(len).enumerate() {
        xor(&mut key, stripe);
        if i + 1 < count {
            hash.diffuse(&mut key);
        }
    }
    key
}

/// Spreads a key over `count` stripes, so that losing any of them loses the key.
pub(crate) fn split_stripes(hash: Hash, key: &[u8], count: usize) -> Result<Vec<u8>> {
    let mut stripes = vec![0; key.len() * count];
    let last = key.len() * (count - 1);
    crate::formats::support::random_bytes(&mut stripes[..last])?;
    let mut block = vec![0; key.len()];
    for stripe in stripes[..last].chunks_exact(key.len()) {
        xor(&mut block, stripe);
        hash.diffuse(&mut block);
    }
    xor(&mut block, key);
    stripes[last..].copy_from_slice(&block);
    Ok(stripes)
}

/// The bytes of a base64 text (RFC 4648); white space in it is skipped. `None` if it is none.
pub(crate) fn base64_decode(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut value, mut bits, mut ended) = (0u32, 0, false);
    for byte in text.bytes().filter(|b| !b.is_ascii_whitespace()) {
        let digit = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => {
                ended = true;
                continue;
            }
            _ => return None,
        };
        if ended {
            return None;
        }
        value = value << 6 | u32::from(digit);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            out.push((value >> bits) as u8);
            value &= (1 << bits) - 1;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stripes_join_again() {
        for (hash, ..) in Hash::ALL {
            let key: Vec<u8> = (0..64).collect();
            let mut stripes = split_stripes(hash, &key, 40).unwrap();
            assert_eq!(merge_stripes(hash, &stripes, 64), key);
            stripes[100] ^= 1;
            assert_ne!(merge_stripes(hash, &stripes, 64), key);
            assert_eq!(Hash::parse(hash.name()).unwrap(), hash);
            assert_eq!(hash.digest(&[b"x"]).len(), hash.len());
        }
    }

    #[test]
    fn pbkdf2_gives_the_published_vector() {
        let mut out = [0; 20];
        Hash::Sha1.pbkdf2(b"password", b"salt", 2, &mut out);
        assert_eq!(out[..6], [0xea, 0x6c, 0x01, 0x4d, 0xc7, 0x2d]);
    }

    #[test]
    fn base64() {
        assert_eq!(base64_decode("aGVs\n bG8=").unwrap(), b"hello");
        assert_eq!(base64_decode("").unwrap(), b"");
        assert!(base64_decode("a$b").is_none() && base64_decode("=aaa").is_none());
    }
}
