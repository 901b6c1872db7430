//! Every format of the table against a model in memory, against itself after reopening, and against `qemu-img` in both
//! directions. A new format adds its lines to [`CASES`].

#![allow(clippy::unwrap_used)] // a test's helpers fail as the test does

mod common;

use block::{
    Create, Image, OpenOptions, Options, create_image,
    formats::{Backing, FORMATS, Mapping, Repair},
};
use common::{Random, qemu, qemu_img};
use std::{collections::BTreeMap, path::Path, sync::Arc};

/// A format with creation options.
#[derive(Clone, Copy)]
struct Case {
    format: &'static str,
    options: &'static str,
    /// What the installed `qemu-img` calls the options; `None` where it has none like them.
    theirs: Option<&'static str>,
    /// Whether `qemu-img` can check this format.
    checks: bool,
}

const fn case(format: &'static str, options: &'static str, checks: bool) -> Case {
    Case { format, options, theirs: Some(options), checks }
}

const CASES: &[Case] = &[
    case("raw", "", false),
    case("qcow2", "", true),
    case("qcow2", "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=100", true),
    case("qcow2", "encrypt.format=aes,encrypt.key-secret=sec0,compat=0.10", true),
    // Clusters that are preallocated read as zeros, not as whatever they decrypt to; QEMU's own do not.
    Case {
        format: "qcow2",
        options: "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=10,encrypt.cipher-alg=aes-128,cluster_size=4096,\
                  preallocation=metadata,extended_l2=off",
        theirs: None,
        checks: true,
    },
    case("vdi", "", true),
    case("vdi", "static=on", true),
    case("vpc", "", false),
    case("vpc", "force_size=on", false),
    case("vpc", "subformat=fixed", false),
    case("vmdk", "", true),
    case("vmdk", "zeroed_grain=on,adapter_type=lsilogic", true),
    case("vmdk", "subformat=monolithicFlat", true),
    case("vmdk", "subformat=twoGbMaxExtentSparse,compat6=on", true),
    case("vmdk", "subformat=twoGbMaxExtentFlat", true),
    case("vmdk", "subformat=streamOptimized", true),
    case("vhdx", "", true),
    case("vhdx", "block_size=1M,log_size=2M,block_state_zero=off", true),
    case("vhdx", "subformat=fixed,block_size=2M", true),
    case("qed", "", true),
    case("qed", "cluster_size=4096,table_size=2", true),
    case("parallels", "", true),
    case("parallels", "cluster_size=65536", true),
    case("qcow", "", false),
    case("qcow", "encrypt.format=aes,encrypt.key-secret=sec0", false),
    case("luks", "key-secret=sec0,iter-time=100", false),
    // QEMU's own measuring of such short times fails now and then, so it does not make these.
    Case {
        format: "luks",
        options: "key-secret=sec0,iter-time=10,cipher-alg=serpent-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha1",
        theirs: None,
        checks: false,
    },
];

const SIZE: u64 = (21 << 20) + 512;
const KEY: &[u8] = b"sesame";

fn secrets() -> Arc<BTreeMap<String, Vec<u8>>> {
    Arc::new(BTreeMap::from([("sec0".to_owned(), KEY.to_vec())]))
}

impl Case {
    fn name(&self) -> String {
        format!("{} {}", self.format, self.options)
    }

    fn encrypted(&self) -> bool {
        self.options.contains("key-secret")
    }

    /// Options to open an image with.
    fn opening(&self) -> Options {
        let mut options = Options::new();
        match self.format {
            "luks" => options.set("key-secret", "sec0"),
            _ if self.encrypted() => options.set("encrypt.key-secret", "sec0"),
            _ => {}
        }
        options
    }

    fn make(&self, path: &Path) -> String {
        self.make_on(path, None)
    }

    fn make_on(&self, path: &Path, backing: Option<Backing>) -> String {
        let name = path.to_str().unwrap().to_owned();
        create_image(&Create {
            format: self.format.into(),
            name: name.clone(),
            size: Some(SIZE),
            backing,
            options: Options::parse(self.options).unwrap(),
            secrets: secrets(),
            ..Default::default()
        })
        .unwrap_or_else(|e| panic!("{}: {e}", self.name()));
        name
    }

    fn open(&self, name: &str, read_only: bool) -> Image {
        let options = OpenOptions {
            discard: true,
            read_only,
            options: self.opening(),
            secrets: secrets(),
            ..OpenOptions::writer(Some(self.format))
        };
        Image::open(name, &options).unwrap_or_else(|e| panic!("{}: {e}", self.name()))
    }

    /// The image for a QEMU program: words before the name and the name.
    fn qemu_name(&self, name: &str) -> (Vec<String>, String) {
        if !self.encrypted() {
            return (Vec::new(), name.to_owned());
        }
        let key = self.opening().iter().next().unwrap().0.to_owned();
        (
            vec![
                "--object".into(),
                format!("secret,id=sec0,data={}", str::from_utf8(KEY).unwrap()),
                "--image-opts".into(),
            ],
            format!("driver={},file.filename={name},{key}=sec0", self.format),
        )
    }

    /// Lets qemu-img check an image.
    fn qemu_check(&self, name: &str) {
        if self.checks
            && let Some(mut command) = qemu("qemu-img")
        {
            let (words, image) = self.qemu_name(name);
            command.arg("check").args(words);
            if !self.encrypted() {
                command.args(["-f", self.format]);
            }
            let out = command.arg(image).output().unwrap();
            assert!(
                out.status.success(),
                "{}: {}{}",
                self.name(),
                String::from_utf8_lossy(&out.stdout),
                String::from_utf8_lossy(&out.stderr)
            );
        }
    }

    /// Compares an image, as QEMU reads it, with bytes.
    fn qemu_compare(&self, name: &str, model: &[u8]) {
        let plain = format!("{name}.plain");
        std::fs::write(&plain, model).unwrap();
        let Some(mut command) = qemu("qemu-img") else { return };
        if self.encrypted() {
            let (words, image) = self.qemu_name(name);
            command.arg("compare").args(words).args([&image, &format!("driver=raw,file.filename={plain}")]);
        } else {
            command.args(["compare", "-f", self.format, "-F", "raw", name, &plain]);
        }
        let out = command.output().unwrap();
        assert!(
            out.status.success(),
            "{}: {}{}",
            self.name(),
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
        std::fs::remove_file(plain).unwrap();
    }

    /// Our own check.
    fn check(&self, name: &str) {
        let options = OpenOptions {
            for_check: true,
            options: self.opening(),
            secrets: secrets(),
            ..OpenOptions::reader(Some(self.format))
        };
        let image = Image::open(name, &options).unwrap();
        match image.format().check(Repair::None) {
            Ok(report) => assert!(
                report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0,
                "{}: {:#?}",
                self.name(),
                report
            ),
            Err(e) => assert!(e.to_string().contains("not support checks"), "{}: {e}", self.name()),
        }
    }
}

fn assert_reads(image: &Image, model: &[u8], when: &str) {
    let mut buf = vec![0xee; model.len()];
    image.read_at(&mut buf, 0).unwrap_or_else(|e| panic!("{when}: {e}"));
    if let Some(at) = buf.iter().zip(model).position(|(a, b)| a != b) {
        panic!("{when}: byte {at:#x} is {:#x}, not {:#x}", buf[at], model[at]);
    }
}

/// Random operations on an image and on plain memory.
fn exercise(case: &Case, name: &str, model: &mut [u8], random: &mut Random, steps: usize) {
    let mut image = case.open(name, false);
    let size = image.size();
    for step in 0..steps {
        let offset = random.below(size);
        let most = if random.below(4) == 0 { 3_000_000 } else { 9000 };
        let len = (1 + random.below(most)).min(size - offset);
        let range = offset as usize..(offset + len) as usize;
        match random.below(11) {
            10 if image.format().compresses() => {
                let unit = image.format().unit();
                let start = offset - offset % unit;
                let end = (start + unit).min(size);
                let bytes = random.bytes((end - start) as usize);
                if let Some(packed) = image.compress(&bytes).unwrap() {
                    image.write_compressed(start, &packed).unwrap();
                    model[start as usize..end as usize].copy_from_slice(&bytes);
                }
            }
            10 | 0..=5 => {
                let bytes = random.bytes(len as usize);
                image.write_at(&bytes, offset).unwrap_or_else(|e| panic!("{}: {e}", case.name()));
                model[range].copy_from_slice(&bytes);
            }
            6 => {
                image.write_zeroes(offset, len, random.below(2) == 0).unwrap();
                model[range].fill(0);
            }
            7 => {
                image.discard(offset, len).unwrap();
                let mut now = vec![0; range.len()];
                image.read_at(&mut now, offset).unwrap();
                for (m, n) in model[range].iter_mut().zip(&now) {
                    assert!(
                        *n == *m || *n == 0 || case.encrypted(),
                        "{}: discard made other bytes appear",
                        case.name()
                    );
                    *m = *n;
                }
            }
            8 => image.flush().unwrap(),
            _ => {
                image.close().unwrap();
                drop(image);
                case.check(name);
                image = case.open(name, false);
                assert_reads(&image, model, &format!("{} reopened at step {step}", case.name()));
            }
        }
        if step % 16 == 0 {
            assert_reads(&image, model, &format!("{} step {step}", case.name()));
        }
    }
    assert_reads(&image, model, &format!("{} at the end", case.name()));
    image.close().unwrap();
    drop(image);
    case.check(name);
}

/// Lets qemu-io write patterns at random places.
fn qemu_writes(case: &Case, name: &str, model: &mut [u8], random: &mut Random) -> bool {
    if case.options.contains("streamOptimized") {
        return false; // QEMU writes each grain of a stream once
    }
    let Some(mut command) = qemu("qemu-io") else { return false };
    let (words, image) = case.qemu_name(name);
    command.args(words);
    if !case.encrypted() {
        command.args(["-f", case.format]);
    }
    for _ in 0..12 {
        let len = (512 * (1 + random.below(600))).min(model.len() as u64);
        let offset = random.below((model.len() as u64 - len) / 512 + 1) * 512;
        let byte = random.below(255) as u8 + 1;
        let zero = random.below(5) == 0;
        command.arg("-c").arg(if zero {
            format!("write -z {offset} {len}")
        } else {
            format!("write -P {byte} {offset} {len}")
        });
        model[offset as usize..(offset + len) as usize].fill(if zero { 0 } else { byte });
    }
    let out = command.arg(image).output().unwrap();
    assert!(out.status.success(), "{}: {}", case.name(), String::from_utf8_lossy(&out.stderr));
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(!said.contains("failed"), "{}: {said}", case.name());
    true
}

#[test]
fn every_format_is_covered() {
    for driver in FORMATS.iter().filter(|d| d.create.is_some()) {
        assert!(CASES.iter().any(|c| c.format == driver.name), "no case for {}", driver.name);
    }
}

#[test]
fn own_images_hold_what_was_written_and_qemu_reads_and_writes_them() {
    let dir = tempfile::tempdir().unwrap();
    for (i, case) in CASES.iter().enumerate() {
        let mut random = Random((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let name = case.make(&dir.path().join(format!("disk{i}.{}", case.format)));
        let size = case.open(&name, true).size();
        assert!(size >= SIZE, "{}", case.name());
        let mut model = vec![0; size as usize];
        if case.format == "luks" {
            // Space that was never written decrypts to noise.
            case.open(&name, true).read_at(&mut model, 0).unwrap();
        }
        exercise(case, &name, &mut model, &mut random, 70);
        case.qemu_check(&name);
        case.qemu_compare(&name, &model);
        if qemu_writes(case, &name, &mut model, &mut random) {
            assert_reads(&case.open(&name, true), &model, &format!("{} after qemu-io", case.name()));
            exercise(case, &name, &mut model, &mut random, 20);
            case.qemu_check(&name);
            case.qemu_compare(&name, &model);
        }
        std::fs::remove_file(&name).unwrap();
    }
}

/// Runs a conversion of `qemu-img`'s; `false` where it is not installed or cannot measure its own speed, as LUKS needs.
fn qemu_converts(words: &[&str]) -> bool {
    for _ in 0..5 {
        let Some(mut command) = qemu("qemu-img") else { return false };
        let out = command.args(words).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        if out.status.success() {
            return true;
        }
        assert!(said.contains("Unable to get accurate CPU usage"), "{words:?}: {said}");
    }
    eprintln!("skipped: qemu-img cannot measure its speed here");
    false
}

#[test]
fn images_made_by_qemu_are_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    for (i, case) in CASES.iter().enumerate() {
        let Some(theirs) = case.theirs else { continue };
        let mut random = Random((i as u64 + 77).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut model = vec![0; SIZE as usize];
        for _ in 0..20 {
            let at = random.below(SIZE - 200_000) as usize;
            let len = random.below(200_000) as usize;
            model[at..at + len].copy_from_slice(&random.bytes(len));
        }
        let plain = dir.path().join("plain");
        std::fs::write(&plain, &model).unwrap();
        let path = dir.path().join(format!("theirs{i}.{}", case.format));
        let name = path.to_str().unwrap();
        let secret = format!("secret,id=sec0,data={}", str::from_utf8(KEY).unwrap());
        let mut words = vec!["convert", "--object", &secret, "-f", "raw", "-O", case.format];
        if !theirs.is_empty() {
            words.extend(["-o", theirs]);
        }
        words.extend([plain.to_str().unwrap(), name]);
        if !qemu_converts(&words) {
            continue;
        }
        let image = case.open(name, true);
        model.resize(image.size() as usize, 0);
        assert_reads(&image, &model, &format!("{} made by qemu-img", case.name()));
        drop(image);
        case.check(name);
        exercise(case, name, &mut model, &mut random, 40);
        case.qemu_check(name);
        case.qemu_compare(name, &model);
        std::fs::remove_file(name).unwrap();
    }
}

/// Cases with a backing file of the same format below.
const BACKED: &[Case] = &[
    case("vmdk", "", true),
    case("vmdk", "zeroed_grain=on", true),
    case("vmdk", "subformat=twoGbMaxExtentSparse", true),
    case("qed", "", true),
    case("qed", "cluster_size=4096,table_size=2", true),
    case("qcow", "", false),
];

#[test]
fn overlays_show_what_is_below_them() {
    let dir = tempfile::tempdir().unwrap();
    for (i, case) in BACKED.iter().enumerate() {
        for theirs in [false, true] {
            let mut random =
                Random((i as u64 * 2 + u64::from(theirs) + 99).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let base = dir.path().join(format!("base{i}{theirs}"));
            let base_name = case.make(&base);
            let mut model = vec![0; SIZE as usize];
            exercise(case, &base_name, &mut model, &mut random, 25);
            let below = model.clone();
            let path = dir.path().join(format!("top{i}{theirs}.{}", case.format));
            let name = path.to_str().unwrap().to_owned();
            if theirs {
                let options = if case.options.is_empty() { "compat6=off" } else { case.options };
                let mut words = vec!["create", "-f", case.format, "-b", &base_name, "-F", case.format];
                if case.format == "vmdk" || !case.options.is_empty() {
                    words.extend(["-o", options]);
                }
                words.push(&name);
                if qemu_img(&words).is_none() {
                    continue;
                }
            } else {
                let backing = Backing { name: format!("base{i}{theirs}"), format: Some(case.format.into()) };
                case.make_on(&path, Some(backing));
            }
            exercise(case, &name, &mut model, &mut random, 60);
            case.qemu_check(&name);
            case.qemu_compare(&name, &model);
            if qemu_writes(case, &name, &mut model, &mut random) {
                assert_reads(&case.open(&name, true), &model, &format!("{} after qemu-io", case.name()));
            }
            assert_reads(&case.open(&base_name, true), &below, "the base");
            if case.format == "vmdk" {
                // A base that changes is found out.
                case.open(&base_name, false).write_at(b"x", 0).unwrap();
                let error = Image::open(&name, &OpenOptions::reader(Some("vmdk"))).unwrap_err().to_string();
                assert!(error.contains("CID"), "{error}");
            }
        }
    }
}

#[test]
fn facts_agree_with_qemu() {
    let dir = tempfile::tempdir().unwrap();
    for (i, case) in CASES.iter().enumerate() {
        let name = case.make(&dir.path().join(format!("disk{i}.{}", case.format)));
        let Some(text) = qemu_img(&["info", "--output=json", "-f", case.format, &name]) else { return };
        let theirs: serde_json::Value = serde_json::from_str(&text).unwrap();
        let options = OpenOptions { no_io: true, ..OpenOptions::reader(Some(case.format)) };
        let image = Image::open(&name, &options).unwrap();
        let info = image.info().unwrap();
        assert_eq!(theirs["virtual-size"], image.size(), "{}", case.name());
        assert_eq!(theirs["cluster-size"].as_u64(), info.cluster_size, "{}", case.name());
        assert_eq!(theirs["encrypted"].as_bool().unwrap_or(false), info.encrypted, "{}", case.name());
        if case.format != "qcow2" {
            let specific = theirs["format-specific"]["data"].clone();
            let mut own = info.specific.unwrap_or_default();
            // Not told before QEMU 9.
            if specific.get("detached-header").is_none()
                && let Some(facts) = own.as_object_mut()
            {
                facts.remove("detached-header");
            }
            assert_eq!(specific, own, "{}", case.name());
        }
    }
}

#[test]
fn many_threads_write_at_once() {
    let dir = tempfile::tempdir().unwrap();
    for (i, case) in CASES.iter().enumerate() {
        let name = case.make(&dir.path().join(format!("disk{i}.{}", case.format)));
        let image = case.open(&name, false);
        let sectors = (8 << 20) / 4096;
        std::thread::scope(|scope| {
            for t in 0..4u64 {
                let image = &image;
                scope.spawn(move || {
                    // Neighbouring pages belong to different threads, so that all units are shared; every fourth is left out.
                    for i in (t..sectors).step_by(4).filter(|i| i % 16 != 5) {
                        image.write_at(&[t as u8 + 1; 4096], i * 4096).unwrap();
                        if i % 128 == t {
                            image.flush().unwrap();
                        }
                    }
                });
            }
        });
        let mut model = vec![0; image.size() as usize];
        image.read_at(&mut model, 0).unwrap();
        for i in 0..sectors {
            let expected = if i % 16 == 5 { 0 } else { (i % 4) as u8 + 1 };
            let page = &model[i as usize * 4096..][..4096];
            let untouched = i % 16 == 5 && case.format == "luks";
            assert!(untouched || page.iter().all(|&b| b == expected), "{} page {i}", case.name());
        }
        image.close().unwrap();
        drop(image);
        case.check(&name);
        case.qemu_check(&name);
        case.qemu_compare(&name, &model);
        std::fs::remove_file(&name).unwrap();
    }
}

#[test]
fn a_read_only_image_is_never_written() {
    let dir = tempfile::tempdir().unwrap();
    for (i, case) in CASES.iter().enumerate() {
        let name = case.make(&dir.path().join(format!("disk{i}.{}", case.format)));
        let before = std::fs::read(&name).unwrap();
        let image = case.open(&name, true);
        assert!(image.write_at(b"x", 0).is_err());
        assert!(image.write_zeroes(0, 4096, true).is_err());
        let mut extents = Vec::new();
        image.map_own(0, image.size(), &mut extents).unwrap();
        assert!(!extents.is_empty() && extents[0].offset == 0);
        image.close().unwrap();
        drop(image);
        assert!(std::fs::read(&name).unwrap() == before, "{}", case.name());
    }
}

/// A stream as VMware writes it: the grain directory is found through a footer at the end.
#[test]
fn streams_with_a_footer_are_read_and_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let case = case("vmdk", "subformat=streamOptimized", true);
    let mut random = Random(0x1234_5678_9abc);
    let name = case.make(&dir.path().join("s.vmdk"));
    let mut model = vec![0; SIZE as usize];
    exercise(&case, &name, &mut model, &mut random, 20);
    let mut bytes = std::fs::read(&name).unwrap();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let header = bytes[..512].to_vec();
    bytes[56..64].fill(0xff);
    let mut marker = [0; 512];
    marker[0] = 1;
    marker[12] = 3;
    bytes.extend(marker);
    bytes.extend(&header);
    bytes.extend([0; 512]);
    std::fs::write(&name, &bytes).unwrap();
    assert_reads(&case.open(&name, true), &model, "through the footer");
    case.qemu_compare(&name, &model);
    exercise(&case, &name, &mut model, &mut random, 20);
    case.qemu_check(&name);
    case.qemu_compare(&name, &model);
    // Something else where the footer should be.
    bytes.truncate(bytes.len() - 512);
    std::fs::write(&name, &bytes).unwrap();
    assert!(Image::open(&name, &OpenOptions::reader(Some("vmdk"))).is_err());
}

/// Damages images at random and opens, maps, reads, checks and writes what opens: no panic, no endless loop.
#[test]
fn damaged_images_are_refused_or_survive() {
    let dir = tempfile::tempdir().unwrap();
    for (i, case) in CASES.iter().enumerate() {
        let mut random = Random((i as u64 + 5).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let name = case.make(&dir.path().join(format!("disk{i}.{}", case.format)));
        let image = case.open(&name, false);
        for at in [0, 3 << 20, 9 << 20] {
            image.write_at(&random.bytes(100_000), at).unwrap();
        }
        image.close().unwrap();
        drop(image);
        let sound = std::fs::read(&name).unwrap();
        let interesting: Vec<usize> =
            (0..sound.len().min(1 << 20)).filter(|&i| sound[i] != 0 || i < 600).take(6000).collect();
        // Whole files are written for each round, so large ones get fewer.
        for _ in 0..if sound.len() > 8 << 20 { 12 } else { 50 } {
            let mut bad = sound.clone();
            for _ in 0..1 + random.below(4) {
                let at = interesting[random.below(interesting.len() as u64) as usize];
                let value = [0, 0xff, 0x7f, 0x80, random.next() as u8][random.below(5) as usize];
                let run = [1, 4, 8][random.below(3) as usize].min(bad.len() - at);
                bad[at..at + run].fill(value);
            }
            if random.below(6) == 0 {
                bad.truncate(random.below(bad.len() as u64) as usize);
            }
            std::fs::write(&name, &bad).unwrap();
            for read_only in [true, false] {
                let options = OpenOptions {
                    read_only,
                    options: case.opening(),
                    secrets: secrets(),
                    // A damaged count of iterations would take hours to work off.
                    no_io: case.format == "luks",
                    ..OpenOptions::writer(Some(case.format))
                };
                let Ok(image) = Image::open(&name, &options) else { continue };
                let size = image.size();
                let mut extents = Vec::new();
                let _ = image.map_own(0, size.max(1), &mut extents);
                for e in &extents {
                    assert!(e.len > 0 && e.offset.checked_add(e.len).is_some_and(|end| end <= size));
                    if let Mapping::Data { host, .. } = e.mapping {
                        assert!(host.checked_add(e.len).is_some());
                    }
                }
                let mut buf = vec![0; 70_000.min(size) as usize];
                let _ = image.read_at(&mut buf, 0);
                let end = size - buf.len() as u64;
                let _ = image.read_at(&mut buf, end);
                let _ = image.format().check(if read_only { Repair::None } else { Repair::All });
                if !read_only && std::fs::metadata(&name).unwrap().len() < 1 << 40 {
                    let _ = image.write_at(&buf, 1.min(size - buf.len() as u64));
                    let _ = image.write_zeroes(0, size.min(5 << 20), true);
                    let _ = image.close();
                }
            }
        }
    }
}
