//! Numbers and small messages of the protocol.

use crate::{Error, Result};
use std::io::Read;

pub(super) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943; // NBDMAGIC
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // IHAVEOPT
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
pub(super) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub(super) const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flags.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

/// Options.
pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_STARTTLS: u32 = 5;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_LIST_META_CONTEXT: u32 = 9;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;
pub(super) const OPT_EXTENDED_HEADERS: u32 = 11;

/// Option replies.
pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
pub(super) const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
pub(super) const REP_ERR_INVALID: u32 = (1 << 31) + 3;
pub(super) const REP_ERR_TLS_REQD: u32 = (1 << 31) + 5;
pub(super) const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
pub(super) const REP_ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;

/// Kinds of information about an export.
pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_NAME: u16 = 1;
pub(super) const INFO_DESCRIPTION: u16 = 2;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flags.
pub(super) const HAS_FLAGS: u16 = 1;
pub(super) const READ_ONLY: u16 = 1 << 1;
pub(super) const SEND_FLUSH: u16 = 1 << 2;
pub(super) const SEND_FUA: u16 = 1 << 3;
pub(super) const SEND_TRIM: u16 = 1 << 5;
pub(super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const SEND_DF: u16 = 1 << 7;
pub(super) const CAN_MULTI_CONN: u16 = 1 << 8;
pub(super) const SEND_CACHE: u16 = 1 << 10;

/// Commands.
pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_CACHE: u16 = 5;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;
pub(super) const CMD_BLOCK_STATUS: u16 = 7;

/// Command flags.
pub(super) const FLAG_FUA: u16 = 1;
pub(super) const FLAG_NO_HOLE: u16 = 2;
pub(super) const FLAG_REQ_ONE: u16 = 8;
pub(super) const FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Chunks of structured replies.
pub(super) const CHUNK_DONE: u16 = 1;
pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_DATA: u16 = 1;
pub(super) const CHUNK_HOLE: u16 = 2;
pub(super) const CHUNK_BLOCK_STATUS: u16 = 5;
pub(super) const CHUNK_BLOCK_STATUS_EXT: u16 = 6;
pub(super) const CHUNK_ERROR: u16 = (1 << 15) + 1;

/// Block status flags of `base:allocation`.
pub(super) const STATE_HOLE: u32 = 1;
pub(super) const STATE_ZERO: u32 = 2;

/// Longest string the protocol allows.
pub(super) const MAX_STRING: u32 = 4096;
/// Largest payload of one request, the protocol's default.
pub(super) const MAX_PAYLOAD: u32 = 32 << 20;

/// Reads exactly `N` bytes.
pub(super) fn take<const N: usize>(from: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes).map_err(|e| Error::io("NBD connection", e))?;
    Ok(bytes)
}

pub(super) fn take_u16(from: &mut impl Read) -> Result<u16> {
    take(from).map(u16::from_be_bytes)
}

pub(super) fn take_u32(from: &mut impl Read) -> Result<u32> {
    take(from).map(u32::from_be_bytes)
}

pub(super) fn take_u64(from: &mut impl Read) -> Result<u64> {
    take(from).map(u64::from_be_bytes)
}

/// Reads `len` bytes, refusing more than `limit`.
pub(super) fn take_vec(from: &mut impl Read, len: u32, limit: u32) -> Result<Vec<u8>> {
    if len > limit {
        return Err(Error::invalid(format!("NBD peer sends {len} bytes where at most {limit} may be")));
    }
    let mut bytes = vec![0; len as usize];
    from.read_exact(&mut bytes).map_err(|e| Error::io("NBD connection", e))?;
    Ok(bytes)
}

/// The protocol's error numbers are those of Linux for the few it knows; others become `EINVAL`.
pub(super) fn error_number(e: &Error) -> u32 {
    match e.errno() {
        n @ (libc::EPERM
        | libc::EIO
        | libc::ENOMEM
        | libc::EINVAL
        | libc::ENOSPC
        | libc::EOVERFLOW
        | libc::ENOTSUP) => n as u32,
        libc::EROFS => libc::EPERM as u32,
        libc::EFBIG | libc::EDQUOT => libc::ENOSPC as u32,
        _ => libc::EIO as u32,
    }
}
