//! Escape sequences in a user's input: Ctrl-A and a letter.

/// What the user's escape sequences ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// `x`: quit.
    Quit,
    /// `h`: help.
    Help,
    /// `c`: to the next front end: the monitor, and back.
    Switch,
    /// `b`: send a break.
    Break,
    /// `p`: power button.
    PowerButton,
    /// `r`: reset.
    Reset,
}

const CTRL_A: u8 = 1;

/// Splits input into what the guest gets and what the user asks of us.
#[derive(Debug, Default)]
pub struct EscapeParser {
    escaped: bool,
}

impl EscapeParser {
    /// The next byte: something for the front end, or an escape, or (within a sequence) neither.
    pub fn next(&mut self, byte: u8) -> Input {
        if !std::mem::take(&mut self.escaped) {
            if byte == CTRL_A {
                self.escaped = true;
                return Input::Nothing;
            }
            return Input::Byte(byte);
        }
        match byte {
            CTRL_A | b'a' => Input::Byte(CTRL_A),
            b'x' => Input::Escape(Escape::Quit),
            b'h' | b'?' => Input::Escape(Escape::Help),
            b'c' => Input::Escape(Escape::Switch),
            b'b' => Input::Escape(Escape::Break),
            b'p' => Input::Escape(Escape::PowerButton),
            b'r' => Input::Escape(Escape::Reset),
            _ => Input::Nothing,
        }
    }
}

/// What a byte of input means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Data.
    Byte(u8),
    /// A request.
    Escape(Escape),
    /// Part of a sequence.
    Nothing,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_taken_out_of_the_input() {
        let mut p = EscapeParser::default();
        let (mut guest, mut asked) = (Vec::new(), Vec::new());
        for &b in b"ls\x01x\x01\x01b\x01zc" {
            match p.next(b) {
                Input::Byte(b) => guest.push(b),
                Input::Escape(e) => asked.push(e),
                Input::Nothing => {}
            }
        }
        assert_eq!(guest, b"ls\x01bc");
        assert_eq!(asked, [Escape::Quit]);
    }
}
