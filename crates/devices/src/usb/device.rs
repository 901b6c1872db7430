//! What a USB device is.

use bus::{State, StateError};
use std::sync::Arc;

/// Speed of a device, with the number by which xHCI knows it (xHCI 1.2, 7.2.2.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speed {
    /// 12 Mbit/s.
    Full = 1,
    /// 480 Mbit/s.
    High = 3,
}

/// A setup packet (USB 2.0, 9.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// bmRequestType and bRequest.
    pub request: u16,
    /// wValue.
    pub value: u16,
    /// wIndex.
    pub index: u16,
    /// wLength.
    pub length: u16,
}

impl Setup {
    /// From the eight bytes.
    pub fn parse(raw: [u8; 8]) -> Self {
        let word = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        Self {
            request: u16::from(raw[0]) << 8 | u16::from(raw[1]),
            value: word(2),
            index: word(4),
            length: word(6),
        }
    }

    /// Whether data flows to the host.
    pub fn is_in(&self) -> bool {
        self.request & 0x8000 != 0
    }
}

/// What became of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// So many bytes were moved.
    Done(usize),
    /// Nothing now; the device wakes the controller when it has something.
    Nak,
    /// The endpoint refuses.
    Stall,
}

/// Makes the controller try again what was answered with [`Outcome::Nak`]. Not to be called under a lock that the
/// device takes in its methods.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// A USB device.
///
/// Its methods are called under the controller's lock, on vCPU threads mostly: they must not block.
pub trait UsbDevice: Send {
    /// Model, `usb-tablet`.
    fn name(&self) -> &'static str;
    /// Speed at which it is attached.
    fn speed(&self) -> Speed;
    /// It has been plugged in: the way to wake the controller.
    fn attach(&mut self, waker: Waker);
    /// A reset of its port: back to the default state.
    fn reset(&mut self);
    /// A transfer on the control pipe. For IN, the answer is put into `data` (longer than asked for is cut); for OUT,
    /// `data` is what the host sent.
    fn control(&mut self, setup: Setup, data: &mut Vec<u8>) -> Outcome;
    /// Wants to send at most `most` bytes to the host through endpoint `number`.
    fn send(&mut self, number: u8, most: usize, data: &mut Vec<u8>) -> Outcome;
    /// Receives bytes through endpoint `number`.
    fn receive(&mut self, number: u8, data: &[u8]) -> Outcome;
    /// For hubs: what is plugged into a port (from 1 up).
    fn child(&mut self, _port: u8) -> Option<&mut Box<dyn UsbDevice>> {
        None
    }
    /// For hubs: plugs a device into a port (0: the first free one). Gives it back if it does not fit.
    ///
    /// # Errors
    /// The device, where there is no such port or it is taken.
    fn plug(&mut self, _port: u8, device: Box<dyn UsbDevice>) -> Result<(), Box<dyn UsbDevice>> {
        Err(device)
    }
    /// For hubs: whether a port is free.
    fn has_room(&self) -> bool {
        false
    }
    /// Guest-visible state.
    ///
    /// # Errors
    /// A state that cannot be saved now.
    fn save(&self) -> Result<State, StateError>;
    /// Restores [`Self::save`].
    ///
    /// # Errors
    /// A state that does not fit.
    fn load(&mut self, state: State) -> Result<(), StateError>;
}
