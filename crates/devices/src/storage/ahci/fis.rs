//! Frames (Serial ATA 3.2, 10.5) and where AHCI puts them (AHCI 1.3.1, 4.2.1).

use crate::storage::ata::{Reply, Taskfile};

/// Frame types.
pub(super) const H2D: u8 = 0x27;
const D2H: u8 = 0x34;
const PIO_SETUP: u8 = 0x5f;
const SET_DEVICE_BITS: u8 = 0xa1;

/// Offsets in the receive area.
pub(super) const PIO_SETUP_AT: u64 = 0x20;
pub(super) const D2H_AT: u64 = 0x40;
pub(super) const SET_DEVICE_BITS_AT: u64 = 0x58;

/// The registers in a frame from the host.
pub(super) fn taskfile(f: &[u8; 64]) -> Taskfile {
    let b = |i: usize, shift: u32| u64::from(f[i]) << shift;
    Taskfile {
        command: f[2],
        features: u16::from_le_bytes([f[3], f[11]]),
        count: u16::from_le_bytes([f[12], f[13]]),
        lba: b(4, 0) | b(5, 8) | b(6, 16) | b(8, 24) | b(9, 32) | b(10, 40),
        device: f[7],
    }
}

fn registers(frame: &mut [u8; 20], count: u16, lba: u64, device: u8) {
    let l = lba.to_le_bytes();
    frame[4..7].copy_from_slice(&l[..3]);
    frame[7] = device;
    frame[8..11].copy_from_slice(&l[3..6]);
    frame[12..14].copy_from_slice(&count.to_le_bytes());
}

/// Registers to the host; `interrupt` asks for one.
pub(super) fn d2h(task: &Taskfile, reply: &Reply, interrupt: bool) -> [u8; 20] {
    let mut f = [0; 20];
    f[0] = D2H;
    f[1] = u8::from(interrupt) << 6;
    (f[2], f[3]) = (reply.status, reply.error);
    registers(&mut f, reply.count.unwrap_or(task.count), reply.lba.unwrap_or(task.lba), task.device);
    f
}

/// The frame before data by PIO; `input`: from the drive.
pub(super) fn pio_setup(task: &Taskfile, reply: &Reply, input: bool, len: u16) -> [u8; 20] {
    use crate::storage::ata::status::DRQ;
    let mut f = [0; 20];
    f[0] = PIO_SETUP;
    f[1] = u8::from(input) << 5 | 1 << 6;
    (f[2], f[3]) = (reply.status | DRQ, reply.error);
    registers(&mut f, reply.count.unwrap_or(task.count), reply.lba.unwrap_or(task.lba), task.device);
    f[15] = reply.status;
    f[16..18].copy_from_slice(&len.to_le_bytes());
    f
}

/// The frame that tells of queued commands that are done.
pub(super) fn set_device_bits(reply: &Reply, done: u32) -> [u8; 8] {
    let mut f = [0; 8];
    f[0] = SET_DEVICE_BITS;
    f[1] = 1 << 6;
    f[2] = reply.status & 0x77;
    f[3] = reply.error;
    f[4..].copy_from_slice(&done.to_le_bytes());
    f
}
