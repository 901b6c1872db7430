//! As much of telnet (RFC 854, 856, 857, 858) as makes a telnet client a raw terminal.

/// "Interpret as command".
pub(super) const IAC: u8 = 255;
const SB: u8 = 250;
const SE: u8 = 240;
const BREAK: u8 = 243;

/// We echo, suppress go-ahead and send binary; the client is to send binary.
pub(super) const GREETING: &[u8] = &[IAC, 251, 1, IAC, 251, 3, IAC, 251, 0, IAC, 253, 0];

#[derive(Clone, Copy, Default)]
enum State {
    #[default]
    Data,
    /// A carriage return was passed on; the NUL or line feed after it is not.
    Return,
    Command,
    Option,
    Negotiation,
    NegotiationCommand,
}

/// Takes commands out of the input.
#[derive(Default)]
pub(super) struct Filter(State);

impl Filter {
    /// Appends the data to `out`. Returns whether there was a break.
    pub(super) fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) -> bool {
        let mut broken = false;
        for &b in input {
            self.0 = match (self.0, b) {
                (State::Data | State::Return, IAC) => State::Command,
                (State::Return, 0 | b'\n') => State::Data,
                (State::Data | State::Return, b) => {
                    out.push(b);
                    if b == b'\r' { State::Return } else { State::Data }
                }
                (State::Command, IAC) => {
                    out.push(IAC);
                    State::Data
                }
                (State::Command, SB) => State::Negotiation,
                (State::Command, 251..=254) => State::Option,
                (State::Command, b) => {
                    broken |= b == BREAK;
                    State::Data
                }
                (State::Option, _) => State::Data,
                (State::Negotiation, IAC) => State::NegotiationCommand,
                (State::Negotiation, _) => State::Negotiation,
                (State::NegotiationCommand, SE) => State::Data,
                (State::NegotiationCommand, _) => State::Negotiation,
            };
        }
        broken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_taken_out() {
        let mut filter = Filter::default();
        let mut out = Vec::new();
        assert!(!filter.feed(&[b'a', IAC, 253, 1, b'b', IAC, SB, 24, 0, b'x', IAC], &mut out));
        assert!(filter.feed(&[SE, b'\r', 0, b'c', IAC, IAC, IAC, BREAK], &mut out));
        assert_eq!(out, [b'a', b'b', b'\r', b'c', IAC]);
    }
}
