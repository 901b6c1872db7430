//! pvpanic: lets a guest say that it crashed (QEMU, docs/specs/pvpanic).

use crate::{CreateError, IsaDevice, Kind, Model, Parts};
use base::props::{Bag, Properties};
use bus::{Device, RegionId, State, StateError, System, SystemRequest, shared};
use schemars::JsonSchema;
use serde::Deserialize;

const KIND: &str = "pvpanic";
const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 1 << 1;

/// Properties of `pvpanic`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Spec {
    /// Port.
    pub ioport: u16,
}

impl Default for Spec {
    fn default() -> Self {
        Self { ioport: 0x505 }
    }
}

/// The table entry.
pub const MODEL: Model = Model {
    name: KIND,
    about: "Guest panic notifier (ISA)",
    properties: Properties::of::<Spec>,
    kind: Kind::Isa(create),
};

fn create(bag: &Bag, parts: &mut dyn Parts) -> Result<IsaDevice, CreateError> {
    let spec: Spec = bag.spec()?;
    let device = shared(Pvpanic { system: parts.system().clone() });
    Ok(IsaDevice { device, ports: (spec.ioport, 1) })
}

struct Pvpanic {
    system: System,
}

impl Device for Pvpanic {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, _: RegionId, _: u64, data: &mut [u8]) {
        data.fill(0);
        data[0] = PANICKED | CRASH_LOADED;
    }

    fn write(&mut self, _: RegionId, _: u64, data: &[u8]) {
        if data[0] & PANICKED != 0 {
            self.system.request(SystemRequest::GuestPanicked);
        } else if data[0] & CRASH_LOADED != 0 {
            tracing::info!("the guest panicked and runs its crash kernel");
        }
    }

    fn reset(&mut self) {}

    fn save(&self) -> Result<State, StateError> {
        State::new(KIND, 1, &())
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        state.unpack::<()>(KIND, 1)
    }
}
