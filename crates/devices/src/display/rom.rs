//! Option ROMs of display devices: the video BIOS, which comes with the distribution's SeaBIOS package.

use crate::CreateError;
use accel::Vm;
use bus::RamWindow;
use bus::pci::Config;
use memory::{Backing, Region};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where packages put video BIOSes.
const DIRECTORIES: &[&str] = &[
    "/usr/share/seabios",
    "/usr/share/qemu",
    "/usr/share/vgabios",
    "/usr/share/qemu-kvm",
    "/usr/local/share/qemu",
];

/// Largest ROM, in bytes.
const MOST: u64 = 1 << 20;

/// An option ROM's contents.
pub struct OptionRom(Vec<u8>);

impl OptionRom {
    /// Reads the ROM of a device: `romfile=` if given (empty: none), otherwise `standard` from where packages put it.
    /// A standard ROM that is not installed is done without, and a line in the log says so.
    ///
    /// # Errors
    /// A given file that cannot be read or is no option ROM.
    pub fn load(device: &str, romfile: Option<&str>, standard: &str) -> Result<Option<Self>, CreateError> {
        let path = match romfile {
            Some("") => return Ok(None),
            Some(path) => PathBuf::from(path),
            None => match DIRECTORIES.iter().map(|d| Path::new(d).join(standard)).find(|p| p.is_file()) {
                Some(path) => path,
                None => {
                    tracing::info!(
                        "{device}: no {standard} on this host (package seabios): BIOS text output stays dark"
                    );
                    return Ok(None);
                }
            },
        };
        let wrong =
            |why: String| CreateError::Other(format!("{device}: option ROM '{}': {why}", path.display()));
        let length = path.metadata().map_err(|e| wrong(e.to_string()))?.len();
        if length > MOST {
            return Err(wrong(format!("{length} bytes are more than an option ROM has")));
        }
        let data = std::fs::read(&path).map_err(|e| wrong(e.to_string()))?;
        if !data.starts_with(&[0x55, 0xaa]) {
            return Err(wrong("it does not begin with 55 aa, as option ROMs do".into()));
        }
        Ok(Some(Self(data)))
    }

    /// The contents.
    pub fn data(&self) -> &[u8] {
        &self.0
    }

    /// Shows it through the function's expansion ROM BAR.
    ///
    /// # Errors
    /// The host gives no memory.
    pub fn plug(&self, config: &mut Config, vm: Arc<dyn Vm>) -> Result<(), CreateError> {
        let size = (self.0.len() as u64).next_power_of_two().max(4096);
        let other = |e: memory::Error| CreateError::Other(e.to_string());
        let region = Region::new(0, size, &Backing::Anonymous, false).map_err(other)?;
        let window = RamWindow::new(config.name(), vm, region, true, false);
        window.memory().write(0, &self.0).map_err(other)?;
        config.add_rom(size as u32); // at most 1 MiB
        config.back_bar(6, window);
        Ok(())
    }

    /// The PC's character set of 256 glyphs of 8 by 16 pixels, a byte a row, where the ROM has it: it is known by its
    /// first two glyphs (nothing, and a face).
    pub fn font(&self) -> Option<&[u8; 4096]> {
        const FIRST: [u8; 32] = [
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, //
            0, 0, 0x7e, 0x81, 0xa5, 0x81, 0x81, 0xbd, 0x99, 0x81, 0x81, 0x7e, 0, 0, 0, 0,
        ];
        let at = self.0.windows(FIRST.len()).position(|w| w == FIRST)?;
        self.0.get(at..)?.first_chunk()
    }
}
