//! Units against the bytes that the standards say.

use super::*;
use crate::storage::DriveSpec;
use ::block::{Image, OpenOptions};
use ::bus::System;
use proptest::prelude::*;
use tempfile::NamedTempFile;

struct Bench {
    file: NamedTempFile,
    lun: Arc<Lun>,
}

fn open(file: &NamedTempFile) -> Arc<Image> {
    let options = OpenOptions { format: Some("raw".into()), ..OpenOptions::default() };
    Arc::new(Image::open(file.path().to_str().unwrap(), &options).unwrap())
}

fn identity() -> LunIdentity {
    LunIdentity {
        vendor: "QEMU".into(),
        product: "QEMU HARDDISK".into(),
        version: "2.5+".into(),
        serial: Some("KV1".into()),
        device_id: "disk0".into(),
        wwn: Some(0x5000_c500_1234_5678),
    }
}

fn disk(spec: &DriveSpec, len: u64) -> Bench {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    let drive = Arc::new(Drive::disk("disk0", spec, open(&file), System::new(|_| {})));
    Bench { file, lun: Arc::new(Lun::new(LunKind::Disk, drive, identity())) }
}

fn cdrom(len: u64) -> Bench {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    let spec = DriveSpec::default();
    let drive = Arc::new(Drive::cdrom("cd0", &spec, Some(open(&file)), System::new(|_| {})));
    Bench { file, lun: Arc::new(Lun::new(LunKind::Cdrom, drive, identity())) }
}

impl Bench {
    fn run(&self, cdb: &[u8], data: &mut [u8]) -> Outcome {
        self.lun.execute(cdb, &mut Buffer::Host(data))
    }

    /// The data of a command that succeeds.
    fn get(&self, cdb: &[u8]) -> Vec<u8> {
        let mut data = vec![0; 8192];
        let outcome = self.run(cdb, &mut data);
        assert_eq!(outcome.status, GOOD, "{cdb:02x?}: {outcome:?}");
        data.truncate(outcome.done as usize);
        data
    }

    fn sense(&self, cdb: &[u8], data: &mut [u8]) -> Sense {
        self.run(cdb, data).sense.unwrap_or_else(|| panic!("{cdb:02x?} succeeded"))
    }

    fn settle(&self) {
        assert_eq!(self.sense(&[0; 6], &mut []), Sense::RESET);
    }
}

#[test]
fn attention_comes_first_and_sense_is_kept() {
    let b = disk(&DriveSpec::default(), 1 << 20);
    assert_eq!(b.get(&[0x12, 0, 0, 0, 36, 0])[8..16], *b"QEMU    ");
    b.settle();
    assert_eq!(b.run(&[0; 6], &mut []).status, GOOD);
    assert_eq!(
        b.sense(&[0x5e, 0, 0, 0, 0, 0, 0, 0, 8, 0], &mut [0; 8]),
        Sense::INVALID_OPCODE,
        "reservations"
    );
    let sense = b.get(&[3, 0, 0, 0, 18, 0]);
    assert_eq!((sense[0], sense[2], sense[12]), (0x70, 5, 0x20));
    assert_eq!(b.get(&[3, 0, 0, 0, 18, 0])[2], 0, "told once");
}

#[test]
fn pages_say_what_the_disk_is() {
    let spec = DriveSpec {
        physical_block_size: Some(4096),
        opt_io_size: 65536,
        discard_granularity: Some(4096),
        ..DriveSpec::default()
    };
    let b = disk(&spec, 1 << 20);
    b.settle();
    let page = |n| b.get(&[0x12, 1, n, 1, 0, 0]);
    assert_eq!(page(0)[4..], [0, 0x80, 0x83, 0xb0, 0xb1, 0xb2]);
    assert_eq!(page(0x80)[4..], *b"KV1");
    let id = page(0x83);
    assert_eq!(id[4..8], [2, 0, 0, 5]);
    assert_eq!(id[8..13], *b"disk0");
    assert_eq!(id[13..25], [1, 3, 0, 8, 0x50, 0, 0xc5, 0, 0x12, 0x34, 0x56, 0x78]);
    let limits = page(0xb0);
    assert_eq!((be32(&limits, 12), be32(&limits, 28)), (128, 8));
    assert_eq!(page(0xb2)[5], 0xe0);
    assert_eq!(b.sense(&[0x12, 1, 0x99, 0, 255, 0], &mut [0; 8]), Sense::INVALID_FIELD);
    assert_eq!(b.get(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]), [0, 0, 7, 0xff, 0, 0, 2, 0]);
    let mut cdb = [0; 16];
    (cdb[0], cdb[1], cdb[13]) = (0x9e, 0x10, 32);
    let capacity = b.get(&cdb);
    assert_eq!((be64(&capacity, 0), capacity[13], capacity[14]), (2047, 3, 0x80));
}

#[test]
fn blocks_move_by_every_length_of_command() {
    let b = disk(&DriveSpec::default(), 1 << 20);
    b.settle();
    let commands: [(&[u8], &[u8]); 4] = [
        (&[0x0a, 0, 0, 5, 1, 0], &[0x08, 0, 0, 5, 1, 0]),
        (&[0x2a, 8, 0, 0, 0, 5, 0, 0, 1, 0], &[0x28, 0, 0, 0, 0, 5, 0, 0, 1, 0]),
        (&[0xaa, 0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0], &[0xa8, 0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0]),
        (
            &[0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0],
            &[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0],
        ),
    ];
    for (i, (write, read)) in commands.iter().enumerate() {
        let fill = 0x40 + i as u8;
        let outcome = b.run(write, &mut [fill; 512]);
        assert_eq!((outcome.status, outcome.done, outcome.wanted), (GOOD, 512, 512));
        assert_eq!(b.get(read), [fill; 512]);
        assert_eq!(std::fs::read(b.file.path()).unwrap()[5 * 512..6 * 512], [fill; 512]);
    }
    let past = [0x28, 0, 0, 0, 8, 0, 0, 0, 1, 0];
    assert_eq!(b.sense(&past, &mut [0; 512]), Sense::LBA_OUT_OF_RANGE);
    let mut wraps = [0xff; 16];
    (wraps[0], wraps[1]) = (0x88, 0);
    assert_eq!(b.sense(&wraps, &mut [0; 512]), Sense::LBA_OUT_OF_RANGE);
    // Less room than blocks: what there is room for, and the transport sees the rest.
    let outcome = b.run(&[0x28, 0, 0, 0, 0, 5, 0, 0, 2, 0], &mut [0; 700]);
    assert_eq!((outcome.status, outcome.done, outcome.wanted), (GOOD, 700, 1024));
    assert_eq!(b.run(&[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], &mut []).status, GOOD);
}

#[test]
fn unmap_and_write_same() {
    let b = disk(&DriveSpec::default(), 1 << 20);
    b.settle();
    let mut same = [0x93, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0];
    assert_eq!(b.run(&same, &mut [0x77; 512]).status, GOOD);
    let now = std::fs::read(b.file.path()).unwrap();
    assert_eq!((now[8 * 512 - 1], now[8 * 512], now[24 * 512 - 1], now[24 * 512]), (0, 0x77, 0x77, 0));
    same[1] = 0x08;
    assert_eq!(b.run(&same, &mut [0; 512]).status, GOOD);
    assert!(std::fs::read(b.file.path()).unwrap().iter().all(|b| *b == 0));
    same[10..14].fill(0xff);
    assert_eq!(b.sense(&same, &mut [0; 512]), Sense::LBA_OUT_OF_RANGE);

    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
    list.extend([0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0, 0]);
    assert_eq!(b.run(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &mut list).status, GOOD);
    list[18] = 0xff;
    assert_eq!(b.sense(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &mut list), Sense::LBA_OUT_OF_RANGE);
    assert_eq!(b.sense(&[0x42, 0, 0, 0, 0, 0, 0, 0, 20, 0], &mut list), Sense::PARAMETER_LENGTH);
}

#[test]
fn the_cache_mode_is_switched_by_its_page() {
    let b = disk(&DriveSpec::default(), 1 << 20);
    b.settle();
    let page = b.get(&[0x1a, 8, 8, 0, 255, 0]);
    assert_eq!((page[2], page[4], page[5], page[6]), (0x10, 8, 18, 4));
    let mut list = vec![0, 0, 0, 0];
    list.extend(&page[4..]);
    list[6] = 0;
    let len = list.len() as u8;
    assert_eq!(b.run(&[0x15, 0x10, 0, 0, len, 0], &mut list).status, GOOD);
    assert!(!b.lun.drive().writeback());
    assert_eq!(b.get(&[0x5a, 8, 8, 0, 0, 0, 0, 0, 255, 0])[10], 0);
    list[7] = 1;
    assert_eq!(b.sense(&[0x15, 0x10, 0, 0, len, 0], &mut list), Sense::INVALID_PARAMETER);
    assert_eq!(b.sense(&[0x15, 0x10, 0, 0, 9, 0], &mut list), Sense::PARAMETER_LENGTH);
    assert_eq!(b.sense(&[0x1a, 0, 0xff, 0, 255, 0], &mut [0; 9]), Sense::SAVING_NOT_SUPPORTED);
    b.lun.reset();
    assert!(b.lun.drive().writeback(), "as configured");
}

#[test]
fn errors_follow_the_policy() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let options = OpenOptions { read_only: true, ..OpenOptions::reader(Some("raw")) };
    let image = Arc::new(Image::open(file.path().to_str().unwrap(), &options).unwrap());
    let drive = Drive::disk("ro", &DriveSpec::default(), image, System::new(|_| {}));
    let lun = Lun::new(LunKind::Disk, Arc::new(drive), identity());
    lun.execute(&[0; 6], &mut Buffer::Host(&mut []));
    let write = |data: &mut [u8]| lun.execute(&[0x0a, 0, 0, 0, 1, 0], &mut Buffer::Host(data));
    assert_eq!(write(&mut [1; 512]).sense, Some(Sense::WRITE_PROTECTED));
    let bad = DriveSpec { rerror: crate::storage::OnError::Enospc, ..DriveSpec::default() };
    assert!(bad.check("scsi-hd", 20).unwrap_err().to_string().contains("rerror"));
}

#[test]
fn media_are_changed_and_the_guest_hears_of_it() {
    let b = cdrom(4 << 20);
    b.settle();
    let drive = b.lun.drive().clone();
    assert_eq!(b.get(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]), [0, 0, 7, 0xff, 0, 0, 8, 0]);
    let events = [0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8, 0];
    assert_eq!(b.get(&events), [0, 6, 4, 0x10, 0, 2, 0, 0]);
    assert_eq!(b.run(&[0x1e, 0, 0, 0, 1, 0], &mut []).status, GOOD, "lock");
    assert!(matches!(drive.eject(false), Err(crate::storage::TrayError::Locked(_))));
    assert_eq!(b.get(&events)[4], 1, "eject request");
    assert_eq!(b.sense(&[0x1b, 0, 0, 0, 2, 0], &mut []), Sense::REMOVAL_PREVENTED);
    assert!(drive.eject(true).unwrap().is_some());
    assert_eq!(b.get(&events)[4..6], [3, 1]);
    assert_eq!(b.sense(&[0; 6], &mut []), Sense::TRAY_OPEN);
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(2048 * 1000).unwrap();
    drive.insert(open(&file)).unwrap();
    assert!(drive.insert(open(&b.file)).is_err());
    assert_eq!(b.get(&events)[4..6], [2, 2]);
    assert_eq!(b.sense(&[0; 6], &mut []), Sense::MEDIUM_CHANGED);
    assert_eq!(b.get(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0])[2..4], [3, 0xe7]);
    // The guest's own eject and load.
    assert_eq!(b.run(&[0x1b, 0, 0, 0, 2, 0], &mut []).status, GOOD);
    assert_eq!(b.sense(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], &mut [0; 2048]), Sense::TRAY_OPEN);
    assert_eq!(b.run(&[0x1b, 0, 0, 0, 3, 0], &mut []).status, GOOD);
    assert_eq!(b.sense(&[0; 6], &mut []), Sense::MEDIUM_CHANGED);
    assert_eq!(b.get(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0]).len(), 2048);
    assert_eq!(b.sense(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], &mut [0; 2048]), Sense::INVALID_OPCODE);
}

#[test]
fn discs_describe_themselves() {
    let b = cdrom(4 << 20);
    b.settle();
    let toc = b.get(&[0x43, 0, 0, 0, 0, 0, 0, 0, 100, 0]);
    assert_eq!(toc, [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xaa, 0, 0, 0, 8, 0]);
    let msf = b.get(&[0x43, 2, 0, 0, 0, 0, 0, 0, 100, 0]);
    assert_eq!(msf[8..12], [0, 0, 2, 0]);
    assert_eq!(msf[16..20], [0, 0, 29, 23]);
    let configuration = b.get(&[0x46, 0, 0, 0, 0, 0, 0, 1, 0, 0]);
    assert_eq!(configuration[6..8], [0, 8]);
    assert_eq!(be32(&configuration, 0) as usize, configuration.len() - 4);
    assert_eq!(b.sense(&[0xad, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0], &mut [0; 9]), Sense::INCOMPATIBLE_MEDIUM);
    let dvd = cdrom(800 << 20);
    dvd.settle();
    assert_eq!(dvd.get(&[0x46, 0, 0, 0, 0, 0, 0, 1, 0, 0])[6..8], [0, 0x10]);
    assert_eq!(dvd.get(&[0xad, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0]).len(), 2052);
    assert_eq!(media_read(&[0xbe, 0, 0, 0, 0, 7, 0, 0, 3, 0x10, 0, 0]), Some((7, 3)));
}

#[test]
fn a_bus_answers_for_units_that_are_not_there() {
    let bus = ScsiBus::new();
    let b = disk(&DriveSpec::default(), 1 << 20);
    let at = |target, lun| LunAddress { target, lun };
    assert!(bus.attach(at(3, 300), &b.lun));
    assert!(!bus.attach(at(3, 300), &b.lun) && !bus.attach(at(256, 0), &b.lun));
    let mut data = [0; 64];
    let list = bus
        .execute(at(3, 0), &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], &mut Buffer::Host(&mut data))
        .unwrap();
    assert_eq!((list.done, data[3], data[8], data[16], data[17]), (24, 16, 0, 0x41, 0x2c));
    let inquiry = bus.execute(at(3, 1), &[0x12, 0, 0, 0, 36, 0], &mut Buffer::Host(&mut data)).unwrap();
    assert_eq!((inquiry.status, data[0]), (GOOD, 0x7f));
    assert_eq!(
        bus.execute(at(3, 1), &[0; 6], &mut Buffer::Host(&mut [])).unwrap().sense,
        Some(Sense::NO_SUCH_LUN)
    );
    assert!(bus.execute(at(4, 0), &[0; 6], &mut Buffer::Host(&mut [])).is_none());
    let saved = bus.save();
    bus.load(saved.clone()).unwrap();
    bus.detach(at(3, 300)).unwrap();
    assert!(bus.load(saved).is_err());
}

#[test]
fn state_goes_over() {
    let (a, b) = (cdrom(1 << 20), cdrom(1 << 20));
    a.run(&[0x1e, 0, 0, 0, 1, 0], &mut []);
    a.settle_anyhow();
    a.run(&[0x1e, 0, 0, 0, 1, 0], &mut []);
    b.lun.load(a.lun.save());
    assert!(b.lun.drive().tray_locked());
    assert_eq!(b.lun.save(), a.lun.save());
}

impl Bench {
    fn settle_anyhow(&self) {
        self.run(&[0; 6], &mut []);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_command_is_survived(
        cd in any::<bool>(),
        cdbs in prop::collection::vec((any::<u8>(), prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..32), 0usize..3000), 1..20),
    ) {
        let b = if cd { cdrom(64 << 10) } else { disk(&DriveSpec::default(), 64 << 10) };
        for (operation, rest, room) in cdbs {
            let mut cdb = vec![operation];
            cdb.extend(rest);
            let outcome = b.run(&cdb, &mut vec![1; room]);
            prop_assert!(outcome.done <= room as u64);
            prop_assert_eq!(outcome.sense.is_some(), outcome.status == CHECK_CONDITION);
        }
    }
}
