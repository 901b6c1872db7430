//! `query-pci`.

use super::{Command, Empty, Result, command};
use crate::Context;
use machine::inspect_pci::{PciInfo, class_name};
use schemars::JsonSchema;
use serde::Serialize;

pub(super) const COMMANDS: &[Command] = &[command!("query-pci", query)];

/// A base address register.
#[derive(Serialize, JsonSchema)]
struct Region {
    bar: u8,
    #[serde(rename = "type")]
    kind: &'static str,
    address: i64,
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefetch: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mem_type_64: Option<bool>,
}

#[derive(Serialize, JsonSchema)]
struct Class {
    #[serde(skip_serializing_if = "Option::is_none")]
    desc: Option<&'static str>,
    class: u16,
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Identity {
    device: u16,
    vendor: u16,
    subsystem: u16,
    subsystem_vendor: u16,
}

#[derive(Serialize, JsonSchema)]
struct BusNumbers {
    number: u8,
    secondary: u8,
    subordinate: u8,
}

#[derive(Serialize, JsonSchema)]
struct Bridge {
    bus: BusNumbers,
    devices: Vec<Device>,
}

/// A function.
#[derive(Serialize, JsonSchema)]
struct Device {
    bus: u8,
    slot: u8,
    function: u8,
    class_info: Class,
    id: Identity,
    #[serde(skip_serializing_if = "Option::is_none")]
    irq: Option<u8>,
    irq_pin: u8,
    qdev_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci_bridge: Option<Bridge>,
    regions: Vec<Region>,
}

/// A bus.
#[derive(Serialize, JsonSchema)]
struct Bus {
    bus: u8,
    devices: Vec<Device>,
}

fn device(info: PciInfo) -> Device {
    let regions = info
        .regions
        .iter()
        .map(|r| Region {
            bar: r.bar,
            kind: if r.io { "io" } else { "memory" },
            address: r.address.map_or(-1, |a| a as i64),
            size: r.size,
            prefetch: (!r.io).then_some(r.prefetchable),
            mem_type_64: (!r.io).then_some(r.wide),
        })
        .collect();
    let name = class_name(info.class);
    Device {
        bus: info.bus,
        slot: info.slot,
        function: info.function,
        class_info: Class { desc: (name != "Class").then_some(name), class: info.class },
        id: Identity {
            device: info.id.1,
            vendor: info.id.0,
            subsystem: info.subsystem.1,
            subsystem_vendor: info.subsystem.0,
        },
        irq: (info.pin != 0).then_some(info.irq),
        irq_pin: info.pin,
        qdev_id: info.device.unwrap_or_default(),
        pci_bridge: info.bridge.map(|(secondary, subordinate, inside)| Bridge {
            bus: BusNumbers { number: info.bus, secondary, subordinate },
            devices: inside.into_iter().map(device).collect(),
        }),
        regions,
    }
}

fn query(c: &Context, _: Empty) -> Result<Vec<Bus>> {
    let all = c.machine(|m| m.pci())?;
    if all.is_empty() {
        return Ok(Vec::new());
    }
    Ok(vec![Bus { bus: 0, devices: all.into_iter().map(device).collect() }])
}
