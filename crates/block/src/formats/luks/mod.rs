//! LUKS: an encrypted disk behind a header with key slots. LUKS1 images are made and opened, LUKS2 images opened.

mod v1;
mod v2;

use super::{
    Amending, Cipher, Creation, Driver, Extent, Format, Info, Mapping, Measured, Measurement, Opening, Preallocation,
    ProbeInput, WriteExtent, crypto::{KeyBytes, SectorCipher, Tweak, secret}, support,
};
use crate::{
    Error, Result,
    options::{OptionKind, OptionSpec, Options},
    storage::{Storage, Zeroing},
};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
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
    key: Option<KeyBytes>,
    specific: serde_json::Value,
}

/// What opening a header finds.
pub(super) struct Unlocked {
    /// Where the encrypted disk begins.
    pub(super) payload: u64,
    /// Its length, where the header says so.
    pub(super) size: Option<u64>,
    pub(super) cipher: Option<SectorCipher>,
    /// The master key, for putting it into further slots.
    pub(super) key: Option<KeyBytes>,
    pub(super) specific: serde_json::Value,
}

/// The header and key slots of a new encrypted disk; options are LUKS's, without a prefix.
pub(super) fn build_header(passphrase: &[u8], options: &mut Options) -> Result<Vec<u8>> {
    v1::build(passphrase, options)
}

/// Bytes that [`build_header`] gives for these options, which it takes.
pub(super) fn header_size(options: &mut Options) -> Result<u64> {
    for name in ["key-secret", "iter-time", "hash-alg"] {
        options.take(name);
    }
    Ok(v1::payload_offset(v1::Choice::take(options)?.key_bytes))
}

/// Reads a version 1 header inside another format, where sectors are counted as `tweak` says.
pub(super) fn unlock_inside(
    storage: &dyn Storage,
    passphrase: Option<&[u8]>,
    tweak: Tweak,
) -> Result<Unlocked> {
    let mut head = [0; 8];
    storage.read_at(&mut head, 0)?;
    if &head[..6] != MAGIC || head[6..] != [0, 1] {
        return Err(Error::unsupported("The encryption header is not LUKS version 1"));
    }
    v1::open(storage, passphrase, tweak)
}

/// Adds or erases key slots of a version 1 header, as the options `state`, `new-secret`, `old-secret`, `keyslot` and
/// `iter-time` say.
pub(super) fn change_keys(
    storage: &dyn Storage,
    key: Option<&KeyBytes>,
    options: &mut Options,
    context: &Amending<'_>,
) -> Result<()> {
    let new = secret(options, "new-secret", context.secrets)?;
    let old = secret(options, "old-secret", context.secrets)?;
    let slot = options.take_number("keyslot")?.map(|n| n as usize);
    let timed = options.get("iter-time").is_some();
    let milliseconds = v1::iteration_time(options)?;
    match options.take("state").as_deref() {
        Some("active") => {
            let new = new.ok_or_else(|| {
                Error::usage("'new-secret' is required to activate a keyslot")
            })?;
            if old.is_some() {
                return Err(Error::usage("'old-secret' must not be given when activating keyslots"));
            }
            let key = key.ok_or_else(|| Error::usage("Adding a key needs the image unlocked: give key-secret"))?;
            v1::add_key(storage, key, new, slot, milliseconds, context.force)
        }
        Some("inactive") => {
            if new.is_some() {
                return Err(Error::usage("'new-secret' must not be given when erasing keyslots"));
            }
            if timed {
                return Err(Error::usage("'iter-time' must not be given when erasing keyslots"));
            }
            v1::erase_key(storage, slot, old, context.force)
        }
        Some(other) => {
            Err(Error::usage(format!("Parameter 'state' does not accept value '{other}'; it is active or inactive")))
        }
        None => Err(Error::usage("Parameter 'state' is missing; it is active or inactive")),
    }
}

fn probe(input: &ProbeInput<'_>) -> u32 {
    if input.head.starts_with(MAGIC) && matches!(input.head.get(6..8), Some([0, 1 | 2])) { 100 } else { 0 }
}

fn open(opening: Opening<'_>) -> Result<Box<dyn Format>> {
    let storage = opening.storage;
    let mut head = [0; 8];
    storage.read_at(&mut head, 0)?;
    let passphrase = secret(opening.options, "key-secret", opening.secrets)?;
    if passphrase.is_none() && !opening.no_io {
        return Err(Error::usage("Parameter 'key-secret' is required for cipher"));
    }
    let passphrase = if opening.no_io { None } else { passphrase };
    let unlocked = match (&head[..6] == MAGIC, head[6], head[7]) {
        (true, 0, 1) => v1::open(&*storage, passphrase, Tweak::Guest)?,
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
        key: unlocked.key,
        specific: unlocked.specific,
    }))
}

fn preallocation(options: &mut Options) -> Result<Preallocation> {
    options.take("preallocation").map_or(Ok(Preallocation::Off), |mode| Preallocation::parse(&mode))
}

fn create(creation: Creation<'_>) -> Result<()> {
    let mode = preallocation(creation.options)?;
    let passphrase = secret(creation.options, "key-secret", creation.secrets)?
        .ok_or_else(|| Error::usage("Parameter 'key-secret' is required for cipher"))?;
    let header = v1::build(passphrase, creation.options)?;
    let payload = header.len() as u64;
    creation.storage.set_size(payload)?;
    creation.storage.write_at(&header, 0)?;
    let size = creation.size.checked_next_multiple_of(512).and_then(|s| s.checked_add(payload));
    let end = size.ok_or_else(|| Error::usage("Image size too large"))?;
    creation.storage.set_size(end)?;
    super::raw::allocate(&*creation.storage, payload, end - payload, mode)?;
    creation.storage.flush()
}

fn measure(measurement: Measurement<'_>) -> Result<Measured> {
    measurement.options.take("preallocation");
    let bytes = header_size(measurement.options)?.checked_add(measurement.size);
    let bytes = bytes.ok_or_else(|| Error::usage("Image size too large"))?;
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

    fn amend(&self, options: &mut Options, context: &Amending<'_>) -> Result<()> {
        if self.specific.get("version").is_some() {
            return Err(Error::unsupported("Key slots of LUKS2 images are not changed here; use cryptsetup"));
        }
        change_keys(&*self.storages[0], self.key.as_ref(), options, context)
    }

    fn created_zeroed(&self) -> bool {
        false
    }
}
