//! LUKS version 1 ("LUKS On-Disk Format Specification" 1.2.3).

use super::{MAGIC, MAX_ITERATIONS, Unlocked};
use crate::{
    Error, Options, Result,
    formats::{
        crypto::{CipherName, Hash, KeyBytes, SectorCipher, Tweak, merge_stripes, split_stripes},
        support::{be32, put, random_bytes, random_uuid},
    },
    storage::{Storage, StorageExt},
};
use std::time::Instant;

/// Bytes of a header.
const HEADER: usize = 592;
/// Bytes of the master key's digest.
const DIGEST: usize = 20;
/// Bytes of a salt.
const SALT: usize = 32;
const SLOTS: usize = 8;
const SLOT_ACTIVE: u32 = 0x00ac_71f3;
const SLOT_FREE: u32 = 0x0000_dead;
/// Stripes of every key slot there is.
const STRIPES: u32 = 4000;
/// Key material begins at multiples of this.
const ALIGN: u64 = 4096;
const MAX_KEY: u32 = 128;

/// A key slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Slot {
    active: bool,
    iterations: u32,
    salt: [u8; SALT],
    offset: u64,
    stripes: u32,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Header {
    cipher: String,
    mode: String,
    hash: String,
    payload: u64,
    key_bytes: u32,
    digest: [u8; DIGEST],
    digest_salt: [u8; SALT],
    digest_iterations: u32,
    uuid: String,
    slots: [Slot; SLOTS],
}

/// The text of a field that zeros fill up.
fn text(bytes: &[u8]) -> Result<String> {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    match str::from_utf8(&bytes[..end]) {
        Ok(text) if text.bytes().all(|b| b.is_ascii_graphic()) => Ok(text.to_owned()),
        _ => Err(Error::invalid("Invalid LUKS header: a name is not plain text")),
    }
}

impl Header {
    fn parse(b: &[u8; HEADER]) -> Result<Self> {
        let bad = |what: String| Error::invalid(format!("Invalid LUKS header: {what}"));
        let key_bytes = be32(b, 108);
        if key_bytes == 0 || key_bytes > MAX_KEY {
            return Err(bad(format!("a master key of {key_bytes} bytes")));
        }
        let salt = |at: usize| {
            let mut salt = [0; SALT];
            salt.copy_from_slice(&b[at..at + SALT]);
            salt
        };
        let mut digest = [0; DIGEST];
        digest.copy_from_slice(&b[112..112 + DIGEST]);
        let payload = u64::from(be32(b, 104)) * 512;
        let mut slots =
            [Slot { active: false, iterations: 0, salt: [0; SALT], offset: 0, stripes: 0 }; SLOTS];
        for (i, slot) in slots.iter_mut().enumerate() {
            let at = 208 + i * 48;
            *slot = Slot {
                active: match be32(b, at) {
                    SLOT_ACTIVE => true,
                    SLOT_FREE => false,
                    state => return Err(bad(format!("key slot {i} has the state {state:#x}"))),
                },
                iterations: be32(b, at + 4),
                salt: salt(at + 8),
                offset: u64::from(be32(b, at + 40)) * 512,
                stripes: be32(b, at + 44),
            };
            if slot.stripes != STRIPES {
                return Err(bad(format!("key slot {i} has {} stripes", slot.stripes)));
            }
            if slot.active && (slot.iterations == 0 || slot.iterations > MAX_ITERATIONS) {
                return Err(bad(format!("key slot {i} asks for {} iterations", slot.iterations)));
            }
            if slot.offset < HEADER as u64
                || (payload > 0 && slot.offset + slot.material(key_bytes) > payload)
            {
                return Err(bad(format!("key slot {i} overlaps the header or the disk")));
            }
        }
        let digest_iterations = be32(b, 164);
        if digest_iterations == 0 || digest_iterations > MAX_ITERATIONS {
            return Err(bad(format!("{digest_iterations} iterations for the master key's digest")));
        }
        Ok(Header {
            cipher: text(&b[8..40])?,
            mode: text(&b[40..72])?,
            hash: text(&b[72..104])?,
            payload,
            key_bytes,
            digest,
            digest_salt: salt(132),
            digest_iterations,
            uuid: text(&b[168..208])?,
            slots,
        })
    }

    fn encode(&self) -> [u8; HEADER] {
        let mut b = [0; HEADER];
        put(&mut b, 0, MAGIC);
        put(&mut b, 6, &1u16.to_be_bytes());
        put(&mut b, 8, self.cipher.as_bytes());
        put(&mut b, 40, self.mode.as_bytes());
        put(&mut b, 72, self.hash.as_bytes());
        put(&mut b, 104, &((self.payload / 512) as u32).to_be_bytes());
        put(&mut b, 108, &self.key_bytes.to_be_bytes());
        put(&mut b, 112, &self.digest);
        put(&mut b, 132, &self.digest_salt);
        put(&mut b, 164, &self.digest_iterations.to_be_bytes());
        put(&mut b, 168, self.uuid.as_bytes());
        for (i, slot) in self.slots.iter().enumerate() {
            let at = 208 + i * 48;
            put(&mut b, at, &(if slot.active { SLOT_ACTIVE } else { SLOT_FREE }).to_be_bytes());
            put(&mut b, at + 4, &slot.iterations.to_be_bytes());
            put(&mut b, at + 8, &slot.salt);
            put(&mut b, at + 40, &((slot.offset / 512) as u32).to_be_bytes());
            put(&mut b, at + 44, &slot.stripes.to_be_bytes());
        }
        b
    }

    /// The header as `info` shows it.
    fn describe(&self) -> serde_json::Value {
        let (mode, ivgen) = self.mode.split_once('-').unwrap_or((&self.mode, ""));
        let (ivgen, ivgen_hash) = ivgen.split_once(':').unwrap_or((ivgen, ""));
        let bits = if mode == "xts" { self.key_bytes * 4 } else { self.key_bytes * 8 };
        let slots: Vec<serde_json::Value> = self
            .slots
            .iter()
            .map(|s| {
                if s.active {
                    serde_json::json!({"active": true, "iters": s.iterations, "stripes": s.stripes, "key-offset": s.offset})
                } else {
                    serde_json::json!({"active": false, "key-offset": s.offset})
                }
            })
            .collect();
        let mut shown = serde_json::json!({
            "cipher-alg": format!("{}-{bits}", self.cipher),
            "cipher-mode": mode,
            "ivgen-alg": ivgen,
            "hash-alg": self.hash,
            "payload-offset": self.payload,
            "master-key-iters": self.digest_iterations,
            "uuid": self.uuid,
            "slots": slots,
            "detached-header": false,
        });
        if !ivgen_hash.is_empty() {
            shown["ivgen-hash-alg"] = ivgen_hash.into();
        }
        shown
    }

    /// The digest that tells the right master key.
    fn digest_of(&self, hash: Hash, key: &[u8]) -> [u8; DIGEST] {
        let mut digest = [0; DIGEST];
        hash.pbkdf2(key, &self.digest_salt, self.digest_iterations, &mut digest);
        digest
    }
}

impl Slot {
    /// Bytes of key material, whole sectors.
    fn material(&self, key_bytes: u32) -> u64 {
        (u64::from(self.stripes) * u64::from(key_bytes)).next_multiple_of(512)
    }
}

/// Reads the header.
fn read(storage: &dyn Storage) -> Result<Header> {
    let mut bytes = [0; HEADER];
    storage.read_at(&mut bytes, 0)?;
    Header::parse(&bytes)
}

pub(super) fn open(storage: &dyn Storage, passphrase: Option<&[u8]>, tweak: Tweak) -> Result<Unlocked> {
    let header = read(storage)?;
    let key = passphrase.map(|passphrase| header.master_key(storage, passphrase)).transpose()?;
    let cipher = match &key {
        Some(key) => {
            Some(SectorCipher::new(CipherName::parse(&header.cipher)?, &header.mode, key.bytes(), tweak)?)
        }
        None => None,
    };
    Ok(Unlocked { payload: header.payload, size: None, cipher, key, specific: header.describe() })
}

impl Header {
    /// The key that a slot holds if `passphrase` opens it.
    fn slot_key(&self, storage: &dyn Storage, slot: &Slot, passphrase: &[u8]) -> Result<Option<KeyBytes>> {
        let (name, hash) = (CipherName::parse(&self.cipher)?, Hash::parse(&self.hash)?);
        let len = self.key_bytes as usize;
        let mut derived = KeyBytes::new(vec![0; len]);
        hash.pbkdf2(passphrase, &slot.salt, slot.iterations, derived.bytes_mut());
        let mut stripes =
            KeyBytes::new(storage.read_vec(slot.offset, slot.material(self.key_bytes) as usize)?);
        SectorCipher::new(name, &self.mode, derived.bytes(), Tweak::Guest)?.run(
            false,
            0,
            stripes.bytes_mut(),
        )?;
        let key = KeyBytes::new(merge_stripes(hash, &stripes.bytes()[..STRIPES as usize * len], len));
        Ok((self.digest_of(hash, key.bytes()) == self.digest).then_some(key))
    }

    fn master_key(&self, storage: &dyn Storage, passphrase: &[u8]) -> Result<KeyBytes> {
        for slot in self.slots.iter().filter(|s| s.active) {
            if let Some(key) = self.slot_key(storage, slot, passphrase)? {
                return Ok(key);
            }
        }
        Err(Error::io(
            "Invalid password, cannot unlock any keyslot",
            std::io::Error::from_raw_os_error(libc::EPERM),
        ))
    }

    /// The stripes of a slot that holds `key` for whoever knows `passphrase`, as they are stored.
    fn material(&self, slot: &Slot, key: &KeyBytes, passphrase: &[u8]) -> Result<Vec<u8>> {
        let (name, hash) = (CipherName::parse(&self.cipher)?, Hash::parse(&self.hash)?);
        let mut derived = KeyBytes::new(vec![0; self.key_bytes as usize]);
        hash.pbkdf2(passphrase, &slot.salt, slot.iterations, derived.bytes_mut());
        let mut stripes = split_stripes(hash, key.bytes(), STRIPES as usize)?;
        stripes.resize(slot.material(self.key_bytes) as usize, 0);
        SectorCipher::new(name, &self.mode, derived.bytes(), Tweak::Guest)?.run(true, 0, &mut stripes)?;
        Ok(stripes)
    }
}

/// Puts `key` into a slot, given or free, to be opened with `passphrase`.
pub(super) fn add_key(
    storage: &dyn Storage,
    key: &KeyBytes,
    passphrase: &[u8],
    slot: Option<usize>,
    milliseconds: u64,
    force: bool,
) -> Result<()> {
    let mut header = read(storage)?;
    let index = match slot {
        Some(i) if i >= SLOTS => {
            return Err(Error::usage(format!("Invalid keyslot {i}, it must be between 0 and {}", SLOTS - 1)));
        }
        Some(i) if header.slots[i].active && !force => {
            return Err(Error::usage(format!(
                "Refusing to overwrite active keyslot {i} - please erase it first"
            )));
        }
        Some(i) => i,
        None => header
            .slots
            .iter()
            .position(|s| !s.active)
            .ok_or_else(|| Error::usage("Can't add a keyslot - all keyslots are in use"))?,
    };
    let mut slot = header.slots[index];
    random_bytes(&mut slot.salt)?;
    slot.iterations = rounds(Hash::parse(&header.hash)?, key.bytes().len(), milliseconds);
    slot.active = true;
    let material = header.material(&slot, key, passphrase)?;
    storage.write_at(&material, slot.offset)?;
    storage.flush()?;
    header.slots[index] = slot;
    storage.write_at(&header.encode(), 0)?;
    storage.flush()
}

/// Empties a slot, or all that `passphrase` opens.
pub(super) fn erase_key(
    storage: &dyn Storage,
    slot: Option<usize>,
    passphrase: Option<&[u8]>,
    force: bool,
) -> Result<()> {
    let mut header = read(storage)?;
    let active = header.slots.iter().filter(|s| s.active).count();
    let mut doomed = Vec::new();
    match (slot, passphrase) {
        (Some(i), _) if i >= SLOTS => {
            return Err(Error::usage(format!("Invalid keyslot {i}, it must be between 0 and {}", SLOTS - 1)));
        }
        (Some(i), passphrase) => {
            if let Some(p) = passphrase
                && (!header.slots[i].active || header.slot_key(storage, &header.slots[i], p)?.is_none())
            {
                return Err(Error::usage(format!("This keyslot {i} doesn't contain the given password")));
            }
            if !header.slots[i].active && !force {
                return Err(Error::usage(format!("Given keyslot {i} is already erased (inactive)")));
            }
            if header.slots[i].active && active == 1 && !force {
                return Err(Error::usage(format!(
                    "Attempt to erase the only active keyslot {i} which will erase all the data in the image \
                     irreversibly - refusing operation"
                )));
            }
            doomed.push(i);
        }
        (None, Some(p)) => {
            for i in 0..SLOTS {
                if header.slots[i].active && header.slot_key(storage, &header.slots[i], p)?.is_some() {
                    doomed.push(i);
                }
            }
            if doomed.is_empty() {
                return Err(Error::usage("No keyslots match given (old) password for erase operation"));
            }
            if doomed.len() == active && !force {
                return Err(Error::usage(
                    "All the active keyslots match the (old) password that was given and erasing them will erase all \
                     the data in the image irreversibly - refusing operation",
                ));
            }
        }
        (None, None) => return Err(Error::usage("To erase keyslot(s), either keyslot index or the password currently contained in them must be given")),
    }
    for i in doomed {
        // The material goes first: a slot marked free whose key could still be read would be no erasure.
        let mut noise = vec![0; header.slots[i].material(header.key_bytes) as usize];
        random_bytes(&mut noise)?;
        storage.write_at(&noise, header.slots[i].offset)?;
        storage.flush()?;
        header.slots[i] = Slot { active: false, iterations: 0, salt: [0; SALT], ..header.slots[i] };
        storage.write_at(&header.encode(), 0)?;
        storage.flush()?;
    }
    Ok(())
}

/// The algorithms chosen by creation options.
pub(super) struct Choice {
    cipher: CipherName,
    mode: String,
    pub(super) key_bytes: u32,
}

impl Choice {
    pub(super) fn take(options: &mut Options) -> Result<Self> {
        let cipher = options.take("cipher-alg").unwrap_or_else(|| "aes-256".into());
        let (name, bits) = cipher.rsplit_once('-').unwrap_or((&cipher, ""));
        let bits: u32 = match bits {
            "128" => 128,
            "192" => 192,
            "256" => 256,
            _ => {
                return Err(Error::usage(format!(
                    "Invalid parameter '{cipher}'; cipher-alg is e.g. aes-256"
                )));
            }
        };
        let chain = options.take("cipher-mode").unwrap_or_else(|| "xts".into());
        if chain == "xts" && bits == 192 {
            return Err(Error::unsupported("XTS mode takes keys of 128 or 256 bits"));
        }
        let ivgen = options.take("ivgen-alg").unwrap_or_else(|| "plain64".into());
        let ivgen_hash = options.take("ivgen-hash-alg");
        let mode = match (chain.as_str(), ivgen.as_str(), ivgen_hash) {
            (chain, "essiv", hash) => format!("{chain}-essiv:{}", hash.as_deref().unwrap_or("sha256")),
            (chain, ivgen, None) => format!("{chain}-{ivgen}"),
            (_, ivgen, Some(_)) => {
                return Err(Error::usage(format!("ivgen-hash-alg makes no sense with ivgen-alg {ivgen}")));
            }
        };
        Ok(Choice {
            cipher: CipherName::parse(name)?,
            mode,
            key_bytes: if chain == "xts" { bits / 4 } else { bits / 8 },
        })
    }
}

/// Where the disk of a new image begins.
pub(super) fn payload_offset(key_bytes: u32) -> u64 {
    ALIGN + SLOTS as u64 * (u64::from(STRIPES) * u64::from(key_bytes)).next_multiple_of(ALIGN)
}

/// How many rounds of PBKDF2 for `out` bytes take that many milliseconds here.
fn rounds(hash: Hash, out: usize, milliseconds: u64) -> u32 {
    let mut buffer = vec![0; out];
    let mut count = 4096u32;
    loop {
        let begin = Instant::now();
        hash.pbkdf2(b"benchmark", &[0x5a; SALT], count, &mut buffer);
        let spent = begin.elapsed().as_micros().max(1);
        if spent > 30_000 || count >= 1 << 24 {
            let wanted = u128::from(count) * u128::from(milliseconds) * 1000 / spent;
            return u32::try_from(wanted).unwrap_or(MAX_ITERATIONS).clamp(1000, MAX_ITERATIONS);
        }
        count *= 4;
    }
}

/// How long to derive a key, from the options.
pub(super) fn iteration_time(options: &mut Options) -> Result<u64> {
    let milliseconds = options.take_number("iter-time")?.unwrap_or(2000);
    if milliseconds == 0 || milliseconds > 3_600_000 {
        return Err(Error::usage("iter-time must be between 1 and 3600000 milliseconds"));
    }
    Ok(milliseconds)
}

/// Header and key slots of a new disk, the first of them opened by `passphrase`: all that comes before the encrypted data.
pub(super) fn build(passphrase: &[u8], options: &mut Options) -> Result<Vec<u8>> {
    let choice = Choice::take(options)?;
    let hash = Hash::parse(&options.take("hash-alg").unwrap_or_else(|| "sha256".into()))?;
    let milliseconds = iteration_time(options)?;
    let len = choice.key_bytes as usize;
    let payload = payload_offset(choice.key_bytes);
    let mut key = KeyBytes::new(vec![0; len]);
    random_bytes(key.bytes_mut())?;
    let mut random = [0; SALT * (SLOTS + 1)];
    random_bytes(&mut random)?;
    let salt = |i: usize| {
        let mut salt = [0; SALT];
        salt.copy_from_slice(&random[i * SALT..(i + 1) * SALT]);
        salt
    };
    let stride = (u64::from(STRIPES) * u64::from(choice.key_bytes)).next_multiple_of(ALIGN);
    let mut slots =
        [Slot { active: false, iterations: 0, salt: [0; SALT], offset: 0, stripes: STRIPES }; SLOTS];
    for (i, slot) in slots.iter_mut().enumerate() {
        slot.offset = ALIGN + i as u64 * stride;
    }
    slots[0] = Slot { active: true, iterations: rounds(hash, len, milliseconds), salt: salt(0), ..slots[0] };
    let id = random_uuid()?;
    let hex: String = id.iter().map(|b| format!("{b:02x}")).collect();
    let mut header = Header {
        cipher: choice.cipher.name().into(),
        mode: choice.mode,
        hash: hash.name().into(),
        payload,
        key_bytes: choice.key_bytes,
        digest: [0; DIGEST],
        digest_salt: salt(SLOTS),
        digest_iterations: rounds(hash, DIGEST, milliseconds / 8),
        uuid: format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]),
        slots,
    };
    header.digest = header.digest_of(hash, key.bytes());
    let stripes = header.material(&slots[0], &key, passphrase)?;
    let mut out = vec![0; payload as usize];
    put(&mut out, 0, &header.encode());
    put(&mut out, slots[0].offset as usize, &stripes);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;
    use proptest::prelude::*;

    fn sample(options: &str) -> MemoryStorage {
        let mut options = Options::parse(options).unwrap();
        let bytes = build(b"secret", &mut options).unwrap();
        options.finish("x").unwrap();
        MemoryStorage::new(bytes)
    }

    #[test]
    fn the_right_passphrase_opens_every_kind() {
        for options in [
            "iter-time=10",
            "iter-time=10,cipher-alg=serpent-128,hash-alg=sha512",
            "iter-time=10,cipher-alg=twofish-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=ripemd160",
        ] {
            let memory = sample(options);
            assert!(open(&memory, Some(b"secret"), Tweak::Guest).unwrap().cipher.is_some());
            assert!(open(&memory, Some(b"Secret"), Tweak::Guest).is_err());
            assert_eq!(open(&memory, None, Tweak::Guest).unwrap().payload, memory.size().unwrap());
        }
        for bad in [
            "cipher-alg=aes",
            "cipher-alg=rot13-256",
            "cipher-mode=ctr",
            "ivgen-alg=odd",
            "hash-alg=md5",
            "iter-time=0",
            "cipher-alg=aes-192",
        ] {
            let mut options = Options::parse(bad).unwrap();
            assert!(build(b"x", &mut options).is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_are_added_and_erased_but_never_the_last() {
        let memory = sample("iter-time=10");
        let opens = |p: &[u8]| open(&memory, Some(p), Tweak::Guest).is_ok();
        let key = open(&memory, Some(b"secret"), Tweak::Guest).unwrap().key.unwrap();
        assert!(erase_key(&memory, Some(0), None, false).is_err());
        assert!(erase_key(&memory, None, Some(b"secret"), false).is_err());
        assert!(add_key(&memory, &key, b"other", Some(0), 10, false).is_err());
        assert!(add_key(&memory, &key, b"other", Some(8), 10, false).is_err());
        add_key(&memory, &key, b"other", None, 10, false).unwrap();
        assert!(opens(b"other") && opens(b"secret"));
        assert!(erase_key(&memory, None, Some(b"wrong"), false).is_err());
        erase_key(&memory, None, Some(b"secret"), false).unwrap();
        assert!(opens(b"other") && !opens(b"secret"));
        erase_key(&memory, Some(1), None, true).unwrap();
        assert!(!opens(b"other"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_header_parses_or_fails(changes in proptest::collection::vec((0..HEADER, any::<u8>()), 0..12)) {
            let mut b = Header {
                cipher: "aes".into(), mode: "xts-plain64".into(), hash: "sha256".into(), payload: 1 << 21, key_bytes: 64,
                digest: [0; DIGEST], digest_salt: [0; SALT], digest_iterations: 1000, uuid: "u".into(),
                slots: [Slot { active: true, iterations: 1, salt: [0; SALT], offset: 4096, stripes: STRIPES }; SLOTS],
            }.encode();
            assert!(Header::parse(&b).is_ok());
            for (at, byte) in changes {
                b[at] = byte;
            }
            let _ = Header::parse(&b).map(|h| h.describe());
        }
    }
}
