//! The PS/2 keyboard and mouse as devices that people's input goes to.

use super::I8042;
use display::input::{Event, Input, Kind, Leds, Sink};
use std::sync::{Arc, Mutex, Weak};

/// What a controller keeps of its connection.
pub(super) struct Connection {
    input: Weak<Input>,
    // Kept, for the input knows them weakly.
    _keyboard: Arc<KeyboardSink>,
    _mouse: Arc<MouseSink>,
}

struct KeyboardSink(Weak<Mutex<I8042>>);

impl Sink for KeyboardSink {
    fn events(&self, events: &[Event]) {
        let Some(device) = self.0.upgrade() else { return };
        let mut device = device.lock().unwrap_or_else(|e| e.into_inner());
        for event in events {
            if let Event::Key(key, down) = event
                && let Some(code) = key.set1()
            {
                device.key(code, *down);
            }
        }
    }
}

struct MouseSink(Weak<Mutex<I8042>>, Mutex<u8>);

impl Sink for MouseSink {
    fn events(&self, events: &[Event]) {
        let Some(device) = self.0.upgrade() else { return };
        let mut buttons = self.1.lock().unwrap_or_else(|e| e.into_inner());
        let mut device = device.lock().unwrap_or_else(|e| e.into_inner());
        for event in events {
            match event {
                // Up is positive to the mouse.
                Event::Move(dx, dy) => device.mouse(*dx, dy.saturating_neg(), 0, *buttons),
                Event::Wheel(_, dy) => device.mouse(0, 0, *dy, *buttons),
                Event::Button(button, true) => {
                    *buttons |= button.mask();
                    device.mouse(0, 0, 0, *buttons);
                }
                Event::Button(button, false) => {
                    *buttons &= !button.mask();
                    device.mouse(0, 0, 0, *buttons);
                }
                Event::Key(..) | Event::Position { .. } => {}
            }
        }
    }
}

impl I8042 {
    /// Connects keyboard and mouse to the machine's input.
    pub fn connect_input(this: &Arc<Mutex<Self>>, input: &Arc<Input>) {
        let keyboard = Arc::new(KeyboardSink(Arc::downgrade(this)));
        let mouse = Arc::new(MouseSink(Arc::downgrade(this), Mutex::default()));
        input.add(Kind::Keyboard, 0, &keyboard);
        input.add(Kind::Mouse, 0, &mouse);
        let connection = Connection { input: Arc::downgrade(input), _keyboard: keyboard, _mouse: mouse };
        this.lock().unwrap_or_else(|e| e.into_inner()).input = Some(connection);
    }

    pub(super) fn leds_changed(&self) {
        if let Some(input) = self.input.as_ref().and_then(|c| c.input.upgrade()) {
            let leds = self.leds();
            input.set_leds(Leds { scroll: leds & 1 != 0, num: leds & 2 != 0, caps: leds & 4 != 0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bus::{Device, IrqLine, System, shared};
    use display::input::{Button, Key};

    fn bytes(device: &Arc<Mutex<I8042>>) -> Vec<u8> {
        let mut out = Vec::new();
        loop {
            let mut device = device.lock().unwrap();
            let mut byte = [0];
            device.read(I8042::COMMAND, 0, &mut byte);
            if byte[0] & 1 == 0 {
                return out;
            }
            device.read(I8042::DATA, 0, &mut byte);
            out.push(byte[0]);
        }
    }

    #[test]
    fn long_texts_arrive_whole() {
        let (input, none) = (Arc::new(Input::default()), IrqLine::unconnected);
        let device = shared(I8042::new(System::new(|_| {}), none(), none()));
        I8042::connect_input(&device, &input);
        for _ in 0..50 {
            input.send(&[Event::Key(Key(30), true), Event::Key(Key(30), false)]);
        }
        assert_eq!(bytes(&device), [0x1e, 0x9e].repeat(50));
        // Lights go back to the viewers.
        let watch = Arc::new(Mutex::new(0));
        let seen = watch.clone();
        let _watch = input.watch(move || *seen.lock().unwrap() += 1);
        for byte in [0xed, 0x04] {
            device.lock().unwrap().write(I8042::DATA, 0, &[byte]);
        }
        assert!(input.leds().caps && *watch.lock().unwrap() == 1);
        bytes(&device);
        // The mouse reports once it has been asked to.
        device.lock().unwrap().write(I8042::COMMAND, 0, &[0xd4]);
        device.lock().unwrap().write(I8042::DATA, 0, &[0xf4]);
        assert_eq!(bytes(&device), [0xfa]);
        input.send(&[Event::Move(3, 2), Event::Button(Button::Right, true)]);
        assert_eq!(bytes(&device), [0x28, 3, 0xfe, 0x0a, 0, 0]);
    }
}
