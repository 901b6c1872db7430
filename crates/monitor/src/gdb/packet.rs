//! Packets: `$data#checksum`, with escapes.

/// Longest packet taken.
const LONGEST: usize = 64 << 10;

/// What arrives.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// A packet with the right checksum, escapes still in it.
    Packet(Vec<u8>),
    /// A damaged packet.
    Bad,
    /// Ctrl-C.
    Interrupt,
}

#[derive(Debug, Default)]
enum Place {
    #[default]
    Between,
    Data,
    Checksum(Option<u8>),
}

/// Finds packets in a stream.
#[derive(Debug, Default)]
pub(super) struct Framer {
    place: Place,
    data: Vec<u8>,
}

impl Framer {
    pub(super) fn feed(&mut self, bytes: &[u8], mut out: impl FnMut(Item)) {
        for &b in bytes {
            match self.place {
                Place::Between => match b {
                    b'$' => {
                        self.data.clear();
                        self.place = Place::Data;
                    }
                    3 => out(Item::Interrupt),
                    // Acknowledgements: the transport is reliable.
                    _ => {}
                },
                Place::Data => match b {
                    b'#' => self.place = Place::Checksum(None),
                    b'$' => self.data.clear(),
                    _ if self.data.len() >= LONGEST => {
                        self.place = Place::Between;
                        out(Item::Bad);
                    }
                    _ => self.data.push(b),
                },
                Place::Checksum(first) => {
                    let Some(digit) = (b as char).to_digit(16) else {
                        self.place = Place::Between;
                        out(Item::Bad);
                        continue;
                    };
                    let Some(high) = first else {
                        self.place = Place::Checksum(Some(digit as u8));
                        continue;
                    };
                    self.place = Place::Between;
                    let data = std::mem::take(&mut self.data);
                    let good = checksum(&data) == high << 4 | digit as u8;
                    out(if good { Item::Packet(data) } else { Item::Bad });
                }
            }
        }
    }
}

fn checksum(data: &[u8]) -> u8 {
    data.iter().fold(0, |sum: u8, b| sum.wrapping_add(*b))
}

/// A packet around `data`, with escapes.
pub(super) fn framed(data: &[u8]) -> Vec<u8> {
    let mut out = vec![b'$'];
    for &b in data {
        if matches!(b, b'$' | b'#' | b'}' | b'*') {
            out.extend([b'}', b ^ 0x20]);
        } else {
            out.push(b);
        }
    }
    let sum = checksum(&out[1..]);
    out.extend(format!("#{sum:02x}").into_bytes());
    out
}

/// Takes escapes out.
pub(super) fn unescape(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len());
    let mut bytes = data.iter();
    while let Some(&b) = bytes.next() {
        match b {
            b'}' => out.extend(bytes.next().map(|b| b ^ 0x20)),
            _ => out.push(b),
        }
    }
    out
}

/// A hexadecimal number.
pub(super) fn number(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

pub(super) fn hex(data: &[u8]) -> Vec<u8> {
    data.iter().flat_map(|b| format!("{b:02x}").into_bytes()).collect()
}

pub(super) fn unhex(text: &[u8]) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    let digit = |b: u8| (b as char).to_digit(16);
    text.chunks(2).map(|p| Some((digit(p[0])? << 4 | digit(p[1])?) as u8)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn items(bytes: &[u8]) -> Vec<Item> {
        let mut all = Vec::new();
        Framer::default().feed(bytes, |i| all.push(i));
        all
    }

    #[test]
    fn packets() {
        assert_eq!(items(b"+$g#67\x03$g#68$m1,2"), [Item::Packet(b"g".to_vec()), Item::Interrupt, Item::Bad]);
        assert_eq!(framed(b"OK"), b"$OK#9a");
        assert_eq!(unhex(b"0aFf"), Some(vec![10, 255]));
        assert_eq!(unhex(b"0"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_survive(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let all = items(&framed(&data));
            let [Item::Packet(text)] = all.as_slice() else { panic!("{all:?}") };
            prop_assert_eq!(unescape(text), data);
        }

        #[test]
        fn any_input(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            items(&data);
        }
    }
}
