//! The 16550A serial port (National Semiconductor PC16550D data sheet).
//!
//! Bytes leave as fast as they come: the transmitter is always empty, so a driver never waits for the line. As on
//! PCs of today, and unlike the first, OUT2 does not gate the interrupt: some systems forget to set it.

use super::output::Output;
use crate::{CreateError, IsaDevice, Kind, Model, Parts};
use base::Timers;
use base::props::{Bag, Properties};
use bus::{CharEvent, CharFrontend, Chardev, Device, IrqLine, RegionId, State, StateError, shared};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

const KIND: &str = "isa-serial";
const FIFO: usize = 16;

/// Properties of `isa-serial`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Spec {
    /// Character device that it is connected to.
    pub chardev: String,
    /// Which of the PC's four ports it is (0 = COM1): gives ports and interrupt.
    #[serde(default)]
    pub index: Option<u8>,
    /// First of its 8 ports.
    #[serde(default)]
    pub iobase: Option<u16>,
    /// Its interrupt.
    #[serde(default)]
    pub irq: Option<u8>,
}

/// The table entry.
pub const MODEL: Model = Model {
    name: KIND,
    about: "16550A serial port (ISA)",
    properties: Properties::of::<Spec>,
    kind: Kind::Isa(create),
};

/// First port and interrupt of COM1 to COM4.
pub const COM: [(u16, u8); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

fn create(bag: &Bag, parts: &mut dyn Parts) -> Result<IsaDevice, CreateError> {
    let spec: Spec = bag.spec()?;
    let index = spec.index.unwrap_or(0);
    let Some((port, irq)) = COM.get(usize::from(index)).copied() else {
        return Err(CreateError::Other(format!("{KIND}: index={index} is not one of 0 to 3")));
    };
    let irq = parts.isa_irq(spec.irq.unwrap_or(irq))?;
    let chardev = parts.take_chardev(&spec.chardev)?;
    let device = shared(Serial::new(chardev, irq, parts.timers()));
    Ok(IsaDevice { device, ports: (spec.iobase.unwrap_or(port), 8) })
}

bitflags::bitflags! {
    /// Interrupt enable register.
    #[derive(Clone, Copy, PartialEq)]
    struct Ier: u8 {
        const RECEIVED = 1;
        const TRANSMITTER_EMPTY = 1 << 1;
        const LINE_STATUS = 1 << 2;
        const MODEM_STATUS = 1 << 3;
    }

    /// Line status register.
    #[derive(Clone, Copy, PartialEq)]
    struct Lsr: u8 {
        const DATA = 1;
        const OVERRUN = 1 << 1;
        const BREAK = 1 << 4;
        const HOLDING_EMPTY = 1 << 5;
        const EMPTY = 1 << 6;
        const FIFO_ERROR = 1 << 7;
    }

    /// Modem control register.
    #[derive(Clone, Copy, PartialEq)]
    struct Mcr: u8 {
        const DTR = 1;
        const RTS = 1 << 1;
        const OUT1 = 1 << 2;
        const OUT2 = 1 << 3;
        const LOOP = 1 << 4;
    }

    /// Modem status register.
    #[derive(Clone, Copy, PartialEq)]
    struct Msr: u8 {
        const DELTA_CTS = 1;
        const DELTA_DSR = 1 << 1;
        const RING_ENDED = 1 << 2;
        const DELTA_DCD = 1 << 3;
        const CTS = 1 << 4;
        const DSR = 1 << 5;
        const RI = 1 << 6;
        const DCD = 1 << 7;
    }
}

/// Interrupt identification, without the FIFO bits.
mod iir {
    pub const NONE: u8 = 1;
    pub const MODEM: u8 = 0;
    pub const TRANSMITTER: u8 = 2;
    pub const RECEIVED: u8 = 4;
    pub const LINE: u8 = 6;
    pub const TIMEOUT: u8 = 0xc;
    pub const FIFO: u8 = 0xc0;
}

const LCR_DLAB: u8 = 1 << 7;
const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;

/// Whoever is connected is there and ready.
const CONNECTED: Msr = Msr::CTS.union(Msr::DSR).union(Msr::DCD);

/// A 16550A. Region 0 is its eight ports.
pub struct Serial {
    port: Arc<Mutex<Port>>,
    output: Output,
}

struct Port {
    irq: IrqLine,
    r: Registers,
    /// The back end has input that did not fit.
    refused: bool,
}

/// What is saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Registers {
    divisor: u16,
    ier: u8,
    lcr: u8,
    mcr: u8,
    msr: u8,
    scratch: u8,
    fifo_enabled: bool,
    /// Trigger level bits of the FIFO control register.
    trigger: u8,
    overrun: bool,
    transmitter_interrupt: bool,
    /// Received bytes, each with its line status bits.
    received: VecDeque<(u8, u8)>,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            divisor: 12, // 9600 baud, as firmware leaves it
            ier: 0,
            lcr: 0,
            mcr: 0,
            msr: CONNECTED.bits(),
            scratch: 0,
            fifo_enabled: false,
            trigger: 0,
            overrun: false,
            transmitter_interrupt: false,
            received: VecDeque::with_capacity(FIFO),
        }
    }
}

/// What an access wants done once the port's lock is released.
#[derive(Default)]
struct After {
    send: Option<u8>,
    resume: bool,
}

impl Serial {
    /// A port that interrupts through `irq`, connected to `chardev`.
    pub fn new(chardev: Arc<dyn Chardev>, irq: IrqLine, timers: &Timers) -> Self {
        let port = Arc::new(Mutex::new(Port { irq, r: Registers::default(), refused: false }));
        chardev.attach(Arc::new(Frontend(Arc::downgrade(&port))));
        Self { port, output: Output::new(chardev, timers) }
    }

    fn finish(&self, after: After) {
        if let Some(byte) = after.send {
            self.output.push(byte);
        }
        if after.resume {
            self.output.chardev().resume_input();
        }
    }
}

fn lock(port: &Mutex<Port>) -> MutexGuard<'_, Port> {
    port.lock().unwrap_or_else(|e| e.into_inner())
}

/// The chardev's way in. Weak, or port and chardev would keep each other alive.
struct Frontend(Weak<Mutex<Port>>);

impl CharFrontend for Frontend {
    fn receive(&self, data: &[u8]) -> usize {
        let Some(port) = self.0.upgrade() else { return data.len() };
        let mut p = lock(&port);
        let room = if p.looped() { 0 } else { p.r.capacity().saturating_sub(p.r.received.len()) };
        let taken = room.min(data.len());
        p.r.received.extend(data[..taken].iter().map(|b| (*b, 0)));
        p.refused |= taken < data.len();
        p.update();
        taken
    }

    fn event(&self, event: CharEvent) {
        // The line stays up whoever is at the other end, and a UART knows no window sizes.
        if event != CharEvent::Break {
            return;
        }
        let Some(port) = self.0.upgrade() else { return };
        let mut p = lock(&port);
        if !p.looped() {
            p.push(0, Lsr::BREAK);
            p.update();
        }
    }
}

impl Registers {
    fn capacity(&self) -> usize {
        if self.fifo_enabled { FIFO } else { 1 }
    }

    fn trigger_level(&self) -> usize {
        if self.fifo_enabled { [1, 4, 8, 14][usize::from(self.trigger & 3)] } else { 1 }
    }

    fn lsr(&self) -> Lsr {
        let mut lsr = Lsr::HOLDING_EMPTY | Lsr::EMPTY;
        if let Some((_, errors)) = self.received.front() {
            lsr |= Lsr::DATA | Lsr::from_bits_truncate(*errors);
        }
        if self.overrun {
            lsr |= Lsr::OVERRUN;
        }
        if self.fifo_enabled && self.received.iter().any(|(_, e)| *e != 0) {
            lsr |= Lsr::FIFO_ERROR;
        }
        lsr
    }

    /// The interrupt with the highest priority that is pending and enabled.
    fn interrupt(&self) -> u8 {
        let ier = Ier::from_bits_truncate(self.ier);
        let n = self.received.len();
        if ier.contains(Ier::LINE_STATUS) && self.lsr().intersects(Lsr::OVERRUN | Lsr::BREAK) {
            iir::LINE
        } else if ier.contains(Ier::RECEIVED) && n >= self.trigger_level() {
            iir::RECEIVED
        } else if ier.contains(Ier::RECEIVED) && n > 0 {
            // Hardware waits for four characters' time without a new one. Nobody gains from waiting here.
            iir::TIMEOUT
        } else if ier.contains(Ier::TRANSMITTER_EMPTY) && self.transmitter_interrupt {
            iir::TRANSMITTER
        } else if ier.contains(Ier::MODEM_STATUS) && self.msr & 0xf != 0 {
            iir::MODEM
        } else {
            iir::NONE
        }
    }
}

impl Port {
    fn looped(&self) -> bool {
        Mcr::from_bits_truncate(self.r.mcr).contains(Mcr::LOOP)
    }

    fn update(&self) {
        self.irq.set(self.r.interrupt() != iir::NONE);
    }

    fn push(&mut self, byte: u8, errors: Lsr) {
        if self.r.received.len() < self.r.capacity() {
            self.r.received.push_back((byte, errors.bits()));
        } else {
            self.r.overrun = true;
        }
    }

    /// Whether the back end is to be asked for more: it had some, and there is room.
    fn take_refused(&mut self) -> bool {
        self.refused && !self.looped() && self.r.received.is_empty() && std::mem::take(&mut self.refused)
    }

    /// Modem inputs: the outputs, when looped back.
    fn update_modem(&mut self) {
        let mcr = Mcr::from_bits_truncate(self.r.mcr);
        let mut inputs = CONNECTED;
        if mcr.contains(Mcr::LOOP) {
            inputs = Msr::empty();
            for (output, input) in
                [(Mcr::DTR, Msr::DSR), (Mcr::RTS, Msr::CTS), (Mcr::OUT1, Msr::RI), (Mcr::OUT2, Msr::DCD)]
            {
                inputs.set(input, mcr.contains(output));
            }
        }
        let old = Msr::from_bits_truncate(self.r.msr);
        let changed = old ^ inputs;
        let mut deltas = old & (Msr::DELTA_CTS | Msr::DELTA_DSR | Msr::RING_ENDED | Msr::DELTA_DCD);
        for (input, delta) in
            [(Msr::CTS, Msr::DELTA_CTS), (Msr::DSR, Msr::DELTA_DSR), (Msr::DCD, Msr::DELTA_DCD)]
        {
            if changed.contains(input) {
                deltas |= delta;
            }
        }
        if old.contains(Msr::RI) && !inputs.contains(Msr::RI) {
            deltas |= Msr::RING_ENDED;
        }
        self.r.msr = (inputs | deltas).bits();
    }

    fn read(&mut self, offset: u64, after: &mut After) -> u8 {
        let r = &mut self.r;
        let dlab = r.lcr & LCR_DLAB != 0;
        let value = match offset & 7 {
            0 if dlab => return r.divisor as u8,
            0 => r.received.pop_front().map_or(0, |(byte, _)| byte),
            1 if dlab => return (r.divisor >> 8) as u8,
            1 => return r.ier,
            2 => {
                let id = r.interrupt();
                if id == iir::TRANSMITTER {
                    r.transmitter_interrupt = false;
                }
                id | if r.fifo_enabled { iir::FIFO } else { 0 }
            }
            3 => return r.lcr,
            4 => return r.mcr,
            5 => {
                let lsr = r.lsr();
                if !lsr.intersects(Lsr::OVERRUN | Lsr::BREAK) {
                    return lsr.bits(); // the reading that polling drivers do for each byte
                }
                r.overrun = false;
                if let Some((_, errors)) = r.received.front_mut() {
                    *errors = 0;
                }
                lsr.bits()
            }
            6 => {
                let msr = r.msr;
                r.msr &= 0xf0;
                msr
            }
            _ => return r.scratch,
        };
        after.resume = self.take_refused();
        self.update();
        value
    }

    fn write(&mut self, offset: u64, value: u8, after: &mut After) {
        let r = &mut self.r;
        let dlab = r.lcr & LCR_DLAB != 0;
        match offset & 7 {
            0 if dlab => r.divisor = r.divisor & 0xff00 | u16::from(value),
            1 if dlab => r.divisor = r.divisor & 0xff | u16::from(value) << 8,
            0 => {
                // It has left before the driver can look.
                r.transmitter_interrupt = true;
                if self.looped() {
                    self.push(value, Lsr::empty());
                } else {
                    after.send = Some(value);
                }
            }
            1 => {
                let new = Ier::from_bits_truncate(value);
                if new.contains(Ier::TRANSMITTER_EMPTY) && r.ier & Ier::TRANSMITTER_EMPTY.bits() == 0 {
                    r.transmitter_interrupt = true;
                }
                r.ier = new.bits();
            }
            2 => {
                let enable = value & FCR_ENABLE != 0;
                if enable != r.fifo_enabled || value & FCR_CLEAR_RECEIVER != 0 {
                    r.received.clear();
                }
                r.fifo_enabled = enable;
                r.trigger = if enable { value >> 6 } else { 0 };
                after.resume = self.take_refused();
            }
            3 => r.lcr = value,
            4 => {
                r.mcr = value & 0x1f;
                self.update_modem();
                after.resume = self.take_refused();
            }
            7 => r.scratch = value,
            _ => {} // line and modem status: factory tests
        }
        self.update();
    }
}

impl Device for Serial {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, _: RegionId, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let mut after = After::default();
            *byte = lock(&self.port).read(offset + i as u64, &mut after);
            self.finish(after);
        }
    }

    fn write(&mut self, _: RegionId, offset: u64, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            let mut after = After::default();
            lock(&self.port).write(offset + i as u64, *byte, &mut after);
            self.finish(after);
        }
    }

    fn pause(&mut self) -> std::io::Result<()> {
        self.output.flush();
        Ok(())
    }

    fn reset(&mut self) {
        self.output.flush();
        let mut p = lock(&self.port);
        p.r = Registers::default();
        p.update();
        let resume = p.take_refused();
        drop(p);
        self.finish(After { send: None, resume });
    }

    fn save(&self) -> Result<State, StateError> {
        State::new(KIND, 1, &lock(&self.port).r)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let r: Registers = state.unpack(KIND, 1)?;
        if r.received.len() > FIFO || r.trigger > 3 {
            let reason = "impossible receiver FIFO".into();
            return Err(StateError::Invalid { kind: KIND.into(), reason });
        }
        let mut p = lock(&self.port);
        p.r = r;
        p.update();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::output::Recorder;
    use super::*;
    use accel::Irqs;
    use bus::IrqPin;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct Wire(AtomicBool);

    impl Irqs for Wire {
        fn set_line(&self, gsi: u32, level: bool) {
            assert_eq!(gsi, 4);
            self.0.store(level, Ordering::SeqCst);
        }
        fn msi(&self, _: u64, _: u32) {}
    }

    struct Rig {
        serial: Serial,
        chardev: Arc<Recorder>,
        wire: Arc<Wire>,
    }

    impl Rig {
        fn new() -> Self {
            let (chardev, wire) = (Arc::new(Recorder::default()), Arc::new(Wire::default()));
            let irq = IrqPin::new(wire.clone(), 4).line();
            Self { serial: Serial::new(chardev.clone(), irq, &Timers::new()), chardev, wire }
        }
        fn get(&mut self, offset: u64) -> u8 {
            let mut b = [0];
            self.serial.read(RegionId(0), offset, &mut b);
            b[0]
        }
        fn put(&mut self, offset: u64, value: u8) {
            self.serial.write(RegionId(0), offset, &[value]);
        }
        fn irq(&self) -> bool {
            self.wire.0.load(Ordering::SeqCst)
        }
        fn front(&self) -> Arc<dyn CharFrontend> {
            self.chardev.frontend.lock().unwrap().clone().unwrap()
        }
    }

    #[test]
    fn output_by_polling() {
        let mut r = Rig::new();
        for b in b"hello\n" {
            assert_eq!(r.get(5), 0x60);
            r.put(0, *b);
        }
        assert_eq!(r.chardev.text(), "hello\n");
        assert!(!r.irq());
    }

    #[test]
    fn output_by_interrupts() {
        let mut r = Rig::new();
        r.put(2, 1);
        r.put(1, 2);
        assert!(r.irq(), "empty already when enabled");
        assert_eq!(r.get(2), 0xc2);
        assert!(!r.irq(), "reading the identification acknowledges");
        assert_eq!(r.get(2), 0xc1);
        r.put(0, b'a');
        assert!(r.irq());
        r.put(1, 0);
        assert!(!r.irq());
        r.put(1, 2);
        assert_eq!(r.get(2), 0xc2);
        r.put(1, 3);
        assert!(!r.irq(), "it was enabled before");
    }

    #[test]
    fn input_with_fifo() {
        let mut r = Rig::new();
        r.put(2, 0x41);
        r.put(1, 1);
        assert_eq!(r.front().receive(b"abc"), 3);
        assert!(r.irq());
        assert_eq!(r.get(2), 0xcc, "below the trigger level");
        assert_eq!(r.front().receive(&[b'd'; 20]), 13);
        assert_eq!(r.get(2), 0xc4);
        let text: Vec<u8> = (0..16).map(|_| r.get(0)).collect();
        assert_eq!(&text[..5], b"abcdd");
        assert_eq!((r.get(5), r.irq()), (0x60, false));
        assert_eq!(r.chardev.resumed.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn input_without_fifo() {
        let mut r = Rig::new();
        r.put(1, 1);
        assert_eq!(r.front().receive(b"xy"), 1);
        assert_eq!((r.get(5), r.get(2)), (0x61, 4));
        assert_eq!(r.get(0), b'x');
        assert_eq!(r.chardev.resumed.load(Ordering::SeqCst), 1);
        assert_eq!(r.front().receive(b"y"), 1);
        r.put(2, 1);
        assert_eq!(r.get(5), 0x60, "turning the FIFO on empties it");
    }

    #[test]
    fn breaks_and_overruns() {
        let mut r = Rig::new();
        r.put(1, 4);
        r.front().event(CharEvent::Break);
        assert!(r.irq());
        assert_eq!((r.get(2), r.get(5), r.get(5)), (6, 0x71, 0x61));
        assert!(!r.irq());
        r.front().event(CharEvent::Break);
        assert_eq!((r.get(5), r.get(5)), (0x63, 0x61));
    }

    #[test]
    fn loop_back() {
        let mut r = Rig::new();
        assert_eq!(r.get(6), 0xb0);
        r.put(4, 0x1a);
        assert_eq!(r.get(6) & 0xf0, 0x90, "as Linux probes");
        r.put(0, b'z');
        assert_eq!((r.get(5), r.get(0)), (0x61, b'z'));
        assert_eq!(r.front().receive(b"q"), 0);
        r.put(1, 8);
        r.put(4, 0x10);
        assert!(r.irq());
        assert_eq!(r.get(2), 0);
        assert_eq!((r.get(6), r.irq()), (0x09, false));
        r.put(4, 0);
        assert_eq!(r.chardev.resumed.load(Ordering::SeqCst), 1);
        assert_eq!(r.chardev.text(), "");
    }

    #[test]
    fn divisor_and_scratch() {
        let mut r = Rig::new();
        r.put(3, 0x83);
        r.put(0, 0x34);
        r.put(1, 0x12);
        assert_eq!((r.get(0), r.get(1)), (0x34, 0x12));
        r.put(3, 0x03);
        assert_eq!((r.get(0), r.get(1), r.get(3)), (0, 0, 3));
        r.put(1, 0xff);
        r.put(7, 0xa5);
        assert_eq!((r.get(1), r.get(7)), (0x0f, 0xa5));
        assert_eq!(r.chardev.text(), "");
    }
}
