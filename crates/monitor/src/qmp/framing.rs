//! Finds JSON values in a stream of bytes, as QMP's lexer does: values need no separators, strings may be in single
//! quotes, and there are limits to length and depth.

/// Longest value in bytes.
const LONGEST: usize = 16 << 20;
/// Deepest nesting.
const DEEPEST: usize = 1024;

/// What the stream holds next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A complete value, in standard JSON as far as quotes go.
    Value(Vec<u8>),
    /// Something that cannot be a value; the text says why.
    Bad(&'static str),
}

/// The state between two reads.
#[derive(Debug, Default)]
pub struct Framer {
    text: Vec<u8>,
    depth: usize,
    /// The quote that ends the string we are in.
    quote: Option<u8>,
    escaped: bool,
    /// Dropping the rest of a line after an error.
    skipping: bool,
}

impl Framer {
    /// Takes bytes; calls `out` for what is complete.
    pub fn feed(&mut self, bytes: &[u8], mut out: impl FnMut(Frame)) {
        for &b in bytes {
            if let Some(frame) = self.next(b) {
                out(frame);
            }
        }
    }

    fn fail(&mut self, why: &'static str) -> Option<Frame> {
        *self = Self { skipping: true, ..Self::default() };
        Some(Frame::Bad(why))
    }

    fn done(&mut self) -> Option<Frame> {
        let text = std::mem::take(&mut self.text);
        *self = Self::default();
        Some(Frame::Value(text))
    }

    fn next(&mut self, b: u8) -> Option<Frame> {
        if self.skipping {
            self.skipping = b != b'\n';
            return None;
        }
        if self.text.len() >= LONGEST {
            return self.fail("JSON token size limit exceeded");
        }
        if let Some(quote) = self.quote {
            return self.in_string(b, quote);
        }
        match b {
            0xff => {
                // Clients send it to start afresh.
                *self = Self::default();
                None
            }
            b' ' | b'\t' | b'\r' | b'\n' if self.depth == 0 => {
                if self.text.is_empty() {
                    return None;
                }
                self.done()
            }
            b'"' | b'\'' => {
                self.text.push(b'"');
                self.quote = Some(b);
                None
            }
            b'{' | b'[' => {
                self.depth += 1;
                if self.depth > DEEPEST {
                    return self.fail("JSON nesting depth limit exceeded");
                }
                self.text.push(b);
                None
            }
            b'}' | b']' => {
                self.text.push(b);
                if self.depth <= 1 {
                    return self.done();
                }
                self.depth -= 1;
                None
            }
            _ => {
                self.text.push(b);
                None
            }
        }
    }

    fn in_string(&mut self, b: u8, quote: u8) -> Option<Frame> {
        if std::mem::take(&mut self.escaped) {
            // Standard JSON has no escape for the single quote.
            if b == b'\'' {
                self.text.pop();
            }
            self.text.push(b);
        } else if b == b'\\' {
            self.text.push(b);
            self.escaped = true;
        } else if b == quote {
            self.text.push(b'"');
            self.quote = None;
            if self.depth == 0 {
                return self.done();
            }
        } else if b == b'"' {
            self.text.extend_from_slice(b"\\\"");
        } else if b == b'\n' {
            return self.fail("JSON parse error, stray control character in a string");
        } else {
            self.text.push(b);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames(text: &[u8]) -> Vec<Frame> {
        let mut all = Vec::new();
        Framer::default().feed(text, |f| all.push(f));
        all
    }

    fn value(text: &str) -> Frame {
        Frame::Value(text.into())
    }

    #[test]
    fn values_need_no_separators() {
        assert_eq!(
            frames(b" {\"a\":[1,{}]}{'b':'x\"y\\'z'} 12\n"),
            [value("{\"a\":[1,{}]}"), value("{\"b\":\"x\\\"y'z\"}"), value("12")]
        );
        assert_eq!(frames(b"{\"}\": \"\\\"}\"}"), [value("{\"}\": \"\\\"}\"}")]);
        assert_eq!(frames(b"{\"a\xff{}"), []);
        assert_eq!(frames(b"{\xff{}"), [value("{}")]);
    }

    #[test]
    fn limits() {
        let deep = vec![b'['; 3000];
        assert_eq!(frames(&deep), [Frame::Bad("JSON nesting depth limit exceeded")]);
        let mut long = vec![b'"'];
        long.resize(LONGEST + 10, b'a');
        long.extend_from_slice(b"\n{}");
        assert_eq!(frames(&long), [Frame::Bad("JSON token size limit exceeded"), value("{}")]);
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let whole = frames(&bytes);
            let mut framer = Framer::default();
            let mut split = Vec::new();
            for b in &bytes {
                framer.feed(std::slice::from_ref(b), |f| split.push(f));
            }
            prop_assert_eq!(whole, split);
        }
    }
}
