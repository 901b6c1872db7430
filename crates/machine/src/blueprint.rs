//! The one description of a VM: property bags. Every front door translates into it, and nothing else builds a VM.

use crate::Error;
use crate::control::Actions;
use crate::firmware::{BootSpec, FirmwareSpec, FwCfgSpec};
use crate::kernel::KernelSpec;
use crate::topology::SmpSpec;
use base::props::{Bag, SIZE_FORMAT};
use memory::Backing;
use schemars::JsonSchema;
use serde::Deserialize;
use std::path::PathBuf;

/// A VM, described.
#[derive(Clone, Debug)]
pub struct Blueprint {
    /// Name of the VM.
    pub name: String,
    /// Board: `q35` or `microvm`, with its options.
    pub machine: Bag,
    /// Accelerator: `auto`, `kvm` or `soft`, with its options.
    pub accel: Bag,
    /// Processor model and its features ([`crate::cpu`]).
    pub cpu: Bag,
    /// vCPUs and their topology.
    pub smp: SmpSpec,
    /// RAM.
    pub memory: MemorySpec,
    /// Kernel to boot directly.
    pub kernel: Option<KernelSpec>,
    /// Objects that others refer to: memory backends, secrets, I/O threads.
    pub objects: Vec<Bag>,
    /// What runs at power-on.
    pub firmware: FirmwareSpec,
    /// What firmware boots.
    pub boot: BootSpec,
    /// Users' files for firmware and guest.
    pub fw_cfg: Vec<FwCfgSpec>,
    /// Disk images, by id.
    pub blockdevs: Vec<Bag>,
    /// Network backends, by id.
    pub netdevs: Vec<Bag>,
    /// Devices, in the order in which they are plugged.
    pub devices: Vec<Bag>,
    /// Character device (by id) that each serial port is connected to.
    pub serials: Vec<String>,
    /// What to do when the guest resets itself, powers off, panics.
    pub actions: Actions,
    /// Do not let the vCPUs run before [`crate::Machine::resume`].
    pub paused: bool,
}

impl Default for Blueprint {
    fn default() -> Self {
        Self {
            name: "kvasir".into(),
            machine: Bag::new("q35"),
            accel: Bag::new("auto"),
            cpu: Bag::new("host"),
            smp: SmpSpec::default(),
            memory: MemorySpec::default(),
            kernel: None,
            objects: Vec::new(),
            firmware: FirmwareSpec::default(),
            boot: BootSpec::default(),
            fw_cfg: Vec::new(),
            blockdevs: Vec::new(),
            netdevs: Vec::new(),
            devices: Vec::new(),
            serials: Vec::new(),
            actions: Actions::default(),
            paused: false,
        }
    }
}

/// `--memory SIZE[,...]`.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct MemorySpec {
    /// Amount of RAM in bytes, or with a suffix (512M, 4G).
    #[schemars(extend("format" = SIZE_FORMAT))]
    pub size: u64,
    /// Share the memory with other processes (memfd).
    pub share: bool,
    /// Use huge pages from the host's pool.
    pub hugepages: bool,
    /// Huge page size (2M, 1G); the host's default if not given.
    #[schemars(extend("format" = SIZE_FORMAT))]
    pub hugepagesize: Option<u64>,
    /// File, or directory of a hugetlbfs mount, that holds the memory.
    pub path: Option<PathBuf>,
    /// Allocate everything at start.
    pub prealloc: bool,
}

impl Default for MemorySpec {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            share: false,
            hugepages: false,
            hugepagesize: None,
            path: None,
            prealloc: false,
        }
    }
}

impl MemorySpec {
    /// The backing this asks for.
    ///
    /// # Errors
    /// Options that contradict each other.
    pub fn backing(&self) -> Result<Backing, Error> {
        match (&self.path, self.hugepages) {
            (Some(_), true) => Err(Error::Config("memory: path= and hugepages=on exclude each other".into())),
            (Some(path), false) => Ok(Backing::File { path: path.clone(), shared: self.share }),
            (None, true) => Ok(Backing::HugeTlb { page_size: self.hugepagesize }),
            (None, false) if self.hugepagesize.is_some() => {
                Err(Error::Config("memory: hugepagesize= needs hugepages=on".into()))
            }
            (None, false) if self.share => Ok(Backing::Memfd),
            (None, false) => Ok(Backing::Anonymous),
        }
    }
}

/// Options of every board.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct BoardSpec {
    /// Have a high precision event timer (the software CPU's q35 only; KVM guests have better clocks).
    pub hpet: Option<bool>,
    /// Describe the machine by ACPI tables.
    pub acpi: Option<bool>,
    /// Have a display: off tells firmware to use the serial port. Follows whether there is a display device.
    pub graphics: Option<bool>,
    /// System management mode, which this machine does not have: only off is possible.
    pub smm: Option<bool>,
}

/// A disk image: `file=PATH,...` of a blockdev.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct BlockSpec {
    /// Path of the image.
    pub file: PathBuf,
    /// Format of the image; probed if not given.
    pub format: Option<String>,
    /// Open for reading only.
    pub read_only: bool,
    /// Open even if another process uses it.
    pub force_share: bool,
    /// Give what the guest discards back to the host.
    pub discard: bool,
    /// Cache mode: none, writeback, writethrough, directsync or unsafe.
    pub cache: Option<String>,
    /// What to do with zeros written: off, on or unmap.
    pub detect_zeroes: Option<String>,
    /// Write to a temporary file; the image stays as it is.
    pub snapshot: bool,
    /// More options, of the format, the storage (file.*) or a throttle (throttling.*), as key=value,...
    pub options: Option<String>,
}

impl Default for BlockSpec {
    fn default() -> Self {
        Self {
            file: PathBuf::new(),
            format: None,
            read_only: false,
            force_share: false,
            discard: true,
            cache: None,
            detect_zeroes: None,
            snapshot: false,
            options: None,
        }
    }
}
