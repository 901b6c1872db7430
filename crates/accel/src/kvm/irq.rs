//! Interrupt lines, messages, and the table that routes them.

use super::{host, vm::Inner};
use crate::{Error, Irqs, Result};
use kvm_bindings::{
    KVM_IOAPIC_NUM_PINS, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi,
};
use kvm_ioctls::VmFd;
use std::collections::BTreeMap;

/// Most routes in a table (`KVM_CAP_IRQ_ROUTING` on x86).
const MAX_ROUTES: usize = kvm_bindings::KVM_MAX_IRQ_ROUTES;

impl Irqs for Inner {
    fn set_line(&self, gsi: u32, level: bool) {
        if let Err(e) = self.fd().set_irq_line(gsi, level) {
            // Only a number that no pin has: the board's mistake, harmless to the guest.
            tracing::warn!(gsi, level, error = %e, "KVM refuses an interrupt line");
        }
    }

    fn msi(&self, address: u64, data: u32) {
        let Some(message) = Message::new(address, data) else {
            tracing::debug!(address, data, "message-signalled interrupt to no local APIC");
            return;
        };
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data,
            ..Default::default()
        };
        if let Err(e) = self.fd().signal_msi(msi) {
            tracing::debug!(address, data, error = %e, "KVM refuses a message-signalled interrupt");
        }
    }
}

/// A message that KVM accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    address: u64,
    data: u32,
}

impl Message {
    /// `None` if the address, which the guest chose, is not that of a local APIC (Intel SDM vol. 3, 11.11.1; bits
    /// 63:40 hold the upper destination ID in KVM's 32-bit format). KVM would refuse a whole routing table for it.
    pub(super) fn new(address: u64, data: u32) -> Option<Self> {
        let local_apic = address & 0xfff0_0000 == 0xfee0_0000;
        let high_ok = (address >> 32) & 0xff == 0;
        (local_apic && high_ok).then_some(Self { address, data })
    }
}

/// The GSI routing table: the kernel's default pins, then one GSI for each irqfd.
#[derive(Debug, Default)]
pub(super) struct Routes {
    messages: BTreeMap<u32, Option<Message>>,
}

impl Routes {
    /// Reserves a GSI.
    pub(super) fn reserve(&mut self) -> Result<u32> {
        if self.messages.len() >= MAX_ROUTES - pins().count() {
            return Err(Error::Unsupported("more message-signalled interrupts than KVM can route".into()));
        }
        let first = KVM_IOAPIC_NUM_PINS;
        let gsi = (first..).zip(self.messages.keys()).find(|(i, used)| i != *used);
        let gsi = gsi.map_or(first + self.messages.len() as u32, |(i, _)| i);
        self.messages.insert(gsi, None);
        Ok(gsi)
    }

    /// Gives a GSI back. The kernel's table is left: nothing signals that GSI any more.
    pub(super) fn release(&mut self, gsi: u32) {
        self.messages.remove(&gsi);
    }

    /// Routes a reserved GSI. The kernel is told only of changes: each new table costs it a grace period.
    pub(super) fn set(&mut self, vm: &VmFd, gsi: u32, message: Message) -> Result<()> {
        let before = self.messages.insert(gsi, Some(message));
        if before == Some(Some(message)) {
            return Ok(());
        }
        let refused = || Error::Unsupported("more interrupt routes than KVM takes".into());
        let table = KvmIrqRouting::from_entries(&self.table()).map_err(|_| refused())?;
        vm.set_gsi_routing(&table).map_err(|e| {
            // So that the next attempt does not take the message for known.
            self.messages.insert(gsi, before.flatten());
            host("KVM refuses the interrupt routing table")(e)
        })
    }

    fn table(&self) -> Vec<kvm_irq_routing_entry> {
        let mut table: Vec<_> = pins().collect();
        table.extend(self.messages.iter().filter_map(|(&gsi, message)| {
            let message = message.as_ref()?;
            let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            entry.u.msi.address_lo = message.address as u32;
            entry.u.msi.address_hi = (message.address >> 32) as u32;
            entry.u.msi.data = message.data;
            Some(entry)
        }));
        table
    }
}

/// The routes that KVM starts with: GSI n is IOAPIC pin n, and below 16 also input n of the two 8259s.
fn pins() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pic = (0..16).map(|gsi| {
        let chip = if gsi < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
        (gsi, chip, gsi % 8)
    });
    let ioapic = (0..KVM_IOAPIC_NUM_PINS).map(|gsi| (gsi, KVM_IRQCHIP_IOAPIC, gsi));
    pic.chain(ioapic).map(|(gsi, irqchip, pin)| {
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip.irqchip = irqchip;
        entry.u.irqchip.pin = pin;
        entry
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_messages_to_a_local_apic_pass() {
        assert!(Message::new(0xfee0_1000, 0x4041).is_some());
        assert!(Message::new(0x0000_0100_fee0_0000, 0x41).is_some(), "x2APIC destination");
        assert!(Message::new(0x0000_0001_fee0_0000, 0x41).is_none(), "reserved bits");
        assert!(Message::new(0xfed0_0000, 0x41).is_none());
        assert!(Message::new(0, 0).is_none());
    }

    #[test]
    fn gsis_follow_the_pins_and_are_reused() {
        let mut r = Routes::default();
        let (a, b, c) = (r.reserve().unwrap(), r.reserve().unwrap(), r.reserve().unwrap());
        assert_eq!([a, b, c], [24, 25, 26]);
        r.release(b);
        assert_eq!(r.reserve().unwrap(), 25);
        assert_eq!(r.reserve().unwrap(), 27);
        assert_eq!(r.table().len(), 40, "reserved is not routed");
        r.messages.insert(b, Message::new(0xfee0_0000, 7));
        assert_eq!(r.table().len(), 41);
        assert_eq!((r.table()[40].gsi, r.table()[40].type_), (25, KVM_IRQ_ROUTING_MSI));
    }

    #[test]
    fn there_is_an_end_to_routes() {
        let mut r = Routes::default();
        for _ in 0..MAX_ROUTES - 40 {
            r.reserve().unwrap();
        }
        assert!(r.reserve().is_err());
        assert!(r.messages.keys().all(|&gsi| (gsi as usize) < MAX_ROUTES));
    }
}
