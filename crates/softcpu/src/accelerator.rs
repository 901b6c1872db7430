//! The accelerator's front door.

use crate::vm::SoftVm;
use accel::{Accel, Cpuid, Error, Result, Vm};
use schemars::JsonSchema;
use serde::Deserialize;
use std::sync::Arc;

/// Properties of the software CPU.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct SoftSpec {
    /// Translate hot 64-bit guest code into host code; off: interpret everything. Without it: on if the host lets us
    /// execute generated code.
    pub translate: Option<bool>,
    /// Most memory that translated code may take, for each vCPU (1M to 1G).
    #[schemars(extend("format" = base::props::SIZE_FORMAT))]
    pub cache: u64,
    /// Executions of a piece of code by the interpreter before it is translated.
    pub threshold: u32,
    /// Keep arithmetic flags right where instructions fault, even if nothing can depend on them; for tests.
    pub exact: bool,
}

impl Default for SoftSpec {
    fn default() -> Self {
        Self { translate: None, cache: 256 << 20, threshold: crate::translate::HOT, exact: false }
    }
}

/// The software CPU.
#[derive(Clone, Debug, Default)]
pub struct SoftAccel {
    spec: SoftSpec,
}

impl SoftAccel {
    /// The accelerator. It is there on every x86-64 host.
    ///
    /// # Errors
    /// Properties out of range.
    pub fn new(spec: SoftSpec) -> Result<Self> {
        let (least, most) = (crate::translate::LEAST as u64, crate::translate::MOST as u64);
        if spec.cache < least || spec.cache > most {
            let text = format!("accelerator 'soft': cache={} is out of range; use 1M to 1G", spec.cache);
            return Err(Error::Unsupported(text));
        }
        Ok(Self { spec })
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
        Ok(Arc::new(SoftVm::with(self.spec.clone())))
    }
}
