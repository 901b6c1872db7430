//! The PVH boot ABI (Xen, docs/misc/pvh.pandoc; `struct hvm_start_info` version 1).

use super::{E820, Entry, KernelError, Tables, place};
use memory::GuestMemory;
use zerocopy::{Immutable, IntoBytes};

const MAGIC: u32 = 0x336e_c578;
const MAX_MEMMAP: usize = 64;

#[repr(C)]
#[derive(IntoBytes, Immutable, Default)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    module_list: u64,
    cmdline: u64,
    rsdp: u64,
    memmap: u64,
    memmap_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(IntoBytes, Immutable, Default)]
struct Module {
    start: u64,
    len: u64,
    cmdline: u64,
    reserved: u64,
}

#[repr(C)]
#[derive(IntoBytes, Immutable, Default)]
struct MemmapEntry {
    start: u64,
    len: u64,
    kind: u32,
    reserved: u32,
}

pub(super) fn finish(
    memory: &GuestMemory,
    tables: &Tables,
    initrd: (u64, u64),
    ip: u64,
) -> Result<Entry, KernelError> {
    let count = tables.e820.len().min(MAX_MEMMAP);
    let info = StartInfo {
        magic: MAGIC,
        version: 1,
        module_count: u32::from(initrd.1 != 0),
        module_list: place::PVH_MODULES,
        cmdline: place::CMDLINE,
        rsdp: tables.rsdp.unwrap_or(0),
        memmap: place::PVH_MEMMAP,
        memmap_entries: count as u32,
        ..Default::default()
    };
    let module = Module { start: initrd.0, len: initrd.1, ..Default::default() };
    let write = || -> memory::Result<()> {
        memory.write_obj(place::PVH_START_INFO, &info)?;
        memory.write_obj(place::PVH_MODULES, &module)?;
        for (i, E820 { start, len, kind }) in tables.e820.iter().take(count).copied().enumerate() {
            let entry = MemmapEntry { start, len, kind, reserved: 0 };
            memory.write_obj(place::PVH_MEMMAP + 24 * i as u64, &entry)?;
        }
        Ok(())
    };
    write().map_err(|e| KernelError::TooLarge(e.to_string()))?;
    Ok(Entry::Protected { ip, esi: 0, ebx: place::PVH_START_INFO })
}
