//! The SCSI host against a driver.

use super::*;
use crate::storage::scsi::{Lun, LunAddress, LunIdentity, LunKind, Sense};
use crate::storage::{Drive, DriveSpec, OnError};
use block::{Image, OpenOptions};
use bus::virtio::testing::{Guest, Transport};
use bus::virtio::{feature as ring, status};
use bus::{System, SystemRequest};
use std::sync::Mutex;
use tempfile::NamedTempFile;

const REQUEST: u64 = 0x10_0000;
const RESPONSE: u64 = 0x10_1000;
const DATA: u64 = 0x11_0000;
const AT: LunAddress = LunAddress { target: 5, lun: 0 };

fn open(file: &NamedTempFile) -> Arc<Image> {
    let options = OpenOptions { format: Some("raw".into()), ..OpenOptions::default() };
    Arc::new(Image::open(file.path().to_str().unwrap(), &options).unwrap())
}

fn unit(file: &NamedTempFile, kind: LunKind, system: System) -> Arc<Lun> {
    let spec = DriveSpec { werror: OnError::Stop, ..DriveSpec::default() };
    let drive = match kind {
        LunKind::Disk => Drive::disk("d0", &spec, open(file), system),
        LunKind::Cdrom => Drive::cdrom("d0", &spec, Some(open(file)), system),
    };
    let identity = LunIdentity {
        vendor: "QEMU".into(),
        product: "X".into(),
        version: "1".into(),
        serial: None,
        device_id: "d0".into(),
        wwn: None,
    };
    Arc::new(Lun::new(kind, Arc::new(drive), identity))
}

struct Bench {
    guest: Guest,
    bus: Arc<ScsiBus>,
    file: NamedTempFile,
}

impl Bench {
    fn new(kind: LunKind) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let bus = ScsiBus::new();
        assert!(bus.attach(AT, &unit(&file, kind, System::new(|_| {}))));
        let spec = Spec { num_queues: Some(2), ..Spec::default() };
        let device = Box::new(Scsi::new(&spec, bus.clone(), 1).unwrap());
        let mut guest = Guest::new(device, Transport::Pci, true);
        guest.bring_up(!ring::RING_PACKED, 4);
        let mut bench = Self { guest, bus, file };
        assert_eq!(bench.command(0, AT, &[0; 6], &[]).status, 2, "unit attention");
        bench
    }

    fn command(&mut self, queue: u16, at: LunAddress, cdb: &[u8], data: &[(u64, u32, bool)]) -> Answer {
        let mut header = [0; 51];
        header[..4].copy_from_slice(&[1, at.target as u8, 0x40 | (at.lun >> 8) as u8, at.lun as u8]);
        header[19..19 + cdb.len()].copy_from_slice(cdb);
        self.guest.mem.write(REQUEST, &header).unwrap();
        self.guest.mem.write(RESPONSE, &[0xee; 108]).unwrap();
        let mut buffers = vec![(REQUEST, 51, false)];
        buffers.extend(data.iter().filter(|b| !b.2));
        buffers.push((RESPONSE, 108, true));
        buffers.extend(data.iter().filter(|b| b.2));
        let used = self.guest.request(2 + queue, &buffers);
        let mut r = [0; 108];
        self.guest.mem.read(RESPONSE, &mut r).unwrap();
        Answer {
            used,
            residual: u32::from_le_bytes([r[4], r[5], r[6], r[7]]),
            status: r[10],
            response: r[11],
            sense: (r[0] > 0).then_some(Sense { key: r[14], asc: r[24], ascq: r[25] }),
        }
    }
}

#[derive(Debug, PartialEq)]
struct Answer {
    used: u32,
    residual: u32,
    status: u8,
    response: u8,
    sense: Option<Sense>,
}

#[test]
fn blocks_and_pages_move_both_ways() {
    let mut b = Bench::new(LunKind::Disk);
    b.guest.mem.write(DATA, &[0x5a; 4096]).unwrap();
    let write = b.command(
        0,
        AT,
        &[0x2a, 0, 0, 0, 0, 3, 0, 0, 8, 0],
        &[(DATA, 1000, false), (DATA + 1000, 3096, false)],
    );
    assert_eq!(write, Answer { used: 108, residual: 0, status: 0, response: 0, sense: None });
    assert_eq!(std::fs::read(b.file.path()).unwrap()[3 * 512..11 * 512], [0x5a; 4096]);
    let read = b.command(1, AT, &[0x28, 0, 0, 0, 0, 3, 0, 0, 8, 0], &[(DATA + 0x2000, 4096, true)]);
    assert_eq!((read.used, read.status), (108 + 4096, 0));
    let mut back = [0; 4096];
    b.guest.mem.read(DATA + 0x2000, &mut back).unwrap();
    assert_eq!(back, [0x5a; 4096]);
    let inquiry = b.command(0, AT, &[0x12, 0, 0, 0, 255, 0], &[(DATA, 255, true)]);
    assert_eq!((inquiry.used, inquiry.residual, inquiry.response), (108 + 36, 255 - 36, 0));
    let overrun = b.command(0, AT, &[0x28, 0, 0, 0, 0, 0, 0, 0, 2, 0], &[(DATA, 512, true)]);
    assert_eq!(overrun.response, 1);
    let bad = b.command(0, AT, &[0x28, 0, 0, 1, 0, 0, 0, 0, 2, 0], &[(DATA, 1024, true)]);
    assert_eq!(bad.sense, Some(Sense::LBA_OUT_OF_RANGE));
    let nobody = b.command(0, LunAddress { target: 9, lun: 0 }, &[0; 6], &[]);
    assert_eq!(nobody.response, 3);
    // A command that takes data is not given what the driver meant to be filled, nor the other way round.
    let wrong = b.command(0, AT, &[0x12, 0, 0, 0, 36, 0], &[(DATA, 36, false)]);
    assert_eq!((wrong.status, wrong.residual), (0, 36));
}

#[test]
fn a_full_ring_of_requests_is_served() {
    let mut b = Bench::new(LunKind::Disk);
    for sector in 0..64u64 {
        std::os::unix::fs::FileExt::write_all_at(b.file.as_file(), &[sector as u8 + 1; 512], sector * 512)
            .unwrap();
    }
    for round in 0..20 {
        for i in 0..16u64 {
            let mut header = [0; 51];
            header[..4].copy_from_slice(&[1, 5, 0x40, 0]);
            header[19] = 0x28;
            header[24] = ((i + round) % 64) as u8;
            header[27] = 1;
            b.guest.mem.write(REQUEST + i * 0x100, &header).unwrap();
            let at = (REQUEST + i * 0x100, RESPONSE + 0x1000 + i * 0x100, DATA + i * 0x1000);
            b.guest
                .submit(2 + (i % 2) as u16, &[(at.0, 51, false), (at.1, 108, true), (at.2, 512, true)])
                .unwrap();
        }
        for i in 0..16 {
            b.guest.wait_used(2 + i % 2);
        }
        for i in 0..16u64 {
            assert_eq!(b.guest.mem.read_obj::<u8>(DATA + i * 0x1000).unwrap(), ((i + round) % 64) as u8 + 1);
        }
    }
}

#[test]
fn events_tell_of_units_and_media() {
    let mut b = Bench::new(LunKind::Cdrom);
    let event = |b: &mut Bench| {
        b.guest.wait_used(1);
        let mut e = [0; 16];
        b.guest.mem.read(DATA, &mut e).unwrap();
        (e[0], e[5], e[12])
    };
    // One that came before there was a buffer.
    let other = NamedTempFile::new().unwrap();
    other.as_file().set_len(4096).unwrap();
    let at = LunAddress { target: 7, lun: 0 };
    assert!(b.bus.attach(at, &unit(&other, LunKind::Disk, System::new(|_| {}))));
    b.guest.submit(1, &[(DATA, 16, true)]).unwrap();
    assert_eq!(event(&mut b), (1, 7, 1));
    b.guest.submit(1, &[(DATA, 16, true)]).unwrap();
    b.bus.detach(at).unwrap();
    assert_eq!(event(&mut b), (1, 7, 2));
    b.guest.submit(1, &[(DATA, 16, true)]).unwrap();
    let drive = b.bus.unit(AT).unwrap().drive().clone();
    drive.eject(true).unwrap();
    assert_eq!(event(&mut b), (3, 5, 0x28));
}

#[test]
fn task_management() {
    let mut b = Bench::new(LunKind::Disk);
    let mut tmf = |subtype: u32, target: u8| {
        let mut r = [0; 24];
        r[4..8].copy_from_slice(&subtype.to_le_bytes());
        r[8..12].copy_from_slice(&[1, target, 0x40, 0]);
        b.guest.mem.write(REQUEST, &r).unwrap();
        assert_eq!(b.guest.request(0, &[(REQUEST, 24, false), (RESPONSE, 1, true)]), 1);
        b.guest.mem.read_obj::<u8>(RESPONSE).unwrap()
    };
    assert_eq!(tmf(0, 5), 0);
    assert_eq!(tmf(2, 5), 11);
    assert_eq!(tmf(0, 6), 3);
    assert_eq!(tmf(5, 5), 0);
    assert_eq!(b.command(0, AT, &[0; 6], &[]).sense, Some(Sense::RESET));
}

#[test]
fn an_error_of_the_host_stops_the_machine_and_is_retried() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = asked.clone();
    let system = System::new(move |r| log.lock().unwrap().push(r));
    let bus = ScsiBus::new();
    // An image that shrinks under the guest: reading past its end in a format with a table fails.
    let image = open(&file);
    let spec = DriveSpec { rerror: OnError::Stop, ..DriveSpec::default() };
    let drive = Drive::disk("d0", &spec, image.clone(), system);
    let error = block::Error::io("read", std::io::Error::from_raw_os_error(libc::EIO));
    assert_eq!(drive.judge("read", false, &error), crate::storage::Judgement::Stop);
    let full = block::Error::io("write", std::io::Error::from_raw_os_error(libc::ENOSPC));
    assert_eq!(drive.judge("write", true, &full), crate::storage::Judgement::Stop);
    assert!(matches!(drive.judge("write", true, &error), crate::storage::Judgement::Report(_)));
    assert!(matches!(asked.lock().unwrap()[0], SystemRequest::Notice("BLOCK_IO_ERROR", _)));
    drop(bus);
}

#[test]
fn hostile_requests_break_the_device_and_nothing_else() {
    let mut b = Bench::new(LunKind::Disk);
    b.guest.submit(2, &[(REQUEST, 20, false), (RESPONSE, 108, true)]).unwrap();
    let notes = b.guest.notes.clone();
    notes.wait("the device to give up", || b.guest.status() & status::NEEDS_RESET != 0);
    b.guest.reset();
}
