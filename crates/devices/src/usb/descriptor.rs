//! Descriptors, and the requests that every device answers the same way (USB 2.0, 9.4 to 9.6).

use super::{Outcome, Setup};
use serde::{Deserialize, Serialize};

/// Descriptors of a device with one configuration.
pub(super) struct Descriptors {
    pub(super) device: [u8; 18],
    /// The configuration with everything in it.
    pub(super) configuration: Vec<u8>,
    /// Strings from number 1 on.
    pub(super) strings: Vec<&'static str>,
    /// High-speed devices say how they would be at full speed.
    pub(super) qualifier: bool,
}

/// The state that the standard requests change.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Standard {
    pub(super) configuration: u8,
    pub(super) remote_wakeup: bool,
    /// Halted endpoints, by address: IN in the upper half.
    pub(super) halted: u32,
}

fn halt_bit(index: u16) -> u32 {
    1 << (u32::from(index & 0xf) + if index & 0x80 != 0 { 16 } else { 0 })
}

/// A device descriptor.
pub(super) fn device(class: u8, high_speed: bool, product: u16) -> [u8; 18] {
    let [p0, p1] = product.to_le_bytes();
    // The vendor is the one that QEMU's devices have; drivers know the classes.
    [
        18,
        1,
        0,
        2,
        class,
        0,
        if class == 9 && high_speed { 1 } else { 0 },
        64,
        0x27,
        0x06,
        p0,
        p1,
        0,
        0,
        1,
        2,
        3,
        1,
    ]
}

/// A configuration of one interface.
pub(super) fn configuration(
    attributes: u8,
    interface: [u8; 3],
    class: &[u8],
    endpoints: &[[u8; 7]],
) -> Vec<u8> {
    let mut out = vec![9, 2, 0, 0, 1, 1, 0, attributes, 50];
    out.extend([9, 4, 0, 0, endpoints.len() as u8, interface[0], interface[1], interface[2], 0]);
    out.extend_from_slice(class);
    endpoints.iter().for_each(|e| out.extend_from_slice(e));
    let length = out.len() as u16; // a few dozen bytes
    out[2..4].copy_from_slice(&length.to_le_bytes());
    out
}

impl Standard {
    /// Answers a standard request to the device or an endpoint; `None` if it is none of these.
    pub(super) fn control(&mut self, d: &Descriptors, setup: Setup, data: &mut Vec<u8>) -> Option<Outcome> {
        let done = Some(Outcome::Done(0));
        let mut answer = |bytes: &[u8]| {
            data.clear();
            data.extend_from_slice(&bytes[..bytes.len().min(setup.length.into())]);
            Some(Outcome::Done(data.len()))
        };
        match setup.request {
            0x8006 => match (setup.value >> 8, (setup.value & 0xff) as usize) {
                (1, _) => answer(&d.device),
                (2, 0) => answer(&d.configuration),
                (3, 0) => answer(&[4, 3, 9, 4]),
                (3, n) => match d.strings.get(n - 1) {
                    Some(text) => {
                        let mut out = vec![(2 + 2 * text.len()) as u8, 3]; // short ASCII
                        out.extend(text.bytes().flat_map(|b| [b, 0]));
                        answer(&out)
                    }
                    None => Some(Outcome::Stall),
                },
                (6, _) if d.qualifier => {
                    let q = [10, 6, 0, 2, d.device[4], d.device[5], d.device[6], 64, 1, 0];
                    answer(&q)
                }
                (7, 0) if d.qualifier => {
                    let mut other = d.configuration.clone();
                    other[1] = 7;
                    answer(&other)
                }
                _ => Some(Outcome::Stall),
            },
            0x8000 => answer(&[u8::from(self.remote_wakeup) << 1, 0]),
            0x8100 => answer(&[0, 0]),
            0x8200 => answer(&[u8::from(self.halted & halt_bit(setup.index) != 0), 0]),
            0x8008 => answer(&[self.configuration]),
            0x810a => answer(&[0]),
            0x0005 => done, // the controller gives the address
            0x0009 => match setup.value {
                0 | 1 => {
                    self.configuration = setup.value as u8;
                    self.halted = 0;
                    done
                }
                _ => Some(Outcome::Stall),
            },
            0x010b => {
                if setup.value == 0 {
                    done
                } else {
                    Some(Outcome::Stall)
                }
            }
            0x0001 | 0x0003 if setup.value == 1 => {
                self.remote_wakeup = setup.request == 3;
                done
            }
            0x0201 | 0x0203 if setup.value == 0 => {
                let bit = halt_bit(setup.index);
                if setup.request == 0x0203 {
                    self.halted |= bit
                } else {
                    self.halted &= !bit
                }
                done
            }
            _ => None,
        }
    }

    /// Whether an endpoint is halted; `address` as in its descriptor.
    pub(super) fn is_halted(&self, address: u8) -> bool {
        self.halted & halt_bit(address.into()) != 0
    }
}
