//! Opening KVM.

use super::{cpuid, host, probe, vm::KvmVm};
use crate::{Accel, Cpuid, Error, Result, Vm};
use kvm_ioctls::{Cap, Kvm};
use std::sync::{Arc, OnceLock};

/// KVM on this host.
pub struct KvmAccel {
    kvm: Arc<Kvm>,
    /// Asked for once: it is among the slower ioctls.
    supported: OnceLock<Cpuid>,
}

impl KvmAccel {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] saying what is missing and how to get it.
    pub fn open() -> Result<Self> {
        let kvm = probe::open().map_err(|e| Error::Unavailable(probe::explain(&e)))?;
        // The youngest of the features relied upon (Linux 4.12); the others are older.
        if !kvm.check_extension(Cap::ImmediateExit) {
            return Err(Error::Unavailable(
                "the kernel's KVM is too old: Linux 4.12 or newer is needed".into(),
            ));
        }
        Ok(Self { kvm: Arc::new(kvm), supported: OnceLock::new() })
    }
}

impl Accel for KvmAccel {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn supported_cpuid(&self) -> Result<Cpuid> {
        if let Some(known) = self.supported.get() {
            return Ok(known.clone());
        }
        let cpuid = cpuid::supported(&self.kvm)?;
        Ok(self.supported.get_or_init(|| cpuid).clone())
    }

    fn max_vcpus(&self) -> u32 {
        u32::try_from(self.kvm.get_max_vcpus()).unwrap_or(u32::MAX)
    }

    fn create_vm(&self) -> Result<Arc<dyn Vm>> {
        let fd = self.kvm.create_vm().map_err(host("cannot create a KVM virtual machine"))?;
        Ok(Arc::new(KvmVm::new(self.kvm.clone(), fd)?))
    }
}
