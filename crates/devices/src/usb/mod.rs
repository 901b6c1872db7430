//! USB: the xHCI host controller, and devices to plug into it.

mod descriptor;
mod device;
mod hid;
mod hub;
mod topology;
pub mod xhci;

pub use device::{Outcome, Setup, Speed, UsbDevice, Waker};
pub use hid::{KEYBOARD, MOUSE, TABLET};
pub use hub::HUB;
pub use topology::UsbBus;
