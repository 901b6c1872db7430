//! Damaged images: a clear error or some bytes, never a panic, an endless loop or a write where none is allowed.
#![allow(clippy::unwrap_used)] // a test that cannot be set up fails

mod common;

use block::{
    Image, OpenOptions, Options,
    formats::{self, Creation, Repair, SnapshotInfo},
    storage::{MemoryStorage, Storage},
};
use common::{Random, siblings::Alone};
use std::{collections::BTreeMap, sync::Arc};

const SIZE: u64 = 4 << 20;

fn sample(options: &str) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::default());
    (formats::find("qcow2").unwrap().create.unwrap())(Creation {
        storage: storage.clone(),
        size: SIZE,
        backing: None,
        options: &mut Options::parse(options).unwrap(),
        name: "disk",
        siblings: &Alone,
        secrets: &BTreeMap::new(),
    })
    .unwrap();
    let image = Image::open_storage(storage.clone(), "disk", &OpenOptions::writer(Some("qcow2"))).unwrap();
    let mut random = Random(77);
    for _ in 0..40 {
        let at = random.below(SIZE - 70_000);
        let bytes = random.bytes(1 + at as usize % 65_000);
        image.write_at(&bytes, at).unwrap();
    }
    let unit = image.format().unit();
    for i in 0..4 {
        let packed = image.compress(&vec![i as u8; unit as usize]).unwrap().unwrap();
        image.write_compressed(i * unit, &packed).unwrap();
    }
    if !options.contains("compat=0.10") {
        image.quiesced(|f| f.bitmaps().unwrap().add("b", Some(65536), true)).unwrap();
    }
    image
        .quiesced(|f| f.snapshots().unwrap().create(SnapshotInfo { name: "s".into(), ..Default::default() }))
        .unwrap();
    image.write_at(&[9; 9000], 12345).unwrap();
    image.close().unwrap();
    storage.snapshot()
}

/// Uses an image in every way; errors are fine.
fn use_it(bytes: &[u8]) {
    for read_only in [true, false] {
        let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
        let options = OpenOptions {
            read_only,
            for_check: read_only,
            no_backing: true,
            ..OpenOptions::writer(Some("qcow2"))
        };
        let Ok(image) = Image::open_storage(storage.clone(), "disk", &options) else { continue };
        let _ = image.info();
        let mut buf = vec![0; 100_000];
        for at in [0, 12_345, SIZE / 2, image.size().saturating_sub(100_000)] {
            let _ = image.read_at(&mut buf, at);
        }
        let mut entries = Vec::new();
        let _ = image.map(0, image.size().min(SIZE), &mut entries);
        let _ = image.format().check(Repair::None);
        if read_only {
            drop(image);
            assert!(storage.snapshot() == bytes, "an image opened read-only was written to");
            continue;
        }
        let _ = image.write_at(&buf[..5000], 777);
        let _ = image.write_zeroes(65536, 200_000, true);
        let _ = image.discard(1 << 20, 1 << 20);
        let _ = image.quiesced(|f| f.snapshots().unwrap().delete("s"));
        let _ = image.flush();
        let _ = image.format().check(Repair::All);
        let _ = image.close();
    }
}

#[test]
fn damaged_qcow2_images() {
    for (n, options) in
        ["", "cluster_size=4k", "cluster_size=512,compat=0.10", "extended_l2=on,cluster_size=16k"]
            .iter()
            .enumerate()
    {
        let good = sample(options);
        use_it(&good);
        let mut random = Random(n as u64 + 1);
        for round in 0..150 {
            let mut bytes = good.clone();
            for _ in 0..1 + random.below(4) {
                // Metadata lies near the start; favour it.
                let reach =
                    if random.below(3) == 0 { bytes.len() as u64 } else { (bytes.len() as u64).min(300_000) };
                let at = if round % 3 == 0 { random.below(150) } else { random.below(reach) } as usize;
                match random.below(3) {
                    0 => bytes[at] ^= 1 << random.below(8),
                    1 => bytes[at] = random.next() as u8,
                    _ => {
                        let end = (at + 8).min(bytes.len());
                        let word = random.next() >> random.below(64);
                        bytes[at..end].copy_from_slice(&word.to_be_bytes()[..end - at]);
                    }
                }
            }
            if random.below(8) == 0 {
                bytes.truncate(random.below(bytes.len() as u64) as usize);
            }
            use_it(&bytes);
        }
    }
}

#[test]
fn raw_images_cannot_disguise_themselves() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(vec![0; 1 << 20]));
    let guessed = Image::open_storage(storage.clone(), "disk", &OpenOptions::default()).unwrap();
    assert!(!guessed.warnings().is_empty());
    assert!(guessed.direct().is_none());
    let mut header = vec![0; 512];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    assert_eq!(guessed.write_at(&header, 0).unwrap_err().errno(), 1);
    guessed.write_at(&[1; 512], 0).unwrap();
    let said = Image::open_storage(storage, "disk", &OpenOptions::writer(Some("raw"))).unwrap();
    said.write_at(&header, 0).unwrap();
}

#[test]
fn circular_chains_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |n: &str| dir.path().join(n).to_str().unwrap().to_owned();
    for (name, backing) in [("a", "b"), ("b", "a"), ("self", "self2")] {
        block::create_image(&block::Create {
            format: "qcow2".into(),
            name: path(name),
            size: Some(1 << 20),
            backing: Some(formats::Backing { name: backing.into(), format: Some("qcow2".into()) }),
            unsafe_backing: true,
            ..Default::default()
        })
        .unwrap();
    }
    let error = Image::open(&path("a"), &OpenOptions::reader(None)).unwrap_err().to_string();
    assert!(error.contains("loop"), "{error}");
}
