//! What devices ask of the machine as a whole.

use std::fmt;
use std::sync::Arc;

/// A request that concerns the whole machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SystemRequest {
    /// Power off (ACPI S5).
    PowerOff,
    /// Reset (keyboard controller, port 0xcf9, ACPI reset register).
    Reset,
    /// The guest says that it panicked (pvpanic).
    GuestPanicked,
    /// A watchdog ran out.
    Watchdog,
    /// End with this exit status (isa-debug-exit).
    Exit(u8),
    /// Stop the machine: an error of the host on a drive (its name), whose command is tried again when the machine goes on.
    IoError(String),
    /// Tell monitors: an event's name in QMP (`BALLOON_CHANGE`), and its data.
    Notice(&'static str, serde_json::Value),
}

/// Handle through which devices send [`SystemRequest`]s; never blocks.
#[derive(Clone)]
pub struct System(Arc<dyn Fn(SystemRequest) + Send + Sync>);

impl System {
    /// A handle that calls `f`.
    pub fn new(f: impl Fn(SystemRequest) + Send + Sync + 'static) -> Self {
        Self(Arc::new(f))
    }

    /// Sends a request.
    pub fn request(&self, request: SystemRequest) {
        (self.0)(request);
    }
}

impl fmt::Debug for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("System")
    }
}
