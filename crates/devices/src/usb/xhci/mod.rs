//! The eXtensible Host Controller (xHCI 1.2), QEMU's `qemu-xhci`.

mod command;
mod core;
mod memory;
mod pci;
mod port;
mod registers;
mod transfer;

pub(super) use self::core::Core;
pub use pci::MODEL;
