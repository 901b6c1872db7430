//! The accelerator's traits.

use crate::{CpuSignals, CpuState, Cpuid, Doorbells, Exit, Irqs, LocalApic, Result};
use memory::Region;
use std::sync::Arc;

/// An accelerator: something that can run virtual machines on this host.
pub trait Accel: Send + Sync {
    /// Short name: `kvm` or `soft`.
    fn name(&self) -> &'static str;
    /// The CPUID of a vCPU with every feature that this accelerator can give a guest on this host (KVM's
    /// "supported CPUID"; the software CPU's own). Topology and APIC IDs are not filled in.
    ///
    /// # Errors
    /// The host's refusal.
    fn supported_cpuid(&self) -> Result<Cpuid>;
    /// Most vCPUs a VM may have.
    fn max_vcpus(&self) -> u32;
    /// A new VM without memory or vCPUs.
    ///
    /// # Errors
    /// The host's refusal.
    fn create_vm(&self) -> Result<Arc<dyn Vm>>;
}

/// Memory to show the guest.
#[derive(Clone, Debug)]
pub struct Slot {
    /// First guest physical address (page-aligned). It may differ from `region.start` for an alias.
    pub gpa: u64,
    /// Length in bytes (page-aligned).
    pub len: u64,
    /// The memory.
    pub region: Region,
    /// Where the slot starts in the region, in bytes (page-aligned).
    pub offset: u64,
    /// Guest writes go to [`CpuIo::mmio_write`] instead (ROM, flash).
    pub readonly: bool,
}

/// Names a slot of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SlotId(pub u32);

/// A virtual machine: memory, interrupt controllers where the accelerator has them, vCPUs.
pub trait Vm: Send + Sync {
    /// Creates vCPU `config.index`. Each index once.
    ///
    /// # Errors
    /// The host's refusal, or a configuration the accelerator cannot serve.
    fn vcpu(&self, config: VcpuConfig) -> Result<Box<dyn Vcpu>>;
    /// Shows memory to the guest. Slots must not overlap.
    ///
    /// # Errors
    /// Overlap, misalignment, or the host's refusal.
    fn map(&self, slot: Slot) -> Result<SlotId>;
    /// Takes memory away from the guest. On return no vCPU accesses it any more.
    ///
    /// # Errors
    /// No such slot.
    fn unmap(&self, slot: SlotId) -> Result<()>;
    /// Calls `page` with each page index of the slot written by *vCPUs* since the log was turned on or last taken.
    /// For the software CPU they are in the region's [`memory::PageTracker`] already, and nothing is called.
    ///
    /// # Errors
    /// No such slot, or the log is off.
    fn take_dirty(&self, slot: SlotId, page: &mut dyn FnMut(u64)) -> Result<()>;
    /// The pages of the slot written by anyone since the last call: what [`Self::take_dirty`] and the region's
    /// tracker know, taken at once. For logs that are taken often (video memory): costs little where little was
    /// written.
    ///
    /// # Errors
    /// No such slot, or the log is off.
    fn take_written(&self, slot: SlotId, region: &Region, page: &mut dyn FnMut(u64)) -> Result<()> {
        region.tracker.take_dirty(&mut *page);
        self.take_dirty(slot, page)
    }
    /// Turns the dirty log of a slot on or off.
    ///
    /// # Errors
    /// No such slot, or the host's refusal.
    fn set_dirty_log(&self, slot: SlotId, on: bool) -> Result<()>;
    /// The accelerator's own interrupt controllers (PIC, IOAPIC, local APICs, PIT), if it has them. Otherwise the
    /// machine provides devices for them and gives each vCPU a [`LocalApic`].
    fn irqs(&self) -> Option<Arc<dyn Irqs>>;
    /// Kernel shortcuts, where there are any.
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        None
    }
    /// State of the accelerator's interrupt controllers and clock (opaque, serialised), for saving a VM.
    ///
    /// # Errors
    /// The host's refusal.
    fn save(&self) -> Result<Vec<u8>>;
    /// Restores [`Self::save`].
    ///
    /// # Errors
    /// A state of another accelerator or version, or the host's refusal.
    fn load(&self, state: &[u8]) -> Result<()>;
    /// Exit and execution counters by name, summed over the vCPUs, for `--stats`.
    fn stats(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}

/// What a vCPU is made with.
#[derive(Clone)]
pub struct VcpuConfig {
    /// Number of the vCPU, 0 first (the bootstrap processor).
    pub index: u32,
    /// Initial APIC ID (x2APIC width).
    pub apic_id: u32,
    /// CPUID as the guest is to see it; topology and APIC IDs filled in.
    pub cpuid: Cpuid,
    /// Mailbox of the vCPU (software CPU).
    pub signals: Arc<CpuSignals>,
    /// Local APIC; required where [`Vm::irqs`] is `None`.
    pub apic: Option<Arc<dyn LocalApic>>,
}

/// A vCPU. Created on any thread; `run` is called by one thread, the vCPU's own.
///
/// After creation the state is that of a processor after RESET: the bootstrap processor starts at the reset vector,
/// the others wait for INIT and SIPI.
pub trait Vcpu: Send {
    /// Runs the guest until there is a reason to stop. HLT and waiting for SIPI sleep inside.
    ///
    /// # Errors
    /// The host failed; the VM cannot go on.
    fn run(&mut self, io: &dyn CpuIo) -> Result<Exit>;
    /// Architectural state, at an instruction boundary. Only while `run` is not active.
    ///
    /// # Errors
    /// The host's refusal.
    fn save(&mut self) -> Result<CpuState>;
    /// Loads an architectural state. Only while `run` is not active.
    ///
    /// # Errors
    /// A state that this accelerator or host cannot take; the vCPU is then unusable until a good load.
    fn load(&mut self, state: &CpuState) -> Result<()>;
    /// As [`Self::save`], but only what is cheap to get is filled in: general registers, RIP, RFLAGS, segments,
    /// tables, control registers, EFER and the APIC base. For boot loaders and debuggers.
    ///
    /// # Errors
    /// The host's refusal.
    fn save_registers(&mut self) -> Result<CpuState> {
        self.save()
    }
    /// Loads general registers, RIP, RFLAGS, segments, tables, CR0, CR2, CR3, CR4 and EFER of `state`, and the MSRs
    /// it lists, in order; everything else stays as it is.
    ///
    /// # Errors
    /// As for [`Self::load`].
    fn load_registers(&mut self, state: &CpuState) -> Result<()> {
        let mut full = self.save()?;
        full.gpr = state.gpr;
        full.rip = state.rip;
        full.rflags = state.rflags;
        full.segments = state.segments;
        full.ldtr = state.ldtr;
        full.tr = state.tr;
        full.gdtr = state.gdtr;
        full.idtr = state.idtr;
        (full.cr0, full.cr2, full.cr3, full.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
        full.efer = state.efer;
        full.msrs.retain(|(index, _)| state.msrs.iter().all(|(other, _)| other != index));
        full.msrs.extend_from_slice(&state.msrs);
        self.load(&full)
    }
    /// Sets what a debugger outside the guest wants; the default is nothing. Only while `run` is not active.
    ///
    /// # Errors
    /// The accelerator or the host cannot do it.
    fn set_debug(&mut self, debug: &GuestDebug) -> Result<()> {
        if *debug == GuestDebug::default() {
            return Ok(());
        }
        Err(crate::Error::Unsupported("this accelerator has no support for debuggers".into()))
    }
    /// A handle with which any thread makes [`Self::run`] return soon (now, or at its next call).
    fn kicker(&self) -> Kicker;
}

/// What a hardware breakpoint waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakKind {
    /// Execution.
    Execute,
    /// A write.
    Write,
    /// A read or a write.
    Access,
}

/// A hardware breakpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HardwareBreak {
    /// Linear address, aligned to the length.
    pub address: u64,
    /// What it waits for.
    pub kind: BreakKind,
    /// Bytes: 1, 2, 4 or 8; 1 for execution.
    pub len: u8,
}

impl HardwareBreak {
    /// The bits of DR7 that make breakpoint `n` of it (Intel SDM volume 3, 18.2.4).
    pub fn dr7(&self, n: usize) -> u64 {
        let kind = match self.kind {
            BreakKind::Execute => 0,
            BreakKind::Write => 1,
            BreakKind::Access => 3,
        };
        let len = match self.len {
            2 => 1,
            4 => 3,
            8 => 2,
            _ => 0,
        };
        2 << (2 * n) | (kind | len << 2) << (16 + 4 * n)
    }
}

/// What a debugger outside the guest wants of a vCPU. Stops are [`Exit::Debug`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestDebug {
    /// Stop after one instruction; interrupts wait meanwhile.
    pub single_step: bool,
    /// Linear addresses where the debugger has written INT3: they stop, instead of reaching the guest.
    pub software: Vec<u64>,
    /// Breakpoints of the processor, at most four; the guest's own do nothing while there are any.
    pub hardware: Vec<HardwareBreak>,
}

/// Makes a vCPU leave [`Vcpu::run`].
#[derive(Clone)]
pub struct Kicker(Arc<dyn Fn() + Send + Sync>);

impl Kicker {
    /// A kicker that calls `f`.
    pub fn new(f: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(f))
    }

    /// Kicks.
    pub fn kick(&self) {
        (self.0)();
    }
}

impl std::fmt::Debug for Kicker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kicker")
    }
}

/// The world outside the CPU: ports and memory-mapped registers. Accesses are 1, 2, 4 or 8 bytes (ports: at most
/// 4). There is no failure: what nobody answers reads as ones and ignores writes, as a PC does.
pub trait CpuIo: Send + Sync {
    /// IN.
    fn port_in(&self, port: u16, data: &mut [u8]);
    /// OUT.
    fn port_out(&self, port: u16, data: &[u8]);
    /// A read of a guest physical address that is not RAM.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// A write to a guest physical address that is not RAM, or is read-only.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
}
