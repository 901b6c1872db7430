//! Namespaces, and `nvme-ns`, which plugs one in.

use crate::model::{CreateError, Kind, Model, Parts};
use crate::place::ChildBus;
use crate::storage::scsi::{boot_class, open_drive};
use crate::storage::{Drive, DriveEvent, DriveSaved, DriveSpec};
use base::props::{Bag, Properties};
use schemars::JsonSchema;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// A namespace of an NVMe controller.
pub const MODEL: Model = Model {
    name: "nvme-ns",
    about: "namespace of an NVMe controller",
    properties: Properties::of::<Spec>,
    kind: Kind::Child { bus: "NVMe", create },
};

/// Properties of `nvme-ns`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Spec {
    /// The drive.
    #[serde(flatten)]
    pub drive: DriveSpec,
    /// Place in the order in which firmware boots; lower comes first.
    pub bootindex: Option<u32>,
    /// Namespace identifier, 1 to 256; the first free one if not given.
    pub nsid: Option<u32>,
    /// IEEE extended unique identifier (64 bits); one made from the number if not given.
    pub eui64: Option<u64>,
}

/// Highest namespace identifier.
pub(super) const MOST: u32 = 256;

/// A namespace.
pub(super) struct Namespace {
    pub(super) drive: Arc<Drive>,
    pub(super) eui64: u64,
}

type Listener = Box<dyn Fn(u32) + Send + Sync>;

/// The namespaces of a controller.
#[derive(Default)]
pub struct NvmeBus {
    spaces: Mutex<BTreeMap<u32, Arc<Namespace>>>,
    changed: Mutex<Option<Listener>>,
}

impl std::fmt::Debug for NvmeBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.lock().keys()).finish()
    }
}

fn create(bag: &Bag, parts: &mut dyn Parts, bus: &ChildBus) -> Result<(), CreateError> {
    let ChildBus::Nvme(bus) = bus else {
        return Err(CreateError::Other(format!("{}: not an NVMe bus", bag.driver)));
    };
    plug(bag, &bag.spec::<Spec>()?, parts, bus)
}

/// Opens the drive of `spec` and plugs it in.
pub(super) fn plug(
    bag: &Bag,
    spec: &Spec,
    parts: &mut dyn Parts,
    bus: &Arc<NvmeBus>,
) -> Result<(), CreateError> {
    let bad = |text: String| Err(CreateError::Other(format!("{}: {text}", bag.driver)));
    spec.drive.check(&bag.driver, 20)?;
    let Some(nsid) = spec.nsid.or_else(|| bus.free()) else {
        return bad(format!("the controller has {MOST} namespaces already"));
    };
    if !(1..=MOST).contains(&nsid) {
        return bad(format!("nsid={nsid} must be from 1 to {MOST}"));
    }
    if bus.get(nsid).is_some() {
        return bad(format!("nsid={nsid} is taken; choose another"));
    }
    let drive = open_drive(bag, &spec.drive, parts, false)?;
    // A locally administered identifier of ours, as others make them.
    let eui64 = spec.eui64.or(spec.drive.wwn).unwrap_or(0x5254_0000_0000_0000 | u64::from(nsid));
    if !bus.attach(nsid, drive, eui64) {
        return bad(format!("nsid={nsid} is taken"));
    }
    parts.bootable(boot_class(false), spec.bootindex, &format!("namespace@{nsid:x},0"));
    Ok(())
}

impl NvmeBus {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Arc<Namespace>>> {
        self.spaces.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The first free identifier.
    pub fn free(&self) -> Option<u32> {
        let spaces = self.lock();
        (1..=MOST).find(|n| !spaces.contains_key(n))
    }

    /// Plugs a drive in as a namespace; `false` if the identifier is taken or impossible.
    pub fn attach(self: &Arc<Self>, nsid: u32, drive: Arc<Drive>, eui64: u64) -> bool {
        if !(1..=MOST).contains(&nsid) || self.lock().contains_key(&nsid) {
            return false;
        }
        let bus = Arc::downgrade(self);
        drive.listen(move |event| {
            if let (DriveEvent::Resized, Some(bus)) = (event, bus.upgrade()) {
                bus.tell(nsid);
            }
        });
        self.lock().insert(nsid, Arc::new(Namespace { drive, eui64 }));
        self.tell(nsid);
        true
    }

    /// Pulls a namespace out.
    pub fn detach(&self, nsid: u32) -> bool {
        let there = self.lock().remove(&nsid).is_some();
        if there {
            self.tell(nsid);
        }
        there
    }

    fn tell(&self, nsid: u32) {
        if let Some(changed) = &*self.changed.lock().unwrap_or_else(|e| e.into_inner()) {
            changed(nsid);
        }
    }

    /// Who hears of namespaces that change.
    pub(super) fn listen(&self, changed: impl Fn(u32) + Send + Sync + 'static) {
        *self.changed.lock().unwrap_or_else(|e| e.into_inner()) = Some(Box::new(changed));
    }

    pub(super) fn get(&self, nsid: u32) -> Option<Arc<Namespace>> {
        self.lock().get(&nsid).cloned()
    }

    pub(super) fn ids(&self) -> Vec<u32> {
        self.lock().keys().copied().collect()
    }

    pub(super) fn all(&self) -> Vec<Arc<Namespace>> {
        self.lock().values().cloned().collect()
    }

    pub(super) fn save(&self) -> Vec<(u32, DriveSaved)> {
        self.lock().iter().map(|(n, s)| (*n, s.drive.save())).collect()
    }

    /// Restores [`Self::save`]; `false` if these are others.
    pub(super) fn load(&self, saved: &[(u32, DriveSaved)]) -> bool {
        let spaces = self.lock();
        let same = spaces.len() == saved.len() && spaces.keys().zip(saved).all(|(a, (b, _))| a == b);
        if same {
            spaces.values().zip(saved).for_each(|(s, (_, saved))| s.drive.load(saved));
        }
        same
    }
}
