//! Drives against the words and registers that the standard says.

use super::*;
use crate::storage::{DriveSpec, scsi::LunIdentity, scsi::LunKind};
use ::block::{Image, OpenOptions};
use ::bus::System;
use proptest::prelude::*;
use tempfile::NamedTempFile;

pub(crate) fn open(file: &NamedTempFile) -> Arc<Image> {
    let options = OpenOptions { format: Some("raw".into()), ..OpenOptions::default() };
    Arc::new(Image::open(file.path().to_str().unwrap(), &options).unwrap())
}

fn identity() -> AtaIdentity {
    AtaIdentity {
        model: "QEMU HARDDISK".into(),
        serial: "KV-7".into(),
        firmware: "2.5+".into(),
        wwn: Some(0x5000_c500_1234_5678),
    }
}

/// A disk of `len` bytes.
pub(crate) fn disk(len: u64) -> (NamedTempFile, Arc<AtaDrive>) {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    let drive = Drive::disk("d0", &DriveSpec::default(), open(&file), System::new(|_| {}));
    let drive = AtaDrive::disk(Arc::new(drive), identity());
    (file, Arc::new(drive))
}

/// A CD-ROM drive with a medium of `len` bytes.
pub(crate) fn cdrom(len: u64) -> (NamedTempFile, Arc<AtaDrive>) {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    let drive = Drive::cdrom("c0", &DriveSpec::default(), Some(open(&file)), System::new(|_| {}));
    let unit = LunIdentity {
        vendor: "QEMU".into(),
        product: "QEMU DVD-ROM".into(),
        version: "2.5+".into(),
        serial: None,
        device_id: "c0".into(),
        wwn: None,
    };
    (file, Arc::new(AtaDrive::cdrom(Lun::new(LunKind::Cdrom, Arc::new(drive), unit), identity())))
}

fn words(data: &[u8]) -> Vec<u16> {
    data.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect()
}

#[test]
fn identify_names_and_sizes() {
    let (_file, d) = disk(200 << 30);
    let Action::Give(Protocol::Pio(1), data) = d.begin(&Taskfile { command: 0xec, ..Taskfile::default() })
    else {
        panic!("no data");
    };
    assert_eq!(data.iter().fold(0u8, |a, b| a.wrapping_add(*b)), 0, "checksum");
    let w = words(&data);
    assert_eq!(w[27], u16::from_be_bytes(*b"QE"));
    assert_eq!((w[1], w[3], w[6]), (16383, 16, 63));
    assert_eq!(u32::from(w[60]) | u32::from(w[61]) << 16, 0xfff_ffff, "28 bits are full");
    assert_eq!(u64::from(w[100]) | u64::from(w[101]) << 16 | u64::from(w[102]) << 32, 200 << 21);
    assert_eq!((w[75], w[76] & 0x100, w[108]), (31, 0x100, 0x5000));
    let (_file, cd) = cdrom(1 << 20);
    let refused = cd.begin(&Taskfile { command: 0xec, ..Taskfile::default() });
    assert!(matches!(refused, Action::Done(r) if r.lba == Some(0xeb_1401) && r.error == error::ABRT));
    assert!(matches!(cd.begin(&Taskfile { command: 0xa1, ..Taskfile::default() }), Action::Give(..)));
}

#[test]
fn addresses_of_all_three_kinds() {
    let (_file, d) = disk(1 << 30);
    let extent = |t: Taskfile| match d.begin(&t) {
        Action::Read(_, e) | Action::Write(_, e, _) => Ok((e.lba, e.sectors)),
        Action::Done(r) => Err(r.error),
        other => panic!("{other:?}"),
    };
    let t = Taskfile { command: 0x20, count: 0, lba: 0x10, device: 0x40, ..Taskfile::default() };
    assert_eq!(extent(t), Ok((16, 256)));
    let chs = Taskfile { command: 0x20, count: 1, lba: 2 << 8 | 5, device: 3, ..Taskfile::default() };
    assert_eq!(extent(chs), Ok(((2 * 16 + 3) * 63 + 4, 1)));
    assert_eq!(extent(Taskfile { lba: 2 << 8, ..chs }), Err(error::IDNF), "sectors count from 1");
    let ext = Taskfile { command: 0x25, count: 0, lba: 0x1_0000, ..Taskfile::default() };
    assert_eq!(extent(ext), Ok((0x1_0000, 0x1_0000)));
    assert_eq!(extent(Taskfile { lba: 0xffff_ffff_ffff, ..ext }), Err(error::IDNF));
    let ncq = Taskfile { command: 0x60, features: 8, count: 5 << 3, lba: 7, ..Taskfile::default() };
    assert_eq!(d.begin(&ncq), Action::Read(Protocol::Queued(5), Extent { lba: 7, sectors: 8 }));
    assert_eq!(extent(Taskfile { lba: 1 << 40, ..ncq }), Err(error::IDNF));
    let log = Taskfile { command: 0x2f, count: 1, lba: 0x10, ..Taskfile::default() };
    let Action::Give(_, page) = d.begin(&log) else { panic!("no log") };
    assert_eq!((page[0], page[3], page.iter().fold(0u8, |a, b| a.wrapping_add(*b))), (5, error::IDNF, 0));
    let Action::Give(_, page) = d.begin(&log) else { panic!("no log") };
    assert_eq!(page[0], 0x80, "told once");
}

#[test]
fn data_moves_and_trims() {
    let (file, d) = disk(1 << 20);
    let write = Taskfile { command: 0x3d, count: 2, lba: 4, ..Taskfile::default() };
    let action = d.begin(&write);
    assert!(matches!(action, Action::Write(Protocol::Dma, _, true)));
    assert_eq!(d.perform(&action, &mut Buffer::Host(&mut [0x33; 1024]), 0), Reply::OK);
    assert_eq!(std::fs::read(file.path()).unwrap()[4 * 512..6 * 512], [0x33; 1024]);
    let trim = d.begin(&Taskfile { command: 6, features: 1, count: 1, ..Taskfile::default() });
    assert_eq!(trim, Action::Trim(512));
    let mut ranges = [0; 512];
    ranges[..8].copy_from_slice(&(4u64 | 2 << 48).to_le_bytes());
    assert_eq!(d.perform(&trim, &mut Buffer::Host(&mut ranges), 0), Reply::OK);
    ranges[..8].copy_from_slice(&(4u64 << 30 | 2 << 48).to_le_bytes());
    assert!(d.perform(&trim, &mut Buffer::Host(&mut ranges), 0).is_error());
    assert_eq!(d.perform(&Action::Flush, &mut Buffer::Host(&mut []), 0), Reply::OK);
}

#[test]
fn packets_carry_scsi() {
    let (_file, cd) = cdrom(1 << 20);
    let mut packet = [0; PACKET];
    let (reply, _) = cd.packet(&packet, &mut Buffer::Host(&mut []));
    assert_eq!((reply.status & 1, reply.error >> 4), (1, 6), "unit attention");
    (packet[0], packet[4]) = (0x12, 36);
    let mut data = [0; 36];
    let (reply, done) = cd.packet(&packet, &mut Buffer::Host(&mut data));
    assert_eq!((reply.is_error(), done, data[0], reply.count), (false, 36, 5, Some(3)));
}

proptest! {
    #[test]
    fn any_registers_are_survived(
        cd in any::<bool>(),
        list in prop::collection::vec((any::<u8>(), any::<u16>(), any::<u16>(), any::<u64>(), any::<u8>()), 1..30),
    ) {
        let (_file, d) = if cd { cdrom(64 << 10) } else { disk(64 << 10) };
        let mut data = vec![0; 4096];
        for (command, features, count, lba, device) in list {
            let action = d.begin(&Taskfile { command, features, count, lba: lba >> 16, device });
            d.perform(&action, &mut Buffer::Host(&mut data), 0);
            d.load(d.save()).unwrap();
        }
    }
}
