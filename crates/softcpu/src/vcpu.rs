//! [`SoftVcpu`]: a [`Cpu`] as the accelerator's traits want it.
#![allow(unsafe_code)] // the lifetime of the outside world while `run` is active

use crate::block::Cache;
use crate::fault::Exception;
use crate::fpu::Fpu;
use crate::mmu::Mmu;
use crate::msr::{self, Msrs};
use crate::state::{Cpu, Mode, Seg, Stats, Table, attr, cr, fl, seg};
use crate::vm::Shared;
use accel::state::{Events, MpState, Segment};
use accel::{CpuIo, CpuState, Error, Exit, GuestDebug, Kicker, Result, Signal, Vcpu, VcpuConfig};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A vCPU of the software CPU.
pub struct SoftVcpu {
    cpu: Box<Cpu>,
}

// SAFETY: the raw pointers of `Cpu` point into the CPU itself or into what it owns; `io` is only set while `run` is
// active. One thread at a time uses a vCPU.
unsafe impl Send for SoftVcpu {}

impl SoftVcpu {
    /// A vCPU after RESET.
    ///
    /// # Errors
    /// The index is taken.
    pub fn new(vm: Arc<Shared>, config: VcpuConfig) -> Result<Self> {
        let me = vm.join(config.index, config.signals.clone())?;
        let phys_bits = config.cpuid.query(0x8000_0008, 0)[0] & 0xff;
        let map_epoch = vm.map_epoch.load(Ordering::SeqCst);
        let word: *const _ = config.signals.word();
        let mut cpu = Box::new(Cpu {
            regs: [0; 18],
            rip: 0,
            flags: 2,
            cc: 0,
            cpl: 0,
            irq_latched: true,
            mode: Mode::empty(),
            block: std::ptr::null(),
            link: std::ptr::null(),
            tlb: std::ptr::null_mut(),
            tlb_mask: 0,
            retired: 0,
            signal_word: word,
            seg: [Seg::default(); 6],
            ldtr: Seg::default(),
            tr: Seg::default(),
            gdtr: Table::default(),
            idtr: Table::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            exception: Exception::default(),
            fault_op: std::ptr::null(),
            request: Default::default(),
            mp_state: MpState::Runnable,
            nmi_masked: false,
            nmi_pending: false,
            acknowledged: None,
            injected: None,
            step_armed: false,
            rf_loaded: false,
            traced: tracing::enabled!(target: "softcpu::instructions", tracing::Level::TRACE),
            map_epoch,
            apic_id: config.apic_id,
            shadow: false,
            pending_db: 0,
            debugger: None,
            jit: Default::default(),
            fpu: Fpu::new(),
            msr: Msrs::default(),
            mmu: Mmu::new(vm.map(), phys_bits),
            code: Cache::new(),
            stats: Stats::default(),
            cpuid: config.cpuid,
            signals: config.signals,
            apic: config.apic,
            vm,
            me,
            io: None,
        });
        cpu.retable();
        // TSCs of all vCPUs start together, at the VM's birth.
        cpu.msr.tsc_offset = cpu.vm.clock.zero().wrapping_neg();
        if let Some(apic) = &cpu.apic {
            apic.set_tsc_offset(cpu.msr.tsc_offset);
        }
        cpu.reset();
        Ok(Self { cpu })
    }

    /// The CPU proper, for tests and tools.
    pub fn cpu(&mut self) -> &mut Cpu {
        &mut self.cpu
    }
}

impl Drop for SoftVcpu {
    fn drop(&mut self) {
        self.cpu.vm.leave(&self.cpu.me);
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, io: &dyn CpuIo) -> Result<Exit> {
        let cpu = &mut *self.cpu;
        let io: *const (dyn CpuIo + '_) = io;
        // SAFETY: only the lifetime changes; the pointer is forgotten before this function returns.
        cpu.io =
            Some(unsafe { std::mem::transmute::<*const (dyn CpuIo + '_), *const (dyn CpuIo + 'static)>(io) });
        cpu.me.set_inside(true);
        cpu.answer_asks();
        let exit = cpu.execute();
        cpu.fpu.flush();
        cpu.me.set_inside(false);
        cpu.io = None;
        cpu.publish_stats();
        Ok(exit)
    }

    fn save(&mut self) -> Result<CpuState> {
        Ok(self.cpu.save_state())
    }

    fn load(&mut self, state: &CpuState) -> Result<()> {
        self.cpu.load_state(state)
    }

    fn set_debug(&mut self, debug: &GuestDebug) -> Result<()> {
        self.cpu.set_debugger(debug);
        Ok(())
    }

    fn kicker(&self) -> Kicker {
        let signals = self.cpu.signals.clone();
        Kicker::new(move || signals.raise(Signal::KICK))
    }
}

fn to_segment(s: &Seg) -> Segment {
    Segment { selector: s.selector, base: s.base, limit: s.limit, attributes: s.attr }
}

fn from_segment(s: &Segment) -> Seg {
    Seg { base: s.base, limit: s.limit, attr: s.attributes & 0x1_f0ff, selector: s.selector }
}

impl Cpu {
    /// Copies the counters to where other threads see them.
    pub(crate) fn publish_stats(&mut self) {
        if let Some(t) = &self.code.translator {
            t.counters.publish(&mut self.stats);
        }
        *self.me.stats.lock().unwrap_or_else(|e| e.into_inner()) = (self.retired, self.stats);
    }

    fn save_state(&mut self) -> CpuState {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.regs[..16]);
        let msrs = msr::SAVED.iter().filter_map(|m| Some((*m, self.msr_value(*m)?))).collect();
        CpuState {
            gpr,
            rip: self.rip,
            rflags: self.rflags(),
            segments: std::array::from_fn(|i| to_segment(&self.seg[i])),
            ldtr: to_segment(&self.ldtr),
            tr: to_segment(&self.tr),
            gdtr: accel::state::Table { base: self.gdtr.base, limit: self.gdtr.limit },
            idtr: accel::state::Table { base: self.idtr.base, limit: self.idtr.limit },
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: self.apic.as_ref().map_or(0, |a| a.cr8() as u64),
            efer: self.efer,
            apic_base: self.apic.as_ref().map_or(0, |a| a.base()),
            dr: [self.dr[0], self.dr[1], self.dr[2], self.dr[3], self.dr6, self.dr7],
            xcr0: self.fpu.xcr0,
            xsave: self.fpu.to_xsave(),
            msrs,
            lapic: self.apic.as_ref().map(|a| a.save()),
            mp_state: self.mp_state,
            events: Events {
                exception: self.injected.map(|e| (e.vector, e.error)),
                interrupt: self.acknowledged,
                shadow: self.shadow,
                nmi_pending: self.nmi_pending,
                nmi_masked: self.nmi_masked,
            },
        }
    }

    fn load_state(&mut self, s: &CpuState) -> Result<()> {
        let bad = |what: String| Err(Error::BadState(what));
        if s.cr0 & cr::CR0_PG != 0 && s.cr0 & cr::CR0_PE == 0 {
            return bad("paging without protection in CR0".into());
        }
        if s.efer & cr::EFER_LMA != 0 && (s.efer & cr::EFER_LME == 0 || s.cr0 & cr::CR0_PG == 0) {
            return bad("long mode is active in EFER, but not enabled".into());
        }
        if s.xcr0 & 1 == 0 || s.xcr0 & !crate::fpu::xcr0::SUPPORTED != 0 {
            return bad(format!(
                "XCR0 {:#x} has state components that the software CPU does not have",
                s.xcr0
            ));
        }
        self.fpu.from_xsave(&s.xsave).map_err(|e| Error::BadState(e.to_string()))?;
        self.fpu.xcr0 = s.xcr0;
        self.regs[..16].copy_from_slice(&s.gpr);
        self.rip = s.rip;
        self.cc = crate::flags::from_rflags(s.rflags);
        self.flags = s.rflags & fl::ALL & !fl::ARITH | 2;
        for (mine, theirs) in self.seg.iter_mut().zip(&s.segments) {
            *mine = from_segment(theirs);
        }
        self.ldtr = from_segment(&s.ldtr);
        self.tr = from_segment(&s.tr);
        self.gdtr = Table { base: s.gdtr.base, limit: s.gdtr.limit };
        self.idtr = Table { base: s.idtr.base, limit: s.idtr.limit };
        (self.cr0, self.cr2, self.cr3, self.cr4, self.efer) =
            (s.cr0 | cr::CR0_ET, s.cr2, s.cr3, s.cr4, s.efer);
        self.cpl = if self.cr0 & cr::CR0_PE == 0 {
            0
        } else if self.flags & fl::VM != 0 {
            3
        } else {
            let ss = &self.seg[seg::SS];
            // As hardware keeps it: the DPL of SS, also for a null one.
            if ss.attr & attr::UNUSABLE != 0 { (self.seg[seg::CS].selector & 3) as u8 } else { ss.dpl() }
        };
        self.dr.copy_from_slice(&s.dr[..4]);
        (self.dr6, self.dr7) = (s.dr[4], s.dr[5] & 0xffff_2bff | 0x400);
        self.mp_state = s.mp_state;
        self.injected = s.events.exception.map(|(vector, error)| Exception {
            vector,
            error,
            address: s.cr2,
            ..Default::default()
        });
        self.acknowledged = s.events.interrupt;
        (self.shadow, self.nmi_pending, self.nmi_masked) =
            (s.events.shadow, s.events.nmi_pending, s.events.nmi_masked);
        self.pending_db = 0;
        if let Some(apic) = self.apic.clone() {
            if apic.write_msr(msr::index::APIC_BASE, s.apic_base).is_err() {
                return bad(format!("IA32_APIC_BASE {:#x} is invalid", s.apic_base));
            }
            if let Some(page) = &s.lapic {
                apic.load(page)?;
            }
            apic.set_cr8((s.cr8 & 15) as u8);
        }
        for (n, v) in &s.msrs {
            match *n {
                // Unlike the guest's own writes, these do not change each other.
                msr::index::TSC => {
                    let offset = self.vm.clock.settle(self.me.index, *v, self.msr.tsc_offset);
                    self.set_tsc_offset(offset);
                    continue;
                }
                msr::index::TSC_ADJUST => {
                    self.msr.tsc_adjust = *v;
                    continue;
                }
                _ => {}
            }
            if self.set_msr(*n, *v).is_none() {
                return bad(format!("MSR {n:#x} cannot be {v:#x}"));
            }
        }
        let pae = self.cr0 & cr::CR0_PG != 0 && self.cr4 & cr::CR4_PAE != 0 && self.efer & cr::EFER_LMA == 0;
        if pae && self.load_cr3(s.cr3).is_err() {
            return bad("the page-directory pointers of PAE paging are invalid".into());
        }
        self.irq_latched = true;
        self.apic_base_changed();
        self.debug_changed();
        self.fpu_access_changed();
        self.code.drop_all();
        self.flush_tlb();
        self.update_mode();
        Ok(())
    }
}
