//! Stores and loads under a mask, and gathers. Elements that are not selected are not accessed, and (but for the stores
//! of bytes) cannot fault.

use super::recipe::Class;
use super::run::third;
use crate::fault::{Res, vector};
use crate::fpu::Vector;
use crate::op::{Op, asize};
use crate::state::{Cpu, seg};

/// Index of the vector register in a slot.
fn index(slot: u64) -> usize {
    ((slot / 8) & 15) as usize
}

/// Whether element `i` of a mask vector is selected: its most significant bit.
fn selected(mask: &[u8], i: usize, element: usize) -> bool {
    mask[(i + 1) * element - 1] & 0x80 != 0
}

impl Cpu {
    /// Linear address of element `i` of a vector in memory. Only the element itself has to be inside the segment; but
    /// offsets do not wrap within the vector.
    fn element_address(&mut self, op: &Op, i: usize, element: usize, write: bool) -> Res<u64> {
        let offset = self.offset(op).wrapping_add((i * element) as u64);
        if !self.mode.is64() && offset > u64::from(u32::MAX) {
            let v = if op.seg() == seg::SS { vector::SS } else { vector::GP };
            return Err(self.raise_with(v, 0));
        }
        self.linear(op.seg(), offset, element as u32, write)
    }

    /// Writes the selected elements of `data`, after all of them have been found writable.
    fn write_selected(&mut self, op: &Op, data: &[u8], mask: &[u8], element: usize) -> Res<()> {
        let count = data.len() / element;
        let mut at = [0; 16];
        for i in (0..count).filter(|i| selected(mask, *i, element)) {
            at[i] = self.element_address(op, i, element, true)?;
            self.probe_write(op.seg(), at[i], element)?;
        }
        for i in (0..count).filter(|i| selected(mask, *i, element)) {
            self.write_bytes(op.seg(), at[i], &data[i * element..(i + 1) * element])?;
        }
        Ok(())
    }

    /// MASKMOVQ.
    pub(super) fn mask_store_mmx(&mut self, op: &Op) -> Res<()> {
        self.check_unit(Class::Mmx)?;
        self.check_x87_pending()?;
        let data = self.fpu.mmx(index(op.dst.into()) & 7);
        let mask = self.fpu.mmx(index(op.src.into()) & 7);
        self.fpu.enter_mmx();
        self.probe_operand(op, data.len())?;
        self.write_selected(op, &data, &mask, 1)
    }

    /// MASKMOVDQU and its VEX form.
    pub(super) fn mask_store_bytes(&mut self, op: &Op, class: Class) -> Res<()> {
        self.check_unit(class)?;
        let data = self.fpu.vec[index(op.dst.into())].xmm();
        let mask = self.fpu.vec[index(op.src.into())].xmm();
        self.probe_operand(op, data.len())?;
        self.write_selected(op, &data, &mask, 1)
    }

    /// The byte-masked stores check all of their operand, selected or not (AMD APM vol. 4, MASKMOVDQU).
    fn probe_operand(&mut self, op: &Op, len: usize) -> Res<()> {
        let lin = self.address(op, len as u32, true)?;
        self.probe_write(op.seg(), lin, len)
    }

    /// VMASKMOV and VPMASKMOV from memory.
    pub(super) fn mask_load(&mut self, op: &Op, element: usize, vector: usize) -> Res<()> {
        self.check_unit(Class::Avx)?;
        let mask = self.fpu.vec[index(op.src.into())];
        let mut result = Vector([0; 64]);
        for i in (0..vector / element).filter(|i| selected(&mask.0, *i, element)) {
            let lin = self.element_address(op, i, element, false)?;
            let at = i * element;
            self.read_bytes(op.seg(), lin, &mut result.0[at..at + element])?;
        }
        self.fpu.vec[index(op.dst.into())] = result;
        Ok(())
    }

    /// VMASKMOV and VPMASKMOV to memory.
    pub(super) fn mask_store(&mut self, op: &Op, element: usize, vector: usize) -> Res<()> {
        self.check_unit(Class::Avx)?;
        let mask = self.fpu.vec[index(op.dst.into())];
        let data = self.fpu.vec[index(op.src.into())];
        self.write_selected(op, &data.0[..vector], &mask.0[..vector], element)
    }

    /// VGATHER and VPGATHER. When an element faults, those before it have been loaded and their mask bits cleared, so
    /// that the instruction can be restarted (Intel SDM vol. 2, VGATHERDPS).
    pub(super) fn gather(&mut self, op: &Op, element: usize, index_size: usize, count: usize) -> Res<()> {
        self.check_unit(Class::Avx)?;
        let (dst, mask, indices) = (index(op.dst.into()), index(op.src.into()), index(third(op)));
        // No two of the registers may be the same.
        if dst == mask || dst == indices || mask == indices {
            return Err(self.ud());
        }
        let indices = self.fpu.vec[indices];
        let base = self.offset(op);
        for i in 0..count {
            let at = i * element;
            if selected(&self.fpu.vec[mask].0, i, element) {
                let raw = &indices.0[i * index_size..(i + 1) * index_size];
                let offset = match *raw {
                    [a, b, c, d] => i64::from(i32::from_le_bytes([a, b, c, d])) as u64,
                    [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
                    _ => 0,
                };
                let sum = base.wrapping_add(offset << op.scale);
                let offset = if op.asize() == asize::A64 { sum } else { sum as u32 as u64 };
                let lin = self.linear(op.seg(), offset, element as u32, false)?;
                let mut b = [0; 8];
                self.read_bytes(op.seg(), lin, &mut b[..element])?;
                self.fpu.vec[dst].0[at..at + element].copy_from_slice(&b[..element]);
            }
            self.fpu.vec[mask].0[at..at + element].fill(0);
        }
        self.fpu.vec[dst].0[count * element..].fill(0);
        self.fpu.vec[mask].0.fill(0);
        Ok(())
    }
}
