//! The clipboard's messages: plain text, and the extension for Unicode.

use crate::MOST_TEXT;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use std::io::{Read, Write};

/// Format: text in UTF-8.
pub(super) const TEXT: u32 = 1;
/// Action: what is supported.
pub(super) const CAPS: u32 = 1 << 24;
/// Action: wants the contents.
pub(super) const REQUEST: u32 = 1 << 25;
/// Action: wants to know what there is.
pub(super) const PEEK: u32 = 1 << 26;
/// Action: there is something.
pub(super) const NOTIFY: u32 = 1 << 27;
/// Action: the contents.
pub(super) const PROVIDE: u32 = 1 << 28;

fn extended(flags: u32, payload: &[u8]) -> Vec<u8> {
    let length = 0i32.wrapping_sub(payload.len() as i32 + 4); // at most a MiB and a little
    let mut out = vec![3, 0, 0, 0];
    out.extend(length.to_be_bytes());
    out.extend(flags.to_be_bytes());
    out.extend_from_slice(payload);
    out
}

/// What the server can do.
pub(super) fn capabilities() -> Vec<u8> {
    extended(CAPS | REQUEST | PEEK | NOTIFY | PROVIDE | TEXT, &(MOST_TEXT as u32).to_be_bytes())
}

/// An action without contents.
pub(super) fn action(flags: u32) -> Vec<u8> {
    extended(flags, &[])
}

/// The contents.
pub(super) fn provide(text: &str) -> Vec<u8> {
    let text = text.replace('\n', "\r\n") + "\0";
    let mut z = ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    // Writing to a vector cannot fail.
    let _ = z.write_all(&(text.len() as u32).to_be_bytes());
    let _ = z.write_all(text.as_bytes());
    extended(PROVIDE | TEXT, &z.finish().unwrap_or_default())
}

/// The text of a viewer's contents, if it is one.
pub(super) fn provided(flags: u32, payload: &[u8]) -> Option<String> {
    if flags & TEXT == 0 {
        return None;
    }
    // Text is the first format.
    let mut z = ZlibDecoder::new(payload);
    let mut length = [0; 4];
    z.read_exact(&mut length).ok()?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MOST_TEXT {
        return None;
    }
    let mut text = Vec::new();
    z.take(length as u64).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    Some(text.trim_end_matches('\0').replace("\r\n", "\n"))
}

/// The plain message, in ISO 8859-1.
pub(super) fn plain(text: &str) -> Vec<u8> {
    let latin: Vec<u8> = text.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')).collect();
    let mut out = vec![3, 0, 0, 0];
    out.extend((latin.len() as u32).to_be_bytes());
    out.extend(latin);
    out
}

/// Text of a plain message.
pub(super) fn from_plain(latin: &[u8]) -> String {
    latin.iter().map(|b| char::from(*b)).collect::<String>().replace("\r\n", "\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn texts_travel() {
        let message = provide("grüße\n→");
        assert_eq!(i32::from_be_bytes(message[4..8].try_into().unwrap()), -(message.len() as i32 - 8));
        assert_eq!(provided(PROVIDE | TEXT, &message[12..]).unwrap(), "grüße\n→");
        assert_eq!(plain("ü→")[8..], [0xfc, b'?']);
        assert_eq!(from_plain(&[0xfc, b'\r', b'\n']), "ü\n");
    }

    proptest! {
        #[test]
        fn any_payload(data in proptest::collection::vec(any::<u8>(), 0..200), flags: u32) {
            provided(flags, &data);
        }
    }
}
