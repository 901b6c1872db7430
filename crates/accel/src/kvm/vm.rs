//! A KVM virtual machine.

use super::doorbell::KvmDoorbells;
use super::irq::Routes;
use super::slots::Slots;
use super::stats::{self, Counters};
use super::vcpu::KvmVcpu;
use super::{chips, host, msrs};
use crate::{Doorbells, Error, Irqs, Result, Slot, SlotId, Vcpu, VcpuConfig, Vm};
use kvm_bindings::{
    KVM_CAP_X2APIC_API, KVM_PIT_SPEAKER_DUMMY, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// First guest physical address that KVM needs for itself on Intel processors: a page table that maps itself, and
/// three pages of a TSS for real mode. Boards put nothing between here and [`RESERVED_END`].
pub const RESERVED_START: u64 = 0xfeff_c000;
/// End of the range that starts at [`RESERVED_START`].
pub const RESERVED_END: u64 = 0xff00_0000;

/// What the VM, its vCPUs and its irqfds share. It goes when the last of them goes, and the guest's memory with it.
pub(super) struct Inner {
    // First, so that the descriptor is closed before memory goes.
    fd: VmFd,
    kvm: Arc<Kvm>,
    slots: Mutex<Slots>,
    routes: Mutex<Routes>,
    counters: Mutex<Vec<Arc<Counters>>>,
    xsave_size: OnceLock<usize>,
    msrs: OnceLock<Vec<u32>>,
}

impl Inner {
    pub(super) fn fd(&self) -> &VmFd {
        &self.fd
    }

    pub(super) fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Counters for one more vCPU.
    pub(super) fn add_counters(&self) -> Arc<Counters> {
        let counters = Arc::new(Counters::default());
        self.counters.lock().unwrap_or_else(|e| e.into_inner()).push(counters.clone());
        counters
    }

    /// Size of a vCPU's XSAVE area in bytes, 0 where the kernel is too old to say (it is a page then).
    pub(super) fn xsave_size(&self) -> usize {
        let ask = || usize::try_from(self.fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        *self.xsave_size.get_or_init(ask)
    }

    /// Whether the host has XCR0.
    pub(super) fn has_xcrs(&self) -> bool {
        self.fd.check_extension(Cap::Xcrs)
    }

    /// The MSRs that belong to a saved state, those that `vcpu` really has.
    pub(super) fn msrs(&self, vcpu: &VcpuFd) -> Result<&[u32]> {
        if let Some(known) = self.msrs.get() {
            return Ok(known);
        }
        let list = msrs::list(&self.kvm, vcpu)?;
        Ok(self.msrs.get_or_init(|| list))
    }
}

/// A virtual machine on KVM, with the interrupt controllers and the timer in the kernel.
///
/// Interrupt inputs are routed as KVM does by itself: GSI n is IOAPIC pin n (also for the timer, GSI 0: there is no
/// interrupt source override to pin 2), and below 16 also input n of the 8259 pair.
pub(super) struct KvmVm(Arc<Inner>);

impl KvmVm {
    pub(super) fn new(kvm: Arc<Kvm>, fd: VmFd) -> Result<Self> {
        // Only Intel processors that cannot run real mode natively use these, but they have to be set before any
        // vCPU is there, and cost next to nothing.
        fd.set_identity_map_address(RESERVED_START).map_err(host("cannot set KVM's identity map address"))?;
        fd.set_tss_address(RESERVED_START as usize + 0x1000).map_err(host("cannot set KVM's TSS address"))?;
        // APIC IDs above 254, and 0xff meaning a processor of that ID in x2APIC mode.
        let x2apic = kvm_enable_cap {
            cap: KVM_CAP_X2APIC_API,
            args: [u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK), 0, 0, 0],
            ..Default::default()
        };
        fd.enable_cap(&x2apic).map_err(host("cannot enable KVM's 32-bit APIC IDs"))?;
        fd.create_irq_chip().map_err(host("cannot create KVM's interrupt controllers"))?;
        // With the port of the speaker's gate (0x61), which guests use to calibrate with channel 2.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(host("cannot create KVM's timer (8254)"))?;
        Ok(Self(Arc::new(Inner {
            fd,
            kvm,
            slots: Mutex::default(),
            routes: Mutex::default(),
            counters: Mutex::default(),
            xsave_size: OnceLock::new(),
            msrs: OnceLock::new(),
        })))
    }
}

impl Vm for KvmVm {
    fn vcpu(&self, config: VcpuConfig) -> Result<Box<dyn Vcpu>> {
        if config.index == 0 && config.apic_id != 0 {
            return Err(Error::Unsupported(format!(
                "a bootstrap processor with APIC ID {}: with KVM it has ID 0",
                config.apic_id
            )));
        }
        Ok(Box::new(KvmVcpu::new(self.0.clone(), &config)?))
    }

    fn map(&self, slot: Slot) -> Result<SlotId> {
        self.0.slots().map(&self.0.fd, slot)
    }

    fn unmap(&self, slot: SlotId) -> Result<()> {
        self.0.slots().unmap(&self.0.fd, slot)
    }

    fn take_dirty(&self, slot: SlotId, page: &mut dyn FnMut(u64)) -> Result<()> {
        self.0.slots().take_dirty(&self.0.fd, slot, page)
    }

    fn set_dirty_log(&self, slot: SlotId, on: bool) -> Result<()> {
        self.0.slots().set_dirty_log(&self.0.fd, slot, on)
    }

    fn irqs(&self) -> Option<Arc<dyn Irqs>> {
        Some(self.0.clone())
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        Some(Arc::new(KvmDoorbells(self.0.clone())))
    }

    fn save(&self) -> Result<Vec<u8>> {
        chips::save(&self.0.fd)
    }

    fn load(&self, state: &[u8]) -> Result<()> {
        chips::load(&self.0.fd, state)
    }

    fn stats(&self) -> Vec<(String, u64)> {
        let counters = self.0.counters.lock().unwrap_or_else(|e| e.into_inner());
        stats::sum(counters.iter().map(|c| &**c))
    }
}
