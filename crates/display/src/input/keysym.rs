//! X keysyms (X11 protocol, appendix A): what viewers call keys by.

use super::Key;

/// Keys whose keysyms do not depend on the keyboard's layout.
pub(super) fn fixed(keysym: u32) -> Option<Key> {
    let evdev = match keysym {
        0xff08 => 14,          // BackSpace
        0xff09 | 0xfe20 => 15, // Tab, ISO_Left_Tab
        0xff0a => 101,
        0xff0d => 28,           // Return
        0xff13 | 0xff6b => 119, // Pause, Break
        0xff14 => 70,
        0xff15 | 0xff61 => 99, // Sys_Req, Print
        0xff1b => 1,
        0xff20 | 0xff67 => 127, // Multi_key, Menu
        0xff50 => 102,
        0xff51 => 105,
        0xff52 => 103,
        0xff53 => 106,
        0xff54 => 108,
        0xff55 => 104,
        0xff56 => 109,
        0xff57 => 107,
        0xff63 => 110,
        0xff6a => 138,
        0xff7e => 100, // Mode_switch
        0xff7f => 69,
        0xff80 => 57,
        0xff8d => 96,
        0xff95 | 0xffb7 => 71,
        0xff97 | 0xffb8 => 72,
        0xff9a | 0xffb9 => 73,
        0xff96 | 0xffb4 => 75,
        0xff9d | 0xffb5 => 76,
        0xff98 | 0xffb6 => 77,
        0xff9c | 0xffb1 => 79,
        0xff99 | 0xffb2 => 80,
        0xff9b | 0xffb3 => 81,
        0xff9e | 0xffb0 => 82,
        0xff9f | 0xffae => 83,
        0xffaa => 55,
        0xffab => 78,
        0xffac => 121,
        0xffad => 74,
        0xffaf => 98,
        0xffbd => 117,
        0xffbe..=0xffc7 => 59 + (keysym - 0xffbe) as u16, // F1 to F10
        0xffc8 => 87,
        0xffc9 => 88,
        0xffca..=0xffcc => 183 + (keysym - 0xffca) as u16,
        0xffe1 => 42,
        0xffe2 => 54,
        0xffe3 => 29,
        0xffe4 => 97,
        0xffe5 => 58,
        0xffe7 => 125, // Meta_L
        0xffe8 => 126,
        0xffe9 => 56,
        0xffea | 0xfe03 => 100, // Alt_R, ISO_Level3_Shift
        0xffeb => 125,
        0xffec => 126,
        0xffff => 111,
        0x1008_ff11 => 114,
        0x1008_ff12 => 113,
        0x1008_ff13 => 115,
        _ => return None,
    };
    Some(Key(evdev))
}

/// The character of a keysym that stands for one.
pub(super) fn character(keysym: u32) -> Option<char> {
    match keysym {
        0x20..=0x7e | 0xa0..=0xff => char::from_u32(keysym),
        0x20ac => Some('€'),
        // Legacy keysyms that European layouts have.
        0x01a3 => Some('ł'),
        0x13bd => Some('œ'),
        0x13bc => Some('Œ'),
        0xfe50 => Some('`'),
        0xfe51 => Some('´'),
        0xfe52 => Some('^'),
        0xfe53 => Some('~'),
        0xfe57 => Some('¨'),
        0x0100_0000..=0x0110_ffff => char::from_u32(keysym - 0x0100_0000),
        _ => None,
    }
}
