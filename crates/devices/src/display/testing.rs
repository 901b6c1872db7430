//! What display devices need to be tested.

use crate::{ChildBus, CreateError, Parts};
use accel::{Irqs, Slot, SlotId, Vcpu, VcpuConfig, Vm};
use base::Timers;
use bus::{Chardev, System};
use display::Displays;
use memory::GuestMemory;
use std::sync::Arc;

/// A VM that shows no memory.
pub(crate) struct NoVm;

fn no<T>() -> accel::Result<T> {
    Err(accel::Error::Unsupported("this VM is for tests".into()))
}

impl Vm for NoVm {
    fn vcpu(&self, _: VcpuConfig) -> accel::Result<Box<dyn Vcpu>> {
        no()
    }
    fn map(&self, _: Slot) -> accel::Result<SlotId> {
        no()
    }
    fn unmap(&self, _: SlotId) -> accel::Result<()> {
        no()
    }
    fn take_dirty(&self, _: SlotId, _: &mut dyn FnMut(u64)) -> accel::Result<()> {
        no()
    }
    fn set_dirty_log(&self, _: SlotId, _: bool) -> accel::Result<()> {
        no()
    }
    fn irqs(&self) -> Option<Arc<dyn Irqs>> {
        None
    }
    fn save(&self) -> accel::Result<Vec<u8>> {
        no()
    }
    fn load(&self, _: &[u8]) -> accel::Result<()> {
        no()
    }
}

/// Gives display devices what they ask for.
pub(crate) struct Studio {
    memory: GuestMemory,
    timers: Timers,
    system: System,
    pub(crate) displays: Arc<Displays>,
}

impl Studio {
    pub(crate) fn new() -> Self {
        Self {
            memory: bus::virtio::testing::ram(),
            timers: Timers::new(),
            system: System::new(|_| {}),
            displays: Arc::new(Displays::new().unwrap()),
        }
    }
}

impl Parts for Studio {
    fn memory(&self) -> &GuestMemory {
        &self.memory
    }
    fn timers(&self) -> &Timers {
        &self.timers
    }
    fn system(&self) -> &System {
        &self.system
    }
    fn irqs(&self) -> Arc<dyn Irqs> {
        Arc::new(bus::virtio::testing::Notes::default())
    }
    fn offer_bus(&mut self, _: ChildBus) {}
    fn vm(&self) -> Result<Arc<dyn Vm>, CreateError> {
        Ok(Arc::new(NoVm))
    }
    fn displays(&self) -> Result<Arc<Displays>, CreateError> {
        Ok(self.displays.clone())
    }
    fn take_drive(&mut self, id: &str) -> Result<Arc<block::Image>, CreateError> {
        Err(CreateError::Other(format!("no drive {id}")))
    }
    fn take_chardev(&mut self, id: &str) -> Result<Arc<dyn Chardev>, CreateError> {
        Err(CreateError::Other(format!("no chardev {id}")))
    }

    fn take_netdev(&mut self, id: &str) -> Result<crate::Cable, CreateError> {
        Err(CreateError::Other(format!("there is no netdev '{id}'")))
    }
}
