//! Queues: every engine on flat and on table formats, against memory.
#![allow(clippy::unwrap_used)] // a test that cannot be set up fails

mod common;

use block::{
    CacheMode, Create, Image, OpenOptions, create_image,
    queue::{Buffer, Engine, Operation, Queue, Request},
};
use common::Random;
use std::{path::Path, sync::Arc};

const SIZE: u64 = 4 << 20;

fn image(dir: &Path, format: &str, cache: &str) -> Option<Arc<Image>> {
    let name = dir.join(format!("{format}-{cache}")).to_str().unwrap().to_owned();
    let create = Create { format: format.into(), name: name.clone(), size: Some(SIZE), ..Default::default() };
    create_image(&create).unwrap();
    let options =
        OpenOptions { cache: CacheMode::parse(cache).unwrap(), ..OpenOptions::writer(Some(format)) };
    match Image::open(&name, &options) {
        Ok(image) => Some(Arc::new(image)),
        Err(e) if e.to_string().contains("O_DIRECT") => None,
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn requests_in_flight_do_what_they_say() {
    // Not /tmp, which may be a file system without O_DIRECT.
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    for (format, cache, engine) in [
        ("raw", "writeback", Engine::Auto),
        ("raw", "none", Engine::Auto),
        ("raw", "none", Engine::Threads),
        ("raw", "directsync", Engine::Auto),
        ("qcow2", "writeback", Engine::Auto),
        ("qcow2", "none", Engine::Auto),
    ] {
        let Some(image) = image(dir.path(), format, cache) else { continue };
        let mut queue = Queue::new(Arc::clone(&image), 16, engine).unwrap();
        let mut model = vec![0u8; SIZE as usize];
        let mut random = Random(11);
        for round in 0..60 {
            // Writes to places apart from each other, all in flight at once.
            let step = SIZE / 24;
            for i in 0..24u64 {
                let grain = if random.below(3) == 0 { 1 } else { 4096 };
                let offset = i * step + random.below(step / 2) / grain * grain;
                let len = (1 + random.below(step / 2 - 4096)).next_multiple_of(grain).min(step / 2);
                let range = offset as usize..(offset + len) as usize;
                let (operation, buffer) = match random.below(8) {
                    0 => (Operation::WriteZeroes { unmap: true }, Buffer::empty()),
                    _ => {
                        let mut buffer = queue.buffer(len as usize);
                        buffer.copy_from_slice(&random.bytes(len as usize));
                        (Operation::Write { durable: random.below(9) == 0 }, buffer)
                    }
                };
                if buffer.is_empty() {
                    model[range].fill(0);
                } else {
                    model[range].copy_from_slice(&buffer);
                }
                queue.push(Request { id: i, operation, offset, len, buffer }).unwrap();
            }
            let mut done = Vec::new();
            queue.drain(&mut done).unwrap();
            let mut ids: Vec<u64> = done
                .into_iter()
                .map(|c| {
                    c.result.unwrap();
                    c.id
                })
                .collect();
            ids.sort_unstable();
            assert_eq!(ids, (0..24).collect::<Vec<_>>());
            for i in 0..30u64 {
                let offset = random.below(SIZE - 70_000);
                let len = 1 + random.below(70_000);
                let buffer = queue.buffer(len as usize);
                queue
                    .push(Request { id: i << 32 | offset, operation: Operation::Read, offset, len, buffer })
                    .unwrap();
            }
            queue
                .push(Request {
                    id: u64::MAX,
                    operation: Operation::Flush,
                    offset: 0,
                    len: 0,
                    buffer: Buffer::empty(),
                })
                .unwrap();
            let mut done = Vec::new();
            queue.drain(&mut done).unwrap();
            assert_eq!(done.len(), 31);
            for c in done {
                c.result.unwrap();
                if c.id != u64::MAX {
                    let at = (c.id & 0xffff_ffff) as usize;
                    assert!(c.buffer[..] == model[at..at + c.buffer.len()], "{format} {cache} round {round}");
                }
            }
        }
        // Errors come back with the request, and a queue may be dropped with requests in flight.
        let buffer = queue.buffer(4096);
        queue
            .push(Request { id: 5, operation: Operation::Read, offset: SIZE - 100, len: 4096, buffer })
            .unwrap();
        let mut done = Vec::new();
        queue.drain(&mut done).unwrap();
        assert!(done.len() == 1 && done[0].result.is_err());
        for i in 0..16 {
            let buffer = queue.buffer(8192);
            queue
                .push(Request { id: i, operation: Operation::Read, offset: i * 8192, len: 8192, buffer })
                .unwrap();
        }
        drop(queue);
        image.close().unwrap();
    }
}

#[test]
fn a_watcher_sees_everything_after_it_came() {
    struct Counter(std::sync::atomic::AtomicU64);
    impl block::jobs::Watcher for Counter {
        fn before_change(&self, _offset: u64, len: u64) -> block::Result<()> {
            self.0.fetch_add(len, std::sync::atomic::Ordering::SeqCst);
            Ok(())
        }
        fn after_change(&self, _offset: u64, _len: u64) {}
    }
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), "raw", "writeback").unwrap();
    let mut queue = Queue::new(Arc::clone(&image), 8, Engine::Auto).unwrap();
    let write = |queue: &mut Queue| {
        let buffer = queue.buffer(4096);
        let request =
            Request { id: 0, operation: Operation::Write { durable: false }, offset: 0, len: 4096, buffer };
        queue.push(request).unwrap();
        let mut done = Vec::new();
        queue.drain(&mut done).unwrap();
        done.pop().unwrap().result.unwrap();
    };
    write(&mut queue);
    let counter = Arc::new(Counter(Default::default()));
    let id = image.watch(Arc::clone(&counter) as Arc<dyn block::jobs::Watcher>);
    write(&mut queue);
    image.unwatch(id);
    write(&mut queue);
    assert_eq!(counter.0.load(std::sync::atomic::Ordering::SeqCst), 4096);
}
