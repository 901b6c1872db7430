//! The debug exit device: a guest's test writes its result, and the program ends with it.

use crate::{CreateError, IsaDevice, Kind, Model, Parts};
use base::props::{Bag, Properties};
use bus::{Device, RegionId, State, StateError, System, SystemRequest, shared};
use schemars::JsonSchema;
use serde::Deserialize;

const KIND: &str = "isa-debug-exit";

/// Properties of `isa-debug-exit`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Spec {
    /// First port.
    pub iobase: u16,
    /// Number of ports.
    pub iosize: u16,
}

impl Default for Spec {
    fn default() -> Self {
        Self { iobase: 0x501, iosize: 2 }
    }
}

/// The table entry.
pub const MODEL: Model = Model {
    name: KIND,
    about: "Ends the program with a status the guest chooses (ISA)",
    properties: Properties::of::<Spec>,
    kind: Kind::Isa(create),
};

fn create(bag: &Bag, parts: &mut dyn Parts) -> Result<IsaDevice, CreateError> {
    let spec: Spec = bag.spec()?;
    let device = shared(DebugExit::new(parts.system().clone()));
    Ok(IsaDevice { device, ports: (spec.iobase, spec.iosize) })
}

/// The device. Writing `v` anywhere ends the program with status `v << 1 | 1`, so that 0, a guest's orderly power-off,
/// is not among them.
pub struct DebugExit {
    system: System,
}

impl DebugExit {
    /// A device that asks `system` to exit.
    pub fn new(system: System) -> Self {
        Self { system }
    }
}

impl Device for DebugExit {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, _: RegionId, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: RegionId, _: u64, data: &[u8]) {
        if let Some(value) = data.first() {
            self.system.request(SystemRequest::Exit(value << 1 | 1));
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn status() {
        let seen: Arc<Mutex<Vec<SystemRequest>>> = Arc::default();
        let s = seen.clone();
        let mut d = DebugExit::new(System::new(move |r| s.lock().unwrap().push(r)));
        d.write(RegionId(0), 0, &[0x10, 0, 0, 0]);
        d.write(RegionId(0), 1, &[0]);
        assert_eq!(*seen.lock().unwrap(), [SystemRequest::Exit(0x21), SystemRequest::Exit(1)]);
    }
}
