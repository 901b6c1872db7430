//! A vCPU without a machine around it: a local APIC that never interrupts, and ports that stop the run.

use accel::{Accel, CpuIo, CpuSignals, Kicker, LocalApic, MsrFault, Slot, Vcpu, VcpuConfig, Vm};
use memory::{Backing, GuestMemory, Region};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Value of [`Ports::last`] before any port was written.
pub const NONE: u32 = u32::MAX;

/// Ports: the first write ends the run.
pub struct Ports {
    last: AtomicU32,
    kicker: Kicker,
}

impl Ports {
    /// Forgets the last port.
    pub fn clear(&self) {
        self.last.store(NONE, Ordering::Relaxed);
    }

    /// The port written last, or [`NONE`].
    pub fn last(&self) -> u32 {
        self.last.load(Ordering::Relaxed)
    }
}

impl CpuIo for Ports {
    fn port_in(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn port_out(&self, port: u16, _data: &[u8]) {
        self.last.store(u32::from(port), Ordering::Relaxed);
        self.kicker.kick();
    }

    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
}

/// A local APIC that never interrupts.
struct Silent;

impl LocalApic for Silent {
    fn has_interrupt(&self) -> bool {
        false
    }
    fn acknowledge(&self) -> Option<u8> {
        None
    }
    fn base(&self) -> u64 {
        0xfee0_0900
    }
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
    fn read_msr(&self, _msr: u32) -> Result<u64, MsrFault> {
        Ok(self.base())
    }
    fn write_msr(&self, _msr: u32, _value: u64) -> Result<(), MsrFault> {
        Ok(())
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _value: u8) {}
    fn set_tsc_offset(&self, _offset: u64) {}
    fn init(&self) {}
    fn save(&self) -> Vec<u8> {
        vec![0; 1024]
    }
    fn load(&self, _page: &[u8]) -> accel::Result<()> {
        Ok(())
    }
}

/// A VM with one vCPU and `ram` bytes of RAM at address 0.
pub struct Bare {
    pub memory: GuestMemory,
    pub vcpu: Box<dyn Vcpu>,
    pub ports: Ports,
    _vm: Arc<dyn Vm>,
}

impl Bare {
    pub fn new(ram: u64, spec: softcpu::SoftSpec) -> Self {
        let soft = softcpu::SoftAccel::new(spec).unwrap();
        let vm = soft.create_vm().unwrap();
        let region = Region::new(0, ram, &Backing::Anonymous, false).unwrap();
        let memory = GuestMemory::from_regions(vec![region.clone()]);
        vm.map(Slot { gpa: 0, len: ram, region, offset: 0, readonly: false }).unwrap();
        let config = VcpuConfig {
            index: 0,
            apic_id: 0,
            cpuid: soft.supported_cpuid().unwrap(),
            signals: Arc::new(CpuSignals::new()),
            apic: Some(Arc::new(Silent)),
        };
        let vcpu = vm.vcpu(config).unwrap();
        let ports = Ports { last: AtomicU32::new(NONE), kicker: vcpu.kicker() };
        Self { memory, vcpu, ports, _vm: vm }
    }
}
