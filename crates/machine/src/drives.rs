//! Disk images of a machine, by id.

use crate::blueprint::BlockSpec;
use crate::{Error, Result};
use base::nearest;
use base::props::Bag;
use block::{CacheMode, Image, OpenOptions};
use devices::CreateError;
use devices::storage::Drive;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Opened images, waiting for the device that takes each.
#[derive(Default)]
pub(crate) struct Drives {
    waiting: BTreeMap<String, Arc<Image>>,
    taken: Vec<String>,
    nodes: BTreeMap<String, Arc<Image>>,
    drives: Vec<Arc<Drive>>,
}

/// How a disk image is opened.
fn open_options(name: &str, spec: &BlockSpec) -> Result<OpenOptions> {
    let bad = |e: block::Error| Error::Config(format!("disk '{name}': {e}"));
    if spec.snapshot {
        return Err(Error::Config(format!("disk '{name}': snapshot=on is not supported yet")));
    }
    Ok(OpenOptions {
        format: spec.format.clone(),
        read_only: spec.read_only,
        force_share: spec.force_share,
        exclusive: !spec.force_share,
        discard: spec.discard,
        cache: spec.cache.as_deref().map(CacheMode::parse).transpose().map_err(bad)?.unwrap_or_default(),
        detect_zeroes: spec
            .detect_zeroes
            .as_deref()
            .map(block::parse_detect_zeroes)
            .transpose()
            .map_err(bad)?
            .unwrap_or_default(),
        options: block::Options::parse(spec.options.as_deref().unwrap_or_default()).map_err(bad)?,
        ..OpenOptions::default()
    })
}

impl Drives {
    /// Opens (and locks) the images of all `blockdevs`.
    pub(crate) fn open(blockdevs: &[Bag]) -> Result<Self> {
        let mut drives = Self::default();
        for bag in blockdevs {
            drives.add(bag)?;
        }
        Ok(drives)
    }

    /// Opens (and locks) one more image.
    pub(crate) fn add(&mut self, bag: &Bag) -> Result<()> {
        let id = bag.id.clone().ok_or_else(|| Error::Config(format!("{}: missing id", bag.driver)))?;
        if self.nodes.contains_key(&id) {
            return Err(Error::Config(format!("there are two disk images with the id '{id}'")));
        }
        let spec: BlockSpec = bag.spec()?;
        let name = spec.file.to_str().filter(|n| !n.is_empty()).ok_or_else(|| {
            Error::Config(format!("disk '{}': file= must name an image, in UTF-8", spec.file.display()))
        })?;
        let options = open_options(name, &spec)?;
        let image = Image::open(name, &options).map_err(|e| {
            // Some messages keep the two lines that image tools print.
            let text = e.to_string().lines().map(str::trim).collect::<Vec<_>>().join("; ");
            Error::Config(format!("disk '{name}': {text}"))
        })?;
        let image = Arc::new(image);
        self.nodes.insert(id.clone(), image.clone());
        self.waiting.insert(id, image);
        Ok(())
    }

    /// Closes an image that no device uses.
    pub(crate) fn remove(&mut self, id: &str) -> Result<()> {
        if !self.nodes.contains_key(id) {
            return Err(Error::Config(format!("Failed to find node with node-name='{id}'")));
        }
        if self.waiting.remove(id).is_none() {
            return Err(Error::Config(format!("Node '{id}' is busy: node is used as root of a device")));
        }
        self.nodes.remove(id);
        Ok(())
    }

    /// All images by id.
    pub(crate) fn nodes(&self) -> &BTreeMap<String, Arc<Image>> {
        &self.nodes
    }

    /// Keeps a drive whose medium can be changed.
    pub(crate) fn offer(&mut self, drive: &Arc<Drive>) {
        self.drives.push(drive.clone());
    }

    /// Drives whose medium can be changed.
    pub(crate) fn drives(&self) -> &[Arc<Drive>] {
        &self.drives
    }

    /// A device has gone: its image may be taken again.
    pub(crate) fn give_back(&mut self, id: &str) {
        self.taken.retain(|t| t != id);
        if let Some(image) = self.nodes.get(id) {
            self.waiting.insert(id.into(), image.clone());
        }
    }

    /// The image for a device.
    pub(crate) fn take(&mut self, id: &str) -> std::result::Result<Arc<Image>, CreateError> {
        if let Some(image) = self.waiting.remove(id) {
            self.taken.push(id.into());
            return Ok(image);
        }
        if self.taken.iter().any(|t| t == id) {
            return Err(CreateError::Other(format!("drive '{id}' is in use by another device")));
        }
        let near =
            nearest(id, self.waiting.keys().map(String::as_str)).map(|n| format!("; did you mean '{n}'?"));
        Err(CreateError::Other(format!("there is no drive '{id}'{}", near.unwrap_or_default())))
    }
}
