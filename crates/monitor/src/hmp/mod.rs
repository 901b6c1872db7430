//! The human monitor.

pub(crate) mod session;

use crate::Context;
use crate::qmp::Result;

/// One user's view: the vCPU that commands look at.
pub struct Shell<'a> {
    context: &'a Context,
    cpu: u32,
}

impl<'a> Shell<'a> {
    /// A fresh one.
    pub fn new(context: &'a Context) -> Self {
        Self { context, cpu: 0 }
    }

    /// Looks at another vCPU from now on.
    ///
    /// # Errors
    /// There is no such vCPU.
    pub fn select_cpu(&mut self, index: u32) -> Result<()> {
        if index >= self.context.machine(|m| m.vcpu_count())? {
            return Err(crate::qmp::Error::generic("Invalid CPU index"));
        }
        self.cpu = index;
        Ok(())
    }

    /// Runs a command line; returns what it prints.
    pub fn run(&mut self, line: &str) -> String {
        format!("unknown command: '{line}' on {}\n", self.cpu)
    }
}
