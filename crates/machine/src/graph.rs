//! Block nodes as QEMU's users describe them (`-blockdev`, `blockdev-add`): formats over storage, by name. An image of
//! the blueprint is a format node together with the storage node below it.

use base::props::Bag;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

type Props = Map<String, Value>;
type Result<T> = std::result::Result<T, String>;

/// Nodes by name.
#[derive(Clone, Debug, Default)]
pub struct Graph(BTreeMap<String, Bag>);

/// Drivers that are storage, not formats.
const PROTOCOLS: &[&str] = &["file", "host_device", "nbd", "null-co", "null-aio"];

impl Graph {
    /// Takes a node in.
    ///
    /// # Errors
    /// No name, or one that is taken.
    pub fn add(&mut self, bag: &Bag) -> Result<()> {
        let name = bag.props.get("node-name").map(text);
        let name = name.ok_or_else(|| String::from("'node-name' must be specified for the root node"))?;
        base::props::check_id(&name).map_err(|e| e.to_string())?;
        if self.0.insert(name.clone(), bag.clone()).is_some() {
            return Err(format!("Duplicate nodes with node-name='{name}'"));
        }
        Ok(())
    }

    /// Makes images of the nodes that no other node is built on.
    ///
    /// # Errors
    /// The first node that makes no sense.
    pub fn images(&self) -> Result<Vec<Bag>> {
        let used: Vec<String> = self
            .0
            .values()
            .flat_map(|b| {
                ["file", "backing"].iter().filter_map(|k| b.props.get(*k)).filter_map(Value::as_str)
            })
            .map(String::from)
            .collect();
        let top = self.0.iter().filter(|(name, _)| !used.contains(name));
        top.map(|(name, bag)| self.image(name, bag).map_err(|e| format!("{name}: {e}"))).collect()
    }

    /// One image, from its format node and the storage node below it.
    ///
    /// # Errors
    /// What is wrong with the node.
    pub fn image(&self, name: &str, bag: &Bag) -> Result<Bag> {
        let mut p = bag.props.clone();
        p.remove("node-name");
        let (format, storage) = if PROTOCOLS.contains(&bag.driver.as_str()) {
            ("raw".to_owned(), bag.clone())
        } else {
            (bag.driver.clone(), self.storage(&mut p)?)
        };
        let mut out = Bag::new("blockdev").with("file", location(&storage)?).with("format", format);
        out.id = Some(name.into());
        let read_only = take_switch(&mut p, "read-only")?;
        let below = storage.props.get("read-only").is_some_and(|v| text(v) == "on");
        if read_only.unwrap_or(below) {
            out = out.with("read-only", true);
        }
        let unmap = take(&mut p, "discard").or_else(|| storage.props.get("discard").map(text));
        discard(&mut out, unmap)?;
        if let Some(detect) = take(&mut p, "detect-zeroes") {
            out = out.with("detect-zeroes", detect);
        }
        let dotted = ["cache.direct", "cache.no-flush"];
        let own: Props = dotted.iter().filter_map(|k| Some(((*k).to_owned(), p.remove(*k)?))).collect();
        let below = || cache(storage.props.get("cache").cloned(), &storage.props);
        if let Some(cache) = cache(p.remove("cache"), &own).or_else(below) {
            out = out.with("cache", cache);
        }
        // A backing chain is the image's own; null cuts it, which an image without one does not notice.
        match p.remove("backing") {
            None | Some(Value::Null) | Some(Value::String(_)) => {}
            Some(_) => return Err(String::from("backing= must name a node or be null")),
        }
        if PROTOCOLS.contains(&bag.driver.as_str()) {
            return Ok(out);
        }
        let mut more = Vec::new();
        for (key, value) in &p {
            if ["auto-read-only", "force-share"].contains(&key.as_str()) {
                continue;
            }
            more.push(format!("{key}={}", text(value).replace(',', ",,")));
        }
        if p.get("force-share").is_some_and(|v| text(v) == "on") {
            out = out.with("force-share", true);
        }
        if !more.is_empty() {
            out = out.with("options", more.join(","));
        }
        Ok(out)
    }

    /// The storage node under a format node: named, nested (JSON), or dotted (`file.filename=`).
    fn storage(&self, p: &mut Props) -> Result<Bag> {
        match p.remove("file") {
            Some(Value::String(name)) => self
                .0
                .get(&name)
                .cloned()
                .ok_or_else(|| format!("Cannot find device='' nor node-name='{name}'")),
            Some(Value::Object(mut inner)) => {
                let driver = take(&mut inner, "driver").unwrap_or_else(|| "file".into());
                Ok(Bag { driver, id: None, props: inner })
            }
            Some(_) => Err(String::from("file= must name a node or be an object")),
            None => {
                let keys: Vec<String> = p.keys().filter(|k| k.starts_with("file.")).cloned().collect();
                let mut inner = Props::new();
                for key in keys {
                    if let Some(value) = p.remove(&key) {
                        inner.insert(key["file.".len()..].to_owned(), value);
                    }
                }
                if inner.is_empty() {
                    return Err(String::from("A block device must be specified for \"file\""));
                }
                let driver = take(&mut inner, "driver").unwrap_or_else(|| "file".into());
                Ok(Bag { driver, id: None, props: inner })
            }
        }
    }
}

/// Name of a storage node's file or server.
fn location(storage: &Bag) -> Result<String> {
    match storage.driver.as_str() {
        "file" | "host_device" => {
            let name = storage.props.get("filename").map(text);
            name.filter(|n| !n.is_empty()).ok_or_else(|| String::from("A block device must have a filename"))
        }
        "nbd" => {
            let get = |key: &str| {
                let nested = storage.props.get("server").and_then(|s| s.get(key)).map(text);
                nested.or_else(|| storage.props.get(&format!("server.{key}")).map(text))
            };
            let export = storage.props.get("export").map(text).unwrap_or_default();
            match (get("path"), get("host"), get("port")) {
                (Some(path), ..) => Ok(format!("nbd+unix:///{export}?socket={path}")),
                (_, Some(host), port) => {
                    Ok(format!("nbd://{host}:{}/{export}", port.unwrap_or_else(|| "10809".into())))
                }
                _ => Err(String::from("nbd: server.path or server.host must be given")),
            }
        }
        "null-co" | "null-aio" => Ok(format!("{}://", storage.driver)),
        other => Err(format!("driver '{other}' is not supported for storage: use file, host_device or nbd")),
    }
}

/// The cache mode that `cache.direct` and `cache.no-flush` mean.
fn cache(value: Option<Value>, props: &Props) -> Option<&'static str> {
    let flag = |key: &str| {
        let nested = value.as_ref().and_then(|v| v.get(key)).map(text);
        nested.or_else(|| props.get(&format!("cache.{key}")).map(text)).is_some_and(|v| v == "on")
    };
    match (flag("direct"), flag("no-flush")) {
        (true, false) => Some("none"),
        (false, true) => Some("unsafe"),
        (true, true) => Some("unsafe"),
        (false, false) => None,
    }
}

impl Graph {
    /// Whether there is a node of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Forgets a node. Returns whether it was storage; `None` if there is none.
    pub fn remove(&mut self, name: &str) -> Option<bool> {
        self.0.remove(name).map(|bag| is_storage(&bag.driver))
    }

    /// The node that is built on `name`.
    pub fn user_of(&self, name: &str) -> Option<&str> {
        let uses = |b: &Bag| {
            ["file", "backing"].iter().any(|k| b.props.get(*k).and_then(Value::as_str) == Some(name))
        };
        self.0.iter().find(|(_, b)| uses(b)).map(|(n, _)| n.as_str())
    }
}

/// Whether a driver is storage, not a format.
pub fn is_storage(driver: &str) -> bool {
    PROTOCOLS.contains(&driver)
}

fn text(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Bool(true) => "on".into(),
        Value::Bool(false) => "off".into(),
        other => other.to_string(),
    }
}

fn take(props: &mut Props, key: &str) -> Option<String> {
    props.remove(key).map(|v| text(&v))
}

fn take_switch(props: &mut Props, key: &str) -> Result<Option<bool>> {
    match take(props, key).as_deref() {
        None => Ok(None),
        Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
        Some("off" | "no" | "false" | "n") => Ok(Some(false)),
        Some(other) => Err(format!("Parameter '{key}' expects 'on' or 'off', not '{other}'")),
    }
}

fn discard(bag: &mut Bag, value: Option<String>) -> Result<()> {
    let on = match value.as_deref() {
        None | Some("unmap" | "on") => true,
        Some("ignore" | "off") => false,
        Some(other) => return Err(format!("discard: '{other}' is unknown: use unmap or ignore")),
    };
    bag.props.insert("discard".into(), on.into());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(all: &[&str]) -> Result<Vec<Bag>> {
        let mut nodes = Graph::default();
        for text in all {
            nodes.add(&Bag::parse(text, "driver").unwrap())?;
        }
        nodes.images()
    }

    #[test]
    fn format_over_storage_is_one_image() {
        let all = nodes(&[
            r#"{"driver":"file","filename":"a.qcow2","node-name":"s","auto-read-only":true,"discard":"unmap"}"#,
            r#"{"node-name":"f","read-only":false,"driver":"qcow2","file":"s","backing":null}"#,
        ])
        .unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].id.as_deref(), Some("f"));
        assert_eq!(
            (text(&all[0].props["file"]), text(&all[0].props["format"])),
            ("a.qcow2".into(), "qcow2".into())
        );
        let all =
            nodes(&["raw,node-name=n,file.driver=file,file.filename=b.img,read-only=on,cache.direct=on"])
                .unwrap();
        assert_eq!(all[0].props["read-only"], true);
        assert_eq!(all[0].props["cache"], "none");
        let all = nodes(&["file,node-name=p,filename=c.img"]).unwrap();
        assert_eq!(all[0].props["format"], "raw");
    }

    #[test]
    fn mistakes_in_nodes() {
        for (all, word) in [
            (vec!["qcow2,file=x"], "node-name"),
            (vec!["qcow2,node-name=a,file=x"], "node-name='x'"),
            (vec!["file,node-name=a,filename=x", "file,node-name=a,filename=y"], "Duplicate"),
            (vec!["qcow2,node-name=a"], "must be specified"),
            (vec!["ssh,node-name=a"], "must be specified"),
            (vec!["raw,node-name=a,file.driver=rbd,file.x=y"], "not supported"),
        ] {
            let e = nodes(&all).unwrap_err();
            assert!(e.contains(word), "{e}");
        }
    }
}
