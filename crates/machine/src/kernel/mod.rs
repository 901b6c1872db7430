//! Direct kernel boot: puts a Linux kernel, its initramfs and command line into guest memory, and says in which
//! state the bootstrap processor enters it.

mod bzimage;
mod elf;
mod entry;
mod pvh;
#[cfg(test)]
mod tests;
mod zero_page;

use memory::{FileView, GuestMemory};
use schemars::JsonSchema;
use serde::Deserialize;
use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub use entry::Entry;

/// What to boot.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct KernelSpec {
    /// Kernel image: a bzImage, or an ELF `vmlinux` (entered by PVH if it has the note).
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub append: String,
    /// How to enter the kernel; chosen by what the image offers if not given.
    pub entry: Option<EntryMode>,
}

/// Ways to enter a Linux kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EntryMode {
    /// 32-bit protected mode without paging (Linux x86 boot protocol, "32-bit boot protocol").
    #[serde(rename = "32")]
    Protected,
    /// 64-bit mode with identity-mapped pages (Linux x86 boot protocol, "64-bit boot protocol").
    #[serde(rename = "64")]
    Long,
    /// Xen's PVH entry: 32-bit protected mode, start info in EBX.
    Pvh,
}

/// A kernel that cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file that cannot be opened or read.
    #[error("cannot read {what} '{}': {source}", path.display())]
    File {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// The image is not usable; the text says why.
    #[error("kernel '{}': {reason}", path.display())]
    Image {
        /// Path of the kernel.
        path: PathBuf,
        /// What is wrong, and what would do.
        reason: String,
    },
    /// Something does not fit into guest memory.
    #[error("{0}")]
    TooLarge(String),
}

/// Where the firmware-like data of a direct boot goes.
#[derive(Clone, Debug)]
pub struct Tables {
    /// Guest physical address of the ACPI RSDP, if the machine has ACPI.
    pub rsdp: Option<u64>,
    /// Address ranges of RAM and reserved areas, as e820 gives them.
    pub e820: Vec<E820>,
    /// There is a VGA in text mode 3, as a video BIOS leaves it.
    pub text_screen: bool,
}

/// One entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820 {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Type: 1 RAM, 2 reserved, 3 ACPI data.
    pub kind: u32,
}

impl E820 {
    /// Usable RAM.
    pub const RAM: u32 = 1;
    /// Reserved.
    pub const RESERVED: u32 = 2;
    /// ACPI tables.
    pub const ACPI: u32 = 3;
}

/// Guest physical addresses of what the loader itself places, all in the first 640 KiB.
mod place {
    pub(super) const GDT: u64 = 0x500;
    pub(super) const ZERO_PAGE: u64 = 0x7000;
    pub(super) const PVH_START_INFO: u64 = 0x6000;
    pub(super) const PVH_MODULES: u64 = 0x6040;
    pub(super) const PVH_MEMMAP: u64 = 0x6100;
    pub(super) const PAGE_TABLES: u64 = 0x9000;
    pub(super) const CMDLINE: u64 = 0x2_0000;
    pub(super) const CMDLINE_MAX: u64 = 0x1_0000;
    pub(super) const HIGH: u64 = 0x10_0000;
}

/// A file being loaded, with its role for messages.
struct Source<'a> {
    what: &'static str,
    path: &'a Path,
    file: File,
    len: u64,
    view: OnceCell<FileView>,
}

impl<'a> Source<'a> {
    fn open(what: &'static str, path: &'a Path) -> Result<Self, KernelError> {
        let fail = |source| KernelError::File { what, path: path.into(), source };
        let file = File::open(path).map_err(fail)?;
        let meta = file.metadata().map_err(fail)?;
        if !meta.is_file() {
            return Err(fail(io::Error::other("not a regular file")));
        }
        Ok(Self { what, path, file, len: meta.len(), view: OnceCell::new() })
    }

    fn error(&self, source: io::Error) -> KernelError {
        KernelError::File { what: self.what, path: self.path.into(), source }
    }

    fn image(&self, reason: impl Into<String>) -> KernelError {
        KernelError::Image { path: self.path.into(), reason: reason.into() }
    }

    /// Reads exactly `buf.len()` bytes at `offset`.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), KernelError> {
        self.file.read_exact_at(buf, offset).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => self.image(format!(
                "the file is truncated: {} bytes, needs {}",
                self.len,
                offset + buf.len() as u64
            )),
            _ => self.error(e),
        })
    }

    /// Copies `len` bytes at `offset` of the file to guest memory.
    fn load(&self, offset: u64, len: u64, memory: &GuestMemory, gpa: u64) -> Result<(), KernelError> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(self.image(format!(
                "the file is truncated: {} bytes, needs {}",
                self.len,
                offset.saturating_add(len)
            )));
        }
        if len == 0 {
            return Ok(());
        }
        let slice = memory.slice(gpa, len).map_err(|_| {
            KernelError::TooLarge(format!(
                "{} '{}' does not fit into {} of guest memory (needs {:#x}..{:#x}); give the guest more with --memory",
                self.what,
                self.path.display(),
                memory::format_size(memory.total()),
                gpa,
                gpa.saturating_add(len)
            ))
        })?;
        // RAM is fresh (or was cleared), so zeros need not be copied.
        let view = match self.view.get() {
            Some(view) => view,
            None => {
                let view = FileView::new(&self.file, self.len).map_err(|e| self.error(e))?;
                self.view.get_or_init(|| view)
            }
        };
        slice.copy_sparse(&view[offset as usize..(offset + len) as usize]);
        Ok(())
    }
}

/// Loads everything and returns how to enter.
///
/// # Errors
/// [`KernelError`]; guest memory may then be partly written.
pub fn load(spec: &KernelSpec, memory: &GuestMemory, tables: &Tables) -> Result<Entry, KernelError> {
    let kernel = Source::open("kernel", &spec.kernel)?;
    let mut head = [0u8; 4];
    if kernel.len < 4 {
        return Err(kernel.image("the file is too short to be a kernel"));
    }
    kernel.read(0, &mut head)?;
    let cmdline = command_line(&spec.append)?;
    memory.write(place::CMDLINE, &cmdline).map_err(|e| KernelError::TooLarge(e.to_string()))?;
    if &head == b"\x7fELF" {
        elf::load(&kernel, spec, memory, tables)
    } else {
        bzimage::load(&kernel, spec, memory, tables)
    }
}

fn command_line(text: &str) -> Result<Vec<u8>, KernelError> {
    if text.len() as u64 >= place::CMDLINE_MAX || text.contains('\0') {
        return Err(KernelError::TooLarge(format!(
            "the kernel command line is {} bytes long, more than the {} possible, or contains a NUL",
            text.len(),
            place::CMDLINE_MAX - 1
        )));
    }
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    Ok(bytes)
}

/// Loads the initramfs as high as possible below `limit` in low RAM, page-aligned, above `kernel_end`. Returns its
/// address and length, `(0, 0)` if there is none.
fn load_initrd(
    spec: &KernelSpec,
    memory: &GuestMemory,
    e820: &[E820],
    kernel_end: u64,
    limit: u64,
) -> Result<(u64, u64), KernelError> {
    let Some(path) = &spec.initrd else { return Ok((0, 0)) };
    let source = Source::open("initrd", path)?;
    let ram_end = e820
        .iter()
        .filter(|e| e.kind == E820::RAM && e.start <= place::HIGH && e.start + e.len > place::HIGH)
        .map(|e| e.start + e.len)
        .next()
        .unwrap_or(0);
    let end = ram_end.min(limit);
    let start = end.checked_sub(source.len).map(|s| s & !0xfff).filter(|s| *s >= kernel_end).ok_or_else(|| {
        KernelError::TooLarge(format!(
            "initrd '{}' ({}) does not fit into {} of guest memory beside the kernel; give the guest more with --memory",
            path.display(),
            memory::format_size(source.len),
            memory::format_size(memory.total())
        ))
    })?;
    source.load(0, source.len, memory, start)?;
    Ok((start, source.len))
}
