//! Device models, one file each. What they plug into is the `bus` crate's; who builds them is the `machine`'s.

pub mod chipset;
pub mod display;
mod model;
mod place;
pub mod storage;
pub mod usb;
pub mod virtio;

pub use model::{
    Cable, CreateChild, CreateError, CreateVirtio, IsaDevice, Kind, Model, Parts, find_model, models,
};
pub use place::{BootClass, ChildBus, PciDevice, PciPlace, PlaceSpec};
