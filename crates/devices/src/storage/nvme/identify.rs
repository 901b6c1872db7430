//! Identify data (NVMe 1.4, 5.15.2) and log pages (5.14).

use super::command::Status;
use super::namespace::{MOST, Namespace};
use super::{MDTS, NvmeBus, VERSION};

/// What the controller says it is.
#[derive(Clone, Debug)]
pub(super) struct Names {
    pub(super) serial: String,
    pub(super) model: String,
    pub(super) firmware: String,
}

fn text(to: &mut [u8], from: &str) {
    to.fill(b' ');
    for (to, from) in to.iter_mut().zip(from.bytes()) {
        *to = from;
    }
}

/// Answers Identify.
pub(super) fn identify(names: &Names, bus: &NvmeBus, kind: u8, nsid: u32) -> Result<Vec<u8>, Status> {
    match kind {
        0x00 | 0x11 => match (nsid, bus.get(nsid)) {
            (0, _) | (MOST_PLUS_ONE..=0xffff_fffe, _) => Err(Status::INVALID_NAMESPACE),
            // What all namespaces have in common: their format is their own.
            (u32::MAX, _) => Ok(common()),
            (_, None) => Ok(vec![0; 4096]),
            (_, Some(space)) => Ok(namespace(&space)),
        },
        0x01 => Ok(controller(names)),
        0x02 | 0x10 => {
            if nsid >= 0xffff_fffe {
                return Err(Status::INVALID_NAMESPACE);
            }
            let mut data = vec![0; 4096];
            let ids = bus.ids().into_iter().filter(|n| *n > nsid);
            for (to, id) in data.chunks_exact_mut(4).zip(ids) {
                to.copy_from_slice(&id.to_le_bytes());
            }
            Ok(data)
        }
        0x03 => {
            let space = bus.get(nsid).ok_or(Status::INVALID_NAMESPACE)?;
            let mut data = vec![0; 4096];
            (data[0], data[1]) = (1, 8); // EUI-64
            data[4..12].copy_from_slice(&space.eui64.to_be_bytes());
            Ok(data)
        }
        _ => Err(Status::INVALID_FIELD),
    }
}

const MOST_PLUS_ONE: u32 = MOST + 1;

fn common() -> Vec<u8> {
    let mut d = vec![0; 4096];
    d[33] = 1 << 3;
    d[130] = 9;
    d
}

fn namespace(space: &Namespace) -> Vec<u8> {
    let mut d = vec![0; 4096];
    let drive = &space.drive;
    let block = drive.block_size();
    for at in [0, 8, 16] {
        d[at..at + 8].copy_from_slice(&drive.blocks().to_le_bytes());
    }
    d[24] = u8::from(drive.discards()) | 1 << 4; // space is given back; the optimal sizes below count
    d[33] = 1 << 3; // Write Zeroes may deallocate; what is deallocated is not defined
    // Optimal sizes are one less than the number of blocks.
    let less_one = |bytes: u32| ((bytes / block).clamp(1, 65536) - 1) as u16;
    let write = less_one(drive.physical_block_size().max(drive.spec().min_io_size));
    let discard = less_one(drive.discard_granularity());
    for (at, value) in [(64, write), (66, write), (68, discard), (70, discard)] {
        d[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    if drive.spec().opt_io_size > 0 {
        d[72..74].copy_from_slice(&less_one(drive.spec().opt_io_size).to_le_bytes());
    }
    d[99] = u8::from(drive.is_read_only());
    d[120..128].copy_from_slice(&space.eui64.to_be_bytes());
    d[130] = block.trailing_zeros() as u8; // at most 21
    d
}

fn controller(names: &Names) -> Vec<u8> {
    let mut d = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| d[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &0x1b36u16.to_le_bytes());
    put(2, &0x1af4u16.to_le_bytes());
    put(72, &[6]); // recommended arbitration burst
    put(73, &[0x00, 0x54, 0x52]); // OUI, lowest byte first
    put(77, &[MDTS]);
    put(80, &VERSION.to_le_bytes());
    put(92, &(1u32 << 8).to_le_bytes()); // namespace attribute notices
    put(111, &[1]); // an I/O controller
    put(258, &[3, 3]); // aborts and event requests at once, less one
    put(260, &[0x03, 0x04]); // one read-only firmware slot; log pages in parts
    put(266, &343u16.to_le_bytes()); // warning and critical temperature, kelvin
    put(268, &373u16.to_le_bytes());
    put(512, &[0x66, 0x44]); // entry sizes
    put(516, &MOST.to_le_bytes());
    put(520, &(1u16 | 1 << 2 | 1 << 3 | 1 << 7).to_le_bytes()); // Compare, Dataset Management, Write Zeroes, Verify
    put(525, &[0x07]); // a volatile write cache; Flush takes all namespaces
    put(2048, &2500u16.to_le_bytes()); // 25 W
    text(&mut d[4..24], &names.serial);
    text(&mut d[24..64], &names.model);
    text(&mut d[64..72], &names.firmware);
    let name = format!("nqn.2019-08.org.qemu:{}", names.serial);
    d[768..768 + name.len().min(255)].copy_from_slice(&name.as_bytes()[..name.len().min(255)]);
    d
}

/// Counters of the SMART log.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Counters {
    pub(super) read_bytes: u64,
    pub(super) written_bytes: u64,
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) media_errors: u64,
}

/// SMART / Health Information (5.14.1.2).
pub(super) fn smart(c: &Counters, read_only: bool) -> Vec<u8> {
    let mut d = vec![0; 512];
    d[0] = u8::from(read_only) << 3;
    d[1..3].copy_from_slice(&323u16.to_le_bytes());
    (d[3], d[4]) = (100, 10); // spare, threshold
    let units = |bytes: u64| bytes.div_ceil(512_000);
    let fields = [
        (32, units(c.read_bytes)),
        (48, units(c.written_bytes)),
        (64, c.reads),
        (80, c.writes),
        (112, 1),
        (160, c.media_errors),
    ];
    for (at, value) in fields {
        d[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    d
}

/// Firmware Slot Information (5.14.1.3).
pub(super) fn firmware(names: &Names) -> Vec<u8> {
    let mut d = vec![0; 512];
    d[0] = 1;
    text(&mut d[8..16], &names.firmware);
    d
}

/// Commands Supported and Effects (5.14.1.5).
pub(super) fn effects() -> Vec<u8> {
    let mut d = vec![0; 4096];
    let mut set = |at: usize, value: u32| d[4 * at..4 * at + 4].copy_from_slice(&value.to_le_bytes());
    for admin in [0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0a, 0x0c] {
        set(admin, 1);
    }
    for (io, changes) in
        [(0x00, true), (0x01, true), (0x02, false), (0x05, false), (0x08, true), (0x09, true), (0x0c, false)]
    {
        set(256 + io, if changes { 3 } else { 1 });
    }
    d
}
