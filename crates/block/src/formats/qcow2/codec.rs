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

fn compress_deflate(input: &[u8], limit: usize) -> Result<Option<Vec<u8>>> {
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

    proptest! {
        #[test]
        fn garbage_never_panics(input in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut out = vec![0; 1024];
            let _ = decompress(false, &input, &mut out);
            let _ = decompress(true, &input, &mut out);
        }
    }
}
