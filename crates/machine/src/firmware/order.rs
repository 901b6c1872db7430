//! What firmware boots, in which order.

use crate::{Error, Result};
use schemars::JsonSchema;
use serde::Deserialize;

/// `--boot order=,once=,menu=,...`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct BootSpec {
    /// Kinds of device to boot from, in this order: a and b floppy, c disk, d CD-ROM, n network.
    pub order: Option<String>,
    /// As order, for the first boot only.
    pub once: Option<String>,
    /// Let the user choose.
    pub menu: bool,
    /// Milliseconds that the menu waits.
    #[serde(alias = "splash_time")]
    pub splash_time: Option<u16>,
    /// Milliseconds after which a machine that found nothing to boot restarts; -1 for never.
    #[serde(alias = "reboot_timeout")]
    pub reboot_timeout: Option<i32>,
    /// Boot from nothing that is not in the order.
    pub strict: bool,
}

/// Something that firmware can boot from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bootable {
    /// `bootindex=`: lower comes first, and before what has none.
    pub index: Option<u32>,
    /// What it is.
    pub class: devices::BootClass,
    /// Open Firmware device path.
    pub path: String,
}

/// Codes in the real-time clock's memory.
fn cmos_code(letter: char) -> u8 {
    match letter {
        'a' | 'b' => 1,
        'c' => 2,
        'd' => 3,
        _ => 4,
    }
}

impl BootSpec {
    /// Checks the letters.
    ///
    /// # Errors
    /// A letter that is none of them, or is there twice.
    pub fn check(&self) -> Result<()> {
        for order in [&self.order, &self.once].into_iter().flatten() {
            for (i, letter) in order.char_indices() {
                if !"abcdn".contains(letter) {
                    return Err(Error::Config(format!(
                        "boot order '{order}': there is no device kind '{letter}'; use a, b (floppy), c (disk), d (CD-ROM), n (network)"
                    )));
                }
                if order[..i].contains(letter) {
                    return Err(Error::Config(format!("boot order '{order}': '{letter}' is there twice")));
                }
            }
        }
        Ok(())
    }

    /// The order of the present boot: the first, or a later one.
    pub(crate) fn letters(&self, first: bool) -> &str {
        let once = self.once.as_deref().filter(|_| first);
        once.or(self.order.as_deref()).unwrap_or("cad")
    }

    /// Bytes 0x3d and 0x38 of the real-time clock's memory.
    pub(crate) fn cmos(&self, first: bool) -> (u8, u8) {
        let mut codes = self.letters(first).chars().map(cmos_code).chain([0; 3]);
        let mut next = || codes.next().unwrap_or(0);
        let (one, two, three) = (next(), next(), next());
        (two << 4 | one, three << 4 | 1) // bit 0: no check of the floppy's signature
    }
}

/// The file `bootorder`: paths, most wanted first. Devices with an index come first; without any, an order given by
/// letters sorts them by kind.
pub(crate) fn boot_order(spec: &BootSpec, all: &[Bootable], first: bool) -> Vec<u8> {
    let explicit = spec.order.is_some() || (first && spec.once.is_some());
    let letters = spec.letters(first);
    let rank = |b: &Bootable| -> Option<(u32, u32)> {
        let kind = letters.chars().position(|c| b.class.letters().contains(c)).map(|n| n as u32);
        match (b.index, explicit) {
            (Some(index), false) => Some((0, index)),
            (Some(index), true) => Some((kind.map_or(u32::MAX, |k| k + 1), index)),
            (None, true) => kind.map(|k| (k + 1, u32::MAX)),
            (None, false) => None,
        }
    };
    let mut ranked: Vec<_> = all.iter().filter_map(|b| rank(b).map(|r| (r, b))).collect();
    ranked.sort_by_key(|(r, _)| *r);
    let mut lines: Vec<&str> = ranked.iter().map(|(_, b)| b.path.as_str()).collect();
    if spec.strict {
        lines.push("HALT");
    }
    if lines.is_empty() {
        return Vec::new();
    }
    let mut text = lines.join("\n").into_bytes();
    text.push(0);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::BootClass;

    fn bootable(index: Option<u32>, class: BootClass, path: &str) -> Bootable {
        Bootable { index, class, path: path.into() }
    }

    #[test]
    fn orders() {
        let all = [
            bootable(None, BootClass::Disk, "disk0"),
            bootable(None, BootClass::Cdrom, "cd"),
            bootable(None, BootClass::Disk, "disk1"),
            bootable(None, BootClass::Network, "net"),
        ];
        let text = |spec: &BootSpec, all: &[Bootable], first| {
            String::from_utf8(boot_order(spec, all, first)).unwrap().trim_end_matches('\0').replace('\n', " ")
        };
        assert_eq!(text(&BootSpec::default(), &all, true), "");
        let spec = BootSpec { order: Some("dc".into()), once: Some("n".into()), ..BootSpec::default() };
        spec.check().unwrap();
        assert_eq!(text(&spec, &all, true), "net");
        assert_eq!(text(&spec, &all, false), "cd disk0 disk1");
        assert_eq!((spec.cmos(true), spec.cmos(false)), ((0x04, 1), (0x23, 1)));
        let mut indexed = all.clone();
        indexed[2].index = Some(1);
        indexed[3].index = Some(0);
        let strict = BootSpec { strict: true, ..BootSpec::default() };
        assert_eq!(text(&strict, &indexed, true), "net disk1 HALT");
        assert_eq!(text(&spec, &indexed, false), "cd disk1 disk0 net");
        for odd in ["x", "cc", "C"] {
            assert!(BootSpec { order: Some(odd.into()), ..BootSpec::default() }.check().is_err());
        }
    }
}
