//! `struct boot_params`, Linux's "zero page" (Documentation/arch/x86/zero-page.rst).

use super::{E820, KernelError, Tables, place};
use memory::GuestMemory;

pub(super) const SETUP_HEADER: usize = 0x1f1;
const EXT_RAMDISK_IMAGE: usize = 0x0c0;
const ACPI_RSDP_ADDR: usize = 0x070;
const E820_ENTRIES: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const E820_MAX: usize = 128;

/// Offsets in the zero page of fields of the setup header that the boot loader fills in.
pub(super) mod field {
    pub(crate) const VID_MODE: usize = 0x1fa;
    pub(crate) const TYPE_OF_LOADER: usize = 0x210;
    pub(crate) const LOADFLAGS: usize = 0x211;
    pub(crate) const RAMDISK_IMAGE: usize = 0x218;
    pub(crate) const RAMDISK_SIZE: usize = 0x21c;
    pub(crate) const HEAP_END_PTR: usize = 0x224;
    pub(crate) const CMD_LINE_PTR: usize = 0x228;
}

/// Offsets of `struct screen_info`, what a boot loader has found out by the video BIOS.
mod screen {
    pub(super) const MODE: usize = 0x06;
    pub(super) const COLUMNS: usize = 0x07;
    pub(super) const LINES: usize = 0x0e;
    pub(super) const IS_VGA: usize = 0x0f;
    pub(super) const POINTS: usize = 0x10;
}

/// A zero page being filled.
pub(super) struct ZeroPage(pub(super) [u8; 4096]);

impl ZeroPage {
    pub(super) fn new() -> Self {
        Self([0; 4096])
    }

    pub(super) fn set_u8(&mut self, at: usize, value: u8) {
        self.0[at] = value;
    }

    pub(super) fn set_u16(&mut self, at: usize, value: u16) {
        self.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    pub(super) fn set_u32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    pub(super) fn set_u64(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Fills in what every entry needs and writes the page to its place.
    pub(super) fn finish(
        mut self,
        memory: &GuestMemory,
        tables: &Tables,
        initrd: (u64, u64),
    ) -> Result<u64, KernelError> {
        const UNDEFINED_LOADER: u8 = 0xff;
        const NORMAL_VIDEO: u16 = 0xffff;
        self.set_u16(field::VID_MODE, NORMAL_VIDEO);
        self.set_u8(field::TYPE_OF_LOADER, UNDEFINED_LOADER);
        self.set_u32(field::CMD_LINE_PTR, place::CMDLINE as u32);
        self.set_u32(field::RAMDISK_IMAGE, initrd.0 as u32);
        self.set_u32(field::RAMDISK_SIZE, initrd.1 as u32);
        self.set_u32(EXT_RAMDISK_IMAGE, (initrd.0 >> 32) as u32);
        self.set_u32(EXT_RAMDISK_IMAGE + 4, (initrd.1 >> 32) as u32);
        self.set_u64(ACPI_RSDP_ADDR, tables.rsdp.unwrap_or(0));
        if tables.text_screen {
            self.set_u8(screen::MODE, 3);
            self.set_u8(screen::COLUMNS, 80);
            self.set_u8(screen::LINES, 25);
            self.set_u8(screen::IS_VGA, 1);
            self.set_u16(screen::POINTS, 16);
        }
        let count = tables.e820.len().min(E820_MAX);
        self.set_u8(E820_ENTRIES, count as u8);
        for (i, E820 { start, len, kind }) in tables.e820.iter().take(count).enumerate() {
            let at = E820_TABLE + 20 * i;
            self.set_u64(at, *start);
            self.set_u64(at + 8, *len);
            self.set_u32(at + 16, *kind);
        }
        memory.write(place::ZERO_PAGE, &self.0).map_err(|e| KernelError::TooLarge(e.to_string()))?;
        Ok(place::ZERO_PAGE)
    }
}
