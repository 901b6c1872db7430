//! Images made by hand: what loads, and what is refused with which words.

use super::*;
use memory::{Backing, Layout};
use std::io::Write;
use tempfile::NamedTempFile;

fn ram(mib: u64) -> GuestMemory {
    GuestMemory::new(&Layout::pc(mib << 20, 1 << 31).unwrap(), &Backing::Anonymous, false).unwrap()
}

fn tables(memory: &GuestMemory) -> Tables {
    let ram = |start, len| E820 { start, len, kind: E820::RAM };
    Tables {
        rsdp: Some(0xe0000),
        e820: vec![ram(0, 0x9fc00), ram(1 << 20, memory.total() - (1 << 20))],
        text_screen: true,
    }
}

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut f = NamedTempFile::new().unwrap();
    f.write_all(bytes).unwrap();
    f
}

fn boot(image: &[u8], spec: KernelSpec, mib: u64) -> Result<(Entry, GuestMemory), KernelError> {
    let f = file(image);
    let memory = ram(mib);
    let spec = KernelSpec { kernel: f.path().into(), ..spec };
    let entry = load(&spec, &memory, &tables(&memory))?;
    Ok((entry, memory))
}

fn refused(image: &[u8], spec: KernelSpec, mib: u64) -> String {
    let message = boot(image, spec, mib).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

/// A bzImage of one setup sector and `body`, relocatable, preferring 16 MiB.
fn bzimage(body: &[u8]) -> Vec<u8> {
    let mut b = vec![0; 0x400];
    b[0x1f1] = 1;
    b[0x1f4..0x1f8].copy_from_slice(&(body.len() as u32 / 16).to_le_bytes());
    b[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    b[0x200..0x202].copy_from_slice(&[0xeb, 0x66]);
    b[0x202..0x206].copy_from_slice(b"HdrS");
    b[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    b[0x211] = 1;
    b[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    b[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes());
    b[0x234] = 1;
    b[0x236] = 1;
    b[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    b[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    b[0x260..0x264].copy_from_slice(&0x20_0000u32.to_le_bytes());
    b.extend(body);
    b
}

/// An ELF64 with one segment at 16 MiB and, if asked, a PVH note.
fn elf(machine: u16, pvh: Option<u32>) -> Vec<u8> {
    let mut note = Vec::new();
    if let Some(entry) = pvh {
        for word in [4u32, 4, 18] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(entry.to_le_bytes());
    }
    let mut e = vec![0; 64 + 2 * 56];
    e[..6].copy_from_slice(b"\x7fELF\x02\x01");
    e[18..20].copy_from_slice(&machine.to_le_bytes());
    e[24..32].copy_from_slice(&0x100_0040u64.to_le_bytes());
    e[32] = 64;
    e[54] = 56;
    e[56] = 2;
    let mut header = |i: usize, fields: [u64; 6], kind: u32| {
        let at = 64 + 56 * i;
        e[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (j, f) in fields.iter().enumerate() {
            e[at + 8 + 8 * j..at + 16 + 8 * j].copy_from_slice(&f.to_le_bytes());
        }
    };
    let data = 64 + 2 * 56;
    header(0, [data, 0, 0x100_0000, 8, 0x1000, 0x20_0000], 1);
    header(1, [data + 8, 0, 0, note.len() as u64, note.len() as u64, 4], 4);
    e.extend(b"KERNEL!!");
    e.extend(note);
    e
}

#[test]
fn bzimage_is_entered_where_the_protocol_says() {
    let initrd = file(&[7; 5000]);
    let spec = KernelSpec {
        initrd: Some(initrd.path().into()),
        append: "console=ttyS0".into(),
        ..Default::default()
    };
    let (entry, m) = boot(&bzimage(&[0x90; 4096]), spec.clone(), 64).unwrap();
    assert_eq!(entry, Entry::Long { ip: 0x100_0200, rsi: place::ZERO_PAGE });
    let page = |at: u64| m.read_obj::<u32>(place::ZERO_PAGE + at).unwrap();
    let initrd_at = page(0x218);
    assert_eq!((initrd_at, page(0x21c)), ((64 << 20) - 8192, 5000));
    assert_eq!(m.read_obj::<u8>(u64::from(initrd_at) + 4999).unwrap(), 7);
    assert_eq!((page(0x228), page(0x202), page(0x070)), (0x2_0000, u32::from_le_bytes(*b"HdrS"), 0xe0000));
    assert_eq!(m.read_obj::<u8>(place::ZERO_PAGE + 0x1e8).unwrap(), 2);
    let mut text = [0; 14];
    m.read(place::CMDLINE, &mut text).unwrap();
    assert_eq!(&text, b"console=ttyS0\0");

    let (entry, _) =
        boot(&bzimage(&[0x90; 4096]), KernelSpec { entry: Some(EntryMode::Protected), ..spec }, 64).unwrap();
    assert_eq!(entry, Entry::Protected { ip: 0x100_0000, esi: place::ZERO_PAGE, ebx: 0 });
}

#[test]
fn elf_kernels_prefer_pvh() {
    let (entry, m) = boot(&elf(62, Some(0x100_0123)), KernelSpec::default(), 64).unwrap();
    assert_eq!(entry, Entry::Protected { ip: 0x100_0123, esi: 0, ebx: place::PVH_START_INFO });
    assert_eq!(m.read_obj::<[u8; 8]>(0x100_0000).unwrap(), *b"KERNEL!!");
    assert_eq!(m.read_obj::<u32>(place::PVH_START_INFO).unwrap(), 0x336e_c578);
    let (entry, _) = boot(&elf(62, None), KernelSpec::default(), 64).unwrap();
    assert_eq!(entry, Entry::Long { ip: 0x100_0040, rsi: place::ZERO_PAGE });
}

#[test]
fn bad_kernels_are_named() {
    let plain = KernelSpec::default;
    assert!(refused(b"", plain(), 64).contains("too short"));
    assert!(refused(&[0; 2000], plain(), 64).contains("neither an ELF file nor a bzImage"));
    assert!(refused(&bzimage(&[0; 4096])[..2000], plain(), 64).contains("truncated"));
    assert!(refused(&elf(62, None)[..100], plain(), 64).contains("truncated"));
    assert!(refused(&elf(62, None)[..180], plain(), 64).contains("truncated"));
    assert!(refused(&elf(183, None), plain(), 64).contains("arm64"));
    assert!(refused(&elf(62, None), plain(), 8).contains("--memory"));
    assert!(refused(&bzimage(&[0; 4096]), plain(), 8).contains("--memory"));
    let mut arm = vec![0; 2000];
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    assert!(refused(&arm, plain(), 64).contains("arm64 kernel"));
    let pvh = KernelSpec { entry: Some(EntryMode::Pvh), ..plain() };
    assert!(refused(&bzimage(&[0; 4096]), pvh.clone(), 64).contains("no PVH entry"));
    assert!(refused(&elf(62, None), pvh, 64).contains("no PVH note"));
    let long = KernelSpec { append: "x".repeat(3000), ..plain() };
    assert!(refused(&bzimage(&[0; 4096]), long, 64).contains("2047"));
}

#[test]
fn missing_files_and_large_initrds_are_named() {
    let memory = ram(64);
    let missing = KernelSpec { kernel: "/nonexistent/vmlinuz".into(), ..Default::default() };
    let text = load(&missing, &memory, &tables(&memory)).unwrap_err().to_string();
    assert!(text.contains("kernel '/nonexistent/vmlinuz'"), "{text}");
    let initrd = tempfile::NamedTempFile::new().unwrap();
    initrd.as_file().set_len(60 << 20).unwrap();
    let spec = KernelSpec { initrd: Some(initrd.path().into()), ..Default::default() };
    assert!(refused(&bzimage(&[0; 4096]), spec, 64).contains("does not fit"));
}
