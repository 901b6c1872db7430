//! Why a vCPU stopped running.

/// Why [`crate::Vcpu::run`] returned. Port, memory and MSR accesses do not: they are served through
/// [`crate::CpuIo`] while the vCPU runs, and HLT waits inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The kicker was used; the caller looks at what it wanted.
    Kicked,
    /// Triple fault (or, on KVM, a shutdown exit): a PC resets.
    Shutdown,
    /// The hypervisor interface was asked for something, such as a KVM system event.
    SystemEvent(SystemEvent),
    /// The accelerator cannot go on; the text holds the reason and a register dump.
    InternalError(String),
    /// A debug stop (breakpoint or single step) that the debugger asked for.
    Debug(DebugExit),
}

/// A system-wide event reported by an accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemEvent {
    /// The guest asked to power off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest says that it crashed.
    Crash,
}

/// Where and why a debugger's stop happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugExit {
    /// Linear address of the instruction.
    pub pc: u64,
    /// DR6 as it would have been for the guest.
    pub dr6: u64,
    /// Vector: 1 for debug exceptions, 3 for INT3.
    pub vector: u8,
}
