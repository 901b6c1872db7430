//! Text screens in a terminal, and a terminal's keys as a keyboard's (ECMA-48, and xterm's sequences).

use crate::input::{Event, Key, Keymap};
use crate::{Cell, TextScreen};
use std::fmt::Write;

/// Draws text screens in a terminal, only what changed.
#[derive(Default)]
pub struct Painter {
    shown: Option<TextScreen>,
}

/// Enters the alternate screen.
const ENTER: &str = "\x1b[?1049h\x1b[2J";
/// Leaves it, with everything as it was.
const LEAVE: &str = "\x1b[0m\x1b[?25h\x1b[?1049l";

impl Painter {
    /// The terminal forgets everything, or another size was set.
    pub fn forget(&mut self) {
        self.shown = None;
    }

    /// What brings the terminal from the last screen to this one.
    pub fn paint(&mut self, screen: &TextScreen) -> String {
        let mut out = String::new();
        let old = match &self.shown {
            Some(old) if (old.columns, old.rows) == (screen.columns, screen.rows) => Some(old),
            _ => {
                out.push_str(ENTER);
                None
            }
        };
        let columns = screen.columns.max(1) as usize;
        let mut colours = None;
        // Where the terminal's cursor is after what was written.
        let mut at = None;
        for (i, cell) in screen.cells.iter().enumerate() {
            if old.is_some_and(|o| o.cells.get(i) == Some(cell)) {
                continue;
            }
            if at != Some(i) || i % columns == 0 {
                // Writing to a string cannot fail, here and below.
                let _ = write!(out, "\x1b[{};{}H", i / columns + 1, i % columns + 1);
            }
            if colours != Some((cell.fg, cell.bg)) {
                let rgb = |c: u32| format!("{};{};{}", c >> 16 & 0xff, c >> 8 & 0xff, c & 0xff);
                let _ = write!(out, "\x1b[38;2;{};48;2;{}m", rgb(cell.fg), rgb(cell.bg));
                colours = Some((cell.fg, cell.bg));
            }
            out.push(if cell.ch.is_control() { ' ' } else { cell.ch });
            at = Some(i + 1);
        }
        if !out.is_empty() || old.is_none_or(|o| o.cursor != screen.cursor) {
            match screen.cursor {
                Some((x, y)) => _ = write!(out, "\x1b[0m\x1b[{};{}H\x1b[?25h", y + 1, x + 1),
                None => out.push_str("\x1b[0m\x1b[?25l"),
            }
        }
        self.shown = Some(screen.clone());
        out
    }

    /// What leaves the terminal as it was before.
    pub fn leave(&mut self) -> &'static str {
        if self.shown.take().is_some() { LEAVE } else { "" }
    }
}

/// A screen that says something, for modes that are not text.
pub fn notice(text: &str) -> TextScreen {
    let mut cells = vec![Cell::default(); 80 * 25];
    for (cell, ch) in cells[80 * 12 + 4..].iter_mut().zip(text.chars().take(72)) {
        cell.ch = ch;
    }
    TextScreen { columns: 80, rows: 25, cells, cursor: None }
}

/// Turns what a terminal sends into keys.
#[derive(Default)]
pub struct KeyDecoder {
    keymap: Keymap,
    /// The beginning of a sequence or of a character.
    pending: Vec<u8>,
}

/// Longest sequence.
const MOST_PENDING: usize = 16;

impl KeyDecoder {
    /// For a guest whose keyboard has this layout.
    pub fn new(keymap: Keymap) -> Self {
        Self { keymap, pending: Vec::new() }
    }

    /// Keys of these bytes. Sequences are expected to arrive whole, as terminals send them: an escape at the end is the
    /// Escape key.
    pub fn decode(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        self.pending.extend_from_slice(bytes);
        let all = std::mem::take(&mut self.pending);
        let mut rest = &all[..];
        while let Some((first, after)) = rest.split_first() {
            rest = match first {
                0x1b => self.escape(after, &mut events),
                0x00 => {
                    self.chord(&[Key::CTRL], ' ', &mut events);
                    after
                }
                0x08 | 0x7f => {
                    tap(&[], Key(14), &mut events);
                    after
                }
                b'\t' | b'\r' | b'\n' => {
                    self.chord(&[], char::from(*first), &mut events);
                    after
                }
                0x01..0x1b => {
                    self.chord(&[Key::CTRL], char::from(first + 0x60), &mut events);
                    after
                }
                0x1c..0x20 => {
                    self.chord(&[Key::CTRL], char::from(first + 0x40), &mut events);
                    after
                }
                _ => {
                    let length = match first {
                        0..0x80 => 1,
                        0xc0..0xe0 => 2,
                        0xe0..0xf0 => 3,
                        _ => 4,
                    };
                    if rest.len() < length {
                        self.pending = rest.to_vec();
                        return events;
                    }
                    let (now, later) = rest.split_at(length);
                    if let Some(ch) = std::str::from_utf8(now).ok().and_then(|t| t.chars().next()) {
                        self.chord(&[], ch, &mut events);
                    }
                    later
                }
            };
        }
        events
    }

    /// What follows an escape; returns what is left.
    fn escape<'a>(&mut self, after: &'a [u8], events: &mut Vec<Event>) -> &'a [u8] {
        let introducer = after.first().copied();
        if !matches!(introducer, Some(b'[' | b'O')) || after.len() < 2 {
            match introducer {
                // Alt and a character.
                Some(c @ 0x20..0x7f) => {
                    self.chord(&[Key::ALT], char::from(c), events);
                    return &after[1..];
                }
                _ => {
                    tap(&[], Key(1), events);
                    return after;
                }
            }
        }
        // Linux's console sends its first function keys as "[[A".
        let skip = if after.get(1) == Some(&b'[') { 2 } else { 1 };
        let Some(end) = after[skip..].iter().take(MOST_PENDING).position(|b| (0x40..0x7f).contains(b)) else {
            return &[];
        };
        let (parameters, last) = (&after[skip..skip + end], after[skip + end]);
        let text = std::str::from_utf8(parameters).unwrap_or_default();
        let mut numbers = text.split(';').map(|n| n.parse::<u32>().unwrap_or(0));
        let (first, modifiers) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(1).max(1) - 1);
        let key = match (skip, last, first) {
            (2, b'A'..=b'E', _) => 59 + u16::from(last - b'A'),
            (_, b'A', _) => 103,
            (_, b'B', _) => 108,
            (_, b'C', _) => 106,
            (_, b'D', _) => 105,
            (_, b'H', _) | (_, b'~', 1 | 7) => 102,
            (_, b'F', _) | (_, b'~', 4 | 8) => 107,
            (_, b'P'..=b'S', _) => 59 + u16::from(last - b'P'),
            (_, b'Z', _) => {
                tap(&[Key::SHIFT], Key(15), events);
                return &after[skip + end + 1..];
            }
            (_, b'~', 2) => 110,
            (_, b'~', 3) => 111,
            (_, b'~', 5) => 104,
            (_, b'~', 6) => 109,
            (_, b'~', 11..=15) => 59 + first as u16 - 11,
            (_, b'~', 17..=21) => 64 + first as u16 - 17,
            (_, b'~', 23..=24) => 87 + first as u16 - 23,
            _ => return &after[skip + end + 1..],
        };
        let held: Vec<_> = [(1, Key::SHIFT), (2, Key::ALT), (4, Key::CTRL)]
            .into_iter()
            .filter(|(bit, _)| modifiers & bit != 0)
            .map(|(_, key)| key)
            .collect();
        tap(&held, Key(key), events);
        &after[skip + end + 1..]
    }

    fn chord(&self, held: &[Key], ch: char, events: &mut Vec<Event>) {
        let Some((key, level)) = self.keymap.find_char(ch) else { return };
        let mut held = held.to_vec();
        if level.shift {
            held.push(Key::SHIFT);
        }
        if level.alt_gr {
            held.push(Key::ALT_RIGHT);
        }
        tap(&held, key, events);
    }
}

/// A key pressed and released while others are held.
fn tap(held: &[Key], key: Key, events: &mut Vec<Event>) {
    events.extend(held.iter().map(|k| Event::Key(*k, true)));
    events.extend([Event::Key(key, true), Event::Key(key, false)]);
    events.extend(held.iter().rev().map(|k| Event::Key(*k, false)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(bytes: &[u8]) -> Vec<(u16, bool)> {
        let events = KeyDecoder::default().decode(bytes);
        events.iter().map(|e| if let Event::Key(k, d) = e { (k.0, *d) } else { panic!() }).collect()
    }

    fn presses(bytes: &[u8]) -> Vec<u16> {
        keys(bytes).into_iter().filter(|k| k.1).map(|k| k.0).collect()
    }

    #[test]
    fn terminals_keys() {
        assert_eq!(keys(b"A"), [(42, true), (30, true), (30, false), (42, false)]);
        assert_eq!(presses(b"\x1b[A\x1bOB\x1b[5~\x1b[15~\x1b[[A\x1bOP"), [103, 108, 104, 63, 59, 59]);
        assert_eq!(presses(b"\x1b[1;5C"), [29, 106], "Ctrl and Right");
        assert_eq!(presses(b"\x1b"), [1]);
        assert_eq!(presses(b"\x1bx"), [56, 45], "Alt and x");
        assert_eq!(presses(b"\x03\r\x7f"), [29, 46, 28, 14]);
    }

    #[test]
    fn only_differences_are_painted() {
        let mut p = Painter::default();
        let mut s = notice("hello");
        assert!(p.paint(&s).contains("hello"));
        assert_eq!(p.paint(&s), "");
        s.cells[81].ch = 'x';
        let out = p.paint(&s);
        assert!(out.starts_with("\x1b[2;2H") && out.contains('x') && !out.contains("hello"), "{out:?}");
        assert_eq!(p.leave(), LEAVE);
        assert_eq!(p.leave(), "");
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut d = KeyDecoder::default();
            for chunk in bytes.chunks(3) {
                d.decode(chunk);
            }
            prop_assert!(d.pending.len() <= MOST_PENDING);
        }
    }
}
