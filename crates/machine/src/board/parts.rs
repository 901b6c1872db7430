//! What device models may take from the machine while they are built.

use crate::Chardevs;
use crate::drives::Drives;
use crate::netdevs::Netdevs;
use accel::{Doorbells, Irqs, Vm};
use base::props::Bag;
use base::{Timers, nearest};
use bus::{Chardev, IrqLine, IrqPin, System};
use devices::chipset::Clock;
use devices::virtio::balloon::Balloon;
use devices::{BootClass, Cable, ChildBus, CreateError, Parts};
use display::Displays;
use memory::GuestMemory;
use std::collections::BTreeMap;
use std::sync::Arc;

pub(super) struct Context<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) vcpus: u32,
    pub(super) timers: &'a Timers,
    pub(super) clock: &'a Clock,
    pub(super) vm: &'a Arc<dyn Vm>,
    pub(super) displays: &'a Arc<Displays>,
    pub(super) system: &'a System,
    pub(super) drives: &'a mut Drives,
    pub(super) iothreads: &'a [Bag],
    pub(super) chardevs: &'a mut Chardevs,
    pub(super) netdevs: &'a mut Netdevs,
    pub(super) irqs: &'a Arc<dyn Irqs>,
    pub(super) doorbells: Option<Arc<dyn Doorbells>>,
    pub(super) balloon: &'a mut Option<Arc<Balloon>>,
    pub(super) offered: &'a mut Vec<ChildBus>,
    /// What firmware can boot from, with paths below the device being created.
    pub(super) bootable: &'a mut Vec<(BootClass, Option<u32>, String)>,
    pub(super) pins: &'a mut BTreeMap<u32, Arc<IrqPin>>,
}

impl Parts for Context<'_> {
    fn memory(&self) -> &GuestMemory {
        self.memory
    }

    fn timers(&self) -> &Timers {
        self.timers
    }

    fn clock(&self) -> Clock {
        self.clock.clone()
    }

    fn vcpus(&self) -> u32 {
        self.vcpus
    }

    fn system(&self) -> &System {
        self.system
    }

    fn irqs(&self) -> Arc<dyn Irqs> {
        self.irqs.clone()
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        self.doorbells.clone()
    }

    fn vm(&self) -> Result<Arc<dyn Vm>, CreateError> {
        Ok(self.vm.clone())
    }

    fn displays(&self) -> Result<Arc<Displays>, CreateError> {
        Ok(self.displays.clone())
    }

    fn offer_bus(&mut self, bus: ChildBus) {
        self.offered.push(bus);
    }

    fn bootable(&mut self, class: BootClass, index: Option<u32>, path: &str) {
        self.bootable.push((class, index, path.into()));
    }

    fn isa_irq(&mut self, irq: u8) -> Result<IrqLine, CreateError> {
        // 2 is where the second interrupt controller is.
        if irq >= 16 || irq == 2 {
            return Err(CreateError::Other(format!(
                "{irq} is not an ISA interrupt: use one of 0 to 15, but not 2"
            )));
        }
        let gsi = irq.into();
        Ok(self.pins.entry(gsi).or_insert_with(|| IrqPin::new(self.irqs.clone(), gsi)).line())
    }

    fn offer_balloon(&mut self, balloon: &Arc<Balloon>) -> Result<(), CreateError> {
        if self.balloon.is_some() {
            return Err(CreateError::Other("a machine has one balloon at most".into()));
        }
        *self.balloon = Some(balloon.clone());
        Ok(())
    }

    fn iothread(&mut self, id: &str) -> Result<Option<u64>, CreateError> {
        let Some(bag) = self.iothreads.iter().find(|o| o.id.as_deref() == Some(id)) else {
            let ids = self.iothreads.iter().filter_map(|o| o.id.as_deref());
            let near = nearest(id, ids).map(|n| format!("; did you mean '{n}'?"));
            return Err(CreateError::Other(format!(
                "there is no iothread object '{id}'{}",
                near.unwrap_or_else(|| format!("; add --object iothread,id={id}"))
            )));
        };
        Ok(bag.spec::<crate::objects::IoThread>()?.poll_max_ns)
    }

    fn take_drive(&mut self, id: &str) -> Result<Arc<block::Image>, CreateError> {
        self.drives.take(id)
    }

    fn offer_drive(&mut self, drive: &Arc<devices::storage::Drive>) {
        self.drives.offer(drive);
    }

    fn take_chardev(&mut self, id: &str) -> Result<Arc<dyn Chardev>, CreateError> {
        take_chardev(self.chardevs, id)
    }

    fn take_netdev(&mut self, id: &str) -> Result<Cable, CreateError> {
        self.netdevs.take(id)
    }
}

pub(super) fn take_chardev(chardevs: &mut Chardevs, id: &str) -> Result<Arc<dyn Chardev>, CreateError> {
    // A multiplexer has room for several.
    if let Some(share) = chardevs.get(id).and_then(|c| c.share()) {
        return Ok(share);
    }
    chardevs.remove(id).ok_or_else(|| {
        let near = nearest(id, chardevs.keys().map(String::as_str)).map(|n| format!("; did you mean '{n}'?"));
        CreateError::Other(format!(
            "there is no character device '{id}', or another device uses it already{}",
            near.unwrap_or_default()
        ))
    })
}
