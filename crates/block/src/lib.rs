//! Disk images: formats, storage, engines and jobs, with no VM in sight.
//!
//! # Architecture
//!
//! ```text
//!   device models   image tool   NBD server   jobs
//!          \             |           |        /
//!           +--------- Image --------+-------+       moves bytes: splits requests, copy-on-write, backing chains,
//!                        |                           zero detection, decompression, encryption
//!        Format (map_read / prepare+commit)          maps guest offsets to extents; owns the metadata
//!                        |
//!        Storage (file, window, memory, NBD, ...)    flat bytes on the host
//! ```
//!
//! * [`storage::Storage`] is a flat run of bytes. Implementations are one file each in `storage/`.
//! * [`formats::Format`] is an open image of some format. It never touches guest data: it says where data is
//!   ([`formats::Format::map`]), where a write may go (`prepare_write`), and makes a finished write visible (`commit_write`).
//!   What it may rely on, and what it must guarantee, stands on the trait.
//! * [`Image`] drives a format, its storages and its backing image. It is `Send + Sync` and synchronous: any number of
//!   threads call [`Image::read_at`] and [`Image::write_at`] at once.
//! * [`queue::Queue`] keeps many requests of one thread in flight, without waiting for any: by io_uring where the image is flat
//!   ([`Image::direct`]), by threads otherwise. Device models use it; how is told there.
//!
//! Around these: [`nbd`] serves images and uses served ones; [`jobs`] mirror, back up, stream and commit images in use, seeing the
//! guest's writes through [`Image::watch`]; [`Throttle`] limits images one by one or in groups.
//!
//! Lock order: an image's gate (changes in progress), its range locks, then whatever the format locks.
//!
//! # Adding a format
//!
//! One file (or folder) in `formats/` with `pub static DRIVER: Driver`, and its name in the `formats!` line of
//! `formats/mod.rs`; `info`, `convert`, `create` and the shared tests then find it. `formats/raw.rs` is the smallest
//! complete one. A sparse format with a table of blocks implements `map` (look the block up), `prepare_write` (in place, or a
//! fresh block with `head` and `tail` so that it is written whole), and `commit_write` (write the table entry); it uses
//! [`formats::push_extent`] and [`formats::push_write`] to merge neighbours. Header fields come from hostile hands: check
//! every offset, size and count with checked arithmetic before use, and bound every allocation. A read-only format
//! returns [`Error::ReadOnly`] from the write calls. `formats/support` has what table formats share: a page cache with ordered
//! write-back, the walk over units, space at the end of the file.
//!
//! Order of writes for crash safety: data, then (where old contents were copied, or on `flush`) a storage flush, then the
//! table that refers to it. Space that tables on disk still refer to must not be reused.

mod error;
pub mod formats;
mod image;
pub mod jobs;
pub mod nbd;
mod options;
pub mod queue;
mod range_lock;
pub mod secret;
pub mod storage;
mod throttle;

pub use error::{Context, Error, Result, strerror};
pub use image::{Create, DetectZeroes, Image, MapEntry, OpenOptions, create_image, parse_detect_zeroes};
pub use options::{OptionKind, OptionSpec, Options, parse_size};
pub use range_lock::{RangeGuard, RangeLock};
pub use storage::CacheMode;
pub use throttle::{Limits, Rate, Throttle};

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    storage::is_zero(bytes)
}
