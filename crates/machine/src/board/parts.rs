//! What device models may take from the machine while they are built.

use crate::Chardevs;
use crate::drives::Drives;
use base::{Timers, nearest};
use bus::{Chardev, System};
use devices::{CreateError, Parts};
use memory::GuestMemory;
use std::sync::Arc;

pub(super) struct Context<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) timers: &'a Timers,
    pub(super) system: &'a System,
    pub(super) drives: &'a mut Drives,
    pub(super) chardevs: &'a mut Chardevs,
}

impl Parts for Context<'_> {
    fn memory(&self) -> &GuestMemory {
        self.memory
    }

    fn timers(&self) -> &Timers {
        self.timers
    }

    fn system(&self) -> &System {
        self.system
    }

    fn take_drive(&mut self, id: &str) -> Result<Arc<block::Image>, CreateError> {
        self.drives.take(id)
    }

    fn take_chardev(&mut self, id: &str) -> Result<Arc<dyn Chardev>, CreateError> {
        take_chardev(self.chardevs, id)
    }
}

pub(super) fn take_chardev(chardevs: &mut Chardevs, id: &str) -> Result<Arc<dyn Chardev>, CreateError> {
    chardevs.remove(id).ok_or_else(|| {
        let near = nearest(id, chardevs.keys().map(String::as_str)).map(|n| format!("; did you mean '{n}'?"));
        CreateError::Other(format!(
            "there is no character device '{id}', or another device uses it already{}",
            near.unwrap_or_default()
        ))
    })
}
