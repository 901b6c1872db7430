use super::*;
use memory::{Backing, Layout};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const AT: RegionId = RegionId(0);

fn device() -> FwCfg {
    let memory =
        GuestMemory::new(&Layout::pc(1 << 20, 1 << 30).unwrap(), &Backing::Anonymous, false).unwrap();
    let mut items = FwCfgItems::new();
    items.set_u16(key::CPUS, 3);
    items.add("opt/b", b"bees".to_vec()).unwrap();
    items.add("opt/a", b"ants".to_vec()).unwrap();
    items.add_writable("etc/w", vec![0; 8]).unwrap();
    assert!(items.add("opt/a", vec![]).is_err());
    assert!(items.add(&"x".repeat(56), vec![]).is_err());
    FwCfg::new(items, memory)
}

fn read(d: &mut FwCfg, key: u16, len: usize) -> Vec<u8> {
    d.write(AT, 0, &key.to_le_bytes());
    (0..len)
        .map(|_| {
            let mut b = [0xff];
            d.read(AT, 1, &mut b);
            b[0]
        })
        .collect()
}

/// Puts a descriptor at 0x1000, starts it, and returns the control word after it.
fn dma(d: &mut FwCfg, control: u32, length: u32, address: u64) -> u32 {
    let mut raw = control.to_be_bytes().to_vec();
    raw.extend(length.to_be_bytes());
    raw.extend(address.to_be_bytes());
    d.memory.write(0x1000, &raw).unwrap();
    d.write(AT, 4, &0u32.to_be_bytes());
    d.write(AT, 8, &0x1000u32.to_be_bytes());
    u32::from_be_bytes(d.memory.read_obj(0x1000).unwrap())
}

#[test]
fn items_by_port() {
    let mut d = device();
    assert_eq!(read(&mut d, key::SIGNATURE, 6), b"QEMU\0\0");
    assert_eq!(read(&mut d, key::ID, 4), [3, 0, 0, 0]);
    assert_eq!(read(&mut d, key::CPUS, 2), [3, 0]);
    assert_eq!(read(&mut d, 0x3210, 2), [0, 0]);
    let mut sign = [0; 8];
    d.read(AT, 4, &mut sign);
    assert_eq!(&sign, b"QEMU CFG");
    d.read(AT, 8, &mut sign[..4]);
    assert_eq!(&sign[..4], b" CFG");
}

#[test]
fn directory_is_sorted() {
    let mut d = device();
    let dir = read(&mut d, key::DIRECTORY, 4 + 3 * 64);
    assert_eq!(dir[..4], [0, 0, 0, 3]);
    let entry = |i: usize| {
        let e = &dir[4 + 64 * i..][..64];
        let name = e[8..].split(|b| *b == 0).next().unwrap().to_vec();
        (String::from_utf8(name).unwrap(), e[3], u16::from_be_bytes([e[4], e[5]]))
    };
    assert_eq!(
        [entry(0), entry(1), entry(2)],
        [("etc/w".into(), 8, 0x20), ("opt/a".into(), 4, 0x21), ("opt/b".into(), 4, 0x22)]
    );
    assert_eq!(read(&mut d, 0x22, 4), b"bees");
    assert_eq!(d.key_of("opt/b"), Some(0x22));
}

#[test]
fn items_by_dma() {
    let mut d = device();
    d.memory.write(0x2000, &[9; 8]).unwrap();
    assert_eq!(dma(&mut d, 0x21 << 16 | 8 | 2, 6, 0x2000), 0);
    assert_eq!(d.memory.read_obj::<[u8; 8]>(0x2000).unwrap(), *b"ants\0\0\x09\x09");
    // Select and skip, then read.
    assert_eq!(dma(&mut d, 0x21 << 16 | 8 | 4, 2, 0), 0);
    assert_eq!(dma(&mut d, 2, 2, 0x2000), 0);
    assert_eq!(d.memory.read_obj::<[u8; 2]>(0x2000).unwrap(), *b"ts");
    // Writing: only what is writable, only inside.
    assert_eq!(dma(&mut d, 0x21 << 16 | 8 | 16, 4, 0x2000), 1);
    assert_eq!(dma(&mut d, 0x20 << 16 | 8 | 16, 9, 0x2000), 1);
    assert_eq!(dma(&mut d, 0x20 << 16 | 8 | 16, 4, 0x2000), 0);
    assert_eq!(read(&mut d, 0x20, 4), *b"tsts");
    // No memory there.
    assert_eq!(dma(&mut d, 0x21 << 16 | 8 | 2, 4, 1 << 40), 1);
    assert_eq!(dma(&mut d, 2, u32::MAX, 0x2000), 1);
    d.write(AT, 4, &u64::MAX.to_be_bytes());
}

#[test]
fn written_items_are_saved_and_reset() {
    let mut d = device();
    d.memory.write(0x2000, b"12345678").unwrap();
    assert_eq!(dma(&mut d, 0x20 << 16 | 8 | 16, 8, 0x2000), 0);
    let state = d.save().unwrap();
    let mut other = device();
    other.load(state.clone()).unwrap();
    assert_eq!(read(&mut other, 0x20, 8), b"12345678");
    other.reset();
    assert_eq!(read(&mut other, 0x20, 8), [0; 8]);
    let mut odd = state;
    odd.data["written"]["33"] = serde_json::json!([1]);
    assert!(other.load(odd).is_err());
}

#[test]
fn refreshed_once_after_each_reset() {
    let mut d = device();
    let count = Arc::new(AtomicU32::new(0));
    let c = count.clone();
    d.refresh_with(vec![0x21], move || {
        let n = c.fetch_add(1, Ordering::SeqCst);
        vec![(0x21, Arc::new(format!("ant{n}").into_bytes()) as Bytes), (0x22, Arc::new(vec![1u8]) as Bytes)]
    });
    assert_eq!(read(&mut d, 0x22, 4), b"bees");
    assert_eq!(read(&mut d, 0x21, 4), b"ant0");
    assert_eq!(read(&mut d, 0x21, 4), b"ant0");
    assert_eq!(read(&mut d, 0x22, 4), b"bees", "another length is refused");
    d.reset();
    assert_eq!(read(&mut d, 0x21, 4), b"ant1");
}
