//! VNC authentication (RFC 6143, 7.2.2): a challenge encrypted with DES by a password of eight characters.

use des::Des;
use des::cipher::{BlockCipherEncrypt, KeyInit};

/// Length of challenge and response.
pub(super) const CHALLENGE: usize = 16;

/// What a viewer that knows the password answers.
pub(super) fn response(password: &str, challenge: &[u8; CHALLENGE]) -> [u8; CHALLENGE] {
    let mut key = [0; 8];
    for (k, p) in key.iter_mut().zip(password.bytes()) {
        // The protocol's DES takes the bits of each byte of the key the other way round.
        *k = p.reverse_bits();
    }
    let cipher = Des::new(&key.into());
    let mut out = *challenge;
    for block in out.as_chunks_mut::<8>().0 {
        let mut b = (*block).into();
        cipher.encrypt_block(&mut b);
        *block = b.into();
    }
    out
}

/// Whether two answers are equal, in a time that does not depend on where they differ.
pub(super) fn equal(a: &[u8; CHALLENGE], b: &[u8; CHALLENGE]) -> bool {
    a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses() {
        // DES of zeros with key bytes of all zeros is a published vector; the empty password gives that key.
        let zero = response("", &[0; 16]);
        assert_eq!(zero[..8], [0x8c, 0xa6, 0x4d, 0xe9, 0xc1, 0xb1, 0x23, 0xa7]);
        assert_eq!(zero[8..], zero[..8]);
        assert_eq!(response("12345678", &[1; 16]), response("123456789", &[1; 16]), "eight characters count");
        assert!(!equal(&response("a", &[1; 16]), &response("b", &[1; 16])));
    }
}
