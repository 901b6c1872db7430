//! Model-specific registers (Intel SDM vol. 4), the time-stamp counter and the paravirtual clock.

use crate::fault::Res;
use crate::mmu::canonical;
use crate::state::{Cpu, cr, seg};

/// MSR numbers.
#[allow(missing_docs)]
pub mod index {
    pub const TSC: u32 = 0x10;
    pub const KVM_WALL_CLOCK: u32 = 0x11;
    pub const KVM_SYSTEM_TIME: u32 = 0x12;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1b;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const UCODE_UPDATE: u32 = 0x79;
    pub const UCODE_REV: u32 = 0x8b;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MCG_CTL: u32 = 0x17b;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const MTRR_PHYS_BASE0: u32 = 0x200;
    pub const MTRR_FIX64K: u32 = 0x250;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const XSS: u32 = 0xda0;
    pub const KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
    pub const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const HWCR: u32 = 0xc001_0015;
}
use index::*;

/// Number of variable MTRRs.
const MTRRS: u32 = 8;
const FIXED_MTRRS: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// AMD configuration registers that systems read, and write back, without first asking whether they exist.
const AMD_ZERO: [u32; 21] = [
    0xc001_0000,
    0xc001_0001,
    0xc001_0002,
    0xc001_0003,
    0xc001_0004,
    0xc001_0005,
    0xc001_0006,
    0xc001_0007,
    0xc001_0010,
    0xc001_001a,
    0xc001_001d,
    0xc001_001f,
    0xc001_0055,
    0xc001_0058,
    0xc001_0112,
    0xc001_0113,
    0xc001_1020,
    0xc001_1022,
    0xc001_1023,
    0xc001_1029,
    0xc001_102a,
];

/// Model-specific registers that no other part of the state holds.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Msrs {
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    /// Guest TSC minus host TSC.
    pub tsc_offset: u64,
    pub tsc_adjust: u64,
    pub tsc_aux: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub mcg_status: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_var: [u64; 2 * MTRRS as usize],
    pub hwcr: u64,
    pub ucode_rev: u64,
    pub kvm_wall_clock: u64,
    pub kvm_system_time: u64,
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            tsc_offset: 0,
            tsc_adjust: 0,
            tsc_aux: 0,
            pat: 0x0007_0406_0007_0406,
            // Fast strings; branch trace and precise event storage unavailable.
            misc_enable: 1 | 1 << 11 | 1 << 12,
            mcg_status: 0,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_var: [0; 2 * MTRRS as usize],
            hwcr: 0,
            ucode_rev: 0x1_0000_0000,
            kvm_wall_clock: 0,
            kvm_system_time: 0,
        }
    }
}

/// What [`accel::CpuState::msrs`] holds, in the order of loading.
pub const SAVED: &[u32] = &[
    SYSENTER_CS,
    SYSENTER_ESP,
    SYSENTER_EIP,
    STAR,
    LSTAR,
    CSTAR,
    FMASK,
    KERNEL_GS_BASE,
    TSC,
    TSC_ADJUST,
    TSC_AUX,
    PAT,
    MISC_ENABLE,
    MCG_STATUS,
    MTRR_DEF_TYPE,
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f,
    HWCR,
    KVM_WALL_CLOCK_NEW,
    KVM_SYSTEM_TIME_NEW,
];

/// Multiplier and shift that turn TSC ticks into nanoseconds the way the paravirtual clock does:
/// `(ticks << shift) * multiplier >> 32` (a negative shift shifts right).
pub fn pvclock_scale(hz: u64) -> (u32, i8) {
    let mut shift = 0i8;
    let mut ticks = hz.max(1) as u128;
    // Bring 10^9 / ticks into [1/2, 1).
    while ticks <= 1_000_000_000 {
        ticks *= 2;
        shift += 1;
    }
    while ticks > 2_000_000_000 {
        ticks /= 2;
        shift -= 1;
    }
    ((1_000_000_000u128 << 32).div_euclid(ticks).min(u32::MAX as u128) as u32, shift)
}

impl Cpu {
    /// The guest's time-stamp counter.
    #[inline]
    pub fn tsc(&self) -> u64 {
        // Guests fence their RDTSC and expect time to agree between vCPUs.
        base::tsc::now_ordered().wrapping_add(self.msr.tsc_offset)
    }

    pub(crate) fn set_tsc_offset(&mut self, offset: u64) {
        self.msr.tsc_offset = offset;
        if let Some(apic) = &self.apic {
            apic.set_tsc_offset(offset);
        }
        self.write_system_time();
    }

    /// RDMSR.
    ///
    /// # Errors
    /// #GP for registers that do not exist.
    pub fn read_msr(&mut self, msr: u32) -> Res<u64> {
        self.stats.msrs += 1;
        match self.msr_value(msr) {
            Some(v) => Ok(v),
            None => {
                tracing::debug!(msr = format_args!("{msr:#x}"), "read of an unknown MSR");
                Err(self.gp(0))
            }
        }
    }

    /// Value of an MSR, if it exists and can be read.
    pub(crate) fn msr_value(&mut self, msr: u32) -> Option<u64> {
        let m = &self.msr;
        Some(match msr {
            TSC => self.tsc(),
            APIC_BASE | TSC_DEADLINE | 0x800..=0x8ff => return self.apic.as_ref()?.read_msr(msr).ok(),
            PLATFORM_ID => 0,
            FEATURE_CONTROL => 1,
            TSC_ADJUST => m.tsc_adjust,
            UCODE_REV => m.ucode_rev,
            MTRR_CAP => 0x500 | MTRRS as u64,
            SYSENTER_CS => m.sysenter_cs,
            SYSENTER_ESP => m.sysenter_esp,
            SYSENTER_EIP => m.sysenter_eip,
            MCG_CAP | MCG_CTL | DEBUGCTL | XSS => 0,
            MCG_STATUS => m.mcg_status,
            MISC_ENABLE => m.misc_enable,
            MTRR_PHYS_BASE0..0x210 => m.mtrr_var[(msr - MTRR_PHYS_BASE0) as usize],
            MTRR_DEF_TYPE => m.mtrr_def_type,
            PAT => m.pat,
            KVM_WALL_CLOCK | KVM_WALL_CLOCK_NEW => m.kvm_wall_clock,
            KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_NEW => m.kvm_system_time,
            EFER => self.efer,
            STAR => m.star,
            LSTAR => m.lstar,
            CSTAR => m.cstar,
            FMASK => m.fmask,
            FS_BASE => self.seg[seg::FS].base,
            GS_BASE => self.seg[seg::GS].base,
            KERNEL_GS_BASE => m.kernel_gs_base,
            TSC_AUX => m.tsc_aux,
            HWCR => m.hwcr,
            _ => match FIXED_MTRRS.iter().position(|f| *f == msr) {
                Some(i) => m.mtrr_fixed[i],
                None if AMD_ZERO.contains(&msr) => 0,
                None => return None,
            },
        })
    }

    /// WRMSR.
    ///
    /// # Errors
    /// #GP for registers that do not exist or cannot take the value.
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Res<()> {
        self.stats.msrs += 1;
        match self.set_msr(msr, value) {
            Some(()) => Ok(()),
            None => {
                tracing::debug!(
                    msr = format_args!("{msr:#x}"),
                    value = format_args!("{value:#x}"),
                    "refused MSR write"
                );
                Err(self.gp(0))
            }
        }
    }

    /// Sets an MSR; `None` if it does not exist or cannot take the value.
    pub(crate) fn set_msr(&mut self, msr: u32, value: u64) -> Option<()> {
        let address = canonical(value).then_some(value);
        match msr {
            TSC => {
                let offset = value.wrapping_sub(base::tsc::now());
                self.msr.tsc_adjust =
                    self.msr.tsc_adjust.wrapping_add(offset.wrapping_sub(self.msr.tsc_offset));
                self.set_tsc_offset(offset);
            }
            TSC_ADJUST => {
                let delta = value.wrapping_sub(self.msr.tsc_adjust);
                self.msr.tsc_adjust = value;
                self.set_tsc_offset(self.msr.tsc_offset.wrapping_add(delta));
            }
            APIC_BASE | TSC_DEADLINE | 0x800..=0x8ff => {
                self.apic.as_ref()?.write_msr(msr, value).ok()?;
                if msr == APIC_BASE {
                    self.apic_base_changed();
                }
            }
            UCODE_UPDATE | MCG_CTL | PLATFORM_ID => {}
            // Writing zero before reading is part of the protocol for reading the revision.
            UCODE_REV => {}
            SYSENTER_CS => self.msr.sysenter_cs = value & 0xffff,
            SYSENTER_ESP => self.msr.sysenter_esp = address?,
            SYSENTER_EIP => self.msr.sysenter_eip = address?,
            MCG_STATUS => self.msr.mcg_status = value,
            MISC_ENABLE => self.msr.misc_enable = value,
            DEBUGCTL => (value & !3 == 0).then_some(())?,
            XSS => (value == 0).then_some(())?,
            MTRR_PHYS_BASE0..0x210 => self.msr.mtrr_var[(msr - MTRR_PHYS_BASE0) as usize] = value,
            MTRR_DEF_TYPE => self.msr.mtrr_def_type = value & 0xcff,
            PAT => {
                let valid = value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7));
                self.msr.pat = valid.then_some(value)?;
            }
            KVM_WALL_CLOCK | KVM_WALL_CLOCK_NEW => {
                self.msr.kvm_wall_clock = value;
                self.write_wall_clock();
            }
            KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_NEW => {
                self.msr.kvm_system_time = value;
                self.write_system_time();
            }
            EFER => self.set_efer(value)?,
            STAR => self.msr.star = value,
            LSTAR => self.msr.lstar = address?,
            CSTAR => self.msr.cstar = address?,
            FMASK => self.msr.fmask = value & 0xffff_ffff,
            FS_BASE => self.seg[seg::FS].base = address?,
            GS_BASE => self.seg[seg::GS].base = address?,
            KERNEL_GS_BASE => self.msr.kernel_gs_base = address?,
            TSC_AUX => self.msr.tsc_aux = (value >> 32 == 0).then_some(value)?,
            HWCR => self.msr.hwcr = value,
            _ => match FIXED_MTRRS.iter().position(|f| *f == msr) {
                Some(i) => self.msr.mtrr_fixed[i] = value,
                None => AMD_ZERO.contains(&msr).then_some(())?,
            },
        }
        Some(())
    }

    fn set_efer(&mut self, value: u64) -> Option<()> {
        let allowed =
            cr::EFER_SCE | cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE | cr::EFER_FFXSR | cr::EFER_AUTOIBRS;
        if value & !allowed != 0 || (value ^ self.efer) & cr::EFER_LME != 0 && self.cr0 & cr::CR0_PG != 0 {
            return None;
        }
        // LMA follows from LME and paging; writes do not change it.
        self.efer = value & !cr::EFER_LMA | self.efer & cr::EFER_LMA;
        self.flush_tlb();
        Some(())
    }

    /// Page of the xAPIC registers after IA32_APIC_BASE changed.
    pub(crate) fn apic_base_changed(&mut self) {
        let base = self.apic.as_ref().map_or(0, |a| a.base());
        // Enabled, and not in x2APIC mode.
        let page = (base & 0xc00 == 0x800).then_some(base & 0x000f_ffff_ffff_f000);
        if page != self.mmu.apic_page {
            self.mmu.apic_page = page;
            self.flush_tlb();
        }
    }

    /// Fills the guest's `pvclock_vcpu_time_info`, if it registered one. The relation of TSC and time never changes, so
    /// once is enough until the TSC is written.
    fn write_system_time(&mut self) {
        if self.msr.kvm_system_time & 1 == 0 {
            return;
        }
        let (mul, shift) = pvclock_scale(base::tsc::frequency());
        let mut b = [0u8; 32];
        // An even version says that the contents are consistent.
        b[0..4].copy_from_slice(&2u32.to_le_bytes());
        b[8..16].copy_from_slice(&self.vm.clock.zero().wrapping_add(self.msr.tsc_offset).to_le_bytes());
        b[24..28].copy_from_slice(&mul.to_le_bytes());
        b[28] = shift as u8;
        b[29] = 1; // PVCLOCK_TSC_STABLE_BIT
        self.phys_write(self.msr.kvm_system_time & !1, &b);
    }

    /// Fills the guest's `pvclock_wall_clock`: the wall-clock time when the system time was zero.
    fn write_wall_clock(&mut self) {
        let start = self.vm.clock.zero_time().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let mut b = [0u8; 12];
        b[0..4].copy_from_slice(&2u32.to_le_bytes());
        b[4..8].copy_from_slice(&(start.as_secs() as u32).to_le_bytes());
        b[8..12].copy_from_slice(&start.subsec_nanos().to_le_bytes());
        self.phys_write(self.msr.kvm_wall_clock, &b);
    }

    /// Writes guest physical memory that the guest told us to; what is not RAM is left alone.
    fn phys_write(&mut self, gpa: u64, bytes: &[u8]) {
        for (i, b) in bytes.iter().enumerate() {
            let at = gpa.wrapping_add(i as u64);
            if let Some(page) = self.mmu.phys.clone().page(at)
                && !page.readonly
            {
                page.put(at, *b);
                page.region.tracker.wrote(page.offset + (at & 0xfff), 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::pvclock_scale;

    #[test]
    fn pvclock_scales() {
        for hz in [1_000_000u64, 500_000_000, 1_000_000_000, 2_600_000_000, 5_300_000_000] {
            let (mul, shift) = pvclock_scale(hz);
            let ticks = hz as u128 * 10;
            let shifted = if shift < 0 { ticks >> -shift } else { ticks << shift };
            let ns = (shifted * mul as u128) >> 32;
            assert!(ns.abs_diff(10_000_000_000) < 100, "{hz}: {ns}");
        }
    }
}
