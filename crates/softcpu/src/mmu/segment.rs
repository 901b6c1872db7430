//! From segment and offset to linear address (Intel SDM vol. 3, 6.3 to 6.6).

use crate::fault::{Res, vector};
use crate::state::{Cpu, Seg, attr, reg, seg};

impl Cpu {
    /// Linear address of `len` bytes at `offset` in a segment, with the checks of the current mode. `offset` is
    /// already truncated to the address size.
    #[inline]
    pub fn linear(&mut self, s: usize, offset: u64, len: u32, write: bool) -> Res<u64> {
        if self.mode.is64() {
            let base = if s >= seg::FS { self.seg[s].base } else { 0 };
            return Ok(base.wrapping_add(offset));
        }
        let g = &self.seg[s];
        let flat = g.limit == u32::MAX
            && g.attr & (attr::P | attr::UNUSABLE | attr::S | attr::CODE | attr::EC | attr::RW)
                == attr::P | attr::S | attr::RW;
        // An access that wraps around 4 GiB violates the limit even of a flat segment.
        if flat && (offset as u32).checked_add(len.wrapping_sub(1)).is_some() {
            return Ok(g.base.wrapping_add(offset) as u32 as u64);
        }
        self.linear_checked(s, offset as u32, len, write)
    }

    #[cold]
    fn linear_checked(&mut self, s: usize, offset: u32, len: u32, write: bool) -> Res<u64> {
        let g = self.seg[s];
        self.linear_in(&g, s, offset, len, write, 0)
    }

    /// Linear address in a given segment, used as segment register `s`; `error` is the code of a fault.
    pub(crate) fn linear_in(
        &mut self,
        g: &Seg,
        s: usize,
        offset: u32,
        len: u32,
        write: bool,
        error: u32,
    ) -> Res<u64> {
        let last = offset.wrapping_add(len.wrapping_sub(1));
        let mut ok = g.usable() && last >= offset;
        if self.protected() && !self.v86() {
            let code = g.attr & attr::CODE != 0;
            ok &= if write { !code && g.attr & attr::RW != 0 } else { !code || g.attr & attr::RW != 0 };
        }
        if g.attr & (attr::CODE | attr::EC) == attr::EC {
            let top = if g.attr & attr::DB != 0 { u32::MAX } else { 0xffff };
            ok &= offset > g.limit && last <= top;
        } else {
            ok &= last <= g.limit;
        }
        if !ok {
            let v = if s == seg::SS { vector::SS } else { vector::GP };
            return Err(self.raise_with(v, error));
        }
        Ok(g.base.wrapping_add(offset as u64) as u32 as u64)
    }

    /// Offset of the memory operand of an operation within its segment.
    #[inline(always)]
    pub fn offset(&self, op: &crate::op::Op) -> u64 {
        let sum = self
            .get::<u64>(op.base)
            .wrapping_add(self.get::<u64>(op.index) << op.scale)
            .wrapping_add(op.disp);
        match op.asize() {
            crate::op::asize::A64 => sum,
            crate::op::asize::A32 => sum as u32 as u64,
            _ => sum as u16 as u64,
        }
    }

    /// Linear address of the memory operand of an operation that accesses `len` bytes.
    #[inline]
    pub fn address(&mut self, op: &crate::op::Op, len: u32, write: bool) -> Res<u64> {
        let offset = self.offset(op);
        self.linear(op.seg(), offset, len, write)
    }

    /// Linear address of the top of the stack plus `delta`, for an access of `len` bytes.
    #[inline]
    pub fn stack(&mut self, delta: i64, len: u32, write: bool) -> Res<u64> {
        let sp = self.regs[reg::RSP as usize / 8].wrapping_add(delta as u64) & self.stack_mask();
        self.linear(seg::SS, sp, len, write)
    }
}
