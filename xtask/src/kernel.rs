//! The uncompressed kernel inside a bzImage.
//!
//! A bzImage is a real-mode setup part followed by a decompressor that carries the kernel proper, an ELF file, as its
//! payload (the Linux kernel's `Documentation/arch/x86/boot.rst`: `payload_offset`, `payload_length`).

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::elf;

/// Blocks of the LZ4 legacy frame hold at most this much, uncompressed.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;

/// No kernel is larger than this; a corrupt length must not become an allocation.
const LARGEST_KERNEL: usize = 1 << 30;

/// Extracts the ELF file from a bzImage.
pub fn extract(image: &[u8]) -> Result<Vec<u8>> {
    let payload = payload(image)?;
    let elf = decompress(payload)?;
    ensure!(elf::is_elf64(&elf), "the payload of the bzImage is not a 64-bit ELF file");
    Ok(elf)
}

fn payload(image: &[u8]) -> Result<&[u8]> {
    let field = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("truncated bzImage")?;
        Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    ensure!(image.get(0x202..0x206) == Some(b"HdrS"), "not a bzImage: no setup header");
    ensure!(field(0x206)? & 0xffff >= 0x208, "bzImage older than boot protocol 2.08: no payload offset");
    let setup_sectors = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + field(0x248)?;
    let end = start + field(0x24c)?;
    image.get(start..end).context("truncated bzImage")
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    // The build appends the uncompressed size, 32 bits, to what the compressor wrote (gzip ends with it by itself).
    let (stream, size) = payload.split_last_chunk::<4>().context("empty payload")?;
    let size = u32::from_le_bytes(*size) as usize;
    ensure!(size <= LARGEST_KERNEL, "implausible size of the uncompressed kernel: {size} bytes");
    let data = match payload {
        [0x02, 0x21, 0x4c, 0x18, ..] => lz4_legacy(stream)?,
        [0x1f, 0x8b, ..] => filter("gzip", payload)?,
        [0xfd, b'7', b'z', b'X', b'Z', ..] => filter("xz", stream)?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => filter("zstd", stream)?,
        [0x7f, b'E', b'L', b'F', ..] => payload.to_vec(),
        _ => {
            bail!("the kernel is compressed in a way this task does not know (starts {:02x?})", &payload[..4])
        }
    };
    Ok(data)
}

/// The LZ4 "legacy frame" of the kernel build: a magic number, then blocks preceded by their 32-bit size.
fn lz4_legacy(stream: &[u8]) -> Result<Vec<u8>> {
    let mut rest = stream.get(4..).context("truncated LZ4 frame")?;
    let mut out = Vec::new();
    while let Some((size, blocks)) = rest.split_first_chunk::<4>() {
        let size = u32::from_le_bytes(*size) as usize;
        ensure!(size <= blocks.len(), "truncated LZ4 block");
        let (block, next) = blocks.split_at(size);
        ensure!(out.len() < LARGEST_KERNEL, "the uncompressed kernel is implausibly large");
        let filled = out.len();
        out.resize(filled + LZ4_LEGACY_BLOCK, 0);
        let length =
            lz4_flex::block::decompress_into(block, &mut out[filled..]).context("corrupt LZ4 block")?;
        out.truncate(filled + length);
        rest = next;
    }
    ensure!(rest.is_empty(), "truncated LZ4 frame");
    Ok(out)
}

/// Runs a decompressor of the system over the data.
pub fn filter(program: &str, data: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{program}: cannot run; install it"))?;
    let mut input = child.stdin.take().context("no pipe")?;
    let output = std::thread::scope(|scope| {
        // A decompressor that stops early closes the pipe; its exit status tells.
        scope.spawn(move || input.write_all(data));
        child.wait_with_output()
    })?;
    ensure!(output.status.success(), "{program}: {}", output.status);
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake_bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 5 * 512];
        image[0x1f1] = 4;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(&[0x90; 16]);
        image.extend_from_slice(payload);
        image.extend_from_slice(b"what follows the payload");
        image
    }

    fn lz4_payload(kernel: &[u8]) -> Vec<u8> {
        let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
        for chunk in kernel.chunks(LZ4_LEGACY_BLOCK) {
            let block = lz4_flex::block::compress(chunk);
            payload.extend_from_slice(&(block.len() as u32).to_le_bytes());
            payload.extend_from_slice(&block);
        }
        payload.extend_from_slice(&(kernel.len() as u32).to_le_bytes());
        payload
    }

    #[test]
    fn lz4_of_several_blocks() {
        let mut kernel = b"\x7fELF\x02\x01".to_vec();
        kernel.resize(LZ4_LEGACY_BLOCK + 12345, 0xcc);
        assert!(extract(&fake_bzimage(&lz4_payload(&kernel))).expect("extracts") == kernel);
    }

    #[test]
    fn damage_is_an_error() {
        let kernel = b"\x7fELF\x02\x01 and so on and so on and so on".to_vec();
        let image = fake_bzimage(&lz4_payload(&kernel));
        for length in [0, 0x1ff, 0x205, 0x24c, 5 * 512 + 20] {
            assert!(extract(&image[..length]).is_err(), "truncated to {length}");
        }
        let not_a_kernel = lz4_payload(b"something else altogether");
        assert!(extract(&fake_bzimage(&not_a_kernel)).is_err());
        assert!(extract(&fake_bzimage(b"????????")).is_err());
    }
}
