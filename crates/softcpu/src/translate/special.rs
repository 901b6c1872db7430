//! Instructions with operands that cannot be chosen: shifts by CL, multiplication and division, CMPXCHG, sign extension of
//! the accumulator.

use super::asm::{Mem, Rm, cond, host, op};
use super::emit::{Done, Emitter, Unsupported, set_memory};
use super::layout::{HOST, gpr};
use super::operand::{host_register, is_high, number};
use super::scan::Inst;
use iced_x86::{Code, OpKind};

/// Host register of the guest's RAX.
fn accumulator() -> u8 {
    HOST[0].unwrap_or(host::R10)
}

impl Emitter<'_> {
    fn no_high_bytes(inst: &Inst) -> Done {
        let i = &inst.i;
        let high = (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Register && is_high(i.op_register(k)));
        if high { Err(Unsupported) } else { Ok(()) }
    }

    pub(super) fn shift_cl(&mut self, inst: &Inst) -> Done {
        Self::no_high_bytes(inst)?;
        let mut i = inst.i;
        let flags = Self::needs_flags(inst);
        let mut held = None;
        if i.op_kind(0) == OpKind::Memory {
            if flags {
                return Err(Unsupported);
            }
            let m = self.operand(inst, true, 1, host::RAX)?;
            set_memory(&mut i, m);
        }
        if flags {
            self.require();
        }
        // The last operand is CL; SHLD and SHRD have another register before it.
        for k in 0..i.op_count() - 1 {
            if i.op_kind(k) != OpKind::Register {
                continue;
            }
            let r = i.op_register(k);
            let n = number(r);
            let h = match HOST[n] {
                Some(h) => h,
                None if i.op_kind(0) == OpKind::Memory => return Err(Unsupported),
                None => match held {
                    Some(m) if m != n => return Err(Unsupported),
                    _ => {
                        self.asm.load(host::RAX, Rm::Gs(gpr(n)));
                        held = Some(n);
                        host::RAX
                    }
                },
            };
            i.set_op_register(k, host_register(h, r.size()));
        }
        self.asm.load32(host::RCX, Rm::Reg(HOST[1].ok_or(Unsupported)?));
        self.encode(&i)?;
        if let Some(n) = held {
            self.asm.store(Rm::Gs(gpr(n)), host::RAX);
        }
        self.wrote(inst);
        Ok(())
    }

    pub(super) fn mul(&mut self, inst: &Inst) -> Done {
        Self::no_high_bytes(inst)?;
        let mut i = inst.i;
        if i.op_kind(0) == OpKind::Memory {
            let m = self.operand(inst, false, 1, host::RCX)?;
            set_memory(&mut i, m);
        } else {
            let r = i.op_register(0);
            let h = self.hold(number(r), host::RCX);
            i.set_op_register(0, host_register(h, r.size()));
        }
        self.asm.mov(host::RAX, accumulator());
        self.encode(&i)?;
        self.asm.mov(accumulator(), host::RAX);
        self.wrote(inst);
        Ok(())
    }

    /// Divisor of 4 or 8 bytes into RCX; whether it has 8.
    fn divisor(&mut self, inst: &Inst) -> Result<bool, Unsupported> {
        let i = &inst.i;
        let wide = match i.code() {
            Code::Div_rm64 | Code::Idiv_rm64 => true,
            Code::Div_rm32 | Code::Idiv_rm32 => false,
            _ => return Err(Unsupported),
        };
        let from = if i.op_kind(0) == OpKind::Memory {
            Rm::Mem(self.operand(inst, false, 1, host::RCX)?)
        } else {
            let n = number(i.op_register(0));
            HOST[n].map_or(Rm::Gs(gpr(n)), Rm::Reg)
        };
        if wide {
            self.asm.load(host::RCX, from);
        } else {
            self.asm.load32(host::RCX, from);
        }
        self.clobber(inst.live_in());
        Ok(wide)
    }

    /// DIV: the quotient fits if the upper half is below the divisor. (All flags are undefined afterwards.)
    pub(super) fn div(&mut self, inst: &Inst) -> Done {
        let wide = self.divisor(inst)?;
        self.asm.rm(wide, &[0x3b], host::RDX, Rm::Reg(host::RCX)); // cmp edx, ecx
        self.interpret_if(cond::AE, &inst.i);
        self.asm.mov(host::RAX, accumulator());
        self.asm.rm(wide, &[0xf7], 6, Rm::Reg(host::RCX));
        self.asm.mov(accumulator(), host::RAX);
        self.wrote(inst);
        Ok(())
    }

    /// IDIV: surely fits if the dividend is sign-extended and the divisor neither 0 nor -1.
    pub(super) fn idiv(&mut self, inst: &Inst) -> Done {
        let wide = self.divisor(inst)?;
        self.asm.rm(wide, &[0x8d], host::RAX, Rm::Mem(Mem::base(host::RCX, 1)));
        self.asm.alu_imm(op::CMP, wide, Rm::Reg(host::RAX), 1);
        self.interpret_if(cond::BE, &inst.i);
        self.asm.mov(host::RAX, accumulator());
        self.asm.rm(wide, &[0xc1], 7, Rm::Reg(host::RAX));
        self.asm.bytes(&[if wide { 63 } else { 31 }]); // sar
        self.asm.rm(wide, &[0x3b], host::RAX, Rm::Reg(host::RDX));
        self.interpret_if(cond::NE, &inst.i);
        self.asm.mov(host::RAX, accumulator());
        self.asm.rm(wide, &[0xf7], 7, Rm::Reg(host::RCX));
        self.asm.mov(accumulator(), host::RAX);
        self.wrote(inst);
        Ok(())
    }

    pub(super) fn cmpxchg(&mut self, inst: &Inst) -> Done {
        Self::no_high_bytes(inst)?;
        let mut i = inst.i;
        let r = i.op_register(1);
        let source = HOST[number(r)].ok_or(Unsupported)?;
        if i.op_kind(0) == OpKind::Memory {
            let m = self.operand(inst, true, 1, host::RCX)?;
            set_memory(&mut i, m);
        } else {
            let d = i.op_register(0);
            let n = number(d);
            if n == 0 {
                return Err(Unsupported);
            }
            i.set_op_register(0, host_register(HOST[n].ok_or(Unsupported)?, d.size()));
        }
        i.set_op_register(1, host_register(source, r.size()));
        self.asm.mov(host::RAX, accumulator());
        self.encode(&i)?;
        self.asm.mov(accumulator(), host::RAX);
        self.wrote(inst);
        Ok(())
    }

    /// CBW, CWDE, CDQE: within RAX. CWD, CDQ, CQO: RDX from RAX; RDX is in its place.
    pub(super) fn extend(&mut self, inst: &Inst) -> Done {
        let (bytes, accumulates): (&[u8], bool) = match inst.i.code() {
            Code::Cbw => (&[0x66, 0x98], true),
            Code::Cwde => (&[0x98], true),
            Code::Cdqe => (&[0x48, 0x98], true),
            Code::Cwd => (&[0x66, 0x99], false),
            Code::Cdq => (&[0x99], false),
            Code::Cqo => (&[0x48, 0x99], false),
            _ => return Err(Unsupported),
        };
        self.asm.mov(host::RAX, accumulator());
        self.asm.bytes(bytes);
        if accumulates {
            self.asm.mov(accumulator(), host::RAX);
        }
        Ok(())
    }
}
