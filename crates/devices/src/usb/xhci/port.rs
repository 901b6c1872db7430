//! Root hub ports (xHCI 1.2, 5.4.8).

use crate::usb::Speed;
use serde::{Deserialize, Serialize};

const CONNECTED: u32 = 1 << 0;
const ENABLED: u32 = 1 << 1;
const RESET: u32 = 1 << 4;
const LINK_SHIFT: u32 = 5;
const LINK: u32 = 0xf << LINK_SHIFT;
const POWER: u32 = 1 << 9;
const SPEED_SHIFT: u32 = 10;
const SPEED: u32 = 0xf << SPEED_SHIFT;
const LINK_WRITE: u32 = 1 << 16;
const CONNECT_CHANGE: u32 = 1 << 17;
const RESET_CHANGE: u32 = 1 << 21;
const LINK_CHANGE: u32 = 1 << 22;
/// Change bits: written as one to clear.
const CHANGES: u32 = 0x7f << 17;
/// Bits that software sets as it likes: wake-up enables, indicator.
const PLAIN: u32 = 7 << 25 | 3 << 14;

const U0: u32 = 0;
const U3: u32 = 3;
const RX_DETECT: u32 = 5;
const POLLING: u32 = 7;
const RESUME: u32 = 15;

/// A port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Port {
    status: u32,
    usb2: bool,
}

/// What a write asks of the device at the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PortAction {
    Nothing,
    Reset,
    Changed,
}

impl Port {
    pub(super) fn new(usb2: bool) -> Self {
        Self { status: POWER | RX_DETECT << LINK_SHIFT, usb2 }
    }

    /// A device is there.
    pub(super) fn connect(&mut self, speed: Speed) {
        let link = if self.usb2 { POLLING } else { U0 };
        self.status = self.status & !(LINK | SPEED)
            | CONNECTED
            | CONNECT_CHANGE
            | link << LINK_SHIFT
            | (speed as u32) << SPEED_SHIFT;
    }

    pub(super) fn read(&self) -> u32 {
        self.status
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.status & ENABLED != 0
    }

    pub(super) fn write(&mut self, value: u32) -> PortAction {
        let connected = self.status & CONNECTED != 0;
        self.status &= !(value & CHANGES);
        self.status = self.status & !PLAIN | value & PLAIN;
        if value & POWER == 0 {
            self.status &= !(POWER | ENABLED);
            return PortAction::Nothing;
        }
        self.status |= POWER;
        // Warm reset (bit 31) is USB 3's.
        if value & RESET != 0 || value >> 31 != 0 && !self.usb2 {
            if !connected {
                return PortAction::Nothing;
            }
            self.status = self.status & !LINK | ENABLED | RESET_CHANGE | U0 << LINK_SHIFT;
            return PortAction::Reset;
        }
        if value & ENABLED != 0 {
            self.status &= !ENABLED;
        }
        if value & LINK_WRITE != 0 && connected {
            match (value & LINK) >> LINK_SHIFT {
                U3 => self.status = self.status & !LINK | U3 << LINK_SHIFT,
                wanted @ (U0 | RESUME) => {
                    let before = (self.status & LINK) >> LINK_SHIFT;
                    let new = if wanted == U0 { U0 } else { RESUME };
                    self.status = self.status & !LINK | new << LINK_SHIFT;
                    if new == U0 && before != U0 {
                        self.status |= LINK_CHANGE;
                        return PortAction::Changed;
                    }
                }
                _ => {}
            }
        }
        PortAction::Nothing
    }
}
