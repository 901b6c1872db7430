//! A KVM vCPU: the run loop.

use super::kick::{self, Kick};
use super::run::{MmioAccess, PortAccess, Runner};
use super::stats::{Counter, Counters};
use super::vm::Inner;
use super::{cpuid, dump, host, msrs, state};
use crate::{
    CpuIo, CpuState, DebugExit, Error, Exit, GuestDebug, Kicker, Result, SystemEvent, Vcpu, VcpuConfig,
};
use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO,
    KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_UNKNOWN,
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, kvm_guest_debug, kvm_guest_debug_arch,
};
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

/// IA32_MISC_ENABLE as a PC's firmware leaves it: fast strings on (Linux gives up `rep movsb` otherwise), branch trace
/// store and PEBS not available (Intel SDM vol. 4, 2.1).
const MISC_ENABLE: u64 = 1 | 1 << 11 | 1 << 12;

/// Vector of INT3.
const BREAKPOINT: u32 = 3;

pub(super) struct KvmVcpu {
    // First, so that the descriptor is closed before the VM's memory goes.
    runner: Runner,
    vm: Arc<Inner>,
    index: u32,
    kick: Arc<Kick>,
    counters: Arc<Counters>,
    /// The kernel finishes an access at the next KVM_RUN: the state is between instructions only after it.
    pending: bool,
    debug: GuestDebug,
}

impl KvmVcpu {
    pub(super) fn new(vm: Arc<Inner>, config: &VcpuConfig) -> Result<Self> {
        kick::install()?;
        let index = config.index;
        // KVM's number of a vCPU is its initial APIC ID.
        let fd = vm.fd().create_vcpu(u64::from(config.apic_id)).map_err(|e| match e.errno() {
            libc::EEXIST => Error::Unsupported(format!("two vCPUs with APIC ID {}", config.apic_id)),
            libc::EINVAL => Error::Unsupported(format!(
                "vCPU {index} with APIC ID {}: KVM on this host takes fewer vCPUs",
                config.apic_id
            )),
            _ => host(format!("cannot create vCPU {index}"))(e),
        })?;
        cpuid::set(&fd, &config.cpuid)?;
        if cpuid::is_intel(&config.cpuid) {
            msrs::write(&fd, &[(msrs::MISC_ENABLE, MISC_ENABLE)])?;
        }
        let runner = Runner::new(fd, vm.fd().run_size());
        let counters = vm.add_counters();
        Ok(Self {
            runner,
            vm,
            index,
            kick: Arc::default(),
            counters,
            pending: false,
            debug: GuestDebug::default(),
        })
    }

    /// Deals with a return of KVM_RUN, if it is one of those that the guest's own devices cause.
    #[inline]
    fn access(&mut self, reason: u32, io: &dyn CpuIo) -> bool {
        match reason {
            KVM_EXIT_IO => match self.runner.port_access() {
                Some(access) => self.counters.count(port(access, io)),
                None => return false,
            },
            KVM_EXIT_MMIO => self.counters.count(mmio(self.runner.mmio_access(), io)),
            _ => return false,
        }
        true
    }

    /// Deals with the other returns. `None` means to go on.
    #[cold]
    fn exit(&mut self, reason: u32) -> Option<Exit> {
        let trouble = |what: String| Some(Exit::InternalError(what));
        self.counters.count(Counter::Other);
        match reason {
            KVM_EXIT_INTR => None,
            KVM_EXIT_SHUTDOWN => Some(Exit::Shutdown),
            KVM_EXIT_SYSTEM_EVENT => match self.runner.system_event() {
                KVM_SYSTEM_EVENT_SHUTDOWN => Some(Exit::SystemEvent(SystemEvent::PowerOff)),
                KVM_SYSTEM_EVENT_RESET => Some(Exit::SystemEvent(SystemEvent::Reset)),
                KVM_SYSTEM_EVENT_CRASH => Some(Exit::SystemEvent(SystemEvent::Crash)),
                other => {
                    trouble(self.report(&format!("KVM reports system event {other}, which is not known")))
                }
            },
            KVM_EXIT_DEBUG => {
                let debug = self.runner.debug();
                if debug.exception == BREAKPOINT && !self.debug.software.contains(&debug.pc) {
                    // The guest's own.
                    return match self.guest_debug(KVM_GUESTDBG_INJECT_BP) {
                        Ok(()) => None,
                        Err(e) => {
                            trouble(self.report(&format!("cannot pass a breakpoint to the guest: {e}")))
                        }
                    };
                }
                Some(Exit::Debug(DebugExit { pc: debug.pc, dr6: debug.dr6, vector: debug.exception as u8 }))
            }
            KVM_EXIT_INTERNAL_ERROR => {
                let (suberror, data) = self.runner.internal_error();
                trouble(self.report(&dump::internal_error(suberror, &data)))
            }
            KVM_EXIT_FAIL_ENTRY => trouble(self.report(&dump::entry_failure(self.runner.entry_failure()))),
            KVM_EXIT_UNKNOWN => trouble(self.report(&format!(
                "KVM does not know the processor's exit reason {:#x}",
                self.runner.unknown()
            ))),
            KVM_EXIT_IO => trouble(self.report("KVM describes a port access that makes no sense")),
            other => trouble(self.report(&format!("KVM exit reason {other} was not expected"))),
        }
    }

    /// KVM_RUN failed with an error that has to do with the guest's memory.
    fn memory_trouble(&self, error: &std::io::Error) -> Exit {
        let at = if self.runner.reason() == KVM_EXIT_MEMORY_FAULT {
            format!(" at guest address {:#x}", self.runner.memory_fault())
        } else {
            String::new()
        };
        Exit::InternalError(self.report(&format!(
            "KVM cannot access the host memory behind the guest's{at}: {error} (out of huge pages, a truncated memory \
             file, or failing memory)"
        )))
    }

    /// Tells the kernel what the debugger wants.
    fn guest_debug(&self, more: u32) -> Result<()> {
        let mut control = more;
        let mut arch = kvm_guest_debug_arch::default();
        let d = &self.debug;
        if *d != GuestDebug::default() {
            control |= KVM_GUESTDBG_ENABLE;
        }
        if d.single_step {
            control |= KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ;
        }
        if !d.software.is_empty() {
            control |= KVM_GUESTDBG_USE_SW_BP;
        }
        if !d.hardware.is_empty() {
            control |= KVM_GUESTDBG_USE_HW_BP;
            arch.debugreg[7] = 0x400;
            for (n, b) in d.hardware.iter().take(4).enumerate() {
                arch.debugreg[n] = b.address;
                arch.debugreg[7] |= b.dr7(n);
            }
        }
        let set = |control| self.runner.fd().set_guest_debug(&kvm_guest_debug { control, pad: 0, arch });
        let result = match set(control) {
            // Kernels before 5.16 cannot hold interrupts back.
            Err(e) if e.errno() == libc::EINVAL && control & KVM_GUESTDBG_BLOCKIRQ != 0 => {
                set(control & !KVM_GUESTDBG_BLOCKIRQ)
            }
            result => result,
        };
        result.map_err(host(format!("cannot set breakpoints of vCPU {}", self.index)))
    }

    /// A sentence followed by the state of the vCPU.
    fn report(&self, sentence: &str) -> String {
        let vcpu = self.index;
        format!("vCPU {vcpu}: {sentence}\n{}", dump::registers(self.runner.fd(), &self.vm))
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, io: &dyn CpuIo) -> Result<Exit> {
        let kick = self.kick.clone();
        let flag = std::ptr::from_ref(self.runner.immediate_exit());
        #[allow(unsafe_code)] // a pointer for the signal handler
        // SAFETY: the flag is in the run page, which `self.runner` keeps mapped longer than this function runs.
        let _running = unsafe { kick.enter(flag) }?;
        loop {
            // Cleared before the request is looked at: a kick that comes later sets it again. The signal handler runs
            // on this thread, so only the compiler could change the order.
            self.runner.immediate_exit().store(0, Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
            if kick.requested() {
                if !self.pending {
                    kick.take();
                    return Ok(Exit::Kicked);
                }
                // Only finish the access.
                self.runner.immediate_exit().store(1, Ordering::Relaxed);
            }
            match self.runner.enter() {
                Ok(()) => {
                    let reason = self.runner.reason();
                    self.pending = self.access(reason, io);
                    if !self.pending
                        && let Some(exit) = self.exit(reason)
                    {
                        return Ok(exit);
                    }
                }
                Err(e) => match e.raw_os_error() {
                    Some(libc::EINTR) => {
                        self.pending = false;
                        self.counters.count(Counter::Signal);
                    }
                    // A vCPU that waits for SIPI was woken.
                    Some(libc::EAGAIN) => {}
                    Some(libc::EFAULT | libc::EHWPOISON) => return Ok(self.memory_trouble(&e)),
                    _ => {
                        return Err(Error::Host {
                            what: format!("cannot run vCPU {}", self.index),
                            source: e,
                        });
                    }
                },
            }
        }
    }

    fn save(&mut self) -> Result<CpuState> {
        state::save(self.runner.fd(), &self.vm)
    }

    fn load(&mut self, state: &CpuState) -> Result<()> {
        state::load(self.runner.fd(), &self.vm, state)
    }

    fn save_registers(&mut self) -> Result<CpuState> {
        let mut out = CpuState::default();
        state::save_registers(self.runner.fd(), &mut out)?;
        Ok(out)
    }

    fn load_registers(&mut self, state: &CpuState) -> Result<()> {
        state::load_registers(self.runner.fd(), state)?;
        msrs::write(self.runner.fd(), &state.msrs)
    }

    fn set_debug(&mut self, debug: &GuestDebug) -> Result<()> {
        self.debug = debug.clone();
        self.guest_debug(0)
    }

    fn kicker(&self) -> Kicker {
        let kick = self.kick.clone();
        Kicker::new(move || kick.kick())
    }
}

/// Serves a port access.
#[inline]
fn port(access: PortAccess<'_>, io: &dyn CpuIo) -> Counter {
    let PortAccess { write, port, size, data } = access;
    if write {
        data.chunks_exact(size).for_each(|item| io.port_out(port, item));
        Counter::PortOut
    } else {
        data.chunks_exact_mut(size).for_each(|item| io.port_in(port, item));
        Counter::PortIn
    }
}

/// Serves a memory access. The part of an access that crosses a page may have any length below 8: devices see
/// powers of two.
#[inline]
fn mmio(access: MmioAccess<'_>, io: &dyn CpuIo) -> Counter {
    let MmioAccess { write, mut gpa, mut data } = access;
    while !data.is_empty() {
        let len = 1 << data.len().ilog2();
        let (part, rest) = data.split_at_mut(len);
        if write {
            io.mmio_write(gpa, part);
        } else {
            io.mmio_read(gpa, part);
        }
        gpa = gpa.wrapping_add(len as u64);
        data = rest;
    }
    if write { Counter::MmioWrite } else { Counter::MmioRead }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, Vec<u8>)>>);

    impl CpuIo for Log {
        fn port_in(&self, port: u16, data: &mut [u8]) {
            data.fill(self.0.lock().unwrap().len() as u8);
            self.0.lock().unwrap().push((u64::from(port), data.to_vec()));
        }
        fn port_out(&self, port: u16, data: &[u8]) {
            self.0.lock().unwrap().push((u64::from(port), data.to_vec()));
        }
        fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
            data.fill(data.len() as u8);
            self.0.lock().unwrap().push((gpa, data.to_vec()));
        }
        fn mmio_write(&self, gpa: u64, data: &[u8]) {
            self.0.lock().unwrap().push((gpa, data.to_vec()));
        }
    }

    #[test]
    fn string_port_accesses_are_served_one_by_one() {
        let log = Log::default();
        let mut data = [9; 6];
        port(PortAccess { write: false, port: 0x1f0, size: 2, data: &mut data }, &log);
        assert_eq!(data, [0, 0, 1, 1, 2, 2]);
        port(PortAccess { write: true, port: 0x80, size: 1, data: &mut [7, 8] }, &log);
        assert_eq!(log.0.into_inner().unwrap()[3..], [(0x80, vec![7]), (0x80, vec![8])]);
    }

    #[test]
    fn odd_lengths_are_split() {
        let log = Log::default();
        let mut data = [0; 7];
        mmio(MmioAccess { write: false, gpa: 0x1000, data: &mut data }, &log);
        assert_eq!(data, [4, 4, 4, 4, 2, 2, 1]);
        mmio(MmioAccess { write: true, gpa: u64::MAX, data: &mut [1, 2, 3] }, &log);
        let log = log.0.into_inner().unwrap();
        let at: Vec<_> = log.iter().map(|(gpa, data)| (*gpa, data.len())).collect();
        assert_eq!(at, [(0x1000, 4), (0x1004, 2), (0x1006, 1), (u64::MAX, 2), (1, 1)]);
    }
}
