//! Display devices: what they publish is a [`display::Console`].

pub mod edid;
mod rom;
#[cfg(test)]
mod testing;
pub mod vga;

pub use rom::OptionRom;
pub(crate) use vga::{pack, unpack};
