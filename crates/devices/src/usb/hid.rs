//! Keyboard, mouse and tablet (Device Class Definition for HID 1.11; HID Usage Tables 1.4).

use super::descriptor::{self, Descriptors, Standard};
use super::{Outcome, Setup, Speed, UsbDevice, Waker};
use crate::{ChildBus, CreateError, Kind as ModelKind, Model, Parts};
use base::props::{Bag, Properties};
use bus::{State, StateError};
use display::input::{Event, Input, Kind, Leds, Sink, absolute};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// Properties of the USB input devices.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Spec {
    /// Port to plug into: N, or N.M behind a hub; the first free one if not given.
    pub port: Option<String>,
}

const fn model(name: &'static str, about: &'static str, create: crate::model::CreateChild) -> Model {
    let kind = ModelKind::Child { bus: "usb-bus", create };
    Model { name, about, properties: Properties::of::<Spec>, kind }
}

/// The keyboard.
pub const KEYBOARD: Model = model("usb-kbd", "USB keyboard", |b, p, bus| create(b, p, bus, Kind::Keyboard));
/// The mouse.
pub const MOUSE: Model = model("usb-mouse", "USB mouse", |b, p, bus| create(b, p, bus, Kind::Mouse));
/// The tablet.
pub const TABLET: Model =
    model("usb-tablet", "USB tablet: absolute pointer", |b, p, bus| create(b, p, bus, Kind::Tablet));

fn create(bag: &Bag, parts: &mut dyn Parts, bus: &ChildBus, kind: Kind) -> Result<(), CreateError> {
    let spec: Spec = bag.spec()?;
    let ChildBus::Usb(bus) = bus else {
        return Err(CreateError::Other(format!("{}: needs a USB bus", bag.driver)));
    };
    let hid = Hid::new(kind, parts.displays()?.input());
    bus.plug(&bag.driver, spec.port.as_deref(), Box::new(hid))
}

/// Most reports that wait to be read.
const MOST_PENDING: usize = 64;
/// Keys in a keyboard's report.
const KEYS: usize = 6;

/// A keyboard as in the boot protocol (HID 1.11, appendix B.1).
const KEYBOARD_REPORT: &[u8] = &[
    0x05, 0x01, 0x09, 0x06, 0xa1, 0x01, 0x75, 0x01, 0x95, 0x08, 0x05, 0x07, 0x19, 0xe0, 0x29, 0xe7, 0x15,
    0x00, 0x25, 0x01, 0x81, 0x02, 0x95, 0x01, 0x75, 0x08, 0x81, 0x01, 0x95, 0x05, 0x75, 0x01, 0x05, 0x08,
    0x19, 0x01, 0x29, 0x05, 0x91, 0x02, 0x95, 0x01, 0x75, 0x03, 0x91, 0x01, 0x95, 0x06, 0x75, 0x08, 0x15,
    0x00, 0x26, 0xff, 0x00, 0x05, 0x07, 0x19, 0x00, 0x2a, 0xff, 0x00, 0x81, 0x00, 0xc0,
];
/// A mouse of five buttons with a wheel and a wheel sideways; its first three bytes are the boot protocol's.
const MOUSE_REPORT: &[u8] = &[
    0x05, 0x01, 0x09, 0x02, 0xa1, 0x01, 0x09, 0x01, 0xa1, 0x00, 0x05, 0x09, 0x19, 0x01, 0x29, 0x05, 0x15,
    0x00, 0x25, 0x01, 0x95, 0x05, 0x75, 0x01, 0x81, 0x02, 0x95, 0x01, 0x75, 0x03, 0x81, 0x01, 0x05, 0x01,
    0x09, 0x30, 0x09, 0x31, 0x09, 0x38, 0x15, 0x81, 0x25, 0x7f, 0x75, 0x08, 0x95, 0x03, 0x81, 0x06, 0x05,
    0x0c, 0x0a, 0x38, 0x02, 0x95, 0x01, 0x81, 0x06, 0xc0, 0xc0,
];
/// The same with positions from 0 to 32767.
const TABLET_REPORT: &[u8] = &[
    0x05, 0x01, 0x09, 0x02, 0xa1, 0x01, 0x09, 0x01, 0xa1, 0x00, 0x05, 0x09, 0x19, 0x01, 0x29, 0x05, 0x15,
    0x00, 0x25, 0x01, 0x95, 0x05, 0x75, 0x01, 0x81, 0x02, 0x95, 0x01, 0x75, 0x03, 0x81, 0x01, 0x05, 0x01,
    0x09, 0x30, 0x09, 0x31, 0x15, 0x00, 0x26, 0xff, 0x7f, 0x35, 0x00, 0x46, 0xff, 0x7f, 0x75, 0x10, 0x95,
    0x02, 0x81, 0x02, 0x09, 0x38, 0x15, 0x81, 0x25, 0x7f, 0x35, 0x00, 0x45, 0x00, 0x75, 0x08, 0x95, 0x01,
    0x81, 0x06, 0x05, 0x0c, 0x0a, 0x38, 0x02, 0x95, 0x01, 0x81, 0x06, 0xc0, 0xc0,
];

/// What is held now, and reports that say so.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Reports {
    standard: Standard,
    boot_protocol: bool,
    idle: u8,
    leds: u8,
    /// USB codes of the keys that are down, modifiers aside.
    keys: Vec<u8>,
    modifiers: u8,
    buttons: u8,
    position: (u16, u16),
    pending: VecDeque<Vec<u8>>,
    /// Movement and wheels that wait for the last report to be taken.
    moved: [i32; 4],
}

struct Shared {
    kind: Kind,
    reports: Mutex<Reports>,
    ready: AtomicBool,
    waker: Mutex<Option<Waker>>,
    input: Weak<Input>,
}

/// The device.
pub(super) struct Hid {
    shared: Arc<Shared>,
    descriptors: Descriptors,
    report: &'static [u8],
}

impl Hid {
    pub(super) fn new(kind: Kind, input: &Arc<Input>) -> Self {
        let (report, product, protocol, name): (&[u8], u16, u8, _) = match kind {
            Kind::Keyboard => (KEYBOARD_REPORT, 1, 1, "Kvasir USB Keyboard"),
            Kind::Mouse => (MOUSE_REPORT, 1, 2, "Kvasir USB Mouse"),
            Kind::Tablet => (TABLET_REPORT, 1, 0, "Kvasir USB Tablet"),
        };
        // Class descriptor: HID 1.11, no country, one report descriptor.
        let hid = [9, 0x21, 0x11, 1, 0, 1, 0x22, report.len() as u8, 0];
        // Interrupt IN; at full speed every 8 ms (keyboard) or 1 ms.
        let interval = if kind == Kind::Keyboard { 8 } else { 1 };
        let endpoint = [7, 5, 0x81, 3, 8, 0, interval];
        let subclass = u8::from(kind != Kind::Tablet);
        let descriptors = Descriptors {
            device: descriptor::device(0, false, product),
            configuration: descriptor::configuration(0xa0, [3, subclass, protocol], &hid, &[endpoint]),
            strings: vec!["Kvasir", name, "1"],
            qualifier: false,
        };
        let shared = Arc::new(Shared {
            kind,
            reports: Mutex::default(),
            ready: AtomicBool::new(false),
            waker: Mutex::default(),
            input: Arc::downgrade(input),
        });
        input.add(kind, 1, &shared);
        Self { shared, descriptors, report }
    }

    fn set_ready(&self, ready: bool) {
        if self.shared.ready.swap(ready, Ordering::SeqCst) != ready
            && let Some(input) = self.shared.input.upgrade()
        {
            input.changed();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Reports {
    /// The report of the state now, taking movement out.
    fn report(&mut self, kind: Kind) -> Vec<u8> {
        match kind {
            Kind::Keyboard => {
                let mut out = vec![self.modifiers, 0];
                if self.keys.len() > KEYS {
                    out.extend([1; KEYS]); // roll-over
                } else {
                    out.extend(&self.keys);
                    out.resize(2 + KEYS, 0);
                }
                out
            }
            Kind::Mouse => {
                let [x, y, wheel, tilt] = [0, 1, 2, 3].map(|i| self.part(i));
                if self.boot_protocol {
                    vec![self.buttons & 7, x, y]
                } else {
                    vec![self.buttons, x, y, wheel, tilt]
                }
            }
            Kind::Tablet => {
                let (x, y) = (self.position.0.to_le_bytes(), self.position.1.to_le_bytes());
                let [wheel, tilt] = [2, 3].map(|i| self.part(i));
                vec![self.buttons, x[0], x[1], y[0], y[1], wheel, tilt]
            }
        }
    }

    /// As much of a movement as fits a byte.
    fn part(&mut self, i: usize) -> u8 {
        let part = self.moved[i].clamp(-127, 127);
        self.moved[i] -= part;
        part as i8 as u8
    }

    fn push(&mut self, kind: Kind) {
        if self.pending.len() < MOST_PENDING {
            let report = self.report(kind);
            self.pending.push_back(report);
        }
    }

    /// Takes an event; returns whether the state it changes has to be reported by itself, in order.
    fn take(&mut self, event: &Event) -> bool {
        match event {
            Event::Key(key, down) => {
                let Some(code) = key.usb() else { return false };
                if code >= 0xe0 {
                    let bit = 1 << (code - 0xe0);
                    if *down { self.modifiers |= bit } else { self.modifiers &= !bit }
                } else {
                    self.keys.retain(|k| *k != code);
                    if *down && self.keys.len() < 32 {
                        self.keys.push(code);
                    }
                }
                true
            }
            Event::Button(button, down) => {
                if *down {
                    self.buttons |= button.mask()
                } else {
                    self.buttons &= !button.mask()
                }
                true
            }
            Event::Move(dx, dy) => {
                self.add(0, *dx);
                self.add(1, *dy);
                false
            }
            Event::Wheel(dx, dy) => {
                self.add(2, *dy);
                self.add(3, *dx);
                false
            }
            Event::Position { at, size } => {
                self.position = (absolute(at.0, size.0) as u16, absolute(at.1, size.1) as u16);
                false
            }
        }
    }

    fn add(&mut self, i: usize, d: i32) {
        const FAR: i32 = 1 << 20;
        self.moved[i] = self.moved[i].saturating_add(d).clamp(-FAR, FAR);
    }
}

impl Sink for Shared {
    fn events(&self, events: &[Event]) {
        {
            let mut reports = self.lock();
            let mut moved = false;
            for event in events {
                // A position before a button belongs to the same report as the button.
                moved |= !matches!(event, Event::Key(..));
                if reports.take(event) {
                    reports.push(self.kind);
                    moved = false;
                }
            }
            // Movements are summed up while nobody reads; the last report is always of the last state.
            if moved && reports.pending.len() < 2 {
                reports.push(self.kind);
            } else if moved && self.kind == Kind::Tablet {
                let report = reports.report(self.kind);
                let buttons = |r: &[u8]| r.first().copied();
                let same = reports.pending.back().is_some_and(|last| {
                    buttons(last) == buttons(&report) && last.get(5..) == Some(&[0, 0][..])
                });
                if same {
                    reports.pending.pop_back();
                }
                reports.pending.push_back(report);
            }
        }
        let waker = self.waker.lock().unwrap_or_else(|e| e.into_inner()).clone();
        if let Some(wake) = waker {
            wake();
        }
    }

    fn is_ready(&self) -> bool {
        self.ready.load(Ordering::SeqCst)
    }
}

impl UsbDevice for Hid {
    fn name(&self) -> &'static str {
        match self.shared.kind {
            Kind::Keyboard => KEYBOARD.name,
            Kind::Mouse => MOUSE.name,
            Kind::Tablet => TABLET.name,
        }
    }

    fn speed(&self) -> Speed {
        Speed::Full
    }

    fn attach(&mut self, waker: Waker) {
        *self.shared.waker.lock().unwrap_or_else(|e| e.into_inner()) = Some(waker);
    }

    fn reset(&mut self) {
        *self.shared.lock() = Reports::default();
        self.set_ready(false);
    }

    fn control(&mut self, setup: Setup, data: &mut Vec<u8>) -> Outcome {
        let mut reports = self.shared.lock();
        if let Some(outcome) = reports.standard.control(&self.descriptors, setup, data) {
            let configured = reports.standard.configuration != 0;
            drop(reports);
            if setup.request == 9 {
                self.set_ready(configured);
            }
            return outcome;
        }
        let mut answer = |bytes: &[u8]| {
            data.clear();
            data.extend_from_slice(&bytes[..bytes.len().min(setup.length.into())]);
            Outcome::Done(data.len())
        };
        match setup.request {
            // Report descriptor, HID descriptor.
            0x8106 if setup.value >> 8 == 0x22 => answer(self.report),
            0x8106 if setup.value >> 8 == 0x21 => answer(&self.descriptors.configuration[18..27]),
            0xa101 => {
                let report = reports.report(self.shared.kind);
                answer(&report)
            }
            0xa102 => answer(&[reports.idle]),
            0xa103 => answer(&[u8::from(!reports.boot_protocol)]),
            0x2109 => {
                let bits = data.first().copied().unwrap_or(0);
                reports.leds = bits;
                drop(reports);
                if let (Kind::Keyboard, Some(input)) = (self.shared.kind, self.shared.input.upgrade()) {
                    input.set_leds(Leds { num: bits & 1 != 0, caps: bits & 2 != 0, scroll: bits & 4 != 0 });
                }
                Outcome::Done(data.len())
            }
            0x210a => {
                reports.idle = (setup.value >> 8) as u8;
                Outcome::Done(0)
            }
            0x210b => {
                reports.boot_protocol = setup.value == 0;
                Outcome::Done(0)
            }
            _ => Outcome::Stall,
        }
    }

    fn send(&mut self, number: u8, most: usize, data: &mut Vec<u8>) -> Outcome {
        let kind = self.shared.kind;
        let mut reports = self.shared.lock();
        if number != 1 || reports.standard.is_halted(0x81) {
            return Outcome::Stall;
        }
        if reports.pending.is_empty() && reports.moved != [0; 4] {
            reports.push(kind);
        }
        let Some(mut report) = reports.pending.pop_front() else { return Outcome::Nak };
        report.truncate(most);
        *data = report;
        Outcome::Done(data.len())
    }

    fn receive(&mut self, _: u8, _: &[u8]) -> Outcome {
        Outcome::Stall
    }

    fn save(&self) -> Result<State, StateError> {
        State::new(self.name(), 1, &*self.shared.lock())
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Reports = state.unpack(self.name(), 1)?;
        let far = saved.moved.iter().any(|m| m.unsigned_abs() > 1 << 20);
        if saved.pending.len() > MOST_PENDING
            || saved.pending.iter().any(|r| r.len() > 8)
            || saved.keys.len() > 32
            || far
        {
            let reason = "reports that the device cannot have".into();
            return Err(StateError::Invalid { kind: self.name().into(), reason });
        }
        let configured = saved.standard.configuration != 0;
        *self.shared.lock() = saved;
        self.set_ready(configured);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use display::input::{Button, Key};

    fn reports(hid: &mut Hid) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        let mut data = Vec::new();
        while let Outcome::Done(_) = hid.send(1, 8, &mut data) {
            all.push(data.clone());
        }
        all
    }

    fn configure(hid: &mut Hid) {
        let setup = Setup { request: 9, value: 1, index: 0, length: 0 };
        assert_eq!(hid.control(setup, &mut Vec::new()), Outcome::Done(0));
    }

    #[test]
    fn keyboard() {
        let input = Arc::new(Input::default());
        let mut hid = Hid::new(Kind::Keyboard, &input);
        configure(&mut hid);
        input.send(&[Event::Key(Key::SHIFT, true), Event::Key(Key(30), true), Event::Key(Key(30), false)]);
        assert_eq!(
            reports(&mut hid),
            [vec![2, 0, 0, 0, 0, 0, 0, 0], vec![2, 0, 4, 0, 0, 0, 0, 0], vec![2, 0, 0, 0, 0, 0, 0, 0]]
        );
        let leds = Setup { request: 0x2109, value: 0x200, index: 0, length: 1 };
        hid.control(leds, &mut vec![2]);
        assert!(input.leds().caps);
    }

    #[test]
    fn tablet_reports_the_last_position_exactly() {
        let input = Arc::new(Input::default());
        let mut hid = Hid::new(Kind::Tablet, &input);
        assert!(!input.is_absolute());
        configure(&mut hid);
        assert!(input.is_absolute());
        for x in 0..500 {
            input.send(&[Event::Position { at: (x, 7), size: (1280, 800) }]);
        }
        let all = reports(&mut hid);
        assert!(all.len() <= MOST_PENDING);
        let last = all.last().unwrap();
        let x = u32::from(last[1]) | u32::from(last[2]) << 8;
        assert_eq!(x * 1280 / 0x8000, 499);
        // A click is at the place where the pointer was then.
        let at = |x| Event::Position { at: (x, 7), size: (1280, 800) };
        input.send(&[at(100), Event::Button(Button::Left, true)]);
        input.send(&[at(900)]);
        let all = reports(&mut hid);
        assert_eq!((all[0][0], all.len()), (1, 2));
        let x = u32::from(all[0][1]) | u32::from(all[0][2]) << 8;
        assert_eq!(x * 1280 / 0x8000, 100);
    }

    #[test]
    fn mouse_sums_up_movement() {
        let input = Arc::new(Input::default());
        let mut hid = Hid::new(Kind::Mouse, &input);
        configure(&mut hid);
        for _ in 0..100 {
            input.send(&[Event::Move(3, -2)]);
        }
        let sum = |i: usize, all: &[Vec<u8>]| all.iter().map(|r| i32::from(r[i] as i8)).sum::<i32>();
        let all = reports(&mut hid);
        assert_eq!((sum(1, &all), sum(2, &all)), (300, -200));
    }
}
