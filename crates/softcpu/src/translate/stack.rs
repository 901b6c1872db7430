//! PUSH, POP, LEAVE.

use super::asm::{Mem, Rm, host};
use super::emit::{Done, Emitter, Unsupported};
use super::layout::{HOST, SPILL, gpr};
use super::memory::{Ea, Shape};
use super::scan::Inst;
use iced_x86::{OpKind, Register};

pub(super) const RSP: usize = 4;
const RBP: usize = 5;

/// Host register of the guest's RSP.
pub(super) fn stack_register() -> u8 {
    HOST[RSP].unwrap_or(host::R15)
}

/// The host's form of what is pushed.
pub(super) enum Pushed {
    /// A host register other than RAX.
    Register(u8),
    /// A constant, sign-extended.
    Constant(i32),
}

impl Emitter<'_> {
    /// Checks the slot below the top of the stack for writing; `t` is RAX.
    pub(super) fn check_push(&mut self, inst: &Inst, once: bool) -> Result<Mem, Unsupported> {
        let shape = Shape { write: true, size: 8, align: 1, once };
        self.check(inst, &Ea::base(RSP, -8), shape, host::RAX)
    }

    /// Stores to the checked slot and moves the stack pointer.
    pub(super) fn store_push(&mut self, slot: Mem, what: Pushed) {
        match what {
            Pushed::Register(r) => self.asm.store(Rm::Mem(slot), r),
            Pushed::Constant(v) => {
                self.asm.rm(true, &[0xc7], 0, Rm::Mem(slot));
                self.asm.bytes(&v.to_le_bytes());
            }
        }
        self.asm.lea(stack_register(), Mem::base(stack_register(), -8));
    }

    pub(super) fn push(&mut self, inst: &Inst) -> Done {
        let i = &inst.i;
        match i.op_kind(0) {
            OpKind::Register => {
                let slot = self.check_push(inst, false)?;
                let r = self.hold(super::operand::number(i.op_register(0)), host::RCX);
                self.store_push(slot, Pushed::Register(r));
            }
            OpKind::Memory => {
                if i.memory_size().size() != 8 {
                    return Err(Unsupported);
                }
                let m = self.operand(inst, false, 1, host::RAX)?;
                self.asm.load(host::RCX, Rm::Mem(m));
                self.asm.store(Rm::Gs(SPILL), host::RCX);
                let slot = self.check_push(inst, true)?;
                self.asm.load(host::RCX, Rm::Gs(SPILL));
                self.store_push(slot, Pushed::Register(host::RCX));
            }
            _ => {
                let v = i32::try_from(i.immediate(0) as i64).map_err(|_| Unsupported)?;
                let slot = self.check_push(inst, false)?;
                self.store_push(slot, Pushed::Constant(v));
            }
        }
        Ok(())
    }

    pub(super) fn pop(&mut self, inst: &Inst) -> Done {
        let r = inst.i.op_register(0);
        if r == Register::None {
            return Err(Unsupported);
        }
        let n = super::operand::number(r);
        let shape = Shape { write: false, size: 8, align: 1, once: false };
        let m = self.check(inst, &Ea::base(RSP, 0), shape, host::RAX)?;
        let sp = stack_register();
        match HOST[n] {
            Some(h) if h == sp => self.asm.load(sp, Rm::Mem(m)),
            Some(h) => {
                self.asm.load(h, Rm::Mem(m));
                self.asm.lea(sp, Mem::base(sp, 8));
            }
            None => {
                self.asm.load(host::RCX, Rm::Mem(m));
                self.asm.store(Rm::Gs(gpr(n)), host::RCX);
                self.asm.lea(sp, Mem::base(sp, 8));
            }
        }
        Ok(())
    }

    pub(super) fn leave(&mut self, inst: &Inst) -> Done {
        let shape = Shape { write: false, size: 8, align: 1, once: false };
        let m = self.check(inst, &Ea::base(RBP, 0), shape, host::RAX)?;
        let bp = HOST[RBP].ok_or(Unsupported)?;
        self.asm.load(host::RCX, Rm::Mem(m));
        self.asm.lea(stack_register(), Mem::base(bp, 8));
        self.asm.mov(bp, host::RCX);
        Ok(())
    }
}
