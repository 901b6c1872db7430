//! Small ports: POST codes (0x80), system control port A (0x92), the delay port 0xed.

use bus::{Device, RegionId, State, StateError, System, SystemRequest};
use serde::{Deserialize, Serialize};

const KIND: &str = "system-ports";

const FAST_RESET: u8 = 1;
const FAST_A20: u8 = 1 << 1;

/// The three ports. The A20 gate is remembered but always open: no system of today runs with it closed.
pub struct SystemPorts {
    system: System,
    saved: Saved,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    post: u8,
    control: u8,
}

const RESET: Saved = Saved { post: 0, control: FAST_A20 };

impl SystemPorts {
    /// Port 0x80. Firmware writes codes there, and others to pass time.
    pub const POST: RegionId = RegionId(0);
    /// Port 0x92.
    pub const CONTROL: RegionId = RegionId(1);
    /// Port 0xed, where Linux goes to pass time if 0x80 is dangerous.
    pub const DELAY: RegionId = RegionId(2);

    /// Ports that ask `system` for a reset.
    pub fn new(system: System) -> Self {
        Self { system, saved: RESET }
    }

    /// The last POST code.
    pub fn post_code(&self) -> u8 {
        self.saved.post
    }
}

impl Device for SystemPorts {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, at: RegionId, _: u64, data: &mut [u8]) {
        match at {
            Self::POST => data.fill(self.saved.post),
            Self::CONTROL => data.fill(self.saved.control),
            _ => {}
        }
    }

    fn write(&mut self, at: RegionId, _: u64, data: &[u8]) {
        let Some(value) = data.first() else { return };
        match at {
            Self::POST => self.saved.post = *value,
            Self::CONTROL => {
                let rose = value & !self.saved.control & FAST_RESET != 0;
                self.saved.control = *value & (FAST_RESET | FAST_A20);
                if rose {
                    self.system.request(SystemRequest::Reset);
                }
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.saved = RESET;
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
    fn fast_reset_needs_a_rising_bit() {
        let seen: Arc<Mutex<Vec<SystemRequest>>> = Arc::default();
        let s = seen.clone();
        let mut d = SystemPorts::new(System::new(move |r| s.lock().unwrap().push(r)));
        let mut b = [0];
        d.read(SystemPorts::CONTROL, 0, &mut b);
        assert_eq!(b, [2]);
        d.write(SystemPorts::CONTROL, 0, &[2]);
        assert_eq!(seen.lock().unwrap().len(), 0);
        d.write(SystemPorts::CONTROL, 0, &[3]);
        d.write(SystemPorts::CONTROL, 0, &[3]);
        assert_eq!(*seen.lock().unwrap(), [SystemRequest::Reset]);
        d.write(SystemPorts::POST, 0, &[0x55]);
        assert_eq!(d.post_code(), 0x55);
    }
}
