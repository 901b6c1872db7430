//! Power cuts: whatever part of the writes since the last flush reached the disk, the image opens, checks without damage, and
//! what was flushed is there.
#![allow(clippy::unwrap_used)] // a test that cannot be set up fails

mod common;

use block::{
    Image, OpenOptions, Options,
    formats::{self, Creation, Repair, SnapshotInfo},
    storage::{Change, MemoryStorage, RecordingStorage, Storage},
};
use common::{Random, siblings::Alone};
use std::{collections::BTreeMap, sync::Arc};

const SIZE: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// A sector's contents are one byte repeated: its possible values since the last flush.
type Model = Vec<Vec<u8>>;

fn create(format: &str, options: &str, storage: Arc<dyn Storage>) {
    let driver = formats::find(format).unwrap();
    (driver.create.unwrap())(Creation {
        storage,
        size: SIZE,
        backing: None,
        options: &mut Options::parse(options).unwrap(),
        name: "disk",
        siblings: &Alone,
        secrets: &BTreeMap::new(),
    })
    .unwrap();
}

fn open(format: &str, storage: Arc<dyn Storage>, read_only: bool) -> block::Result<Image> {
    let options = OpenOptions { read_only, discard: true, ..OpenOptions::writer(Some(format)) };
    Image::open_storage(storage, "disk", &options)
}

/// Does random work on an image, noting what may be found after a cut at each flush: (changes so far, model then).
fn work(image: &Image, record: &RecordingStorage, random: &mut Random, snapshots: bool) -> Vec<(usize, Model)> {
    let sectors = SIZE / SECTOR;
    let mut now = vec![0u8; sectors as usize];
    let mut points: Vec<(usize, Model)> = vec![(record.len(), now.iter().map(|&b| vec![b]).collect())];
    let mut saved: Option<Vec<u8>> = None;
    for step in 0..60u64 {
        let first = random.below(sectors);
        let most = if random.below(3) == 0 { 400 } else { 12 };
        let n = (1 + random.below(most)).min(sectors - first);
        let range = first as usize..(first + n) as usize;
        let value = (step % 250) as u8 + 1;
        let mut note = |range: std::ops::Range<usize>, value: u8| {
            let (_, model) = points.last_mut().unwrap();
            model[range].iter_mut().for_each(|v| v.push(value));
        };
        match random.below(if snapshots { 12 } else { 9 }) {
            0..=4 => {
                note(range.clone(), value);
                image.write_at(&vec![value; (n * SECTOR) as usize], first * SECTOR).unwrap();
                now[range].fill(value);
            }
            5 => {
                note(range.clone(), 0);
                image.write_zeroes(first * SECTOR, n * SECTOR, true).unwrap();
                now[range].fill(0);
            }
            6 => {
                note(range.clone(), 0);
                image.discard(first * SECTOR, n * SECTOR).unwrap();
                let mut bytes = vec![0; (n * SECTOR) as usize];
                image.read_at(&mut bytes, first * SECTOR).unwrap();
                for (i, s) in range.enumerate() {
                    now[s] = bytes[i * SECTOR as usize];
                }
            }
            9 if saved.is_none() => {
                image.quiesced(|f| f.snapshots().unwrap().create(SnapshotInfo { name: "s".into(), ..Default::default() })).unwrap();
                saved = Some(now.clone());
            }
            10 => {
                if let Some(then) = saved.take() {
                    let (_, model) = points.last_mut().unwrap();
                    model.iter_mut().zip(&then).for_each(|(v, b)| v.push(*b));
                    image.quiesced(|f| f.snapshots().unwrap().apply("s")).unwrap();
                    now = then;
                    image.quiesced(|f| f.snapshots().unwrap().delete("s")).unwrap();
                }
            }
            _ => {
                image.flush().unwrap();
                points.push((record.len(), now.iter().map(|&b| vec![b]).collect()));
            }
        }
    }
    image.close().unwrap();
    points.push((record.len(), now.iter().map(|&b| vec![b]).collect()));
    points
}

/// Looks at what a cut left.
fn examine(format: &str, left: Vec<u8>, allowed: &Model, what: &str) {
    let storage = Arc::new(MemoryStorage::new(left));
    let image = open(format, storage.clone(), false).unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut bytes = vec![0; SIZE as usize];
    image.read_at(&mut bytes, 0).unwrap_or_else(|e| panic!("{what}: {e}"));
    for (i, sector) in bytes.chunks(SECTOR as usize).enumerate() {
        // A sector is written whole or not at all; parts of different writes may follow each other only at sectors.
        assert!(sector.iter().all(|b| *b == sector[0]), "{what}: sector {i} is torn");
        assert!(allowed[i].contains(&sector[0]), "{what}: sector {i} is {}, not one of {:?}", sector[0], allowed[i]);
    }
    match image.format().check(Repair::None) {
        Ok(report) => assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: {:#?}", report.messages),
        Err(block::Error::Unsupported(_)) => {}
        Err(e) => panic!("{what}: {e}"),
    }
    image.write_at(&[7; 512], 0).unwrap_or_else(|e| panic!("{what}: {e}"));
    image.close().unwrap_or_else(|e| panic!("{what}: {e}"));
}

fn run(format: &str, options: &str, snapshots: bool, seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let record = Arc::new(RecordingStorage::new());
    create(format, options, record.clone());
    let image = open(format, record.clone(), false).unwrap();
    let points = work(&image, &record, &mut random, snapshots);
    drop(image);
    let changes = record.changes();
    let start = points[0].0;
    let durable = MemoryStorage::default();
    changes[..start].iter().for_each(|c| c.apply(&durable).unwrap());
    // Since which flush of the storage changes may be missing.
    let mut since = start;
    for cut in start..=changes.len() {
        // What may be found: everything from the last completed flush of the image on.
        let at = points.iter().rposition(|(n, _)| *n <= cut).unwrap();
        let allowed = &points[at].1;
        let pending: Vec<&Change> = changes[since..cut].iter().filter(|c| **c != Change::Flush).collect();
        let mut variants = vec![pending.clone()];
        if pending.len() > 1 {
            // Some of the writes, in some order.
            for _ in 0..2 {
                let mut some: Vec<&Change> = pending.iter().copied().filter(|_| random.below(2) == 0).collect();
                for i in (1..some.len()).rev() {
                    // Overlapping writes keep their order, as in a disk's queue.
                    let j = random.below(i as u64 + 1) as usize;
                    if !overlap(some[i], some[j]) && !(j..i).any(|k| overlap(some[k], some[i]) || overlap(some[k], some[j])) {
                        some.swap(i, j);
                    }
                }
                variants.push(some);
            }
        }
        for (v, list) in variants.iter().enumerate() {
            let disk = MemoryStorage::new(durable.snapshot());
            list.iter().for_each(|c| c.apply(&disk).unwrap());
            examine(format, disk.snapshot(), allowed, &format!("{format} {options}: cut at {cut}, variant {v}"));
        }
        if changes.get(cut) == Some(&Change::Flush) {
            changes[since..cut].iter().for_each(|c| c.apply(&durable).unwrap());
            since = cut;
        }
    }
}

fn span(c: &Change) -> (u64, u64) {
    match c {
        Change::Write(o, b) => (*o, o + b.len() as u64),
        Change::Zero(o, n) => (*o, o + n),
        Change::Size(_) => (0, u64::MAX),
        Change::Flush => (0, 0),
    }
}

fn overlap(a: &Change, b: &Change) -> bool {
    let ((s, e), (t, f)) = (span(a), span(b));
    s < f && t < e
}

#[test]
fn qcow2() {
    for (i, options) in
        ["cluster_size=4k", "cluster_size=512", "", "cluster_size=16k,extended_l2=on", "cluster_size=1k,compat=0.10"]
            .iter()
            .enumerate()
    {
        for seed in 0..2 {
            run("qcow2", options, false, 100 + i as u64 * 10 + seed);
        }
    }
}

#[test]
fn qcow2_with_lazy_refcounts() {
    run("qcow2", "cluster_size=4k,lazy_refcounts=on", false, 200);
    run("qcow2", "lazy_refcounts=on", false, 201);
}

#[test]
fn qcow2_with_snapshots() {
    for seed in 0..2 {
        run("qcow2", "cluster_size=4k", true, 300 + seed);
        run("qcow2", "cluster_size=512", true, 310 + seed);
    }
}
