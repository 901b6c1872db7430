//! Interrupts between devices, controllers and vCPUs.

use crate::Result;
use base::EventFd;

/// The machine's interrupt inputs.
pub trait Irqs: Send + Sync {
    /// Sets the level of global system interrupt `gsi` (0..24: IOAPIC pin, and 8259 input below 16; 0 is the timer).
    fn set_line(&self, gsi: u32, level: bool);
    /// Delivers a message-signalled interrupt: `data` written to `address` (Intel SDM vol. 3, 11.11).
    fn msi(&self, address: u64, data: u32);
}

/// A place a guest can write to ring a doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoAddress {
    /// A port.
    Port(u16),
    /// A guest physical address.
    Mmio(u64),
}

/// Kernel shortcuts between guest and devices: ioeventfd and irqfd.
pub trait Doorbells: Send + Sync {
    /// Signals `fd` on every guest write of `len` bytes (0 = any length) at `at`, of `datamatch` if given, without
    /// leaving the kernel.
    ///
    /// # Errors
    /// The kernel's refusal (place taken, out of slots).
    fn attach(&self, at: IoAddress, len: u32, datamatch: Option<u64>, fd: &EventFd) -> Result<()>;
    /// Undoes [`Self::attach`], with the same arguments.
    ///
    /// # Errors
    /// Nothing was attached there.
    fn detach(&self, at: IoAddress, len: u32, datamatch: Option<u64>, fd: &EventFd) -> Result<()>;
    /// An interrupt that a signalled `fd` delivers, inside the kernel, as the message that is routed to it.
    ///
    /// For signals from outside the process (vhost, vhost-user, VFIO). A device in this process calls [`Irqs::msi`]
    /// instead: one system call as well, without a route, each change of which costs the kernel a grace period
    /// (milliseconds) while the guest sets up its vectors.
    ///
    /// # Errors
    /// Out of routes.
    fn irqfd(&self, fd: &EventFd) -> Result<Box<dyn IrqFd>>;
}

/// A message route of an irqfd; dropping it detaches.
pub trait IrqFd: Send + Sync {
    /// Sets (or with `None` masks) the message.
    ///
    /// # Errors
    /// The kernel's refusal.
    fn route(&self, message: Option<(u64, u32)>) -> Result<()>;
}

/// An MSR access that faults (#GP).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrFault;

/// A local APIC, as the software CPU sees it. (KVM has its own in the kernel.)
///
/// The APIC raises [`crate::Signal::INTERRUPT`] in the vCPU's [`crate::CpuSignals`] when there may be something new to
/// deliver, and NMI, INIT, SIPI, SMI directly. The signal is an event, not a level: a vCPU that clears it while it
/// cannot take interrupts asks [`Self::has_interrupt`] once it can.
pub trait LocalApic: Send + Sync {
    /// Whether an interrupt can be delivered now, as far as the APIC goes (priorities, 8259 through LINT0). The CPU
    /// adds its own conditions (RFLAGS.IF, shadows).
    fn has_interrupt(&self) -> bool;
    /// Acknowledges the highest-priority deliverable interrupt and returns its vector, if there still is one.
    fn acknowledge(&self) -> Option<u8>;
    /// IA32_APIC_BASE (Intel SDM vol. 3, 11.4.4).
    fn base(&self) -> u64;
    /// Reads `data.len()` bytes at `offset` (0..0x1000) of the xAPIC page.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` (0..0x1000) of the xAPIC page.
    fn write(&self, offset: u64, data: &[u8]);
    /// Reads IA32_APIC_BASE (0x1b), IA32_TSC_DEADLINE (0x6e0) or an x2APIC MSR (0x800..0x900).
    ///
    /// # Errors
    /// The access faults.
    fn read_msr(&self, msr: u32) -> std::result::Result<u64, MsrFault>;
    /// Writes IA32_APIC_BASE (0x1b), IA32_TSC_DEADLINE (0x6e0, in guest TSC ticks) or an x2APIC MSR.
    ///
    /// # Errors
    /// The access faults.
    fn write_msr(&self, msr: u32, value: u64) -> std::result::Result<(), MsrFault>;
    /// Task priority as CR8 shows it (0..16).
    fn cr8(&self) -> u8;
    /// Writes the task priority through CR8.
    fn set_cr8(&self, value: u8);
    /// The guest's TSC is the host's plus this offset; told by the CPU when it changes, for TSC-deadline timers.
    fn set_tsc_offset(&self, offset: u64);
    /// INIT: everything but the APIC ID and base goes to its reset value.
    fn init(&self);
    /// Register page as KVM_GET_LAPIC lays it out.
    fn save(&self) -> Vec<u8>;
    /// Sets IA32_APIC_BASE to a saved value, without the checks that a guest's write undergoes. Comes before
    /// [`Self::load`].
    fn load_base(&self, value: u64) {
        let _ = self.write_msr(0x1b, value); // an APIC without checks of its own
    }
    /// Restores [`Self::save`] and re-arms the timer (IA32_TSC_DEADLINE is written after it).
    ///
    /// # Errors
    /// The page has the wrong length.
    fn load(&self, page: &[u8]) -> Result<()>;
}
