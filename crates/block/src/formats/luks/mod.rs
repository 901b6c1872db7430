//! LUKS: an encrypted disk behind a header with key slots. LUKS1 images are made and opened, LUKS2 images opened.

mod v1;
mod v2;

use super::{
    Cipher, Creation, Driver, Extent, Format, Info, Mapping, Measured, Measurement, Opening, Preallocation,
    ProbeInput, WriteExtent, crypto::SectorCipher, support,
};
use crate::{
    Error, Result,
    options::{OptionKind, OptionSpec, Options},
    storage::{Storage, Zeroing},
};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

const fn option(name: &'static str, kind: OptionKind, help: &'static str) -> OptionSpec {
    OptionSpec { name, kind, help, default: None }
}

/// The format.
pub static DRIVER: Driver = Driver {
    name: "luks",
    probe,
    open,
    create: Some(create),
    measure: Some(measure),
    options: &[
        option("key-secret", OptionKind::Text, "ID of the secret that provides the keyslot passphrase"),
        option("cipher-alg", OptionKind::Text, "Name of encryption cipher algorithm"),
        option("cipher-mode", OptionKind::Text, "Name of encryption cipher mode"),
        option("ivgen-alg", OptionKind::Text, "Name of IV generator algorithm"),
        option("ivgen-hash-alg", OptionKind::Text, "Name of IV generator hash algorithm"),
        option("hash-alg", OptionKind::Text, "Name of encryption hash algorithm"),
        option("iter-time", OptionKind::Number, "Time to spend in PBKDF in milliseconds"),
        option("preallocation", OptionKind::Text, "Preallocation mode (allowed values: off, falloc, full)"),
    ],
    backing: false,
};

const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
/// Most rounds of key derivation an image may ask for: hours of a processor.
const MAX_ITERATIONS: u32 = 1 << 30;

/// An unlocked (or, for `info`, still locked) image.
struct Luks {
    storages: [Arc<dyn Storage>; 1],
    payload: u64,
    size: AtomicU64,
    /// A size that the header fixes; otherwise the disk ends with the file.
    fixed_size: bool,
    cipher: Option<SectorCipher>,
    specific: serde_json::Value,
}

/// What opening a header finds.
struct Unlocked {
    /// Where the encrypted disk begins.
    payload: u64,
    /// Its length, where the header says so.
    size: Option<u64>,
    cipher: Option<SectorCipher>,
    specific: serde_json::Value,
}

fn probe(input: &ProbeInput<'_>) -> u32 {
    if input.head.starts_with(MAGIC) && matches!(input.head.get(6..8), Some([0, 1 | 2])) { 100 } else { 0 }
}

fn secret<'a>(options: &mut Options, secrets: &'a BTreeMap<String, Vec<u8>>) -> Result<Option<&'a [u8]>> {
    let Some(id) = options.take("key-secret") else { return Ok(None) };
    secrets
        .get(&id)
        .map(|s| Some(s.as_slice()))
        .ok_or_else(|| Error::usage(format!("No secret with id '{id}'")))
}

fn open(opening: Opening<'_>) -> Result<Box<dyn Format>> {
    let storage = opening.storage;
    let mut head = [0; 8];
    storage.read_at(&mut head, 0)?;
    let passphrase = secret(opening.options, opening.secrets)?;
    if passphrase.is_none() && !opening.no_io {
        return Err(Error::usage("Parameter 'key-secret' is required for cipher"));
    }
    let passphrase = if opening.no_io { None } else { passphrase };
    let unlocked = match (&head[..6] == MAGIC, head[6], head[7]) {
        (true, 0, 1) => v1::open(&*storage, passphrase)?,
        (true, 0, 2) => v2::open(&*storage, passphrase)?,
        (true, a, b) => {
            return Err(Error::unsupported(format!(
                "LUKS version {} is not supported",
                u16::from_be_bytes([a, b])
            )));
        }
        _ => return Err(Error::invalid("Volume is not in LUKS format")),
    };
    let room = storage.size()?.saturating_sub(unlocked.payload);
    let size = unlocked.size.unwrap_or(room);
    if size > room {
        return Err(Error::invalid("Invalid LUKS image: the file ends before the encrypted disk does"));
    }
    let sector = unlocked.cipher.as_ref().map_or(512, |c| c.sector());
    Ok(Box::new(Luks {
        storages: [storage],
        payload: unlocked.payload,
        size: AtomicU64::new(size - size % sector),
        fixed_size: unlocked.size.is_some(),
        cipher: unlocked.cipher,
        specific: unlocked.specific,
    }))
}

fn preallocation(options: &mut Options) -> Result<Preallocation> {
    options.take("preallocation").map_or(Ok(Preallocation::Off), |mode| Preallocation::parse(&mode))
}

fn create(creation: Creation<'_>) -> Result<()> {
    let mode = preallocation(creation.options)?;
    let passphrase = secret(creation.options, creation.secrets)?
        .ok_or_else(|| Error::usage("Parameter 'key-secret' is required for cipher"))?;
    let payload = v1::create(&*creation.storage, passphrase, creation.options)?;
    let size = creation.size.checked_next_multiple_of(512).and_then(|s| s.checked_add(payload));
    let end = size.ok_or_else(|| Error::usage("Image size too large"))?;
    creation.storage.set_size(end)?;
    super::raw::allocate(&*creation.storage, payload, end - payload, mode)?;
    creation.storage.flush()
}

fn measure(measurement: Measurement<'_>) -> Result<Measured> {
    for name in ["key-secret", "iter-time", "ivgen-alg", "ivgen-hash-alg", "hash-alg", "preallocation"] {
        measurement.options.take(name);
    }
    let bytes = v1::payload_offset(v1::Choice::take(measurement.options)?.key_bytes) + measurement.size;
    Ok(Measured { required: bytes, fully_allocated: bytes, bitmaps: None })
}

impl Format for Luks {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn info(&self) -> Result<Info> {
        Ok(Info { encrypted: true, specific: Some(self.specific.clone()), ..Info::default() })
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn unit(&self) -> u64 {
        self.cipher.as_ref().map_or(512, |c| c.sector())
    }

    fn flat(&self) -> Option<u64> {
        Some(self.payload)
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        // Holes are no zeros here: whatever they decrypt to is the data.
        let mapping = Mapping::Data { file: 0, host: self.payload + offset, in_place: true };
        super::push_extent(out, Extent { offset, len, mapping });
        Ok(())
    }

    fn prepare_write(&self, offset: u64, len: u64, out: &mut Vec<WriteExtent>) -> Result<()> {
        let host = self.payload + offset;
        out.push(WriteExtent {
            offset,
            len,
            file: 0,
            host,
            new: false,
            head: 0,
            tail: 0,
            fresh: false,
            cookie: 0,
        });
        Ok(())
    }

    fn commit_write(&self, _extents: &[WriteExtent]) -> Result<()> {
        Ok(())
    }

    fn abort_write(&self, _extents: &[WriteExtent]) {}

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> Result<Zeroing> {
        Ok(Zeroing::Unsupported)
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        // A hole would read as noise, neither zeros nor what was there.
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.storages[0].flush()
    }

    fn resize(&self, size: u64, mode: Preallocation) -> Result<()> {
        if self.fixed_size {
            return Err(support::no_resize());
        }
        let size =
            size.checked_next_multiple_of(self.unit()).and_then(|s| Some((s, s.checked_add(self.payload)?)));
        let (size, end) = size.ok_or_else(|| Error::usage("The requested file size is too large"))?;
        let old = self.size();
        self.storages[0].set_size(end)?;
        if size > old {
            super::raw::allocate(&*self.storages[0], self.payload + old, size - old, mode)?;
        }
        self.size.store(size, Ordering::Release);
        // New space has to read as zeros, which are stored encrypted.
        if let Some(cipher) = &self.cipher {
            let mut at = old;
            while at < size {
                let n = (size - at).min(1 << 20);
                let mut zeros = vec![0; n as usize];
                cipher.encrypt(at, self.payload + at, &mut zeros)?;
                self.storages[0].write_at(&zeros, self.payload + at)?;
                at += n;
            }
        }
        Ok(())
    }

    fn cipher(&self) -> Option<&dyn Cipher> {
        self.cipher.as_ref().map(|c| c as &dyn Cipher)
    }

    fn created_zeroed(&self) -> bool {
        false
    }
}
