//! The accelerator's front door.

use crate::vm::SoftVm;
use accel::{Accel, Cpuid, Result, Vm};
use std::sync::Arc;

/// The software CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoftAccel;

impl SoftAccel {
    /// The accelerator. It is there on every x86-64 host.
    pub fn new() -> Self {
        Self
    }
}

impl Accel for SoftAccel {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn supported_cpuid(&self) -> Result<Cpuid> {
        Ok(crate::cpuid::supported())
    }

    fn max_vcpus(&self) -> u32 {
        255
    }

    fn create_vm(&self) -> Result<Arc<dyn Vm>> {
        Ok(Arc::new(SoftVm::new()))
    }
}
