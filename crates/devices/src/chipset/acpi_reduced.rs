//! Power management of reduced-hardware ACPI (ACPI specification 6.5, 4.1 and 4.8.3.7): sleep control, sleep status and
//! reset registers at three consecutive ports, and the interrupt of the generic event device for the power button.
//!
//! A microvm has this instead of the fixed hardware: no power-management timer to probe, no SCI.

use bus::{Device, IrqLine, RegionId, State, StateError, System, SystemRequest};
use serde::{Deserialize, Serialize};

const KIND: &str = "acpi-reduced";
const SLP_EN: u8 = 1 << 5;
const WAK_STS: u8 = 1 << 7;

/// The registers: sleep control at offset 0, sleep status at 1, reset at 2.
#[derive(Debug)]
pub struct ReducedPower {
    system: System,
    button: IrqLine,
    s5_sleep_type: u8,
    reset_value: u8,
    saved: Saved,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    control: u8,
    status: u8,
}

impl ReducedPower {
    /// Number of ports.
    pub const PORTS: u64 = 3;

    /// `button` is the event device's interrupt; `s5_sleep_type` (0..8) is what the DSDT's `\_S5` says, `reset_value`
    /// what the FADT says.
    pub fn new(system: System, button: IrqLine, s5_sleep_type: u8, reset_value: u8) -> Self {
        Self { system, button, s5_sleep_type, reset_value, saved: Saved::default() }
    }

    /// Presses the power button.
    pub fn power_button(&mut self) {
        self.button.pulse();
    }
}

impl Device for ReducedPower {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, _: RegionId, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            0 => data[0] = self.saved.control & !SLP_EN,
            1 => data[0] = self.saved.status,
            _ => {}
        }
    }

    fn write(&mut self, _: RegionId, offset: u64, data: &[u8]) {
        let value = data[0];
        match offset {
            0 => {
                self.saved.control = value;
                if value & SLP_EN != 0 && (value >> 2) & 7 == self.s5_sleep_type {
                    self.system.request(SystemRequest::PowerOff);
                }
            }
            1 => self.saved.status &= !(value & WAK_STS),
            _ if value == self.reset_value => self.system.request(SystemRequest::Reset),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.saved = Saved::default();
        self.button.set(false);
    }

    fn save(&self) -> Result<State, StateError> {
        State::new(KIND, 1, &self.saved)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        self.saved = state.unpack(KIND, 1)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn sleep_and_reset_reach_the_machine() {
        let asked = Arc::new(Mutex::new(vec![]));
        let sink = asked.clone();
        let system = System::new(move |r| sink.lock().unwrap().push(r));
        let mut d = ReducedPower::new(system, IrqLine::unconnected(), 5, 0x0f);
        d.write(RegionId(0), 0, &[5 << 2]);
        d.write(RegionId(0), 0, &[3 << 2 | SLP_EN]);
        d.write(RegionId(0), 2, &[1]);
        assert!(asked.lock().unwrap().is_empty());
        d.write(RegionId(0), 0, &[5 << 2 | SLP_EN]);
        d.write(RegionId(0), 2, &[0x0f]);
        assert_eq!(*asked.lock().unwrap(), [SystemRequest::PowerOff, SystemRequest::Reset]);
    }
}
