//! Disk images as monitors see them, and media that are changed.

use crate::{Error, Machine, Result};
use base::props::Bag;
use block::Image;
use devices::storage::Drive;
use std::sync::Arc;

/// An image.
#[derive(Clone)]
pub struct BlockNode {
    /// Its id.
    pub name: String,
    /// The image.
    pub image: Arc<Image>,
    /// The device that uses it: id or driver, and path of the device.
    pub device: Option<Bag>,
}

impl Machine {
    /// All images by id.
    pub fn block_nodes(&self) -> Vec<BlockNode> {
        let devices = self.devices();
        let node = |(name, image): (&String, &Arc<Image>)| BlockNode {
            name: name.clone(),
            image: image.clone(),
            device: devices
                .iter()
                .find(|d| d.props.get("drive").and_then(|v| v.as_str()) == Some(name))
                .cloned(),
        };
        self.built().drives.nodes().iter().map(node).collect()
    }

    /// Opens another image.
    ///
    /// # Errors
    /// A description that makes no sense, an id that is taken, or an image that cannot be opened.
    pub fn add_block_node(&mut self, bag: &Bag) -> Result<()> {
        self.built_mut().drives.add(bag)?;
        self.blueprint_mut().blockdevs.push(bag.clone());
        Ok(())
    }

    /// Closes an image.
    ///
    /// # Errors
    /// There is none of that id, or a device uses it.
    pub fn remove_block_node(&mut self, id: &str) -> Result<()> {
        self.built_mut().drives.remove(id)?;
        self.blueprint_mut().blockdevs.retain(|b| b.id.as_deref() != Some(id));
        Ok(())
    }

    /// The drive with a removable medium that the device of that id (or the image it had at first) is.
    ///
    /// # Errors
    /// There is none.
    pub fn drive(&self, id: &str) -> Result<Arc<Drive>> {
        let drives = self.built().drives.drives();
        let found = drives.iter().find(|d| d.name() == id || d.spec().drive == id);
        found
            .cloned()
            .ok_or_else(|| Error::Config(format!("Device '{id}' is not a drive with a removable medium")))
    }

    /// All drives that devices have told of.
    pub fn drives(&self) -> Vec<Arc<Drive>> {
        self.built().drives.drives().to_vec()
    }

    /// Takes the medium out of a drive; its image may be used again.
    ///
    /// # Errors
    /// The guest has locked the tray, and `force` is off.
    pub fn remove_medium(&mut self, drive: &Drive, force: bool) -> Result<()> {
        let image = drive.eject(force).map_err(|e| Error::Config(e.to_string()))?;
        if let Some(image) = image {
            let nodes = self.built().drives.nodes();
            let name = nodes.iter().find(|(_, i)| Arc::ptr_eq(i, &image)).map(|(n, _)| n.clone());
            if let Some(name) = name {
                self.built_mut().drives.give_back(&name);
            }
        }
        Ok(())
    }

    /// Puts an opened image into a drive.
    ///
    /// # Errors
    /// No such drive or image, or the tray is locked.
    pub fn insert_medium(&mut self, drive: &str, node: &str) -> Result<()> {
        let drive = self.drive(drive)?;
        let image = self.built_mut().drives.take(node).map_err(Error::from)?;
        drive.insert(image).map_err(|e| {
            self.built_mut().drives.give_back(node);
            Error::Config(e.to_string())
        })
    }
}
