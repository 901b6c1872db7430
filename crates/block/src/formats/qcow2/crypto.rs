//! Encryption of guest data: a LUKS header inside the image (QEMU's `docs/interop/qcow2.txt`, "Full disk encryption header
//! pointer"), or the old AES, whose key is the passphrase.

use super::{Qcow2, header::Header};
use crate::{
    Error, Options, Result,
    formats::{
        Amending,
        crypto::{KeyBytes, SectorCipher, Tweak, passphrase_cipher, secret},
        luks,
    },
    storage::{Storage, Window},
};
use std::{collections::BTreeMap, sync::Arc};

/// `crypt_method`: AES.
pub(super) const AES: u32 = 1;
/// `crypt_method`: LUKS.
pub(super) const LUKS: u32 = 2;
/// Longest encryption header: key slots of the longest keys end well before.
const MAX_HEADER: u64 = 64 << 20;

/// What an encrypted image needs for its data.
pub(super) struct Encryption {
    /// Missing where the image was opened without its key, to look at metadata.
    pub(super) cipher: Option<SectorCipher>,
    key: Option<KeyBytes>,
    /// As `info` shows it.
    pub(super) specific: serde_json::Value,
}

/// The header's place in the file as a storage of its own.
fn region(storage: &Arc<dyn Storage>, header: &Header) -> Result<Window> {
    let (offset, len) =
        header.crypto.ok_or_else(|| Error::invalid("CRYPTO header extension missing"))?;
    if offset & (header.cluster_size() - 1) != 0 || len == 0 || len > MAX_HEADER {
        return Err(Error::invalid("Encryption header offset or length is invalid"));
    }
    if offset.checked_add(len).is_none_or(|end| storage.size().is_ok_and(|size| end > size)) {
        return Err(Error::invalid("The encryption header reaches past the end of the file"));
    }
    Window::new(Arc::clone(storage), offset, len)
}

/// Reads the encryption header with the options `encrypt.format` and `encrypt.key-secret`. `keyless`: no data will be read.
pub(super) fn open(
    storage: &Arc<dyn Storage>,
    header: &Header,
    options: &mut Options,
    secrets: &BTreeMap<String, Vec<u8>>,
    keyless: bool,
) -> Result<Option<Encryption>> {
    let mut given = options.take_prefixed("encrypt.");
    let passphrase = secret(&mut given, "key-secret", secrets)?;
    let format = match header.crypt_method {
        0 => None,
        AES => Some("aes"),
        _ => Some("luks"),
    };
    if let Some(wanted) = given.take("format")
        && Some(wanted.as_str()) != format
    {
        return Err(Error::usage(match format {
            None => "No encryption in image header, but options specified format".to_owned()
                + &format!(" '{wanted}'"),
            Some(format) => format!(
                "Header reported '{format}' encryption format but options specify '{wanted}'"
            ),
        }));
    }
    given.finish("encryption of format 'qcow2'")?;
    let Some(format) = format else {
        return match passphrase {
            Some(_) => Err(Error::usage("The image is not encrypted: it takes no encrypt.key-secret")),
            None => Ok(None),
        };
    };
    if passphrase.is_none() && !keyless {
        return Err(Error::usage("Parameter 'encrypt.key-secret' is required for cipher"));
    }
    if format == "aes" {
        let cipher = passphrase.map(passphrase_cipher).transpose()?;
        return Ok(Some(Encryption { cipher, key: None, specific: serde_json::json!({ "format": "aes" }) }));
    }
    // Sectors are numbered by their place in the file.
    let mut unlocked = luks::unlock_inside(&region(storage, header)?, passphrase, Tweak::Host)?;
    unlocked.specific["format"] = "luks".into();
    Ok(Some(Encryption { cipher: unlocked.cipher, key: unlocked.key, specific: unlocked.specific }))
}

/// What to encrypt a new image with: the method, and the LUKS header to be put into it.
pub(super) enum Choice {
    /// Nothing.
    None,
    /// The old AES.
    Aes,
    /// LUKS, with these options.
    Luks(Options),
}

impl Choice {
    /// From the options `encryption` and `encrypt.*`.
    pub(super) fn take(options: &mut Options) -> Result<Self> {
        let old = options.take_bool("encryption")?.unwrap_or(false);
        let mut given = options.take_prefixed("encrypt.");
        match given.take("format") {
            Some(_) if old => Err(Error::usage(
                "Options encryption and encrypt.format are mutually exclusive",
            )),
            Some(format) if format == "luks" => Ok(Choice::Luks(given)),
            Some(format) if format == "aes" => Self::aes(given),
            Some(other) => Err(Error::usage(format!("Invalid parameter '{other}'; encrypt.format is luks or aes"))),
            None if old => Self::aes(given),
            None if given.is_empty() => Ok(Choice::None),
            None => Err(Error::usage("Parameter 'encrypt.format' is missing; it is luks")),
        }
    }

    fn aes(mut given: Options) -> Result<Self> {
        given.take("key-secret").ok_or_else(|| {
            Error::usage("Parameter 'encrypt.key-secret' is required for cipher")
        })?;
        given.finish("encryption format 'aes'")?;
        Ok(Choice::Aes)
    }

    /// The header's `crypt_method`.
    pub(super) fn method(&self) -> u32 {
        match self {
            Choice::None => 0,
            Choice::Aes => AES,
            Choice::Luks(_) => LUKS,
        }
    }

    /// The bytes of the encryption header.
    pub(super) fn header(self, secrets: &BTreeMap<String, Vec<u8>>) -> Result<Vec<u8>> {
        let Choice::Luks(mut options) = self else { return Ok(Vec::new()) };
        let passphrase = secret(&mut options, "key-secret", secrets)?
            .ok_or_else(|| Error::usage("Parameter 'encrypt.key-secret' is required for cipher"))?;
        let bytes = luks::build_header(passphrase, &mut options)?;
        options.finish("encryption format 'luks'")?;
        Ok(bytes)
    }

    /// How many bytes [`Choice::header`] gives.
    pub(super) fn header_size(&mut self) -> Result<u64> {
        match self {
            Choice::Luks(options) => luks::header_size(options),
            _ => Ok(0),
        }
    }
}

impl Qcow2 {
    /// Changes key slots as the options that begin with `encrypt.` say.
    pub(super) fn amend_keys(&self, options: &mut Options, context: &Amending<'_>) -> Result<()> {
        let mut given = options.take_prefixed("encrypt.");
        if given.is_empty() {
            return Ok(());
        }
        let meta = self.lock();
        if let Some(format) = given.take("format")
            && (format != "luks" || meta.header.crypt_method != LUKS)
        {
            return Err(Error::unsupported("Changing the encryption format is not supported"));
        }
        if meta.header.crypt_method != LUKS {
            return Err(Error::unsupported("Only LUKS encryption options can be amended for qcow2"));
        }
        let key = self.encryption.as_ref().and_then(|e| e.key.as_ref());
        luks::change_keys(&region(self.main(), &meta.header)?, key, &mut given, context)?;
        given.finish("encryption of format 'qcow2'")
    }
}
