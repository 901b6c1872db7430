//! A line editor: cursor keys, history, completion, for terminals without any.

/// Longest line.
const LONGEST: usize = 4096;
/// Lines remembered.
const REMEMBERED: usize = 128;

/// What a key did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing that needs an answer.
    None,
    /// A whole line.
    Line(String),
    /// The user wants to know how the text before the cursor could go on.
    Complete(String),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Escape {
    #[default]
    None,
    /// After ESC.
    Begun,
    /// After ESC [ or ESC O, with the parameter so far.
    Bracket(u16),
}

/// The editor. What it wants shown is appended to the `out` of each call.
#[derive(Debug, Default)]
pub(super) struct Editor {
    line: Vec<char>,
    cursor: usize,
    history: Vec<String>,
    /// Position in the history; its length is the new line.
    at: usize,
    escape: Escape,
    /// Bytes of a character that is not complete yet.
    partial: Vec<u8>,
    /// The last byte ended a line with a carriage return, so a line feed after it does not.
    returned: bool,
}

impl Editor {
    /// Takes a byte.
    pub(super) fn key(&mut self, byte: u8, out: &mut String) -> Outcome {
        let returned = std::mem::take(&mut self.returned);
        match std::mem::take(&mut self.escape) {
            Escape::None => {}
            Escape::Begun => {
                if byte == b'[' || byte == b'O' {
                    self.escape = Escape::Bracket(0);
                }
                return Outcome::None;
            }
            Escape::Bracket(n) => {
                self.bracket(byte, n, out);
                return Outcome::None;
            }
        }
        match byte {
            b'\n' if returned => {}
            b'\r' | b'\n' => {
                self.returned = byte == b'\r';
                return self.enter(out);
            }
            b'\t' => return Outcome::Complete(self.line[..self.cursor].iter().collect()),
            0x1b => self.escape = Escape::Begun,
            0x08 | 0x7f => self.erase_back(out),
            0x01 => self.move_to(0, out),
            0x05 => self.move_to(self.line.len(), out),
            0x02 => self.move_to(self.cursor.saturating_sub(1), out),
            0x06 => self.move_to(self.cursor + 1, out),
            0x04 => self.erase(out),
            0x0b => {
                self.line.truncate(self.cursor);
                out.push_str("\x1b[K");
            }
            0x15 => self.replace(Vec::new(), out),
            0x17 => self.erase_word(out),
            0x0e => self.recall(1, out),
            0x10 => self.recall(-1, out),
            0..=0x1f => {}
            _ => self.text(byte, out),
        }
        Outcome::None
    }

    /// Writes `text` at the cursor.
    pub(super) fn insert(&mut self, text: &str, out: &mut String) {
        for c in text.chars() {
            if self.line.len() < LONGEST {
                self.line.insert(self.cursor, c);
                self.cursor += 1;
                out.push(c);
            }
        }
        self.redraw_tail(out);
    }

    /// The line so far, for after a message.
    pub(super) fn redraw(&self, out: &mut String) {
        out.extend(&self.line);
        left(self.line.len() - self.cursor, out);
    }

    fn text(&mut self, byte: u8, out: &mut String) {
        self.partial.push(byte);
        match std::str::from_utf8(&self.partial) {
            Ok(s) => {
                let s = s.to_owned();
                self.partial.clear();
                self.insert(&s, out);
            }
            Err(e) if e.error_len().is_some() || self.partial.len() >= 4 => self.partial.clear(),
            Err(_) => {}
        }
    }

    fn redraw_tail(&self, out: &mut String) {
        if self.cursor < self.line.len() {
            out.extend(&self.line[self.cursor..]);
            out.push_str("\x1b[K");
            left(self.line.len() - self.cursor, out);
        }
    }

    fn enter(&mut self, out: &mut String) -> Outcome {
        let line: String = self.line.drain(..).collect();
        self.cursor = 0;
        out.push_str("\r\n");
        let trimmed = line.trim();
        if !trimmed.is_empty() && self.history.last().map(String::as_str) != Some(trimmed) {
            if self.history.len() == REMEMBERED {
                self.history.remove(0);
            }
            self.history.push(trimmed.into());
        }
        self.at = self.history.len();
        Outcome::Line(line)
    }

    fn bracket(&mut self, byte: u8, n: u16, out: &mut String) {
        match byte {
            b'0'..=b'9' => {
                self.escape = Escape::Bracket(n.saturating_mul(10).saturating_add((byte - b'0').into()))
            }
            b';' => self.escape = Escape::Bracket(0),
            b'A' => self.recall(-1, out),
            b'B' => self.recall(1, out),
            b'C' => self.move_to(self.cursor + 1, out),
            b'D' => self.move_to(self.cursor.saturating_sub(1), out),
            b'H' => self.move_to(0, out),
            b'F' => self.move_to(self.line.len(), out),
            b'~' => match n {
                1 | 7 => self.move_to(0, out),
                4 | 8 => self.move_to(self.line.len(), out),
                3 => self.erase(out),
                _ => {}
            },
            _ => {}
        }
    }

    fn move_to(&mut self, to: usize, out: &mut String) {
        let to = to.min(self.line.len());
        left(self.cursor.saturating_sub(to), out);
        if to > self.cursor {
            out.extend(&self.line[self.cursor..to]);
        }
        self.cursor = to;
    }

    fn erase(&mut self, out: &mut String) {
        if self.cursor < self.line.len() {
            self.line.remove(self.cursor);
            out.push_str("\x1b[K");
            self.redraw_tail(out);
        }
    }

    fn erase_back(&mut self, out: &mut String) {
        if self.cursor > 0 {
            self.move_to(self.cursor - 1, out);
            self.erase(out);
        }
    }

    fn erase_word(&mut self, out: &mut String) {
        while self.cursor > 0 && self.line[self.cursor - 1] == ' ' {
            self.erase_back(out);
        }
        while self.cursor > 0 && self.line[self.cursor - 1] != ' ' {
            self.erase_back(out);
        }
    }

    fn replace(&mut self, line: Vec<char>, out: &mut String) {
        self.move_to(0, out);
        out.push_str("\x1b[K");
        self.line = line;
        out.extend(&self.line);
        self.cursor = self.line.len();
    }

    fn recall(&mut self, step: isize, out: &mut String) {
        let Some(at) = self.at.checked_add_signed(step).filter(|a| *a <= self.history.len()) else { return };
        self.at = at;
        let line = self.history.get(at).map(|l| l.chars().collect()).unwrap_or_default();
        self.replace(line, out);
    }
}

fn left(n: usize, out: &mut String) {
    if n > 0 {
        out.push_str(&format!("\x1b[{n}D"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(editor: &mut Editor, keys: &[u8]) -> Vec<String> {
        let mut out = String::new();
        keys.iter()
            .filter_map(|b| match editor.key(*b, &mut out) {
                Outcome::Line(l) => Some(l),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn editing() {
        let mut e = Editor::default();
        assert_eq!(lines(&mut e, b"stpo\x1b[D\x1b[D\x7ft\r\n"), ["stpo"]);
        assert_eq!(lines(&mut e, b"abc\x01X\x05Y\x17hello\r"), ["hello"]);
        assert_eq!(lines(&mut e, "é\x08e\r".as_bytes()), ["e"]);
        assert_eq!(lines(&mut e, b"junk\x15ok\n\n"), ["ok", ""]);
    }

    #[test]
    fn history() {
        let mut e = Editor::default();
        lines(&mut e, b"one\rtwo\r");
        assert_eq!(lines(&mut e, b"\x1b[A\x1b[A\r"), ["one"]);
        assert_eq!(lines(&mut e, b"\x10\x10\x0e\r"), ["one"]);
        assert_eq!(lines(&mut e, b"\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A\x1b[B\r"), ["two"]);
    }

    #[test]
    fn completion_and_long_lines() {
        let mut e = Editor::default();
        let mut out = String::new();
        lines(&mut e, b"info re");
        assert_eq!(e.key(b'\t', &mut out), Outcome::Complete("info re".into()));
        e.insert("gisters ", &mut out);
        assert_eq!(lines(&mut e, b"\r"), ["info registers "]);
        assert_eq!(lines(&mut e, &[&[b'a'; 10_000][..], b"\r"].concat())[0].len(), LONGEST);
    }
}
