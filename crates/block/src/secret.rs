//! Secrets as QEMU's `secret` objects describe them: from a file or the command line, as they are or in base64, in the clear or
//! encrypted with another secret.

use crate::{
    Error, Options, Result,
    formats::crypto::{CipherName, SectorCipher, Tweak, base64_decode},
};
use std::collections::BTreeMap;

/// Largest secret that is read from a file.
const MAX_SECRET: u64 = 64 << 20;

fn decode(what: &str, text: &[u8]) -> Result<Vec<u8>> {
    let text = str::from_utf8(text).map_err(|_| Error::usage(format!("{what} is not valid base64")))?;
    let text: String = text.split_ascii_whitespace().collect();
    base64_decode(&text).ok_or_else(|| Error::usage(format!("{what} is not valid base64")))
}

/// The bytes of the secret that `data`, `file`, `format`, `keyid` and `iv` describe, which are taken out. `known` are the secrets
/// that `keyid` may name.
pub fn load(options: &mut Options, known: &BTreeMap<String, Vec<u8>>) -> Result<Vec<u8>> {
    let data = match (options.take("data"), options.take("file")) {
        (Some(data), None) => data.into_bytes(),
        (None, Some(name)) => {
            let failed = |e| Error::io(format!("Unable to read {name}"), e);
            if std::fs::metadata(&name).map_err(failed)?.len() > MAX_SECRET {
                return Err(Error::usage(format!("{name} is too large for a secret")));
            }
            std::fs::read(&name).map_err(failed)?
        }
        (Some(_), Some(_)) => return Err(Error::usage("'file' and 'data' are mutually exclusive")),
        (None, None) => return Err(Error::usage("Must provide 'file' or 'data' property")),
    };
    let base64 = match options.take("format").as_deref() {
        None | Some("raw") => false,
        Some("base64") => true,
        Some(other) => {
            return Err(Error::usage(format!("Secret format '{other}' is neither raw nor base64")));
        }
    };
    let iv = options.take("iv");
    let Some(keyid) = options.take("keyid") else {
        if iv.is_some() {
            return Err(Error::usage("'iv' needs 'keyid'"));
        }
        return if base64 { decode("The secret", &data) } else { Ok(data) };
    };
    // AES-256 in CBC mode with PKCS#7 padding.
    let key = known.get(&keyid).ok_or_else(|| Error::usage(format!("No secret with id '{keyid}'")))?;
    if key.len() != 32 {
        return Err(Error::usage(format!("Key should be 32 bytes in length, '{keyid}' has {}", key.len())));
    }
    let iv = decode(
        "The initialization vector",
        iv.ok_or_else(|| Error::usage("IV is required to decrypt secret"))?.as_bytes(),
    )?;
    if iv.len() != 16 {
        return Err(Error::usage(format!("IV should be 16 bytes in length not {}", iv.len())));
    }
    let mut bytes = if base64 { decode("The secret", &data)? } else { data };
    if bytes.is_empty() || !bytes.len().is_multiple_of(16) {
        return Err(Error::usage("The encrypted secret is no whole number of blocks of 16 bytes"));
    }
    let cipher = SectorCipher::new(CipherName::Aes, "ecb", key, Tweak::Guest)?.with_sector(16);
    let mut previous = iv;
    for block in bytes.chunks_exact_mut(16) {
        let stored = block.to_vec();
        cipher.run(false, 0, block)?;
        block.iter_mut().zip(&previous).for_each(|(a, b)| *a ^= b);
        previous = stored;
    }
    let padding = bytes.last().copied().map_or(0, usize::from);
    if !(1..=16).contains(&padding) || !bytes.ends_with(&vec![padding as u8; padding]) {
        return Err(Error::usage(format!("Incorrect padding after decryption: is '{keyid}' the right key?")));
    }
    bytes.truncate(bytes.len() - padding);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encrypted_secrets_are_decrypted() {
        // printf 123456 | openssl enc -aes-256-cbc -a -K 00010203...1f -iv 0f0e...00
        let key: Vec<u8> = (0..32).collect();
        let cipher = SectorCipher::new(CipherName::Aes, "ecb", &key, Tweak::Guest).unwrap().with_sector(16);
        let iv: Vec<u8> = (0..16).rev().collect();
        let mut block = *b"123456\x0a\x0a\x0a\x0a\x0a\x0a\x0a\x0a\x0a\x0a";
        block.iter_mut().zip(&iv).for_each(|(a, b)| *a ^= b);
        cipher.run(true, 0, &mut block).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        std::fs::write(&file, block).unwrap();
        let known = BTreeMap::from([("master".to_owned(), key), ("short".to_owned(), vec![1])]);
        let describe = |key: &str| {
            Options::parse(&format!("file={},keyid={key},iv=Dw4NDAsKCQgHBgUEAwIBAA==", file.display()))
                .unwrap()
        };
        assert_eq!(load(&mut describe("master"), &known).unwrap(), b"123456");
        assert!(load(&mut describe("short"), &known).is_err());
        assert!(load(&mut describe("none"), &known).is_err());
    }
}
