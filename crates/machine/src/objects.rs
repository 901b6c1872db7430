//! Objects (`--object KIND,id=ID,...`): what devices and the machine refer to by id.

use crate::{Error, Machine, Result};
use base::nearest;
use base::props::{Bag, Properties, SIZE_FORMAT};
use schemars::JsonSchema;
use serde::Deserialize;
use std::path::PathBuf;

/// A kind of object.
pub struct ObjectKind {
    /// QEMU's name.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// Properties, from the `Spec`.
    pub properties: fn() -> Properties,
    check: fn(&Bag) -> Result<()>,
}

/// All kinds.
pub const KINDS: &[ObjectKind] = &[
    ObjectKind {
        name: "iothread",
        about: "Thread for disks (each disk has its own already)",
        properties: Properties::of::<IoThread>,
        check: |bag| bag.spec::<IoThread>().map(drop).map_err(Error::from),
    },
    ObjectKind {
        name: "memory-backend-file",
        about: "Memory in a file",
        properties: Properties::of::<MemoryBackend>,
        check: |bag| match bag.spec::<MemoryBackend>()?.mem_path {
            Some(_) => Ok(()),
            None => Err(Error::Config("memory-backend-file: mem-path property not set".into())),
        },
    },
    ObjectKind {
        name: "memory-backend-memfd",
        about: "Memory that other processes can share",
        properties: Properties::of::<MemoryBackend>,
        check: |bag| bag.spec::<MemoryBackend>().map(drop).map_err(Error::from),
    },
    ObjectKind {
        name: "memory-backend-ram",
        about: "Memory",
        properties: Properties::of::<MemoryBackend>,
        check: |bag| bag.spec::<MemoryBackend>().map(drop).map_err(Error::from),
    },
    ObjectKind {
        name: "rng-random",
        about: "Random numbers from a file",
        properties: Properties::of::<Rng>,
        check: |bag| bag.spec::<Rng>().map(drop).map_err(Error::from),
    },
    ObjectKind {
        name: "rng-builtin",
        about: "Random numbers of the host",
        properties: Properties::of::<NoSpec>,
        check: |bag| bag.spec::<NoSpec>().map(drop).map_err(Error::from),
    },
    ObjectKind {
        name: "secret",
        about: "A secret, in a file or given",
        properties: Properties::of::<Secret>,
        check: |bag| bag.spec::<Secret>()?.bytes().map(drop),
    },
];

#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct NoSpec {}

#[derive(Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
#[allow(dead_code)] // some are only checked: disks have threads of their own
pub(crate) struct IoThread {
    /// Longest time to poll, in nanoseconds.
    pub(crate) poll_max_ns: Option<u64>,
    /// Factor by which polling grows.
    poll_grow: Option<u64>,
    /// Factor by which polling shrinks.
    poll_shrink: Option<u64>,
    /// Requests handed to the kernel at once.
    aio_max_batch: Option<u64>,
}

/// Properties of the memory backends.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct MemoryBackend {
    /// Size in bytes.
    #[schemars(extend("format" = SIZE_FORMAT))]
    pub size: u64,
    /// Share it with other processes.
    pub share: Option<bool>,
    /// Allocate everything at start.
    pub prealloc: bool,
    /// Threads that allocate (one is used).
    pub prealloc_threads: Option<u32>,
    /// File, or directory of a hugetlbfs mount.
    pub mem_path: Option<PathBuf>,
    /// Use huge pages.
    pub hugetlb: bool,
    /// Size of a huge page.
    #[schemars(extend("format" = SIZE_FORMAT))]
    pub hugetlbsize: Option<u64>,
    /// Let the host merge equal pages.
    pub merge: Option<bool>,
    /// Include it in core dumps of the program.
    pub dump: Option<bool>,
    /// Forbid the file to be resized.
    pub seal: Option<bool>,
}

#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Rng {
    /// File to read from.
    filename: Option<PathBuf>,
}

/// Properties of secrets.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Secret {
    /// The secret itself.
    pub data: Option<String>,
    /// File that holds it.
    pub file: Option<PathBuf>,
    /// Encoding: raw or base64.
    pub format: Option<String>,
    /// Id of the secret that this one is encrypted with.
    pub keyid: Option<String>,
    /// Initialisation vector, in base64.
    pub iv: Option<String>,
}

/// Largest secret in a file.
const LONGEST_SECRET: u64 = 1 << 20;

impl Secret {
    /// What is stored, not yet decoded.
    ///
    /// # Errors
    /// Contradictions, or a file that cannot be read.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let bad = |text: &str| Err(Error::Config(format!("secret: {text}")));
        match (&self.data, &self.file) {
            (Some(_), Some(_)) => bad("'file' and 'data' are mutually exclusive"),
            (None, None) => bad("Must provide 'file' or 'data' property for secret"),
            (Some(data), None) => Ok(data.clone().into_bytes()),
            (None, Some(path)) => {
                use std::io::Read;
                let fail = |source| Error::Host {
                    what: format!("secret: cannot read '{}'", path.display()),
                    source,
                };
                let mut out = Vec::new();
                let file = std::fs::File::open(path).map_err(fail)?;
                file.take(LONGEST_SECRET).read_to_end(&mut out).map_err(fail)?;
                Ok(out)
            }
        }
    }
}

/// Checks an object's description.
///
/// # Errors
/// An unknown kind (with the nearest), or bad properties.
pub fn check(bag: &Bag) -> Result<()> {
    let kind = KINDS.iter().find(|k| k.name == bag.driver).ok_or_else(|| {
        let near = nearest(&bag.driver, KINDS.iter().map(|k| k.name));
        let near = near.map(|n| format!("; did you mean '{n}'?")).unwrap_or_default();
        Error::Config(format!("invalid object type: {}{near}", bag.driver))
    })?;
    if bag.id.is_none() {
        return Err(Error::Config(format!("object '{}': missing id", bag.driver)));
    }
    (kind.check)(bag)
}

/// A device's description with the objects that it names looked up.
///
/// # Errors
/// An object that does not exist, or is of another kind.
pub fn resolve(bag: &Bag, objects: &[Bag]) -> Result<Bag> {
    let mut bag = bag.clone();
    let find = |key: &str, id: &str, kinds: &[&str]| {
        let object = objects.iter().find(|o| o.id.as_deref() == Some(id));
        let object = object.filter(|o| kinds.contains(&o.driver.as_str()));
        object.cloned().ok_or_else(|| {
            Error::Config(format!(
                "{}: {key}={id}: there is no {} of this id",
                bag.driver,
                kinds.join(" or ")
            ))
        })
    };
    if let Some(serde_json::Value::String(id)) = bag.props.get("iothread").cloned() {
        // Every disk has a thread of its own.
        find("iothread", &id, &["iothread"])?;
        bag.props.remove("iothread");
    }
    if bag.driver.starts_with("virtio-rng")
        && let Some(serde_json::Value::String(id)) = bag.props.get("rng").cloned()
    {
        let rng: Rng = find("rng", &id, &["rng-random", "rng-builtin"])?.spec()?;
        let host = ["/dev/urandom", "/dev/random"];
        if let Some(file) = rng.filename.filter(|f| !host.iter().any(|h| f.as_os_str() == *h)) {
            return Err(Error::Config(format!(
                "object '{id}': filename={}: only the host's random numbers are supported: use /dev/urandom",
                file.display()
            )));
        }
        bag.props.remove("rng");
    }
    Ok(bag)
}

impl Machine {
    /// The machine's objects.
    pub fn objects(&self) -> &[Bag] {
        &self.blueprint().objects
    }

    /// Adds an object.
    ///
    /// # Errors
    /// A description that makes no sense, or an id that is taken.
    pub fn add_object(&mut self, bag: Bag) -> Result<()> {
        check(&bag)?;
        if self.objects().iter().any(|o| o.id == bag.id) {
            let id = bag.id.unwrap_or_default();
            return Err(Error::Config(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        self.blueprint_mut().objects.push(bag);
        Ok(())
    }

    /// Removes an object.
    ///
    /// # Errors
    /// There is no such object, or a device uses it.
    pub fn remove_object(&mut self, id: &str) -> Result<()> {
        let known = |o: &Bag| o.id.as_deref() == Some(id);
        if !self.objects().iter().any(known) {
            return Err(Error::Config(format!("object '{id}' not found")));
        }
        let uses = |bag: &Bag| bag.props.values().any(|v| v.as_str() == Some(id));
        if self.devices().iter().any(uses) {
            return Err(Error::Config(format!("object '{id}' is in use, can not be deleted")));
        }
        self.blueprint_mut().objects.retain(|o| !known(o));
        Ok(())
    }
}
