//! Firmware: where its files are, how the guest sees them, and what it is told.

mod config;
mod loader;
mod order;
mod vars;

pub use config::{FwCfgSpec, bios_memory_map};
pub use order::{BootSpec, Bootable};

pub(crate) use config::{Facts, items};
pub(crate) use order::boot_order;

use crate::{Error, Result};
use accel::{Slot, Vm};
use bus::{Bus, RegionId, SharedDevice, Space, shared};
use devices::chipset::Flash;
use memory::{Backing, GuestMemory, Region};
use schemars::JsonSchema;
use serde::Deserialize;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What runs at power-on: `--firmware KIND[,vars=FILE]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct FirmwareSpec {
    /// `auto` (SeaBIOS unless a kernel is given), `bios`, `uefi`, `none`, or the path of a ROM or flash image.
    pub kind: String,
    /// UEFI's variable store; made from the firmware's template if the file does not exist. Without it, variables
    /// last as long as the machine.
    pub vars: Option<PathBuf>,
    /// Template of the variable store, where the firmware is given as a path.
    pub vars_template: Option<PathBuf>,
}

impl Default for FirmwareSpec {
    fn default() -> Self {
        Self { kind: "auto".into(), vars: None, vars_template: None }
    }
}

/// SeaBIOS, where distributions put it.
const BIOS: [&str; 3] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/bios-256k.bin",
    "/usr/share/seavgabios/bios-256k.bin",
];
/// OVMF with its template of variables.
const UEFI: [(&str, &str); 5] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
];

/// Firmware may take this much below 4 GiB.
const LARGEST: u64 = 16 << 20;
const SMALLEST: u64 = 64 << 10;

/// Firmware, read.
#[derive(Debug)]
pub(crate) enum Firmware {
    /// A ROM.
    Rom(Vec<u8>),
    /// UEFI in flash: code that does not change, and variables.
    Flash {
        /// Contents of the upper chip.
        code: Vec<u8>,
        /// Contents of the chip below it and the file that keeps them; none if the code brings its own.
        vars: Option<vars::Vars>,
    },
}

impl FirmwareSpec {
    /// What there is to run before the kernel or the disk, if anything.
    ///
    /// # Errors
    /// Files that are missing or make no sense: one line.
    pub(crate) fn open(&self, direct_kernel: bool) -> Result<Option<Firmware>> {
        let firmware = match self.kind.as_str() {
            "none" => None,
            "auto" if direct_kernel => None,
            "auto" | "bios" => Some(Firmware::Rom(read(&find_bios()?)?)),
            "uefi" => {
                let (code, template) = find_uefi()?;
                Some(self.flash(&code, Some(&template))?)
            }
            path => Some(self.by_path(Path::new(path))?),
        };
        if self.vars.is_some() && !matches!(firmware, Some(Firmware::Flash { vars: Some(_), .. })) {
            return Err(Error::Config(format!(
                "--firmware {}: only UEFI firmware without variables of its own has a variable store; leave out vars=",
                self.kind
            )));
        }
        Ok(firmware)
    }

    fn by_path(&self, path: &Path) -> Result<Firmware> {
        if !path.exists() && !path.to_string_lossy().contains('/') {
            return Err(Error::Config(format!(
                "--firmware {}: use bios, uefi, none or the path of a file",
                path.display()
            )));
        }
        let head = read(path)?;
        // A UEFI firmware volume has its signature at 0x28 (UEFI Platform Initialization specification, 3.2.1).
        if head.get(0x28..0x2c) != Some(b"_FVH") {
            return Ok(Firmware::Rom(head));
        }
        match (&self.vars, &self.vars_template) {
            (None, None) => Ok(Firmware::Flash { code: head, vars: None }),
            (_, template) => self.flash(path, template.as_deref()),
        }
    }

    fn flash(&self, code: &Path, template: Option<&Path>) -> Result<Firmware> {
        let vars = vars::open(self.vars.as_deref(), template)?;
        Ok(Firmware::Flash { code: read(code)?, vars: Some(vars) })
    }
}

fn find_bios() -> Result<PathBuf> {
    BIOS.iter().map(PathBuf::from).find(|p| p.exists()).ok_or_else(|| {
        Error::Config(format!(
            "there is no BIOS at {}: install the package 'seabios', or give --firmware FILE or --kernel",
            BIOS[0]
        ))
    })
}

fn find_uefi() -> Result<(PathBuf, PathBuf)> {
    let both = |(code, vars): &&(&str, &str)| Path::new(code).exists() && Path::new(vars).exists();
    UEFI.iter().find(both).map(|(code, vars)| (code.into(), vars.into())).ok_or_else(|| {
        Error::Config(format!(
            "there is no UEFI firmware at {}: install the package 'ovmf', or give --firmware FILE",
            UEFI[0].0
        ))
    })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let fail = |source| Error::Host { what: format!("cannot read firmware '{}'", path.display()), source };
    let file = File::open(path).map_err(fail)?;
    let mut bytes = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(fail)?;
    check_size(path, bytes.len() as u64)?;
    Ok(bytes)
}

fn check_size(path: &Path, len: u64) -> Result<()> {
    if (SMALLEST..=LARGEST).contains(&len) && len.is_multiple_of(memory::PAGE_SIZE) {
        return Ok(());
    }
    Err(Error::Config(format!(
        "firmware '{}' is {len} bytes long: it must be 64 KiB to 16 MiB, in whole pages",
        path.display()
    )))
}

/// Puts firmware below 4 GiB. Returns the region in which the reset vector lies, and the flash chips.
pub(crate) fn install(
    firmware: &Firmware,
    vm: &Arc<dyn Vm>,
    bus: &Bus,
) -> Result<(Region, Vec<SharedDevice>)> {
    let mut chips = Vec::new();
    let mut chip = |region: &Region, store, readonly| -> Result<()> {
        let flash = shared(Flash::new(vm.clone(), region.clone(), store, readonly)?);
        bus.map(Space::Memory, region.start, region.len(), "pflash", &flash, RegionId(0))?;
        chips.push(flash as SharedDevice);
        Ok(())
    };
    let code = match firmware {
        Firmware::Rom(code) => {
            let region = region_below(1 << 32, code)?;
            let Region { start, .. } = region;
            let len = region.len();
            vm.map(Slot { gpa: start, len, region: region.clone(), offset: 0, readonly: true })?;
            region
        }
        Firmware::Flash { code, vars: None } => {
            let region = region_below(1 << 32, code)?;
            chip(&region, None, false)?;
            region
        }
        Firmware::Flash { code, vars: Some(vars) } => {
            let region = region_below(1 << 32, code)?;
            chip(&region, None, true)?;
            let store = vars.store.as_ref().map(File::try_clone).transpose();
            let store = store.map_err(|source| Error::Host { what: "firmware variables".into(), source })?;
            chip(&region_below(region.start, &vars.contents)?, store, false)?;
            region
        }
    };
    Ok((code, chips))
}

fn region_below(end: u64, contents: &[u8]) -> Result<Region> {
    let len = contents.len() as u64;
    let region = Region::new(end - len, len, &Backing::Anonymous, false)?;
    GuestMemory::from_regions(vec![region.clone()]).write(region.start, contents)?;
    Ok(region)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(kind: &str) -> FirmwareSpec {
        FirmwareSpec { kind: kind.into(), ..FirmwareSpec::default() }
    }

    #[test]
    fn kinds() {
        assert!(spec("none").open(false).unwrap().is_none());
        assert!(spec("auto").open(true).unwrap().is_none());
        let e = spec("bois").open(false).unwrap_err().to_string();
        assert!(e.contains("use bios, uefi, none"), "{e}");
        let e = spec("/nowhere/bios.bin").open(false).unwrap_err().to_string();
        assert!(e.contains("'/nowhere/bios.bin'"), "{e}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rom");
        std::fs::write(&path, vec![0; 1000]).unwrap();
        let e = spec(path.to_str().unwrap()).open(false).unwrap_err().to_string();
        assert!(e.contains("1000 bytes"), "{e}");
        std::fs::write(&path, vec![0x90; 64 << 10]).unwrap();
        assert!(
            matches!(spec(path.to_str().unwrap()).open(true).unwrap(), Some(Firmware::Rom(r)) if r.len() == 65536)
        );
        let odd = FirmwareSpec { vars: Some(dir.path().join("v")), ..spec(path.to_str().unwrap()) };
        assert!(odd.open(false).unwrap_err().to_string().contains("leave out vars="));
        let mut fv = vec![0; 128 << 10];
        fv[0x28..0x2c].copy_from_slice(b"_FVH");
        std::fs::write(&path, &fv).unwrap();
        let flash = spec(path.to_str().unwrap()).open(false).unwrap();
        assert!(matches!(flash, Some(Firmware::Flash { vars: None, .. })));
        let template = dir.path().join("template");
        std::fs::write(&template, &fv).unwrap();
        let kept = FirmwareSpec { vars_template: Some(template), ..odd };
        let Some(Firmware::Flash { vars: Some(vars), .. }) = kept.open(false).unwrap() else { panic!() };
        assert_eq!((vars.contents, vars.store.is_some()), (fv, true));
        drop(vars.store);
        assert!(dir.path().join("v").exists());
        assert!(kept.open(false).is_ok(), "the first one let go of it");
    }
}
