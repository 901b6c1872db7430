//! The i8042 keyboard controller with a PS/2 keyboard and mouse (IBM PS/2 Hardware Interface Technical Reference,
//! "Keyboard and Auxiliary Device Controller").

use super::ps2::{BREAK, Keyboard, Mouse, translate};
use bus::{Device, IrqLine, RegionId, State, StateError, System, SystemRequest};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

const KIND: &str = "i8042";

bitflags::bitflags! {
    /// Status register.
    #[derive(Clone, Copy, PartialEq)]
    struct Status: u8 {
        const OUTPUT_FULL = 1;
        const SYSTEM = 1 << 2;
        const COMMAND = 1 << 3;
        const NOT_LOCKED = 1 << 4;
        const AUX = 1 << 5;
    }

    /// Controller configuration ("command byte").
    #[derive(Clone, Copy, PartialEq)]
    struct Config: u8 {
        const KEYBOARD_INTERRUPT = 1;
        const AUX_INTERRUPT = 1 << 1;
        const SYSTEM = 1 << 2;
        const KEYBOARD_OFF = 1 << 4;
        const AUX_OFF = 1 << 5;
        const TRANSLATE = 1 << 6;
    }
}

/// Output port: not resetting, A20 open.
const OUTPUT_RESET: u8 = 1;
const OUTPUT_A20: u8 = 1 << 1;
/// Output port bits that show the interrupts.
const OUTPUT_KEYBOARD_FULL: u8 = 1 << 4;
const OUTPUT_AUX_FULL: u8 = 1 << 5;
/// Input port: keyboard not locked, no manufacturing jumper.
const INPUT_PORT: u8 = 0xb0;

/// Where a byte in the output buffer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Source {
    Keyboard,
    Aux,
}

/// The controller: ports 0x60 and 0x64, interrupts 1 and 12.
pub struct I8042 {
    system: System,
    keyboard_irq: IrqLine,
    aux_irq: IrqLine,
    s: Saved,
    /// Keys that wait for room in the keyboard's buffer, which holds a few only.
    typed: VecDeque<(u8, bool)>,
    pub(super) input: Option<super::i8042_input::Connection>,
}

/// Most keys that wait.
const TYPED: usize = 256;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    config: u8,
    output_port: u8,
    /// Internal memory from 0x21 on.
    ram: [u8; 31],
    /// The last byte went to the command port.
    command: bool,
    /// Command that awaits its argument at the data port.
    pending: Option<u8>,
    /// Byte in the output buffer.
    output: Option<(u8, Source)>,
    /// The output buffer's last contents, which reading it again gives.
    last: u8,
    /// Answers of the controller itself, ahead of those of the devices.
    answers: VecDeque<(u8, Source)>,
    /// A break prefix came from the keyboard and is to be merged into the next code.
    break_code: bool,
    keyboard: Keyboard,
    mouse: Mouse,
}

impl Saved {
    fn new() -> Self {
        // Systems that are started without firmware expect what firmware leaves.
        let config = Config::KEYBOARD_INTERRUPT | Config::AUX_INTERRUPT | Config::SYSTEM | Config::TRANSLATE;
        Self {
            config: config.bits(),
            output_port: OUTPUT_RESET | OUTPUT_A20,
            ram: [0; 31],
            command: false,
            pending: None,
            output: None,
            last: 0,
            answers: VecDeque::new(),
            break_code: false,
            keyboard: Keyboard::new(),
            mouse: Mouse::new(),
        }
    }
}

impl I8042 {
    /// Port 0x60.
    pub const DATA: RegionId = RegionId(0);
    /// Port 0x64.
    pub const COMMAND: RegionId = RegionId(1);

    /// A controller that interrupts through the given lines (1 and 12) and asks `system` for resets.
    pub fn new(system: System, keyboard_irq: IrqLine, aux_irq: IrqLine) -> Self {
        Self { system, keyboard_irq, aux_irq, s: Saved::new(), typed: VecDeque::new(), input: None }
    }

    /// A key goes down or up. `code` is its scan code of set 1, with bit 7 set for the keys with the prefix 0xe0;
    /// Pause is 0xc5.
    pub fn key(&mut self, code: u8, down: bool) {
        // A release is never lost while its press is kept.
        if self.typed.len() < TYPED || !down {
            self.typed.push_back((code, down));
            self.typed.truncate(2 * TYPED);
        }
        self.refill();
    }

    /// The mouse moves (right, up, wheel away from the user) or its buttons change (left bit 0, right 1, middle 2).
    pub fn mouse(&mut self, dx: i32, dy: i32, dz: i32, buttons: u8) {
        self.s.mouse.input(dx, dy, dz, buttons);
        self.refill();
    }

    /// The keyboard's LEDs: scroll lock bit 0, num lock bit 1, caps lock bit 2.
    pub fn leds(&self) -> u8 {
        self.s.keyboard.leds()
    }

    fn config(&self) -> Config {
        Config::from_bits_truncate(self.s.config)
    }

    fn answer(&mut self, byte: u8) {
        self.answer_from(byte, Source::Keyboard);
    }

    fn answer_from(&mut self, byte: u8, source: Source) {
        // No command answers with more than one byte, so one that is not read is replaced, as in the real buffer.
        self.s.answers.clear();
        self.s.answers.push_back((byte, source));
    }

    /// Moves the next byte into an empty output buffer, and sets the interrupts.
    fn refill(&mut self) {
        if self.s.output.is_none() {
            while !self.s.keyboard.has_data()
                && let Some((code, down)) = self.typed.pop_front()
            {
                self.s.keyboard.key(code, down);
            }
            self.s.output = self.next();
            if let Some((byte, _)) = self.s.output {
                self.s.last = byte;
            }
        }
        let config = self.config();
        let from = self.s.output.map(|(_, source)| source);
        self.keyboard_irq.set(from == Some(Source::Keyboard) && config.contains(Config::KEYBOARD_INTERRUPT));
        self.aux_irq.set(from == Some(Source::Aux) && config.contains(Config::AUX_INTERRUPT));
    }

    fn next(&mut self) -> Option<(u8, Source)> {
        if let Some(answer) = self.s.answers.pop_front() {
            return Some(answer);
        }
        let config = self.config();
        while !config.contains(Config::KEYBOARD_OFF) && self.s.keyboard.has_data() {
            let byte = self.s.keyboard.take()?;
            if !config.contains(Config::TRANSLATE) {
                return Some((byte, Source::Keyboard));
            }
            if byte == BREAK {
                self.s.break_code = true;
                continue;
            }
            let released = if std::mem::take(&mut self.s.break_code) { 0x80 } else { 0 };
            return Some((translate(byte) | released, Source::Keyboard));
        }
        if config.contains(Config::AUX_OFF) {
            return None;
        }
        self.s.mouse.take().map(|byte| (byte, Source::Aux))
    }

    fn read_data(&mut self) -> u8 {
        let Some((byte, _)) = self.s.output.take() else { return self.s.last };
        // The lines fall before the next byte raises them, for interrupt controllers that look for edges.
        self.keyboard_irq.set(false);
        self.aux_irq.set(false);
        self.refill();
        byte
    }

    fn status(&self) -> u8 {
        let mut status = Status::NOT_LOCKED;
        status.set(Status::OUTPUT_FULL, self.s.output.is_some());
        status.set(Status::SYSTEM, self.config().contains(Config::SYSTEM));
        status.set(Status::COMMAND, self.s.command);
        status.set(Status::AUX, matches!(self.s.output, Some((_, Source::Aux))));
        status.bits()
    }

    fn write_command(&mut self, command: u8) {
        self.s.command = true;
        self.s.pending = None;
        let set = |config: &mut u8, bit: Config, on: bool| {
            if on { *config |= bit.bits() } else { *config &= !bit.bits() }
        };
        match command {
            0x20 => self.answer(self.s.config),
            0x21..=0x3f => self.answer(self.s.ram[usize::from(command - 0x21)]),
            0x60..=0x7f | 0xd1..=0xd4 => self.s.pending = Some(command),
            0xa7 => set(&mut self.s.config, Config::AUX_OFF, true),
            0xa8 => set(&mut self.s.config, Config::AUX_OFF, false),
            0xa9 | 0xab => self.answer(0), // port tests: no fault
            0xaa => {
                set(&mut self.s.config, Config::SYSTEM, true);
                self.answer(0x55);
            }
            0xad => set(&mut self.s.config, Config::KEYBOARD_OFF, true),
            0xae => set(&mut self.s.config, Config::KEYBOARD_OFF, false),
            0xc0 => self.answer(INPUT_PORT),
            0xd0 => {
                let full = match self.s.output {
                    Some((_, Source::Keyboard)) => OUTPUT_KEYBOARD_FULL,
                    Some((_, Source::Aux)) => OUTPUT_AUX_FULL,
                    None => 0,
                };
                self.answer(self.s.output_port | full);
            }
            0xdd => self.set_output_port(self.s.output_port & !OUTPUT_A20),
            0xdf => self.set_output_port(self.s.output_port | OUTPUT_A20),
            // Pulses the low output lines that are zero; line 0 is the processor's reset.
            0xf0..=0xff if command & OUTPUT_RESET == 0 => self.system.request(SystemRequest::Reset),
            _ => {}
        }
        self.refill();
    }

    /// A20 is remembered but always open: no system of today runs with it closed.
    fn set_output_port(&mut self, value: u8) {
        self.s.output_port = value & (OUTPUT_RESET | OUTPUT_A20);
        if value & OUTPUT_RESET == 0 {
            self.system.request(SystemRequest::Reset);
        }
    }

    fn write_data(&mut self, value: u8) {
        self.s.command = false;
        match self.s.pending.take() {
            None => {
                // Writing to the keyboard turns it on.
                self.s.config &= !Config::KEYBOARD_OFF.bits();
                self.s.keyboard.command(value);
                self.leds_changed();
            }
            Some(0x60) => self.s.config = value & Config::all().bits(),
            Some(at @ 0x61..=0x7f) => self.s.ram[usize::from(at - 0x61)] = value,
            Some(0xd1) => self.set_output_port(value),
            Some(0xd2) => self.answer_from(value, Source::Keyboard),
            Some(0xd3) => self.answer_from(value, Source::Aux),
            Some(_) => {
                self.s.config &= !Config::AUX_OFF.bits();
                self.s.mouse.command(value);
            }
        }
        self.refill();
    }
}

impl Device for I8042 {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, at: RegionId, _: u64, data: &mut [u8]) {
        let value = if at == Self::DATA { self.read_data() } else { self.status() };
        if let Some(byte) = data.first_mut() {
            *byte = value;
        }
    }

    fn write(&mut self, at: RegionId, _: u64, data: &[u8]) {
        let Some(value) = data.first() else { return };
        if at == Self::DATA { self.write_data(*value) } else { self.write_command(*value) }
    }

    fn reset(&mut self) {
        self.s = Saved::new();
        self.typed.clear();
        self.leds_changed();
        self.refill();
    }

    fn save(&self) -> Result<State, StateError> {
        State::new(KIND, 1, &self.s)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let s: Saved = state.unpack(KIND, 1)?;
        if s.answers.len() > 1 || !s.keyboard.is_valid() || !s.mouse.is_valid() {
            return Err(StateError::Invalid { kind: KIND.into(), reason: "impossible queues".into() });
        }
        self.s = s;
        self.refill();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel::Irqs;
    use bus::IrqPin;
    use std::sync::{Arc, Mutex};

    #[derive(Default)]
    struct Edges(Mutex<Vec<u32>>);

    impl Irqs for Edges {
        fn set_line(&self, gsi: u32, level: bool) {
            if level {
                self.0.lock().unwrap().push(gsi);
            }
        }
        fn msi(&self, _: u64, _: u32) {}
    }

    struct Rig {
        c: I8042,
        edges: Arc<Edges>,
        seen: Arc<Mutex<Vec<SystemRequest>>>,
    }

    impl Rig {
        fn new() -> Self {
            let edges = Arc::new(Edges::default());
            let line = |gsi| IrqPin::new(edges.clone(), gsi).line();
            let seen: Arc<Mutex<Vec<SystemRequest>>> = Arc::default();
            let s = seen.clone();
            let system = System::new(move |r| s.lock().unwrap().push(r));
            Self { c: I8042::new(system, line(1), line(12)), edges, seen }
        }
        fn status(&mut self) -> u8 {
            let mut b = [0];
            self.c.read(I8042::COMMAND, 0, &mut b);
            b[0]
        }
        fn data(&mut self) -> u8 {
            let mut b = [0];
            self.c.read(I8042::DATA, 0, &mut b);
            b[0]
        }
        fn command(&mut self, c: u8) {
            self.c.write(I8042::COMMAND, 0, &[c]);
        }
        fn put(&mut self, v: u8) {
            self.c.write(I8042::DATA, 0, &[v]);
        }
        /// All that can be read, as (byte, from the mouse).
        fn drain(&mut self) -> Vec<(u8, bool)> {
            let mut all = Vec::new();
            loop {
                let status = self.status();
                if status & 1 == 0 {
                    return all;
                }
                all.push((self.data(), status & 0x20 != 0));
            }
        }
        fn edges(&self) -> Vec<u32> {
            std::mem::take(&mut self.edges.0.lock().unwrap())
        }
    }

    #[test]
    fn controller_tests_and_configuration() {
        let mut r = Rig::new();
        for (command, answer) in [(0xaa, 0x55), (0xab, 0), (0xa9, 0), (0x20, 0x47), (0xc0, 0xb0), (0xd0, 3)] {
            r.command(command);
            assert_eq!((r.data(), r.status() & 1), (answer, 0), "{command:#x}");
        }
        assert_eq!(r.status(), 0x1c);
        r.command(0x60);
        r.put(0xff);
        r.command(0x20);
        assert_eq!(r.data(), 0x77);
        assert_eq!(r.status() & 8, 8);
        r.command(0xa8);
        r.command(0xae);
        r.command(0x20);
        assert_eq!(r.data(), 0x47);
        r.command(0x65);
        r.put(0x5a);
        r.command(0x25);
        assert_eq!(r.data(), 0x5a);
    }

    #[test]
    fn reset_pulses() {
        let mut r = Rig::new();
        r.command(0xff);
        assert_eq!(r.seen.lock().unwrap().len(), 0);
        r.command(0xfe);
        r.command(0xd1);
        r.put(2);
        assert_eq!(*r.seen.lock().unwrap(), [SystemRequest::Reset, SystemRequest::Reset]);
    }

    #[test]
    fn keys_are_translated() {
        let mut r = Rig::new();
        r.c.key(0x1e, true);
        r.c.key(0x1e, false);
        r.c.key(0xc8, false);
        assert_eq!(r.drain(), [(0x1e, false), (0x9e, false), (0xe0, false), (0xc8, false)]);
        assert_eq!(r.edges(), [1; 4]);
        r.put(0xf2);
        assert_eq!(r.drain(), [(0xfa, false), (0xab, false), (0x41, false)]);
        r.command(0x60);
        r.put(0);
        r.c.key(0x1e, false);
        assert_eq!(r.drain(), [(0xf0, false), (0x1c, false)]);
        assert_eq!(r.edges(), [1; 3], "interrupts are off");
    }

    #[test]
    fn aux_loop_and_mouse() {
        let mut r = Rig::new();
        r.command(0xd3);
        r.put(0xa5);
        assert_eq!((r.drain(), r.edges()), (vec![(0xa5, true)], vec![12]));
        r.command(0xd4);
        r.put(0xff);
        assert_eq!(r.drain(), [(0xfa, true), (0xaa, true), (0, true)]);
        r.command(0xd4);
        r.put(0xf4);
        r.drain();
        r.edges();
        r.c.mouse(1, 2, 0, 1);
        assert_eq!((r.drain(), r.edges()), (vec![(9, true), (1, true), (2, true)], vec![12; 3]));
        r.command(0xa7);
        r.c.mouse(1, 2, 0, 0);
        assert_eq!(r.drain(), []);
        r.command(0xa8);
        assert_eq!(r.drain().len(), 3);
    }

    #[test]
    fn a_disabled_keyboard_keeps_its_keys() {
        let mut r = Rig::new();
        r.command(0xad);
        r.c.key(0x10, true);
        assert_eq!(r.drain(), []);
        r.command(0xae);
        assert_eq!(r.drain(), [(0x10, false)]);
        r.put(0xed);
        r.put(4);
        r.drain();
        assert_eq!(r.c.leds(), 4);
    }
}
