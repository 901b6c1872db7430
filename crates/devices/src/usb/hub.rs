//! A hub of eight ports (USB 2.0, 11).

use super::descriptor::{self, Descriptors, Standard};
use super::{Outcome, Setup, Speed, UsbDevice, Waker};
use crate::{ChildBus, CreateError, Kind, Model, Parts};
use base::props::{Bag, Properties};
use bus::{State, StateError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const KIND: &str = "usb-hub";

/// Ports of the hub.
const PORTS: usize = 8;

/// Properties of `usb-hub`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Spec {
    /// Port to plug into: N, or N.M behind a hub; the first free one if not given.
    pub port: Option<String>,
}

/// The table entry.
pub const HUB: Model = Model {
    name: KIND,
    about: "USB hub of eight ports",
    properties: Properties::of::<Spec>,
    kind: Kind::Child { bus: "usb-bus", create },
};

fn create(bag: &Bag, _: &mut dyn Parts, bus: &ChildBus) -> Result<(), CreateError> {
    let spec: Spec = bag.spec()?;
    let ChildBus::Usb(bus) = bus else {
        return Err(CreateError::Other(format!("{KIND}: needs a USB bus")));
    };
    bus.plug(KIND, spec.port.as_deref(), Box::new(Hub::new()))
}

const CONNECTION: u16 = 1 << 0;
const ENABLE: u16 = 1 << 1;
const SUSPEND: u16 = 1 << 2;
const RESET: u16 = 1 << 4;
const POWER: u16 = 1 << 8;

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Port {
    status: u16,
    change: u16,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Hubs {
    standard: Standard,
    ports: [Port; PORTS],
}

struct Hub {
    s: Hubs,
    devices: [Option<Box<dyn UsbDevice>>; PORTS],
    descriptors: Descriptors,
    waker: Option<Waker>,
}

impl Hub {
    fn new() -> Self {
        let endpoint = [7, 5, 0x81, 3, 2, 0, 0xff];
        Self {
            s: Hubs::default(),
            devices: Default::default(),
            descriptors: Descriptors {
                device: descriptor::device(9, false, 3),
                configuration: descriptor::configuration(0xe0, [9, 0, 0], &[], &[endpoint]),
                strings: vec!["Kvasir", "Kvasir USB Hub", "1"],
                qualifier: false,
            },
            waker: None,
        }
    }

    fn port_of(index: u16) -> Option<usize> {
        usize::from(index & 0xff).checked_sub(1).filter(|p| *p < PORTS)
    }

    /// Ports that have something to tell, a bit each from bit 1 on.
    fn changes(&self) -> u16 {
        let changed = self.s.ports.iter().enumerate().filter(|(_, p)| p.change != 0);
        changed.fold(0, |all, (i, _)| all | 2 << i)
    }

    fn set_feature(&mut self, port: usize, feature: u16) -> Outcome {
        let has_device = self.devices[port].is_some();
        let p = &mut self.s.ports[port];
        match feature {
            2 => p.status |= SUSPEND,
            4 => {
                if has_device && p.status & POWER != 0 {
                    p.status |= ENABLE;
                    p.status &= !SUSPEND;
                    p.change |= RESET;
                    if let Some(device) = &mut self.devices[port] {
                        device.reset();
                    }
                }
            }
            8 => {
                if p.status & POWER == 0 {
                    p.status |= POWER;
                    if has_device {
                        p.status |= CONNECTION;
                        p.change |= CONNECTION;
                    }
                }
            }
            21 | 22 => {} // test and indicator
            _ => return Outcome::Stall,
        }
        Outcome::Done(0)
    }

    fn clear_feature(&mut self, port: usize, feature: u16) -> Outcome {
        let p = &mut self.s.ports[port];
        match feature {
            1 => p.status &= !ENABLE,
            2 => {
                if p.status & SUSPEND != 0 {
                    p.status &= !SUSPEND;
                    p.change |= SUSPEND;
                }
            }
            8 => *p = Port::default(),
            16..=20 => p.change &= !(1 << (feature - 16)),
            21 | 22 => {}
            _ => return Outcome::Stall,
        }
        Outcome::Done(0)
    }
}

impl UsbDevice for Hub {
    fn name(&self) -> &'static str {
        KIND
    }

    fn speed(&self) -> Speed {
        Speed::Full
    }

    fn attach(&mut self, waker: Waker) {
        for device in self.devices.iter_mut().flatten() {
            device.attach(waker.clone());
        }
        self.waker = Some(waker);
    }

    fn reset(&mut self) {
        self.s = Hubs::default();
    }

    fn control(&mut self, setup: Setup, data: &mut Vec<u8>) -> Outcome {
        if let Some(outcome) = self.s.standard.control(&self.descriptors, setup, data) {
            return outcome;
        }
        let mut answer = |bytes: &[u8]| {
            data.clear();
            data.extend_from_slice(&bytes[..bytes.len().min(setup.length.into())]);
            Outcome::Done(data.len())
        };
        match (setup.request, Self::port_of(setup.index)) {
            // Hub descriptor: power is switched port by port, all devices are removable.
            (0xa006, _) => answer(&[11, 0x29, PORTS as u8, 0x0a, 0, 1, 0, 0, 0, 0xff, 0xff]),
            (0xa000, _) => answer(&[0; 4]),
            (0x2001 | 0x2003, _) => Outcome::Done(0),
            (0xa300, Some(port)) => {
                let p = self.s.ports[port];
                let mut out = [0; 4];
                out[..2].copy_from_slice(&p.status.to_le_bytes());
                out[2..].copy_from_slice(&p.change.to_le_bytes());
                answer(&out)
            }
            (0x2303, Some(port)) => self.set_feature(port, setup.value),
            (0x2301, Some(port)) => self.clear_feature(port, setup.value),
            _ => Outcome::Stall,
        }
    }

    fn send(&mut self, number: u8, most: usize, data: &mut Vec<u8>) -> Outcome {
        if number != 1 {
            return Outcome::Stall;
        }
        match self.changes() {
            0 => Outcome::Nak,
            changes => {
                *data = changes.to_le_bytes().to_vec();
                data.truncate(most);
                Outcome::Done(data.len())
            }
        }
    }

    fn receive(&mut self, _: u8, _: &[u8]) -> Outcome {
        Outcome::Stall
    }

    fn child(&mut self, port: u8) -> Option<&mut Box<dyn UsbDevice>> {
        self.devices.get_mut(usize::from(port).checked_sub(1)?)?.as_mut()
    }

    fn plug(&mut self, port: u8, mut device: Box<dyn UsbDevice>) -> Result<(), Box<dyn UsbDevice>> {
        let wanted = match port {
            0 => self.devices.iter().position(Option::is_none),
            port => Some(usize::from(port) - 1).filter(|p| self.devices.get(*p).is_some_and(Option::is_none)),
        };
        let Some(port) = wanted else { return Err(device) };
        if let Some(waker) = &self.waker {
            device.attach(waker.clone());
        }
        self.devices[port] = Some(device);
        let p = &mut self.s.ports[port];
        if p.status & POWER != 0 {
            p.status |= CONNECTION;
            p.change |= CONNECTION;
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        self.devices.iter().any(Option::is_none)
    }

    fn save(&self) -> Result<State, StateError> {
        let devices: Result<Vec<_>, _> =
            self.devices.iter().map(|d| d.as_ref().map(|d| d.save()).transpose()).collect();
        State::new(KIND, 1, &(&self.s, devices?))
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let (s, devices): (Hubs, Vec<Option<State>>) = state.unpack(KIND, 1)?;
        let same = devices.len() == PORTS
            && devices.iter().zip(&self.devices).all(|(saved, device)| saved.is_some() == device.is_some());
        if !same {
            let reason = "other devices are plugged into the hub".into();
            return Err(StateError::Invalid { kind: KIND.into(), reason });
        }
        for (device, state) in self.devices.iter_mut().zip(devices) {
            if let (Some(device), Some(state)) = (device, state) {
                device.load(state)?;
            }
        }
        self.s = s;
        Ok(())
    }
}
