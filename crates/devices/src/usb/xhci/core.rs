//! State of the controller, and its events.

use super::memory::{Ring, Trb, kind};
use super::port::Port;
use crate::usb::{UsbDevice, Waker};
use bus::pci::{Intx, Msi, MsixVectors};
use memory::GuestMemory;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Device slots.
pub(super) const SLOTS: usize = 64;
/// Interrupters.
pub(super) const INTERRUPTERS: usize = 4;
/// Ports of USB 2, then as many of USB 3 (which nothing is plugged into: all our devices are slower).
pub(super) const PORTS2: usize = 8;
pub(super) const PORTS: usize = PORTS2 + 4;
/// Endpoints of a device context: the control endpoint is 1.
pub(super) const ENDPOINTS: usize = 32;

pub(super) const CMD_RUN: u32 = 1 << 0;
pub(super) const CMD_RESET: u32 = 1 << 1;
pub(super) const CMD_INTERRUPTS: u32 = 1 << 2;
pub(super) const STS_HALTED: u32 = 1 << 0;
pub(super) const STS_ERROR: u32 = 1 << 2;
pub(super) const STS_EVENT: u32 = 1 << 3;
pub(super) const STS_PORT: u32 = 1 << 4;

/// State of an endpoint (xHCI 1.2, 6.2.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum EndpointState {
    #[default]
    Disabled = 0,
    Running = 1,
    Halted = 2,
    Stopped = 3,
    Error = 4,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Endpoint {
    pub(super) state: EndpointState,
    pub(super) ring: Ring,
    /// The device had nothing the last time; its waker makes us ask again.
    pub(super) waits: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Slot {
    pub(super) enabled: bool,
    pub(super) addressed: bool,
    /// Where the device context is.
    pub(super) context: u64,
    /// Root port, from 1 up.
    pub(super) port: u8,
    /// Ports of hubs on the way, four bits each.
    pub(super) route: u32,
    pub(super) endpoints: [Endpoint; ENDPOINTS],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Interrupter {
    pub(super) management: u32,
    pub(super) moderation: u32,
    pub(super) table_size: u32,
    pub(super) table: u64,
    pub(super) dequeue: u64,
    /// The segment: first address and number of TRBs.
    pub(super) segment: (u64, u32),
    /// Where the next event goes, and the cycle bit.
    pub(super) index: u32,
    pub(super) cycle: bool,
}

/// Registers and what they stand for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    pub(super) command: u32,
    pub(super) status: u32,
    pub(super) notifications: u32,
    pub(super) contexts: u64,
    pub(super) config: u32,
    pub(super) commands: Ring,
    pub(super) commands_run: bool,
    pub(super) interrupters: [Interrupter; INTERRUPTERS],
    pub(super) ports: [Port; PORTS],
    pub(super) slots: Vec<Slot>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            command: 0,
            status: STS_HALTED,
            notifications: 0,
            contexts: 0,
            config: 0,
            commands: Ring::default(),
            commands_run: false,
            interrupters: [Interrupter { cycle: true, ..Interrupter::default() }; INTERRUPTERS],
            ports: std::array::from_fn(|i| Port::new(i < PORTS2)),
            slots: vec![Slot::default(); SLOTS + 1],
        }
    }
}

/// The ways to interrupt.
pub(super) struct Interrupts {
    pub(super) msix: MsixVectors,
    pub(super) msi: Msi,
    pub(super) intx: Arc<Intx>,
}

/// The controller, without its place on PCI.
pub(in crate::usb) struct Core {
    pub(super) s: State,
    pub(super) devices: [Option<Box<dyn UsbDevice>>; PORTS],
    pub(super) memory: GuestMemory,
    pub(super) interrupts: Interrupts,
    pub(super) waker: Option<Waker>,
    /// Between `pause` and `start` nothing moves.
    pub(super) running: bool,
    pub(super) started: std::time::Instant,
}

impl Core {
    pub(super) fn new(memory: GuestMemory, interrupts: Interrupts) -> Self {
        Self {
            s: State::default(),
            devices: Default::default(),
            memory,
            interrupts,
            waker: None,
            running: false,
            started: std::time::Instant::now(),
        }
    }

    /// Back to power-on, or what a controller reset does: devices stay plugged.
    pub(super) fn reset(&mut self) {
        self.s = State::default();
        for (i, device) in self.devices.iter_mut().enumerate() {
            if let Some(device) = device {
                device.reset();
                self.s.ports[i].connect(device.speed());
            }
        }
        self.interrupts.intx.set(false);
    }

    pub(super) fn is_running(&self) -> bool {
        self.s.command & CMD_RUN != 0 && self.running
    }

    /// The controller cannot go on.
    pub(super) fn fail(&mut self, why: &str) {
        tracing::warn!("xHCI: {why}; the controller stops until it is reset");
        self.s.status |= STS_ERROR | STS_HALTED;
        self.s.command &= !CMD_RUN;
    }

    // --- events -----------------------------------------------------------------------------------------------------

    /// Puts an event on an interrupter's ring.
    pub(super) fn event(&mut self, interrupter: u32, mut trb: Trb) {
        let n = interrupter as usize % INTERRUPTERS;
        let memory = self.memory.clone();
        let i = &mut self.s.interrupters[n];
        let (base, length) = i.segment;
        if length == 0 {
            return; // no ring has been given
        }
        // A full ring loses events rather than overtaking the driver (it has sized it).
        let next = (i.index + 1) % length;
        if base.wrapping_add(16 * u64::from(next)) == i.dequeue & !0xf {
            tracing::debug!("xHCI: event ring {n} is full");
            return;
        }
        trb.control = trb.control & !Trb::CYCLE | u32::from(i.cycle);
        trb.store(&memory, base.wrapping_add(16 * u64::from(i.index)));
        i.index = next;
        i.cycle ^= next == 0;
        self.raise(n);
    }

    fn raise(&mut self, n: usize) {
        let i = &mut self.s.interrupters[n];
        i.management |= 1;
        // The event handler busy bit: it will look at the ring before it enables interrupts again.
        let busy = i.dequeue & 8 != 0;
        i.dequeue |= 8;
        self.s.status |= STS_EVENT;
        if busy || i.management & 2 == 0 || self.s.command & CMD_INTERRUPTS == 0 {
            return;
        }
        if self.interrupts.msix.enabled() {
            self.s.interrupters[n].management &= !1;
            self.interrupts.msix.notify(n as u16);
        } else if self.interrupts.msi.enabled() {
            self.s.interrupters[n].management &= !1;
            self.interrupts.msi.notify(n as u8);
        } else {
            self.update_line();
        }
    }

    /// The interrupt pin follows the first interrupter.
    pub(super) fn update_line(&mut self) {
        if self.interrupts.msix.enabled() || self.interrupts.msi.enabled() {
            return;
        }
        let pending = self.s.interrupters[0].management & 3 == 3;
        self.interrupts.intx.set(pending && self.s.command & CMD_INTERRUPTS != 0);
    }

    /// Tells that a port changed.
    pub(super) fn port_changed(&mut self, port: usize) {
        self.s.status |= STS_PORT;
        if self.is_running() {
            let parameter = ((port + 1) as u64) << 24;
            self.event(0, Trb { parameter, status: 1 << 24, control: kind::PORT_STATUS_CHANGE << 10 });
        }
    }

    // --- devices ----------------------------------------------------------------------------------------------------

    /// Whether something can still be plugged in, here or behind hubs.
    pub(in crate::usb) fn has_room(&self) -> bool {
        self.devices[..PORTS2].iter().any(|d| d.as_ref().is_none_or(|d| d.has_room()))
    }

    /// Plugs a device in by its path, or into the first free port.
    pub(in crate::usb) fn plug(
        &mut self,
        path: Option<&[u8]>,
        mut device: Box<dyn UsbDevice>,
    ) -> Result<(), Box<dyn UsbDevice>> {
        let (root, rest): (usize, &[u8]) = match path {
            None => match self.devices[..PORTS2].iter().position(Option::is_none) {
                Some(free) => (free, &[]),
                None => {
                    let hub = self.devices.iter_mut().flatten().find(|d| d.has_room());
                    return match hub {
                        Some(hub) => hub.plug(0, device),
                        None => Err(device),
                    };
                }
            },
            Some([root, rest @ ..]) => (usize::from(*root) - 1, rest),
            Some([]) => return Err(device),
        };
        if root >= PORTS2 {
            return Err(device);
        }
        let Some((last, hubs)) = rest.split_last() else {
            if self.devices[root].is_some() {
                return Err(device);
            }
            if let Some(waker) = &self.waker {
                device.attach(waker.clone());
            }
            device.reset();
            self.s.ports[root].connect(device.speed());
            self.devices[root] = Some(device);
            self.port_changed(root);
            return Ok(());
        };
        let mut at = self.devices[root].as_mut();
        for port in hubs {
            at = at.and_then(|d| d.child(*port));
        }
        let outcome = match at {
            Some(hub) => hub.plug(*last, device),
            None => Err(device),
        };
        if outcome.is_ok() {
            self.wake();
        }
        outcome
    }

    /// The device that a slot is for.
    pub(super) fn device(&mut self, slot: usize) -> Option<&mut Box<dyn UsbDevice>> {
        let s = self.s.slots.get(slot)?;
        let (port, mut route) = (usize::from(s.port), s.route);
        let mut device = self.devices.get_mut(port.checked_sub(1)?)?.as_mut()?;
        while route & 0xf != 0 {
            device = device.child((route & 0xf) as u8)?;
            route >>= 4;
        }
        Some(device)
    }

    /// A device has something where it had nothing: asks again.
    pub(in crate::usb) fn wake(&mut self) {
        if !self.is_running() {
            return;
        }
        for slot in 1..=SLOTS {
            for endpoint in 1..ENDPOINTS {
                if self.s.slots[slot].endpoints[endpoint].waits {
                    self.run_endpoint(slot, endpoint);
                }
            }
        }
    }
}
