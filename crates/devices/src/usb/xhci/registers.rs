//! Registers (xHCI 1.2, 5).

use super::core::{
    CMD_INTERRUPTS, CMD_RESET, CMD_RUN, Core, INTERRUPTERS, PORTS, PORTS2, SLOTS, STS_ERROR, STS_EVENT,
    STS_HALTED, STS_PORT,
};
use super::memory::{Ring, Trb, code, kind};
use super::port::PortAction;

/// Where the parts begin.
const OPERATIONAL: u64 = 0x40;
const PORT_REGISTERS: u64 = OPERATIONAL + 0x400;
const RUNTIME: u64 = 0x1000;
const DOORBELLS: u64 = 0x2000;
/// Extended capabilities.
const EXTENDED: u64 = 0x20;
/// Where the MSI-X table and its pending bits are.
pub(super) const MSIX_TABLE: u32 = 0x3000;
pub(super) const MSIX_PENDING: u32 = 0x3800;
/// Length of the BAR.
pub(super) const LENGTH: u64 = 0x4000;

const COMMAND_RUNNING: u64 = 1 << 3;

fn low(value: u64, word: u32) -> u64 {
    value & 0xffff_ffff_0000_0000 | u64::from(word)
}

fn high(value: u64, word: u32) -> u64 {
    value & 0xffff_ffff | u64::from(word) << 32
}

impl Core {
    /// Reads a double word at a multiple of four.
    pub(super) fn read_register(&mut self, at: u64) -> u32 {
        match at {
            0..EXTENDED => match at {
                0x00 => 0x0100 << 16 | OPERATIONAL as u32,
                0x04 => SLOTS as u32 | (INTERRUPTERS as u32) << 8 | (PORTS as u32) << 24,
                0x08 => 0xf,
                0x0c => 0,
                // 64-bit addresses, extended capabilities.
                0x10 => 1 | ((EXTENDED / 4) as u32) << 16,
                0x14 => DOORBELLS as u32,
                0x18 => RUNTIME as u32,
                _ => 0,
            },
            EXTENDED..OPERATIONAL => self.extended(at - EXTENDED),
            OPERATIONAL..PORT_REGISTERS => self.read_operational(at - OPERATIONAL),
            PORT_REGISTERS..RUNTIME => {
                let port = ((at - PORT_REGISTERS) / 16) as usize;
                match (self.s.ports.get(port), at & 0xf) {
                    (Some(port), 0) => port.read(),
                    _ => 0,
                }
            }
            RUNTIME..DOORBELLS => self.read_runtime(at - RUNTIME),
            _ => 0,
        }
    }

    /// Which ports speak which protocol (xHCI 1.2, 7.2).
    fn extended(&self, at: u64) -> u32 {
        const NAME: u32 = u32::from_le_bytes(*b"USB ");
        let ports3 = (PORTS - PORTS2) as u32;
        match at {
            0x00 => 0x0200_0402,
            0x04 | 0x14 => NAME,
            0x08 => (PORTS2 as u32) << 8 | 1,
            0x10 => 0x0300_0002,
            0x18 => ports3 << 8 | (PORTS2 as u32 + 1),
            _ => 0,
        }
    }

    fn read_operational(&self, at: u64) -> u32 {
        let s = &self.s;
        match at {
            0x00 => s.command,
            0x04 => s.status,
            0x08 => 1, // pages of 4 KiB
            0x14 => s.notifications,
            // The pointer reads as zero; whether it runs does not.
            0x18 if s.commands_run => COMMAND_RUNNING as u32,
            0x30 => s.contexts as u32,
            0x34 => (s.contexts >> 32) as u32,
            0x38 => s.config,
            _ => 0,
        }
    }

    fn read_runtime(&self, at: u64) -> u32 {
        if at == 0 {
            // Microframes of 125 microseconds.
            return (self.started.elapsed().as_micros() / 125) as u32 & 0x3fff;
        }
        let Some(i) = at.checked_sub(0x20).and_then(|n| self.s.interrupters.get((n / 0x20) as usize)) else {
            return 0;
        };
        match at & 0x1f {
            0x00 => i.management,
            0x04 => i.moderation,
            0x08 => i.table_size,
            0x10 => i.table as u32,
            0x14 => (i.table >> 32) as u32,
            0x18 => i.dequeue as u32,
            0x1c => (i.dequeue >> 32) as u32,
            _ => 0,
        }
    }

    /// Writes a double word at a multiple of four.
    pub(super) fn write_register(&mut self, at: u64, value: u32) {
        match at {
            OPERATIONAL..PORT_REGISTERS => self.write_operational(at - OPERATIONAL, value),
            PORT_REGISTERS..RUNTIME => {
                let port = ((at - PORT_REGISTERS) / 16) as usize;
                if port < PORTS && at & 0xf == 0 {
                    self.write_port(port, value);
                }
            }
            RUNTIME..DOORBELLS => self.write_runtime(at - RUNTIME, value),
            DOORBELLS.. => self.doorbell(((at - DOORBELLS) / 4) as usize, value),
            _ => {}
        }
    }

    fn write_operational(&mut self, at: u64, value: u32) {
        match at {
            0x00 => self.write_command(value),
            0x04 => {
                self.s.status &= !(value & (STS_ERROR | STS_EVENT | STS_PORT));
                self.update_line();
            }
            0x14 => self.s.notifications = value & 0xffff,
            0x18 => {
                const STOP: u32 = 2;
                const ABORT: u32 = 4;
                if self.s.commands_run {
                    if value & (STOP | ABORT) != 0 {
                        self.s.commands_run = false;
                        let parameter = self.s.commands.at;
                        let control = kind::COMMAND_COMPLETION << 10;
                        self.event(0, Trb { parameter, status: code::COMMAND_RING_STOPPED << 24, control });
                    }
                } else {
                    self.s.commands.at = low(self.s.commands.at, value & !0x3f);
                    self.s.commands.cycle = value & 1 != 0;
                }
            }
            0x1c if !self.s.commands_run => self.s.commands.at = high(self.s.commands.at, value),
            0x30 => self.s.contexts = low(self.s.contexts, value & !0x3f),
            0x34 => self.s.contexts = high(self.s.contexts, value),
            0x38 => self.s.config = value & 0x3ff,
            _ => {}
        }
    }

    fn write_command(&mut self, value: u32) {
        if value & CMD_RESET != 0 {
            return self.reset();
        }
        let was = self.s.command & CMD_RUN != 0;
        self.s.command = value & (CMD_RUN | CMD_INTERRUPTS | 1 << 3 | 1 << 10);
        let runs = self.s.command & CMD_RUN != 0;
        if runs && !was {
            self.s.status &= !STS_HALTED;
            // What was plugged in before is announced now.
            if self.s.status & STS_PORT == 0 {
                let connected: Vec<_> = (0..PORTS).filter(|p| self.devices[*p].is_some()).collect();
                connected.into_iter().for_each(|p| self.port_changed(p));
            }
            self.wake();
        } else if !runs {
            self.s.status |= STS_HALTED;
            self.s.commands_run = false;
        }
        self.update_line();
    }

    fn write_port(&mut self, port: usize, value: u32) {
        match self.s.ports[port].write(value) {
            PortAction::Nothing => {}
            PortAction::Reset => {
                if let Some(device) = &mut self.devices[port] {
                    device.reset();
                }
                self.port_changed(port);
            }
            PortAction::Changed => self.port_changed(port),
        }
    }

    fn write_runtime(&mut self, at: u64, value: u32) {
        let Some(n) = at.checked_sub(0x20).map(|n| (n / 0x20) as usize).filter(|n| *n < INTERRUPTERS) else {
            return;
        };
        let i = &mut self.s.interrupters[n];
        match at & 0x1f {
            0x00 => {
                i.management &= !(value & 1);
                i.management = i.management & !2 | value & 2;
                self.update_line();
            }
            0x04 => i.moderation = value,
            0x08 => i.table_size = value & 0xffff,
            0x10 => i.table = low(i.table, value & !0x3f),
            0x14 => {
                i.table = high(i.table, value);
                self.read_table(n);
            }
            0x18 => {
                // Event handler busy: written as one to clear.
                let busy = i.dequeue & 8 & !u64::from(value);
                i.dequeue = low(i.dequeue, value & !0xf | value & 7) & !8 | busy;
            }
            0x1c => {
                i.dequeue = high(i.dequeue, value);
                // Events that came meanwhile interrupt again.
                let (base, _) = i.segment;
                let empty = i.dequeue & !0xf == base.wrapping_add(16 * u64::from(i.index));
                if i.dequeue & 8 == 0 && !empty && self.s.command & CMD_RUN != 0 {
                    self.interrupt_again(n);
                }
            }
            _ => {}
        }
    }

    /// The table of an event ring has one segment.
    fn read_table(&mut self, n: usize) {
        let at = self.s.interrupters[n].table;
        if at == 0 {
            return;
        }
        let Some(entry) = Trb::load(&self.memory, at) else {
            return self.fail("the event ring's segment table is not in memory");
        };
        let length = entry.status & 0xffff;
        if !(16..=4096).contains(&length) {
            return self.fail("an event ring's segment has 16 to 4096 entries");
        }
        let i = &mut self.s.interrupters[n];
        i.segment = (entry.parameter & !0x3f, length);
        (i.index, i.cycle) = (0, true);
    }

    fn doorbell(&mut self, slot: usize, value: u32) {
        if !self.is_running() {
            return;
        }
        match (slot, (value & 0xff) as usize) {
            (0, 0) => self.run_commands(),
            (1..=SLOTS, endpoint @ 1..32) => {
                let e = &mut self.s.slots[slot].endpoints[endpoint];
                use super::core::EndpointState::{Running, Stopped};
                if e.state == Stopped {
                    e.state = Running;
                    self.store_endpoint_state(slot, endpoint);
                }
                self.run_endpoint(slot, endpoint);
            }
            _ => {}
        }
    }

    /// Interrupts for events that the driver has not seen.
    fn interrupt_again(&mut self, n: usize) {
        let i = &mut self.s.interrupters[n];
        i.management |= 1;
        i.dequeue |= 8;
        if i.management & 2 == 0 || self.s.command & CMD_INTERRUPTS == 0 {
            return;
        }
        if self.interrupts.msix.enabled() {
            self.s.interrupters[n].management &= !1;
            self.interrupts.msix.notify(n as u16); // below four
        } else if self.interrupts.msi.enabled() {
            self.s.interrupters[n].management &= !1;
            self.interrupts.msi.notify(n as u8); // below four
        } else {
            self.update_line();
        }
    }

    /// Where the command ring is now.
    pub(super) fn command_ring(&mut self) -> &mut Ring {
        &mut self.s.commands
    }
}
