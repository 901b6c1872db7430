use super::*;
use crate::{Image, OpenOptions, formats::support::put, storage::MemoryStorage};
use proptest::prelude::*;
use std::io::Write;

fn encode64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for c in bytes.chunks(3) {
        let v = u32::from(c[0]) << 16
            | u32::from(*c.get(1).unwrap_or(&0)) << 8
            | u32::from(*c.get(2).unwrap_or(&0));
        for i in 0..4 {
            out.push(if i <= c.len() { DIGITS[(v >> (18 - 6 * i) & 63) as usize] as char } else { '=' });
        }
        if out.len().is_multiple_of(60) {
            out.push_str("\n\t\t");
        }
    }
    out
}

/// An image with one chunk of each kind, and its disk; `kind` is the last chunk's.
pub(super) fn sample(kind: u32, fork: bool) -> (Vec<u8>, Vec<u8>) {
    let text: Vec<u8> = (0..8 * 512u32).map(|i| (i / 7 % 200) as u8 + 1).collect();
    let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    zlib.write_all(&text).unwrap();
    let mut bz = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
    bz.write_all(&text).unwrap();
    // 512 bytes of 5: one plain byte, then copies of the byte before.
    let mut adc = vec![0x80, 5];
    adc.extend([0x40 | 0x3f, 0, 0].repeat(7));
    adc.extend([0x40 | (511 - 7 * 67 - 4) as u8, 0, 0]);
    let zlib = zlib.finish().unwrap();
    let mut parts = vec![(0x8000_0005, 8, zlib.clone()), (1, 8, text.clone()), (2, 3, Vec::new())];
    if kind == 0x8000_0005 {
        parts.push((kind, 8, zlib));
    } else {
        parts.extend([(0x8000_0004, 1, adc), (kind, 8, bz.finish().unwrap())]);
    }
    let mut file = vec![0xee; 100];
    let mut table = vec![0; TABLE_HEADER];
    put(&mut table, 0, b"mish");
    put(&mut table, 200, &(parts.len() as u32 + 1).to_be_bytes());
    let (mut sector, mut disk) = (0u64, Vec::new());
    for (kind, sectors, bytes) in &parts {
        let mut e = [0; ENTRY];
        put(&mut e, 0, &kind.to_be_bytes());
        for (at, value) in
            [(8, sector), (16, *sectors), (24, file.len() as u64 - 100), (32, bytes.len() as u64)]
        {
            put(&mut e, at, &value.to_be_bytes());
        }
        table.extend(e);
        file.extend(bytes);
        sector += sectors;
        match kind {
            2 => disk.extend([0; 3 * 512]),
            0x8000_0004 => disk.extend([5; 512]),
            _ => disk.extend(&text),
        }
    }
    let mut end = [0; ENTRY];
    put(&mut end, 0, &u32::MAX.to_be_bytes());
    table.extend(end);
    let at = file.len() as u64;
    let mut trailer = [0; TRAILER];
    put(&mut trailer, 0, b"koly\0\0\0\x04");
    put(&mut trailer, 24, &100u64.to_be_bytes());
    put(&mut trailer, 492, &sector.to_be_bytes());
    if fork {
        let mut resources = vec![0; 256];
        put(&mut resources, 0, &256u32.to_be_bytes());
        put(&mut resources, 4, &(260 + table.len() as u32).to_be_bytes());
        put(&mut resources, 8, &(4 + table.len() as u32).to_be_bytes());
        resources.extend((table.len() as u32).to_be_bytes());
        resources.extend(&table);
        put(&mut trailer, 40, &at.to_be_bytes());
        put(&mut trailer, 48, &(resources.len() as u64).to_be_bytes());
        file.extend(resources);
    } else {
        let list = format!(
            "<plist><dict><key>resource-fork</key><dict><key>blkx</key><array><dict><key>Data</key><data>\n{}\n</data></dict></array>\
             <key>plst</key><array><dict><data>!</data></dict></array></dict></dict></plist>",
            encode64(&table)
        );
        put(&mut trailer, 216, &at.to_be_bytes());
        put(&mut trailer, 224, &(list.len() as u64).to_be_bytes());
        file.extend(list.bytes());
    }
    file.extend(trailer);
    (file, disk)
}

fn open_bytes(file: Vec<u8>) -> Result<Image> {
    Image::open_storage(Arc::new(MemoryStorage::new(file)), "x.dmg", &OpenOptions::reader(None))
}

#[test]
fn chunks_of_every_kind_are_read() {
    for fork in [false, true] {
        let (file, disk) = sample(0x8000_0006, fork);
        let image = open_bytes(file).unwrap();
        assert_eq!((image.driver().name, image.size()), ("dmg", disk.len() as u64));
        for (from, to) in [(0, disk.len()), (4000, 9000), (disk.len() - 700, disk.len())] {
            let mut buf = vec![0xaa; to - from];
            image.read_at(&mut buf, from as u64).unwrap();
            assert!(buf == disk[from..to], "{from}..{to}");
        }
    }
}

#[test]
fn qemu_reads_the_same() {
    // Only kinds that every build of QEMU has.
    for fork in [false, true] {
        let (file, disk) = sample(0x8000_0005, fork);
        if let Some(theirs) = support::read_by_qemu("dmg", &file) {
            assert!(theirs == disk);
        }
        let mut ours = vec![0; disk.len()];
        open_bytes(file).unwrap().read_at(&mut ours, 0).unwrap();
        assert!(ours == disk);
    }
}

#[test]
fn lzfse_is_refused_clearly() {
    let (file, disk) = sample(0x8000_0007, false);
    let image = open_bytes(file).unwrap();
    image.read_at(&mut vec![0; 4096], 0).unwrap();
    let error = image.read_at(&mut vec![0; 512], disk.len() as u64 - 512).unwrap_err().to_string();
    assert!(error.contains("LZFSE"), "{error}");
}

proptest! {
    #[test]
    fn any_table_reads_or_fails(fork in any::<bool>(), changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..8)) {
        let (mut file, _) = sample(0x8000_0006, fork);
        let from = file.len() - 1400;
        for (at, byte) in changes {
            let at = from + at.index(1400);
            file[at] = byte;
        }
        if let Ok(image) = open_bytes(file) {
            let mut buf = vec![0; image.size().min(20_000) as usize];
            let _ = image.read_at(&mut buf, 0);
        }
    }

    #[test]
    fn any_adc_decodes_or_fails(input in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut out = [0; 600];
        decode_adc(&input, &mut out);
    }
}
