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
    /// Bytes of what PUSH, POP, CALL and RET move.
    pub(super) fn word(&self) -> i32 {
        if self.narrow { 4 } else { 8 }
    }

    /// MOV r, r/m of a word.
    pub(super) fn load_word(&mut self, r: u8, from: Rm) {
        self.asm.rm(!self.narrow, &[0x8b], r, from);
    }

    /// MOV r/m, r of a word.
    pub(super) fn store_word(&mut self, to: Rm, r: u8) {
        self.asm.rm(!self.narrow, &[0x89], r, to);
    }

    /// Sets the stack pointer to an address.
    pub(super) fn set_stack(&mut self, to: Mem) {
        self.asm.rm(!self.narrow, &[0x8d], stack_register(), Rm::Mem(to));
    }

    /// Checks the word at `disp` from a register for reading; `t` is RAX.
    pub(super) fn check_pop(&mut self, inst: &Inst, n: usize) -> Result<Mem, Unsupported> {
        let shape = Shape { write: false, size: self.word() as u8, align: 1, once: false };
        self.check(inst, &Ea { base: Some(n), narrow: self.narrow, ..Ea::default() }, shape, host::RAX)
    }

    /// Checks the slot below the top of the stack for writing; `t` is RAX.
    pub(super) fn check_push(&mut self, inst: &Inst, once: bool) -> Result<Mem, Unsupported> {
        let shape = Shape { write: true, size: self.word() as u8, align: 1, once };
        let ea = Ea { base: Some(RSP), disp: -self.word(), narrow: self.narrow, ..Ea::default() };
        self.check(inst, &ea, shape, host::RAX)
    }

    /// Stores to the checked slot and moves the stack pointer.
    pub(super) fn store_push(&mut self, slot: Mem, what: Pushed) {
        match what {
            Pushed::Register(r) => self.store_word(Rm::Mem(slot), r),
            Pushed::Constant(v) => {
                self.asm.rm(!self.narrow, &[0xc7], 0, Rm::Mem(slot));
                self.asm.bytes(&v.to_le_bytes());
            }
        }
        self.set_stack(Mem::base(stack_register(), -self.word()));
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
                if i.memory_size().size() != self.word() as usize {
                    return Err(Unsupported);
                }
                let m = self.operand(inst, false, 1, host::RAX)?;
                self.load_word(host::RCX, Rm::Mem(m));
                self.asm.store(Rm::Gs(SPILL), host::RCX);
                let slot = self.check_push(inst, true)?;
                self.asm.load(host::RCX, Rm::Gs(SPILL));
                self.store_push(slot, Pushed::Register(host::RCX));
            }
            _ => {
                let v = i.immediate(0) as i64;
                let v = if self.narrow { v as i32 } else { i32::try_from(v).map_err(|_| Unsupported)? };
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
        let m = self.check_pop(inst, RSP)?;
        let sp = stack_register();
        let up = Mem::base(sp, self.word());
        match HOST[n] {
            Some(h) if h == sp => self.load_word(sp, Rm::Mem(m)),
            Some(h) => {
                self.load_word(h, Rm::Mem(m));
                self.set_stack(up);
            }
            None => {
                self.asm.load(host::RCX, Rm::Mem(m));
                self.asm.store(Rm::Gs(gpr(n)), host::RCX);
                self.set_stack(up);
            }
        }
        Ok(())
    }

    pub(super) fn leave(&mut self, inst: &Inst) -> Done {
        let m = self.check_pop(inst, RBP)?;
        let bp = HOST[RBP].ok_or(Unsupported)?;
        self.load_word(host::RCX, Rm::Mem(m));
        self.set_stack(Mem::base(bp, self.word()));
        self.asm.mov(bp, host::RCX);
        Ok(())
    }
}
