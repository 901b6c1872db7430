//! SCSI command blocks on a disk and on a CD-ROM drive: one byte of length, the block, then the data that it takes.
#![no_main]

use block::{Image, OpenOptions};
use bus::System;
use devices::storage::scsi::{Lun, LunIdentity, LunKind};
use devices::storage::{Buffer, Drive, DriveSpec};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

fn unit(kind: LunKind, image: Arc<Image>) -> Lun {
    let (spec, system) = (DriveSpec::default(), System::new(|_| {}));
    let drive = match kind {
        LunKind::Disk => Drive::disk("d", &spec, image, system),
        LunKind::Cdrom => Drive::cdrom("d", &spec, Some(image), system),
    };
    let text = || String::from("x");
    let identity = LunIdentity {
        vendor: text(),
        product: text(),
        version: text(),
        serial: Some(text()),
        device_id: text(),
        wwn: Some(1),
    };
    Lun::new(kind, Arc::new(drive), identity)
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = tempfile::NamedTempFile::new() else { return };
    let (Ok(()), Some(name)) = (file.as_file().set_len(64 << 10), file.path().to_str()) else { return };
    let options = OpenOptions { format: Some("raw".into()), ..OpenOptions::default() };
    let Ok(image) = Image::open(name, &options).map(Arc::new) else { return };
    for kind in [LunKind::Disk, LunKind::Cdrom] {
        let unit = unit(kind, image.clone());
        let mut rest = bytes;
        while let [len, tail @ ..] = rest {
            let (cdb, tail) = tail.split_at(usize::from(len % 33).min(tail.len()));
            let (data, tail) = tail.split_at(tail.len().min(64));
            let mut room = vec![0; 4096];
            room[..data.len()].copy_from_slice(data);
            let outcome = unit.execute(cdb, &mut Buffer::Host(&mut room));
            assert!(outcome.done <= room.len() as u64);
            rest = tail;
        }
        unit.load(unit.save());
    }
});
