//! bzImage (Documentation/arch/x86/boot.rst).

use super::zero_page::{SETUP_HEADER, ZeroPage, field};
use super::{Entry, EntryMode, KernelError, KernelSpec, Source, Tables, load_initrd, place};
use memory::GuestMemory;

const HEADER_END: usize = 0x290;
const SETUP_SECTS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const JUMP: usize = 0x201;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const INITRD_ADDR_MAX: usize = 0x22c;
const KERNEL_ALIGNMENT: usize = 0x230;
const RELOCATABLE: usize = 0x234;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
const XLF_KERNEL_64: u16 = 1;
const LOADED_HIGH: u8 = 1;
const CAN_USE_HEAP: u8 = 1 << 7;
const QUIET_FLAG: u8 = 1 << 5;

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

pub(super) fn load(
    kernel: &Source<'_>,
    spec: &KernelSpec,
    memory: &GuestMemory,
    tables: &Tables,
) -> Result<Entry, KernelError> {
    let mut head = [0u8; HEADER_END];
    if kernel.len < HEADER_END as u64 {
        return Err(kernel.image("this is neither an ELF file nor a bzImage: too short"));
    }
    kernel.read(0, &mut head)?;
    if &head[MAGIC..MAGIC + 4] != b"HdrS" || u16_at(&head, BOOT_FLAG) != 0xaa55 {
        return Err(kernel.image(describe_foreign(&head)));
    }
    let version = u16_at(&head, VERSION);
    if version < 0x20a {
        return Err(kernel.image(format!(
            "boot protocol {}.{:02} is too old; 2.10 (Linux 2.6.31) or newer is needed",
            version >> 8,
            version & 0xff
        )));
    }
    if head[field::LOADFLAGS] & LOADED_HIGH == 0 {
        return Err(kernel.image("this is a zImage; build a bzImage"));
    }
    let can_64 = version >= 0x20c && u16_at(&head, XLOADFLAGS) & XLF_KERNEL_64 != 0;
    let mode = match spec.entry {
        None if can_64 => EntryMode::Long,
        None => EntryMode::Protected,
        Some(EntryMode::Long) if !can_64 => {
            return Err(kernel.image("it has no 64-bit entry point (a 32-bit kernel?); use entry=32"));
        }
        Some(EntryMode::Pvh) => {
            return Err(kernel.image("a bzImage has no PVH entry; give the ELF vmlinux, or use entry=64"));
        }
        Some(mode) => mode,
    };
    let cmdline_max = u32_at(&head, CMDLINE_SIZE) as usize;
    if spec.append.len() > cmdline_max {
        return Err(KernelError::TooLarge(format!(
            "the kernel command line is {} bytes long; this kernel takes at most {cmdline_max}",
            spec.append.len()
        )));
    }
    let setup_sects = if head[SETUP_SECTS] == 0 { 4 } else { u64::from(head[SETUP_SECTS]) };
    let body = (setup_sects + 1) * 512;
    let body_len = kernel.len.checked_sub(body).filter(|l| *l > 0);
    let body_len = body_len.ok_or_else(|| kernel.image("the file is truncated: no protected-mode code"))?;
    // The header's own count of the protected-mode code, in 16-byte paragraphs, shows a truncated file.
    let expected = u64::from(u32_at(&head, 0x1f4)) * 16;
    if body_len < expected.saturating_sub(15) {
        return Err(kernel.image(format!(
            "the file is truncated: {} bytes, its header tells {}",
            kernel.len,
            body + expected
        )));
    }
    let init_size = u64::from(u32_at(&head, INIT_SIZE)).max(body_len);
    let at = load_address(&head);
    let kernel_end = at + init_size;
    if memory.slice(at, init_size).is_err() {
        return Err(KernelError::TooLarge(format!(
            "kernel '{}' needs RAM up to {}; the guest has {}: give it more with --memory",
            kernel.path.display(),
            memory::format_size(kernel_end.next_multiple_of(1 << 20)),
            memory::format_size(memory.total())
        )));
    }
    kernel.load(body, body_len, memory, at)?;
    let initrd_max = u64::from(u32_at(&head, INITRD_ADDR_MAX)) + 1;
    let initrd = load_initrd(spec, memory, &tables.e820, kernel_end, initrd_max)?;

    let mut page = ZeroPage::new();
    let header_end = (JUMP + 1 + usize::from(head[JUMP])).clamp(MAGIC + 4, HEADER_END);
    page.0[SETUP_HEADER..header_end].copy_from_slice(&head[SETUP_HEADER..header_end]);
    let flags = (head[field::LOADFLAGS] | CAN_USE_HEAP) & !QUIET_FLAG;
    page.set_u8(field::LOADFLAGS, flags);
    page.set_u16(field::HEAP_END_PTR, 0xfe00);
    page.set_u32(0x214, at as u32); // code32_start
    let params = page.finish(memory, tables, initrd)?;
    Ok(match mode {
        EntryMode::Long => Entry::Long { ip: at + 0x200, rsi: params },
        _ => Entry::Protected { ip: at, esi: params, ebx: 0 },
    })
}

/// Where the protected-mode code goes: at its preferred address if the kernel can run there (decompression in place
/// then needs no move), otherwise at 1 MiB.
fn load_address(head: &[u8]) -> u64 {
    let preferred = u64::from(u32_at(head, PREF_ADDRESS)) | u64::from(u32_at(head, PREF_ADDRESS + 4)) << 32;
    let alignment = u64::from(u32_at(head, KERNEL_ALIGNMENT)).max(1);
    let usable = head[RELOCATABLE] != 0 && preferred >= place::HIGH && preferred.is_multiple_of(alignment);
    if usable && preferred < 1 << 31 { preferred } else { place::HIGH }
}

/// Says what a file that is no x86 Linux kernel seems to be.
fn describe_foreign(head: &[u8]) -> String {
    let what = if &head[0x38..0x3c] == b"ARM\x64" {
        "this is an arm64 kernel"
    } else if &head[0x38..0x3c] == b"RSC\x05" {
        "this is a RISC-V kernel"
    } else if head.starts_with(&[0x1f, 0x8b]) {
        "this is a gzip file; decompress it first"
    } else if head.starts_with(&[0xfd, b'7', b'z', b'X', b'Z']) {
        "this is an xz file; decompress it first"
    } else if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        "this is a zstd file; decompress it first"
    } else {
        "this is neither an ELF file nor a bzImage"
    };
    format!("{what}; an x86-64 Linux bzImage or vmlinux is needed")
}
