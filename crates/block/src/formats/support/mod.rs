//! What several formats share: a cache of table pages with ordered write-back, the walk over units of a table, the end of the
//! file as an allocator, and reading numbers out of headers.

mod cache;
mod places;
mod tail;
mod two_level;
mod units;

pub(super) use cache::{Batch, MetaCache, flush_ordered};
pub(super) use places::Places;
pub(super) use tail::Tail;
pub(super) use two_level::{Shape, TwoLevel};
pub(super) use units::{Slot, commit_units, discard_units, map_units, prepare_units, zero_units};

use crate::{Error, Result};
use std::io::Read;

/// The unsigned 16-bit number at `at`, least significant byte first. Callers index buffers of known length.
pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// The 32-bit number at `at`, least significant byte first.
pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from(le16(bytes, at)) | u32::from(le16(bytes, at + 2)) << 16
}

/// The 64-bit number at `at`, least significant byte first.
pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

/// The 16-bit number at `at`, most significant byte first.
pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// The 32-bit number at `at`, most significant byte first.
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from(be16(bytes, at)) << 16 | u32::from(be16(bytes, at + 2))
}

/// The 64-bit number at `at`, most significant byte first.
pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

/// Copies `value` to `bytes[at..]`.
pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Fills `bytes` with random bytes fit for keys and identifiers.
pub(super) fn random_bytes(bytes: &mut [u8]) -> Result<()> {
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(bytes))
        .map_err(|e| Error::io("Could not read random bytes from /dev/urandom", e))
}

/// A random (version 4) UUID, bytes in the order of its text.
pub(super) fn random_uuid() -> Result<[u8; 16]> {
    let mut id = [0; 16];
    random_bytes(&mut id)?;
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(id)
}

/// What formats answer that cannot change size.
pub(super) fn no_resize() -> Error {
    Error::unsupported("Image format driver does not support resize")
}

/// What `qemu-img` reads from an image of these bytes, for tests; `None` where it is not installed or lacks the format.
#[cfg(test)]
pub(super) fn read_by_qemu(format: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    let dir = tempfile::tempdir().ok()?;
    let (image, plain) = (dir.path().join("image"), dir.path().join("plain"));
    std::fs::write(&image, bytes).ok()?;
    let output = std::process::Command::new("qemu-img")
        .args(["convert", "-f", format, "-O", "raw"])
        .args([&image, &plain])
        .output()
        .ok()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if said.contains("Unknown driver") {
        return None;
    }
    assert!(output.status.success(), "{said}");
    std::fs::read(plain).ok()
}
