//! What the device holds: numbered items, and files, which are items with a name in the directory.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Contents of an item: bytes, or a file that is mapped.
pub type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Numbers of the items that have no name (QEMU, include/standard-headers/linux/qemu_fw_cfg.h).
pub mod key {
    /// "QEMU".
    pub const SIGNATURE: u16 = 0x00;
    /// Features of the interface.
    pub const ID: u16 = 0x01;
    /// UUID of the system.
    pub const UUID: u16 = 0x02;
    /// RAM below 4 GiB in bytes, 64 bits.
    pub const RAM_SIZE: u16 = 0x03;
    /// Whether there is no display, 16 bits.
    pub const NO_GRAPHIC: u16 = 0x04;
    /// Number of processors that are present, 16 bits.
    pub const CPUS: u16 = 0x05;
    /// Address of the kernel, 32 bits.
    pub const KERNEL_ADDRESS: u16 = 0x07;
    /// Size of the kernel, 32 bits.
    pub const KERNEL_SIZE: u16 = 0x08;
    /// Address of the initramfs, 32 bits.
    pub const INITRD_ADDRESS: u16 = 0x0a;
    /// Size of the initramfs, 32 bits.
    pub const INITRD_SIZE: u16 = 0x0b;
    /// Whether firmware shows its boot menu, 16 bits.
    pub const BOOT_MENU: u16 = 0x0e;
    /// Number of processors there can be (one more than the highest APIC ID), 16 bits.
    pub const MAX_CPUS: u16 = 0x0f;
    /// The protected-mode part of the kernel.
    pub const KERNEL_DATA: u16 = 0x11;
    /// The initramfs.
    pub const INITRD_DATA: u16 = 0x12;
    /// Address of the command line, 32 bits.
    pub const CMDLINE_ADDRESS: u16 = 0x13;
    /// Length of the command line with its NUL, 32 bits.
    pub const CMDLINE_SIZE: u16 = 0x14;
    /// The command line.
    pub const CMDLINE_DATA: u16 = 0x15;
    /// Address of the real-mode part of the kernel, 32 bits.
    pub const SETUP_ADDRESS: u16 = 0x16;
    /// Size of the real-mode part, 32 bits.
    pub const SETUP_SIZE: u16 = 0x17;
    /// The real-mode part.
    pub const SETUP_DATA: u16 = 0x18;
    /// Directory of files.
    pub const DIRECTORY: u16 = 0x19;
    /// Number of the first file.
    pub const FIRST_FILE: u16 = 0x20;
    /// Whether the timer's interrupt goes to IOAPIC input 2, 32 bits.
    pub const IRQ0_OVERRIDE: u16 = 0x8002;
}

/// The selector has no more numbers than these.
const LAST_FILE: u16 = 0x3fff;
/// Longest name of a file, without its NUL.
const NAME_MAX: usize = 55;

/// An item.
pub(super) struct Item {
    bytes: Bytes,
    /// What reset goes back to, if the guest may write.
    power_on: Option<Bytes>,
    name: Option<String>,
}

impl Item {
    pub(super) fn bytes(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }

    pub(super) fn len(&self) -> usize {
        self.bytes().len()
    }

    pub(super) fn set(&mut self, bytes: impl Into<Bytes>) {
        self.bytes = bytes.into();
    }

    pub(super) fn is_writable(&self) -> bool {
        self.power_on.is_some()
    }

    /// Overwrites part of a writable item. Returns whether all of it fits.
    pub(super) fn write(&mut self, at: usize, data: &[u8]) -> bool {
        let mut bytes = self.bytes().to_vec();
        let place = at.checked_add(data.len()).and_then(|end| bytes.get_mut(at..end));
        let (true, Some(place)) = (self.is_writable(), place) else { return false };
        place.copy_from_slice(data);
        self.bytes = Arc::new(bytes);
        true
    }

    pub(super) fn reset(&mut self) {
        if let Some(bytes) = &self.power_on {
            self.bytes = bytes.clone();
        }
    }
}

/// Items being collected for a device.
#[derive(Default)]
pub struct FwCfgItems {
    numbered: BTreeMap<u16, Bytes>,
    files: BTreeMap<String, (Bytes, bool)>,
}

impl FwCfgItems {
    /// Nothing but what tells the interface.
    pub fn new() -> Self {
        const TRADITIONAL_AND_DMA: u32 = 0b11;
        let mut items = Self::default();
        items.set(key::SIGNATURE, b"QEMU".to_vec());
        items.set_u32(key::ID, TRADITIONAL_AND_DMA);
        items
    }

    /// Sets a numbered item.
    pub fn set(&mut self, key: u16, bytes: Vec<u8>) {
        self.numbered.insert(key, Arc::new(bytes));
    }

    /// Sets a numbered item to something shared.
    pub fn set_shared(&mut self, key: u16, bytes: Bytes) {
        self.numbered.insert(key, bytes);
    }

    /// Sets a numbered 16-bit item.
    pub fn set_u16(&mut self, key: u16, value: u16) {
        self.set(key, value.to_le_bytes().to_vec());
    }

    /// Sets a numbered 32-bit item.
    pub fn set_u32(&mut self, key: u16, value: u32) {
        self.set(key, value.to_le_bytes().to_vec());
    }

    /// Adds a file.
    ///
    /// # Errors
    /// A name that is empty, too long or taken, or too many files: one line.
    pub fn add(&mut self, name: &str, bytes: Vec<u8>) -> Result<(), String> {
        self.insert(name, Arc::new(bytes), false)
    }

    /// Adds a file whose contents are shared.
    ///
    /// # Errors
    /// As for [`Self::add`].
    pub fn add_shared(&mut self, name: &str, bytes: Bytes) -> Result<(), String> {
        self.insert(name, bytes, false)
    }

    /// Adds a file that the guest may write; a reset restores it.
    ///
    /// # Errors
    /// As for [`Self::add`].
    pub fn add_writable(&mut self, name: &str, bytes: Vec<u8>) -> Result<(), String> {
        self.insert(name, Arc::new(bytes), true)
    }

    fn insert(&mut self, name: &str, bytes: Bytes, writable: bool) -> Result<(), String> {
        if name.is_empty() || name.len() > NAME_MAX || name.contains('\0') {
            return Err(format!("firmware file name '{name}' is empty or longer than {NAME_MAX} bytes"));
        }
        if u32::try_from((*bytes).as_ref().len()).is_err() {
            return Err(format!("firmware file '{name}' is larger than 4 GiB"));
        }
        if self.files.len() >= usize::from(LAST_FILE - key::FIRST_FILE) {
            return Err(format!("firmware file '{name}': there are too many"));
        }
        if self.files.contains_key(name) {
            return Err(format!("firmware file '{name}' is given twice"));
        }
        self.files.insert(name.into(), (bytes, writable));
        Ok(())
    }

    /// Numbers the files, by name as firmware expects, and writes the directory.
    pub(super) fn finish(self) -> BTreeMap<u16, Item> {
        let numbered = self.numbered.into_iter();
        let mut items: BTreeMap<u16, Item> =
            numbered.map(|(key, bytes)| (key, Item { bytes, power_on: None, name: None })).collect();
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec(); // `insert` bounds it
        for (key, (name, (bytes, writable))) in (key::FIRST_FILE..).zip(self.files) {
            let len = (*bytes).as_ref().len() as u32; // `insert` bounds it
            directory.extend(len.to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0, 0]);
            let mut field = [0; NAME_MAX + 1];
            field[..name.len()].copy_from_slice(name.as_bytes());
            directory.extend(field);
            let power_on = writable.then(|| bytes.clone());
            items.insert(key, Item { bytes, power_on, name: Some(name) });
        }
        items.insert(key::DIRECTORY, Item { bytes: Arc::new(directory), power_on: None, name: None });
        items
    }
}

pub(super) fn key_of(items: &BTreeMap<u16, Item>, name: &str) -> Option<u16> {
    items.iter().find(|(_, i)| i.name.as_deref() == Some(name)).map(|(key, _)| *key)
}
