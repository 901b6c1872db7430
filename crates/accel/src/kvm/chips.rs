//! State of the interrupt controllers, timer and clock that KVM keeps for a VM.
#![allow(unsafe_code)] // unions in the kernel's structures

use super::{host, refused};
use crate::{Error, Result};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_ioapic_state,
    kvm_irqchip, kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// Format of [`Saved`].
const VERSION: u32 = 1;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    kind: String,
    version: u32,
    /// Master and slave.
    pics: [Pic; 2],
    ioapic: Ioapic,
    pit: Pit,
    /// kvm-clock in nanoseconds. It stands still while the VM is stored.
    clock: u64,
}

/// An 8259 as `struct kvm_pic_state` has it, field by field.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pic {
    last_irr: u8,
    irr: u8,
    imr: u8,
    isr: u8,
    priority_add: u8,
    irq_base: u8,
    read_reg_select: u8,
    poll: u8,
    special_mask: u8,
    init_state: u8,
    auto_eoi: u8,
    rotate_on_auto_eoi: u8,
    special_fully_nested_mode: u8,
    init4: u8,
    elcr: u8,
    elcr_mask: u8,
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ioapic {
    base_address: u64,
    ioregsel: u32,
    id: u32,
    irr: u32,
    redirection: [u64; 24],
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pit {
    flags: u32,
    channels: [Channel; 3],
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Channel {
    count: u32,
    latched_count: u16,
    count_latched: u8,
    status_latched: u8,
    status: u8,
    read_state: u8,
    write_state: u8,
    write_latch: u8,
    rw_mode: u8,
    mode: u8,
    bcd: u8,
    gate: u8,
    count_load_time: i64,
}

/// Generates the conversions between a saved struct and the kernel's, whose fields are named alike.
macro_rules! same_fields {
    ($saved:ident, $kernel:ident, $($field:ident),+) => {
        impl From<&$kernel> for $saved {
            fn from(k: &$kernel) -> Self {
                Self { $($field: k.$field),+ }
            }
        }
        impl From<&$saved> for $kernel {
            fn from(s: &$saved) -> Self {
                Self { $($field: s.$field),+ }
            }
        }
    };
}
same_fields!(
    Pic,
    kvm_pic_state,
    last_irr,
    irr,
    imr,
    isr,
    priority_add,
    irq_base,
    read_reg_select,
    poll,
    special_mask,
    init_state,
    auto_eoi,
    rotate_on_auto_eoi,
    special_fully_nested_mode,
    init4,
    elcr,
    elcr_mask
);
same_fields!(
    Channel,
    kvm_pit_channel_state,
    count,
    latched_count,
    count_latched,
    status_latched,
    status,
    read_state,
    write_state,
    write_latch,
    rw_mode,
    mode,
    bcd,
    gate,
    count_load_time
);

fn get_chip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(host("cannot get the state of KVM's interrupt controllers"))?;
    Ok(chip)
}

/// The state of everything in the kernel that belongs to no vCPU.
pub(super) fn save(vm: &VmFd) -> Result<Vec<u8>> {
    let pic = |id| -> Result<Pic> {
        let chip = get_chip(vm, id)?;
        // SAFETY: the kernel fills this member for the two PICs; every bit pattern is valid.
        Ok(Pic::from(unsafe { &chip.chip.pic }))
    };
    let chip = get_chip(vm, KVM_IRQCHIP_IOAPIC)?;
    // SAFETY: the kernel fills this member for the IOAPIC; every bit pattern is valid.
    let ioapic = unsafe { &chip.chip.ioapic };
    let pit = vm.get_pit2().map_err(host("cannot get the state of KVM's timer"))?;
    let clock = vm.get_clock().map_err(host("cannot get KVM's clock"))?;
    let saved = Saved {
        kind: "kvm".into(),
        version: VERSION,
        pics: [pic(KVM_IRQCHIP_PIC_MASTER)?, pic(KVM_IRQCHIP_PIC_SLAVE)?],
        ioapic: Ioapic {
            base_address: ioapic.base_address,
            ioregsel: ioapic.ioregsel,
            id: ioapic.id,
            irr: ioapic.irr,
            // SAFETY: the other member of the union is a bit-field view of the same 64 bits.
            redirection: ioapic.redirtbl.map(|entry| unsafe { entry.bits }),
        },
        pit: Pit { flags: pit.flags, channels: [0, 1, 2].map(|i| Channel::from(&pit.channels[i])) },
        clock: clock.clock,
    };
    serde_json::to_vec(&saved).map_err(|e| Error::BadState(e.to_string()))
}

fn parse(state: &[u8]) -> Result<Saved> {
    #[derive(Deserialize)]
    struct Header {
        kind: String,
        version: u32,
    }
    let unreadable = |e: serde_json::Error| Error::BadState(format!("interrupt controllers: {e}"));
    let header: Header = serde_json::from_slice(state).map_err(unreadable)?;
    if header.kind != "kvm" || header.version != VERSION {
        return Err(Error::BadState(format!(
            "interrupt controllers of accelerator '{}', version {}; this is 'kvm', version {VERSION}",
            header.kind, header.version
        )));
    }
    serde_json::from_slice(state).map_err(unreadable)
}

/// Restores [`save`].
pub(super) fn load(vm: &VmFd, state: &[u8]) -> Result<()> {
    let saved = parse(state)?;
    for (id, pic) in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE].into_iter().zip(&saved.pics) {
        let mut chip = kvm_irqchip { chip_id: id, ..Default::default() };
        chip.chip.pic = kvm_pic_state::from(pic);
        vm.set_irqchip(&chip).map_err(refused("8259 state"))?;
    }
    let mut ioapic = kvm_ioapic_state {
        base_address: saved.ioapic.base_address,
        ioregsel: saved.ioapic.ioregsel,
        id: saved.ioapic.id,
        irr: saved.ioapic.irr,
        ..Default::default()
    };
    for (entry, bits) in ioapic.redirtbl.iter_mut().zip(saved.ioapic.redirection) {
        entry.bits = bits;
    }
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    chip.chip.ioapic = ioapic;
    vm.set_irqchip(&chip).map_err(refused("IOAPIC state"))?;
    let pit = kvm_pit_state2 {
        channels: [0, 1, 2].map(|i| kvm_pit_channel_state::from(&saved.pit.channels[i])),
        flags: saved.pit.flags,
        ..Default::default()
    };
    vm.set_pit2(&pit).map_err(refused("8254 state"))?;
    let clock = kvm_clock_data { clock: saved.clock, ..Default::default() };
    vm.set_clock(&clock).map_err(refused("clock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Saved {
        let mut s = Saved {
            kind: "kvm".into(),
            version: VERSION,
            pics: Default::default(),
            ioapic: Ioapic::default(),
            pit: Pit::default(),
            clock: u64::MAX,
        };
        s.pics[1].irq_base = 0x70;
        s.ioapic.redirection[23] = 0xff00_0000_0001_0000;
        s.pit.channels[2].count_load_time = -5;
        s
    }

    #[test]
    fn survives_its_own_format() {
        let text = serde_json::to_vec(&sample()).unwrap();
        assert_eq!(parse(&text).unwrap(), sample());
    }

    #[test]
    fn conversions_keep_every_field() {
        let bytes: Vec<u8> = (1..=16).collect();
        let names = ["last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "read_reg_select", "poll"];
        let pic = Pic { elcr_mask: bytes[15], poll: 7, irr: 3, ..Default::default() };
        assert_eq!(Pic::from(&kvm_pic_state::from(&pic)), pic);
        let json = serde_json::to_value(&pic).unwrap();
        assert!(names.iter().all(|n| json.get(n).is_some()));
        let channel = Channel { count: 0x1_0000, gate: 1, count_load_time: 9, ..Default::default() };
        assert_eq!(Channel::from(&kvm_pit_channel_state::from(&channel)), channel);
    }

    #[test]
    fn strangers_are_refused_with_a_reason() {
        let error = |change: fn(&mut Saved)| {
            let mut s = sample();
            change(&mut s);
            parse(&serde_json::to_vec(&s).unwrap()).unwrap_err().to_string()
        };
        assert!(error(|s| s.version = 2).contains("version 2"));
        assert!(error(|s| s.kind = "soft".into()).contains("'soft'"));
        assert!(parse(b"{}").is_err());
        assert!(parse(b"\xff").is_err());
    }
}
