//! From a viewer's keysyms to keys of the guest.

use crate::input::{Event, Input, Key, Keymap};
use std::collections::BTreeMap;

/// Most keys that a viewer holds down at a time.
const MOST_HELD: usize = 128;

/// A viewer's keyboard.
pub(super) struct Keyboard {
    keymap: Keymap,
    /// Keys that are down, by keysym (or scan code, with bit 31).
    held: BTreeMap<u32, Key>,
}

impl Keyboard {
    pub(super) fn new(keymap: Keymap) -> Self {
        Self { keymap, held: BTreeMap::new() }
    }

    fn holds(&self, keys: &[Key]) -> bool {
        self.held.values().any(|k| keys.contains(k))
    }

    /// A key event; `code` is a scan code of set 1 from viewers that send such.
    pub(super) fn event(&mut self, down: bool, keysym: u32, code: Option<u32>, input: &Input) {
        let coded = code.filter(|c| (1..0x100).contains(c)).and_then(|c| Key::from_set1(c as u8));
        let name = match (coded, code) {
            (Some(_), Some(code)) => code | 1 << 31,
            _ => keysym,
        };
        if !down {
            let known = self.held.remove(&name);
            // Shift may have come or gone since the press, and with it the keysym's case.
            let twin = || {
                char::from_u32(keysym).filter(char::is_ascii_alphabetic).and_then(|c| {
                    let other =
                        if c.is_ascii_lowercase() { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() };
                    self.held.remove(&other.into())
                })
            };
            if let Some(key) = known.or_else(twin) {
                input.send(&[Event::Key(key, false)]);
            }
            return;
        }
        if let Some(key) = coded {
            self.press(name, key, input);
            return;
        }
        let Some((key, level)) = self.keymap.find(keysym) else {
            tracing::debug!("no key for keysym {keysym:#x}");
            return;
        };
        let (shifts, alt_gr) = ([Key::SHIFT, Key::SHIFT_RIGHT], [Key::ALT_RIGHT]);
        // With Ctrl or Alt the key is meant, not the character.
        let chord = self.holds(&[Key::CTRL, Key::CTRL_RIGHT, Key::ALT, Key::META, Key::META_RIGHT]);
        let Some(level) = level.filter(|_| !chord) else {
            self.press(name, key, input);
            return;
        };
        // The viewer's modifiers may be those of another layout than the guest's, or be missing (programs that type).
        let want_shift = level.shift ^ (level.letter && input.leds().caps);
        let has_shift = self.holds(&shifts);
        let has_alt_gr = self.holds(&alt_gr);
        let mut before = Vec::new();
        if want_shift && !has_shift {
            before.push((Key::SHIFT, true));
        }
        if !want_shift && has_shift {
            before.extend(shifts.into_iter().filter(|k| self.holds(&[*k])).map(|k| (k, false)));
        }
        if level.alt_gr != has_alt_gr {
            before.push((Key::ALT_RIGHT, level.alt_gr));
        }
        for (key, down) in &before {
            input.send(&[Event::Key(*key, *down)]);
        }
        self.press(name, key, input);
        for (key, down) in before.iter().rev() {
            input.send(&[Event::Key(*key, !*down)]);
        }
    }

    fn press(&mut self, name: u32, key: Key, input: &Input) {
        if self.held.len() < MOST_HELD || self.held.contains_key(&name) {
            self.held.insert(name, key);
            input.send(&[Event::Key(key, true)]);
        }
    }

    /// Lets go of everything.
    pub(super) fn release(&mut self, input: &Input) {
        for key in std::mem::take(&mut self.held).into_values() {
            input.send(&[Event::Key(key, false)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::{Kind, Leds, Sink};
    use std::sync::{Arc, Mutex};

    #[derive(Default)]
    struct Log(Mutex<Vec<(u16, bool)>>);

    impl Sink for Log {
        fn events(&self, events: &[Event]) {
            for e in events {
                if let Event::Key(k, down) = e {
                    self.0.lock().unwrap().push((k.0, *down));
                }
            }
        }
    }

    #[test]
    fn characters_bring_their_modifiers() {
        let (input, log) = (Input::default(), Arc::new(Log::default()));
        input.add(Kind::Keyboard, 0, &log);
        let mut k = Keyboard::new(Keymap::default());
        let took = || std::mem::take(&mut *log.0.lock().unwrap());
        k.event(true, b'A'.into(), None, &input);
        k.event(false, b'A'.into(), None, &input);
        assert_eq!(took(), [(42, true), (30, true), (42, false), (30, false)]);
        // Shift held by the viewer.
        k.event(true, 0xffe1, None, &input);
        k.event(true, b'A'.into(), None, &input);
        k.event(false, 0xffe1, None, &input);
        k.event(false, b'a'.into(), None, &input);
        assert_eq!(took(), [(42, true), (30, true), (42, false), (30, false)]);
        // A viewer whose layout has the slash with Shift.
        k.event(true, 0xffe2, None, &input);
        k.event(true, b'/'.into(), None, &input);
        assert_eq!(took(), [(54, true), (54, false), (53, true), (54, true)]);
        k.release(&input);
        took();
        // Caps Lock in the guest.
        input.set_leds(Leds { caps: true, ..Leds::default() });
        k.event(true, b'A'.into(), None, &input);
        assert_eq!(took(), [(30, true)]);
        k.release(&input);
        took();
        // Chords are keys; scan codes win.
        k.event(true, 0xffe3, None, &input);
        k.event(true, b'C'.into(), None, &input);
        k.event(true, 0xffff, Some(0xd3), &input);
        assert_eq!(took(), [(29, true), (46, true), (111, true)]);
        k.release(&input);
        assert_eq!(took().len(), 3);
        assert!(!input.is_down(Key::CTRL));
    }
}
