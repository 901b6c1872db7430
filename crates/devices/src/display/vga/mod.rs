//! The standard VGA: IBM's VGA with the Bochs VBE extensions, on PCI (QEMU's `VGA`).

mod core;
mod draw;
mod legacy;
mod pci;
mod post;
mod source;
#[cfg(test)]
mod tests;
mod vbe;

pub use self::core::{Ports, Vga};
pub use pci::MODEL;
pub(crate) use pci::{pack, unpack};
use source::VgaSource;
