//! Creating images.

use super::{Image, OpenOptions, open::Neighbours};
use crate::{
    Context, Error, Options, Result,
    formats::{self, Backing, Creation},
    storage::{self, Location, Permissions, StorageOptions},
};
use std::{collections::BTreeMap, sync::Arc};

/// What to create.
#[derive(Clone, Debug, Default)]
pub struct Create {
    /// Format name.
    pub format: String,
    /// Path or URL.
    pub name: String,
    /// Size of the disk in bytes; with a backing file it may be left to that.
    pub size: Option<u64>,
    /// Backing file.
    pub backing: Option<Backing>,
    /// Do not open the backing file to see whether it is there.
    pub unsafe_backing: bool,
    /// Creation options of the format.
    pub options: Options,
    /// Secrets by id.
    pub secrets: Arc<BTreeMap<String, Vec<u8>>>,
}

/// Creates an image; the result is its size in bytes.
pub fn create_image(create: &Create) -> Result<u64> {
    let driver = formats::find(&create.format)
        .ok_or_else(|| Error::usage(format!("Unknown file format '{}'", create.format)))?;
    let make = driver.create.ok_or_else(|| {
        Error::unsupported(format!("Format driver '{}' does not support image creation", create.format))
    })?;
    let mut size = create.size;
    if let Some(backing) = &create.backing {
        if !driver.backing {
            return Err(Error::usage(format!(
                "Backing file not supported for file format '{}'",
                create.format
            )));
        }
        let full = storage::join_name(&create.name, &backing.name);
        if full == create.name {
            return Err(Error::usage(
                "Error: Trying to create an image with the same filename as the backing file",
            ));
        }
        if size.is_none() || !create.unsafe_backing {
            let options = OpenOptions {
                no_io: true,
                force_share: true,
                secrets: Arc::clone(&create.secrets),
                ..OpenOptions::reader(backing.format.as_deref())
            };
            match Image::open(&full, &options) {
                Ok(image) => size = size.or(Some(image.size())),
                Err(e) if create.unsafe_backing && size.is_some() => drop(e),
                Err(e) => return Err(e).context(|| format!("Could not open '{full}'")),
            }
        }
    }
    let size = size.ok_or_else(|| Error::usage("Image creation needs a size parameter"))?;
    if size > i64::MAX as u64 - 511 {
        return Err(Error::usage("Image size must be less than 8 EiB!"));
    }
    let mut options = create.options.clone();
    let location = Location::parse(&create.name)?;
    let storage = storage::create(&location, 0)?;
    storage.set_permissions(Permissions {
        used: Permissions::READ | Permissions::WRITE | Permissions::RESIZE,
        unshared: Permissions::WRITE | Permissions::RESIZE,
    })?;
    let neighbours =
        Neighbours { base: &create.name, options: StorageOptions::default(), permissions: Permissions::NONE };
    make(Creation {
        storage: Arc::clone(&storage),
        size,
        backing: create.backing.clone(),
        options: &mut options,
        name: &create.name,
        siblings: &neighbours,
        secrets: &create.secrets,
    })?;
    options.finish(&format!("format '{}'", create.format))?;
    storage.set_permissions(Permissions::NONE)?;
    Ok(size)
}
