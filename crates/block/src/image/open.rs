//! Opening: names, probing, locks, backing chains.

use super::{DetectZeroes, Image};
use crate::{
    Context, Error, Options, Result,
    formats::{self, Opening, ProbeInput, Siblings},
    range_lock::RangeLock,
    storage::{self, CacheMode, Location, Permissions, Storage, StorageOptions},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, RwLock, atomic::AtomicBool},
};

/// Longest backing chain: each image takes a descriptor and a level of recursion.
const MAX_CHAIN: usize = 200;

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Format; guessed from the contents if `None`.
    pub format: Option<String>,
    /// Refuse writes.
    pub read_only: bool,
    /// Cache mode.
    pub cache: CacheMode,
    /// Pass discards down to the host.
    pub discard: bool,
    /// What to do with zeros written.
    pub detect_zeroes: DetectZeroes,
    /// Open read-only although another process writes; what is read may be inconsistent.
    pub force_share: bool,
    /// Take no locks at all.
    pub no_locks: bool,
    /// Leave the backing file closed; what it holds then reads as zeros.
    pub no_backing: bool,
    /// Options for the format, and (with `file.` in front) for the storage.
    pub options: Options,
    /// Only metadata will be looked at.
    pub no_io: bool,
    /// Tolerate dirty and corrupt marks and do not repair unasked, for `check`.
    pub for_check: bool,
    /// Let others neither write nor resize while open (`true` is what running machines do). Tools share.
    pub exclusive: bool,
    /// Secrets by id.
    pub secrets: Arc<BTreeMap<String, Vec<u8>>>,
    /// TLS credentials by id, for connections.
    pub credentials: Arc<BTreeMap<String, crate::nbd::TlsCredentials>>,
}

impl OpenOptions {
    /// For reading an image of a given format (or any).
    pub fn reader(format: Option<&str>) -> Self {
        OpenOptions { format: format.map(str::to_owned), read_only: true, ..Default::default() }
    }

    /// For reading and writing.
    pub fn writer(format: Option<&str>) -> Self {
        OpenOptions { format: format.map(str::to_owned), ..Default::default() }
    }
}

/// Opens and creates the further files of an image, next to its main file.
pub(super) struct Neighbours<'a> {
    pub(super) base: &'a str,
    pub(super) options: StorageOptions,
    pub(super) permissions: Permissions,
}

impl Siblings for Neighbours<'_> {
    fn open(&self, name: &str, read_only: bool) -> Result<Arc<dyn Storage>> {
        let name = storage::join_name(self.base, name);
        let options =
            StorageOptions { read_only: read_only || self.options.read_only, ..self.options.clone() };
        let storage = storage::open(&Location::parse(&name)?, &options)?;
        storage.set_permissions(self.permissions)?;
        Ok(storage)
    }

    fn create(&self, name: &str, size: u64) -> Result<Arc<dyn Storage>> {
        storage::create(&Location::parse(&storage::join_name(self.base, name))?, size)
    }
}

impl Image {
    /// Opens an image and its backing chain. `name` is a path, a URL, or `json:{...}`.
    pub fn open(name: &str, options: &OpenOptions) -> Result<Image> {
        open_chain(name, options, &mut Vec::new())
    }

    /// Opens an image on a storage that is open already; backing names are relative to `name`.
    pub fn open_storage(storage: Arc<dyn Storage>, name: &str, options: &OpenOptions) -> Result<Image> {
        open_on(storage, name, options, &mut Vec::new())
    }
}

fn open_chain(name: &str, options: &OpenOptions, chain: &mut Vec<(u64, u64)>) -> Result<Image> {
    let mut options = options.clone();
    let location = match storage::parse_json_name(name) {
        Some(parsed) => {
            let mut given = Options::from(parsed?);
            std::mem::swap(&mut given, &mut options.options);
            for (key, value) in given.iter() {
                options.options.set(key, value);
            }
            locate(&mut options)?
        }
        None if name.is_empty() => locate(&mut options)?,
        None => Location::parse(name)?,
    };
    let shown = match &location {
        Location::File(path) if name.is_empty() || name.starts_with("json:") => path.display().to_string(),
        _ => name.to_owned(),
    };
    let storage_options = storage_options(&mut options)?;
    let storage = storage::open(&location, &storage_options)?;
    open_on(storage, &shown, &options, chain)
}

/// Turns option-style naming (`driver=qcow2,file.driver=file,file.filename=x`) into a location, leaving the format's options.
fn locate(options: &mut OpenOptions) -> Result<Location> {
    let given = &mut options.options;
    let mut file = given.take_prefixed("file.");
    if file.is_empty() {
        if let Some(name) = given.take("filename") {
            file.set("filename", name);
        }
        // `driver=file,filename=x` names a bare storage, which is then read as raw.
        if let Some(driver) = given.get("driver")
            && formats::find(driver).is_none()
        {
            file.set("driver", driver);
            given.take("driver");
            // All of the options are the storage's.
            for (key, value) in std::mem::take(given).iter() {
                file.set(key, value);
            }
            given.set("driver", "raw");
        }
    }
    if let Some(driver) = given.take("driver") {
        if options.format.as_ref().is_some_and(|f| *f != driver) {
            return Err(Error::usage("Cannot specify both 'driver' and 'format' options"));
        }
        options.format = Some(driver);
    }
    let mut map = file.into_map();
    let mut rest = Options::new();
    for key in [
        "locking",
        "cache.direct",
        "cache.no-flush",
        "discard",
        "read-only",
        "aio",
        "node-name",
        "detect-zeroes",
    ] {
        if let Some(value) = map.remove(key) {
            rest.set(&format!("file.{key}"), value);
        }
    }
    let location = Location::from_options(&mut map, &options.secrets, &options.credentials)?;
    if let Some(key) = map.keys().next() {
        return Err(Error::usage(format!("Block protocol does not support the option '{key}'")));
    }
    for (key, value) in rest.iter() {
        options.options.set(key, value);
    }
    Ok(location)
}

/// Options that every node has, and those of the storage.
fn storage_options(options: &mut OpenOptions) -> Result<StorageOptions> {
    let given = &mut options.options;
    let mut file = given.take_prefixed("file.");
    for key in ["node-name", "id"] {
        given.take(key);
        file.take(key);
    }
    if let Some(on) = given.take_bool("read-only")?.or(file.take_bool("read-only")?) {
        options.read_only |= on;
    }
    if let Some(on) = given.take_bool("force-share")? {
        options.force_share |= on;
    }
    if let Some(on) = given.take_bool("cache.direct")?.or(file.take_bool("cache.direct")?) {
        options.cache.direct = on;
    }
    if let Some(on) = given.take_bool("cache.no-flush")?.or(file.take_bool("cache.no-flush")?) {
        options.cache.no_flush = on;
    }
    if let Some(mode) = given.take("detect-zeroes") {
        options.detect_zeroes = super::parse_detect_zeroes(&mode)?;
    }
    if let Some(mode) = given.take("discard").or(file.take("discard")) {
        options.discard = matches!(mode.as_str(), "on" | "unmap");
    }
    match file.take("locking").as_deref() {
        None | Some("auto" | "on") => {}
        Some("off") => options.no_locks = true,
        Some(other) => {
            return Err(Error::usage(format!("Parameter 'locking' does not accept value '{other}'")));
        }
    }
    // The engine is chosen by the caller of `Image::direct`; both names mean the same files.
    file.take("aio");
    file.take("driver");
    file.finish("the storage")?;
    if options.force_share && !options.read_only {
        return Err(Error::usage("force-share=on can only be used with read-only images"));
    }
    Ok(StorageOptions {
        read_only: options.read_only,
        cache: options.cache,
        no_locks: options.no_locks,
        discard: options.discard,
    })
}

fn open_on(
    storage: Arc<dyn Storage>,
    name: &str,
    options: &OpenOptions,
    chain: &mut Vec<(u64, u64)>,
) -> Result<Image> {
    let identity = identity(&*storage);
    if chain.len() >= MAX_CHAIN || identity.is_some_and(|id| chain.contains(&id)) {
        return Err(Error::invalid(format!(
            "Backing file chain of '{name}' is a loop, or longer than {MAX_CHAIN} images"
        )));
    }
    let mut warnings = Vec::new();
    let driver = match options.format.as_deref() {
        Some(format) => {
            formats::find(format).ok_or_else(|| Error::usage(format!("Unknown driver '{format}'")))?
        }
        None => {
            let mut head = vec![0; 2048];
            storage.read_at(&mut head, 0)?;
            head.truncate(storage.size()?.min(2048) as usize);
            formats::probe(&ProbeInput { head: &head, name })
        }
    };
    let guard_first_sector = options.format.is_none() && driver.name == "raw" && !options.read_only;
    if guard_first_sector {
        warnings.push(format!(
            "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         Automatically \
             detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n         \
             Specify the 'raw' format explicitly to remove the restrictions."
        ));
    }
    let permissions = permissions(driver.name, options);
    storage.set_permissions(permissions)?;
    let mut format_options = options.options.clone();
    let backing_options = format_options.take_prefixed("backing.");
    let named_backing = format_options.take("backing");
    let limits = crate::Limits::take(&mut format_options)?;
    let neighbours = Neighbours {
        base: name,
        options: StorageOptions {
            read_only: options.read_only,
            cache: options.cache,
            no_locks: options.no_locks,
            discard: options.discard,
        },
        permissions,
    };
    let format = (driver.open)(Opening {
        storage: Arc::clone(&storage),
        read_only: options.read_only,
        options: &mut format_options,
        siblings: &neighbours,
        secrets: &options.secrets,
        for_check: options.for_check,
        no_io: options.no_io,
    })?;
    format_options.finish(&format!("format '{}'", driver.name))?;
    let image = Image {
        driver,
        name: name.to_owned(),
        read_only: options.read_only,
        writethrough: options.cache.writethrough,
        backing: RwLock::new(None),
        locks: RangeLock::default(),
        guard_first_sector,
        detect_zeroes: options.detect_zeroes,
        discard: options.discard,
        decoded: Mutex::default(),
        decoded_any: AtomicBool::new(false),
        warnings,
        identity,
        closed: AtomicBool::new(false),
        watch: super::watch::Watch::default(),
        format,
    };
    if !limits.is_unlimited() {
        image.set_throttle(Some(Arc::new(crate::Throttle::new(limits))));
    }
    if !options.no_backing && named_backing.as_deref() != Some("") {
        let stored = image.info()?.backing;
        let (name, format, rest) = match (backing_options.is_empty(), stored) {
            (true, None) => return Ok(image),
            (true, Some(b)) => (resolve(name, &b.name), b.format, Options::new()),
            (false, _) => (String::new(), None, backing_options),
        };
        let below = OpenOptions {
            format,
            read_only: true,
            detect_zeroes: DetectZeroes::Off,
            options: rest,
            for_check: false,
            exclusive: false,
            ..options.clone()
        };
        chain.extend(image.identity);
        let backing = open_chain(&name, &below, chain).context(|| "Could not open backing file")?;
        if image.identity.is_some() {
            chain.pop();
        }
        *image.backing.write().unwrap_or_else(|e| e.into_inner()) = Some(Arc::new(backing));
    }
    Ok(image)
}

/// The full name of a backing file.
fn resolve(image: &str, backing: &str) -> String {
    if backing.starts_with("json:") { backing.to_owned() } else { storage::join_name(image, backing) }
}

/// Device and inode, by which loops are found.
fn identity(storage: &dyn Storage) -> Option<(u64, u64)> {
    let stat = rustix::fs::fstat(storage.raw_fd()?).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// What QEMU's tools claim for such an image.
fn permissions(format: &str, options: &OpenOptions) -> Permissions {
    if options.force_share {
        return Permissions { used: if options.no_io { 0 } else { Permissions::READ }, unshared: 0 };
    }
    let mut used = 0;
    if !options.no_io || format != "raw" {
        used |= Permissions::READ;
    }
    if !options.read_only {
        used |= Permissions::WRITE;
    }
    let mut unshared = 0;
    if format != "raw" {
        // The metadata must not change below us, and writing means growing.
        unshared |= Permissions::WRITE | Permissions::RESIZE;
        if !options.read_only {
            used |= Permissions::RESIZE;
        }
    } else if options.exclusive {
        unshared |= Permissions::RESIZE;
        if !options.read_only {
            unshared |= Permissions::WRITE;
        }
    }
    Permissions { used, unshared }
}
