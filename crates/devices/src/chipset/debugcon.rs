//! The debug console: what is written to its port comes out (Bochs' port 0xe9, SeaBIOS' and OVMF's 0x402).

use super::output::Output;
use crate::{CreateError, IsaDevice, Kind, Model, Parts};
use base::Timers;
use base::props::{Bag, Properties};
use bus::{Chardev, Device, RegionId, State, StateError, shared};
use schemars::JsonSchema;
use serde::Deserialize;
use std::sync::Arc;

const KIND: &str = "isa-debugcon";

/// Properties of `isa-debugcon`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Spec {
    /// Character device that the text goes to.
    pub chardev: String,
    /// Port.
    #[serde(default = "default_port")]
    pub iobase: u16,
    /// What reading the port gives; guests know the console by it.
    #[serde(default = "default_readback")]
    pub readback: u8,
}

fn default_port() -> u16 {
    0xe9
}

fn default_readback() -> u8 {
    0xe9
}

/// The table entry.
pub const MODEL: Model = Model {
    name: KIND,
    about: "Debug console (ISA)",
    properties: Properties::of::<Spec>,
    kind: Kind::Isa(create),
};

fn create(bag: &Bag, parts: &mut dyn Parts) -> Result<IsaDevice, CreateError> {
    let spec: Spec = bag.spec()?;
    let chardev = parts.take_chardev(&spec.chardev)?;
    let device = shared(DebugCon::new(chardev, parts.timers(), spec.readback));
    Ok(IsaDevice { device, ports: (spec.iobase, 1) })
}

/// A debug console. Region 0 is its port.
pub struct DebugCon {
    output: Output,
    readback: u8,
}

impl DebugCon {
    /// A console that writes to `chardev` and reads as `readback`.
    pub fn new(chardev: Arc<dyn Chardev>, timers: &Timers, readback: u8) -> Self {
        Self { output: Output::new(chardev, timers), readback }
    }
}

impl Device for DebugCon {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, _: RegionId, _: u64, data: &mut [u8]) {
        data.fill(self.readback);
    }

    fn write(&mut self, _: RegionId, _: u64, data: &[u8]) {
        if let Some(byte) = data.first() {
            self.output.push(*byte);
        }
    }

    fn pause(&mut self) -> std::io::Result<()> {
        self.output.flush();
        Ok(())
    }

    fn reset(&mut self) {
        self.output.flush();
    }

    fn save(&self) -> Result<State, StateError> {
        State::new(KIND, 1, &())
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        state.unpack::<()>(KIND, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::super::output::Recorder;
    use super::*;

    #[test]
    fn text_comes_out_and_the_port_answers() {
        let chardev = Arc::new(Recorder::default());
        let mut d = DebugCon::new(chardev.clone(), &Timers::new(), 0xe9);
        for b in b"SeaBIOS\n" {
            d.write(RegionId(0), 0, &[*b]);
        }
        assert_eq!(chardev.text(), "SeaBIOS\n");
        let mut b = [0];
        d.read(RegionId(0), 0, &mut b);
        assert_eq!(b, [0xe9]);
        d.write(RegionId(0), 0, b"x");
        d.pause().unwrap();
        assert!(chardev.text().ends_with('x'));
    }
}
