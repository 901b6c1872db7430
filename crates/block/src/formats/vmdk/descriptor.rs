//! The descriptor of a VMDK: lines of text that name the extents ("Virtual Disk Format" 5.0, chapter 2).

use crate::{Error, Result};

/// Longest descriptor that is read, in bytes.
pub(super) const MAX_DESCRIPTOR: usize = 1 << 20;
/// The parent's CID in an image without a parent.
pub(super) const NO_PARENT: u32 = u32::MAX;

/// What an extent line says about where the bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// As they are, from this sector of the file on.
    Flat { sector: u64 },
    /// In a file with grain tables.
    Sparse,
    /// Nowhere: zeros.
    Zero,
}

/// A line of the extent description.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct ExtentLine {
    pub(super) writable: bool,
    pub(super) sectors: u64,
    pub(super) kind: Kind,
    /// The word for the kind, as written.
    pub(super) word: String,
    pub(super) file: String,
}

/// A descriptor, parsed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Descriptor {
    pub(super) cid: u32,
    pub(super) parent_cid: u32,
    pub(super) create_type: String,
    pub(super) parent_hint: Option<String>,
    pub(super) extents: Vec<ExtentLine>,
}

/// Whether text begins like a descriptor: comments and empty lines, then a version that is known.
pub(super) fn looks_like_descriptor(head: &[u8]) -> bool {
    if !head.starts_with(b"#") {
        return false;
    }
    for line in head.split(|&b| b == b'\n') {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        return matches!(line, b"version=1" | b"version=2" | b"version=3");
    }
    false
}

impl Descriptor {
    /// Parses a descriptor's text; what follows a zero byte is padding.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let text = text.split('\0').next().unwrap_or_default();
        let mut parsed = Descriptor {
            cid: 0,
            parent_cid: NO_PARENT,
            create_type: String::new(),
            parent_hint: None,
            extents: Vec::new(),
        };
        let number = |key: &str, value: &str| {
            u32::from_str_radix(value, 16)
                .map_err(|_| Error::invalid(format!("Invalid VMDK descriptor: {key}={value}")))
        };
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some((key, value)) = line.split_once('=').map(|(k, v)| (k.trim(), v.trim())) {
                let plain = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value);
                match key {
                    "CID" => parsed.cid = number(key, value)?,
                    "parentCID" => parsed.parent_cid = number(key, value)?,
                    "createType" => parsed.create_type = plain.to_owned(),
                    "parentFileNameHint" if !plain.is_empty() => parsed.parent_hint = Some(plain.to_owned()),
                    _ if !is_access(key) => {}
                    _ => parsed.extents.extend(extent_line(line)?),
                }
            } else {
                parsed.extents.extend(extent_line(line)?);
            }
        }
        Ok(parsed)
    }
}

/// Whether a line begins like an extent's although a file name in it holds a `=`.
fn is_access(key: &str) -> bool {
    ["RW ", "RDONLY ", "NOACCESS "].iter().any(|a| key.starts_with(a))
}

/// An extent line; `None` if it is none at all.
fn extent_line(line: &str) -> Result<Option<ExtentLine>> {
    let bad = || Error::invalid(format!("Invalid extent line: {line}"));
    let mut words = line.splitn(4, ' ');
    let access = words.next().unwrap_or_default();
    let writable = match access {
        "RW" => true,
        "RDONLY" => false,
        "NOACCESS" => {
            return Err(Error::unsupported(format!("VMDK extents without access are not supported: {line}")));
        }
        _ => return Ok(None),
    };
    let sectors: u64 = words.next().and_then(|w| w.parse().ok()).filter(|&s| s > 0).ok_or_else(bad)?;
    let word = words.next().ok_or_else(bad)?.to_owned();
    let rest = words.next().unwrap_or_default().trim();
    let (file, after) = match rest.strip_prefix('"') {
        Some(quoted) => quoted.rsplit_once('"').ok_or_else(bad)?,
        None => ("", rest),
    };
    let kind = match word.as_str() {
        "ZERO" => Kind::Zero,
        "FLAT" | "VMFS" => {
            Kind::Flat { sector: if after.is_empty() { 0 } else { after.trim().parse().map_err(|_| bad())? } }
        }
        "SPARSE" | "VMFSSPARSE" => Kind::Sparse,
        _ => {
            return Err(Error::unsupported(format!("Unsupported extent type '{word}' in a VMDK descriptor")));
        }
    };
    if kind != Kind::Zero && file.is_empty() {
        return Err(bad());
    }
    Ok(Some(ExtentLine { writable, sectors, kind, word, file: file.to_owned() }))
}

/// Puts another CID into a descriptor's text; `None` if there is none to replace.
pub(super) fn replace_cid(text: &str, cid: u32) -> Option<String> {
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        if line.starts_with("CID=") {
            let end = at + line.trim_end_matches(['\n', '\r', '\0']).len();
            return Some(format!("{}CID={cid:08x}{}", &text[..at], &text[end..]));
        }
        at += line.len();
    }
    None
}

/// What a new descriptor says.
pub(super) struct NewDescriptor<'a> {
    pub(super) cid: u32,
    pub(super) parent: Option<(u32, &'a str)>,
    pub(super) create_type: &'a str,
    /// Extent lines.
    pub(super) extents: &'a str,
    pub(super) hardware_version: &'a str,
    pub(super) tools_version: &'a str,
    pub(super) adapter: &'a str,
    pub(super) sectors: u64,
}

impl NewDescriptor<'_> {
    pub(super) fn text(&self) -> String {
        let heads = if self.adapter == "ide" { 16 } else { 255 };
        let cylinders = self.sectors / (63 * heads);
        let (parent, hint) = match self.parent {
            Some((cid, name)) => (cid, format!("parentFileNameHint=\"{name}\"\n")),
            None => (NO_PARENT, String::new()),
        };
        format!(
            "# Disk DescriptorFile\nversion=1\nCID={:08x}\nparentCID={parent:08x}\ncreateType=\"{}\"\n{hint}\n\
             # Extent description\n{}\n\
             # The Disk Data Base\n#DDB\n\n\
             ddb.virtualHWVersion = \"{}\"\nddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"{heads}\"\n\
             ddb.geometry.sectors = \"63\"\nddb.adapterType = \"{}\"\nddb.toolsVersion = \"{}\"\n",
            self.cid, self.create_type, self.extents, self.hardware_version, self.adapter, self.tools_version
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> String {
        NewDescriptor {
            cid: 0x1234,
            parent: Some((7, "base.vmdk")),
            create_type: "twoGbMaxExtentSparse",
            extents: "RW 100 SPARSE \"a=b-s001.vmdk\"\nRDONLY 8 FLAT \"f \"x\".vmdk\" 12\nRW 5 ZERO\n",
            hardware_version: "4",
            tools_version: "2147483647",
            adapter: "ide",
            sectors: 1 << 20,
        }
        .text()
    }

    #[test]
    fn text_parses_back() {
        let d = Descriptor::parse(&(sample() + "\0\0junk")).unwrap();
        assert_eq!((d.cid, d.parent_cid, d.parent_hint.as_deref()), (0x1234, 7, Some("base.vmdk")));
        assert_eq!(d.extents.len(), 3);
        assert_eq!(d.extents[0].file, "a=b-s001.vmdk");
        assert_eq!(d.extents[1].kind, Kind::Flat { sector: 12 });
        assert_eq!(d.extents[1].file, "f \"x\".vmdk");
        assert!(!d.extents[1].writable);
        assert_eq!(d.extents[2].kind, Kind::Zero);
        let changed = replace_cid(&sample(), 0xabcd_ef01).unwrap();
        assert_eq!(changed.len(), sample().len());
        assert_eq!(Descriptor::parse(&changed).unwrap().cid, 0xabcd_ef01);
        assert!(looks_like_descriptor(sample().as_bytes()));
        assert!(!looks_like_descriptor(b"# comment\nnothing=1\n"));
    }

    #[test]
    fn broken_lines_are_refused() {
        for line in [
            "RW x FLAT \"a\" 0",
            "RW 0 ZERO",
            "RW 5 FLAT",
            "RW 5 FLAT \"a\" z",
            "NOACCESS 5 FLAT \"a\" 0",
            "RW 5 ODD \"a\"",
            "RW 5",
            "CID=zz",
        ] {
            assert!(Descriptor::parse(line).is_err(), "{line}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_fails(text in "\\PC{0,200}", line in "RW [0-9]{1,30} [A-Z]{1,8} \"?[a-z\"]{0,5}\"? ?[0-9]{0,25}") {
            let _ = Descriptor::parse(&text);
            let _ = Descriptor::parse(&line);
            let _ = looks_like_descriptor(text.as_bytes());
            let _ = replace_cid(&text, 1);
        }
    }
}
