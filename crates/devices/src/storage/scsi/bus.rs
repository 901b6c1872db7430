//! A SCSI bus: which unit has which address.

use super::{CDB_LEN, Lun, LunSaved, Outcome, Sense, be16, be32, opcode};
use crate::storage::Buffer;
use bus::StateError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// Address of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LunAddress {
    /// Target.
    pub target: u16,
    /// Logical unit number.
    pub lun: u16,
}

/// A change of what is on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScsiBusEvent {
    /// A unit was plugged in.
    Added(LunAddress),
    /// A unit was pulled out.
    Removed(LunAddress),
    /// Something about a unit has changed: its medium or its size.
    Changed(LunAddress, Sense),
}

type Listener = Box<dyn Fn(ScsiBusEvent) + Send + Sync>;

/// The units behind one controller.
#[derive(Default)]
pub struct ScsiBus {
    units: Mutex<BTreeMap<LunAddress, Arc<Lun>>>,
    listener: Mutex<Option<Listener>>,
}

impl std::fmt::Debug for ScsiBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.lock().keys()).finish()
    }
}

/// State of a bus: of each unit, by address.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ScsiBusSaved(Vec<(LunAddress, LunSaved)>);

impl ScsiBus {
    /// Highest target and logical unit number (LUNs in flat space addressing have 14 bits, SAM-5, 4.7.7).
    pub const MAX_TARGET: u16 = 255;
    /// See [`Self::MAX_TARGET`].
    pub const MAX_LUN: u16 = 16383;

    /// An empty bus.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<LunAddress, Arc<Lun>>> {
        self.units.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Who hears of changes: the controller. It must not call the bus from there.
    pub fn listen(&self, listener: impl Fn(ScsiBusEvent) + Send + Sync + 'static) {
        *self.listener.lock().unwrap_or_else(|e| e.into_inner()) = Some(Box::new(listener));
    }

    fn tell(&self, event: ScsiBusEvent) {
        if let Some(listener) = &*self.listener.lock().unwrap_or_else(|e| e.into_inner()) {
            listener(event);
        }
    }

    /// The first target without a unit.
    pub fn free_target(&self) -> Option<u16> {
        let units = self.lock();
        (0..=Self::MAX_TARGET).find(|t| !units.keys().any(|a| a.target == *t))
    }

    /// The first free unit number of a target.
    pub fn free_lun(&self, target: u16) -> Option<u16> {
        let units = self.lock();
        (0..=Self::MAX_LUN).find(|lun| !units.contains_key(&LunAddress { target, lun: *lun }))
    }

    /// Plugs a unit in. `false` if the address is taken or impossible.
    pub fn attach(self: &Arc<Self>, address: LunAddress, unit: &Arc<Lun>) -> bool {
        if address.target > Self::MAX_TARGET || address.lun > Self::MAX_LUN {
            return false;
        }
        {
            let mut units = self.lock();
            if units.contains_key(&address) {
                return false;
            }
            for (_, sibling) in units.iter().filter(|(a, _)| a.target == address.target) {
                sibling.attend(Sense::LUNS_CHANGED);
            }
            units.insert(address, unit.clone());
        }
        let (bus, watched) = (Arc::downgrade(self), Arc::downgrade(unit));
        unit.drive().listen(move |event| {
            let (Some(bus), Some(unit)) = (bus.upgrade(), watched.upgrade()) else { return };
            // Pulled out meanwhile?
            if !bus.lock().get(&address).is_some_and(|u| Arc::ptr_eq(u, &unit)) {
                return;
            }
            let sense = match event {
                crate::storage::DriveEvent::Resized => Sense::CAPACITY_CHANGED,
                _ => Sense::MEDIUM_CHANGED,
            };
            bus.tell(ScsiBusEvent::Changed(address, sense));
        });
        self.tell(ScsiBusEvent::Added(address));
        true
    }

    /// Pulls a unit out.
    pub fn detach(&self, address: LunAddress) -> Option<Arc<Lun>> {
        let unit = self.lock().remove(&address)?;
        self.tell(ScsiBusEvent::Removed(address));
        Some(unit)
    }

    /// A unit.
    pub fn unit(&self, address: LunAddress) -> Option<Arc<Lun>> {
        self.lock().get(&address).cloned()
    }

    /// All units.
    pub fn units(&self) -> Vec<(LunAddress, Arc<Lun>)> {
        self.lock().iter().map(|(a, u)| (*a, u.clone())).collect()
    }

    /// Resets every unit.
    pub fn reset(&self) {
        self.units().iter().for_each(|(_, u)| u.reset());
    }

    /// Whether a target has any unit.
    pub fn has_target(&self, target: u16) -> bool {
        self.lock().keys().any(|a| a.target == target)
    }

    /// Carries a command out on a unit, or answers for one that is not there (SPC-4, 6.4.2). `None`: there is no such
    /// target at all.
    pub fn execute(&self, address: LunAddress, cdb: &[u8], buffer: &mut Buffer<'_>) -> Option<Outcome> {
        let operation = cdb.first().copied().unwrap_or_default();
        let unit = self.unit(address);
        if unit.is_none() && !self.has_target(address.target) {
            return None;
        }
        let mut block = [0; CDB_LEN];
        let n = cdb.len().min(CDB_LEN);
        block[..n].copy_from_slice(&cdb[..n]);
        let (data, allocation) = match (operation, &unit) {
            (opcode::REPORT_LUNS, _) => (self.lun_list(address.target), be32(&block, 6).into()),
            (_, Some(unit)) => return Some(unit.execute(cdb, buffer)),
            // No device, and none can be here now.
            (opcode::INQUIRY, None) if block[1] & 1 == 0 => {
                let mut data = vec![0; 36];
                data[0] = 0x7f;
                data[4] = 31;
                (data, be16(&block, 3).into())
            }
            (opcode::REQUEST_SENSE, None) => (Sense::NO_SUCH_LUN.fixed().to_vec(), block[4].into()),
            _ => return Some(Outcome::check(Sense::NO_SUCH_LUN)),
        };
        let wanted = (data.len() as u64).min(allocation);
        let written = buffer.write(0, &data[..wanted as usize]);
        let (done, bad_memory) = (written.as_ref().copied().unwrap_or(0), written.is_err());
        Some(Outcome { status: super::GOOD, sense: None, done, wanted, bad_memory })
    }

    fn lun_list(&self, target: u16) -> Vec<u8> {
        let mut luns: Vec<u16> = self.lock().keys().filter(|a| a.target == target).map(|a| a.lun).collect();
        if luns.first() != Some(&0) {
            luns.insert(0, 0); // LUN 0 always answers
        }
        let mut data = ((luns.len() * 8) as u32).to_be_bytes().to_vec();
        data.extend([0; 4]);
        for lun in luns {
            // Peripheral addressing up to 255, flat space above (SAM-5, 4.7.7).
            let field = if lun < 256 { lun } else { 0x4000 | lun };
            data.extend(field.to_be_bytes());
            data.extend([0; 6]);
        }
        data
    }

    /// Guest-visible state.
    pub fn save(&self) -> ScsiBusSaved {
        ScsiBusSaved(self.units().into_iter().map(|(a, u)| (a, u.save())).collect())
    }

    /// Restores [`Self::save`].
    ///
    /// # Errors
    /// Other units than are here.
    pub fn load(&self, saved: ScsiBusSaved) -> Result<(), StateError> {
        let units = self.units();
        let same = units.len() == saved.0.len() && units.iter().zip(&saved.0).all(|((a, _), (b, _))| a == b);
        if !same {
            let reason = "the units on the SCSI bus are others than were saved".into();
            return Err(StateError::Invalid { kind: "scsi".into(), reason });
        }
        for ((_, unit), (_, state)) in units.into_iter().zip(saved.0) {
            unit.load(state);
        }
        Ok(())
    }
}
