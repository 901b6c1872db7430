//! Control registers, TLB maintenance, reset, INIT and start-up.

use crate::fault::Res;
use crate::state::{Cpu, Mode, Seg, Table, attr, cr, fl, seg};
use accel::state::MpState;

const CR0_ALL: u64 = cr::CR0_PE
    | cr::CR0_MP
    | cr::CR0_EM
    | cr::CR0_TS
    | cr::CR0_ET
    | cr::CR0_NE
    | cr::CR0_WP
    | cr::CR0_AM
    | cr::CR0_NW
    | cr::CR0_CD
    | cr::CR0_PG;

const CR4_ALL: u64 = cr::CR4_TSD
    | cr::CR4_DE
    | cr::CR4_PSE
    | cr::CR4_PAE
    | cr::CR4_MCE
    | cr::CR4_PGE
    | cr::CR4_PCE
    | cr::CR4_OSFXSR
    | cr::CR4_OSXMMEXCPT
    | cr::CR4_UMIP
    | cr::CR4_FSGSBASE
    | cr::CR4_PCIDE
    | cr::CR4_OSXSAVE
    | cr::CR4_SMEP
    | cr::CR4_SMAP;

impl Cpu {
    /// MOV to CR0.
    pub(crate) fn set_cr0(&mut self, value: u64) -> Res<()> {
        if value >> 32 != 0 {
            return Err(self.gp(0));
        }
        let new = value & CR0_ALL | cr::CR0_ET;
        let on = |bit: u64| new & bit != 0;
        if on(cr::CR0_PG) && !on(cr::CR0_PE) || on(cr::CR0_NW) && !on(cr::CR0_CD) {
            return Err(self.gp(0));
        }
        let changed = new ^ self.cr0;
        if changed & cr::CR0_PG != 0 {
            if on(cr::CR0_PG) {
                if self.efer & cr::EFER_LME != 0 {
                    let long_code = self.seg[seg::CS].attr & attr::L != 0;
                    if self.cr4 & cr::CR4_PAE == 0 || long_code || self.tr.attr & 8 == 0 && self.tr.usable() {
                        return Err(self.gp(0));
                    }
                    self.efer |= cr::EFER_LMA;
                } else if self.cr4 & cr::CR4_PAE != 0 {
                    self.load_pdptes(self.cr3, new)?;
                }
            } else {
                if self.mode.is64() || self.cr4 & cr::CR4_PCIDE != 0 {
                    return Err(self.gp(0));
                }
                self.efer &= !cr::EFER_LMA;
            }
        }
        self.cr0 = new;
        self.fpu_access_changed();
        if changed & (cr::CR0_PG | cr::CR0_WP | cr::CR0_PE) != 0 {
            self.flush_tlb();
        }
        self.update_mode();
        Ok(())
    }

    /// MOV to CR4.
    pub(crate) fn set_cr4(&mut self, new: u64) -> Res<()> {
        if new & !CR4_ALL != 0 {
            return Err(self.gp(0));
        }
        let changed = new ^ self.cr4;
        let long = self.long_mode();
        let pcid_on = changed & new & cr::CR4_PCIDE != 0;
        if long && new & cr::CR4_PAE == 0 || pcid_on && (!long || self.cr3 & 0xfff != 0) {
            return Err(self.gp(0));
        }
        let paging = cr::CR4_PSE | cr::CR4_PAE | cr::CR4_PGE | cr::CR4_PCIDE | cr::CR4_SMEP | cr::CR4_SMAP;
        if changed & paging != 0 {
            if self.cr0 & cr::CR0_PG != 0 && !long && new & cr::CR4_PAE != 0 {
                self.load_pdptes(self.cr3, self.cr0)?;
            }
            self.cr4 = new;
            self.flush_tlb();
        }
        self.cr4 = new;
        self.fpu_access_changed();
        self.update_mode();
        Ok(())
    }

    /// MOV to CR3.
    pub(crate) fn set_cr3(&mut self, value: u64) -> Res<()> {
        let pcide = self.cr4 & cr::CR4_PCIDE != 0;
        let keep = pcide && value >> 63 != 0;
        let new = if pcide { value & !(1 << 63) } else { value };
        if self.long_mode() && new >> self.mmu.phys_bits != 0 {
            return Err(self.gp(0));
        }
        if !self.long_mode() {
            return self.load_cr3(new & 0xffff_ffff);
        }
        self.cr3 = new;
        self.stats.tlb_flushes += !keep as u64;
        if pcide {
            self.mmu.tlb.switch(self.pcid());
        }
        if !keep {
            self.mmu.tlb.flush_current();
        }
        self.retable();
        Ok(())
    }

    /// Loads CR3 outside long mode.
    pub(crate) fn load_cr3(&mut self, value: u64) -> Res<()> {
        if self.cr0 & cr::CR0_PG != 0 && self.cr4 & cr::CR4_PAE != 0 {
            self.load_pdptes(value, self.cr0)?;
        }
        self.cr3 = value;
        self.stats.tlb_flushes += 1;
        self.mmu.tlb.flush_current();
        self.retable();
        Ok(())
    }

    /// Loads the page-directory pointers of PAE paging.
    fn load_pdptes(&mut self, cr3: u64, _cr0: u64) -> Res<()> {
        let beyond = !((1u64 << self.mmu.phys_bits) - 1);
        let mut entries = [0; 4];
        for (i, e) in entries.iter_mut().enumerate() {
            *e = self.mmu.phys.load::<true>((cr3 & 0xffff_ffe0) + 8 * i as u64);
            if *e & 1 != 0 && *e & (beyond | 0x1e6) != 0 {
                return Err(self.gp(0));
            }
        }
        self.mmu.pdpte = entries;
        Ok(())
    }

    /// The current process-context identifier.
    pub(crate) fn pcid(&self) -> u16 {
        if self.cr4 & cr::CR4_PCIDE != 0 { (self.cr3 & 0xfff) as u16 } else { 0 }
    }

    /// Drops all translations.
    pub(crate) fn flush_tlb(&mut self) {
        self.stats.tlb_flushes += 1;
        self.mmu.tlb.flush_all();
        self.mmu.tlb.switch(self.pcid());
        self.me.forget_writable();
        self.retable();
    }

    /// Drops all translations, as for a new memory map.
    pub(crate) fn flush_all_tlbs(&mut self) {
        self.flush_tlb();
    }

    /// Drops the translations of an address space.
    pub(crate) fn flush_pcid(&mut self, pcid: u16) {
        self.stats.tlb_flushes += 1;
        self.mmu.tlb.flush_pcid(pcid);
        self.retable();
    }

    /// INVLPG.
    pub(crate) fn flush_page(&mut self, lin: u64) {
        self.mmu.tlb.flush_page(lin);
        // Tables may have moved.
        self.retable();
        self.code.drop_jumps(lin);
    }

    /// To be called when CR0, CR4 or XCR0 changed in ways that decide about floating point.
    pub(crate) fn fpu_access_changed(&mut self) {
        self.fpu.ready = 0;
    }

    /// State after RESET.
    pub(crate) fn reset(&mut self) {
        self.init_registers();
        self.cr0 = cr::CR0_CD | cr::CR0_NW | cr::CR0_ET;
        self.fpu = crate::fpu::Fpu::new();
        let offset = self.msr.tsc_offset;
        self.msr = crate::msr::Msrs { tsc_offset: offset, ..Default::default() };
        self.mp_state = if self.is_bootstrap() { MpState::Runnable } else { MpState::Uninitialized };
        self.nmi_pending = false;
        self.apic_base_changed();
        self.flush_tlb();
        self.update_mode();
    }

    /// INIT.
    pub(crate) fn init(&mut self) {
        self.init_registers();
        self.cr0 = self.cr0 & (cr::CR0_CD | cr::CR0_NW) | cr::CR0_ET;
        if let Some(apic) = self.apic.clone() {
            apic.init();
        }
        self.mp_state = if self.is_bootstrap() { MpState::Runnable } else { MpState::InitReceived };
        self.apic_base_changed();
        self.flush_tlb();
        self.update_mode();
    }

    /// Start-up IPI.
    pub(crate) fn start_up(&mut self, vector: u8) {
        self.seg[seg::CS].selector = (vector as u16) << 8;
        self.seg[seg::CS].base = (vector as u64) << 12;
        self.rip = 0;
        self.mp_state = MpState::Runnable;
        self.update_mode();
    }

    fn is_bootstrap(&self) -> bool {
        self.me.index == 0
    }

    /// What RESET and INIT do alike (Intel SDM vol. 3, table 11-1). The segments' D bits are clear.
    fn init_registers(&mut self) {
        self.regs = [0; 18];
        self.regs[2] = self.cpuid.query(1, 0)[0] as u64;
        self.rip = 0xfff0;
        self.flags = 2;
        self.cc = crate::flags::from_rflags(0);
        self.cpl = 0;
        let data = Seg { base: 0, limit: 0xffff, attr: 0x93, selector: 0 };
        self.seg = [data; 6];
        self.seg[seg::CS] = Seg { base: 0xffff_0000, limit: 0xffff, attr: 0x9b, selector: 0xf000 };
        self.ldtr = Seg { base: 0, limit: 0xffff, attr: 0x82, selector: 0 };
        self.tr = Seg { base: 0, limit: 0xffff, attr: 0x8b, selector: 0 };
        self.gdtr = Table { base: 0, limit: 0xffff };
        self.idtr = Table { base: 0, limit: 0xffff };
        (self.cr2, self.cr3, self.cr4, self.efer) = (0, 0, 0, 0);
        self.dr = [0; 4];
        (self.dr6, self.dr7) = (0xffff_0ff0, 0x400);
        self.mmu.watched.clear();
        (self.nmi_masked, self.shadow, self.step_armed, self.rf_loaded) = (false, false, false, false);
        (self.acknowledged, self.injected, self.pending_db) = (None, None, 0);
        self.irq_latched = true;
        self.mode = Mode::empty();
        self.fpu_access_changed();
        debug_assert!(self.flags & fl::VM == 0);
    }
}
