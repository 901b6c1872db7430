//! Register operands.

use super::asm::{Mem, Rm, host};
use super::emit::{Done, Emitter, Unsupported, set_memory};
use super::layout::{HOST, gpr};
use super::scan::Inst;
use iced_x86::{OpAccess, OpKind, Register};

/// Whether a register is AH, CH, DH or BH.
pub fn is_high(r: Register) -> bool {
    matches!(r, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// Number of the general register that `r` is (part of).
pub fn number(r: Register) -> usize {
    r.full_register().number()
}

/// The host register `n`, seen as one of `size` bytes.
pub fn host_register(n: u8, size: usize) -> Register {
    let n = u32::from(n & 15);
    match size {
        1 if n < 4 => Register::AL + n,
        1 => Register::SPL + (n - 4),
        2 => Register::AX + n,
        4 => Register::EAX + n,
        _ => Register::RAX + n,
    }
}

impl Emitter<'_> {
    /// An instruction with AH, CH, DH or BH, which can only be encoded without REX: registers that need one are copied
    /// to scratch registers.
    pub(super) fn high_byte(&mut self, inst: &Inst) -> Done {
        let mut i = inst.i;
        let access = self.accesses(&i);
        let memory = (0..i.op_count()).find(|k| i.op_kind(*k) == OpKind::Memory);
        // Which scratch register stands for which guest register.
        let mut copies: [Option<usize>; 2] = [None; 2];
        let mut written = [false; 2];
        for k in 0..i.op_count() {
            if i.op_kind(k) == OpKind::Register && is_high(i.op_register(k)) {
                let n = number(i.op_register(k));
                if n < 2 {
                    copies[n] = Some(n);
                }
            }
        }
        let flags = Self::needs_flags(inst);
        let mut reserved = None;
        if let Some(k) = memory {
            let t = if copies[0].is_some() || flags { host::RCX } else { host::RAX };
            if copies[t as usize].is_some() {
                return Err(Unsupported);
            }
            let write = !matches!(access[k as usize], OpAccess::Read | OpAccess::CondRead);
            let m = self.operand(inst, write, 1, t)?;
            self.asm.lea(t, m);
            set_memory(&mut i, Mem::base(t, 0));
            reserved = Some(t as usize);
        }
        if flags {
            self.require();
        }
        let mut names = [Register::None; 5];
        for k in 0..i.op_count() {
            if i.op_kind(k) != OpKind::Register {
                continue;
            }
            let r = i.op_register(k);
            let n = number(r);
            let writes = !matches!(access[k as usize], OpAccess::Read | OpAccess::CondRead | OpAccess::None);
            let direct = HOST[n].filter(|h| if r.size() == 1 { *h < 4 } else { *h < 8 } && *h > 1);
            let h = if let Some(s) = copies.iter().position(|c| *c == Some(n)) {
                written[s] |= writes;
                s as u8
            } else if let Some(h) = direct {
                h
            } else {
                let s = (0..2).find(|s| copies[*s].is_none() && reserved != Some(*s)).ok_or(Unsupported)?;
                copies[s] = Some(n);
                written[s] |= writes;
                s as u8
            };
            names[k as usize] =
                if is_high(r) { Register::AH + u32::from(h) } else { host_register(h, r.size()) };
        }
        for (s, n) in copies.iter().enumerate() {
            if let Some(n) = n {
                self.asm.load(s as u8, HOST[*n].map_or(Rm::Gs(gpr(*n)), Rm::Reg));
            }
        }
        for k in 0..i.op_count() {
            if names[k as usize] != Register::None {
                i.set_op_register(k, names[k as usize]);
            }
        }
        self.encode(&i)?;
        for (s, n) in copies.iter().enumerate() {
            if let Some(n) = n
                && written[s]
            {
                self.asm.store(HOST[*n].map_or(Rm::Gs(gpr(*n)), Rm::Reg), s as u8);
            }
        }
        self.wrote(inst);
        Ok(())
    }

    /// LEA: no access, and flags stay as they are.
    pub(super) fn lea(&mut self, inst: &Inst) -> Done {
        let i = &inst.i;
        let size = i.op_register(0).size();
        let n = number(i.op_register(0));
        if size < 4 {
            return Err(Unsupported);
        }
        let wide = size == 8;
        let d = HOST[n].unwrap_or(host::RAX);
        // Segment overrides do not matter.
        if i.memory_base() == Register::RIP
            || i.memory_base() == Register::None && i.memory_index() == Register::None
        {
            let v = i.memory_displacement64();
            self.asm.mov_imm(d, if wide { v } else { v & 0xffff_ffff });
        } else {
            let part = |r: Register| (r != Register::None).then(|| number(r));
            let (base, index) = (part(i.memory_base()), part(i.memory_index()));
            let base = base.map(|n| self.hold(n, host::RCX));
            let index = index.map(|n| self.hold(n, host::RAX));
            let scale = i.memory_index_scale().trailing_zeros() as u8;
            let m = Mem { base, index: index.map(|r| (r, scale)), disp: i.memory_displacement64() as i32 };
            self.asm.rm(wide, &[0x8d], d, Rm::Mem(m));
        }
        if HOST[n].is_none() {
            self.asm.store(Rm::Gs(gpr(n)), d);
        }
        Ok(())
    }

    /// The host register of a guest register, or `scratch` with a copy.
    pub(super) fn hold(&mut self, n: usize, scratch: u8) -> u8 {
        HOST[n].unwrap_or_else(|| {
            self.asm.load(scratch, Rm::Gs(gpr(n)));
            scratch
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(host_register(3, 1), Register::BL);
        assert_eq!(host_register(5, 1), Register::BPL);
        assert_eq!(host_register(10, 1), Register::R10L);
        assert_eq!(host_register(15, 2), Register::R15W);
        assert_eq!(host_register(7, 4), Register::EDI);
        assert_eq!(host_register(12, 8), Register::R12);
        assert_eq!(number(Register::CH), 1);
        assert_eq!(Register::AH + 3, Register::BH);
    }
}
