//! Keys, and their numbers on the various keyboards.

/// A key of a keyboard by its place, as Linux numbers them (`KEY_*` of input-event-codes.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub u16);

struct Row {
    /// QEMU's name (`QKeyCode`).
    name: &'static str,
    evdev: u16,
    /// Scan code of set 1; bit 7 stands for the prefix 0xe0; 0 if there is none.
    set1: u8,
    /// USB HID usage of the keyboard page; 0 if there is none.
    usb: u8,
}

const fn row(name: &'static str, evdev: u16, set1: u8, usb: u8) -> Row {
    Row { name, evdev, set1, usb }
}

/// USB HID Usage Tables 1.4, 10; AT scan codes from the PS/2 hardware reference.
const KEYS: &[Row] = &[
    row("esc", 1, 0x01, 0x29),
    row("1", 2, 0x02, 0x1e),
    row("2", 3, 0x03, 0x1f),
    row("3", 4, 0x04, 0x20),
    row("4", 5, 0x05, 0x21),
    row("5", 6, 0x06, 0x22),
    row("6", 7, 0x07, 0x23),
    row("7", 8, 0x08, 0x24),
    row("8", 9, 0x09, 0x25),
    row("9", 10, 0x0a, 0x26),
    row("0", 11, 0x0b, 0x27),
    row("minus", 12, 0x0c, 0x2d),
    row("equal", 13, 0x0d, 0x2e),
    row("backspace", 14, 0x0e, 0x2a),
    row("tab", 15, 0x0f, 0x2b),
    row("q", 16, 0x10, 0x14),
    row("w", 17, 0x11, 0x1a),
    row("e", 18, 0x12, 0x08),
    row("r", 19, 0x13, 0x15),
    row("t", 20, 0x14, 0x17),
    row("y", 21, 0x15, 0x1c),
    row("u", 22, 0x16, 0x18),
    row("i", 23, 0x17, 0x0c),
    row("o", 24, 0x18, 0x12),
    row("p", 25, 0x19, 0x13),
    row("bracket_left", 26, 0x1a, 0x2f),
    row("bracket_right", 27, 0x1b, 0x30),
    row("ret", 28, 0x1c, 0x28),
    row("ctrl", 29, 0x1d, 0xe0),
    row("a", 30, 0x1e, 0x04),
    row("s", 31, 0x1f, 0x16),
    row("d", 32, 0x20, 0x07),
    row("f", 33, 0x21, 0x09),
    row("g", 34, 0x22, 0x0a),
    row("h", 35, 0x23, 0x0b),
    row("j", 36, 0x24, 0x0d),
    row("k", 37, 0x25, 0x0e),
    row("l", 38, 0x26, 0x0f),
    row("semicolon", 39, 0x27, 0x33),
    row("apostrophe", 40, 0x28, 0x34),
    row("grave_accent", 41, 0x29, 0x35),
    row("shift", 42, 0x2a, 0xe1),
    row("backslash", 43, 0x2b, 0x31),
    row("z", 44, 0x2c, 0x1d),
    row("x", 45, 0x2d, 0x1b),
    row("c", 46, 0x2e, 0x06),
    row("v", 47, 0x2f, 0x19),
    row("b", 48, 0x30, 0x05),
    row("n", 49, 0x31, 0x11),
    row("m", 50, 0x32, 0x10),
    row("comma", 51, 0x33, 0x36),
    row("dot", 52, 0x34, 0x37),
    row("slash", 53, 0x35, 0x38),
    row("shift_r", 54, 0x36, 0xe5),
    row("kp_multiply", 55, 0x37, 0x55),
    row("alt", 56, 0x38, 0xe2),
    row("spc", 57, 0x39, 0x2c),
    row("caps_lock", 58, 0x3a, 0x39),
    row("f1", 59, 0x3b, 0x3a),
    row("f2", 60, 0x3c, 0x3b),
    row("f3", 61, 0x3d, 0x3c),
    row("f4", 62, 0x3e, 0x3d),
    row("f5", 63, 0x3f, 0x3e),
    row("f6", 64, 0x40, 0x3f),
    row("f7", 65, 0x41, 0x40),
    row("f8", 66, 0x42, 0x41),
    row("f9", 67, 0x43, 0x42),
    row("f10", 68, 0x44, 0x43),
    row("num_lock", 69, 0x45, 0x53),
    row("scroll_lock", 70, 0x46, 0x47),
    row("kp_7", 71, 0x47, 0x5f),
    row("kp_8", 72, 0x48, 0x60),
    row("kp_9", 73, 0x49, 0x61),
    row("kp_subtract", 74, 0x4a, 0x56),
    row("kp_4", 75, 0x4b, 0x5c),
    row("kp_5", 76, 0x4c, 0x5d),
    row("kp_6", 77, 0x4d, 0x5e),
    row("kp_add", 78, 0x4e, 0x57),
    row("kp_1", 79, 0x4f, 0x59),
    row("kp_2", 80, 0x50, 0x5a),
    row("kp_3", 81, 0x51, 0x5b),
    row("kp_0", 82, 0x52, 0x62),
    row("kp_decimal", 83, 0x53, 0x63),
    row("less", 86, 0x56, 0x64),
    row("f11", 87, 0x57, 0x44),
    row("f12", 88, 0x58, 0x45),
    row("ro", 89, 0x73, 0x87),
    row("henkan", 92, 0x79, 0x8a),
    row("hiragana", 93, 0x70, 0x88),
    row("muhenkan", 94, 0x7b, 0x8b),
    row("kp_enter", 96, 0x9c, 0x58),
    row("ctrl_r", 97, 0x9d, 0xe4),
    row("kp_divide", 98, 0xb5, 0x54),
    row("print", 99, 0xb7, 0x46),
    row("alt_r", 100, 0xb8, 0xe6),
    row("lf", 101, 0x5b, 0),
    row("home", 102, 0xc7, 0x4a),
    row("up", 103, 0xc8, 0x52),
    row("pgup", 104, 0xc9, 0x4b),
    row("left", 105, 0xcb, 0x50),
    row("right", 106, 0xcd, 0x4f),
    row("end", 107, 0xcf, 0x4d),
    row("down", 108, 0xd0, 0x51),
    row("pgdn", 109, 0xd1, 0x4e),
    row("insert", 110, 0xd2, 0x49),
    row("delete", 111, 0xd3, 0x4c),
    row("audiomute", 113, 0xa0, 0x7f),
    row("volumedown", 114, 0xae, 0x81),
    row("volumeup", 115, 0xb0, 0x80),
    row("power", 116, 0xde, 0x66),
    row("kp_equals", 117, 0x59, 0x67),
    row("pause", 119, 0xc5, 0x48),
    row("kp_comma", 121, 0x7e, 0x85),
    row("yen", 124, 0x7d, 0x89),
    row("meta_l", 125, 0xdb, 0xe3),
    row("meta_r", 126, 0xdc, 0xe7),
    row("compose", 127, 0xdd, 0x65),
    row("stop", 128, 0xe8, 0x78),
    row("again", 129, 0x85, 0x79),
    row("props", 130, 0x86, 0x76),
    row("undo", 131, 0x87, 0x7a),
    row("front", 132, 0x8c, 0x77),
    row("copy", 133, 0xf8, 0x7c),
    row("open", 134, 0x64, 0x74),
    row("paste", 135, 0x65, 0x7d),
    row("find", 136, 0xc1, 0x7e),
    row("cut", 137, 0xbc, 0x7b),
    row("help", 138, 0xf5, 0x75),
    row("menu", 139, 0x9e, 0),
    row("calculator", 140, 0xa1, 0),
    row("sleep", 142, 0xdf, 0),
    row("wake", 143, 0xe3, 0),
    row("mail", 155, 0xec, 0),
    row("computer", 157, 0xeb, 0),
    row("ac_bookmarks", 156, 0xe6, 0),
    row("ac_back", 158, 0xea, 0),
    row("ac_forward", 159, 0xe9, 0),
    row("audionext", 163, 0x99, 0),
    row("audioplay", 164, 0xa2, 0),
    row("audioprev", 165, 0x90, 0),
    row("audiostop", 166, 0xa4, 0),
    row("ac_home", 172, 0xb2, 0),
    row("ac_refresh", 173, 0xe7, 0),
    row("f13", 183, 0x5d, 0x68),
    row("f14", 184, 0x5e, 0x69),
    row("f15", 185, 0x5f, 0x6a),
    row("mediaselect", 226, 0xed, 0),
];

/// Other names that QEMU takes.
const ALIASES: &[(&str, &str)] =
    &[("sysrq", "print"), ("kp_sysrq", "print"), ("altgr", "alt_r"), ("enter", "ret"), ("space", "spc")];

impl Key {
    /// Left Shift.
    pub const SHIFT: Self = Self(42);
    /// Right Shift.
    pub const SHIFT_RIGHT: Self = Self(54);
    /// Left Control.
    pub const CTRL: Self = Self(29);
    /// Right Control.
    pub const CTRL_RIGHT: Self = Self(97);
    /// Left Alt.
    pub const ALT: Self = Self(56);
    /// Right Alt (AltGr).
    pub const ALT_RIGHT: Self = Self(100);
    /// Left Super.
    pub const META: Self = Self(125);
    /// Right Super.
    pub const META_RIGHT: Self = Self(126);

    fn row(self) -> Option<&'static Row> {
        KEYS.iter().find(|r| r.evdev == self.0)
    }

    /// The key of that name: QEMU's (`a`, `ret`, `ctrl`, `kp_enter`).
    pub fn from_name(name: &str) -> Option<Self> {
        let name = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, real)| real);
        KEYS.iter().find(|r| r.name == name).map(|r| Self(r.evdev))
    }

    /// QEMU's name of the key.
    pub fn name(self) -> Option<&'static str> {
        self.row().map(|r| r.name)
    }

    /// All names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        KEYS.iter().map(|r| r.name)
    }

    /// All keys.
    pub fn all() -> impl Iterator<Item = Self> {
        KEYS.iter().map(|r| Self(r.evdev))
    }

    /// The key with a scan code of set 1, bit 7 standing for the prefix 0xe0 (as VNC's extended key events and
    /// QEMU's `number` give it).
    pub fn from_set1(code: u8) -> Option<Self> {
        // Print Screen is also known by its code with Alt (SysRq), Pause by that with Ctrl (Break).
        let code = match code {
            0x54 => 0xb7,
            0xc6 => 0xc5,
            code => code,
        };
        KEYS.iter().find(|r| r.set1 == code && code != 0).map(|r| Self(r.evdev))
    }

    /// Scan code of set 1, bit 7 standing for the prefix 0xe0.
    pub fn set1(self) -> Option<u8> {
        self.row().map(|r| r.set1).filter(|c| *c != 0)
    }

    /// USB HID usage on the keyboard page.
    pub fn usb(self) -> Option<u8> {
        self.row().map(|r| r.usb).filter(|c| *c != 0)
    }

    /// Parses a combination, `ctrl-alt-delete`; also numbers of set 1 as `0x1e`.
    ///
    /// # Errors
    /// Says which part is not a key.
    pub fn parse_combination(text: &str) -> Result<Vec<Self>, String> {
        text.split('-')
            .map(|part| {
                let number = part.strip_prefix("0x").and_then(|hex| u8::from_str_radix(hex, 16).ok());
                let key = number.and_then(Self::from_set1).or_else(|| Self::from_name(part));
                key.ok_or_else(|| {
                    let near = base::nearest(part, Self::names());
                    let near = near.map(|n| format!("; did you mean '{n}'?")).unwrap_or_default();
                    format!("unknown key '{part}' in '{text}'{near}")
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn numbers_are_unique() {
        let mut seen = BTreeSet::new();
        for r in KEYS {
            assert!(seen.insert((0, u16::from(r.set1))) || r.set1 == 0, "{} set 1", r.name);
            assert!(seen.insert((1, u16::from(r.usb))) || r.usb == 0, "{} USB", r.name);
            assert!(seen.insert((2, r.evdev)), "{} evdev", r.name);
        }
        assert_eq!(Key::from_set1(0xc8), Key::from_name("up"));
        assert_eq!(Key::from_set1(0), None);
    }

    #[test]
    fn combinations() {
        let keys = Key::parse_combination("ctrl-alt-delete").unwrap();
        assert_eq!(keys, [Key::CTRL, Key::ALT, Key(111)]);
        assert_eq!(Key::parse_combination("0xe").unwrap(), [Key(14)]);
        assert_eq!(
            Key::parse_combination("ctl").unwrap_err(),
            "unknown key 'ctl' in 'ctl'; did you mean 'ctrl'?"
        );
    }
}
