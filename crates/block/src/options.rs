//! `key=value` options as image tools take them, and sizes with suffixes.

use crate::{Error, Result};
use std::collections::BTreeMap;

/// Options by name. Typed getters take an option out, so that what is left at the end is unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options(BTreeMap<String, String>);

/// What an option's value looks like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OptionKind {
    /// Bytes, with an optional suffix.
    Size,
    /// `on` or `off`.
    Bool,
    /// A plain number.
    Number,
    /// Text.
    Text,
}

/// A creation (or amendment) option a format takes.
#[derive(Clone, Copy, Debug)]
pub struct OptionSpec {
    /// Its name.
    pub name: &'static str,
    /// Its kind.
    pub kind: OptionKind,
    /// One line saying what it does.
    pub help: &'static str,
    /// Value shown as the default, if there is one.
    pub default: Option<&'static str>,
}

impl Options {
    /// No options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Parses `a=b,c=d`; a comma in a value is doubled, and a bare `a` means `a=on`.
    pub fn parse(text: &str) -> Result<Self> {
        let mut options = Self::new();
        options.extend_parsed(text)?;
        Ok(options)
    }

    /// Parses more options on top of these.
    pub fn extend_parsed(&mut self, text: &str) -> Result<()> {
        let mut rest = text;
        while !rest.is_empty() {
            let mut part = String::new();
            loop {
                match rest.find(',') {
                    Some(at) if rest[at + 1..].starts_with(',') => {
                        part.push_str(&rest[..=at]);
                        rest = &rest[at + 2..];
                    }
                    Some(at) => {
                        part.push_str(&rest[..at]);
                        rest = &rest[at + 1..];
                        break;
                    }
                    None => {
                        part.push_str(rest);
                        rest = "";
                        break;
                    }
                }
            }
            match part.split_once('=') {
                Some((key, value)) => self.set(key, value),
                None if part.is_empty() => {}
                None => self.set(&part, "on"),
            }
        }
        Ok(())
    }

    /// Sets an option.
    pub fn set(&mut self, key: &str, value: impl Into<String>) {
        self.0.insert(key.to_owned(), value.into());
    }

    /// Looks at an option.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Takes an option out.
    pub fn take(&mut self, key: &str) -> Option<String> {
        self.0.remove(key)
    }

    /// Takes a boolean out.
    pub fn take_bool(&mut self, key: &str) -> Result<Option<bool>> {
        self.take(key)
            .map(|v| match v.as_str() {
                "on" | "yes" | "true" | "y" => Ok(true),
                "off" | "no" | "false" | "n" => Ok(false),
                _ => Err(Error::usage(format!("Parameter '{key}' expects 'on' or 'off'"))),
            })
            .transpose()
    }

    /// Takes a size in bytes out.
    pub fn take_size(&mut self, key: &str) -> Result<Option<u64>> {
        self.take(key)
            .map(|v| {
                parse_size(&v).ok_or_else(|| {
                    Error::usage(format!(
                        "Parameter '{key}' expects a non-negative number below 2^64\n\
                         Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                         and exabytes, respectively."
                    ))
                })
            })
            .transpose()
    }

    /// Takes a number out.
    pub fn take_number(&mut self, key: &str) -> Result<Option<u64>> {
        self.take(key)
            .map(|v| {
                let parsed = match v.strip_prefix("0x") {
                    Some(hex) => u64::from_str_radix(hex, 16),
                    None => v.parse(),
                };
                parsed.map_err(|_| Error::usage(format!("Parameter '{key}' expects a number")))
            })
            .transpose()
    }

    /// All options whose names begin with `prefix`, moved out with the prefix removed.
    pub fn take_prefixed(&mut self, prefix: &str) -> Options {
        let keys: Vec<String> = self.0.keys().filter(|k| k.starts_with(prefix)).cloned().collect();
        let mut out = Options::new();
        for key in keys {
            if let Some(value) = self.0.remove(&key) {
                out.set(&key[prefix.len()..], value);
            }
        }
        out
    }

    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// Whether none are left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The map itself.
    pub fn into_map(self) -> BTreeMap<String, String> {
        self.0
    }

    /// Refuses what nobody took.
    pub fn finish(self, whose: &str) -> Result<()> {
        match self.0.keys().next() {
            Some(key) => Err(Error::usage(format!("Invalid parameter '{key}' for {whose}"))),
            None => Ok(()),
        }
    }
}

impl From<BTreeMap<String, String>> for Options {
    fn from(map: BTreeMap<String, String>) -> Self {
        Options(map)
    }
}

/// A size in bytes: a number (decimal or 0x hexadecimal) with an optional suffix `bBkKmMgGtTpPeE`; a fraction
/// is allowed before a suffix. `None` if it is anything else, negative, or 2^64 and more.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim_start();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).ok();
    }
    let (number, shift) = match text.chars().last()? {
        'b' | 'B' => (&text[..text.len() - 1], 0),
        'k' | 'K' => (&text[..text.len() - 1], 10),
        'm' | 'M' => (&text[..text.len() - 1], 20),
        'g' | 'G' => (&text[..text.len() - 1], 30),
        't' | 'T' => (&text[..text.len() - 1], 40),
        'p' | 'P' => (&text[..text.len() - 1], 50),
        'e' | 'E' => (&text[..text.len() - 1], 60),
        _ => (text, 0),
    };
    if let Some((whole, fraction)) = number.split_once('.') {
        if shift == 0 && fraction.bytes().any(|b| b != b'0')
            || !number.bytes().all(|b| b.is_ascii_digit() || b == b'.')
        {
            return None;
        }
        let whole: u64 = whole.parse().ok()?;
        let part = format!("0.{fraction}").parse::<f64>().ok()? * (1u64 << shift) as f64;
        return whole.checked_mul(1 << shift)?.checked_add(part.round() as u64);
    }
    if !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, value) in [
            ("0", 0),
            ("512", 512),
            ("1k", 1024),
            ("1.5G", 3 << 29),
            ("0x10", 16),
            ("2T", 2 << 40),
            ("7b", 7),
        ] {
            assert_eq!(parse_size(text), Some(value), "{text}");
        }
        for bad in ["", "k", "-1", "1x", "1.5", "16E", "99999999999999999999", "1 k", "0x"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }

    #[test]
    fn options_split_and_are_consumed() {
        let mut o = Options::parse("a=1,b=x,,y,c,d.e=f,d.g=").unwrap();
        assert_eq!(o.take_number("a").unwrap(), Some(1));
        assert_eq!(o.take("b").unwrap(), "x,y");
        assert_eq!(o.take_bool("c").unwrap(), Some(true));
        assert!(o.clone().finish("x").is_err());
        let d = o.take_prefixed("d.");
        assert_eq!((d.get("e"), d.get("g")), (Some("f"), Some("")));
        o.finish("x").unwrap();
    }
}
