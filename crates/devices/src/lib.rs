//! Device models, one file each. What they plug into is the `bus` crate's; who builds them is the `machine`'s.

pub mod chipset;
mod model;
pub mod virtio;

pub use model::{CreateError, CreateVirtio, IsaDevice, Kind, Model, Parts, find_model, models};
