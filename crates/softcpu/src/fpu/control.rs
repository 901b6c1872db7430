//! x87 control instructions, MXCSR, and the environment images of FNSTENV and FNSAVE (Intel SDM vol. 1, 8.1 and 8.3).

use super::{Fpu, abridge, fsw, mxcsr};
use crate::fault::{Res, vector};
use crate::op::Op;
use crate::state::{Cpu, cr, reg};

/// Format of an environment image (Intel SDM vol. 1, figures 8-9 to 8-12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Format {
    /// 32-bit fields.
    wide: bool,
    /// Real-address or virtual-8086 mode: linear addresses instead of selector and offset.
    real: bool,
}

impl Format {
    fn len(self) -> usize {
        if self.wide { 28 } else { 14 }
    }
}

impl Fpu {
    /// The seven fields of an environment image, each 2 or 4 bytes.
    fn environment(&mut self, format: Format) -> [u32; 7] {
        let (fop, fip, fdp) = (u32::from(self.fop & 0x7ff), self.fip as u32, self.fdp as u32);
        let image = self.x87_ref();
        let words = [image.fcw, image.fsw, image.full_ftw()].map(|w| u32::from(w) | 0xffff_0000);
        let [fcw, fsw, ftw] = words;
        match format {
            // Selectors are zero: CPUID says that they are deprecated.
            Format { wide: true, real: false } => [fcw, fsw, ftw, fip, fop << 16, fdp, 0xffff_0000],
            Format { wide: false, real: false } => [fcw, fsw, ftw, fip, 0, fdp, 0],
            Format { wide: true, real: true } => [
                fcw,
                fsw,
                ftw,
                fip & 0xffff | 0xffff_0000,
                (fip >> 16) << 12 | fop,
                fdp & 0xffff | 0xffff_0000,
                (fdp >> 16) << 12,
            ],
            Format { wide: false, real: true } => {
                [fcw, fsw, ftw, fip, (fip >> 16 & 0xf) << 12 | fop, fdp, (fdp >> 16 & 0xf) << 12]
            }
        }
    }

    fn set_environment(&mut self, [fcw, fsw, ftw, a, b, c, d]: [u32; 7], format: Format) {
        self.x87().set_env(fcw as u16, fsw as u16, abridge(ftw as u16));
        let (fop, fip, fdp) = match format {
            Format { wide: true, real: false } => (b >> 16, a, c),
            // There is no room for the opcode.
            Format { wide: false, real: false } => (0, a, c),
            Format { wide: true, real: true } => {
                (b, a & 0xffff | (b >> 12) << 16, c & 0xffff | (d >> 12) << 16)
            }
            Format { wide: false, real: true } => {
                (b, a & 0xffff | (b >> 12) << 16, c & 0xffff | (d >> 12) << 16)
            }
        };
        (self.fop, self.fip, self.fdp) = (fop as u16 & 0x7ff, u64::from(fip), u64::from(fdp));
    }
}

fn put(out: &mut [u8], fields: [u32; 7], wide: bool) {
    let size = if wide { 4 } else { 2 };
    for (i, f) in fields.iter().enumerate() {
        out[i * size..(i + 1) * size].copy_from_slice(&f.to_le_bytes()[..size]);
    }
}

fn get(from: &[u8], wide: bool) -> [u32; 7] {
    let size = if wide { 4 } else { 2 };
    std::array::from_fn(|i| {
        let mut b = [0; 4];
        b[..size].copy_from_slice(&from[i * size..(i + 1) * size]);
        u32::from_le_bytes(b)
    })
}

impl Cpu {
    fn x87_format(&self, wide: bool) -> Format {
        Format { wide, real: !self.protected() || self.v86() }
    }

    /// Reads the memory operand.
    pub(super) fn operand(&mut self, op: &Op, buf: &mut [u8]) -> Res<()> {
        let lin = self.address(op, buf.len() as u32, false)?;
        self.read_bytes(op.seg(), lin, buf)
    }

    /// Writes the memory operand.
    pub(super) fn set_operand(&mut self, op: &Op, buf: &[u8]) -> Res<()> {
        let lin = self.address(op, buf.len() as u32, true)?;
        self.write_bytes(op.seg(), lin, buf)
    }

    /// #NM as x87 instructions without wait raise it.
    pub(crate) fn check_x87_available(&mut self) -> Res<()> {
        if self.cr0 & (cr::CR0_EM | cr::CR0_TS) != 0 { Err(self.raise(vector::NM)) } else { Ok(()) }
    }

    pub(crate) fn fninit(&mut self) -> Res<()> {
        self.check_x87_available()?;
        self.fpu.fninit();
        Ok(())
    }

    pub(crate) fn fnclex(&mut self) -> Res<()> {
        self.check_x87_available()?;
        self.fpu.clear_x87_exceptions();
        Ok(())
    }

    /// FLDCW: a waiting instruction.
    pub(crate) fn fldcw(&mut self, op: &Op) -> Res<()> {
        self.check_x87_waiting()?;
        let mut b = [0; 2];
        self.operand(op, &mut b)?;
        self.fpu.set_fcw(u16::from_le_bytes(b));
        Ok(())
    }

    pub(crate) fn fnstcw(&mut self, op: &Op) -> Res<()> {
        self.check_x87_available()?;
        let value = self.fpu.fcw();
        self.set_operand(op, &value.to_le_bytes())
    }

    pub(crate) fn fnstsw(&mut self, op: &Op) -> Res<()> {
        self.check_x87_available()?;
        let value = self.fpu.fsw();
        self.set_operand(op, &value.to_le_bytes())
    }

    pub(crate) fn fnstsw_ax(&mut self) -> Res<()> {
        self.check_x87_available()?;
        let value = self.fpu.fsw();
        self.set::<u16>(reg::RAX, value);
        Ok(())
    }

    pub(crate) fn fnstenv(&mut self, op: &Op, wide: bool) -> Res<()> {
        self.check_x87_available()?;
        let format = self.x87_format(wide);
        let mut b = [0; 28];
        put(&mut b, self.fpu.environment(format), wide);
        self.set_operand(op, &b[..format.len()])?;
        let image = self.fpu.x87();
        image.fcw |= fsw::FLAGS;
        image.fsw &= !(fsw::ES | fsw::B);
        Ok(())
    }

    pub(crate) fn fldenv(&mut self, op: &Op, wide: bool) -> Res<()> {
        self.check_x87_waiting()?;
        let format = self.x87_format(wide);
        let mut b = [0; 28];
        self.operand(op, &mut b[..format.len()])?;
        self.fpu.set_environment(get(&b, wide), format);
        Ok(())
    }

    pub(crate) fn fnsave(&mut self, op: &Op, wide: bool) -> Res<()> {
        self.check_x87_available()?;
        let format = self.x87_format(wide);
        let at = format.len();
        let mut b = [0; 108];
        put(&mut b, self.fpu.environment(format), wide);
        for (i, st) in self.fpu.x87_ref().st.iter().enumerate() {
            b[at + 10 * i..at + 10 * (i + 1)].copy_from_slice(&st[..10]);
        }
        self.set_operand(op, &b[..at + 80])?;
        self.fpu.fninit();
        Ok(())
    }

    pub(crate) fn frstor(&mut self, op: &Op, wide: bool) -> Res<()> {
        self.check_x87_waiting()?;
        let format = self.x87_format(wide);
        let at = format.len();
        let mut b = [0; 108];
        self.operand(op, &mut b[..at + 80])?;
        self.fpu.set_environment(get(&b, wide), format);
        for (i, st) in self.fpu.x87().st.iter_mut().enumerate() {
            *st = [0; 16];
            st[..10].copy_from_slice(&b[at + 10 * i..at + 10 * (i + 1)]);
        }
        Ok(())
    }

    /// WAIT.
    pub(crate) fn fwait(&mut self) -> Res<()> {
        if self.cr0 & (cr::CR0_MP | cr::CR0_TS) == cr::CR0_MP | cr::CR0_TS {
            return Err(self.raise(vector::NM));
        }
        self.check_x87_pending()
    }

    pub(crate) fn ldmxcsr(&mut self, op: &Op) -> Res<()> {
        let mut b = [0; 4];
        self.operand(op, &mut b)?;
        let value = u32::from_le_bytes(b);
        if value & !mxcsr::VALID != 0 {
            return Err(self.gp(0));
        }
        self.fpu.set_mxcsr(value);
        Ok(())
    }

    pub(crate) fn stmxcsr(&mut self, op: &Op) -> Res<()> {
        let value = self.fpu.mxcsr();
        self.set_operand(op, &value.to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn environments_round_trip(
            fcw: u16, fsw: u16, tags: u8, fop in 0u16..0x800, fip: u32, fdp: u32, wide: bool, real: bool
        ) {
            let format = Format { wide, real };
            let mut f = Fpu::new();
            f.fninit();
            f.x87().set_env(fcw, fsw, tags);
            // What the format can hold.
            let limit = match format {
                Format { wide: true, .. } => u32::MAX,
                Format { wide: false, real: true } => 0xf_ffff,
                Format { wide: false, real: false } => 0xffff,
            };
            (f.fop, f.fip, f.fdp) = (fop, u64::from(fip & limit), u64::from(fdp & limit));
            let mut bytes = [0; 28];
            put(&mut bytes, f.environment(format), wide);
            if !wide && !real {
                f.fop = 0;
            }
            let mut g = Fpu::new();
            g.set_environment(get(&bytes, wide), format);
            let mut again = [0; 28];
            put(&mut again, g.environment(format), wide);
            prop_assert_eq!(bytes, again);
            prop_assert_eq!((g.fop, g.fip, g.fdp), (f.fop, f.fip, f.fdp));
            prop_assert_eq!(g.x87().ftw, tags);
        }
    }
}
