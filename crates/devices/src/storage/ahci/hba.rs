//! The adapter's global registers, and what its threads share.

use super::PORTS;
use super::port::{Port, PortSaved, Reset};
use crate::storage::Workers;
use crate::storage::ata::IdeBus;
use bus::pci::{Intx, Msi};
use memory::GuestMemory;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard};

/// Global registers (AHCI 1.3.1, 3.1).
mod reg {
    pub(super) const CAP: u32 = 0x00;
    pub(super) const GHC: u32 = 0x04;
    pub(super) const IS: u32 = 0x08;
    pub(super) const PI: u32 = 0x0c;
    pub(super) const VS: u32 = 0x10;
}

const GHC_RESET: u32 = 1 << 0;
const GHC_INTERRUPTS: u32 = 1 << 1;
const GHC_AHCI: u32 = 1 << 31;

/// 64-bit addresses, queueing, 3 Gb/s, AHCI only, 32 slots.
const CAPABILITIES: u32 = 1 << 31 | 1 << 30 | 2 << 20 | 1 << 18 | 31 << 8 | (PORTS as u32 - 1);
const VERSION: u32 = 0x0001_0300;
/// Where the ports' registers start, and how far apart they are.
const PORT_BASE: u32 = 0x100;
const PORT_SIZE: u32 = 0x80;

/// The adapter.
pub(super) struct Hba {
    pub(super) memory: GuestMemory,
    pub(super) workers: Arc<Workers>,
    intx: Arc<Intx>,
    msi: Msi,
    buses: Vec<Arc<IdeBus>>,
    state: Mutex<HbaState>,
}

pub(super) struct HbaState {
    pub(super) ports: Vec<Port>,
    pub(super) running: bool,
    /// Bus mastering is enabled: without it nothing may be read or written.
    pub(super) master: bool,
    ghc: u32,
    is: u32,
    /// The guest has asked for a reset, and commands still run.
    resetting: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HbaSaved {
    ports: Vec<PortSaved>,
    master: bool,
    ghc: u32,
    is: u32,
    resetting: bool,
}

impl HbaSaved {
    pub(super) fn fits(&self) -> bool {
        self.ports.len() == PORTS
    }
}

impl Hba {
    pub(super) fn new(memory: GuestMemory, intx: Arc<Intx>, msi: Msi, workers: Arc<Workers>) -> Self {
        let hba = Self {
            memory,
            workers,
            intx,
            msi,
            buses: (0..PORTS).map(|n| IdeBus::new(n, 1)).collect(),
            state: Mutex::new(HbaState {
                ports: (0..PORTS).map(|_| Port::default()).collect(),
                running: false,
                master: false,
                ghc: GHC_AHCI,
                is: 0,
                resetting: false,
            }),
        };
        hba.power_on();
        hba
    }

    pub(super) fn buses(&self) -> &[Arc<IdeBus>] {
        &self.buses
    }

    pub(super) fn bus(&self, port: usize) -> &IdeBus {
        &self.buses[port]
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, HbaState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Brings interrupts in line with the registers.
    pub(super) fn update(&self, state: &mut HbaState) {
        let before = state.is;
        for (i, port) in state.ports.iter().enumerate() {
            state.is |= u32::from(port.interrupts()) << i;
        }
        let enabled = state.ghc & GHC_INTERRUPTS != 0;
        if self.msi.enabled() {
            self.intx.set(false);
            if enabled && state.is & !before != 0 {
                self.msi.notify(0);
            }
        } else {
            self.intx.set(enabled && state.is != 0);
        }
    }

    pub(super) fn read(&self, register: u32) -> u32 {
        let state = self.lock();
        match register {
            reg::CAP => CAPABILITIES,
            reg::GHC => state.ghc | if state.resetting { GHC_RESET } else { 0 },
            reg::IS => state.is,
            reg::PI => (1 << PORTS) - 1,
            reg::VS => VERSION,
            PORT_BASE.. => {
                let (port, offset) = ((register - PORT_BASE) / PORT_SIZE, (register - PORT_BASE) % PORT_SIZE);
                state.ports.get(port as usize).map_or(0, |p| p.read(offset))
            }
            _ => 0,
        }
    }

    /// Register contents for partial writes: of registers whose bits are cleared by ones, nothing.
    pub(super) fn stored(&self, register: u32) -> u32 {
        let offset = register.wrapping_sub(PORT_BASE) % PORT_SIZE;
        let by_ones =
            register == reg::IS || register >= PORT_BASE && [0x10, 0x30, 0x34, 0x38].contains(&offset);
        if by_ones { 0 } else { self.read(register) }
    }

    pub(super) fn write(self: &Arc<Self>, register: u32, value: u32) {
        let mut state = self.lock();
        match register {
            reg::GHC => {
                if value & GHC_RESET != 0 {
                    state.resetting = true;
                    self.finish_reset(&mut state);
                } else {
                    let enabling = value & !state.ghc & GHC_INTERRUPTS != 0;
                    state.ghc = GHC_AHCI | value & GHC_INTERRUPTS;
                    if enabling && state.is != 0 && self.msi.enabled() {
                        self.msi.notify(0);
                    }
                }
            }
            reg::IS => state.is &= !value,
            PORT_BASE.. => {
                let (port, offset) = ((register - PORT_BASE) / PORT_SIZE, (register - PORT_BASE) % PORT_SIZE);
                if (port as usize) < PORTS {
                    self.write_port(&mut state, port as usize, offset, value);
                }
            }
            _ => {}
        }
        self.update(&mut state);
    }

    /// Resets once no command runs any more.
    pub(super) fn finish_reset(&self, state: &mut HbaState) {
        if !state.resetting || state.ports.iter().any(Port::is_busy) {
            // What still runs is to have no effect.
            if state.resetting {
                state.ports.iter_mut().for_each(Port::forget);
            }
            return;
        }
        state.resetting = false;
        state.ghc = GHC_AHCI;
        state.is = 0;
        for port in 0..PORTS {
            self.reset_port(state, port, Reset::Adapter);
        }
    }

    pub(super) fn set_master(self: &Arc<Self>, on: bool) {
        let mut state = self.lock();
        let was = std::mem::replace(&mut state.master, on);
        if on && !was && state.running {
            for port in 0..PORTS {
                self.issue(&mut state, port);
            }
            self.update(&mut state);
        }
    }

    /// Power-on state of everything.
    pub(super) fn power_on(&self) {
        self.lock().ports.iter_mut().for_each(Port::forget);
        self.workers.abandon();
        self.buses.iter().flat_map(|b| b.drives()).for_each(|d| d.reset());
        let mut state = self.lock();
        (state.ghc, state.is, state.resetting, state.master) = (GHC_AHCI, 0, false, false);
        for port in 0..PORTS {
            self.reset_port(&mut state, port, Reset::Power);
        }
        self.update(&mut state);
    }

    pub(super) fn start(self: &Arc<Self>) {
        for drive in self.buses.iter().flat_map(|b| b.drives()) {
            drive.drive().set_workers(&self.workers);
        }
        {
            let mut state = self.lock();
            state.running = true;
            // Drives may have been plugged in since the ports were reset.
            for port in 0..PORTS {
                if state.ports[port].is_fresh() {
                    self.reset_port(&mut state, port, Reset::Power);
                }
                self.issue(&mut state, port);
            }
            self.update(&mut state);
        }
        self.workers.resume();
    }

    pub(super) fn pause(&self) {
        self.lock().running = false;
        self.workers.drain();
    }

    pub(super) fn save(&self) -> HbaSaved {
        let state = self.lock();
        HbaSaved {
            ports: state.ports.iter().map(Port::save).collect(),
            master: state.master,
            ghc: state.ghc,
            is: state.is,
            resetting: state.resetting,
        }
    }

    pub(super) fn load(&self, saved: HbaSaved) {
        self.lock().ports.iter_mut().for_each(Port::forget);
        self.workers.abandon();
        let mut state = self.lock();
        state.ports = saved.ports.into_iter().map(Port::load).collect();
        (state.ghc, state.is) = (saved.ghc & GHC_INTERRUPTS | GHC_AHCI, saved.is);
        (state.master, state.resetting) = (saved.master, saved.resetting);
        self.finish_reset(&mut state);
        self.update(&mut state);
    }
}
