//! Devices and back ends that come and go while the machine exists.

use crate::topology::Topology;
use crate::{Error, Machine, Result, cpu};
use accel::Cpuid;
use base::props::Bag;
use bus::Chardev;
use std::sync::Arc;

impl Machine {
    /// Descriptions of the devices, in the order in which they were plugged.
    pub fn devices(&self) -> Vec<Bag> {
        self.built().plugged.iter().map(|p| p.bag.clone()).collect()
    }

    /// Where a device is on PCI: slot and function.
    pub fn pci_address(&self, id: &str) -> Option<(u8, u8)> {
        let plugged = self.built().plugged.iter().find(|p| p.bag.id.as_deref() == Some(id))?;
        plugged.pci.as_ref().map(|at| (at.slot, at.function))
    }

    /// How the vCPUs are arranged.
    pub fn topology(&self) -> Topology {
        self.built().acpi.topology
    }

    /// Name of the CPU model.
    pub fn cpu_model(&self) -> String {
        self.built().processor.model.clone()
    }

    /// What a vCPU could offer its guest here, without topology.
    pub fn supported_cpuid(&self) -> &Cpuid {
        &self.built().processor.supported
    }

    /// Features of the vCPUs, by QEMU's names, and whether the guest has them.
    pub fn cpu_features(&self) -> Vec<(String, bool)> {
        cpu::feature_list(&self.built().processor.cpuid).map(|(name, on)| (name.to_owned(), on)).collect()
    }

    /// Makes a character device available to devices that come later.
    pub fn add_chardev(&mut self, id: &str, chardev: Arc<dyn Chardev>) {
        self.built_mut().chardevs.insert(id.into(), chardev);
    }

    /// Takes back a character device that no device took.
    pub fn remove_chardev(&mut self, id: &str) {
        self.built_mut().chardevs.remove(id);
    }

    /// Plugs a device into the running machine.
    ///
    /// # Errors
    /// A description that makes no sense, or a place where nothing can be plugged now.
    pub fn add_device(&mut self, bag: &Bag) -> Result<()> {
        if let Some(id) = &bag.id
            && self.built().plugged.iter().any(|p| p.bag.id.as_deref() == Some(id))
        {
            return Err(Error::Config(format!("Duplicate device ID '{id}'")));
        }
        Err(Error::Config(format!(
            "{}: this machine has no bus that devices can be plugged into now",
            bag.driver
        )))
    }

    /// Asks the guest to give a device up; the notice `DEVICE_DELETED` tells when it has.
    ///
    /// # Errors
    /// There is no such device (an empty text), or it cannot be unplugged.
    pub fn remove_device(&mut self, id: &str) -> Result<()> {
        if !self.built().plugged.iter().any(|p| p.bag.id.as_deref() == Some(id)) {
            return Err(Error::Config(String::new()));
        }
        Err(Error::Config(format!("Device '{id}' cannot be unplugged: its bus does not support it")))
    }
}
