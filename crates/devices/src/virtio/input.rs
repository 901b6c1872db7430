//! Keyboard, mouse and tablet (virtio 1.2, 5.8): Linux's input events over a queue.

use super::{RingSpec, VirtioDevice, read_structure};
use crate::model::{CreateError, Kind as ModelKind, Model, Parts};
use base::props::{Bag, Properties};
use bus::virtio::{Activation, Chain, Interrupt, QueueError, SharedQueue, device_id};
use bus::{State, StateError};
use display::input::{ABSOLUTE_MAX, Button, Event, Input, Key, Kind, Leds, Sink, absolute};
use memory::GuestMemory;
use schemars::JsonSchema;
use serde::Deserialize;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// Properties of the input devices.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Spec {
    /// Ring features.
    #[serde(flatten)]
    pub ring: RingSpec,
}

const fn model(name: &'static str, about: &'static str, create: crate::CreateVirtio) -> Model {
    Model { name, about, properties: Properties::of::<Spec>, kind: ModelKind::Virtio(create) }
}

/// The keyboard.
pub const KEYBOARD: Model =
    model("virtio-keyboard", "virtio keyboard", |bag, parts| create(bag, parts, Kind::Keyboard));
/// The mouse.
pub const MOUSE: Model = model("virtio-mouse", "virtio mouse", |bag, parts| create(bag, parts, Kind::Mouse));
/// The tablet.
pub const TABLET: Model =
    model("virtio-tablet", "virtio tablet: absolute pointer", |bag, parts| create(bag, parts, Kind::Tablet));

fn create(bag: &Bag, parts: &mut dyn Parts, kind: Kind) -> Result<Box<dyn VirtioDevice>, CreateError> {
    let spec: Spec = bag.spec()?;
    Ok(Box::new(VirtioInput::new(spec.ring, kind, parts.displays()?.input())))
}

const QUEUE_SIZE: u16 = 64;
/// Most events that wait for buffers; more are dropped, whole frames at a time.
const MOST_PENDING: usize = 1024;

const EV_SYN: u16 = 0;
const EV_KEY: u16 = 1;
const EV_REL: u16 = 2;
const EV_ABS: u16 = 3;
const EV_LED: u16 = 0x11;
const EV_REP: u16 = 0x14;
const REL_X: u16 = 0;
const REL_Y: u16 = 1;
const REL_HWHEEL: u16 = 6;
const REL_WHEEL: u16 = 8;
const ABS_X: u16 = 0;
const ABS_Y: u16 = 1;

const LED_NUM: u16 = 0;
const LED_CAPS: u16 = 1;
const LED_SCROLL: u16 = 2;

/// Selectors of configuration space.
mod select {
    pub(super) const NAME: u8 = 1;
    pub(super) const SERIAL: u8 = 2;
    pub(super) const DEVICE_IDS: u8 = 3;
    pub(super) const PROPERTIES: u8 = 0x10;
    pub(super) const EVENTS: u8 = 0x11;
    pub(super) const ABSOLUTE: u8 = 0x12;
}

/// An event, as Linux has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Raw {
    kind: u16,
    code: u16,
    value: i32,
}

impl Raw {
    fn bytes(self) -> [u8; 8] {
        let mut out = [0; 8];
        out[..2].copy_from_slice(&self.kind.to_le_bytes());
        out[2..4].copy_from_slice(&self.code.to_le_bytes());
        out[4..].copy_from_slice(&self.value.to_le_bytes());
        out
    }
}

struct Active {
    events: Option<SharedQueue>,
    status: Option<SharedQueue>,
    memory: GuestMemory,
    interrupt: Interrupt,
}

#[derive(Default)]
struct Work {
    running: bool,
    active: Option<Active>,
    pending: VecDeque<Raw>,
    chain: Chain,
    leds: Leds,
}

struct Shared {
    kind: Kind,
    work: Mutex<Work>,
    ready: AtomicBool,
    input: Weak<Input>,
}

/// The device.
pub struct VirtioInput {
    ring: RingSpec,
    selected: (u8, u8),
    shared: Arc<Shared>,
}

impl VirtioInput {
    /// A device of a kind, which takes its events from `input`.
    pub fn new(ring: RingSpec, kind: Kind, input: &Arc<Input>) -> Self {
        let shared = Arc::new(Shared {
            kind,
            work: Mutex::default(),
            ready: AtomicBool::new(false),
            input: Arc::downgrade(input),
        });
        input.add(kind, 2, &shared);
        Self { ring, selected: (0, 0), shared }
    }

    fn model(&self) -> &'static Model {
        match self.shared.kind {
            Kind::Keyboard => &KEYBOARD,
            Kind::Mouse => &MOUSE,
            Kind::Tablet => &TABLET,
        }
    }

    /// What the selected item of configuration space holds.
    fn selection(&self) -> Vec<u8> {
        let kind = self.shared.kind;
        match self.selected {
            (select::NAME, 0) => match kind {
                Kind::Keyboard => b"Kvasir Virtio Keyboard".to_vec(),
                Kind::Mouse => b"Kvasir Virtio Mouse".to_vec(),
                Kind::Tablet => b"Kvasir Virtio Tablet".to_vec(),
            },
            (select::SERIAL, 0) => Vec::new(),
            (select::DEVICE_IDS, 0) => {
                // Bus 6 (virtual), vendor, product, version.
                let product = match kind {
                    Kind::Keyboard => 1,
                    Kind::Mouse => 2,
                    Kind::Tablet => 3,
                };
                [6u16, 0x1af4, product, 1].iter().flat_map(|n| n.to_le_bytes()).collect()
            }
            (select::PROPERTIES, 0) => Vec::new(),
            (select::EVENTS, kind) => bitmap(&self.codes(kind.into())),
            (select::ABSOLUTE, axis) if kind == Kind::Tablet && u16::from(axis) <= ABS_Y => {
                [0, ABSOLUTE_MAX, 0, 0, 0].iter().flat_map(|n| n.to_le_bytes()).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Codes of a kind of event that the device may send.
    fn codes(&self, kind: u16) -> Vec<u16> {
        let buttons = || Button::ALL.iter().map(|b| b.evdev()).collect();
        match (self.shared.kind, kind) {
            (Kind::Keyboard, EV_KEY) => Key::all().map(|k| k.0).collect(),
            (Kind::Keyboard, EV_LED) => vec![LED_NUM, LED_CAPS, LED_SCROLL],
            (Kind::Keyboard, EV_REP) => vec![0, 1],
            (Kind::Mouse | Kind::Tablet, EV_KEY) => buttons(),
            (Kind::Mouse, EV_REL) => vec![REL_X, REL_Y, REL_WHEEL, REL_HWHEEL],
            (Kind::Tablet, EV_REL) => vec![REL_WHEEL, REL_HWHEEL],
            (Kind::Tablet, EV_ABS) => vec![ABS_X, ABS_Y],
            _ => Vec::new(),
        }
    }
}

fn bitmap(codes: &[u16]) -> Vec<u8> {
    let mut out = Vec::new();
    for code in codes {
        let at = usize::from(code / 8);
        if out.len() <= at {
            out.resize(at + 1, 0);
        }
        out[at] |= 1 << (code % 8);
    }
    out
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn set_ready(&self, ready: bool) {
        if self.ready.swap(ready, Ordering::SeqCst) != ready
            && let Some(input) = self.input.upgrade()
        {
            input.changed();
        }
    }

    /// Gives pending events to the driver as far as it has buffers for whole frames.
    fn deliver(work: &mut Work) {
        let Work { running: true, active: Some(active), pending, chain, .. } = work else { return };
        let Some(queue) = &active.events else { return };
        let mut queue = queue.lock().unwrap_or_else(|e| e.into_inner());
        if queue.is_broken() {
            return;
        }
        let result = (|| {
            while let Some(event) = pending.front() {
                if !queue.pop_or_listen(chain)? {
                    break;
                }
                let mut writer = chain.writer(&active.memory);
                writer.write(&event.bytes())?;
                let written = writer.written();
                queue.push(chain, written)?;
                pending.pop_front();
            }
            queue.publish()
        })();
        match result {
            Ok(true) => active.interrupt.queue(0),
            Ok(false) => {}
            Err(e) => active.interrupt.fail(&format!("event queue: {e}")),
        }
    }

    /// Takes what the driver says: lights.
    fn take_status(work: &mut Work) {
        let Work { running: true, active: Some(active), chain, leds, .. } = work else { return };
        let Some(queue) = &active.status else { return };
        let mut queue = queue.lock().unwrap_or_else(|e| e.into_inner());
        if queue.is_broken() {
            return;
        }
        let result = (|| {
            for _ in 0..queue.size() {
                if !queue.pop_or_listen(chain)? {
                    break;
                }
                let event: Result<[u8; 8], QueueError> = chain.reader(&active.memory).read_array();
                if let Ok(event) = event {
                    let word = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
                    let on = event[4] != 0;
                    match (word(0), word(2)) {
                        (EV_LED, LED_NUM) => leds.num = on,
                        (EV_LED, LED_CAPS) => leds.caps = on,
                        (EV_LED, LED_SCROLL) => leds.scroll = on,
                        _ => {}
                    }
                }
                queue.push(chain, 0)?;
            }
            queue.publish()
        })();
        match result {
            Ok(true) => active.interrupt.queue(1),
            Ok(false) => {}
            Err(e) => active.interrupt.fail(&format!("status queue: {e}")),
        }
    }
}

impl Sink for Shared {
    fn events(&self, events: &[Event]) {
        let mut raw = Vec::with_capacity(events.len() + 2);
        let mut put = |kind, code, value| raw.push(Raw { kind, code, value });
        for event in events {
            match event {
                Event::Key(key, down) => put(EV_KEY, key.0, i32::from(*down)),
                Event::Button(button, down) => put(EV_KEY, button.evdev(), i32::from(*down)),
                Event::Move(dx, dy) => {
                    put(EV_REL, REL_X, *dx);
                    put(EV_REL, REL_Y, *dy);
                }
                Event::Wheel(dx, dy) => {
                    if *dy != 0 {
                        put(EV_REL, REL_WHEEL, *dy);
                    }
                    if *dx != 0 {
                        put(EV_REL, REL_HWHEEL, *dx);
                    }
                }
                Event::Position { at, size } => {
                    put(EV_ABS, ABS_X, absolute(at.0, size.0) as i32);
                    put(EV_ABS, ABS_Y, absolute(at.1, size.1) as i32);
                }
            }
        }
        put(EV_SYN, 0, 0);
        let mut work = self.lock();
        if work.pending.len() + raw.len() <= MOST_PENDING {
            work.pending.extend(raw);
        }
        Self::deliver(&mut work);
    }

    fn is_ready(&self) -> bool {
        self.ready.load(Ordering::SeqCst)
    }
}

impl VirtioDevice for VirtioInput {
    fn name(&self) -> &'static str {
        self.model().name
    }

    fn device_id(&self) -> u32 {
        device_id::INPUT
    }

    fn features(&self) -> u64 {
        self.ring.features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let item = self.selection();
        let mut config = vec![self.selected.0, self.selected.1, item.len() as u8, 0, 0, 0, 0, 0]; // at most 128
        config.extend(item);
        read_structure(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            match at {
                0 => self.selected.0 = *byte,
                1 => self.selected.1 = *byte,
                _ => {}
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { queues, memory, interrupt, .. } = activation;
        let mut queues = queues.into_iter();
        let (events, status) = (queues.next().flatten(), queues.next().flatten());
        self.shared.lock().active = Some(Active { events, status, memory, interrupt });
        self.shared.set_ready(true);
        Ok(())
    }

    fn notify(&mut self, queue: u16) {
        let leds = {
            let mut work = self.shared.lock();
            match queue {
                0 => Shared::deliver(&mut work),
                _ => Shared::take_status(&mut work),
            }
            work.leds
        };
        if let (1, Some(input)) = (queue, self.shared.input.upgrade()) {
            input.set_leds(leds);
        }
    }

    fn reset(&mut self) {
        {
            let mut work = self.shared.lock();
            work.active = None;
            work.pending.clear();
        }
        self.selected = (0, 0);
        self.shared.set_ready(false);
    }

    fn start(&mut self) -> io::Result<()> {
        let mut work = self.shared.lock();
        work.running = true;
        Shared::deliver(&mut work);
        Shared::take_status(&mut work);
        Ok(())
    }

    fn pause(&mut self) -> io::Result<()> {
        self.shared.lock().running = false;
        Ok(())
    }

    fn save(&self) -> Result<State, StateError> {
        State::new(self.name(), 1, &self.selected)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        self.selected = state.unpack(self.name(), 1)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_describes_the_device() {
        let input = Arc::new(Input::default());
        let mut d = VirtioInput::new(RingSpec::default(), Kind::Tablet, &input);
        d.write_config(0, &[select::ABSOLUTE, 1]);
        let mut c = [0; 16];
        d.read_config(0, &mut c);
        assert_eq!(c[..3], [select::ABSOLUTE, 1, 20]);
        assert_eq!(c[12..16], 0x7fffu32.to_le_bytes());
        d.write_config(0, &[select::EVENTS, EV_KEY as u8]);
        let mut c = [0; 0x30];
        d.read_config(0, &mut c);
        assert_eq!(c[8 + 0x110 / 8], 0x1f);
        let mut k = VirtioInput::new(RingSpec::default(), Kind::Keyboard, &input);
        k.write_config(0, &[select::EVENTS]);
        k.write_config(1, &[EV_KEY as u8]);
        k.read_config(0, &mut c);
        assert_ne!(c[8 + 30 / 8] & 1 << (30 % 8), 0);
        assert!(!input.is_absolute(), "nobody drives it");
    }
}
