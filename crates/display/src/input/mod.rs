//! Keyboards and pointers: events from people, and the devices that pass them to the guest.

mod keymap;
mod keys;
mod keysym;

pub use keymap::{Keymap, Level};
pub use keys::Key;

use crate::watchers::{Watch, Watchers};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// Range of absolute positions that devices report: 0 to this.
pub const ABSOLUTE_MAX: u32 = 0x7fff;

/// A button of a pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Button {
    /// Left.
    Left,
    /// Middle.
    Middle,
    /// Right.
    Right,
    /// The first side button ("back").
    Side,
    /// The second side button ("forward").
    Extra,
}

impl Button {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Left, Self::Middle, Self::Right, Self::Side, Self::Extra];

    /// Bit in the masks of mice: left 0, right 1, middle 2, side 3, extra 4.
    pub fn mask(self) -> u8 {
        match self {
            Self::Left => 1,
            Self::Right => 2,
            Self::Middle => 4,
            Self::Side => 8,
            Self::Extra => 16,
        }
    }

    /// Linux's code (`BTN_LEFT` and so on).
    pub fn evdev(self) -> u16 {
        match self {
            Self::Left => 0x110,
            Self::Right => 0x111,
            Self::Middle => 0x112,
            Self::Side => 0x113,
            Self::Extra => 0x114,
        }
    }
}

/// Something a person does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A key goes down or up.
    Key(Key, bool),
    /// A button goes down or up.
    Button(Button, bool),
    /// The pointer moves right and down, in pixels.
    Move(i32, i32),
    /// The wheel turns: to the right, and away from the user.
    Wheel(i32, i32),
    /// The pointer is at a pixel of a screen of `size`.
    Position {
        /// Pixel from the left and from the top.
        at: (u32, u32),
        /// Width and height of the screen.
        size: (u32, u32),
    },
}

/// The value, 0 to [`ABSOLUTE_MAX`], that guests turn into pixel `at` of `size`: the middle of the pixel, so that
/// rounding either way gives this pixel.
pub fn absolute(at: u32, size: u32) -> u32 {
    if size == 0 {
        return 0;
    }
    let range = u64::from(ABSOLUTE_MAX) + 1;
    let at = u64::from(at.min(size - 1));
    (((2 * at + 1) * range) / (2 * u64::from(size))).min(ABSOLUTE_MAX.into()) as u32
}

/// Lights of a keyboard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leds {
    /// Scroll Lock.
    pub scroll: bool,
    /// Num Lock.
    pub num: bool,
    /// Caps Lock.
    pub caps: bool,
}

/// What a device takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Keys.
    Keyboard,
    /// Buttons, wheel and movement.
    Mouse,
    /// Buttons, wheel and positions.
    Tablet,
}

/// An input device of the guest.
pub trait Sink: Send + Sync {
    /// What happened, all at one time. Only events of the device's kind.
    fn events(&self, events: &[Event]);
    /// Whether the guest has a driver that listens. Others of the kind are tried first otherwise. Takes no lock.
    fn is_ready(&self) -> bool {
        true
    }
}

struct Entry {
    kind: Kind,
    rank: u8,
    sink: Weak<dyn Sink>,
}

#[derive(Default)]
struct State {
    sinks: Vec<Entry>,
    /// Keys and buttons that are down.
    keys: BTreeSet<Key>,
    buttons: BTreeSet<Button>,
    last: Option<(u32, u32)>,
    leds: Leds,
}

/// A machine's keyboards and pointers.
#[derive(Default)]
pub struct Input {
    state: Mutex<State>,
    /// Held while events are handed on, so that they arrive in order. Before `state`.
    order: Mutex<()>,
    watchers: Watchers,
}

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Input")
    }
}

impl Input {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Adds a device, which stays as long as the caller keeps it. Among those of a kind that are ready, the one of
    /// highest rank, and of these the last, gets the events (PS/2 0, USB 1, virtio 2).
    pub fn add(&self, kind: Kind, rank: u8, sink: &Arc<impl Sink + 'static>) {
        let sink: Arc<dyn Sink> = sink.clone();
        let mut state = self.lock();
        state.sinks.retain(|e| e.sink.strong_count() > 0);
        state.sinks.push(Entry { kind, rank, sink: Arc::downgrade(&sink) });
    }

    fn pick(&self, kinds: &[Kind]) -> Option<(Kind, Arc<dyn Sink>)> {
        let mut found: Vec<_> = {
            let state = self.lock();
            let all = state.sinks.iter().filter(|e| kinds.contains(&e.kind));
            all.filter_map(|e| Some((e.rank, e.kind, e.sink.upgrade()?))).collect()
        };
        // A tablet before a mouse, whatever their ranks: viewers have absolute pointers.
        found.sort_by_key(|(rank, kind, _)| (*kind == Kind::Tablet, *rank));
        let ready = found.iter().rposition(|(_, _, sink)| sink.is_ready());
        let (_, kind, sink) = found.swap_remove(ready.or(found.len().checked_sub(1))?);
        Some((kind, sink))
    }

    /// Whether the guest takes positions rather than movements.
    pub fn is_absolute(&self) -> bool {
        self.pick(&[Kind::Mouse, Kind::Tablet])
            .is_some_and(|(kind, sink)| kind == Kind::Tablet && sink.is_ready())
    }

    /// Passes what happened, all at one time, to the guest.
    pub fn send(&self, events: &[Event]) {
        let _order = self.order.lock().unwrap_or_else(|e| e.into_inner());
        let (keys, others): (Vec<Event>, Vec<Event>) =
            events.iter().partition(|e| matches!(e, Event::Key(..)));
        if !keys.is_empty() {
            {
                let mut state = self.lock();
                for event in &keys {
                    match event {
                        Event::Key(key, true) => _ = state.keys.insert(*key),
                        Event::Key(key, false) => _ = state.keys.remove(key),
                        _ => {}
                    }
                }
            }
            if let Some((_, sink)) = self.pick(&[Kind::Keyboard]) {
                sink.events(&keys);
            }
        }
        if !others.is_empty() {
            self.point(others);
        }
    }

    fn point(&self, events: Vec<Event>) {
        let picked = self.pick(&[Kind::Mouse, Kind::Tablet]);
        let relative = !matches!(picked, Some((Kind::Tablet, _)));
        let mut out = Vec::with_capacity(events.len());
        {
            let mut state = self.lock();
            for event in events {
                match event {
                    Event::Position { at, .. } => {
                        let last = state.last.replace(at);
                        if !relative {
                            out.push(event);
                        } else if let Some(last) = last {
                            let d = |new: u32, old: u32| (i64::from(new) - i64::from(old)) as i32; // screens are small
                            out.push(Event::Move(d(at.0, last.0), d(at.1, last.1)));
                        }
                    }
                    Event::Move(dx, dy) if !relative => {
                        let _ = (dx, dy); // a tablet has no movements; the viewer sends positions once it knows
                    }
                    Event::Button(button, down) => {
                        if down {
                            state.buttons.insert(button);
                        } else {
                            state.buttons.remove(&button);
                        }
                        out.push(event);
                    }
                    other => out.push(other),
                }
            }
        }
        if let (Some((_, sink)), false) = (picked, out.is_empty()) {
            sink.events(&out);
        }
    }

    /// Whether a key is down.
    pub fn is_down(&self, key: Key) -> bool {
        self.lock().keys.contains(&key)
    }

    /// Lets go of all keys and buttons.
    pub fn release_all(&self) {
        let (keys, buttons) = {
            let state = self.lock();
            (state.keys.clone(), state.buttons.clone())
        };
        let up: Vec<_> = keys.into_iter().map(|k| Event::Key(k, false)).collect();
        let buttons = buttons.into_iter().map(|b| Event::Button(b, false));
        self.send(&up.into_iter().chain(buttons).collect::<Vec<_>>());
    }

    /// The keyboard's lights.
    pub fn leds(&self) -> Leds {
        self.lock().leds
    }

    /// For keyboards: the guest has set the lights.
    pub fn set_leds(&self, leds: Leds) {
        let changed = {
            let mut state = self.lock();
            std::mem::replace(&mut state.leds, leds) != leds
        };
        if changed {
            self.changed();
        }
    }

    /// For devices: readiness may have changed.
    pub fn changed(&self) {
        self.watchers.call();
    }

    /// Calls `wake`, which must not block, when lights or the pointer's kind may have changed.
    pub fn watch(&self, wake: impl Fn() + Send + Sync + 'static) -> Watch {
        self.watchers.add(wake)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<Event>>, Mutex<bool>);

    impl Sink for Log {
        fn events(&self, events: &[Event]) {
            self.0.lock().unwrap().extend(events);
        }
        fn is_ready(&self) -> bool {
            *self.1.lock().unwrap()
        }
    }

    #[test]
    fn the_ready_device_of_highest_rank_gets_the_events() {
        let input = Input::default();
        let (mouse, tablet, keyboard) =
            (Arc::new(Log::default()), Arc::new(Log::default()), Arc::new(Log::default()));
        *mouse.1.lock().unwrap() = true;
        input.add(Kind::Mouse, 0, &mouse);
        input.add(Kind::Tablet, 1, &tablet);
        input.add(Kind::Keyboard, 0, &keyboard);
        let at = |x, y| Event::Position { at: (x, y), size: (100, 100) };
        assert!(!input.is_absolute());
        input.send(&[at(10, 10)]);
        input.send(&[at(15, 7), Event::Button(Button::Left, true), Event::Key(Key(30), true)]);
        assert_eq!(*mouse.0.lock().unwrap(), [Event::Move(5, -3), Event::Button(Button::Left, true)]);
        assert_eq!(*keyboard.0.lock().unwrap(), [Event::Key(Key(30), true)]);
        *tablet.1.lock().unwrap() = true;
        assert!(input.is_absolute());
        input.send(&[at(1, 2)]);
        assert_eq!(*tablet.0.lock().unwrap(), [at(1, 2)]);
        assert!(input.is_down(Key(30)));
        input.release_all();
        assert!(!input.is_down(Key(30)));
        assert_eq!(tablet.0.lock().unwrap()[1..], [Event::Button(Button::Left, false)]);
    }

    #[test]
    fn absolute_positions_come_back_as_the_same_pixel() {
        for size in [1, 2, 640, 800, 1024, 1280, 1366, 1920, 3840, 7680] {
            for at in 0..size {
                let v = absolute(at, size);
                assert!(v <= ABSOLUTE_MAX);
                // libinput and the X server: (v - min) * size / (max - min + 1).
                assert_eq!(u64::from(v) * u64::from(size) / 0x8000, u64::from(at), "{at} of {size}");
            }
        }
        assert_eq!(absolute(5, 0), 0);
        assert_eq!(absolute(u32::MAX, 10), absolute(9, 10));
    }
}
