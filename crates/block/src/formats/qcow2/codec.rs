//! Compression of clusters: raw deflate with a 4 KiB window, or zstd.

use crate::{Error, Result};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use std::cell::RefCell;

/// Window of QEMU's deflate streams: 2^12 bytes. A larger one would give streams that it cannot read.
const WINDOW_BITS: u8 = 12;

thread_local! {
    static DEFLATE: RefCell<Option<Compress>> = const { RefCell::new(None) };
    static INFLATE: RefCell<Option<Decompress>> = const { RefCell::new(None) };
    static ZSTD: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    static UNZSTD: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Compresses `input`; `None` if the result is not smaller than `limit`.
pub(super) fn compress(zstd: bool, input: &[u8], limit: usize) -> Result<Option<Vec<u8>>> {
    if zstd { compress_zstd(input, limit) } else { compress_deflate(input, limit) }
}

/// Whether all byte values are about equally frequent, as in random, encrypted or compressed data.
fn looks_random(bytes: &[u8]) -> bool {
    // Four tables, so that a value that comes twice in a row does not wait for itself.
    let mut counts = [[0u32; 256]; 4];
    let quads = bytes.chunks_exact(4);
    for &b in quads.remainder() {
        counts[0][usize::from(b)] += 1;
    }
    for quad in quads {
        for (table, &b) in counts.iter_mut().zip(quad) {
            table[usize::from(b)] += 1;
        }
    }
    let n = bytes.len() as f64;
    let sum: f64 = (0..256)
        .map(|i| counts.iter().map(|t| t[i]).sum::<u32>())
        .filter(|&c| c > 0)
        .map(|c| f64::from(c) * f64::from(c).log2())
        .sum();
    let entropy = n.log2() - sum / n;
    // Random bytes fall short of 8 bits by 255 / (2 n ln 2) on average (Miller and Madow), and hardly ever by half as much again.
    entropy > 8.0 - 1.5 * 255.0 / (2.0 * n * std::f64::consts::LN_2)
}

/// How many positions repeat four bytes that came at most a window before, roughly: what deflate's matches live on.
fn repetitions(bytes: &[u8]) -> usize {
    const SLOTS: u32 = 12;
    let mut last = [0u32; 1 << SLOTS];
    let mut found = 0;
    for (at, four) in bytes.windows(4).enumerate() {
        let word = u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        let slot = &mut last[(word.wrapping_mul(0x9e37_79b1) >> (32 - SLOTS)) as usize];
        let before = std::mem::replace(slot, at as u32 + 1) as usize;
        if before > 0 && at + 1 - before <= 1 << WINDOW_BITS && bytes[before - 1..before + 3] == *four {
            found += 1;
        }
    }
    found
}

/// Whether it is not worth trying to deflate a cluster, which takes as long for random bytes as for others: no value is rarer than
/// others, and nothing repeats.
fn is_incompressible(input: &[u8]) -> bool {
    input.len() >= 16384 && looks_random(input) && repetitions(input) < input.len() / 128
}

fn compress_deflate(input: &[u8], limit: usize) -> Result<Option<Vec<u8>>> {
    if is_incompressible(input) {
        return Ok(None);
    }
    DEFLATE.with_borrow_mut(|state| {
        let deflate = state.get_or_insert_with(|| {
            Compress::new_with_window_bits(Compression::default(), false, WINDOW_BITS)
        });
        deflate.reset();
        let mut output = vec![0; limit];
        match deflate.compress(input, &mut output, FlushCompress::Finish) {
            Ok(Status::StreamEnd) if (deflate.total_out() as usize) < limit => {
                output.truncate(deflate.total_out() as usize);
                Ok(Some(output))
            }
            Ok(_) => Ok(None),
            Err(e) => Err(Error::invalid(format!("deflate failed: {e}"))),
        }
    })
}

fn compress_zstd(input: &[u8], limit: usize) -> Result<Option<Vec<u8>>> {
    let failed = |e| Error::io("zstd", e);
    ZSTD.with_borrow_mut(|state| {
        let compressor = match state {
            Some(c) => c,
            None => {
                state.insert(zstd::bulk::Compressor::new(zstd::DEFAULT_COMPRESSION_LEVEL).map_err(failed)?)
            }
        };
        // One byte short of the limit: no room means no gain, which zstd reports as an error.
        let mut output = vec![0; limit.saturating_sub(1)];
        match compressor.compress_to_buffer(input, &mut output[..]) {
            Ok(n) => {
                output.truncate(n);
                Ok(Some(output))
            }
            Err(_) => Ok(None),
        }
    })
}

/// Fills `output` from `input`, which may have bytes behind the stream's end.
pub(super) fn decompress(zstd: bool, input: &[u8], output: &mut [u8]) -> Result<()> {
    if zstd { decompress_zstd(input, output) } else { decompress_deflate(input, output) }
}

fn decompress_deflate(input: &[u8], output: &mut [u8]) -> Result<()> {
    INFLATE.with_borrow_mut(|state| {
        // The full window reads every stream, whatever its writer chose.
        let inflate = state.get_or_insert_with(|| Decompress::new_with_window_bits(false, 15));
        inflate.reset(false);
        match inflate.decompress(input, output, FlushDecompress::Finish) {
            Ok(Status::StreamEnd | Status::BufError | Status::Ok)
                if inflate.total_out() == output.len() as u64 =>
            {
                Ok(())
            }
            Ok(_) => Err(Error::Corrupt("compressed cluster ends early".into())),
            Err(e) => Err(Error::Corrupt(format!("compressed cluster is damaged: {e}"))),
        }
    })
}

fn decompress_zstd(input: &[u8], output: &mut [u8]) -> Result<()> {
    let damaged = |e: std::io::Error| Error::Corrupt(format!("compressed cluster is damaged: {e}"));
    // What follows the frame in the last sector is not a frame; the frame says where it ends.
    let frame = zstd::zstd_safe::find_frame_compressed_size(input)
        .map_err(|_| Error::Corrupt("compressed cluster is not a zstd frame".into()))?;
    let input = input.get(..frame).ok_or_else(|| Error::Corrupt("compressed cluster ends early".into()))?;
    UNZSTD.with_borrow_mut(|state| {
        let decompressor = match state {
            Some(d) => d,
            None => state.insert(zstd::bulk::Decompressor::new().map_err(damaged)?),
        };
        match decompressor.decompress_to_buffer(input, output).map_err(damaged)? {
            n if n == output.len() => Ok(()),
            _ => Err(Error::Corrupt("compressed cluster ends early".into())),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i / 7 % 97) as u8).collect()
    }

    #[test]
    fn round_trips_with_trailing_bytes() {
        for zstd in [false, true] {
            let data = sample(65536);
            let mut packed = compress(zstd, &data, data.len()).unwrap().unwrap();
            packed.extend([0xab; 300]);
            let mut back = vec![0; data.len()];
            decompress(zstd, &packed, &mut back).unwrap();
            assert_eq!(back, data);
            assert!(decompress(zstd, &packed[..20], &mut back).is_err());
        }
    }

    #[test]
    fn noise_is_refused() {
        let mut x = 1u32;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 24) as u8
        })
        .take(4096)
        .collect();
        for zstd in [false, true] {
            assert_eq!(compress(zstd, &noise, 4096).unwrap(), None);
        }
    }

    #[test]
    fn only_what_cannot_be_compressed_is_left_alone() {
        let mut x = 0x1234_5678_9abc_def1u64;
        let mut noise = |len: usize| -> Vec<u8> {
            std::iter::repeat_with(|| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                (x >> 24) as u8
            })
            .take(len)
            .collect()
        };
        for len in [32768, 65536, 1 << 20] {
            assert!(is_incompressible(&noise(len)), "{len}");
        }
        // A little text in noise, repeated noise, and base64 are worth it.
        let mut mixed = noise(65536);
        mixed[20_000..26_000].fill(b'x');
        assert!(!is_incompressible(&mixed));
        let repeated: Vec<u8> = noise(2000).iter().copied().cycle().take(65536).collect();
        assert!(!is_incompressible(&repeated));
        assert!(compress(false, &repeated, 65536).unwrap().is_some_and(|c| c.len() < 8000));
        let narrow: Vec<u8> = noise(65536).iter().map(|b| b & 0x3f).collect();
        assert!(!is_incompressible(&narrow));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(input in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut out = vec![0; 1024];
            let _ = decompress(false, &input, &mut out);
            let _ = decompress(true, &input, &mut out);
        }
    }
}
