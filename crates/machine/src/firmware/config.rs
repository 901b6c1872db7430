//! What the firmware configuration device tells.

use super::loader::{self, Script};
use super::{BootSpec, Bootable, boot_order};
use crate::acpi::{self, Blob};
use crate::topology::Topology;
use crate::{Error, Result};
use devices::chipset::FwCfgItems;
use devices::chipset::fw_cfg::{Bytes, key};
use memory::GuestMemory;
use schemars::JsonSchema;
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::Arc;

/// `--fw-cfg name=,string=|file=`: a file of the user's for firmware and guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct FwCfgSpec {
    /// Name; users' own begin with `opt/`.
    pub name: String,
    /// The contents as text.
    pub string: Option<String>,
    /// The file that has the contents.
    pub file: Option<PathBuf>,
}

impl FwCfgSpec {
    fn contents(&self) -> Result<Bytes> {
        match (&self.string, &self.file) {
            (Some(text), None) => Ok(Arc::new(text.clone().into_bytes())),
            (None, Some(path)) => {
                let fail =
                    |source| Error::Host { what: format!("firmware file '{}'", path.display()), source };
                // Read, not mapped: a file that shrinks while the machine runs must not end it.
                Ok(Arc::new(std::fs::read(path).map_err(fail)?))
            }
            _ => Err(Error::Config(format!("firmware file '{}': give either string= or file=", self.name))),
        }
    }
}

/// What the items are made from.
pub(crate) struct Facts<'a> {
    pub(crate) topology: &'a Topology,
    pub(crate) memory: &'a GuestMemory,
    pub(crate) graphics: bool,
    /// The timer's interrupt is input 2 of the IOAPIC.
    pub(crate) irq0_override: bool,
    /// ACPI tables, unless the machine has none.
    pub(crate) acpi: Option<&'a Blob>,
    /// SMBIOS entry point and structures.
    pub(crate) smbios: (Vec<u8>, Vec<u8>),
    pub(crate) uuid: Option<[u8; 16]>,
    pub(crate) boot: &'a BootSpec,
    pub(crate) bootable: &'a [Bootable],
    pub(crate) files: &'a [FwCfgSpec],
    /// The GUID by which guests notice that they were cloned or went back in time.
    pub(crate) generation_id: Option<[u8; 16]>,
}

/// The memory map that firmware completes: RAM, and what the accelerator keeps for itself.
pub fn bios_memory_map(memory: &GuestMemory) -> Vec<u8> {
    let mut map = Vec::new();
    let mut add = |start: u64, len: u64, kind: u32| {
        map.extend(start.to_le_bytes());
        map.extend(len.to_le_bytes());
        map.extend(kind.to_le_bytes());
    };
    add(accel::kvm::RESERVED_START, accel::kvm::RESERVED_END - accel::kvm::RESERVED_START, 2);
    for region in memory.regions() {
        add(region.start, region.len(), 1);
    }
    map
}

/// All items.
///
/// # Errors
/// Users' files that are missing, or names that cannot be.
pub(crate) fn items(facts: &Facts<'_>) -> Result<FwCfgItems> {
    let mut items = FwCfgItems::new();
    items.set(key::UUID, facts.uuid.unwrap_or_default().to_vec());
    items.set(key::RAM_SIZE, facts.memory.total().to_le_bytes().to_vec());
    items.set_u16(key::NO_GRAPHIC, u16::from(!facts.graphics));
    items.set_u16(key::CPUS, facts.topology.count() as u16); // the accelerators have fewer
    let highest = facts.topology.apic_ids().max().unwrap_or(0);
    items.set_u16(key::MAX_CPUS, u16::try_from(highest + 1).unwrap_or(u16::MAX));
    items.set_u16(key::BOOT_MENU, facts.boot.menu.into());
    items.set_u32(key::IRQ0_OVERRIDE, facts.irq0_override.into());

    let mut add = |name: &str, bytes: Vec<u8>| items.add(name, bytes).map_err(Error::Config);
    add("etc/e820", bios_memory_map(facts.memory))?;
    // Sleep types of S0 to S5, with bit 7 for those that there are: S0 and S5.
    add("etc/system-states", vec![0x80, 0, 0, 1, 2, 0x80])?;
    let (entry, structures) = &facts.smbios;
    add("etc/smbios/smbios-anchor", entry.clone())?;
    add("etc/smbios/smbios-tables", structures.clone())?;
    add("bootorder", boot_order(facts.boot, facts.bootable, true))?;
    if let Some(wait) = facts.boot.splash_time {
        add("etc/boot-menu-wait", wait.to_le_bytes().to_vec())?;
    }
    if let Some(wait) = facts.boot.reboot_timeout {
        add("etc/boot-fail-wait", wait.to_le_bytes().to_vec())?;
    }
    let mut script = Script::default();
    if let Some(blob) = facts.acpi {
        add(loader::TABLES, blob.bytes.clone())?;
        add(loader::RSDP, blob.rsdp(acpi::OEM_ID))?;
        loader::place_tables(&mut script, blob);
    }
    if let Some(guid) = facts.generation_id {
        add(GENERATION_ID, generation_page(guid))?;
        items.add_writable(GENERATION_ADDRESS, vec![0; 8]).map_err(Error::Config)?;
        script.allocate(GENERATION_ID, 4096, loader::Zone::High);
        script.write_pointer(GENERATION_ADDRESS, 0, GENERATION_ID, GENERATION_OFFSET, 8);
    }
    items.add(loader::SCRIPT, script.finish()).map_err(Error::Config)?;
    for file in facts.files {
        items.add_shared(&file.name, file.contents()?).map_err(Error::Config)?;
    }
    Ok(items)
}

/// The file that holds the generation ID, and the one in which firmware says where it put that.
pub(crate) const GENERATION_ID: &str = "etc/vmgenid_guid";
/// See [`GENERATION_ID`].
pub(crate) const GENERATION_ADDRESS: &str = "etc/vmgenid_addr";
/// Where in its page the GUID is: firmware that looks for tables must not take it for one.
pub(crate) const GENERATION_OFFSET: u32 = 40;

fn generation_page(guid: [u8; 16]) -> Vec<u8> {
    let mut page = vec![0; 4096];
    page[GENERATION_OFFSET as usize..][..16].copy_from_slice(&guid);
    page
}
