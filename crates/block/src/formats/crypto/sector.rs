//! Ciphers that encrypt sectors, each by its number.

use super::Hash;
use crate::{Error, Result, formats::Cipher};
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit, consts::U16};

/// Bytes of a cipher block; ciphers with other blocks are not used for disks.
const BLOCK: usize = 16;
/// Bytes of a sector that has a number of its own.
const SECTOR: usize = 512;

type Block = Array<u8, U16>;

/// A keyed block cipher.
trait BlockCipher: Send + Sync {
    fn encrypt(&self, blocks: &mut [Block]);
    fn decrypt(&self, blocks: &mut [Block]);
}

impl<T> BlockCipher for T
where
    T: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + Send + Sync,
{
    fn encrypt(&self, blocks: &mut [Block]) {
        self.encrypt_blocks(blocks);
    }

    fn decrypt(&self, blocks: &mut [Block]) {
        self.decrypt_blocks(blocks);
    }
}

/// A family of ciphers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum CipherName {
    /// AES.
    Aes,
    /// Serpent.
    Serpent,
    /// Twofish.
    Twofish,
}

impl CipherName {
    /// By its name in LUKS headers.
    pub(crate) fn parse(name: &str) -> Result<Self> {
        match name {
            "aes" => Ok(CipherName::Aes),
            "serpent" => Ok(CipherName::Serpent),
            "twofish" => Ok(CipherName::Twofish),
            _ => Err(Error::unsupported(format!(
                "Unsupported cipher '{name}'; aes, serpent and twofish are supported"
            ))),
        }
    }

    /// Its name in LUKS headers.
    pub(crate) fn name(self) -> &'static str {
        match self {
            CipherName::Aes => "aes",
            CipherName::Serpent => "serpent",
            CipherName::Twofish => "twofish",
        }
    }

    fn keyed(self, key: &[u8]) -> Result<Box<dyn BlockCipher>> {
        fn make<T: KeyInit + BlockCipher + 'static>(key: &[u8]) -> Option<Box<dyn BlockCipher>> {
            T::new_from_slice(key).ok().map(|c| Box::new(c) as Box<dyn BlockCipher>)
        }
        let made = match (self, key.len()) {
            (CipherName::Aes, 16) => make::<aes::Aes128>(key),
            (CipherName::Aes, 24) => make::<aes::Aes192>(key),
            (CipherName::Aes, 32) => make::<aes::Aes256>(key),
            (CipherName::Serpent, 16 | 24 | 32) => make::<serpent::Serpent>(key),
            (CipherName::Twofish, 16 | 24 | 32) => make::<twofish::Twofish>(key),
            _ => None,
        };
        made.ok_or_else(|| {
            Error::unsupported(format!("{} takes no keys of {} bytes", self.name(), key.len()))
        })
    }
}

/// How blocks of a sector are chained.
enum Mode {
    Ecb,
    Cbc,
    /// With the second key.
    Xts(Box<dyn BlockCipher>),
}

/// How a sector's number becomes its initialization vector.
enum Vector {
    None,
    /// 32 bits of it.
    Plain,
    /// 64 bits of it.
    Plain64,
    /// Encrypted with a hash of the key.
    Essiv(Box<dyn BlockCipher>),
}

/// Which number a sector has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Tweak {
    /// Its place on the guest's disk.
    Guest,
    /// Its place on the guest's disk plus this.
    GuestFrom(u64),
    /// Its place in the file.
    Host,
}

/// A cipher with its key and mode.
pub(crate) struct SectorCipher {
    cipher: Box<dyn BlockCipher>,
    mode: Mode,
    vector: Vector,
    tweak: Tweak,
    sector: usize,
}

impl SectorCipher {
    /// `mode` as LUKS writes it: `xts-plain64`, `cbc-essiv:sha256`, `ecb`.
    pub(crate) fn new(name: CipherName, mode: &str, key: &[u8], tweak: Tweak) -> Result<Self> {
        let (chain, vector) = mode.split_once('-').unwrap_or((mode, ""));
        let (key, mode) = match chain {
            "ecb" => (key, Mode::Ecb),
            "cbc" => (key, Mode::Cbc),
            "xts" => {
                let (a, b) = key.split_at(key.len() / 2);
                (a, Mode::Xts(name.keyed(b)?))
            }
            _ => {
                return Err(Error::unsupported(format!(
                    "Unsupported cipher mode '{chain}'; xts, cbc and ecb are supported"
                )));
            }
        };
        let vector = match vector.split_once(':').unwrap_or((vector, "")) {
            ("", _) if matches!(mode, Mode::Ecb) => Vector::None,
            ("plain", _) => Vector::Plain,
            ("plain64", _) => Vector::Plain64,
            ("essiv", hash) => Vector::Essiv(name.keyed(&Hash::parse(hash)?.digest(&[key]))?),
            (other, _) => {
                return Err(Error::unsupported(format!(
                    "Unsupported IV generator '{other}'; plain, plain64 and essiv are supported"
                )));
            }
        };
        Ok(SectorCipher { cipher: name.keyed(key)?, mode, vector, tweak, sector: SECTOR })
    }

    /// Sectors of another size; they are still numbered in units of 512 bytes.
    pub(crate) fn with_sector(mut self, sector: usize) -> Self {
        self.sector = sector;
        self
    }

    fn initial(&self, number: u64) -> Block {
        let mut iv = Block::default();
        match &self.vector {
            Vector::None => {}
            Vector::Plain => iv[..4].copy_from_slice(&(number as u32).to_le_bytes()),
            Vector::Plain64 => iv[..8].copy_from_slice(&number.to_le_bytes()),
            Vector::Essiv(cipher) => {
                iv[..8].copy_from_slice(&number.to_le_bytes());
                cipher.encrypt(std::slice::from_mut(&mut iv));
            }
        }
        iv
    }

    /// Encrypts or decrypts whole sectors in place; the first one has this number.
    pub(crate) fn run(&self, encrypt: bool, number: u64, bytes: &mut [u8]) -> Result<()> {
        if !bytes.len().is_multiple_of(self.sector) {
            return Err(Error::invalid("encrypted data is no whole number of sectors"));
        }
        let step = (self.sector / SECTOR) as u64;
        for (i, sector) in bytes.chunks_exact_mut(self.sector).enumerate() {
            let iv = self.initial(number.wrapping_add(i as u64 * step));
            let (blocks, _) = Block::slice_as_chunks_mut(sector);
            match &self.mode {
                Mode::Ecb => self.apply(encrypt, blocks),
                Mode::Cbc => self.cbc(encrypt, iv, blocks),
                Mode::Xts(second) => self.xts(encrypt, &**second, iv, blocks),
            }
        }
        Ok(())
    }

    fn apply(&self, encrypt: bool, blocks: &mut [Block]) {
        if encrypt { self.cipher.encrypt(blocks) } else { self.cipher.decrypt(blocks) }
    }

    fn cbc(&self, encrypt: bool, mut previous: Block, blocks: &mut [Block]) {
        if encrypt {
            for block in blocks {
                xor(block, &previous);
                self.cipher.encrypt(std::slice::from_mut(block));
                previous = *block;
            }
            return;
        }
        // All blocks at once, which the cipher does faster; the chain needs what they were.
        for part in blocks.chunks_mut(32) {
            let mut before = [Block::default(); 32];
            before[..part.len()].copy_from_slice(part);
            self.cipher.decrypt(part);
            for (block, old) in part.iter_mut().zip(&before) {
                xor(block, &previous);
                previous = *old;
            }
        }
    }

    /// IEEE 1619: each block has its own tweak, the previous one doubled.
    fn xts(&self, encrypt: bool, second: &dyn BlockCipher, mut tweak: Block, blocks: &mut [Block]) {
        second.encrypt(std::slice::from_mut(&mut tweak));
        for part in blocks.chunks_mut(32) {
            let mut tweaks = [Block::default(); 32];
            for (block, t) in part.iter_mut().zip(&mut tweaks) {
                *t = tweak;
                xor(block, t);
                tweak = double(&tweak);
            }
            self.apply(encrypt, part);
            for (block, t) in part.iter_mut().zip(&tweaks) {
                xor(block, t);
            }
        }
    }

    fn number(&self, guest: u64, host: u64) -> u64 {
        match self.tweak {
            Tweak::Guest => guest / SECTOR as u64,
            Tweak::GuestFrom(base) => (guest / SECTOR as u64).wrapping_add(base),
            Tweak::Host => host / SECTOR as u64,
        }
    }
}

impl Cipher for SectorCipher {
    fn decrypt(&self, guest: u64, host: u64, buf: &mut [u8]) -> Result<()> {
        self.run(false, self.number(guest, host), buf)
    }

    fn encrypt(&self, guest: u64, host: u64, buf: &mut [u8]) -> Result<()> {
        self.run(true, self.number(guest, host), buf)
    }

    fn sector(&self) -> u64 {
        self.sector as u64
    }
}

fn xor(block: &mut Block, with: &Block) {
    for (a, b) in block.iter_mut().zip(with) {
        *a ^= b;
    }
}

/// A tweak times x in GF(2^128), least significant byte first.
fn double(tweak: &Block) -> Block {
    let mut bytes = [0; BLOCK];
    bytes.copy_from_slice(tweak);
    let value = u128::from_le_bytes(bytes);
    let doubled = value << 1 ^ if value >> 127 != 0 { 0x87 } else { 0 };
    Block::from(doubled.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xts_gives_the_standard_vector() {
        // IEEE 1619, vector 2: keys of 0x11 and 0x22, sector 0x3333333333, plaintext of 0x44.
        let key = [[0x11; 16], [0x22; 16]].concat();
        let cipher = SectorCipher::new(CipherName::Aes, "xts-plain64", &key, Tweak::Guest).unwrap();
        let mut sector = [0x44; SECTOR];
        cipher.run(true, 0x33_3333_3333, &mut sector).unwrap();
        assert_eq!(
            sector[..16],
            [0xc4, 0x54, 0x18, 0x5e, 0x6a, 0x16, 0x93, 0x6e, 0x39, 0x33, 0x40, 0x38, 0xac, 0xef, 0x83, 0x8b]
        );
        cipher.run(false, 0x33_3333_3333, &mut sector).unwrap();
        assert_eq!(sector, [0x44; SECTOR]);
    }

    #[test]
    fn every_mode_round_trips_and_sectors_differ() {
        for name in [CipherName::Aes, CipherName::Serpent, CipherName::Twofish] {
            for mode in ["xts-plain64", "xts-plain", "cbc-plain64", "cbc-essiv:sha256", "ecb"] {
                let key: Vec<u8> = (0..64).take(if mode.starts_with("xts") { 64 } else { 32 }).collect();
                for sector in [512, 4096] {
                    let cipher =
                        SectorCipher::new(name, mode, &key, Tweak::GuestFrom(5)).unwrap().with_sector(sector);
                    let mut bytes = vec![7; 8192];
                    cipher.encrypt(4096, 0, &mut bytes).unwrap();
                    assert_ne!(bytes[..16], [7; 16]);
                    assert_eq!(bytes[..16] == bytes[4096..4112], mode == "ecb", "{mode}");
                    cipher.decrypt(4096, 0, &mut bytes).unwrap();
                    assert_eq!(bytes, [7; 8192]);
                    assert!(cipher.decrypt(0, 0, &mut bytes[..100]).is_err());
                }
            }
        }
    }
}
