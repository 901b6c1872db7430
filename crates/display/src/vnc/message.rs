//! Messages of viewers (RFC 6143, 7.5, and extensions).

use super::pixel::PixelFormat;
use super::transport::{Rx, Source};
use crate::{MOST_TEXT, Rect};
use std::io;

/// Most encodings that are looked at.
const MOST_ENCODINGS: usize = 1024;
/// Most bytes of a fence's payload (the protocol's limit).
const MOST_FENCE: usize = 64;

/// What a viewer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientMessage {
    /// From now on pixels in this format.
    SetPixelFormat(PixelFormat),
    /// Encodings by preference, and pseudo-encodings.
    SetEncodings(Vec<i32>),
    /// Wants an update of an area: only what changed, or everything.
    UpdateRequest {
        /// Only what changed.
        incremental: bool,
        /// The area.
        area: Rect,
    },
    /// A key, by keysym.
    Key {
        /// Goes down.
        down: bool,
        /// X keysym.
        keysym: u32,
        /// Scan code of set 1 (bit 7: prefix e0), if the viewer sends such.
        code: Option<u32>,
    },
    /// The pointer: buttons that are down, and where it is.
    Pointer {
        /// Bit 0 left, 1 middle, 2 right, 3 to 6 wheel up, down, left, right, 7 back.
        buttons: u8,
        /// Position, or movement from 0x7fff where the guest takes movements only.
        at: (u16, u16),
    },
    /// Text in ISO 8859-1.
    CutText(Vec<u8>),
    /// Extended clipboard: flags and payload.
    Clipboard(u32, Vec<u8>),
    /// Updates without requests, of an area; or no longer.
    ContinuousUpdates(bool, Rect),
    /// A fence: flags and payload.
    Fence(u32, Vec<u8>),
    /// Wants the guest to have a screen of this size.
    SetDesktopSize(u16, u16),
    /// Something that is taken note of and not done (sound).
    Ignored,
}

fn bad(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn area<S: Source>(rx: &mut Rx<S>) -> io::Result<Rect> {
    let n = [rx.u16()?, rx.u16()?, rx.u16()?, rx.u16()?].map(u32::from);
    Ok(Rect::new(n[0], n[1], n[2], n[3]))
}

/// Reads a message.
///
/// # Errors
/// The connection's, or a message that no viewer sends.
pub fn read_message<S: Source>(rx: &mut Rx<S>) -> io::Result<ClientMessage> {
    Ok(match rx.u8()? {
        0 => {
            rx.skip(3)?;
            ClientMessage::SetPixelFormat(PixelFormat::parse(&rx.array()?)?)
        }
        2 => {
            rx.skip(1)?;
            let number = usize::from(rx.u16()?);
            let mut all = Vec::with_capacity(number.min(MOST_ENCODINGS));
            for i in 0..number {
                let encoding = rx.u32()? as i32;
                if i < MOST_ENCODINGS {
                    all.push(encoding);
                }
            }
            ClientMessage::SetEncodings(all)
        }
        3 => ClientMessage::UpdateRequest { incremental: rx.u8()? != 0, area: area(rx)? },
        4 => {
            let down = rx.u8()? != 0;
            rx.skip(2)?;
            ClientMessage::Key { down, keysym: rx.u32()?, code: None }
        }
        5 => ClientMessage::Pointer { buttons: rx.u8()?, at: (rx.u16()?, rx.u16()?) },
        6 => {
            rx.skip(3)?;
            let length = rx.u32()? as i32;
            let most = MOST_TEXT as u32 + 64;
            if length < 0 {
                // Extended: flags are part of the length.
                let length = length.unsigned_abs();
                if !(4..=most).contains(&length) {
                    return Err(bad(format!("clipboard of {length} bytes")));
                }
                let flags = rx.u32()?;
                ClientMessage::Clipboard(flags, rx.bytes(length as usize - 4)?)
            } else if length as u32 > most {
                rx.skip(length as u64)?;
                ClientMessage::Ignored
            } else {
                ClientMessage::CutText(rx.bytes(length as usize)?)
            }
        }
        150 => ClientMessage::ContinuousUpdates(rx.u8()? != 0, area(rx)?),
        248 => {
            rx.skip(3)?;
            let flags = rx.u32()?;
            let length = usize::from(rx.u8()?);
            if length > MOST_FENCE {
                return Err(bad(format!("a fence of {length} bytes")));
            }
            ClientMessage::Fence(flags, rx.bytes(length)?)
        }
        251 => {
            rx.skip(1)?;
            let (w, h) = (rx.u16()?, rx.u16()?);
            let screens = rx.u8()?;
            rx.skip(1 + 16 * u64::from(screens))?;
            ClientMessage::SetDesktopSize(w, h)
        }
        255 => match rx.u8()? {
            0 => {
                let down = rx.u16()? != 0;
                ClientMessage::Key { down, keysym: rx.u32()?, code: Some(rx.u32()?) }
            }
            1 => {
                // Sound: enable, disable, or a format.
                if rx.u16()? == 2 {
                    rx.skip(6)?;
                }
                ClientMessage::Ignored
            }
            other => return Err(bad(format!("unknown QEMU message {other}"))),
        },
        other => return Err(bad(format!("unknown message {other}"))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(data: &[u8]) -> io::Result<ClientMessage> {
        read_message(&mut Rx::new(data))
    }

    #[test]
    fn messages() {
        assert_eq!(
            read(&[4, 1, 0, 0, 0, 0, 0xff, 0x0d]).unwrap(),
            ClientMessage::Key { down: true, keysym: 0xff0d, code: None }
        );
        assert_eq!(
            read(&[2, 0, 0, 2, 0, 0, 0, 16, 0xff, 0xff, 0xff, 0x11]).unwrap(),
            ClientMessage::SetEncodings(vec![16, -239])
        );
        assert_eq!(read(&[5, 4, 0, 10, 0, 20]).unwrap(), ClientMessage::Pointer { buttons: 4, at: (10, 20) });
        assert_eq!(
            read(&[6, 0, 0, 0, 0, 0, 0, 2, b'h', b'i']).unwrap(),
            ClientMessage::CutText(b"hi".to_vec())
        );
        assert_eq!(
            read(&[6, 0, 0, 0, 0xff, 0xff, 0xff, 0xfb, 1, 0, 0, 1, 9]).unwrap(),
            ClientMessage::Clipboard(0x0100_0001, vec![9])
        );
        for bad in [&[1][..], &[255, 9], &[248, 0, 0, 0, 0, 0, 0, 0, 65], &[6, 0, 0, 0, 0x80, 0, 0, 0]] {
            assert_eq!(read(bad).unwrap_err().kind(), io::ErrorKind::InvalidData, "{bad:?}");
        }
        // Longer than anybody copies: read over, in bounded memory, until the viewer stops sending.
        assert_eq!(
            read(&[6, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff]).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    proptest! {
        #[test]
        fn any_bytes(data in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut rx = Rx::new(&data[..]);
            while read_message(&mut rx).is_ok() {}
        }
    }
}
