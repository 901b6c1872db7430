//! ELF kernels: `vmlinux` with a PVH note, or an x86-64 ELF entered by the 64-bit boot protocol.

use super::zero_page::ZeroPage;
use super::{Entry, EntryMode, KernelError, KernelSpec, Source, Tables, load_initrd, place, pvh};
use memory::GuestMemory;

const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const MAX_SEGMENTS: u16 = 128;

/// A program header, in the 64-bit form.
struct Segment {
    kind: u32,
    offset: u64,
    paddr: u64,
    file_len: u64,
    mem_len: u64,
    align: u64,
}

struct Header {
    class64: bool,
    machine: u16,
    entry: u64,
    segments: Vec<Segment>,
}

fn number(b: &[u8], at: usize, len: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..len].copy_from_slice(&b[at..at + len]);
    u64::from_le_bytes(bytes)
}

fn parse(kernel: &Source<'_>) -> Result<Header, KernelError> {
    let mut h = [0u8; 64];
    let len = (kernel.len as usize).min(64);
    kernel.read(0, &mut h[..len])?;
    let class64 = h[4] == 2;
    if h[5] != 1 || !(class64 || h[4] == 1) {
        return Err(kernel.image("not a little-endian ELF file; an x86-64 kernel is needed"));
    }
    if len < if class64 { 64 } else { 52 } {
        return Err(kernel.image("the ELF header is truncated"));
    }
    let machine = number(&h, 18, 2) as u16;
    if machine != EM_X86_64 && machine != EM_386 {
        return Err(kernel.image(format!(
            "it is built for {}; an x86-64 kernel is needed",
            match machine {
                183 => "arm64".into(),
                40 => "32-bit Arm".into(),
                243 => "RISC-V".into(),
                21 => "PowerPC64".into(),
                22 => "s390".into(),
                n => format!("another architecture (ELF machine {n})"),
            }
        )));
    }
    let (entry, phoff, phentsize, phnum) = if class64 {
        (number(&h, 24, 8), number(&h, 32, 8), number(&h, 54, 2), number(&h, 56, 2) as u16)
    } else {
        (number(&h, 24, 4), number(&h, 28, 4), number(&h, 42, 2), number(&h, 44, 2) as u16)
    };
    let want = if class64 { 56 } else { 32 };
    if phentsize != want || phnum == 0 || phnum > MAX_SEGMENTS {
        return Err(
            kernel.image("the ELF file has no usable program headers: it is not an executable kernel")
        );
    }
    let mut table = vec![0; want as usize * usize::from(phnum)];
    if phoff.checked_add(table.len() as u64).is_none_or(|end| end > kernel.len) {
        return Err(kernel.image("the ELF program headers lie outside the file: it is truncated"));
    }
    kernel.read(phoff, &mut table)?;
    let segments = table
        .chunks_exact(want as usize)
        .map(|p| {
            let kind = number(p, 0, 4) as u32;
            let f = |at64: usize, at32: usize| if class64 { number(p, at64, 8) } else { number(p, at32, 4) };
            Segment {
                kind,
                offset: f(8, 4),
                paddr: f(24, 12),
                file_len: f(32, 16),
                mem_len: f(40, 20),
                align: f(48, 28),
            }
        })
        .collect();
    Ok(Header { class64, machine, entry, segments })
}

pub(super) fn load(
    kernel: &Source<'_>,
    spec: &KernelSpec,
    memory: &GuestMemory,
    tables: &Tables,
) -> Result<Entry, KernelError> {
    let header = parse(kernel)?;
    let pvh_entry = pvh_note(kernel, &header)?;
    let mode = match (spec.entry, pvh_entry) {
        (None, Some(_)) => EntryMode::Pvh,
        (None, None) if header.class64 && header.machine == EM_X86_64 => EntryMode::Long,
        (None, None) => {
            return Err(
                kernel.image("a 32-bit ELF kernel without PVH note cannot be booted; give its bzImage")
            );
        }
        (Some(EntryMode::Pvh), None) => {
            return Err(kernel.image("it has no PVH note (build with CONFIG_PVH=y, or give the bzImage)"));
        }
        (Some(EntryMode::Protected), _) => return Err(kernel.image("entry=32 needs a bzImage")),
        (Some(EntryMode::Long), _) if !header.class64 => {
            return Err(kernel.image("entry=64 needs a 64-bit kernel"));
        }
        (Some(mode), _) => mode,
    };
    let mut end = place::HIGH;
    let mut loaded = false;
    for s in header.segments.iter().filter(|s| s.kind == PT_LOAD && s.mem_len > 0) {
        if s.file_len > s.mem_len || s.paddr.checked_add(s.mem_len).is_none() {
            return Err(kernel.image("an ELF segment has an impossible size"));
        }
        if s.paddr < place::HIGH {
            return Err(kernel.image(format!("a segment wants to be loaded at {:#x}, below 1 MiB", s.paddr)));
        }
        if memory.slice(s.paddr, s.mem_len).is_err() {
            return Err(KernelError::TooLarge(format!(
                "kernel '{}' needs RAM at {:#x}..{:#x}; the guest has {}: give it more with --memory",
                kernel.path.display(),
                s.paddr,
                s.paddr + s.mem_len,
                memory::format_size(memory.total())
            )));
        }
        // Fresh guest RAM is zero, so what follows the file's bytes (bss) need not be cleared at first boot; on a
        // reset the machine clears RAM before it loads again.
        kernel.load(s.offset, s.file_len, memory, s.paddr)?;
        end = end.max(s.paddr + s.mem_len);
        loaded = true;
    }
    if !loaded {
        return Err(kernel.image("the ELF file has nothing to load"));
    }
    let end = end.next_multiple_of(4096);
    // Linux allocates early page tables and its brk area right after itself; the initramfs goes to the top of RAM.
    let initrd = load_initrd(spec, memory, &tables.e820, end, 0x8000_0000)?;
    if mode == EntryMode::Pvh {
        let ip = pvh_entry.ok_or_else(|| kernel.image("it has no PVH note"))?;
        return pvh::finish(memory, tables, initrd, ip);
    }
    let mut page = ZeroPage::new();
    page.set_u16(0x1fe, 0xaa55);
    page.0[0x202..0x206].copy_from_slice(b"HdrS");
    page.set_u16(0x206, 0x20c);
    page.set_u8(0x211, 1);
    page.set_u32(0x230, 0x0100_0000);
    let rsi = page.finish(memory, tables, initrd)?;
    Ok(Entry::Long { ip: header.entry, rsi })
}

/// Entry point from the `XEN_ELFNOTE_PHYS32_ENTRY` note (type 18, name "Xen"), if there is one.
fn pvh_note(kernel: &Source<'_>, header: &Header) -> Result<Option<u64>, KernelError> {
    const MAX_NOTES: u64 = 1 << 20;
    const PHYS32_ENTRY: u64 = 18;
    for s in header.segments.iter().filter(|s| s.kind == PT_NOTE && s.file_len <= MAX_NOTES) {
        let mut notes = vec![0; s.file_len as usize];
        if s.offset.checked_add(s.file_len).is_none_or(|end| end > kernel.len) {
            return Err(kernel.image("an ELF note segment lies outside the file: it is truncated"));
        }
        kernel.read(s.offset, &mut notes)?;
        let align = if s.align == 8 { 8 } else { 4 };
        let mut at = 0usize;
        while at + 12 <= notes.len() {
            let (name_len, desc_len, kind) =
                (number(&notes, at, 4), number(&notes, at + 4, 4), number(&notes, at + 8, 4));
            if name_len > MAX_NOTES || desc_len > MAX_NOTES {
                break;
            }
            let name = at + 12;
            let desc = (name + name_len as usize).next_multiple_of(align);
            let next = (desc + desc_len as usize).next_multiple_of(align);
            if desc + desc_len as usize > notes.len() {
                break;
            }
            if kind == PHYS32_ENTRY && notes[name..].starts_with(b"Xen\0") && (desc_len == 4 || desc_len == 8)
            {
                return Ok(Some(number(&notes, desc, desc_len as usize)));
            }
            at = next;
        }
    }
    Ok(None)
}
