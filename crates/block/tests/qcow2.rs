//! qcow2 against a model in memory, against itself after reopening, and against `qemu-img`.
#![allow(clippy::unwrap_used)] // a test that cannot be set up fails

mod common;

use block::{
    Create, Image, OpenOptions, Options, create_image,
    formats::{Amending, Backing, Preallocation, Repair, SnapshotInfo},
};
use common::{Random, qemu_img};
use std::path::Path;

const SIZE: u64 = 6 << 20;

fn make(path: &Path, options: &str, backing: Option<Backing>) -> String {
    let name = path.to_str().unwrap().to_owned();
    create_image(&Create {
        format: "qcow2".into(),
        name: name.clone(),
        size: Some(SIZE),
        backing,
        options: Options::parse(options).unwrap(),
        ..Default::default()
    })
    .unwrap();
    name
}

fn open(name: &str) -> Image {
    Image::open(name, &OpenOptions { discard: true, ..OpenOptions::writer(Some("qcow2")) }).unwrap()
}

fn assert_reads(image: &Image, model: &[u8], when: &str) {
    let mut buf = vec![0xee; model.len()];
    image.read_at(&mut buf, 0).unwrap();
    if let Some(at) = buf.iter().zip(model).position(|(a, b)| a != b) {
        panic!("{when}: byte {at:#x} is {:#x}, not {:#x}", buf[at], model[at]);
    }
}

fn assert_sound(name: &str, leaks_too: bool) {
    let image =
        Image::open(name, &OpenOptions { for_check: true, ..OpenOptions::reader(Some("qcow2")) }).unwrap();
    let report = image.format().check(Repair::None).unwrap();
    assert_eq!(report.corruptions, 0, "{:#?}", report.messages);
    assert_eq!(report.check_errors, 0);
    if leaks_too {
        assert_eq!(report.leaks, 0, "{:#?}", report.messages);
    }
    drop(image);
    qemu_img(&["check", name]);
}

/// Random operations on an image and on plain memory.
fn run(options: &str, with_backing: bool, snapshots: bool, compress: bool, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut model = vec![0u8; SIZE as usize];
    let backing = with_backing.then(|| {
        // A shorter raw backing file, so that its end is met, too.
        let bytes = random.bytes(SIZE as usize / 2 + 512);
        model[..bytes.len()].copy_from_slice(&bytes);
        std::fs::write(dir.path().join("base"), &bytes).unwrap();
        Backing { name: "base".into(), format: Some("raw".into()) }
    });
    let v2 = options.contains("compat=0.10");
    let name = make(&dir.path().join("disk"), options, backing);
    let mut image = open(&name);
    let mut saved: Vec<(String, Vec<u8>)> = Vec::new();
    for step in 0..160 {
        let offset = random.below(SIZE);
        let most = if random.below(4) == 0 { 600_000 } else { 9000 };
        let len = (1 + random.below(most)).min(SIZE - offset);
        let range = offset as usize..(offset + len) as usize;
        match random.below(if snapshots { 13 } else { 11 }) {
            0..=5 => {
                let bytes = random.bytes(len as usize);
                image.write_at(&bytes, offset).unwrap();
                model[range].copy_from_slice(&bytes);
            }
            6 => {
                image.write_zeroes(offset, len, random.below(2) == 0).unwrap();
                model[range].fill(0);
            }
            7 => {
                image.discard(offset, len).unwrap();
                // What a discard leaves is either; take what the image says.
                let mut now = vec![0; range.len()];
                image.read_at(&mut now, offset).unwrap();
                for (m, n) in model[range.clone()].iter_mut().zip(&now) {
                    assert!(*n == *m || *n == 0 || v2, "discard made other bytes appear at step {step}");
                    *m = *n;
                }
            }
            8 => image.flush().unwrap(),
            9 if compress => {
                let unit = image.format().unit();
                let start = offset - offset % unit;
                let end = (start + unit).min(SIZE);
                let bytes = random.bytes((end - start) as usize);
                if let Some(packed) = image.compress(&bytes).unwrap() {
                    image.write_compressed(start, &packed).unwrap();
                    model[start as usize..end as usize].copy_from_slice(&bytes);
                }
            }
            10 => {
                image.close().unwrap();
                drop(image);
                assert_sound(&name, true);
                image = open(&name);
                assert_reads(&image, &model, "after reopening");
            }
            11 => {
                let tag = format!("s{step}");
                image
                    .quiesced(|f| {
                        f.snapshots()
                            .unwrap()
                            .create(SnapshotInfo { name: tag.clone(), ..Default::default() })
                    })
                    .unwrap();
                saved.push((tag, model.clone()));
            }
            12 if !saved.is_empty() => {
                let at = random.below(saved.len() as u64) as usize;
                if random.below(2) == 0 {
                    let (tag, _) = saved.remove(at);
                    image.quiesced(|f| f.snapshots().unwrap().delete(&tag)).unwrap();
                } else {
                    let (tag, then) = &saved[at];
                    image.quiesced(|f| f.snapshots().unwrap().apply(tag)).unwrap();
                    model.copy_from_slice(then);
                }
            }
            _ => {}
        }
        if step % 16 == 0 {
            assert_reads(&image, &model, &format!("step {step}"));
        }
    }
    assert_reads(&image, &model, "at the end");
    image.close().unwrap();
    drop(image);
    assert_sound(&name, true);
    for (tag, then) in &saved {
        let view = Image::open(&name, &OpenOptions::reader(Some("qcow2"))).unwrap();
        view.format().snapshots().unwrap().view(tag).unwrap();
        assert_reads(&view, then, tag);
    }
    let plain = dir.path().join("plain");
    std::fs::write(&plain, &model).unwrap();
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", &name, plain.to_str().unwrap()]);
}

#[test]
fn default_options() {
    run("", false, true, true, 1);
    run("", true, true, true, 2);
}

#[test]
fn version_2() {
    run("compat=0.10", false, true, true, 3);
    run("compat=0.10", true, true, true, 4);
}

#[test]
fn cluster_sizes() {
    for (i, size) in ["512", "1k", "4k", "2M"].iter().enumerate() {
        run(&format!("cluster_size={size}"), i % 2 == 0, true, true, 10 + i as u64);
    }
}

#[test]
fn refcount_widths() {
    for bits in [2, 4, 8, 32, 64] {
        // Two bits count to three: few snapshots fit.
        run(&format!("refcount_bits={bits},cluster_size=4k"), false, bits > 4, bits > 4, 20 + bits);
    }
    run("refcount_bits=1,cluster_size=1k", true, false, true, 21);
}

#[test]
fn extended_l2() {
    run("extended_l2=on", false, true, true, 30);
    run("extended_l2=on,cluster_size=16k", true, true, true, 31);
    run("extended_l2=on,cluster_size=2M,compression_type=zstd", true, true, true, 32);
}

#[test]
fn zstd_and_lazy_refcounts() {
    run("compression_type=zstd", true, true, true, 40);
    run("lazy_refcounts=on", true, true, true, 41);
}

#[test]
fn external_data_file() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    for (i, raw) in ["", ",data_file_raw=on"].iter().enumerate() {
        let options = format!("data_file={}{raw}", data.display());
        run(&options, i == 0, false, false, 50 + i as u64);
    }
}

#[test]
fn preallocation() {
    let dir = tempfile::tempdir().unwrap();
    for (mode, options) in [
        ("metadata", ""),
        ("falloc", ""),
        ("full", ""),
        ("metadata", ",extended_l2=on"),
        ("metadata", ",cluster_size=512"),
    ] {
        let name = make(&dir.path().join(mode), &format!("preallocation={mode}{options}"), None);
        assert_sound(&name, true);
        let image = open(&name);
        assert_reads(&image, &vec![0; SIZE as usize], mode);
        let mut extents = Vec::new();
        image.map_own(0, SIZE, &mut extents).unwrap();
        assert!(extents.iter().all(|e| !matches!(e.mapping, block::formats::Mapping::Unallocated)), "{mode}");
    }
}

#[test]
fn resizing() {
    for options in ["", "cluster_size=512", "extended_l2=on", "compat=0.10"] {
        let dir = tempfile::tempdir().unwrap();
        let name = make(&dir.path().join("d"), options, None);
        let image = open(&name);
        let bytes = Random(9).bytes(SIZE as usize);
        image.write_at(&bytes, 0).unwrap();
        image.resize(SIZE * 3, Preallocation::Off).unwrap();
        let mut model = bytes.clone();
        model.resize(SIZE as usize * 3, 0);
        assert_reads(&image, &model, options);
        image.write_at(b"end", SIZE * 3 - 3).unwrap();
        image.resize(SIZE / 2 + 512, Preallocation::Off).unwrap();
        model.truncate(SIZE as usize / 2 + 512);
        assert_reads(&image, &model, options);
        image.resize(SIZE, Preallocation::Metadata).unwrap();
        image.close().unwrap();
        drop(image);
        assert_sound(&name, true);
        let image = open(&name);
        assert_reads(&image, &model, options);
    }
}

#[test]
fn amending() {
    let dir = tempfile::tempdir().unwrap();
    let name = make(&dir.path().join("d"), "", None);
    let bytes = Random(5).bytes(SIZE as usize);
    open(&name).write_at(&bytes, 0).unwrap();
    open(&name).write_zeroes(1 << 20, 1 << 20, true).unwrap();
    let mut model = bytes;
    model[1 << 20..2 << 20].fill(0);
    for change in [
        "refcount_bits=64",
        "refcount_bits=1",
        "refcount_bits=16,lazy_refcounts=on",
        "compat=0.10",
        "compat=1.1",
    ] {
        let image = open(&name);
        let mut options = Options::parse(change).unwrap();
        image
            .quiesced(|f| f.amend(&mut options, &Amending { secrets: &Default::default(), force: false }))
            .unwrap();
        image.close().unwrap();
        drop(image);
        assert_sound(&name, false);
        assert_reads(&open(&name), &model, change);
    }
}

#[test]
fn damaged_refcounts_are_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let name = make(&dir.path().join("d"), "", None);
    let bytes = Random(6).bytes(SIZE as usize);
    open(&name).write_at(&bytes, 0).unwrap();
    for (at, junk) in [(0x20000u64 + 20, [0u8, 0, 0, 9]), (0x10000, [0xff, 0xff, 1, 0])] {
        let file = std::fs::OpenOptions::new().write(true).open(&name).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &junk, at).unwrap();
        let image =
            Image::open(&name, &OpenOptions { for_check: true, ..OpenOptions::writer(Some("qcow2")) })
                .unwrap();
        assert!(image.format().check(Repair::None).unwrap().corruptions > 0);
        let report = image.format().check(Repair::All).unwrap();
        assert!(report.corruptions_fixed > 0);
        image.close().unwrap();
        drop(image);
        assert_sound(&name, false);
        assert_reads(&open(&name), &bytes, "repaired");
    }
}

#[test]
fn bitmaps_record_writes() {
    let dir = tempfile::tempdir().unwrap();
    let name = make(&dir.path().join("d"), "", None);
    let image = open(&name);
    image.quiesced(|f| f.bitmaps().unwrap().add("b0", None, true)).unwrap();
    image.quiesced(|f| f.bitmaps().unwrap().add("off", Some(512), false)).unwrap();
    image.write_at(&[1; 70_000], 65536).unwrap();
    image.close().unwrap();
    drop(image);
    assert_sound(&name, true);
    let image = open(&name);
    let bitmaps = image.format().bitmaps().unwrap();
    let bits = bitmaps.load("b0").unwrap();
    assert_eq!(bits[0], 0b110);
    assert!(block::is_zero(&bits[1..]));
    assert!(block::is_zero(&bitmaps.load("off").unwrap()));
    image.quiesced(|f| f.bitmaps().unwrap().remove("b0")).unwrap();
    image.resize(SIZE * 2, Preallocation::Off).unwrap();
    image.close().unwrap();
    drop(image);
    assert_sound(&name, true);
    if let Some(info) = qemu_img(&["info", "--output=json", &name]) {
        assert!(info.contains("\"off\"") && !info.contains("\"b0\""));
    }
}

#[test]
fn many_threads_write_at_once() {
    let dir = tempfile::tempdir().unwrap();
    for options in ["", "extended_l2=on", "cluster_size=4k"] {
        let name = make(&dir.path().join("d"), options, None);
        let image = open(&name);
        std::thread::scope(|scope| {
            for t in 0..4u64 {
                let image = &image;
                scope.spawn(move || {
                    // Neighbouring sectors belong to different threads, so that all clusters are shared.
                    for i in (t..SIZE / 4096).step_by(4) {
                        image.write_at(&[t as u8 + 1; 4096], i * 4096).unwrap();
                        if i % 64 == t {
                            image.flush().unwrap();
                        }
                    }
                });
            }
        });
        let model: Vec<u8> = (0..SIZE).map(|i| (i / 4096 % 4) as u8 + 1).collect();
        assert_reads(&image, &model, options);
        image.close().unwrap();
        drop(image);
        assert_sound(&name, true);
    }
}

#[test]
fn locks_keep_qemu_out() {
    let dir = tempfile::tempdir().unwrap();
    let name = make(&dir.path().join("d"), "", None);
    let _image = open(&name);
    assert!(Image::open(&name, &OpenOptions::writer(Some("qcow2"))).is_err());
    assert!(Image::open(&name, &OpenOptions::reader(Some("qcow2"))).is_err());
    let shared = OpenOptions { force_share: true, ..OpenOptions::reader(Some("qcow2")) };
    Image::open(&name, &shared).unwrap();
    if let Some(mut qemu) = common::qemu("qemu-img") {
        assert!(!qemu.args(["info", &name]).output().unwrap().status.success());
        qemu_img(&["info", "-U", &name]);
    }
}
