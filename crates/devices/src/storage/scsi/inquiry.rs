//! INQUIRY and its pages (SPC-4, 6.6 and 7.8; SBC-3, 6.6).

use super::{CDB_LEN, Lun, LunKind, Moved, Sense, be16, reply};
use crate::storage::Buffer;

/// Blocks that one UNMAP or WRITE SAME may name, and descriptors of an UNMAP; told in the block limits page.
pub(super) const MAX_UNMAP_BYTES: u64 = 1 << 30;
pub(super) const MAX_UNMAP_DESCRIPTORS: u32 = 255;
pub(super) const MAX_WRITE_SAME_BYTES: u64 = 1 << 30;

/// `text` padded with blanks to `N`.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    for (to, from) in field.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    field
}

impl Lun {
    fn device_type(&self) -> u8 {
        match self.kind {
            LunKind::Disk => 0,
            LunKind::Cdrom => 5,
        }
    }

    pub(super) fn inquiry(&self, cdb: &[u8; CDB_LEN], buffer: &mut Buffer<'_>) -> Moved {
        let allocation = be16(cdb, 3).into();
        if cdb[1] & 1 != 0 {
            let page = self.vital_page(cdb[2]).ok_or(Sense::INVALID_FIELD)?;
            let mut data = vec![self.device_type(), cdb[2]];
            data.extend((page.len() as u16).to_be_bytes()); // pages are short
            data.extend(page);
            return reply(buffer, &data, allocation);
        }
        if cdb[2] != 0 {
            return Err(Sense::INVALID_FIELD.into());
        }
        let mut data = [0; 36];
        data[0] = self.device_type();
        data[1] = u8::from(self.drive.is_removable()) << 7;
        data[2] = 5; // SPC-3
        data[3] = 0x12; // hierarchical LUNs, this format
        data[4] = data.len() as u8 - 5;
        data[7] = 0x02; // command queueing
        data[8..16].copy_from_slice(&padded::<8>(&self.identity.vendor));
        data[16..32].copy_from_slice(&padded::<16>(&self.identity.product));
        data[32..].copy_from_slice(&padded::<4>(&self.identity.version));
        reply(buffer, &data, allocation)
    }

    fn vital_page(&self, page: u8) -> Option<Vec<u8>> {
        let disk = self.kind == LunKind::Disk;
        Some(match page {
            0x00 => {
                let mut list = vec![0x00];
                list.extend(self.identity.serial.is_some().then_some(0x80));
                list.push(0x83);
                if disk {
                    list.extend([0xb0, 0xb1, 0xb2]);
                }
                list
            }
            0x80 => self.identity.serial.as_ref()?.as_bytes().to_vec(),
            0x83 => self.identification(),
            0xb0 if disk => self.block_limits(),
            0xb1 if disk => {
                let mut data = vec![0; 60];
                data[1] = 1; // non-rotating: the host's cache answers, seeks cost nothing
                data
            }
            0xb2 if disk => {
                // Unmapping by UNMAP and WRITE SAME; what it leaves is not defined; resource-provisioned.
                let on = self.drive.discards();
                vec![0, if on { 0xe0 } else { 0 }, if on { 2 } else { 0 }, 0]
            }
            _ => return None,
        })
    }

    /// Designators: a name of ours, and the world wide name.
    fn identification(&self) -> Vec<u8> {
        let mut data = Vec::new();
        let id = &self.identity.device_id.as_bytes()[..self.identity.device_id.len().min(200)];
        data.extend([0x02, 0x00, 0, id.len() as u8]); // ASCII, vendor specific; at most 200
        data.extend(id);
        if let Some(wwn) = self.identity.wwn {
            data.extend([0x01, 0x03, 0, 8]); // binary, NAA
            data.extend(wwn.to_be_bytes());
        }
        data
    }

    fn block_limits(&self) -> Vec<u8> {
        let block = self.drive.block_size();
        let in_blocks = |bytes: u32| bytes / block;
        let mut data = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| data[at - 4..at - 4 + bytes.len()].copy_from_slice(bytes);
        let spec = self.drive.spec();
        put(4, &[1]); // WRITE SAME of zero blocks is not "all"
        let least = in_blocks(spec.min_io_size).min(u16::MAX.into()) as u16;
        put(6, &least.to_be_bytes());
        put(12, &in_blocks(spec.opt_io_size).to_be_bytes());
        if self.drive.discards() {
            let most = (MAX_UNMAP_BYTES / u64::from(block)) as u32;
            put(20, &most.to_be_bytes());
            put(24, &MAX_UNMAP_DESCRIPTORS.to_be_bytes());
            put(28, &in_blocks(self.drive.discard_granularity()).to_be_bytes());
        }
        put(36, &(MAX_WRITE_SAME_BYTES / u64::from(block)).to_be_bytes());
        data
    }
}
