//! A cable: which drives hang on a port or channel.

use super::{AtaDrive, AtaSaved};
use ::bus::StateError;
use std::sync::{Arc, Mutex, MutexGuard};

/// Drives of an IDE channel (two) or a SATA port (one).
#[derive(Debug)]
pub struct IdeBus {
    number: usize,
    drives: Mutex<Vec<Option<Arc<AtaDrive>>>>,
}

impl IdeBus {
    /// The cable of port or channel `number`, with `places` connectors.
    pub fn new(number: usize, places: usize) -> Arc<Self> {
        Arc::new(Self { number, drives: Mutex::new(vec![None; places]) })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Arc<AtaDrive>>>> {
        self.drives.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Number of the port or channel.
    pub fn number(&self) -> usize {
        self.number
    }

    /// Number of connectors.
    pub fn places(&self) -> usize {
        self.lock().len()
    }

    /// The first free connector.
    pub fn free(&self) -> Option<usize> {
        self.lock().iter().position(Option::is_none)
    }

    /// Plugs a drive in. `false` if there is no such connector, or it is taken.
    pub fn attach(&self, place: usize, drive: &Arc<AtaDrive>) -> bool {
        match self.lock().get_mut(place) {
            Some(slot @ None) => {
                *slot = Some(drive.clone());
                true
            }
            _ => false,
        }
    }

    /// The drive at a connector.
    pub fn drive(&self, place: usize) -> Option<Arc<AtaDrive>> {
        self.lock().get(place).cloned().flatten()
    }

    /// All drives.
    pub fn drives(&self) -> Vec<Arc<AtaDrive>> {
        self.lock().iter().flatten().cloned().collect()
    }

    /// State of the drives, by connector.
    pub fn save(&self) -> Vec<Option<AtaSaved>> {
        self.lock().iter().map(|d| d.as_ref().map(|d| d.save())).collect()
    }

    /// Restores [`Self::save`].
    ///
    /// # Errors
    /// Other drives than are here.
    pub fn load(&self, saved: Vec<Option<AtaSaved>>) -> Result<(), StateError> {
        let drives = self.lock().clone();
        let same =
            drives.len() == saved.len() && drives.iter().zip(&saved).all(|(a, b)| a.is_some() == b.is_some());
        if !same {
            let reason = "the drives on the cable are others than were saved".into();
            return Err(StateError::Invalid { kind: "ata".into(), reason });
        }
        drives.iter().flatten().zip(saved.into_iter().flatten()).try_for_each(|(d, s)| d.load(s))
    }
}
