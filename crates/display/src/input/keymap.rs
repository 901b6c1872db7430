//! Keyboard layouts: which key, with which modifiers, gives a character in the guest.

use super::{Key, keysym};
use base::nearest;

/// Modifiers that a character needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Level {
    /// Shift.
    pub shift: bool,
    /// AltGr.
    pub alt_gr: bool,
    /// A letter: Caps Lock counts as Shift.
    pub letter: bool,
}

/// A layout: rows of characters from left to right, without, with Shift, and with AltGr (blanks: nothing). The rows are
/// those of digits, and of Q, A and Z, the key right of left Shift (ISO) being the first of the last.
struct Layout {
    name: &'static str,
    about: &'static str,
    plain: [&'static str; 4],
    shift: [&'static str; 4],
    alt_gr: [&'static str; 4],
}

/// Keys of the rows.
const ROWS: [&[u16]; 4] = [
    &[41, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13],
    &[16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27],
    &[30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 43],
    &[86, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53],
];

const LAYOUTS: &[Layout] = &[
    Layout {
        name: "en-us",
        about: "English (United States)",
        plain: ["`1234567890-=", "qwertyuiop[]", "asdfghjkl;'\\", " zxcvbnm,./"],
        shift: ["~!@#$%^&*()_+", "QWERTYUIOP{}", "ASDFGHJKL:\"|", " ZXCVBNM<>?"],
        alt_gr: ["", "", "", ""],
    },
    Layout {
        name: "en-gb",
        about: "English (United Kingdom)",
        plain: ["`1234567890-=", "qwertyuiop[]", "asdfghjkl;'#", "\\zxcvbnm,./"],
        shift: ["¬!\"£$%^&*()_+", "QWERTYUIOP{}", "ASDFGHJKL:@~", "|ZXCVBNM<>?"],
        alt_gr: ["¦   €", "", "", ""],
    },
    Layout {
        name: "de",
        about: "German",
        plain: ["^1234567890ß´", "qwertzuiopü+", "asdfghjklöä#", "<yxcvbnm,.-"],
        shift: ["°!\"§$%&/()=?`", "QWERTZUIOPÜ*", "ASDFGHJKLÖÄ'", ">YXCVBNM;:_"],
        alt_gr: ["  ²³   {[]}\\", "@ €        ~", "", "|      µ"],
    },
    Layout {
        name: "fr",
        about: "French",
        plain: ["²&é\"'(-è_çà)=", "azertyuiop^$", "qsdfghjklmù*", "<wxcvbn,;:!"],
        shift: [" 1234567890°+", "AZERTYUIOP¨£", "QSDFGHJKLM%µ", ">WXCVBN?./§"],
        alt_gr: ["  ~#{[|`\\^@]}", "  €        ¤", "", ""],
    },
    Layout {
        name: "es",
        about: "Spanish",
        plain: ["º1234567890'¡", "qwertyuiop`+", "asdfghjklñ´ç", "<zxcvbnm,.-"],
        shift: ["ª!\"·$%&/()=?¿", "QWERTYUIOP^*", "ASDFGHJKLÑ¨Ç", ">ZXCVBNM;:_"],
        alt_gr: ["\\|@#~ ¬", "  €       []", "          {}", ""],
    },
    Layout {
        name: "it",
        about: "Italian",
        plain: ["\\1234567890'ì", "qwertyuiopè+", "asdfghjklòàù", "<zxcvbnm,.-"],
        shift: ["|!\"£$%&/()=?^", "QWERTYUIOPé*", "ASDFGHJKLç°§", ">ZXCVBNM;:_"],
        alt_gr: ["           `~", "  €       []", "         @#", ""],
    },
    Layout {
        name: "pt",
        about: "Portuguese",
        plain: ["\\1234567890'«", "qwertyuiop+´", "asdfghjklçº~", "<zxcvbnm,.-"],
        shift: ["|!\"#$%&/()=?»", "QWERTYUIOP*`", "ASDFGHJKLÇª^", ">ZXCVBNM;:_"],
        alt_gr: ["  @£§  {[]}", "  €       ¨", "", ""],
    },
    Layout {
        name: "sv",
        about: "Swedish",
        plain: ["§1234567890+´", "qwertyuiopå¨", "asdfghjklöä'", "<zxcvbnm,.-"],
        shift: ["½!\"#¤%&/()=?`", "QWERTYUIOPÅ^", "ASDFGHJKLÖÄ*", ">ZXCVBNM;:_"],
        alt_gr: ["  @£$  {[]}\\", "  €        ~", "", "|"],
    },
    Layout {
        name: "da",
        about: "Danish",
        plain: ["½1234567890+´", "qwertyuiopå¨", "asdfghjklæø'", "<zxcvbnm,.-"],
        shift: ["§!\"#¤%&/()=?`", "QWERTYUIOPÅ^", "ASDFGHJKLÆØ*", ">ZXCVBNM;:_"],
        alt_gr: ["  @£$  {[]} |", "  €        ~", "", "\\"],
    },
    Layout {
        name: "no",
        about: "Norwegian",
        plain: ["|1234567890+\\", "qwertyuiopå¨", "asdfghjkløæ'", "<zxcvbnm,.-"],
        shift: ["§!\"#¤%&/()=?`", "QWERTYUIOPÅ^", "ASDFGHJKLØÆ*", ">ZXCVBNM;:_"],
        alt_gr: ["  @£$  {[]} ´", "  €        ~", "", ""],
    },
    Layout {
        name: "de-ch",
        about: "German (Switzerland)",
        plain: ["§1234567890'^", "qwertzuiopü¨", "asdfghjklöä$", "<yxcvbnm,.-"],
        shift: ["°+\"*ç%&/()=?`", "QWERTZUIOPè!", "ASDFGHJKLéà£", ">YXCVBNM;:_"],
        alt_gr: [" ¦@#  ¬|¢  ´~", "  €       []", "          {}", "\\"],
    },
];

/// A layout of the guest's keyboard.
#[derive(Clone, Copy)]
pub struct Keymap(&'static Layout);

impl Default for Keymap {
    fn default() -> Self {
        Self(&LAYOUTS[0])
    }
}

impl std::fmt::Debug for Keymap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.name)
    }
}

impl Keymap {
    /// The layout of that name (`en-us`, `de`).
    ///
    /// # Errors
    /// Says which there are.
    pub fn named(name: &str) -> Result<Self, String> {
        LAYOUTS.iter().find(|l| l.name == name).map(Self).ok_or_else(|| {
            let names: Vec<_> = LAYOUTS.iter().map(|l| l.name).collect();
            let near = nearest(name, names.iter().copied());
            let near = near.map(|n| format!(" did you mean '{n}'?")).unwrap_or_default();
            format!("unknown keyboard layout '{name}':{near} use one of {}", names.join(", "))
        })
    }

    /// Names and descriptions of all layouts.
    pub fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
        LAYOUTS.iter().map(|l| (l.name, l.about))
    }

    /// Key and modifiers for a character.
    pub fn find_char(&self, ch: char) -> Option<(Key, Level)> {
        match ch {
            ' ' => return Some((Key(57), Level::default())),
            '\n' | '\r' => return Some((Key(28), Level::default())),
            '\t' => return Some((Key(15), Level::default())),
            '\u{8}' => return Some((Key(14), Level::default())),
            '\u{1b}' => return Some((Key(1), Level::default())),
            _ => {}
        }
        let levels =
            [(&self.0.plain, false, false), (&self.0.shift, true, false), (&self.0.alt_gr, false, true)];
        levels.into_iter().find_map(|(rows, shift, alt_gr)| {
            rows.iter().zip(ROWS).find_map(|(row, keys)| {
                let at = row.chars().position(|c| c == ch && c != ' ')?;
                let letter = ch.is_alphabetic() && !alt_gr;
                Some((Key(*keys.get(at)?), Level { shift, alt_gr, letter }))
            })
        })
    }

    /// Key for an X keysym, and the modifiers that its character needs (none for keys that stand for no character).
    pub fn find(&self, sym: u32) -> Option<(Key, Option<Level>)> {
        if let Some(key) = keysym::fixed(sym) {
            return Some((key, None));
        }
        let (key, level) = self.find_char(keysym::character(sym)?)?;
        Some((key, Some(level)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_fit_their_keys() {
        for l in LAYOUTS {
            for (i, keys) in ROWS.iter().enumerate() {
                assert_eq!(l.plain[i].chars().count(), keys.len(), "{} row {i}", l.name);
                assert_eq!(l.shift[i].chars().count(), keys.len(), "{} row {i} with Shift", l.name);
                assert!(l.alt_gr[i].chars().count() <= keys.len(), "{} row {i} with AltGr", l.name);
            }
            let map = Keymap(l);
            for c in 'a'..='z' {
                let (key, level) = map.find_char(c).unwrap();
                assert_eq!(level, Level { letter: true, ..Level::default() }, "{} {c}", l.name);
                let upper = map.find_char(c.to_ascii_uppercase()).unwrap();
                assert_eq!(
                    upper,
                    (key, Level { shift: true, letter: true, alt_gr: false }),
                    "{} {c}",
                    l.name
                );
            }
            for c in '0'..='9' {
                assert!(map.find_char(c).is_some(), "{} {c}", l.name);
            }
        }
    }

    #[test]
    fn keysyms() {
        let us = Keymap::default();
        assert_eq!(us.find(b'!'.into()), Some((Key(2), Some(Level { shift: true, ..Level::default() }))));
        assert_eq!(us.find(0xff0d), Some((Key(28), None)));
        assert_eq!(us.find(0xdead_beef), None);
        let de = Keymap::named("de").unwrap();
        assert_eq!(de.find(b'@'.into()).unwrap().0, Key(16));
        assert_eq!(de.find(b'z'.into()).unwrap().0, Key(21));
        assert!(Keymap::named("en").unwrap_err().contains("use one of en-us"));
    }
}
