//! IDENTIFY DEVICE and IDENTIFY PACKET DEVICE (ACS-3, 7.12 and 7.13), SMART data.

use super::AtaDrive;

struct Words([u16; 256]);

impl Words {
    /// Text of words `from..to`, first character in the high byte, padded with blanks.
    fn text(&mut self, from: usize, to: usize, text: &str) {
        let mut bytes = text.bytes().chain(std::iter::repeat(b' '));
        for word in &mut self.0[from..to] {
            let pair = [bytes.next().unwrap_or(b' '), bytes.next().unwrap_or(b' ')];
            *word = u16::from_be_bytes(pair);
        }
    }

    fn long(&mut self, at: usize, value: u32) {
        self.0[at] = value as u16;
        self.0[at + 1] = (value >> 16) as u16;
    }

    /// The bytes, with the integrity word.
    fn finish(mut self) -> Vec<u8> {
        self.0[255] = 0x00a5;
        let mut bytes: Vec<u8> = self.0.iter().flat_map(|w| w.to_le_bytes()).collect();
        let sum = bytes.iter().fold(0u8, |a, b| a.wrapping_add(*b));
        bytes[511] = sum.wrapping_neg();
        bytes
    }
}

impl AtaDrive {
    fn words(&self) -> Words {
        let mut w = Words([0; 256]);
        w.text(10, 20, &self.identity.serial);
        w.text(23, 27, &self.identity.firmware);
        w.text(27, 47, &self.identity.model);
        let state = self.lock();
        w.0[53] = 7; // words 54 to 58, 64 to 70 and 88 are valid
        w.0[63] = 0x07 | u16::from(state.mwdma) << 8;
        w.0[64] = 0x03; // PIO modes 3 and 4
        w.0[65..69].fill(120); // nanoseconds a cycle
        w.0[88] = 0x3f | u16::from(state.udma) << 8;
        w.0[93] = 0x6001; // 80-conductor cable
        w
    }

    pub(super) fn identify_disk(&self) -> Vec<u8> {
        let total = self.drive.blocks();
        let mut w = self.words();
        let (heads, sectors, multiple, smart) = {
            let s = self.lock();
            (u64::from(s.heads), u64::from(s.sectors), s.multiple, s.smart)
        };
        let cylinders = (total / (16 * 63)).clamp(1, 16383) as u16;
        w.0[0] = 0x0040;
        (w.0[1], w.0[3], w.0[6]) = (cylinders, 16, 63);
        w.0[47] = 0x8000 | u16::from(super::MAX_MULTIPLE);
        w.0[49] = 0x0b00; // DMA, LBA, IORDY
        w.0[50] = 0x4000;
        w.0[51..53].fill(0x0200);
        let now = (total / (heads * sectors)).min(u16::MAX.into());
        (w.0[54], w.0[55], w.0[56]) = (now as u16, heads as u16, sectors as u16);
        w.long(57, (now * heads * sectors).min(u32::MAX.into()) as u32);
        w.0[59] = if multiple == 0 { 0 } else { 0x0100 | u16::from(multiple) };
        w.long(60, total.min(0xfff_ffff) as u32);
        w.0[75] = 31; // queue depth less one
        w.0[76] = 0x0106; // NCQ; 1.5 and 3 Gb/s
        w.0[80] = 0x01f0; // ATA/ATAPI-4 to ACS
        w.0[82] = 0x4021; // NOP, write cache, SMART
        w.0[83] = 0x7400; // FLUSH, FLUSH EXT, 48-bit
        w.0[84] = 0x4060 | if self.identity.wwn.is_some() { 0x100 } else { 0 }; // FUA, logs
        w.0[85] = 0x4000 | u16::from(self.drive.writeback()) << 5 | u16::from(smart);
        w.0[86] = 0x3400;
        w.0[87] = w.0[84];
        w.long(100, total as u32);
        w.long(102, (total >> 32) as u32);
        let exponent = (self.drive.physical_block_size() / 512).trailing_zeros() as u16;
        w.0[106] = 0x4000 | if exponent > 0 { 0x2000 | exponent } else { 0 };
        if let Some(wwn) = self.identity.wwn {
            for (i, pair) in wwn.to_be_bytes().as_chunks::<2>().0.iter().enumerate() {
                w.0[108 + i] = u16::from_be_bytes(*pair);
            }
        }
        w.0[105] = 64; // blocks of ranges that one DATA SET MANAGEMENT takes
        w.0[169] = u16::from(self.drive.discards());
        w.0[217] = 1; // non-rotating
        w.finish()
    }

    pub(super) fn identify_packet(&self) -> Vec<u8> {
        let mut w = self.words();
        w.0[0] = 0x85c0; // packets of 12 bytes, DRQ within 50 us, removable, CD-ROM
        w.0[49] = 0x0b00;
        w.0[50] = 0x4000;
        w.0[71..73].fill(30);
        w.0[76] = 0x0006;
        w.0[80] = 0x01f0;
        w.0[82] = 0x4210; // NOP, DEVICE RESET, packets
        w.0[83] = 0x4000;
        w.0[84] = 0x4000;
        w.0[85] = 0x4210;
        w.0[87] = 0x4000;
        w.finish()
    }
}

fn with_checksum(mut data: Vec<u8>) -> Vec<u8> {
    let sum = data.iter().fold(0u8, |a, b| a.wrapping_add(*b));
    data[511] = sum.wrapping_neg();
    data
}

/// Attributes: identifier, flags, normalised value, worst, raw.
const ATTRIBUTES: [(u8, u16, u8, u8, u64); 5] = [
    (0x01, 0x03, 100, 100, 0),  // read errors
    (0x05, 0x03, 100, 100, 0),  // reallocated sectors
    (0x09, 0x03, 100, 100, 1),  // power-on hours
    (0x0c, 0x03, 100, 100, 1),  // power cycles
    (0xc2, 0x02, 69, 50, 0x1f), // temperature
];

pub(super) fn smart_data() -> Vec<u8> {
    let mut data = vec![0; 512];
    data[0] = 1;
    for (entry, (id, flags, value, worst, raw)) in data[2..].chunks_exact_mut(12).zip(ATTRIBUTES) {
        entry[0] = id;
        entry[1..3].copy_from_slice(&flags.to_le_bytes());
        (entry[3], entry[4]) = (value, worst);
        entry[5..11].copy_from_slice(&raw.to_le_bytes()[..6]);
    }
    data[362] = 0x02; // offline collection done
    data[367] = 0x11; // offline tests, self-test
    data[368] = 0x03; // saves attributes
    data[370] = 0x01; // error logging
    (data[372], data[373]) = (1, 1); // minutes of self-tests
    with_checksum(data)
}

pub(super) fn smart_thresholds() -> Vec<u8> {
    let mut data = vec![0; 512];
    data[0] = 1;
    for (entry, (id, ..)) in data[2..].chunks_exact_mut(12).zip(ATTRIBUTES) {
        (entry[0], entry[1]) = (id, 6);
    }
    with_checksum(data)
}

/// Log directory, empty error log, empty self-test log.
pub(super) fn smart_log(address: u8) -> Option<Vec<u8>> {
    let mut data = vec![0; 512];
    match address {
        0 => {
            data[0] = 1;
            (data[2], data[12]) = (1, 1);
            return Some(data);
        }
        1 | 6 => data[0] = 1,
        _ => return None,
    }
    Some(with_checksum(data))
}
