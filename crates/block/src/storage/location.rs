//! Names of storages: paths, `file:`, URLs, `json:`.

use crate::{Error, Result};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// What a storage name means.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Location {
    /// A host file or device.
    File(PathBuf),
    /// `null-co://`.
    Null {
        /// Size in bytes.
        size: u64,
        /// Whether reads clear the buffer.
        zeroes: bool,
    },
    /// An export of an NBD server.
    Nbd(crate::nbd::NbdAddress),
    /// A file on a web server.
    Http(super::HttpAddress),
    /// A protocol that exists elsewhere.
    Unsupported {
        /// The protocol's name.
        scheme: String,
        /// What to do instead.
        advice: &'static str,
    },
}

/// The `proto` of `proto:rest`, unless the colon belongs to a path (`./a:b`, `/a:b`).
pub(crate) fn scheme(name: &str) -> Option<&str> {
    let colon = name.find(':')?;
    let head = &name[..colon];
    (!head.is_empty() && !head.contains('/')).then_some(head)
}

impl Location {
    /// Reads a name as QEMU does.
    pub fn parse(name: &str) -> Result<Self> {
        let Some(scheme) = scheme(name) else { return Ok(Location::File(PathBuf::from(name))) };
        let rest = &name[scheme.len() + 1..];
        Ok(match scheme {
            "file" | "host_device" => Location::File(PathBuf::from(rest.strip_prefix("//").unwrap_or(rest))),
            "nbd" | "nbd+unix" | "nbd+tcp" | "nbds" | "nbds+tcp" | "nbds+unix" => {
                Location::Nbd(crate::nbd::NbdAddress::parse(name)?)
            }
            "null-co" | "null-aio" => Location::Null { size: 1 << 30, zeroes: false },
            "http" | "https" => Location::Http(super::HttpAddress::parse(name)?),
            "iscsi" | "iser" | "rbd" | "ssh" | "nfs" | "gluster" | "sheepdog" | "ftp" | "ftps" => {
                Location::Unsupported {
                    scheme: scheme.into(),
                    advice: "export the image over NBD (for example with qemu-nbd or nbdkit) and open it as nbd://host/export",
                }
            }
            _ => return Err(Error::usage(format!("Unknown protocol '{scheme}'"))),
        })
    }

    /// Builds a location from `driver` and its options (`filename`, `size`, ...), taking out what it uses.
    /// `secrets` and `credentials` are what options may name.
    pub fn from_options(
        options: &mut BTreeMap<String, String>,
        secrets: &BTreeMap<String, Vec<u8>>,
        credentials: &BTreeMap<String, crate::nbd::TlsCredentials>,
    ) -> Result<Self> {
        let driver = options.remove("driver");
        let driver = match (driver, options.get("filename").or(options.get("url"))) {
            // A name with a protocol says the driver, whose further options may stand beside it.
            (None, Some(name)) if name.starts_with("http://") => Some("http".to_owned()),
            (None, Some(name)) if name.starts_with("https://") => Some("https".to_owned()),
            (driver, _) => driver,
        };
        match driver.as_deref() {
            Some("null-co" | "null-aio") => {
                let size = match options.remove("size") {
                    Some(s) => s.parse().map_err(|_| Error::usage(format!("Invalid size '{s}'")))?,
                    None => 1 << 30,
                };
                let zeroes = options.remove("read-zeroes").is_some_and(|v| v == "on" || v == "true");
                Ok(Location::Null { size, zeroes })
            }
            Some("http" | "https") => Ok(Location::Http(super::HttpAddress::from_options(options, secrets)?)),
            Some("nbd") => Ok(Location::Nbd(crate::nbd::NbdAddress::from_options(options, credentials)?)),
            None | Some("file" | "host_device") => match options.remove("filename") {
                Some(name) if driver.is_some() => Ok(Location::File(PathBuf::from(name))),
                Some(name) => Location::parse(&name),
                None => Err(Error::usage("The 'file' block driver requires a file name")),
            },
            Some(other) => Location::parse(&format!("{other}:")),
        }
    }
}

/// Joins a name found in an image (`name`) with the name of that image (`base`), as QEMU does for backing files: absolute
/// names and names with a protocol stand for themselves.
pub fn join_name(base: &str, name: &str) -> String {
    if scheme(name).is_some() || name.starts_with('/') {
        return name.to_owned();
    }
    let prefix = scheme(base).map_or(0, |s| s.len() + 1);
    match base[prefix..].rfind('/') {
        Some(slash) => format!("{}{name}", &base[..prefix + slash + 1]),
        None => format!("{}{name}", &base[..prefix]),
    }
}

/// An absolute path for `name`, if it is a plain relative one.
pub fn absolute_name(name: &str) -> String {
    if scheme(name).is_some() {
        return name.to_owned();
    }
    std::path::absolute(Path::new(name)).map_or_else(|_| name.to_owned(), |p| p.display().to_string())
}

/// Takes a `json:{...}` name apart into dotted keys (`file.filename`).
pub fn parse_json_name(name: &str) -> Option<Result<BTreeMap<String, String>>> {
    let text = name.strip_prefix("json:")?;
    let parsed: Result<serde_json::Value, _> = serde_json::from_str(text);
    Some(match parsed {
        Ok(serde_json::Value::Object(map)) => {
            let mut out = BTreeMap::new();
            flatten("", &serde_json::Value::Object(map), &mut out);
            Ok(out)
        }
        Ok(_) => Err(Error::usage("Invalid JSON object given")),
        Err(e) => Err(Error::usage(format!("Could not parse the JSON options: {e}"))),
    })
}

fn flatten(prefix: &str, value: &serde_json::Value, out: &mut BTreeMap<String, String>) {
    use serde_json::Value;
    let key = |k: &str| if prefix.is_empty() { k.to_owned() } else { format!("{prefix}.{k}") };
    match value {
        Value::Object(map) => map.iter().for_each(|(k, v)| flatten(&key(k), v, out)),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(i, v)| flatten(&key(&i.to_string()), v, out))
        }
        Value::String(s) => drop(out.insert(prefix.to_owned(), s.clone())),
        Value::Bool(b) => drop(out.insert(prefix.to_owned(), if *b { "on" } else { "off" }.to_owned())),
        Value::Number(n) => drop(out.insert(prefix.to_owned(), n.to_string())),
        Value::Null => drop(out.insert(prefix.to_owned(), String::new())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(Location::parse("a/b:c").unwrap(), Location::File("a/b:c".into()));
        assert_eq!(Location::parse("file:x y").unwrap(), Location::File("x y".into()));
        assert!(Location::parse("what:ever").is_err());
        assert!(matches!(Location::parse("rbd:pool/x").unwrap(), Location::Unsupported { .. }));
    }

    #[test]
    fn backing_names_are_relative_to_the_image() {
        assert_eq!(join_name("dir/top.qcow2", "base.raw"), "dir/base.raw");
        assert_eq!(join_name("top", "base"), "base");
        assert_eq!(join_name("/d/top", "/abs"), "/abs");
        assert_eq!(join_name("/d/top", "nbd://h/x"), "nbd://h/x");
        assert_eq!(join_name("file:/d/top", "b"), "file:/d/b");
    }

    #[test]
    fn json_names_flatten() {
        let m = parse_json_name(
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"x"},"a":[true,3]}"#,
        )
        .unwrap()
        .unwrap();
        assert_eq!(m["file.filename"], "x");
        assert_eq!(m["a.0"], "on");
        assert_eq!(m["a.1"], "3");
        assert!(parse_json_name("json:[").unwrap().is_err());
        assert!(parse_json_name("x.json").is_none());
    }
}
