//! The I/O APIC (Intel 82093AA data sheet; ICH9 data sheet, 13.5, for version 0x20 with its EOI register).

use super::message::{Delivery, Destination, Message};
use serde::{Deserialize, Serialize};

/// Interrupt inputs.
pub(super) const PINS: usize = 24;

const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Bits of a redirection entry that a guest can write: all that are defined but delivery status and remote IRR.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// Offsets in the register window.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

/// The I/O APIC. `send` of its methods takes an interrupt message and says whether a local APIC accepted it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct IoApic {
    select: u8,
    id: u8,
    entries: [u64; PINS],
    /// Levels of the inputs.
    lines: u32,
}

impl IoApic {
    pub(super) fn new() -> Self {
        Self { select: 0, id: 0, entries: [MASKED; PINS], lines: 0 }
    }

    /// RESET; the inputs are what they are.
    pub(super) fn reset(&mut self) {
        *self = Self { lines: self.lines, ..Self::new() };
    }

    /// Whether a loaded state can be.
    pub(super) fn is_valid(&self) -> bool {
        self.lines >> PINS == 0 && self.entries.iter().all(|e| e & !(WRITABLE | REMOTE_IRR) == 0)
    }

    /// Sets the level of an input.
    pub(super) fn set_line(&mut self, pin: usize, level: bool, send: &mut dyn FnMut(Message) -> bool) {
        let bit = 1u32 << pin;
        let rising = level && self.lines & bit == 0;
        if level {
            self.lines |= bit
        } else {
            self.lines &= !bit
        }
        let entry = self.entries[pin];
        // An edge that comes while the entry is masked is lost, a level is not.
        if level && (rising || entry & LEVEL != 0) {
            self.deliver(pin, send);
        }
    }

    fn deliver(&mut self, pin: usize, send: &mut dyn FnMut(Message) -> bool) {
        let entry = self.entries[pin];
        let level = entry & LEVEL != 0;
        if entry & MASKED != 0 || (level && entry & REMOTE_IRR != 0) {
            return;
        }
        let Some(delivery) = Delivery::from_bits((entry >> 8) as u32).filter(|d| *d != Delivery::Startup)
        else {
            return;
        };
        let destination = Destination::new((entry >> 56) as u32, entry & 0x800 != 0, false);
        // Only fixed and lowest-priority interrupts end with an EOI.
        let ends = level && matches!(delivery, Delivery::Fixed | Delivery::LowestPriority);
        let message = Message { destination, delivery, vector: entry as u8, level: ends };
        if send(message) && ends {
            self.entries[pin] |= REMOTE_IRR;
        }
    }

    /// An interrupt of this vector has ended: by broadcast from a local APIC, or through the EOI register.
    pub(super) fn end_of_interrupt(&mut self, vector: u8, send: &mut dyn FnMut(Message) -> bool) {
        for pin in 0..PINS {
            let entry = self.entries[pin];
            if entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR && entry as u8 == vector {
                self.entries[pin] &= !REMOTE_IRR;
                if self.lines & (1 << pin) != 0 {
                    self.deliver(pin, send);
                }
            }
        }
    }

    fn read_window(&self) -> u32 {
        match self.select {
            0 | 2 => u32::from(self.id) << 24,
            1 => VERSION,
            n @ 0x10..=0x3f => {
                let entry = self.entries[usize::from(n - 0x10) / 2];
                (if n & 1 == 0 { entry } else { entry >> 32 }) as u32
            }
            _ => u32::MAX,
        }
    }

    fn write_window(&mut self, value: u32, send: &mut dyn FnMut(Message) -> bool) {
        match self.select {
            0 => self.id = (value >> 24) as u8 & 0xf,
            n @ 0x10..=0x3f => {
                let pin = usize::from(n - 0x10) / 2;
                let old = self.entries[pin];
                let merged = match n & 1 {
                    0 => old >> 32 << 32 | u64::from(value),
                    _ => old & 0xffff_ffff | u64::from(value) << 32,
                };
                let mut entry = merged & WRITABLE | old & REMOTE_IRR;
                // An edge-triggered entry has no remote IRR. Guests clear it by changing the trigger mode to and fro.
                if entry & LEVEL == 0 {
                    entry &= !REMOTE_IRR;
                }
                self.entries[pin] = entry;
                if entry & LEVEL != 0 && self.lines & (1 << pin) != 0 {
                    self.deliver(pin, send);
                }
            }
            _ => {}
        }
    }

    /// Guest read at `offset` of the register page.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset & !3 {
            SELECT => self.select.into(),
            WINDOW => self.read_window(),
            _ => 0,
        };
        data.fill(0);
        for (d, s) in data.iter_mut().zip(&value.to_le_bytes()[(offset & 3) as usize..]) {
            *d = *s;
        }
    }

    /// Guest write at `offset` of the register page.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], send: &mut dyn FnMut(Message) -> bool) {
        let mut bytes = [0; 4];
        for (b, d) in bytes.iter_mut().zip(data) {
            *b = *d;
        }
        let value = u32::from_le_bytes(bytes);
        match offset {
            SELECT => self.select = value as u8,
            WINDOW if data.len() >= 4 => self.write_window(value, send),
            EOI => self.end_of_interrupt(value as u8, send),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [u8; 0] = [];

    /// An IOAPIC and what it sent.
    struct Rig {
        apic: IoApic,
        sent: Vec<Message>,
        accept: bool,
    }

    impl Rig {
        fn new() -> Self {
            Self { apic: IoApic::new(), sent: Vec::new(), accept: true }
        }
        fn with(&mut self, f: impl FnOnce(&mut IoApic, &mut dyn FnMut(Message) -> bool)) {
            let (sent, accept) = (&mut self.sent, self.accept);
            f(&mut self.apic, &mut |m| {
                sent.push(m);
                accept
            });
        }
        fn write(&mut self, register: u8, value: u32) {
            self.with(|a, s| a.write(SELECT, &[register], s));
            self.with(|a, s| a.write(WINDOW, &value.to_le_bytes(), s));
        }
        fn read(&mut self, register: u8) -> u32 {
            let mut b = [0; 4];
            self.with(|a, s| a.write(SELECT, &u32::from(register).to_le_bytes(), s));
            self.apic.read(WINDOW, &mut b);
            u32::from_le_bytes(b)
        }
        fn line(&mut self, pin: usize, level: bool) {
            self.with(|a, s| a.set_line(pin, level, s));
        }
        fn vectors(&mut self) -> Vec<u8> {
            self.sent.drain(..).map(|m| m.vector).collect()
        }
    }

    #[test]
    fn registers() {
        let mut r = Rig::new();
        assert_eq!(r.read(1), 0x0017_0020);
        r.write(0, 0xff00_0000);
        assert_eq!(r.read(0), 0x0f00_0000);
        r.write(0x10 + 2 * 5, 0xffff_ffff);
        r.write(0x11 + 2 * 5, 0xffff_ffff);
        assert_eq!((r.read(0x1a), r.read(0x1b)), (0x0001_afff, 0xff00_0000));
        assert_eq!((r.read(0x3f), r.read(0x40)), (0, u32::MAX));
        assert_eq!(r.sent, []);
    }

    #[test]
    fn edges_are_delivered_once_and_lost_while_masked() {
        let mut r = Rig::new();
        r.line(4, true);
        r.line(4, false);
        r.write(0x18, 0x34);
        assert_eq!(r.vectors(), NONE);
        r.line(4, true);
        r.line(4, true);
        assert_eq!(r.vectors(), [0x34]);
        r.line(4, false);
        r.line(4, true);
        assert_eq!(r.vectors(), [0x34]);
    }

    #[test]
    fn levels_wait_for_the_end_of_interrupt() {
        let mut r = Rig::new();
        r.write(0x10 + 2 * 11, 0x1_8051);
        r.line(11, true);
        assert_eq!(r.vectors(), NONE);
        r.write(0x10 + 2 * 11, 0x8051);
        assert!(r.sent[0].level);
        assert_eq!(r.vectors(), [0x51]);
        assert_eq!(r.read(0x10 + 2 * 11), 0xc051);
        r.line(11, false);
        r.line(11, true);
        assert_eq!(r.vectors(), NONE, "in service");
        r.with(|a, s| a.end_of_interrupt(0x50, s));
        assert_eq!(r.vectors(), NONE);
        r.with(|a, s| a.end_of_interrupt(0x51, s));
        assert_eq!(r.vectors(), [0x51], "still asserted");
        r.line(11, false);
        r.with(|a, s| a.write(EOI, &0x51u32.to_le_bytes(), s));
        assert_eq!(r.vectors(), NONE);
        assert_eq!(r.read(0x10 + 2 * 11), 0x8051);
        // Nobody took it: the next change of level tries again.
        r.accept = false;
        r.line(11, true);
        assert_eq!(r.vectors(), [0x51]);
        assert_eq!(r.read(0x10 + 2 * 11), 0x8051);
    }

    #[test]
    fn changing_the_trigger_mode_clears_remote_irr() {
        let mut r = Rig::new();
        r.write(0x10, 0x8060);
        r.line(0, true);
        assert_eq!(r.read(0x10), 0xc060);
        r.line(0, false);
        r.write(0x10, 0x1_0060);
        r.write(0x10, 0x8060);
        assert_eq!(r.read(0x10), 0x8060);
    }

    #[test]
    fn destinations() {
        let mut r = Rig::new();
        r.write(0x11, 0x0300_0000);
        r.write(0x10, 0x0931);
        r.line(0, true);
        let m = r.sent[0];
        assert_eq!(m.destination, Destination::Logical(3));
        assert_eq!((m.delivery, m.vector, m.level), (Delivery::LowestPriority, 0x31, false));
    }
}
