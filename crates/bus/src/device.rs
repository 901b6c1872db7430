//! What every device is.

use crate::{State, StateError};
use std::sync::{Arc, Mutex};

/// Which of a device's regions is accessed; the numbers are the device's own (for PCI functions: the BAR).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RegionId(pub u32);

/// A device shared between the bus, its owner and its own threads.
pub type SharedDevice = Arc<Mutex<dyn Device>>;

/// Wraps a device for sharing.
pub fn shared<D: Device + 'static>(device: D) -> Arc<Mutex<D>> {
    Arc::new(Mutex::new(device))
}

/// A device model.
///
/// # Lifecycle
/// Created paused and reset. The machine calls `start` before vCPUs run, and `pause` after they have stopped.
/// Between a `pause` that returned and the next `start` the device is quiescent: it neither touches guest memory nor
/// raises interrupts, and `save`, `load` and `reset` may be called. `reset` may also be called while the guest runs
/// (a guest-triggered device reset); it then returns with the device idle but still started. Accesses may arrive at
/// any time, in any order, with any value: guests are hostile.
pub trait Device: Send {
    /// Name for logs and saved state: the model's, `i8042`, `virtio-blk`.
    fn name(&self) -> &str;
    /// Guest read of `data.len()` (1, 2, 4 or 8) bytes at `offset` of region `at`. `data` arrives filled with 0xff,
    /// what a bus without an answer reads as; the device overwrites what it drives.
    fn read(&mut self, at: RegionId, offset: u64, data: &mut [u8]);
    /// Guest write of `data` (1, 2, 4 or 8 bytes).
    fn write(&mut self, at: RegionId, offset: u64, data: &[u8]);
    /// Begins to work.
    ///
    /// # Errors
    /// A thread or descriptor that the host does not give.
    fn start(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    /// Stops working; returns when quiescent.
    ///
    /// # Errors
    /// Outstanding work that cannot be finished or undone.
    fn pause(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    /// Back to the state after power-on.
    fn reset(&mut self);
    /// Guest-visible state.
    ///
    /// # Errors
    /// A state that cannot be saved now (the text says why).
    fn save(&self) -> Result<State, StateError>;
    /// Restores what [`Self::save`] gave, perhaps in another process.
    ///
    /// # Errors
    /// A state of another kind or version, or one that no device could have been in.
    fn load(&mut self, state: State) -> Result<(), StateError>;
    /// Appends the device's AML (ACPI specification, 20) to the DSDT's `\_SB` scope.
    fn acpi(&self, _out: &mut Vec<u8>) {}
}
