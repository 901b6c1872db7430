//! The pair of 8259A interrupt controllers (Intel 8259A data sheet; ICH9 data sheet, 13.4, for the ELCR).

use serde::{Deserialize, Serialize};

/// Input of the master where the slave is connected.
const CASCADE: u8 = 2;

/// Which register a read of the command port gives (OCW3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Select {
    #[default]
    Request,
    Service,
}

/// Where the chip is in its initialisation sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Init {
    #[default]
    Done,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Chip {
    /// Input levels.
    lines: u8,
    irr: u8,
    isr: u8,
    imr: u8,
    /// Input of highest priority.
    first: u8,
    vector_base: u8,
    select: Select,
    init: Init,
    /// ICW1 asked for ICW4; ICW1 said there is no other chip.
    wants_icw4: bool,
    single: bool,
    /// ICW1: all inputs are level-triggered.
    all_level: bool,
    poll: bool,
    special_mask: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    fully_nested: bool,
    /// Edge/level control register: inputs that are level-triggered.
    elcr: u8,
}

impl Chip {
    /// After power-on everything is masked, so that a chip that nobody has given vectors yet interrupts nobody.
    fn power_on() -> Self {
        Self { imr: 0xff, ..Self::default() }
    }

    /// Inputs that are level-triggered.
    fn level(&self) -> u8 {
        if self.all_level { 0xff } else { self.elcr }
    }

    /// Rank of the input with the highest priority in `set`, 0 for the highest; 8 if the set is empty.
    fn rank(&self, set: u8) -> u8 {
        set.rotate_right(self.first.into()).trailing_zeros() as u8 // at most 8
    }

    fn input(&self, rank: u8) -> u8 {
        (rank + self.first) & 7
    }

    fn set_line(&mut self, n: u8, level: bool) {
        let bit = 1 << n;
        if level {
            if self.level() & bit != 0 || self.lines & bit == 0 {
                self.irr |= bit;
            }
            self.lines |= bit;
        } else {
            if self.level() & bit != 0 {
                self.irr &= !bit;
            }
            self.lines &= !bit;
        }
    }

    /// The input whose interrupt the chip asks for. `cascade` is the input behind which a slave is, if any.
    fn request(&self, cascade: Option<u8>) -> Option<u8> {
        let rank = self.rank(self.irr & !self.imr);
        if rank == 8 {
            return None;
        }
        let mut service = self.isr;
        if self.special_mask {
            service &= !self.imr;
        }
        // In special fully nested mode the slave's own priorities decide among its inputs.
        if let (true, Some(n)) = (self.fully_nested, cascade) {
            service &= !(1 << n);
        }
        (rank < self.rank(service)).then(|| self.input(rank))
    }

    fn acknowledge(&mut self, n: u8) {
        let bit = 1 << n;
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.first = (n + 1) & 7;
        }
        if self.level() & bit == 0 {
            self.irr &= !bit;
        }
    }

    /// The non-specific end of interrupt: of the input in service with the highest priority.
    fn end_highest(&mut self) -> Option<u8> {
        let set = if self.special_mask { self.isr & !self.imr } else { self.isr };
        let rank = self.rank(set);
        if rank == 8 {
            return None;
        }
        let n = self.input(rank);
        self.isr &= !(1 << n);
        Some(n)
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1. Edges are forgotten; levels are still there.
            *self = Self {
                lines: self.lines,
                elcr: self.elcr,
                vector_base: self.vector_base,
                init: Init::Icw2,
                wants_icw4: value & 1 != 0,
                single: value & 2 != 0,
                all_level: value & 8 != 0,
                ..Self::default()
            };
            self.irr = self.lines & self.level();
        } else if value & 8 != 0 {
            // OCW3.
            if value & 4 != 0 {
                self.poll = true;
            }
            match value & 3 {
                2 => self.select = Select::Request,
                3 => self.select = Select::Service,
                _ => {}
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            // OCW2.
            let n = value & 7;
            match value >> 5 {
                0 => self.rotate_on_auto_eoi = false,
                4 => self.rotate_on_auto_eoi = true,
                1 => {
                    self.end_highest();
                }
                5 => {
                    if let Some(n) = self.end_highest() {
                        self.first = (n + 1) & 7;
                    }
                }
                3 => self.isr &= !(1 << n),
                6 => self.first = (n + 1) & 7,
                7 => {
                    self.isr &= !(1 << n);
                    self.first = (n + 1) & 7;
                }
                _ => {} // 2: no operation
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        let last = if self.wants_icw4 { Init::Icw4 } else { Init::Done };
        match self.init {
            Init::Done => self.imr = value,
            Init::Icw2 => {
                self.vector_base = value & 0xf8;
                self.init = if self.single { last } else { Init::Icw3 };
            }
            // ICW3 tells how the chips are wired, which a PC's are in one way only.
            Init::Icw3 => self.init = last,
            Init::Icw4 => {
                self.fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 2 != 0;
                self.init = Init::Done;
            }
        }
    }

    fn is_valid(&self) -> bool {
        self.first < 8 && self.vector_base & 7 == 0
    }
}

/// The pair. Inputs 0 to 7 are the master's, 8 to 15 the slave's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pic {
    master: Chip,
    slave: Chip,
}

impl Pic {
    pub(super) fn new() -> Self {
        Self { master: Chip::power_on(), slave: Chip::power_on() }
    }

    /// RESET; the inputs are what they are.
    pub(super) fn reset(&mut self) {
        for chip in [&mut self.master, &mut self.slave] {
            *chip = Chip { lines: chip.lines, ..Chip::power_on() };
        }
        self.cascade();
    }

    /// Whether a loaded state can be.
    pub(super) fn is_valid(&self) -> bool {
        self.master.is_valid() && self.slave.is_valid()
    }

    /// Sets the level of input `n` (0..16, not 2).
    pub(super) fn set_line(&mut self, n: u8, level: bool) {
        if n < 8 {
            self.master.set_line(n, level);
        } else {
            self.slave.set_line(n & 7, level);
            self.cascade();
        }
    }

    /// Whether the pair asks for an interrupt (its INT output).
    pub(super) fn output(&self) -> bool {
        self.master.request(Some(CASCADE)).is_some()
    }

    fn cascade(&mut self) {
        let output = self.slave.request(None).is_some();
        self.master.set_line(CASCADE, output);
    }

    /// After the slave was acknowledged: its output falls, and rises again if there is more, which the master's
    /// edge detection has to see.
    fn cascade_again(&mut self) {
        self.master.set_line(CASCADE, false);
        self.cascade();
    }

    /// The processor's acknowledge cycle: the vector, spurious if the request has gone.
    pub(super) fn acknowledge(&mut self) -> u8 {
        let Some(n) = self.master.request(Some(CASCADE)) else {
            return self.master.vector_base + 7;
        };
        self.master.acknowledge(n);
        if n != CASCADE {
            return self.master.vector_base + n;
        }
        let vector = match self.slave.request(None) {
            Some(n) => {
                self.slave.acknowledge(n);
                self.slave.vector_base + n
            }
            None => self.slave.vector_base + 7,
        };
        self.cascade_again();
        vector
    }

    fn chip(&mut self, slave: bool) -> &mut Chip {
        if slave { &mut self.slave } else { &mut self.master }
    }

    /// Guest read of a chip's command (0x20, 0xa0) or data port (0x21, 0xa1).
    pub(super) fn read(&mut self, slave: bool, data_port: bool) -> u8 {
        let cascade = (!slave).then_some(CASCADE);
        let chip = self.chip(slave);
        if std::mem::take(&mut chip.poll) {
            let Some(n) = chip.request(cascade) else { return 0 };
            chip.acknowledge(n);
            if slave {
                self.cascade_again();
            }
            return 0x80 | n;
        }
        match (data_port, chip.select) {
            (true, _) => chip.imr,
            (false, Select::Request) => chip.irr,
            (false, Select::Service) => chip.isr,
        }
    }

    /// Guest write of a chip's command or data port.
    pub(super) fn write(&mut self, slave: bool, data_port: bool, value: u8) {
        let chip = self.chip(slave);
        if data_port {
            chip.write_data(value)
        } else {
            chip.write_command(value)
        }
        self.cascade();
    }

    /// Edge/level control register of a chip (0x4d0, 0x4d1).
    pub(super) fn elcr(&self, slave: bool) -> u8 {
        if slave { self.slave.elcr } else { self.master.elcr }
    }

    /// Writes an ELCR. IRQ 0, 1, 2, 8 and 13 are always edge-triggered.
    pub(super) fn set_elcr(&mut self, slave: bool, value: u8) {
        let chip = self.chip(slave);
        chip.elcr = value & if slave { 0xde } else { 0xf8 };
        chip.irr = (chip.irr & !chip.level()) | (chip.lines & chip.level());
        self.cascade();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pair programmed as PC firmware does: vectors 0x08 and 0x70, everything unmasked.
    fn ready(icw4: u8) -> Pic {
        let mut p = Pic::new();
        for (slave, base, wiring) in [(false, 0x08, 4), (true, 0x70, 2)] {
            p.write(slave, false, 0x11);
            for v in [base, wiring, icw4, 0] {
                p.write(slave, true, v);
            }
        }
        p
    }

    fn pulse(p: &mut Pic, n: u8) {
        p.set_line(n, true);
        p.set_line(n, false);
    }

    const EOI: u8 = 0x20;

    #[test]
    fn priorities_and_nesting() {
        let mut p = ready(1);
        pulse(&mut p, 4);
        assert!(p.output());
        assert_eq!(p.acknowledge(), 0x0c);
        pulse(&mut p, 5);
        assert!(!p.output(), "lower priority waits");
        pulse(&mut p, 0);
        assert_eq!(p.acknowledge(), 0x08);
        p.write(false, false, EOI);
        assert!(!p.output(), "4 is still in service");
        p.write(false, false, EOI);
        assert_eq!(p.acknowledge(), 0x0d);
        p.write(false, false, 0x65);
        assert!(!p.output());
        assert_eq!(p.acknowledge(), 0x0f, "spurious");
    }

    #[test]
    fn slave_goes_through_the_master() {
        let mut p = ready(1);
        pulse(&mut p, 12);
        pulse(&mut p, 8);
        assert_eq!(p.acknowledge(), 0x70);
        assert!(!p.output());
        p.write(true, false, EOI);
        p.write(false, false, EOI);
        assert_eq!(p.acknowledge(), 0x74);
        p.write(true, false, EOI);
        p.write(false, false, EOI);
        assert!(!p.output());
        p.write(true, true, 0xff);
        pulse(&mut p, 12);
        assert!(!p.output());
        p.write(true, true, 0);
        assert!(p.output());
    }

    #[test]
    fn automatic_end_of_interrupt_on_both() {
        let mut p = ready(3);
        pulse(&mut p, 9);
        pulse(&mut p, 10);
        assert_eq!((p.acknowledge(), p.acknowledge()), (0x71, 0x72));
        assert!(!p.output());
    }

    #[test]
    fn rotation() {
        let mut p = ready(1);
        // Set priority: input 4 lowest, so 5 highest.
        p.write(false, false, 0xc4);
        pulse(&mut p, 1);
        pulse(&mut p, 6);
        assert_eq!(p.acknowledge(), 0x0e);
        // Rotate on non-specific EOI: 6 becomes lowest, so 7 is first, then 0, 1.
        p.write(false, false, 0xa0);
        pulse(&mut p, 6);
        pulse(&mut p, 7);
        assert_eq!(p.acknowledge(), 0x0f);
        p.write(false, false, EOI);
        assert_eq!(p.acknowledge(), 0x09);
    }

    #[test]
    fn level_and_edge() {
        let mut p = ready(1);
        p.set_elcr(true, 0xff);
        p.set_elcr(false, 0xff);
        assert_eq!((p.elcr(false), p.elcr(true)), (0xf8, 0xde));
        p.set_line(11, true);
        assert_eq!(p.acknowledge(), 0x73);
        p.write(true, false, EOI);
        p.write(false, false, EOI);
        assert_eq!(p.acknowledge(), 0x73, "still asserted");
        p.set_line(11, false);
        p.write(true, false, EOI);
        p.write(false, false, EOI);
        assert!(!p.output());
        p.set_line(1, true);
        assert_eq!(p.acknowledge(), 0x09);
        p.write(false, false, EOI);
        p.set_line(1, true);
        assert!(!p.output(), "no new edge");
    }

    #[test]
    fn special_mask_mode_lets_lower_priorities_in() {
        let mut p = ready(1);
        pulse(&mut p, 3);
        assert_eq!(p.acknowledge(), 0x0b);
        p.write(false, true, 0x08);
        p.write(false, false, 0x68);
        pulse(&mut p, 6);
        assert_eq!(p.acknowledge(), 0x0e);
        p.write(false, false, EOI);
        p.write(false, false, 0x0b);
        assert_eq!(p.read(false, false), 0x08, "a masked input's service bit stays");
        p.write(false, false, 0x48);
        pulse(&mut p, 6);
        assert!(!p.output());
    }

    #[test]
    fn special_fully_nested_mode() {
        let mut p = ready(0x11);
        pulse(&mut p, 12);
        assert_eq!(p.acknowledge(), 0x74);
        pulse(&mut p, 9);
        assert_eq!(p.acknowledge(), 0x71, "a higher input of the same slave");
    }

    #[test]
    fn poll_and_register_reads() {
        let mut p = ready(1);
        pulse(&mut p, 5);
        assert_eq!(p.read(false, false), 0x20);
        p.write(false, false, 0x0c);
        assert_eq!(p.read(false, false), 0x85);
        p.write(false, false, 0x0b);
        assert_eq!(p.read(false, false), 0x20);
        p.write(false, false, 0x0c);
        assert_eq!(p.read(false, false), 0);
        p.write(false, true, 0xa5);
        assert_eq!(p.read(false, true), 0xa5);
    }

    #[test]
    fn initialisation_forgets_edges_and_keeps_levels() {
        let mut p = ready(1);
        p.set_elcr(false, 0x20);
        p.set_line(5, true);
        p.set_line(3, true);
        p.write(false, false, 0x13);
        assert_eq!(p.read(false, false), 0x20);
        // Single: ICW3 is left out.
        p.write(false, true, 0x47);
        p.write(false, true, 1);
        p.write(false, true, 0xdf);
        assert_eq!(p.read(false, true), 0xdf);
        assert_eq!(p.acknowledge(), 0x45);
    }
}
