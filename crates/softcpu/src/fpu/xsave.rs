//! FXSAVE, the XSAVE family and XCR0 (Intel SDM vol. 1, 10.5 and chapter 13).

use super::image::{AVX_OFFSET, AVX_SIZE, EXTENDED, HEADER, Pointers, STANDARD_SIZE};
use super::{Fpu, mxcsr, xcr0};
use crate::fault::{Res, vector};
use crate::native::features::Host;
use crate::op::Op;
use crate::state::{Cpu, cr, reg};

/// Set in XCOMP_BV: the area is in the compacted format.
const COMPACTED: u64 = 1 << 63;

/// State components that XCR0 may enable on this host.
pub fn components() -> u64 {
    if Host::get().has_avx() { xcr0::SUPPORTED } else { xcr0::X87 | xcr0::SSE }
}

/// Members of the XSAVE family that save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Save {
    /// XSAVE.
    Plain,
    /// XSAVEOPT: components in their initial configuration are not written.
    Optimised,
    /// XSAVEC and XSAVES: so, and in the compacted format.
    Compacted,
}

fn quad(b: &[u8], at: usize) -> u64 {
    let mut q = [0; 8];
    q.copy_from_slice(&b[at..at + 8]);
    u64::from_le_bytes(q)
}

fn pointers(wide: bool) -> Pointers {
    if wide { Pointers::Wide } else { Pointers::Narrow }
}

/// What an XRSTOR does to each component, once the header has been found good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Restore {
    /// Components loaded from the area.
    load: u64,
    /// Components given their initial configuration.
    init: u64,
    /// MXCSR is loaded from the area.
    mxcsr: bool,
}

/// Checks an XSAVE header (bytes 512 to 575 of the area) for restoring the components of `rfbm`. `None`: #GP.
fn plan(header: &[u8], rfbm: u64, enabled: u64, supervisor: bool) -> Option<Restore> {
    let (bv, comp) = (quad(header, 0), quad(header, 8));
    let compact = comp & COMPACTED != 0;
    if compact {
        let format = comp & !COMPACTED;
        if format & !enabled != 0 || bv & !format != 0 || header[16..].iter().any(|b| *b != 0) {
            return None;
        }
    } else if supervisor || bv & !enabled != 0 || header[8..24].iter().any(|b| *b != 0) {
        return None;
    }
    let vector = xcr0::SSE | xcr0::AVX;
    Some(Restore {
        load: rfbm & bv,
        init: rfbm & !bv,
        // The standard format loads MXCSR whatever XSTATE_BV says; in the compacted one it belongs to SSE.
        mxcsr: if compact { rfbm & bv & xcr0::SSE != 0 } else { rfbm & vector != 0 },
    })
}

impl Cpu {
    /// XMM and YMM registers that the mode can name.
    pub(crate) fn vector_count(&self) -> usize {
        if self.mode.is64() { 16 } else { 8 }
    }

    /// Checks of FXSAVE and FXRSTOR, and the operand's linear address.
    fn fx_operand(&mut self, op: &Op, write: bool) -> Res<u64> {
        self.check_x87_available()?;
        self.aligned(op, 512, 16, write)
    }

    /// Linear address of the memory operand, which must be aligned (#GP).
    pub(crate) fn aligned(&mut self, op: &Op, len: u32, align: u64, write: bool) -> Res<u64> {
        let lin = self.address(op, len, write)?;
        if lin & (align - 1) != 0 {
            return Err(self.gp(0));
        }
        Ok(lin)
    }

    pub(crate) fn fxsave(&mut self, op: &Op, wide: bool) -> Res<()> {
        let lin = self.fx_operand(op, true)?;
        let count = self.vector_count();
        // The processor checks the whole area, though it leaves the end of it alone.
        self.probe_write(op.seg(), lin, 512)?;
        let mut b = [0; 512];
        self.fpu.put_x87(&mut b, pointers(wide));
        self.fpu.put_mxcsr(&mut b);
        self.fpu.put_xmm(&mut b, count);
        self.write_bytes(op.seg(), lin, &b[..160 + 16 * count])
    }

    pub(crate) fn fxrstor(&mut self, op: &Op, wide: bool) -> Res<()> {
        let lin = self.fx_operand(op, false)?;
        let count = self.vector_count();
        let mut b = [0; 512];
        self.read_bytes(op.seg(), lin, &mut b)?;
        let value = Fpu::image_mxcsr(&b);
        if value & !mxcsr::VALID != 0 {
            return Err(self.gp(0));
        }
        self.fpu.get_x87(&b, pointers(wide));
        self.fpu.set_mxcsr(value);
        self.fpu.get_xmm(&b, count);
        Ok(())
    }

    /// Checks common to the family; the requested-feature bitmap (EDX:EAX and what is enabled).
    fn xsave_checks(&mut self) -> Res<u64> {
        if self.cr4 & cr::CR4_OSXSAVE == 0 {
            return Err(self.ud());
        }
        if self.cr0 & cr::CR0_TS != 0 {
            return Err(self.raise(vector::NM));
        }
        let mask = u64::from(self.get::<u32>(reg::RDX)) << 32 | u64::from(self.get::<u32>(reg::RAX));
        Ok(mask & self.fpu.xcr0)
    }

    fn supervisor_only(&mut self) -> Res<()> {
        if self.cpl != 0 { Err(self.gp(0)) } else { Ok(()) }
    }

    pub(crate) fn xsave(&mut self, op: &Op, wide: bool, how: Save) -> Res<()> {
        let rfbm = self.xsave_checks()?;
        let lin = self.aligned(op, EXTENDED as u32, 64, true)?;
        let seg = op.seg();
        let count = self.vector_count();
        let end = if rfbm & xcr0::AVX != 0 { STANDARD_SIZE } else { EXTENDED };
        self.probe_write(seg, lin, end)?;
        let mut used = self.fpu.in_use() & rfbm;
        let compact = how == Save::Compacted;
        // In the compacted format, MXCSR is part of the SSE component, and its being unusual makes that one in use.
        if compact && rfbm & xcr0::SSE != 0 && self.fpu.mxcsr() != mxcsr::DEFAULT {
            used |= xcr0::SSE;
        }
        let write = if how == Save::Plain { rfbm } else { used };
        let mut b = [0; STANDARD_SIZE];
        if write & xcr0::X87 != 0 {
            self.fpu.put_x87(&mut b, pointers(wide));
            self.write_bytes(seg, lin, &b[..24])?;
            self.write_bytes(seg, lin.wrapping_add(32), &b[32..160])?;
        }
        let save_mxcsr = if compact { used & xcr0::SSE } else { rfbm & (xcr0::SSE | xcr0::AVX) };
        if save_mxcsr != 0 {
            self.fpu.put_mxcsr(&mut b);
            self.write_bytes(seg, lin.wrapping_add(24), &b[24..32])?;
        }
        if write & xcr0::SSE != 0 {
            self.fpu.put_xmm(&mut b, count);
            self.write_bytes(seg, lin.wrapping_add(160), &b[160..160 + 16 * count])?;
        }
        if write & xcr0::AVX != 0 {
            self.fpu.put_avx(&mut b[AVX_OFFSET..], count);
            self.write_bytes(
                seg,
                lin.wrapping_add(AVX_OFFSET as u64),
                &b[AVX_OFFSET..AVX_OFFSET + AVX_SIZE * count / 16],
            )?;
        }
        let header = lin.wrapping_add(HEADER as u64);
        if compact {
            b[..8].copy_from_slice(&used.to_le_bytes());
            b[8..16].copy_from_slice(&(rfbm | COMPACTED).to_le_bytes());
            self.write_bytes(seg, header, &b[..16])
        } else {
            let old = self.read::<u64>(seg, header)?;
            self.write::<u64>(seg, header, old & !rfbm | used)
        }
    }

    pub(crate) fn xsaves(&mut self, op: &Op, wide: bool) -> Res<()> {
        self.xsave_checks()?;
        self.supervisor_only()?;
        self.xsave(op, wide, Save::Compacted)
    }

    pub(crate) fn xrstor(&mut self, op: &Op, wide: bool) -> Res<()> {
        let rfbm = self.xsave_checks()?;
        self.restore(op, wide, rfbm, false)
    }

    pub(crate) fn xrstors(&mut self, op: &Op, wide: bool) -> Res<()> {
        let rfbm = self.xsave_checks()?;
        self.supervisor_only()?;
        self.restore(op, wide, rfbm, true)
    }

    fn restore(&mut self, op: &Op, wide: bool, rfbm: u64, supervisor: bool) -> Res<()> {
        let lin = self.aligned(op, EXTENDED as u32, 64, false)?;
        let count = self.vector_count();
        let mut b = [0; STANDARD_SIZE];
        self.read_bytes(op.seg(), lin, &mut b[..EXTENDED])?;
        let Some(plan) = plan(&b[HEADER..EXTENDED], rfbm, self.fpu.xcr0, supervisor) else {
            return Err(self.gp(0));
        };
        let value = Fpu::image_mxcsr(&b);
        if plan.mxcsr && value & !mxcsr::VALID != 0 {
            return Err(self.gp(0));
        }
        if plan.load & xcr0::AVX != 0 {
            self.read_bytes(
                op.seg(),
                lin.wrapping_add(AVX_OFFSET as u64),
                &mut b[AVX_OFFSET..AVX_OFFSET + AVX_SIZE * count / 16],
            )?;
        }
        let fpu = &mut self.fpu;
        if plan.load & xcr0::X87 != 0 {
            fpu.get_x87(&b, pointers(wide));
        } else if plan.init & xcr0::X87 != 0 {
            fpu.init_x87();
        }
        if plan.mxcsr {
            fpu.set_mxcsr(value);
        } else if quad(&b, HEADER + 8) & COMPACTED != 0 && plan.init & xcr0::SSE != 0 {
            fpu.set_mxcsr(mxcsr::DEFAULT);
        }
        let zero = [0; STANDARD_SIZE];
        if plan.load & xcr0::SSE != 0 {
            fpu.get_xmm(&b, count);
        } else if plan.init & xcr0::SSE != 0 {
            fpu.get_xmm(&zero, count);
        }
        if plan.load & xcr0::AVX != 0 {
            fpu.get_avx(&b[AVX_OFFSET..], count);
        } else if plan.init & xcr0::AVX != 0 {
            fpu.get_avx(&zero, count);
        }
        Ok(())
    }

    pub(crate) fn xgetbv(&mut self) -> Res<()> {
        if self.cr4 & cr::CR4_OSXSAVE == 0 {
            return Err(self.ud());
        }
        let value = match self.get::<u32>(reg::RCX) {
            0 => self.fpu.xcr0,
            1 => {
                let mxcsr_used = if self.fpu.mxcsr() != mxcsr::DEFAULT { xcr0::SSE } else { 0 };
                (self.fpu.in_use() | mxcsr_used) & self.fpu.xcr0
            }
            _ => return Err(self.gp(0)),
        };
        self.set::<u32>(reg::RAX, value as u32);
        self.set::<u32>(reg::RDX, (value >> 32) as u32);
        Ok(())
    }

    pub(crate) fn xsetbv(&mut self) -> Res<()> {
        if self.cr4 & cr::CR4_OSXSAVE == 0 {
            return Err(self.ud());
        }
        self.supervisor_only()?;
        let value = u64::from(self.get::<u32>(reg::RDX)) << 32 | u64::from(self.get::<u32>(reg::RAX));
        let index: u32 = self.get(reg::RCX);
        if index != 0 || !valid_xcr0(value) {
            return Err(self.gp(0));
        }
        self.fpu.xcr0 = value;
        self.fpu.control_changed();
        Ok(())
    }
}

/// Whether XCR0 may have this value.
pub fn valid_xcr0(value: u64) -> bool {
    value & xcr0::X87 != 0 && value & !components() == 0 && (value & xcr0::AVX == 0 || value & xcr0::SSE != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(bv: u64, comp: u64) -> [u8; 64] {
        let mut h = [0; 64];
        h[..8].copy_from_slice(&bv.to_le_bytes());
        h[8..16].copy_from_slice(&comp.to_le_bytes());
        h
    }

    #[test]
    fn headers() {
        // Standard format.
        let p = plan(&header(3, 0), 7, 7, false).unwrap();
        assert_eq!((p.load, p.init, p.mxcsr), (3, 4, true));
        assert_eq!(plan(&header(8, 0), 7, 7, false), None);
        assert_eq!(plan(&header(3, 0), 7, 7, true), None);
        let mut h = header(3, 0);
        h[16] = 1;
        assert_eq!(plan(&h, 7, 7, false), None);
        h[16] = 0;
        h[24] = 1; // ignored in the standard format
        assert!(plan(&h, 7, 7, false).is_some());
        // Compacted format.
        let p = plan(&header(1, COMPACTED | 7), 7, 7, true).unwrap();
        assert_eq!((p.load, p.init, p.mxcsr), (1, 6, false));
        assert_eq!(plan(&header(4, COMPACTED | 3), 7, 7, false), None);
        assert_eq!(plan(&header(1, COMPACTED | 15), 7, 7, false), None);
        let mut h = header(1, COMPACTED | 7);
        h[63] = 1;
        assert_eq!(plan(&h, 7, 7, false), None);
    }

    #[test]
    fn xcr0_values() {
        assert!(valid_xcr0(1) && valid_xcr0(3));
        assert!(!valid_xcr0(0) && !valid_xcr0(2) && !valid_xcr0(5) && !valid_xcr0(0xe7));
    }
}
