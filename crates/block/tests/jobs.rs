//! Block jobs while a guest writes.
#![allow(clippy::unwrap_used)] // a test that cannot be set up fails

mod common;

use block::{
    Create, Image, OpenOptions, create_image,
    formats::Backing,
    jobs::{ActiveCommit, Backup, BackupMode, Commit, Control, Job, Mirror, MirrorMode, Step, Stream},
};
use common::Random;
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

const SIZE: u64 = 8 << 20;

fn make(dir: &Path, name: &str, backing: Option<&str>) -> String {
    let path = dir.join(name).to_str().unwrap().to_owned();
    create_image(&Create {
        format: "qcow2".into(),
        name: path.clone(),
        size: Some(SIZE),
        backing: backing.map(|b| Backing { name: b.into(), format: Some("qcow2".into()) }),
        unsafe_backing: true,
        ..Default::default()
    })
    .unwrap();
    path
}

fn open(name: &str) -> Arc<Image> {
    Arc::new(Image::open(name, &OpenOptions::writer(Some("qcow2"))).unwrap())
}

fn contents(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; image.size() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn scribble(image: &Image, seed: u64, count: u32) {
    let mut random = Random(seed);
    for _ in 0..count {
        let at = random.below(SIZE - 40_000);
        match random.below(4) {
            0 => image.write_zeroes(at, 1 + random.below(30_000), true).unwrap(),
            _ => {
                let len = 1 + random.below(30_000) as usize;
                image.write_at(&random.bytes(len), at).unwrap();
            }
        }
    }
}

/// Runs `f` while another thread writes.
fn while_written(image: &Arc<Image>, f: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut seed = 100;
            while !stop.load(Ordering::Relaxed) {
                scribble(image, seed, 3);
                seed += 1;
                std::thread::yield_now();
            }
        });
        f();
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_mirror_keeps_up() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (open(&make(dir.path(), "s", None)), open(&make(dir.path(), "t", None)));
    scribble(&source, 1, 200);
    let mut job: Box<dyn Job> =
        Box::new(Mirror::new(Arc::clone(&source), Arc::clone(&target), MirrorMode::Full).unwrap());
    assert!(source.direct().is_none());
    while_written(&source, || {
        let before = job.progress().0;
        for _ in 0..40 {
            if job.step().unwrap() == Step::Ready {
                break;
            }
        }
        assert!(job.progress().0 > before);
    });
    job.complete().unwrap();
    assert!(contents(&source) == contents(&target));
}

#[test]
fn a_backup_is_the_moment_it_began() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (open(&make(dir.path(), "s", None)), open(&make(dir.path(), "t", None)));
    scribble(&source, 2, 200);
    let then = contents(&source);
    let mut job: Box<dyn Job> =
        Box::new(Backup::new(Arc::clone(&source), Arc::clone(&target), BackupMode::Full).unwrap());
    // At least these writes come while it runs, whatever the threads do.
    scribble(&source, 9, 50);
    while_written(&source, || {
        while job.step().unwrap() == Step::Worked {
            std::thread::yield_now();
        }
    });
    job.complete().unwrap();
    assert!(contents(&source) != then);
    assert!(contents(&target) == then);
}

#[test]
fn an_incremental_backup_copies_what_a_bitmap_names() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (open(&make(dir.path(), "s", None)), open(&make(dir.path(), "t", None)));
    scribble(&source, 3, 100);
    Box::new(Backup::new(Arc::clone(&source), Arc::clone(&target), BackupMode::Full).unwrap())
        .complete()
        .unwrap();
    source.quiesced(|f| f.bitmaps().unwrap().add("b", None, true)).unwrap();
    source.write_at(&[1; 100_000], 1 << 20).unwrap();
    let bits = source.format().bitmaps().unwrap().load("b").unwrap();
    let job =
        Backup::new(Arc::clone(&source), Arc::clone(&target), BackupMode::Incremental(65536, bits)).unwrap();
    assert!(job.progress().1 <= 4 * 65536);
    Box::new(job).complete().unwrap();
    assert!(contents(&source) == contents(&target));
}

#[test]
fn a_stream_makes_the_backing_file_needless() {
    let dir = tempfile::tempdir().unwrap();
    let (base, middle, top) =
        (make(dir.path(), "a", None), make(dir.path(), "b", Some("a")), make(dir.path(), "c", Some("b")));
    scribble(&open(&base), 4, 150);
    scribble(&open(&middle), 5, 60);
    let image = open(&top);
    scribble(&image, 6, 20);
    let mut job: Box<dyn Job> = Box::new(Stream::new(Arc::clone(&image), None, 0));
    while_written(&image, || while job.step().unwrap() == Step::Worked {});
    let now = contents(&image);
    job.complete().unwrap();
    assert!(contents(&image) == now);
    assert!(image.info().unwrap().backing.is_none());
    image.close().unwrap();
    drop(image);
    std::fs::remove_file(&base).unwrap();
    assert!(contents(&open(&top)) == now);
}

#[test]
fn commits_write_to_the_base() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (make(dir.path(), "a", None), make(dir.path(), "b", Some("a")));
    scribble(&open(&base), 7, 100);
    scribble(&open(&top), 8, 50);
    let lower = open(&base);
    let alone = OpenOptions { no_backing: true, ..OpenOptions::writer(Some("qcow2")) };
    let upper = Arc::new(Image::open(&top, &alone).unwrap());
    upper.replace_backing(Some(Arc::clone(&lower)));
    let before = contents(&upper);
    Box::new(Commit::new(Arc::clone(&upper), Arc::clone(&lower), 1).unwrap()).complete().unwrap();
    assert!(contents(&lower) == before);
    let mut job: Box<dyn Job> = Box::new(ActiveCommit::new(Arc::clone(&upper), Arc::clone(&lower)).unwrap());
    while_written(&upper, || {
        for _ in 0..20 {
            job.step().unwrap();
        }
    });
    job.complete().unwrap();
    assert!(contents(&lower) == contents(&upper));
}

#[test]
fn jobs_are_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (open(&make(dir.path(), "s", None)), open(&make(dir.path(), "t", None)));
    let mut job = Mirror::new(source, target, MirrorMode::Full).unwrap();
    let control = Control::default();
    control.cancel();
    assert!(control.run(&mut job).unwrap());
    let control = Control::default();
    control.set_rate(1 << 40);
    assert!(!control.run(&mut job).unwrap());
}
