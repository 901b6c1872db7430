//! LUKS version 2 ("LUKS2 On-Disk Format Specification" 1.1.1): two copies of a binary header, each with an area of JSON.
//!
//! Images are unlocked and their disk is read and written; the header is never changed.

use super::{MAGIC, MAX_ITERATIONS, Unlocked};
use crate::{
    Error, Result,
    formats::{
        crypto::{CipherName, Hash, SectorCipher, Tweak, base64_decode, merge_stripes, wipe},
        support::be64,
    },
    storage::{Storage, StorageExt},
};
use serde::Deserialize;
use std::collections::BTreeMap;

/// Bytes of the binary header.
const BINARY: usize = 4096;
/// The magic of the second copy.
const MAGIC_SECOND: &[u8; 6] = b"SKUL\xba\xbe";
/// Sizes that a header with its JSON can have; the second copy follows the first.
const SIZES: [u64; 9] =
    [16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20];
/// Most memory that a key slot's derivation may take, in KiB.
const MAX_MEMORY: u32 = 4 << 20;
const MAX_KEY: usize = 128;

#[derive(Deserialize, Debug)]
struct Metadata {
    keyslots: BTreeMap<String, KeySlot>,
    segments: BTreeMap<String, Segment>,
    digests: BTreeMap<String, Digest>,
    #[serde(default)]
    config: Config,
}

#[derive(Deserialize, Debug, Default)]
struct Config {
    #[serde(default)]
    requirements: Option<Requirements>,
}

#[derive(Deserialize, Debug, Default)]
struct Requirements {
    #[serde(default)]
    mandatory: Vec<String>,
}

#[derive(Deserialize, Debug)]
struct KeySlot {
    #[serde(rename = "type")]
    kind: String,
    key_size: usize,
    #[serde(default)]
    area: Option<Area>,
    #[serde(default)]
    af: Option<Stripes>,
    #[serde(default)]
    kdf: Option<Kdf>,
}

#[derive(Deserialize, Debug)]
struct Area {
    offset: String,
    size: String,
    encryption: String,
    key_size: usize,
}

#[derive(Deserialize, Debug)]
struct Stripes {
    stripes: usize,
    hash: String,
}

#[derive(Deserialize, Debug)]
#[serde(tag = "type")]
enum Kdf {
    #[serde(rename = "pbkdf2")]
    Pbkdf2 { hash: String, iterations: u32, salt: String },
    #[serde(rename = "argon2i")]
    Argon2i { time: u32, memory: u32, cpus: u32, salt: String },
    #[serde(rename = "argon2id")]
    Argon2id { time: u32, memory: u32, cpus: u32, salt: String },
}

#[derive(Deserialize, Debug)]
struct Segment {
    #[serde(rename = "type")]
    kind: String,
    offset: String,
    size: String,
    #[serde(default)]
    iv_tweak: String,
    #[serde(default)]
    encryption: String,
    #[serde(default)]
    sector_size: usize,
}

#[derive(Deserialize, Debug)]
struct Digest {
    #[serde(rename = "type")]
    kind: String,
    keyslots: Vec<String>,
    segments: Vec<String>,
    hash: String,
    iterations: u32,
    salt: String,
    digest: String,
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::invalid(format!("Invalid LUKS2 header: {what}"))
}

fn number(text: &str, what: &str) -> Result<u64> {
    text.parse().map_err(|_| bad(format!("{what} '{text}'")))
}

fn base64(text: &str) -> Result<Vec<u8>> {
    base64_decode(text).ok_or_else(|| bad("a salt or digest is not base64"))
}

/// One copy of the header: its sequence number and its JSON text.
fn read_copy(storage: &dyn Storage, at: u64, magic: &[u8; 6]) -> Result<(u64, String, String)> {
    let mut binary = storage.read_vec(at, BINARY)?;
    let size = be64(&binary, 8);
    if binary[..6] != *magic || binary[6..8] != [0, 2] || be64(&binary, 256) != at || !SIZES.contains(&size) {
        return Err(bad("wrong signature, version, place or size"));
    }
    let field = |range: std::ops::Range<usize>| {
        let bytes = &binary[range];
        String::from_utf8_lossy(bytes.split(|&b| b == 0).next().unwrap_or_default()).into_owned()
    };
    let (algorithm, uuid) = (field(72..104), field(168..208));
    let stored = binary[448..512].to_vec();
    binary[448..512].fill(0);
    let json = storage.read_vec(at + BINARY as u64, size as usize - BINARY)?;
    let hash = Hash::parse(&algorithm)?;
    if hash.digest(&[&binary, &json])[..] != stored[..hash.len()] {
        return Err(bad("wrong checksum"));
    }
    let end = json.iter().position(|&b| b == 0).unwrap_or(json.len());
    let text = str::from_utf8(&json[..end]).map_err(|_| bad("the metadata is not UTF-8"))?;
    Ok((be64(&binary, 16), text.to_owned(), uuid))
}

fn read_metadata(storage: &dyn Storage) -> Result<(Metadata, String)> {
    let mut best: Option<(u64, String, String)> = None;
    let mut failure = None;
    let copies = std::iter::once((0, MAGIC)).chain(SIZES.iter().map(|&at| (at, MAGIC_SECOND)));
    for (at, magic) in copies {
        match read_copy(storage, at, magic) {
            Ok(copy) if best.as_ref().is_none_or(|b| copy.0 > b.0) => best = Some(copy),
            Ok(_) => {}
            Err(e) => failure = failure.or(Some(e)),
        }
    }
    let Some((_, text, uuid)) = best else { return Err(failure.unwrap_or_else(|| bad("there is none"))) };
    let metadata: Metadata = serde_json::from_str(&text).map_err(bad)?;
    Ok((metadata, uuid))
}

pub(super) fn open(storage: &dyn Storage, passphrase: Option<&[u8]>) -> Result<Unlocked> {
    let (metadata, uuid) = read_metadata(storage)?;
    if let Some(requirement) = metadata.config.requirements.iter().flat_map(|r| &r.mandatory).next() {
        return Err(Error::unsupported(format!(
            "The LUKS2 image requires '{requirement}', which is not supported"
        )));
    }
    let (id, segment) = match metadata.segments.iter().next() {
        Some((id, s)) if metadata.segments.len() == 1 && s.kind == "crypt" => (id, s),
        _ => {
            return Err(Error::unsupported(
                "LUKS2 images with other than one encrypted segment are not supported",
            ));
        }
    };
    let offset = number(&segment.offset, "segment offset")?;
    if !offset.is_multiple_of(512) || offset > i64::MAX as u64 {
        return Err(bad(format!("segment offset {offset}")));
    }
    let size = match segment.size.as_str() {
        "dynamic" => None,
        size => Some(number(size, "segment size")?),
    };
    if !segment.sector_size.is_power_of_two() || !(512..=4096).contains(&segment.sector_size) {
        return Err(bad(format!("sector size {}", segment.sector_size)));
    }
    let cipher = match passphrase {
        None => None,
        Some(passphrase) => {
            let key = unlock(storage, &metadata, id, passphrase)?;
            let (name, mode) = encryption(&segment.encryption)?;
            let tweak = Tweak::GuestFrom(number(&segment.iv_tweak, "IV tweak")?);
            Some(SectorCipher::new(name, mode, &key, tweak)?.with_sector(segment.sector_size))
        }
    };
    let specific = serde_json::json!({
        "version": 2,
        "encryption": segment.encryption,
        "sector-size": segment.sector_size,
        "payload-offset": offset,
        "uuid": uuid,
        "slots": metadata.keyslots.keys().collect::<Vec<_>>(),
    });
    // Key slots of version 2 are not changed here, so that the key is not kept.
    Ok(Unlocked { payload: offset, size, cipher, key: None, specific })
}

/// `aes-xts-plain64`: the cipher, and the mode as [`SectorCipher::new`] takes it.
fn encryption(text: &str) -> Result<(CipherName, &str)> {
    let (name, mode) = text.split_once('-').ok_or_else(|| bad(format!("encryption '{text}'")))?;
    Ok((CipherName::parse(name)?, mode))
}

/// Finds the key of a segment with a passphrase.
fn unlock(storage: &dyn Storage, metadata: &Metadata, segment: &str, passphrase: &[u8]) -> Result<Vec<u8>> {
    let mut skipped = None;
    for digest in metadata.digests.values().filter(|d| d.segments.iter().any(|s| s == segment)) {
        if digest.kind != "pbkdf2" || digest.iterations == 0 || digest.iterations > MAX_ITERATIONS {
            return Err(bad(format!("digest of type '{}'", digest.kind)));
        }
        let (hash, salt, wanted) =
            (Hash::parse(&digest.hash)?, base64(&digest.salt)?, base64(&digest.digest)?);
        for slot in digest.keyslots.iter().filter_map(|id| metadata.keyslots.get(id)) {
            let key = match slot.key(storage, passphrase) {
                Ok(key) => key,
                // Another slot may still fit.
                Err(e) => {
                    skipped = Some(e);
                    continue;
                }
            };
            let mut found = vec![0; wanted.len().min(64)];
            hash.pbkdf2(&key, &salt, digest.iterations, &mut found);
            if !wanted.is_empty() && found == wanted {
                return Ok(key);
            }
        }
    }
    Err(skipped.unwrap_or_else(|| {
        Error::io(
            "Invalid password, cannot unlock any keyslot",
            std::io::Error::from_raw_os_error(libc::EPERM),
        )
    }))
}

impl KeySlot {
    /// What the slot holds, if the passphrase is right; noise otherwise.
    fn key(&self, storage: &dyn Storage, passphrase: &[u8]) -> Result<Vec<u8>> {
        let (Some(area), Some(af), Some(kdf)) = (&self.area, &self.af, &self.kdf) else {
            return Err(Error::unsupported(format!(
                "LUKS2 key slots of type '{}' are not supported",
                self.kind
            )));
        };
        let (offset, size) = (number(&area.offset, "area offset")?, number(&area.size, "area size")?);
        let length =
            (1..=MAX_KEY).contains(&self.key_size).then(|| self.key_size.checked_mul(af.stripes)).flatten();
        let length = length
            .filter(|&l| l > 0 && l as u64 <= size.min(1 << 24))
            .ok_or_else(|| bad("a key slot's sizes"))?;
        if !(1..=MAX_KEY).contains(&area.key_size) || offset > i64::MAX as u64 {
            return Err(bad("a key slot's area"));
        }
        let mut derived = kdf.derive(passphrase, area.key_size)?;
        let mut stripes = storage.read_vec(offset, length.next_multiple_of(512))?;
        let (name, mode) = encryption(&area.encryption)?;
        SectorCipher::new(name, mode, &derived, Tweak::Guest)?.run(false, 0, &mut stripes)?;
        let key = merge_stripes(Hash::parse(&af.hash)?, &stripes[..length], self.key_size);
        wipe(&mut derived);
        wipe(&mut stripes);
        Ok(key)
    }
}

impl Kdf {
    fn derive(&self, passphrase: &[u8], len: usize) -> Result<Vec<u8>> {
        let mut out = vec![0; len];
        let (algorithm, time, memory, cpus, salt) = match self {
            Kdf::Pbkdf2 { hash, iterations, salt } => {
                if *iterations == 0 || *iterations > MAX_ITERATIONS {
                    return Err(bad(format!("{iterations} iterations")));
                }
                Hash::parse(hash)?.pbkdf2(passphrase, &base64(salt)?, *iterations, &mut out);
                return Ok(out);
            }
            Kdf::Argon2i { time, memory, cpus, salt } => {
                (argon2::Algorithm::Argon2i, time, memory, cpus, salt)
            }
            Kdf::Argon2id { time, memory, cpus, salt } => {
                (argon2::Algorithm::Argon2id, time, memory, cpus, salt)
            }
        };
        if *memory > MAX_MEMORY || *time > 1 << 16 || *cpus > 64 {
            return Err(Error::unsupported(format!(
                "A LUKS2 key slot asks for {memory} KiB of memory, {time} rounds and {cpus} lanes, which is more than allowed"
            )));
        }
        let failed = |e: argon2::Error| bad(format!("key derivation: {e}"));
        let parameters = argon2::Params::new(*memory, *time, *cpus, Some(len)).map_err(failed)?;
        argon2::Argon2::new(algorithm, argon2::Version::V0x13, parameters)
            .hash_password_into(passphrase, &base64(salt)?, &mut out)
            .map_err(failed)?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        formats::{Cipher, crypto::split_stripes, support::put},
        storage::MemoryStorage,
    };
    use proptest::prelude::*;

    fn encode64(bytes: &[u8]) -> String {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        bytes
            .chunks(3)
            .flat_map(|c| {
                let v = u32::from(c[0]) << 16
                    | u32::from(*c.get(1).unwrap_or(&0)) << 8
                    | u32::from(*c.get(2).unwrap_or(&0));
                (0..4).map(
                    move |i| {
                        if i <= c.len() { DIGITS[(v >> (18 - 6 * i) & 63) as usize] as char } else { '=' }
                    },
                )
            })
            .collect()
    }

    /// An image made by the specification, with a disk of one block of sevens.
    fn sample(kdf: &str, sector: usize) -> MemoryStorage {
        let memory = MemoryStorage::new(vec![0; 1 << 20]);
        let key: Vec<u8> = (0..64).map(|i| i * 3).collect();
        let kdf: serde_json::Value = serde_json::from_str(kdf).unwrap();
        let derived = serde_json::from_value::<Kdf>(kdf.clone()).unwrap().derive(b"secret", 64).unwrap();
        let mut stripes = split_stripes(Hash::Sha256, &key, 100).unwrap();
        stripes.resize(stripes.len().next_multiple_of(512), 0);
        SectorCipher::new(CipherName::Aes, "xts-plain64", &derived, Tweak::Guest)
            .unwrap()
            .run(true, 0, &mut stripes)
            .unwrap();
        memory.write_at(&stripes, 32768).unwrap();
        let mut digest = [0; 32];
        Hash::Sha256.pbkdf2(&key, b"digestsalt", 1000, &mut digest);
        let json = serde_json::json!({
            "keyslots": {"0": {"type": "luks2", "key_size": 64, "kdf": kdf,
                "af": {"type": "luks1", "stripes": 100, "hash": "sha256"},
                "area": {"type": "raw", "offset": "32768", "size": "8192", "encryption": "aes-xts-plain64", "key_size": 64}}},
            "segments": {"0": {"type": "crypt", "offset": "524288", "size": "dynamic", "iv_tweak": "3",
                "encryption": "aes-xts-plain64", "sector_size": sector}},
            "digests": {"0": {"type": "pbkdf2", "keyslots": ["0"], "segments": ["0"], "hash": "sha256", "iterations": 1000,
                "salt": encode64(b"digestsalt"), "digest": encode64(&digest)}},
            "config": {"json_size": "12288", "keyslots_size": "16384"}
        })
        .to_string();
        write_copy(&memory, 0, MAGIC, 1, &json);
        write_copy(&memory, 16 << 10, MAGIC_SECOND, 2, &json);
        let mut disk = vec![7; 4096];
        SectorCipher::new(CipherName::Aes, "xts-plain64", &key, Tweak::GuestFrom(3))
            .unwrap()
            .with_sector(sector)
            .encrypt(0, 0, &mut disk)
            .unwrap();
        memory.write_at(&disk, 524_288).unwrap();
        memory
    }

    fn write_copy(memory: &MemoryStorage, at: u64, magic: &[u8; 6], sequence: u64, json: &str) {
        let mut bytes = vec![0; 16 << 10];
        put(&mut bytes, 0, magic);
        put(&mut bytes, 6, &2u16.to_be_bytes());
        put(&mut bytes, 8, &(16u64 << 10).to_be_bytes());
        put(&mut bytes, 16, &sequence.to_be_bytes());
        put(&mut bytes, 72, b"sha256");
        put(&mut bytes, 256, &at.to_be_bytes());
        put(&mut bytes, BINARY, json.as_bytes());
        let sum = Hash::Sha256.digest(&[&bytes]);
        put(&mut bytes, 448, &sum);
        memory.write_at(&bytes, at).unwrap();
    }

    #[test]
    fn unlocks_with_every_derivation() {
        for (kdf, sector) in [
            (r#"{"type": "pbkdf2", "hash": "sha256", "iterations": 1000, "salt": "c2FsdHNhbHQ="}"#, 512),
            (r#"{"type": "argon2id", "time": 1, "memory": 64, "cpus": 2, "salt": "c2FsdHNhbHQ="}"#, 4096),
            (r#"{"type": "argon2i", "time": 2, "memory": 64, "cpus": 1, "salt": "c2FsdHNhbHQ="}"#, 512),
        ] {
            let memory = sample(kdf, sector);
            let unlocked = open(&memory, Some(b"secret")).unwrap();
            let mut disk = memory.read_vec(unlocked.payload, 4096).unwrap();
            unlocked.cipher.unwrap().decrypt(0, unlocked.payload, &mut disk).unwrap();
            assert_eq!(disk, vec![7; 4096]);
            assert!(open(&memory, Some(b"wrong")).is_err());
            // The other copy serves where one is damaged.
            memory.write_at(&[1], 5000).unwrap();
            assert!(open(&memory, Some(b"secret")).is_ok());
            memory.write_at(&[1], (16 << 10) + 5000).unwrap();
            assert!(open(&memory, None).is_err());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn any_json_opens_or_fails(at in 0..900usize, with in "[0-9a-z\"{}:,-]{1,12}") {
            let memory = sample(r#"{"type": "pbkdf2", "hash": "sha256", "iterations": 10, "salt": "c2FsdA=="}"#, 512);
            let (_, mut json, _) = read_copy(&memory, 0, MAGIC).unwrap();
            let at = at.min(json.len() - 1);
            json.replace_range(at..(at + with.len()).min(json.len()), &with);
            write_copy(&memory, 0, MAGIC, 9, &json);
            let _ = open(&memory, None);
        }
    }
}
